// bias_adamw on the CPU, between and after the passes: one thread, in order.
#include "fastft/adamw_math.h"
#include "fastft/bias_adamw.h"

namespace fastft {
namespace {

template <class S>
bool status(const AdamWArgs& args) {
    const S* partials = static_cast<const S*>(args.partials);
    double sum = 0;
    if (wants_norm(args)) {
        for (int64_t i = 0; i < args.chunks; ++i) sum += double(partials[i]);
    }
    const double inv_scale = args.grad_scale ? 1 / double(*args.grad_scale) : 1.0;
    auto* out = static_cast<AdamWStatus<S>*>(args.status);
    *out = adamw_status<S>(sum, args.max_grad_norm, inv_scale, args.found_inf && *args.found_inf != 0);
    return out->skipped == 0;
}

}  // namespace

bool bias_adamw_status_cpu(const AdamWArgs& args) {
    return args.is_double ? status<double>(args) : status<float>(args);
}

void bias_adamw_count_cpu(const AdamWArgs& args) {
    for (int64_t i = 0; i < args.count; ++i) args.steps[args.tensors[i].step] += 1;
}

}  // namespace fastft
