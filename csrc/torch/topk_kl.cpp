// topk_kl: unpacks tensors and calls the kernels.
#include "fastft/topk_kl.h"

#include <vector>

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {

void topk_kl_rows(Tensor logits, const Tensor& ids, const Tensor& log_probs, std::optional<Tensor> weights,
                  Tensor kl, bool tail, double temperature, std::string direction, double beta,
                  bool write_grad) {
    check_rows(logits, "topk_kl: logits must be [rows, vocab] with contiguous rows");
    TopkKlArgs args{};
    args.dtype = dtype_of(logits);
    const ScalarType acc = accumulate_type(args.dtype);
    args.rows = logits.size(0);
    args.vocab = logits.size(1);
    args.logits_stride = logits.stride(0);
    check(ids.dim() == 2 && ids.size(0) == args.rows && ids.scalar_type() == ScalarType::Long &&
              ids.is_contiguous(),
          "topk_kl: ids must be [rows, k] int64");
    args.k = ids.size(1);
    check(log_probs.dim() == 2 && log_probs.size(0) == args.rows && log_probs.size(1) == args.k &&
              log_probs.scalar_type() == acc && log_probs.is_contiguous(),
          "topk_kl: log_probs must be [rows, k] in the accumulation dtype");
    check_vector(kl, args.rows, acc, "topk_kl: kl must be [rows] in the accumulation dtype");
    if (weights)
        check_vector(*weights, args.rows, acc, "topk_kl: weights must be [rows] in the accumulation dtype");
    args.logits = logits.data_ptr();
    args.ids = static_cast<const int64_t*>(ids.data_ptr());
    args.log_probs = log_probs.data_ptr();
    args.weights = optional_data(weights);
    args.kl = kl.data_ptr();
    args.temperature = temperature;
    args.beta = beta;
    args.tail = tail;
    args.write_grad = write_grad;
    args.direction = direction_of(direction);
    if (logits.is_cuda()) {
        DeviceGuard guard(logits);
        const Tensor scratch = torch::stable::new_empty(kl, {args.rows, args.k});
        args.scratch = scratch.data_ptr();
        topk_kl_cuda(args, current_stream(logits));
    } else {
        cpu_capability();
        parallel_rows(args.rows, args.vocab, [&](int64_t b, int64_t e) {
            std::vector<double> scratch(2 * static_cast<size_t>(args.k + 1));
            TopkKlArgs part = args;
            part.scratch = scratch.data();
            topk_kl_cpu(part, b, e);
        });
    }
}

}  // namespace fastft
