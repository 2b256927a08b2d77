// Devices and launch configurations, for fastft._build.
#include <cstring>

#include "common.cuh"
#include "fastft/build_info.h"
#include "fastft/cuda_device.h"

namespace fastft {

int exchange_cuda_device(int device) {
    int previous = 0;
    cudaError_t error = cudaGetDevice(&previous);
    if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) {
        throw std::runtime_error("fastft: cannot use CUDA device " + std::to_string(device) + ": " +
                                 cudaGetErrorString(error));
    }
    return previous;
}

int device_count() {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        cudaGetLastError();  // no driver is an answer, not an error for the next launch to find
        return 0;
    }
    return n;
}

bool device_limits(int device, DeviceLimits* out) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    static_assert(sizeof(out->name) == sizeof(properties.name), "names have one length");
    memcpy(out->name, properties.name, sizeof(out->name));
    out->major = properties.major;
    out->minor = properties.minor;
    out->multiprocessors = properties.multiProcessorCount;
    out->max_threads_per_block = properties.maxThreadsPerBlock;
    out->shared_bytes_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
    out->shared_bytes_per_multiprocessor = static_cast<int64_t>(properties.sharedMemPerMultiprocessor);
    out->l2_bytes = properties.l2CacheSize;
    out->global_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    return true;
}

RowLimits current_row_limits() {
    int device = 0, major = 0, per_block = 0, per_multiprocessor = 0;
    cudaError_t error = cudaGetDevice(&device);
    const auto read = [&](cudaDeviceAttr attribute, int* value) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
    };
    read(cudaDevAttrComputeCapabilityMajor, &major);
    read(cudaDevAttrMaxSharedMemoryPerBlockOptin, &per_block);
    read(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &per_multiprocessor);
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("fastft: no CUDA device: ") + cudaGetErrorString(error));
    return row_limits(major, per_block, per_multiprocessor);
}

int launch_configurations(LaunchConfiguration* out, int capacity) {
    const bool device = device_count() > 0;
    const RowLimits limits = device ? current_row_limits() : RowLimits{1, 0, 0};
    const KernelEntry kernels[] = {log_softmax_kl_entry(limits),
                                   log_softmax_kl_backward_entry(),
                                   topk_kl_entry(limits),
                                   cross_entropy_entry(limits),
                                   index_check_entry(),
                                   relu_entry(),
                                   relu_backward_entry(),
                                   rms_norm_entry(),
                                   rms_norm_backward_entry(),
                                   rms_norm_dweight_entry(),
                                   rotary_entry(),
                                   swiglu_entry(),
                                   swiglu_backward_entry(),
                                   row_reduce_entry(),
                                   adamw_norm_entry(),
                                   adamw_update_entry(),
                                   adamw_update_8bit_entry(),
                                   dequantise_4bit_entry(),
                                   dequantise_8bit_entry(),
                                   lora_down_entry(),
                                   lora_outer_entry(),
                                   lora_down_outer_entry(),
                                   lora_combine_entry(),
                                   lora_up_entry()};
    int n = 0;
    for (const KernelEntry& kernel : kernels) {
        if (n == capacity) break;
        LaunchConfiguration configuration{
            kernel.name, kernel.launch.blocks, kernel.launch.threads, 0, 0, kernel.launch.shared_bytes, 0};
        cudaFuncAttributes attributes;
        if (device && cudaFuncGetAttributes(&attributes, kernel.function) == cudaSuccess) {
            configuration.registers = attributes.numRegs;
            cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kernel.launch.shared_bytes));
            configuration.static_shared_bytes = static_cast<int>(attributes.sharedSizeBytes);
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&configuration.blocks_per_multiprocessor,
                                                          kernel.function, kernel.launch.threads,
                                                          static_cast<size_t>(kernel.launch.shared_bytes));
        }
        cudaGetLastError();
        out[n++] = configuration;
    }
    return n;
}

}  // namespace fastft
