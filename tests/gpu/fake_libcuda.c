/*
 * A libcuda.so.1 and libnvidia-ml.so.1 for machines without a GPU. It behaves as the driver's documentation says.
 *
 * It is loaded by two kinds of processes, like the real one:
 *   - an app: device memory lives in files below $FAKE_CUDA_DIR/devN, never in the app's own memory; a checkpoint
 *     moves it into anonymous memory of the app (so a dump grows as it really would) and removes the files;
 *   - a controller, which calls cuCheckpointProcess*(pid). It finds the app's mailbox (a variable of this library) by the
 *     library's place in /proc/PID/maps and writes to it; a thread inside the app, the "restore thread", does the
 *     work. So it works across namespaces and on a process that CRIU revived, as the real one does.
 *
 * $FAKE_CUDA_DIR/driver  one line: driver version, CUDA version                        570.86.10 12080
 * $FAKE_CUDA_DIR/gpus    one line a GPU: UUID, bytes, MIG mode, persistence mode, model    GPU-... 8589934592 0 1 NVIDIA L4
 * $FAKE_CUDA_DIR/faults  one line a fault, first match wins: call, pid or 0, CUresult, times, delay in ms, and what else
 *                        happens: "-", "after" (the work is done all the same), "failed" (the process ends in
 *                        state FAILED), "abort" (the controller dies), "hang" (no answer ever)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
       ILLEGAL_STATE = 401, NOT_READY = 600, NOT_SUPPORTED = 801, UNKNOWN = 999 };
enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };
enum { NOTHING, DO_LOCK, DO_CHECKPOINT, DO_RESTORE, DO_UNLOCK, DO_FAIL };
enum { MAX_GPUS = 16, MAX_ALLOCS = 128, MAX_NODES = 512, CHUNK = 1 << 20 };
#define EXPORT __attribute__((visibility("default")))
typedef uint64_t devptr;
typedef struct { unsigned char bytes[16]; } uuid_t16;

struct gpu { char uuid[64], model[64]; uint64_t bytes; int mig, persistence; };
struct alloc { uint64_t size; int gpu; char file[16]; void *host; };
struct node { int copy; devptr to, from; uint64_t bytes; uint32_t value; };

/* What a controller reads and writes in an app. Plain data at a fixed place in the library. */
static struct mailbox {
    int context, state, tid, gpu, gpus_seen;
    long busy_until_ms;
    struct alloc allocs[MAX_ALLOCS];
    volatile int command, done, result;
    int timeout_ms, new_gpu[MAX_GPUS];
} box;

static char dir[256];
static int initialised;
static pthread_rwlock_t api = PTHREAD_RWLOCK_INITIALIZER;
static int handle_fd = -1;
static void *handle_map;

static long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000L + t.tv_nsec / 1000000;
}

static void nap(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static const char *root(void) {
    if (!dir[0]) {
        const char *env = getenv("FAKE_CUDA_DIR");
        snprintf(dir, sizeof dir, "%s", env ? env : "/nonexistent");
    }
    return dir;
}

static int read_gpus(struct gpu gpus[MAX_GPUS]) {
    char path[300];
    int count = 0;
    snprintf(path, sizeof path, "%s/gpus", root());
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    while (count < MAX_GPUS) {
        struct gpu *g = &gpus[count];
        if (fscanf(file, "%63s %lu %d %d %63[^\n]\n", g->uuid, &g->bytes, &g->mig, &g->persistence, g->model) != 5) break;
        count++;
    }
    fclose(file);
    return count;
}

static void read_driver(char version[64], int *cuda) {
    char path[300];
    snprintf(path, sizeof path, "%s/driver", root());
    FILE *file = fopen(path, "re");
    strcpy(version, "570.86.10");
    *cuda = 12080;
    if (file) {
        if (fscanf(file, "%63s %d", version, cuda) != 2) abort();
        fclose(file);
    }
}

/* ---- faults ------------------------------------------------------------------------------------------------- */

struct fault { int code, delay_ms; char also[16]; };

static struct fault take_fault(const char *call, int pid) {
    struct fault none = {-1, 0, "-"}, found = none;
    char path[300], lines[64][128];
    int count = 0;
    snprintf(path, sizeof path, "%s/faults", root());
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return none;
    flock(fd, LOCK_EX);
    FILE *file = fdopen(fd, "r+");
    while (count < 64 && fgets(lines[count], sizeof lines[0], file)) {
        char name[32], also[16];
        int who, code, times, delay;
        if (found.code < 0 && sscanf(lines[count], "%31s %d %d %d %d %15s", name, &who, &code, &times, &delay, also) == 6 &&
            !strcmp(name, call) && (who == 0 || who == pid) && times > 0) {
            found.code = code;
            found.delay_ms = delay;
            strcpy(found.also, also);
            snprintf(lines[count], sizeof lines[0], "%s %d %d %d %d %s\n", name, who, code, times - 1, delay, also);
        }
        count++;
    }
    rewind(file);
    if (ftruncate(fd, 0)) abort();
    for (int i = 0; i < count; i++) fputs(lines[i], file);
    fclose(file);
    if (found.code >= 0) {
        if (found.delay_ms) nap(found.delay_ms);
        if (!strcmp(found.also, "abort")) abort();
        if (!strcmp(found.also, "hang")) for (;;) nap(1000);
    }
    return found;
}

/* ---- device memory, and the restore thread of an app -------------------------------------------------------- */

static void file_path(char path[320], const struct alloc *a) {
    snprintf(path, 320, "%s/dev%d/%s", root(), a->gpu, a->file);
}

static uint64_t used_on(int gpu) {
    char path[300];
    uint64_t sum = 0;
    snprintf(path, sizeof path, "%s/dev%d", root(), gpu);
    DIR *d = opendir(path);
    if (!d) return 0;
    for (struct dirent *e; (e = readdir(d));) {
        struct stat s;
        if (e->d_name[0] != '.' && !fstatat(dirfd(d), e->d_name, &s, 0)) sum += s.st_size;
    }
    closedir(d);
    return sum;
}

static int make_file(struct alloc *a) {
    struct gpu gpus[MAX_GPUS];
    char path[320];
    if (a->gpu >= read_gpus(gpus)) return NO_DEVICE;
    if (used_on(a->gpu) + a->size > gpus[a->gpu].bytes) return OUT_OF_MEMORY;
    snprintf(path, sizeof path, "%s/dev%d", root(), a->gpu);
    mkdir(path, 0777);
    strcpy(a->file, "mem-XXXXXX");
    file_path(path, a);
    int fd = mkstemp(path);
    if (fd < 0) return OUT_OF_MEMORY;
    strcpy(a->file, strrchr(path, '/') + 1);
    int failed = ftruncate(fd, a->size);
    close(fd);
    return failed ? OUT_OF_MEMORY : OK;
}

static int transfer(struct alloc *a, void *host, uint64_t offset, uint64_t bytes, int write) {
    char path[320];
    file_path(path, a);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return UNKNOWN;
    for (uint64_t at = 0; at < bytes;) {
        ssize_t n = write ? pwrite(fd, (char *)host + at, bytes - at, offset + at)
                          : pread(fd, (char *)host + at, bytes - at, offset + at);
        if (n <= 0) { close(fd); return UNKNOWN; }
        at += n;
    }
    close(fd);
    return OK;
}

static void hold_handle(void) {
    char path[320];
    snprintf(path, sizeof path, "%s/nvidiactl", root());
    handle_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (handle_fd >= 0 && !ftruncate(handle_fd, 4096))
        handle_map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, handle_fd, 0);
}

static void drop_handle(void) {
    if (handle_map) munmap(handle_map, 4096);
    if (handle_fd >= 0) close(handle_fd);
    handle_map = NULL;
    handle_fd = -1;
}

static int do_lock(void) {
    long end = box.timeout_ms ? now_ms() + box.timeout_ms : 0;
    while (now_ms() < box.busy_until_ms || pthread_rwlock_trywrlock(&api)) {
        if (end && now_ms() >= end) return NOT_READY;
        nap(2);
    }
    box.state = LOCKED;
    return OK;
}

static int do_checkpoint(void) {
    for (struct alloc *a = box.allocs; a < box.allocs + MAX_ALLOCS; a++) {
        if (!a->size) continue;
        a->host = mmap(NULL, a->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (a->host == MAP_FAILED || transfer(a, a->host, 0, a->size, 0)) return OUT_OF_MEMORY;
    }
    for (struct alloc *a = box.allocs; a < box.allocs + MAX_ALLOCS; a++) {
        char path[320];
        if (!a->size) continue;
        file_path(path, a);
        unlink(path);
    }
    drop_handle();
    box.state = CHECKPOINTED;
    return OK;
}

static int do_restore(void) {
    for (struct alloc *a = box.allocs; a < box.allocs + MAX_ALLOCS; a++) {
        if (!a->size) continue;
        a->gpu = box.new_gpu[a->gpu];
        int failed = make_file(a);
        if (failed) return failed;
        if (transfer(a, a->host, 0, a->size, 1)) return UNKNOWN;
        munmap(a->host, a->size);
        a->host = NULL;
    }
    box.gpu = box.new_gpu[box.gpu];
    hold_handle();
    box.state = LOCKED;
    return OK;
}

static void *restore_thread(void *unused) {
    (void)unused;
    box.tid = syscall(SYS_gettid);
    for (;; nap(1)) {
        if (!box.command) continue;
        switch (box.command) {
        case DO_LOCK: box.result = do_lock(); break;
        case DO_CHECKPOINT: box.result = do_checkpoint(); break;
        case DO_RESTORE: box.result = do_restore(); break;
        case DO_UNLOCK: box.state = RUNNING; pthread_rwlock_unlock(&api); box.result = OK; break;
        case DO_FAIL: box.state = FAILED; box.result = OK; break;
        }
        box.command = NOTHING;
        __sync_synchronize();
        box.done = 1;
    }
    return NULL;
}

/* ---- controller ----------------------------------------------------------------------------------------------- */

static int peer(int pid, struct mailbox *copy, uintptr_t *address) {
    Dl_info self;
    char path[64], line[512];
    uintptr_t base = 0;
    dladdr(&box, &self);
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    FILE *maps = fopen(path, "re");
    if (!maps) return INVALID_VALUE;
    while (!base && fgets(line, sizeof line, maps)) {
        char *name = strrchr(line, '/');
        unsigned long start, end, offset;
        if (name && !strncmp(name, "/libcuda.so.1", 13) &&
            sscanf(line, "%lx-%lx %*s %lx", &start, &end, &offset) == 3 && offset == 0)
            base = start;
    }
    fclose(maps);
    if (!base) return NOT_INITIALIZED;
    *address = base + ((uintptr_t)&box - (uintptr_t)self.dli_fbase);
    struct iovec local = {copy, sizeof *copy}, remote = {(void *)*address, sizeof *copy};
    if (process_vm_readv(pid, &local, 1, &remote, 1, 0) != sizeof *copy) return INVALID_VALUE;
    return copy->context ? OK : NOT_INITIALIZED;
}

static int poke(int pid, uintptr_t address, const void *data, size_t size) {
    struct iovec local = {(void *)data, size}, remote = {(void *)address, size};
    return process_vm_writev(pid, &local, 1, &remote, 1, 0) == (ssize_t)size ? OK : INVALID_VALUE;
}

static int order(int pid, uintptr_t address, struct mailbox *copy, int command) {
    copy->command = NOTHING;
    copy->done = 0;
    size_t from = offsetof(struct mailbox, command);
    if (poke(pid, address + from, (char *)copy + from, sizeof *copy - from)) return INVALID_VALUE;
    if (poke(pid, address + from, &command, sizeof command)) return INVALID_VALUE;
    for (int done = 0; !done; nap(1)) {
        struct iovec local = {copy, sizeof *copy}, remote = {(void *)address, sizeof *copy};
        if (process_vm_readv(pid, &local, 1, &remote, 1, 0) != sizeof *copy) return INVALID_VALUE;
        done = copy->done;
    }
    return copy->result;
}

static int act(const char *name, int pid, int command, int needed, int timeout_ms, const int *new_gpu) {
    struct mailbox copy;
    uintptr_t address;
    struct fault fault = take_fault(name, pid);
    int result = peer(pid, &copy, &address);
    if (result) return result;
    if (!strcmp(fault.also, "failed")) {
        order(pid, address, &copy, DO_FAIL);
        return fault.code;
    }
    if (fault.code > 0 && strcmp(fault.also, "after")) return fault.code;
    if (copy.state != needed) return ILLEGAL_STATE;
    copy.timeout_ms = timeout_ms;
    for (int i = 0; i < MAX_GPUS; i++) copy.new_gpu[i] = new_gpu ? new_gpu[i] : i;
    result = order(pid, address, &copy, command);
    return fault.code > 0 ? fault.code : result;
}

EXPORT int cuCheckpointProcessGetState(int pid, int *state) {
    struct mailbox copy;
    uintptr_t address;
    struct fault fault = take_fault("state", pid);
    if (fault.code > 0) return fault.code;
    int result = peer(pid, &copy, &address);
    *state = copy.state;
    return result;
}

EXPORT int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid) {
    struct mailbox copy;
    uintptr_t address;
    int result = peer(pid, &copy, &address);
    *tid = copy.tid;
    return result;
}

EXPORT int cuCheckpointProcessLock(int pid, unsigned *args) {
    return act("lock", pid, DO_LOCK, RUNNING, args ? (int)args[0] : 0, NULL);
}

EXPORT int cuCheckpointProcessCheckpoint(int pid, void *args) {
    (void)args;
    return act("checkpoint", pid, DO_CHECKPOINT, LOCKED, 0, NULL);
}

struct pair { uuid_t16 old, new; };
struct restore_args { struct pair *pairs; unsigned count; char reserved[52]; };
_Static_assert(sizeof(struct restore_args) == 64, "as in cuda.h");

static int gpu_by_uuid(const uuid_t16 *wanted, struct gpu *gpus, int count) {
    for (int i = 0; i < count; i++) {
        char text[64] = "GPU-";
        for (int b = 0, at = 4; b < 16; b++) {
            if (b == 4 || b == 6 || b == 8 || b == 10) text[at++] = '-';
            at += sprintf(text + at, "%02x", wanted->bytes[b]);
        }
        if (!strcmp(text, gpus[i].uuid)) return i;
    }
    return -1;
}

EXPORT int cuCheckpointProcessRestore(int pid, struct restore_args *args) {
    struct gpu gpus[MAX_GPUS];
    int new_gpu[MAX_GPUS], count = read_gpus(gpus), cuda, mapped = 0;
    char version[64];
    struct mailbox copy;
    uintptr_t address;
    read_driver(version, &cuda);
    for (int i = 0; i < MAX_GPUS; i++) new_gpu[i] = i;
    if (args && args->count) {
        if (atoi(version) < 580) return INVALID_VALUE; /* these bytes were reserved, must be zero */
        for (int i = 0; i < 52; i++) if (args->reserved[i]) return INVALID_VALUE;
        for (unsigned i = 0; i < args->count; i++) {
            int old = gpu_by_uuid(&args->pairs[i].old, gpus, count), new = gpu_by_uuid(&args->pairs[i].new, gpus, count);
            if (old < 0 || new < 0 || strcmp(gpus[old].model, gpus[new].model)) return INVALID_VALUE;
            new_gpu[old] = new;
            mapped |= 1 << old;
        }
        if (peer(pid, &copy, &address) || !(mapped & 1 << copy.gpu)) return INVALID_VALUE;
    }
    return act("restore", pid, DO_RESTORE, CHECKPOINTED, 0, new_gpu);
}

EXPORT int cuCheckpointProcessUnlock(int pid, void *args) {
    (void)args;
    return act("unlock", pid, DO_UNLOCK, LOCKED, 0, NULL);
}

/* ---- the part of the driver API that script/gpu-check's workload uses ------------------------------------------ */

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

#define CALL(expression) ({ pthread_rwlock_rdlock(&api); int r_ = (expression); pthread_rwlock_unlock(&api); r_; })

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

/* For tests only: a kernel that runs for this long. */
EXPORT void fake_kernel(int ms) { box.busy_until_ms = now_ms() + ms; }

/* ---- NVML ------------------------------------------------------------------------------------------------------ */

enum { NVML_NOT_SUPPORTED = 3, NVML_NOT_FOUND = 6, NVML_SMALL = 7, NVML_NO_DRIVER = 9 };
struct memory { unsigned long long total, free, used; };
struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };

EXPORT int nvmlInitWithFlags(unsigned flags) { (void)flags; return access(root(), X_OK) ? NVML_NO_DRIVER : OK; }
EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
EXPORT int nvmlShutdown(void) { return OK; }
EXPORT const char *nvmlErrorString(int code) { return code == NVML_NO_DRIVER ? "Driver Not Loaded" : "an NVML error"; }

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    struct gpu gpus[MAX_GPUS];
    *count = read_gpus(gpus);
    return OK;
}

static struct gpu *device(void *handle) {
    static __thread struct gpu gpus[MAX_GPUS];
    read_gpus(gpus);
    return &gpus[(uintptr_t)handle - 1];
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(uintptr_t)(index + 1);
    return OK;
}

EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    int cuda;
    char version[64];
    read_driver(version, &cuda);
    snprintf(text, length, "%s", version);
    return OK;
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) { return cuDriverGetVersion(version); }
EXPORT int nvmlSystemGetCudaDriverVersion(int *version) { return cuDriverGetVersion(version); }
EXPORT int nvmlDeviceGetName(void *h, char *text, unsigned length) { snprintf(text, length, "%s", device(h)->model); return OK; }
EXPORT int nvmlDeviceGetUUID(void *h, char *text, unsigned length) { snprintf(text, length, "%s", device(h)->uuid); return OK; }
EXPORT int nvmlDeviceGetPersistenceMode(void *h, unsigned *mode) { *mode = device(h)->persistence; return OK; }

EXPORT int nvmlDeviceGetMemoryInfo(void *h, struct memory *memory) {
    memory->total = device(h)->bytes;
    memory->used = used_on((uintptr_t)h - 1);
    memory->free = memory->total - memory->used;
    return OK;
}

EXPORT int nvmlDeviceGetMigMode(void *h, unsigned *current, unsigned *pending) {
    *current = *pending = device(h)->mig;
    return OK;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *count, struct process *processes) {
    unsigned room = *count;
    DIR *d = opendir("/proc");
    *count = 0;
    for (struct dirent *e; (e = readdir(d));) {
        struct mailbox copy;
        uintptr_t address;
        int pid = atoi(e->d_name);
        if (!pid || pid == getpid() || peer(pid, &copy, &address) || copy.gpu != (int)(uintptr_t)h - 1) continue;
        if (copy.state == CHECKPOINTED) continue; /* it lets go of the GPU */
        if (*count < room) {
            processes[*count] = (struct process){pid, 0, -1, -1};
            for (int i = 0; i < MAX_ALLOCS; i++) processes[*count].used += copy.allocs[i].size;
        }
        ++*count;
    }
    closedir(d);
    return *count > room ? NVML_SMALL : OK;
}

/* Processes below an MPS server: those of the file "mps" in the state folder. */
EXPORT int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *h, unsigned *count, struct process *processes) {
    char path[300];
    unsigned room = *count, pid;
    (void)h;
    *count = 0;
    snprintf(path, sizeof path, "%s/mps", root());
    FILE *file = fopen(path, "re");
    for (; file && fscanf(file, "%u", &pid) == 1; ++*count)
        if (*count < room) processes[*count] = (struct process){pid, 0, -1, -1};
    if (file) fclose(file);
    return *count > room ? NVML_SMALL : OK;
}
