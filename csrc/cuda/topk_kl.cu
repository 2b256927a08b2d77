// topk_kl on CUDA. One block a row; the k buckets are gathered first, then the row is read once for the
// tail's log-sum-exp and once for the gradient.
#include "fastft/topk_kl.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

template <class T>
__global__ void FASTFT_ROW_KERNEL topk_kl_kernel(TopkKlArgs args, float c) {
    const int64_t r = blockIdx.x;
    T* logits = static_cast<T*>(args.logits) + r * args.logits_stride;
    const int64_t* ids = args.ids + r * args.k;
    const float* log_probs = static_cast<const float*>(args.log_probs) + r * args.k;
    float* buckets = static_cast<float*>(args.scratch) + r * (args.k + 1);
    float* kl = static_cast<float*>(args.kl) + r;
    const float temperature = static_cast<float>(args.temperature);
    if (args.weights && static_cast<const float*>(args.weights)[r] == 0) {
        if (threadIdx.x == 0) *kl = 0;
        if (args.write_grad) fill_row(logits, args.vocab, 0);
        return;
    }

    bool bad = false;
    for (int64_t i = threadIdx.x; i < args.k; i += blockDim.x) bad |= ids[i] < 0 || ids[i] >= args.vocab;
    if (__syncthreads_or(bad)) {
        if (threadIdx.x == 0) *kl = NAN;
        if (args.write_grad) fill_row(logits, args.vocab, NAN);
        return;
    }
    for (int64_t i = threadIdx.x; i < args.k; i += blockDim.x) {
        buckets[i] = to_float(logits[ids[i]]);
        if (args.tail) from_float(-INFINITY, logits + ids[i]);
    }
    __syncthreads();  // the k logits are out of the row before it is read as the tail

    const float log2e = static_cast<float>(kLog2E);
    const bool aligned = is_aligned(logits);
    RowStats<float> tail{0, 0};
    float student_tail = 0, teacher_tail = 0;
    if (args.tail) {
        tail = softmax_stats(logits, args.vocab, aligned, log2e);
        student_tail = lse(tail, log2e);
        // In double: what is wanted is 1 minus this sum.
        double mass = 0;
        for (int64_t i = threadIdx.x; i < args.k; i += blockDim.x)
            mass += exp2(double(log_probs[i]) * kLog2E);
        mass = block_sum(mass);
        // With every token listed the bucket is empty, whatever rounding left of the teacher's mass.
        teacher_tail = args.k < args.vocab && mass < 1 ? static_cast<float>(log(1 - mass)) : -INFINITY;
    }

    KlState<float> state, identity;
    state.init();
    identity.init();
    for (int64_t i = threadIdx.x; i < args.k; i += blockDim.x) {
        const float q[1] = {log_probs[i]}, p[1] = {buckets[i]};
        state.update(q, p, c);
    }
    if (args.tail && threadIdx.x == 0) {
        const float q[1] = {teacher_tail}, p[1] = {student_tail};
        state.update(q, p, c);
    }
    state =
        block_reduce(state, identity, [c](KlState<float>& a, const KlState<float>& b) { merge(a, b, c); });
    if (threadIdx.x == 0) *kl = temperature * temperature * kl_value(state, c);
    if (!args.write_grad) return;

    const RowStats<float> teacher = stats(state.p), student = stats(state.q);
    const auto bucket_grad = [&](float p, float q) {
        return forward_kl_grad(log2_prob(p, student.max, student.log2_sum, c),
                               log2_prob(q, teacher.max, teacher.log2_sum, c), temperature);
    };
    if (args.tail && student_tail > -INFINITY) {
        const float scale = bucket_grad(student_tail, teacher_tail);
        for_elements(args.vocab, [&](int64_t i, int64_t left) {
            float x[kElements];
            load_elements(logits + i, left, aligned, x);
#pragma unroll
            for (int k = 0; k < kElements; ++k)
                x[k] = scale * exp2_(log2_prob(x[k], tail.max, tail.log2_sum, log2e));
            store_elements(logits + i, left, aligned, x);
        });
    } else {
        fill_row(logits, args.vocab, 0);
    }
    __syncthreads();  // the k entries are written over the row
    for (int64_t i = threadIdx.x; i < args.k; i += blockDim.x) {
        from_float(bucket_grad(buckets[i], log_probs[i]), logits + ids[i]);
    }
}

}  // namespace
}  // namespace FASTFT_TARGET

void topk_kl_cuda(const TopkKlArgs& args, cudaStream_t stream) {
    constexpr const char* name = "topk_kl_kernel";
    if (args.rows == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        topk_kl_kernel<decltype(element)><<<grid_of(name, args.rows), threads_for(args.vocab), 0, stream>>>(
            args, static_cast<float>(kLog2E / args.temperature));
    });
    check_launch(name, args.rows, args.vocab);
}

KernelEntry topk_kl_entry() {
    return {"topk_kl", reinterpret_cast<const void*>(&topk_kl_kernel<__nv_bfloat16>), threads_for(50272)};
}

}  // namespace fastft
