// swiglu: y = silu(g) u with silu(g) = g sigmoid(g), and both gradients in one pass over dy, g and u:
//   dg = dy u s (1 + g (1 - s)),   du = dy g s,   s = sigmoid(g).
// Arithmetic in float (double for double), one rounding. Backward needs g and u alone.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/row_math.h"
#include "fastft/target.h"
#include "fastft/types.h"

namespace fastft {

struct SwigluArgs {
    const void *gate, *up;  // [count]
    void* y;                // [count] out
    int64_t count;
    DType dtype;
};

struct SwigluBackwardArgs {
    const void *dy, *gate, *up;  // [count]
    void *dgate, *dup;           // [count] out
    int64_t count;
    DType dtype;
};

// Elements [begin, end).
void swiglu_cpu(const SwigluArgs& args, int64_t begin, int64_t end);
void swiglu_backward_cpu(const SwigluBackwardArgs& args, int64_t begin, int64_t end);
void swiglu_cuda(const SwigluArgs& args, cudaStream_t stream);
void swiglu_backward_cuda(const SwigluBackwardArgs& args, cudaStream_t stream);

inline namespace FASTFT_TARGET {

// sigmoid(g) and 1 - sigmoid(g) from t = exp(-|g|), which is never above 1: nothing overflows, and neither of
// the two is what cancellation has left. Where t underflows (|g| > 87.3 in float, or 103.9) the lesser one is
// 0.
template <class V>
struct Sigmoid {
    V value, rest;

    explicit FASTFT_HD Sigmoid(V g) {
        const V zero = ValueTraits<V>::splat(0), one = ValueTraits<V>::splat(1);
        const V t = exp_minus_abs_(g);
        const V larger = reciprocal_(one + t), lesser = t * larger;
        const auto is_positive = g >= zero;
        value = select_(is_positive, larger, lesser);
        rest = select_(is_positive, lesser, larger);
    }
};

template <class V>
FASTFT_HD V swiglu_value(V gate, V up) {
    return gate * Sigmoid<V>(gate).value * up;
}

// d y / d gate and d y / d up, times dy.
template <class V>
struct SwigluGradient {
    V gate, up;

    FASTFT_HD SwigluGradient(V dy, V g, V u) {
        const Sigmoid<V> s(g);
        const V scaled = dy * s.value;
        up = scaled * g;
        gate = scaled * u * fma_(g, s.rest, ValueTraits<V>::splat(1));
    }
};

}  // namespace FASTFT_TARGET
}  // namespace fastft
