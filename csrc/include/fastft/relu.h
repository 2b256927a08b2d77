// relu: y = max(x, 0), and one bit an element for backward: dx = dy where the bit is set, else 0.
//
// Bit i % 8 of byte i / 8 is !(x[i] <= 0): NaN stays NaN and passes its gradient on, as in torch.relu. The
// mask takes the place of y, which autograd would keep: 1 / 16 of its bytes in a 16-bit type.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/target.h"
#include "fastft/types.h"

namespace fastft {

struct ReluArgs {
    const void* x;  // [count]
    void* y;        // [count] out
    uint8_t* mask;  // [ceil(count / 8)] out; bits beyond count are 0
    int64_t count;
    DType dtype;
};

struct ReluBackwardArgs {
    const void* dy;       // [count]
    const uint8_t* mask;  // [ceil(count / 8)]
    void* dx;             // [count] out
    int64_t count;
    DType dtype;
};

// Elements [begin, end); begin is a multiple of 8.
void relu_cpu(const ReluArgs& args, int64_t begin, int64_t end);
void relu_backward_cpu(const ReluBackwardArgs& args, int64_t begin, int64_t end);
void relu_cuda(const ReluArgs& args, cudaStream_t stream);
void relu_backward_cuda(const ReluBackwardArgs& args, cudaStream_t stream);

}  // namespace fastft
