// dequantise: unpacks tensors and calls the kernels.
#include "fastft/dequantise.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

void check_flat(const Tensor& x, ScalarType dtype, const Tensor& out, const char* message) {
    check(x.scalar_type() == dtype && x.is_contiguous() && x.is_cuda() == out.is_cuda(), message);
}

}  // namespace

void dequantise_4bit(const Tensor& packed, const Tensor& code, const Tensor& absmax,
                     std::optional<Tensor> absmax_code, std::optional<Tensor> absmax_scale,
                     double absmax_offset, int64_t block, int64_t absmax_block, int64_t first, Tensor out) {
    Dequantise4bitArgs args{};
    args.dtype = dtype_of(out);
    args.first = first;
    args.count = out.numel();
    args.block = block;
    args.absmax_block = absmax_block;
    args.absmax_offset = static_cast<float>(absmax_offset);
    check(out.is_contiguous(), "dequantise_4bit: out must be contiguous");
    check(first >= 0 && first % 2 == 0, "dequantise_4bit: first must be even");
    check(block >= 8 && block % 8 == 0, "dequantise_4bit: block must be a multiple of 8");
    check_flat(packed, ScalarType::Byte, out,
               "dequantise_4bit: packed must be uint8, contiguous, on out's device");
    check(packed.numel() >= (first + args.count + 1) / 2,
          "dequantise_4bit: packed ends before the tile does");
    check_flat(code, ScalarType::Float, out,
               "dequantise_4bit: code must be float32, contiguous, on out's device");
    check(code.numel() == 16, "dequantise_4bit: code must have 16 elements");
    const int64_t blocks = (first + args.count + block - 1) / block;
    check(absmax.numel() >= blocks, "dequantise_4bit: absmax ends before the tile does");
    args.packed = static_cast<const uint8_t*>(packed.data_ptr());
    args.code = static_cast<const float*>(code.data_ptr());
    args.out = out.data_ptr();
    if (absmax_code) {
        check(absmax_scale.has_value() && absmax_block > 0,
              "dequantise_4bit: absmax_code needs absmax_scale");
        check_flat(absmax, ScalarType::Byte, out,
                   "dequantise_4bit: a quantised absmax must be uint8, contiguous");
        check_flat(*absmax_code, ScalarType::Float, out,
                   "dequantise_4bit: absmax_code must be float32, contiguous");
        check_flat(*absmax_scale, ScalarType::Float, out,
                   "dequantise_4bit: absmax_scale must be float32, contiguous");
        check(absmax_code->numel() == 256, "dequantise_4bit: absmax_code must have 256 elements");
        check(absmax_scale->numel() >= (blocks + absmax_block - 1) / absmax_block,
              "dequantise_4bit: absmax_scale ends before the tile does");
        args.absmax8 = static_cast<const uint8_t*>(absmax.data_ptr());
        args.absmax_code = static_cast<const float*>(absmax_code->data_ptr());
        args.absmax_scale = static_cast<const float*>(absmax_scale->data_ptr());
    } else {
        check_flat(absmax, ScalarType::Float, out, "dequantise_4bit: absmax must be float32, contiguous");
        args.absmax = static_cast<const float*>(absmax.data_ptr());
    }
    if (out.is_cuda()) {
        DeviceGuard guard(out);
        dequantise_4bit_cuda(args, current_stream(out));
        return;
    }
    cpu_capability();
    // A thread takes whole runs of kUnit elements, so none begins in the middle of a byte.
    constexpr int64_t kUnit = 4096;
    parallel_rows((args.count + kUnit - 1) / kUnit, kUnit, [&](int64_t b, int64_t e) {
        dequantise_4bit_cpu(args, b * kUnit, e * kUnit < args.count ? e * kUnit : args.count);
    });
}

void dequantise_8bit(const Tensor& values, const Tensor& scale, Tensor out) {
    Dequantise8bitArgs args{};
    args.dtype = dtype_of(out);
    check(out.dim() == 2 && out.is_contiguous(), "dequantise_8bit: out must be [rows, K], contiguous");
    args.rows = out.size(0);
    args.K = out.size(1);
    check_flat(values, ScalarType::Char, out,
               "dequantise_8bit: values must be int8, contiguous, on out's device");
    check(values.numel() == out.numel(), "dequantise_8bit: values must have the shape of out");
    check_flat(scale, ScalarType::Float, out,
               "dequantise_8bit: scale must be float32, contiguous, on out's device");
    check(scale.numel() == args.rows, "dequantise_8bit: scale must be [rows]");
    args.values = static_cast<const int8_t*>(values.data_ptr());
    args.scale = static_cast<const float*>(scale.data_ptr());
    args.out = out.data_ptr();
    if (out.is_cuda()) {
        DeviceGuard guard(out);
        dequantise_8bit_cuda(args, current_stream(out));
        return;
    }
    cpu_capability();
    parallel_rows(args.rows, args.K, [&](int64_t b, int64_t e) { dequantise_8bit_cpu(args, b, e); });
}

}  // namespace fastft
