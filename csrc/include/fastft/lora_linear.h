// lora_linear: the products of a LoRA layer with its two small matrices. The frozen product goes to the
// vendor's library; these three add what the adapter needs around it. r is small (4 to 256), M, K and N are
// not:
//
//   lora_down   u = scaling * x a^T      x [M, K], a [r, K]: x lora_A^T in forward, dy lora_B in backward
//   lora_up     y += u b^T               u [M, r], b [N, r]: u lora_B^T in forward, du lora_A in backward
//   lora_outer  g = u^T y                u [M, r], y [M, N]: the gradients of both small matrices
//
//   lora_down_outer   u' = scaling * y a^T and g = y^T u for one y: dy lora_B and the gradient of lora_B
//
// Each reads its large operand once, where it lies (lora_down and lora_outer on CUDA once for each 64 of r).
// Sums are kept in float (double for double) and rounded once; on CPUs with bf16 products, pairs of bfloat16
// products are added without rounding in between. The order of additions depends on the sizes alone, so
// results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/small_matrix.h"
#include "fastft/types.h"

namespace fastft {

struct LoraDownArgs {
    const void* x;   // [M, K], row stride x_stride, last dimension contiguous
    SmallMatrix a;   // [r, K]
    void* u;         // [M, r] out, row stride u_stride
    void* packed_a;  // CPU scratch, lora_packed_bytes(dtype, r, K)
    void* scratch;   // CUDA, lora_plan(*this).scratch_size() float
    int64_t M, K, r, x_stride, u_stride;
    double scaling;
    DType dtype;
};

struct LoraUpArgs {
    void* y;         // [M, N] in and out, row stride y_stride, last dimension contiguous
    const void* u;   // [M, r], row stride u_stride
    SmallMatrix b;   // [N, r]
    void* packed_b;  // CPU scratch, lora_packed_bytes(dtype, r, N)
    int64_t M, N, r, y_stride, u_stride;
    DType dtype;
};

struct LoraOuterArgs {
    const void* u;   // [M, r], row stride u_stride
    const void* y;   // [M, N], row stride y_stride, last dimension contiguous
    SmallMatrix g;   // [r, N] out
    void* packed_u;  // CPU scratch, lora_packed_bytes(dtype, r, M)
    void* sums;      // CPU scratch, lora_packed_bytes(dtype, r, N)
    void* scratch;   // CUDA, lora_plan(*this).scratch_size() float
    int64_t M, N, r, y_stride, u_stride;
    DType dtype;
};

struct LoraDownOuterArgs {
    const void* y;  // [M, N], row stride y_stride, last dimension contiguous
    SmallMatrix a;  // [r, N]
    void* du;       // [M, r] out, row stride du_stride
    const void* u;  // [M, r], row stride u_stride
    void* g;        // [N, r] out, contiguous
    void* scratch;  // CUDA, lora_down_outer_plan(*this).scratch_size() float
    int64_t M, N, r, y_stride, du_stride, u_stride;
    double scaling;
    DType dtype;
};

// The two halves of it, as far as they say what is computed.
inline LoraDownArgs down_part(const LoraDownOuterArgs& args) {
    LoraDownArgs part{};
    part.x = args.y, part.a = args.a, part.u = args.du, part.scratch = args.scratch;
    part.M = args.M, part.K = args.N, part.r = args.r;
    part.x_stride = args.y_stride, part.u_stride = args.du_stride;
    part.scaling = args.scaling, part.dtype = args.dtype;
    return part;
}
inline LoraOuterArgs outer_part(const LoraDownOuterArgs& args) {
    LoraOuterArgs part{};
    part.u = args.u, part.y = args.y, part.g = {args.g, 1, args.r}, part.scratch = args.scratch;
    part.M = args.M, part.N = args.N, part.r = args.r;
    part.y_stride = args.y_stride, part.u_stride = args.u_stride, part.dtype = args.dtype;
    return part;
}

// Enough for the packed form of a small matrix with sides r and `length`, in every CPU capability.
inline int64_t lora_packed_bytes(DType dtype, int64_t r, int64_t length) {
    const int64_t r_padded = (r + 15) / 16 * 16, padded = (length + 63) / 64 * 64;
    return r_padded * padded * (dtype == DType::Float64 ? 8 : 4);
}

// Each kernel first brings its small matrix into the order in which it is read: *_pack over a range of the
// long dimension (K, N; M for u), then the work itself over rows [begin, end), or for lora_outer over units
// of kLoraColumns columns.
constexpr int64_t kLoraColumns = 64;
void lora_down_pack_cpu(const LoraDownArgs& args, int64_t begin, int64_t end);    // pairs of K
void lora_down_cpu(const LoraDownArgs& args, int64_t begin, int64_t end);         // rows
void lora_up_pack_cpu(const LoraUpArgs& args, int64_t begin, int64_t end);        // units of columns
void lora_up_cpu(const LoraUpArgs& args, int64_t begin, int64_t end);             // rows
void lora_outer_pack_cpu(const LoraOuterArgs& args, int64_t begin, int64_t end);  // pairs of M
void lora_outer_cpu(const LoraOuterArgs& args, int64_t begin, int64_t end);       // units of columns

void lora_down_cuda(const LoraDownArgs& args, cudaStream_t stream);
void lora_up_cuda(const LoraUpArgs& args, cudaStream_t stream);
void lora_outer_cuda(const LoraOuterArgs& args, cudaStream_t stream);
void lora_down_outer_cuda(const LoraDownOuterArgs& args, cudaStream_t stream);

}  // namespace fastft
