// Element types as the kernels see them: storage only, no arithmetic.
#pragma once

#include <cstdint>

namespace fastft {

enum class DType : int32_t { Float64, Float32, BFloat16, Float16 };

// Raw 16-bit patterns. Kernels convert to float in registers (cpu/vec.h, cuda/common.cuh).
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// Which divergence between the teacher's distribution P_t and the student's P_s.
enum class Direction : int32_t {
    Forward,  // KL(P_t || P_s)
    Reverse,  // KL(P_s || P_t)
    Jsd,      // beta KL(P_t || M) + (1 - beta) KL(P_s || M), M = beta P_t + (1 - beta) P_s
};

}  // namespace fastft
