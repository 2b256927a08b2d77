// Which instruction set the CPU kernels use; picked once, at run time.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define FASTFT_EXPORT __declspec(dllexport)
#else
#define FASTFT_EXPORT __attribute__((visibility("default")))
#endif

namespace fastft {

enum class CpuCapability : int32_t { Scalar, Avx2, Avx512, Avx512Bf16 };

// The best one that this build and this CPU both have.
FASTFT_EXPORT CpuCapability best_cpu_capability();

// The one in use: the best, unless the environment variable FASTFT_CPU_CAPABILITY (scalar, avx2, avx512,
// avx512_bf16) asks for a lesser one. Throws std::runtime_error where it asks for one that is not there.
FASTFT_EXPORT CpuCapability cpu_capability();
FASTFT_EXPORT void set_cpu_capability(const char* name);

FASTFT_EXPORT const char* name_of(CpuCapability capability);

// vec.h's exp2 and log in the capability in use, for tests.
FASTFT_EXPORT void exp2_array_cpu(const float* x, float* y, int64_t n);
FASTFT_EXPORT void log_array_cpu(const float* x, float* y, int64_t n);

}  // namespace fastft
