/* Preloaded between Python and the C library: it counts the calls that touch one folder, and kills,
 * fails, shortens, stops or records the n-th of them. Nothing happens before campaign_arm().
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* Kinds of calls: a mask of these is armed. */
enum { WRITE = 1, SYNC = 2, NAME = 4, CREATE = 8, READ = 16, OPEN = 32 };
/* What is done to the n-th. */
enum { NOTHING, KILL_BEFORE, KILL_INSIDE, KILL_AFTER, FAIL, FAIL_FROM, SHORT, STOP_BEFORE, RECORD };

static char folder[4096];
static size_t folder_length;
static int kinds, action, error_number, log_fd = -1;
static pid_t owner;
static long at, calls, of_kind[6];

void campaign_arm(const char *path, int which, int what, long number, int error, int log) {
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
    kinds = which, at = number, error_number = error, log_fd = log, calls = 0;
    memset(of_kind, 0, sizeof of_kind);
    owner = getpid();
    action = what;
}

void campaign_disarm(void) { action = NOTHING; }

long campaign_calls(int kind) { return of_kind[kind]; }

/* The C library's own function. */
#define REAL(name) ((__typeof__(&name))next((void **)&real_##name, #name))
#define DECLARE(name) static void *real_##name

static void *next(void **cached, const char *name) {
    if (!*cached) *cached = dlsym(RTLD_NEXT, name);
    return *cached;
}

/* The whole path of a name, as seen from an open folder or from the working directory. */
static const char *whole(int at_fd, const char *path, char buffer[8192]) {
    char link[64] = "/proc/self/cwd";
    if (!path || path[0] == '/') return path;
    if (at_fd != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", at_fd);
    ssize_t n = readlink(link, buffer, 4096);
    if (n <= 0) return NULL;
    snprintf(buffer + n, (size_t)(8192 - n), *path ? "/%s" : "%s", path);
    return buffer;
}

static int at_counts(int fd, const char *path) {
    char buffer[8192];
    path = whole(fd, path, buffer);
    return path && !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

static int path_counts(const char *path) { return at_counts(AT_FDCWD, path); }
static int fd_counts(int fd) { return at_counts(fd, ""); }

static void now(int number) {
    kill(getpid(), number);
    if (number == SIGKILL) for (;;) pause();
}

/* Count a call. Return 1 if it has to fail (errno is set), 2 if it has to be cut short, else 0. */
static int before(int kind, int counts) {
    if (!action || action == RECORD || !counts || getpid() != owner) return 0;
    __atomic_add_fetch(&of_kind[__builtin_ctz(kind)], 1, __ATOMIC_SEQ_CST);
    if (!(kinds & kind)) return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (action == FAIL_FROM ? number < at : number != at) return 0;
    switch (action) {
    case KILL_BEFORE: now(SIGKILL); break;
    case STOP_BEFORE: now(SIGSTOP); break;
    case KILL_INSIDE: return 2;
    case KILL_AFTER: return 3;
    case SHORT: return 2;
    case FAIL: case FAIL_FROM:
        if (kind == NAME && error_number == EINTR) return 0; /* Linux interrupts none of them. */
        errno = error_number;
        return 1;
    }
    return 0;
}

static void after(int verdict) {
    int saved = errno;
    if (verdict == 3 || (verdict == 2 && action == KILL_INSIDE)) now(SIGKILL);
    errno = saved;
}

/* The record: operation, inode, offset, lengths, then path, second path and data. */
struct record { char op[8]; uint64_t inode; int64_t offset; int64_t paths[2]; int64_t data; };

DECLARE(writev);

static void note(const char *op, int fd, int64_t offset, const char *a, const char *b, const void *data,
                 int64_t length) {
    struct record r = {{0}, 0, offset, {0, 0}, length};
    struct stat s;
    char first[8192], second[8192];
    int saved = errno;
    a = whole(AT_FDCWD, a, first), b = whole(AT_FDCWD, b, second);
    r.paths[0] = a ? (int64_t)strlen(a) : 0, r.paths[1] = b ? (int64_t)strlen(b) : 0;
    strncpy(r.op, op, sizeof r.op - 1);
    if (fd >= 0 ? !fstat(fd, &s) : b && !lstat(b, &s)) r.inode = s.st_ino;
    struct iovec parts[] = {{&r, sizeof r}, {(void *)a, (size_t)r.paths[0]}, {(void *)b, (size_t)r.paths[1]},
                            {(void *)data, data ? (size_t)length : 0}};
    (void)!REAL(writev)(log_fd, parts, 4);
    errno = saved;
}

#define RECORDS(counts) (action == RECORD && getpid() == owner && (counts))
/* What a person was told: writes to standard output and standard error count as such. */
#define TOLD(fd) ((fd) == 1 || (fd) == 2)

static size_t half(size_t n, int verdict) { return verdict == 2 && n > 1 ? n / 2 : n; }

DECLARE(write);
ssize_t write(int fd, const void *data, size_t n) {
    int mine = action && fd != log_fd && fd_counts(fd), verdict = before(WRITE, mine);
    if (verdict == 1) return -1;
    off_t offset = RECORDS(mine) ? lseek(fd, 0, SEEK_CUR) : 0;
    if (RECORDS(mine) && (fcntl(fd, F_GETFL) & O_APPEND)) { struct stat s; fstat(fd, &s); offset = s.st_size; }
    ssize_t done = REAL(write)(fd, data, half(n, verdict));
    if (RECORDS(mine) && done > 0) note("write", fd, offset, 0, 0, data, done);
    if (action == RECORD && getpid() == owner && TOLD(fd) && done > 0) note("told", -1, 0, 0, 0, data, done);
    after(verdict);
    return done;
}

DECLARE(pwrite64);
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t offset) {
    int mine = action && fd_counts(fd), verdict = before(WRITE, mine);
    if (verdict == 1) return -1;
    ssize_t done = REAL(pwrite64)(fd, data, half(n, verdict), offset);
    if (RECORDS(mine) && done > 0) note("write", fd, offset, 0, 0, data, done);
    after(verdict);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    int mine = action && fd_counts(fd), verdict = before(WRITE, mine);
    if (verdict == 1) return -1;
    off_t offset = RECORDS(mine) ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t done = REAL(writev)(fd, parts, verdict == 2 && count > 1 ? count / 2 : count), left = done;
    for (int i = 0; RECORDS(mine) && i < count && left > 0; i++) {
        int64_t length = left < (ssize_t)parts[i].iov_len ? left : (ssize_t)parts[i].iov_len;
        note("write", fd, offset, 0, 0, parts[i].iov_base, length);
        offset += length, left -= length;
    }
    after(verdict);
    return done;
}

/* Calls without data: VERDICT runs the call, or fails it, and records it where it succeeded. */
#define PLAIN(kind, counts, call, record)                    \
    int mine = action && (counts), verdict = before(kind, mine); \
    if (verdict == 1) return -1;                             \
    int done = call;                                         \
    if (RECORDS(mine) && !done) record;                      \
    after(verdict);                                          \
    return done

DECLARE(ftruncate64);
int ftruncate64(int fd, off64_t size) {
    PLAIN(WRITE, fd_counts(fd), REAL(ftruncate64)(fd, size), note("size", fd, size, 0, 0, 0, 0));
}

DECLARE(posix_fallocate64);
int posix_fallocate64(int fd, off64_t start, off64_t length) { /* returns the error itself */
    int mine = action && fd_counts(fd), verdict = before(WRITE, mine);
    if (verdict == 1) return error_number;
    int done = REAL(posix_fallocate64)(fd, start, length);
    if (RECORDS(mine) && !done) note("room", fd, start + length, 0, 0, 0, 0);
    after(verdict);
    return done;
}

DECLARE(fsync);
int fsync(int fd) { PLAIN(SYNC, fd_counts(fd), REAL(fsync)(fd), note("sync", fd, 0, 0, 0, 0, 0)); }
DECLARE(fdatasync);
int fdatasync(int fd) { PLAIN(SYNC, fd_counts(fd), REAL(fdatasync)(fd), note("sync", fd, 0, 0, 0, 0, 0)); }

DECLARE(rename);
int rename(const char *a, const char *b) {
    PLAIN(NAME, path_counts(a) || path_counts(b), REAL(rename)(a, b), note("rename", -1, 0, a, b, 0, 0));
}
DECLARE(renameat);
int renameat(int x, const char *a, int y, const char *b) {
    PLAIN(NAME, path_counts(a) || path_counts(b), REAL(renameat)(x, a, y, b), note("rename", -1, 0, a, b, 0, 0));
}
DECLARE(link);
int link(const char *a, const char *b) {
    PLAIN(NAME, path_counts(b), REAL(link)(a, b), note("link", -1, 0, a, b, 0, 0));
}
DECLARE(linkat);
int linkat(int x, const char *a, int y, const char *b, int flags) {
    PLAIN(NAME, path_counts(b), REAL(linkat)(x, a, y, b, flags), note("link", -1, 0, a, b, 0, 0));
}
DECLARE(unlink);
int unlink(const char *path) { PLAIN(NAME, path_counts(path), REAL(unlink)(path), note("unlink", -1, 0, path, 0, 0, 0)); }
DECLARE(unlinkat);
int unlinkat(int fd, const char *path, int flags) {
    char buffer[8192];
    PLAIN(NAME, at_counts(fd, path), REAL(unlinkat)(fd, path, flags),
          note(flags & AT_REMOVEDIR ? "rmdir" : "unlink", -1, 0, whole(fd, path, buffer), 0, 0, 0));
}
DECLARE(mkdir);
int mkdir(const char *path, mode_t mode) {
    PLAIN(NAME, path_counts(path), REAL(mkdir)(path, mode), note("mkdir", -1, 0, path, path, 0, 0));
}
DECLARE(rmdir);
int rmdir(const char *path) { PLAIN(NAME, path_counts(path), REAL(rmdir)(path), note("rmdir", -1, 0, path, 0, 0, 0)); }
DECLARE(fchmod);
int fchmod(int fd, mode_t mode) { PLAIN(NAME, fd_counts(fd), REAL(fchmod)(fd, mode), (void)0); }
DECLARE(chmod);
int chmod(const char *path, mode_t mode) { PLAIN(NAME, path_counts(path), REAL(chmod)(path, mode), (void)0); }

static int opened(int fd, int flags, const char *path, int verdict) {
    int unnamed = (flags & O_TMPFILE) == O_TMPFILE;
    if (fd >= 0 && !unnamed && (flags & (O_CREAT | O_TRUNC)) && RECORDS(path_counts(path)))
        note(flags & O_TRUNC ? "new" : "open", fd, 0, path, 0, 0, 0);
    after(verdict);
    return fd;
}

#define MODE(at_fd, flags)                                                     \
    va_list rest;                                                        \
    va_start(rest, flags);                                               \
    mode_t mode = (flags) & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                        \
    int verdict = before((flags) & (O_CREAT | O_TRUNC) ? CREATE : OPEN, action && at_counts(at_fd, path)); \
    if (verdict == 1) return -1

#define OPENS(name)                                                      \
    DECLARE(name);                                                        \
    int name(const char *path, int flags, ...) {                          \
        MODE(AT_FDCWD, flags);                                                      \
        return opened(REAL(name)(path, flags, mode), flags, path, verdict); \
    }
OPENS(open)
OPENS(open64)

DECLARE(openat64);
int openat64(int at_fd, const char *path, int flags, ...) {
    MODE(at_fd, flags);
    return opened(REAL(openat64)(at_fd, path, flags, mode), flags, path, verdict);
}

DECLARE(read);
ssize_t read(int fd, void *data, size_t n) {
    int verdict = before(READ, action && fd_counts(fd));
    if (verdict == 1) return -1;
    ssize_t done = REAL(read)(fd, data, half(n, verdict));
    after(verdict);
    return done;
}

DECLARE(pread64);
ssize_t pread64(int fd, void *data, size_t n, off64_t offset) {
    int verdict = before(READ, action && fd_counts(fd));
    if (verdict == 1) return -1;
    ssize_t done = REAL(pread64)(fd, data, half(n, verdict), offset);
    after(verdict);
    return done;
}

DECLARE(preadv64v2);
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    int verdict = before(READ, action && fd_counts(fd));
    if (verdict == 1) return -1;
    struct iovec first = parts[0];
    if (verdict == 2) first.iov_len = half(first.iov_len, 2), parts = &first, count = 1;
    ssize_t done = REAL(preadv64v2)(fd, parts, count, offset, flags);
    after(verdict);
    return done;
}
