/* Counts the system calls that change files below one folder, and does harm at a chosen one.
 *
 * LD_PRELOAD. Nothing happens until fault_arm(folder, at, how) is called in the process:
 *   how 0: only count    1: die before the call    2: die after half of it (a write; else before it)    3: the disk is full
 *   4: `at` bytes are left on the disk; the write that would pass them writes what fits
 * fault_count() gives the calls so far, fault_bytes() the bytes written, fault_refused() the calls that found a full disk,
 * fault_growing() the number of the last call that needs room.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static long at, count, bytes, refused, growing;
static int how = -1;

void fault_arm(const char *path, long number, int kind) {
    snprintf(folder, sizeof folder, "%s", path);
    at = number;
    count = bytes = refused = growing = 0;
    how = kind;
}

long fault_count(void) { return count; }
long fault_bytes(void) { return bytes; }
long fault_refused(void) { return refused; }
long fault_growing(void) { return growing; }

static void die(void) { kill(getpid(), SIGKILL); }

static int below(const char *path) { return how >= 0 && strncmp(path, folder, strlen(folder)) == 0; }

static int fd_below(int fd) {
    char link[64], path[4096];
    if (how < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* 0: go on. 1: fail with ENOSPC. 2: do half of it, then die. */
static int harm(int grows) {
    ++count;
    if (grows) growing = count;
    int full = how == 4 ? bytes >= at : how == 3 && count >= at;
    if (full && grows) { ++refused; errno = ENOSPC; return 1; }  /* from here on; what needs no room goes on */
    if (count < at || how <= 0 || how >= 3) return 0;
    if (count > at) return 0;
    if (how == 1) die();
    return 2;
}

/* How much of a write fits. */
static size_t room(size_t size) {
    if (how == 4 && bytes + (long)size > at) size = (size_t)(at - bytes);
    bytes += (long)size;
    return size;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int open_any(const char *name, const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, mode_t) = (int (*)(const char *, int, mode_t))dlsym(RTLD_NEXT, name);
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && below(path)) {
        int h = harm((flags & O_CREAT) != 0 && access(path, F_OK) != 0);
        if (h == 1) return -1;
        if (h == 2) die();
    }
    return real(path, flags, mode);
}

#define MODE(flags, mode) mode_t mode = 0; if (flags & O_CREAT) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); }

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_any("open", path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_any("open64", path, flags, mode); }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (fd_below(fd)) {
        int h = harm(1);
        if (h == 1) return -1;
        if (h == 2) { real(fd, data, size / 2); die(); }
        size = room(size);
    }
    return real(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    if (fd_below(fd)) {
        int h = harm(1);
        if (h == 1) return -1;
        if (h == 2) { real(fd, data, size / 2, place); die(); }
        size = room(size);
    }
    return real(fd, data, size, place);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) { return pwrite64(fd, data, size, place); }

#define ON_FD(name) int name(int fd) { REAL(int, #name, int); if (fd_below(fd) && harm(0) == 2) die(); return real(fd); }
ON_FD(fsync)
ON_FD(fdatasync)

#define ON_PATH(name) int name(const char *path) { REAL(int, #name, const char *); if (below(path) && harm(0) == 2) die(); return real(path); }
ON_PATH(unlink)
ON_PATH(rmdir)

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    if (fd_below(fd) && harm(0) == 2) die();
    return real(fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (below(to) && harm(0) == 2) die();
    return real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    if (below(path)) {
        int h = harm(1);
        if (h == 1) return -1;
        if (h == 2) die();
    }
    return real(path, mode);
}
