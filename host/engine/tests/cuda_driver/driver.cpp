// A driver for a device that is the shim: the functions of libcuda.so.1 that the backend calls, as a library of that name.
//
// Whatever may be late is late: work on a stream is done when somebody waits for the stream. So a wait that is missing shows as a
// wrong result. What a driver forbids fails: a call without a context, waiting in a capture, memory outside of an allocation, a
// block of another size, shared memory that was not asked for. What is left when the last context goes is told on standard error.
//
// PM_DRIVER_DEVICES says how many devices there are, PM_DRIVER_MIB how much memory each has. PM_DRIVER_MISHAPS names a file that may be
// written at any time: `lost N` in a line of it is the end of device N, `taken N BYTES` what other processes have of its memory, `unmappable N` that none can be
// mapped.
#include <atomic>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>

namespace shim {

typedef int Result;
typedef unsigned long long Address;
typedef std::vector<std::function<void()>> Work;

enum : Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
    UNSUPPORTED_PTX_VERSION = 222, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719, IN_A_CAPTURE = 900 };

struct Stream {
    Work work;
    Work *captured;
};

struct Function {
    const Entry *entry;
    unsigned most_shared;
};

struct Module {
    std::string image;
    std::map<std::string, Function> functions;
};

struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    Stream *stream;
    const unsigned *attributes;
    unsigned n_attributes;
};

struct Device {
    int retained;
    std::map<Address, size_t> memory, reserved;
    std::map<Address, struct Physical *> maps;
    size_t taken;
    std::set<Stream *> streams;
    bool is_lost, refuses_maps;
};

static const int MOST_DEVICES = 8;
static const unsigned ATTRIBUTE_WORDS = 18, STREAM_SERIALIZATION = 6, MOST_SHARED = 8;

// Held during each call: a device has one thread of each host that uses it, and the shim is one for all devices.
static std::recursive_mutex turn;
static bool is_initialised;
static Device devices[MOST_DEVICES];
static thread_local Device *here;
static thread_local Stream *recorded;
// Modules, graphs, events, pinned memory and what the library of products has made, that exist.
static std::atomic<int> others;
// Streams whose launches are recorded, of all devices.
static int n_recorded;
static uint64_t n_launches, n_done;

static uint64_t setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}

static int n_devices() { return std::min((int)setting("PM_DRIVER_DEVICES", 1), MOST_DEVICES); }

static size_t all_memory() { return setting("PM_DRIVER_MIB", 1 << 10) << 20; }

// What others have of a device's memory. Sees to it that a device is lost whose end has come.
static size_t mishaps(Device *of) {
    const char *path = getenv("PM_DRIVER_MISHAPS");
    if (!path) return 0;
    std::ifstream file(path);
    std::string what;
    size_t device, bytes, taken = 0;
    of->refuses_maps = false;
    while (file >> what >> device) {
        bool is_here = device < MOST_DEVICES && &devices[device] == of;
        if (what == "lost" && is_here) of->is_lost = true;
        if (what == "unmappable" && is_here) of->refuses_maps = true;
        if (what == "taken" && file >> bytes && is_here) taken = bytes;
    }
    return taken;
}

template <typename M> static Result made(M **to, M value) {
    *to = new M(value);
    others++;
    return SUCCESS;
}

template <typename M> static Result unmade(M *one) {
    others--;
    delete one;
    return SUCCESS;
}

static Result refuse(const char *what, Result code) {
    fprintf(stderr, "driver: %s: %d\n", what, code);
    return code;
}

static void finish(Work &work) {
    Work now;
    std::swap(now, work);
    for (auto &one : now) {
        one();
        n_done++;
    }
}

static void do_first(Work &work) {
    auto one = work.front();
    work.erase(work.begin());
    one();
    n_done++;
}

static bool is_inside(Address at, size_t bytes) {
    auto next = here->memory.upper_bound(at);
    if (next == here->memory.begin()) return false;
    --next;
    return at + bytes <= next->first + next->second;
}

static Result add(Stream *stream, std::function<void()> one) {
    if (!here->streams.count(stream)) return refuse("no stream", INVALID_HANDLE);
    (stream->captured ? *stream->captured : stream->work).push_back(one);
    return SUCCESS;
}

#define IN_CONTEXT                                                          \
    std::lock_guard<std::recursive_mutex> own_turn(turn);                   \
    if (!is_initialised) return refuse(__func__, NOT_INITIALIZED);          \
    if (!here) return refuse(__func__, INVALID_CONTEXT);                    \
    if (here->is_lost) return LAUNCH_FAILED
#define NOT_CAPTURING                                                       \
    IN_CONTEXT;                                                             \
    if (recorded) return refuse(__func__, IN_A_CAPTURE)
#define INSIDE(at, bytes)                                                   \
    if (!is_inside(at, bytes)) return refuse(__func__, ILLEGAL_ADDRESS)

extern "C" {

// === Devices and contexts ===

Result cuInit(unsigned) {
    is_initialised = true;
    return SUCCESS;
}

Result cuDriverGetVersion(int *version) {
    *version = 12080;
    return SUCCESS;
}

Result cuDeviceGetCount(int *count) {
    *count = n_devices();
    return SUCCESS;
}

Result cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0 <= ordinal && ordinal < n_devices() ? SUCCESS : INVALID_DEVICE;
}

Result cuDeviceGetName(char *name, int size, int) {
    snprintf(name, size, "the shim");
    return SUCCESS;
}

Result cuDeviceTotalMem_v2(size_t *bytes, int) {
    *bytes = all_memory();
    return SUCCESS;
}

// Four multiprocessors of compute capability 9.0.
Result cuDeviceGetAttribute(int *value, int which, int) {
    *value = which == 16 ? 4 : which == 75 ? 9 : 0;
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(Device **to, int device) {
    std::lock_guard<std::recursive_mutex> own_turn(turn);
    *to = &devices[device];
    (*to)->retained++;
    return SUCCESS;
}

// What belongs to no device is counted with the last one that goes.
Result cuDevicePrimaryCtxRelease_v2(int device) {
    std::lock_guard<std::recursive_mutex> own_turn(turn);
    Device &of = devices[device];
    bool is_last = --of.retained == 0 && std::none_of(devices, devices + MOST_DEVICES, [](Device &d) { return d.retained; });
    bool is_left = !of.memory.empty() || !of.streams.empty();
    if (of.retained == 0 && !of.is_lost && (is_left || (is_last && others != 0))) refuse("something is left", (int)others);
    return SUCCESS;
}

Result cuCtxSetCurrent(Device *to) {
    here = to;
    return SUCCESS;
}

Result cuGetErrorName(Result code, const char **text) {
    static char name[32];
    snprintf(name, sizeof name, "SHIM_%d", code);
    *text = name;
    return SUCCESS;
}

Result cuGetErrorString(Result, const char **text) {
    *text = "a fault of the shim's driver";
    return SUCCESS;
}

// === Memory ===

Result cuMemGetInfo_v2(size_t *free, size_t *total) {
    IN_CONTEXT;
    *free = all_memory() - std::min(all_memory(), here->taken + mishaps(here));
    *total = all_memory();
    return SUCCESS;
}

Result cuMemAlloc_v2(Address *to, size_t bytes) {
    NOT_CAPTURING;
    if (bytes == 0) return refuse(__func__, INVALID_VALUE);
    if (here->taken + bytes + mishaps(here) > all_memory()) return OUT_OF_MEMORY;
    void *at = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(at, 0xff, bytes);
    *to = (Address)at;
    here->memory[*to] = bytes;
    here->taken += bytes;
    return SUCCESS;
}

Result cuMemFree_v2(Address at) {
    NOT_CAPTURING;
    if (!here->memory.count(at)) return refuse(__func__, INVALID_VALUE);
    for (Stream *stream : here->streams) finish(stream->work);
    here->taken -= here->memory[at];
    here->memory.erase(at);
    free((void *)at);
    return SUCCESS;
}

// Memory at addresses that are reserved, of which the first so many bytes are mapped: who touches what is not ends here.

static const size_t GRANULE = 64 << 10;

struct MemoryKind {
    int type, handles, location, device;
};

struct Physical {
    size_t bytes;
    Device *of;
    // Its handle, and where it is mapped.
    int uses;
};

// Memory goes with the last that knows it.
static void forget(Physical *memory) {
    if (--memory->uses) return;
    memory->of->taken -= memory->bytes;
    unmade(memory);
}

// Whether what is mapped from an address on ends so many bytes further.
static bool is_mapped(Address at, size_t bytes) {
    Address end = at;
    for (auto next = here->maps.find(at); next != here->maps.end() && next->first == end && end < at + bytes; ++next)
        end += next->second->bytes;
    return bytes && end == at + bytes;
}

Result cuMemGetAllocationGranularity(size_t *bytes, const MemoryKind *, int) {
    IN_CONTEXT;
    *bytes = GRANULE;
    return SUCCESS;
}

Result cuMemAddressReserve(Address *to, size_t bytes, size_t, Address, unsigned long long) {
    NOT_CAPTURING;
    if (bytes == 0 || bytes % GRANULE) return refuse(__func__, INVALID_VALUE);
    // With a gap behind it, so that no range touches the next one.
    void *at = mmap(nullptr, bytes + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return refuse(__func__, OUT_OF_MEMORY);
    *to = (Address)at;
    here->memory[*to] = 0;
    here->reserved[*to] = bytes;
    return SUCCESS;
}

Result cuMemAddressFree(Address at, size_t bytes) {
    NOT_CAPTURING;
    auto map = here->maps.lower_bound(at);
    bool is_empty = map == here->maps.end() || map->first >= at + bytes;
    if (!here->reserved.count(at) || here->reserved[at] != bytes || !is_empty) return refuse(__func__, INVALID_VALUE);
    here->memory.erase(at);
    here->reserved.erase(at);
    munmap((void *)at, bytes + GRANULE);
    return SUCCESS;
}

Result cuMemCreate(Physical **to, size_t bytes, const MemoryKind *kind, unsigned long long) {
    NOT_CAPTURING;
    const int PINNED = 1, ON_DEVICE = 1;
    if (kind->type != PINNED || kind->location != ON_DEVICE || &devices[kind->device] != here || bytes == 0 || bytes % GRANULE)
        return refuse(__func__, INVALID_VALUE);
    if (here->taken + bytes + mishaps(here) > all_memory()) return OUT_OF_MEMORY;
    here->taken += bytes;
    return made(to, Physical{bytes, here, 1});
}

Result cuMemRelease(Physical *memory) {
    NOT_CAPTURING;
    forget(memory);
    return SUCCESS;
}

Result cuMemMap(Address at, size_t bytes, size_t offset, Physical *memory, unsigned long long) {
    NOT_CAPTURING;
    auto of = --here->reserved.upper_bound(at);
    bool is_first = of->first == at, is_within = at + bytes <= of->first + of->second;
    auto before = here->maps.lower_bound(at);
    bool is_next = is_first || (before != here->maps.begin() && (--before)->first + before->second->bytes == at);
    if (offset || bytes != memory->bytes || here->maps.count(at) || !is_within || !is_next) return refuse(__func__, INVALID_VALUE);
    here->maps[at] = memory;
    memory->uses++;
    return SUCCESS;
}

Result cuMemSetAccess(Address at, size_t bytes, const int *access, size_t n) {
    NOT_CAPTURING;
    const int READ_AND_WRITE = 3;
    auto &open = *--here->memory.upper_bound(at);
    bool is_next = open.first + open.second == at && is_mapped(at, bytes);
    if (n != 1 || &devices[access[1]] != here || access[2] != READ_AND_WRITE || !is_next) return refuse(__func__, INVALID_VALUE);
    // One of the mishaps: as if there were no memory for the tables of pages.
    if (mishaps(here), here->refuses_maps) return OUT_OF_MEMORY;
    mprotect((void *)at, bytes, PROT_READ | PROT_WRITE);
    memset((void *)at, 0xff, bytes);
    open.second += bytes;
    return SUCCESS;
}

// Whole mappings alone, here the last ones of a range.
Result cuMemUnmap(Address at, size_t bytes) {
    NOT_CAPTURING;
    auto of = --here->reserved.upper_bound(at);
    auto behind = here->maps.lower_bound(at + bytes);
    bool is_last = behind == here->maps.end() || behind->first >= of->first + of->second;
    if (!is_mapped(at, bytes) || !is_last) return refuse(__func__, INVALID_VALUE);
    for (auto map = here->maps.find(at); map != behind; map = here->maps.erase(map)) forget(map->second);
    size_t &open = here->memory[of->first];
    open = std::min(open, (size_t)(at - of->first));
    mprotect((void *)at, bytes, PROT_NONE);
    return SUCCESS;
}

Result cuMemHostAlloc(void **to, size_t bytes, unsigned) {
    NOT_CAPTURING;
    *to = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(*to, 0xff, bytes);
    others++;
    return SUCCESS;
}

Result cuMemFreeHost(void *at) {
    NOT_CAPTURING;
    others--;
    free(at);
    return SUCCESS;
}

Result cuMemsetD8Async(Address at, unsigned char byte, size_t bytes, Stream *stream) {
    IN_CONTEXT;
    INSIDE(at, bytes);
    return add(stream, [=] { memset((void *)at, byte, bytes); });
}

// Waits for no stream.
Result cuMemcpyDtoH_v2(void *to, Address from, size_t bytes) {
    NOT_CAPTURING;
    INSIDE(from, bytes);
    memcpy(to, (const void *)from, bytes);
    return SUCCESS;
}

Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, Stream *stream) {
    IN_CONTEXT;
    INSIDE(to, bytes);
    return add(stream, [=] { memcpy((void *)to, from, bytes); });
}

Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, Stream *stream) {
    IN_CONTEXT;
    INSIDE(from, bytes);
    return add(stream, [=] { memcpy(to, (const void *)from, bytes); });
}

struct Copy2D {
    size_t from_x, from_y;
    unsigned from_kind;
    const char *from;
    Address from_device;
    void *from_array;
    size_t from_pitch, to_x, to_y;
    unsigned to_kind;
    void *to;
    Address to_device;
    void *to_array;
    size_t to_pitch, width, height;
};

Result cuMemcpy2DAsync_v2(const Copy2D *copy, Stream *stream) {
    IN_CONTEXT;
    const unsigned HOST = 1, DEVICE_KIND = 2;
    Copy2D c = *copy;
    if (c.from_kind != HOST || c.to_kind != DEVICE_KIND || c.from_x || c.from_y || c.to_x || c.to_y || !c.height ||
        c.from_pitch < c.width || c.to_pitch < c.width)
        return refuse(__func__, INVALID_VALUE);
    INSIDE(c.to_device, (c.height - 1) * c.to_pitch + c.width);
    return add(stream, [=] {
        for (size_t i = 0; i < c.height; i++) memcpy((char *)c.to_device + i * c.to_pitch, c.from + i * c.from_pitch, c.width);
    });
}

// === Code ===

Result cuModuleLoadDataEx(Module **to, const char *image, unsigned n_options, const int *options, void **values) {
    IN_CONTEXT;
    const int ERROR_LOG = 5, ERROR_LOG_BYTES = 6;
    if (n_options != 2 || options[0] != ERROR_LOG || options[1] != ERROR_LOG_BYTES) return refuse(__func__, INVALID_VALUE);
    snprintf((char *)values[0], (size_t)values[1], "%s", strstr(image, ".version 8.0\n") ? "" : "unsupported version");
    if (!strstr(image, ".version 8.0\n")) return refuse(__func__, UNSUPPORTED_PTX_VERSION);
    return made(to, Module{image, {}});
}

Result cuModuleUnload(Module *module) {
    IN_CONTEXT;
    return unmade(module);
}

Result cuModuleGetFunction(Function **to, Module *module, const char *name) {
    IN_CONTEXT;
    bool is_there = module->image.find(".entry " + std::string(name) + "(") != std::string::npos;
    for (const Entry &e : Entry::all())
        if (is_there && strcmp(e.name, name) == 0) {
            Function &function = module->functions[name];
            function = {&e, 48 << 10};
            *to = &function;
            return SUCCESS;
        }
    return refuse(name, NOT_FOUND);
}

Result cuFuncSetAttribute(Function *function, int which, int value) {
    IN_CONTEXT;
    if (which != MOST_SHARED || value > 227 << 10) return refuse(__func__, INVALID_VALUE);
    function->most_shared = value;
    return SUCCESS;
}

// === Streams and graphs ===

Result cuStreamCreate(Stream **to, unsigned) {
    NOT_CAPTURING;
    *to = new Stream{};
    here->streams.insert(*to);
    return SUCCESS;
}

Result cuStreamDestroy_v2(Stream *stream) {
    NOT_CAPTURING;
    if (!here->streams.erase(stream)) return refuse(__func__, INVALID_HANDLE);
    delete stream;
    return SUCCESS;
}

Result cuStreamSynchronize(Stream *stream) {
    NOT_CAPTURING;
    mishaps(here);
    if (here->is_lost) return LAUNCH_FAILED;
    finish(stream->work);
    return SUCCESS;
}

// Of the mode in which a thread forbids itself and nobody else what cannot be recorded.
Result cuStreamBeginCapture_v2(Stream *stream, int mode) {
    NOT_CAPTURING;
    const int THREAD_LOCAL = 1;
    if (mode != THREAD_LOCAL) return refuse(__func__, INVALID_VALUE);
    recorded = stream;
    n_recorded++;
    return made(&stream->captured, Work{});
}

Result cuStreamEndCapture(Stream *stream, Work **graph) {
    IN_CONTEXT;
    *graph = stream->captured;
    if (!*graph) return refuse(__func__, INVALID_HANDLE);
    stream->captured = nullptr;
    recorded = nullptr;
    n_recorded--;
    return SUCCESS;
}

Result cuGraphInstantiateWithFlags(Work **to, Work *graph, unsigned long long) {
    IN_CONTEXT;
    return made(to, *graph);
}

Result cuGraphDestroy(Work *graph) {
    IN_CONTEXT;
    return unmade(graph);
}

Result cuGraphExecDestroy(Work *graph) { return cuGraphDestroy(graph); }

Result cuGraphUpload(Work *, Stream *) { return SUCCESS; }

Result cuGraphLaunch(Work *graph, Stream *stream) {
    NOT_CAPTURING;
    stream->work.insert(stream->work.end(), graph->begin(), graph->end());
    return SUCCESS;
}

// === Events ===
//
// Time is what has been done on any stream.

struct Event {
    uint64_t at;
};

Result cuEventCreate(Event **to, unsigned) {
    NOT_CAPTURING;
    return made(to, Event{~0ull});
}

Result cuEventDestroy_v2(Event *event) {
    IN_CONTEXT;
    return unmade(event);
}

Result cuEventRecord(Event *event, Stream *stream) {
    IN_CONTEXT;
    event->at = ~0ull;
    return add(stream, [=] { event->at = n_done; });
}

// What comes after it stays undone.
Result cuEventSynchronize(Event *event) {
    NOT_CAPTURING;
    mishaps(here);
    if (here->is_lost) return LAUNCH_FAILED;
    for (Stream *stream : here->streams)
        while (event->at == ~0ull && !stream->work.empty()) do_first(stream->work);
    return event->at == ~0ull ? refuse(__func__, NOT_READY) : SUCCESS;
}

Result cuEventElapsedTime(float *milliseconds, Event *start, Event *end) {
    IN_CONTEXT;
    if (start->at == ~0ull || end->at == ~0ull) return refuse(__func__, NOT_READY);
    *milliseconds = (float)(end->at - start->at);
    return SUCCESS;
}

// === Launches ===

Result cuLaunchKernelEx(const LaunchConfig *c, Function *function, void **parameters, void **) {
    IN_CONTEXT;
    const Entry *of = function->entry;
    bool is_grid = c->grid_x && c->grid_y && c->grid_z && c->grid_y < 65536 && c->grid_z < 65536;
    if (!is_grid || c->block_x != of->threads || c->block_y != 1 || c->block_z != 1) return refuse(of->name, INVALID_VALUE);
    if (c->shared > function->most_shared) return refuse("shared memory that was not asked for", INVALID_VALUE);
    for (unsigned i = 0; i < c->n_attributes; i++)
        if (c->attributes[i * ATTRIBUTE_WORDS] != STREAM_SERIALIZATION) return refuse("an attribute", INVALID_VALUE);
    std::vector<Argument> taken_over;
    for (Kind kind : of->body->kinds()) {
        uint64_t bits = 0;
        memcpy(&bits, *parameters++, kind == U32 || kind == F32 ? 4 : 8);
        taken_over.push_back({kind, bits});
    }
    Dim grid = {c->grid_x, c->grid_y, c->grid_z};
    size_t shared_bytes = c->shared;
    return add(c->stream, [=] {
        kernel = of->name;
        entry = of;
        arguments = taken_over;
        grid_size = grid;
        dynamic_bytes = shared_bytes;
        random_state = seed = ++n_launches;
        run_grid(of->threads);
    });
}

}  // extern "C"

}  // namespace shim
