// rotary on CUDA: bound by the bytes it moves. A thread has kElements neighbours of both halves of one head,
// or of what is not rotated; the threads of a token's heads find its cosines and sines in the cache.
//
// At 4300 GB/s (H200) Llama-3-8B's q and k of 2048 tokens in 16 bits take 10 us forward, and as long
// backward.
#include "fastft/rotary.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ __forceinline__ void load(const T* p, int left, float (&x)[kElements]) {
    load_elements(p, left, is_aligned(p), x);
}

template <class T>
__device__ __forceinline__ void store(T* p, int left, const float (&x)[kElements]) {
    store_elements(p, left, is_aligned(p), x);
}

template <class T, class C>
__device__ __forceinline__ void rotate(const T* x, T* y, const C* cos, const C* sin, int half, int left,
                                       bool transposed) {
    float x1[kElements], x2[kElements], c[kElements], s1[kElements], s2[kElements], out[kElements];
    load(x, left, x1);
    load(x + half, left, x2);
    load(sin, left, s1);
    load(sin + half, left, s2);
    load(cos, left, c);
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] = fma_(c[i], x1[i], (transposed ? s2[i] : -s1[i]) * x2[i]);
    store(y, left, out);
    load(cos + half, left, c);
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] = fma_(c[i], x2[i], (transposed ? -s1[i] : s2[i]) * x1[i]);
    store(y + half, left, out);
}

// items: groups of kElements in all heads of all tokens; of_half and of_rest: those of one head.
template <class T, class C>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(RotaryArgs args, uint32_t items, uint32_t of_half, uint32_t of_rest) {
    uint32_t i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= items) return;
    const uint32_t of_head = of_half + of_rest, heads = static_cast<uint32_t>(args.q.heads + args.k.heads);
    const uint32_t group = i % of_head;
    i /= of_head;
    uint32_t head = i % heads;
    i /= heads;
    const int64_t batch = i / static_cast<uint32_t>(args.tokens),
                  token = i % static_cast<uint32_t>(args.tokens);
    const bool is_query = head < static_cast<uint32_t>(args.q.heads);
    const RotaryHeads& of = is_query ? args.q : args.k;
    if (!is_query) head -= static_cast<uint32_t>(args.q.heads);
    const T* x = static_cast<const T*>(of.x) + batch * of.x_batch + head * of.x_head + token * of.x_token;
    T* y = static_cast<T*>(of.y) + batch * of.y_batch + head * of.y_head + token * of.y_token;
    if (group < of_half) {
        const int half = static_cast<int>(args.rotated / 2), from = static_cast<int>(group) * kElements;
        const C* cos = static_cast<const C*>(args.cos) + batch * args.cos_batch + token * args.cos_token;
        const C* sin = static_cast<const C*>(args.sin) + batch * args.sin_batch + token * args.sin_token;
        rotate(x + from, y + from, cos + from, sin + from, half, half - from, args.transposed);
    } else {
        const int from = static_cast<int>(args.rotated) + static_cast<int>(group - of_half) * kElements;
        const int left = static_cast<int>(args.size) - from;
        float passed[kElements];
        load(x + from, left, passed);
        store(y + from, left, passed);
    }
}

}  // namespace
}  // namespace FASTFT_TARGET

void rotary_cuda(const RotaryArgs& args, cudaStream_t stream) {
    constexpr const char* name = "rotary_kernel";
    const int64_t rows = args.batch * args.tokens * (args.q.heads + args.k.heads);
    const int64_t of_half = (args.rotated / 2 + kElements - 1) / kElements;
    const int64_t of_rest = (args.size - args.rotated + kElements - 1) / kElements;
    const int64_t items = rows * (of_half + of_rest);
    if (items == 0) return;
    if (items > INT32_MAX) {
        throw std::runtime_error(std::string(name) + " with " + std::to_string(rows) + " rows of " +
                                 std::to_string(args.size) + ": too large for one launch");
    }
    const auto launch = [&](auto kernel) {
        const unsigned grid = grid_of(name, (items + kThreads - 1) / kThreads);
        check_launch(name,
                     launch_kernel(kernel, grid, kThreads, 0, 1, stream, args, static_cast<uint32_t>(items),
                                   static_cast<uint32_t>(of_half), static_cast<uint32_t>(of_rest)),
                     rows, args.size);
    };
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        if (args.angle_dtype == DType::Float32) return launch(&rotary_kernel<T, float>);
        launch(&rotary_kernel<T, T>);
    });
}

KernelEntry rotary_entry() {
    return {"rotary", reinterpret_cast<const void*>(&rotary_kernel<__nv_bfloat16, __nv_bfloat16>),
            plain_launch(kThreads)};
}

}  // namespace fastft
