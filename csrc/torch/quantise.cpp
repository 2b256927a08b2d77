// quantise: unpacks tensors and calls the kernel.
#include "fastft/quantise.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {

void quantise_4bit(const Tensor& x, const Tensor& bounds, int64_t block, Tensor packed, Tensor absmax) {
    Quantise4bitArgs args{};
    args.dtype = dtype_of(x);
    args.count = x.numel();
    args.block = block;
    check(x.is_contiguous(), "quantise_4bit: x must be contiguous");
    check(block >= 64 && block % 64 == 0, "quantise_4bit: block must be a multiple of 64");
    check(bounds.scalar_type() == ScalarType::Float && bounds.is_contiguous() && bounds.numel() == 15,
          "quantise_4bit: bounds must be float32 [15], contiguous");
    check(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
              packed.numel() == (args.count + 1) / 2,
          "quantise_4bit: packed must be uint8 with an element for two of x, contiguous");
    const int64_t blocks = (args.count + block - 1) / block;
    check(absmax.scalar_type() == ScalarType::Float && absmax.is_contiguous() && absmax.numel() == blocks,
          "quantise_4bit: absmax must be float32 with an element for each block, contiguous");
    args.x = x.data_ptr();
    args.bounds = static_cast<const float*>(bounds.data_ptr());
    args.packed = static_cast<uint8_t*>(packed.data_ptr());
    args.absmax = static_cast<float*>(absmax.data_ptr());
    cpu_capability();
    parallel_rows(blocks, block, [&](int64_t b, int64_t e) { quantise_4bit_cpu(args, b, e); });
}

}  // namespace fastft
