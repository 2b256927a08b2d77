// lora_linear on the CPU: register-blocked products with a small matrix that is packed once per call.
//
// All three are bound by arithmetic once the large operand streams, so each keeps 12 to 20 accumulators and
// feeds them by broadcasts of one side against vectors of the other. With bf16 products (avx512_bf16) two
// neighbours of the summed dimension lie in one 32-bit word of the packed matrix.
#include "fastft/lora_linear.h"

#include "dot.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// The words that hold pairs [begin, end) of n elements along the summed dimension.
template <class T>
inline int64_t first_word(int64_t begin) {
    return 2 * begin / depth<T>();
}
template <class T>
inline int64_t last_word(int64_t end, int64_t n) {
    return smaller(2 * end / depth<T>(), (n + depth<T>() - 1) / depth<T>());
}

// Stores the first `n` lanes.
template <class T>
inline void store_lanes(T* p, Value<T> x, int64_t n) {
    if (n >= lanes<T>()) {
        store_value(p, x);
    } else {
        T buffer[lanes<T>()];
        store_value(buffer, x);
        memcpy(p, buffer, sizeof(T) * static_cast<size_t>(n));
    }
}

// ---------------------------------------------------------------------------------------------------------
// lora_down: u[m, j] = scaling * sum_k x[m, k] a[j, k]; lanes are j, packed_a is [K / depth, r]

template <class T>
void down_pack(const LoraDownArgs& args, int64_t begin, int64_t end) {
    const int64_t padded = round_up(args.r, lanes<T>());
    pack<T>(args.a, args.r, args.K, 0, padded, first_word<T>(begin), last_word<T>(end, args.K),
            static_cast<Word<T>*>(args.packed_a), padded);
}

template <class T, int kRowsHere, int kVectors>
void down_tile(const LoraDownArgs& args, int64_t m, int64_t j) {
    using V = Value<T>;
    const int64_t L = lanes<T>(), padded = round_up(args.r, L);
    V sums[kRowsHere][kVectors];
    for (int i = 0; i < kRowsHere; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] = ValueTraits<V>::splat(0);
    }
    multiply<T, kRowsHere, kVectors, kVectors == 1 ? 2 : 1, true>(
        static_cast<const T*>(args.x) + m * args.x_stride, args.x_stride, args.K,
        static_cast<const Word<T>*>(args.packed_a) + j, padded, sums);
    const V scaling = ValueTraits<V>::splat(ScalarOf<V>(args.scaling));
    T* u = static_cast<T*>(args.u) + m * args.u_stride + j;
    for (int i = 0; i < kRowsHere; ++i) {
        for (int v = 0; v < kVectors; ++v) {
            if (j + v * L < args.r) {
                store_lanes(u + i * args.u_stride + v * L, sums[i][v] * scaling, args.r - j - v * L);
            }
        }
    }
}

template <class T>
void down(const LoraDownArgs& args, int64_t begin, int64_t end) {
    constexpr int kMost = most_vectors<T>();
    const int64_t L = lanes<T>(), padded = round_up(args.r, L);
    for_rows(begin, end, [&](int64_t m, auto rows) {
        int64_t j = 0;
        for (; j + kMost * L <= padded; j += kMost * L) down_tile<T, rows, kMost>(args, m, j);
        for (; j + 2 * L <= padded; j += 2 * L) down_tile<T, rows, 2>(args, m, j);
        if (j < padded) down_tile<T, rows, 1>(args, m, j);
    });
}

// ---------------------------------------------------------------------------------------------------------
// lora_up: y[m, n] += sum_j u[m, j] b[n, j]; lanes are n, packed_b is [r / depth, N]

template <class T>
void up_pack(const LoraUpArgs& args, int64_t begin, int64_t end) {
    const int64_t words = (args.r + depth<T>() - 1) / depth<T>();
    for (int64_t unit = begin; unit < end; ++unit) {
        pack<T>(args.b, args.N, args.r, unit * kLoraColumns, (unit + 1) * kLoraColumns, 0, words,
                static_cast<Word<T>*>(args.packed_b), round_up(args.N, kLoraColumns));
    }
}

template <class T, int kRowsHere>
inline void up_tile(const LoraUpArgs& args, int64_t m, int64_t n, T* y, int64_t y_stride) {
    constexpr int kVectors = most_vectors<T>();
    constexpr int64_t L = lanes<T>();
    Value<T> sums[kRowsHere][kVectors];
    for (int i = 0; i < kRowsHere; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] = load_value<Value<T>>(y + i * y_stride + v * L);
    }
    multiply<T, kRowsHere, kVectors, 1, false>(
        static_cast<const T*>(args.u) + m * args.u_stride, args.u_stride, args.r,
        static_cast<const Word<T>*>(args.packed_b) + n, round_up(args.N, kLoraColumns), sums);
    for (int i = 0; i < kRowsHere; ++i) {
        for (int v = 0; v < kVectors; ++v) store_value(y + i * y_stride + v * L, sums[i][v]);
    }
}

template <class T>
void up(const LoraUpArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t step = most_vectors<T>() * lanes<T>();
    for_rows(begin, end, [&](int64_t m, auto rows) {
        T* y = static_cast<T*>(args.y) + m * args.y_stride;
        int64_t n = 0;
        for (; n + step <= args.N; n += step) {
            up_tile<T, rows>(args, m, n, y + n, args.y_stride);
        }
        if (n < args.N) {
            T tail[rows * step] = {};
            const size_t bytes = sizeof(T) * static_cast<size_t>(args.N - n);
            for (int i = 0; i < rows; ++i) memcpy(tail + i * step, y + i * args.y_stride + n, bytes);
            up_tile<T, rows>(args, m, n, tail, step);
            for (int i = 0; i < rows; ++i) memcpy(y + i * args.y_stride + n, tail + i * step, bytes);
        }
    });
}

// ---------------------------------------------------------------------------------------------------------
// lora_outer: g[j, n] = sum_m u[m, j] y[m, n]; lanes are n, packed_u is [M / depth, r]

// Rows of y that are brought into words at a time: with kLoraColumns columns they stay in the L1 cache.
constexpr int64_t kOuterRows = 128;

template <class T>
void outer_pack(const LoraOuterArgs& args, int64_t begin, int64_t end) {
    const SmallMatrix u{const_cast<void*>(args.u), 1, args.u_stride};
    pack<T>(u, args.r, args.M, 0, args.r, first_word<T>(begin), last_word<T>(end, args.M),
            static_cast<Word<T>*>(args.packed_u), args.r);
}

// Words of `rows` rows of y from column n on, as [rows / depth, kLoraColumns], 0 beyond the matrix. The order
// of columns within 2 vectors is that of Dot::load_columns.
template <class T>
void load_block(const LoraOuterArgs& args, int64_t m, int64_t rows, int64_t n, Operand<T>* out) {
    using D = Dot<T>;
    constexpr int64_t step = 2 * lanes<T>();
    const T* y = static_cast<const T*>(args.y) + m * args.y_stride + n;
    const int64_t columns = smaller(kLoraColumns, args.N - n);
    const auto load_row = [&](const T* const(&from)[D::kDepth]) {
        for (int64_t c = 0; c < kLoraColumns; c += step, out += 2) {
            const T* at[D::kDepth];
            for (int t = 0; t < D::kDepth; ++t) at[t] = from[t] + c;
            Operand<T> two[2];
            D::load_columns(at, two);
            for (int v = 0; v < 2; ++v) out[v] = two[v];
        }
    };
    int64_t i = 0;
    for (; columns == kLoraColumns && i + D::kDepth <= rows; i += D::kDepth) {
        const T* from[D::kDepth];
        for (int t = 0; t < D::kDepth; ++t) {
            from[t] = y + (i + t) * args.y_stride;
            // The next columns of this row: too short a piece for the hardware to foresee.
            for (int64_t c = 0; c < kLoraColumns; c += kLine / static_cast<int64_t>(sizeof(T))) {
                __builtin_prefetch(from[t] + kLoraColumns + c);
            }
        }
        load_row(from);
    }
    for (; i < rows; i += D::kDepth) {
        T copy[D::kDepth][kLoraColumns] = {};
        const T* from[D::kDepth];
        for (int t = 0; t < D::kDepth; ++t) {
            if (i + t < rows) {
                memcpy(copy[t], y + (i + t) * args.y_stride, sizeof(T) * static_cast<size_t>(columns));
            }
            from[t] = copy[t];
        }
        load_row(from);
    }
}

// sums[j + i][n + ...] += words [0, words) of packed_u's row `w` on times a block's, for kOutputs i's.
template <class T, int kOutputs>
void outer_tile(const LoraOuterArgs& args, const Operand<T>* block, int64_t w, int64_t words, int64_t j,
                int64_t n) {
    using D = Dot<T>;
    using V = Value<T>;
    constexpr int64_t step = 2 * lanes<T>(), row = kLoraColumns / lanes<T>();
    const int64_t sums_stride = round_up(args.N, kLoraColumns);
    ScalarOf<V>* sums = static_cast<ScalarOf<V>*>(args.sums) + j * sums_stride + n;
    const Word<T>* u = static_cast<const Word<T>*>(args.packed_u) + w * args.r + j;
    for (int64_t c = 0; c < kLoraColumns; c += step, block += 2) {
        V acc[kOutputs][2];
        for (int i = 0; i < kOutputs; ++i) {
            for (int v = 0; v < 2; ++v) acc[i][v] = ValueTraits<V>::splat(0);
        }
        for (int64_t k = 0; k < words; ++k) {
            for (int i = 0; i < kOutputs; ++i) {
                const Operand<T> b = D::broadcast_word(u + k * args.r + i);
                for (int v = 0; v < 2; ++v) acc[i][v] = D::multiply_add(b, block[k * row + v], acc[i][v]);
            }
        }
        for (int i = 0; i < kOutputs; ++i) {
            for (int v = 0; v < 2; ++v) {
                ScalarOf<V>* out = sums + i * sums_stride + c + v * lanes<T>();
                store_value(out, acc[i][v] + load_value<Value<T>>(out));
            }
        }
    }
}

template <class T>
void outer(const LoraOuterArgs& args, int64_t begin, int64_t end) {
    using S = ScalarOf<Value<T>>;
    constexpr int kMany = sizeof(Value<T>) == 64 ? 8 : 4;
    const int64_t sums_stride = round_up(args.N, kLoraColumns);
    S* sums = static_cast<S*>(args.sums);
    Operand<T> block[kOuterRows / depth<T>() * kLoraColumns / lanes<T>()];
    for (int64_t n = begin * kLoraColumns; n < end * kLoraColumns; n += kLoraColumns) {
        for (int64_t j = 0; j < args.r; ++j) memset(sums + j * sums_stride + n, 0, sizeof(S) * kLoraColumns);
        for (int64_t m = 0; m < args.M; m += kOuterRows) {
            const int64_t rows = smaller(kOuterRows, args.M - m);
            const int64_t w = m / depth<T>(), words = (rows + depth<T>() - 1) / depth<T>();
            load_block<T>(args, m, rows, n, block);
            int64_t j = 0;
            for (; j + kMany <= args.r; j += kMany) outer_tile<T, kMany>(args, block, w, words, j, n);
            for (; j + 2 <= args.r; j += 2) outer_tile<T, 2>(args, block, w, words, j, n);
            if (j < args.r) outer_tile<T, 1>(args, block, w, words, j, n);
        }
        const int64_t columns = smaller(kLoraColumns, args.N - n);
        T* g = static_cast<T*>(args.g.data) + n * args.g.stride_1;
        for (int64_t j = 0; j < args.r; ++j) {
            T ordered[kLoraColumns];
            for (int64_t c = 0; c < kLoraColumns; c += 2 * lanes<T>()) {
                const S* from = sums + j * sums_stride + n + c;
                const Value<T> both[2] = {load_value<Value<T>>(from),
                                          load_value<Value<T>>(from + lanes<T>())};
                S in_order[2 * lanes<T>()];
                Dot<T>::store_columns(both, in_order);
                for (int v = 0; v < 2; ++v) {
                    store_value(ordered + c + v * lanes<T>(),
                                load_value<Value<T>>(in_order + v * lanes<T>()));
                }
            }
            for (int64_t c = 0; c < columns; ++c) g[j * args.g.stride_0 + c * args.g.stride_1] = ordered[c];
        }
    }
}

}  // namespace

#define FASTFT_LORA(name, Args, kernel)                                                     \
    void name(const Args& args, int64_t begin, int64_t end) {                               \
        dispatch_dtype(args.dtype, [&](auto x) { kernel<decltype(x)>(args, begin, end); }); \
    }
FASTFT_LORA(lora_down_pack, LoraDownArgs, down_pack)
FASTFT_LORA(lora_down, LoraDownArgs, down)
FASTFT_LORA(lora_up_pack, LoraUpArgs, up_pack)
FASTFT_LORA(lora_up, LoraUpArgs, up)
FASTFT_LORA(lora_outer_pack, LoraOuterArgs, outer_pack)
FASTFT_LORA(lora_outer, LoraOuterArgs, outer)
#undef FASTFT_LORA

}  // namespace FASTFT_TARGET
}  // namespace fastft
