// Kernels over elements that lie in a row: a thread has kElements neighbours.
#pragma once

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {

constexpr int kElementThreads = 256;

// The elements of one thread: where they begin, and how many of them there are.
struct Part {
    int64_t begin;
    int left;

    __device__ __forceinline__ explicit Part(int64_t count)
        : begin((int64_t(blockIdx.x) * kElementThreads + threadIdx.x) * kElements),
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

// A kernel over args.count elements.
template <class Kernel, class Args>
void launch_elements(const char* name, Kernel kernel, const Args& args, cudaStream_t stream) {
    constexpr int64_t kOfABlock = int64_t(kElementThreads) * kElements;
    const unsigned grid = grid_of(name, (args.count + kOfABlock - 1) / kOfABlock);
    check_launch(name, launch_kernel(kernel, grid, kElementThreads, 0, 1, stream, args), 1, args.count);
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
