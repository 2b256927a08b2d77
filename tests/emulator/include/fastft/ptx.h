// In place of csrc/include/fastft/ptx.h, which is found behind this one.
#pragma once

#include <cuda_runtime.h>

namespace fastft {

inline float ptx_max_nan(float a, float b) { return a != a || a > b ? a : b; }
// No result is subnormal.
inline float ptx_exp2(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

inline void ptx_copy_async(void* target, const void* source, int bytes) {
    emulator::copy_async(target, source, 16, static_cast<size_t>(16 - bytes));
}

}  // namespace fastft
