// cross_entropy on the CPU; compiled once per capability (see vec.h).
#include "fastft/cross_entropy.h"

#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

template <class T>
void rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    using Traits = ValueTraits<V>;
    const V c = Traits::splat(S(kLog2E));
    for (int64_t r = begin; r < end; ++r) {
        T* logits = static_cast<T*>(args.logits) + r * args.logits_stride;
        S* nll = static_cast<S*>(args.nll) + r;
        const int64_t label = args.labels[r];
        if (label == args.ignore_index) {
            *nll = 0;
            if (args.write_grad) memset(logits, 0, sizeof(T) * static_cast<size_t>(args.vocab));
            continue;
        }
        SoftmaxState<V> state;
        state.init();
        for_blocks(logits, args.vocab, [&](const V(&x)[kBlock]) { state.update(x, c); });
        const RowStats<double> row = stats(fold(state, kLog2E));
        const double log2_p = log2_prob<double>(to_value(logits[label]), row.max, row.log2_sum, kLog2E);
        *nll = S(-log2_p * kLn2);
        if (!args.write_grad) continue;
        const V max = Traits::splat(S(row.max)), log2_sum = Traits::splat(S(row.log2_sum));
        map_blocks(logits, logits, args.vocab, [&](V x) { return exp2_(log2_prob(x, max, log2_sum, c)); });
        // expm1 keeps the digits of a label that is almost certain.
        from_value(S(expm1(log2_p * kLn2)), logits + label);
    }
}

}  // namespace

void cross_entropy_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { rows<decltype(element)>(args, begin, end); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
