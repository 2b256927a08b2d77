// topk_kl on the CPU; compiled once per capability (see vec.h).
#include "fastft/topk_kl.h"

#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// log of the mass that k log-probabilities leave; -inf where rounding makes them sum to 1 or more.
template <class S>
double log_tail_mass(const S* log_probs, int64_t k) {
    RunningSum<double> mass;
    mass.init();
    for (int64_t i = 0; i < k; ++i) mass.add(exp2_(double(log_probs[i]) * kLog2E));
    const double left = 1 - mass.sum;
    return left > 0 ? log_(left) : -__builtin_inf();
}

template <class T>
void rows(const TopkKlArgs& args, int64_t begin, int64_t end) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    using Traits = ValueTraits<V>;
    const double temperature = args.temperature, c = kLog2E / temperature;
    const V vlog2e = Traits::splat(S(kLog2E));
    T minus_inf;
    from_value(-S(__builtin_inf()), &minus_inf);
    for (int64_t r = begin; r < end; ++r) {
        T* logits = static_cast<T*>(args.logits) + r * args.logits_stride;
        const int64_t* ids = args.ids + r * args.k;
        const S* log_probs = static_cast<const S*>(args.log_probs) + r * args.k;
        S* buckets = static_cast<S*>(args.scratch) + r * (args.k + 1);
        S* kl = static_cast<S*>(args.kl) + r;
        if (args.weights && static_cast<const S*>(args.weights)[r] == S(0)) {
            *kl = 0;
            if (args.write_grad) memset(logits, 0, sizeof(T) * static_cast<size_t>(args.vocab));
            continue;
        }
        for (int64_t i = 0; i < args.k; ++i) buckets[i] = to_value(logits[ids[i]]);

        RowStats<double> tail{0, 0};
        double student_tail = 0, teacher_tail = 0;
        if (args.tail) {
            for (int64_t i = 0; i < args.k; ++i) logits[ids[i]] = minus_inf;
            SoftmaxState<V> state;
            state.init();
            for_blocks(logits, args.vocab, [&](const V(&x)[kBlock]) { state.update(x, vlog2e); });
            tail = stats(fold(state, kLog2E));
            student_tail = lse(tail, kLog2E);
            // With every token listed the bucket is empty, whatever rounding left of the teacher's mass.
            teacher_tail = args.k == args.vocab ? -__builtin_inf() : log_tail_mass(log_probs, args.k);
        }

        KlState<double> state;
        state.init();
        for (int64_t i = 0; i < args.k; ++i) {
            const double q[1] = {log_probs[i]}, p[1] = {buckets[i]};
            state.update(q, p, c);
        }
        if (args.tail) {
            const double q[1] = {teacher_tail}, p[1] = {student_tail};
            state.update(q, p, c);
        }
        *kl = S(temperature * temperature * kl_value(state, c));
        if (!args.write_grad) continue;

        const RowStats<double> teacher = stats(state.p), student = stats(state.q);
        const auto bucket_grad = [&](double p, double q) {
            return forward_kl_grad(log2_prob(p, student.max, student.log2_sum, c),
                                   log2_prob(q, teacher.max, teacher.log2_sum, c), temperature);
        };
        if (args.tail && student_tail > -__builtin_inf()) {
            const V max = Traits::splat(S(tail.max)), log2_sum = Traits::splat(S(tail.log2_sum));
            const V scale = Traits::splat(S(bucket_grad(student_tail, teacher_tail)));
            map_blocks(logits, logits, args.vocab,
                       [&](V x) { return scale * exp2_(log2_prob(x, max, log2_sum, vlog2e)); });
        } else {
            memset(logits, 0, sizeof(T) * static_cast<size_t>(args.vocab));
        }
        for (int64_t i = 0; i < args.k; ++i) {
            from_value(S(bucket_grad(buckets[i], log_probs[i])), logits + ids[i]);
        }
    }
}

}  // namespace

void topk_kl_rows(const TopkKlArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { rows<decltype(element)>(args, begin, end); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
