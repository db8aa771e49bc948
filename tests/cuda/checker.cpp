// What kernels do to memory, watched access by access, for kernels that run as PTX (ptx.py): what compute-sanitizer
// would say of them on a device (memcheck, racecheck, initcheck), and races between blocks and between launches too.
//
// Every byte that was touched has a cell: whether it was written, who wrote it last, who read it since. An access has to
// come after those that it conflicts with, by what orders accesses in the PTX memory model ("Causality order"):
//
//   one thread        its program
//   one warp          bar.warp.sync of all lanes; shuffles and votes order nothing
//   one block         bar.sync
//   blocks            a thread's fence, then its atomic operation, seen by another's atomic operation, then that one's
//                     fence; what the first thread's block did before a barrier in front of the fence comes along, and
//                     the second's block has it behind its next barrier
//   launches          all of a level come behind all of the level before; within a level nothing is ordered. What is
//                     begun early (programmatic dependent launch) comes behind its griddepcontrol.wait only, and before
//                     that behind what was done when the first of such launches in a row began
//
// Blocks run one after the other, but what is ordered is judged by the above alone, so that a race between blocks is
// seen whichever ran first. Who writes to global memory what is there already races with nobody: either value is right.
// Not seen: a write between a thread's fence and its atomic operation is taken for fenced.
#pragma GCC optimize("O2")
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

namespace {

enum Kind { READ, WRITE, ATOMIC, CONSTANT, ASKED };  // ASKED: for the cache, whatever it is
enum { MOST_THREADS = 1024, MANY_OF_WARP = 1024, MANY = 2047, MANY_BLOCKS = 16383, SHARED_BYTES = 1 << 18 };

struct Stamp {  // launch 0: nobody
    uint64_t launch : 22, block : 14, epoch : 10, thread : 11, warp_epoch : 6, atomic : 1;
};
struct Cell {
    Stamp write, read;
    bool written;
};
struct Page {
    Cell cell[4096];
};
struct Allocation {
    uint64_t bytes;
    bool written;  // all of it, where a page does not say otherwise
};
struct Bound {  // of a block's accesses: those before `epoch`, and those of `thread` up to it
    unsigned epoch, thread;
};
typedef std::map<unsigned, Bound> Clock;  // by block

std::map<uint64_t, Allocation> allocations;
std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
Cell shared_cells[SHARED_BYTES];
unsigned launch, level_first = 1, block, epoch, threads;
unsigned done_first = 1;  // launches from this number on may not be done when an early one begins
bool is_early, any_waited;
bool waited[MOST_THREADS];
unsigned warp_epoch[MOST_THREADS], fenced[MOST_THREADS];  // fenced: epoch + 1 of the last fence
Clock acquired[MOST_THREADS], pending[MOST_THREADS], of_block;
std::unordered_map<uint64_t, Clock> released;  // by the address of an atomic operation
bool acquires;                                 // whether any thread of the block has acquired something
char said[400];

void join(Clock& to, const Clock& from) {
    for (const auto& [other, bound] : from) {
        auto [at, is_new] = to.emplace(other, bound);
        if (!is_new && at->second.epoch < bound.epoch) at->second = bound;
    }
}

bool covers(const Clock& clock, const Stamp& prior) {
    const auto at = clock.find(prior.block);
    if (at == clock.end()) return false;
    return prior.epoch < at->second.epoch || (prior.thread == at->second.thread && prior.epoch == at->second.epoch);
}

// Whether what left a stamp comes before what this thread does now.
bool ordered(const Stamp& prior, unsigned thread) {
    if (!prior.launch) return true;
    if (prior.launch != launch) return prior.launch < (is_early && !waited[thread] ? done_first : level_first);
    if (prior.block == MANY_BLOCKS) return false;
    if (prior.block != block) return covers(of_block, prior) || covers(acquired[thread], prior);
    if (prior.epoch < epoch || prior.thread == thread) return true;
    const bool same_warp = prior.thread < MOST_THREADS ? prior.thread / 32 == thread / 32
                                                       : prior.thread == MANY_OF_WARP + thread / 32;
    return same_warp && prior.warp_epoch < warp_epoch[thread];
}

Stamp stamp_of(unsigned thread, bool atomic) {
    return {launch, block, epoch, thread, warp_epoch[thread], atomic};
}

void note_read(Stamp& read, unsigned thread) {
    const Stamp now = stamp_of(thread, false);
    if (!read.launch || read.launch < level_first) {
        read = now;
    } else if (read.launch != launch || read.block != block) {
        read = now, read.block = MANY_BLOCKS, read.thread = MANY;
    } else if (read.epoch < epoch || read.thread == thread) {
        read = now;
    } else {
        const bool same_warp = read.thread < MOST_THREADS ? read.thread / 32 == thread / 32
                                                          : read.thread == MANY_OF_WARP + thread / 32;
        read.thread = same_warp ? MANY_OF_WARP + thread / 32 : MANY;
        read.warp_epoch = now.warp_epoch;
    }
}

const char* conflict(const char* memory, const char* does, const char* did, const Stamp& prior) {
    char who[60];
    if (prior.launch != launch)
        snprintf(who, sizeof who, "a launch beside this one");
    else if (prior.block == MANY_BLOCKS)
        snprintf(who, sizeof who, "several blocks");
    else if (prior.thread >= MOST_THREADS)
        snprintf(who, sizeof who, "several threads of block %u", (unsigned)prior.block);
    else
        snprintf(who, sizeof who, "thread %u of block %u", (unsigned)prior.thread, (unsigned)prior.block);
    snprintf(said, sizeof said, "race: %s %s memory that %s %s, and nothing orders them", does, memory, who, did);
    return said;
}

// `same`: what is written is there already.
const char* touch(Cell& cell, const char* memory, int kind, unsigned thread, bool same = false) {
    const bool writes = kind == WRITE || kind == ATOMIC;
    const char* const does = kind == WRITE ? "writes" : kind == ATOMIC ? "changes" : "reads";
    if (kind != WRITE && !cell.written) {
        snprintf(said, sizeof said, "%s %s memory that nobody has written", does, memory);
        return said;
    }
    if (!same && !(kind == ATOMIC && cell.write.atomic) && !ordered(cell.write, thread))
        return conflict(memory, does, "wrote", cell.write);
    if (!same && writes && !ordered(cell.read, thread)) return conflict(memory, does, "read", cell.read);
    if (kind == CONSTANT && cell.write.launch == launch) {
        snprintf(said, sizeof said, "reads by ld.global.nc what this launch wrote");
        return said;
    }
    if (writes)
        cell.write = stamp_of(thread, kind == ATOMIC), cell.read = Stamp(), cell.written = true;
    else
        note_read(cell.read, thread);
    return nullptr;
}

// The allocation that an address lies in, or null.
std::pair<const uint64_t, Allocation>* latest;

std::pair<const uint64_t, Allocation>* allocation_of(uint64_t at) {
    if (latest && at - latest->first < latest->second.bytes) return latest;
    auto above = allocations.upper_bound(at);
    if (above == allocations.begin()) return nullptr;
    --above;
    return at - above->first < above->second.bytes ? latest = &*above : nullptr;
}

struct Known {
    uint64_t number = ~0ull;
    Page* page;
} known[256];  // pages that were asked for lately

Page& page_of(uint64_t number) {
    Known& last = known[number % 256];
    if (last.number == number) return *last.page;
    std::unique_ptr<Page>& page = pages[number];
    if (!page) {
        page = std::make_unique<Page>();
        memset((void*)page.get(), 0, sizeof(Page));
        for (uint64_t k = 0; k < 4096;) {  // allocation by allocation
            const auto* const there = allocation_of(number * 4096 + k);
            const uint64_t end = there ? there->first + there->second.bytes - number * 4096 : k + 1;
            for (; k < end && k < 4096; k++) page->cell[k].written = there && there->second.written;
        }
    }
    last.number = number, last.page = page.get();
    return *page;
}

// Bytes become as if a host had just written them, or as if nobody had.
void set_bytes(uint64_t at, uint64_t bytes, bool written) {
    const uint64_t end = at + bytes;
    auto* const there = allocation_of(at);
    const bool whole = there && there->first == at && there->second.bytes == bytes;
    if (whole) there->second.written = written;
    while (at < end) {
        const uint64_t number = at / 4096, next = (number + 1) * 4096 < end ? (number + 1) * 4096 : end;
        const bool all = next - at == 4096;
        if (whole && all)
            pages.erase(number), known[number % 256].number = ~0ull;
        else if (!whole || pages.count(number)) {
            Page& page = page_of(number);
            for (uint64_t k = at; k < next; k++) page.cell[k % 4096] = Cell{Stamp(), Stamp(), written};
        }
        at = next;
    }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void checker_allocate(uint64_t at, uint64_t bytes) {
    allocations[at] = {bytes, false};
    set_bytes(at, bytes, false);
}
void checker_free(uint64_t at) {
    const uint64_t bytes = allocations[at].bytes;
    set_bytes(at, bytes, false);
    allocations.erase(at), latest = nullptr;
}
void checker_written(uint64_t at, uint64_t bytes) { set_bytes(at, bytes, true); }

// The launches from here on are a level: they come behind all before them, and beside one another.
void checker_level() {
    if (!is_early) done_first = level_first;
    level_first = launch + 1;
    is_early = false;
}
// The launch to come begins early. Others begin when all of the level before are done.
void checker_early(uint64_t early) { is_early = early; }

void checker_launch(int n_threads) {
    launch++;
    any_waited = false;
    threads = n_threads;
    released.clear();
}
const char* checker_block(uint64_t number) {
    block = number;
    epoch = 1;
    memset(shared_cells, 0, sizeof shared_cells);
    memset(warp_epoch, 0, sizeof warp_epoch);
    memset(fenced, 0, sizeof fenced);
    memset(waited, 0, sizeof waited);
    for (unsigned k = 0; k < threads && acquires; k++) acquired[k].clear(), pending[k].clear();
    of_block.clear();
    acquires = false;
    return number < MANY_BLOCKS && launch < 1 << 22 ? nullptr : "more blocks or launches than the checker counts";
}
// A launch has ended. If one that begins early did not wait at all, it could be done before those in front of it are, and
// who waits for it alone would begin too soon.
const char* checker_done() { return is_early && !any_waited ? "a kernel that begins early does not wait" : nullptr; }
const char* checker_barrier() {
    for (unsigned k = 0; k < threads && acquires; k++) join(of_block, acquired[k]);
    return ++epoch < 1023 ? nullptr : "more barriers than the checker counts";
}
void checker_wait(int thread) { waited[thread] = any_waited = true; }
void checker_warp(int thread) { warp_epoch[thread] = warp_epoch[thread] < 63 ? warp_epoch[thread] + 1 : 63; }

void checker_fence(int thread) {
    fenced[thread] = epoch + 1;
    if (!pending[thread].empty()) join(acquired[thread], pending[thread]), pending[thread].clear(), acquires = true;
}

// `value`: what is written, or null.
const char* checker_global(uint64_t at, int bytes, int kind, int thread, const uint8_t* value) {
    const auto* const there = allocation_of(at);
    if (!there || at + bytes > there->first + there->second.bytes) {
        snprintf(said, sizeof said, "an access of %d bytes outside of what was allocated", bytes);
        return said;
    }
    if (kind == ASKED) return nullptr;
    Cell* const cells = page_of(at / 4096).cell + at % 4096;  // which lie in one page: the address is aligned
    for (int k = 0; k < bytes; k++) {
        Cell& cell = cells[k];
        const bool same = value && cell.written && value[k] == ((const uint8_t*)at)[k];
        if (const char* fault = touch(cell, "global", kind, thread, same)) return fault;
    }
    if (kind == ATOMIC) {
        Clock& clock = released[at];
        if (!clock.empty()) join(pending[thread], clock), acquires = true;
        if (fenced[thread]) {  // a release: what came before the fence, and what had been acquired by then
            clock[block] = {fenced[thread] - 1, (unsigned)thread};
            join(clock, acquired[thread]), join(clock, of_block);
        }
    }
    return nullptr;
}
const char* checker_shared(uint32_t at, int bytes, int kind, int thread) {
    for (int k = 0; k < bytes; k++)
        if (const char* fault = touch(shared_cells[at + k], "shared", kind, thread)) return fault;
    return nullptr;
}
}
#pragma GCC visibility pop
