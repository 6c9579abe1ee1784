// A device behind a pipe: takes requests on standard input (allocate, write, read, launch), answers on standard output.
//
// A process of its own, because a fault of a kernel ends it and no more than it, and because AddressSanitizer wants to be there
// from the start, which it cannot be in a library that a test loads. With PM_DRIVER it is a library all the same, without
// AddressSanitizer and without requests: see driver.cpp.
#ifdef PM_DRIVER
static void __sanitizer_start_switch_fiber(void **, const void *, size_t) {}
static void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) {}
#else
#include <sanitizer/common_interface_defs.h>
#endif
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <string>
#include <utility>

namespace shim {

static const size_t STACK = 256 << 10;

Fiber *current;
Dim block_index, grid_size;

static std::string kernel, skipped;
static uint64_t seed, random_state;
static const Entry *entry;
static std::vector<Argument> arguments;
static std::vector<Fiber> fibers;
// A heap: the fiber with the greatest turn is next.
static std::vector<Fiber *> runnable;
static std::set<std::string> sites;
static unsigned at_barrier;
static int any;
static int last_any;
static std::vector<unsigned> in_warp;
static std::vector<std::vector<Slot>> slots;
static void *scheduler_fake_stack;
static const void *scheduler_stack;
static size_t scheduler_stack_size;

struct Allocation {
    std::string site;
    unsigned char *memory;
    size_t bytes;
};
static std::vector<Allocation> allocations;
static size_t dynamic_bytes;

static uint64_t random_u64() {
    random_state += 0x9e3779b97f4a7c15;
    uint64_t x = random_state;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static bool is_later(const Fiber *a, const Fiber *b) { return a->turn < b->turn; }

// Under even seeds any fiber may be next. Under odd ones warps have ranks for as long as the block runs, and one goes on until it can
// go no further: the first then is a barrier or more ahead of the last.
static void let_run(Fiber &f) {
    f.state = RUNNING;
    uint64_t rank = seed % 2 == 0 ? 0 : fibers[f.warp * 32].rank;
    f.turn = rank << 32 | random_u64() >> 32;
    runnable.push_back(&f);
    std::push_heap(runnable.begin(), runnable.end(), is_later);
}

static std::string site_of(const char *file, int line) { return std::string(file) + ":" + std::to_string(line); }

void fail(const char *what, const char *file, int line) {
    fprintf(stderr, "%s: %s", kernel.c_str(), what);
    if (file[0]) fprintf(stderr, " at %s:%d", file, line);
    fprintf(stderr, " (block %u,%u,%u", block_index.x, block_index.y, block_index.z);
    if (current) fprintf(stderr, ", thread %u", current->index.x);
    fprintf(stderr, ", seed %llu)\n", (unsigned long long)seed);
    fflush(stderr);
    _exit(3);
}

// === Switching ===

#if defined(__x86_64__)
// Saves what a function must keep, then stands on the other stack.
extern "C" void shim_switch(void **save, void *to);
asm(R"(
.text
.globl shim_switch
shim_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
static void *scheduler_context;

static void prepare(Fiber &f, void (*start)()) {
    void **top = (void **)((char *)f.stack + STACK);
    // A function starts with its stack eight bytes off a multiple of 16.
    *--top = nullptr;
    *--top = (void *)start;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f.context = top;
}

static void enter(Fiber &f) { shim_switch(&scheduler_context, f.context); }
static void leave(Fiber &f) { shim_switch(&f.context, scheduler_context); }
#else
static ucontext_t scheduler_context;

static void prepare(Fiber &f, void (*start)()) {
    if (!f.context) f.context = new ucontext_t;
    ucontext_t *c = (ucontext_t *)f.context;
    getcontext(c);
    c->uc_stack.ss_sp = f.stack;
    c->uc_stack.ss_size = STACK;
    c->uc_link = nullptr;
    makecontext(c, start, 0);
}

static void enter(Fiber &f) { swapcontext(&scheduler_context, (ucontext_t *)f.context); }
static void leave(Fiber &f) { swapcontext((ucontext_t *)f.context, &scheduler_context); }
#endif

// Back to the scheduler until it is this fiber's turn again.
static void yield_fiber() {
    Fiber &f = *current;
    bool ended = f.state == ENDED;
    __sanitizer_start_switch_fiber(ended ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_size);
    leave(f);
    __sanitizer_finish_switch_fiber(f.fake_stack, &scheduler_stack, &scheduler_stack_size);
}

static void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
    entry->body->run(arguments);
    current->state = ENDED;
    yield_fiber();
    abort();
}

// === Waiting ===

int sync_threads(int predicate, const char *file, int line) {
    std::string site = site_of(file, line);
    sites.insert(site);
    if (site == skipped) return predicate;
    Fiber &f = *current;
    f.state = AT_BARRIER;
    f.file = file;
    f.line = line;
    any |= predicate;
    if (++at_barrier == fibers.size()) {
        for (Fiber &other : fibers) {
            if (other.line != line || strcmp(other.file, file) != 0) fail("threads wait at different barriers, one of them", file, line);
            let_run(other);
        }
        at_barrier = 0;
        last_any = any;
        any = 0;
    }
    yield_fiber();
    return last_any;
}

const Slot *exchange(const void *mine, size_t bytes) {
    Fiber &f = *current;
    // Two sets: a lane that is one exchange ahead does not overwrite what others have yet to read.
    f.phase ^= 1;
    Slot *set = slots[f.warp].data() + f.phase * 32;
    memcpy(set[f.lane].bytes, mine, bytes);
    f.state = IN_WARP;
    f.file = "an operation of the warp";
    f.line = 0;
    if (++in_warp[f.warp] == 32) {
        for (unsigned i = 0; i < 32; i++) let_run(fibers[f.warp * 32 + i]);
        in_warp[f.warp] = 0;
    }
    yield_fiber();
    return set;
}

static void finish_copy(const Copy &copy) {
    if (copy.live) {
        memcpy(copy.to, copy.from, 16);
    } else {
        memset(copy.to, 0, 16);
    }
}

void start_copy(Copy copy) {
    if (random_u64() % 2 == 0) {
        finish_copy(copy);
    } else {
        current->copies.back().push_back(copy);
    }
}

void await_copies(size_t pending) {
    sites.insert("await_copies");
    if (skipped == "await_copies") return;
    auto &groups = current->copies;
    // The last group is open and belongs to no wait.
    while (groups.size() > pending + 1) {
        for (const Copy &copy : groups.front()) finish_copy(copy);
        groups.erase(groups.begin());
    }
}

void *shared(const char *file, int line, size_t bytes) {
    std::string site = site_of(file, line);
    for (Allocation &a : allocations)
        if (a.site == site && a.bytes == bytes) return a.memory;
    unsigned char *memory = (unsigned char *)malloc(bytes);
    // NaN, whether read as bf16, f16 or float; a wild index, read as one.
    memset(memory, 0xff, bytes);
    allocations.push_back({site, memory, bytes});
    return memory;
}

void *dynamic_shared() { return shared("dynamic", 0, dynamic_bytes); }

// === Blocks ===

static void report_deadlock() {
    for (Fiber &f : fibers) {
        if (f.state == ENDED) continue;
        bool ended = std::any_of(fibers.begin(), fibers.end(), [](Fiber &other) { return other.state == ENDED; });
        current = &f;
        fail(ended ? "a thread waits for threads that have ended" : "threads wait for each other", f.file, f.line);
    }
}

static void run_block(unsigned threads) {
    fibers.resize(threads);
    in_warp.assign(threads / 32, 0);
    slots.assign(threads / 32, std::vector<Slot>(64));
    at_barrier = any = 0;
    for (unsigned i = 0; i < threads; i++) {
        Fiber &f = fibers[i];
        f.index = {i, 0, 0};
        f.lane = i % 32;
        f.warp = i / 32;
        f.rank = random_u64() >> 32;
        f.phase = 0;
        f.copies.assign(1, {});
        f.fake_stack = nullptr;
        prepare(f, fiber_main);
        let_run(f);
    }
    unsigned left = threads;
    while (left > 0) {
        if (runnable.empty()) report_deadlock();
        std::pop_heap(runnable.begin(), runnable.end(), is_later);
        current = runnable.back();
        runnable.pop_back();
        __sanitizer_start_switch_fiber(&scheduler_fake_stack, current->stack, STACK);
        enter(*current);
        __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
        left -= current->state == ENDED;
    }
    current = nullptr;
    for (Allocation &a : allocations) free(a.memory);
    allocations.clear();
}

static void run_grid(unsigned threads) {
    std::vector<Dim> blocks;
    for (unsigned z = 0; z < grid_size.z; z++)
        for (unsigned y = 0; y < grid_size.y; y++)
            for (unsigned x = 0; x < grid_size.x; x++) blocks.push_back({x, y, z});
    for (size_t i = blocks.size(); i > 1; i--) std::swap(blocks[i - 1], blocks[random_u64() % i]);
    fibers.resize(threads);
    size_t all = (size_t)threads * STACK;
    char *stacks = (char *)mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) fail("no memory for the stacks of its threads", "", 0);
    for (unsigned i = 0; i < threads; i++) fibers[i].stack = stacks + i * STACK;
    for (Dim block : blocks) {
        block_index = block;
        run_block(threads);
    }
    munmap(stacks, all);
}

// === Requests ===

template <class V> static V read_value() {
    V v;
    if (fread(&v, sizeof v, 1, stdin) != 1) fail("the request is cut short", "", 0);
    return v;
}

static std::vector<unsigned char> read_bytes() {
    std::vector<unsigned char> bytes(read_value<uint64_t>());
    if (!bytes.empty() && fread(bytes.data(), bytes.size(), 1, stdin) != 1) fail("the request is cut short", "", 0);
    return bytes;
}

static std::string read_string() {
    std::vector<unsigned char> bytes = read_bytes();
    return std::string(bytes.begin(), bytes.end());
}

template <class V> static void write_value(V v) { fwrite(&v, sizeof v, 1, stdout); }

static void launch() {
    kernel = read_string();
    grid_size.x = read_value<uint32_t>();
    grid_size.y = read_value<uint32_t>();
    grid_size.z = read_value<uint32_t>();
    unsigned threads = read_value<uint32_t>();
    dynamic_bytes = read_value<uint32_t>();
    random_state = seed = read_value<uint64_t>();
    skipped = read_string();
    arguments.resize(read_value<uint32_t>());
    for (Argument &a : arguments) {
        a.kind = (Kind)read_value<uint32_t>();
        a.bits = read_value<uint64_t>();
    }
    entry = nullptr;
    for (const Entry &e : Entry::all())
        if (kernel == e.name) entry = &e;
    if (!entry) fail("there is no such kernel", "", 0);
    if (threads != entry->threads) fail("the launch has another block size than the kernel", "", 0);
    sites.clear();
    run_grid(threads);
    write_value<uint64_t>(sites.size());
    for (const std::string &site : sites) {
        write_value<uint64_t>(site.size());
        fwrite(site.data(), site.size(), 1, stdout);
    }
}

// Serves until the other side closes the pipe.
static void serve() {
    uint32_t request;
    while (fread(&request, sizeof request, 1, stdin) == 1) {
        if (request == 0) {
            // Exactly as long as asked for, so that the red zone begins behind the last byte.
            write_value<uint64_t>((uint64_t)malloc(read_value<uint64_t>()));
        } else if (request == 1) {
            char *to = (char *)read_value<uint64_t>();
            std::vector<unsigned char> bytes = read_bytes();
            if (!bytes.empty()) memcpy(to, bytes.data(), bytes.size());
            write_value<uint64_t>(0);
        } else if (request == 2) {
            const char *from = (const char *)read_value<uint64_t>();
            uint64_t len = read_value<uint64_t>();
            fwrite(from, 1, len, stdout);
        } else {
            launch();
        }
        fflush(stdout);
    }
}

}  // namespace shim

#ifndef PM_DRIVER
int main() {
    shim::serve();
    _exit(0);
}
#endif
