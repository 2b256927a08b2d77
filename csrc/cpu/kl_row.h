// Divergence and gradient of one pair of rows; of logits (log_softmax_kl.cpp), or of buckets (topk_kl.cpp).
#pragma once

#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {

using Row = KlRow<double>;  // whatever the element type: it costs nothing per element

template <class T>
inline Row kl_forward(const T* student, const T* teacher, int64_t vocab, double c, bool reverse) {
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
inline Row jsd_forward(const T* student, const T* teacher, int64_t vocab, double c, double beta) {
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
inline Row row_forward(const T* student, const T* teacher, int64_t vocab, double c, Direction direction,
                       double beta) {
    if (direction == Direction::Jsd) return jsd_forward(student, teacher, vocab, c, beta);
    return kl_forward(student, teacher, vocab, c, direction == Direction::Reverse);
}

// d divergence / d student, times scale; grad may be the student's row.
template <class T>
inline void row_grad(const T* student, const T* teacher, T* grad, int64_t vocab, double c, const Row& row,
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

}  // namespace FASTFT_TARGET
}  // namespace fastft
