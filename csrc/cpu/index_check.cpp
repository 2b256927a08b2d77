// index_check on the CPU: one thread, in order; a comparison for each id is nothing beside the head's
// product.
#include "fastft/index_check.h"

namespace fastft {

void index_check_cpu(const IndexCheckArgs& args) {
    for (int64_t i = 0; i < args.count; ++i) {
        const int64_t id = args.index[i];
        if ((id >= 0 && id < args.vocab) || id == args.ignore) continue;
        if (args.record->state == IndexRecord::kEmpty)
            *args.record = {
                IndexRecord::kWritten, args.source, i / args.columns, id, args.vocab, args.ignore};
        return;
    }
}

}  // namespace fastft
