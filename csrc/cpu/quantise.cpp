// quantise on the CPU; compiled once per capability (see vec.h).
#include "fastft/quantise.h"

#include "vec_codes.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

constexpr int kRun = 64;  // elements whose codes are packed together

// The largest magnitude of x[0, n).
template <class T>
float largest_magnitude(const T* x, int64_t n) {
    float most = 0.0f;
    int64_t i = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
    if constexpr (width<Value<T>>() > 1) {
        VecF m = splat_(0.0f);
        for (; i + kWidth <= n; i += kWidth) m = max_(abs_(load(x + i)), m);
        most = max_lanes_(m);
    }
#endif
    for (; i < n; ++i) {
        const float v = static_cast<float>(to_value(x[i]));
        const float magnitude = v < 0 ? -v : v;
        if (magnitude > most) most = magnitude;
    }
    return most;
}

// codes[i] = how many bounds are below x[i] scaled; n at most kRun.
template <class T, class Scale>
void find_codes(const T* x, int64_t n, const float* bounds, Scale&& scale, uint8_t* codes) {
    int64_t i = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
    if constexpr (width<Value<T>>() > 1) {
        const VecF one = splat_(1.0f), zero = splat_(0.0f);
        for (; i + kWidth <= n; i += kWidth) {
            const VecF v = scale(load(x + i));
            VecF code = zero;
            for (int b = 0; b < 15; ++b) code = code + select_(v > splat_(bounds[b]), one, zero);
            store(codes + i, code);
        }
    }
#endif
    for (; i < n; ++i) {
        const float v = scale(static_cast<float>(to_value(x[i])));
        int code = 0;
        for (int b = 0; b < 15; ++b) code += v > bounds[b];
        codes[i] = static_cast<uint8_t>(code);
    }
}

struct Multiply {
    float by;
    float operator()(float x) const { return x * by; }
#if defined(__AVX512F__) || defined(__AVX2__)
    VecF operator()(VecF x) const { return x * splat_(by); }
#endif
};

struct Divide {
    float by;
    float operator()(float x) const { return x / by; }
#if defined(__AVX512F__) || defined(__AVX2__)
    VecF operator()(VecF x) const { return x / splat_(by); }
#endif
};

template <class T>
void quantise_4bit(const Quantise4bitArgs& args, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * args.block, rest = args.count - first;
        const int64_t n = rest < args.block ? rest : args.block;
        const T* x = static_cast<const T*>(args.x) + first;
        const float absmax = largest_magnitude(x, n), divisor = absmax > 1e-38f ? absmax : 1e-38f;
        const bool whole = n == args.block;
        // bitsandbytes multiplies in whole blocks, divides in the last, partial one, and keeps its bound
        // there.
        args.absmax[block] = whole ? absmax : divisor;
        for (int64_t i = 0; i < n; i += kRun) {
            uint8_t codes[kRun + 1];
            const int64_t m = n - i < kRun ? n - i : kRun;
            if (whole) {
                find_codes(x + i, m, args.bounds, Multiply{1.0f / divisor}, codes);
            } else {
                find_codes(x + i, m, args.bounds, Divide{divisor}, codes);
            }
            codes[m] = 7;  // what an odd count ends in: the code of zero
            uint8_t* packed = args.packed + (first + i) / 2;
            for (int64_t j = 0; j < (m + 1) / 2; ++j) {
                packed[j] = static_cast<uint8_t>(codes[2 * j] << 4 | codes[2 * j + 1]);
            }
        }
    }
}

}  // namespace

void quantise_4bit_blocks(const Quantise4bitArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { quantise_4bit<decltype(element)>(args, begin, end); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
