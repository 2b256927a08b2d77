// What the AdamW kernel asks of SIMD values beyond vec.h: roots, abs_, floor_, the largest lane, and stores
// of 8-bit codes.
#pragma once

#include "fastft/adamw_math.h"
#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {

#if defined(__AVX512F__)

inline VecF sqrt_(VecF x) { return {_mm512_sqrt_ps(x.v)}; }
inline VecF abs_(VecF x) { return {_mm512_abs_ps(x.v)}; }
inline VecF copy_sign_(VecF x, VecF sign) {
    const __m512 bit = _mm512_set1_ps(-0.0f);
    return {_mm512_or_ps(_mm512_andnot_ps(bit, x.v), _mm512_and_ps(bit, sign.v))};
}
inline VecF floor_(VecF x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline VecF quick_sqrt_(VecF x) {
    const VecF r{_mm512_rsqrt14_ps(x.v)}, s = x * r;
    return fma_(splat_(0.5f) * r, x - s * s, s);
}
inline VecF fourth_root_(VecF x) { return {_mm512_rsqrt14_ps(_mm512_rsqrt14_ps(x.v))}; }
inline float largest(VecF x) { return _mm512_reduce_max_ps(x.v); }

// The integer parts, which are in the code's range.
inline void store(int8_t* p, VecF x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x.v)));
}
inline void store(uint8_t* p, VecF x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x.v)));
}

#elif defined(__AVX2__)

inline VecF sqrt_(VecF x) { return {_mm256_sqrt_ps(x.v)}; }
inline VecF copy_sign_(VecF x, VecF sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_andnot_ps(bit, x.v), _mm256_and_ps(bit, sign.v))};
}
inline VecF abs_(VecF x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
inline VecF floor_(VecF x) { return {_mm256_floor_ps(x.v)}; }
inline VecF quick_sqrt_(VecF x) {
    const VecF r{_mm256_rsqrt_ps(x.v)}, s = x * r;
    return fma_(splat_(0.5f) * r, x - s * s, s);
}
inline VecF fourth_root_(VecF x) { return {_mm256_rsqrt_ps(_mm256_rsqrt_ps(x.v))}; }
inline float largest(VecF x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// The eight lowest bytes of eight integers: gathered within 128-bit halves, then both halves together.
inline void store_bytes(void* p, VecF x) {
    const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_cvttps_epi32(x.v), gather);
    _mm_storel_epi64(static_cast<__m128i*>(p),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
// The integer parts, which are in the code's range.
inline void store(int8_t* p, VecF x) { store_bytes(p, x); }
inline void store(uint8_t* p, VecF x) { store_bytes(p, x); }

#endif

inline double largest(double x) { return x; }
#if !defined(__AVX512F__) && !defined(__AVX2__)
inline float largest(float x) { return x; }
#endif

}  // namespace FASTFT_TARGET
}  // namespace fastft
