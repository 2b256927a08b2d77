// What attention's forward and backward share: rows and packed blocks of ragged sequences.
#pragma once

#include "dot.h"
#include "fastft/attention.h"

namespace fastft {
inline namespace FASTFT_TARGET {

template <class T>
const T* row_of(const Heads& x, int64_t token, int64_t head) {
    return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

// The sequence of `cu_seqlens` [sequences + 1] that holds `place`: the last one that begins at or before it.
template <class I>
inline int64_t sequence_of(const I* cu_seqlens, int64_t sequences, int64_t place) {
    int64_t low = 0, high = sequences;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (cu_seqlens[middle] <= place ? low : high) = middle;
    }
    return low;
}

// A head's columns, in whole vectors.
template <class T>
int64_t columns_of(int64_t head_size) {
    return round_up(head_size, lanes<T>());
}
template <class T>
int64_t words_of(int64_t n) {
    return (n + depth<T>() - 1) / depth<T>();
}

// A block of rows [count, head_size], packed for products that sum over the head size: each row a column,
// [head_size / depth, kAttentionKeys].
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t count, int64_t head_size, Word<T>* out) {
    const SmallMatrix matrix{const_cast<T*>(x), stride, 1};
    pack<T>(matrix, count, head_size, 0, round_up(count, lanes<T>()), 0, words_of<T>(head_size), out,
            kAttentionKeys);
}

// The same for products that sum over the rows: [count / depth, columns].
template <class T>
void pack_columns(const T* x, int64_t stride, int64_t count, int64_t head_size, Word<T>* out) {
    const SmallMatrix matrix{const_cast<T*>(x), 1, stride};
    const int64_t columns = columns_of<T>(head_size);
    pack<T>(matrix, head_size, count, 0, columns, 0, words_of<T>(count), out, columns);
}

// f(j, vectors) over vectors [0, n), `vectors` a compile-time constant.
template <class T, class F>
inline void for_vectors(int64_t n, F&& f) {
    constexpr int kMost = most_vectors<T>();
    int64_t j = 0;
    for (; j + kMost <= n; j += kMost) f(j, std::integral_constant<int, kMost>());
    for (; kMost > 2 && j + 2 <= n; j += 2) f(j, std::integral_constant<int, 2>());
    for (; j < n; ++j) f(j, std::integral_constant<int, 1>());
}

// out[i, j] = sum_d x[i, d] block[d, j] for kRowsHere rows, `stride` apart, and j in the first `vectors`.
template <class T, int kRowsHere>
inline void scores_of(const T* x, int64_t stride, int64_t head_size, const Word<T>* block, int64_t vectors,
                      ScalarOf<Value<T>> (&out)[kRowsHere][kAttentionKeys]) {
    using V = Value<T>;
    constexpr int64_t L = lanes<T>();
    for_vectors<T>(vectors, [&](int64_t j, auto n) {
        V sums[kRowsHere][n];
        for (int i = 0; i < kRowsHere; ++i) {
            for (int u = 0; u < n; ++u) sums[i][u] = ValueTraits<V>::splat(0);
        }
        multiply<T, kRowsHere, n, kRowsHere == 1 ? 2 : 1, false>(x, stride, head_size, block + j * L,
                                                                 kAttentionKeys, sums);
        for (int i = 0; i < kRowsHere; ++i) {
            for (int u = 0; u < n; ++u) store_value(out[i] + (j + u) * L, sums[i][u]);
        }
    });
}

// out[i, :] = factor(i) out[i, :] + sum_j weights[i, j] block[j, :], j in [0, count).
template <class T, int kRowsHere, class F>
inline void accumulate(const T (&weights)[kRowsHere][kAttentionKeys], int64_t count, const Word<T>* block,
                       int64_t columns, ScalarOf<Value<T>>* out, F&& factor) {
    using V = Value<T>;
    constexpr int64_t L = lanes<T>();
    for_vectors<T>(columns / L, [&](int64_t j, auto n) {
        V sums[kRowsHere][n];
        for (int i = 0; i < kRowsHere; ++i) {
            for (int u = 0; u < n; ++u) {
                sums[i][u] = factor(i, load_value<V>(out + i * columns + (j + u) * L));
            }
        }
        multiply<T, kRowsHere, n, kRowsHere == 1 ? 2 : 1, false>(weights[0], kAttentionKeys, count,
                                                                 block + j * L, columns, sums);
        for (int i = 0; i < kRowsHere; ++i) {
            for (int u = 0; u < n; ++u) store_value(out + i * columns + (j + u) * L, sums[i][u]);
        }
    });
}

// From both ends in turn: later units of a causal sequence see more keys, and a thread's stretch of units
// then holds both kinds.
inline int64_t zigzag(int64_t place, int64_t units) { return place % 2 ? units - 1 - place / 2 : place / 2; }

}  // namespace FASTFT_TARGET
}  // namespace fastft
