// Runs kernels on the CPU: threads, blocks and what they meet at. Knows nothing of CUDA's spelling (cuda.h) or of PTX
// (ptx.h).
//
// A thread is a fibre with a stack of its own. A block is one OS thread that runs its fibres one at a time, each until it
// has to wait: so `__shared__` is `thread_local`, and nothing inside a block is ever a data race. Several blocks run at
// once, their ids handed out in order, as on a GPU: blocks that wait for earlier ones make progress.
//
// What a GPU leaves open is varied from launch to launch (`Launch::schedule`): fibres run in ascending or descending
// order, asynchronous copies happen at once or as late as they may, and one warp of a block may get on only when no other
// does. A kernel that forgets a barrier or a wait computes wrong bits in one of these. Shared memory begins as garbage.
#pragma once
// C's headers where they do: most of a kernel's compilation is reading headers.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sched.h>
#include <new>
#include <type_traits>
#include <utility>
#ifdef __linux__
#include <link.h>
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace emulator {

// The twin of `Launch` in driver/emulated.rs.
struct Launch {
    const char* kernel;
    const void* const* arguments;
    const size_t* sizes;  // of the arguments
    size_t count;         // of the arguments
    uint32_t grid[3];
    uint32_t block;
    uint32_t shared;      // bytes of dynamic shared memory
    uint32_t dependent;   // whether every thread has to call wait_dependencies
    uint32_t schedule;    // DESCENDING | LATE | SLOW, and the number of the slow warp above
    char* stacks;         // [workers][MAX_THREADS] of STACK bytes, aligned to STACK
    char* message;        // what went wrong, if something did
    size_t message_bytes;
    // Shared by the workers, and atomic.
    uint64_t next;        // block to be begun
    uint64_t progress;    // counts whatever happens
    uint64_t failed;      // not 0: `message` says why
};
constexpr uint32_t DESCENDING = 1, LATE = 2, SLOW = 4, SLOW_WARP = 3;
constexpr size_t STACK = 64 << 10, MAX_THREADS = 1024;
constexpr uint32_t LANES = 32;
// What shared memory holds before it is written: as a float -4.3e8, as an index far out.
constexpr unsigned char POISON = 0xcd;
// Nothing happened in any block for this long: a deadlock. Blocks that compute are never quiet.
constexpr time_t PATIENCE = 20;  // seconds

struct Dim {
    unsigned x, y, z;
};

// What a fibre waits for: that a counter of its block reaches a value. Without a counter it asks again by itself.
struct Wait {
    const uint64_t* counter = nullptr;
    uint64_t value = 0;
    const char* at = nullptr;
    bool polls = false;
};

// A meeting of so many: arrivals complete a phase.
struct Meeting {
    uint64_t phase = 0;
    uint32_t arrived = 0;
};

// A warp's collective: what each lane brought, in two buffers: no lane is two phases ahead of another.
struct Warp {
    Meeting meeting;
    uint32_t live = 0;
    const char* at = nullptr;
    uint32_t present[2] = {};  // lanes that brought something
    uint64_t brought[2][LANES][6];
};

// A list that forgets its values when it is cleared, and keeps its memory.
template <class T> struct List {
    T* values = nullptr;
    size_t count = 0, room = 0;
    void push(const T& v) {
        if (count == room) {
            room = room ? 2 * room : 64;
            values = (T*)realloc((void*)values, room * sizeof(T));
            if (!values) abort();
        }
        values[count++] = v;
    }
    ~List() { free((void*)values); }
};

struct Copy {
    void* to;
    const void* from;
    uint32_t bytes, group;
};
struct BulkCopy {
    void* to;
    const void* from;
    uint32_t bytes;
    unsigned long long* barrier;
};

struct Block;

// Lies at the low end of its stack, which is aligned: found from any address on the stack.
struct Fibre {
    void* context;
    Block* block;
    Dim thread;
    Wait wait;
    bool done, waited;
    uint32_t committed;         // groups of copies
    List<Copy>* copies;         // not yet made
    uint64_t guard;             // overwritten by a stack that grew too long
};
constexpr uint64_t GUARD = 0x5afe57ac5afe57ac;

// A block, and the worker's memory for it and those that follow.
struct Block {
    Launch& launch;
    void (*body)(const Launch&);
    Dim index;
    uint32_t live;
    void* scheduler;
    bool moved;  // something happened in this round
    bool ran;    // some fibre could go on
    Fibre* fibres[MAX_THREADS];
    Warp warps[MAX_THREADS / LANES];
    unsigned char* shared;  // dynamic, and a fence
    Meeting barriers[16];
    List<Copy> copies[MAX_THREADS];
    List<BulkCopy> bulk;

    bool late() const { return launch.schedule & LATE; }
    bool failed() const { return __atomic_load_n(&launch.failed, __ATOMIC_RELAXED); }
};

inline Fibre* current() { return (Fibre*)((uintptr_t)__builtin_frame_address(0) & ~(uintptr_t)(STACK - 1)); }
inline unsigned lane() { return current()->thread.x % LANES; }

// ---- Switching fibres --------------------------------------------------------------------------------------------------
#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");
inline void* new_context(char* stack, void (*entry)()) {
    uint64_t* top = (uint64_t*)(stack + STACK);
    *--top = 0;                // where a return address would be: the stack is as a call leaves it
    *--top = (uint64_t)entry;  // what `ret` goes to
    for (int i = 0; i < 6; i++) *--top = 0;
    return top;
}
#elif defined(__aarch64__)
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
inline void* new_context(char* stack, void (*entry)()) {
    uint64_t* top = (uint64_t*)(stack + STACK - 160);
    memset(top, 0, 160);
    top[11] = (uint64_t)entry;  // x30: what `ret` goes to
    return top;
}
#else
inline void emulator_switch(void** from, void* to) {
    // A context lives on the stack of whoever left; the new one's is at its top.
    ucontext_t here;
    *from = &here;
    swapcontext(&here, (ucontext_t*)to);
}
inline void* new_context(char* stack, void (*entry)()) {
    constexpr size_t ROOM = (sizeof(ucontext_t) + 63) / 64 * 64;
    ucontext_t* context = (ucontext_t*)(stack + STACK - ROOM);
    getcontext(context);
    context->uc_stack.ss_sp = stack + sizeof(Fibre);
    context->uc_stack.ss_size = STACK - ROOM - sizeof(Fibre);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

inline void leave() {
    Fibre* self = current();
    emulator_switch(&self->context, self->block->scheduler);
}

// ---- Failing -----------------------------------------------------------------------------------------------------------
__attribute__((format(printf, 2, 3))) inline void report(Launch& launch, const char* format, ...) {
    if (__atomic_exchange_n(&launch.failed, 1, __ATOMIC_SEQ_CST)) return;  // the first one is the cause
    va_list values;
    va_start(values, format);
    vsnprintf(launch.message, launch.message_bytes, format, values);
    va_end(values);
}

// Ends the launch, from a fibre. Does not return.
[[noreturn]] inline void fail(const char* what) {
    Fibre* self = current();
    const Dim b = self->block->index;
    report(self->block->launch, "%s (block %u,%u,%u thread %u)", what, b.x, b.y, b.z, self->thread.x);
    for (;;) leave();
}
inline void require(bool holds, const char* what) {
    if (!holds) fail(what);
}

// ---- Waiting -----------------------------------------------------------------------------------------------------------
// Something happened that others may wait for.
inline void move() { current()->block->moved = true; }

// Lets others run, and comes back whatever they did.
inline void poll(const char* at) {
    current()->wait = {nullptr, 0, at, true};
    leave();
}

inline void wait_for(const uint64_t& counter, uint64_t value, const char* at) {
    if (counter >= value) return;
    current()->wait = {&counter, value, at, false};
    leave();
}

inline bool complete(Meeting& meeting, uint32_t wanted) {
    if (meeting.arrived == 0 || meeting.arrived < wanted) return false;
    meeting.arrived = 0;
    meeting.phase++;
    return true;
}

// bar.sync: `count` threads, or all that have not ended.
inline void barrier(uint32_t id, uint32_t count, const char* at) {
    Block& block = *current()->block;
    Meeting& meeting = block.barriers[id];
    const uint64_t phase = meeting.phase;
    meeting.arrived++;
    move();
    complete(meeting, count ? count : block.live);
    wait_for(meeting.phase, phase + 1, at);
}

// What every lane of the warp brought to the same collective.
struct Gathered {
    const uint64_t (*of)[6];
    uint32_t lanes;  // that take part
};
inline void close_collective(Warp& warp) {
    if (complete(warp.meeting, warp.live)) warp.present[warp.meeting.phase % 2] = 0;
}
inline Gathered gather(unsigned mask, const uint64_t* values, size_t count, const char* at) {
    require(mask == ~0u, "a collective of a part of a warp, which the emulator does not know");
    Warp& warp = current()->block->warps[current()->thread.x / LANES];
    const uint64_t phase = warp.meeting.phase;
    require(warp.meeting.arrived == 0 || warp.at == at, "the lanes of a warp are at different collectives");
    warp.at = at;
    memcpy(warp.brought[phase % 2][lane()], values, count * sizeof *values);
    warp.present[phase % 2] |= 1u << lane();
    warp.meeting.arrived++;
    move();
    close_collective(warp);
    wait_for(warp.meeting.phase, phase + 1, at);
    return {warp.brought[phase % 2], warp.present[phase % 2]};
}

// ---- Running -----------------------------------------------------------------------------------------------------------
inline void run_fibre() {
    Fibre* self = current();
    Block& block = *self->block;
    block.body(block.launch);
    require(self->waited || !block.launch.dependent, "a thread ended without wait_dependencies()");
    self->done = true;
    block.moved = true;
    // Who has ended is waited for no longer.
    block.live--;
    complete(block.barriers[0], block.live);
    Warp& warp = block.warps[self->thread.x / LANES];
    warp.live--;
    close_collective(warp);
    for (;;) leave();
}

// Static shared memory is the library's only thread-local memory.
inline void poison_static_shared() {
#ifdef __linux__
    const auto visit = [](dl_phdr_info* info, size_t, void* here) {
        bool own = false;
        const ElfW(Phdr)* tls = nullptr;
        for (int i = 0; i < info->dlpi_phnum; i++) {
            const ElfW(Phdr)& h = info->dlpi_phdr[i];
            const uintptr_t start = info->dlpi_addr + h.p_vaddr;
            if (h.p_type == PT_LOAD && start <= (uintptr_t)here && (uintptr_t)here < start + h.p_memsz) own = true;
            if (h.p_type == PT_TLS) tls = &h;
        }
        if (own && tls && info->dlpi_tls_data) memset(info->dlpi_tls_data, POISON, tls->p_memsz);
        return own ? 1 : 0;
    };
    dl_iterate_phdr(visit, (void*)&poison_static_shared);
#endif
}

// Bytes behind dynamic shared memory that nobody may write.
constexpr size_t FENCE = 1024;
// Of dynamic shared memory.
constexpr size_t ALIGNMENT = 128;

inline void start(Block& block, char* stacks) {
    const Launch& launch = block.launch;
    block.live = launch.block;
    for (Warp& w : block.warps) w.meeting = Meeting(), w.live = 0, w.present[0] = w.present[1] = 0;
    for (Meeting& m : block.barriers) m = Meeting();
    memset(block.shared, POISON, launch.shared + FENCE);
    block.bulk.count = 0;
    poison_static_shared();
    for (uint32_t t = 0; t < launch.block; t++) {
        char* stack = stacks + t * STACK;
        block.copies[t].count = 0;
        Fibre* fibre = new (stack) Fibre{nullptr, &block, {t, 0, 0}, {}, false, false, 0, &block.copies[t], GUARD};
        fibre->context = new_context(stack, run_fibre);
        block.warps[t / LANES].live++;
        block.fibres[t] = fibre;
    }
}

inline void explain(Block& block) {
    // Where most of the threads that have not ended are.
    const char* at = "nothing";
    uint32_t waiting = 0;
    const uint32_t threads = block.launch.block;
    for (uint32_t t = 0; t < threads; t++) {
        if (block.fibres[t]->done) continue;
        uint32_t same = 0;
        for (uint32_t o = 0; o < threads; o++) same += !block.fibres[o]->done && block.fibres[o]->wait.at == block.fibres[t]->wait.at;
        if (same > waiting) waiting = same, at = block.fibres[t]->wait.at;
    }
    report(block.launch, "deadlock: in block %u,%u,%u %u of %u threads have not ended, of which %u wait at %s", block.index.x,
           block.index.y, block.index.z, block.live, threads, waiting, at);
}

// Runs the fibres of a warp until none can go on.
inline void run_warp(Block& block, uint32_t warp) {
    const uint32_t first = warp * LANES, rest = block.launch.block - first, count = rest < LANES ? rest : LANES;
    const bool down = block.launch.schedule & DESCENDING;
    bool again = true;
    while (again && !block.failed()) {
        again = false;
        for (uint32_t i = 0; i < count; i++) {
            Fibre* fibre = block.fibres[first + (down ? count - 1 - i : i)];
            if (fibre->done || (fibre->wait.counter && *fibre->wait.counter < fibre->wait.value)) continue;
            again |= !fibre->wait.polls;
            block.ran = true;
            fibre->wait = {};
            emulator_switch(&block.scheduler, fibre->context);
            if (fibre->guard != GUARD) report(block.launch, "the stack of a thread overflowed");
        }
    }
}

inline time_t seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

inline void run(Block& block) {
    Launch& launch = block.launch;
    const bool down = launch.schedule & DESCENDING;
    const uint32_t warps = (launch.block + LANES - 1) / LANES;
    const uint32_t slow = launch.schedule & SLOW ? (launch.schedule >> SLOW_WARP) % warps : warps;
    uint64_t seen = ~0ull;
    time_t since = 0;
    while (block.live > 0 && !block.failed()) {
        block.moved = block.ran = false;
        for (uint32_t i = 0; i < warps; i++) {
            const uint32_t w = down ? warps - 1 - i : i;
            if (w != slow) run_warp(block, w);
        }
        if (!block.moved && slow < warps) run_warp(block, slow);
        if (block.moved) {
            __atomic_fetch_add(&launch.progress, 1, __ATOMIC_RELAXED);
            continue;
        }
        if (!block.ran) explain(block);
        sched_yield();
        const uint64_t now = __atomic_load_n(&launch.progress, __ATOMIC_RELAXED);
        if (now != seen) seen = now, since = seconds();
        else if (seconds() - since > PATIENCE) explain(block);
    }
    const unsigned char* fence = block.shared + launch.shared;
    for (size_t i = 0; i < FENCE; i++)
        if (fence[i] != POISON) {
            report(launch, "block %u,%u,%u wrote past its %u bytes of dynamic shared memory", block.index.x, block.index.y,
                   block.index.z, launch.shared);
            break;
        }
}

// A worker's share of a launch: one block after the other, until none is left.
inline void work(Launch& launch, uint32_t worker, void (*body)(const Launch&)) {
    const uint64_t x = launch.grid[0], y = launch.grid[1], all = x * y * launch.grid[2];
    const size_t room = (launch.shared + FENCE + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    unsigned char* shared = (unsigned char*)aligned_alloc(ALIGNMENT, room);
    Block* block = new (malloc(sizeof(Block))) Block{launch, body};
    block->shared = shared;
    for (uint64_t i; (i = __atomic_fetch_add(&launch.next, 1, __ATOMIC_RELAXED)) < all && !block->failed();) {
        block->index = {(unsigned)(i % x), (unsigned)(i / x % y), (unsigned)(i / x / y)};
        start(*block, launch.stacks + worker * MAX_THREADS * STACK);
        run(*block);
        __atomic_fetch_add(&launch.progress, 1, __ATOMIC_RELAXED);
    }
    block->~Block();
    free(block);
    free(shared);
}

// Whether a launch has the arguments that a kernel takes, by number and size.
inline bool fits(Launch& l, const size_t* wanted, size_t count) {
    bool same = l.count == count;
    for (size_t i = 0; same && i < count; i++) same = l.sizes[i] == wanted[i];
    if (same) return true;
    char lists[2][160] = {};
    const auto list = [](char (&to)[160], const size_t* sizes, size_t count) {
        for (size_t i = 0, used = 0; i < count && used < sizeof to; i++) used += snprintf(to + used, sizeof to - used, " %zu", sizes[i]);
    };
    list(lists[0], wanted, count);
    list(lists[1], l.sizes, l.count);
    report(l, "it takes arguments of%s bytes, and got%s", lists[0], lists[1]);
    return false;
}

// Calls a kernel with a launch's arguments.
template <auto KERNEL, class... P, size_t... I> void call(const Launch& l, void (*)(P...), std::index_sequence<I...>) {
    KERNEL(*(const P*)l.arguments[I]...);
}
template <auto KERNEL, class... P> void enter(Launch& l, uint32_t worker, void (*kernel)(P...)) {
    constexpr size_t wanted[] = {sizeof(P)..., 0};
    if (!fits(l, wanted, sizeof...(P))) return;
    work(l, worker, [](const Launch& l) { call<KERNEL>(l, (void (*)(P...))nullptr, std::index_sequence_for<P...>()); });
}

}  // namespace emulator

// A kernel's entry for the host.
#define EMULATOR_KERNEL(name)                                                                              \
    extern "C" __attribute__((visibility("default"))) void emulate_##name(emulator::Launch* l, uint32_t worker) { \
        emulator::enter<&name>(*l, worker, name);                                                          \
    }
