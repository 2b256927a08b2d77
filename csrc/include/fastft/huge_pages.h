// A hint about large new buffers.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastft {

// Asks for huge pages under a large new CPU tensor. Its pages are all touched for the first time by the
// kernel that follows, and at 4 KiB a fault that costs more than the kernel itself. Only a hint, where the
// system lets a process ask (transparent_hugepage = madvise).
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = uintptr_t(2) << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
    if (end > begin + 4 * page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace fastft
