// quantise: a weight as two codes a byte with a scale for each block of elements (nf4, fp4), as it is read.
//
//   absmax[b] = max |x[e]| over the elements of block b
//   c[e]      = how many of `bounds` lie below x[e] / absmax[b]: the nearest of 16 sorted values
//
// Bit for bit what bitsandbytes computes on a CPU, which there takes several passes over 20 bytes an element.
// Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. On a GPU bitsandbytes has a kernel for it.
#pragma once

#include <cstdint>

#include "fastft/types.h"

namespace fastft {

struct Quantise4bitArgs {
    const void* x;         // [count]
    const float* bounds;   // [15], the midpoints of the sorted code
    uint8_t* packed;       // [ceil(count / 2)] out, the even elements' codes in the high halves
    float* absmax;         // [ceil(count / block)] out
    int64_t count, block;  // block a multiple of 64
    DType dtype;
};

// Blocks [begin, end).
void quantise_4bit_cpu(const Quantise4bitArgs& args, int64_t begin, int64_t end);

}  // namespace fastft
