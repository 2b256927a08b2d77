// swiglu on the CPU; compiled once per capability.
#include "fastft/swiglu.h"

#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

template <class T>
void backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
    using V = Value<T>;
    constexpr int64_t step = block_elements<T>();
    const auto block = [](const T* d, const T* g, const T* u, T* dg, T* du) {
        V a[kBlock], b[kBlock], c[kBlock];
        load_block(d, a);
        load_block(g, b);
        load_block(u, c);
        for (int k = 0; k < kBlock; ++k) {
            const SwigluGradient<V> gradient(a[k], b[k], c[k]);
            b[k] = gradient.gate;
            c[k] = gradient.up;
        }
        store_block(dg, b);
        store_block(du, c);
    };
    int64_t i = 0;
    for (; i + step <= n; i += step) block(dy + i, gate + i, up + i, dgate + i, dup + i);
    if (i < n) {
        T d[step], g[step], u[step];
        copy_tail(dy + i, n - i, d);
        copy_tail(gate + i, n - i, g);
        copy_tail(up + i, n - i, u);
        block(d, g, u, g, u);
        memcpy(dgate + i, g, sizeof(T) * static_cast<size_t>(n - i));
        memcpy(dup + i, u, sizeof(T) * static_cast<size_t>(n - i));
    }
}

}  // namespace

void swiglu_range(const SwigluArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        map_blocks(static_cast<const T*>(args.gate) + begin, static_cast<const T*>(args.up) + begin,
                   static_cast<T*>(args.y) + begin, end - begin,
                   [](Value<T> g, Value<T> u) { return swiglu_value(g, u); });
    });
}

void swiglu_backward_range(const SwigluBackwardArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) {
        using T = decltype(element);
        backward(static_cast<const T*>(args.dy) + begin, static_cast<const T*>(args.gate) + begin,
                 static_cast<const T*>(args.up) + begin, static_cast<T*>(args.dgate) + begin,
                 static_cast<T*>(args.dup) + begin, end - begin);
    });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
