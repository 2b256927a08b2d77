// CUDA's words for an ordinary C++ compiler: enough of them for the kernels in csrc/cuda to run on the CPU.
//
// A CUDA thread is a fiber; a block's `__shared__` variables are thread_local ones, because that is the one
// storage class which `extern` may precede and whose variables the linker puts side by side: emulator.cpp
// keeps a copy of that memory for each block. What switches fibers or needs to know which one runs is a
// function of emulator.cpp (namespace emulator); the rest is here, and is compiled and watched like the
// kernels themselves.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local

using std::max;
using std::min;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount, maxThreadsPerBlock, l2CacheSize;
    size_t sharedMemPerBlockOptin, sharedMemPerMultiprocessor, totalGlobalMem;
};
struct cudaFuncAttributes {
    int numRegs;
    size_t sharedSizeBytes;
};

namespace emulator {

struct Launch {
    const void* kernel;
    dim3 grid, block;
    unsigned cluster;
    size_t shared_bytes;
    const void* parameters;  // that every thread reads
    size_t parameter_bytes;
    void (*run)(const void* parameters);
};
cudaError_t launch(const Launch& launch);
// Ends the launch; it returns an error with this message.
[[noreturn]] void fail(const char* message);

// Of all threads of the block, or of the warp (`lanes`: CUDA's mask, which must name every thread of it): the
// last one to come runs `action` on what each has brought. `orders_memory`: what was written before is seen
// by all behind it.
using Action = void (*)(void* const* brought, int count);
void block_barrier(void* mine, Action action);
void warp_barrier(unsigned lanes, const char* name, void* mine, Action action, bool orders_memory);
void cluster_barrier();
void fence();
int atomic_add(int* address, int value);
unsigned long long atomic_cas(unsigned long long* address, unsigned long long expected,
                              unsigned long long value);
void copy_async(void* shared, const void* global, size_t bytes, size_t zeros);
void copy_commit();
void copy_wait(size_t groups_left);
// Where a variable of this block's shared memory lies in that of the block with this rank in the cluster.
void* shared_of(void* own, unsigned rank);

template <class Value>
struct Shuffled {
    Value value, result;
    int lane;
};
// Every lane gets the value of the lane that `source` names.
template <class Value>
Value shuffle(unsigned lanes, const char* name, Value value, int lane) {
    Shuffled<Value> mine{value, value, lane};
    warp_barrier(
        lanes, name, &mine,
        [](void* const* brought, int count) {
            for (int i = 0; i < count; ++i) {
                auto* to = static_cast<Shuffled<Value>*>(brought[i]);
                if (to->lane < count) to->result = static_cast<Shuffled<Value>*>(brought[to->lane])->value;
            }
        },
        false);
    return mine.result;
}

}  // namespace emulator

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t bytes);

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
    const Call call{kernel, {arguments...}};
    emulator::Launch launch{};
    launch.kernel = reinterpret_cast<const void*>(kernel);
    launch.grid = config->gridDim;
    launch.block = config->blockDim;
    launch.cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
    launch.shared_bytes = config->dynamicSmemBytes;
    launch.parameters = &call;
    launch.parameter_bytes = sizeof(call);
    launch.run = [](const void* p) {
        const Call& call = *static_cast<const Call*>(p);
        std::apply(call.first, call.second);
    };
    return emulator::launch(launch);
}

// --- Functions of device code ------------------------------------------------------------------------------

inline void __syncthreads() { emulator::block_barrier(nullptr, nullptr); }
inline int __syncthreads_or(int x) {
    emulator::block_barrier(&x, [](void* const* brought, int count) {
        int any = 0;
        for (int i = 0; i < count; ++i) any |= *static_cast<int*>(brought[i]);
        for (int i = 0; i < count; ++i) *static_cast<int*>(brought[i]) = any != 0;
    });
    return x;
}
inline void __syncwarp(unsigned lanes = 0xffffffffu) {
    emulator::warp_barrier(lanes, "__syncwarp", nullptr, nullptr, true);
}
inline int __any_sync(unsigned lanes, int x) {
    emulator::warp_barrier(
        lanes, "__any_sync", &x,
        [](void* const* brought, int count) {
            int any = 0;
            for (int i = 0; i < count; ++i) any |= *static_cast<int*>(brought[i]);
            for (int i = 0; i < count; ++i) *static_cast<int*>(brought[i]) = any != 0;
        },
        false);
    return x;
}
inline int emulated_lane() {
    return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}
template <class Value>
Value __shfl_xor_sync(unsigned lanes, Value value, int mask) {
    return emulator::shuffle(lanes, "__shfl_xor_sync", value, emulated_lane() ^ mask);
}
template <class Value>
Value __shfl_down_sync(unsigned lanes, Value value, unsigned delta) {
    return emulator::shuffle(lanes, "__shfl_down_sync", value, emulated_lane() + static_cast<int>(delta));
}
template <class Value>
Value __shfl_sync(unsigned lanes, Value value, int lane) {
    return emulator::shuffle(lanes, "__shfl_sync", value, lane);
}
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_system() { emulator::fence(); }
inline int atomicAdd(int* address, int value) { return emulator::atomic_add(address, value); }
inline unsigned long long atomicCAS(unsigned long long* address, unsigned long long expected,
                                    unsigned long long value) {
    return emulator::atomic_cas(address, expected, value);
}
template <class Value>
Value __ldcg(const Value* p) {
    return *p;
}
template <class Value>
Value __ldg(const Value* p) {
    return *p;
}
inline float __uint_as_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline uint32_t __float_as_uint(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
// A macro: some C libraries have an rsqrtf.
inline float emulated_rsqrtf(float x) { return 1 / sqrtf(x); }
#define rsqrtf emulated_rsqrtf
