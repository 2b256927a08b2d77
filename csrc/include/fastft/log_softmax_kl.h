// log_softmax_kl: a divergence between softmax(teacher / T) and softmax(student / T), row by row.
//
// Forward reads each row once (online softmax of both rows and the divergence together; jsd, whose mixture
// needs both normalisers, twice). The gradient reads it once more and may overwrite the student's logits.
// Nothing of size [rows, vocab] is written in forward. Accumulates in float for 16-bit and float elements (a
// row's lanes are folded in double), in double for double.
//
// "Acc" below is float, or double for Float64.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/types.h"

namespace fastft {

struct LogSoftmaxKlArgs {
    const void* student;  // [rows, vocab] logits, row stride student_stride
    const void* teacher;  // [rows, vocab] logits, row stride teacher_stride
    const void* weights;  // [rows] Acc or null; a row of weight 0 is not read: kl 0, gradient 0
    void* kl;             // [rows] Acc out: T^2 * divergence in nats (not yet weighted)
    void* stats;          // [rows, kLogSoftmaxKlStats] Acc out, or null: what backward needs
    void* grad;           // [rows, vocab] out, row stride grad_stride, may be `student`; or null:
                          //   T^2 d divergence / d student (not yet weighted)
    int64_t rows, vocab;
    int64_t student_stride, teacher_stride, grad_stride;
    double temperature;
    double beta;  // jsd only, in (0, 1)
    Direction direction;
    DType dtype;
};

// max and log2 of the softmax's sum of student and teacher, and the divergence that the gradient needs:
// KL(P_s || P_t) for reverse, KL(P_s || M) for jsd.
constexpr int64_t kLogSoftmaxKlStats = 5;

struct LogSoftmaxKlBackwardArgs {
    const void* grad_kl;  // [rows] Acc: gradient with respect to `kl` above
    const void* student;  // [rows, vocab]
    const void* teacher;  // [rows, vocab]
    const void* stats;    // [rows, kLogSoftmaxKlStats] Acc from forward
    void* grad;           // [rows, vocab] out, contiguous; a row whose grad_kl is 0 becomes 0
    int64_t rows, vocab;
    int64_t student_stride, teacher_stride;
    double temperature;
    double beta;
    Direction direction;
    DType dtype;
};

// Rows [begin, end), on the calling thread.
void log_softmax_kl_cpu(const LogSoftmaxKlArgs& args, int64_t begin, int64_t end);
void log_softmax_kl_backward_cpu(const LogSoftmaxKlBackwardArgs& args, int64_t begin, int64_t end);

// All rows. Float32, BFloat16, Float16. Throws std::runtime_error when the launch fails.
void log_softmax_kl_cuda(const LogSoftmaxKlArgs& args, cudaStream_t stream);
void log_softmax_kl_backward_cuda(const LogSoftmaxKlBackwardArgs& args, cudaStream_t stream);

}  // namespace fastft
