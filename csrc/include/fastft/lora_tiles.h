// How the CUDA kernels of lora_linear cut their operands; plain arithmetic, also for the host, which
// allocates the scratch.
//
// lora_down and lora_outer are one product, with a long side i, a short side j and a deep sum d:
//
//   out[i, j] = sum_d large(i, d) small(j, d)
//
//   lora_down    large(i, d) = x[i, d]   small(j, d) = a[j, d]   length M, depth K
//   lora_outer   large(i, d) = y[d, i]   small(j, d) = u[d, j]   length N, depth M
//
// A block has kLoraTile of i, 16 or 64 of j, and a range of d, a split, of which it leaves the float sums in
// scratch; a second kernel adds the splits in their order.
//
// lora_down_outer is both for one y, each with a plan of its own: the columns of y are the d of the one and
// the i of the other, the rows the other way round. A block has one split of either, so its part of y is read
// once.
#pragma once

#include <cstdint>

#include "fastft/lora_linear.h"
#include "fastft/target.h"

namespace fastft {
inline namespace FASTFT_TARGET {

constexpr int kLoraTile = 128;
// Elements of d that are in shared memory at once: 128 bytes of a row of x.
constexpr int lora_tile_depth(int element_bytes) { return 128 / element_bytes; }
// Enough blocks for two on each of an H200's 132 multiprocessors. A constant, so that results do not depend
// on the device.
constexpr int64_t kLoraBlocks = 264;

FASTFT_HD int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// The blocks of out[length, r]: block b of [0, tiles * groups) has the i from b / groups * kLoraTile on and
// the j from b % groups * ranks on, so that neighbours share what they read of the large operand.
struct LoraPlan {
    int64_t length, depth, r;
    int64_t tiles, groups;
    int64_t split_depth, splits;
    int ranks;         // j of a block: 16 or 64
    bool ranks_first;  // order of a block's sums in scratch: j or i with stride 1, like the output

    FASTFT_HD int64_t blocks() const { return tiles * groups; }
    FASTFT_HD int64_t first_i(int64_t block) const { return block / groups * kLoraTile; }
    FASTFT_HD int64_t first_j(int64_t block) const { return block % groups * ranks; }
    FASTFT_HD int64_t first_d(int64_t split) const { return split * split_depth; }
    FASTFT_HD int64_t last_d(int64_t split) const {
        return first_d(split + 1) < depth ? first_d(split + 1) : depth;
    }

    // Scratch: [splits, blocks, ranks * kLoraTile] float.
    FASTFT_HD int64_t split_sums() const { return blocks() * ranks * kLoraTile; }
    int64_t scratch_size() const { return splits * split_sums(); }
    FASTFT_HD int64_t scratch_index(int64_t split, int64_t block) const {
        return (split * blocks() + block) * ranks * kLoraTile;
    }
    // Distance of two neighbours along the other side of a block's sums.
    FASTFT_HD int scratch_stride() const { return ranks_first ? ranks : kLoraTile; }
};

// Splits of at least split_depth and as long as `blocks` blocks in all allow, in multiples of unit.
inline LoraPlan lora_plan(int64_t length, int64_t depth, int64_t r, bool ranks_first, int64_t blocks,
                          int64_t split_depth, int64_t unit) {
    LoraPlan plan{};
    plan.length = length;
    plan.depth = depth;
    plan.r = r;
    plan.ranks = r <= 16 ? 16 : 64;
    plan.ranks_first = ranks_first;
    plan.tiles = ceil_div(length, kLoraTile);
    plan.groups = ceil_div(r, plan.ranks);
    const int64_t even = blocks > 0 ? ceil_div(depth, blocks) : depth;
    plan.split_depth = ceil_div(even > split_depth ? even : split_depth, unit) * unit;
    plan.splits = depth > 0 ? ceil_div(depth, plan.split_depth) : 1;
    return plan;
}

// With shorter splits the sums that each writes and the second kernel reads, 8 bytes for each (i, j), would
// be more than a quarter of what it reads of the large operand.
inline LoraPlan lora_plan(int64_t length, int64_t depth, int64_t r, bool ranks_first, int element_bytes) {
    const int64_t ranks = r <= 16 ? 16 : 64, blocks = ceil_div(length, kLoraTile) * ceil_div(r, ranks);
    return lora_plan(length, depth, r, ranks_first, blocks > 0 ? ceil_div(kLoraBlocks, blocks) : 1,
                     16 * ranks, lora_tile_depth(element_bytes));
}

inline LoraPlan lora_plan(const LoraDownArgs& args) {
    return lora_plan(args.M, args.K, args.r, true, args.dtype == DType::Float32 ? 4 : 2);
}
inline LoraPlan lora_plan(const LoraOuterArgs& args) {
    return lora_plan(args.N, args.M, args.r, args.g.stride_0 == 1, args.dtype == DType::Float32 ? 4 : 2);
}

// The columns of y that a block of lora_down_outer has: its warps keep the sums for all of them in registers.
constexpr int kLoraPairColumns = 512;
// The least rows; the sums for fewer would be more than a quarter of what is read of y.
constexpr int kLoraPairRows = 256;

struct LoraPairPlan {
    bool fused;  // one kernel for both; else one after the other, in the same scratch
    LoraPlan down, outer;

    int64_t scratch_size() const {
        const int64_t one = down.scratch_size(), other = outer.scratch_size();
        return fused ? one + other : (one > other ? one : other);
    }
};

inline LoraPairPlan lora_down_outer_plan(const LoraDownOuterArgs& args) {
    const bool two_bytes = args.dtype == DType::BFloat16 || args.dtype == DType::Float16;
    if (!two_bytes || args.r > 16 || args.M * args.N * args.r == 0) {
        return {false, lora_plan(down_part(args)), lora_plan(outer_part(args))};
    }
    LoraPairPlan plan{true, {}, {}};
    plan.down = lora_plan(args.M, args.N, args.r, true, args.N, kLoraPairColumns, kLoraPairColumns);
    plan.outer = lora_plan(args.N, args.M, args.r, true, ceil_div(kLoraBlocks, plan.down.splits),
                           kLoraPairRows, kLoraTile);
    return plan;
}

// Where element `index` of one split's sums belongs: out[i, j], which may lie beyond its ends.
struct LoraPlace {
    int64_t i, j;
};
FASTFT_HD LoraPlace lora_place(const LoraPlan& plan, int64_t index) {
    const int64_t size = plan.ranks * kLoraTile, block = index / size;
    const int within = static_cast<int>(index % size), stride = plan.scratch_stride();
    const int fast = within % stride, slow = within / stride;
    return {plan.first_i(block) + (plan.ranks_first ? slow : fast),
            plan.first_j(block) + (plan.ranks_first ? fast : slow)};
}

// Element `index` of the sums of all splits.
FASTFT_HD float lora_combine(const LoraPlan& plan, const float* scratch, int64_t index) {
    float sum = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 4
#endif
    for (int64_t split = 0; split < plan.splits; ++split) sum += scratch[split * plan.split_sums() + index];
    return sum;
}

// Piece n of a tile with kColumns columns: kVector neighbours in a row, `inside` of them within a matrix that
// ends `rows` rows and `columns` columns after the tile's first element.
struct TilePiece {
    int row, column, inside;
};
template <int kColumns, int kVector>
FASTFT_HD TilePiece tile_piece(int n, int64_t rows, int64_t columns) {
    static_assert(kColumns % kVector == 0, "a row has whole pieces");
    TilePiece piece{n / (kColumns / kVector), n % (kColumns / kVector) * kVector, 0};
    const int64_t left = piece.row < rows ? columns - piece.column : 0;
    piece.inside = static_cast<int>(left < 0 ? 0 : left > kVector ? kVector : left);
    return piece;
}

}  // namespace FASTFT_TARGET
}  // namespace fastft
