// cross_entropy on CUDA; bound by memory. A row is kept in shared memory between its log-sum-exp and its
// gradient (see row_launch.h).
#include "fastft/cross_entropy.h"

#include "row.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

struct Row {
    RowStats<float> stats;
    float log_p;  // of the label
};

template <class T>
__global__ void FASTFT_ROW_KERNEL cross_entropy_kernel(CrossEntropyArgs args, RowLaunch launch) {
    const RowPart part = row_part(launch, args.vocab);
    T* row_logits = static_cast<T*>(args.logits) + part.row * args.logits_stride;
    T* part_logits = row_logits + part.begin;
    float* nll = static_cast<float*>(args.nll) + part.row;
    const bool first = part.begin == 0 && threadIdx.x == 0;
    const int64_t label = args.labels[part.row];
    const bool ignored = label == args.ignore_index;
    if (ignored || label < 0 || label >= args.vocab) {
        const float value = ignored ? 0.0f : NAN;
        if (first) *nll = value;
        if (args.write_grad) fill(part_logits, part.size, value);
        return;
    }
    const float c = static_cast<float>(kLog2E);
    // The barriers in merge_row also keep it from being overwritten, by any block, before all have read it.
    const float label_logit = to_float(row_logits[label]);
    RowCache<T, 1> logits({row_logits}, part, launch.cached);
    SoftmaxState<float> state;
    state.init();
    logits.read([&](int, const float (&x)[1][kElements]) { state.update(x[0], c); });
    const Row row = merge_row(state, c, launch.blocks, [&](const SoftmaxState<double>& total) {
        const RowStats<double> all = stats(total);
        const double log_p = log2_prob<double>(label_logit, all.max, all.log2_sum, c) * kLn2;
        return Row{narrow(all), static_cast<float>(log_p)};
    });
    if (first) *nll = -row.log_p;
    if (!args.write_grad) return;
    const bool aligned = is_aligned(part_logits);
    logits.reread([&](int i, const float (&x)[1][kElements]) {
        float g[kElements];
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            // expm1 keeps the digits of a label that is almost certain.
            g[k] = part.begin + i + k == label
                       ? expm1f(row.log_p)
                       : exp2_(log2_prob(x[0][k], row.stats.max, row.stats.log2_sum, c));
        }
        store_elements(part_logits + i, part.size - i, aligned, g);
    });
}

}  // namespace
}  // namespace FASTFT_TARGET

void cross_entropy_cuda(const CrossEntropyArgs& args, cudaStream_t stream) {
    constexpr const char* name = "cross_entropy_kernel";
    if (args.rows == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        const RowLaunch launch = plan_cached_row(args.vocab, sizeof(T), current_row_limits());
        launch_rows<cross_entropy_kernel<T>>(name, args, launch, true, stream);
    });
}

KernelEntry cross_entropy_entry(const RowLimits& limits) {
    return {"cross_entropy", reinterpret_cast<const void*>(&cross_entropy_kernel<__nv_bfloat16>),
            plan_cached_row(kReportedVocab, sizeof(__nv_bfloat16), limits)};
}

}  // namespace fastft
