/* Where the fake machine is described: its GPUs, its driver, and the faults it is to have. */
#include "fake_cuda.h"

static char dir[256];

long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000L + t.tv_nsec / 1000000;
}

void nap(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

const char *root(void) {
    if (!dir[0]) {
        const char *env = getenv("FAKE_CUDA_DIR");
        snprintf(dir, sizeof dir, "%s", env ? env : "/nonexistent");
    }
    return dir;
}

int read_gpus(struct gpu gpus[MAX_GPUS]) {
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

void read_driver(char version[64], int *cuda) {
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

struct fault take_fault(const char *call, int pid) {
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
