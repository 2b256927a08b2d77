// bias_adamw: one AdamW step of many small tensors at once, their state in flat buffers.
//
// Tensor i's state is [offset, offset + numel) of every flat buffer, with offset a multiple of kCodeBlock;
// the buffers end on a multiple of it too, and their padding stays 0. Work is cut into chunks of kAdamWChunk
// elements, none of which spans two tensors; each is worked on by one CPU thread or one CUDA block.
//
// With clipping or a check for finite gradients a first pass writes one sum of squares per chunk; they are
// added up in the order of the chunks, and the second pass updates everything or, where the norm is not
// finite, nothing: parameters, state and step counts stay. Without either there is one pass. The host never
// waits for the device. CUDA: the pointers of parameters and gradients are kernel arguments, so that
// gradients may move from step to step without a copy to the device, and a CUDA graph replays the step.
//
// State is float for 16-bit and float parameters, double for double (Acc below); or 8-bit codes with a scale
// per block (adamw_math.h), computed with in Acc.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"
#include "fastft/types.h"

namespace fastft {

constexpr int64_t kAdamWChunk = 4096;
constexpr int64_t kCodeBlock = 256;

// A row of the plan.
struct AdamWTensor {
    int64_t offset;  // in the flat buffers, in elements
    int64_t numel;
    int64_t group;        // index of its hyperparameters
    int64_t step;         // index of its step count
    int64_t first_chunk;  // of the plan's chunks
    int64_t dtype;        // DType of the parameter and its gradient
};

// The hyperparameters of one group.
struct AdamWGroup {
    double lr, beta1, beta2, eps, weight_decay;
};

struct AdamWArgs {
    void* const* params;                 // [count] host array of pointers, each [numel]
    const void* const* grads;            // [count] host array of pointers, each [numel]
    const AdamWTensor* tensors;          // [count] in host memory, in the order of their groups
    const AdamWTensor* device_tensors;   // the same where the kernel runs
    const int64_t* device_chunk_tensor;  // [chunks] index of each chunk's tensor, where the kernel runs
    const AdamWGroup* groups;            // [group_count] host
    int64_t count, chunks, group_count;
    void* exp_avg;     // [total] Acc, or int8
    void* exp_avg_sq;  // [total] Acc, or uint8
    void* scales;      // [2, total / kCodeBlock] Acc: of exp_avg, of sqrt(exp_avg_sq); null: state is Acc
    void* master;      // [total] Acc: 16-bit parameters are rounded copies of it; or null
    float* steps;      // steps done, one per tensor of the flat buffers
    void* status;      // AdamWStatus<Acc> out; grad_norm only where a norm is asked for
    void* partials;    // [chunks] Acc, scratch
    int32_t* tickets;  // [2] 0 before and after; CUDA: counts finished blocks
    const float* lr;   // [group_count] where the kernel runs, instead of the groups' lr; CUDA only; or null
    const float* grad_scale;  // [] the gradients are this many times too large; or null
    const float* found_inf;   // [] not 0: skip the step; or null
    int64_t total;
    double max_grad_norm;  // 0: no clipping
    bool skip_non_finite;  // skip the step where the norm of the gradients is not finite
    bool is_double;        // Acc is double; all tensors are Float64 then
};

// Chunks [begin, end), on the calling thread: the sums of squares; the update itself, with args.status
// written.
void bias_adamw_norm_cpu(const AdamWArgs& args, int64_t begin, int64_t end);
void bias_adamw_update_cpu(const AdamWArgs& args, int64_t begin, int64_t end);
// Writes args.status, from the sums of squares where wanted; true where the step is to be done.
bool bias_adamw_status_cpu(const AdamWArgs& args);
// Counts the step of every tensor.
void bias_adamw_count_cpu(const AdamWArgs& args);

// The whole step. Float32, BFloat16, Float16. Throws std::runtime_error when a launch fails.
void bias_adamw_cuda(const AdamWArgs& args, cudaStream_t stream);

}  // namespace fastft
