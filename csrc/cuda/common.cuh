// What the row kernels share: 16-byte loads and stores, sums over a block, launches and their checks.
//
// No row kernel has atomics: threads own fixed elements and states are merged in a fixed order, so two runs
// agree bit for bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastft/row_launch.h"
#include "fastft/row_math.h"
#include "fastft/types.h"

namespace fastft {

// Of the current device.
RowLimits current_row_limits();

inline namespace FASTFT_TARGET {

// Of every kernel: 64 registers for each of 1024 threads on a multiprocessor, so that four blocks of 256 fit.
// On sm_120 some kernels want two more than that, and spill; there the bound is 128.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define FASTFT_ROW_KERNEL __launch_bounds__(kMaxThreads, 1)
#else
#define FASTFT_ROW_KERNEL __launch_bounds__(kMaxThreads, 2)
#endif

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

// The elements in 16 bytes. A bfloat16 is the upper half of a float; its conversion function takes an
// instruction more.
__device__ __forceinline__ void unpack(const uint4& v, const float*, float* x) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(words[i]);
}
__device__ __forceinline__ void unpack(const uint4& v, const __nv_bfloat16*, float* x) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void unpack(const uint4& v, const __half*, float* x) {
    union {
        uint4 words;
        __half elements[8];
    } u{v};
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(u.elements[i]);
}

// x[0, kElements) of a row from `p`, `left` of them inside the row and -inf beyond it: probability 0.
template <class T>
__device__ __forceinline__ void load_elements(const T* p, int left, bool aligned, float (&x)[kElements]) {
    if (aligned && left >= kElements) {
#pragma unroll
        for (int i = 0; i < kVectors<T>; ++i)
            unpack(reinterpret_cast<const uint4*>(p)[i], p, x + i * (kElements / kVectors<T>));
    } else {
#pragma unroll
        for (int k = 0; k < kElements; ++k) x[k] = k < left ? to_float(p[k]) : -INFINITY;
    }
}

template <class T>
__device__ __forceinline__ void store_elements(T* p, int left, bool aligned, const float (&x)[kElements]) {
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

// f(position) for each group of kElements elements that this thread owns of n.
template <class F>
__device__ __forceinline__ void for_elements(int n, F&& f) {
    const int step = static_cast<int>(blockDim.x) * kElements;
    for (int i = static_cast<int>(threadIdx.x) * kElements; i < n; i += step) f(i);
}

template <class T>
__device__ void fill(T* p, int n, float value) {
    const bool aligned = is_aligned(p);
    float x[kElements];
#pragma unroll
    for (int k = 0; k < kElements; ++k) x[k] = value;
    for_elements(n, [&](int i) { store_elements(p + i, n - i, aligned, x); });
}

template <class Value>
__device__ __forceinline__ Value shuffle_xor(const Value& value, int mask) {
    static_assert(sizeof(Value) % 4 == 0, "shuffled in 32-bit words");
    constexpr int n = sizeof(Value) / 4;
    union {
        Value value;
        uint32_t words[n];
    } from{value}, to{value};
#pragma unroll
    for (int i = 0; i < n; ++i) to.words[i] = __shfl_xor_sync(0xffffffffu, from.words[i], mask);
    return to.value;
}

// What a launch gives each block beyond what the kernel declares. Its one declaration, for every kernel: as
// what it is used is the kernel's business.
extern __shared__ __align__(128) char dynamic_shared[];

// The sum over the block's threads, for all of them. blockDim.x is a multiple of the warp's size.
template <class Number>
__device__ Number block_sum(Number x) {
    __shared__ Number partial[kMaxThreads / kWarp];
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    __syncthreads();  // the sum before may still be read
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
    __syncthreads();
    Number total = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) total += partial[warp];
    return total;
}

inline unsigned grid_of(const char* kernel, int64_t blocks) {
    if (blocks > INT32_MAX) throw std::runtime_error(std::string(kernel) + ": more than 2^31 - 1 blocks");
    return static_cast<unsigned>(blocks);
}

inline void check_launch(const char* kernel, cudaError_t error, int64_t rows, int64_t vocab) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // reported here, and not to the next one who asks
        throw std::runtime_error(std::string(kernel) + " with rows=" + std::to_string(rows) +
                                 " vocab=" + std::to_string(vocab) + ": " + cudaGetErrorString(error));
    }
}

// kernel(arguments...), of blocks that may form clusters. Every launch of this project is made here, by a
// plain function and not by <<<>>>, so that it can also be compiled by a compiler that knows nothing of CUDA
// (tests/emulator).
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
                          int cluster, cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launches kernel(args, launch, constants...) with launch.blocks blocks for each of args.rows rows.
// `cluster`: blocks of a row merge states.
template <auto kernel, class Args, class... Constants>
void launch_rows(const char* name, const Args& args, const RowLaunch& launch, bool cluster,
                 cudaStream_t stream, Constants... constants) {
    const int64_t blocks = args.rows * launch.blocks;
    // Positions in a row are int. The margin is for those that a loop computes beyond the row's end.
    if (args.vocab > INT32_MAX / 2 || args.rows > INT32_MAX || blocks > INT32_MAX)
        throw std::runtime_error(std::string(name) + " with rows=" + std::to_string(args.rows) +
                                 " vocab=" + std::to_string(args.vocab) + ": too large for one launch");
    if (launch.shared_bytes > 0) {
        // More than 48 KB are given to kernels that asked for it, on each device; to ask twice does no harm.
        static std::atomic<uint64_t> asked{0};
        int device = 0;
        cudaGetDevice(&device);
        const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
        if (!(asked.load(std::memory_order_relaxed) & bit)) {
            const int most = static_cast<int>(current_row_limits().shared_per_block - kStaticShared);
            check_launch(name,
                         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
                         args.rows, args.vocab);
            check_launch(name,
                         cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                              cudaSharedmemCarveoutMaxShared),
                         args.rows, args.vocab);
            asked.fetch_or(bit, std::memory_order_relaxed);
        }
    }
    check_launch(
        name,
        launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), launch.threads, launch.shared_bytes,
                      cluster ? launch.blocks : 1, stream, args, launch, constants...),
        args.rows, args.vocab);
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
    RowLaunch launch;      // for OPT's vocabulary
};
constexpr int64_t kReportedVocab = 50272;
// Of a kernel whose blocks do not share rows.
inline RowLaunch plain_launch(int threads, int64_t dynamic_shared_bytes = 0) {
    RowLaunch launch{};
    launch.blocks = 1;
    launch.threads = threads;
    launch.shared_bytes = dynamic_shared_bytes;
    return launch;
}
KernelEntry log_softmax_kl_entry(const RowLimits& limits);
KernelEntry log_softmax_kl_backward_entry();
KernelEntry topk_kl_entry(const RowLimits& limits);
KernelEntry cross_entropy_entry(const RowLimits& limits);
KernelEntry index_check_entry();
KernelEntry lora_down_entry();
KernelEntry lora_outer_entry();
KernelEntry lora_down_outer_entry();
KernelEntry lora_combine_entry();
KernelEntry lora_up_entry();
KernelEntry relu_entry();
KernelEntry relu_backward_entry();
KernelEntry rms_norm_entry();
KernelEntry rms_norm_backward_entry();
KernelEntry rms_norm_dweight_entry();
KernelEntry rotary_entry();
KernelEntry swiglu_entry();
KernelEntry swiglu_backward_entry();
KernelEntry row_reduce_entry();
KernelEntry dequantise_4bit_entry();
KernelEntry dequantise_8bit_entry();
KernelEntry adamw_norm_entry();
KernelEntry adamw_update_entry();
KernelEntry adamw_update_8bit_entry();

}  // namespace fastft
