/*
 * Uses memory in every way that a pager can get wrong, and knows what each page must hold.
 *
 *   torture DIR WORKERS MEGABYTES SEED STEPS
 *
 * Fills its memory, forks WORKERS copies of itself, writes DIR/ready, and waits for DIR/go. In between it is
 * checkpointed and restored. Then every process carries out STEPS random operations (DIR/go may hold a number that
 * makes them others), and checks what it reads against a model of its own (one version number per page; the model
 * is ordinary memory and restored like the rest). A process that finds a wrong byte writes DIR/bad.PID and what it
 * found, or where it crashed; one that is through writes DIR/done.N and waits to be killed, so that its memory can be
 * looked at.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define PAGE 4096UL
#define REGIONS 12
#define MOVED 8   /* the mover's region, which lies at one of two places */
#define READ 9    /* the reader's region */
#define WIPED 10  /* region with MADV_WIPEONFORK */
#define HUGE 11   /* region with MADV_HUGEPAGE */
#define ANYTHING UINT32_MAX

struct region {
	unsigned char *base;
	size_t pages;
	size_t room;        /* entries in version */
	uint32_t *version;  /* per page: 0 zeros, ANYTHING after MADV_FREE, else what pattern() makes of it */
};

static struct region regions[REGIONS];
static unsigned char *shared;
static size_t shared_pages;
static const char *dir;
static size_t step_count;
static uint64_t state;
static uint32_t next_version = 1;
static int depth;
static int self_fd;

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30; x *= 0xbf58476d1ce4e5b9ULL;
	x ^= x >> 27; x *= 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static uint64_t random64(void) { return mix(state += 0x9e3779b97f4a7c15ULL); }
static size_t below(size_t n) { return n ? random64() % n : 0; }

static void bad(const char *format, ...)
{
	char path[4096], text[512];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(text, sizeof text, format, arguments);
	snprintf(path, sizeof path, "%s/bad.%d", dir, getpid());
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (write(fd, text, length) != length)
		abort();
	_exit(3);
}

static void crashed(int number, siginfo_t *info, void *context)
{
	(void)context;
	bad("signal %d (%d) at %p\n", number, info->si_code, info->si_addr);
}

static void must_have_ended_well(pid_t pid, const char *what)
{
	int status;
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status == 0)
		return;
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
		pause(); /* the instance is being ended, one after the other, or memory was short */
	bad("%s: status %x\n", what, status);
}

static void touch(const char *name, int number)
{
	char path[4096];
	snprintf(path, sizeof path, "%s/%s.%d", dir, name, number);
	close(open(path, O_WRONLY | O_CREAT, 0644));
}

static void fill_page(unsigned char *page, uint32_t version)
{
	uint64_t *word = (uint64_t *)page;
	for (size_t i = 0; i < PAGE / 8; i++)
		word[i] = version ? mix(((uint64_t)version << 16) + i) : 0;
}

static void write_page(struct region *r, size_t i)
{
	r->version[i] = next_version++;
	fill_page(r->base + i * PAGE, r->version[i]);
}

static void check_page(struct region *r, size_t i, const char *when)
{
	uint32_t version = r->version[i];
	const uint64_t *word = (const uint64_t *)(r->base + i * PAGE);
	if (version == ANYTHING)
		return;
	for (size_t w = 0; w < PAGE / 8; w++) {
		uint64_t expected = version ? mix(((uint64_t)version << 16) + w) : 0;
		uint64_t found = ((volatile const uint64_t *)word)[w];
		if (found != expected)
			bad("%s: depth %d region %zu page %zu of %zu (%p) word %zu: version %u, expected %llx, found %llx\n",
			    when, depth, (size_t)(r - regions), i, r->pages, (void *)word, w, version,
			    (unsigned long long)expected, (unsigned long long)found);
	}
}

static void check_all(const char *when)
{
	for (int r = 0; r < REGIONS; r++)
		for (size_t i = 0; i < regions[r].pages; i++)
			check_page(&regions[r], i, when);
	for (size_t i = 0; i < shared_pages; i++)
		for (size_t w = 0; w < PAGE / 8; w += 64)
			if (((uint64_t *)(shared + i * PAGE))[w] != mix((i << 20) + w))
				bad("%s: shared page %zu word %zu\n", when, i, w);
}

static void range(struct region *r, size_t *first, size_t *count)
{
	*first = below(r->pages);
	*count = 1 + below(below(4) ? 8 : 300);
	if (*first + *count > r->pages)
		*count = r->pages - *first;
}

static void forget(struct region *r, size_t first, size_t count, uint32_t version)
{
	for (size_t i = first; i < first + count; i++)
		r->version[i] = version;
}

static void resize(struct region *r, size_t pages)
{
	if (pages > r->room)
		return;
	unsigned char *moved = mremap(r->base, r->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
	if (moved == MAP_FAILED)
		return; /* several mappings by now (mprotect); nothing has changed */
	r->base = moved;
	if (pages > r->pages)
		forget(r, r->pages, pages - r->pages, 0);
	r->pages = pages;
}

static int one_mapping(const unsigned char *at, size_t length)
{
	/*
	 * Over several an mremap(2) answers EFAULT; but Linux 6.17 and later, asked for no more than a move, has moved
	 * those before the one that it fails at (one that is registered with a userfaultfd).
	 */
	static char maps[1 << 18];
	size_t have = 0;
	ssize_t more;
	int fd = open("/proc/self/maps", O_RDONLY);
	while ((more = read(fd, maps + have, sizeof maps - 1 - have)) > 0)
		have += more;
	close(fd);
	maps[have] = 0;
	for (const char *line = maps; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
		unsigned long start, end;
		if (sscanf(line, "%lx-%lx", &start, &end) == 2 && start <= (unsigned long)at && (unsigned long)at < end)
			return (unsigned long)at + length <= end;
	}
	return 0;
}

static void move(struct region *r)
{
	size_t length = r->pages * PAGE;
	if (!one_mapping(r->base, length))
		return;
	unsigned char *place = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *moved = mremap(r->base, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place);
	if (moved != place)
		bad("mremap: %s\n", strerror(errno));
	r->base = moved;
}

static void *moving_thread(void *argument)
{
	/* Moves a region of its own away and back, at the same time as all else, and reads it at either place. */
	struct region *r = argument;
	uint64_t own = 99 + depth;
	size_t length = r->pages * PAGE;
	unsigned char *home = r->base, *away = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (size_t n = 0; n < step_count; n++) {
		unsigned char *to = r->base == home ? away : home;
		/* What it leaves stays mapped, lest somebody else is given the place. */
		unsigned char *moved =
			mremap(r->base, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to);
		if (moved != to)
			bad("mover: %s\n", strerror(errno));
		r->base = to;
		for (int i = 0; i < 8; i++)
			check_page(r, mix(own += 7) % r->pages, "mover");
	}
	return NULL;
}

static void *reading_thread(void *argument)
{
	/* Reads and gives up pages of a region of its own, at the same time as all else. */
	struct region *r = argument;
	uint64_t own = 77 + depth;
	for (size_t n = 0; n < 16 * step_count; n++) {
		size_t i = mix(own += 13) % r->pages;
		check_page(r, i, "thread");
		if (n % 7 == 0) {
			madvise(r->base + i * PAGE, PAGE, MADV_DONTNEED);
			r->version[i] = 0;
			check_page(r, i, "thread after MADV_DONTNEED");
		}
	}
	return NULL;
}

static void steps(size_t count);

static void child(size_t count)
{
	pid_t pid = fork();
	if (pid < 0)
		bad("fork: %s\n", strerror(errno));
	if (pid == 0) {
		depth++;
		state ^= 0x5555 * depth;
		/* The threads' regions: they may have been in the middle of something. */
		regions[MOVED].pages = regions[READ].pages = 0;
		self_fd = syscall(SYS_pidfd_open, getpid(), 0);
		forget(&regions[WIPED], 0, regions[WIPED].pages, 0);
		if (below(2))
			check_all("child");
		steps(count);
		check_all("child at its end");
		_exit(0);
	}
	if (below(3) == 0) /* else go on beside it */
		must_have_ended_well(pid, "child");
}

static void run_program(void)
{
	pid_t pid = below(2) ? fork() : vfork();
	if (pid == 0) {
		execl("/bin/true", "true", NULL);
		_exit(9);
	}
	must_have_ended_well(pid, "exec");
}

static int reads_in_the_same_memory(void *argument)
{
	struct region *r = argument;
	for (size_t i = 0; i < r->pages; i += 37)
		check_page(r, i, "process with the same memory");
	return 0;
}

static void share_memory(struct region *r)
{
	/* Another process, no thread, in the same memory: CLONE_VM alone. */
	static char stack[65536] __attribute__((aligned(16)));
	pid_t pid = clone(reads_in_the_same_memory, stack + sizeof stack, CLONE_VM | SIGCHLD, r);
	must_have_ended_well(pid, "process with the same memory");
}

static void heap(void)
{
	/* The heap grows, shrinks and grows again; what is new reads as zeros. */
	for (int n = 0; n < 2; n++) {
		unsigned char *end = sbrk(8 * PAGE);
		for (size_t i = 0; i < 8 * PAGE; i++)
			if (end[i])
				bad("new heap is not zero\n");
		memset(end, 0xee, 8 * PAGE);
		if (n == 0)
			sbrk(-4 * (intptr_t)PAGE), sbrk(-4 * (intptr_t)PAGE);
	}
}

static void split_and_move(struct region *r, size_t first, size_t span)
{
	/* A piece is moved out, its place (still mapped: MREMAP_DONTUNMAP) reads as zeros, and it is moved back. */
	size_t length = span * PAGE;
	unsigned char *at = r->base + first * PAGE;
	if (!one_mapping(at, length))
		return;
	unsigned char *place = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *moved = mremap(at, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, place);
	if (moved != place)
		bad("mremap away: %s\n", strerror(errno));
	for (size_t i = 0; i < length; i += PAGE)
		if (at[i])
			bad("what was moved away is there still\n");
	if (mremap(moved, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, at) != at)
		bad("mremap back: %s\n", strerror(errno));
}

static void shrink_and_grow(struct region *r)
{
	/* In place, without a move: the kernel tells of the one and not of the other. */
	size_t less = 1 + below(64), length = r->pages * PAGE;
	if (r->pages < 600 || mremap(r->base, length, length - less * PAGE, 0) == MAP_FAILED)
		return;
	r->pages -= less;
	if (mremap(r->base, r->pages * PAGE, length, 0) == MAP_FAILED)
		return;
	forget(r, r->pages, less, 0);
	r->pages += less;
}

static void steps(size_t count)
{
	for (size_t n = 0; n < count; n++) {
		size_t number = below(REGIONS - 2);
		struct region *r = &regions[number < MOVED ? number : number + 2];
		size_t first, span;
		range(r, &first, &span);
		unsigned char *at = r->base + first * PAGE;
		switch (below(30)) {
		case 0 ... 6:
			for (size_t i = first; i < first + span; i++)
				check_page(r, i, "read");
			break;
		case 7 ... 10:
			for (size_t i = first; i < first + span; i++)
				write_page(r, i);
			break;
		case 11 ... 12:
			madvise(at, span * PAGE, MADV_DONTNEED);
			forget(r, first, span, 0);
			break;
		case 13:
			madvise(at, span * PAGE, MADV_FREE);
			forget(r, first, span, ANYTHING);
			break;
		case 14:
			munmap(at, span * PAGE);
			if (mmap(at, span * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != at)
				bad("mmap: %s\n", strerror(errno));
			if (r == &regions[WIPED])
				madvise(at, span * PAGE, MADV_WIPEONFORK);
			forget(r, first, span, 0);
			break;
		case 15:
			if (r != &regions[WIPED])
				move(r);
			break;
		case 16:
			if (r != &regions[WIPED])
				resize(r, r->pages + below(64));
			break;
		case 17:
			if (r->pages > 600)
				resize(r, r->pages - below(64));
			break;
		case 18:
			mprotect(at, span * PAGE, PROT_READ);
			for (size_t i = first; i < first + span; i++)
				check_page(r, i, "read-only");
			mprotect(at, span * PAGE, PROT_READ | PROT_WRITE);
			break;
		case 19:
			heap();
			break;
		case 20:
			/* The first write of a page by the kernel, not by the program. */
			if (r->version[first] != ANYTHING) {
				int fds[2];
				unsigned char page[PAGE];
				r->version[first] = next_version++;
				fill_page(page, r->version[first]);
				if (pipe(fds) || write(fds[1], page, PAGE) != PAGE || read(fds[0], at, PAGE) != PAGE)
					bad("pipe: %s\n", strerror(errno));
				close(fds[0]);
				close(fds[1]);
			}
			break;
		case 21:
			if (depth < 2 && below(3) == 0)
				child(count / 3);
			break;
		case 22:
			if (below(4) == 0)
				run_program();
			break;
		case 23:
			madvise(at, span * PAGE, below(2) ? MADV_PAGEOUT : MADV_COLD);
			break;
		case 24:
			madvise(at, span * PAGE, below(2) ? MADV_POPULATE_READ : MADV_POPULATE_WRITE);
			break;
		case 25:
			if (mlock(at, span * PAGE) == 0)
				munlock(at, span * PAGE);
			break;
		case 26: {
			/* Given up by way of process_madvise(2), which before Linux 6.13 may not do it. */
			struct iovec piece = {at, span * PAGE};
			if (syscall(SYS_process_madvise, self_fd, &piece, 1, MADV_DONTNEED, 0) > 0)
				forget(r, first, span, 0);
			break;
		}
		case 27:
			if (r != &regions[WIPED])
				shrink_and_grow(r);
			break;
		case 28:
			if (r != &regions[WIPED])
				split_and_move(r, first, span);
			break;
		case 29:
			if (below(3) == 0)
				share_memory(r);
			else
				madvise(at, span * PAGE, MADV_COLLAPSE);
			break;
		}
	}
}

static void fill(struct region *r, size_t pages)
{
	r->pages = pages;
	r->room = pages * 2 + 4096;
	r->base = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	r->version = mmap(NULL, r->room * sizeof *r->version, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (r == &regions[HUGE])
		madvise(r->base, pages * PAGE, MADV_HUGEPAGE);
	if (r == &regions[WIPED])
		madvise(r->base, pages * PAGE, MADV_WIPEONFORK);
	for (size_t i = 0; i < pages; i++)
		if (i % 11 != 5) /* some holes */
			write_page(r, i);
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	dir = argv[1];
	int workers = atoi(argv[2]);
	size_t pages = (strtoul(argv[3], NULL, 10) << 20) / PAGE / REGIONS;
	state = strtoull(argv[4], NULL, 10);
	step_count = strtoul(argv[5], NULL, 10);

	for (int r = 0; r < REGIONS; r++)
		fill(&regions[r], pages);
	shared_pages = 64;
	shared = mmap(NULL, shared_pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (size_t i = 0; i < shared_pages; i++)
		for (size_t w = 0; w < PAGE / 8; w++)
			((uint64_t *)(shared + i * PAGE))[w] = mix((i << 20) + w);

	int me = 0;
	for (int w = 1; w <= workers; w++) {
		pid_t pid = fork();
		if (pid < 0)
			return 2;
		if (pid == 0) {
			me = w;
			state += w;
			/* As in the forked child of a step: this region starts anew. */
			forget(&regions[WIPED], 0, regions[WIPED].pages, 0);
			for (size_t i = 0; i < pages; i += 3)
				write_page(&regions[WIPED], i);
			for (size_t i = w; i < pages; i += 50)
				write_page(&regions[w % 8], i);
			break;
		}
	}
	touch("ready", me);
	char go[4096];
	struct stat found;
	snprintf(go, sizeof go, "%s/go", dir);
	while (stat(go, &found))
		usleep(2000);

	FILE *file = fopen(go, "r");
	unsigned long more = 0;
	if (file && fscanf(file, "%lu", &more) == 1)
		state += mix(more);
	if (file)
		fclose(file);
	struct sigaction telling = {.sa_sigaction = crashed, .sa_flags = SA_SIGINFO | SA_RESETHAND};
	sigaction(SIGSEGV, &telling, NULL);
	sigaction(SIGBUS, &telling, NULL);
	self_fd = syscall(SYS_pidfd_open, getpid(), 0);
	pthread_t threads[2];
	pthread_create(&threads[0], NULL, reading_thread, &regions[READ]);
	pthread_create(&threads[1], NULL, moving_thread, &regions[MOVED]);
	steps(step_count);
	for (int t = 0; t < 2; t++)
		pthread_join(threads[t], NULL);
	check_all("at the end");
	touch("done", me);
	for (;;)
		pause();
}
