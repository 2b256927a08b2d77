// row_reduce: weighted sum or mean of one number per row, in an order that depends on nothing but the number
// of rows: not on threads, and not on how rows were cut into chunks.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/types.h"

namespace fastft {

struct RowReduceArgs {
    const void* values;   // [rows] Acc
    const void* weights;  // [rows] Acc, or null for ones
    void* out;            // [] Acc: sum(w * v), divided by sum(w) with `mean`; 0 where sum(w) is 0
    void* row_scale;      // [rows] Acc out: d out / d values
    int64_t rows;
    bool mean;
    bool is_double;
};

void row_reduce_cpu(const RowReduceArgs& args);
void row_reduce_cuda(const RowReduceArgs& args, cudaStream_t stream);

}  // namespace fastft
