// Runs CUDA kernels on the CPU, one fiber a thread, and watches every access to memory they make.
//
// The kernels are compiled with -fsanitize=thread,... but linked without a sanitizer's library: the calls
// that the compiler puts before every access come here. Each byte of shared memory and of the buffers that a
// test has named remembers who wrote and who read it last, and at which barrier. So a mistake is found where
// it is made, whatever the order of threads:
//   - an access outside the buffers, outside the shared memory asked for, or not aligned as its type;
//   - a read of shared memory, or of a buffer meant for output, that nothing has written;
//   - two accesses to a byte, one of them a write, by threads that no barrier orders (within a warp, a block,
//   a
//     cluster, or a grid, where only a fence before an atomic and the block that comes later order anything);
//   - a barrier that some threads do not reach, and a copy that is not waited for;
//   - shared memory of a block of the cluster that has ended.
// What CUDA leaves open is chosen by the test: the order in which threads and blocks run, by a seed.
//
// Not emulated: time, caches, registers, launch bounds, the last bits of approximate instructions.
#include <cuda_runtime.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "common.cuh"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastft {
inline namespace FASTFT_TARGET {
constexpr size_t kMostShared = 256 * 1024;
alignas(128) thread_local char dynamic_shared[kMostShared];
}  // namespace FASTFT_TARGET
}  // namespace fastft

namespace {

using fastft::dynamic_shared;
using fastft::kMostShared;

constexpr size_t kStack = 128 * 1024;
constexpr int kWarpSize = 32;

// An access of the past. thread, warp and block count through the grid; kMany: more than one of them.
constexpr int kMany = -1;
struct Access {
    uint32_t serial = 0;  // of the launch, or of the cluster for shared memory; any other: none
    int thread = 0, warp = 0, block = 0, cluster = 0;
    uint16_t block_epoch = 0, warp_epoch = 0, cluster_epoch = 0;  // barriers passed before
};
struct Cell {
    Access write, read;
};

// What a test has named.
struct Region {
    uintptr_t begin, end;
    std::string name;
    bool writable;
    std::vector<bool> unwritten;  // of output
    std::vector<Cell> cells;
};

struct Copy {
    char* shared;
    const char* global;
    size_t bytes, zeros;
};

struct Barrier {
    const char* kind = nullptr;
    int expected = 0;
    std::vector<int> waiting;  // fibers
    void* brought[1024] = {};
    uint16_t epoch = 0;
};

enum class State { Ready, Waiting, Done };
struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started = false;
    State state = State::Done;
    int block = 0, thread = 0;  // rank in the cluster, index in the block
    int fenced_epoch = kMany;   // block's epoch at the last __threadfence
    Barrier* at = nullptr;
    uint3 index = {};
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

struct Block {
    int id = 0;
    uint3 index = {};
    int running = 0;  // threads
    std::vector<int> ready;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::map<int, std::pair<int, int>>
        acquired;  // of other blocks: epoch up to which, and the thread that told
};

struct Device {
    int major;
    int64_t shared_per_block, shared_per_multiprocessor;
};

template <class T>
T* reserve(size_t count) {
    void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return static_cast<T*>(p);
}

constexpr int kMostBlocks = 8, kMostFibers = kMostBlocks * 1024;

std::vector<Region> regions;  // in the order of their addresses
std::vector<Device> devices{{9, 232448, 233472}};
int device = 0;
std::map<std::pair<const void*, int>, size_t> allowed_shared;
std::string error;
bool running = false;
uint32_t serial = 0, cluster_serial = 0;
uint64_t order_seed = 0, random_state = 1;

char* stacks = nullptr;
std::vector<Fiber> fibers;
std::vector<Block> blocks;
Barrier cluster;
int current = 0, threads = 0, loaded = 0, cluster_id = 0;
const emulator::Launch* job = nullptr;
jmp_buf scheduler;
// An atomic's history: what each block had done before its last fence.
std::map<int, std::pair<int, int>> released;

// This library, and its thread_local variables, which are the kernels' shared memory.
uintptr_t image_begin = 0, image_end = 0;
char* shared = nullptr;
size_t shared_size = 0;
char* saved = nullptr;  // of each block of the cluster that is not the one running
Cell* shared_cells = nullptr;

uint64_t random_number() {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return random_state >> 33;
}

// The next one of n in a launch's order: first to last, last to first, or any.
size_t choose(size_t n) { return order_seed == 0 ? 0 : order_seed == 1 ? n - 1 : random_number() % n; }

int find_image(dl_phdr_info* info, size_t, void*) {
    uintptr_t begin = UINTPTR_MAX, end = 0;
    size_t tls = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type == PT_LOAD) {
            begin = std::min<uintptr_t>(begin, info->dlpi_addr + part.p_vaddr);
            end = std::max<uintptr_t>(end, info->dlpi_addr + part.p_vaddr + part.p_memsz);
        }
        if (part.p_type == PT_TLS) tls = part.p_memsz;
    }
    const uintptr_t here = reinterpret_cast<uintptr_t>(&find_image);
    if (here < begin || here >= end) return 0;
    image_begin = begin;
    image_end = end;
    shared = static_cast<char*>(info->dlpi_tls_data);
    shared_size = tls;
    return 1;
}

void prepare() {
    dynamic_shared[0] = 0;  // now this thread has its thread_local variables
    dl_iterate_phdr(&find_image, nullptr);
    if (!stacks) {
        stacks = reserve<char>(kMostFibers * kStack);
        fibers.resize(kMostFibers);
        saved = reserve<char>(kMostBlocks * shared_size);
        shared_cells = reserve<Cell>(kMostBlocks * shared_size);
    }
}

// f(offset, size) for the parts of shared memory in use.
template <class F>
void for_shared(F&& f) {
    const size_t dynamic = static_cast<size_t>(dynamic_shared - shared);
    f(size_t(0), dynamic);
    f(dynamic, job->shared_bytes);
    f(dynamic + kMostShared, shared_size - dynamic - kMostShared);
}

void load_block(int block) {
    if (block == loaded) return;
    for_shared([&](size_t offset, size_t size) {
        memcpy(saved + loaded * shared_size + offset, shared + offset, size);
        memcpy(shared + offset, saved + block * shared_size + offset, size);
    });
    loaded = block;
}

// --- Errors ------------------------------------------------------------------------------------------------

std::string who(int fiber) {
    const Fiber& f = fibers[fiber];
    return "thread " + std::to_string(f.thread) + " of block " + std::to_string(blocks[f.block].id);
}

// While it lives nothing is watched: the emulator itself is at work. Not all of it is compiled without the
// calls: of a template that kernels use as well, the linker keeps one copy.
class Pause {
  public:
    Pause() : before_(running) { running = false; }
    ~Pause() { running = before_; }

  private:
    bool before_;
};

[[noreturn]] void give_up(const std::string& message, const void* code = nullptr) {
    error = who(current) + " " + message;
    if (code) {
        char where[40];
        snprintf(where, sizeof(where), " [+0x%zx]", reinterpret_cast<uintptr_t>(code) - image_begin - 1);
        error += where;
    }
    _longjmp(scheduler, 2);
}

// --- Memory ------------------------------------------------------------------------------------------------

int warps_of_block() { return (threads + kWarpSize - 1) / kWarpSize; }

Access this_access(uint32_t of) {
    const Fiber& f = fibers[current];
    const Block& b = blocks[f.block];
    Access a;
    a.serial = of;
    a.thread = b.id * threads + f.thread;
    a.warp = b.id * warps_of_block() + f.thread / kWarpSize;
    a.block = b.id;
    a.cluster = cluster_id;
    a.block_epoch = b.barrier.epoch;
    a.warp_epoch = b.warps[f.thread / kWarpSize].epoch;
    a.cluster_epoch = cluster.epoch;
    return a;
}

// Whether everything in `a` happened before what `now` does.
bool ordered(const Access& a, const Access& now) {
    if (a.serial != now.serial || a.thread == now.thread) return true;
    if (a.block == now.block && now.block_epoch > a.block_epoch) return true;
    if (a.warp == now.warp && now.warp_epoch > a.warp_epoch) return true;
    if (a.cluster == now.cluster && now.cluster_epoch > a.cluster_epoch) return true;
    const auto& acquired = blocks[fibers[current].block].acquired;
    if (a.block == kMany)
        return a.cluster == kMany && acquired.size() + 1 == gridDim.x * gridDim.y * gridDim.z;
    const auto found = acquired.find(a.block);
    return found != acquired.end() &&
           (a.block_epoch < found->second.first || a.thread == found->second.second);
}

void touch(Cell& cell, const Access& now, bool write, const std::string& what, const void* code) {
    const auto race = [&](const char* did, const Access& a) {
        const std::string other = a.thread == kMany ? "several threads"
                                                    : "thread " + std::to_string(a.thread % threads) +
                                                          " of block " + std::to_string(a.block);
        give_up(std::string(write ? "writes " : "reads ") + what + ", which " + other + " " + did +
                    " with no barrier in between",
                code);
    };
    if (!ordered(cell.write, now)) race("wrote", cell.write);
    if (write) {
        if (!ordered(cell.read, now)) race("read", cell.read);
        cell.write = now;
        cell.read.serial = 0;
    } else if (cell.read.serial != now.serial || ordered(cell.read, now)) {
        cell.read = now;
    } else {
        Access& a = cell.read;
        if (a.thread != now.thread) a.thread = kMany;
        if (a.warp != now.warp) a.warp = kMany;
        if (a.block != now.block) a.block = kMany;
        if (a.cluster != now.cluster) a.cluster = kMany;
        a.block_epoch = std::max(a.block_epoch, now.block_epoch);
        a.warp_epoch = std::max(a.warp_epoch, now.warp_epoch);
        a.cluster_epoch = std::max(a.cluster_epoch, now.cluster_epoch);
    }
}

std::string hex(uintptr_t p) {
    char text[24];
    snprintf(text, sizeof(text), "0x%zx", p);
    return text;
}

void access_shared(int block, size_t offset, size_t size, bool write, const void* code) {
    const size_t dynamic = static_cast<size_t>(dynamic_shared - shared);
    if (offset + size > dynamic && offset < dynamic + kMostShared &&
        (offset < dynamic || offset + size > dynamic + job->shared_bytes)) {
        give_up(std::string(write ? "writes " : "reads ") + std::to_string(size) +
                    " bytes of shared memory at " + std::to_string(static_cast<int64_t>(offset - dynamic)) +
                    ", outside the " + std::to_string(job->shared_bytes) + " that the launch asked for",
                code);
    }
    if (blocks[block].running == 0) give_up("accesses shared memory of a block that has ended", code);
    const Access now = this_access(cluster_serial);
    Cell* cells = shared_cells + block * shared_size + offset;
    for (size_t i = 0; i < size; ++i) {
        if (!write && cells[i].write.serial != cluster_serial)
            give_up("reads shared memory that nothing has written", code);
        touch(cells[i], now, write, "a byte of shared memory", code);
    }
}

void access(const void* address, size_t size, bool write, const void* code) {
    const uintptr_t p = reinterpret_cast<uintptr_t>(address);
    const auto offset_in = [&](const void* begin) { return p - reinterpret_cast<uintptr_t>(begin); };
    if (offset_in(stacks) < kMostFibers * kStack) return;
    if (offset_in(shared) < shared_size)
        return access_shared(fibers[current].block, offset_in(shared), size, write, code);
    if (offset_in(saved) < kMostBlocks * shared_size)
        return access_shared(static_cast<int>(offset_in(saved) / shared_size), offset_in(saved) % shared_size,
                             size, write, code);
    if (!write && offset_in(job->parameters) < job->parameter_bytes) return;
    if (!write && p >= image_begin && p < image_end) return;  // threadIdx, constants
    // The first region behind p, and the one before that.
    auto next = std::upper_bound(regions.begin(), regions.end(), p,
                                 [](uintptr_t x, const Region& region) { return x < region.begin; });
    const std::string did = (write ? "writes " : "reads ") + std::to_string(size) + " bytes at " + hex(p);
    if (next == regions.begin()) give_up(did + ", before all buffers", code);
    Region& region = *(next - 1);
    if (p + size > region.end) {
        give_up(
            did + ", " + std::to_string(p + size - region.end) + " bytes beyond the end of " + region.name,
            code);
    }
    if (write && !region.writable) give_up("writes to " + region.name + ", which is input", code);
    const Access now = this_access(serial);
    const size_t first = p - region.begin;
    for (size_t i = first; i < first + size; ++i) {
        if (!region.unwritten.empty()) {
            if (!write && region.unwritten[i])
                give_up("reads from " + region.name + " what nothing has written", code);
            region.unwritten[i] = false;
        }
        touch(region.cells[i], now, write, "byte " + std::to_string(i) + " of " + region.name, code);
    }
}

void watch(const void* address, size_t size, bool write, const void* code) {
    const Pause pause;
    access(address, size, write, code);
}

// --- Fibers ------------------------------------------------------------------------------------------------

void enter(int index) {
    for (;;) {
        running = true;
        job->run(job->parameters);
        running = false;
        Fiber& f = fibers[index];
        for (const auto& group : f.groups) {
            if (!group.empty()) give_up("ends before a copy it has started was waited for");
        }
        if (!f.open.empty()) give_up("ends before a copy it has started was waited for");
        f.groups.clear();
        f.state = State::Done;
        if (_setjmp(f.resume) == 0) _longjmp(scheduler, 1);
    }
}

void suspend() {
    if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

// Returns when the fiber suspends or ends; false where the launch has failed.
bool resume(int index) {
    Fiber& f = fibers[index];
    current = index;
    load_block(f.block);
    threadIdx = f.index;
    blockIdx = blocks[f.block].index;
    const int back = _setjmp(scheduler);
    if (back == 0) {
        if (f.started) _longjmp(f.resume, 1);
        f.started = true;
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = stacks + index * kStack;
        f.start.uc_stack.ss_size = kStack;
        f.start.uc_link = nullptr;
        makecontext(&f.start, reinterpret_cast<void (*)()>(&enter), 1, index);
        setcontext(&f.start);
    }
    return back == 1;
}

void arrive(Barrier& barrier, const char* kind, int index, void* mine, emulator::Action action,
            bool orders_memory) {
    if (barrier.waiting.empty()) barrier.kind = kind;
    if (strcmp(barrier.kind, kind) != 0)
        give_up(std::string("is at ") + kind + " while " + who(barrier.waiting[0]) + " is at " +
                barrier.kind);
    Fiber& f = fibers[current];
    barrier.waiting.push_back(current);
    barrier.brought[index] = mine;
    f.state = State::Waiting;
    f.at = &barrier;
    if (static_cast<int>(barrier.waiting.size()) == barrier.expected) {
        if (action) action(barrier.brought, barrier.expected);
        if (orders_memory && ++barrier.epoch == UINT16_MAX) give_up("passes too many barriers");
        for (int i : barrier.waiting) {
            fibers[i].state = State::Ready;
            blocks[fibers[i].block].ready.push_back(i);
        }
        barrier.waiting.clear();
    }
    suspend();
}

// What an atomic changes (bounds alone: atomics do not race with each other) and what it orders.
void meet_atomics(const void* address, size_t size) {
    const Fiber& f = fibers[current];
    Block& block = blocks[f.block];
    const uintptr_t p = reinterpret_cast<uintptr_t>(address);
    bool inside = false;
    for (const Region& region : regions)
        inside |= p >= region.begin && p + size <= region.end && region.writable;
    if (!inside) give_up("has an atomic at " + hex(p) + ", outside all buffers");
    if (f.fenced_epoch != kMany) released[block.id] = {f.fenced_epoch, block.id * threads + f.thread};
    for (const auto& other : released) {
        if (other.first != block.id) block.acquired[other.first] = other.second;
    }
}

bool run_cluster(const emulator::Launch& launch, int first_block) {
    const int size = static_cast<int>(launch.cluster);
    ++cluster_serial;
    cluster_id = first_block / size;
    cluster = Barrier();
    cluster.expected = size * threads;
    blocks.assign(size, Block());
    loaded = 0;
    for (int b = 0; b < size; ++b) {
        Block& block = blocks[b];
        block.id = first_block + b;
        const unsigned id = static_cast<unsigned>(block.id);
        block.index = {id % gridDim.x, id / gridDim.x % gridDim.y, id / gridDim.x / gridDim.y};
        block.running = threads;
        block.barrier.expected = threads;
        block.warps.resize(warps_of_block());
        for (int w = 0; w < warps_of_block(); ++w)
            block.warps[w].expected = std::min(kWarpSize, threads - w * kWarpSize);
        // What is left there from before is nobody's: NaN in every floating type, -1 in integers.
        for_shared([&](size_t offset, size_t bytes) {
            memset((b == 0 ? shared : saved + b * shared_size) + offset, 0xff, bytes);
        });
        for (int t = 0; t < threads; ++t) {
            const int index = b * threads + t;
            Fiber& f = fibers[index];
            const unsigned i = static_cast<unsigned>(t);
            f.state = State::Ready;
            f.block = b;
            f.thread = t;
            f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
            f.fenced_epoch = kMany;
            f.groups.clear();
            f.open.clear();
            block.ready.push_back(index);
        }
    }
    int left = size * threads;
    while (left > 0) {
        std::vector<int> able;
        for (int b = 0; b < size; ++b) {
            if (!blocks[b].ready.empty()) able.push_back(b);
        }
        if (able.empty()) {
            for (int i = 0; i < size * threads; ++i) {
                if (fibers[i].state != State::Waiting) continue;
                current = i;
                error =
                    who(i) + " waits at " + fibers[i].at->kind + " for " +
                    std::to_string(fibers[i].at->expected - static_cast<int>(fibers[i].at->waiting.size())) +
                    " threads that never come";
                return false;
            }
        }
        Block& block = blocks[able[choose(able.size())]];
        while (!block.ready.empty()) {
            const size_t n = choose(block.ready.size());
            const int index = block.ready[n];
            block.ready.erase(block.ready.begin() + static_cast<std::ptrdiff_t>(n));
            if (!resume(index)) return false;
            if (fibers[index].state == State::Done) {
                --block.running;
                --left;
            }
        }
    }
    return true;
}

}  // namespace

namespace emulator {

void fail(const char* message) {
    const Pause pause;
    give_up(message, __builtin_return_address(0));
}

void block_barrier(void* mine, Action action) {
    const Pause pause;
    const Fiber& f = fibers[current];
    arrive(blocks[f.block].barrier, action ? "__syncthreads_or" : "__syncthreads", f.thread, mine, action,
           true);
}

void warp_barrier(unsigned lanes, const char* name, void* mine, Action action, bool orders_memory) {
    const Pause pause;
    const Fiber& f = fibers[current];
    Barrier& warp = blocks[f.block].warps[f.thread / kWarpSize];
    const unsigned all = warp.expected == kWarpSize ? 0xffffffffu : (1u << warp.expected) - 1;
    if ((lanes & all) != all)
        give_up(std::string("calls ") + name + " for a part of its warp, which is not emulated");
    arrive(warp, name, f.thread % kWarpSize, mine, action, orders_memory);
}

void cluster_barrier() {
    const Pause pause;
    arrive(cluster, "cluster.sync", 0, nullptr, nullptr, true);
}

void fence() {
    const Pause pause;
    fibers[current].fenced_epoch = blocks[fibers[current].block].barrier.epoch;
}

int atomic_add(int* address, int value) {
    const Pause pause;
    meet_atomics(address, sizeof(*address));
    const int before = *address;
    *address = before + value;
    return before;
}

unsigned long long atomic_cas(unsigned long long* address, unsigned long long expected,
                              unsigned long long value) {
    const Pause pause;
    meet_atomics(address, sizeof(*address));
    const unsigned long long before = *address;
    if (before == expected) *address = value;
    return before;
}

void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
    const Pause pause;
    const void* code = __builtin_return_address(0);
    if (bytes != 4 && bytes != 8 && bytes != 16) give_up("copies neither 4, 8 nor 16 bytes", code);
    if (zeros > bytes) give_up("copies fewer than no bytes", code);
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0)
        give_up("copies from or to an address that is not a multiple of the size", code);
    if (zeros < bytes) access(from, bytes - zeros, false, code);
    access(to, bytes, true, code);
    memset(to, 0xff, bytes);
    fibers[current].open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, zeros});
}

void copy_commit() {
    const Pause pause;
    Fiber& f = fibers[current];
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}

void copy_wait(size_t groups_left) {
    const Pause pause;
    const void* code = __builtin_return_address(0);
    auto& groups = fibers[current].groups;
    while (groups.size() > groups_left) {
        for (const Copy& copy : groups[0]) {
            if (copy.zeros < copy.bytes) access(copy.global, copy.bytes - copy.zeros, false, code);
            access(copy.shared, copy.bytes, true, code);
            memcpy(copy.shared, copy.global, copy.bytes - copy.zeros);
            memset(copy.shared + copy.bytes - copy.zeros, 0, copy.zeros);
        }
        groups.erase(groups.begin());
    }
}

void* shared_of(void* own, unsigned rank) {
    const Pause pause;
    if (rank >= blocks.size()) give_up("asks for a block that its cluster does not have");
    const size_t offset = static_cast<size_t>(static_cast<char*>(own) - shared);
    if (offset >= shared_size) give_up("maps an address that is not in shared memory");
    return static_cast<int>(rank) == fibers[current].block ? own : saved + rank * shared_size + offset;
}

cudaError_t launch(const Launch& launch) {
    error.clear();
    const Device& limits = devices[device];
    const auto found = allowed_shared.find({launch.kernel, device});
    const size_t most_shared = found == allowed_shared.end() ? 48 * 1024 : found->second;
    const uint64_t count = uint64_t(launch.block.x) * launch.block.y * launch.block.z;
    const uint64_t grid = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (count == 0 || count > 1024 || launch.block.z > 64)
        error = "bad number of threads " + std::to_string(count);
    if (grid == 0 || grid > INT32_MAX || launch.grid.y > 65535 || launch.grid.z > 65535) error = "bad grid";
    if (launch.cluster > kMostBlocks || (launch.cluster > 1 && limits.major < 9) ||
        launch.grid.x % launch.cluster)
        error = "bad cluster of " + std::to_string(launch.cluster) + " blocks";
    if (launch.shared_bytes > most_shared ||
        launch.shared_bytes > static_cast<size_t>(limits.shared_per_block))
        error = std::to_string(launch.shared_bytes) + " bytes of shared memory, more than was asked for";
    if (launch.parameter_bytes > 32764) error = "too many bytes of parameters";
    if (!error.empty()) return cudaErrorLaunchFailure;

    prepare();
    job = &launch;
    gridDim = launch.grid;
    blockDim = launch.block;
    threads = static_cast<int>(count);
    ++serial;
    released.clear();
    random_state = order_seed;
    std::vector<int> firsts;
    for (uint64_t b = 0; b < grid; b += launch.cluster) firsts.push_back(static_cast<int>(b));
    while (!firsts.empty()) {
        const size_t n = choose(firsts.size());
        const int first = firsts[n];
        firsts.erase(firsts.begin() + static_cast<std::ptrdiff_t>(n));
        if (!run_cluster(launch, first)) {
            for (Fiber& f : fibers) f.started = false;  // they stand in the middle of the kernel
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

}  // namespace emulator

// --- What csrc asks of the driver
// ----------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return error.c_str(); }
cudaError_t cudaGetDevice(int* out) {
    *out = device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {};
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const Device& d = devices[device];
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? d.major
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin
                 ? static_cast<int>(d.shared_per_block)
                 : static_cast<int>(d.shared_per_multiprocessor);
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
        allowed_shared[{kernel, device}] = static_cast<size_t>(value);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    *blocks = 0;
    return cudaSuccess;
}

// --- What tests ask
// ------------------------------------------------------------------------------------------

#define FASTFT_EMULATOR extern "C" __attribute__((visibility("default")))

FASTFT_EMULATOR void emulator_device(int major, int64_t shared_per_block, int64_t shared_per_multiprocessor) {
    for (size_t i = 0; i < devices.size(); ++i) {
        const Device& d = devices[i];
        if (d.major == major && d.shared_per_block == shared_per_block &&
            d.shared_per_multiprocessor == shared_per_multiprocessor) {
            device = static_cast<int>(i);
            return;
        }
    }
    // Each its own: a launcher remembers for which devices it has asked for shared memory.
    device = static_cast<int>(devices.size());
    devices.push_back({major, shared_per_block, shared_per_multiprocessor});
}

// 0: threads and blocks first to last; 1: last to first; else any order.
FASTFT_EMULATOR void emulator_order(uint64_t seed) { order_seed = seed; }

FASTFT_EMULATOR void emulator_forget() { regions.clear(); }

FASTFT_EMULATOR void emulator_buffer(const char* name, uintptr_t begin, size_t bytes, int writable,
                                     int unwritten) {
    Region region{begin, begin + bytes, name, writable != 0, {}, std::vector<Cell>(bytes)};
    if (unwritten) region.unwritten.assign(bytes, true);
    regions.insert(std::upper_bound(regions.begin(), regions.end(), begin,
                                    [](uintptr_t x, const Region& other) { return x < other.begin; }),
                   std::move(region));
}

// --- Where the compiler's calls come in
// ----------------------------------------------------------------------

#define FASTFT_WATCH(name, size, write)                                  \
    extern "C" void __tsan_##name(void* p) {                             \
        if (running) watch(p, size, write, __builtin_return_address(0)); \
    }
FASTFT_WATCH(read1, 1, false)
FASTFT_WATCH(read2, 2, false)
FASTFT_WATCH(read4, 4, false)
FASTFT_WATCH(read8, 8, false)
FASTFT_WATCH(read16, 16, false)
FASTFT_WATCH(write1, 1, true)
FASTFT_WATCH(write2, 2, true)
FASTFT_WATCH(write4, 4, true)
FASTFT_WATCH(write8, 8, true)
FASTFT_WATCH(write16, 16, true)
FASTFT_WATCH(unaligned_read2, 2, false)
FASTFT_WATCH(unaligned_read4, 4, false)
FASTFT_WATCH(unaligned_read8, 8, false)
FASTFT_WATCH(unaligned_read16, 16, false)
FASTFT_WATCH(unaligned_write2, 2, true)
FASTFT_WATCH(unaligned_write4, 4, true)
FASTFT_WATCH(unaligned_write8, 8, true)
FASTFT_WATCH(unaligned_write16, 16, true)
extern "C" void __tsan_read_range(void* p, size_t size) {
    if (running) watch(p, size, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t size) {
    if (running) watch(p, size, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
// Of launchers, which run alone.
extern "C" uint8_t __tsan_atomic8_load(const uint8_t* p, int) { return *p; }
extern "C" uint64_t __tsan_atomic64_load(const uint64_t* p, int) { return *p; }
extern "C" uint64_t __tsan_atomic64_fetch_or(uint64_t* p, uint64_t bits, int) {
    const uint64_t before = *p;
    *p |= bits;
    return before;
}
extern "C" int __tsan_atomic32_fetch_add(int* p, int value, int) {
    const int before = *p;
    *p += value;
    return before;
}

// The undefined-behaviour sanitizer's. Their first argument begins with the place in the source.
struct Place {
    const char* file;
    uint32_t line, column;
};
#define FASTFT_UNDEFINED(name, message)                                            \
    extern "C" void __ubsan_handle_##name(Place* at, ...) {                        \
        if (!running) return;                                                      \
        const Pause pause;                                                         \
        const char* file = strrchr(at->file, '/');                                 \
        give_up(std::string(message " at ") + (file ? file + 1 : at->file) + ":" + \
                std::to_string(at->line));                                         \
    }
FASTFT_UNDEFINED(type_mismatch_v1, "uses an address that is null or not aligned for its type")
FASTFT_UNDEFINED(out_of_bounds, "indexes an array beyond its end")
FASTFT_UNDEFINED(shift_out_of_bounds, "shifts by too much")
FASTFT_UNDEFINED(add_overflow, "overflows an addition")
FASTFT_UNDEFINED(sub_overflow, "overflows a subtraction")
FASTFT_UNDEFINED(mul_overflow, "overflows a product")
FASTFT_UNDEFINED(negate_overflow, "overflows a negation")
FASTFT_UNDEFINED(divrem_overflow, "divides by 0")
FASTFT_UNDEFINED(float_cast_overflow, "converts a number that its integer type does not have")
