// summed_products: unpacks tensors and calls the kernel.
#include "fastft/summed_products.h"

#include <vector>

#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

// A dimension's stride, but of one that has a single element the least that the kernel takes.
int64_t row_stride(const Tensor& x, int64_t row, int64_t column) {
    return x.size(row) > 1 ? x.stride(row)
                           : (x.size(column) + kSummedProductsAlignment - 1) / kSummedProductsAlignment *
                                 kSummedProductsAlignment;
}

bool is_aligned(const Tensor& x, int64_t row, int64_t column) {
    return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
           row_stride(x, row, column) % kSummedProductsAlignment == 0;
}

// x, or a copy of it with the same order of dimensions: a slice may begin anywhere.
Tensor aligned(const Tensor& x, int64_t row, int64_t column) {
    if (is_aligned(x, row, column)) return x;
    if (row == 0) return torch::stable::clone(x);
    return torch::stable::transpose(torch::stable::clone(torch::stable::transpose(x, 0, 1)), 0, 1);
}

}  // namespace

void summed_products(std::vector<Tensor> a, std::vector<Tensor> b, std::optional<Tensor> bias, Tensor y) {
    check(!a.empty() && a.size() <= kSummedProducts && a.size() == b.size(),
          "summed_products: a and b must have one to four matrices each");
    check_rows(y, "summed_products: y must be [M, N] with contiguous rows");
    SummedProductsArgs args{};
    args.dtype = dtype_of(y);
    check(args.dtype == DType::BFloat16 || args.dtype == DType::Float16,
          "summed_products: y must be bfloat16 or float16");
    args.y = y.data_ptr();
    args.M = y.size(0);
    args.N = y.size(1);
    args.y_stride = row_stride(y, 0, 1);
    args.by_depth = b[0].dim() == 2 && b[0].stride(1) != 1;
    args.count = static_cast<int>(a.size());
    check(
        args.N % kSummedProductsAlignment == 0 && is_aligned(y, 0, 1),
        "summed_products: y must have a multiple of 8 columns and rows that begin at multiples of 16 bytes");
    for (size_t n = 0; n < a.size(); ++n) {
        check_rows(a[n], "summed_products: each of a must be [M, depth] with contiguous rows");
        check(b[n].dim() == 2 && b[n].stride(args.by_depth ? 0 : 1) == 1,
              "summed_products: all of b must be [N, depth] and contiguous along the same dimension");
        check(a[n].size(0) == args.M && b[n].size(0) == args.N && a[n].size(1) == b[n].size(1),
              "summed_products: a must be [M, depth], b [N, depth] and y [M, N]");
        check(a[n].scalar_type() == y.scalar_type() && b[n].scalar_type() == y.scalar_type(),
              "summed_products: a and b must have the dtype of y");
        check(a[n].size(1) > 0 && a[n].size(1) % kSummedProductsAlignment == 0,
              "summed_products: depths must be multiples of 8");
        const int64_t row = args.by_depth ? 1 : 0, column = 1 - row;
        a[n] = aligned(a[n], 0, 1);
        b[n] = aligned(b[n], row, column);
        args.terms[n] = {a[n].data_ptr(), b[n].data_ptr(), a[n].size(1), row_stride(a[n], 0, 1),
                         row_stride(b[n], row, column)};
    }
    if (bias) {
        check_vector(*bias, args.N, y.scalar_type(), "summed_products: bias must be [N] with the dtype of y");
        if (reinterpret_cast<uintptr_t>(bias->data_ptr()) % 16 != 0) bias = torch::stable::clone(*bias);
        args.bias = bias->data_ptr();
    }
    DeviceGuard guard(y);
    summed_products_cuda(args, current_stream(y));
}

}  // namespace fastft
