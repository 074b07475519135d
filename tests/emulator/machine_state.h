// What the emulated machine remembers: shared by machine.cpp and machine_sm90.cpp.
#pragma once
#include <array>
#include <bitset>
#include <csetjmp>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "machine_sm90.h"

namespace emulator {

constexpr int max_threads = 1024;
constexpr int max_warps = max_threads / 32;
constexpr int max_barriers = 16;
constexpr int max_mbarriers = 128;
constexpr int max_storers = 32;  // threads of a block that issue store_box
constexpr size_t stack_bytes = 256 * 1024;
constexpr size_t max_shared = 227 * 1024;
constexpr size_t shared_margin = 256 * 1024;  // address space around shared memory, to recognise near misses
constexpr unsigned char poison = 0xFF;

// A line of the kernel's source, or (file null) an address in its code.
struct Where {
    const char* file = nullptr;
    uintptr_t line = 0;
    Where() = default;
    Where(Site site) : file(site.file), line(uintptr_t(site.line)) {}
    explicit Where(void* code) : line(reinterpret_cast<uintptr_t>(code)) {}
};

// ---- time ---------------------------------------------------------------------------------------------------------
// What happens is stamped with the time of who does it: the clock of a thread's warp; phases of an mbarrier, which
// stands for the loads that count towards it; groups of a warp's products or of a thread's stores. All count from 1 and
// are never set back, so 0 is before everything. A thread knows of everybody the time before which what they did is
// ordered before what it does. These are vectors over threads, mbarriers, warps (products), storing threads, and the
// previous kernel.

using Time = uint32_t;
constexpr int max_agents = max_mbarriers + max_warps + max_storers + 1;
using Times = std::array<Time, max_threads + max_agents>;

// ---- threads ------------------------------------------------------------------------------------------------------

struct Copy {
    unsigned char* shared;
    const void* global;
    int bytes;
    bool valid;
    uint64_t group;
    Where where;
};

struct Store {
    TensorMap map;
    int at[4];
    float* floats;  // null for a box
    bool add;       // to what is there
    uint32_t from;  // offset in shared memory
    int size;
    Time group;
    Where where;
    std::vector<unsigned char> read{};
};

struct Fiber {
    bool done;
    const char* waits_at;  // null while it can run
    int waits_for;         // mbarrier, or -1
    uint32_t parity;
    Site site;
    std::vector<Copy> copies;
    uint64_t group;              // number of groups of copies committed so far
    std::vector<Store> stores;   // that still read shared memory
    std::vector<Store> written;  // that do not, but global memory does not have it all yet
    int storer;                  // -1 before the first store
    Time store_group;            // the one that the next store belongs to
    std::vector<Time> fences;
    size_t products;      // issued so far
    Time product_group;   // the one that the next product belongs to
    bool product_fenced;  // since its last product_wait
    uint32_t fence;       // number of its last product_fence among all
    bool fenced_global;   // since its wait_for_previous_kernel
    std::vector<Time> global_fences;
    std::unique_ptr<Times> known_at_fence;  // the last one of global memory
};

struct Warp {
    uint32_t ready;
    int arrived;
    const char* name;
    Site site;
    void* operands[32];
};

struct Barrier {
    const char* name;
    Site site;
    int expected;
    int arrived = 0;  // and do not wait
    std::vector<int> waiting;
    std::bitset<max_threads> came;
    Times known;  // to those who do not wait
    int sum = 0, result = 0;
};

// ---- shared memory ------------------------------------------------------------------------------------------------

enum class Kind { read, write };

// What is remembered of each byte. What asynchronous instructions of compute capability 9.0 do is in Chunk.
struct Byte {
    Time write_time;
    uint32_t write_fences;  // how many fence_async() its writer had made before
    int16_t writer;
    bool in_flight;
    Where write_where, read_where;
    struct Read {
        Time time;
        uint32_t lanes;  // that read at this time
    } read[max_warps];
};

// Of each 16 bytes.
struct Chunk {
    uint64_t block;  // the rest is about this block
    bool touched;    // by plain accesses since the last load
    bool written;    // the same
    bool async;      // something else was here
    bool in_flight;
    uint8_t mbarrier[2];  // one more than its number
    uint32_t version;     // changes with every write
    struct {
        int agent, thread;
        Time time;
        Where where;
    } load, store;
    Where product_where;
    Time product[max_warps];      // group of the last product that reads it
    uint32_t checked[max_warps];  // version that the products of this warp may read, and one more
};

// Of 16 bytes of global memory.
struct GlobalWrite {
    uint64_t block;
    Time time;
    bool async;       // by a store
    uint32_t fences;  // how many fence_async_global() its writer had made before
    int thread;
    Where where;
};

struct Load {
    enum { box, bytes } kind;
    TensorMap map;
    int at[4];
    const unsigned char* from;
    uint32_t to;  // offset in shared memory
    int size, mbarrier, thread;
    Where where;
};

struct Mbarrier {
    uint32_t offset;
    int arrivals, pending;
    int64_t bytes;
    uint64_t phases;
    int maker;
    Time made;
    bool fenced;
    Where where;
    std::vector<int> waiting;
    Times arriving, completed;
    Time waited;  // what landed before that has been waited for
    Load last;    // that landed, and when
    Time last_landed;
};

// ---- products -----------------------------------------------------------------------------------------------------

// Of a warpgroup. Each of its warps carries out its part at its own product_wait.
struct Product {
    Site site;
    ProductOperands operands;
    int threads = 0;  // that have issued it
    int warps_done = 0;
    std::vector<uint32_t> a_chunks, b_chunks;  // offsets in shared memory
    bool loaded = false;
    std::vector<float> a;   // 64 x 16
    std::vector<double> b;  // 16 x columns
};

struct Accumulator {
    float* at[32] = {};
    int columns = 0;
    int parts = 0;  // under way
    Site site{};
    float c[16][256];
};

struct Part {
    std::shared_ptr<Product> product;
    std::shared_ptr<Accumulator> accumulator;
    Time group;
    int lanes = 0;  // that have issued it
    const uint32_t* a_at[32];
    uint32_t a[32][4];
};

struct WarpProducts {
    std::deque<Part> parts;
    size_t first = 0;  // number of parts[0]
    std::vector<std::shared_ptr<Accumulator>> live;
};

struct Warpgroup {
    std::deque<std::shared_ptr<Product>> products;
    size_t first = 0;
    std::vector<int> waiting;
    int registers, register_calls;
};

// -------------------------------------------------------------------------------------------------------------------

// Words of global memory.
class Words {
  public:
    void clear() { pages_.clear(), last_ = nullptr; }
    bool empty() const { return pages_.empty(); }
    void add(const void* p, size_t size) {
        for (size_t i = word(p), end = word(p, size - 1); i <= end; ++i) page(i).set(i % in_page);
    }
    bool contain(const void* p, size_t size) const {
        for (size_t i = word(p), end = word(p, size - 1); i <= end; ++i) {
            auto found = pages_.find(i / in_page);
            if (found != pages_.end() && found->second[i % in_page]) return true;
        }
        return false;
    }
    void swap(Words& other) {
        pages_.swap(other.pages_);
        last_ = other.last_ = nullptr;
    }

  private:
    static constexpr size_t in_page = 1024;
    static size_t word(const void* p, size_t offset = 0) { return (reinterpret_cast<uintptr_t>(p) + offset) / 4; }
    std::bitset<in_page>& page(size_t i) {
        if (!last_ || last_number_ != i / in_page) last_ = &pages_[i / in_page], last_number_ = i / in_page;
        return *last_;
    }
    std::unordered_map<size_t, std::bitset<in_page>> pages_;
    std::bitset<in_page>* last_ = nullptr;
    size_t last_number_ = 0;
};

struct Statistics {
    uint64_t blocks, barriers, collectives, mma, ldmatrix, ldmatrix_conflicts, copies, products, loads, stores;
};

struct Machine {
    uint64_t random = 1, seed = 1;
    int patience_s = 60;
    Statistics statistics{};
    std::string message;
    sigjmp_buf escape;

    void (*invoke)(void*);
    void* kernel;
    int threads, shared_bytes;
    uint64_t block = 0;      // number of blocks that ever ran
    Fiber* fiber = nullptr;  // the running one
    int self = 0;
    Where last;  // memory access
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    char* stacks = nullptr;
    unsigned char* region = nullptr;
    unsigned char* shared = nullptr;
    uint32_t window = 0;  // address of shared[0] in the shared window
    Byte* bytes = nullptr;
    Chunk* chunks = nullptr;
    int done = 0;
    int polls;                                              // since the last time that anybody could go on for it
    bool yielded = false;                                   // somebody asks for another warp's turn
    std::vector<unsigned> order;                            // of the blocks
    std::unordered_map<size_t, GlobalWrite> global_writes;  // by this launch, if it may load them
    Words written, previous;  // by this launch, and by the previous one if this one could overlap it
    Barrier barriers[max_barriers];

    Time clock[max_warps];    // of each warp
    Time started[max_warps];  // its clock when the block started
    Times* known = nullptr;   // of each thread
    Times floor;              // what all threads know
    Time agent_clock[max_agents];
    bool agents_used;  // by this launch

    std::vector<Mbarrier> mbarriers;
    std::vector<Load> loads;  // under way
    unsigned eagerness;       // of loads to land
    int storers;
    WarpProducts products[max_warps];
    uint32_t fences;  // number of the last product_fence
    // Of each word of the stacks: 128 for an accumulator under way, how many products under way have it as a register
    // of A; and how many product_fence there had been when it was last written.
    uint8_t* under_way = nullptr;
    uint32_t* written_at = nullptr;
    Warpgroup warpgroups[max_warps / 4];
};
extern Machine m;

// ---- machine.cpp --------------------------------------------------------------------------------------------------

unsigned below(unsigned n);
std::string text(const Where& where);
void wait(const char* name, Site site);  // sleep until somebody calls wake()
void wake(const std::vector<int>& threads);
void let_others_run();
void poll(const char* name, Site site, int mbarrier, uint32_t parity);  // the same, of who asks again and again
void access(const void* address, size_t size, Kind kind, Where where);
void check_byte(size_t i, Kind kind, Where where);  // a fault unless it may be accessed
void global_access(const void* address, size_t size, Kind kind, Where where, bool async = false);

// To the precision of float32.
inline double truncated(double x) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    u &= ~uint64_t((1u << 29) - 1);
    memcpy(&x, &u, sizeof u);
    return x;
}

inline int mbarrier_agent(int i) { return max_threads + i; }
inline int product_agent(int warp) { return max_threads + max_mbarriers + warp; }
inline int store_agent(int i) { return max_threads + max_mbarriers + max_warps + i; }
constexpr int previous_kernel = max_threads + max_agents - 1;

// Whether what somebody did at that time is ordered before this thread.
inline bool ordered(int agent, Time time) { return time < m.floor[agent] || time < m.known[m.self][agent]; }
inline void merge(Times& to, const Times& from) {
    for (int i = 0; i < m.threads; ++i) to[i] = to[i] < from[i] ? from[i] : to[i];
    if (!m.agents_used) return;
    for (int i = max_threads; i < max_threads + max_agents; ++i) to[i] = to[i] < from[i] ? from[i] : to[i];
}
// What this thread did and knows becomes known to whoever acquires it.
inline void release(Times& to) {
    m.polls = 0;
    m.known[m.self][m.self] = ++m.clock[m.self / 32];
    merge(to, m.known[m.self]);
}
inline void acquire(const Times& from) { merge(m.known[m.self], from); }

inline Chunk& chunk(size_t i) {
    Chunk& c = m.chunks[i];
    if (c.block != m.block) {
        memset(static_cast<void*>(&c), 0, sizeof c);
        c.block = m.block;
    }
    return c;
}

// ---- machine_sm90.cpp ---------------------------------------------------------------------------------------------

void start_block_sm90();
void end_block_sm90();
void exit_thread_sm90();
bool land_one();  // of the loads under way; false if there is none
void check_async(const Chunk& c, size_t byte, Kind kind, Where where);  // for a plain access
void register_access(const void* address, size_t size, Kind kind, Where where);
std::string state_of(const Mbarrier& barrier);

}  // namespace emulator
