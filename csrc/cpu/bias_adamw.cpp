// bias_adamw on the CPU; compiled once per capability (see vec.h).
//
// Everything is done in blocks of kCodeBlock elements, whose length is known to the compiler. The last block
// of a tensor is copied to a padded one and back; state needs no copy, the flat buffers are padded.
#include "fastft/bias_adamw.h"

#include "vec_codes.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// Parameters and gradients lie in pages of their own, at whose ends the hardware's prefetching stops; the
// flat state does without. Measured on an AMD EPYC over OPT-30B's biases: 7 % of the step; 2048 and 4096 gain
// less.
constexpr int64_t kPrefetchBytes = 512;

// f(chunk, its tensor, its first element in the tensor, its elements) for each of the chunks [begin, end).
template <class F>
void for_chunks(const AdamWArgs& args, int64_t begin, int64_t end, F&& f) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t i = args.device_chunk_tensor[chunk];
        const AdamWTensor& tensor = args.tensors[i];
        const int64_t first = (chunk - tensor.first_chunk) * kAdamWChunk;
        const int64_t left = tensor.numel - first;
        f(chunk, i, first, left < kAdamWChunk ? left : kAdamWChunk);
    }
}

template <class T>
void copy_padded(const T* from, int64_t n, T (&to)[kCodeBlock]) {
    memcpy(to, from, sizeof(T) * static_cast<size_t>(n));
    memset(to + n, 0, sizeof(T) * static_cast<size_t>(kCodeBlock - n));
}

template <class V>
double sum_of_lanes(V x) {
    double total = 0;
    for (int i = 0; i < width<V>(); ++i) total += lane(x, i);
    return total;
}

template <class T>
double sum_of_squares(const T* x, int64_t n) {
    using V = Value<T>;
    constexpr int kStreams = 4;  // sums in flight, to hide the latency of an addition
    V sums[kStreams];
    for (V& sum : sums) sum = ValueTraits<V>::splat(0);
    T tail[kCodeBlock];
    for (int64_t i = 0; i < n; i += kCodeBlock) {
        const T* block = x + i;
        if (n - i < kCodeBlock) {
            copy_padded(block, n - i, tail);
            block = tail;
        }
        for (int k = 0; k < kCodeBlock; k += kStreams * width<V>()) {
            for (int s = 0; s < kStreams; ++s) {
                const V v = load_value<V>(block + k + s * width<V>());
                sums[s] = fma_(v, v, sums[s]);
            }
        }
    }
    double total = 0;
    for (const V& sum : sums) total += sum_of_lanes(sum);
    return total;
}

// What a block reads and writes beside its state.
template <class T, class S>
struct Pointers {
    T* param;
    const T* grad;
    S* master;  // what is computed with, param being its rounded copy; null: param itself
};

template <class V, class T, class S>
inline AdamWElement<V> load_param(const Pointers<T, S>& p, int k) {
    __builtin_prefetch(reinterpret_cast<const char*>(p.grad + k) + kPrefetchBytes, 0);
    __builtin_prefetch(reinterpret_cast<const char*>(p.param + k) + kPrefetchBytes, 1);
    AdamWElement<V> x;
    x.param = p.master ? load_value<V>(p.master + k) : load_value<V>(p.param + k);
    return x;
}

template <class V, class T, class S>
inline void store_param(const Pointers<T, S>& p, int k, V x) {
    if (p.master) store_value(p.master + k, x);
    store_value(p.param + k, x);
}

template <class V, class T, class S>
void update_block(const Pointers<T, S>& p, S* exp_avg, S* exp_avg_sq, const AdamWCoefficients<V>& c) {
    for (int k = 0; k < kCodeBlock; k += width<V>()) {
        AdamWElement<V> x = load_param<V>(p, k);
        x.exp_avg = load_value<V>(exp_avg + k);
        x.exp_avg_sq = load_value<V>(exp_avg_sq + k);
        adamw_update(x, load_value<V>(p.grad + k), c);
        store_value(exp_avg + k, x.exp_avg);
        store_value(exp_avg_sq + k, x.exp_avg_sq);
        store_param(p, k, x.param);
    }
}

// 0, 1, 2, ... in the lanes.
template <class V>
V lane_indices() {
    ScalarOf<V> lanes[width<V>()];
    for (int i = 0; i < width<V>(); ++i) lanes[i] = ScalarOf<V>(i);
    return load_value<V>(lanes);
}

template <class V, class T, class S>
void update_block_8bit(const Pointers<T, S>& p, int8_t* exp_avg, uint8_t* exp_avg_sq, S& exp_avg_scale,
                       S& root_scale, float offset, const AdamWCoefficients<V>& c) {
    using Traits = ValueTraits<V>;
    const V zero = Traits::splat(0);
    S exp_avgs[kCodeBlock], roots[kCodeBlock];
    const V unit1 = Traits::splat(exp_avg_unit(exp_avg_scale)), unit2 = Traits::splat(root_unit(root_scale));
    V most_exp_avg = zero, most_root = zero, not_finite = zero;
    for (int k = 0; k < kCodeBlock; k += width<V>()) {
        AdamWElement<V> x = load_param<V>(p, k);
        x.exp_avg = decode_exp_avg(load_value<V>(exp_avg + k), unit1);
        const V old_root = decode_root(load_value<V>(exp_avg_sq + k), unit2);
        x.exp_avg_sq = old_root * old_root;
        const V root = adamw_update(x, load_value<V>(p.grad + k), c);
        store_param(p, k, x.param);
        store_value(exp_avgs + k, x.exp_avg);
        store_value(roots + k, root);
        most_exp_avg = max_(most_exp_avg, abs_(x.exp_avg));
        most_root = max_(most_root, root);
        // 0, or from the first inf or NaN on NaN; whatever makes exp_avg so makes the root so.
        not_finite = fma_(root, zero, not_finite);
    }
    if (any_(select_(zero >= not_finite, zero, Traits::splat(1)) > zero)) {
        exp_avg_scale = root_scale = S(__builtin_nanf(""));
        memset(exp_avg, 0, kCodeBlock);
        memset(exp_avg_sq, 0, kCodeBlock);
        return;
    }
    exp_avg_scale = largest(most_exp_avg);
    root_scale = largest(most_root);
    const V factor1 = Traits::splat(exp_avg_factor(exp_avg_scale));
    const V factor2 = Traits::splat(root_factor(root_scale));
    const V voffset = Traits::splat(S(offset)), lanes = Traits::splat(S(width<V>()));
    V index = lane_indices<V>();
    for (int k = 0; k < kCodeBlock; k += width<V>()) {
        store_value(exp_avg + k, encode_exp_avg(load_value<V>(exp_avgs + k), factor1));
        store_value(exp_avg_sq + k, encode_root(load_value<V>(roots + k), factor2, dither(index, voffset)));
        index = index + lanes;
    }
}

template <class T>
void update_chunk(const AdamWArgs& args, int64_t i, int64_t first, int64_t n,
                  const AdamWCoefficients<Value<T>>& c, float step) {
    using V = Value<T>;
    using S = ScalarOf<V>;
    const AdamWTensor& tensor = args.tensors[i];
    const Pointers<T, S> whole{
        static_cast<T*>(args.params[i]) + first, static_cast<const T*>(args.grads[i]) + first,
        args.master && sizeof(T) == 2 ? static_cast<S*>(args.master) + tensor.offset + first : nullptr};
    const int64_t state = tensor.offset + first;
    T tail_param[kCodeBlock], tail_grad[kCodeBlock];
    for (int64_t j = 0; j < n; j += kCodeBlock) {
        Pointers<T, S> p{whole.param + j, whole.grad + j, whole.master ? whole.master + j : nullptr};
        const int64_t left = n - j;
        if (left < kCodeBlock) {
            copy_padded(p.param, left, tail_param);
            copy_padded(p.grad, left, tail_grad);
            p.param = tail_param;
            p.grad = tail_grad;
        }
        if (args.scales) {
            const int64_t block = (state + j) / kCodeBlock;
            S* scales = static_cast<S*>(args.scales);
            update_block_8bit(
                p, static_cast<int8_t*>(args.exp_avg) + state + j,
                static_cast<uint8_t*>(args.exp_avg_sq) + state + j, scales[block],
                scales[args.total / kCodeBlock + block],
                dither_offset(static_cast<uint32_t>(step), static_cast<uint32_t>((first + j) / kCodeBlock)),
                c);
        } else {
            update_block(p, static_cast<S*>(args.exp_avg) + state + j,
                         static_cast<S*>(args.exp_avg_sq) + state + j, c);
        }
        if (left < kCodeBlock) memcpy(whole.param + j, tail_param, sizeof(T) * static_cast<size_t>(left));
    }
}

}  // namespace

void bias_adamw_norm_chunks(const AdamWArgs& args, int64_t begin, int64_t end) {
    for_chunks(args, begin, end, [&](int64_t chunk, int64_t i, int64_t first, int64_t n) {
        dispatch_dtype(static_cast<DType>(args.tensors[i].dtype), [&](auto element) {
            using T = decltype(element);
            using S = ScalarOf<Value<T>>;
            static_cast<S*>(args.partials)[chunk] =
                S(sum_of_squares(static_cast<const T*>(args.grads[i]) + first, n));
        });
    });
}

void bias_adamw_update_chunks(const AdamWArgs& args, int64_t begin, int64_t end) {
    // Neighbouring tensors mostly share their group and step count, and two powers are not free.
    AdamWCoefficients<double> c{};
    int64_t group = -1;
    float step = 0;
    for_chunks(args, begin, end, [&](int64_t, int64_t i, int64_t first, int64_t n) {
        const AdamWTensor& tensor = args.tensors[i];
        if (tensor.group != group || args.steps[tensor.step] + 1 != step) {
            group = tensor.group;
            step = args.steps[tensor.step] + 1;
            c = adamw_coefficients(args.groups[group], step);
        }
        dispatch_dtype(static_cast<DType>(tensor.dtype), [&](auto element) {
            using T = decltype(element);
            using S = ScalarOf<Value<T>>;
            c.grad_factor = static_cast<const AdamWStatus<S>*>(args.status)->grad_factor;
            update_chunk<T>(args, i, first, n, splat<Value<T>>(c), step);
        });
    });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
