// The little that the host code needs of CUDA's devices.
#pragma once

namespace fastft {

// Makes `device` the calling thread's current device and returns the one before. Throws on an error.
int exchange_cuda_device(int device);

}  // namespace fastft
