// lora_linear on CUDA. Bound by memory: tiles of the large operand pass through shared memory by asynchronous
// copies and are multiplied there, by tensor cores or in float32 by plain FMA. lora_tiles.h says which block
// has which tile. No atomics: splits of a sum are added in their order, so two runs agree bit for bit.
//
// Predicted, not measured: bytes / 4.3 TB/s on an H200, 16-bit, r 16.
//   M 2048  K, N 7168   lora_down, lora_outer read 29 MB, 7 us;    lora_up reads and writes 59 MB, 14 us
//   M 8192  K, N 8192   lora_down, lora_outer read 134 MB, 31 us;  lora_up reads and writes 268 MB, 62 us
//                       lora_down_outer reads 134 MB and moves 34 MB of sums, 39 us in place of 62
// and about 2 us for the second launch of lora_down and lora_outer. In one launch a ticket of the last block
// would need a counter that is zero, which scratch is not: a memset costs a launch as well.
#include "fastft/lora_linear.h"

#include <cuda_pipeline.h>
#include <mma.h>

#include <type_traits>

#include "common.cuh"
#include "fastft/lora_tiles.h"
#include "fastft/ptx.h"

namespace fastft {
inline namespace FASTFT_TARGET {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kThreads = 128;
// Blocks on a multiprocessor that registers must allow: as many as an H200's shared memory does, or as come
// without spilling.
template <int kRanks>
constexpr int kSplitBlocks = kRanks == 16 ? 3 : 2;
template <class T>
constexpr int kUpBlocks = sizeof(T) == 2 ? 4 : 2;
// Tiles that are in shared memory or on their way to it at once.
constexpr int kSplitStages = 3;
constexpr int kUpStages = 2;
constexpr int kUpRows = 64;   // of a block's tile of y
constexpr int kUpSlab = 32;   // of them, added at once
constexpr int kUpDepth = 16;  // of r at once

// Elements in 16 bytes; also the padding of a row in shared memory, which spreads a column over the banks.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kDepth = lora_tile_depth(sizeof(T));

template <class T>
union Piece {
    uint4 words;
    T elements[kVector<T>];
};

// Element (row, column) at data[row * row_stride + column * column_stride].
template <class T>
struct Operand {
    T* data;
    int64_t rows, columns, row_stride, column_stride;
    bool aligned;  // pieces may be accessed as 16 bytes
};

// 16 bytes to shared memory: `bytes` of them from `source`, then zeros. Nothing else of `source` is read.
__device__ __forceinline__ void copy_async(void* target, const void* source, int bytes) {
    ptx_copy_async(target, source, bytes);
}

// A tile of one operand in shared memory: kSide of i or j by kDeep of d, d along the rows or down the
// columns.
template <class T, int kSide, int kDeep, bool kDeepRows>
struct Tile {
    static constexpr int kRows = kDeepRows ? kSide : kDeep;
    static constexpr int kColumns = kDeepRows ? kDeep : kSide;
    static constexpr int kStride = kColumns + kVector<T>;
    static constexpr int kSize = kRows * kStride;

    static __device__ __forceinline__ int index(int side, int d) {
        return kDeepRows ? side * kStride + d : d * kStride + side;
    }

    // Starts to copy the tile whose first element is (side, d), with zeros beyond the operand.
    static __device__ __forceinline__ void load(const Operand<const T>& from, int64_t side, int64_t d,
                                                T* to) {
        constexpr int kPieces = kRows * kColumns / kVector<T>;
        static_assert(kPieces % kThreads == 0, "every thread copies as many");
        const int64_t row = kDeepRows ? side : d, column = kDeepRows ? d : side;
        // f(piece, its first element in the operand, its place in the tile)
        const auto with_piece = [&](int n, auto&& f) {
            const TilePiece piece = tile_piece<kColumns, kVector<T>>(
                n * kThreads + static_cast<int>(threadIdx.x), from.rows - row, from.columns - column);
            f(piece.inside,
              from.data + (row + piece.row) * from.row_stride + (column + piece.column) * from.column_stride,
              to + piece.row * kStride + piece.column);
        };
        if (from.aligned) {
#pragma unroll
            for (int n = 0; n < kPieces / kThreads; ++n) {
                with_piece(n, [&](int inside, const T* source, T* target) {
                    copy_async(target, inside > 0 ? source : from.data, inside * static_cast<int>(sizeof(T)));
                });
            }
        } else {
#pragma unroll 1  // unrolled it costs the registers that keep other blocks running
            for (int n = 0; n < kPieces / kThreads; ++n) {
                with_piece(n, [&](int inside, const T* source, T* target) {
                    Piece<T> x;
#pragma unroll
                    for (int k = 0; k < kVector<T>; ++k) {
                        if (k < inside) {
                            x.elements[k] = source[k * from.column_stride];
                        } else {
                            from_float(0, &x.elements[k]);
                        }
                    }
                    *reinterpret_cast<uint4*>(target) = x.words;
                });
            }
        }
    }
};

// A block's sums over (i, j), kLoraTile by kRanks: 32 of i for each warp, in 16 x 16 fragments.
template <class T, int kRanks>
class Sums {
  public:
    __device__ Sums() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < kRanks / 16; ++j) wmma::fill_fragment(sums_[i][j], 0.0f);
        }
    }

    template <int kDeep, bool kLargeRows, bool kSmallRows>
    __device__ __forceinline__ void add(const T* large, const T* small) {
        using LargeTile = Tile<T, kLoraTile, kDeep, kLargeRows>;
        using SmallTile = Tile<T, kRanks, kDeep, kSmallRows>;
        using LargeOrder = std::conditional_t<kLargeRows, wmma::row_major, wmma::col_major>;
        using SmallOrder = std::conditional_t<kSmallRows, wmma::col_major, wmma::row_major>;
        const int first = static_cast<int>(threadIdx.x) / kWarp * 32;
#pragma unroll 1  // or the tiles of all steps are loaded ahead, and registers spill
        for (int d = 0; d < kDeep; d += 16) {
            wmma::fragment<wmma::matrix_a, 16, 16, 16, T, LargeOrder> a[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                wmma::load_matrix_sync(a[i], large + LargeTile::index(first + i * 16, d), LargeTile::kStride);
            }
#pragma unroll
            for (int j = 0; j < kRanks / 16; ++j) {
                wmma::fragment<wmma::matrix_b, 16, 16, 16, T, SmallOrder> b;
                wmma::load_matrix_sync(b, small + SmallTile::index(j * 16, d), SmallTile::kStride);
#pragma unroll
                for (int i = 0; i < 2; ++i) wmma::mma_sync(sums_[i][j], a[i], b, sums_[i][j]);
            }
        }
    }

    // (i, j) of kCount j to out[i * stride + j - first_j], or with i along the rows to
    // out[(j - first_j) * stride + i].
    template <int kCount>
    __device__ __forceinline__ void store(float* out, int stride, bool ranks_first, int first_j) const {
        const int first_i = static_cast<int>(threadIdx.x) / kWarp * 32;
#pragma unroll
        for (int n = 0; n < 2 * kRanks / 16; ++n) {
            const int i = first_i + n % 2 * 16, j = n / 2 * 16 - first_j;
            if (j < 0 || j >= kCount) continue;
            float* to = out + (ranks_first ? i * stride + j : j * stride + i);
            wmma::store_matrix_sync(to, sums_[n % 2][n / 2], stride,
                                    ranks_first ? wmma::mem_row_major : wmma::mem_col_major);
        }
    }

  private:
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums_[2][kRanks / 16];
};

// The same in float32: one i for each thread.
template <int kRanks>
class Sums<float, kRanks> {
    static_assert(kThreads == kLoraTile, "a thread for each i");

  public:
    template <int kDeep, bool kLargeRows, bool kSmallRows>
    __device__ __forceinline__ void add(const float* large, const float* small) {
        using LargeTile = Tile<float, kLoraTile, kDeep, kLargeRows>;
        using SmallTile = Tile<float, kRanks, kDeep, kSmallRows>;
        constexpr int kUnroll = 4;  // neighbours are read as 16 bytes
        for (int d = 0; d < kDeep; d += kUnroll) {
#pragma unroll
            for (int j = 0; j < kRanks; ++j) {
#pragma unroll
                for (int k = 0; k < kUnroll; ++k) {
                    sums_[j] = fmaf(large[LargeTile::index(static_cast<int>(threadIdx.x), d + k)],
                                    small[SmallTile::index(j, d + k)], sums_[j]);
                }
            }
        }
    }

    template <int kCount>
    __device__ __forceinline__ void store(float* out, int stride, bool ranks_first, int first_j) const {
        const int i = static_cast<int>(threadIdx.x);
#pragma unroll
        for (int n = 0; n < kRanks; ++n) {
            const int j = n - first_j;
            if (j >= 0 && j < kCount) out[ranks_first ? i * stride + j : j * stride + i] = sums_[n];
        }
    }

  private:
    float sums_[kRanks] = {};
};

template <class T, int kRanks, int kDeep, int kStages, bool kLargeRows, bool kSmallRows>
struct Pipeline {
    using LargeTile = Tile<T, kLoraTile, kDeep, kLargeRows>;
    using SmallTile = Tile<T, kRanks, kDeep, kSmallRows>;
    static constexpr int kStage = LargeTile::kSize + SmallTile::kSize;
    static constexpr int kBytes = kStages * kStage * static_cast<int>(sizeof(T));
    static_assert(LargeTile::kSize * sizeof(T) % 32 == 0 && kStage * sizeof(T) % 32 == 0,
                  "fragments are loaded from multiples of 32 bytes");

    // sums += large(i, d) small(j, d) over d in [begin, end), from the block's first i and j on.
    static __device__ __forceinline__ void run(Sums<T, kRanks>& sums, const Operand<const T>& large,
                                               const Operand<const T>& small, int64_t i, int64_t j,
                                               int64_t begin, int64_t end, T* shared) {
        const int64_t steps = ceil_div(end - begin, kDeep);
        const auto load = [&](int64_t step) {
            if (step < steps) {
                T* stage = shared + step % kStages * kStage;
                LargeTile::load(large, i, begin + step * kDeep, stage);
                SmallTile::load(small, j, begin + step * kDeep, stage + LargeTile::kSize);
            }
            __pipeline_commit();  // an empty one keeps the count
        };
        for (int step = 0; step < kStages - 1; ++step) load(step);
        for (int64_t step = 0; step < steps; ++step) {
            __pipeline_wait_prior(kStages - 2);
            // The tiles of this step are there for every thread, and every thread is done with those of the
            // step before, which the next load overwrites.
            __syncthreads();
            load(step + kStages - 1);
            const T* stage = shared + step % kStages * kStage;
            sums.template add<kDeep, kLargeRows, kSmallRows>(stage, stage + LargeTile::kSize);
        }
    }
};

template <class T, int kRanks, bool kLargeRows, bool kSmallRows>
using SplitPipeline = Pipeline<T, kRanks, kDepth<T>, kSplitStages, kLargeRows, kSmallRows>;

// The sums of one split over one block's (i, j). Grid: plan.blocks(), plan.splits.
template <class T, int kRanks, bool kLargeRows, bool kSmallRows>
__global__ void __launch_bounds__(kThreads, kSplitBlocks<kRanks>)
    lora_split_kernel(Operand<const T> large, Operand<const T> small, LoraPlan plan, float* scratch) {
    Sums<T, kRanks> sums;
    SplitPipeline<T, kRanks, kLargeRows, kSmallRows>::run(
        sums, large, small, plan.first_i(blockIdx.x), plan.first_j(blockIdx.x), plan.first_d(blockIdx.y),
        plan.last_d(blockIdx.y), reinterpret_cast<T*>(dynamic_shared));
    sums.template store<kRanks>(scratch + plan.scratch_index(blockIdx.y, blockIdx.x), plan.scratch_stride(),
                                plan.ranks_first, 0);
}

// out(i, j) = scaling * the sum of its splits.
template <class T>
__global__ void __launch_bounds__(kThreads)
    lora_combine_kernel(LoraPlan plan, const float* scratch, float scaling, T* out, int64_t i_stride,
                        int64_t j_stride) {
    const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const LoraPlace at = lora_place(plan, index);
    if (at.i >= plan.length || at.j >= plan.r) return;
    from_float(scaling * lora_combine(plan, scratch, index), out + at.i * i_stride + at.j * j_stride);
}

// Shared memory of lora_down_outer: a tile of y, read along its rows for one product and down its columns for
// the other, with a's tile for the first; and u's tiles, which stay for all the columns of a tile of rows.
template <class T, bool kSmallRows>
struct Pair {
    static constexpr int kDeep = kDepth<T>;
    static constexpr int kSteps = kLoraPairColumns / kDeep;
    using YTile = Tile<T, kLoraTile, kDeep, true>;
    using YColumns = Tile<T, kDeep, kLoraTile, false>;
    using ATile = Tile<T, 16, kDeep, kSmallRows>;
    using UTile = Tile<T, 16, kLoraTile, false>;
    static_assert(YTile::kStride == YColumns::kStride && YTile::kSize == YColumns::kSize, "the same memory");
    static_assert(kDeep == kThreads / kWarp * 16, "a fragment of columns for each warp");
    static constexpr int kStage = YTile::kSize + ATile::kSize;
    static constexpr int kBytes = kSplitStages * (kStage + UTile::kSize) * static_cast<int>(sizeof(T));
    static_assert(YTile::kSize * sizeof(T) % 32 == 0 && ATile::kSize * sizeof(T) % 32 == 0, "see Pipeline");
};

// The sums of y a^T over the block's columns and of y^T u over its rows. Grid: down.splits, outer.splits.
template <class T, bool kSmallRows>
__global__ void __launch_bounds__(kThreads, 2)
    lora_pair_kernel(Operand<const T> y, Operand<const T> a, Operand<const T> u, LoraPlan down,
                     LoraPlan outer, float* down_scratch, float* outer_scratch) {
    using Shape = Pair<T, kSmallRows>;
    T* stages = reinterpret_cast<T*>(dynamic_shared);
    T* us = stages + kSplitStages * Shape::kStage;
    const int64_t row = outer.first_d(blockIdx.y), column = down.first_d(blockIdx.x);
    const int64_t tiles = ceil_div(outer.last_d(blockIdx.y) - row, kLoraTile);
    const int steps = static_cast<int>(ceil_div(down.last_d(blockIdx.x) - column, Shape::kDeep));
    const int first = static_cast<int>(threadIdx.x) / kWarp * 16;  // of a tile's columns, the warp's

    int64_t next_tile = 0;
    int next_step = 0, next_stage = 0, stage = 0;
    const auto load = [&] {
        if (next_tile < tiles) {
            T* to = stages + next_stage * Shape::kStage;
            const int64_t i = row + next_tile * kLoraTile, d = column + next_step * Shape::kDeep;
            Shape::YTile::load(y, i, d, to);
            Shape::ATile::load(a, 0, d, to + Shape::YTile::kSize);
            // As many of u's tiles as there are stages: of one step each, they come and go with the stages.
            if (next_step == 0)
                Shape::UTile::load(u, 0, i, us + next_tile % kSplitStages * Shape::UTile::kSize);
            next_stage = next_stage + 1 < kSplitStages ? next_stage + 1 : 0;
            if (++next_step == steps) {
                next_step = 0;
                ++next_tile;
            }
        }
        __pipeline_commit();  // an empty one keeps the count
    };
    for (int n = 0; n < kSplitStages - 1; ++n) load();

    wmma::fragment<wmma::accumulator, 16, 16, 16, float> outer_sums[Shape::kSteps];
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) wmma::fill_fragment(outer_sums[step], 0.0f);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const T* u_tile = us + tile % kSplitStages * Shape::UTile::kSize;
        Sums<T, 16> sums;
#pragma unroll  // or outer_sums would not be in registers
        for (int step = 0; step < Shape::kSteps; ++step) {
            if (step >= steps) break;
            __pipeline_wait_prior(kSplitStages - 2);
            __syncthreads();  // see Pipeline::run
            load();
            const T* y_tile = stages + stage * Shape::kStage;
            stage = stage + 1 < kSplitStages ? stage + 1 : 0;
            sums.template add<Shape::kDeep, true, kSmallRows>(y_tile, y_tile + Shape::YTile::kSize);
#pragma unroll 2
            for (int d = 0; d < kLoraTile; d += 16) {
                wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::col_major> columns;
                wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> ranks;
                wmma::load_matrix_sync(columns, y_tile + Shape::YColumns::index(first, d),
                                       Shape::YColumns::kStride);
                wmma::load_matrix_sync(ranks, u_tile + Shape::UTile::index(0, d), Shape::UTile::kStride);
                wmma::mma_sync(outer_sums[step], columns, ranks, outer_sums[step]);
            }
        }
        sums.template store<16>(down_scratch + down.scratch_index(blockIdx.x, row / kLoraTile + tile),
                                down.scratch_stride(), true, 0);
    }
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
        if (step >= steps) break;
        const int64_t i = column + step * Shape::kDeep + first;
        float* to = outer_scratch + outer.scratch_index(blockIdx.y, i / kLoraTile);
        wmma::store_matrix_sync(to + i % kLoraTile * outer.scratch_stride(), outer_sums[step],
                                outer.scratch_stride(), wmma::mem_row_major);
    }
}

// Shared memory of lora_up: the tile of y, then the operands' tiles, whose place a slab of the product takes.
template <class T, bool kSmallRows>
struct Up {
    using YTile = Tile<T, kUpRows, kLoraTile, true>;
    using Product = Pipeline<T, kUpRows, kUpDepth, kUpStages, kSmallRows, true>;
    static constexpr int kSlabStride = kLoraTile + kVector<float>;  // of float [kUpSlab, kLoraTile]
    static constexpr int kSlabBytes = kUpSlab * kSlabStride * static_cast<int>(sizeof(float));
    static constexpr int kYBytes = YTile::kSize * static_cast<int>(sizeof(T));
    static constexpr int kBytes = kYBytes + (Product::kBytes > kSlabBytes ? Product::kBytes : kSlabBytes);
    static_assert(kYBytes % 32 == 0, "see Pipeline");
};

// y(j, i) += sum_d b(i, d) u(j, d): kUpRows rows of y and kLoraTile columns for each block.
template <class T, bool kSmallRows>
__global__ void __launch_bounds__(kThreads, kUpBlocks<T>)
    lora_up_kernel(Operand<T> y, Operand<const T> b, Operand<const T> u, int64_t column_tiles) {
    using Shape = Up<T, kSmallRows>;
    using YTile = typename Shape::YTile;
    const int64_t row = blockIdx.x / column_tiles * kUpRows, column = blockIdx.x % column_tiles * kLoraTile;
    T* before = reinterpret_cast<T*>(dynamic_shared);
    char* rest = dynamic_shared + Shape::kYBytes;

    // Part of the product's first group of copies, so it is there when the product is.
    YTile::load({y.data, y.rows, y.columns, y.row_stride, y.column_stride, y.aligned}, row, column, before);
    Sums<T, kUpRows> sums;
    Shape::Product::run(sums, b, u, column, row, 0, u.columns, reinterpret_cast<T*>(rest));

    float* product = reinterpret_cast<float*>(rest);
#pragma unroll
    for (int slab = 0; slab < kUpRows; slab += kUpSlab) {
        __syncthreads();  // what is there has been read
        sums.template store<kUpSlab>(product, Shape::kSlabStride, false, slab);
        __syncthreads();
        constexpr int kPieces = kUpSlab * kLoraTile / kVector<T>;
#pragma unroll
        for (int n = 0; n < kPieces / kThreads; ++n) {
            const TilePiece piece = tile_piece<kLoraTile, kVector<T>>(
                n * kThreads + static_cast<int>(threadIdx.x), y.rows - row - slab, y.columns - column);
            const float* add = product + piece.row * Shape::kSlabStride + piece.column;
            Piece<T> sum;
            sum.words =
                *reinterpret_cast<const uint4*>(before + YTile::index(slab + piece.row, piece.column));
#pragma unroll
            for (int k = 0; k < kVector<T>; ++k) {
                from_float(to_float(sum.elements[k]) + add[k], &sum.elements[k]);
            }
            T* to = y.data + (row + slab + piece.row) * y.row_stride + column + piece.column;
            if (y.aligned && piece.inside == kVector<T>) {
                *reinterpret_cast<uint4*>(to) = sum.words;
            } else {
#pragma unroll
                for (int k = 0; k < kVector<T>; ++k) {
                    if (k < piece.inside) to[k] = sum.elements[k];
                }
            }
        }
    }
}

template <class T>
Operand<T> operand(T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    const bool aligned = column_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                         row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    return {data, rows, columns, row_stride, column_stride, aligned};
}

// A small matrix [side, depth] with whichever of its dimensions is contiguous along the rows.
bool deep_rows(const SmallMatrix& m) { return m.stride_1 == 1 || m.stride_0 != 1; }
template <class T>
Operand<const T> small_operand(const SmallMatrix& m, int64_t side, int64_t depth) {
    const T* data = static_cast<const T*>(m.data);
    return deep_rows(m) ? operand(data, side, depth, m.stride_0, m.stride_1)
                        : operand(data, depth, side, m.stride_1, m.stride_0);
}

// f(std::true_type or std::false_type)
template <class F>
void dispatch_bool(bool value, F&& f) {
    if (value) {
        f(std::true_type());
    } else {
        f(std::false_type());
    }
}

void check(const char* kernel, int64_t M, int64_t columns, int64_t r, cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(kernel) + " with M=" + std::to_string(M) +
                                 " columns=" + std::to_string(columns) + " r=" + std::to_string(r) + ": " +
                                 cudaGetErrorString(error));
    }
}

// More than the 48 KB of shared memory that a kernel has without asking.
template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class T>
void launch_combine(const char* name, const LoraPlan& plan, const float* scratch, double scaling, T* out,
                    int64_t i_stride, int64_t j_stride, cudaStream_t stream) {
    check(name, plan.length, plan.depth, plan.r,
          launch_kernel(&lora_combine_kernel<T>, grid_of(name, plan.split_sums() / kThreads), kThreads, 0, 1,
                        stream, plan, scratch, static_cast<float>(scaling), out, i_stride, j_stride));
}

template <bool kLargeRows, bool kSmallRows, class T>
void launch_product(const char* name, const Operand<const T>& large, const Operand<const T>& small,
                    const LoraPlan& plan, float* scratch, double scaling, T* out, int64_t i_stride,
                    int64_t j_stride, cudaStream_t stream) {
    const auto run = [&](auto ranks) {
        constexpr int kRanks = decltype(ranks)::value;
        constexpr int kBytes = SplitPipeline<T, kRanks, kLargeRows, kSmallRows>::kBytes;
        const auto kernel = &lora_split_kernel<T, kRanks, kLargeRows, kSmallRows>;
        check(name, large.rows, large.columns, plan.r, allow_shared(kernel, kBytes));
        const dim3 grid(grid_of(name, plan.blocks()), static_cast<unsigned>(plan.splits));
        check(name, large.rows, large.columns, plan.r,
              launch_kernel(kernel, grid, kThreads, kBytes, 1, stream, large, small, plan, scratch));
    };
    if (plan.ranks == 16) {
        run(std::integral_constant<int, 16>());
    } else {
        run(std::integral_constant<int, 64>());
    }
    launch_combine(name, plan, scratch, scaling, out, i_stride, j_stride, stream);
}

}  // namespace
}  // namespace FASTFT_TARGET

void lora_down_cuda(const LoraDownArgs& args, cudaStream_t stream) {
    constexpr const char* name = "lora_down";
    if (args.M == 0 || args.r == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_bool(deep_rows(args.a), [&](auto small_rows) {
            launch_product<true, decltype(small_rows)::value>(
                name, operand(static_cast<const T*>(args.x), args.M, args.K, args.x_stride, 1),
                small_operand<T>(args.a, args.r, args.K), lora_plan(args), static_cast<float*>(args.scratch),
                args.scaling, static_cast<T*>(args.u), args.u_stride, 1, stream);
        });
    });
}

void lora_outer_cuda(const LoraOuterArgs& args, cudaStream_t stream) {
    constexpr const char* name = "lora_outer";
    if (args.N == 0 || args.r == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        launch_product<false, false>(name,
                                     operand(static_cast<const T*>(args.y), args.M, args.N, args.y_stride, 1),
                                     operand(static_cast<const T*>(args.u), args.M, args.r, args.u_stride, 1),
                                     lora_plan(args), static_cast<float*>(args.scratch), 1,
                                     static_cast<T*>(args.g.data), args.g.stride_1, args.g.stride_0, stream);
    });
}

void lora_down_outer_cuda(const LoraDownOuterArgs& args, cudaStream_t stream) {
    constexpr const char* name = "lora_down_outer";
    const LoraPairPlan plan = lora_down_outer_plan(args);
    if (!plan.fused) {
        lora_down_cuda(down_part(args), stream);
        lora_outer_cuda(outer_part(args), stream);
        return;
    }
    const auto run = [&](auto element, auto small_rows) {
        using T = decltype(element);
        using Shape = Pair<T, decltype(small_rows)::value>;
        const auto kernel = &lora_pair_kernel<T, decltype(small_rows)::value>;
        float* down_scratch = static_cast<float*>(args.scratch);
        float* outer_scratch = down_scratch + plan.down.scratch_size();
        check(name, args.M, args.N, args.r, allow_shared(kernel, Shape::kBytes));
        const dim3 grid(grid_of(name, plan.down.splits), static_cast<unsigned>(plan.outer.splits));
        check(name, args.M, args.N, args.r,
              launch_kernel(kernel, grid, kThreads, Shape::kBytes, 1, stream,
                            operand(static_cast<const T*>(args.y), args.M, args.N, args.y_stride, 1),
                            small_operand<T>(args.a, args.r, args.N),
                            operand(static_cast<const T*>(args.u), args.M, args.r, args.u_stride, 1),
                            plan.down, plan.outer, down_scratch, outer_scratch));
        launch_combine(name, plan.down, down_scratch, args.scaling, static_cast<T*>(args.du), args.du_stride,
                       1, stream);
        launch_combine(name, plan.outer, outer_scratch, 1, static_cast<T*>(args.g), args.r, 1, stream);
    };
    dispatch_bool(deep_rows(args.a), [&](auto small_rows) {
        if (args.dtype == DType::BFloat16) {
            run(__nv_bfloat16(), small_rows);
        } else {
            run(__half(), small_rows);
        }
    });
}

void lora_up_cuda(const LoraUpArgs& args, cudaStream_t stream) {
    constexpr const char* name = "lora_up";
    if (args.M == 0 || args.N == 0 || args.r == 0) return;
    dispatch_dtype(name, args.dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_bool(deep_rows(args.b), [&](auto small_rows) {
            constexpr bool kSmallRows = decltype(small_rows)::value;
            constexpr int kBytes = Up<T, kSmallRows>::kBytes;
            const int64_t column_tiles = ceil_div(args.N, kLoraTile);
            const auto kernel = &lora_up_kernel<T, kSmallRows>;
            check(name, args.M, args.N, args.r, allow_shared(kernel, kBytes));
            const unsigned grid = grid_of(name, column_tiles * ceil_div(args.M, kUpRows));
            check(name, args.M, args.N, args.r,
                  launch_kernel(kernel, grid, kThreads, kBytes, 1, stream,
                                operand(static_cast<T*>(args.y), args.M, args.N, args.y_stride, 1),
                                small_operand<T>(args.b, args.N, args.r),
                                operand(static_cast<const T*>(args.u), args.M, args.r, args.u_stride, 1),
                                column_tiles));
        });
    });
}

KernelEntry lora_down_entry() {
    constexpr int kBytes = SplitPipeline<__nv_bfloat16, 16, true, true>::kBytes;
    const auto kernel = &lora_split_kernel<__nv_bfloat16, 16, true, true>;
    return {"lora_down", reinterpret_cast<const void*>(kernel), plain_launch(kThreads, kBytes)};
}
KernelEntry lora_outer_entry() {
    constexpr int kBytes = SplitPipeline<__nv_bfloat16, 16, false, false>::kBytes;
    const auto kernel = &lora_split_kernel<__nv_bfloat16, 16, false, false>;
    return {"lora_outer", reinterpret_cast<const void*>(kernel), plain_launch(kThreads, kBytes)};
}
KernelEntry lora_down_outer_entry() {
    const auto kernel = &lora_pair_kernel<__nv_bfloat16, false>;
    return {"lora_down_outer", reinterpret_cast<const void*>(kernel),
            plain_launch(kThreads, Pair<__nv_bfloat16, false>::kBytes)};
}
KernelEntry lora_combine_entry() {
    return {"lora_combine", reinterpret_cast<const void*>(&lora_combine_kernel<__nv_bfloat16>),
            plain_launch(kThreads)};
}
KernelEntry lora_up_entry() {
    const auto kernel = &lora_up_kernel<__nv_bfloat16, true>;
    return {"lora_up", reinterpret_cast<const void*>(kernel),
            plain_launch(kThreads, Up<__nv_bfloat16, true>::kBytes)};
}

}  // namespace fastft
