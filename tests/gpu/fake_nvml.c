/* NVML, as far as nvidia-ml-py is asked for it. */
#include "fake_cuda.h"

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
