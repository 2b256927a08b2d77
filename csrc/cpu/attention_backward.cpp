// The gradient of attention on the CPU: dq a block of queries at a time, dk and dv a block of keys at a time.
#include "attention_block.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

using Args = AttentionBackwardArgs;

inline int64_t group_of(const Args& args) { return args.heads / args.kv_heads; }
inline int64_t units_of(int64_t rows) { return (rows + kAttentionQueries - 1) / kAttentionQueries; }

// The forms in which a block of keys and one of queries lie packed.
enum KeyForm { kKeyRows, kValueRows, kKeyColumns };
enum QueryForm { kQueryRows, kGradRows, kQueryColumns, kGradColumns };

template <class T>
Word<T>* form_of(const Args& args, void* packed, int64_t block, int64_t forms, int64_t form) {
    const int64_t bytes = attention_packed_bytes(args.dtype, args.head_size);
    return reinterpret_cast<Word<T>*>(static_cast<char*>(packed) + (block * forms + form) * bytes);
}
template <class T>
Word<T>* keys_of(const Args& args, int64_t head, int64_t block, KeyForm form) {
    return form_of<T>(args, args.packed_keys, head * args.first_key_block[args.sequences] + block,
                      kAttentionKeyForms, form);
}
template <class T>
Word<T>* queries_of(const Args& args, int64_t head, int64_t block, QueryForm form) {
    return form_of<T>(args, args.packed_queries, head * args.first_query_block[args.sequences] + block,
                      kAttentionQueryForms, form);
}

// Rows (token, query head) of a key/value head, one behind the other: of q, and of grad behind them.
template <class T>
T* q_rows(const Args& args, int64_t head) {
    return static_cast<T*>(args.rows) + 2 * head * attention_rows(args) * args.head_size;
}
template <class T>
T* grad_rows(const Args& args, int64_t head) {
    return q_rows<T>(args, head) + attention_rows(args) * args.head_size;
}
// Of each row: log2(e) lse, and the sum of grad times out.
template <class S>
S* lse_of(const Args& args, int64_t head) {
    return static_cast<S*>(args.stats) + 2 * head * attention_stats(args);
}
template <class S>
S* sums_of(const Args& args, int64_t head) {
    return lse_of<S>(args, head) + attention_stats(args);
}

template <class T>
void gather(const Args& args, int64_t begin, int64_t end) {
    using S = ScalarOf<Value<T>>;
    const int64_t D = args.head_size, group = group_of(args), rows = attention_rows(args),
                  units = units_of(rows);
    const size_t bytes = sizeof(T) * static_cast<size_t>(D);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / units, first = i % units * kAttentionQueries;
        for (int64_t row = first; row < smaller(first + kAttentionQueries, rows); ++row) {
            const int64_t token = row / group, query_head = (args.first_kv_head + head) * group + row % group;
            const T* grad = row_of<T>(args.grad, token, query_head);
            const T* out = row_of<T>(args.out, token, query_head);
            memcpy(q_rows<T>(args, head) + row * D, row_of<T>(args.q, token, query_head), bytes);
            memcpy(grad_rows<T>(args, head) + row * D, grad, bytes);
            S sum = 0;
            for (int64_t d = 0; d < D; ++d) sum += S(to_value(grad[d])) * S(to_value(out[d]));
            lse_of<S>(args, head)[row] =
                S(kLog2E) * static_cast<const S*>(args.lse)[query_head * args.tokens + token];
            sums_of<S>(args, head)[row] = sum;
        }
    }
}

template <class T>
void pack_keys(const Args& args, int64_t begin, int64_t end) {
    const int64_t blocks = args.first_key_block[args.sequences], D = args.head_size;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks, block = i % blocks, kv_head = args.first_kv_head + head;
        const int64_t s = sequence_of(args.first_key_block, args.sequences, block);
        const int64_t first = args.cu_seqlens_k[s] + (block - args.first_key_block[s]) * kAttentionKeys;
        const int64_t count = smaller(kAttentionKeys, args.cu_seqlens_k[s + 1] - first);
        const T *k = row_of<T>(args.k, first, kv_head), *v = row_of<T>(args.v, first, kv_head);
        pack_rows<T>(k, args.k.token_stride, count, D, keys_of<T>(args, head, block, kKeyRows));
        pack_rows<T>(v, args.v.token_stride, count, D, keys_of<T>(args, head, block, kValueRows));
        pack_columns<T>(k, args.k.token_stride, count, D, keys_of<T>(args, head, block, kKeyColumns));
    }
}

template <class T>
void pack_queries(const Args& args, int64_t begin, int64_t end) {
    const int64_t blocks = args.first_query_block[args.sequences], D = args.head_size, group = group_of(args);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks, block = i % blocks;
        const int64_t s = sequence_of(args.first_query_block, args.sequences, block);
        const int64_t first =
            args.cu_seqlens_q[s] * group + (block - args.first_query_block[s]) * kAttentionKeys;
        const int64_t count = smaller(kAttentionKeys, args.cu_seqlens_q[s + 1] * group - first);
        const T *q = q_rows<T>(args, head) + first * D, *grad = grad_rows<T>(args, head) + first * D;
        pack_rows<T>(q, D, count, D, queries_of<T>(args, head, block, kQueryRows));
        pack_rows<T>(grad, D, count, D, queries_of<T>(args, head, block, kGradRows));
        pack_columns<T>(q, D, count, D, queries_of<T>(args, head, block, kQueryColumns));
        pack_columns<T>(grad, D, count, D, queries_of<T>(args, head, block, kGradColumns));
    }
}

// p = exp2(c s - lse) and ds = scale p (dp - d) of a row of scores; lse(j) and sum(j) are those of vector j.
// What is outside of [first, end) is not seen: 0. p may be null.
template <class T, class Lse, class Sum>
inline void weights_of(const Args& args, const ScalarOf<Value<T>>* s, const ScalarOf<Value<T>>* dp,
                       int64_t first, int64_t end, int64_t vectors, Lse&& lse, Sum&& sum, T* p, T* ds) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    constexpr int64_t L = lanes<T>();
    const V c = ValueTraits<V>::splat(S(args.scale * kLog2E)), scale = ValueTraits<V>::splat(S(args.scale));
    for (int64_t j = 0; j < vectors; ++j) {
        const V weight = exp2_(load_value<V>(s + j * L) * c - lse(j));
        if (p) store_value(p + j * L, weight);
        store_value(ds + j * L, weight * (load_value<V>(dp + j * L) - sum(j)) * scale);
    }
    const auto clear = [&](int64_t from, int64_t to) {
        if (from >= to) return;
        const size_t bytes = sizeof(T) * static_cast<size_t>(to - from);
        if (p) memset(static_cast<void*>(p + from), 0, bytes);
        memset(static_cast<void*>(ds + from), 0, bytes);
    };
    clear(0, smaller(first, vectors * L));
    clear(end > 0 ? end : 0, vectors * L);
}

// Of one unit of rows.
template <class T>
struct Sums {
    using S = ScalarOf<Value<T>>;
    alignas(64) S first[kAttentionQueries * kAttentionHeadSize];
    alignas(64) S second[kAttentionQueries * kAttentionHeadSize];
};

template <class S, class T>
void write_row(const S* sums, int64_t head_size, T* out) {
    for (int64_t d = 0; d < head_size; ++d) from_value(sums[d], out + d);
}

// dq of one unit of rows.
template <class T>
void unit_of_queries(const Args& args, Sums<T>& sums, int64_t head, int64_t unit) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    constexpr int64_t L = lanes<T>();
    const int64_t D = args.head_size, columns = columns_of<T>(D), group = group_of(args);
    const int64_t first_row = unit * kAttentionQueries;
    const int64_t last_row = smaller(first_row + kAttentionQueries, attention_rows(args));
    memset(sums.first, 0, sizeof(S) * static_cast<size_t>((last_row - first_row) * columns));
    for (int64_t begin = first_row, end; begin < last_row; begin = end) {
        const int64_t s = sequence_of(args.cu_seqlens_q, args.sequences, begin / group);
        const int64_t keys = args.cu_seqlens_k[s + 1] - args.cu_seqlens_k[s];
        const int64_t last_token = args.cu_seqlens_q[s + 1];
        end = smaller(last_row, last_token * group);
        const auto visible = [&](int64_t row) {
            return args.causal ? keys - last_token + row / group + 1 : keys;
        };
        for (int64_t key = 0; key < visible(end - 1); key += kAttentionKeys) {
            const int64_t block = args.first_key_block[s] + key / kAttentionKeys;
            for_rows(begin, end, [&](int64_t m, auto n) {
                const int64_t count = smaller(smaller(kAttentionKeys, keys - key), visible(m + n - 1) - key);
                if (count <= 0) return;
                const int64_t vectors = (count + L - 1) / L;
                alignas(64) S scores[n][kAttentionKeys], dp[n][kAttentionKeys];
                alignas(64) T ds[n][kAttentionKeys];
                scores_of<T>(q_rows<T>(args, head) + m * D, D, D, keys_of<T>(args, head, block, kKeyRows),
                             vectors, scores);
                scores_of<T>(grad_rows<T>(args, head) + m * D, D, D,
                             keys_of<T>(args, head, block, kValueRows), vectors, dp);
                for (int i = 0; i < n; ++i) {
                    const V lse = ValueTraits<V>::splat(lse_of<S>(args, head)[m + i]);
                    const V sum = ValueTraits<V>::splat(sums_of<S>(args, head)[m + i]);
                    weights_of<T>(
                        args, scores[i], dp[i], 0, smaller(count, visible(m + i) - key), vectors,
                        [&](int64_t) { return lse; }, [&](int64_t) { return sum; }, static_cast<T*>(nullptr),
                        ds[i]);
                }
                accumulate<T>(ds, count, keys_of<T>(args, head, block, kKeyColumns), columns,
                              sums.first + (m - first_row) * columns, [](int, V x) { return x; });
            });
        }
    }
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t place = row / group * args.heads + (args.first_kv_head + head) * group + row % group;
        write_row(sums.first + (row - first_row) * columns, D, static_cast<T*>(args.dq) + place * D);
    }
}

// dk and dv of one unit of keys.
template <class T>
void unit_of_keys(const Args& args, Sums<T>& sums, int64_t head, int64_t unit) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    constexpr int64_t L = lanes<T>();
    const int64_t D = args.head_size, columns = columns_of<T>(D), group = group_of(args);
    const int64_t kv_head = args.first_kv_head + head, first_key = unit * kAttentionQueries;
    const int64_t last_key = smaller(first_key + kAttentionQueries, args.keys);
    const size_t bytes = sizeof(S) * static_cast<size_t>((last_key - first_key) * columns);
    memset(sums.first, 0, bytes);
    memset(sums.second, 0, bytes);
    for (int64_t begin = first_key, end; begin < last_key; begin = end) {
        const int64_t s = sequence_of(args.cu_seqlens_k, args.sequences, begin);
        const int64_t queries = args.cu_seqlens_q[s + 1] - args.cu_seqlens_q[s];
        const int64_t last = args.cu_seqlens_k[s + 1];
        end = smaller(last_key, last);
        // The first row, of this sequence's, that sees the key.
        const auto first_row = [&](int64_t key) {
            const int64_t token = args.causal ? key - last + queries : 0;
            return token > 0 ? token * group : 0;
        };
        const int64_t rows = queries * group, before = args.cu_seqlens_q[s] * group;
        for (int64_t row = first_row(begin) / kAttentionKeys * kAttentionKeys; row < rows;
             row += kAttentionKeys) {
            const int64_t block = args.first_query_block[s] + row / kAttentionKeys;
            const int64_t count = smaller(kAttentionKeys, rows - row), vectors = (count + L - 1) / L;
            const S* lse = lse_of<S>(args, head) + before + row;
            const S* sum = sums_of<S>(args, head) + before + row;
            for_rows(begin, end, [&](int64_t m, auto n) {
                if (first_row(m) >= row + count) return;
                alignas(64) S scores[n][kAttentionKeys], dp[n][kAttentionKeys];
                alignas(64) T p[n][kAttentionKeys], ds[n][kAttentionKeys];
                scores_of<T>(row_of<T>(args.k, m, kv_head), args.k.token_stride, D,
                             queries_of<T>(args, head, block, kQueryRows), vectors, scores);
                scores_of<T>(row_of<T>(args.v, m, kv_head), args.v.token_stride, D,
                             queries_of<T>(args, head, block, kGradRows), vectors, dp);
                for (int i = 0; i < n; ++i) {
                    weights_of<T>(
                        args, scores[i], dp[i], first_row(m + i) - row, count, vectors,
                        [&](int64_t j) { return load_value<V>(lse + j * L); },
                        [&](int64_t j) { return load_value<V>(sum + j * L); }, p[i], ds[i]);
                }
                const auto keep = [](int, V x) { return x; };
                accumulate<T>(ds, count, queries_of<T>(args, head, block, kQueryColumns), columns,
                              sums.first + (m - first_key) * columns, keep);
                accumulate<T>(p, count, queries_of<T>(args, head, block, kGradColumns), columns,
                              sums.second + (m - first_key) * columns, keep);
            });
        }
    }
    for (int64_t key = first_key; key < last_key; ++key) {
        const int64_t place = (key * args.kv_heads + kv_head) * D, at = (key - first_key) * columns;
        write_row(sums.first + at, D, static_cast<T*>(args.dk) + place);
        write_row(sums.second + at, D, static_cast<T*>(args.dv) + place);
    }
}

}  // namespace

void attention_backward_gather(const Args& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { gather<decltype(element)>(args, begin, end); });
}

void attention_backward_pack_keys(const Args& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { pack_keys<decltype(element)>(args, begin, end); });
}

void attention_backward_pack_queries(const Args& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { pack_queries<decltype(element)>(args, begin, end); });
}

void attention_backward_queries(const Args& args, int64_t begin, int64_t end) {
    const int64_t units = units_of(attention_rows(args));
    dispatch_dtype(args.dtype, [&](auto element) {
        Sums<decltype(element)> sums;
        for (int64_t i = begin; i < end; ++i) {
            unit_of_queries(args, sums, i / units, zigzag(i % units, units));
        }
    });
}

void attention_backward_keys(const Args& args, int64_t begin, int64_t end) {
    const int64_t units = units_of(args.keys);
    dispatch_dtype(args.dtype, [&](auto element) {
        Sums<decltype(element)> sums;
        for (int64_t i = begin; i < end; ++i) {
            unit_of_keys(args, sums, i / units, zigzag(i % units, units));
        }
    });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
