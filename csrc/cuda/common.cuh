// What the row kernels share: 16-byte loads and stores, reductions over a block, launch checks.
//
// Every kernel gives one block to one row and has no atomics: threads own fixed elements and states are
// merged in a fixed order, so two runs agree bit for bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastft/row_math.h"
#include "fastft/types.h"

namespace fastft {
inline namespace FASTFT_TARGET {

constexpr int kMaxThreads = 512;
constexpr int kWarp = 32;
// Of every kernel. The 1 matters: left to itself ptxas squeezes some kernels into 32 registers so that more
// blocks fit on an SM, and spills (seen on sm_90a). 1024 threads spill too, on sm_120, which wants 72
// registers.
#define FASTFT_ROW_KERNEL __launch_bounds__(kMaxThreads, 1)
// Elements that a thread takes at once: 16 bytes of a 16-bit type, 32 of float.
constexpr int kElements = 8;

// Threads of a block that works on a row of `vocab` elements: short rows would leave threads without a single
// load. A multiple of the warp's size.
inline int threads_for(int64_t vocab) { return vocab >= 4096 ? kMaxThreads : 128; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half* out) { *out = __float2half_rn(x); }

template <class T>
constexpr int kVectors = kElements * static_cast<int>(sizeof(T)) / 16;

// Whether 16-byte accesses may be used from p on, every kElements elements.
__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// x[0, kElements) of a row from `p`, `left` of them inside the row and -inf beyond it: probability 0.
template <class T>
__device__ __forceinline__ void load_elements(const T* p, int64_t left, bool aligned, float (&x)[kElements]) {
    if (aligned && left >= kElements) {
        union {
            uint4 words[kVectors<T>];
            T elements[kElements];
        } u;
#pragma unroll
        for (int i = 0; i < kVectors<T>; ++i) u.words[i] = reinterpret_cast<const uint4*>(p)[i];
#pragma unroll
        for (int k = 0; k < kElements; ++k) x[k] = to_float(u.elements[k]);
    } else {
#pragma unroll
        for (int k = 0; k < kElements; ++k) x[k] = k < left ? to_float(p[k]) : -INFINITY;
    }
}

template <class T>
__device__ __forceinline__ void store_elements(T* p, int64_t left, bool aligned,
                                               const float (&x)[kElements]) {
    if (aligned && left >= kElements) {
        union {
            uint4 words[kVectors<T>];
            T elements[kElements];
        } u;
#pragma unroll
        for (int k = 0; k < kElements; ++k) from_float(x[k], &u.elements[k]);
#pragma unroll
        for (int i = 0; i < kVectors<T>; ++i) reinterpret_cast<uint4*>(p)[i] = u.words[i];
    } else {
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            if (k < left) from_float(x[k], p + k);
        }
    }
}

// f(position, left) for each group of elements that this thread owns in a row of n.
template <class F>
__device__ __forceinline__ void for_elements(int64_t n, F&& f) {
    for (int64_t i = int64_t(threadIdx.x) * kElements; i < n; i += int64_t(blockDim.x) * kElements)
        f(i, n - i);
}

template <class T>
__device__ void fill_row(T* row, int64_t n, float value) {
    const bool aligned = is_aligned(row);
    float x[kElements];
#pragma unroll
    for (int k = 0; k < kElements; ++k) x[k] = value;
    for_elements(n, [&](int64_t i, int64_t left) { store_elements(row + i, left, aligned, x); });
}

template <class State>
__device__ __forceinline__ State shuffle_down(const State& state, int offset) {
    static_assert(sizeof(State) % 4 == 0, "shuffled in 32-bit words");
    constexpr int n = sizeof(State) / 4;
    union {
        State state;
        uint32_t words[n];
    } from{state}, to{state};
#pragma unroll
    for (int i = 0; i < n; ++i) to.words[i] = __shfl_down_sync(0xffffffffu, from.words[i], offset);
    return to.state;
}

// Merges the states of a block's threads, in the order of their warps, and returns the result to all of them.
// `identity` is a state that merging leaves without effect. blockDim.x is a multiple of the warp's size.
template <class State, class Merge>
__device__ State block_reduce(State state, const State& identity, Merge&& merge) {
    __shared__ State partial[kMaxThreads / kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) merge(state, shuffle_down(state, offset));
    __syncthreads();  // an earlier reduction of the same type may still be read
    if (lane == 0) partial[warp] = state;
    __syncthreads();
    if (warp == 0) {
        state = lane < static_cast<int>(blockDim.x) / kWarp ? partial[lane] : identity;
        for (int offset = kWarp / 2; offset > 0; offset /= 2) merge(state, shuffle_down(state, offset));
        if (lane == 0) partial[0] = state;
    }
    __syncthreads();
    return partial[0];
}

template <class Number>
__device__ Number block_sum(Number x) {
    return block_reduce(x, Number(0), [](Number& a, const Number& b) { a += b; });
}

// max x and log2 sum exp2(c * (x - max)) over a row, the same in all threads of the block.
template <class T>
__device__ RowStats<float> softmax_stats(const T* row, int64_t vocab, bool aligned, float c) {
    SoftmaxState<float> state, identity;
    state.init();
    identity.init();
    for_elements(vocab, [&](int64_t i, int64_t left) {
        float x[kElements];
        load_elements(row + i, left, aligned, x);
        state.update(x, c);
    });
    return stats(block_reduce(state, identity,
                              [c](SoftmaxState<float>& a, const SoftmaxState<float>& b) { merge(a, b, c); }));
}

inline void check_launch(const char* kernel, int64_t rows, int64_t vocab) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(kernel) + " with rows=" + std::to_string(rows) +
                                 " vocab=" + std::to_string(vocab) + ": " + cudaGetErrorString(error));
    }
}

inline unsigned grid_of(const char* kernel, int64_t rows) {
    if (rows > INT32_MAX) throw std::runtime_error(std::string(kernel) + ": more than 2^31 - 1 rows");
    return static_cast<unsigned>(rows);
}

// f(T{}) with the element type of a runtime dtype; the one place where dtypes become template arguments.
template <class F>
void dispatch_dtype(const char* kernel, DType dtype, F&& f) {
    switch (dtype) {
        case DType::Float32:
            return f(float{});
        case DType::BFloat16:
            return f(__nv_bfloat16{});
        case DType::Float16:
            return f(__half{});
        case DType::Float64:
            break;
    }
    throw std::runtime_error(std::string(kernel) +
                             ": float64 is a CPU dtype; use float32, bfloat16 or float16");
}

}  // namespace FASTFT_TARGET

// Each kernel file reports its kernels here (device.cu collects them).
struct KernelEntry {
    const char* name;
    const void* function;  // the bfloat16 instance
    int threads;           // for a vocabulary of 50272
    int dynamic_shared_bytes = 0;
};
KernelEntry log_softmax_kl_entry();
KernelEntry log_softmax_kl_backward_entry();
KernelEntry topk_kl_entry();
KernelEntry cross_entropy_entry();
KernelEntry lora_down_entry();
KernelEntry lora_outer_entry();
KernelEntry lora_combine_entry();
KernelEntry lora_up_entry();
KernelEntry row_reduce_entry();
KernelEntry adamw_norm_entry();
KernelEntry adamw_update_entry();
KernelEntry adamw_update_8bit_entry();

}  // namespace fastft
