// Kernels with one mistake each, and the same without it: what the emulator must find, and must not.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <mma.h>

#include <cstring>

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kThreads = 64;
struct Args {
    float* x;
    int64_t n;
};

// Every thread gets its mirror image's element.
template <bool kWrong>
__global__ void no_barrier(Args a) {
    __shared__ float shared[kThreads];
    shared[threadIdx.x] = a.x[threadIdx.x];
    if (!kWrong) __syncthreads();
    a.x[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

template <bool kWrong>
__global__ void no_barrier_before_reuse(Args a) {
    __shared__ float shared[kThreads];
    float sum = 0;
    for (int i = 0; i < 2; ++i) {
        shared[threadIdx.x] = a.x[threadIdx.x];
        __syncthreads();
        sum += shared[kThreads - 1 - threadIdx.x];
        if (!kWrong) __syncthreads();
    }
    a.x[threadIdx.x] = sum;
}

template <bool kWrong>
__global__ void no_warp_barrier(Args a) {
    __shared__ float shared[kThreads];
    shared[threadIdx.x] = a.x[threadIdx.x];
    if (kWrong) {
        __any_sync(0xffffffffu, 1);  // brings a warp together, but orders no memory
    } else {
        __syncwarp();
    }
    a.x[threadIdx.x] = shared[threadIdx.x ^ 1];
}

template <bool kWrong>
__global__ void divergent_barrier(Args a) {
    if (kWrong ? threadIdx.x < 40 : a.n > 0) __syncthreads();
}

template <bool kWrong>
__global__ void divergent_shuffle(Args a) {
    float x = a.x[threadIdx.x];
    if (kWrong ? threadIdx.x < 40 : a.n > 0) x = __shfl_xor_sync(0xffffffffu, x, 1);
    a.x[threadIdx.x] = x;
}

template <bool kWrong>
__global__ void beyond_the_end(Args a) {
    const int64_t i = threadIdx.x;
    if (kWrong ? i <= a.n : i < a.n) a.x[i] = 0;
}

template <bool kWrong>
__global__ void before_the_begin(Args a) {
    if (threadIdx.x == 0) a.x[1] = a.x[kWrong ? -1 : 0];
}

template <bool kWrong>
__global__ void beyond_shared(Args) {
    dynamic_shared[kWrong ? 1 + threadIdx.x : threadIdx.x] = 1;
}

template <bool kWrong>
__global__ void unwritten_shared(Args a) {
    float* shared = reinterpret_cast<float*>(dynamic_shared);
    if (threadIdx.x < (kWrong ? 1 : kThreads / 4)) shared[threadIdx.x] = 1;
    if (threadIdx.x < kThreads / 4) a.x[threadIdx.x] = shared[threadIdx.x];
}

template <bool kWrong>
__global__ void misaligned(Args a) {
    if (threadIdx.x == 0) *reinterpret_cast<uint4*>(a.x + (kWrong ? 1 : 0)) = uint4{1, 2, 3, 4};
}

template <bool kWrong>
__global__ void copy_not_waited_for(Args a) {
    float* shared = reinterpret_cast<float*>(dynamic_shared);
    if (threadIdx.x > 0) return;
    __pipeline_memcpy_async(shared, a.x, 16);
    __pipeline_commit();
    __pipeline_commit();
    __pipeline_wait_prior(kWrong ? 2 : 1);
    for (int i = 0; i < 4; ++i) a.x[i] = shared[i];
}

// A copy has arrived for the thread that asked for it, and for the others behind a barrier.
template <bool kWrong>
__global__ void copy_of_another_thread(Args a) {
    float* shared = reinterpret_cast<float*>(dynamic_shared);
    if (threadIdx.x == 0) {
        __pipeline_memcpy_async(shared, a.x, 16);
        __pipeline_commit();
    }
    if (kWrong) __syncthreads();
    __pipeline_wait_prior(0);
    if (!kWrong) __syncthreads();
    if (threadIdx.x < 4) a.x[4 + threadIdx.x] = shared[threadIdx.x];
}

// Two blocks that know nothing of each other.
template <bool kWrong>
__global__ void blocks_that_meet(Args a) {
    a.x[kWrong ? threadIdx.x : blockIdx.x * kThreads + threadIdx.x] = 1;
}

// The last block adds up what the others have written. The last two elements are the sum and an integer 0.
template <bool kWrong>
__global__ void no_fence(Args a) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        a.x[blockIdx.x] = 1;
        if (!kWrong) __threadfence();
        last = atomicAdd(reinterpret_cast<int*>(a.x + a.n - 1), 1) == static_cast<int>(gridDim.x) - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float sum = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) sum += a.x[b];
        a.x[a.n - 2] = sum;
    }
}

// Each block reads its neighbour's shared memory. kWrong 1: with no barrier before; 2: none after.
template <int kWrong>
__global__ void cluster_barrier(Args a) {
    __shared__ float shared;
    const auto cluster = cooperative_groups::this_cluster();
    if (threadIdx.x == 0) shared = static_cast<float>(blockIdx.x);
    if (kWrong != 1) cluster.sync();
    if (threadIdx.x == 0) a.x[blockIdx.x] = *cluster.map_shared_rank(&shared, (blockIdx.x + 1) % 2);
    if (kWrong != 2) cluster.sync();
}

// 16 x 16 of bfloat16 times itself: the first warp brings it, both use it.
template <bool kWrong>
__global__ void product(Args a) {
    namespace wmma = nvcuda::wmma;
    auto* shared = reinterpret_cast<__nv_bfloat16*>(dynamic_shared);
    for (int i = threadIdx.x; i < 256; i += kThreads) shared[i] = __float2bfloat16_rn(a.x[i]);
    if (!kWrong) __syncthreads();
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> right;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::fill_fragment(sum, 0.0f);
    wmma::load_matrix_sync(left, shared, 16);
    wmma::load_matrix_sync(right, shared, 16);
    wmma::mma_sync(sum, left, right, sum);
    if (threadIdx.x < kWarp) wmma::store_matrix_sync(a.x, sum, 16, wmma::mem_col_major);
}

struct Case {
    const char* name;
    void (*kernel)(Args);
    unsigned blocks;
    int shared, cluster;
};
#define FASTFT_CASE(name, ...) \
    {#name, &name<true>, __VA_ARGS__}, { "right " #name, &name<false>, __VA_ARGS__ }
const Case kCases[] = {
    FASTFT_CASE(no_barrier, 1, 0, 1),
    FASTFT_CASE(no_barrier_before_reuse, 1, 0, 1),
    FASTFT_CASE(no_warp_barrier, 1, 0, 1),
    FASTFT_CASE(divergent_barrier, 1, 0, 1),
    FASTFT_CASE(divergent_shuffle, 1, 0, 1),
    FASTFT_CASE(beyond_the_end, 1, 0, 1),
    FASTFT_CASE(before_the_begin, 1, 0, 1),
    FASTFT_CASE(beyond_shared, 1, kThreads, 1),
    FASTFT_CASE(unwritten_shared, 1, kThreads, 1),
    FASTFT_CASE(misaligned, 1, 0, 1),
    FASTFT_CASE(copy_not_waited_for, 1, 16, 1),
    FASTFT_CASE(copy_of_another_thread, 1, 16, 1),
    FASTFT_CASE(blocks_that_meet, 2, 0, 1),
    FASTFT_CASE(no_fence, 4, 0, 1),
    FASTFT_CASE(product, 1, 512, 1),
    {"right cluster_barrier", &cluster_barrier<0>, 4, 0, 2},
    {"no_cluster_barrier_before", &cluster_barrier<1>, 4, 0, 2},
    {"no_cluster_barrier_after", &cluster_barrier<2>, 4, 0, 2},
};

}  // namespace
}  // namespace FASTFT_TARGET
}  // namespace fastft

static std::string fault;
extern "C" __attribute__((visibility("default"))) const char* fault_message() { return fault.c_str(); }
extern "C" __attribute__((visibility("default"))) int faulty(const char* name, float* x, int64_t n) {
    for (const auto& one : fastft::kCases) {
        if (strcmp(one.name, name) != 0) continue;
        const cudaError_t error = fastft::launch_kernel(one.kernel, one.blocks, fastft::kThreads, one.shared,
                                                        one.cluster, nullptr, fastft::Args{x, n});
        fault = cudaGetErrorString(error);
        return error != cudaSuccess;
    }
    fault = "no such kernel";
    return 1;
}
