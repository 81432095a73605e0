/* The part of the driver API that script/gpu-check's workload uses. */
#include "fake_cuda.h"

static int initialised;

static struct alloc *find(devptr address, uint64_t *offset) {
    unsigned index = (address >> 40) - 1;
    *offset = address & ((1UL << 40) - 1);
    return index < MAX_ALLOCS && box.allocs[index].size ? &box.allocs[index] : NULL;
}

EXPORT int cuInit(unsigned flags) {
    struct gpu gpus[MAX_GPUS];
    (void)flags;
    struct fault fault = take_fault("init", getpid());
    if (fault.code > 0) return fault.code;
    initialised = 1;
    return read_gpus(gpus) ? OK : NO_DEVICE;
}

EXPORT int cuDriverGetVersion(int *version) {
    char text[64];
    read_driver(text, version);
    return OK;
}

EXPORT int cuGetErrorName(int code, const char **name) {
    switch (code) {
    case OK: *name = "CUDA_SUCCESS"; return OK;
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; return OK;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return OK;
    case NOT_INITIALIZED: *name = "CUDA_ERROR_NOT_INITIALIZED"; return OK;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; return OK;
    case OPERATING_SYSTEM: *name = "CUDA_ERROR_OPERATING_SYSTEM"; return OK;
    case ILLEGAL_STATE: *name = "CUDA_ERROR_ILLEGAL_STATE"; return OK;
    case NOT_READY: *name = "CUDA_ERROR_NOT_READY"; return OK;
    case NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; return OK;
    case UNKNOWN: *name = "CUDA_ERROR_UNKNOWN"; return OK;
    default: return INVALID_VALUE;
    }
}

EXPORT int cuDeviceGetCount(int *count) {
    struct gpu gpus[MAX_GPUS];
    *count = read_gpus(gpus);
    return initialised ? OK : NOT_INITIALIZED;
}

EXPORT int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return OK;
}

EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
    pthread_t thread;
    struct gpu gpus[MAX_GPUS];
    if (!initialised) return NOT_INITIALIZED;
    if (device >= read_gpus(gpus)) return INVALID_VALUE;
    if (!box.context) {
        box.gpu = device;
        prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0); /* for controllers that are not root */
        hold_handle();
        if (pthread_create(&thread, NULL, restore_thread, NULL)) return UNKNOWN;
        while (!box.tid) nap(1);
        box.context = 1;
    }
    *context = &box;
    return OK;
}

EXPORT int cuCtxSetCurrent(void *context) { return context == &box ? OK : INVALID_VALUE; }

#define CALL(expression) ({ pthread_rwlock_rdlock(&api_lock); int r_ = (expression); pthread_rwlock_unlock(&api_lock); r_; })

static int alloc_device(devptr *address, size_t size) {
    for (unsigned i = 0; i < MAX_ALLOCS; i++) {
        struct alloc *a = &box.allocs[i];
        if (a->size) continue;
        a->gpu = box.gpu;
        a->size = size;
        int failed = make_file(a);
        if (failed) { a->size = 0; return failed; }
        *address = (uint64_t)(i + 1) << 40;
        return OK;
    }
    return OUT_OF_MEMORY;
}

static int free_device(devptr address) {
    uint64_t offset;
    char path[320];
    struct alloc *a = find(address, &offset);
    if (!a || offset) return INVALID_VALUE;
    file_path(path, a);
    unlink(path);
    a->size = 0;
    return OK;
}

static int copy_host(devptr device, void *host, size_t size, int write) {
    uint64_t offset;
    struct alloc *a = find(device, &offset);
    if (!a || offset + size > a->size) return INVALID_VALUE;
    return transfer(a, host, offset, size, write);
}

EXPORT int cuMemAlloc_v2(devptr *address, size_t size) { return CALL(alloc_device(address, size)); }
EXPORT int cuMemFree_v2(devptr address) { return CALL(free_device(address)); }
EXPORT int cuMemcpyHtoD_v2(devptr to, void *from, size_t size) { return CALL(copy_host(to, from, size, 1)); }
EXPORT int cuMemcpyDtoH_v2(void *to, devptr from, size_t size) { return CALL(copy_host(from, to, size, 0)); }
EXPORT int cuCtxSynchronize(void) { return CALL(OK); }

EXPORT int cuMemAllocHost_v2(void **address, size_t size) {
    *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return *address == MAP_FAILED ? OUT_OF_MEMORY : OK;
}

static int register_host(void *address, size_t size) {
    for (struct pin *p = box.pins; p < box.pins + MAX_PINS; p++) {
        if (p->size) continue;
        int failed = pin_pages((uintptr_t)address, size);
        if (!failed) *p = (struct pin){(uintptr_t)address, size};
        return failed;
    }
    return OUT_OF_MEMORY;
}

EXPORT int cuMemHostRegister_v2(void *address, size_t size, unsigned flags) {
    (void)flags;
    return CALL(register_host(address, size));
}

EXPORT int cuMemFreeHost(void *address) { (void)address; return OK; }

/* Streams run at once; a capturing one records instead. A graph is its list of operations. */
struct stream { struct graph *capturing; };
struct graph { int count; struct node nodes[MAX_NODES]; };

static int run(struct node n) {
    char *chunk = malloc(CHUNK);
    int failed = OK;
    for (uint64_t at = 0; at < n.bytes && !failed; at += CHUNK) {
        uint64_t size = n.bytes - at < CHUNK ? n.bytes - at : CHUNK;
        if (n.copy)
            failed = copy_host(n.from + at, chunk, size, 0);
        else
            for (uint64_t i = 0; i < size / 4; i++) ((uint32_t *)chunk)[i] = n.value;
        if (!failed) failed = copy_host(n.to + at, chunk, size, 1);
    }
    free(chunk);
    return failed;
}

static int submit(struct stream *stream, struct node n) {
    if (!stream || !stream->capturing) return run(n);
    if (stream->capturing->count == MAX_NODES) return OUT_OF_MEMORY;
    stream->capturing->nodes[stream->capturing->count++] = n;
    return OK;
}

static int launch(struct graph *graph) {
    int failed = OK;
    for (int i = 0; i < graph->count && !failed; i++) failed = run(graph->nodes[i]);
    return failed;
}

EXPORT int cuStreamCreate(struct stream **stream, unsigned flags) {
    (void)flags;
    *stream = calloc(1, sizeof **stream);
    return OK;
}

EXPORT int cuStreamSynchronize(struct stream *stream) { (void)stream; return CALL(OK); }

EXPORT int cuMemsetD32Async(devptr to, unsigned value, size_t count, struct stream *stream) {
    return CALL(submit(stream, (struct node){0, to, 0, count * 4, value}));
}

EXPORT int cuMemcpyDtoDAsync_v2(devptr to, devptr from, size_t bytes, struct stream *stream) {
    return CALL(submit(stream, (struct node){1, to, from, bytes, 0}));
}

EXPORT int cuStreamBeginCapture_v2(struct stream *stream, int mode) {
    (void)mode;
    stream->capturing = calloc(1, sizeof *stream->capturing);
    return OK;
}

EXPORT int cuStreamEndCapture(struct stream *stream, struct graph **graph) {
    *graph = stream->capturing;
    stream->capturing = NULL;
    return OK;
}

EXPORT int cuGraphInstantiateWithFlags(struct graph **executable, struct graph *graph, unsigned long long flags) {
    (void)flags;
    *executable = graph;
    return OK;
}

EXPORT int cuGraphLaunch(struct graph *graph, struct stream *stream) { (void)stream; return CALL(launch(graph)); }

/* Modules: the one kernel of relume.gpu.workload, run here for the text it came as. */
static int mix(devptr memory, uint64_t words, uint32_t seed) {
    uint32_t *chunk = malloc(CHUNK);
    int failed = OK;
    for (uint64_t at = 0; at < words * 4 && !failed; at += CHUNK) {
        uint64_t size = words * 4 - at < CHUNK ? words * 4 - at : CHUNK;
        failed = copy_host(memory + at, chunk, size, 0);
        for (uint64_t i = 0; i < size / 4; i++) chunk[i] = (chunk[i] ^ seed) * 1664525 + 1013904223;
        if (!failed) failed = copy_host(memory + at, chunk, size, 1);
    }
    free(chunk);
    return failed;
}

EXPORT int cuModuleLoadData(void **module, const char *image) {
    struct fault fault = take_fault("module", getpid());
    if (fault.code > 0) return fault.code;
    *module = (void *)image;
    return strstr(image, ".version") && strstr(image, ".entry relume_mix") ? OK : INVALID_VALUE;
}

EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return strcmp(name, "relume_mix") ? INVALID_VALUE : OK;
}

EXPORT int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **values, void **extra) {
    (void)stream;
    uint64_t words = *(uint64_t *)values[1];
    if (!function || y != 1 || z != 1 || by != 1 || bz != 1 || shared || extra || (uint64_t)x * bx < words) return INVALID_VALUE;
    return CALL(mix(*(devptr *)values[0], words, *(uint32_t *)values[2]));
}

/* For tests only: a kernel that runs for this long. */
EXPORT void fake_kernel(int ms) { box.busy_until_ms = now_ms() + ms; }
