// cross_entropy: -log softmax(logits)[label] of each row, and its gradient in place of the logits.
// Accumulates in float for 16-bit and float elements, in double for double.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/types.h"

namespace fastft {

struct CrossEntropyArgs {
    void* logits;           // [rows, vocab], row stride logits_stride; with write_grad overwritten by
                            //   softmax(logits) - onehot(label), or by 0 where the label is ignored
    const int64_t* labels;  // [rows], in [0, vocab) or ignore_index, see index_check.h; CUDA: NaN where it is
                            //   neither
    void* nll;              // [rows] Acc out, nats; 0 where the label is ignored
    int64_t rows, vocab, logits_stride, ignore_index;
    bool write_grad;
    DType dtype;
};

void cross_entropy_cpu(const CrossEntropyArgs& args, int64_t begin, int64_t end);
void cross_entropy_cuda(const CrossEntropyArgs& args, cudaStream_t stream);

}  // namespace fastft
