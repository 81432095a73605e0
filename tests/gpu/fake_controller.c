/* The process checkpoint functions: finding an app's mailbox, and giving its restore thread orders. */
#include "fake_cuda.h"

int peer(int pid, struct mailbox *copy, uintptr_t *address) {
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
