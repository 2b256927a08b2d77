// log_softmax_kl on the CPU; compiled once per capability (see vec.h).
#include "fastft/log_softmax_kl.h"

#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// One row's results, in double whatever the element type: they cost nothing per element.
struct Row {
    RowStats<double> student, teacher;
    double divergence;       // the op's value, without T^2
    double grad_divergence;  // what the gradient's formula subtracts
};

template <class T>
Row kl_forward(const T* student, const T* teacher, int64_t vocab, double c, bool reverse) {
    using V = Value<T>;
    const V vc = ValueTraits<V>::splat(ScalarOf<V>(c));
    KlState<V> state;
    state.init();
    for_blocks(reverse ? student : teacher, reverse ? teacher : student, vocab,
               [&](const V(&p)[kBlock], const V(&q)[kBlock]) { state.update(p, q, vc); });
    const KlState<double> total = fold(state, c);
    const double kl = kl_value(total, c);
    return {stats(reverse ? total.p : total.q), stats(reverse ? total.q : total.p), kl, kl};
}

// Two passes: the mixture of the two distributions needs both normalisers.
template <class T>
Row jsd_forward(const T* student, const T* teacher, int64_t vocab, double c, double beta) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    using Traits = ValueTraits<V>;
    const V vc = Traits::splat(S(c)), vbeta = Traits::splat(S(beta));
    SoftmaxState<V> state_s, state_t;
    state_s.init();
    state_t.init();
    for_blocks(student, teacher, vocab, [&](const V(&s)[kBlock], const V(&t)[kBlock]) {
        state_s.update(s, vc);
        state_t.update(t, vc);
    });
    Row row{stats(fold(state_s, c)), stats(fold(state_t, c)), 0, 0};
    const V max_s = Traits::splat(S(row.student.max)), sum_s = Traits::splat(S(row.student.log2_sum));
    const V max_t = Traits::splat(S(row.teacher.max)), sum_t = Traits::splat(S(row.teacher.log2_sum));
    RunningSum<V> total_s, total_t;
    total_s.init();
    total_t.init();
    for_blocks(student, teacher, vocab, [&](const V(&s)[kBlock], const V(&t)[kBlock]) {
        V block_s = Traits::splat(0), block_t = Traits::splat(0);
        for (int k = 0; k < kBlock; ++k) {
            const JsdTerms<V> terms =
                jsd_terms(log2_prob(s[k], max_s, sum_s, vc), log2_prob(t[k], max_t, sum_t, vc), vbeta);
            block_s = block_s + terms.s;
            block_t = block_t + terms.t;
        }
        total_s.add(block_s);
        total_t.add(block_t);
    });
    row.grad_divergence = fold(total_s);
    row.divergence = beta * fold(total_t) + (1 - beta) * row.grad_divergence;
    return row;
}

template <class T>
Row row_forward(const T* student, const T* teacher, int64_t vocab, double c, Direction direction,
                double beta) {
    if (direction == Direction::Jsd) return jsd_forward(student, teacher, vocab, c, beta);
    return kl_forward(student, teacher, vocab, c, direction == Direction::Reverse);
}

template <class T>
void row_grad(const T* student, const T* teacher, T* grad, int64_t vocab, double c, const Row& row,
              Direction direction, double beta, double scale) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    using Traits = ValueTraits<V>;
    const V vc = Traits::splat(S(c));
    const V max_s = Traits::splat(S(row.student.max)), sum_s = Traits::splat(S(row.student.log2_sum));
    const V max_t = Traits::splat(S(row.teacher.max)), sum_t = Traits::splat(S(row.teacher.log2_sum));
    const V divergence = Traits::splat(S(row.grad_divergence));
    const V vbeta = Traits::splat(S(beta));
    if (direction == Direction::Forward) {
        const V vscale = Traits::splat(S(scale));
        map_blocks(student, teacher, grad, vocab, [&](V s, V t) {
            return forward_kl_grad(log2_prob(s, max_s, sum_s, vc), log2_prob(t, max_t, sum_t, vc), vscale);
        });
    } else if (direction == Direction::Reverse) {
        const V vscale = Traits::splat(S(scale));
        map_blocks(student, teacher, grad, vocab, [&](V s, V t) {
            return reverse_kl_grad(log2_prob(s, max_s, sum_s, vc), log2_prob(t, max_t, sum_t, vc), divergence,
                                   vscale);
        });
    } else {
        const V vscale = Traits::splat(S(scale * (1 - beta)));
        map_blocks(student, teacher, grad, vocab, [&](V s, V t) {
            return jsd_grad(log2_prob(s, max_s, sum_s, vc), log2_prob(t, max_t, sum_t, vc), divergence, vbeta,
                            vscale);
        });
    }
}

template <class T>
void forward_rows(const LogSoftmaxKlArgs& args, int64_t begin, int64_t end) {
    using Acc = ScalarOf<Value<T>>;
    const double c = kLog2E / args.temperature;
    for (int64_t r = begin; r < end; ++r) {
        const T* student = static_cast<const T*>(args.student) + r * args.student_stride;
        const T* teacher = static_cast<const T*>(args.teacher) + r * args.teacher_stride;
        T* grad = args.grad ? static_cast<T*>(args.grad) + r * args.grad_stride : nullptr;
        Acc* kl = static_cast<Acc*>(args.kl) + r;
        if (args.weights && static_cast<const Acc*>(args.weights)[r] == Acc(0)) {
            *kl = 0;
            if (grad) memset(grad, 0, sizeof(T) * static_cast<size_t>(args.vocab));
            if (args.stats) {
                Acc* out = static_cast<Acc*>(args.stats) + r * kLogSoftmaxKlStats;
                for (int64_t i = 0; i < kLogSoftmaxKlStats; ++i) out[i] = 0;
            }
            continue;
        }
        const Row row = row_forward(student, teacher, args.vocab, c, args.direction, args.beta);
        *kl = Acc(args.temperature * args.temperature * row.divergence);
        if (args.stats) {
            Acc* out = static_cast<Acc*>(args.stats) + r * kLogSoftmaxKlStats;
            out[0] = Acc(row.student.max);
            out[1] = Acc(row.student.log2_sum);
            out[2] = Acc(row.teacher.max);
            out[3] = Acc(row.teacher.log2_sum);
            out[4] = Acc(row.grad_divergence);
        }
        if (grad) {
            row_grad(student, teacher, grad, args.vocab, c, row, args.direction, args.beta, args.temperature);
        }
    }
}

template <class T>
void backward_rows(const LogSoftmaxKlBackwardArgs& args, int64_t begin, int64_t end) {
    using Acc = ScalarOf<Value<T>>;
    const double c = kLog2E / args.temperature;
    for (int64_t r = begin; r < end; ++r) {
        T* grad = static_cast<T*>(args.grad) + r * args.vocab;
        const Acc grad_kl = static_cast<const Acc*>(args.grad_kl)[r];
        if (grad_kl == Acc(0)) {
            memset(grad, 0, sizeof(T) * static_cast<size_t>(args.vocab));
            continue;
        }
        const Acc* in = static_cast<const Acc*>(args.stats) + r * kLogSoftmaxKlStats;
        const Row row{{in[0], in[1]}, {in[2], in[3]}, 0, in[4]};
        row_grad(static_cast<const T*>(args.student) + r * args.student_stride,
                 static_cast<const T*>(args.teacher) + r * args.teacher_stride, grad, args.vocab, c, row,
                 args.direction, args.beta, args.temperature * grad_kl);
    }
}

}  // namespace

void log_softmax_kl_rows(const LogSoftmaxKlArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { forward_rows<decltype(element)>(args, begin, end); });
}

void log_softmax_kl_backward_rows(const LogSoftmaxKlBackwardArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { backward_rows<decltype(element)>(args, begin, end); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
