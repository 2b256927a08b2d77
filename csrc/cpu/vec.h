// SIMD values for the row kernels: one vector type `VecF` of floats per CPU capability, with the operations
// that row_math.h asks for, and loads and stores from every element type. Double has no vector type: it
// exists for tests (gradcheck), and runs through the same templates with V = double.
//
// A file that includes this is compiled once per capability with FASTFT_TARGET naming it. It must include
// nothing that defines inline functions outside of that namespace (no <algorithm>, no <vector>).
#pragma once

#include <cstdint>
#include <cstring>

#include "fastft/row_math.h"
#include "fastft/types.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastft {
inline namespace FASTFT_TARGET {

// --- Conversions of one element -------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline double to_value(double x) { return x; }
inline float to_value(float x) { return x; }
inline float to_value(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_value(Float16 x) {
    // The exponent is moved to float's range by a multiplication, which also normalises subnormals.
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

inline void from_value(double x, double* out) { *out = x; }
inline void from_value(float x, float* out) { *out = x; }
// Both round to nearest, ties to even.
inline void from_value(float x, BFloat16* out) {
    const uint32_t bits = float_to_bits(x);
    out->bits = x != x ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_value(float x, Float16* out) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u;
    } else if (rest >= 0x477ff000u) {  // rounds to 2^16 or more
        half = 0x7c00u;
    } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 puts the bits at the end of the mantissa
        half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    } else {
        half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

// --- exp2 and log of floats ------------------------------------------------------------------------------

// 2^f on [-1/2, 1/2], minimax in relative error, 2e-9 before rounding. exp2_ of a vector has a relative error
// of at most 3 * 2^-24 on [-126, 0] (tests/ops/test_row_math.py); below -126 it is exactly 0.
constexpr float kExp2[7] = {1.0f,          0.693147206f,     0.240226469f,    0.0555032878f,
                            0.0096184890f, 0.0013399931422f, 0.0001534581178f};
// (log(1 + x) - x + x^2 / 2) / x^3 on [sqrt(1/2) - 1, sqrt(2) - 1], minimax, 6e-9 of log's own size.
// log_ of a vector has a relative error of at most 4 * 2^-24 over the normal numbers, and an absolute one of
// 2^-24 near 1. Its argument must be a positive normal number or +inf.
constexpr float kLog[8] = {0.333333167f, -0.250008104f, 0.200022863f, -0.166245542f,
                           0.141811913f, -0.131287528f, 0.128816519f, -0.0785962190f};

#if defined(__AVX512F__)

struct VecF {
    __m512 v;
};
constexpr int kWidth = 16;

inline VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline __mmask16 operator>(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline __mmask16 operator>=(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline bool any_(__mmask16 m) { return m != 0; }
inline bool any_nan_(VecF x) { return _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q) != 0; }
inline VecF select_(__mmask16 m, VecF a, VecF b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
inline VecF fma_(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The instruction returns its second operand where either is NaN, like max_ of scalars.
inline VecF max_(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VecF splat_(float x) { return {_mm512_set1_ps(x)}; }
inline float max_lanes_(VecF x) { return _mm512_reduce_max_ps(x.v); }
inline float sum_lanes_(VecF x) { return _mm512_reduce_add_ps(x.v); }

inline VecF exp2_(VecF x) {
    // -inf and everything that would be subnormal becomes -200, which scalef turns into 0.
    const __m512 lowest = _mm512_set1_ps(-200.0f);
    const __m512 z =
        _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_LT_OQ), x.v, lowest);
    const __m512 n = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(z, n);
    __m512 p = _mm512_set1_ps(kExp2[6]);
    for (int i = 5; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[i]));
    return {_mm512_scalef_ps(p, n)};
}

inline VecF log_(VecF x) {
    // mantissa in [1, 2), moved to [sqrt(1/2), sqrt(2)) by taking one from the exponent
    __m512 e = _mm512_getexp_ps(x.v), m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask16 high = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GE_OQ);
    m = _mm512_mask_mul_ps(m, high, m, _mm512_set1_ps(0.5f));
    e = _mm512_mask_add_ps(e, high, e, _mm512_set1_ps(1.0f));
    const __m512 f = _mm512_sub_ps(m, _mm512_set1_ps(1.0f)), f2 = _mm512_mul_ps(f, f);
    __m512 p = _mm512_set1_ps(kLog[7]);
    for (int i = 6; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kLog[i]));
    // small terms first: x^3 P(x) - x^2/2, then x, then e ln2 in two parts
    __m512 r = _mm512_fmadd_ps(_mm512_mul_ps(p, f), f2, _mm512_mul_ps(f2, _mm512_set1_ps(-0.5f)));
    r = _mm512_fmadd_ps(e, _mm512_set1_ps(-2.12194440e-4f), r);
    r = _mm512_add_ps(r, f);
    r = _mm512_fmadd_ps(e, _mm512_set1_ps(0.693359375f), r);
    // The exponent of inf is inf, and its two parts of e ln2 cancel to NaN.
    return {_mm512_mask_mov_ps(r, _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(__FLT_MAX__), _CMP_NLE_UQ), x.v)};
}

// exp(-|x|): nothing overflows, what underflows becomes subnormal and then 0, so two of exp2_'s steps are not
// needed.
inline VecF exp_minus_abs_(VecF x) {
    const __m512 log2e = _mm512_set1_ps(static_cast<float>(kLog2E));
    // -inf becomes -200, which scalef turns into 0; NaN stays.
    const __m512 z = _mm512_max_ps(_mm512_set1_ps(-200.0f), _mm512_or_ps(x.v, _mm512_set1_ps(-0.0f)));
    const __m512 n =
        _mm512_roundscale_ps(_mm512_mul_ps(z, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_fmsub_ps(z, log2e, n);
    __m512 p = _mm512_set1_ps(kExp2[6]);
    for (int i = 5; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[i]));
    return {_mm512_scalef_ps(p, n)};
}

// The estimate is good to 2^-14: after a step of Newton's what is left is rounding, two units in the last
// place.
inline VecF reciprocal_(VecF x) {
    const __m512 r = _mm512_rcp14_ps(x.v);
    return {_mm512_fmadd_ps(_mm512_fnmadd_ps(x.v, r, _mm512_set1_ps(1.0f)), r, r)};
}

inline VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline VecF load(const BFloat16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline VecF load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline VecF load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline VecF load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, VecF x) { _mm512_storeu_ps(p, x.v); }
inline void store(BFloat16* p, VecF x) {
#if defined(__AVX512BF16__)
    const __m256i h = (__m256i)_mm512_cvtneps_pbh(x.v);
#else
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i all = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
    const __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
inline void store(Float16* p, VecF x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

struct VecF {
    __m256 v;
};
struct MaskF {
    __m256 v;
};
constexpr int kWidth = 8;

inline VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
inline MaskF operator>(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline MaskF operator>=(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
inline bool any_(MaskF m) { return _mm256_movemask_ps(m.v) != 0; }
inline bool any_nan_(VecF x) { return _mm256_movemask_ps(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)) != 0; }
inline VecF select_(MaskF m, VecF a, VecF b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
inline VecF fma_(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF max_(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
inline VecF splat_(float x) { return {_mm256_set1_ps(x)}; }
template <class F>
inline float fold_lanes_(VecF x, F&& f) {
    const VecF half = f(x, VecF{_mm256_permute2f128_ps(x.v, x.v, 1)});
    const VecF quarter = f(half, VecF{_mm256_permute_ps(half.v, 0x4e)});
    return _mm256_cvtss_f32(f(quarter, VecF{_mm256_permute_ps(quarter.v, 0xb1)}).v);
}
inline float max_lanes_(VecF x) {
    return fold_lanes_(x, [](VecF a, VecF b) { return max_(a, b); });
}
inline float sum_lanes_(VecF x) {
    return fold_lanes_(x, [](VecF a, VecF b) { return a + b; });
}

inline VecF exp2_(VecF x) {
    // Kept where x >= -126 or NaN; -inf and subnormal results become 0.
    const __m256 low = _mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
    const __m256 z = _mm256_blendv_ps(x.v, _mm256_set1_ps(-126.0f), low);
    const __m256 n = _mm256_round_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(z, n);
    __m256 p = _mm256_set1_ps(kExp2[6]);
    for (int i = 5; i >= 0; --i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2[i]));
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return {_mm256_andnot_ps(low, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)))};
}

inline VecF log_(VecF x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    // Subtracting sqrt(1/2)'s pattern first puts the mantissa into [sqrt(1/2), sqrt(2)).
    const __m256i offset = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));
    const __m256 e = _mm256_cvtepi32_ps(_mm256_srai_epi32(offset, 23));
    const __m256i mantissa = _mm256_add_epi32(_mm256_and_si256(offset, _mm256_set1_epi32(0x007fffff)),
                                              _mm256_set1_epi32(0x3f3504f3));
    const __m256 f = _mm256_sub_ps(_mm256_castsi256_ps(mantissa), _mm256_set1_ps(1.0f)),
                 f2 = _mm256_mul_ps(f, f);
    __m256 p = _mm256_set1_ps(kLog[7]);
    for (int i = 6; i >= 0; --i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kLog[i]));
    __m256 r = _mm256_fmadd_ps(_mm256_mul_ps(p, f), f2, _mm256_mul_ps(f2, _mm256_set1_ps(-0.5f)));
    r = _mm256_fmadd_ps(e, _mm256_set1_ps(-2.12194440e-4f), r);
    r = _mm256_add_ps(r, f);
    r = _mm256_fmadd_ps(e, _mm256_set1_ps(0.693359375f), r);
    // The integer arithmetic above knows neither inf nor NaN.
    const __m256 special = _mm256_cmp_ps(x.v, _mm256_set1_ps(__FLT_MAX__), _CMP_NLE_UQ);
    return {_mm256_blendv_ps(r, x.v, special)};
}

inline VecF exp_minus_abs_(VecF x) {
    const __m256 negative = _mm256_or_ps(x.v, _mm256_set1_ps(-0.0f));
    return exp2_(VecF{_mm256_mul_ps(negative, _mm256_set1_ps(static_cast<float>(kLog2E)))});
}
inline VecF reciprocal_(VecF x) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), x.v)}; }

inline VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline VecF load(const BFloat16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline VecF load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline VecF load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline VecF load(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, VecF x) { _mm256_storeu_ps(p, x.v); }
inline void store(BFloat16* p, VecF x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i all =
        _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    // packus works within 128-bit halves; the permutation brings the two results together
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(all, all), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Float16* p, VecF x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#endif

#if defined(__AVX512F__) || defined(__AVX2__)
template <>
struct ValueTraits<VecF> {
    using Scalar = float;
    static VecF splat(float x) { return splat_(x); }
};
#else
using VecF = float;
#endif

// --- What a kernel template asks for: the value type of an element type, and blocks of values -----------

inline double max_lanes_(double x) { return x; }
inline double sum_lanes_(double x) { return x; }
#if !defined(__AVX512F__) && !defined(__AVX2__)
inline float max_lanes_(float x) { return x; }
inline float sum_lanes_(float x) { return x; }
#endif

template <class T>
struct ValueOf {
    using type = VecF;
};
template <>
struct ValueOf<double> {
    using type = double;
};
template <class T>
using Value = typename ValueOf<T>::type;

template <class V>
constexpr int width() {
    return sizeof(V) / sizeof(ScalarOf<V>);
}

// One value, of width<V>() elements, from any element type: a number, or a code.
template <class V, class T>
inline V load_value(const T* p) {
    if constexpr (width<V>() > 1) {
        return load(p);
    } else if constexpr (sizeof(T) == 1) {
        return V(*p);
    } else {
        return to_value(*p);
    }
}

template <class V, class T>
inline void store_value(T* p, V x) {
    if constexpr (width<V>() > 1) {
        store(p, x);
    } else if constexpr (sizeof(T) == 1) {
        *p = static_cast<T>(x);
    } else {
        from_value(x, p);
    }
}

// K vectors are in flight at once: enough to hide the latency of exp2's chain, few enough for 16 registers.
constexpr int kBlock = 4;

template <class T>
constexpr int64_t block_elements() {
    return int64_t(kBlock) * width<Value<T>>();
}

template <class T, class V>
inline void load_block(const T* p, V (&x)[kBlock]) {
    if constexpr (width<V>() == 1) {
        for (int k = 0; k < kBlock; ++k) x[k] = to_value(p[k]);
    } else {
        for (int k = 0; k < kBlock; ++k) x[k] = load(p + k * width<V>());
    }
}

template <class T, class V>
inline void store_block(T* p, const V (&x)[kBlock]) {
    if constexpr (width<V>() == 1) {
        for (int k = 0; k < kBlock; ++k) from_value(x[k], p + k);
    } else {
        for (int k = 0; k < kBlock; ++k) store(p + k * width<V>(), x[k]);
    }
}

// The last, short block of a row, filled up with -inf: probability 0, so it adds nothing to any sum.
template <class T>
inline void copy_tail(const T* p, int64_t n, T (&buffer)[block_elements<T>()]) {
    T minus_inf;
    from_value(-ScalarOf<Value<T>>(__builtin_inf()), &minus_inf);
    for (int64_t i = 0; i < block_elements<T>(); ++i) buffer[i] = i < n ? p[i] : minus_inf;
}

// f(x) for every block of x[0, n).
template <class T, class F>
inline void for_blocks(const T* x, int64_t n, F&& f) {
    using V = Value<T>;
    constexpr int64_t step = block_elements<T>();
    V a[kBlock];
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        load_block(x + i, a);
        f(a);
    }
    if (i < n) {
        T buffer[step];
        copy_tail(x + i, n - i, buffer);
        load_block(buffer, a);
        f(a);
    }
}

// f(x, y) for every block of x[0, n) and y[0, n).
template <class T, class F>
inline void for_blocks(const T* x, const T* y, int64_t n, F&& f) {
    using V = Value<T>;
    constexpr int64_t step = block_elements<T>();
    V a[kBlock], b[kBlock];
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        load_block(x + i, a);
        load_block(y + i, b);
        f(a, b);
    }
    if (i < n) {
        T buffer_x[step], buffer_y[step];
        copy_tail(x + i, n - i, buffer_x);
        copy_tail(y + i, n - i, buffer_y);
        load_block(buffer_x, a);
        load_block(buffer_y, b);
        f(a, b);
    }
}

// out[j] = f(x[j], y[j]) element by element; out may be x or y.
template <class T, class F>
inline void map_blocks(const T* x, const T* y, T* out, int64_t n, F&& f) {
    using V = Value<T>;
    constexpr int64_t step = block_elements<T>();
    V a[kBlock], b[kBlock];
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        load_block(x + i, a);
        load_block(y + i, b);
        for (int k = 0; k < kBlock; ++k) a[k] = f(a[k], b[k]);
        store_block(out + i, a);
    }
    if (i < n) {
        T buffer_x[step], buffer_y[step];
        copy_tail(x + i, n - i, buffer_x);
        copy_tail(y + i, n - i, buffer_y);
        load_block(buffer_x, a);
        load_block(buffer_y, b);
        for (int k = 0; k < kBlock; ++k) a[k] = f(a[k], b[k]);
        store_block(buffer_x, a);
        memcpy(out + i, buffer_x, sizeof(T) * static_cast<size_t>(n - i));
    }
}

// out[j] = f(x[j]); out may be x.
template <class T, class F>
inline void map_blocks(const T* x, T* out, int64_t n, F&& f) {
    using V = Value<T>;
    constexpr int64_t step = block_elements<T>();
    V a[kBlock];
    int64_t i = 0;
    for (; i + step <= n; i += step) {
        load_block(x + i, a);
        for (int k = 0; k < kBlock; ++k) a[k] = f(a[k]);
        store_block(out + i, a);
    }
    if (i < n) {
        T buffer[step];
        copy_tail(x + i, n - i, buffer);
        load_block(buffer, a);
        for (int k = 0; k < kBlock; ++k) a[k] = f(a[k]);
        store_block(buffer, a);
        memcpy(out + i, buffer, sizeof(T) * static_cast<size_t>(n - i));
    }
}

// Lane `i` of a vector as a double; lanes are folded in double, in their order.
template <class V>
inline double lane(const V& v, int i) {
    ScalarOf<V> x;
    memcpy(&x, reinterpret_cast<const char*>(&v) + sizeof(x) * static_cast<size_t>(i), sizeof(x));
    return x;
}

template <class V>
inline RunningSum<double> lane(const RunningSum<V>& s, int i) {
    return {lane(s.sum, i), lane(s.carry, i)};
}

template <class V>
inline SoftmaxState<double> lane(const SoftmaxState<V>& s, int i) {
    return {lane(s.max, i), lane(s.sum, i)};
}

template <class V>
inline SoftmaxState<double> fold(const SoftmaxState<V>& state, double c) {
    SoftmaxState<double> total = lane(state, 0);
    for (int i = 1; i < width<V>(); ++i) merge(total, lane(state, i), c);
    return total;
}

template <class V>
inline KlState<double> fold(const KlState<V>& state, double c) {
    KlState<double> total;
    for (int i = 0; i < width<V>(); ++i) {
        const KlState<double> one{lane(state.p, i), lane(state.q, i), lane(state.dot, i)};
        if (i == 0) {
            total = one;
        } else {
            merge(total, one, c);
        }
    }
    return total;
}

template <class V>
inline double fold(const RunningSum<V>& s) {
    double total = 0;
    for (int i = 0; i < width<V>(); ++i) total += lane(s, i).value();
    return total;
}

// f(element) with a value of the type that `dtype` names.
template <class F>
inline void dispatch_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::Float64:
            return f(double());
        case DType::Float32:
            return f(float());
        case DType::BFloat16:
            return f(BFloat16());
        case DType::Float16:
            return f(Float16());
    }
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
