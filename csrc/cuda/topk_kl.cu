// topk_kl on CUDA; bound by memory. The k listed logits are gathered first; the row, without them, is kept in
// shared memory between the tail's log-sum-exp and the gradient (see row_launch.h). Each block of a row sees
// to the listed tokens in its own part.
#include "fastft/topk_kl.h"

#include "row.cuh"

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

struct Row {
    RowStats<float> student, teacher;  // over the buckets
    RowStats<float> tail;              // over the student's other logits
    float kl;
    float tail_grad;  // of the tail's bucket; 0 where it is empty
};

template <class T>
__global__ void FASTFT_ROW_KERNEL topk_kl_kernel(TopkKlArgs args, RowLaunch launch, float c) {
    const RowPart part = row_part(launch, args.vocab);
    const int64_t r = part.row;
    T* row_logits = static_cast<T*>(args.logits) + r * args.logits_stride;
    T* part_logits = row_logits + part.begin;
    const int64_t* ids = args.ids + r * args.k;
    const float* log_probs = static_cast<const float*>(args.log_probs) + r * args.k;
    float* buckets = static_cast<float*>(args.scratch) + r * (args.k + 1);
    float* kl = static_cast<float*>(args.kl) + r;
    const float temperature = static_cast<float>(args.temperature);
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
        const float q[1] = {log_probs[i]}, p[1] = {to_float(row_logits[ids[i]])};
        buckets[i] = p[0];
        state.buckets.update(q, p, c);
        if (args.tail) {
            from_float(-INFINITY, row_logits + ids[i]);
            state.teacher_mass.add(exp2(double(log_probs[i]) * kLog2E));
        }
    });
    __syncthreads();  // the listed logits are out of this part before it is read as the tail

    const float log2e = static_cast<float>(kLog2E);
    RowCache<T, 1> logits({row_logits}, part, launch.cached);
    if (args.tail) logits.read([&](int, const float (&x)[1][kElements]) { state.tail.update(x[0], log2e); });
    const Row row = merge_row(state, c, launch.blocks, [&](TopkState<double> total) {
        const RowStats<double> tail = stats(total.tail);
        const double student[1] = {lse<double>(tail, log2e)}, mass = total.teacher_mass.value();
        // With every token listed the bucket is empty, whatever rounding left of the teacher's mass.
        const double teacher[1] = {args.k < args.vocab && mass < 1 ? log(1 - mass) : -INFINITY};
        if (args.tail) total.buckets.update(teacher, student, double(c));
        const RowStats<double> of_teacher = stats(total.buckets.p), of_student = stats(total.buckets.q);
        const double kl_tail = forward_kl_grad<double>(
            log2_prob<double>(student[0], of_student.max, of_student.log2_sum, c),
            log2_prob<double>(teacher[0], of_teacher.max, of_teacher.log2_sum, c), temperature);
        return Row{narrow(of_student), narrow(of_teacher), narrow(tail),
                   static_cast<float>(kl_value(total.buckets, double(c))),
                   args.tail && student[0] > -INFINITY ? static_cast<float>(kl_tail) : 0.0f};
    });
    if (first) *kl = temperature * temperature * row.kl;
    if (!args.write_grad) return;

    if (args.tail && row.tail_grad != 0) {
        const bool aligned = is_aligned(part_logits);
        logits.reread([&](int i, const float (&x)[1][kElements]) {
            float g[kElements];
#pragma unroll
            for (int k = 0; k < kElements; ++k)
                g[k] = row.tail_grad * exp2_(log2_prob(x[0][k], row.tail.max, row.tail.log2_sum, log2e));
            store_elements(part_logits + i, part.size - i, aligned, g);
        });
    } else {
        fill(part_logits, part.size, 0);
    }
    __syncthreads();  // the listed tokens are written over the part
    for_listed([&](int64_t i) {
        const float grad =
            forward_kl_grad(log2_prob(buckets[i], row.student.max, row.student.log2_sum, c),
                            log2_prob(log_probs[i], row.teacher.max, row.teacher.log2_sum, c), temperature);
        from_float(grad, row_logits + ids[i]);
    });
}

}  // namespace
}  // namespace FASTFT_TARGET

void topk_kl_cuda(const TopkKlArgs& args, cudaStream_t stream) {
    constexpr const char* name = "topk_kl_kernel";
    if (args.rows == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        const RowLaunch launch = plan_cached_row(args.vocab, sizeof(T), current_row_limits());
        launch_rows<topk_kl_kernel<T>>(name, args, launch, true, stream,
                                       static_cast<float>(kLog2E / args.temperature));
    });
}

KernelEntry topk_kl_entry(const RowLimits& limits) {
    return {"topk_kl", reinterpret_cast<const void*>(&topk_kl_kernel<__nv_bfloat16>),
            plan_cached_row(kReportedVocab, sizeof(__nv_bfloat16), limits)};
}

}  // namespace fastft
