// rotary: rotary position embedding of queries and keys. With x1, x2 the halves of a head's first R elements
// and c1, c2, s1, s2 those of its token's cosines and sines
//   y1 = c1 x1 - s1 x2,   y2 = c2 x2 + s2 x1        or, transposed (the gradient),
//   y1 = c1 x1 + s2 x2,   y2 = c2 x2 - s1 x1
// and the other D - R elements as they are. Arithmetic in float (double for double), one rounding.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/target.h"
#include "fastft/types.h"

namespace fastft {

// [batch, heads, tokens, D], x and y; strides in elements, the last dimension contiguous.
struct RotaryHeads {
    const void* x;
    void* y;
    int64_t heads;
    int64_t x_batch, x_head, x_token;
    int64_t y_batch, y_head, y_token;
};

struct RotaryArgs {
    RotaryHeads q, k;
    const void *cos, *sin;  // [batch, tokens, R], contiguous in the last dimension; stride 0 of one for all
    int64_t cos_batch, cos_token, sin_batch, sin_token;
    int64_t batch, tokens;
    int64_t size, rotated;  // D, and R, which is even
    bool transposed;
    DType dtype;        // of q and k
    DType angle_dtype;  // of cos and sin: dtype, or float32 beside 16 bits
};

// Tokens [begin, end) of batch * tokens.
void rotary_cpu(const RotaryArgs& args, int64_t begin, int64_t end);
void rotary_cuda(const RotaryArgs& args, cudaStream_t stream);

}  // namespace fastft
