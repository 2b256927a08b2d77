// rotary: unpacks tensors, allocates the results in their inputs' memory order and calls the kernels.
#include "fastft/rotary.h"

#include "fastft/cpu_capability.h"
#include "ops.h"
#include "util.h"

namespace fastft {
namespace {

// New memory without gaps: a token's heads side by side where x has them so, else a head's tokens.
Tensor empty_in_order_of(const Tensor& x) {
    if (x.stride(1) < x.stride(2)) {
        const Tensor by_token = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
        return torch::stable::transpose(by_token, 1, 2);
    }
    return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
}

bool has_rows(const Tensor& x) { return x.numel() == 0 || x.size(-1) == 1 || x.stride(-1) == 1; }

RotaryHeads heads_of(const Tensor& x, const Tensor& y) {
    return {x.data_ptr(), y.data_ptr(), x.size(1),   x.stride(0), x.stride(1),
            x.stride(2),  y.stride(0),  y.stride(1), y.stride(2)};
}

void check_angles(const Tensor& angles, const Tensor& q, const char* message) {
    check(angles.dim() == 3 && (angles.size(0) == 1 || angles.size(0) == q.size(0)) &&
              angles.size(1) == q.size(2) && angles.size(2) <= q.size(3) && angles.size(2) % 2 == 0 &&
              has_rows(angles) && angles.is_cuda() == q.is_cuda() &&
              (angles.scalar_type() == q.scalar_type() ||
               (angles.scalar_type() == ScalarType::Float && q.scalar_type() != ScalarType::Double)),
          message);
}

int64_t batch_stride(const Tensor& angles) { return angles.size(0) == 1 ? 0 : angles.stride(0); }

}  // namespace

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  bool transposed) {
    check(q.dim() == 4 && has_rows(q),
          "rotary: q must be [batch, heads, tokens, head_size] with contiguous rows");
    check(k.dim() == 4 && has_rows(k) && k.size(0) == q.size(0) && k.size(2) == q.size(2) &&
              k.size(3) == q.size(3) && k.scalar_type() == q.scalar_type() && k.is_cuda() == q.is_cuda(),
          "rotary: k must be [batch, kv_heads, tokens, head_size] like q");
    check_angles(cos, q, "rotary: cos must be [batch or 1, tokens, even size up to head_size] like q");
    check_angles(sin, q, "rotary: sin must be [batch or 1, tokens, even size up to head_size] like q");
    check(cos.size(2) == sin.size(2) && cos.scalar_type() == sin.scalar_type(),
          "rotary: sin must be like cos");
    Tensor y_q = empty_in_order_of(q), y_k = empty_in_order_of(k);
    RotaryArgs args{};
    args.q = heads_of(q, y_q);
    args.k = heads_of(k, y_k);
    args.cos = cos.data_ptr();
    args.sin = sin.data_ptr();
    args.cos_batch = batch_stride(cos);
    args.cos_token = cos.stride(1);
    args.sin_batch = batch_stride(sin);
    args.sin_token = sin.stride(1);
    args.batch = q.size(0);
    args.tokens = q.size(2);
    args.size = q.size(3);
    args.rotated = cos.size(2);
    args.transposed = transposed;
    args.dtype = dtype_of(q);
    args.angle_dtype = dtype_of(cos);
    if (q.is_cuda()) {
        DeviceGuard guard(q);
        rotary_cuda(args, current_stream(q));
    } else {
        cpu_capability();  // an error of its environment variable must not leave a worker thread
        parallel_light_rows(args.batch * args.tokens, (args.q.heads + args.k.heads) * args.size,
                            [&](int64_t begin, int64_t end) { rotary_cpu(args, begin, end); });
    }
    return {y_q, y_k};
}

}  // namespace fastft
