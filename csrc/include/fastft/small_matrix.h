// A matrix that kernels bring into an order of their own before they multiply with it.
#pragma once

#include <cstdint>

namespace fastft {

// Element (i, j) at data[i * stride_0 + j * stride_1].
struct SmallMatrix {
    void* data;
    int64_t stride_0, stride_1;
};

}  // namespace fastft
