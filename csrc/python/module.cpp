// fastft._build: what this build is and what it found on this machine. Tensors go through torch.ops, never
// through here; the functions on raw addresses serve the tests of row_math.h and vec.h.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "fastft/bias_adamw.h"
#include "fastft/build_info.h"
#include "fastft/cpu_capability.h"
#include "fastft/huge_pages.h"
#include "fastft/lora_tiles.h"
#include "fastft/row_launch.h"
#include "fastft/row_math.h"
#include "fastft/summed_products.h"

namespace py = pybind11;

namespace {

py::dict info() {
    py::dict d;
    d["version"] = FASTFT_VERSION;
    d["cuda"] = fastft::built_with_cuda();
    d["cuda_reason"] = FASTFT_CUDA_REASON;
    d["cuda_archs"] = FASTFT_CUDA_ARCHS;
    d["cuda_compiler"] = FASTFT_CUDA_COMPILER;
    d["compiler"] = FASTFT_COMPILER;
    d["torch_built_with"] = FASTFT_TORCH_VERSION;
    d["cpu_capability"] = fastft::name_of(fastft::cpu_capability());
    d["cpu_capability_best"] = fastft::name_of(fastft::best_cpu_capability());
    d["torch_has_cuda_stream"] = fastft::torch_has_cuda_stream();
    return d;
}

py::list launch_configurations() {
    fastft::LaunchConfiguration all[64];
    const int n = fastft::launch_configurations(all, 64);
    py::list out;
    for (int i = 0; i < n; ++i) {
        py::dict d;
        d["kernel"] = all[i].kernel;
        d["blocks"] = all[i].blocks;
        d["threads"] = all[i].threads;
        d["registers"] = all[i].registers;
        d["static_shared_bytes"] = all[i].static_shared_bytes;
        d["dynamic_shared_bytes"] = all[i].dynamic_shared_bytes;
        d["blocks_per_multiprocessor"] = all[i].blocks_per_multiprocessor;
        out.append(d);
    }
    return out;
}

py::list devices() {
    py::list out;
    for (int i = 0; i < fastft::device_count(); ++i) {
        fastft::DeviceLimits limits;
        if (!fastft::device_limits(i, &limits)) continue;
        py::dict d;
        d["name"] = limits.name;
        d["capability"] = py::make_tuple(limits.major, limits.minor);
        d["multiprocessors"] = limits.multiprocessors;
        d["max_threads_per_block"] = limits.max_threads_per_block;
        d["shared_bytes_per_block"] = limits.shared_bytes_per_block;
        d["shared_bytes_per_multiprocessor"] = limits.shared_bytes_per_multiprocessor;
        d["l2_bytes"] = limits.l2_bytes;
        d["global_bytes"] = limits.global_bytes;
        out.append(d);
    }
    return out;
}

template <class T>
T* address(uintptr_t p) {
    return reinterpret_cast<T*>(p);
}

py::dict plan_cached_row(int64_t vocab, int64_t element_bytes, int major, int64_t shared_per_block,
                         int64_t shared_per_multiprocessor) {
    const fastft::RowLaunch launch = fastft::plan_cached_row(
        vocab, element_bytes, fastft::row_limits(major, shared_per_block, shared_per_multiprocessor));
    py::dict d;
    d["blocks"] = launch.blocks;
    d["threads"] = launch.threads;
    d["slice"] = launch.slice;
    d["cached"] = launch.cached;
    d["shared_bytes"] = launch.shared_bytes;
    return d;
}

// The lanes' states as merge_lanes in cuda/row.cuh merges them: 32 at a time, all moved to the largest
// maximum, then added by exchanges over 16, 8, 4, 2 and 1 lanes.
template <class S>
fastft::KlState<S> merge_lanes(std::vector<fastft::KlState<S>> lanes, S c) {
    const fastft::KlState<S> none = [] {
        fastft::KlState<S> state;
        state.init();
        return state;
    }();
    lanes.resize(fastft::kWarp, none);
    S p_max = none.p.max, q_max = none.q.max;
    for (const auto& lane : lanes) {
        p_max = fastft::max_(p_max, lane.p.max);
        q_max = fastft::max_(q_max, lane.q.max);
    }
    for (auto& lane : lanes) lane.move_to(p_max, q_max, c);
    for (size_t mask = fastft::kWarp / 2; mask > 0; mask /= 2) {
        const auto before = lanes;
        for (size_t i = 0; i < lanes.size(); ++i) lanes[i].add(before[i ^ mask]);
    }
    return lanes[0];
}

// KL(softmax(p) || softmax(q)) of one row the way `blocks` blocks of `threads` CUDA threads compute it: every
// thread takes kElements neighbouring elements of its block's slice in turn; then threads, warps and blocks
// merge. Runs the very templates of the device.
double kl_by_blocks(uintptr_t p_address, uintptr_t q_address, int64_t n, int blocks, int threads,
                    double temperature) {
    using fastft::kElements, fastft::kWarp;
    const float* p = address<const float>(p_address);
    const float* q = address<const float>(q_address);
    const float c = static_cast<float>(fastft::kLog2E / temperature);
    const int64_t slice = fastft::slice_of(n, blocks);
    std::vector<fastft::KlState<double>> of_blocks;
    for (int block = 0; block < blocks; ++block) {
        const int64_t end = std::min(n, (block + 1) * slice);
        std::vector<fastft::KlState<double>> of_warps;
        for (int first = 0; first < threads; first += kWarp) {
            std::vector<fastft::KlState<float>> lanes;
            for (int thread = first; thread < first + kWarp; ++thread) {
                fastft::KlState<float> state;
                state.init();
                for (int64_t i = block * slice + int64_t(thread) * kElements; i < end;
                     i += int64_t(threads) * kElements) {
                    float x[kElements], y[kElements];
                    for (int k = 0; k < kElements; ++k) {
                        x[k] = i + k < end ? p[i + k] : -INFINITY;
                        y[k] = i + k < end ? q[i + k] : -INFINITY;
                    }
                    state.update(x, y, c);
                }
                lanes.push_back(state);
            }
            of_warps.push_back(widen(merge_lanes(lanes, c)));
        }
        of_blocks.push_back(merge_lanes(of_warps, double(c)));
    }
    return fastft::kl_value(merge_lanes(of_blocks, double(c)), double(c));
}

}  // namespace

PYBIND11_MODULE(_build, m) {
    m.doc() = "Build information, device limits and launch configurations of fastft's kernels.";
    m.def("info", &info);
    m.attr("ADAMW_CHUNK") = fastft::kAdamWChunk;
    m.attr("ADAMW_CODE_BLOCK") = fastft::kCodeBlock;
    m.def("launch_configurations", &launch_configurations);
    m.def("devices", &devices);
    m.def("cpu_capability", [] { return fastft::name_of(fastft::cpu_capability()); });
    m.def("set_cpu_capability", [](const std::string& name) { fastft::set_cpu_capability(name.c_str()); });
    m.def("advise_huge_pages",
          [](uintptr_t data, int64_t bytes) { fastft::advise_huge_pages(address<void>(data), bytes); });
    m.def("exp2_array", [](uintptr_t x, uintptr_t y, int64_t n) {
        fastft::exp2_array_cpu(address<const float>(x), address<float>(y), n);
    });
    m.def("log_array", [](uintptr_t x, uintptr_t y, int64_t n) {
        fastft::log_array_cpu(address<const float>(x), address<float>(y), n);
    });
    m.def("plan_cached_row", &plan_cached_row);
    m.def("kl_by_blocks", &kl_by_blocks);
    m.def("lora_splits", [](int64_t length, int64_t depth, int64_t r, int element_bytes) {
        const auto plan = fastft::lora_plan(length, depth, r, true, element_bytes);
        return py::make_tuple(plan.blocks(), plan.splits, plan.split_depth, plan.scratch_size());
    });
    m.attr("CUTLASS") = fastft::cutlass_version();
    m.attr("CUTLASS_REASON") = FASTFT_CUTLASS_REASON;
    m.attr("SUMMED_PRODUCTS") = fastft::kSummedProducts;
    m.attr("SUMMED_PRODUCTS_ALIGNMENT") = fastft::kSummedProductsAlignment;
    m.def("summed_products_columns", &fastft::summed_products_columns);
    m.def("lora_pair_splits", [](int64_t M, int64_t N, int64_t r, bool two_bytes) {
        fastft::LoraDownOuterArgs args{};
        args.M = M, args.N = N, args.r = r;
        args.dtype = two_bytes ? fastft::DType::BFloat16 : fastft::DType::Float32;
        const auto plan = fastft::lora_down_outer_plan(args);
        return py::make_tuple(plan.fused, plan.down.split_depth, plan.down.splits, plan.outer.split_depth,
                              plan.outer.splits, plan.scratch_size());
    });
}
