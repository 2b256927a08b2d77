// How the CUDA kernels lay a row of logits over the device. Plain C++, so that it is tested without a device.
//
// A row is read twice, once for its softmax and once for its gradient, and the first read keeps it in shared
// memory: device memory then moves each logit once in and each gradient once out, and nothing depends on what
// the L2 cache still holds of the rows that all blocks work on together.
//
// Where one block cannot hold a row, a cluster of blocks shares it (compute capability 9.0 and later). Blocks
// are kept small enough that at least kResident of them fit on a multiprocessor: while one merges its states
// or waits for its neighbours, another one loads or computes. OPT's student and teacher rows in bfloat16 are
// 201 KB: four blocks of 50 KB a row, and four such blocks on a multiprocessor of an H200. Each keeps up to
// 32 KB of loads on their way (row.cuh), where 33 B/ns * 0.8 us = 26 KB a multiprocessor hide the memory's
// latency. Llama 3's 128,256 tokens make eight blocks of 64 KB, three a multiprocessor. Where even the
// largest cluster is too small, or there is none, the first part of each slice is kept and the rest read
// again.
//
// Predicted on an H200 (4.3 TB/s) for log_softmax_kl with gradient, 3 * 2048 * 50272 * 2 B: 0.144 ms. The
// arithmetic is nearly as tight: at that rate and 1.98 GHz a multiprocessor has 47 instruction slots and 5.8
// exp2 for a pair of elements, and sm_90a's machine code takes 41 and 4.2 (25 and 2.2 in the first read), and
// some 3 more for merging. So 0.15 to 0.2 ms are to be expected; fewer instructions, not fewer bytes, are
// what is left.
#pragma once

#include <cstdint>

namespace fastft {

// Elements that a thread takes at once: 16 bytes of a 16-bit type, 32 of float.
constexpr int kElements = 8;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;

// What limits a launch; of one device.
struct RowLimits {
    int max_cluster;  // blocks; 1 where the device has no clusters
    int64_t shared_per_block;
    int64_t shared_per_multiprocessor;
};

inline RowLimits row_limits(int compute_capability_major, int64_t shared_per_block,
                            int64_t shared_per_multiprocessor) {
    // 8 blocks are allowed on every device that has clusters.
    return {compute_capability_major >= 9 ? 8 : 1, shared_per_block, shared_per_multiprocessor};
}

struct RowLaunch {
    int blocks;      // that share a row; more than one is a cluster in kernels that merge states
    int threads;     // of each
    int64_t slice;   // elements of the row for each block, a multiple of kElements; the last may have fewer
    int64_t cached;  // of them kept in shared memory, a multiple of kElements
    int64_t shared_bytes;  // dynamic, for all rows that are kept
};

// Of a block's shared memory: what the merging of states needs, and 1 KB that the system takes of each block.
constexpr int64_t kStaticShared = 2048;
constexpr int64_t kSystemShared = 1024;
// Blocks on a multiprocessor that the plan aims for.
constexpr int kResident = 3;

inline int64_t slice_of(int64_t vocab, int blocks) {
    const int64_t groups = (vocab + kElements - 1) / kElements;
    return (groups + blocks - 1) / blocks * kElements;
}

// A whole number of warps, and none without elements.
inline int threads_of(int64_t slice, int most) {
    const int64_t warps = (slice / kElements + kWarp - 1) / kWarp;
    return warps * kWarp < most ? static_cast<int>(warps) * kWarp : most;
}

// For kernels that read their rows twice; `element_bytes` is that of all rows together, which share a slice.
inline RowLaunch plan_cached_row(int64_t vocab, int64_t element_bytes, const RowLimits& limits) {
    const auto resident = [&](int64_t elements) {
        return limits.shared_per_multiprocessor / (elements * element_bytes + kStaticShared + kSystemShared);
    };
    RowLaunch launch{};
    launch.blocks = 1;
    while (resident(slice_of(vocab, launch.blocks)) < kResident && 2 * launch.blocks <= limits.max_cluster)
        launch.blocks *= 2;
    launch.slice = slice_of(vocab, launch.blocks);
    const int64_t room = (limits.shared_per_block - kStaticShared) / element_bytes / kElements * kElements;
    launch.cached = launch.slice < room ? launch.slice : (room > 0 ? room : 0);
    launch.shared_bytes = launch.cached * element_bytes;
    // A block that has the multiprocessor to itself, or half of it, needs more warps to keep it busy.
    launch.threads =
        threads_of(launch.slice, resident(launch.cached) < kResident ? kMaxThreads : kMaxThreads / 2);
    return launch;
}

// For kernels that read and write each element once: blocks that know nothing of each other. Slices are short
// so that the last blocks of a launch do not leave most multiprocessors idle.
inline RowLaunch plan_streamed_row(int64_t vocab) {
    constexpr int64_t longest = 16384;
    RowLaunch launch{};
    launch.blocks = static_cast<int>((vocab + longest - 1) / longest);
    launch.slice = slice_of(vocab, launch.blocks);
    launch.threads = threads_of(launch.slice, kMaxThreads / 2);
    return launch;
}

}  // namespace fastft
