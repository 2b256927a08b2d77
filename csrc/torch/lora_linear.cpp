// lora_linear: unpacks tensors, allocates packed forms and scratch and calls the kernels.
#include "fastft/lora_linear.h"

#include <memory>

#include "fastft/cpu_capability.h"
#include "fastft/lora_tiles.h"
#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

SmallMatrix small_matrix(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

// A small matrix's packed form; plain memory, since a tensor would cost more than it takes to fill one.
std::unique_ptr<char[]> packed(DType dtype, int64_t r, int64_t length) {
    return std::unique_ptr<char[]>(new char[static_cast<size_t>(lora_packed_bytes(dtype, r, length))]);
}

// Of the kind that args' kernels on CUDA need; like every tensor freed here, it goes back to the allocator
// for this stream, behind the launches.
template <class Args>
Tensor scratch_of(const Tensor& like, const Args& args) {
    return torch::stable::new_empty(like, {lora_plan(args).scratch_size()}, ScalarType::Float);
}

// f(begin, end) over [0, n) where each step costs `work` multiplications.
template <class F>
void parallel_work(int64_t n, int64_t work, const F& f) {
    torch::stable::parallel_for(0, n, 1 + 65536 / (work > 0 ? work : 1), f);
}

int64_t pairs(int64_t n) { return (n + 1) / 2; }
int64_t column_units(int64_t n) { return (n + kLoraColumns - 1) / kLoraColumns; }

}  // namespace

void lora_down(const Tensor& x, const Tensor& a, double scaling, Tensor u) {
    check_rows(x, "lora_down: x must be [M, K] with contiguous rows");
    check_rows(u, "lora_down: u must be [M, r] with contiguous rows");
    check(a.dim() == 2 && a.size(1) == x.size(1), "lora_down: a must be [r, K] like x");
    check(u.size(0) == x.size(0) && u.size(1) == a.size(0), "lora_down: u must be [M, r] like x and a");
    check(a.scalar_type() == x.scalar_type() && u.scalar_type() == x.scalar_type(),
          "lora_down: a and u must have the dtype of x");
    LoraDownArgs args{};
    args.dtype = dtype_of(x);
    args.x = x.data_ptr();
    args.a = small_matrix(a);
    args.u = u.data_ptr();
    args.M = x.size(0);
    args.K = x.size(1);
    args.r = a.size(0);
    args.x_stride = x.stride(0);
    args.u_stride = u.stride(0);
    args.scaling = scaling;
    if (x.is_cuda()) {
        DeviceGuard guard(x);
        const Tensor scratch = scratch_of(x, args);
        args.scratch = scratch.data_ptr();
        lora_down_cuda(args, current_stream(x));
        return;
    }
    cpu_capability();  // an error of its environment variable must not leave a worker thread
    const auto scratch = packed(args.dtype, args.r, args.K);
    args.packed_a = scratch.get();
    parallel_work(pairs(args.K), 8 * args.r, [&](int64_t b, int64_t e) { lora_down_pack_cpu(args, b, e); });
    parallel_work(args.M, args.K * args.r, [&](int64_t b, int64_t e) { lora_down_cpu(args, b, e); });
}

void lora_up(Tensor y, const Tensor& u, const Tensor& b) {
    check_rows(y, "lora_up: y must be [M, N] with contiguous rows");
    check_rows(u, "lora_up: u must be [M, r] with contiguous rows");
    check(u.size(0) == y.size(0), "lora_up: u must be [M, r] like y");
    check(b.dim() == 2 && b.size(0) == y.size(1) && b.size(1) == u.size(1),
          "lora_up: b must be [N, r] like y, u");
    check(u.scalar_type() == y.scalar_type() && b.scalar_type() == y.scalar_type(),
          "lora_up: u and b must have the dtype of y");
    LoraUpArgs args{};
    args.dtype = dtype_of(y);
    args.y = y.data_ptr();
    args.u = u.data_ptr();
    args.b = small_matrix(b);
    args.M = y.size(0);
    args.N = y.size(1);
    args.r = u.size(1);
    args.y_stride = y.stride(0);
    args.u_stride = u.stride(0);
    if (y.is_cuda()) {
        DeviceGuard guard(y);
        lora_up_cuda(args, current_stream(y));
        return;
    }
    cpu_capability();
    const auto packed_b = packed(args.dtype, args.r, args.N);
    args.packed_b = packed_b.get();
    parallel_work(column_units(args.N), 4 * kLoraColumns * args.r,
                  [&](int64_t begin, int64_t end) { lora_up_pack_cpu(args, begin, end); });
    parallel_work(args.M, args.N * args.r,
                  [&](int64_t begin, int64_t end) { lora_up_cpu(args, begin, end); });
}

Tensor lora_outer(const Tensor& u, const Tensor& y, bool transposed) {
    check_rows(y, "lora_outer: y must be [M, N] with contiguous rows");
    check_rows(u, "lora_outer: u must be [M, r] with contiguous rows");
    check(u.size(0) == y.size(0), "lora_outer: u must be [M, r] like y");
    check(u.scalar_type() == y.scalar_type(), "lora_outer: u must have the dtype of y");
    LoraOuterArgs args{};
    args.dtype = dtype_of(y);
    args.u = u.data_ptr();
    args.y = y.data_ptr();
    args.M = y.size(0);
    args.N = y.size(1);
    args.r = u.size(1);
    args.y_stride = y.stride(0);
    args.u_stride = u.stride(0);
    Tensor g = transposed ? torch::stable::new_empty(y, {args.N, args.r})
                          : torch::stable::new_empty(y, {args.r, args.N});
    args.g = small_matrix(g);
    if (transposed) args.g = {g.data_ptr(), 1, args.r};
    if (y.is_cuda()) {
        DeviceGuard guard(y);
        const Tensor scratch = scratch_of(y, args);
        args.scratch = scratch.data_ptr();
        lora_outer_cuda(args, current_stream(y));
        return g;
    }
    cpu_capability();
    const auto packed_u = packed(args.dtype, args.r, args.M);
    const auto sums = packed(args.dtype, args.r, args.N);
    args.packed_u = packed_u.get();
    args.sums = sums.get();
    parallel_work(pairs(args.M), 8 * args.r,
                  [&](int64_t begin, int64_t end) { lora_outer_pack_cpu(args, begin, end); });
    parallel_work(column_units(args.N), args.M * args.r * kLoraColumns,
                  [&](int64_t begin, int64_t end) { lora_outer_cpu(args, begin, end); });
    return g;
}

Tensor lora_down_outer(const Tensor& y, const Tensor& a, double scaling, Tensor du, const Tensor& u) {
    if (!y.is_cuda()) {  // y of a layer is in the cache behind the first: one pass for both would win nothing
        lora_down(y, a, scaling, du);
        return lora_outer(u, y, true);
    }
    check_rows(y, "lora_down_outer: y must be [M, N] with contiguous rows");
    check_rows(du, "lora_down_outer: du must be [M, r] with contiguous rows");
    check_rows(u, "lora_down_outer: u must be [M, r] with contiguous rows");
    check(a.dim() == 2 && a.size(1) == y.size(1), "lora_down_outer: a must be [r, N] like y");
    for (const Tensor* t : {static_cast<const Tensor*>(&du), &u}) {
        check(t->size(0) == y.size(0) && t->size(1) == a.size(0),
              "lora_down_outer: du and u must be [M, r] like y and a");
    }
    for (const Tensor* t : {&a, static_cast<const Tensor*>(&du), &u}) {
        check(t->scalar_type() == y.scalar_type(), "lora_down_outer: a, du and u must have the dtype of y");
    }
    LoraDownOuterArgs args{};
    args.dtype = dtype_of(y);
    args.y = y.data_ptr();
    args.a = small_matrix(a);
    args.du = du.data_ptr();
    args.u = u.data_ptr();
    args.M = y.size(0);
    args.N = y.size(1);
    args.r = a.size(0);
    args.y_stride = y.stride(0);
    args.du_stride = du.stride(0);
    args.u_stride = u.stride(0);
    args.scaling = scaling;
    Tensor g = torch::stable::new_empty(y, {args.N, args.r});
    args.g = g.data_ptr();
    DeviceGuard guard(y);
    const Tensor scratch =
        torch::stable::new_empty(y, {lora_down_outer_plan(args).scratch_size()}, ScalarType::Float);
    args.scratch = scratch.data_ptr();
    lora_down_outer_cuda(args, current_stream(y));
    return g;
}

}  // namespace fastft
