// dequantise: a tile of a quantised weight in a floating dtype, for one matrix product and then thrown away.
//
//   4 bit   w[e] = code[c[e]] * absmax(e / block): two codes a byte, the first in the high half; any code
//   book of 16
//           (nf4, fp4). Doubly quantised: absmax(i) = absmax_code[absmax8[i]] * absmax_scale[i /
//           absmax_block] + offset.
//   8 bit   w[n, k] = values[n, k] * scale[n]
//
// Elements are counted through the whole weight, row after row, as bitsandbytes stores them. Products are
// float, rounded once. Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; 2022,
// https://arxiv.org/abs/2208.07339.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/target.h"
#include "fastft/types.h"

namespace fastft {

struct Dequantise4bitArgs {
    const uint8_t* packed;      // [ceil(elements of the weight / 2)]
    const float* code;          // [16]
    const float* absmax;        // [blocks], or null where it is quantised itself
    const uint8_t* absmax8;     // [blocks]
    const float* absmax_code;   // [256]
    const float* absmax_scale;  // [ceil(blocks / absmax_block)]
    void* out;                  // [count] out: elements [first, first + count); first is even
    int64_t first, count, block, absmax_block;
    float absmax_offset;
    DType dtype;
};

struct Dequantise8bitArgs {
    const int8_t* values;  // [rows, K]
    const float* scale;    // [rows]
    void* out;             // [rows, K]
    int64_t rows, K;
    DType dtype;
};

inline namespace FASTFT_TARGET {

FASTFT_HD float absmax_of(const Dequantise4bitArgs& args, int64_t block) {
    if (args.absmax) return args.absmax[block];
    return args.absmax_code[args.absmax8[block]] * args.absmax_scale[block / args.absmax_block] +
           args.absmax_offset;
}

// The code of element e: even elements are in a byte's high half.
FASTFT_HD int code_of(uint8_t byte, int64_t e) { return e % 2 == 0 ? byte >> 4 : byte & 15; }

}  // namespace FASTFT_TARGET

// Elements [begin, end) of `out`, begin even.
void dequantise_4bit_cpu(const Dequantise4bitArgs& args, int64_t begin, int64_t end);
void dequantise_8bit_cpu(const Dequantise8bitArgs& args, int64_t begin, int64_t end);  // rows
void dequantise_4bit_cuda(const Dequantise4bitArgs& args, cudaStream_t stream);
void dequantise_8bit_cuda(const Dequantise8bitArgs& args, cudaStream_t stream);

}  // namespace fastft
