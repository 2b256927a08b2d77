// Copies that arrive when they are waited for, and no earlier.
#pragma once

#include <cuda_runtime.h>

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zeros = 0) {
    emulator::copy_async(shared, global, bytes, zeros);
}
inline void __pipeline_commit() { emulator::copy_commit(); }
inline void __pipeline_wait_prior(size_t groups) { emulator::copy_wait(groups); }
