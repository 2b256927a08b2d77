// What the Python module asks of the library.
#pragma once

#include <cstdint>

#include "fastft/cpu_capability.h"

namespace fastft {

// A kernel's launch configuration as the library would use it for rows of `vocab` elements.
struct LaunchConfiguration {
    const char* kernel;
    int threads;        // per block; one block works on one row
    int registers;      // per thread, of the bfloat16 instance on the current device; 0 without a device
    int shared_bytes;   // static
    int blocks_per_sm;  // resident; 0 without a device
};

struct DeviceLimits {
    char name[256];
    int major, minor;
    int multiprocessors;
    int max_threads_per_block;
    int64_t shared_bytes_per_block;
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
