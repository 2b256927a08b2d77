// index_check: looks for ids outside [0, vocab). The first that is found is written into a record in memory
// of the host, where it can be read at any time without waiting for the device.
#pragma once

#include <cstdint>

#include "fastft/cuda_stream.h"

namespace fastft {

struct IndexRecord {
    enum State : int64_t { kEmpty, kBeingWritten, kWritten };
    int64_t state;  // the host empties a written record, and does nothing to it else
    int64_t source, row, id, vocab, ignore;
};

struct IndexCheckArgs {
    const int64_t* index;  // [count], `columns` to a row
    int64_t count, columns;
    int64_t vocab, ignore;  // what is allowed: 0 <= id < vocab, or id == ignore
    int64_t source;         // whose index it is: a number for the record
    IndexRecord* record;    // CUDA: pinned, of this device alone
};

void index_check_cpu(const IndexCheckArgs& args);
void index_check_cuda(const IndexCheckArgs& args, cudaStream_t stream);

}  // namespace fastft
