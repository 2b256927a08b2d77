// rms_norm: y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps) of each row, and its gradients
//   dx      = rstd * (dy * weight - x * rstd * mean(dy * weight * x * rstd))
//   dweight = sum over rows of dy * x * rstd
//
// Sums and products are float (double for double), and every result is rounded once. y and dy have weight's
// dtype: x's own, or float32 beside an x of 16 bits. Zhang and Sennrich 2019, arXiv 1910.07467.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/target.h"
#include "fastft/types.h"

namespace fastft {

struct RmsNormArgs {
    const void* x;       // [rows, width]
    const void* weight;  // [width]
    void* y;             // [rows, width] out, of weight's dtype
    void* rstd;          // [rows] out, float (double for double), saved for backward
    int64_t rows;
    int64_t width;
    double eps;
    DType dtype;         // of x
    DType weight_dtype;  // x's, or Float32
};

struct RmsNormBackwardArgs {
    const void* dy;      // [rows, width] of weight's dtype
    const void* x;       // [rows, width]
    const void* weight;  // [width]
    const void* rstd;    // [rows]
    void* dx;            // [rows, width] out
    void* partials;      // [chunks, width] float (double for double), sums over a chunk's rows; or null
    void* dweight;       // [width] out, of weight's dtype; or null
    int64_t rows;
    int64_t width;
    DType dtype;
    DType weight_dtype;
};

// Rows whose part of dweight is summed into one row of partials. By the shape alone, so that neither threads
// nor devices change the order of the sum; few enough for parallelism, enough for the partials to be a small
// part of what is moved anyway.
inline int64_t rms_norm_chunk_rows(int64_t rows) {
    const int64_t share = rows / 1024;
    return share < 16 ? 16 : share > 64 ? 64 : share;
}
inline int64_t rms_norm_chunks(int64_t rows) {
    const int64_t chunk = rms_norm_chunk_rows(rows);
    return (rows + chunk - 1) / chunk;
}

// Rows [begin, end).
void rms_norm_cpu(const RmsNormArgs& args, int64_t begin, int64_t end);
// Chunks [begin, end): dx of their rows, and their partials where there are any.
void rms_norm_backward_cpu(const RmsNormBackwardArgs& args, int64_t begin, int64_t end);
// Columns [begin, end) of dweight from the partials of all chunks.
void rms_norm_dweight_cpu(const RmsNormBackwardArgs& args, int64_t begin, int64_t end);
void rms_norm_cuda(const RmsNormArgs& args, cudaStream_t stream);
void rms_norm_backward_cuda(const RmsNormBackwardArgs& args, cudaStream_t stream);

}  // namespace fastft
