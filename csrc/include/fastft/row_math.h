// The mathematics of one row of logits, shared by every kernel of this project on every device.
//
// A row is seen by several lanes (SIMD lanes on the CPU, threads on the GPU). Each lane keeps a state,
// updates it with the elements it sees, and states are merged in a fixed order at the end of the row: all
// move to the largest of their maxima (`move_to`), then their sums are added (`add`). Both float and double
// states merge; what the row is worth is computed from a double one, since float's log2 of a sum of thousands
// is off by more than the KL of a student that is close to its teacher. Templates take V, "a value": float or
// double (scalar CPU code, CUDA threads) or a SIMD vector of floats (cpu/vec.h). For V they need + - * /,
// fma_, max_, exp2_, log_, select_, and the comparisons > and >=.
//
// Conventions
//   c       = log2(e) / temperature, so softmax weights are exp2((x - max) * c); one multiplication for the
//             temperature and the change of base. The subtraction comes first: logits of +-1e4 lose nothing.
//   max     starts at the lowest finite number, not -inf: then -inf logits need no branch, since
//             exp2(-inf - lowest) is 0 and not NaN. A row of only -inf has sum 0 and gives NaN, as in torch.
//   0 log 0 = 0: an element with probability 0 under the first argument of KL adds nothing, even where the
//             other one is 0 as well. KL is inf where only the second one is 0.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDA_ARCH__
#include "fastft/ptx.h"
#endif
#include "fastft/target.h"
#include "fastft/types.h"

namespace fastft {
inline namespace FASTFT_TARGET {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

FASTFT_HD float fma_(float a, float b, float c) { return fmaf(a, b, c); }
FASTFT_HD double fma_(double a, double b, double c) { return fma(a, b, c); }
FASTFT_HD double max_(double a, double b) { return a > b ? a : b; }
#ifdef __CUDA_ARCH__
// One instruction where the comparison below takes two; a NaN in either is kept.
__device__ __forceinline__ float max_(float a, float b) { return ptx_max_nan(a, b); }
// The instruction behind exp2f: the same 2 ulp where the result is a normal number, and 0 below 2^-126, as in
// cpu/vec.h, where exp2f spends two more multiplications on subnormals.
__device__ __forceinline__ float exp2_(float x) { return ptx_exp2(x); }
__device__ __forceinline__ double exp2_(double x) { return exp2(x); }  // of states only
#else
// A NaN in `a` is dropped, one in `b` is kept: call with the running value first.
FASTFT_HD float max_(float a, float b) { return a > b ? a : b; }
// 0 below the normal numbers, as for vectors: what is not 0 may be divided by.
FASTFT_HD float exp2_(float x) { return x < -126 ? 0 : exp2f(x); }
FASTFT_HD double exp2_(double x) { return x < -1022 ? 0 : exp2(x); }
#endif
FASTFT_HD float exp_minus_abs_(float x) { return exp2_(-fabsf(x) * float(kLog2E)); }
FASTFT_HD double exp_minus_abs_(double x) { return exp2_(-fabs(x) * kLog2E); }
// 1 / x of a normal number whose reciprocal is one.
FASTFT_HD float reciprocal_(float x) { return 1 / x; }
FASTFT_HD double reciprocal_(double x) { return 1 / x; }
FASTFT_HD float log_(float x) { return logf(x); }
FASTFT_HD double log_(double x) { return log(x); }
FASTFT_HD float log2_(float x) { return log2f(x); }
FASTFT_HD double log2_(double x) { return log2(x); }
FASTFT_HD float select_(bool m, float a, float b) { return m ? a : b; }
FASTFT_HD double select_(bool m, double a, double b) { return m ? a : b; }
FASTFT_HD bool any_(bool m) { return m; }
FASTFT_HD bool any_nan_(float x) { return x != x; }
FASTFT_HD bool any_nan_(double x) { return x != x; }

// Constants of V's element type, and V from one number.
template <class V>
struct ValueTraits {
    using Scalar = V;
    static FASTFT_HD V splat(V x) { return x; }
};
template <class V>
using ScalarOf = typename ValueTraits<V>::Scalar;

template <class S>
FASTFT_HD S lowest();
template <>
FASTFT_HD float lowest<float>() {
    return -FLT_MAX;
}
template <>
FASTFT_HD double lowest<double>() {
    return -DBL_MAX;
}

// Sum with Kahan's compensation: its error does not grow with the number of terms. It matters where the
// student is close to its teacher: an error of the two softmax sums is an error of the KL, however small the
// KL is.
template <class V>
struct RunningSum {
    V sum, carry;

    FASTFT_HD void init() { sum = carry = ValueTraits<V>::splat(0); }
    FASTFT_HD void add(V x) {
        const V y = x - carry;
        const V t = sum + y;
        const V lost = (t - sum) - y;
        carry = select_(lost >= lost, lost, ValueTraits<V>::splat(0));  // inf - inf must not become NaN
        sum = t;
    }
    // Knuth's two-sum: unlike `add`, no less exact where b is the larger one.
    FASTFT_HD void merge(const RunningSum& b) {
        const V t = sum + b.sum;
        const V b_part = t - sum;
        const V lost = (sum - (t - b_part)) + (b.sum - b_part);
        carry = carry + b.carry - select_(lost >= lost, lost, ValueTraits<V>::splat(0));
        sum = t;
    }
    FASTFT_HD V value() const { return sum - carry; }
    FASTFT_HD void scale(V s) {
        // An infinite sum whose weight has become 0 must go: inf * 0 is NaN.
        const V zero = ValueTraits<V>::splat(0);
        sum = select_(zero >= s, zero, sum * s);
        carry = carry * s;
    }
};

// ---------------------------------------------------------------------------------------------------------
// Online softmax: max and sum of exp2((x - max) * c).

template <class V>
struct SoftmaxState {
    V max;
    RunningSum<V> sum;

    FASTFT_HD void init() {
        max = ValueTraits<V>::splat(lowest<ScalarOf<V>>());
        sum.init();
    }

    // Takes K values at once so that the rescaling costs one exp2 per K elements.
    template <int K>
    FASTFT_HD void update(const V (&x)[K], V c) {
        V m = max;
        for (int k = 0; k < K; ++k) m = max_(m, x[k]);
        V block = exp2_((x[0] - m) * c);
        for (int k = 1; k < K; ++k) block = block + exp2_((x[k] - m) * c);
        if (any_(m > max)) sum.scale(exp2_((max - m) * c));
        sum.add(block);
        max = m;
    }

    // To a maximum that is no less than its own.
    FASTFT_HD void move_to(V m, V c) {
        sum.scale(exp2_((max - m) * c));
        max = m;
    }
    // Another state with the same maximum.
    FASTFT_HD void add(const SoftmaxState& b) { sum.merge(b.sum); }
};

template <class S>
FASTFT_HD void merge(SoftmaxState<S>& a, SoftmaxState<S> b, S c) {
    const S m = max_(a.max, b.max);
    a.move_to(m, c);
    b.move_to(m, c);
    a.add(b);
}

// ---------------------------------------------------------------------------------------------------------
// Online KL(P || Q) of two rows, P = softmax(p / T), Q = softmax(q / T):
//   KL = sum_j P_j (p_j - q_j) / T - lse(p / T) + lse(q / T)
// `dot` is sum_j exp2((p_j - max_p) c) (p_j - q_j), still to be divided by P's sum.

template <class V>
struct KlState {
    SoftmaxState<V> p, q;
    RunningSum<V> dot;

    FASTFT_HD void init() {
        p.init();
        q.init();
        dot.init();
    }

    template <int K>
    FASTFT_HD void update(const V (&x)[K], const V (&y)[K], V c) {
        const V zero = ValueTraits<V>::splat(0);
        q.update(y, c);
        V m = p.max;
        for (int k = 0; k < K; ++k) m = max_(m, x[k]);
        V block_sum = zero, block_dot = zero;
        for (int k = 0; k < K; ++k) {
            const V e = exp2_((x[k] - m) * c);
            block_sum = block_sum + e;
            block_dot = fma_(e, x[k] - y[k], block_dot);
        }
        if (any_nan_(block_dot)) block_dot = masked_dot(x, y, m, c);
        if (any_(m > p.max)) {
            const V scale = exp2_((p.max - m) * c);
            p.sum.scale(scale);
            dot.scale(scale);
        }
        p.sum.add(block_sum);
        dot.add(block_dot);
        p.max = m;
    }

    // The same sum with 0 * inf = 0 and 0 * NaN = 0, for the few blocks with a -inf in them. NaN (not 0)
    // where x is NaN: the comparison is written so that NaN fails it.
    template <int K>
    static FASTFT_HD V masked_dot(const V (&x)[K], const V (&y)[K], V m, V c) {
        const V zero = ValueTraits<V>::splat(0);
        V sum = zero;
        for (int k = 0; k < K; ++k) {
            const V e = exp2_((x[k] - m) * c);
            sum = sum + select_(zero >= e, zero, e * (x[k] - y[k]));
        }
        return sum;
    }

    FASTFT_HD void move_to(V p_max, V q_max, V c) {
        dot.scale(exp2_((p.max - p_max) * c));
        p.move_to(p_max, c);
        q.move_to(q_max, c);
    }
    FASTFT_HD void add(const KlState& b) {
        p.add(b.p);
        q.add(b.q);
        dot.merge(b.dot);
    }
};

template <class S>
FASTFT_HD void merge(KlState<S>& a, KlState<S> b, S c) {
    const S p_max = max_(a.p.max, b.p.max), q_max = max_(a.q.max, b.q.max);
    a.move_to(p_max, q_max, c);
    b.move_to(p_max, q_max, c);
    a.add(b);
}

// The same state in double.
FASTFT_HD RunningSum<double> widen(const RunningSum<float>& a) { return {a.sum, a.carry}; }
FASTFT_HD SoftmaxState<double> widen(const SoftmaxState<float>& a) { return {a.max, widen(a.sum)}; }
FASTFT_HD KlState<double> widen(const KlState<float>& a) { return {widen(a.p), widen(a.q), widen(a.dot)}; }

// What the gradient needs to know about a row. `log2_sum` is log2 of the softmax's sum, kept apart from max:
// their sum would lose the digits of log2_sum where max is large.
template <class S>
struct RowStats {
    S max, log2_sum;
};

template <class S>
FASTFT_HD RowStats<S> stats(const SoftmaxState<S>& a) {
    return {a.max, log2_(a.sum.value())};
}

FASTFT_HD RowStats<float> narrow(const RowStats<double>& a) {
    return {static_cast<float>(a.max), static_cast<float>(a.log2_sum)};
}

// A row's results. `divergence` is the op's value without T^2, `grad_divergence` what the gradient subtracts:
// KL(P_s || P_t) for reverse, KL(P_s || M) for jsd.
template <class S>
struct KlRow {
    RowStats<S> student, teacher;
    S divergence, grad_divergence;
};

FASTFT_HD KlRow<float> narrow(const KlRow<double>& a) {
    return {narrow(a.student), narrow(a.teacher), static_cast<float>(a.divergence),
            static_cast<float>(a.grad_divergence)};
}

// log-sum-exp of x / T in nats.
template <class S>
FASTFT_HD S lse(const RowStats<S>& a, S c) {
    return (a.max * c + a.log2_sum) * S(kLn2);
}

template <class S>
FASTFT_HD S kl_value(const KlState<S>& a, S c) {
    const S p_sum = a.p.sum.value(), q_sum = a.q.sum.value();
    // The difference of the two log-sum-exps, large parts first.
    const S lse_difference = ((a.p.max - a.q.max) * c + (log2_(p_sum) - log2_(q_sum))) * S(kLn2);
    return a.dot.value() / p_sum * c * S(kLn2) - lse_difference;
}

// log2 of the softmax probability of x.
template <class V>
FASTFT_HD V log2_prob(V x, V max, V log2_sum, V c) {
    return fma_(x - max, c, ValueTraits<V>::splat(0) - log2_sum);
}

// ---------------------------------------------------------------------------------------------------------
// Log of the mass that a teacher's listed tokens leave for all others; -inf where rounding leaves none.
// Reverse KL would be infinite there: for it the tail has at least 2^-24, which float32 cannot tell from 0
// beside a 1.
FASTFT_HD double log_tail_mass(double listed, Direction direction) {
    const double left = max_(direction == Direction::Reverse ? 0x1p-24 : 0.0, 1 - listed);
    return left > 0 ? log_(left) : -static_cast<double>(INFINITY);
}

// ---------------------------------------------------------------------------------------------------------
// Gradients with respect to the student's logit s, for one element. `scale` is the factor of the row (the
// temperature, the row's weight and the incoming gradient). T^2 dKL/ds = T * the expressions below.

// Forward KL(P_t || P_s): P_s - P_t.
template <class V>
FASTFT_HD V forward_kl_grad(V log2_ps, V log2_pt, V scale) {
    return scale * (exp2_(log2_ps) - exp2_(log2_pt));
}

// Reverse KL(P_s || P_t): P_s (log P_s - log P_t - KL).
template <class V>
FASTFT_HD V reverse_kl_grad(V log2_ps, V log2_pt, V kl, V scale) {
    const V zero = ValueTraits<V>::splat(0);
    const V ps = exp2_(log2_ps);
    const V ln2 = ValueTraits<V>::splat(ScalarOf<V>(kLn2));
    return select_(zero >= ps, zero, scale * ps * ((log2_ps - log2_pt) * ln2 - kl));
}

// The two parts of the generalised Jensen-Shannon divergence at one element:
//   t = P_t log(P_t / M),  s = P_s log(P_s / M),  M = beta P_t + (1 - beta) P_s.
// Both logarithms come from one, of M over the larger of the two: with e the smaller over the larger,
//   log(larger / M) = -log(w + w' e),  log(smaller / M) = log e - log(w + w' e),
// which neither divides nor takes the logarithm of a tiny M.
template <class V>
struct JsdTerms {
    V t, s;
};

template <class V>
FASTFT_HD JsdTerms<V> jsd_terms(V log2_ps, V log2_pt, V beta) {
    const V zero = ValueTraits<V>::splat(0), one = ValueTraits<V>::splat(1);
    const V ln2 = ValueTraits<V>::splat(ScalarOf<V>(kLn2));
    // exp2 of this is 0 in float and double, and 0 times it is 0, which 0 times -inf is not.
    const V lowest_log2 = ValueTraits<V>::splat(-1100);
    log2_ps = max_(lowest_log2, log2_ps);
    log2_pt = max_(lowest_log2, log2_pt);
    const V difference = log2_ps - log2_pt;
    const auto student_larger = difference >= zero;
    const V log2_e = select_(student_larger, zero - difference, difference);
    const V larger = exp2_(select_(student_larger, log2_ps, log2_pt)), e = exp2_(log2_e);
    const V weight = select_(student_larger, one - beta, beta);
    const V log_larger = zero - log_(fma_(one - weight, e, weight));
    const V at_larger = larger * log_larger, at_smaller = larger * e * fma_(log2_e, ln2, log_larger);
    return {select_(student_larger, at_smaller, at_larger), select_(student_larger, at_larger, at_smaller)};
}

// (1 - beta) P_s (log(P_s / M) - KL(P_s || M)); the factor (1 - beta) belongs to `scale`.
template <class V>
FASTFT_HD V jsd_grad(V log2_ps, V log2_pt, V kl_student, V beta, V scale) {
    const V zero = ValueTraits<V>::splat(0), one = ValueTraits<V>::splat(1);
    const V ps = exp2_(log2_ps);
    // No overflow where P_s counts: it is a normal number then, and P_t / P_s at most 2^126.
    const V log_mixture = log_(fma_(beta, exp2_(log2_pt - log2_ps), one - beta));
    return select_(zero >= ps, zero, zero - scale * ps * (log_mixture + kl_student));
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
