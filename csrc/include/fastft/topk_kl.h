// topk_kl: a divergence from a teacher that is known by k log-probabilities and, with `tail`, by the mass of
// everything else as one more bucket. The student's distribution over the same k (+ 1) buckets is
//   b_i = logits[ids_i],  b_k = log sum_{j not in ids} exp(logits_j)
// and the divergence is that of log_softmax_kl over these k (+ 1) numbers, at temperature T, in its
// direction.
//
// The tail's log-sum-exp is summed over the tail alone (the k logits are set to -inf first), never as one
// minus the rest: a tail of 1e-9 keeps its digits. Accumulates in float (double for double); the k + 1
// buckets are computed in double on the CPU.
//
// Gradient: with g_i that of log_softmax_kl with respect to bucket i, g_i at ids_i; g_k exp(logits_j - b_k)
// in the tail.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/types.h"

namespace fastft {

struct TopkKlArgs {
    void* logits;           // [rows, vocab], row stride logits_stride; overwritten: by T^2 times the
                            //   divergence's gradient with write_grad, else left without the k logits
    const int64_t* ids;     // [rows, k], distinct in a row, each in [0, vocab), see index_check.h; CUDA: NaN
                            //   where one is not
    const void* log_probs;  // [rows, k] Acc: the teacher's log-probabilities over the whole vocabulary
    const void* weights;    // [rows] Acc or null; a row of weight 0 is not read: kl 0, gradient 0
    void* scratch;          // CUDA: [rows, k] float; CPU: [2, k + 1] double, of the calling thread
    void* kl;               // [rows] Acc out: T^2 times the divergence in nats (not yet weighted)
    int64_t rows, vocab, k, logits_stride;
    double temperature;
    double beta;  // jsd only, in (0, 1)
    bool tail, write_grad;
    Direction direction;
    DType dtype;
};

void topk_kl_cpu(const TopkKlArgs& args, int64_t begin, int64_t end);
void topk_kl_cuda(const TopkKlArgs& args, cudaStream_t stream);

}  // namespace fastft
