// summed_products on CUDA: CUTLASS's persistent, warp-specialised product for sm_90a, whose producer goes on
// from one pair of operands to the next. The consumers multiply whatever tile comes next and know nothing of
// it, so the terms are one sum in registers; y is written once and read never.
//
// Predicted for lora_linear's forward on an H200, 16-bit, r 16, M 8192, K = N = 7168: a frozen product
// takes 1.07 ms; the adapter's columns fill one tile of 64 more behind 112, 0.01 ms, and lora_down 0.03 ms.
// See docs/kernels.md.
#include "fastft/summed_products.h"

#include <cuda_runtime.h>

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/version.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastft {
namespace {

using cute::_1, cute::_2, cute::_64, cute::_128, cute::_256, cute::Shape;
using RowMajor = cutlass::layout::RowMajor;

// CUTLASS's main loop over a list of operands. What the kernel takes for the depth is that of all terms, each
// rounded up to whole tiles; beyond a term's own depth the copies fill with zeros.
template <class Base>
struct SummedMainloop : Base {
    using typename Base::MainloopPipeline;
    using typename Base::PipelineState;
    using typename Base::TensorStorage;
    using typename Base::TileShape;

    struct Arguments {
        typename Base::Arguments terms[kSummedProducts];
        int depths[kSummedProducts];
        int count;
    };
    struct Params {
        typename Base::Params terms[kSummedProducts];
        int depths[kSummedProducts];
        int count;
        uint32_t tma_transaction_bytes = Base::TmaTransactionBytes;
    };

    static CUTLASS_HOST_DEVICE int tiles(int depth) {
        return (depth + cute::size<2>(TileShape{}) - 1) / cute::size<2>(TileShape{});
    }

    template <class ProblemShape>
    static ProblemShape of_term(ProblemShape shape, int depth) {
        cute::get<2>(shape) = depth;
        return shape;
    }

    template <class ProblemShape>
    static Params to_underlying_arguments(const ProblemShape& shape, const Arguments& args, void* workspace) {
        Params params{};
        params.count = args.count;
        for (int n = 0; n < args.count; ++n) {
            params.depths[n] = args.depths[n];
            params.terms[n] =
                Base::to_underlying_arguments(of_term(shape, args.depths[n]), args.terms[n], workspace);
        }
        return params;
    }

    template <class ProblemShape>
    static bool can_implement(const ProblemShape& shape, const Arguments& args) {
        for (int n = 0; n < args.count; ++n) {
            if (!Base::can_implement(of_term(shape, args.depths[n]), args.terms[n])) return false;
        }
        return true;
    }

    CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
        for (int n = 0; n < params.count; ++n) Base::prefetch_tma_descriptors(params.terms[n]);
    }

    // Coordinates of tiles alone, which are alike for all terms: an operand's address is in its descriptor.
    template <class ProblemShape>
    CUTLASS_DEVICE auto load_init(const ProblemShape& shape, const Params& params) const {
        return Base::load_init(shape, params.terms[0]);
    }

    template <class Inputs, class Block, class Iterator>
    CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState stage,
                             const Inputs& inputs, const Block& block, Iterator, int, int thread,
                             uint32_t block_rank, TensorStorage& shared) {
        for (int n = 0; n < params.count; ++n) {
            const int count = tiles(params.depths[n]);
            Base::load(params.terms[n], pipeline, stage, inputs, block, cute::make_coord_iterator(count),
                       count, thread, block_rank, shared);
            stage.advance(count);
        }
    }

    template <class Sums>
    CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState stage, Sums& sums, int count, int thread,
                            TensorStorage& shared, const Params& params) {
        Base::mma(pipeline, stage, sums, count, thread, shared, params.terms[0]);
    }
};

template <class T, bool kByDepth, class Tile, class Cluster>
struct Product {
    static constexpr int kAlignment = kSummedProductsAlignment;
    static_assert(kAlignment * sizeof(T) == 16, "what the tensor memory accelerator asks of a stride");
    using LayoutB = std::conditional_t<kByDepth, RowMajor, cutlass::layout::ColumnMajor>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kAlignment, T,
        RowMajor, kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative,
        cutlass::epilogue::fusion::LinCombPerColBias<T, float, T, void, float, kAlignment>>::CollectiveOp;
    using Base = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, RowMajor, kAlignment, T, LayoutB, kAlignment,
        float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
    using Mainloop = SummedMainloop<Base>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
        cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>>;

    static cutlass::Status run(const SummedProductsArgs& from, int multiprocessors, cudaStream_t stream) {
        typename Gemm::Arguments to{};
        to.mode = cutlass::gemm::GemmUniversalMode::kGemm;
        int depth = 0;
        for (int n = 0; n < from.count; ++n) {
            const auto& term = from.terms[n];
            auto& operands = to.mainloop.terms[n];
            operands.ptr_A = static_cast<const T*>(term.a);
            operands.dA = {term.a_stride, _1{}, 0};
            operands.ptr_B = static_cast<const T*>(term.b);
            if constexpr (kByDepth) {
                operands.dB = {_1{}, term.b_stride, 0};
            } else {
                operands.dB = {term.b_stride, _1{}, 0};
            }
            to.mainloop.depths[n] = static_cast<int>(term.depth);
            depth += Mainloop::tiles(to.mainloop.depths[n]) * cute::size<2>(Tile{});
        }
        to.mainloop.count = from.count;
        to.problem_shape = {static_cast<int>(from.M), static_cast<int>(from.N), depth, 1};
        to.epilogue.thread.alpha = 1;
        to.epilogue.thread.bias_ptr = static_cast<const T*>(from.bias);
        to.epilogue.ptr_D = static_cast<T*>(from.y);
        to.epilogue.dD = {from.y_stride, _1{}, 0};
        to.hw_info.sm_count = multiprocessors;
        to.scheduler.max_swizzle_size = 8;  // blocks that run together share rows and columns in the L2 cache
        const cutlass::Status status = Gemm::can_implement(to);
        if (status != cutlass::Status::kSuccess) return status;
        if (Gemm::get_workspace_size(to) != 0) return cutlass::Status::kErrorWorkspaceNull;
        return Gemm().run(to, nullptr, stream);
    }
};

template <class T, bool kByDepth>
cutlass::Status run(const SummedProductsArgs& args, int multiprocessors, cudaStream_t stream) {
    if (summed_products_columns(args.M, args.N, multiprocessors) == 256) {
        return Product<T, kByDepth, Shape<_128, _256, _64>, Shape<_2, _1, _1>>::run(args, multiprocessors,
                                                                                    stream);
    }
    return Product<T, kByDepth, Shape<_128, _128, _64>, Shape<_1, _1, _1>>::run(args, multiprocessors,
                                                                                stream);
}

[[noreturn]] void fail(const SummedProductsArgs& args, const std::string& why) {
    throw std::runtime_error("summed_products with M=" + std::to_string(args.M) +
                             " N=" + std::to_string(args.N) + " and " + std::to_string(args.count) +
                             " products: " + why);
}

}  // namespace

#define FASTFT_STRING(x) #x
#define FASTFT_VERSION_STRING(major, minor, patch) \
    FASTFT_STRING(major) "." FASTFT_STRING(minor) "." FASTFT_STRING(patch)
const char* cutlass_version() { return FASTFT_VERSION_STRING(CUTLASS_MAJOR, CUTLASS_MINOR, CUTLASS_PATCH); }

void summed_products_cuda(const SummedProductsArgs& args, cudaStream_t stream) {
    if (args.M == 0 || args.N == 0) return;
    int device = 0, major = 0, minor = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    const auto read = [&](cudaDeviceAttr attribute, int* value) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
    };
    read(cudaDevAttrComputeCapabilityMajor, &major);
    read(cudaDevAttrComputeCapabilityMinor, &minor);
    read(cudaDevAttrMultiProcessorCount, &multiprocessors);
    if (error != cudaSuccess) fail(args, cudaGetErrorString(error));
    if (major != 9 || minor != 0) {
        fail(args, "the device has compute capability " + std::to_string(major) + "." +
                       std::to_string(minor) + ", the kernel is built for 9.0");
    }
    int64_t depth = 0;
    for (int n = 0; n < args.count; ++n) depth += args.terms[n].depth;
    if (args.M > INT32_MAX || args.N > INT32_MAX || depth > INT32_MAX / 2)
        fail(args, "too large for one launch");
    cutlass::Status status = cutlass::Status::kErrorNotSupported;
    if (args.dtype == DType::BFloat16) {
        status = args.by_depth ? run<cutlass::bfloat16_t, true>(args, multiprocessors, stream)
                               : run<cutlass::bfloat16_t, false>(args, multiprocessors, stream);
    } else if (args.dtype == DType::Float16) {
        status = args.by_depth ? run<cutlass::half_t, true>(args, multiprocessors, stream)
                               : run<cutlass::half_t, false>(args, multiprocessors, stream);
    }
    if (status == cutlass::Status::kErrorInternal) {
        error = cudaGetLastError();  // reported here, and not to the next one who asks
        if (error != cudaSuccess) fail(args, cudaGetErrorString(error));
    }
    if (status != cutlass::Status::kSuccess) fail(args, cutlass::cutlassGetStatusString(status));
}

}  // namespace fastft
