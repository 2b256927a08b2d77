// rms_norm: unpacks tensors, allocates the results and calls the kernels.
#include "fastft/rms_norm.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

template <class Args>
void set_sizes(Args& args, const Tensor& x, const Tensor& weight) {
    check(x.dim() > 0 && x.is_contiguous(), "rms_norm: x must be [..., width], contiguous");
    args.width = x.size(x.dim() - 1);
    args.dtype = dtype_of(x);
    args.weight_dtype = dtype_of(weight);
    check(args.width > 0, "rms_norm: x must have a width of at least 1");
    args.rows = x.numel() / args.width;
    check(weight.dim() == 1 && weight.size(0) == args.width && weight.is_contiguous(),
          "rms_norm: weight must be [width] like x, contiguous");
    const bool narrow = args.dtype == DType::BFloat16 || args.dtype == DType::Float16;
    check(args.weight_dtype == args.dtype || (narrow && args.weight_dtype == DType::Float32),
          "rms_norm: weight must be of x's dtype, or float32 beside an x of 16 bits");
    check(weight.is_cuda() == x.is_cuda(), "rms_norm: weight must be on x's device");
    args.x = x.data_ptr();
    args.weight = weight.data_ptr();
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    RmsNormArgs args{};
    set_sizes(args, x, weight);
    Tensor y = torch::stable::new_empty(x, x.sizes(), weight.scalar_type());
    Tensor rstd =
        torch::stable::new_empty(x, x.sizes().slice(0, x.sizes().size() - 1), accumulate_type(args.dtype));
    args.y = y.data_ptr();
    args.rstd = rstd.data_ptr();
    args.eps = eps;
    if (x.is_cuda()) {
        DeviceGuard guard(x);
        rms_norm_cuda(args, current_stream(x));
    } else {
        cpu_capability();  // an error of its environment variable must not leave a worker thread
        parallel_light_rows(args.rows, args.width, [&](int64_t b, int64_t e) { rms_norm_cpu(args, b, e); });
    }
    return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, bool weight_grad) {
    RmsNormBackwardArgs args{};
    set_sizes(args, x, weight);
    check(grad.sizes().equals(x.sizes()) && grad.is_contiguous() &&
              grad.scalar_type() == weight.scalar_type() && grad.is_cuda() == x.is_cuda(),
          "rms_norm_backward: grad must be of x's shape, contiguous, of weight's dtype");
    const ScalarType accumulate = accumulate_type(args.dtype);
    check(rstd.numel() == args.rows && rstd.scalar_type() == accumulate && rstd.is_contiguous() &&
              rstd.is_cuda() == x.is_cuda(),
          "rms_norm_backward: rstd must be as rms_norm returns it");
    const int64_t chunks = rms_norm_chunks(args.rows);
    Tensor dx = torch::stable::empty_like(x);
    Tensor dweight = torch::stable::new_empty(weight, {weight_grad ? args.width : 0});
    Tensor partials = torch::stable::new_empty(x, {weight_grad ? chunks : 0, args.width}, accumulate);
    args.dy = grad.data_ptr();
    args.rstd = rstd.data_ptr();
    args.dx = dx.data_ptr();
    if (weight_grad) {
        args.partials = partials.data_ptr();
        args.dweight = dweight.data_ptr();
    }
    if (x.is_cuda()) {
        DeviceGuard guard(x);
        rms_norm_backward_cuda(args, current_stream(x));
        return {dx, dweight};
    }
    cpu_capability();
    parallel_light_rows(chunks, rms_norm_chunk_rows(args.rows) * args.width,
                        [&](int64_t b, int64_t e) { rms_norm_backward_cpu(args, b, e); });
    if (weight_grad) {
        constexpr int64_t kUnit = 64;  // columns; no two threads write to one cache line
        parallel_light_rows(
            (args.width + kUnit - 1) / kUnit, kUnit * (chunks + 1), [&](int64_t b, int64_t e) {
                rms_norm_dweight_cpu(args, b * kUnit, e * kUnit < args.width ? e * kUnit : args.width);
            });
    }
    return {dx, dweight};
}

}  // namespace fastft
