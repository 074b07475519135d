// Compute capability 9.0: barriers in shared memory, the copy engine, products of a warpgroup.
//
// What is asynchronous happens as late as the program allows. Loads land in any order, when nothing else can happen or
// at a random moment before; until then their destination holds NaN and may not be touched. Stores read shared memory
// at the store_box_wait of their thread, and global memory has what they write at its store_box_finish or exit.
// Products read shared memory and write their accumulators at the product_wait of each warp, which takes its 16 rows of
// A and all of B; until then the accumulators hold NaN and their registers may not be touched.
//
// Ordering is what PTX promises, no more: who uses what was copied has waited for it, or knows of a thread that has;
// and what was written by plain stores and is read by copies or products needs a fence_async() of its writer on the
// way.
#include "machine_state.h"

#include <algorithm>

namespace emulator {
namespace {

[[noreturn]] void out_of_bounds(const char* name, int64_t first, int64_t bytes, Where where) {
    fault("%s at %s: shared memory out of bounds: bytes [%ld, %ld) of %d", name, text(where).c_str(), long(first),
          long(first + bytes), m.shared_bytes);
}

// Offset in shared memory of an address in the shared window.
uint32_t offset_of(const char* name, uint32_t address, int64_t bytes, uint32_t alignment, Site site) {
    int64_t first = int64_t(address) - m.window;
    if (first < 0 || first + bytes > m.shared_bytes) out_of_bounds(name, first, bytes, site);
    if (address % alignment) fault("%s at %s: address is not %u-byte aligned", name, text(site).c_str(), alignment);
    return uint32_t(first);
}

// A chunk's address bits from 4 on, exchanged by the swizzle of a pitch.
uint32_t swizzled(uint32_t address, int pitch) { return address ^ (address >> 3 & (uint32_t(pitch) / 16 - 1) << 4); }

}  // namespace

uint32_t shared_address(const void* p, Site site) {
    long offset = static_cast<const unsigned char*>(p) - m.shared;
    if (offset < 0 || offset > m.shared_bytes) out_of_bounds("shared_address", offset, 0, site);
    return m.window + uint32_t(offset);
}

// ---- who may touch what -------------------------------------------------------------------------------------------

namespace {

const char* verb(Kind kind) { return kind == Kind::write ? "writes" : "reads"; }

// A write, plain or by a load, to what is read asynchronously.
void check_readers(const Chunk& c, const char* who, size_t byte, Where where) {
    for (int w = 0; w < m.threads / 32; ++w)
        if (c.product[w] && !ordered(product_agent(w), c.product[w]))
            fault(
                "%s byte %zu of shared memory at %s, which the product of warp %d at %s reads: no product_wait and "
                "barrier between",
                who, byte, text(where).c_str(), w, text(c.product_where).c_str());
    if (c.store.time && !ordered(c.store.agent, c.store.time))
        fault(
            "%s byte %zu of shared memory at %s, which the store of thread %d at %s reads: no store_box_wait and "
            "barrier between",
            who, byte, text(where).c_str(), c.store.thread, text(c.store.where).c_str());
}

// Any access to what is loaded asynchronously.
void check_writer(const Chunk& c, const char* who, size_t byte, Where where) {
    if (c.mbarrier[0] || c.mbarrier[1]) {
        const Mbarrier& barrier = m.mbarriers[(c.mbarrier[0] ? c.mbarrier[0] : c.mbarrier[1]) - 1u];
        fault("%s byte %zu of shared memory at %s, beside %s", who, byte, text(where).c_str(),
              state_of(barrier).c_str());
    }
    if (c.in_flight)
        fault("%s byte %zu of shared memory at %s while the load of thread %d at %s is under way", who, byte,
              text(where).c_str(), c.load.thread, text(c.load.where).c_str());
    if (c.load.time && !ordered(c.load.agent, c.load.time))
        fault("%s byte %zu of shared memory at %s, which the load of thread %d at %s wrote: no mbarrier_wait between",
              who, byte, text(where).c_str(), c.load.thread, text(c.load.where).c_str());
}

// A store or a product of this thread may read the chunk.
void check_async_read(size_t i, const char* who, Where where) {
    const Chunk& c = chunk(i);
    check_writer(c, who, i * 16, where);
    if (!c.written) return;
    for (size_t byte = i * 16; byte < i * 16 + 16; ++byte) {
        const Byte& b = m.bytes[byte];
        check_byte(byte, Kind::read, where);
        if (b.write_time < m.started[b.writer / 32]) continue;
        const std::vector<Time>& fences = m.fibers[size_t(b.writer)].fences;
        bool fenced = b.write_fences < fences.size();
        if (!fenced || (b.writer != m.self && !ordered(b.writer, fences[b.write_fences])))
            fault("fence_async is missing: %s byte %zu of shared memory at %s, which thread %d wrote at %s", who, byte,
                  text(where).c_str(), b.writer, text(b.write_where).c_str());
    }
}

}  // namespace

void check_async(const Chunk& c, size_t byte, Kind kind, Where where) {
    if (c.mbarrier[0] || c.mbarrier[1]) {
        unsigned number = c.mbarrier[byte % 16 / 8];
        if (number)
            fault("%s byte %zu of shared memory at %s, where there is %s", verb(kind), byte, text(where).c_str(),
                  state_of(m.mbarriers[number - 1]).c_str());
        return;  // nothing asynchronous comes beside a barrier
    }
    check_writer(c, verb(kind), byte, where);
    if (kind == Kind::write) check_readers(c, verb(kind), byte, where);
}

// ---- barriers in shared memory ------------------------------------------------------------------------------------

std::string state_of(const Mbarrier& b) {
    return "the mbarrier at byte " + std::to_string(b.offset) + " (made at " + text(b.where) + "; phase " +
           std::to_string(b.phases) + " lacks " + std::to_string(b.pending) + " of " + std::to_string(b.arrivals) +
           " arrivals and " + std::to_string(b.bytes) + " bytes)";
}

namespace {

Mbarrier& mbarrier_at(const char* name, uint32_t address, Site site) {
    uint32_t offset = offset_of(name, address, 8, 8, site);
    unsigned number = chunk(offset / 16).mbarrier[offset / 8 % 2];
    if (!number) fault("%s at %s: there is no mbarrier at byte %u of shared memory", name, text(site).c_str(), offset);
    Mbarrier& b = m.mbarriers[number - 1];
    if (b.maker != m.self && !ordered(b.maker, b.made))
        fault("%s at %s: no barrier between and the mbarrier_init of thread %d at %s", name, text(site).c_str(),
              b.maker, text(b.where).c_str());
    if (!b.fenced)
        fault("%s at %s: no mbarrier_init_fence after the mbarrier_init of thread %d at %s", name, text(site).c_str(),
              b.maker, text(b.where).c_str());
    return b;
}

void complete(Mbarrier& b, const char* name, Where where) {
    if (b.pending) return;
    if (b.bytes < 0)
        fault("%s at %s: more bytes have come than were announced: %s", name, text(where).c_str(), state_of(b).c_str());
    if (b.bytes) return;
    int agent = int(&b - m.mbarriers.data());
    b.arriving[mbarrier_agent(agent)] = ++m.agent_clock[agent];
    b.completed = b.arriving;
    ++b.phases;
    b.pending = b.arrivals;
    wake(b.waiting);
    b.waiting.clear();
}

bool reached(const Mbarrier& b, uint32_t parity) { return (b.phases & 1) != parity; }

void passed(Mbarrier& b) {
    b.waited = b.completed[mbarrier_agent(int(&b - m.mbarriers.data()))];
    acquire(b.completed);
}

}  // namespace

void mbarrier_init(uint32_t address, int arrivals, Site site) {
    uint32_t offset = offset_of("mbarrier_init", address, 8, 8, site);
    if (arrivals < 1 || arrivals >= 1 << 20) fault("mbarrier_init at %s: %d arrivals", text(site).c_str(), arrivals);
    if (m.mbarriers.size() == max_mbarriers)
        fault("mbarrier_init at %s: more than %d mbarriers are not emulated", text(site).c_str(), max_mbarriers);
    access(m.shared + offset, 8, Kind::write, site);  // a fault where there is one already
    m.agents_used = true;
    m.mbarriers.emplace_back();
    Mbarrier& b = m.mbarriers.back();
    b.offset = offset;
    b.arrivals = b.pending = arrivals;
    b.maker = m.self;
    b.made = m.clock[m.self / 32];
    b.where = site;
    Chunk& c = chunk(offset / 16);
    c.mbarrier[offset / 8 % 2] = uint8_t(m.mbarriers.size());
    c.async = true;
}

void mbarrier_init_fence() {
    for (Mbarrier& b : m.mbarriers)
        if (b.maker == m.self) b.fenced = true;
}

void mbarrier_arrive(const char* name, uint32_t address, int bytes, Site site) {
    Mbarrier& b = mbarrier_at(name, address, site);
    if (!b.pending) fault("%s at %s: one arrival too many: %s", name, text(site).c_str(), state_of(b).c_str());
    if (bytes < 0 || b.bytes + bytes >= 1 << 20)
        fault("%s at %s: %d bytes more: %s", name, text(site).c_str(), bytes, state_of(b).c_str());
    release(b.arriving);
    --b.pending;
    b.bytes += bytes;
    complete(b, name, site);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
    Mbarrier& b = mbarrier_at("mbarrier_wait", address, site);
    if (parity > 1) fault("mbarrier_wait at %s: parity %u", text(site).c_str(), parity);
    if (below(8) == 0) let_others_run();
    while (!reached(b, parity)) {
        b.waiting.push_back(m.self);
        m.fiber->waits_for = int(&b - m.mbarriers.data());
        m.fiber->parity = parity;
        wait("mbarrier_wait", site);
        m.fiber->waits_for = -1;
    }
    passed(b);
}

bool mbarrier_test(uint32_t address, uint32_t parity, Site site) {
    Mbarrier& b = mbarrier_at("mbarrier_test", address, site);
    if (parity > 1) fault("mbarrier_test at %s: parity %u", text(site).c_str(), parity);
    if (!reached(b, parity)) {
        poll("mbarrier_test", site, int(&b - m.mbarriers.data()), parity);
        if (!reached(b, parity)) {
            if (below(2)) land_one();  // whoever asks again and again gets an answer
            return false;
        }
    }
    passed(b);
    return true;
}

// ---- the copy engine ----------------------------------------------------------------------------------------------

namespace {

constexpr uint64_t valid_map = 0x50414d524f534e54;

// Calls copy(offset in shared memory, global address or null, bytes) for the 16-byte chunks of a box.
template <class F> void for_chunks(const TensorMap& map, const int (&at)[4], uint32_t offset, F copy) {
    const unsigned char* head = map.address + at[2] * map.strides[2] + at[3] * map.strides[3];
    for (int r = 0; r < map.box_rows; ++r)
        for (int c = 0; c < map.pitch; c += 16) {
            int64_t row = int64_t(at[1]) + r, column = int64_t(at[0]) + c / 2;
            uint32_t address = swizzled(m.window + offset + uint32_t(r * map.pitch + c), map.pitch);
            bool inside = row >= 0 && row < map.sizes[1] && column >= 0 && column < map.sizes[0];
            int bytes = inside ? int(std::min<int64_t>(16, (map.sizes[0] - column) * 2)) : 0;
            copy(address - m.window, inside ? head + row * map.strides[1] + column * 2 : nullptr, bytes);
        }
}

uint32_t require_box(const char* name, uint32_t address, const TensorMap& map, const int (&at)[4], Site site) {
    require_map(name, map, site);
    uint32_t offset = offset_of(name, address, int64_t(map.box_rows) * map.pitch, uint32_t(8 * map.pitch), site);
    for (int i = 2; i < 4; ++i)
        if (at[i] < 0 || at[i] >= map.sizes[i])
            fault("%s at %s: %s %d of %ld", name, text(site).c_str(), i == 2 ? "head" : "batch", at[i],
                  long(map.sizes[i]));
    if (at[0] % 8)  // 16-byte chunks that are partly outside on the left are not emulated
        fault("%s at %s: column %d is not a multiple of 8", name, text(site).c_str(), at[0]);
    return offset;
}

// A load of this thread may read this, up to 16 bytes at a multiple of 16.
void check_source(const char* name, const unsigned char* global, int bytes, Site site) {
    const auto missing = [&](const char* what, const Where& there) {
        fault("fence_async_global is missing: %s reads address <0x%zx> at %s, which %s wrote%s%s", name,
              reinterpret_cast<size_t>(global), text(site).c_str(), what, there.line ? " at " : "",
              there.line ? text(there).c_str() : "");
    };
    global_access(global, size_t(bytes), Kind::read, site);
    if (!m.previous.empty() && !m.fiber->fenced_global && m.previous.contain(global, size_t(bytes)))
        missing("the previous kernel", {});
    auto found = m.global_writes.find(reinterpret_cast<uintptr_t>(global) / 16);
    if (found == m.global_writes.end() || found->second.block != m.block) return;
    const GlobalWrite& w = found->second;
    if (w.thread != m.self && !ordered(w.thread, w.time))
        fault("%s reads address <0x%zx> at %s, which thread %d wrote at %s with no barrier between", name,
              reinterpret_cast<size_t>(global), text(site).c_str(), w.thread, text(w.where).c_str());
    // By its writer before this thread knew, or by this thread since.
    const std::vector<Time>& fences = m.fibers[size_t(w.thread)].global_fences;
    if (w.async) return;
    bool there = w.fences < fences.size() && (w.thread == m.self || ordered(w.thread, fences[w.fences]));
    const Times* known = m.fiber->known_at_fence.get();
    bool here = known && (w.thread == m.self ? false : w.time < (*known)[w.thread]);
    if (!there && !here) missing(("thread " + std::to_string(w.thread)).c_str(), w.where);
}

void start_load(Load load, Site site) {
    const char* name = load.kind == Load::box ? "load_box" : "load_bytes";
    for (size_t i = load.to / 16; i < (load.to + size_t(load.size)) / 16; ++i) {
        Chunk& c = chunk(i);
        check_writer(c, name, i * 16, site);
        check_readers(c, name, i * 16, site);
        if (c.touched)
            for (size_t byte = i * 16; byte < i * 16 + 16; ++byte) {
                check_byte(byte, Kind::write, site);
                m.bytes[byte].write_time = 0;
                for (Byte::Read& r : m.bytes[byte].read) r.time = 0;
            }
        c.touched = c.written = false;
        c.async = c.in_flight = true;
        c.load = {0, m.self, 0, site};
        ++c.version;
    }
    const auto read = [&](const unsigned char* global, int bytes) { check_source(name, global, bytes, site); };
    if (load.kind == Load::bytes) {
        for (int i = 0; i < load.size; i += 16) read(load.from + i, 16);
    } else {
        for_chunks(load.map, load.at, load.to, [&](uint32_t, const unsigned char* global, int bytes) {
            if (bytes) read(global, bytes);
        });
    }
    memset(m.shared + load.to, poison, size_t(load.size));
    m.loads.push_back(load);
    ++m.statistics.loads;
}

void land(const Load& load) {
    m.self = load.thread;
    m.last = load.where;
    auto to = m.shared + load.to;
    if (load.kind == Load::bytes) {
        memcpy(to, load.from, size_t(load.size));
    } else {
        for_chunks(load.map, load.at, load.to, [](uint32_t offset, const unsigned char* global, int bytes) {
            memset(m.shared + offset, 0, 16);
            if (bytes) memcpy(m.shared + offset, global, size_t(bytes));
        });
    }
    Mbarrier& b = m.mbarriers[size_t(load.mbarrier)];
    for (size_t i = load.to / 16; i < (load.to + size_t(load.size)) / 16; ++i) {
        Chunk& c = chunk(i);
        c.in_flight = false;
        c.load.agent = mbarrier_agent(load.mbarrier);
        c.load.time = m.agent_clock[load.mbarrier];
    }
    b.last_landed = m.agent_clock[load.mbarrier];
    b.last = load;
    b.bytes -= load.size;
    complete(b, load.kind == Load::box ? "load_box" : "load_bytes", load.where);
}

void start_store(const char* name, Store& store, Site site) {
    Fiber& f = *m.fiber;
    m.agents_used = true;
    if (f.storer < 0) {
        if (m.storers == max_storers)
            fault("%s at %s: more than %d storing threads are not emulated", name, text(site).c_str(), max_storers);
        f.storer = m.storers++;
        f.store_group = m.agent_clock[max_mbarriers + max_warps + f.storer];
    }
    store.group = f.store_group;
    for (size_t i = store.from / 16; i < (store.from + size_t(store.size)) / 16; ++i) {
        check_async_read(i, name, site);
        Chunk& c = chunk(i);
        c.async = true;
        c.store = {store_agent(f.storer), m.self, store.group, site};
    }
    f.stores.push_back(store);
    ++m.statistics.stores;
}

void write(const Store& store) {
    m.last = store.where;
    if (!store.floats) {
        for_chunks(store.map, store.at, store.from, [&](uint32_t offset, const unsigned char* global, int bytes) {
            if (!bytes) return;
            global_access(global, size_t(bytes), Kind::write, store.where, true);
            memcpy(const_cast<unsigned char*>(global), &store.read[offset - store.from], size_t(bytes));
        });
        return;
    }
    global_access(store.floats, size_t(store.size), Kind::write, store.where, true);
    for (int i = 0; i < store.size / 4; ++i) {
        float x;
        memcpy(&x, &store.read[size_t(4 * i)], sizeof x);
        store.floats[i] = store.add ? store.floats[i] + x : x;
    }
}

// Global memory has what the stores of this thread no longer need shared memory for.
void finish_written() {
    for (const Store& store : m.fiber->written) write(store);
    m.fiber->written.clear();
}

}  // namespace

bool land_one() {
    if (m.loads.empty()) return false;
    m.polls = 0;
    size_t i = below(unsigned(m.loads.size()));
    Load load = m.loads[i];
    m.loads.erase(m.loads.begin() + long(i));
    int self = m.self;
    land(load);
    m.self = self;
    return true;
}

bool encode(TensorMap& map, const void* address, const int64_t (&sizes)[4], const int64_t (&strides)[3], int box_rows,
            int box_columns) {
    bool good = reinterpret_cast<uintptr_t>(address) % 16 == 0;
    for (int64_t size : sizes) good = good && size > 0 && size <= int64_t(1) << 32;
    for (int64_t stride : strides) good = good && stride > 0 && stride % 16 == 0 && stride < int64_t(1) << 40;
    good = good && box_rows > 0 && box_rows <= 256 && (box_columns == 16 || box_columns == 32 || box_columns == 64);
    map = {static_cast<const unsigned char*>(address), {}, {2}, box_rows, 2 * box_columns, good ? valid_map : 0};
    for (int i = 0; i < 4; ++i) map.sizes[i] = sizes[i];
    for (int i = 0; i < 3; ++i) map.strides[i + 1] = strides[i];
    return good;
}

void require_map(const char* name, const TensorMap& map, Site site) {
    if (map.valid != valid_map) fault("%s at %s: not a tensor map", name, text(site).c_str());
}

void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row, int head, int batch,
              Site site) {
    Load load{Load::box, map, {column, row, head, batch}, nullptr, 0, map.box_rows * map.pitch, 0, m.self, site};
    load.mbarrier = int(&mbarrier_at("load_box", barrier, site) - m.mbarriers.data());
    load.to = require_box("load_box", to, map, load.at, site);
    start_load(load, site);
}

void load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier, Site site) {
    if (bytes <= 0 || bytes % 16) fault("load_bytes at %s: %d bytes", text(site).c_str(), bytes);
    require_aligned("load_bytes (source)", from, 16, site);
    Load load{Load::bytes, {}, {}, static_cast<const unsigned char*>(from), 0, bytes, 0, m.self, site};
    load.mbarrier = int(&mbarrier_at("load_bytes", barrier, site) - m.mbarriers.data());
    load.to = offset_of("load_bytes", to, bytes, 16, site);
    start_load(load, site);
}

void store_box(const TensorMap& map, uint32_t from, int column, int row, int head, int batch, Site site) {
    Store store{map, {column, row, head, batch}, nullptr, false, 0, map.box_rows * map.pitch, 0, site};
    store.from = require_box("store_box", from, map, store.at, site);
    start_store("store_box", store, site);
}

void store_floats(float* to, uint32_t from, int floats, bool add, Site site) {
    const char* name = add ? "reduce_floats" : "store_floats";
    if (floats <= 0 || floats % 4) fault("%s at %s: %d floats", name, text(site).c_str(), floats);
    require_aligned(add ? "reduce_floats (destination)" : "store_floats (destination)", to, 16, site);
    Store store{{}, {}, to, add, offset_of(name, from, floats * 4, 16, site), floats * 4, 0, site};
    start_store(name, store, site);
}

void store_box_commit() { ++m.fiber->store_group; }

void store_box_wait(int newest_allowed) {
    Fiber& f = *m.fiber;
    if (f.storer < 0) return;
    size_t done = 0;
    while (done < f.stores.size() && f.stores[done].group + Time(newest_allowed) < f.store_group) {
        Store& store = f.stores[done++];
        store.read.assign(m.shared + store.from, m.shared + store.from + store.size);
        f.written.push_back(std::move(store));
    }
    f.stores.erase(f.stores.begin(), f.stores.begin() + long(done));
    Time& known = m.known[m.self][store_agent(f.storer)];
    Time all = f.store_group - std::min(Time(newest_allowed), f.store_group);
    known = std::max(known, all);
}

void store_box_finish() {
    store_box_wait(0);
    finish_written();
}

void fence_async() {
    m.fiber->fences.push_back(m.clock[m.self / 32]);
    mbarrier_init_fence();
}

void fence_async_global() {
    Fiber& f = *m.fiber;
    f.fenced_global = ordered(previous_kernel, Time(m.block));
    f.global_fences.push_back(m.clock[m.self / 32]);
    if (!f.known_at_fence) f.known_at_fence = std::make_unique<Times>();
    for (int t = 0; t < m.threads; ++t) (*f.known_at_fence)[t] = std::max(m.known[m.self][t], m.floor[t]);
}

// ---- registers ----------------------------------------------------------------------------------------------------

void set_registers(const char* name, int count, bool more, Site site) {
    if (m.threads % 128) fault("%s at %s: a block of %d threads", name, text(site).c_str(), m.threads);
    Warpgroup& group = m.warpgroups[m.self / 128];
    if (group.register_calls++ % 128 == 0) {
        if (more ? count < group.registers : count > group.registers)
            fault("%s at %s: from %d registers to %d", name, text(site).c_str(), group.registers, count);
        group.registers = count;
    } else if (group.registers != count) {
        fault("%s at %s: %d registers, %d for other threads of the warpgroup", name, text(site).c_str(), count,
              group.registers);
    }
}

// ---- products of a warpgroup --------------------------------------------------------------------------------------

namespace {

// Offsets in shared memory of an operand's 16-byte chunks, as the hardware finds them: eight rows of the pitch are a
// core matrix. Along K: chunk 2 r + h holds row r, summed elements 8 h ... Along M or N: chunk k extent / 8 + c holds
// summed element k, rows 8 c ...
void find_chunks(std::vector<uint32_t>& chunks, uint64_t descriptor, bool mn_major, int extent, Site site) {
    const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
    uint32_t start = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 49 & 7) fault("multiply at %s: a base offset is not emulated", text(site).c_str());
    if (descriptor >> 62 == 0) fault("multiply at %s: operands without swizzle are not emulated", text(site).c_str());
    uint32_t pitch = 256u >> (descriptor >> 62);
    const auto add = [&](uint32_t address) {
        address = swizzled(address & 0x3ffff, int(pitch));
        chunks.push_back(offset_of("multiply", address, 16, 16, site));
    };
    if (mn_major) {
        uint32_t per_slab = pitch / 16;
        for (uint32_t k = 0; k < 16; ++k)
            for (uint32_t c = 0; c < uint32_t(extent) / 8; ++c)
                add(start + c / per_slab * leading + c % per_slab * 16 + k / 8 * stride + k % 8 * pitch);
    } else {
        for (uint32_t r = 0; r < uint32_t(extent); ++r)
            for (uint32_t h = 0; h < 2; ++h) add(start + r / 8 * stride + r % 8 * pitch + 16 * h);
    }
}

// Element (r, k) of an operand goes to out[r * row_step + k * k_step].
template <class T> void load_operand(T* out, size_t row_step, size_t k_step, const std::vector<uint32_t>& chunks,
                                     bool mn_major, int extent, bool bf16) {
    for (size_t i = 0; i < chunks.size(); ++i) {
        uint16_t x[8];
        memcpy(x, m.shared + chunks[i], 16);
        for (size_t e = 0; e < 8; ++e) {
            size_t per_k = size_t(extent) / 8;
            size_t r = mn_major ? i % per_k * 8 + e : i / 2, k = mn_major ? i / per_k : i % 2 * 8 + e;
            out[r * row_step + k * k_step] = bf16 ? from_bf16(x[e]) : from_f16(x[e]);
        }
    }
}

bool same(const ProductOperands& x, const ProductOperands& y) {
    return x.columns == y.columns && x.a_in_registers == y.a_in_registers && x.a_mn_major == y.a_mn_major &&
           x.b_mn_major == y.b_mn_major && x.accumulate == y.accumulate && x.bf16 == y.bf16 && x.a == y.a && x.b == y.b;
}

constexpr int accumulator_under_way = 128;

// Row of the warp's 16, and column, of a lane's register of an accumulator.
int row_of(int lane, int r) { return lane / 4 + 8 * (r / 2 % 2); }
int column_of(int lane, int r) { return 8 * (r / 4) + 2 * (lane % 4) + r % 2; }

// This warp may read its 16 rows of A, and B, from now on until its product_wait.
void read_operands(const Product& product, Time group) {
    size_t warp = size_t(m.self / 32);
    const auto read = [&](uint32_t offset) {
        Chunk& c = chunk(offset / 16);
        if (c.checked[warp] != c.version + 1) {
            check_async_read(offset / 16, "a product", product.site);
            c.checked[warp] = c.version + 1;
        }
        c.async = true;
        c.product[warp] = group;
        c.product_where = product.site;
    };
    for (size_t i = 0; i < product.a_chunks.size(); ++i)
        if ((product.operands.a_mn_major ? i % 8 / 2 : i / 32) == warp % 4) read(product.a_chunks[i]);
    for (uint32_t offset : product.b_chunks) read(offset);
}

size_t word_of(const void* p) { return size_t(static_cast<const char*>(p) - m.stacks) / 4; }
bool on_stack(const void* p) { return word_of(p) < max_threads * stack_bytes / 4; }

// By how much the state of these registers changes.
void mark(const void* registers, int count, int change) {
    if (on_stack(registers))
        for (int i = 0; i < count; ++i) m.under_way[word_of(registers) + size_t(i)] += uint8_t(change);
}

void require_fence(const void* registers, int count, const char* which, Site site) {
    if (on_stack(registers))
        for (int i = 0; i < count; ++i)
            if (m.written_at[word_of(registers) + size_t(i)] >= m.fiber->fence)
                fault("multiply at %s: product_fence is missing: %s %d was written after the last one",
                      text(site).c_str(), which, i);
}

void start_accumulator(Accumulator& accumulator, float* d, bool accumulate, Site site) {
    int lane = m.self % 32;
    if (!m.fiber->product_fenced)
        fault("multiply at %s: product_fence is missing: these accumulators are not under way", text(site).c_str());
    require_fence(d, accumulator.columns / 2, "accumulator", site);
    if (on_stack(d))
        for (int r = 0; r < accumulator.columns / 2; ++r)
            if (m.under_way[word_of(d + r)])
                fault("multiply at %s: accumulator %d is part of another product under way", text(site).c_str(), r);
    mark(d, accumulator.columns / 2, accumulator_under_way);
    for (int r = 0; r < accumulator.columns / 2; ++r)
        accumulator.c[row_of(lane, r)][column_of(lane, r)] = accumulate ? d[r] : 0.0f;
    memset(d, poison, sizeof(float) * size_t(accumulator.columns / 2));
    accumulator.at[lane] = d;
}

// c += a b for the 16 rows of a warp, each sum exact and then truncated to float32.
void multiply_add(float (&c)[16][256], const float (&a)[16][16], const double* b, int columns) {
    for (int i = 0; i < 16; ++i) {
        double sum[256] = {};
        for (int k = 0; k < 16; ++k) {
            double x = a[i][k];
            for (int j = 0; j < columns; ++j) sum[j] += x * b[k * columns + j];
        }
        for (int j = 0; j < columns; ++j) c[i][j] = float(truncated(c[i][j] + sum[j]));
    }
}

void carry_out(Part& part, int warp) {
    Product& product = *part.product;
    Accumulator& accumulator = *part.accumulator;
    const ProductOperands& x = product.operands;
    if (!product.loaded) {
        product.loaded = true;
        product.b.resize(size_t(x.columns) * 16);
        load_operand(product.b.data(), 1, size_t(x.columns), product.b_chunks, x.b_mn_major, x.columns, x.bf16);
        product.a.resize(64 * 16);
        load_operand(product.a.data(), 16, 1, product.a_chunks, x.a_mn_major, 64, x.bf16);
    }
    float a[16][16];
    if (x.a_in_registers) {
        for (int l = 0; l < 32; ++l) {
            mark(part.a_at[l], 4, -1);
            if (memcmp(part.a_at[l], part.a[l], sizeof part.a[l]))
                fault("registers of A were written while the product at %s was under way (lane %d)",
                      text(product.site).c_str(), l);
            for (int r = 0; r < 4; ++r)
                for (int h = 0; h < 2; ++h) {
                    uint16_t bits = uint16_t(part.a[l][r] >> 16 * h);
                    a[l / 4 + r % 2 * 8][l % 4 * 2 + r / 2 * 8 + h] = x.bf16 ? from_bf16(bits) : from_f16(bits);
                }
        }
    } else {
        memcpy(a, product.a.data() + warp % 4 * 256, sizeof a);
    }
    if (!x.accumulate) memset(accumulator.c, 0, sizeof accumulator.c);
    multiply_add(accumulator.c, a, product.b.data(), x.columns);
    ++m.statistics.products;
    if (--accumulator.parts) return;
    for (int l = 0; l < 32; ++l) {
        float* d = accumulator.at[l];
        mark(d, x.columns / 2, -accumulator_under_way);
        for (int r = 0; r < x.columns / 2; ++r) {
            uint32_t bits;
            memcpy(&bits, d + r, sizeof bits);
            if (bits != 0xffffffffu)
                fault("accumulators were written while the product at %s was under way (lane %d, register %d)",
                      text(product.site).c_str(), l, r);
            d[r] = accumulator.c[row_of(l, r)][column_of(l, r)];
        }
    }
    auto& live = m.products[warp].live;
    live.erase(std::find(live.begin(), live.end(), part.accumulator));
}

}  // namespace

void register_access(const void* address, size_t size, Kind kind, Where where) {
    for (size_t i = word_of(address), end = i + (size + 3) / 4; i < end; ++i) {
        if (m.under_way[i] & accumulator_under_way)
            fault("%s an accumulator at %s while its product is under way", verb(kind), text(where).c_str());
        if (kind == Kind::read) continue;
        if (m.under_way[i]) fault("writes a register of A at %s while its product is under way", text(where).c_str());
        m.written_at[i] = m.fences;
    }
}

void multiply(const ProductOperands& operands, float* d, const uint32_t* a, Site site) {
    if (m.threads % 128) fault("multiply at %s: a block of %d threads", text(site).c_str(), m.threads);
    if (operands.columns % 8 || operands.columns < 8 || operands.columns > 256)
        fault("multiply at %s: %d columns", text(site).c_str(), operands.columns);
    Fiber& f = *m.fiber;
    int lane = m.self % 32, warp = m.self / 32;
    Warpgroup& warpgroup = m.warpgroups[warp / 4];
    WarpProducts& products = m.products[warp];
    size_t number = f.products++;
    m.agents_used = true;

    if (number == warpgroup.first + warpgroup.products.size()) {
        auto product = std::make_shared<Product>();
        product->site = site;
        product->operands = operands;
        if (!operands.a_in_registers) find_chunks(product->a_chunks, operands.a, operands.a_mn_major, 64, site);
        find_chunks(product->b_chunks, operands.b, operands.b_mn_major, operands.columns, site);
        warpgroup.products.push_back(std::move(product));
    }
    std::shared_ptr<Product> product = warpgroup.products[number - warpgroup.first];
    if (product->site.line != site.line || !same(product->operands, operands))
        fault("divergent warpgroup: this thread is at multiply %s%s, others at multiply %s", text(site).c_str(),
              product->site.line == site.line ? " with other operands" : "", text(product->site).c_str());

    if (number == products.first + products.parts.size()) {
        Part part;
        part.product = product;
        part.group = f.product_group;
        for (auto& live : products.live)
            if (live->at[lane] == d) part.accumulator = live;
        if (!part.accumulator) {
            part.accumulator = std::make_shared<Accumulator>();
            part.accumulator->columns = operands.columns;
            part.accumulator->site = site;
            products.live.push_back(part.accumulator);
        }
        ++part.accumulator->parts;
        products.parts.push_back(std::move(part));
    }
    Part& part = products.parts[number - products.first];
    Accumulator& accumulator = *part.accumulator;
    if (part.group != f.product_group)
        fault("divergent warpgroup: not all lanes made a product_commit before multiply at %s", text(site).c_str());
    if (accumulator.columns != operands.columns || (accumulator.at[lane] && accumulator.at[lane] != d))
        fault("multiply at %s: other accumulators than the product at %s, which is under way", text(site).c_str(),
              text(accumulator.site).c_str());
    if (!accumulator.at[lane]) start_accumulator(accumulator, d, operands.accumulate, site);
    if (a) {
        require_fence(a, 4, "register of A", site);
        mark(a, 4, 1);
        part.a_at[lane] = a;
        memcpy(part.a[lane], a, sizeof part.a[lane]);
    }
    // Checked with what the first lane knows; whatever order the lanes come in, one that does not know is first at
    // times.
    if (++part.lanes == 1) read_operands(*product, part.group);
    if (++product->threads == 128) {
        wake(warpgroup.waiting);
        warpgroup.waiting.clear();
    }
}

void product_fence() {
    m.fiber->product_fenced = true;
    m.fiber->fence = ++m.fences;
}
void product_commit() { ++m.fiber->product_group; }

void product_wait(int newest_allowed, Site site) {
    Fiber& f = *m.fiber;
    int warp = m.self / 32;
    Time done = f.product_group - std::min(Time(newest_allowed), f.product_group);
    // No part of a product starts before all warps have come to it.
    WarpProducts& products = m.products[warp];
    for (size_t i = 0; i < products.parts.size() && products.parts[i].group < done; ++i) {
        std::shared_ptr<Product> product = products.parts[i].product;
        while (product->threads < 128) {
            m.warpgroups[warp / 4].waiting.push_back(m.self);
            wait("product_wait", site);
        }
    }
    warp_collective("product_wait", site, &done, [](void* const operands[32]) {
        int warp = m.self / 32;
        WarpProducts& products = m.products[warp];
        Warpgroup& warpgroup = m.warpgroups[warp / 4];
        Time done = *static_cast<Time*>(operands[0]);
        for (int l = 1; l < 32; ++l)
            if (*static_cast<Time*>(operands[l]) != done)
                fault("product_wait: the lanes of a warp have committed different groups");
        while (!products.parts.empty() && products.parts[0].group < done) {
            Part& part = products.parts[0];
            carry_out(part, warp);
            ++part.product->warps_done;
            products.parts.pop_front();
            ++products.first;
        }
        while (!warpgroup.products.empty() && warpgroup.products[0]->warps_done == 4) {
            warpgroup.products.pop_front();
            ++warpgroup.first;
        }
    });
    Time& known = m.known[m.self][product_agent(warp)];
    known = std::max(known, done);
    f.product_fenced = false;
}

void store_matrix_x4(uint32_t row, const uint32_t (&x)[4], Site site) {
    uint32_t offset = offset_of("store_matrix_x4", row, 16, 16, site);
    access(m.shared + offset, 16, Kind::write, site);
    struct Operand {
        const uint32_t* x;
        unsigned char* row;
    } operand{x, m.shared + offset};
    warp_collective("store_matrix_x4", site, &operand, [](void* const operands[32]) {
        for (int i = 0; i < 32; ++i)
            for (int l = 0; l < 4; ++l)
                memcpy(static_cast<Operand*>(operands[i])->row + 4 * l,
                       static_cast<Operand*>(operands[i % 8 * 4 + l])->x + i / 8, 4);
    });
}

// ---- blocks -------------------------------------------------------------------------------------------------------

namespace {

// Of a thread, before anybody gives or takes some: all there are, as __launch_bounds__(threads, 1) allows.
int launch_registers() { return std::min(256, 65536 / m.threads / 8 * 8); }

}  // namespace

void start_block_sm90() {
    static const unsigned eagerness_of_64[] = {0, 1, 8, 64};
    m.eagerness = eagerness_of_64[below(4)];
    m.loads.clear();
    m.mbarriers.clear();
    m.mbarriers.reserve(max_mbarriers);
    m.storers = 0;
    for (int i = 0; i < max_agents; ++i) m.floor[max_threads + i] = ++m.agent_clock[i];
    m.floor[previous_kernel] = Time(m.block) + m.previous.empty();
    for (int w = 0; w < max_warps; ++w) {
        m.products[w].parts.clear();
        m.products[w].first = 0;
        m.products[w].live.clear();
    }
    for (Warpgroup& group : m.warpgroups) {
        group.products.clear();
        group.first = 0;
        group.waiting.clear();
        group.registers = launch_registers();
        group.register_calls = 0;
    }
    for (int t = 0; t < m.threads; ++t) {
        Fiber& f = m.fibers[size_t(t)];
        f.stores.clear();
        f.written.clear();
        f.storer = -1;
        f.store_group = 0;
        f.fences.clear();
        f.products = 0;
        f.product_group = m.agent_clock[max_mbarriers + t / 32];
        f.product_fenced = false;
        f.fence = 0;
        f.fenced_global = false;
        f.global_fences.clear();
        f.known_at_fence.reset();
    }
}

void exit_thread_sm90() {
    const Fiber& f = *m.fiber;
    if (!f.stores.empty()) fault("a thread exits while its store at %s is under way", text(f.stores[0].where).c_str());
    finish_written();
    const WarpProducts& products = m.products[m.self / 32];
    if (f.products > products.first)
        fault("a thread exits while its product at %s is under way", text(products.parts[0].product->site).c_str());
    // What the next block starts from.
    Time& group = m.agent_clock[max_mbarriers + m.self / 32];
    group = std::max(group, f.product_group);
    if (f.storer >= 0) m.agent_clock[max_mbarriers + max_warps + f.storer] = f.store_group;
}

void end_block_sm90() {
    while (land_one()) {
    }
    for (const Mbarrier& b : m.mbarriers)
        if (b.last_landed && b.last_landed >= b.waited)
            fault("the block exits and nobody has waited for the load of thread %d at %s", b.last.thread,
                  text(b.last.where).c_str());
    int registers = 0;
    for (int g = 0; g < m.threads / 128; ++g) {
        if (m.warpgroups[g].register_calls % 128)
            fault("take_registers or give_registers: not by all threads of warpgroup %d", g);
        registers += m.warpgroups[g].registers;
    }
    if (registers > launch_registers() * (m.threads / 128))
        fault("take_registers: the warpgroups have %d registers a thread together, the block started with %d",
              registers, launch_registers() * (m.threads / 128));
}

}  // namespace emulator
