// float16 as a pattern of bits, rounded to nearest even. By hand: not every compiler has _Float16 in C++.
#pragma once

#include <cuda_runtime.h>

struct __half {
    uint16_t bits;
};
inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31;
    const float fraction = static_cast<float>(x.bits & 1023), sign = x.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
    return sign * (exponent == 0 ? ldexpf(fraction, -24) : ldexpf(fraction + 1024, exponent - 25));
}
inline __half __float2half_rn(float x) {
    const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
    const float size = fabsf(x);
    if (x != x) return {0x7fff};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    // The steps between subnormals are those of the smallest normal numbers; a carry is the next exponent.
    const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
    const uint32_t steps = static_cast<uint32_t>(nearbyintf(ldexpf(size, 10 - exponent)));
    return {static_cast<uint16_t>(sign | (steps + static_cast<uint32_t>(exponent + 14) * 1024))};
}
