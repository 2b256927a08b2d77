// index_check on CUDA. Its one atomic chooses who writes an empty record, so of several bad ids any may be
// the one that is reported. It is atomic among this device's threads only, like every atomic on the host's
// memory behind PCIe; that is enough, because the host leaves a record alone until it is written.
#include "fastft/index_check.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kIdsPerThread = 4;

__global__ void FASTFT_ROW_KERNEL index_check_kernel(IndexCheckArgs args) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count; i += step) {
        const int64_t id = args.index[i];
        if ((id >= 0 && id < args.vocab) || id == args.ignore) continue;
        IndexRecord* record = args.record;
        auto* state = reinterpret_cast<unsigned long long*>(&record->state);
        if (atomicCAS(state, IndexRecord::kEmpty, IndexRecord::kBeingWritten) == IndexRecord::kEmpty) {
            record->source = args.source;
            record->row = i / args.columns;
            record->id = id;
            record->vocab = args.vocab;
            record->ignore = args.ignore;
            __threadfence_system();  // the host finds it written only with all that is in it
            record->state = IndexRecord::kWritten;
        }
        return;
    }
}

}  // namespace
}  // namespace FASTFT_TARGET

void index_check_cuda(const IndexCheckArgs& args, cudaStream_t stream) {
    constexpr const char* name = "index_check_kernel";
    if (args.count == 0) return;
    constexpr int64_t per_block = int64_t(kMaxThreads) * kIdsPerThread;
    const dim3 grid(grid_of(name, (args.count + per_block - 1) / per_block));
    check_launch(name, launch_kernel(&index_check_kernel, grid, kMaxThreads, 0, 1, stream, args),
                 args.count / args.columns, args.vocab);
}

KernelEntry index_check_entry() {
    return {"index_check", reinterpret_cast<const void*>(&index_check_kernel), plain_launch(kMaxThreads)};
}

}  // namespace fastft
