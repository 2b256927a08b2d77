// row_reduce on CUDA: one block, in double. The rows are few; the fixed order is the point.
#include "fastft/row_reduce.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

template <class Acc>
__global__ void FASTFT_ROW_KERNEL row_reduce_kernel(RowReduceArgs args) {
    const Acc* values = static_cast<const Acc*>(args.values);
    const Acc* weights = static_cast<const Acc*>(args.weights);
    double total = 0, mass = 0;
    for (int64_t r = threadIdx.x; r < args.rows; r += blockDim.x) {
        const double w = weights ? double(weights[r]) : 1.0;
        // A row of weight 0 counts for nothing, even where its value is inf or NaN.
        if (w != 0) total += w * double(values[r]);
        mass += w;
    }
    total = block_sum(total);
    mass = block_sum(mass);
    double scale = 1;
    if (args.mean) scale = mass != 0 ? 1 / mass : 0;
    if (threadIdx.x == 0) *static_cast<Acc*>(args.out) = scale != 0 ? Acc(total * scale) : Acc(0);
    for (int64_t r = threadIdx.x; r < args.rows; r += blockDim.x) {
        static_cast<Acc*>(args.row_scale)[r] = Acc((weights ? double(weights[r]) : 1.0) * scale);
    }
}

}  // namespace
}  // namespace FASTFT_TARGET

void row_reduce_cuda(const RowReduceArgs& args, cudaStream_t stream) {
    // Also with no rows: the sum of nothing is 0, and it must be written.
    const auto kernel = args.is_double ? &row_reduce_kernel<double> : &row_reduce_kernel<float>;
    check_launch("row_reduce_kernel", launch_kernel(kernel, 1, kMaxThreads, 0, 1, stream, args), args.rows,
                 1);
}

KernelEntry row_reduce_entry() {
    return {"row_reduce", reinterpret_cast<const void*>(&row_reduce_kernel<float>),
            plain_launch(kMaxThreads)};
}

}  // namespace fastft
