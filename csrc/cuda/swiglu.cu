// swiglu on CUDA: bound by the bytes it moves; a thread has kElements neighbours.
//
// At 4300 GB/s (H200) Llama-3-8B's [2048, 14336] in 16 bits takes 41 us forward and 68 us backward.
#include "fastft/swiglu.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kThreads = 256;

// The elements of one thread: where they begin, and how many of them there are.
struct Part {
    int64_t begin;
    int left;

    __device__ __forceinline__ explicit Part(int64_t count)
        : begin((int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElements),
          left(static_cast<int>(min(count - begin, int64_t(kElements)))) {}

    template <class T>
    __device__ __forceinline__ void load(const void* from, float (&x)[kElements]) const {
        const T* p = static_cast<const T*>(from) + begin;
        load_elements(p, left, is_aligned(p), x);
    }
    template <class T>
    __device__ __forceinline__ void store(void* to, const float (&x)[kElements]) const {
        T* p = static_cast<T*>(to) + begin;
        store_elements(p, left, is_aligned(p), x);
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluArgs args) {
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
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(SwigluBackwardArgs args) {
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

template <class Kernel, class Args>
void launch(const char* name, Kernel kernel, const Args& args, cudaStream_t stream) {
    constexpr int64_t kOfABlock = int64_t(kThreads) * kElements;
    const unsigned grid = grid_of(name, (args.count + kOfABlock - 1) / kOfABlock);
    check_launch(name, launch_kernel(kernel, grid, kThreads, 0, 1, stream, args), 1, args.count);
}

}  // namespace
}  // namespace FASTFT_TARGET

void swiglu_cuda(const SwigluArgs& args, cudaStream_t stream) {
    constexpr const char* name = "swiglu_kernel";
    if (args.count == 0) return;
    dispatch_dtype(name, args.dtype,
                   [&](auto element) { launch(name, &swiglu_kernel<decltype(element)>, args, stream); });
}

void swiglu_backward_cuda(const SwigluBackwardArgs& args, cudaStream_t stream) {
    constexpr const char* name = "swiglu_backward_kernel";
    if (args.count == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        launch(name, &swiglu_backward_kernel<decltype(element)>, args, stream);
    });
}

KernelEntry swiglu_entry() {
    return {"swiglu", reinterpret_cast<const void*>(&swiglu_kernel<__nv_bfloat16>), plain_launch(kThreads)};
}
KernelEntry swiglu_backward_entry() {
    return {"swiglu_backward", reinterpret_cast<const void*>(&swiglu_backward_kernel<__nv_bfloat16>),
            plain_launch(kThreads)};
}

}  // namespace fastft
