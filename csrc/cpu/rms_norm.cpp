// rms_norm on the CPU; compiled once per capability. Two passes over a row, the second from the first-level
// cache. Sums of squares and of products are float vectors over up to kRun elements and double beyond, so
// that their error does not grow with the row.
#include "fastft/rms_norm.h"

#include <cmath>

#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// How a vector of a row is read and written: all of it, or the row's last n elements with zeros behind them.
template <class V>
struct Whole {
    template <class T>
    V load(const T* p) const {
        return load_value<V>(p);
    }
    template <class T>
    void store(T* p, V x) const {
        store_value(p, x);
    }
};

template <class V>
struct Tail {
    int64_t n;

    template <class T>
    V load(const T* p) const {
        T buffer[width<V>()] = {};
        memcpy(buffer, p, sizeof(T) * static_cast<size_t>(n));
        return load_value<V>(buffer);
    }
    template <class T>
    void store(T* p, V x) const {
        T buffer[width<V>()];
        store_value(buffer, x);
        memcpy(p, buffer, sizeof(T) * static_cast<size_t>(n));
    }
};

// f(i, k, how) for the vectors of elements [begin, end); neighbours have different k < kBlock, for sums that
// do not wait for each other.
template <class V, class F>
inline void for_vectors(int64_t begin, int64_t end, F&& f) {
    constexpr int64_t step = width<V>();
    int64_t i = begin;
    for (; i + kBlock * step <= end; i += kBlock * step) {
        for (int k = 0; k < kBlock; ++k) f(i + k * step, k, Whole<V>());
    }
    for (; i + step <= end; i += step) f(i, 0, Whole<V>());
    if (i < end) f(i, 0, Tail<V>{end - i});
}

// The sum over [0, n) of what add(sum, i, how) adds at i.
template <class V, class F>
inline double row_sum(int64_t n, F&& add) {
    constexpr int64_t kRun = 16 * kBlock * width<V>();
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kRun) {
        V sums[kBlock];
        for (int k = 0; k < kBlock; ++k) sums[k] = ValueTraits<V>::splat(0);
        for_vectors<V>(begin, begin + kRun < n ? begin + kRun : n,
                       [&](int64_t i, int k, auto how) { sums[k] = add(sums[k], i, how); });
        total += sum_lanes_((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
}
static_assert(kBlock == 4, "row_sum adds four sums");

template <class T, class W>
inline void forward_row(const T* x, const W* weight, double eps, int64_t n, W* y, ScalarOf<Value<T>>* rstd) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    const double squares = row_sum<V>(n, [&](V sum, int64_t i, auto how) {
        const V v = how.load(x + i);
        return fma_(v, v, sum);
    });
    *rstd = static_cast<S>(1 / sqrt(squares / static_cast<double>(n) + eps));
    const V scale = ValueTraits<V>::splat(*rstd);
    for_vectors<V>(0, n, [&](int64_t i, int, auto how) {
        how.store(y + i, how.load(x + i) * scale * how.load(weight + i));
    });
}

// partial: where dweight's sum goes, or null.
template <class T, class W>
inline void backward_row(const W* dy, const T* x, const W* weight, ScalarOf<Value<T>> rstd, int64_t n, T* dx,
                         ScalarOf<Value<T>>* partial) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    const double dot = row_sum<V>(n, [&](V sum, int64_t i, auto how) {
        return fma_(how.load(dy + i) * how.load(weight + i), how.load(x + i), sum);
    });
    const V scale = ValueTraits<V>::splat(rstd);
    const V mean = ValueTraits<V>::splat(static_cast<S>(-dot * rstd / static_cast<double>(n)));
    const auto store_dx = [&](int64_t i, auto how, V g, V normalised) {
        how.store(dx + i, fma_(normalised, mean, g * how.load(weight + i)) * scale);
    };
    if (partial) {
        for_vectors<V>(0, n, [&](int64_t i, int, auto how) {
            const V g = how.load(dy + i), normalised = how.load(x + i) * scale;
            store_dx(i, how, g, normalised);
            how.store(partial + i, fma_(g, normalised, how.load(partial + i)));
        });
    } else {
        for_vectors<V>(0, n, [&](int64_t i, int, auto how) {
            store_dx(i, how, how.load(dy + i), how.load(x + i) * scale);
        });
    }
}

// f(x's element type, weight's).
template <class F>
inline void dispatch_dtypes(DType dtype, DType weight_dtype, F&& f) {
    dispatch_dtype(dtype, [&](auto x) {
        if constexpr (sizeof(x) == 2) {
            if (weight_dtype == DType::Float32) return f(x, float());
        }
        return f(x, x);
    });
}

}  // namespace

void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
    dispatch_dtypes(args.dtype, args.weight_dtype, [&](auto element, auto weight_element) {
        using T = decltype(element);
        using W = decltype(weight_element);
        using S = ScalarOf<Value<T>>;
        for (int64_t r = begin; r < end; ++r) {
            forward_row(static_cast<const T*>(args.x) + r * args.width, static_cast<const W*>(args.weight),
                        args.eps, args.width, static_cast<W*>(args.y) + r * args.width,
                        static_cast<S*>(args.rstd) + r);
        }
    });
}

void rms_norm_backward_chunks(const RmsNormBackwardArgs& args, int64_t begin, int64_t end) {
    dispatch_dtypes(args.dtype, args.weight_dtype, [&](auto element, auto weight_element) {
        using T = decltype(element);
        using W = decltype(weight_element);
        using S = ScalarOf<Value<T>>;
        const int64_t size = rms_norm_chunk_rows(args.rows);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            S* partial = nullptr;
            if (args.partials) {
                partial = static_cast<S*>(args.partials) + chunk * args.width;
                memset(partial, 0, sizeof(S) * static_cast<size_t>(args.width));
            }
            const int64_t last = (chunk + 1) * size < args.rows ? (chunk + 1) * size : args.rows;
            for (int64_t r = chunk * size; r < last; ++r) {
                const int64_t at = r * args.width;
                backward_row(static_cast<const W*>(args.dy) + at, static_cast<const T*>(args.x) + at,
                             static_cast<const W*>(args.weight), static_cast<const S*>(args.rstd)[r],
                             args.width, static_cast<T*>(args.dx) + at, partial);
            }
        }
    });
}

void rms_norm_dweight_columns(const RmsNormBackwardArgs& args, int64_t begin, int64_t end) {
    dispatch_dtypes(args.dtype, args.weight_dtype, [&](auto element, auto weight_element) {
        using V = Value<decltype(element)>;
        using W = decltype(weight_element);
        const ScalarOf<V>* partials = static_cast<const ScalarOf<V>*>(args.partials);
        const int64_t chunks = rms_norm_chunks(args.rows);
        for_vectors<V>(begin, end, [&](int64_t i, int, auto how) {
            V sum = ValueTraits<V>::splat(0);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                sum = sum + how.load(partials + chunk * args.width + i);
            }
            how.store(static_cast<W*>(args.dweight) + i, sum);
        });
    });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
