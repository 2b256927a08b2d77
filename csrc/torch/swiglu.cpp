// swiglu: unpacks tensors, allocates the results and calls the kernels.
#include "fastft/swiglu.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

void check_same(const Tensor& x, const Tensor& like, const char* message) {
    check(x.is_contiguous() && x.numel() == like.numel() && x.scalar_type() == like.scalar_type() &&
              x.is_cuda() == like.is_cuda(),
          message);
}

}  // namespace

Tensor swiglu(const Tensor& gate, const Tensor& up) {
    check(gate.is_contiguous(), "swiglu: gate must be contiguous");
    check_same(up, gate, "swiglu: up must be contiguous and of gate's shape, dtype and device");
    Tensor y = torch::stable::empty_like(gate);
    SwigluArgs args{};
    args.gate = gate.data_ptr();
    args.up = up.data_ptr();
    args.y = y.data_ptr();
    args.count = gate.numel();
    args.dtype = dtype_of(gate);
    if (gate.is_cuda()) {
        DeviceGuard guard(gate);
        swiglu_cuda(args, current_stream(gate));
    } else {
        cpu_capability();  // an error of its environment variable must not leave a worker thread
        parallel_elements(args, swiglu_cpu);
    }
    return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
    check(gate.is_contiguous(), "swiglu_backward: gate must be contiguous");
    check_same(up, gate, "swiglu_backward: up must be contiguous and of gate's shape, dtype and device");
    check_same(grad, gate, "swiglu_backward: grad must be contiguous and of gate's shape, dtype and device");
    Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(up);
    SwigluBackwardArgs args{};
    args.dy = grad.data_ptr();
    args.gate = gate.data_ptr();
    args.up = up.data_ptr();
    args.dgate = dgate.data_ptr();
    args.dup = dup.data_ptr();
    args.count = gate.numel();
    args.dtype = dtype_of(gate);
    if (gate.is_cuda()) {
        DeviceGuard guard(gate);
        swiglu_backward_cuda(args, current_stream(gate));
    } else {
        cpu_capability();  // an error of its environment variable must not leave a worker thread
        parallel_elements(args, swiglu_backward_cpu);
    }
    return {dgate, dup};
}

}  // namespace fastft
