// attention: unpacks tensors, divides the work and calls the kernels.
#include "fastft/attention.h"

#include <algorithm>
#include <vector>

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "scratch.h"
#include "util.h"

namespace fastft {
namespace {

// Packed keys and values beside each other at a time: more heads keep more threads busy, fewer need less
// memory.
constexpr int64_t kPackedBytes = int64_t(64) << 20;

Heads heads_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

void check_heads(const Tensor& x, const Tensor& like, int64_t heads, const char* message) {
    check(x.dim() == 3 && x.size(1) == heads && x.size(2) == like.size(2) &&
              x.scalar_type() == like.scalar_type() && (x.numel() == 0 || x.size(2) == 1 || x.stride(2) == 1),
          message);
}

void check_offsets(const Tensor& x, int64_t sequences, int64_t tokens, const char* message) {
    check(
        x.dim() == 1 && x.size(0) == sequences + 1 && x.scalar_type() == ScalarType::Int && x.is_contiguous(),
        message);
    const int32_t* at = static_cast<const int32_t*>(x.data_ptr());
    check(at[0] == 0 && at[sequences] == tokens && std::is_sorted(at, at + sequences + 1), message);
}

// What both directions take: AttentionArgs or AttentionBackwardArgs, filled with what is checked here.
template <class Args>
Args args_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
             const Tensor& cu_seqlens_k, double scale, bool is_causal) {
    check(q.dim() == 3 && k.dim() == 3, "attention: q and k must be [tokens, heads, head_size]");
    check(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) > 0,
          "attention: cu_seqlens_q must be [sequences + 1]");
    Args args{};
    args.dtype = dtype_of(q);
    args.tokens = q.size(0);
    args.heads = q.size(1);
    args.kv_heads = k.size(1);
    args.head_size = q.size(2);
    args.sequences = cu_seqlens_q.size(0) - 1;
    check(args.kv_heads > 0 && args.heads % args.kv_heads == 0,
          "attention: heads of k must divide those of q");
    check(args.head_size <= kAttentionHeadSize, "attention: head_size must be at most 256");
    check_heads(q, q, args.heads, "attention: q must have contiguous heads");
    check_heads(k, q, args.kv_heads, "attention: k must be [tokens, kv_heads, head_size] like q");
    check_heads(v, q, args.kv_heads, "attention: v must be [tokens, kv_heads, head_size] like q");
    check(v.size(0) == k.size(0), "attention: v must have as many tokens as k");
    check_offsets(cu_seqlens_q, args.sequences, args.tokens,
                  "attention: cu_seqlens_q must rise from 0 to q's tokens");
    check_offsets(cu_seqlens_k, args.sequences, k.size(0),
                  "attention: cu_seqlens_k must rise from 0 to k's tokens");
    args.q = heads_of(q);
    args.k = heads_of(k);
    args.v = heads_of(v);
    args.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.data_ptr());
    args.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.data_ptr());
    args.scale = scale;
    args.causal = is_causal;
    return args;
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                     std::optional<Tensor> seqused_k, std::optional<Tensor> prefix_k,
                                     std::optional<Tensor> prefix_v, double scale, bool is_causal) {
    AttentionArgs args = args_of<AttentionArgs>(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, is_causal);
    if (prefix_k && prefix_v) {
        check_heads(*prefix_k, q, args.kv_heads,
                    "attention: prefix_k must be [tokens, kv_heads, head_size] like k");
        check_heads(*prefix_v, q, args.kv_heads,
                    "attention: prefix_v must be [tokens, kv_heads, head_size] like v");
        check(prefix_v->size(0) == prefix_k->size(0),
              "attention: prefix_v must have as many tokens as prefix_k");
        args.prefix_k = heads_of(*prefix_k);
        args.prefix_v = heads_of(*prefix_v);
        args.prefix_tokens = prefix_k->size(0);
    }
    if (seqused_k) {
        check_vector(*seqused_k, args.sequences, ScalarType::Int,
                     "attention: seqused_k must be int32 [sequences]");
        args.seqused_k = static_cast<const int32_t*>(seqused_k->data_ptr());
        for (int64_t s = 0; s < args.sequences; ++s) {
            check(args.seqused_k[s] >= 0 &&
                      args.seqused_k[s] <= args.cu_seqlens_k[s + 1] - args.cu_seqlens_k[s],
                  "attention: seqused_k must be between 0 and the keys that cu_seqlens_k gives a sequence");
        }
    }
    Tensor out = torch::stable::new_empty(q, {args.tokens, args.heads, args.head_size});
    Tensor lse = torch::stable::new_empty(q, {args.heads, args.tokens}, accumulate_type(args.dtype));
    args.out = out.data_ptr();
    args.lse = lse.data_ptr();

    const auto blocks_of = [](int64_t keys) { return (keys + kAttentionKeys - 1) / kAttentionKeys; };
    std::vector<int64_t> first_block{blocks_of(args.prefix_tokens)};
    for (int64_t s = 0; s < args.sequences; ++s) {
        first_block.push_back(first_block.back() + blocks_of(attention_keys_of(args, s)));
    }
    args.first_block = first_block.data();
    const int64_t blocks = first_block.back(), head_bytes = blocks * attention_block_bytes(args);
    const int64_t heads_at_once =
        std::clamp(kPackedBytes / std::max<int64_t>(head_bytes, 1), int64_t(1), args.kv_heads);
    const Scratch packed(heads_at_once * head_bytes);
    args.packed = packed.data();

    cpu_capability();  // an error of its environment variable must not leave a worker thread
    for (; args.first_kv_head < args.kv_heads; args.first_kv_head += heads_at_once) {
        const int64_t heads = std::min(heads_at_once, args.kv_heads - args.first_kv_head);
        torch::stable::parallel_for(0, heads * blocks, 1,
                                    [&](int64_t b, int64_t e) { attention_pack_cpu(args, b, e); });
        torch::stable::parallel_for(0, heads * attention_units(args), 1,
                                    [&](int64_t b, int64_t e) { attention_cpu(args, b, e); });
    }
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                      double scale, bool is_causal) {
    AttentionBackwardArgs args =
        args_of<AttentionBackwardArgs>(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, is_causal);
    args.keys = k.size(0);
    check_heads(grad, q, args.heads, "attention_backward: grad must be [tokens, heads, head_size] like q");
    check_heads(out, q, args.heads, "attention_backward: out must be [tokens, heads, head_size] like q");
    check(grad.size(0) == args.tokens && out.size(0) == args.tokens,
          "attention_backward: grad and out must have q's tokens");
    check(lse.dim() == 2 && lse.size(0) == args.heads && lse.size(1) == args.tokens && lse.is_contiguous() &&
              lse.scalar_type() == accumulate_type(args.dtype),
          "attention_backward: lse must be [heads, tokens] in the accumulation dtype");
    args.grad = heads_of(grad);
    args.out = heads_of(out);
    args.lse = lse.data_ptr();
    Tensor dq = torch::stable::new_empty(q, {args.tokens, args.heads, args.head_size});
    Tensor dk = torch::stable::new_empty(q, {args.keys, args.kv_heads, args.head_size});
    Tensor dv = torch::stable::new_empty(q, {args.keys, args.kv_heads, args.head_size});
    args.dq = dq.data_ptr();
    args.dk = dk.data_ptr();
    args.dv = dv.data_ptr();

    const auto blocks_of = [&](const int32_t* cu_seqlens, int64_t rows_of_a_token) {
        std::vector<int64_t> first{0};
        for (int64_t s = 0; s < args.sequences; ++s) {
            const int64_t rows = (cu_seqlens[s + 1] - cu_seqlens[s]) * rows_of_a_token;
            first.push_back(first.back() + (rows + kAttentionKeys - 1) / kAttentionKeys);
        }
        return first;
    };
    const auto key_blocks = blocks_of(args.cu_seqlens_k, 1);
    const auto query_blocks = blocks_of(args.cu_seqlens_q, args.heads / args.kv_heads);
    args.first_key_block = key_blocks.data();
    args.first_query_block = query_blocks.data();
    const int64_t block_bytes = attention_packed_bytes(args.dtype, args.head_size);
    const int64_t key_bytes = key_blocks.back() * kAttentionKeyForms * block_bytes;
    const int64_t query_bytes = query_blocks.back() * kAttentionQueryForms * block_bytes;
    const int64_t heads_at_once =
        std::clamp(kPackedBytes / std::max<int64_t>(key_bytes + query_bytes, 1), int64_t(1), args.kv_heads);
    const int64_t rows = attention_rows(args);
    int64_t bytes = 0;
    const auto place = [&](int64_t of_a_head) {
        const int64_t begin = bytes;
        bytes += (heads_at_once * of_a_head + kLine - 1) / kLine * kLine;
        return begin;
    };
    const int64_t places[] = {place(key_bytes), place(query_bytes),
                              place(2 * rows * args.head_size * static_cast<int64_t>(q.element_size())),
                              place(2 * attention_stats(args) * static_cast<int64_t>(lse.element_size()))};
    const Scratch scratch(bytes);
    args.packed_keys = scratch.data() + places[0];
    args.packed_queries = scratch.data() + places[1];
    args.rows = scratch.data() + places[2];
    args.stats = scratch.data() + places[3];

    cpu_capability();  // an error of its environment variable must not leave a worker thread
    const auto units_of = [](int64_t n) { return (n + kAttentionQueries - 1) / kAttentionQueries; };
    for (; args.first_kv_head < args.kv_heads; args.first_kv_head += heads_at_once) {
        const int64_t heads = std::min(heads_at_once, args.kv_heads - args.first_kv_head);
        const auto run = [&](auto kernel, int64_t n) {
            torch::stable::parallel_for(0, heads * n, 1, [&](int64_t b, int64_t e) { kernel(args, b, e); });
        };
        run(attention_backward_gather_cpu, units_of(rows));
        run(attention_backward_pack_keys_cpu, key_blocks.back());
        run(attention_backward_pack_queries_cpu, query_blocks.back());
        run(attention_backward_queries_cpu, units_of(rows));
        run(attention_backward_keys_cpu, units_of(args.keys));
    }
    return {dq, dk, dv};
}

}  // namespace fastft
