// dequantise on the CPU; compiled once per capability (see vec.h).
#include "fastft/dequantise.h"

#include "vec.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

// code[c] for as many codes as a vector has lanes, from half as many bytes.
#if defined(__AVX512F__)
struct CodeBook {
    __m512 code;
    explicit CodeBook(const float* p) : code(_mm512_loadu_ps(p)) {}
    VecF look_up(const uint8_t* bytes) const {
        const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)),
                      low = _mm_set1_epi8(15);
        const __m128i high_half = _mm_and_si128(_mm_srli_epi16(both, 4), low),
                      low_half = _mm_and_si128(both, low);
        const __m512i codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high_half, low_half));
        return {_mm512_permutexvar_ps(codes, code)};
    }
};
#elif defined(__AVX2__)
struct CodeBook {
    __m256 first, second;
    explicit CodeBook(const float* p) : first(_mm256_loadu_ps(p)), second(_mm256_loadu_ps(p + 8)) {}
    VecF look_up(const uint8_t* bytes) const {
        int32_t word;
        memcpy(&word, bytes, 4);
        const __m128i both = _mm_cvtsi32_si128(word), low = _mm_set1_epi8(15);
        const __m128i high_half = _mm_and_si128(_mm_srli_epi16(both, 4), low),
                      low_half = _mm_and_si128(both, low);
        const __m256i codes = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(high_half, low_half));
        // The permutation sees the low 3 bits; the fourth, moved to the sign, picks the half of the book.
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(first, codes),
                                 _mm256_permutevar8x32_ps(second, codes), upper)};
    }
};
#endif

template <class T>
void dequantise_4bit(const Dequantise4bitArgs& args, int64_t begin, int64_t end) {
    T* out = static_cast<T*>(args.out);
    for (int64_t i = begin; i < end;) {
        const int64_t e = args.first + i, block = e / args.block;
        const int64_t in_block = args.block * (block + 1) - e, stop = in_block < end - i ? i + in_block : end;
        const float absmax = absmax_of(args, block);
#if defined(__AVX512F__) || defined(__AVX2__)
        if constexpr (width<Value<T>>() > 1) {
            const CodeBook book(args.code);
            const VecF scale = splat_(absmax);
            for (; i + kWidth <= stop; i += kWidth) {
                store(out + i, book.look_up(args.packed + (args.first + i) / 2) * scale);
            }
        }
#endif
        for (; i < stop; ++i) {
            const int64_t element = args.first + i;
            const float w = args.code[code_of(args.packed[element / 2], element)] * absmax;
            from_value(ScalarOf<Value<T>>(w), out + i);
        }
    }
}

template <class T>
void dequantise_8bit(const Dequantise8bitArgs& args, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        const int8_t* values = args.values + n * args.K;
        T* out = static_cast<T*>(args.out) + n * args.K;
        int64_t k = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
        if constexpr (width<Value<T>>() > 1) {
            const VecF scale = splat_(args.scale[n]);
            for (; k + kWidth <= args.K; k += kWidth) store(out + k, load(values + k) * scale);
        }
#endif
        for (; k < args.K; ++k) {
            from_value(ScalarOf<Value<T>>(static_cast<float>(values[k]) * args.scale[n]), out + k);
        }
    }
}

}  // namespace

void dequantise_4bit_range(const Dequantise4bitArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { dequantise_4bit<decltype(element)>(args, begin, end); });
}

void dequantise_8bit_rows(const Dequantise8bitArgs& args, int64_t begin, int64_t end) {
    dispatch_dtype(args.dtype, [&](auto element) { dequantise_8bit<decltype(element)>(args, begin, end); });
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
