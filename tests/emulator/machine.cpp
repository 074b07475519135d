// A CUDA thread block on one CPU thread.
//
// Every CUDA thread is a fiber; the scheduler runs one at a time until it blocks, choosing warps and lanes at random
// from a seed. Warp-wide instructions are meetings of 32 fibers, carried out once by the last lane to arrive.
// Shared memory starts as NaN (0xFF). The kernel is compiled with -fsanitize=thread and linked with the __tsan_*
// functions below instead of that sanitizer's runtime, so that every load and store passes through access(): it
// reports shared memory out of bounds, races (two threads, one of them writing, no barrier between), misaligned
// vector accesses, and reads of what an asynchronous copy has not delivered yet.
// The first fault ends the launch: its message waits in fault_message().
// What compute capability 9.0 adds is in machine_sm90.cpp.
#include "machine_state.h"

#include <algorithm>
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

struct uint3 {
    unsigned x, y, z;
};
uint3 threadIdx, blockIdx, blockDim, gridDim;

// ---- context switch -----------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
// Saves the callee-saved registers and the stack pointer, loads the other side's.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch, @function
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, . - emulator_switch
)");
struct Context {
    void* stack_pointer;
    void start(char* stack, size_t bytes, void (*entry)()) {
        auto top = reinterpret_cast<uintptr_t*>(stack + bytes);  // 16-byte aligned
        *--top = 0;                                              // return address of entry, which never returns
        *--top = reinterpret_cast<uintptr_t>(entry);
        for (int i = 0; i < 6; ++i) *--top = 0;
        stack_pointer = top;
    }
    static void change(Context& from, Context& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;
    void start(char* stack, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

namespace emulator {

Machine m;

namespace {

constexpr size_t page = 4096;
Context scheduler;
std::vector<Context> contexts;  // of the fibers

uint64_t next_random() {  // xorshift64*
    m.random ^= m.random >> 12;
    m.random ^= m.random << 25;
    m.random ^= m.random >> 27;
    return m.random * 0x2545F4914F6CDD1DULL;
}

}  // namespace

unsigned below(unsigned n) { return unsigned((next_random() >> 32) * n >> 32); }

std::string text(const Where& where) {
    char buffer[256];
    Dl_info info{};
    if (where.file) {
        const char* slash = strrchr(where.file, '/');
        snprintf(buffer, sizeof buffer, "%s:%d", slash ? slash + 1 : where.file, int(where.line));
    } else if (dladdr(reinterpret_cast<void*>(where.line), &info)) {  // the harness turns this into file:line
        snprintf(buffer, sizeof buffer, "<+0x%zx>", size_t(where.line - reinterpret_cast<uintptr_t>(info.dli_fbase)));
    } else {
        snprintf(buffer, sizeof buffer, "?");
    }
    return buffer;
}

namespace {

[[noreturn]] void leave(const std::string& message) {
    m.message = message;
    siglongjmp(m.escape, 1);
}

std::string waiting() {
    struct Group {
        const char* name;
        Site site;
        int count, first, mbarrier;
        uint32_t parity;
    };
    std::vector<Group> groups;
    for (int t = 0; t < m.threads; ++t) {
        Fiber& f = m.fibers[t];
        const char* name = f.done ? "exit" : f.waits_at ? f.waits_at : "work";
        bool found = false;
        for (Group& g : groups)
            if (!strcmp(g.name, name) && (f.done || (g.site.line == f.site.line && g.mbarrier == f.waits_for &&
                                                     (f.waits_for < 0 || g.parity == f.parity))))
                ++g.count, found = true;
        if (!found) groups.push_back({name, f.done ? Site{nullptr, 0} : f.site, 1, t, f.waits_for, f.parity});
    }
    std::string s;
    for (Group& g : groups) {
        char buffer[256];
        snprintf(buffer, sizeof buffer, "%s%d threads (first: %d) at %s", s.empty() ? "" : "; ", g.count, g.first,
                 g.name);
        s += buffer;
        if (g.site.file) s += " " + text(g.site);
        if (g.mbarrier >= 0)
            s += " for parity " + std::to_string(g.parity) + " of " + state_of(m.mbarriers[size_t(g.mbarrier)]);
    }
    return s;
}

void switch_to_scheduler() { Context::change(contexts[m.self], scheduler); }

}  // namespace

void wait(const char* name, Site site) {
    Fiber& fiber = *m.fiber;
    fiber.waits_at = name;
    fiber.site = site;
    m.warps[m.self / 32].ready &= ~(1u << m.self % 32);
    switch_to_scheduler();
    fiber.waits_at = nullptr;
}

void wake(const std::vector<int>& threads) {
    m.polls = 0;
    for (int t : threads) m.warps[t / 32].ready |= 1u << t % 32;
}

void let_others_run() {
    m.yielded = true;
    switch_to_scheduler();
}

void poll(const char* name, Site site, int mbarrier, uint32_t parity) {
    Fiber& fiber = *m.fiber;
    fiber.waits_at = name;
    fiber.site = site;
    fiber.waits_for = mbarrier;
    fiber.parity = parity;
    if (++m.polls > 100000) leave("deadlock: " + waiting());
    let_others_run();
    fiber.waits_at = nullptr;
    fiber.waits_for = -1;
}

namespace {

void fiber_main() {
    m.invoke(m.kernel);
    if (m.agents_used) exit_thread_sm90();
    m.fiber->done = true;
    m.warps[m.self / 32].ready &= ~(1u << m.self % 32);
    ++m.done;
    switch_to_scheduler();
    abort();
}

// Copies that nobody waited for: by an exited block, or by a launch that ended in a fault.
void forget_copies() {
    for (Fiber& f : m.fibers) {
        for (Copy& copy : f.copies)
            for (int i = 0; i < copy.bytes; ++i) m.bytes[copy.shared - m.shared + i].in_flight = false;
        f.copies.clear();
    }
}

void run_block() {
    ++m.statistics.blocks;
    ++m.block;
    m.done = 0;
    m.polls = 0;
    for (Barrier& barrier : m.barriers) {
        barrier.waiting.clear();
        barrier.came.reset();
        barrier.arrived = barrier.sum = 0;
        barrier.known.fill(0);
    }
    for (int w = 0; w < max_warps; ++w) m.started[w] = ++m.clock[w];
    for (int t = 0; t < max_threads; ++t) m.floor[t] = m.clock[t / 32];
    start_block_sm90();
    memset(m.shared, poison, size_t(m.shared_bytes));
    forget_copies();
    int warps = m.threads / 32;
    for (int w = 0; w < warps; ++w) {
        m.warps[w].ready = 0xffffffffu;
        m.warps[w].arrived = 0;
    }
    for (int t = 0; t < m.threads; ++t) {
        Fiber& f = m.fibers[t];
        f.done = false;
        f.waits_at = nullptr;
        f.waits_for = -1;
        f.group = 0;
        contexts[size_t(t)].start(m.stacks + size_t(t) * stack_bytes + page, stack_bytes - page, fiber_main);
    }
    // How long a warp runs before another one gets its turn: from lockstep to one after another.
    static const unsigned stay_of_16[] = {0, 8, 15, 16};
    unsigned stay = stay_of_16[below(4)];
    int w = int(below(unsigned(warps)));
    while (m.done < m.threads) {
        if (!m.loads.empty() && below(64) < m.eagerness) land_one();
        if (!m.warps[w].ready || m.yielded || below(16) >= stay) {
            m.yielded = false;
            int first = int(below(unsigned(warps))), i = 0;
            while (i < warps && !m.warps[(first + i) % warps].ready) ++i;
            if (i == warps) {
                if (land_one()) continue;
                leave("deadlock: " + waiting());
            }
            w = (first + i) % warps;
        }
        unsigned start = below(32), step = below(16) * 2 + 1;
        for (unsigned i = 0; i < 32; ++i) {
            unsigned l = (start + i * step) % 32;
            if (!(m.warps[w].ready >> l & 1)) continue;
            m.self = w * 32 + int(l);
            m.fiber = &m.fibers[m.self];
            threadIdx = {unsigned(m.self), 0, 0};
            Context::change(scheduler, contexts[size_t(m.self)]);
        }
    }
    end_block_sm90();
    m.fiber = nullptr;
}

// ---- signals ------------------------------------------------------------------------------------------------------

std::string here() {
    char buffer[128];
    snprintf(buffer, sizeof buffer, "block (%u, %u, %u) thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z, m.self);
    return buffer;
}

void on_signal(int signal, siginfo_t* info, void*) {
    char buffer[256];
    auto address = static_cast<char*>(info->si_addr);
    if (signal == SIGVTALRM) {
        snprintf(buffer, sizeof buffer, "still running after %d s at ", m.patience_s);
    } else if (address >= m.stacks && address < m.stacks + size_t(max_threads) * stack_bytes) {
        snprintf(buffer, sizeof buffer, "stack overflow (%zu bytes a thread) at ", stack_bytes);
    } else {  // the harness puts a name to the address
        snprintf(buffer, sizeof buffer, "access violation at address <0x%zx> at ", size_t(address));
    }
    leave(here() + buffer + text(m.last));
}

class Signals {
  public:
    Signals() {
        stack_t stack{};
        stack.ss_sp = memory_;
        stack.ss_size = sizeof memory_;
        sigaltstack(&stack, &old_stack_);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; ++i) sigaction(signals_[i], &action, &old_[i]);
        itimerval timer{};
        timer.it_value.tv_sec = m.patience_s;
        setitimer(ITIMER_VIRTUAL, &timer, &old_timer_);
    }
    ~Signals() {
        setitimer(ITIMER_VIRTUAL, &old_timer_, nullptr);
        for (int i = 0; i < 3; ++i) sigaction(signals_[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

  private:
    const int signals_[3] = {SIGSEGV, SIGBUS, SIGVTALRM};
    struct sigaction old_[3];
    stack_t old_stack_;
    itimerval old_timer_;
    static char memory_[64 * 1024];
};
char Signals::memory_[64 * 1024];

char* map(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    return static_cast<char*>(p);
}

void prepare(int threads) {
    if (!m.region) {
        m.region = reinterpret_cast<unsigned char*>(map(max_shared + 2 * shared_margin));
        m.shared = m.region + shared_margin;
        m.bytes = reinterpret_cast<Byte*>(map(sizeof(Byte) * max_shared));
        m.chunks = reinterpret_cast<Chunk*>(map(sizeof(Chunk) * (max_shared / 16)));
        m.known = reinterpret_cast<Times*>(map(sizeof(Times) * max_threads));
        m.stacks = map(size_t(max_threads) * stack_bytes);
        m.under_way = reinterpret_cast<uint8_t*>(map(max_threads * stack_bytes / 4));
        m.written_at = reinterpret_cast<uint32_t*>(map(max_threads * stack_bytes));
        for (int t = 0; t < max_threads; ++t) mprotect(m.stacks + size_t(t) * stack_bytes, page, PROT_NONE);
        m.warps.resize(max_threads / 32);
        m.fibers.resize(max_threads);
        contexts.resize(max_threads);
    }
    m.threads = threads;
    m.agents_used = !m.previous.empty();
    for (int t = 0; t < threads; ++t) m.known[t].fill(0);
    m.floor.fill(0);
}

// ---- shared memory ------------------------------------------------------------------------------------------------

// True when what a thread did at that time is not ordered before this thread.
bool unordered(int thread, Time time) { return !ordered(thread, time) && thread != m.self; }

const char* verb(Kind kind) { return kind == Kind::write ? "writes" : "reads"; }

[[noreturn]] void race(size_t offset, const char* mine, const char* theirs, int thread, Where there, Where where) {
    fault("race in shared memory: %s byte %zu at %s, which thread %d %s at %s with no barrier between", mine, offset,
          text(where).c_str(), thread, theirs, text(there).c_str());
}

}  // namespace

void check_byte(size_t i, Kind kind, Where where) {
    const Byte& b = m.bytes[i];
    if (b.in_flight)
        fault("%s byte %zu of shared memory at %s while the copy_async of thread %d at %s is under way", verb(kind), i,
              text(where).c_str(), b.writer, text(b.write_where).c_str());
    if (unordered(b.writer, b.write_time)) race(i, verb(kind), "wrote", b.writer, b.write_where, where);
    if (kind == Kind::read) return;
    for (int w = 0; w < m.threads / 32; ++w) {
        const Byte::Read& r = b.read[w];
        if (r.time < m.floor[w * 32]) continue;
        for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1) {
            int thread = w * 32 + __builtin_ctz(lanes);
            if (unordered(thread, r.time)) race(i, verb(kind), "read", thread, b.read_where, where);
        }
    }
}

void access(const void* address, size_t size, Kind kind, Where where) {
    long first = static_cast<const unsigned char*>(address) - m.shared;
    if (first < 0 || first + long(size) > m.shared_bytes)
        fault("shared memory out of bounds: %s bytes [%ld, %ld) of %d at %s", verb(kind), first, first + long(size),
              m.shared_bytes, text(where).c_str());
    size_t end = size_t(first) + size;
    for (size_t i = size_t(first) / 16; i * 16 < end; ++i) {
        Chunk& c = chunk(i);
        if (c.async) check_async(c, std::max(i * 16, size_t(first)), kind, where);
        c.touched = true;
        if (kind == Kind::write) c.written = true, ++c.version;
    }
    int warp = m.self / 32;
    for (size_t i = size_t(first); i < end; ++i) {
        check_byte(i, kind, where);
        Byte& b = m.bytes[i];
        if (kind == Kind::read) {
            Byte::Read& r = b.read[warp];
            if (r.time != m.clock[warp]) r = {m.clock[warp], 0};
            r.lanes |= 1u << m.self % 32;
            b.read_where = where;
        } else {
            b.write_time = m.clock[warp];
            b.write_fences = uint32_t(m.fiber->fences.size());
            b.writer = int16_t(m.self);
            b.write_where = where;
        }
    }
}

namespace {

void require_shared(const char* name, const void* address, size_t bytes, Site site) {
    long offset = static_cast<const unsigned char*>(address) - m.shared;
    if (offset < 0 || offset + long(bytes) > m.shared_bytes)
        fault("%s at %s: shared memory out of bounds: bytes [%ld, %ld) of %d", name, text(site).c_str(), offset,
              offset + long(bytes), m.shared_bytes);
    require_aligned(name, address, bytes, site);
}

void land(const Copy& copy) {
    for (int i = 0; i < copy.bytes; ++i) m.bytes[copy.shared - m.shared + i].in_flight = false;
    access(copy.shared, size_t(copy.bytes), Kind::write, copy.where);
    m.last = copy.where;
    if (copy.valid) memcpy(copy.shared, copy.global, size_t(copy.bytes));
    else memset(copy.shared, 0, size_t(copy.bytes));
}

}  // namespace

// ---- host ---------------------------------------------------------------------------------------------------------

int run(Grid grid, int threads, int shared_bytes, bool overlap, void (*invoke)(void*), void* kernel) {
    m.message.clear();
    if (!overlap) m.written.clear();
    m.previous.swap(m.written);
    m.written.clear();
    m.global_writes.clear();
    if (threads <= 0 || threads > max_threads || threads % 32) {
        m.message = "a block of " + std::to_string(threads) + " threads (1 to 1024, whole warps)";
        return fault_status;
    }
    if (shared_bytes < 0 || size_t(shared_bytes) > max_shared) {
        m.message = "a block with " + std::to_string(shared_bytes) + " bytes of shared memory";
        return fault_status;
    }
    if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
        m.message = "a grid beyond 2^31-1 x 65535 x 65535";
        return fault_status;
    }
    prepare(threads);
    m.random = m.seed;
    m.invoke = invoke;
    m.kernel = kernel;
    m.shared_bytes = shared_bytes;
    m.window = 1024 + 128 * (2 * below(4) + 1);  // aligned as little as shared memory is bound to be
    gridDim = {grid.x, grid.y, grid.z};
    blockDim = {unsigned(threads), 1, 1};
    m.order.resize(size_t(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < m.order.size(); ++i) {
        size_t j = below(unsigned(i) + 1);
        m.order[i] = m.order[j];
        m.order[j] = unsigned(i);
    }
    Signals signals;
    if (sigsetjmp(m.escape, 1)) {
        forget_previous_launch();
        madvise(m.under_way, max_threads * stack_bytes / 4, MADV_DONTNEED);  // zeros
        m.fiber = nullptr;
        return fault_status;
    }
    for (unsigned i : m.order) {
        blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
        run_block();
    }
    return 0;
}

void forget_previous_launch() { m.written.clear(); }

const char* fault_message() { return m.message.c_str(); }

void fault(const char* format, ...) {
    char buffer[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    leave(here() + buffer);
}

extern "C" void emulator_configure(unsigned long long seed, int patience_s) {
    m.seed = (seed * 0x9E3779B97F4A7C15ULL) ^ 0xD1B54A32D192ED03ULL;
    if (!m.seed) m.seed = 1;
    m.patience_s = patience_s;
    m.statistics = {};
    m.written.clear();
}
// Whatever ran before the next launch may have written this: that launch, if it overlaps, has to wait before it reads
// or writes there.
extern "C" void emulator_written_before(const void* address, size_t bytes) { m.written.add(address, bytes); }
extern "C" const char* emulator_fault() { return fault_message(); }
extern "C" void emulator_statistics(uint64_t* out) { memcpy(out, &m.statistics, sizeof m.statistics); }

// ---- block and warp -----------------------------------------------------------------------------------------------

unsigned char* shared_memory() { return m.shared; }
unsigned char* aligned_shared_memory(int bytes) {
    m.window = m.window / bytes * bytes;  // all threads of a block, before they use an address
    return m.shared;
}
int lane() { return m.self % 32; }

namespace {

// Everything the threads have done is ordered before everything they do from now on. Also what others released.
void synchronise(const std::vector<int>& threads, const Times* released) {
    uint32_t warps = 0;
    for (int t : threads) warps |= 1u << t / 32;
    for (int w = 0; w < max_warps; ++w) m.clock[w] += warps >> w & 1;
    for (int t : threads) m.known[t][t] = m.clock[t / 32];
    if (int(threads.size()) == m.threads) {
        for (int t : threads) m.floor[t] = m.clock[t / 32];
        if (m.agents_used)
            for (int t : threads)
                for (int i = max_threads; i < max_threads + max_agents; ++i)
                    m.floor[i] = std::max(m.floor[i], m.known[t][i]);
        return;
    }
    static Times known;
    known.fill(0);
    for (int t : threads) merge(known, m.known[t]);
    if (released) merge(known, *released);
    for (int t : threads) merge(m.known[t], known);
}

// This thread comes to a barrier, with or without waiting for the others.
void come(const char* name, int id, int threads, bool waits, Site site) {
    if (id < 0 || id >= max_barriers) fault("%s at %s: there is no barrier %d", name, text(site).c_str(), id);
    if (threads <= 0 || threads > m.threads || threads % 32)
        fault("%s at %s: a barrier of %d threads in a block of %d", name, text(site).c_str(), threads, m.threads);
    Barrier& barrier = m.barriers[id];
    if (barrier.came.none()) {
        barrier.name = name;
        barrier.site = site;
        barrier.expected = threads;
    } else if (barrier.expected != threads ||
               (id == 0 && (barrier.site.line != site.line || strcmp(barrier.name, name)))) {
        fault("divergent barrier: this thread is at %s %s, others wait at %s %s", name, text(site).c_str(),
              barrier.name, text(barrier.site).c_str());
    }
    if (barrier.came[size_t(m.self)])
        fault("%s at %s: this thread has come to barrier %d already, which waits for others", name, text(site).c_str(),
              id);
    barrier.came.set(size_t(m.self));
    if (waits) {
        barrier.waiting.push_back(m.self);
    } else {
        ++barrier.arrived;
        release(barrier.known);
    }
    if (int(barrier.waiting.size()) + barrier.arrived < barrier.expected) {
        if (waits) wait(name, site);
        return;
    }
    ++m.statistics.barriers;
    synchronise(barrier.waiting, barrier.arrived ? &barrier.known : nullptr);
    wake(barrier.waiting);
    barrier.waiting.clear();
    barrier.came.reset();
    barrier.arrived = 0;
    barrier.known.fill(0);
    barrier.result = barrier.sum;
    barrier.sum = 0;
}

}  // namespace

void block_barrier(const char* name, int id, int threads, Site site) { come(name, id, threads, true, site); }
void barrier_arrive(const char* name, int id, int threads, Site site) { come(name, id, threads, false, site); }

int block_count(int predicate, Site site) {
    m.barriers[0].sum += predicate != 0;
    block_barrier("__syncthreads_count", 0, m.threads, site);
    return m.barriers[0].result;
}

int block_threads() { return m.threads; }

void warp_collective(const char* name, Site site, void* operands, Compute compute) {
    Warp& warp = m.warps[m.self / 32];
    if (warp.arrived == 0) {
        warp.name = name;
        warp.site = site;
    } else if (warp.site.line != site.line || strcmp(warp.name, name)) {
        fault("divergent warp: lane %d is at %s %s, others wait at %s %s", m.self % 32, name, text(site).c_str(),
              warp.name, text(warp.site).c_str());
    }
    warp.operands[m.self % 32] = operands;
    if (++warp.arrived < 32) {
        wait(name, site);
        return;
    }
    warp.arrived = 0;
    ++m.statistics.collectives;
    if (compute) compute(warp.operands);
    warp.ready = 0xffffffffu;
}

void warp_barrier(Site site) {
    warp_collective("__syncwarp", site, nullptr, [](void* const*) {
        static std::vector<int> lanes(32);
        for (int l = 0; l < 32; ++l) lanes[size_t(l)] = m.self / 32 * 32 + l;
        synchronise(lanes, nullptr);
    });
}

uint64_t shuffle(const char* name, uint64_t value, int source_lane, Site site) {
    struct Operand {
        uint64_t value, result;
        int source;
    } operand{value, 0, source_lane & 31};
    warp_collective(name, site, &operand, [](void* const operands[32]) {
        for (int l = 0; l < 32; ++l) {
            auto self = static_cast<Operand*>(operands[l]);
            self->result = static_cast<Operand*>(operands[self->source])->value;
        }
    });
    return operand.result;
}

unsigned ballot(int predicate, Site site) {
    struct Operand {
        int predicate;
        unsigned result;
    } operand{predicate, 0};
    warp_collective("__ballot_sync", site, &operand, [](void* const operands[32]) {
        unsigned bits = 0;
        for (int l = 0; l < 32; ++l) bits |= unsigned(static_cast<Operand*>(operands[l])->predicate != 0) << l;
        for (int l = 0; l < 32; ++l) static_cast<Operand*>(operands[l])->result = bits;
    });
    return operand.result;
}

// ---- memory -------------------------------------------------------------------------------------------------------

void require_aligned(const char* name, const void* address, size_t alignment, Site site) {
    if (reinterpret_cast<uintptr_t>(address) % alignment)
        fault("%s at %s: address is not %zu-byte aligned", name, text(site).c_str(), alignment);
}

void load_matrix_x4(uint32_t (&r)[4], const void* row, bool transposed, Site site) {
    const char* name = transposed ? "load_matrix_x4_transposed" : "load_matrix_x4";
    require_shared(name, row, 16, site);
    access(row, 16, Kind::read, site);
    if (m.agents_used) register_access(r, sizeof r, Kind::write, site);
    struct Operand {
        uint32_t* r;
        const unsigned char* row;
        bool transposed;
    } operand{r, static_cast<const unsigned char*>(row), transposed};
    warp_collective(name, site, &operand, [](void* const operands[32]) {
        auto of = [&](int l) { return static_cast<Operand*>(operands[l]); };
        ++m.statistics.ldmatrix;
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t element[8][8];
            int rows_in[8] = {}, most = 0;
            for (int i = 0; i < 8; ++i) {
                const unsigned char* p = of(matrix * 8 + i)->row;
                memcpy(element[i], p, 16);
                bool seen = false;  // the same row twice is one access
                for (int j = 0; j < i; ++j) seen |= of(matrix * 8 + j)->row == p;
                int& bank = rows_in[(p - m.shared) / 16 % 8];
                if (!seen && ++bank > most) most = bank;
            }
            m.statistics.ldmatrix_conflicts += uint64_t(most - 1);
            for (int l = 0; l < 32; ++l) {
                int i = l / 4, j = l % 4 * 2;
                uint16_t lo = of(l)->transposed ? element[j][i] : element[i][j];
                uint16_t hi = of(l)->transposed ? element[j + 1][i] : element[i][j + 1];
                of(l)->r[matrix] = lo | uint32_t(hi) << 16;
            }
        }
    });
}

// The copy lands as late as the program allows: at the wait of the thread that issued it. Until then the destination
// holds NaN and may not be touched.
void copy_async(void* shared, const void* global, int bytes, bool valid, Site site) {
    require_shared("copy_async", shared, size_t(bytes), site);
    require_aligned("copy_async (source)", global, size_t(bytes), site);
    access(shared, size_t(bytes), Kind::write, site);
    auto destination = static_cast<unsigned char*>(shared);
    memset(destination, poison, size_t(bytes));
    for (int i = 0; i < bytes; ++i) m.bytes[destination - m.shared + i].in_flight = true;
    m.fiber->copies.push_back({destination, global, bytes, valid, m.fiber->group, site});
    ++m.statistics.copies;
}

void copy_async_commit() { ++m.fiber->group; }

void copy_async_wait(int newest_allowed) {
    auto& copies = m.fiber->copies;
    size_t landed = 0;
    while (landed < copies.size() && copies[landed].group + uint64_t(newest_allowed) < m.fiber->group)
        land(copies[landed++]);
    copies.erase(copies.begin(), copies.begin() + long(landed));
}

// ---- global memory ------------------------------------------------------------------------------------------------

void wait_for_previous_kernel() { m.known[m.self][previous_kernel] = Time(m.block) + 1; }

void global_access(const void* address, size_t size, Kind kind, Where where, bool async) {
    if (kind == Kind::write) m.written.add(address, size);
    if (kind == Kind::write && !m.mbarriers.empty())
        for (size_t i = reinterpret_cast<uintptr_t>(address) / 16; i * 16 < reinterpret_cast<uintptr_t>(address) + size;
             ++i)
            m.global_writes[i] = {m.block, m.clock[m.self / 32], async, uint32_t(m.fiber->global_fences.size()), m.self,
                                  where};
    if (!m.previous.empty() && !ordered(previous_kernel, Time(m.block)) && m.previous.contain(address, size))
        fault("%s address <0x%zx> at %s, which the previous kernel writes: no wait_for_previous_kernel before",
              verb(kind), reinterpret_cast<size_t>(address), text(where).c_str());
}

// ---- tensor cores -------------------------------------------------------------------------------------------------
// Products are exact. They are added in blocks (8 wide for 16-bit types, 4 for TF32) to the accumulator and each sum is
// truncated to float32, not rounded: what published measurements found on compute capability 8.0.

namespace {

struct MmaOperand {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

template <int K, int Block, class Load> void multiply(void* const operands[32], Load load) {
    double a[16][K], b[K][8], c[16][8];
    for (int l = 0; l < 32; ++l) {
        auto o = static_cast<const MmaOperand*>(operands[l]);
        int g = l / 4, t = l % 4;
        load(*o, g, t, a, b);
        for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = o->c[i];
    }
    for (int i = 0; i < 16; ++i)
        for (int k0 = 0; k0 < K; k0 += Block) {
            for (int k = k0; k < k0 + Block; ++k)
                for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
            for (int j = 0; j < 8; ++j) c[i][j] = truncated(c[i][j]);
        }
    for (int l = 0; l < 32; ++l) {
        auto o = static_cast<const MmaOperand*>(operands[l]);
        for (int i = 0; i < 4; ++i) o->c[i] = float(c[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2]);
    }
    ++m.statistics.mma;
}

template <float (*convert)(uint16_t)> void multiply_16bit(void* const operands[32]) {
    multiply<16, 8>(operands, [](const MmaOperand& o, int g, int t, double (&a)[16][16], double (&b)[16][8]) {
        for (int h = 0; h < 2; ++h) {
            for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * t + r / 2 * 8 + h] = convert(uint16_t(o.a[r] >> 16 * h));
            for (int r = 0; r < 2; ++r) b[2 * t + r * 8 + h][g] = convert(uint16_t(o.b[r] >> 16 * h));
        }
    });
}

float bits_to_float(uint32_t x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}
uint32_t float_to_bits(float x) {
    uint32_t y;
    memcpy(&y, &x, sizeof y);
    return y;
}

void multiply_tf32(void* const operands[32]) {
    multiply<8, 4>(operands, [](const MmaOperand& o, int g, int t, double (&a)[16][8], double (&b)[8][8]) {
        auto operand = [](uint32_t x) { return bits_to_float(x & 0xffffe000u); };
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = operand(o.a[r]);
        for (int r = 0; r < 2; ++r) b[t + r * 4][g] = operand(o.b[r]);
    });
}

}  // namespace

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
    MmaOperand operand{c, a, {b0, b1}};
    warp_collective("mma_m16n8k16<bf16>", site, &operand, multiply_16bit<from_bf16>);
}
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
    MmaOperand operand{c, a, {b0, b1}};
    warp_collective("mma_m16n8k16<f16>", site, &operand, multiply_16bit<from_f16>);
}
void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1, Site site) {
    uint32_t bits[4];
    memcpy(bits, a, sizeof bits);
    MmaOperand operand{c, bits, {float_to_bits(b0), float_to_bits(b1)}};
    warp_collective("mma_m16n8k8_tf32", site, &operand, multiply_tf32);
}

// ---- conversions --------------------------------------------------------------------------------------------------

float from_bf16(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }

uint16_t to_bf16(float x) {
    uint32_t u = float_to_bits(x);
    if (std::isnan(x)) return 0x7fff;
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float from_f16(uint16_t x) {
    uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(mantissa), -24);
    return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t to_f16(float x) {
    if (std::isnan(x)) return 0x7fff;
    uint32_t u = float_to_bits(x);
    uint16_t sign = uint16_t(u >> 16 & 0x8000);
    float magnitude = std::fabs(x);
    if (magnitude < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24)));
    u &= 0x7fffffff;
    u += 0xfff + (u >> 13 & 1);
    if (u >= 0x47800000u) return sign | 0x7c00;
    return sign | uint16_t((u - 0x38000000u) >> 13);
}

float exp2_flushed(float x) {
    float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

}  // namespace emulator

// ---- what -fsanitize=thread calls before every load and store -----------------------------------------------------

namespace {
using emulator::Kind;
void instrumented(void* address, size_t size, bool aligned, Kind kind, void* return_address) {
    if (!emulator::m.fiber) return;
    emulator::Where where(static_cast<char*>(return_address) - 1);
    emulator::m.last = where;
    if (aligned && reinterpret_cast<uintptr_t>(address) % size)
        emulator::fault("misaligned access of %zu bytes at %s", size, emulator::text(where).c_str());
    const auto inside = [&](const void* area, size_t bytes) {
        return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(area) < bytes;
    };
    if (inside(emulator::m.region, emulator::max_shared + 2 * emulator::shared_margin))
        emulator::access(address, size, kind, where);
    else if (!inside(emulator::m.stacks, emulator::max_threads * emulator::stack_bytes))
        emulator::global_access(address, size, kind, where);
    else if (emulator::m.agents_used) emulator::register_access(address, size, kind, where);
}
}  // namespace

#define HOOK(name, kind, aligned, size) \
    extern "C" void __tsan_##name(void* p) { instrumented(p, size, aligned, Kind::kind, __builtin_return_address(0)); }
#define HOOKS(size)                      \
    HOOK(read##size, read, true, size)   \
    HOOK(write##size, write, true, size) \
    HOOK(unaligned_read##size, read, false, size) HOOK(unaligned_write##size, write, false, size)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t size) {
    instrumented(p, size, false, Kind::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t size) {
    instrumented(p, size, false, Kind::write, __builtin_return_address(0));
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
