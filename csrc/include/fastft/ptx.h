// The machine instructions that CUDA has no function for; device code only. All of this project's inline
// assembly is here, so that tests/emulator can put functions in its place.
#pragma once

namespace fastft {

__device__ __forceinline__ float ptx_max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

__device__ __forceinline__ float ptx_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes to shared memory behind the thread's back: `bytes` of them from `source`, then zeros.
__device__ __forceinline__ void ptx_copy_async(void* target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(target))),
                 "l"(source), "r"(bytes)
                 : "memory");
}

}  // namespace fastft
