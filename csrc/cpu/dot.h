// Register-blocked products: rows of a large matrix against a small one that was packed for it, for every
// element type. With bf16 products (avx512_bf16) two neighbours of the summed dimension lie in one 32-bit
// word of the packed matrix.
#pragma once

#include <type_traits>

#include "fastft/small_matrix.h"
#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {

// How elements of type T are multiplied and summed: `kDepth` neighbours of the summed dimension at once.
//   Word     kDepth elements of the packed matrix that belong to one output
//   Operand  a vector of Words
template <class T>
struct Dot {
    using V = Value<T>;
    using Word = ScalarOf<V>;
    using Operand = V;
    static constexpr int kDepth = 1;

    static Word word(const T (&x)[kDepth]) { return to_value(x[0]); }
    static Operand broadcast(const T* x) { return ValueTraits<V>::splat(to_value(*x)); }
    static Operand broadcast_word(const Word* x) { return ValueTraits<V>::splat(*x); }
    static Operand load_words(const Word* p) {
        if constexpr (width<V>() == 1) {
            return *p;
        } else {
            return load(p);
        }
    }
    static V multiply_add(Operand a, Operand b, V sum) { return fma_(a, b, sum); }

    // Two vectors of Words from two neighbouring vectors of columns of the rows `x` (kDepth of them).
    static void load_columns(const T* const (&x)[kDepth], Operand (&out)[2]) {
        for (int i = 0; i < 2; ++i) {
            if constexpr (width<V>() == 1) {
                out[i] = to_value(x[0][i]);
            } else {
                out[i] = load(x[0] + i * width<V>());
            }
        }
    }
    // Column i of what load_columns gave is lane i of the two vectors.
    static void store_columns(const V (&sums)[2], Word* out) {
        memcpy(out, &sums[0], sizeof(V));
        memcpy(out + width<V>(), &sums[1], sizeof(V));
    }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<BFloat16> {
    using V = VecF;
    struct Word {
        BFloat16 x[2];
    };
    using Operand = __m512i;
    static constexpr int kDepth = 2;

    static Word word(const BFloat16 (&x)[2]) { return {{x[0], x[1]}}; }
    static Operand broadcast(const BFloat16* x) {
        int32_t pair;
        memcpy(&pair, x, 4);
        return _mm512_set1_epi32(pair);
    }
    static Operand broadcast_word(const Word* x) { return broadcast(x->x); }
    static Operand load_words(const Word* p) { return _mm512_loadu_si512(p); }
    static V multiply_add(Operand a, Operand b, V sum) {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b)};
    }

    static void load_columns(const BFloat16* const (&x)[2], Operand (&out)[2]) {
        const __m512i a = _mm512_loadu_si512(x[0]), b = _mm512_loadu_si512(x[1]);
        out[0] = _mm512_unpacklo_epi16(a, b);
        out[1] = _mm512_unpackhi_epi16(a, b);
    }
    // unpack works within 128 bits: [0] holds columns 0-3, 8-11, 16-19, 24-27, [1] the others.
    static void store_columns(const V (&sums)[2], float* out) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        _mm512_storeu_ps(out, _mm512_permutex2var_ps(sums[0].v, first, sums[1].v));
        _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(sums[0].v, second, sums[1].v));
    }
};
#endif

template <class T>
using Word = typename Dot<T>::Word;
template <class T>
using Operand = typename Dot<T>::Operand;
template <class T>
constexpr int depth() {
    return Dot<T>::kDepth;
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr int64_t lanes() {
    return width<Value<T>>();
}

// out[w * out_stride + i] = the word of elements (i, w * depth + [0, depth)) of a small matrix [outputs, n],
// 0 beyond its ends, for i in [i_begin, i_end) and w in [w_begin, w_end).
template <class T>
void pack(const SmallMatrix& m, int64_t outputs, int64_t n, int64_t i_begin, int64_t i_end, int64_t w_begin,
          int64_t w_end, Word<T>* out, int64_t out_stride) {
    constexpr int kDepth = depth<T>();
    const int64_t i_inside = smaller(i_end, outputs), w_inside = smaller(w_end, n / kDepth);
    const T* data = static_cast<const T*>(m.data);
    // The compiler is shown that one of the strides is 1: that is what it can make vectors of.
    const auto copy = [&](int64_t i_from, int64_t i_to, auto stride_0, auto stride_1) {
        for (int64_t w = w_begin; w < w_inside; ++w) {
            for (int64_t i = i_from; i < i_to; ++i) {
                T x[kDepth];
                for (int t = 0; t < kDepth; ++t) x[t] = data[i * stride_0 + (w * kDepth + t) * stride_1];
                out[w * out_stride + i] = Dot<T>::word(x);
            }
        }
    };
    struct One {
        constexpr operator int64_t() const { return 1; }
    };
    if (m.stride_0 == 1) {
        copy(i_begin, i_inside, One(), m.stride_1);
    } else {
        // Few rows at a time: a power of two between them sends them all to the same few lines of the L1
        // cache.
        for (int64_t i = i_begin; i < i_inside; i += 4) {
            if (m.stride_1 == 1) {
                copy(i, smaller(i + 4, i_inside), m.stride_0, One());
            } else {
                copy(i, smaller(i + 4, i_inside), m.stride_0, m.stride_1);
            }
        }
    }
    T zeros[kDepth];
    for (int t = 0; t < kDepth; ++t) from_value(ScalarOf<Value<T>>(0), &zeros[t]);
    for (int64_t w = w_begin; w < w_end; ++w) {
        for (int64_t i = w < w_inside ? i_inside : i_begin; i < i_end; ++i) {
            T x[kDepth];
            memcpy(x, zeros, sizeof(x));
            for (int t = 0; t < kDepth; ++t) {
                if (i < outputs && w * kDepth + t < n) {
                    x[t] = data[i * m.stride_0 + (w * kDepth + t) * m.stride_1];
                }
            }
            out[w * out_stride + i] = Dot<T>::word(x);
        }
    }
}

constexpr int64_t kLine = 64;  // bytes

// sums[m][v] += row m of x, an [kRows, n] matrix, times a packed matrix of vectors v. With few sums there are
// kChains of each, taking turns, for a multiplication to begin before the one before it has ended. kAhead:
// the rows that follow are prefetched; rows often end at a page's end, where the hardware's own prefetching
// stops.
template <class T, int kRows, int kVectors, int kChains, bool kAhead>
inline void multiply(const T* x, int64_t x_stride, int64_t n, const Word<T>* packed, int64_t packed_stride,
                     Value<T> (&sums)[kRows][kVectors]) {
    using D = Dot<T>;
    constexpr int64_t L = lanes<T>(), kLineWords = kLine / static_cast<int64_t>(sizeof(T) * D::kDepth);
    const auto step = [&](int64_t w, auto broadcast, Value<T>(&to)[kRows][kVectors]) {
        Operand<T> p[kVectors];
        for (int v = 0; v < kVectors; ++v) p[v] = D::load_words(packed + w * packed_stride + v * L);
        for (int m = 0; m < kRows; ++m) {
            const Operand<T> b = broadcast(m, w);
            for (int v = 0; v < kVectors; ++v) to[m][v] = D::multiply_add(b, p[v], to[m][v]);
        }
    };
    const auto inside = [&](int m, int64_t w) { return D::broadcast(x + m * x_stride + w * D::kDepth); };
    const int64_t whole = n / D::kDepth;
    int64_t w = 0;
    Value<T> chains[kChains][kRows][kVectors];
    for (int c = 1; c < kChains; ++c) {
        for (int m = 0; m < kRows; ++m) {
            for (int v = 0; v < kVectors; ++v) chains[c][m][v] = ValueTraits<Value<T>>::splat(0);
        }
    }
    for (; w + kChains <= whole; w += kChains) {
        if (kAhead && w % kLineWords == 0) {
            for (int m = 0; m < kRows; ++m) __builtin_prefetch(x + (m + kRows) * x_stride + w * D::kDepth);
        }
        step(w, inside, sums);
        for (int c = 1; c < kChains; ++c) step(w + c, inside, chains[c]);
    }
    for (int c = 1; c < kChains; ++c) {
        for (int m = 0; m < kRows; ++m) {
            for (int v = 0; v < kVectors; ++v) sums[m][v] = sums[m][v] + chains[c][m][v];
        }
    }
    for (; w < whole; ++w) step(w, inside, sums);
    if (whole * D::kDepth < n) {
        step(
            whole,
            [&](int m, int64_t) {
                T last[D::kDepth];
                for (int t = 0; t < D::kDepth; ++t) from_value(ScalarOf<Value<T>>(0), &last[t]);
                last[0] = x[m * x_stride + n - 1];
                return D::broadcast(last);
            },
            sums);
    }
}

// Six rows at a time: their distance is often a power of two, and an L1 cache keeps 8 lines of the same
// address modulo 4096. Up to 4 vectors for each make 24 sums of 32 registers, or 2 make 12 of 16.
constexpr int kRows = 6;
template <class T>
constexpr int most_vectors() {
    return sizeof(Value<T>) == 64 ? 4 : 2;
}

// f(i, rows) over [begin, end), rows a compile-time constant.
template <class F>
inline void for_rows(int64_t begin, int64_t end, F&& f) {
    int64_t m = begin;
    for (; m + kRows <= end; m += kRows) f(m, std::integral_constant<int, kRows>());
    for (; m + 2 <= end; m += 2) f(m, std::integral_constant<int, 2>());
    if (m < end) f(m, std::integral_constant<int, 1>());
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
