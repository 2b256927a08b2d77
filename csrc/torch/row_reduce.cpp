// row_reduce: unpacks tensors and calls the kernels.
#include "fastft/row_reduce.h"

#include "ops.h"
#include "util.h"

namespace fastft {

std::tuple<Tensor, Tensor> row_reduce(const Tensor& values, std::optional<Tensor> weights, bool mean) {
    check(values.dim() == 1, "row_reduce: values must be [rows]");
    RowReduceArgs args{};
    args.rows = values.size(0);
    args.is_double = values.scalar_type() == ScalarType::Double;
    const ScalarType acc = args.is_double ? ScalarType::Double : ScalarType::Float;
    check_vector(values, args.rows, acc, "row_reduce: values must be contiguous float32 or float64");
    if (weights)
        check_vector(*weights, args.rows, acc, "row_reduce: weights must have the shape and dtype of values");
    Tensor out = torch::stable::new_empty(values, {});
    Tensor row_scale = torch::stable::new_empty(values, {args.rows});
    args.values = values.data_ptr();
    args.weights = optional_data(weights);
    args.out = out.data_ptr();
    args.row_scale = row_scale.data_ptr();
    args.mean = mean;
    if (values.is_cuda()) {
        DeviceGuard guard(values);
        row_reduce_cuda(args, current_stream(values));
    } else {
        row_reduce_cpu(args);
    }
    return {out, row_scale};
}

}  // namespace fastft
