// log_softmax_kl on the CPU; compiled once per capability (see vec.h).
#include "fastft/log_softmax_kl.h"

#include "kl_row.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

template <class T>
void forward_rows(const LogSoftmaxKlArgs& args, int64_t begin, int64_t end) {
    using Acc = ScalarOf<Value<T>>;
    const double c = kLog2E / args.temperature;
    for (int64_t r = begin; r < end; ++r) {
        const T* student = static_cast<const T*>(args.student) + r * args.student_stride;
        const T* teacher = static_cast<const T*>(args.teacher) + r * args.teacher_stride;
        T* grad = args.grad ? static_cast<T*>(args.grad) + r * args.grad_stride : nullptr;
        Acc* kl = static_cast<Acc*>(args.kl) + r;
        if (args.weights && static_cast<const Acc*>(args.weights)[r] == Acc(0)) {
            *kl = 0;
            if (grad) memset(grad, 0, sizeof(T) * static_cast<size_t>(args.vocab));
            if (args.stats) {
                Acc* out = static_cast<Acc*>(args.stats) + r * kLogSoftmaxKlStats;
                for (int64_t i = 0; i < kLogSoftmaxKlStats; ++i) out[i] = 0;
            }
            continue;
        }
        const Row row = row_forward(student, teacher, args.vocab, c, args.direction, args.beta);
        *kl = Acc(args.temperature * args.temperature * row.divergence);
        if (args.stats) {
            Acc* out = static_cast<Acc*>(args.stats) + r * kLogSoftmaxKlStats;
            out[0] = Acc(row.student.max);
            out[1] = Acc(row.student.log2_sum);
            out[2] = Acc(row.teacher.max);
            out[3] = Acc(row.teacher.log2_sum);
            out[4] = Acc(row.grad_divergence);
        }
        if (grad) {
            row_grad(student, teacher, grad, args.vocab, c, row, args.direction, args.beta, args.temperature);
        }
    }
}

template <class T>
void backward_rows(const LogSoftmaxKlBackwardArgs& args, int64_t begin, int64_t end) {
    using Acc = ScalarOf<Value<T>>;
    const double c = kLog2E / args.temperature;
    for (int64_t r = begin; r < end; ++r) {
        T* grad = static_cast<T*>(args.grad) + r * args.vocab;
        const Acc grad_kl = static_cast<const Acc*>(args.grad_kl)[r];
        if (grad_kl == Acc(0)) {
            memset(grad, 0, sizeof(T) * static_cast<size_t>(args.vocab));
            continue;
        }
        const Acc* in = static_cast<const Acc*>(args.stats) + r * kLogSoftmaxKlStats;
        const Row row{{in[0], in[1]}, {in[2], in[3]}, 0, in[4]};
        row_grad(static_cast<const T*>(args.student) + r * args.student_stride,
                 static_cast<const T*>(args.teacher) + r * args.teacher_stride, grad, args.vocab, c, row,
                 args.direction, args.beta, args.temperature * grad_kl);
    }
}

}  // namespace

void log_softmax_kl_rows(const LogSoftmaxKlArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { forward_rows<decltype(element)>(args, begin, end); });
}

void log_softmax_kl_backward_rows(const LogSoftmaxKlBackwardArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { backward_rows<decltype(element)>(args, begin, end); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
