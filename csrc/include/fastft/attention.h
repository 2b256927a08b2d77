// attention: softmax(scale q k^T) v and its log-sum-exp over ragged sequences, each of them behind a prefix
// that all share. Query heads in groups of neighbours share a key/value head.
//
// A query sees the whole prefix and, of its own sequence, every key, or with `causal` those up to its own
// place, the last query standing at the last key. Scores and sums are float (double for double); the
// probabilities are rounded to the dtype before they multiply v, in relation to the largest score so far.
// A query that sees no key gives 0, with a log-sum-exp of -inf.
//
// The keys and values of a head are packed once for all of its queries, in blocks of kAttentionKeys; each
// block stays in the cache while a block of queries goes by it, and nothing of size [queries, keys] exists
// (Dao et al. 2022, arXiv 2205.14135). The prefix and the sequence's own keys are one softmax: no merging.
#pragma once

#include <cstdint>

#include "fastft/types.h"

namespace fastft {

constexpr int64_t kAttentionKeys = 128;    // of a block; a multiple of every vector's length
constexpr int64_t kAttentionQueries = 48;  // rows of a unit of work; a multiple of 6
constexpr int64_t kAttentionHeadSize = 256;

// [tokens, heads, head_size], the last dimension contiguous.
struct Heads {
    const void* data;
    int64_t token_stride, head_stride;
};

struct AttentionArgs {
    Heads q, k, v, prefix_k, prefix_v;
    const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [sequences + 1]
    const int32_t* seqused_k;    // [sequences]: how many of its keys a sequence has; null: all
    const int64_t* first_block;  // [sequences + 1]: of each sequence's own keys, behind the prefix's
    void* packed;  // [heads of this round, first_block[sequences]] blocks of attention_block_bytes
    void* out;     // [tokens, heads, head_size]
    void* lse;     // [heads, tokens] Acc, natural logarithm
    int64_t tokens, sequences, heads, kv_heads, head_size, prefix_tokens;
    int64_t first_kv_head;  // of this round
    double scale;
    bool causal;
    DType dtype;
};

// One block of rows of a head, packed, in every CPU capability.
inline int64_t attention_packed_bytes(DType dtype, int64_t head_size) {
    return (dtype == DType::Float64 ? 8 : 4) * ((head_size + 63) / 64 * 64) * kAttentionKeys;
}
inline int64_t attention_block_bytes(const AttentionArgs& args) {  // of keys and values
    return 2 * attention_packed_bytes(args.dtype, args.head_size);
}

// A row is a query token with one of the query heads that share a key/value head; the heads of a token stand
// side by side, the sequences one behind the other, in units of kAttentionQueries.
inline int64_t attention_units(const AttentionArgs& args) {
    return (args.tokens * (args.heads / args.kv_heads) + kAttentionQueries - 1) / kAttentionQueries;
}

inline int64_t attention_keys_of(const AttentionArgs& args, int64_t sequence) {
    return args.seqused_k ? args.seqused_k[sequence]
                          : args.cu_seqlens_k[sequence + 1] - args.cu_seqlens_k[sequence];
}

// Over [head of this round, block] and then over [head of this round, unit].
void attention_pack_cpu(const AttentionArgs& args, int64_t begin, int64_t end);
void attention_cpu(const AttentionArgs& args, int64_t begin, int64_t end);

// The gradient, without prefix and seqused_k. With p = exp(scale q k^T - lse), d = sum(grad out) of a query:
//   ds = scale p (grad v^T - d),   dq = ds k,   dk = ds^T q,   dv = p^T grad
// Both p and ds are computed twice, once a block of queries at a time for dq and once a block of keys at a
// time for dk and dv: no sum has two writers, and results do not depend on the number of threads. They are
// rounded to the dtype before the products.
struct AttentionBackwardArgs {
    Heads grad, q, k, v, out;
    const void* lse;  // [heads, tokens] Acc
    const int32_t *cu_seqlens_q, *cu_seqlens_k;
    const int64_t *first_key_block, *first_query_block;  // [sequences + 1]
    // Scratch, for each head of this round: packed keys and queries; rows [2, attention_rows, head_size] of q
    // and grad; stats [2, attention_stats] Acc of log2(e) lse and d.
    void *packed_keys, *packed_queries, *rows, *stats;
    void *dq, *dk, *dv;  // [tokens, heads, head_size], [keys, kv_heads, head_size] twice
    int64_t tokens, keys, sequences, heads, kv_heads, head_size;
    int64_t first_kv_head;  // of this round
    double scale;
    bool causal;
    DType dtype;
};

constexpr int64_t kAttentionKeyForms = 3, kAttentionQueryForms = 4;  // packed, of each block

inline int64_t attention_rows(const AttentionBackwardArgs& args) {
    return args.tokens * (args.heads / args.kv_heads);
}
inline int64_t attention_stats(const AttentionBackwardArgs& args) {  // vectors may read beyond the last row
    return attention_rows(args) + 64;
}

// In this order, over [head of this round, n] with n: units of rows; blocks of keys; blocks of queries; units
// of rows; units of keys.
void attention_backward_gather_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
void attention_backward_pack_keys_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
void attention_backward_pack_queries_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
void attention_backward_queries_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
void attention_backward_keys_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end);

}  // namespace fastft
