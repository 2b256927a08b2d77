// dequantise on CUDA: bound by the bytes it writes. A thread makes 8 neighbours, one 16-byte store of a
// 16-bit type.
//
// At 4300 GB/s (H200) a [7168, 7168] weight takes 30 us from 4 bits (0.56 bytes read and 2 written an
// element).
#include "fastft/dequantise.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kThreads = 256;

// An 8-element group lies in one block of the quantiser: both start at multiples of 8.
template <class T>
__global__ void __launch_bounds__(kThreads) dequantise_4bit_kernel(Dequantise4bitArgs args) {
    __shared__ float code[16];  // 16 entries in 16 banks: no lookup waits for another
    if (threadIdx.x < 16) code[threadIdx.x] = args.code[threadIdx.x];
    __syncthreads();
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElements;
    if (i >= args.count) return;
    const int64_t e = args.first + i;
    const int left = static_cast<int>(min(args.count - i, int64_t(kElements)));
    T* out = static_cast<T*>(args.out) + i;
    float x[kElements];
    if (left >= kElements && args.first % kElements == 0 &&
        reinterpret_cast<uintptr_t>(args.packed) % 4 == 0) {
        // Little endian: the byte of the first two elements is the lowest.
        const uint32_t bytes = *reinterpret_cast<const uint32_t*>(args.packed + e / 2);
        const float absmax = absmax_of(args, e / args.block);
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            x[k] = code[code_of(static_cast<uint8_t>(bytes >> (k / 2 * 8)), k)] * absmax;
        }
    } else {
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            const int64_t element = e + k;
            x[k] = k < left ? code[code_of(args.packed[element / 2], element)] *
                                  absmax_of(args, element / args.block)
                            : 0;
        }
    }
    store_elements(out, left, is_aligned(out), x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantise_8bit_kernel(Dequantise8bitArgs args) {
    const int64_t row = blockIdx.y + int64_t(blockIdx.z) * gridDim.y;
    const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElements;
    if (row >= args.rows || k >= args.K) return;
    const int8_t* values = args.values + row * args.K + k;
    T* out = static_cast<T*>(args.out) + row * args.K + k;
    const float scale = args.scale[row];
    const int left = static_cast<int>(min(args.K - k, int64_t(kElements)));
    float x[kElements];
    if (left >= kElements && reinterpret_cast<uintptr_t>(values) % 8 == 0) {
        const uint2 words = *reinterpret_cast<const uint2*>(values);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            const uint32_t word = j < 4 ? words.x : words.y;
            x[j] = static_cast<float>(static_cast<int8_t>(word >> (j % 4 * 8))) * scale;
        }
    } else {
#pragma unroll
        for (int j = 0; j < kElements; ++j) x[j] = j < left ? static_cast<float>(values[j]) * scale : 0;
    }
    store_elements(out, left, is_aligned(out), x);
}

int64_t blocks_for(int64_t elements) {
    return (elements + int64_t(kThreads) * kElements - 1) / (int64_t(kThreads) * kElements);
}

}  // namespace
}  // namespace FASTFT_TARGET

void dequantise_4bit_cuda(const Dequantise4bitArgs& args, cudaStream_t stream) {
    constexpr const char* name = "dequantise_4bit_kernel";
    if (args.count == 0) return;
    const unsigned grid = grid_of(name, blocks_for(args.count));
    dispatch_dtype(name, args.dtype, [&](auto element) {
        const auto kernel = &dequantise_4bit_kernel<decltype(element)>;
        check_launch(name, launch_kernel(kernel, grid, kThreads, 0, 1, stream, args), 1, args.count);
    });
}

void dequantise_8bit_cuda(const Dequantise8bitArgs& args, cudaStream_t stream) {
    constexpr const char* name = "dequantise_8bit_kernel";
    if (args.rows == 0 || args.K == 0) return;
    constexpr int64_t kMostY = 65535;
    const int64_t y = args.rows < kMostY ? args.rows : kMostY;
    const dim3 grid(grid_of(name, blocks_for(args.K)), static_cast<unsigned>(y),
                    grid_of(name, (args.rows + y - 1) / y));
    dispatch_dtype(name, args.dtype, [&](auto element) {
        const auto kernel = &dequantise_8bit_kernel<decltype(element)>;
        check_launch(name, launch_kernel(kernel, grid, kThreads, 0, 1, stream, args), args.rows, args.K);
    });
}

KernelEntry dequantise_4bit_entry() {
    return {"dequantise_4bit", reinterpret_cast<const void*>(&dequantise_4bit_kernel<__nv_bfloat16>),
            plain_launch(kThreads)};
}
KernelEntry dequantise_8bit_entry() {
    return {"dequantise_8bit", reinterpret_cast<const void*>(&dequantise_8bit_kernel<__nv_bfloat16>),
            plain_launch(kThreads)};
}

}  // namespace fastft
