// What the Python module asks of the library.
#pragma once

#include <cstdint>

#include "fastft/cpu_capability.h"

namespace fastft {

// A kernel's launch as the library makes it on the current device, for rows of OPT's vocabulary (50,272) in
// bfloat16.
struct LaunchConfiguration {
    const char* kernel;
    int blocks;                     // that share a row
    int threads;                    // of a block
    int registers;                  // of a thread; 0 without a device, like what follows
    int static_shared_bytes;        // of a block
    int64_t dynamic_shared_bytes;   // of a block
    int blocks_per_multiprocessor;  // resident
};

struct DeviceLimits {
    char name[256];
    int major, minor;
    int multiprocessors;
    int max_threads_per_block;
    int64_t shared_bytes_per_block, shared_bytes_per_multiprocessor;
    int64_t l2_bytes;
    int64_t global_bytes;
};

FASTFT_EXPORT bool built_with_cuda();
// Fills at most `capacity` entries and returns how many there are; 0 in a build without CUDA.
FASTFT_EXPORT int launch_configurations(LaunchConfiguration* out, int capacity);
// Number of CUDA devices; 0 without CUDA, without a driver or without a device.
FASTFT_EXPORT int device_count();
FASTFT_EXPORT bool device_limits(int device, DeviceLimits* out);
// Whether the loaded torch offers its current CUDA stream.
FASTFT_EXPORT bool torch_has_cuda_stream();

}  // namespace fastft
