// Run-time choice between the copies of each CPU kernel. This file and everything it includes is compiled
// for the baseline instruction set.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "fastft/attention.h"
#include "fastft/bias_adamw.h"
#include "fastft/cpu_capability.h"
#include "fastft/cross_entropy.h"
#include "fastft/dequantise.h"
#include "fastft/log_softmax_kl.h"
#include "fastft/lora_linear.h"
#include "fastft/quantise.h"
#include "fastft/relu.h"
#include "fastft/rms_norm.h"
#include "fastft/rotary.h"
#include "fastft/swiglu.h"
#include "fastft/topk_kl.h"

namespace fastft {

#define FASTFT_DECLARE_TARGET(target)                                                     \
    namespace target {                                                                    \
    void attention_pack(const AttentionArgs&, int64_t, int64_t);                          \
    void attention(const AttentionArgs&, int64_t, int64_t);                               \
    void attention_backward_gather(const AttentionBackwardArgs&, int64_t, int64_t);       \
    void attention_backward_pack_keys(const AttentionBackwardArgs&, int64_t, int64_t);    \
    void attention_backward_pack_queries(const AttentionBackwardArgs&, int64_t, int64_t); \
    void attention_backward_queries(const AttentionBackwardArgs&, int64_t, int64_t);      \
    void attention_backward_keys(const AttentionBackwardArgs&, int64_t, int64_t);         \
    void log_softmax_kl_rows(const LogSoftmaxKlArgs&, int64_t, int64_t);                  \
    void log_softmax_kl_backward_rows(const LogSoftmaxKlBackwardArgs&, int64_t, int64_t); \
    void topk_kl_rows(const TopkKlArgs&, int64_t, int64_t);                               \
    void cross_entropy_rows(const CrossEntropyArgs&, int64_t, int64_t);                   \
    void lora_down_pack(const LoraDownArgs&, int64_t, int64_t);                           \
    void lora_down(const LoraDownArgs&, int64_t, int64_t);                                \
    void lora_up_pack(const LoraUpArgs&, int64_t, int64_t);                               \
    void lora_up(const LoraUpArgs&, int64_t, int64_t);                                    \
    void lora_outer_pack(const LoraOuterArgs&, int64_t, int64_t);                         \
    void lora_outer(const LoraOuterArgs&, int64_t, int64_t);                              \
    void bias_adamw_norm_chunks(const AdamWArgs&, int64_t, int64_t);                      \
    void bias_adamw_update_chunks(const AdamWArgs&, int64_t, int64_t);                    \
    void dequantise_4bit_range(const Dequantise4bitArgs&, int64_t, int64_t);              \
    void dequantise_8bit_rows(const Dequantise8bitArgs&, int64_t, int64_t);               \
    void quantise_4bit_blocks(const Quantise4bitArgs&, int64_t, int64_t);                 \
    void relu_range(const ReluArgs&, int64_t, int64_t);                                   \
    void relu_backward_range(const ReluBackwardArgs&, int64_t, int64_t);                  \
    void rms_norm_rows(const RmsNormArgs&, int64_t, int64_t);                             \
    void rms_norm_backward_chunks(const RmsNormBackwardArgs&, int64_t, int64_t);          \
    void rms_norm_dweight_columns(const RmsNormBackwardArgs&, int64_t, int64_t);          \
    void rotary_tokens(const RotaryArgs&, int64_t, int64_t);                              \
    void swiglu_range(const SwigluArgs&, int64_t, int64_t);                               \
    void swiglu_backward_range(const SwigluBackwardArgs&, int64_t, int64_t);              \
    void exp2_array(const float*, float*, int64_t);                                       \
    void log_array(const float*, float*, int64_t);                                        \
    }

FASTFT_DECLARE_TARGET(scalar)
#ifdef FASTFT_CPU_X86
FASTFT_DECLARE_TARGET(avx2)
FASTFT_DECLARE_TARGET(avx512)
FASTFT_DECLARE_TARGET(avx512_bf16)
#endif

namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

CpuCapability from_name(const std::string& name) {
    for (int i = 0; i < 4; ++i) {
        if (name == kNames[i]) {
            const auto capability = static_cast<CpuCapability>(i);
            if (capability > best_cpu_capability()) {
                throw std::runtime_error("FASTFT_CPU_CAPABILITY=" + name +
                                         ", but this build on this CPU has " +
                                         name_of(best_cpu_capability()) + " at best");
            }
            return capability;
        }
    }
    throw std::runtime_error("FASTFT_CPU_CAPABILITY=" + name +
                             ", expected scalar, avx2, avx512 or avx512_bf16");
}

CpuCapability from_environment() {
    const char* name = std::getenv("FASTFT_CPU_CAPABILITY");
    return name && *name ? from_name(name) : best_cpu_capability();
}

// -1 until first asked for, so that a bad environment variable is an error of the first call, not of import.
std::atomic<int32_t> current{-1};

}  // namespace

const char* name_of(CpuCapability capability) { return kNames[static_cast<int32_t>(capability)]; }

CpuCapability best_cpu_capability() {
#ifdef FASTFT_CPU_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuCapability::Avx512Bf16;
    if (avx512) return CpuCapability::Avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        return CpuCapability::Avx2;
    }
#endif
    return CpuCapability::Scalar;
}

CpuCapability cpu_capability() {
    int32_t value = current.load(std::memory_order_relaxed);
    if (value < 0) {
        value = static_cast<int32_t>(from_environment());
        current.store(value, std::memory_order_relaxed);
    }
    return static_cast<CpuCapability>(value);
}

void set_cpu_capability(const char* name) {
    current.store(static_cast<int32_t>(from_name(name)), std::memory_order_relaxed);
}

#ifdef FASTFT_CPU_X86
#define FASTFT_CALL(function, ...)                     \
    switch (cpu_capability()) {                        \
        case CpuCapability::Avx512Bf16:                \
            return avx512_bf16::function(__VA_ARGS__); \
        case CpuCapability::Avx512:                    \
            return avx512::function(__VA_ARGS__);      \
        case CpuCapability::Avx2:                      \
            return avx2::function(__VA_ARGS__);        \
        case CpuCapability::Scalar:                    \
            return scalar::function(__VA_ARGS__);      \
    }
#else
#define FASTFT_CALL(function, ...) return scalar::function(__VA_ARGS__)
#endif

void attention_pack_cpu(const AttentionArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(attention_pack, args, begin, end);
}
void attention_cpu(const AttentionArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(attention, args, begin, end);
}
void attention_backward_gather_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(attention_backward_gather, args, begin, end);
}
void attention_backward_pack_keys_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(attention_backward_pack_keys, args, begin, end);
}
void attention_backward_pack_queries_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(attention_backward_pack_queries, args, begin, end);
}
void attention_backward_queries_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(attention_backward_queries, args, begin, end);
}
void attention_backward_keys_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(attention_backward_keys, args, begin, end);
}
void log_softmax_kl_cpu(const LogSoftmaxKlArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(log_softmax_kl_rows, args, begin, end);
}
void log_softmax_kl_backward_cpu(const LogSoftmaxKlBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(log_softmax_kl_backward_rows, args, begin, end);
}
void topk_kl_cpu(const TopkKlArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(topk_kl_rows, args, begin, end);
}
void cross_entropy_cpu(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(cross_entropy_rows, args, begin, end);
}
void lora_down_pack_cpu(const LoraDownArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(lora_down_pack, args, begin, end);
}
void lora_down_cpu(const LoraDownArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(lora_down, args, begin, end);
}
void lora_up_pack_cpu(const LoraUpArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(lora_up_pack, args, begin, end);
}
void lora_up_cpu(const LoraUpArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(lora_up, args, begin, end);
}
void lora_outer_pack_cpu(const LoraOuterArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(lora_outer_pack, args, begin, end);
}
void lora_outer_cpu(const LoraOuterArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(lora_outer, args, begin, end);
}
void bias_adamw_norm_cpu(const AdamWArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(bias_adamw_norm_chunks, args, begin, end);
}
void bias_adamw_update_cpu(const AdamWArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(bias_adamw_update_chunks, args, begin, end);
}
void dequantise_4bit_cpu(const Dequantise4bitArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(dequantise_4bit_range, args, begin, end);
}
void dequantise_8bit_cpu(const Dequantise8bitArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(dequantise_8bit_rows, args, begin, end);
}
void quantise_4bit_cpu(const Quantise4bitArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(quantise_4bit_blocks, args, begin, end);
}
void relu_cpu(const ReluArgs& args, int64_t begin, int64_t end) { FASTFT_CALL(relu_range, args, begin, end); }
void relu_backward_cpu(const ReluBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(relu_backward_range, args, begin, end);
}
void rms_norm_cpu(const RmsNormArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(rms_norm_rows, args, begin, end);
}
void rms_norm_backward_cpu(const RmsNormBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(rms_norm_backward_chunks, args, begin, end);
}
void rms_norm_dweight_cpu(const RmsNormBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(rms_norm_dweight_columns, args, begin, end);
}
void rotary_cpu(const RotaryArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(rotary_tokens, args, begin, end);
}
void swiglu_cpu(const SwigluArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(swiglu_range, args, begin, end);
}
void swiglu_backward_cpu(const SwigluBackwardArgs& args, int64_t begin, int64_t end) {
    FASTFT_CALL(swiglu_backward_range, args, begin, end);
}
void exp2_array_cpu(const float* x, float* y, int64_t n) { FASTFT_CALL(exp2_array, x, y, n); }
void log_array_cpu(const float* x, float* y, int64_t n) { FASTFT_CALL(log_array, x, y, n); }

}  // namespace fastft
