// log_softmax_kl on CUDA; bound by memory. A row is shared by a cluster of blocks and kept in their shared
// memory between its statistics and its gradient (see row_launch.h). The separate backward is a map over
// rows that forward has left in device memory.
//
// No cache hints: what is written is read next, by the head's matrix products, and may still be in L2.
#include "fastft/log_softmax_kl.h"

#include "kl_row.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// The order of a pair of rows in this file.
constexpr int kStudent = 0, kTeacher = 1;
template <class T>
using Logits = RowCache<T, 2>;

template <class S>
struct JsdSums {
    RunningSum<S> t, s;

    __device__ void init() {
        t.init();
        s.init();
    }
    __device__ void add(const JsdSums& b) {
        t.merge(b.t);
        s.merge(b.s);
    }
};
__device__ __forceinline__ JsdSums<double> widen(const JsdSums<float>& a) { return {widen(a.t), widen(a.s)}; }
template <class S>
__device__ __forceinline__ void merge_lanes(JsdSums<S>& a, S) {
    add_lanes(a);
}

template <Direction direction, class T>
__device__ __forceinline__ Row row_forward(Logits<T>& logits, int blocks, float c, float beta) {
    KlState<float> state;
    state.init();
    logits.read(
        [&](int, const float (&x)[2][kElements]) { update<direction>(state, x[kStudent], x[kTeacher], c); });
    Row row = merge_row(state, c, blocks, [c](const KlState<double>& total) {
        return narrow(row_of<direction>(total, double(c)));
    });
    if constexpr (direction == Direction::Jsd) {
        // The mixture of the two distributions needs both normalisers first.
        JsdSums<float> sums;
        sums.init();
        logits.reread([&](int, const float (&x)[2][kElements]) {
            float block_t = 0, block_s = 0;
#pragma unroll
            for (int k = 0; k < kElements; ++k) {
                const JsdTerms<float> terms =
                    jsd_terms(log2_prob(x[kStudent][k], row.student.max, row.student.log2_sum, c),
                              log2_prob(x[kTeacher][k], row.teacher.max, row.teacher.log2_sum, c), beta);
                block_t += terms.t;
                block_s += terms.s;
            }
            sums.t.add(block_t);
            sums.s.add(block_s);
        });
        const JsdTerms<float> total = merge_row(sums, c, blocks, [](const JsdSums<double>& all) {
            return JsdTerms<float>{static_cast<float>(all.t.value()), static_cast<float>(all.s.value())};
        });
        row.grad_divergence = total.s;
        row.divergence = beta * total.t + (1 - beta) * total.s;
    }
    return row;
}

// d divergence / d student of this block's part of the row, times scale. grad: the part's first element; may
// be the student's.
template <Direction direction, class T>
__device__ __forceinline__ void row_grad(const Logits<T>& logits, T* grad, int size, const Row& row, float c,
                                         float beta, float scale) {
    const bool aligned = is_aligned(grad);
    logits.reread([&](int i, const float (&x)[2][kElements]) {
        float g[kElements];
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            const float log2_ps = log2_prob(x[kStudent][k], row.student.max, row.student.log2_sum, c);
            const float log2_pt = log2_prob(x[kTeacher][k], row.teacher.max, row.teacher.log2_sum, c);
            g[k] = kl_grad<direction>(log2_ps, log2_pt, row, beta, scale);
        }
        store_elements(grad + i, size - i, aligned, g);
    });
}

template <class T, Direction direction>
__global__ void FASTFT_ROW_KERNEL log_softmax_kl_kernel(LogSoftmaxKlArgs args, RowLaunch launch, float c) {
    const RowPart part = row_part(launch, args.vocab);
    const int64_t r = part.row;
    T* grad = args.grad ? static_cast<T*>(args.grad) + r * args.grad_stride + part.begin : nullptr;
    float* kl = static_cast<float*>(args.kl) + r;
    float* out = args.stats ? static_cast<float*>(args.stats) + r * kLogSoftmaxKlStats : nullptr;
    const bool first = part.begin == 0 && threadIdx.x == 0;
    if (args.weights && static_cast<const float*>(args.weights)[r] == 0) {
        if (first) {
            *kl = 0;
            for (int i = 0; out && i < kLogSoftmaxKlStats; ++i) out[i] = 0;
        }
        if (grad) fill(grad, part.size, 0);
        return;
    }
    const float temperature = static_cast<float>(args.temperature), beta = static_cast<float>(args.beta);
    Logits<T> logits({static_cast<const T*>(args.student) + r * args.student_stride,
                      static_cast<const T*>(args.teacher) + r * args.teacher_stride},
                     part, launch.cached);
    const Row row = row_forward<direction>(logits, launch.blocks, c, beta);
    if (first) {
        *kl = temperature * temperature * row.divergence;
        if (out) {
            out[0] = row.student.max;
            out[1] = row.student.log2_sum;
            out[2] = row.teacher.max;
            out[3] = row.teacher.log2_sum;
            out[4] = row.grad_divergence;
        }
    }
    if (grad) row_grad<direction>(logits, grad, part.size, row, c, beta, temperature);
}

template <class T, Direction direction>
__global__ void FASTFT_ROW_KERNEL log_softmax_kl_backward_kernel(LogSoftmaxKlBackwardArgs args,
                                                                 RowLaunch launch, float c) {
    const RowPart part = row_part(launch, args.vocab);
    const int64_t r = part.row;
    T* grad = static_cast<T*>(args.grad) + r * args.vocab + part.begin;
    const float grad_kl = static_cast<const float*>(args.grad_kl)[r];
    if (grad_kl == 0) {
        fill(grad, part.size, 0);
        return;
    }
    const float* in = static_cast<const float*>(args.stats) + r * kLogSoftmaxKlStats;
    const Row row{{in[0], in[1]}, {in[2], in[3]}, 0, in[4]};
    const Logits<T> logits({static_cast<const T*>(args.student) + r * args.student_stride,
                            static_cast<const T*>(args.teacher) + r * args.teacher_stride},
                           part, 0);
    row_grad<direction>(logits, grad, part.size, row, c, static_cast<float>(args.beta),
                        static_cast<float>(args.temperature) * grad_kl);
}

}  // namespace
}  // namespace FASTFT_TARGET

void log_softmax_kl_cuda(const LogSoftmaxKlArgs& args, cudaStream_t stream) {
    constexpr const char* name = "log_softmax_kl_kernel";
    if (args.rows == 0) return;
    const float c = static_cast<float>(kLog2E / args.temperature);
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        const RowLaunch launch = plan_cached_row(args.vocab, 2 * sizeof(T), current_row_limits());
        dispatch_direction(args.direction, [&](auto direction) {
            launch_rows<log_softmax_kl_kernel<T, decltype(direction)::value>>(name, args, launch, true,
                                                                              stream, c);
        });
    });
}

void log_softmax_kl_backward_cuda(const LogSoftmaxKlBackwardArgs& args, cudaStream_t stream) {
    constexpr const char* name = "log_softmax_kl_backward_kernel";
    if (args.rows == 0) return;
    const float c = static_cast<float>(kLog2E / args.temperature);
    const RowLaunch launch = plan_streamed_row(args.vocab);
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_direction(args.direction, [&](auto direction) {
            launch_rows<log_softmax_kl_backward_kernel<T, decltype(direction)::value>>(name, args, launch,
                                                                                       false, stream, c);
        });
    });
}

KernelEntry log_softmax_kl_entry(const RowLimits& limits) {
    return {"log_softmax_kl",
            reinterpret_cast<const void*>(&log_softmax_kl_kernel<__nv_bfloat16, Direction::Forward>),
            plan_cached_row(kReportedVocab, 2 * sizeof(__nv_bfloat16), limits)};
}
KernelEntry log_softmax_kl_backward_entry() {
    return {"log_softmax_kl_backward",
            reinterpret_cast<const void*>(&log_softmax_kl_backward_kernel<__nv_bfloat16, Direction::Forward>),
            plan_streamed_row(kReportedVocab)};
}

}  // namespace fastft
