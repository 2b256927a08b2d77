// index_check: unpacks tensors and calls the kernels.
#include "fastft/index_check.h"

#include "ops.h"
#include "util.h"

namespace fastft {

void index_check(const Tensor& index, int64_t vocab, int64_t ignore, int64_t source, Tensor record) {
    check((index.dim() == 1 || index.dim() == 2) && index.scalar_type() == ScalarType::Long &&
              index.is_contiguous(),
          "index_check: index must be [rows] or [rows, k] int64");
    check(!record.is_cuda(), "index_check: record must be in the host's memory");
    check_vector(record, sizeof(IndexRecord) / sizeof(int64_t), ScalarType::Long,
                 "index_check: record must be [6] int64");
    IndexCheckArgs args{};
    args.index = static_cast<const int64_t*>(index.data_ptr());
    args.count = index.numel();
    args.columns = index.dim() == 2 ? index.size(1) : 1;
    args.vocab = vocab;
    args.ignore = ignore;
    args.source = source;
    args.record = static_cast<IndexRecord*>(record.data_ptr());
    if (index.is_cuda()) {
        DeviceGuard guard(index);
        index_check_cuda(args, current_stream(index));
    } else {
        index_check_cpu(args);
    }
}

}  // namespace fastft
