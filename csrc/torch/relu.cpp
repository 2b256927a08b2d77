// relu: unpacks tensors, allocates the mask and calls the kernels.
#include "fastft/relu.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {
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
        cpu_capability();  // an error of its environment variable must not leave a worker thread
        parallel_elements(args, relu_cpu);
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
        cpu_capability();  // an error of its environment variable must not leave a worker thread
        parallel_elements(args, relu_backward_cpu);
    }
    return dx;
}

}  // namespace fastft
