// cross_entropy: unpacks tensors and calls the kernels.
#include "fastft/cross_entropy.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {

void cross_entropy_rows(Tensor logits, const Tensor& labels, Tensor nll, int64_t ignore_index,
                        bool write_grad) {
    check_rows(logits, "cross_entropy: logits must be [rows, vocab] with contiguous rows");
    CrossEntropyArgs args{};
    args.dtype = dtype_of(logits);
    args.rows = logits.size(0);
    args.vocab = logits.size(1);
    args.logits_stride = logits.stride(0);
    check_vector(labels, args.rows, ScalarType::Long, "cross_entropy: labels must be [rows] int64");
    check_vector(nll, args.rows, accumulate_type(args.dtype),
                 "cross_entropy: nll must be [rows] in the accumulation dtype");
    args.logits = logits.data_ptr();
    args.labels = static_cast<const int64_t*>(labels.data_ptr());
    args.nll = nll.data_ptr();
    args.ignore_index = ignore_index;
    args.write_grad = write_grad;
    if (logits.is_cuda()) {
        DeviceGuard guard(logits);
        cross_entropy_cuda(args, current_stream(logits));
    } else {
        cpu_capability();
        parallel_rows(args.rows, args.vocab, [&](int64_t b, int64_t e) { cross_entropy_cpu(args, b, e); });
    }
}

}  // namespace fastft
