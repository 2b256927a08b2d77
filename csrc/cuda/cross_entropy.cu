// cross_entropy on CUDA. One block a row; one read for the log-sum-exp, one read and write for the gradient.
#include "fastft/cross_entropy.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

template <class T>
__global__ void FASTFT_ROW_KERNEL cross_entropy_kernel(CrossEntropyArgs args) {
    const int64_t r = blockIdx.x;
    T* logits = static_cast<T*>(args.logits) + r * args.logits_stride;
    float* nll = static_cast<float*>(args.nll) + r;
    const int64_t label = args.labels[r];
    const bool ignored = label == args.ignore_index;
    if (ignored || label < 0 || label >= args.vocab) {
        const float value = ignored ? 0.0f : NAN;
        if (threadIdx.x == 0) *nll = value;
        if (args.write_grad) fill_row(logits, args.vocab, value);
        return;
    }
    const float c = static_cast<float>(kLog2E);
    const bool aligned = is_aligned(logits);
    const float label_logit = to_float(logits[label]);
    // The barriers inside also keep the label's logit from being overwritten before all have read it.
    const RowStats<float> row = softmax_stats(logits, args.vocab, aligned, c);
    const float log_p = log2_prob(label_logit, row.max, row.log2_sum, c) * static_cast<float>(kLn2);
    if (threadIdx.x == 0) *nll = -log_p;
    if (!args.write_grad) return;
    for_elements(args.vocab, [&](int64_t i, int64_t left) {
        float x[kElements];
        load_elements(logits + i, left, aligned, x);
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            // expm1 keeps the digits of a label that is almost certain.
            x[k] = i + k == label ? expm1f(log_p) : exp2_(log2_prob(x[k], row.max, row.log2_sum, c));
        }
        store_elements(logits + i, left, aligned, x);
    });
}

}  // namespace
}  // namespace FASTFT_TARGET

void cross_entropy_cuda(const CrossEntropyArgs& args, cudaStream_t stream) {
    constexpr const char* name = "cross_entropy_kernel";
    if (args.rows == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        cross_entropy_kernel<decltype(element)>
            <<<grid_of(name, args.rows), threads_for(args.vocab), 0, stream>>>(args);
    });
    check_launch(name, args.rows, args.vocab);
}

KernelEntry cross_entropy_entry() {
    return {"cross_entropy", reinterpret_cast<const void*>(&cross_entropy_kernel<__nv_bfloat16>),
            threads_for(50272)};
}

}  // namespace fastft
