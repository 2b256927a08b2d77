// row_reduce on the CPU: one thread, in order; the rows are few and the order is the point.
#include "fastft/row_reduce.h"

#include "fastft/row_math.h"

namespace fastft {
namespace {

template <class Acc>
void reduce(const RowReduceArgs& args) {
    const Acc* values = static_cast<const Acc*>(args.values);
    const Acc* weights = static_cast<const Acc*>(args.weights);
    Acc* row_scale = static_cast<Acc*>(args.row_scale);
    RunningSum<double> total, mass;
    total.init();
    mass.init();
    for (int64_t r = 0; r < args.rows; ++r) {
        const double w = weights ? double(weights[r]) : 1.0;
        // A row of weight 0 counts for nothing, even where its value is inf or NaN.
        if (w != 0) total.add(w * double(values[r]));
        mass.add(w);
    }
    double scale = 1;
    if (args.mean) scale = mass.sum != 0 ? 1 / mass.sum : 0;
    *static_cast<Acc*>(args.out) = scale != 0 ? Acc(total.sum * scale) : Acc(0);
    for (int64_t r = 0; r < args.rows; ++r) row_scale[r] = Acc((weights ? double(weights[r]) : 1.0) * scale);
}

}  // namespace

void row_reduce_cpu(const RowReduceArgs& args) {
    if (args.is_double) {
        reduce<double>(args);
    } else {
        reduce<float>(args);
    }
}

}  // namespace fastft
