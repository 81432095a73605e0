/*
 * Holds memory and, once told to, touches some of it: what a first answer does to a model.
 *
 *   touch DIR HELD_MB TOUCHED_MB
 *
 * Writes DIR/ready when its memory is filled, waits for DIR/go, reads TOUCHED_MB of it (every fourth block of 64 MB),
 * and writes the time at which it was through, in seconds since the epoch, to DIR/done.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BLOCK (64UL << 20)

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	size_t blocks = strtoul(argv[2], NULL, 10) * 1048576 / BLOCK, touched = strtoul(argv[3], NULL, 10) * 1048576 / BLOCK;
	unsigned long **block = calloc(blocks, sizeof *block);
	for (size_t b = 0; b < blocks; b++) {
		block[b] = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (size_t i = 0; i < BLOCK / 8; i++)
			block[b][i] = b * BLOCK + i + 1;
	}
	char path[4096];
	struct stat found;
	snprintf(path, sizeof path, "%s/ready", argv[1]);
	fclose(fopen(path, "w"));
	snprintf(path, sizeof path, "%s/go", argv[1]);
	while (stat(path, &found))
		usleep(1000);
	unsigned long sum = 0;
	for (size_t b = 0; b < touched; b++)
		for (size_t i = 0; i < BLOCK / 8; i += 8)
			sum += ((volatile unsigned long *)block[b * 4 % blocks])[i];
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	snprintf(path, sizeof path, "%s/done.new", argv[1]);
	FILE *done = fopen(path, "w");
	fprintf(done, "%ld.%09ld %lu\n", now.tv_sec, now.tv_nsec, sum);
	fclose(done);
	char final[4096];
	snprintf(final, sizeof final, "%s/done", argv[1]);
	rename(path, final);
	for (;;)
		pause();
}
