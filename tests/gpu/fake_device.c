/* Inside an app: device memory, and the restore thread that moves it at a controller's word. */
#include "fake_cuda.h"

struct mailbox box;
pthread_rwlock_t api_lock = PTHREAD_RWLOCK_INITIALIZER;
static int handle_fd = -1;
static void *handle_map;

void file_path(char path[320], const struct alloc *a) {
    snprintf(path, 320, "%s/dev%d/%s", root(), a->gpu, a->file);
}

uint64_t used_on(int gpu) {
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

int make_file(struct alloc *a) {
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

int transfer(struct alloc *a, void *host, uint64_t offset, uint64_t bytes, int write) {
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

/*
 * What os_lock_user_pages does: get_user_pages while holding the mmap lock, so without FAULT_FLAG_ALLOW_RETRY.
 * Reading /proc/self/mem takes the same path in the kernel (__access_remote_vm): EIO where a userfaultfd is in the way.
 */
int pin_pages(uintptr_t start, size_t size) {
    int fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC), result = OK;
    if (fd < 0) return UNKNOWN;
    for (size_t at = 0; at < size && !result; at += 4096) {
        char byte;
        if (pread(fd, &byte, 1, (off_t)(start + at)) != 1) result = INVALID_VALUE;
    }
    close(fd);
    return result;
}

static int pin_all(void) {
    int failed = OK;
    for (struct alloc *a = box.allocs; a < box.allocs + MAX_ALLOCS && !failed; a++)
        if (a->size) failed = pin_pages((uintptr_t)a->host, a->size);
    for (struct pin *p = box.pins; p < box.pins + MAX_PINS && !failed; p++)
        if (p->size) failed = pin_pages(p->start, p->size);
    return failed;
}

void hold_handle(void) {
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
    while (now_ms() < box.busy_until_ms || pthread_rwlock_trywrlock(&api_lock)) {
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
    if (box.stuck) return OPERATING_SYSTEM;
    int unpinned = pin_all();
    if (unpinned) return unpinned;
    for (struct alloc *a = box.allocs; a < box.allocs + MAX_ALLOCS; a++) {
        if (!a->size) continue;
        a->gpu = box.new_gpu[a->gpu];
        int failed = make_file(a);
        box.stuck = failed == OUT_OF_MEMORY;
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

void *restore_thread(void *unused) {
    (void)unused;
    box.tid = syscall(SYS_gettid);
    for (;; nap(1)) {
        if (!box.command) continue;
        switch (box.command) {
        case DO_LOCK: box.result = do_lock(); break;
        case DO_CHECKPOINT: box.result = do_checkpoint(); break;
        case DO_RESTORE: box.result = do_restore(); break;
        case DO_UNLOCK: box.state = RUNNING; pthread_rwlock_unlock(&api_lock); box.result = OK; break;
        case DO_FAIL: box.state = FAILED; box.result = OK; break;
        }
        box.command = NOTHING;
        __sync_synchronize();
        box.done = 1;
    }
    return NULL;
}
