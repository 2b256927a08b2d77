// The launchers of csrc/cuda for ctypes: 0, or 1 and a message. `sizeof_*`: for the test that the structures
// in launchers.py are those of the headers.
#include <exception>
#include <string>

#include "fastft/bias_adamw.h"
#include "fastft/cross_entropy.h"
#include "fastft/dequantise.h"
#include "fastft/index_check.h"
#include "fastft/log_softmax_kl.h"
#include "fastft/lora_linear.h"
#include "fastft/relu.h"
#include "fastft/rms_norm.h"
#include "fastft/rotary.h"
#include "fastft/row_reduce.h"
#include "fastft/swiglu.h"
#include "fastft/topk_kl.h"

static std::string message;
extern "C" __attribute__((visibility("default"))) const char* emulator_message() { return message.c_str(); }

#define FASTFT_LAUNCHER(name, Args)                                                                 \
    extern "C" __attribute__((visibility("default"))) size_t sizeof_##name() {                      \
        return sizeof(fastft::Args);                                                                \
    }                                                                                               \
    extern "C" __attribute__((visibility("default"))) int launch_##name(const fastft::Args* args) { \
        try {                                                                                       \
            fastft::name##_cuda(*args, nullptr);                                                    \
            return 0;                                                                               \
        } catch (const std::exception& error) {                                                     \
            message = error.what();                                                                 \
            return 1;                                                                               \
        }                                                                                           \
    }

FASTFT_LAUNCHER(bias_adamw, AdamWArgs)
FASTFT_LAUNCHER(cross_entropy, CrossEntropyArgs)
FASTFT_LAUNCHER(dequantise_4bit, Dequantise4bitArgs)
FASTFT_LAUNCHER(dequantise_8bit, Dequantise8bitArgs)
FASTFT_LAUNCHER(index_check, IndexCheckArgs)
FASTFT_LAUNCHER(log_softmax_kl, LogSoftmaxKlArgs)
FASTFT_LAUNCHER(log_softmax_kl_backward, LogSoftmaxKlBackwardArgs)
FASTFT_LAUNCHER(lora_down, LoraDownArgs)
FASTFT_LAUNCHER(lora_down_outer, LoraDownOuterArgs)
FASTFT_LAUNCHER(lora_outer, LoraOuterArgs)
FASTFT_LAUNCHER(lora_up, LoraUpArgs)
FASTFT_LAUNCHER(relu, ReluArgs)
FASTFT_LAUNCHER(relu_backward, ReluBackwardArgs)
FASTFT_LAUNCHER(rms_norm, RmsNormArgs)
FASTFT_LAUNCHER(rms_norm_backward, RmsNormBackwardArgs)
FASTFT_LAUNCHER(rotary, RotaryArgs)
FASTFT_LAUNCHER(swiglu, SwigluArgs)
FASTFT_LAUNCHER(swiglu_backward, SwigluBackwardArgs)
FASTFT_LAUNCHER(row_reduce, RowReduceArgs)
FASTFT_LAUNCHER(topk_kl, TopkKlArgs)
