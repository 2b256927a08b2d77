// bias_adamw on CUDA. One block a chunk of kAdamWChunk elements; a warp takes blocks of kCodeBlock elements
// in turn, eight a thread, so that an 8-bit block's largest element is found by shuffles alone.
//
// What a whole step needs (the norm, the step counts) is the work of the block that finishes last: it is told
// by a ticket, an integer whose order changes no result, and works in a fixed order.
#include "fastft/bias_adamw.h"

#include "common.cuh"
#include "fastft/adamw_math.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kThreads = 256;
// The 1: see FASTFT_ROW_KERNEL; without it the 8-bit kernel spills on sm_90a.
#define FASTFT_ADAMW_KERNEL __launch_bounds__(kThreads, 1)
constexpr int64_t kMaxTensors = 1024;  // OPT-175B has 769 biases
constexpr int64_t kMaxGroups = 32;
static_assert(kCodeBlock == kWarp * kElements, "a warp works on one block of codes");

// The argument of a launch, by value: at most kMaxTensors tensors with their neighbouring groups, of the
// chunks [first_chunk, first_chunk + chunks), a block each; one block where there is none. 18 KB, of the 32
// that a kernel may have.
struct Launch {
    void* params[kMaxTensors];
    const void* grads[kMaxTensors];
    AdamWGroup groups[kMaxGroups];
    AdamWArgs args;  // its host pointers are not used
    int64_t first_tensor, tensors, first_group, first_chunk, chunks;
};
static_assert(sizeof(Launch) < 32000, "a kernel's arguments are limited");

struct Chunk {
    AdamWTensor tensor;
    int64_t slot;   // of Launch's pointers
    int64_t first;  // element in the tensor
    int64_t size;
};

__device__ __forceinline__ Chunk chunk_of(const Launch& launch) {
    const int64_t chunk = launch.first_chunk + blockIdx.x;
    const int64_t i = launch.args.device_chunk_tensor[chunk];
    Chunk c;
    c.tensor = launch.args.device_tensors[i];
    c.slot = i - launch.first_tensor;
    c.first = (chunk - c.tensor.first_chunk) * kAdamWChunk;
    c.size = min(c.tensor.numel - c.first, kAdamWChunk);
    return c;
}

// f(first element in the chunk) for each block of codes of this thread's warp, the same in all of its
// threads.
template <class F>
__device__ __forceinline__ void for_blocks(int64_t size, F&& f) {
    for (int64_t i = threadIdx.x / kWarp * kCodeBlock; i < size; i += kThreads / kWarp * kCodeBlock) f(i);
}

template <class T>
__device__ __forceinline__ void load_or_zero(const T* p, int64_t left, float (&x)[kElements]) {
    load_elements(p, left, is_aligned(p), x);
#pragma unroll
    for (int k = 0; k < kElements; ++k) x[k] = k < left ? x[k] : 0.0f;
}

// The element type of a chunk is the same for its whole block.
template <class F>
__device__ __forceinline__ void switch_dtype(int64_t dtype, F&& f) {
    if (dtype == static_cast<int64_t>(DType::Float32)) {
        f(float{});
    } else if (dtype == static_cast<int64_t>(DType::BFloat16)) {
        f(__nv_bfloat16{});
    } else {
        f(__half{});
    }
}

// True in all threads of the block that is the last of the grid to get here; the others' writes are visible
// to it.
__device__ bool is_last_block(int32_t* ticket) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(ticket, 1) == static_cast<int32_t>(gridDim.x) - 1;
        if (last) {
            *ticket = 0;
            __threadfence();
        }
    }
    __syncthreads();
    return last;
}

__device__ __forceinline__ float inv_scale_of(const AdamWArgs& args) {
    return args.grad_scale ? 1 / *args.grad_scale : 1.0f;
}
__device__ __forceinline__ bool found_inf(const AdamWArgs& args) {
    return args.found_inf && *args.found_inf != 0;
}

// `finish`: the last launch of the step's first pass.
__global__ void FASTFT_ADAMW_KERNEL adamw_norm_kernel(const __grid_constant__ Launch launch, bool finish) {
    const AdamWArgs& args = launch.args;
    float* partials = static_cast<float*>(args.partials);
    if (launch.chunks > 0) {
        const Chunk c = chunk_of(launch);
        float sum = 0;
        switch_dtype(c.tensor.dtype, [&](auto element) {
            using T = decltype(element);
            const T* grad = static_cast<const T*>(launch.grads[c.slot]) + c.first;
            for_blocks(c.size, [&](int64_t block) {
                const int64_t i = block + threadIdx.x % kWarp * kElements;
                float x[kElements];
                load_or_zero(grad + i, c.size - i, x);
#pragma unroll
                for (int k = 0; k < kElements; ++k) sum = fma_(x[k], x[k], sum);
            });
        });
        sum = block_sum(sum);
        if (threadIdx.x == 0) partials[launch.first_chunk + blockIdx.x] = sum;
    }
    if (!finish || !is_last_block(args.tickets)) return;
    double total = 0;
    for (int64_t i = threadIdx.x; i < args.chunks; i += kThreads) total += double(__ldcg(partials + i));
    total = block_sum(total);
    if (threadIdx.x == 0) {
        *static_cast<AdamWStatus<float>*>(args.status) =
            adamw_status<float>(total, args.max_grad_norm, inv_scale_of(args), found_inf(args));
    }
}

__device__ __forceinline__ float warp_max(float x) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        x = max_(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

template <class Code>
__device__ __forceinline__ void load_codes(const Code* p, float (&x)[kElements]) {
    union {
        uint2 word;
        Code codes[kElements];
    } u;
    u.word = *reinterpret_cast<const uint2*>(p);
#pragma unroll
    for (int k = 0; k < kElements; ++k) x[k] = static_cast<float>(u.codes[k]);
}

template <class Code>
__device__ __forceinline__ void store_codes(Code* p, const float (&x)[kElements]) {
    union {
        uint2 word;
        Code codes[kElements];
    } u;
#pragma unroll
    for (int k = 0; k < kElements; ++k) u.codes[k] = static_cast<Code>(static_cast<int>(x[k]));
    *reinterpret_cast<uint2*>(p) = u.word;
}

// One block of codes of a chunk; `state` is its first element in the flat buffers, `left` counts from this
// thread's first element.
template <bool k8Bit, class T>
__device__ __forceinline__ void update_block(const AdamWArgs& args, T* param, const T* grad, int64_t state,
                                             int64_t left, float offset, const AdamWCoefficients<float>& c) {
    const int lane = threadIdx.x % kWarp;
    const int64_t i = state + lane * kElements;
    float* master = args.master && sizeof(T) == 2 ? static_cast<float*>(args.master) + i : nullptr;
    float p[kElements], g[kElements], m[kElements], v[kElements];
    if (master) {
        load_elements(master, kElements, true, p);
    } else {
        load_or_zero(param, left, p);
    }
    load_or_zero(grad, left, g);
    float *scale1 = nullptr, *scale2 = nullptr;
    if constexpr (k8Bit) {
        scale1 = static_cast<float*>(args.scales) + state / kCodeBlock;
        scale2 = scale1 + args.total / kCodeBlock;
        const float unit1 = exp_avg_unit(*scale1), unit2 = root_unit(*scale2);
        load_codes(static_cast<const int8_t*>(args.exp_avg) + i, m);
        load_codes(static_cast<const uint8_t*>(args.exp_avg_sq) + i, v);
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            m[k] = decode_exp_avg(m[k], unit1);
            const float root = decode_root(v[k], unit2);
            v[k] = root * root;
        }
    } else {
        load_elements(static_cast<const float*>(args.exp_avg) + i, kElements, true, m);
        load_elements(static_cast<const float*>(args.exp_avg_sq) + i, kElements, true, v);
    }
    float most1 = 0, most2 = 0, not_finite = 0;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
        AdamWElement<float> x{p[k], m[k], v[k]};
        const float root = adamw_update(x, g[k], c);
        p[k] = x.param;
        m[k] = x.exp_avg;
        if constexpr (k8Bit) {
            v[k] = root;
            most1 = max_(most1, abs_(m[k]));
            most2 = max_(most2, root);
            // 0, or from the first inf or NaN on NaN; whatever makes exp_avg so makes the root so.
            not_finite = fma_(root, 0.0f, not_finite);
        } else {
            v[k] = x.exp_avg_sq;
        }
    }
    store_elements(param, left, is_aligned(param), p);
    if (master) store_elements(master, kElements, true, p);
    if constexpr (k8Bit) {
        most1 = warp_max(most1);
        most2 = warp_max(most2);
        if (__any_sync(0xffffffffu, !(not_finite == 0))) {
            most1 = most2 = NAN;
#pragma unroll
            for (int k = 0; k < kElements; ++k) m[k] = v[k] = 0;
        } else {
            const float factor1 = exp_avg_factor(most1), factor2 = root_factor(most2);
#pragma unroll
            for (int k = 0; k < kElements; ++k) {
                m[k] = encode_exp_avg(m[k], factor1);
                v[k] = encode_root(v[k], factor2, dither(static_cast<float>(lane * kElements + k), offset));
            }
        }
        store_codes(static_cast<int8_t*>(args.exp_avg) + i, m);
        store_codes(static_cast<uint8_t*>(args.exp_avg_sq) + i, v);
        __syncwarp();  // every thread has read the scales
        if (lane == 0) {
            *scale1 = most1;
            *scale2 = most2;
        }
    } else {
        store_elements(static_cast<float*>(args.exp_avg) + i, kElements, true, m);
        store_elements(static_cast<float*>(args.exp_avg_sq) + i, kElements, true, v);
    }
}

template <bool k8Bit>
__global__ void FASTFT_ADAMW_KERNEL adamw_update_kernel(const __grid_constant__ Launch launch) {
    const AdamWArgs& args = launch.args;
    auto* status = static_cast<AdamWStatus<float>*>(args.status);
    const bool norm = wants_norm(args);
    if (norm ? status->skipped != 0 : found_inf(args)) {
        if (!norm && blockIdx.x == 0 && threadIdx.x == 0) *status = {0, 0, 1};
        return;
    }
    const float grad_factor = norm ? status->grad_factor : inv_scale_of(args);
    if (!norm && blockIdx.x == 0 && threadIdx.x == 0) *status = {0, grad_factor, 0};

    // A step without a single element still counts.
    if (launch.chunks > 0) {
        const Chunk c = chunk_of(launch);
        __shared__ AdamWCoefficients<float> shared;
        const float step = args.steps[c.tensor.step] + 1;
        if (threadIdx.x == 0) {
            AdamWGroup group = launch.groups[c.tensor.group - launch.first_group];
            if (args.lr) group.lr = args.lr[c.tensor.group];
            AdamWCoefficients<double> coefficients = adamw_coefficients(group, step);
            coefficients.grad_factor = grad_factor;
            shared = splat<float>(coefficients);
        }
        __syncthreads();
        const AdamWCoefficients<float> coefficients = shared;
        switch_dtype(c.tensor.dtype, [&](auto element) {
            using T = decltype(element);
            T* param = static_cast<T*>(launch.params[c.slot]) + c.first;
            const T* grad = static_cast<const T*>(launch.grads[c.slot]) + c.first;
            for_blocks(c.size, [&](int64_t block) {
                const int64_t i = block + threadIdx.x % kWarp * kElements;
                const float offset = dither_offset(static_cast<uint32_t>(step),
                                                   static_cast<uint32_t>((c.first + block) / kCodeBlock));
                update_block<k8Bit>(args, param + i, grad + i, c.tensor.offset + c.first + block, c.size - i,
                                    offset, coefficients);
            });
        });
    }
    if (!is_last_block(args.tickets + 1)) return;
    for (int64_t i = threadIdx.x; i < launch.tensors; i += kThreads) {
        args.steps[args.device_tensors[launch.first_tensor + i].step] += 1;
    }
}

template <class... Parameters, class... Constants>
void run(const char* name, void (*kernel)(Launch, Parameters...), cudaStream_t stream, const Launch& launch,
         Constants... constants) {
    const unsigned grid = grid_of(name, launch.chunks > 0 ? launch.chunks : 1);
    const cudaError_t error = launch_kernel(kernel, grid, kThreads, 0, 1, stream, launch, constants...);
    if (error != cudaSuccess) {
        cudaGetLastError();  // reported here, and not to the next one who asks
        throw std::runtime_error(std::string(name) + " with tensors=" + std::to_string(launch.tensors) +
                                 " chunks=" + std::to_string(launch.chunks) + ": " +
                                 cudaGetErrorString(error));
    }
}

// f(launch, whether it is the last) for as few launches as the limits on arguments allow.
template <class F>
void for_launches(const AdamWArgs& args, F&& f) {
    Launch launch;
    launch.args = args;
    for (int64_t begin = 0; begin < args.count;) {
        const AdamWTensor* tensors = args.tensors;
        launch.first_tensor = begin;
        launch.first_group = tensors[begin].group;
        launch.first_chunk = tensors[begin].first_chunk;
        int64_t end = begin;
        for (; end < args.count && end - begin < kMaxTensors; ++end) {
            const int64_t group = tensors[end].group;
            if (group - launch.first_group >= kMaxGroups) break;
            launch.params[end - begin] = args.params[end];
            launch.grads[end - begin] = args.grads[end];
            launch.groups[group - launch.first_group] = args.groups[group];
        }
        launch.tensors = end - begin;
        const int64_t end_chunk = end < args.count ? tensors[end].first_chunk : args.chunks;
        launch.chunks = end_chunk - launch.first_chunk;
        f(launch, end == args.count);
        begin = end;
    }
}

}  // namespace
}  // namespace FASTFT_TARGET

void bias_adamw_cuda(const AdamWArgs& args, cudaStream_t stream) {
    if (args.is_double) {
        throw std::runtime_error("bias_adamw: float64 is a CPU dtype; use float32, bfloat16 or float16");
    }
    if (wants_norm(args)) {
        for_launches(args, [&](const Launch& launch, bool last) {
            run("adamw_norm_kernel", &adamw_norm_kernel, stream, launch, last);
        });
    }
    const auto kernel = args.scales ? &adamw_update_kernel<true> : &adamw_update_kernel<false>;
    for_launches(args,
                 [&](const Launch& launch, bool) { run("adamw_update_kernel", kernel, stream, launch); });
}

KernelEntry adamw_norm_entry() {
    return {"adamw_norm", reinterpret_cast<const void*>(&adamw_norm_kernel), plain_launch(kThreads)};
}
KernelEntry adamw_update_entry() {
    return {"adamw_update", reinterpret_cast<const void*>(&adamw_update_kernel<false>),
            plain_launch(kThreads)};
}
KernelEntry adamw_update_8bit_entry() {
    return {"adamw_update_8bit", reinterpret_cast<const void*>(&adamw_update_kernel<true>),
            plain_launch(kThreads)};
}

}  // namespace fastft
