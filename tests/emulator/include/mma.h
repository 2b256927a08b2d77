// Matrix products of a warp, 16 x 16 x 16. Each lane holds eight neighbours of a fragment's 256 elements;
// which ones is CUDA's secret, so no kernel can depend on it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "the emulator has one shape");
    static constexpr int num_elements = 8;
    T x[num_elements];
};

inline float as_float(float x) { return x; }
inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float as_float(__half x) { return __half2float(x); }

// f(element of the fragment, its place in memory)
template <class F>
void for_places(bool rows, unsigned stride, F&& f) {
    for (int k = 0; k < 8; ++k) {
        const unsigned i = static_cast<unsigned>(emulated_lane() * 8 + k), row = i / 16, column = i % 16;
        f(k, rows ? row * stride + column : column * stride + row);
    }
}
// Of all lanes, for a matrix at p.
inline void meet(const char* name, const void* p, size_t stride_bytes) {
    if (reinterpret_cast<uintptr_t>(p) % 32 != 0)
        emulator::fail("a fragment's address is not a multiple of 32");
    if (stride_bytes % 16 != 0) emulator::fail("a fragment's rows do not begin at multiples of 16 bytes");
    emulator::warp_barrier(0xffffffffu, name, nullptr, nullptr, false);
}

template <class Fragment, class T>
void load(Fragment& a, const T* p, unsigned stride, bool rows) {
    meet("load_matrix_sync", p, stride * sizeof(T));
    for_places(rows, stride, [&](int k, unsigned place) { a.x[k] = p[place]; });
}
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& a, const T* p, unsigned stride) {
    load(a, p, stride, std::is_same<Layout, row_major>::value);
}
template <class T>
void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& a, const T* p, unsigned stride, layout_t layout) {
    load(a, p, stride, layout == mem_row_major);
}
template <class T>
void store_matrix_sync(T* p, const fragment<accumulator, 16, 16, 16, T>& a, unsigned stride,
                       layout_t layout) {
    meet("store_matrix_sync", p, stride * sizeof(T));
    for_places(layout == mem_row_major, stride, [&](int k, unsigned place) { p[place] = a.x[k]; });
}
template <class Use, class T, class Layout, class Value>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& a, const Value& value) {
    for (int k = 0; k < 8; ++k) a.x[k] = value;
}
template <class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
              const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& c) {
    struct Lane {
        const T *a, *b;
        const float* c;
        float d[8];
    } mine{a.x, b.x, c.x, {}};
    emulator::warp_barrier(
        0xffffffffu, "mma_sync", &mine,
        [](void* const* brought, int) {
            const auto lane = [&](int i) -> Lane& { return *static_cast<Lane*>(brought[i / 8]); };
            float a[256], b[256];
            for (int i = 0; i < 256; ++i) {
                a[i] = as_float(lane(i).a[i % 8]);
                b[i] = as_float(lane(i).b[i % 8]);
            }
            for (int i = 0; i < 256; ++i) {
                float sum = lane(i).c[i % 8];
                for (int k = 0; k < 16; ++k) sum = fmaf(a[i / 16 * 16 + k], b[k * 16 + i % 16], sum);
                lane(i).d[i % 8] = sum;
            }
        },
        false);
    for (int k = 0; k < 8; ++k) d.x[k] = mine.d[k];
}

}  // namespace wmma
}  // namespace nvcuda
