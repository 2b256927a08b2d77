// swiglu on CUDA: bound by the bytes it moves; a thread has kElements neighbours.
//
// At 4300 GB/s (H200) Llama-3-8B's [2048, 14336] in 16 bits takes 41 us forward and 68 us backward.
#include "fastft/swiglu.h"

#include "elements.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

template <class T>
__global__ void __launch_bounds__(kElementThreads) swiglu_kernel(SwigluArgs args) {
    const Part part(args.count);
    if (part.left <= 0) return;
    float gate[kElements], up[kElements];
    part.load<T>(args.gate, gate);
    part.load<T>(args.up, up);
#pragma unroll
    for (int k = 0; k < kElements; ++k) gate[k] = swiglu_value(gate[k], up[k]);
    part.store<T>(args.y, gate);
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) swiglu_backward_kernel(SwigluBackwardArgs args) {
    const Part part(args.count);
    if (part.left <= 0) return;
    float dy[kElements], gate[kElements], up[kElements];
    part.load<T>(args.dy, dy);
    part.load<T>(args.gate, gate);
    part.load<T>(args.up, up);
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
        const SwigluGradient<float> gradient(dy[k], gate[k], up[k]);
        gate[k] = gradient.gate;
        up[k] = gradient.up;
    }
    part.store<T>(args.dgate, gate);
    part.store<T>(args.dup, up);
}

}  // namespace
}  // namespace FASTFT_TARGET

void swiglu_cuda(const SwigluArgs& args, cudaStream_t stream) {
    constexpr const char* name = "swiglu_kernel";
    if (args.count == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        launch_elements(name, &swiglu_kernel<decltype(element)>, args, stream);
    });
}

void swiglu_backward_cuda(const SwigluBackwardArgs& args, cudaStream_t stream) {
    constexpr const char* name = "swiglu_backward_kernel";
    if (args.count == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        launch_elements(name, &swiglu_backward_kernel<decltype(element)>, args, stream);
    });
}

KernelEntry swiglu_entry() {
    return {"swiglu", reinterpret_cast<const void*>(&swiglu_kernel<__nv_bfloat16>),
            plain_launch(kElementThreads)};
}
KernelEntry swiglu_backward_entry() {
    return {"swiglu_backward", reinterpret_cast<const void*>(&swiglu_backward_kernel<__nv_bfloat16>),
            plain_launch(kElementThreads)};
}

}  // namespace fastft
