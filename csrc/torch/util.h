// What the glue files share: dtype names, row strides, the current stream, splitting rows over torch's
// threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "fastft/cuda_stream.h"
#include "fastft/huge_pages.h"
#include "fastft/types.h"

// In a CPU-only libtorch the symbol is missing; weak, it is null there instead of an error of the loader.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace fastft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Errors here are the last line of defence (the Python side has checked shapes and dtypes and names the
// arguments of the public function): one sentence, no C++ location.
inline void check(bool ok, const char* message) {
    if (!ok) throw std::runtime_error(message);
}

inline DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Double:
            return DType::Float64;
        case ScalarType::Float:
            return DType::Float32;
        case ScalarType::BFloat16:
            return DType::BFloat16;
        case ScalarType::Half:
            return DType::Float16;
        default:
            throw std::runtime_error("fastft: expected float64, float32, bfloat16 or float16");
    }
}

// The dtype of sums, losses and weights beside elements of dtype `d`.
inline ScalarType accumulate_type(DType d) {
    return d == DType::Float64 ? ScalarType::Double : ScalarType::Float;
}

inline Direction direction_of(const std::string& name) {
    if (name == "forward") return Direction::Forward;
    if (name == "reverse") return Direction::Reverse;
    if (name == "jsd") return Direction::Jsd;
    throw std::runtime_error("fastft: direction is " + name + ", expected forward, reverse or jsd");
}

inline void check_rows(const Tensor& x, const char* message) {
    check(x.dim() == 2 && (x.size(0) == 0 || x.size(1) <= 1 || x.stride(1) == 1), message);
}

inline void check_vector(const Tensor& x, int64_t rows, ScalarType dtype, const char* message) {
    check(x.dim() == 1 && x.size(0) == rows && x.scalar_type() == dtype && x.is_contiguous(), message);
}

inline const void* optional_data(const std::optional<Tensor>& x) { return x ? x->data_ptr() : nullptr; }

// f(begin, end) over [0, rows) on torch's own thread pool. A row is `row_elements` long; a thread gets at
// least 32768 elements. Which thread takes a row does not change the row's result.
template <class F>
void parallel_rows(int64_t rows, int64_t row_elements, const F& f) {
    const int64_t grain = 1 + 32768 / (row_elements > 0 ? row_elements : 1);
    torch::stable::parallel_for(0, rows, grain, f);
}

// The same for a few instructions an element: a thread gets at least 2^18, since to wake another one takes as
// long as these take (20 us).
template <class F>
void parallel_light_rows(int64_t rows, int64_t row_elements, const F& f) {
    torch::stable::parallel_for(0, rows, 1 + (int64_t(1) << 18) / (row_elements > 0 ? row_elements : 1), f);
}

// kernel(args, begin, end) over args.count elements; where ranges meet, at multiples of 4096, does not depend
// on the number of threads.
template <class Args, class Kernel>
void parallel_elements(const Args& args, Kernel kernel) {
    constexpr int64_t kUnit = 4096;
    parallel_rows((args.count + kUnit - 1) / kUnit, kUnit, [&](int64_t b, int64_t e) {
        kernel(args, b * kUnit, e * kUnit < args.count ? e * kUnit : args.count);
    });
}

inline cudaStream_t current_stream(const Tensor& x) {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream != nullptr &&
              aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0,
          "fastft: this torch has no CUDA stream");
    return static_cast<cudaStream_t>(stream);
}

// Makes x's device the current one while it lives; a launch goes to the current device.
class DeviceGuard {
  public:
    explicit DeviceGuard(const Tensor& x);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_;
};

}  // namespace fastft
