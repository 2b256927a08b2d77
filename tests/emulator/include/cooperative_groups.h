#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {
struct Cluster {
    void sync() const { emulator::cluster_barrier(); }
    template <class T>
    T* map_shared_rank(T* own, unsigned rank) const {
        return static_cast<T*>(emulator::shared_of(own, rank));
    }
};
inline Cluster this_cluster() { return {}; }
}  // namespace cooperative_groups
