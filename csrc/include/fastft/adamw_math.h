// The mathematics of AdamW for one element, and of its 8-bit state, shared by the CPU and CUDA kernels.
//
// Templates take V, "a value", as in row_math.h: a float or double, or a SIMD vector of floats. Beyond what
// row_math.h asks of V they need sqrt_, abs_, copy_sign_, floor_, quick_sqrt_ and fourth_root_.
//
// 8-bit state. Blocks of kCodeBlock elements share one scale per moment; an element is an 8-bit integer c:
//   exp_avg          = scale * sign(c) (c / 127)^4,  scale = max |exp_avg|
//   sqrt(exp_avg_sq) = scale * (c / 254.99)^2,       scale = max sqrt(exp_avg_sq)
// so both moments are fourth powers of an integer: decoding is two or three products, encoding square roots,
// and there is no table to search. Chosen by measurement against 32-bit state (tests/ops/test_bias_adamw.py
// repeats those with "tree", bitsandbytes' dynamic map; "minifloat" is e3m4, and e4m4 of the root):
//                                                          here     tree    minifloat
//   biases of a network, 200 steps: error of the loss      0.13 %   1.6 %   1.0 %
//                                   error of the biases    1.5 %    3.3 %   4.1 %
//   gradients that spread over e^(+-7) in a block, 100
//   steps: error of the parameters                         35 %     164 x   74 %
// The tree fails the last one because its exp_avg_sq becomes 0 where exp_avg does not. Two rules matter:
// - exp_avg_sq changes by (1 - beta2) of itself a step, less than half a code. Rounded to nearest it would
//   stand still unless a gradient is several times its usual size. It is rounded with a dither that depends
//   on the element's index and the step only, so errors average out and runs repeat bit for bit.
// - c is at least 1 for exp_avg_sq: it is not taken for 0 beside an exp_avg that is not.
// A block that holds an infinity or a NaN decodes to NaN as a whole: visible, not silent.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastft/bias_adamw.h"
#include "fastft/row_math.h"
#include "fastft/target.h"

namespace fastft {
inline namespace FASTFT_TARGET {

FASTFT_HD float sqrt_(float x) { return sqrtf(x); }
FASTFT_HD double sqrt_(double x) { return sqrt(x); }
FASTFT_HD float abs_(float x) { return fabsf(x); }
FASTFT_HD double abs_(double x) { return fabs(x); }
FASTFT_HD float copy_sign_(float x, float sign) { return copysignf(x, sign); }
FASTFT_HD double copy_sign_(double x, double sign) { return copysign(x, sign); }
FASTFT_HD float floor_(float x) { return floorf(x); }
FASTFT_HD double floor_(double x) { return floor(x); }
// sqrt(x) to about one rounding, for x > 0; quicker than sqrt_ in vectors, whose divider is the bottleneck.
FASTFT_HD float quick_sqrt_(float x) { return sqrtf(x); }
FASTFT_HD double quick_sqrt_(double x) { return sqrt(x); }
// x^(1/4), 0 at 0. Vectors and CUDA take it from reciprocal roots, with a relative error of at most 6e-4: it
// only chooses between neighbouring codes of exp_avg.
FASTFT_HD double fourth_root_(double x) { return sqrt(sqrt(x)); }
FASTFT_HD float fourth_root_(float x) {
#ifdef __CUDA_ARCH__
    return rsqrtf(rsqrtf(x));
#else
    return sqrtf(sqrtf(x));
#endif
}

// ---------------------------------------------------------------------------------------------------------
// The update. Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, in torch.optim.AdamW's form.

// What is the same for all elements of a tensor in one step.
template <class V>
struct AdamWCoefficients {
    V grad_factor;  // what the gradient is multiplied with: clipping and the loss scale
    V one_minus_beta1, beta2, one_minus_beta2, eps;
    V decay;                // 1 - lr weight_decay
    V minus_step_size;      // -lr / (1 - beta1^step)
    V inv_sqrt_correction;  // 1 / sqrt(1 - beta2^step)
};

// `step` counts from 1. In double: 1 - beta2^step loses three digits at step 1. grad_factor is the caller's.
FASTFT_HD AdamWCoefficients<double> adamw_coefficients(const AdamWGroup& group, double step) {
    const double correction1 = 1 - pow(group.beta1, step), correction2 = 1 - pow(group.beta2, step);
    return {1,
            1 - group.beta1,
            group.beta2,
            1 - group.beta2,
            group.eps,
            1 - group.lr * group.weight_decay,
            -group.lr / correction1,
            1 / sqrt(correction2)};
}

template <class V>
FASTFT_HD AdamWCoefficients<V> splat(const AdamWCoefficients<double>& c) {
    using T = ValueTraits<V>;
    using S = ScalarOf<V>;
    return {T::splat(S(c.grad_factor)),
            T::splat(S(c.one_minus_beta1)),
            T::splat(S(c.beta2)),
            T::splat(S(c.one_minus_beta2)),
            T::splat(S(c.eps)),
            T::splat(S(c.decay)),
            T::splat(S(c.minus_step_size)),
            T::splat(S(c.inv_sqrt_correction))};
}

template <class V>
struct AdamWElement {
    V param, exp_avg, exp_avg_sq;
};

// One step of one element; returns the new sqrt(exp_avg_sq), which the 8-bit state stores.
template <class V>
FASTFT_HD V adamw_update(AdamWElement<V>& x, V grad, const AdamWCoefficients<V>& c) {
    grad = grad * c.grad_factor;
    x.exp_avg = fma_(c.one_minus_beta1, grad - x.exp_avg, x.exp_avg);
    x.exp_avg_sq = fma_(c.beta2, x.exp_avg_sq, c.one_minus_beta2 * grad * grad);
    const V root = sqrt_(x.exp_avg_sq);
    const V step = c.minus_step_size * x.exp_avg / fma_(root, c.inv_sqrt_correction, c.eps);
    x.param = fma_(x.param, c.decay, step);
    return root;
}

// Whether there is a first pass.
FASTFT_HD bool wants_norm(const AdamWArgs& args) { return args.max_grad_norm > 0 || args.skip_non_finite; }

// What the first pass tells the second about all gradients, and the caller about the step.
template <class S>
struct AdamWStatus {
    S grad_norm;    // 2-norm of all gradients, unscaled, before clipping
    S grad_factor;  // what every gradient is multiplied with
    S skipped;      // 1 where the step leaves everything alone, else 0
};

// From the sum of squares of the gradients as they came. max_grad_norm 0: no clipping. The clipping factor is
// that of torch.nn.utils.clip_grad_norm_. A norm that is not finite skips the step: a gradient is inf or NaN,
// or larger than any whose square is a number.
template <class S>
FASTFT_HD AdamWStatus<S> adamw_status(double sum_of_squares, double max_grad_norm, double inv_scale,
                                      bool found_inf) {
    const double norm = sqrt(sum_of_squares) * inv_scale;
    const double clip = max_grad_norm > 0 ? max_grad_norm / (norm + 1e-6) : 1.0;
    const bool finite = norm - norm == 0;
    return {S(norm), S((clip < 1 ? clip : 1.0) * inv_scale), S(finite && !found_inf ? 0 : 1)};
}

// ---------------------------------------------------------------------------------------------------------
// 8-bit codes, as values: the kernels convert them from and to integers.

// The second one is a little less than 255, which leaves room for any dither: its sum stays below 256.
constexpr double kExpAvgCodes = 127, kRootCodes = 254.99;

// code: the integer; unit: exp_avg_unit of its block's scale.
template <class V>
FASTFT_HD V decode_exp_avg(V code, V unit) {
    const V square = code * code;
    return copy_sign_(square * (square * unit), code);
}
template <class S>
FASTFT_HD S exp_avg_unit(S scale) {
    return scale * S(1 / (kExpAvgCodes * kExpAvgCodes * kExpAvgCodes * kExpAvgCodes));
}

// sqrt(exp_avg_sq).
template <class V>
FASTFT_HD V decode_root(V code, V unit) {
    return code * code * unit;
}
template <class S>
FASTFT_HD S root_unit(S scale) {
    return scale * S(1 / (kRootCodes * kRootCodes));
}

// The factors that encoding needs; roots of the scale, so that no scale is too small to be divided by.
template <class S>
FASTFT_HD S exp_avg_factor(S scale) {
    return scale > 0 ? S(kExpAvgCodes) / sqrt_(sqrt_(scale)) : S(0);
}
template <class S>
FASTFT_HD S root_factor(S scale) {
    return scale > 0 ? S(kRootCodes) / sqrt_(scale) : S(0);
}

// Encoders return a number whose integer part is the code. exp_avg is finite and at most its block's scale:
// within
// (-128, 128), rounded to nearest by the conversion towards 0.
template <class V>
FASTFT_HD V encode_exp_avg(V exp_avg, V factor) {
    const V half = ValueTraits<V>::splat(ScalarOf<V>(0.5));
    return copy_sign_(fma_(fourth_root_(abs_(exp_avg)), factor, half), exp_avg);
}

// Within [1, 256): `dither` is in [0, 1). The order in max_ drops the NaN of quick_sqrt_(0).
template <class V>
FASTFT_HD V encode_root(V root, V factor, V dither) {
    return max_(fma_(quick_sqrt_(root), factor, dither), ValueTraits<V>::splat(1));
}

// The dither of the element `index` (0 to kCodeBlock - 1) of a block: Weyl sequences over elements (golden
// ratio), steps (sqrt 2) and blocks (sqrt 3), so that every element sees evenly spread numbers over the
// steps.
FASTFT_HD float dither_offset(uint32_t step, uint32_t block) {
    return static_cast<float>((step * 0x6a09e667u + block * 0xbb67ae85u) >> 8) * 0x1p-24f;
}
template <class V>
FASTFT_HD V dither(V index, V offset) {
    const V t = fma_(index, ValueTraits<V>::splat(ScalarOf<V>(0.61803399)), offset);
    return t - floor_(t);
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
