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

// Keys and values of one block and head, in every CPU capability.
inline int64_t attention_block_bytes(const AttentionArgs& args) {
    const int64_t element = args.dtype == DType::Float64 ? 8 : 4, columns = (args.head_size + 63) / 64 * 64;
    return 2 * element * columns * kAttentionKeys;
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

}  // namespace fastft
