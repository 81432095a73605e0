/*
 * A libcuda.so.1 and libnvidia-ml.so.1 for machines without a GPU. It behaves as the driver's documentation says.
 *
 * It is loaded by two kinds of processes, like the real one:
 *   - an app: device memory lives in files below $FAKE_CUDA_DIR/devN, never in the app's own memory; a checkpoint
 *     moves it into anonymous memory of the app (so a dump grows as it really would) and removes the files,
 *     and a restore pins that memory, and what the app registered, by the kernel's get_user_pages under the mmap lock,
 *     as os_lock_user_pages of NVIDIA's kernel module does: it fails where a userfaultfd would have to be waited for;
 *   - a controller, which calls cuCheckpointProcess*(pid). It finds the app's mailbox (a variable of this library) by the
 *     library's place in /proc/PID/maps and writes to it; a thread inside the app, the "restore thread", does the
 *     work. So it works across namespaces and on a process that CRIU revived, as the real one does.
 *
 * $FAKE_CUDA_DIR/driver  one line: driver version, CUDA version                        570.86.10 12080
 * $FAKE_CUDA_DIR/gpus    one line a GPU: UUID, bytes, MIG mode, persistence mode, model    GPU-... 8589934592 0 1 NVIDIA L4
 * $FAKE_CUDA_DIR/faults  one line a fault, first match wins: call, pid or 0, CUresult, times, delay in ms, and what else
 *                        happens: "-", "after" (the work is done all the same), "failed" (the process ends in
 *                        state FAILED), "abort" (the controller dies), "hang" (no answer ever)
 *
 * A restore that found too little device memory fails for ever, as the real one does (cuda-checkpoint #44).
 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
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
       OPERATING_SYSTEM = 304, ILLEGAL_STATE = 401, NOT_READY = 600, NOT_SUPPORTED = 801, UNKNOWN = 999 };
enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };
enum { NOTHING, DO_LOCK, DO_CHECKPOINT, DO_RESTORE, DO_UNLOCK, DO_FAIL };
enum { MAX_GPUS = 16, MAX_ALLOCS = 128, MAX_PINS = 16, MAX_NODES = 512, CHUNK = 1 << 20 };
#define EXPORT __attribute__((visibility("default")))
typedef uint64_t devptr;
typedef struct { unsigned char bytes[16]; } uuid_t16;

struct gpu { char uuid[64], model[64]; uint64_t bytes; int mig, persistence; };
struct alloc { uint64_t size; int gpu; char file[16]; void *host; };
struct pin { uintptr_t start; size_t size; };
struct node { int copy; devptr to, from; uint64_t bytes; uint32_t value; };
struct fault { int code, delay_ms; char also[16]; };

/* What a controller reads and writes in an app. Plain data at a fixed place in the library. */
struct mailbox {
    int context, state, tid, gpu, stuck;
    long busy_until_ms;
    struct alloc allocs[MAX_ALLOCS];
    struct pin pins[MAX_PINS];
    volatile int command, done, result;
    int timeout_ms, new_gpu[MAX_GPUS];
};
extern struct mailbox box;

extern pthread_rwlock_t api_lock; /* readers: CUDA calls of the app; writer: the restore thread while it is locked */

long now_ms(void);
void nap(long ms);
const char *root(void);
int read_gpus(struct gpu gpus[MAX_GPUS]);
void read_driver(char version[64], int *cuda);
struct fault take_fault(const char *call, int pid);
void file_path(char path[320], const struct alloc *a);
uint64_t used_on(int gpu);
int make_file(struct alloc *a);
int pin_pages(uintptr_t start, size_t size);
int transfer(struct alloc *a, void *host, uint64_t offset, uint64_t bytes, int write);
void hold_handle(void);
void *restore_thread(void *unused);
int cuDriverGetVersion(int *version);
int peer(int pid, struct mailbox *copy, uintptr_t *address);

#endif
