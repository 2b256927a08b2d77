// topk_kl on the CPU; compiled once per capability (see vec.h).
#include "fastft/topk_kl.h"

#include "kl_row.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

template <class T>
void rows(const TopkKlArgs& args, int64_t begin, int64_t end) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    using Traits = ValueTraits<V>;
    const int64_t k = args.k, buckets = args.tail ? k + 1 : k;
    const double c = kLog2E / args.temperature;
    const V vlog2e = Traits::splat(S(kLog2E));
    double* student = static_cast<double*>(args.scratch);  // the tail last
    double* teacher = student + k + 1;
    T minus_inf;
    from_value(-S(__builtin_inf()), &minus_inf);
    for (int64_t r = begin; r < end; ++r) {
        T* logits = static_cast<T*>(args.logits) + r * args.logits_stride;
        const int64_t* ids = args.ids + r * k;
        const S* log_probs = static_cast<const S*>(args.log_probs) + r * k;
        S* kl = static_cast<S*>(args.kl) + r;
        if (args.weights && static_cast<const S*>(args.weights)[r] == S(0)) {
            *kl = 0;
            if (args.write_grad) memset(logits, 0, sizeof(T) * static_cast<size_t>(args.vocab));
            continue;
        }
        for (int64_t i = 0; i < k; ++i) {
            student[i] = to_value(logits[ids[i]]);
            teacher[i] = log_probs[i];
        }
        RowStats<double> tail{0, -__builtin_inf()};
        if (args.tail) {
            for (int64_t i = 0; i < k; ++i) logits[ids[i]] = minus_inf;
            SoftmaxState<V> state;
            state.init();
            for_blocks(logits, args.vocab, [&](const V(&x)[kBlock]) { state.update(x, vlog2e); });
            tail = stats(fold(state, kLog2E));
            student[k] = lse(tail, kLog2E);
            RunningSum<double> listed;
            listed.init();
            for (int64_t i = 0; i < k; ++i) listed.add(exp2_(teacher[i] * kLog2E));
            // With every token listed the bucket is empty, whatever rounding left of the teacher's mass.
            teacher[k] = k == args.vocab ? -__builtin_inf() : log_tail_mass(listed.value(), args.direction);
        }
        const Row row = row_forward(student, teacher, buckets, c, args.direction, args.beta);
        *kl = S(args.temperature * args.temperature * row.divergence);
        if (!args.write_grad) continue;

        double* grad = student;
        row_grad(student, teacher, grad, buckets, c, row, args.direction, args.beta, args.temperature);
        if (tail.log2_sum > -__builtin_inf()) {
            const V max = Traits::splat(S(tail.max)), log2_sum = Traits::splat(S(tail.log2_sum));
            const V scale = Traits::splat(S(grad[k]));
            map_blocks(logits, logits, args.vocab,
                       [&](V x) { return scale * exp2_(log2_prob(x, max, log2_sum, vlog2e)); });
        } else {  // no tail, or nothing in it
            memset(logits, 0, sizeof(T) * static_cast<size_t>(args.vocab));
        }
        for (int64_t i = 0; i < k; ++i) from_value(S(grad[i]), logits + ids[i]);
    }
}

}  // namespace

void topk_kl_rows(const TopkKlArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { rows<decltype(element)>(args, begin, end); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
