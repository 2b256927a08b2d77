// rotary on the CPU; compiled once per capability. A token's cosines and sines are loaded once for all of its
// heads: the outer loop goes over vectors of them, the inner ones over the heads of q and of k.
#include "fastft/rotary.h"

#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// y1 = c1 x1 + a x2, y2 = c2 x2 + b x1: (a, b) is (-s1, s2), or (s2, -s1) transposed.
template <class V>
struct Rotation {
    V c1, c2, a, b;
};

template <class V, class C>
inline Rotation<V> load_rotation(const C* cos, const C* sin, int64_t half, bool transposed) {
    const V zero = ValueTraits<V>::splat(0);
    const V s1 = zero - load_value<V>(sin), s2 = load_value<V>(sin + half);
    return {load_value<V>(cos), load_value<V>(cos + half), transposed ? s2 : s1, transposed ? s1 : s2};
}

// width<V>() columns of each half, in every head of one token.
template <class V, class T>
inline void rotate_columns(const T* x, T* y, int64_t half, const Rotation<V>& r, int64_t heads,
                           int64_t x_head, int64_t y_head) {
    for (int64_t h = 0; h < heads; ++h, x += x_head, y += y_head) {
        const V x1 = load_value<V>(x), x2 = load_value<V>(x + half);
        store_value(y, fma_(r.c1, x1, r.a * x2));
        store_value(y + half, fma_(r.c2, x2, r.b * x1));
    }
}

template <class T>
struct Token {
    const T* x;
    T* y;
    int64_t heads, x_head, y_head;

    Token(const RotaryHeads& of, int64_t batch, int64_t token)
        : x(static_cast<const T*>(of.x) + batch * of.x_batch + token * of.x_token),
          y(static_cast<T*>(of.y) + batch * of.y_batch + token * of.y_token),
          heads(of.heads),
          x_head(of.x_head),
          y_head(of.y_head) {}

    template <class V>
    void rotate(int64_t i, int64_t half, const Rotation<V>& r) const {
        rotate_columns(x + i, y + i, half, r, heads, x_head, y_head);
    }
    void pass(int64_t from, int64_t count) const {
        for (int64_t h = 0; h < heads; ++h) {
            memcpy(y + h * y_head + from, x + h * x_head + from, static_cast<size_t>(count) * sizeof(T));
        }
    }
};

template <class T, class C>
void rotate_tokens(const RotaryArgs& args, int64_t begin, int64_t end) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    const int64_t half = args.rotated / 2;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / args.tokens, token = i % args.tokens;
        const C* cos = static_cast<const C*>(args.cos) + batch * args.cos_batch + token * args.cos_token;
        const C* sin = static_cast<const C*>(args.sin) + batch * args.sin_batch + token * args.sin_token;
        const Token<T> q(args.q, batch, token), k(args.k, batch, token);
        int64_t j = 0;
        for (; j + width<V>() <= half; j += width<V>()) {
            const auto r = load_rotation<V>(cos + j, sin + j, half, args.transposed);
            q.rotate(j, half, r);
            k.rotate(j, half, r);
        }
        for (; j < half; ++j) {
            const auto r = load_rotation<S>(cos + j, sin + j, half, args.transposed);
            q.rotate(j, half, r);
            k.rotate(j, half, r);
        }
        if (args.rotated < args.size) {
            q.pass(args.rotated, args.size - args.rotated);
            k.pass(args.rotated, args.size - args.rotated);
        }
    }
}

template <class T>
void rotate_16_bits(const RotaryArgs& args, int64_t begin, int64_t end) {
    if (args.angle_dtype == DType::Float32) return rotate_tokens<T, float>(args, begin, end);
    rotate_tokens<T, T>(args, begin, end);
}

}  // namespace

void rotary_tokens(const RotaryArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
        case DType::Float64:
            return rotate_tokens<double, double>(args, begin, end);
        case DType::Float32:
            return rotate_tokens<float, float>(args, begin, end);
        case DType::BFloat16:
            return rotate_16_bits<BFloat16>(args, begin, end);
        case DType::Float16:
            return rotate_16_bits<Float16>(args, begin, end);
    }
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
