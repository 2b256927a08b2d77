// attention on the CPU: both products run on dot.h's register blocks, with the softmax of six rows of scores
// between them in the first-level cache.
#include "fastft/attention.h"

#include "attention_block.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// Which keys a block holds, of the prefix or of a sequence.
struct KeyBlock {
    int64_t first, count;
};

// A block's packed keys [head_size / depth, kAttentionKeys] and, behind them, values
// [kAttentionKeys / depth, columns].
template <class T>
Word<T>* packed_keys(const AttentionArgs& args, int64_t head, int64_t block) {
    const int64_t place = head * args.first_block[args.sequences] + block;
    return reinterpret_cast<Word<T>*>(static_cast<char*>(args.packed) + place * attention_block_bytes(args));
}
template <class T>
Word<T>* packed_values(const AttentionArgs& args, int64_t head, int64_t block) {
    return packed_keys<T>(args, head, block) + words_of<T>(args.head_size) * kAttentionKeys;
}

template <class T>
void pack_block(const AttentionArgs& args, const Heads& k, const Heads& v, int64_t token, int64_t count,
                int64_t head, int64_t block) {
    const int64_t kv_head = args.first_kv_head + head;
    pack_rows<T>(row_of<T>(k, token, kv_head), k.token_stride, count, args.head_size,
                 packed_keys<T>(args, head, block));
    pack_columns<T>(row_of<T>(v, token, kv_head), v.token_stride, count, args.head_size,
                    packed_values<T>(args, head, block));
}

template <class T>
void pack_blocks(const AttentionArgs& args, int64_t begin, int64_t end) {
    const int64_t blocks = args.first_block[args.sequences];
    for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks, block = i % blocks;
        if (block < args.first_block[0]) {
            const int64_t token = block * kAttentionKeys;
            pack_block<T>(args, args.prefix_k, args.prefix_v, token,
                          smaller(kAttentionKeys, args.prefix_tokens - token), head, block);
        } else {
            const int64_t s = sequence_of(args.first_block, args.sequences, block);
            const int64_t key = (block - args.first_block[s]) * kAttentionKeys;
            pack_block<T>(args, args.k, args.v, args.cu_seqlens_k[s] + key,
                          smaller(kAttentionKeys, attention_keys_of(args, s) - key), head, block);
        }
    }
}

// Queries that go by the keys together: rows are (token, head) pairs, the heads of a token side by side.
template <class T>
struct Queries {
    using V = Value<T>;
    using S = ScalarOf<V>;

    alignas(64) T q[kAttentionQueries * kAttentionHeadSize];
    alignas(64) S out[kAttentionQueries * kAttentionHeadSize];  // sum of p v, in relation to max
    S max[kAttentionQueries], sum[kAttentionQueries];
    int64_t visible[kAttentionQueries];  // how many of the keys at hand the row may see
};

// One block of keys for rows [m, m + kRowsHere).
template <class T, int kRowsHere>
void attend_block(const AttentionArgs& args, Queries<T>& x, int64_t m, const KeyBlock& keys, const Word<T>* k,
                  const Word<T>* v) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    constexpr int64_t L = lanes<T>();
    const int64_t D = args.head_size, columns = columns_of<T>(D);
    const int64_t count =
        smaller(keys.count, x.visible[m + kRowsHere - 1] - keys.first);  // rows see ever more
    if (count <= 0) return;
    const int64_t vectors = (count + L - 1) / L;
    const V zero = ValueTraits<V>::splat(0), c = ValueTraits<V>::splat(S(args.scale * kLog2E));

    alignas(64) S scores[kRowsHere][kAttentionKeys];
    scores_of<T>(x.q + m * D, D, D, k, vectors, scores);

    alignas(64) T p[kRowsHere][kAttentionKeys];
    V rescale[kRowsHere];
    for (int i = 0; i < kRowsHere; ++i) {
        S* s = scores[i];
        const int64_t seen = smaller(count, x.visible[m + i] - keys.first);
        for (int64_t j = seen > 0 ? seen : 0; j < vectors * L; ++j) s[j] = -S(__builtin_inf());
        V largest = ValueTraits<V>::splat(x.max[m + i]);
        for (int64_t j = 0; j < vectors; ++j) largest = max_(largest, load_value<V>(s + j * L));
        const S max = max_lanes_(largest);
        const V shift = ValueTraits<V>::splat(max);
        V sum = zero;
        for (int64_t j = 0; j < vectors; ++j) {
            const V weight = exp2_((load_value<V>(s + j * L) - shift) * c);
            sum = sum + weight;
            store_value(p[i] + j * L, weight);
        }
        const S factor = exp2_((x.max[m + i] - max) * S(args.scale * kLog2E));
        x.max[m + i] = max;
        x.sum[m + i] = x.sum[m + i] * factor + sum_lanes_(sum);
        rescale[i] = ValueTraits<V>::splat(factor);
    }

    accumulate<T>(p, count, v, columns, x.out + m * columns, [&](int i, V sum) { return sum * rescale[i]; });
}

// One unit of queries against the prefix, then each part of it against its own sequence.
template <class T>
void attend(const AttentionArgs& args, Queries<T>& x, int64_t head, int64_t unit) {
    using S = ScalarOf<Value<T>>;
    const int64_t D = args.head_size, columns = columns_of<T>(D), group = args.heads / args.kv_heads;
    const int64_t first = unit * kAttentionQueries,
                  rows = smaller(kAttentionQueries, args.tokens * group - first);
    const auto token_of = [&](int64_t row) { return (first + row) / group; };
    const auto head_of = [&](int64_t row) {
        return (args.first_kv_head + head) * group + (first + row) % group;
    };
    for (int64_t i = 0; i < rows; ++i) {
        memcpy(x.q + i * D, row_of<T>(args.q, token_of(i), head_of(i)), sizeof(T) * static_cast<size_t>(D));
        x.max[i] = lowest<S>();
        x.sum[i] = 0;
    }
    memset(x.out, 0, sizeof(S) * static_cast<size_t>(rows * columns));

    // Rows [begin, end) against a stretch of keys, whose last visible[end - 1] at most are seen.
    const auto go_by = [&](int64_t begin, int64_t end, int64_t keys, int64_t first_block) {
        for (int64_t key = 0; key < x.visible[end - 1]; key += kAttentionKeys) {
            const int64_t block = first_block + key / kAttentionKeys;
            const KeyBlock at{key, smaller(kAttentionKeys, keys - key)};
            const Word<T>*k = packed_keys<T>(args, head, block), *v = packed_values<T>(args, head, block);
            for_rows(begin, end, [&](int64_t m, auto n) { attend_block<T, n>(args, x, m, at, k, v); });
        }
    };
    for (int64_t i = 0; i < rows; ++i) x.visible[i] = args.prefix_tokens;
    go_by(0, rows, args.prefix_tokens, 0);
    for (int64_t begin = 0, end; begin < rows; begin = end) {
        const int64_t s = sequence_of(args.cu_seqlens_q, args.sequences, token_of(begin)),
                      last_token = args.cu_seqlens_q[s + 1];
        const int64_t keys = attention_keys_of(args, s);
        end = smaller(rows, last_token * group - first);
        for (int64_t i = begin; i < end; ++i) {
            x.visible[i] = args.causal ? keys - last_token + token_of(i) + 1 : keys;
        }
        go_by(begin, end, keys, args.first_block[s]);
    }

    for (int64_t i = 0; i < rows; ++i) {
        T* out = static_cast<T*>(args.out) + (token_of(i) * args.heads + head_of(i)) * D;
        // A row of sum 0 saw no key; one of NaN keeps it.
        const S factor = x.sum[i] == 0 ? S(0) : 1 / x.sum[i];
        for (int64_t d = 0; d < D; ++d) from_value(x.out[i * columns + d] * factor, out + d);
        static_cast<S*>(args.lse)[head_of(i) * args.tokens + token_of(i)] =
            x.sum[i] == 0 ? -S(__builtin_inf()) : x.max[i] * S(args.scale) + log_(x.sum[i]);
    }
}

template <class T>
void attend_units(const AttentionArgs& args, int64_t begin, int64_t end) {
    Queries<T> x;
    const int64_t units = attention_units(args);
    for (int64_t i = begin; i < end; ++i) {
        attend(args, x, i / units, zigzag(i % units, units));
    }
}

}  // namespace

void attention_pack(const AttentionArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { pack_blocks<decltype(element)>(args, begin, end); });
}

void attention(const AttentionArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { attend_units<decltype(element)>(args, begin, end); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
