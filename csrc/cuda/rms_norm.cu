// rms_norm on CUDA: bound by the bytes it moves. A row's threads (`lanes`: a part of a warp where the row is
// short, else a block) keep it in registers between its sum and its results; a row of more than
// kMaxThreads * kMostGroups * 8 elements is read twice, the second time mostly from the caches.
//
// dweight is summed over a chunk's rows in registers, too, a thread's columns being the same in all rows, and
// over the chunks by a second kernel: both in a fixed order.
//
// At 4300 GB/s (H200) [2048, 4096] in 16 bits takes 7.8 us forward and 11.7 us backward; unfused, forward
// alone moves nine times its bytes.
#include "fastft/rms_norm.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kThreads = 256;               // of a block that has several rows
constexpr int kMostGroups = 2;              // groups of kElements that a thread keeps of a row
constexpr int kColumns = 32, kStripes = 8;  // of a block of the last kernel

struct Launch {
    int threads, lanes, groups;  // groups: 0 where the row is read twice
};

Launch plan(int64_t width) {
    const int64_t groups = (width + kElements - 1) / kElements;
    if (groups <= kWarp) {
        int lanes = 1;
        while (lanes < groups) lanes *= 2;
        return {kThreads, lanes, 1};
    }
    const int64_t each = (groups + kMaxThreads - 1) / kMaxThreads;
    if (each > kMostGroups) return {kMaxThreads, kMaxThreads, 0};
    const int64_t warps = (groups + each * kWarp - 1) / (each * kWarp);
    const int threads = static_cast<int>(warps) * kWarp;
    return {threads, threads, static_cast<int>(each)};
}

// The sum over a row's threads, for all of them; all threads of the block must come here.
__device__ __forceinline__ float row_sum(float x, int lanes) {
    if (lanes > kWarp) return block_sum(x);
    for (int mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// A row's elements with zeros beyond its end.
template <class T>
struct Row {
    const T* p;
    int width;
    bool aligned;

    // exists: else the row has no elements.
    __device__ Row(const void* rows, int64_t row, int64_t width, bool exists)
        : p(static_cast<const T*>(rows) + row * width),
          width(exists ? static_cast<int>(width) : 0),
          aligned(is_aligned(p)) {}

    __device__ __forceinline__ void load(int i, float (&x)[kElements]) const {
        load_elements(p + i, width - i, aligned, x);
        if (width - i < kElements) {
#pragma unroll
            for (int k = 0; k < kElements; ++k) x[k] = k < width - i ? x[k] : 0.0f;
        }
    }
};

// f(g, i) for the thread's groups of a row, the constant number of them where they are kept.
template <int kGroups, class F>
__device__ __forceinline__ void for_groups(int width, int lane, int lanes, F&& f) {
    if constexpr (kGroups > 0) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) f(g, (g * lanes + lane) * kElements);
    } else {
        for (int i = lane * kElements; i < width; i += lanes * kElements) f(0, i);
    }
}

template <class T, class W, int kGroups>
__global__ void FASTFT_ROW_KERNEL rms_norm_kernel(RmsNormArgs args, int lanes) {
    const int lane = static_cast<int>(threadIdx.x) % lanes;
    const int64_t row = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    const bool exists = row < args.rows;
    const Row<T> x(args.x, row, args.width, exists);
    const Row<W> weight(args.weight, 0, args.width, exists);
    float kept[kGroups > 0 ? kGroups : 1][kElements];
    float squares = 0;
    for_groups<kGroups>(x.width, lane, lanes, [&](int g, int i) {
        x.load(i, kept[g]);
#pragma unroll
        for (int k = 0; k < kElements; ++k) squares = fma_(kept[g][k], kept[g][k], squares);
    });
    const float mean = row_sum(squares, lanes) / static_cast<float>(args.width);
    const float rstd = 1.0f / sqrtf(mean + static_cast<float>(args.eps));
    if (exists && lane == 0) static_cast<float*>(args.rstd)[row] = rstd;
    W* y = static_cast<W*>(args.y) + row * args.width;
    const bool aligned = is_aligned(y);
    for_groups<kGroups>(x.width, lane, lanes, [&](int g, int i) {
        float w[kElements];
        weight.load(i, w);
        if constexpr (kGroups == 0) x.load(i, kept[g]);
#pragma unroll
        for (int k = 0; k < kElements; ++k) w[k] *= kept[g][k] * rstd;
        store_elements(y + i, x.width - i, aligned, w);
    });
}

// Rows [c * chunk, (c + 1) * chunk) for the block's c-th set of lanes.
template <class T, class W, int kGroups>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rms_norm_backward_kernel(RmsNormBackwardArgs args, int lanes, int chunk) {
    constexpr int kKept = kGroups > 0 ? kGroups : 1;
    const int lane = static_cast<int>(threadIdx.x) % lanes;
    const int64_t c = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    const bool chunk_exists = c * chunk < args.rows;
    const Row<W> weight(args.weight, 0, args.width, chunk_exists);
    float* partial = args.partials ? static_cast<float*>(args.partials) + c * args.width : nullptr;
    const bool partial_aligned = is_aligned(partial);
    float sums[kKept][kElements] = {};
    for (int r = 0; r < chunk; ++r) {
        const int64_t row = c * chunk + r;
        const bool exists = row < args.rows;
        const Row<T> x(args.x, row, args.width, exists);
        const Row<W> dy(args.dy, row, args.width, exists);
        const float rstd = exists ? static_cast<const float*>(args.rstd)[row] : 0.0f;
        float kept_x[kKept][kElements], kept_dy[kKept][kElements];
        float dot = 0;
        for_groups<kGroups>(x.width, lane, lanes, [&](int g, int i) {
            float w[kElements];
            x.load(i, kept_x[g]);
            dy.load(i, kept_dy[g]);
            weight.load(i, w);
#pragma unroll
            for (int k = 0; k < kElements; ++k) dot = fma_(kept_dy[g][k] * w[k], kept_x[g][k], dot);
        });
        const float mean = row_sum(dot, lanes) * rstd / static_cast<float>(args.width);
        T* dx = static_cast<T*>(args.dx) + row * args.width;
        const bool aligned = is_aligned(dx);
        for_groups<kGroups>(x.width, lane, lanes, [&](int g, int i) {
            float w[kElements];
            weight.load(i, w);
            if constexpr (kGroups == 0) {
                x.load(i, kept_x[g]);
                dy.load(i, kept_dy[g]);
                if (partial) {
                    if (r == 0) {
#pragma unroll
                        for (int k = 0; k < kElements; ++k) sums[g][k] = 0;
                    } else {
                        load_elements(partial + i, x.width - i, partial_aligned, sums[g]);
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < kElements; ++k) {
                const float normalised = kept_x[g][k] * rstd;
                w[k] = rstd * fma_(normalised, -mean, kept_dy[g][k] * w[k]);
                sums[g][k] = fma_(kept_dy[g][k], normalised, sums[g][k]);
            }
            store_elements(dx + i, x.width - i, aligned, w);
            if constexpr (kGroups == 0) {
                if (partial) store_elements(partial + i, x.width - i, partial_aligned, sums[g]);
            }
        });
    }
    if constexpr (kGroups > 0) {
        if (partial) {
            for_groups<kGroups>(weight.width, lane, lanes, [&](int g, int i) {
                store_elements(partial + i, weight.width - i, partial_aligned, sums[g]);
            });
        }
    }
}

// dweight from the partials: of kColumns columns every kStripes-th chunk is one thread's.
template <class W>
__global__ void __launch_bounds__(kColumns* kStripes)
    rms_norm_dweight_kernel(RmsNormBackwardArgs args, int64_t chunks) {
    __shared__ float sums[kStripes][kColumns];
    const int x = static_cast<int>(threadIdx.x) % kColumns, stripe = static_cast<int>(threadIdx.x) / kColumns;
    const int64_t column = int64_t(blockIdx.x) * kColumns + x;
    float sum = 0;
    if (column < args.width) {
        const float* partials = static_cast<const float*>(args.partials) + column;
#pragma unroll 4
        for (int64_t chunk = stripe; chunk < chunks; chunk += kStripes) sum += partials[chunk * args.width];
    }
    sums[stripe][x] = sum;
    __syncthreads();
    if (stripe > 0 || column >= args.width) return;
    for (int other = 1; other < kStripes; ++other) sum += sums[other][x];
    from_float(sum, static_cast<W*>(args.dweight) + column);
}

// f(x's element, weight's element).
template <class F>
void dispatch_dtypes(const char* name, DType dtype, DType weight_dtype, F&& f) {
    dispatch_dtype(name, dtype, [&](auto x) {
        if constexpr (sizeof(x) == 2) {
            if (weight_dtype == DType::Float32) return f(x, float{});
        }
        return f(x, x);
    });
}

// launch(kernel) with the kernel of these dtypes that keeps so many groups.
template <template <class, class, int> class Kernel, class Args, class F>
void dispatch(const char* name, const Args& args, const Launch& plan, F&& launch) {
    dispatch_dtypes(name, args.dtype, args.weight_dtype, [&](auto x, auto w) {
        using T = decltype(x);
        using W = decltype(w);
        if (plan.groups == 1) return launch(Kernel<T, W, 1>::function);
        if (plan.groups == 2) return launch(Kernel<T, W, 2>::function);
        return launch(Kernel<T, W, 0>::function);
    });
}
static_assert(kMostGroups == 2, "dispatch names every number of groups");

template <class T, class W, int kGroups>
struct Forward {
    static constexpr auto function = &rms_norm_kernel<T, W, kGroups>;
};
template <class T, class W, int kGroups>
struct Backward {
    static constexpr auto function = &rms_norm_backward_kernel<T, W, kGroups>;
};

// Blocks for so many rows, or chunks of rows, of this width.
unsigned grid_for(const char* name, int64_t count, int64_t width, const Launch& plan) {
    // Positions in a row are int. The margin is for those that a loop computes beyond the row's end.
    if (width > INT32_MAX / 2)
        throw std::runtime_error(std::string(name) + " with width=" + std::to_string(width) +
                                 ": too large for one launch");
    const int64_t slots = plan.threads / plan.lanes;
    return grid_of(name, (count + slots - 1) / slots);
}

}  // namespace
}  // namespace FASTFT_TARGET

void rms_norm_cuda(const RmsNormArgs& args, cudaStream_t stream) {
    constexpr const char* name = "rms_norm_kernel";
    if (args.rows == 0) return;
    const Launch launch = plan(args.width);
    const unsigned grid = grid_for(name, args.rows, args.width, launch);
    dispatch<Forward>(name, args, launch, [&](auto kernel) {
        check_launch(name, launch_kernel(kernel, grid, launch.threads, 0, 1, stream, args, launch.lanes),
                     args.rows, args.width);
    });
}

void rms_norm_backward_cuda(const RmsNormBackwardArgs& args, cudaStream_t stream) {
    constexpr const char* name = "rms_norm_backward_kernel";
    if (args.rows > 0) {
        const Launch launch = plan(args.width);
        const int chunk = args.dweight ? static_cast<int>(rms_norm_chunk_rows(args.rows)) : 1;
        const int64_t chunks = (args.rows + chunk - 1) / chunk;
        const unsigned grid = grid_for(name, chunks, args.width, launch);
        dispatch<Backward>(name, args, launch, [&](auto kernel) {
            check_launch(name,
                         launch_kernel(kernel, grid, launch.threads, 0, 1, stream, args, launch.lanes, chunk),
                         args.rows, args.width);
        });
    }
    if (!args.dweight) return;
    constexpr const char* last = "rms_norm_dweight_kernel";
    const unsigned grid = grid_of(last, (args.width + kColumns - 1) / kColumns);
    dispatch_dtype(last, args.weight_dtype, [&](auto element) {
        check_launch(last,
                     launch_kernel(&rms_norm_dweight_kernel<decltype(element)>, grid, kColumns * kStripes, 0,
                                   1, stream, args, rms_norm_chunks(args.rows)),
                     args.rows, args.width);
    });
}

KernelEntry rms_norm_entry() {
    return {"rms_norm", reinterpret_cast<const void*>(&rms_norm_kernel<__nv_bfloat16, __nv_bfloat16, 1>),
            plain_launch(kMaxThreads)};
}
KernelEntry rms_norm_backward_entry() {
    return {"rms_norm_backward",
            reinterpret_cast<const void*>(&rms_norm_backward_kernel<__nv_bfloat16, __nv_bfloat16, 1>),
            plain_launch(kMaxThreads)};
}
KernelEntry rms_norm_dweight_entry() {
    return {"rms_norm_dweight", reinterpret_cast<const void*>(&rms_norm_dweight_kernel<__nv_bfloat16>),
            plain_launch(kColumns * kStripes)};
}

}  // namespace fastft
