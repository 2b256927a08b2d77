// relu on the CPU; compiled once per capability. Bound by memory: plain loops over bit patterns, which the
// compiler makes vectors of, are as fast as it is. An element is kept or not by `& -keep`: GCC 12 makes no
// vectors of a choice between 16-bit elements by bytes without AVX-512 (four times slower).
#include "fastft/relu.h"

#include <cstring>

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kRun = 64;  // elements whose bits are packed together

// f(minus_inf) with the pattern of -inf as a signed integer of the element's size. Beside it as integers,
// all that is greater is NaN, 0 or positive; what is not is negative or -0.
template <class F>
void dispatch_pattern(DType dtype, F&& f) {
    switch (dtype) {
        case DType::Float64:
            return f(static_cast<int64_t>(0xfff0000000000000u));
        case DType::Float32:
            return f(static_cast<int32_t>(0xff800000u));
        case DType::BFloat16:
            return f(static_cast<int16_t>(0xff80u));
        case DType::Float16:
            return f(static_cast<int16_t>(0xfc00u));
    }
}

// Eight bytes of 0 or 1 to the bits of one: the product adds byte j, shifted, into bit 56 + j.
inline uint8_t pack(const uint8_t* bytes) {
    uint64_t word;
    memcpy(&word, bytes, 8);
    return static_cast<uint8_t>(word * 0x0102040810204080u >> 56);
}

// The bits of one byte to eight bytes that are 0 or not.
inline void unpack(uint8_t bits, uint8_t* bytes) {
    const uint64_t word = bits * 0x0101010101010101u & 0x8040201008040201u;
    memcpy(bytes, &word, 8);
}

template <class I>
inline void relu_run(const I* x, I minus_inf, int64_t n, I* y, uint8_t* mask) {
    uint8_t keep[kRun] = {};
    for (int64_t j = 0; j < n; ++j) {
        const bool kept = (x[j] > minus_inf) & (x[j] != 0);
        keep[j] = kept;
        y[j] = x[j] & static_cast<I>(-kept);
    }
    for (int64_t j = 0; j < n; j += 8) mask[j / 8] = pack(keep + j);
}

template <class I>
inline void relu_backward_run(const I* dy, const uint8_t* mask, int64_t n, I* dx) {
    uint8_t keep[kRun];
    for (int64_t j = 0; j < n; j += 8) unpack(mask[j / 8], keep + j);
    for (int64_t j = 0; j < n; ++j) dx[j] = dy[j] & static_cast<I>(-(keep[j] != 0));
}

// run(i, n) for [begin, end) in runs: n is the constant kRun but in the last.
template <class F>
inline void for_runs(int64_t begin, int64_t end, F&& run) {
    int64_t i = begin;
    for (; i + kRun <= end; i += kRun) run(i, kRun);
    if (i < end) run(i, end - i);
}

}  // namespace

void relu_range(const ReluArgs& args, int64_t begin, int64_t end) {
    dispatch_pattern(args.dtype, [&](auto minus_inf) {
        using I = decltype(minus_inf);
        const I* x = static_cast<const I*>(args.x);
        I* y = static_cast<I*>(args.y);
        for_runs(begin, end,
                 [&](int64_t i, int64_t n) { relu_run(x + i, minus_inf, n, y + i, args.mask + i / 8); });
    });
}

void relu_backward_range(const ReluBackwardArgs& args, int64_t begin, int64_t end) {
    dispatch_pattern(args.dtype, [&](auto minus_inf) {
        using I = decltype(minus_inf);
        const I* dy = static_cast<const I*>(args.dy);
        I* dx = static_cast<I*>(args.dx);
        for_runs(begin, end,
                 [&](int64_t i, int64_t n) { relu_backward_run(dy + i, args.mask + i / 8, n, dx + i); });
    });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
