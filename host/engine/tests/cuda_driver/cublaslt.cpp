// A library of products on the driver's device: the functions of libcublasLt.so.13 that the backend calls.
//
// It computes what the descriptors say, number by number, when somebody waits for the stream; so a matrix that is described otherwise
// than it lies shows as a wrong result. It takes nothing that the library would refuse, and what is left is told with the driver's.

namespace shim {

enum : int { LT_INVALID_VALUE = 7, LT_NOT_SUPPORTED = 15 };
enum : int { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68 };

struct Desc {
    bool is_w_transposed;
};

// Column-major.
struct Layout {
    int kind;
    uint64_t rows, columns;
    int64_t pitch;
};

struct Preference {
    size_t workspace;
    unsigned reductions;
};

struct Algorithm {
    uint64_t data[8];
};

struct Advice {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

// Products that were asked for.
static uint64_t n_multiplied;

static const uint64_t MAGIC = 0x706d2d6c74ull;

static size_t size_of(int kind) { return kind == R_32F ? 4 : 2; }

static double number(int kind, const char *at, uint64_t i) {
    if (kind == R_32F) return ((const float *)at)[i];
    unsigned short bits = ((const unsigned short *)at)[i];
    return kind == R_16F ? f16_to_float(bits) : bf16_to_float(bits);
}

static void put_number(int kind, char *at, uint64_t i, double v) {
    if (kind == R_32F) ((float *)at)[i] = (float)v;
    else ((unsigned short *)at)[i] = (unsigned short)(kind == R_16F ? float_to_f16((float)v) : float_to_bf16((float)v));
}

static size_t bytes_of(const Layout &l) { return ((l.columns - 1) * (uint64_t)l.pitch + l.rows) * size_of(l.kind); }

static bool fits(const Desc *desc, const Layout *w, const Layout *x, const Layout *y) {
    bool is_kind = w->kind == x->kind && (y->kind == w->kind || y->kind == R_32F);
    return desc->is_w_transposed && is_kind && w->rows == x->rows && w->columns == y->rows && x->columns == y->columns;
}

template <typename M> static int described(M **to, M value) {
    return here ? made(to, value) : refuse("the library without a context", 1);
}

extern "C" {

size_t cublasLtGetVersion() { return 120804; }
int cublasLtCreate(Preference **to) { return described(to, Preference{}); }

// Waits for everything.
int cublasLtDestroy(Preference *handle) {
    std::lock_guard<std::recursive_mutex> own_turn(turn);
    if (!here || n_recorded) return refuse(__func__, 1);
    return unmade(handle);
}

int cublasLtMatmulDescDestroy(Desc *desc) { return unmade(desc); }
int cublasLtMatrixLayoutDestroy(Layout *layout) { return unmade(layout); }
int cublasLtMatmulPreferenceCreate(Preference **to) { return described(to, Preference{}); }
int cublasLtMatmulPreferenceDestroy(Preference *preference) { return unmade(preference); }

int cublasLtMatmulDescCreate(Desc **to, int compute, int scale) {
    if (compute != COMPUTE_32F || scale != R_32F) return refuse(__func__, LT_INVALID_VALUE);
    return described(to, Desc{false});
}

int cublasLtMatmulDescSetAttribute(Desc *desc, int which, const void *from, size_t bytes) {
    if (which != 3 || bytes != 4) return refuse(__func__, LT_INVALID_VALUE);
    desc->is_w_transposed = *(const int *)from == 1;
    return 0;
}

int cublasLtMatrixLayoutCreate(Layout **to, int kind, uint64_t rows, uint64_t columns, int64_t pitch) {
    if (!rows || !columns || pitch < (int64_t)rows) return refuse(__func__, LT_INVALID_VALUE);
    return described(to, Layout{kind, rows, columns, pitch});
}

int cublasLtMatrixLayoutSetAttribute(Layout *layout, int which, const void *from, size_t bytes) {
    if (which != 3 || bytes != 8) return refuse(__func__, LT_INVALID_VALUE);
    layout->columns = *(const uint64_t *)from;
    return 0;
}

int cublasLtMatmulPreferenceSetAttribute(Preference *preference, int which, const void *from, size_t bytes) {
    if (which == 1 && bytes == 8) preference->workspace = *(const size_t *)from;
    else if (which == 3 && bytes == 4) preference->reductions = *(const unsigned *)from;
    else return refuse(__func__, LT_INVALID_VALUE);
    return 0;
}

// Two algorithms, and one that cannot be taken. Of those that add runs in the type of the result there would be others.
int cublasLtMatmulAlgoGetHeuristic(void *, Desc *desc, Layout *w, Layout *x, Layout *y, Layout *to, Preference *preference, int wanted,
        Advice *advice, int *n) {
    if (!fits(desc, w, x, y) || y != to || wanted < 3 || preference->reductions != 2) return refuse(__func__, LT_NOT_SUPPORTED);
    advice[0] = {{{MAGIC, 0}}, preference->workspace, LT_NOT_SUPPORTED, 1.0f, {}};
    advice[1] = {{{MAGIC, x->columns}}, preference->workspace, 0, 1.0f, {}};
    advice[2] = {{{MAGIC, x->columns}}, 0, 0, 1.0f, {}};
    *n = 3;
    return 0;
}

int cublasLtMatmul(void *, Desc *desc, const float *alpha, const char *w, Layout *lw, const char *x, Layout *lx, const float *beta,
        const char *y, Layout *ly, char *to, Layout *lto, const Algorithm *algorithm, char *workspace, size_t bytes, Stream *stream) {
    NOT_CAPTURING;
    if (!fits(desc, lw, lx, ly) || ly != lto || y != to || algorithm->data[0] != MAGIC || lx->columns > algorithm->data[1])
        return refuse(__func__, LT_NOT_SUPPORTED);
    INSIDE((Address)w, bytes_of(*lw));
    INSIDE((Address)x, bytes_of(*lx));
    INSIDE((Address)to, bytes_of(*lto));
    INSIDE((Address)workspace, bytes);
    if (((Address)w | (Address)x | (Address)to | (Address)workspace) % 256) return refuse("an address", LT_INVALID_VALUE);
    Layout l = *lw, m = *lx, n = *ly;
    float a = *alpha, b = *beta;
    n_multiplied++;
    return add(stream, [=] {
        memset(workspace, 0xff, bytes);
        for (uint64_t column = 0; column < n.columns; column++)
            for (uint64_t row = 0; row < n.rows; row++) {
                double sum = 0.0;
                for (uint64_t i = 0; i < l.rows; i++)
                    sum += number(l.kind, w, row * l.pitch + i) * number(m.kind, x, column * m.pitch + i);
                uint64_t at = column * n.pitch + row;
                put_number(n.kind, to, at, a * sum + (b == 0.0f ? 0.0 : b * number(n.kind, to, at)));
            }
    });
}

// For the test alone.
uint64_t shim_multiplied() { return n_multiplied; }

}  // extern "C"

}  // namespace shim
