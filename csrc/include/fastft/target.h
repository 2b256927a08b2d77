// Marks for code that is compiled several times: for the host, for each CPU capability, and for the device.
#pragma once

#ifdef __CUDACC__
#define FASTFT_HD __host__ __device__ __forceinline__
#else
#define FASTFT_HD inline
#endif

// Every translation unit that is compiled with its own instruction set names a target, and all shared
// templates live in an inline namespace of that name. Without it the linker would merge the AVX-512 and
// the baseline instance of one template, and an older machine would meet an illegal instruction.
#ifndef FASTFT_TARGET
#ifdef __CUDACC__
#define FASTFT_TARGET cuda
#else
#define FASTFT_TARGET host
#endif
#endif
