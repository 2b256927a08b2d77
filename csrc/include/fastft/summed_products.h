// Several matrix products with one result, in one main loop:
//
//   y = sum_n a_n b_n^T + bias          a_n [M, K_n], b_n [N, K_n], bias [N], y [M, N]
//
// lora_linear's forward is x W^T + u lora_B^T + bias and its backward dy W + du lora_A (of several layers,
// with a dy W each): what the adapter adds is r more columns of a long sum, and no pass over y of its own.
//
// Sums are kept in float and rounded once. Kernels for sm_90a alone, of CUTLASS's parts; built where its
// headers are found.
#pragma once

#include <cstdint>

#include "fastft/build_info.h"
#include "fastft/cuda_stream.h"
#include "fastft/types.h"

namespace fastft {

constexpr int kSummedProducts = 4;  // at most; query, key, value and what their adapters add

struct SummedProductsArgs {
    struct Term {
        const void* a;  // [M, depth], row stride a_stride, last dimension contiguous
        const void* b;  // [N, depth]: (n, d) at b[n * b_stride + d], or, by_depth, at b[d * b_stride + n]
        int64_t depth, a_stride, b_stride;
    };
    Term terms[kSummedProducts];
    const void* bias;  // [N] or null
    void* y;           // [M, N] out, row stride y_stride, last dimension contiguous
    int64_t M, N, y_stride;
    int count;
    bool by_depth;  // of all terms
    DType dtype;    // BFloat16 or Float16
};

// Depths, N and strides are multiples of kSummedProductsAlignment elements, and addresses of 16 bytes: what
// the tensor memory accelerator can copy.
constexpr int64_t kSummedProductsAlignment = 8;

// Of a block's tile, kSummedProductsRows rows by so many columns. Wide tiles are multiplied faster, by a
// quarter as is assumed here until it has been measured, narrow ones leave fewer of the multiprocessors idle
// in the last round of a small product.
constexpr int64_t kSummedProductsRows = 128;
inline int summed_products_columns(int64_t M, int64_t N, int multiprocessors) {
    const auto rounds = [&](int64_t rows, int64_t columns) {
        const int64_t tiles =
            (M + rows - 1) / rows * (rows / kSummedProductsRows) * ((N + columns - 1) / columns);
        return (tiles + multiprocessors - 1) / multiprocessors;
    };
    // Wide ones come in pairs, one above the other, which read their columns of b once for both.
    const int64_t wide = rounds(2 * kSummedProductsRows, 256), narrow = rounds(kSummedProductsRows, 128);
    return wide * 2 * 4 <= narrow * 5 ? 256 : 128;
}

// The CUTLASS that the kernels were built with; empty in a build without them.
FASTFT_EXPORT const char* cutlass_version();
void summed_products_cuda(const SummedProductsArgs& args, cudaStream_t stream);

}  // namespace fastft
