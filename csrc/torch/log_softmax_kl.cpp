// log_softmax_kl: unpacks tensors and calls the kernels.
#include "fastft/log_softmax_kl.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

LogSoftmaxKlArgs unpack(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weights,
                        double temperature, const std::string& direction, double beta) {
    check_rows(student, "log_softmax_kl: student_logits must be [rows, vocab] with contiguous rows");
    check_rows(teacher, "log_softmax_kl: teacher_logits must be [rows, vocab] with contiguous rows");
    check(teacher.size(0) == student.size(0) && teacher.size(1) == student.size(1) &&
              teacher.scalar_type() == student.scalar_type(),
          "log_softmax_kl: teacher_logits must have the shape and dtype of student_logits");
    LogSoftmaxKlArgs args{};
    args.student = student.data_ptr();
    args.teacher = teacher.data_ptr();
    args.weights = optional_data(weights);
    args.rows = student.size(0);
    args.vocab = student.size(1);
    args.student_stride = student.stride(0);
    args.teacher_stride = teacher.stride(0);
    args.temperature = temperature;
    args.beta = beta;
    args.direction = direction_of(direction);
    args.dtype = dtype_of(student);
    if (weights) {
        check_vector(*weights, args.rows, accumulate_type(args.dtype),
                     "log_softmax_kl: weights must be [rows] in the accumulation dtype");
    }
    return args;
}

void run(const LogSoftmaxKlArgs& args, const Tensor& student) {
    if (student.is_cuda()) {
        DeviceGuard guard(student);
        log_softmax_kl_cuda(args, current_stream(student));
    } else {
        cpu_capability();  // an error of its environment variable must not leave a worker thread
        parallel_rows(args.rows, args.vocab, [&](int64_t b, int64_t e) { log_softmax_kl_cpu(args, b, e); });
    }
}

}  // namespace

std::tuple<Tensor, Tensor> log_softmax_kl_forward(const Tensor& student, const Tensor& teacher,
                                                  std::optional<Tensor> weights, double temperature,
                                                  std::string direction, double beta) {
    LogSoftmaxKlArgs args = unpack(student, teacher, weights, temperature, direction, beta);
    Tensor kl = torch::stable::new_empty(student, {args.rows}, accumulate_type(args.dtype));
    Tensor stats =
        torch::stable::new_empty(student, {args.rows, kLogSoftmaxKlStats}, accumulate_type(args.dtype));
    args.kl = kl.data_ptr();
    args.stats = stats.data_ptr();
    run(args, student);
    return {kl, stats};
}

Tensor log_softmax_kl_backward(const Tensor& grad_kl, const Tensor& student, const Tensor& teacher,
                               const Tensor& stats, double temperature, std::string direction, double beta) {
    const LogSoftmaxKlArgs forward = unpack(student, teacher, std::nullopt, temperature, direction, beta);
    const ScalarType acc = accumulate_type(forward.dtype);
    check_vector(grad_kl, forward.rows, acc,
                 "log_softmax_kl: grad_kl must be [rows] in the accumulation dtype");
    check(stats.dim() == 2 && stats.size(0) == forward.rows && stats.size(1) == kLogSoftmaxKlStats &&
              stats.scalar_type() == acc && stats.is_contiguous(),
          "log_softmax_kl: stats must be the ones of forward");
    Tensor grad = torch::stable::new_empty(student, {forward.rows, forward.vocab});
    LogSoftmaxKlBackwardArgs args{};
    args.grad_kl = grad_kl.data_ptr();
    args.student = forward.student;
    args.teacher = forward.teacher;
    args.stats = stats.data_ptr();
    args.grad = grad.data_ptr();
    args.rows = forward.rows;
    args.vocab = forward.vocab;
    args.student_stride = forward.student_stride;
    args.teacher_stride = forward.teacher_stride;
    args.temperature = temperature;
    args.beta = beta;
    args.direction = forward.direction;
    args.dtype = forward.dtype;
    if (student.is_cuda()) {
        DeviceGuard guard(student);
        log_softmax_kl_backward_cuda(args, current_stream(student));
    } else {
        cpu_capability();
        advise_huge_pages(args.grad, args.rows * args.vocab * static_cast<int64_t>(grad.element_size()));
        parallel_rows(args.rows, args.vocab,
                      [&](int64_t b, int64_t e) { log_softmax_kl_backward_cpu(args, b, e); });
    }
    return grad;
}

void log_softmax_kl_rows(Tensor student, const Tensor& teacher, std::optional<Tensor> weights, Tensor kl,
                         double temperature, std::string direction, double beta, bool write_grad) {
    LogSoftmaxKlArgs args = unpack(student, teacher, weights, temperature, direction, beta);
    check_vector(kl, args.rows, accumulate_type(args.dtype),
                 "log_softmax_kl: kl must be [rows] in the accumulation dtype");
    args.kl = kl.data_ptr();
    if (write_grad) {
        args.grad = student.data_ptr();
        args.grad_stride = args.student_stride;
    }
    run(args, student);
}

}  // namespace fastft
