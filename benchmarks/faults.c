/* Counts the calls that change files below one folder, and makes one of them fail or ends the process there.
 *
 * Preloaded (LD_PRELOAD) into a Python process, which arms it through ctypes: fault_arm(root, at, error, mode). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ONCE = 0, FROM_THERE = 1, KILL = 2, TORN = 3 };
#define HANDLES 65536
static char root[PATH_MAX];
#define LONGEST 20000
static char trace[LONGEST][10]; /* the calls, by number */
static long at = -1, count = 0;
static int error = 0, mode = 0, armed = 0;
static unsigned char ours[HANDLES];

void fault_arm(const char *folder, long k, int err, int how) {
    strncpy(root, folder, sizeof root - 1);
    at = k; error = err; mode = how; count = 0; armed = 1;
}
long fault_count(void) { return count; }
const char *fault_call(long k) { return k < LONGEST ? trace[k] : ""; }

static int below(int folder, const char *path) {
    char full[2 * PATH_MAX], cwd[PATH_MAX], link[64];
    if (!armed || !path) return 0;
    if (path[0] == '/') return !strncmp(path, root, strlen(root));
    if (folder == AT_FDCWD) { if (!getcwd(cwd, sizeof cwd)) return 0; }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, cwd, sizeof cwd - 1);
        if (n < 0) return 0;
        cwd[n] = 0;
    }
    snprintf(full, sizeof full, "%s/%s", cwd, path);
    return !strncmp(full, root, strlen(root));
}

/* 0: go on; -1: fail with errno set. `room` says whether a full disk can refuse this call. */
static int step(const char *name, int room) {
    long mine = count++;
    if (mine < LONGEST) strncpy(trace[mine], name, sizeof trace[0] - 1);
    int hit = mine == at || (mode == FROM_THERE && mine >= at && room);
    if (at < 0 || !hit) return 0;
    if (mode == KILL || mode == TORN) { kill(getpid(), SIGKILL); pause(); }
    errno = error;
    return -1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))

static int opened(int handle, int mine, int flags) {
    if (handle >= 0 && handle < HANDLES) ours[handle] = mine && CHANGES(flags);
    return handle;
}
#define OPEN(name) \
int name(const char *path, int flags, ...) { \
    REAL(name); mode_t how = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); how = va_arg(rest, mode_t); va_end(rest); } \
    int mine = below(AT_FDCWD, path); \
    if (mine && CHANGES(flags) && step("open", 1)) return -1; \
    return opened(real(path, flags, how), mine, flags); \
}
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
int name(int folder, const char *path, int flags, ...) { \
    REAL(name); mode_t how = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); how = va_arg(rest, mode_t); va_end(rest); } \
    int mine = below(folder, path); \
    if (mine && CHANGES(flags) && step("open", 1)) return -1; \
    return opened(real(folder, path, flags, how), mine, flags); \
}
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) \
FILE *name(const char *path, const char *how) { \
    REAL(name); int changes = strpbrk(how, "wa+") != NULL, mine = below(AT_FDCWD, path); \
    if (mine && changes && step("fopen", 1)) return NULL; \
    FILE *file = real(path, how); \
    if (file) opened(fileno(file), mine, changes ? O_WRONLY : 0); \
    return file; \
}
FOPEN(fopen)
FOPEN(fopen64)

#define MINE(handle) (armed && (handle) >= 0 && (handle) < HANDLES && ours[handle])
ssize_t write(int handle, const void *data, size_t size) {
    REAL(write);
    if (!MINE(handle)) return real(handle, data, size);
    if (at >= 0 && count == at && (mode == TORN || mode == FROM_THERE) && size > 1) {
        ssize_t half = real(handle, data, size / 2);
        if (mode == TORN) step("write", 1);
        else { count++; at++; }
        return half;
    }
    return step("write", 1) ? -1 : real(handle, data, size);
}
ssize_t writev(int handle, const struct iovec *parts, int number) {
    REAL(writev);
    return MINE(handle) && step("writev", 1) ? -1 : real(handle, parts, number);
}
ssize_t pwrite64(int handle, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    return MINE(handle) && step("pwrite", 1) ? -1 : real(handle, data, size, offset);
}
int fsync(int handle) {
    REAL(fsync);
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t n = armed ? readlink(link, path, sizeof path - 1) : -1;
    if (n >= 0) path[n] = 0;
    return n >= 0 && below(AT_FDCWD, path) && step("fsync", 1) ? -1 : real(handle);
}
int ftruncate64(int handle, off64_t size) { REAL(ftruncate64); return MINE(handle) && step("truncate", 1) ? -1 : real(handle, size); }
int close(int handle) { REAL(close); if (handle >= 0 && handle < HANDLES) ours[handle] = 0; return real(handle); }

#define TWO(name, room) int name(const char *a, const char *b) { REAL(name); \
    return (below(AT_FDCWD, a) || below(AT_FDCWD, b)) && step(#name, room) ? -1 : real(a, b); }
TWO(rename, 0)
TWO(link, 1)
int renameat(int f, const char *a, int g, const char *b) { REAL(renameat);
    return (below(f, a) || below(g, b)) && step("rename", 0) ? -1 : real(f, a, g, b); }
int linkat(int f, const char *a, int g, const char *b, int flags) { REAL(linkat);
    return (below(f, a) || below(g, b)) && step("link", 1) ? -1 : real(f, a, g, b, flags); }
#define ONE(name, room) int name(const char *path) { REAL(name); \
    return below(AT_FDCWD, path) && step(#name, room) ? -1 : real(path); }
ONE(unlink, 0)
ONE(rmdir, 0)
int unlinkat(int f, const char *path, int flags) { REAL(unlinkat);
    return below(f, path) && step("unlink", 0) ? -1 : real(f, path, flags); }
int mkdir(const char *path, mode_t how) { REAL(mkdir); return below(AT_FDCWD, path) && step("mkdir", 1) ? -1 : real(path, how); }
int chmod(const char *path, mode_t how) { REAL(chmod); return below(AT_FDCWD, path) && step("chmod", 0) ? -1 : real(path, how); }
int fchmodat(int f, const char *path, mode_t how, int flags) { REAL(fchmodat);
    return below(f, path) && step("chmod", 0) ? -1 : real(f, path, how, flags); }
