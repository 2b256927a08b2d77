// Memory that a call needs while it runs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastft {

constexpr int64_t kLine = 64;  // bytes

// Bytes from the start of a cache line. A thread keeps what is small enough for its next call: to fault fresh
// pages in costs more than what a small kernel does with them (attention's backward over 300 tokens, 9 heads:
// three times as much). One of a thread at a time.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) {
        thread_local Kept kept;
        if (bytes > kMostKept) {
            own_ = allocate(bytes);
        } else if (bytes > kept.bytes) {
            kept.data = allocate(bytes);
            kept.bytes = bytes;
        }
        data_ = own_ ? own_.get() : kept.data.get();
    }
    char* data() const { return data_; }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    using Block = std::unique_ptr<char, Free>;
    struct Kept {
        Block data;
        int64_t bytes = 0;
    };
    static constexpr int64_t kMostKept = int64_t(16) << 20;

    static Block allocate(int64_t bytes) {
        const size_t whole = static_cast<size_t>((bytes + kLine - 1) / kLine * kLine);
        Block block(static_cast<char*>(std::aligned_alloc(kLine, whole)));
        if (!block) throw std::bad_alloc();
        return block;
    }

    Block own_;
    char* data_;
};

}  // namespace fastft
