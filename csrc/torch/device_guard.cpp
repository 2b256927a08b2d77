// DeviceGuard, and the CUDA entry points of a build without CUDA or without CUTLASS.
#include "fastft/bias_adamw.h"
#include "fastft/build_info.h"
#include "fastft/cross_entropy.h"
#include "fastft/cuda_device.h"
#include "fastft/dequantise.h"
#include "fastft/index_check.h"
#include "fastft/log_softmax_kl.h"
#include "fastft/lora_linear.h"
#include "fastft/relu.h"
#include "fastft/rms_norm.h"
#include "fastft/rotary.h"
#include "fastft/row_reduce.h"
#include "fastft/summed_products.h"
#include "fastft/swiglu.h"
#include "fastft/topk_kl.h"
#include "util.h"

namespace fastft {

DeviceGuard::DeviceGuard(const Tensor& x) : previous_(exchange_cuda_device(x.get_device_index())) {}
DeviceGuard::~DeviceGuard() { exchange_cuda_device(previous_); }

bool torch_has_cuda_stream() { return aoti_torch_get_current_cuda_stream != nullptr; }

#ifdef FASTFT_WITH_CUDA
bool built_with_cuda() { return true; }
#else
bool built_with_cuda() { return false; }
int launch_configurations(LaunchConfiguration*, int) { return 0; }
int device_count() { return 0; }
bool device_limits(int, DeviceLimits*) { return false; }

namespace {
[[noreturn]] void no_cuda() {
    throw std::runtime_error(
        "fastft was built without CUDA; rebuild with FASTFT_CUDA=1 (nvcc must be on PATH)");
}
}  // namespace

int exchange_cuda_device(int) { no_cuda(); }
void log_softmax_kl_cuda(const LogSoftmaxKlArgs&, cudaStream_t) { no_cuda(); }
void log_softmax_kl_backward_cuda(const LogSoftmaxKlBackwardArgs&, cudaStream_t) { no_cuda(); }
void topk_kl_cuda(const TopkKlArgs&, cudaStream_t) { no_cuda(); }
void cross_entropy_cuda(const CrossEntropyArgs&, cudaStream_t) { no_cuda(); }
void index_check_cuda(const IndexCheckArgs&, cudaStream_t) { no_cuda(); }
void dequantise_4bit_cuda(const Dequantise4bitArgs&, cudaStream_t) { no_cuda(); }
void dequantise_8bit_cuda(const Dequantise8bitArgs&, cudaStream_t) { no_cuda(); }
void lora_down_cuda(const LoraDownArgs&, cudaStream_t) { no_cuda(); }
void lora_up_cuda(const LoraUpArgs&, cudaStream_t) { no_cuda(); }
void lora_outer_cuda(const LoraOuterArgs&, cudaStream_t) { no_cuda(); }
void lora_down_outer_cuda(const LoraDownOuterArgs&, cudaStream_t) { no_cuda(); }
void bias_adamw_cuda(const AdamWArgs&, cudaStream_t) { no_cuda(); }
void relu_cuda(const ReluArgs&, cudaStream_t) { no_cuda(); }
void relu_backward_cuda(const ReluBackwardArgs&, cudaStream_t) { no_cuda(); }
void rms_norm_cuda(const RmsNormArgs&, cudaStream_t) { no_cuda(); }
void rms_norm_backward_cuda(const RmsNormBackwardArgs&, cudaStream_t) { no_cuda(); }
void rotary_cuda(const RotaryArgs&, cudaStream_t) { no_cuda(); }
void swiglu_cuda(const SwigluArgs&, cudaStream_t) { no_cuda(); }
void swiglu_backward_cuda(const SwigluBackwardArgs&, cudaStream_t) { no_cuda(); }
void row_reduce_cuda(const RowReduceArgs&, cudaStream_t) { no_cuda(); }
#endif

#ifndef FASTFT_WITH_CUTLASS
const char* cutlass_version() { return ""; }
void summed_products_cuda(const SummedProductsArgs&, cudaStream_t) {
    throw std::runtime_error("fastft was built without CUTLASS; `fastft doctor` says why");
}
#endif

}  // namespace fastft
