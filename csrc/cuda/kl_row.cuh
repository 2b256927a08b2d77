// Divergence and gradient of one pair of rows; of logits (log_softmax_kl.cu), or of buckets (topk_kl.cu).
#pragma once

#include "row.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {

using Row = KlRow<float>;

// The first argument of a KL is `p`. Jsd needs both normalisers before anything else: `dot` stays 0.
template <Direction direction, class S, int K>
__device__ __forceinline__ void update(KlState<S>& state, const S (&student)[K], const S (&teacher)[K], S c) {
    if constexpr (direction == Direction::Forward) {
        state.update(teacher, student, c);
    } else if constexpr (direction == Direction::Reverse) {
        state.update(student, teacher, c);
    } else {
        state.p.update(teacher, c);
        state.q.update(student, c);
    }
}

// What is known of a row whose elements have all been seen: for jsd not yet its divergence.
template <Direction direction>
__device__ __forceinline__ KlRow<double> row_of(const KlState<double>& state, double c) {
    const RowStats<double> of_p = stats(state.p), of_q = stats(state.q);
    const double kl = direction == Direction::Jsd ? 0 : kl_value(state, c);
    return direction == Direction::Reverse ? KlRow<double>{of_p, of_q, kl, kl}
                                           : KlRow<double>{of_q, of_p, kl, kl};
}

// d divergence / d student at one element, times scale.
template <Direction direction>
__device__ __forceinline__ float kl_grad(float log2_ps, float log2_pt, const Row& row, float beta,
                                         float scale) {
    if constexpr (direction == Direction::Forward) {
        return forward_kl_grad(log2_ps, log2_pt, scale);
    } else if constexpr (direction == Direction::Reverse) {
        return reverse_kl_grad(log2_ps, log2_pt, row.grad_divergence, scale);
    } else {
        return jsd_grad(log2_ps, log2_pt, row.grad_divergence, beta, scale * (1 - beta));
    }
}

// f(std::integral_constant<Direction, ...>) of a runtime direction.
template <class F>
void dispatch_direction(Direction direction, F&& f) {
    switch (direction) {
        case Direction::Forward:
            return f(std::integral_constant<Direction, Direction::Forward>{});
        case Direction::Reverse:
            return f(std::integral_constant<Direction, Direction::Reverse>{});
        case Direction::Jsd:
            return f(std::integral_constant<Direction, Direction::Jsd>{});
    }
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
