// topk_kl on CUDA; bound by memory. The k listed logits are gathered first; the row, without them, is kept in
// shared memory between the tail's log-sum-exp and the gradient (see row_launch.h). Each block of a row sees
// to the listed tokens in its own part; jsd, which needs the normalisers first, is summed by each block over
// all.
#include "fastft/topk_kl.h"

#include "kl_row.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// What the blocks of a row merge: the buckets listed in their parts, and those parts' tail.
template <class S>
struct TopkState {
    KlState<S> buckets;
    SoftmaxState<S> tail;
    RunningSum<double> teacher_mass;  // in double: what is wanted is 1 minus this sum

    __device__ void init() {
        buckets.init();
        tail.init();
        teacher_mass.init();
    }
    __device__ void add(const TopkState& b) {
        buckets.add(b.buckets);
        tail.add(b.tail);
        teacher_mass.merge(b.teacher_mass);
    }
};
__device__ __forceinline__ TopkState<double> widen(const TopkState<float>& a) {
    return {widen(a.buckets), widen(a.tail), a.teacher_mass};
}
template <class S>
__device__ __forceinline__ void merge_lanes(TopkState<S>& a, S c) {
    a.buckets.move_to(lanes_max(a.buckets.p.max), lanes_max(a.buckets.q.max), c);
    a.tail.move_to(lanes_max(a.tail.max), static_cast<float>(kLog2E));
    add_lanes(a);
}

struct Buckets {
    Row row;
    RowStats<float> tail;              // of the student's other logits
    float tail_log2_ps, tail_log2_pt;  // of their bucket; -inf where it is empty
};

template <class T, Direction direction>
__global__ void FASTFT_ROW_KERNEL topk_kl_kernel(TopkKlArgs args, RowLaunch launch, float c) {
    const RowPart part = row_part(launch, args.vocab);
    const int64_t r = part.row;
    T* row_logits = static_cast<T*>(args.logits) + r * args.logits_stride;
    T* part_logits = row_logits + part.begin;
    const int64_t* ids = args.ids + r * args.k;
    const float* log_probs = static_cast<const float*>(args.log_probs) + r * args.k;
    float* buckets = static_cast<float*>(args.scratch) + r * args.k;
    float* kl = static_cast<float*>(args.kl) + r;
    const float temperature = static_cast<float>(args.temperature), beta = static_cast<float>(args.beta);
    const bool first = part.begin == 0 && threadIdx.x == 0;
    if (args.weights && static_cast<const float*>(args.weights)[r] == 0) {
        if (first) *kl = 0;
        if (args.write_grad) fill(part_logits, part.size, 0);
        return;
    }

    bool bad = false;
    for (int64_t i = threadIdx.x; i < args.k; i += blockDim.x) bad |= ids[i] < 0 || ids[i] >= args.vocab;
    if (__syncthreads_or(bad)) {
        if (first) *kl = NAN;
        if (args.write_grad) fill(part_logits, part.size, NAN);
        return;
    }
    // f(i) for the listed tokens in this part; a thread sees the same ones each time.
    const auto for_listed = [&](auto&& f) {
        for (int64_t i = threadIdx.x; i < args.k; i += blockDim.x) {
            if (ids[i] >= part.begin && ids[i] < part.begin + part.size) f(i);
        }
    };
    TopkState<float> state;
    state.init();
    for_listed([&](int64_t i) {
        const float student[1] = {to_float(row_logits[ids[i]])}, teacher[1] = {log_probs[i]};
        buckets[i] = student[0];
        update<direction>(state.buckets, student, teacher, c);
        if (args.tail) {
            from_float(-INFINITY, row_logits + ids[i]);
            state.teacher_mass.add(exp2(double(log_probs[i]) * kLog2E));
        }
    });
    __syncthreads();  // the listed logits are out of this part before it is read as the tail

    const float log2e = static_cast<float>(kLog2E);
    RowCache<T, 1> logits({row_logits}, part, launch.cached);
    if (args.tail) logits.read([&](int, const float (&x)[1][kElements]) { state.tail.update(x[0], log2e); });
    Buckets all = merge_row(state, c, launch.blocks, [&](TopkState<double> total) {
        const RowStats<double> tail = stats(total.tail);
        double student[1] = {-INFINITY}, teacher[1] = {-INFINITY};
        if (args.tail) {
            student[0] = lse<double>(tail, log2e);
            // With every token listed the bucket is empty, whatever rounding left of the teacher's mass.
            if (args.k < args.vocab) teacher[0] = log_tail_mass(total.teacher_mass.value(), direction);
            update<direction>(total.buckets, student, teacher, double(c));
        }
        const KlRow<double> row = row_of<direction>(total.buckets, double(c));
        const double log2_ps = log2_prob<double>(student[0], row.student.max, row.student.log2_sum, c);
        const double log2_pt = log2_prob<double>(teacher[0], row.teacher.max, row.teacher.log2_sum, c);
        return Buckets{narrow(row), narrow(tail), static_cast<float>(log2_ps), static_cast<float>(log2_pt)};
    });
    Row& row = all.row;
    const auto log2_ps = [&](int64_t i) {
        return log2_prob(buckets[i], row.student.max, row.student.log2_sum, c);
    };
    const auto log2_pt = [&](int64_t i) {
        return log2_prob(log_probs[i], row.teacher.max, row.teacher.log2_sum, c);
    };
    if constexpr (direction == Direction::Jsd) {
        double t = 0, s = 0;
        const auto add = [&](const JsdTerms<float>& terms) {
            t += terms.t;
            s += terms.s;
        };
        for (int64_t i = threadIdx.x; i < args.k; i += blockDim.x)
            add(jsd_terms(log2_ps(i), log2_pt(i), beta));
        if (threadIdx.x == 0) add(jsd_terms(all.tail_log2_ps, all.tail_log2_pt, beta));
        t = block_sum(t);
        s = block_sum(s);
        row.grad_divergence = static_cast<float>(s);
        row.divergence = static_cast<float>(beta * t + (1 - beta) * s);
    }
    if (first) *kl = temperature * temperature * row.divergence;
    if (!args.write_grad) return;

    const float tail_grad = kl_grad<direction>(all.tail_log2_ps, all.tail_log2_pt, row, beta, temperature);
    if (args.tail && all.tail_log2_ps > -INFINITY) {
        const bool aligned = is_aligned(part_logits);
        logits.reread([&](int i, const float (&x)[1][kElements]) {
            float g[kElements];
#pragma unroll
            for (int k = 0; k < kElements; ++k)
                g[k] = tail_grad * exp2_(log2_prob(x[0][k], all.tail.max, all.tail.log2_sum, log2e));
            store_elements(part_logits + i, part.size - i, aligned, g);
        });
    } else {
        fill(part_logits, part.size, 0);
    }
    __syncthreads();  // the listed tokens are written over the part
    for_listed([&](int64_t i) {
        from_float(kl_grad<direction>(log2_ps(i), log2_pt(i), row, beta, temperature), row_logits + ids[i]);
    });
}

}  // namespace
}  // namespace FASTFT_TARGET

void topk_kl_cuda(const TopkKlArgs& args, cudaStream_t stream) {
    constexpr const char* name = "topk_kl_kernel";
    if (args.rows == 0) return;
    const float c = static_cast<float>(kLog2E / args.temperature);
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        const RowLaunch launch = plan_cached_row(args.vocab, sizeof(T), current_row_limits());
        dispatch_direction(args.direction, [&](auto direction) {
            launch_rows<topk_kl_kernel<T, decltype(direction)::value>>(name, args, launch, true, stream, c);
        });
    });
}

KernelEntry topk_kl_entry(const RowLimits& limits) {
    return {"topk_kl", reinterpret_cast<const void*>(&topk_kl_kernel<__nv_bfloat16, Direction::Forward>),
            plan_cached_row(kReportedVocab, sizeof(__nv_bfloat16), limits)};
}

}  // namespace fastft
