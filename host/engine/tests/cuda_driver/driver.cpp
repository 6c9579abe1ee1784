// A driver for a device that is the shim: the functions of libcuda.so.1 that the backend calls, as a library of that name.
//
// Whatever may be late is late: work on a stream is done when somebody waits for the stream. So a wait that is missing shows as a
// wrong result. What a driver forbids fails: a call without a context, waiting in a capture, memory outside of an allocation, a
// block of another size, shared memory that was not asked for. What is left when the last context goes is told on standard error.
#include <functional>
#include <map>

namespace shim {

typedef int Result;
typedef unsigned long long Address;
typedef std::vector<std::function<void()>> Work;

enum : Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
    UNSUPPORTED_PTX_VERSION = 222, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, IN_A_CAPTURE = 900 };

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

static const size_t ALL = (size_t)1 << 30;
static const unsigned ATTRIBUTE_WORDS = 18, STREAM_SERIALIZATION = 6, MOST_SHARED = 8;

static bool is_initialised;
static int retained;
static char context;
static void *current_context;
static std::set<Stream *> streams;
static std::map<Address, size_t> memory;
static size_t taken;
// Modules, graphs, events, pinned memory and what the library of products has made, that exist.
static int others;
static uint64_t n_launches, n_done;

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

static void finish_all() {
    for (Stream *stream : streams) finish(stream->work);
}

static bool is_capturing() {
    return std::any_of(streams.begin(), streams.end(), [](Stream *stream) { return stream->captured; });
}

static bool is_inside(Address at, size_t bytes) {
    auto next = memory.upper_bound(at);
    if (next == memory.begin()) return false;
    --next;
    return at + bytes <= next->first + next->second;
}

static Result add(Stream *stream, std::function<void()> one) {
    if (!streams.count(stream)) return refuse("no stream", INVALID_HANDLE);
    (stream->captured ? *stream->captured : stream->work).push_back(one);
    return SUCCESS;
}

#define IN_CONTEXT                                                          \
    if (!is_initialised) return refuse(__func__, NOT_INITIALIZED);          \
    if (!current_context) return refuse(__func__, INVALID_CONTEXT)
#define NOT_CAPTURING                                                       \
    IN_CONTEXT;                                                             \
    if (is_capturing()) return refuse(__func__, IN_A_CAPTURE)
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
    *count = 1;
    return SUCCESS;
}

Result cuDeviceGet(int *device, int ordinal) {
    *device = 0;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

Result cuDeviceGetName(char *name, int size, int) {
    snprintf(name, size, "the shim");
    return SUCCESS;
}

Result cuDeviceTotalMem_v2(size_t *bytes, int) {
    *bytes = ALL;
    return SUCCESS;
}

// Four multiprocessors of compute capability 9.0.
Result cuDeviceGetAttribute(int *value, int which, int) {
    *value = which == 16 ? 4 : which == 75 ? 9 : 0;
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(void **to, int) {
    retained++;
    *to = &context;
    return SUCCESS;
}

Result cuDevicePrimaryCtxRelease_v2(int) {
    if (--retained == 0 && (!memory.empty() || !streams.empty() || others != 0)) refuse("something is left", others);
    return SUCCESS;
}

Result cuCtxSetCurrent(void *to) {
    current_context = to;
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
    *free = ALL - taken;
    *total = ALL;
    return SUCCESS;
}

Result cuMemAlloc_v2(Address *to, size_t bytes) {
    NOT_CAPTURING;
    if (bytes == 0) return refuse(__func__, INVALID_VALUE);
    if (taken + bytes > ALL) return OUT_OF_MEMORY;
    void *at = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(at, 0xff, bytes);
    *to = (Address)at;
    memory[*to] = bytes;
    taken += bytes;
    return SUCCESS;
}

Result cuMemFree_v2(Address at) {
    NOT_CAPTURING;
    if (!memory.count(at)) return refuse(__func__, INVALID_VALUE);
    finish_all();
    taken -= memory[at];
    memory.erase(at);
    free((void *)at);
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
    streams.insert(*to);
    return SUCCESS;
}

Result cuStreamDestroy_v2(Stream *stream) {
    NOT_CAPTURING;
    if (!streams.erase(stream)) return refuse(__func__, INVALID_HANDLE);
    delete stream;
    return SUCCESS;
}

Result cuStreamSynchronize(Stream *stream) {
    NOT_CAPTURING;
    finish(stream->work);
    return SUCCESS;
}

Result cuStreamBeginCapture_v2(Stream *stream, int) {
    NOT_CAPTURING;
    return made(&stream->captured, Work{});
}

Result cuStreamEndCapture(Stream *stream, Work **graph) {
    IN_CONTEXT;
    *graph = stream->captured;
    stream->captured = nullptr;
    return *graph ? SUCCESS : refuse(__func__, INVALID_HANDLE);
}

Result cuGraphInstantiateWithFlags(Work **to, Work *graph, unsigned long long) {
    IN_CONTEXT;
    return made(to, *graph);
}

Result cuGraphDestroy(Work *graph) { return unmade(graph); }

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

Result cuEventDestroy_v2(Event *event) { return unmade(event); }

Result cuEventRecord(Event *event, Stream *stream) {
    IN_CONTEXT;
    event->at = ~0ull;
    return add(stream, [=] { event->at = n_done; });
}

// What comes after it stays undone.
Result cuEventSynchronize(Event *event) {
    NOT_CAPTURING;
    for (Stream *stream : streams)
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
