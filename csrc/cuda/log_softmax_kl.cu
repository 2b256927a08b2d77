// log_softmax_kl on CUDA. One block a row; bound by memory: forward reads each logit once (jsd twice), the
// gradient reads it once more, largely from L2, and writes it once.
#include "fastft/log_softmax_kl.h"

#include "common.cuh"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// A row's results; see csrc/cpu/log_softmax_kl.cpp for the same in double.
struct Row {
    RowStats<float> student, teacher;
    float divergence, grad_divergence;
};

struct JsdSums {
    float t, s;
};

template <class T>
__device__ Row row_forward(const T* student, const T* teacher, int64_t vocab, float c, Direction direction,
                           float beta) {
    const bool reverse = direction == Direction::Reverse;
    const T* p = reverse ? student : teacher;
    const T* q = reverse ? teacher : student;
    const bool aligned = is_aligned(p) && is_aligned(q);
    KlState<float> state, identity;
    state.init();
    identity.init();
    for_elements(vocab, [&](int64_t i, int64_t left) {
        float x[kElements], y[kElements];
        load_elements(p + i, left, aligned, x);
        load_elements(q + i, left, aligned, y);
        state.update(x, y, c);
    });
    state =
        block_reduce(state, identity, [c](KlState<float>& a, const KlState<float>& b) { merge(a, b, c); });
    Row row;
    row.student = stats(reverse ? state.p : state.q);
    row.teacher = stats(reverse ? state.q : state.p);
    row.divergence = row.grad_divergence = kl_value(state, c);
    if (direction == Direction::Jsd) {
        JsdSums sums{0, 0};
        for_elements(vocab, [&](int64_t i, int64_t left) {
            float s[kElements], t[kElements];
            load_elements(student + i, left, aligned, s);
            load_elements(teacher + i, left, aligned, t);
#pragma unroll
            for (int k = 0; k < kElements; ++k) {
                const JsdTerms<float> terms =
                    jsd_terms(log2_prob(s[k], row.student.max, row.student.log2_sum, c),
                              log2_prob(t[k], row.teacher.max, row.teacher.log2_sum, c), beta);
                sums.t += terms.t;
                sums.s += terms.s;
            }
        });
        sums = block_reduce(sums, JsdSums{0, 0}, [](JsdSums& a, const JsdSums& b) {
            a.t += b.t;
            a.s += b.s;
        });
        row.grad_divergence = sums.s;
        row.divergence = beta * sums.t + (1 - beta) * sums.s;
    }
    return row;
}

// f(log2 P_s, log2 P_t) for every element, written to grad; grad may be student.
template <class T, class F>
__device__ __forceinline__ void map_row(const T* student, const T* teacher, T* grad, int64_t vocab, float c,
                                        const Row& row, F&& f) {
    const bool aligned = is_aligned(student) && is_aligned(teacher) && is_aligned(grad);
    for_elements(vocab, [&](int64_t i, int64_t left) {
        float s[kElements], t[kElements];
        load_elements(student + i, left, aligned, s);
        load_elements(teacher + i, left, aligned, t);
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
            s[k] = f(log2_prob(s[k], row.student.max, row.student.log2_sum, c),
                     log2_prob(t[k], row.teacher.max, row.teacher.log2_sum, c));
        }
        store_elements(grad + i, left, aligned, s);
    });
}

template <class T>
__device__ void row_grad(const T* student, const T* teacher, T* grad, int64_t vocab, float c, const Row& row,
                         Direction direction, float beta, float scale) {
    if (direction == Direction::Forward) {
        map_row(student, teacher, grad, vocab, c, row,
                [&](float log2_ps, float log2_pt) { return forward_kl_grad(log2_ps, log2_pt, scale); });
    } else if (direction == Direction::Reverse) {
        map_row(student, teacher, grad, vocab, c, row, [&](float log2_ps, float log2_pt) {
            return reverse_kl_grad(log2_ps, log2_pt, row.grad_divergence, scale);
        });
    } else {
        const float jsd_scale = scale * (1 - beta);
        map_row(student, teacher, grad, vocab, c, row, [&](float log2_ps, float log2_pt) {
            return jsd_grad(log2_ps, log2_pt, row.grad_divergence, beta, jsd_scale);
        });
    }
}

template <class T>
__global__ void FASTFT_ROW_KERNEL log_softmax_kl_kernel(LogSoftmaxKlArgs args, float c) {
    const int64_t r = blockIdx.x;
    const T* student = static_cast<const T*>(args.student) + r * args.student_stride;
    const T* teacher = static_cast<const T*>(args.teacher) + r * args.teacher_stride;
    T* grad = args.grad ? static_cast<T*>(args.grad) + r * args.grad_stride : nullptr;
    float* kl = static_cast<float*>(args.kl) + r;
    float* out = args.stats ? static_cast<float*>(args.stats) + r * kLogSoftmaxKlStats : nullptr;
    if (args.weights && static_cast<const float*>(args.weights)[r] == 0) {
        if (threadIdx.x == 0) *kl = 0;
        if (out && threadIdx.x < kLogSoftmaxKlStats) out[threadIdx.x] = 0;
        if (grad) fill_row(grad, args.vocab, 0);
        return;
    }
    const float temperature = static_cast<float>(args.temperature), beta = static_cast<float>(args.beta);
    const Row row = row_forward(student, teacher, args.vocab, c, args.direction, beta);
    if (threadIdx.x == 0) {
        *kl = temperature * temperature * row.divergence;
        if (out) {
            out[0] = row.student.max;
            out[1] = row.student.log2_sum;
            out[2] = row.teacher.max;
            out[3] = row.teacher.log2_sum;
            out[4] = row.grad_divergence;
        }
    }
    if (grad) row_grad(student, teacher, grad, args.vocab, c, row, args.direction, beta, temperature);
}

template <class T>
__global__ void FASTFT_ROW_KERNEL log_softmax_kl_backward_kernel(LogSoftmaxKlBackwardArgs args, float c) {
    const int64_t r = blockIdx.x;
    T* grad = static_cast<T*>(args.grad) + r * args.vocab;
    const float grad_kl = static_cast<const float*>(args.grad_kl)[r];
    if (grad_kl == 0) {
        fill_row(grad, args.vocab, 0);
        return;
    }
    const float* in = static_cast<const float*>(args.stats) + r * kLogSoftmaxKlStats;
    const Row row{{in[0], in[1]}, {in[2], in[3]}, 0, in[4]};
    row_grad(static_cast<const T*>(args.student) + r * args.student_stride,
             static_cast<const T*>(args.teacher) + r * args.teacher_stride, grad, args.vocab, c, row,
             args.direction, static_cast<float>(args.beta), static_cast<float>(args.temperature) * grad_kl);
}

}  // namespace
}  // namespace FASTFT_TARGET

void log_softmax_kl_cuda(const LogSoftmaxKlArgs& args, cudaStream_t stream) {
    constexpr const char* name = "log_softmax_kl_kernel";
    if (args.rows == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        log_softmax_kl_kernel<decltype(element)>
            <<<grid_of(name, args.rows), threads_for(args.vocab), 0, stream>>>(
                args, static_cast<float>(kLog2E / args.temperature));
    });
    check_launch(name, args.rows, args.vocab);
}

void log_softmax_kl_backward_cuda(const LogSoftmaxKlBackwardArgs& args, cudaStream_t stream) {
    constexpr const char* name = "log_softmax_kl_backward_kernel";
    if (args.rows == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        log_softmax_kl_backward_kernel<decltype(element)>
            <<<grid_of(name, args.rows), threads_for(args.vocab), 0, stream>>>(
                args, static_cast<float>(kLog2E / args.temperature));
    });
    check_launch(name, args.rows, args.vocab);
}

KernelEntry log_softmax_kl_entry() {
    return {"log_softmax_kl", reinterpret_cast<const void*>(&log_softmax_kl_kernel<__nv_bfloat16>),
            threads_for(50272)};
}
KernelEntry log_softmax_kl_backward_entry() {
    return {"log_softmax_kl_backward",
            reinterpret_cast<const void*>(&log_softmax_kl_backward_kernel<__nv_bfloat16>),
            threads_for(50272)};
}

}  // namespace fastft
