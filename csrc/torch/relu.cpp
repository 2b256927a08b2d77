// relu: unpacks tensors, allocates the mask and calls the kernels.
#include "fastft/relu.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

// kernel(args, begin, end) over the elements; a thread takes whole bytes of the mask.
template <class Args, class Kernel>
void run_cpu(const Args& args, Kernel kernel) {
    cpu_capability();  // an error of its environment variable must not leave a worker thread
    constexpr int64_t kUnit = 4096;
    parallel_rows((args.count + kUnit - 1) / kUnit, kUnit, [&](int64_t b, int64_t e) {
        kernel(args, b * kUnit, e * kUnit < args.count ? e * kUnit : args.count);
    });
}

}  // namespace

std::tuple<Tensor, Tensor> relu(const Tensor& x) {
    check(x.is_contiguous(), "relu: x must be contiguous");
    ReluArgs args{};
    args.dtype = dtype_of(x);
    args.count = x.numel();
    Tensor y = torch::stable::empty_like(x);
    Tensor mask = torch::stable::new_empty(x, {(args.count + 7) / 8}, ScalarType::Byte);
    args.x = x.data_ptr();
    args.y = y.data_ptr();
    args.mask = static_cast<uint8_t*>(mask.data_ptr());
    if (x.is_cuda()) {
        DeviceGuard guard(x);
        relu_cuda(args, current_stream(x));
    } else {
        run_cpu(args, relu_cpu);
    }
    return {y, mask};
}

Tensor relu_backward(const Tensor& grad, const Tensor& mask) {
    check(grad.is_contiguous(), "relu_backward: grad must be contiguous");
    ReluBackwardArgs args{};
    args.dtype = dtype_of(grad);
    args.count = grad.numel();
    check_vector(mask, (args.count + 7) / 8, ScalarType::Byte,
                 "relu_backward: mask must be uint8 with a bit for each element of grad");
    check(mask.is_cuda() == grad.is_cuda(), "relu_backward: mask must be on grad's device");
    Tensor dx = torch::stable::empty_like(grad);
    args.dy = grad.data_ptr();
    args.mask = static_cast<const uint8_t*>(mask.data_ptr());
    args.dx = dx.data_ptr();
    if (grad.is_cuda()) {
        DeviceGuard guard(grad);
        relu_backward_cuda(args, current_stream(grad));
    } else {
        run_cpu(args, relu_backward_cpu);
    }
    return dx;
}

}  // namespace fastft
