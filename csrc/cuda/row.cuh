// A row of logits as a block, or a cluster of blocks, works on it: which part is whose, reading it once from
// device memory and once more from shared memory, and merging what all threads have seen of it.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {

// This block's part of its row.
struct RowPart {
    int64_t row;
    int begin, size;  // elements; launch_rows refuses rows that int cannot count
};

__device__ __forceinline__ RowPart row_part(const RowLaunch& launch, int64_t vocab) {
    // Blocks of a cluster are neighbours in the grid, so the remainder is a block's rank in its cluster.
    const unsigned blocks = static_cast<unsigned>(launch.blocks);
    const int64_t begin = min(blockIdx.x % blocks * launch.slice, vocab);
    const int64_t size = min(vocab - begin, launch.slice);
    return {blockIdx.x / blocks, static_cast<int>(begin), static_cast<int>(size)};
}

// A part of N rows (student and teacher), read twice in the same order. The first `cached` elements stay in
// shared memory. A thread reads back only what it has brought there itself: no barrier is needed, and a row
// may be overwritten in place, behind the second read.
template <class T, int N>
class RowCache {
  public:
    // rows: the first elements of whole rows.
    __device__ RowCache(const T* const (&rows)[N], const RowPart& part, int64_t cached)
        : size_(part.size), cached_(static_cast<int>(cached)), aligned_(true) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            rows_[n] = rows[n] + part.begin;
            aligned_ = aligned_ && is_aligned(rows_[n]);
        }
        // Only whole, aligned groups are copied past the registers.
        fetched_ = aligned_ ? min(cached_, size_ / kElements * kElements) : 0;
    }

    // f(i, x) for each group of elements that this thread owns: x[n][k] is element i + k of this part of row
    // n, -inf past its end. kAhead groups are on their way while one is worked on.
    template <class F>
    __device__ __forceinline__ void read(F&& f) {
        const int step = static_cast<int>(blockDim.x) * kElements;
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead)
            fetch(static_cast<int>(threadIdx.x) * kElements + ahead * step);
        for_elements(size_, [&](int i) {
            __pipeline_wait_prior(kAhead - 1);  // all but the latest groups have arrived
            float x[N][kElements];
            const bool fetched = i < fetched_, kept = i < cached_;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                if (fetched) {
                    load_elements(slot(n, i), kElements, true, x[n]);
                } else {
                    load_elements(rows_[n] + i, size_ - i, aligned_, x[n]);
                    if (kept) store_elements(slot(n, i), kElements, true, x[n]);
                }
            }
            fetch(i + kAhead * step);
            f(i, x);
        });
    }

    // The same once more.
    template <class F>
    __device__ __forceinline__ void reread(F&& f) const {
        for_elements(size_, [&](int i) {
            float x[N][kElements];
            const bool kept = i < cached_;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                if (kept) {
                    load_elements(slot(n, i), kElements, true, x[n]);
                } else {
                    load_elements(rows_[n] + i, size_ - i, aligned_, x[n]);
                }
            }
            f(i, x);
        });
    }

  private:
    // Groups, 32 bytes of two 16-bit rows each: with 256 threads 32 KB a block.
    static constexpr int kAhead = 4;

    __device__ __forceinline__ T* slot(int n, int i) const {
        return reinterpret_cast<T*>(dynamic_shared) + (n * cached_ + i);
    }
    __device__ __forceinline__ void fetch(int i) const {
        if (i < fetched_) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int v = 0; v < kVectors<T>; ++v)
                    __pipeline_memcpy_async(slot(n, i) + v * (16 / sizeof(T)),
                                            rows_[n] + i + v * (16 / sizeof(T)), 16);
            }
        }
        __pipeline_commit();  // of a group, which may be empty
    }

    const T* rows_[N];
    int size_, cached_, fetched_;
    bool aligned_;
};

// Merging the states of a warp's lanes; afterwards all have the result.
template <class S>
__device__ __forceinline__ S lanes_max(S x) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = max_(x, shuffle_xor(x, mask));
    return x;
}
template <class State>
__device__ __forceinline__ void add_lanes(State& a) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) a.add(shuffle_xor(a, mask));
}
template <class S>
__device__ __forceinline__ void merge_lanes(SoftmaxState<S>& a, S c) {
    a.move_to(lanes_max(a.max), c);
    add_lanes(a);
}
template <class S>
__device__ __forceinline__ void merge_lanes(KlState<S>& a, S c) {
    a.move_to(lanes_max(a.p.max), lanes_max(a.q.max), c);
    add_lanes(a);
}

// Merges the states of all threads that work on a row (warp by warp in float, then over warps and blocks in
// double) and returns finish(the row's state) to all of them; finish runs in one warp. Called by every thread
// of every block of the row, once in a kernel for a type of state.
template <class State, class Finish>
__device__ auto merge_row(State state, float c, int blocks, Finish&& finish) {
    using Wide = decltype(widen(state));
    using Result = decltype(finish(widen(state)));
    __shared__ Wide partial[kMaxThreads / kWarp];
    __shared__ Result result;
    static_assert(sizeof(partial) + sizeof(result) < kStaticShared, "see row_launch.h");
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    merge_lanes(state, c);
    if (lane == 0) partial[warp] = widen(state);
    __syncthreads();
    Wide total;
    total.init();
    if (warp == 0) {
        if (lane < static_cast<int>(blockDim.x) / kWarp) total = partial[lane];
        merge_lanes(total, double(c));
    }
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
        const auto cluster = cooperative_groups::this_cluster();
        if (warp == 0 && lane == 0) partial[0] = total;
        cluster.sync();  // every block's total is in its partial[0]
        if (warp == 0) {
            total.init();
            if (lane < blocks) total = *cluster.map_shared_rank(&partial[0], lane);
            merge_lanes(total, double(c));
        }
        cluster.sync();  // all have read: a block may go, and its shared memory with it
    }
#endif
    if (warp == 0) {
        const Result own = finish(total);
        if (lane == 0) result = own;
    }
    __syncthreads();
    return result;
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
