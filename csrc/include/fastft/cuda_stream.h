// cudaStream_t without CUDA's headers, which a CPU-only build does not have. The typedef is CUDA's own, and
// C++ allows a typedef to be repeated.
#pragma once

typedef struct CUstream_st* cudaStream_t;
