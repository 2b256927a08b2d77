// bias_adamw: unpacks tensors and calls the kernels.
#include "fastft/bias_adamw.h"

#include <vector>

#include "fastft/adamw_math.h"
#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

// Which argument's which tensor does not fit is for the Python side to find out and to say.
constexpr const char* kUnfit = "bias_adamw: params and grads do not fit the plan";

constexpr int64_t kRow = sizeof(AdamWTensor) / sizeof(int64_t);
constexpr size_t kGroupRow = sizeof(AdamWGroup) / sizeof(double);

void check_flat(const Tensor& x, int64_t n, ScalarType dtype, int32_t device, const char* message) {
    check_vector(x, n, dtype, message);
    check(x.get_device() == device, message);
}

}  // namespace

void bias_adamw(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor exp_avg, Tensor exp_avg_sq,
                std::optional<Tensor> scales, std::optional<Tensor> master, Tensor steps, Tensor status,
                Tensor partials, Tensor tickets, const Tensor& plan, const Tensor& device_plan,
                std::vector<double> hyperparameters, std::optional<Tensor> lr,
                std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, double max_grad_norm,
                bool skip_non_finite) {
    const size_t count = params.size();
    check(grads.size() == count, kUnfit);
    if (count == 0) return;
    check(
        plan.dim() == 1 && plan.scalar_type() == ScalarType::Long && plan.is_contiguous() &&
            !plan.is_cuda() && plan.size(0) >= static_cast<int64_t>(count) * kRow,
        "bias_adamw: plan must be int64 on the CPU, a row for each of params and the tensors of the chunks");
    const int32_t device = exp_avg.get_device();
    check_flat(device_plan, plan.size(0), ScalarType::Long, device,
               "bias_adamw: device_plan must be the plan where the state is");
    AdamWArgs args{};
    args.tensors = static_cast<const AdamWTensor*>(plan.data_ptr());
    args.device_tensors = static_cast<const AdamWTensor*>(device_plan.data_ptr());
    args.device_chunk_tensor =
        static_cast<const int64_t*>(device_plan.data_ptr()) + static_cast<int64_t>(count) * kRow;
    args.count = static_cast<int64_t>(count);
    args.chunks = plan.size(0) - args.count * kRow;

    const bool cuda = params[0].is_cuda();
    std::vector<void*> param_pointers(count);
    std::vector<const void*> grad_pointers(count);
    for (size_t i = 0; i < count; ++i) {
        const Tensor &param = params[i], &grad = grads[i];
        const AdamWTensor& row = args.tensors[i];
        check(param.get_device() == device && grad.get_device() == device && param.is_cuda() == cuda &&
                  grad.is_cuda() == cuda,
              kUnfit);
        check(static_cast<int64_t>(dtype_of(param)) == row.dtype && grad.scalar_type() == param.scalar_type(),
              kUnfit);
        check(param.numel() == row.numel && grad.numel() == row.numel, kUnfit);
        check(param.is_contiguous() && grad.is_contiguous(), kUnfit);
        param_pointers[i] = param.data_ptr();
        grad_pointers[i] = grad.data_ptr();
    }
    args.params = param_pointers.data();
    args.grads = grad_pointers.data();
    args.is_double = dtype_of(params[0]) == DType::Float64;
    const ScalarType acc = args.is_double ? ScalarType::Double : ScalarType::Float;

    check(exp_avg.dim() == 1 && exp_avg.is_cuda() == cuda, "bias_adamw: exp_avg must be flat, beside params");
    args.total = exp_avg.size(0);
    const ScalarType codes1 = scales ? ScalarType::Char : acc, codes2 = scales ? ScalarType::Byte : acc;
    check_flat(exp_avg, args.total, codes1, device, "bias_adamw: exp_avg must be flat, int8 with scales");
    check_flat(exp_avg_sq, args.total, codes2, device,
               "bias_adamw: exp_avg_sq must be flat, uint8 with scales");
    if (scales) {
        check_flat(*scales, args.total / kCodeBlock * 2, acc, device,
                   "bias_adamw: scales must be flat, two for every block of the state");
        args.scales = scales->data_ptr();
    }
    if (master) {
        check_flat(*master, args.total, acc, device, "bias_adamw: master must be flat, as long as the state");
        args.master = master->data_ptr();
    }
    check_flat(steps, steps.size(0), ScalarType::Float, device, "bias_adamw: steps must be float32");
    check_flat(status, 3, acc, device, "bias_adamw: status must be [3] in the accumulation dtype");
    check_flat(partials, partials.size(0), acc, device,
               "bias_adamw: partials must be in the accumulation dtype");
    check(partials.size(0) >= args.chunks, "bias_adamw: partials must have an element for each chunk");
    check_flat(tickets, 2, ScalarType::Int, device, "bias_adamw: tickets must be [2] int32");
    args.exp_avg = exp_avg.data_ptr();
    args.exp_avg_sq = exp_avg_sq.data_ptr();
    args.steps = static_cast<float*>(steps.data_ptr());
    args.status = status.data_ptr();
    args.partials = partials.data_ptr();
    args.tickets = static_cast<int32_t*>(tickets.data_ptr());

    check(hyperparameters.size() % kGroupRow == 0,
          "bias_adamw: hyperparameters must be five numbers a group");
    args.groups = reinterpret_cast<const AdamWGroup*>(hyperparameters.data());
    args.group_count = static_cast<int64_t>(hyperparameters.size() / kGroupRow);
    for (size_t i = 0; i < count; ++i) {
        const AdamWTensor& row = args.tensors[i];
        check(row.dtype == static_cast<int64_t>(DType::Float64) ? args.is_double : !args.is_double, kUnfit);
        check(row.group >= 0 && row.group < args.group_count && row.step >= 0 && row.step < steps.size(0) &&
                  row.offset >= 0 && row.offset + row.numel <= args.total,
              "bias_adamw: the plan does not fit the state");
        check(i == 0 || row.group >= args.tensors[i - 1].group,
              "bias_adamw: the plan is not in the order of groups");
    }
    if (lr) {
        check_flat(*lr, args.group_count, ScalarType::Float, device,
                   "bias_adamw: lr must be float32, one a group");
        args.lr = static_cast<const float*>(lr->data_ptr());
        if (!cuda) {
            for (size_t g = 0; g < hyperparameters.size() / kGroupRow; ++g) {
                hyperparameters[g * kGroupRow] = double(args.lr[g]);
            }
        }
    }
    for (const auto& one :
         {std::make_pair(&grad_scale, &args.grad_scale), std::make_pair(&found_inf, &args.found_inf)}) {
        if (!*one.first) continue;
        const Tensor& x = **one.first;
        check(x.numel() == 1 && x.scalar_type() == ScalarType::Float && x.get_device() == device &&
                  x.is_cuda() == cuda,
              "bias_adamw: grad_scale and found_inf must be one float32 each, beside params");
        *one.second = static_cast<const float*>(x.data_ptr());
    }
    args.max_grad_norm = max_grad_norm;
    args.skip_non_finite = skip_non_finite;

    if (cuda) {
        DeviceGuard guard(exp_avg);
        bias_adamw_cuda(args, current_stream(exp_avg));
        return;
    }
    cpu_capability();  // an error of its environment variable must not leave a worker thread
    if (wants_norm(args)) {
        parallel_rows(args.chunks, kAdamWChunk,
                      [&](int64_t b, int64_t e) { bias_adamw_norm_cpu(args, b, e); });
    }
    if (!bias_adamw_status_cpu(args)) return;
    parallel_rows(args.chunks, kAdamWChunk, [&](int64_t b, int64_t e) { bias_adamw_update_cpu(args, b, e); });
    bias_adamw_count_cpu(args);
}

}  // namespace fastft
