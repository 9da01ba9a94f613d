/* A wrong clock for one process: shifts the wall clock by FAULT_CLOCK seconds, as libc and Python see it.

   Waits that end at a moment of the wall clock are shifted back before the kernel sees them, so a wait stays as
   long as it is on a machine whose own clock is wrong. The monotonic clock is untouched. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define WALL 1000000000L /* a deadline above this is no uptime: it is a moment of the wall clock */

static long shift(void) {
    static long seconds;
    static int known;
    if (!known) {
        const char *text = getenv("FAULT_CLOCK");
        seconds = text ? atol(text) : 0;
        known = 1;
    }
    return seconds;
}

static long raw(long number, long a, long b, long c, long d, long e, long f) {
    static long (*real)(long, ...);
    if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return real(number, a, b, c, d, e, f);
}

static void *real_of(const char *name) {
#if defined(__x86_64__)
    void *found = dlvsym(RTLD_NEXT, name, "GLIBC_2.3.2"); /* plain dlsym may give the oldest condition variables */
    if (found) return found;
#endif
    return dlsym(RTLD_NEXT, name);
}

static const struct timespec *back(const struct timespec *at, struct timespec *room) {
    if (!at || at->tv_sec < WALL) return at;
    *room = *at;
    room->tv_sec -= shift();
    return room;
}

int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, now);
    if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE || which == CLOCK_TAI))
        now->tv_sec += shift();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec wall;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &wall)) return -1;
    now->tv_sec = wall.tv_sec;
    now->tv_usec = wall.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    if (now) *now = wall.tv_sec;
    return wall.tv_sec;
}

long syscall(long number, ...) { /* abseil, below gRPC, waits through this one */
    va_list list;
    struct timespec room, *now;
    va_start(list, number);
    long a = va_arg(list, long), b = va_arg(list, long), c = va_arg(list, long);
    long d = va_arg(list, long), e = va_arg(list, long), f = va_arg(list, long);
    va_end(list);
    if (number == SYS_futex && (b & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && (b & FUTEX_CLOCK_REALTIME))
        d = (long)back((const struct timespec *)d, &room);
    long result = raw(number, a, b, c, d, e, f);
    if (number == SYS_clock_gettime && !result && (a == CLOCK_REALTIME || a == CLOCK_REALTIME_COARSE)) {
        now = (struct timespec *)b;
        now->tv_sec += shift();
    }
    return result;
}

int pthread_cond_timedwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, const struct timespec *restrict at) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec room;
    if (!real) real = (int (*)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *))real_of("pthread_cond_timedwait");
    return real(c, m, back(at, &room));
}

int pthread_cond_clockwait(pthread_cond_t *c, pthread_mutex_t *m, clockid_t which, const struct timespec *at) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    struct timespec room;
    if (!real)
        real = (int (*)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *))dlsym(
            RTLD_NEXT, "pthread_cond_clockwait");
    return real(c, m, which, back(at, &room));
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict m, const struct timespec *restrict at) {
    static int (*real)(pthread_mutex_t *, const struct timespec *);
    struct timespec room;
    if (!real) real = (int (*)(pthread_mutex_t *, const struct timespec *))dlsym(RTLD_NEXT, "pthread_mutex_timedlock");
    return real(m, back(at, &room));
}

int sem_timedwait(sem_t *restrict s, const struct timespec *restrict at) {
    static int (*real)(sem_t *, const struct timespec *);
    struct timespec room;
    if (!real) real = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    return real(s, back(at, &room));
}

int sem_clockwait(sem_t *restrict s, clockid_t which, const struct timespec *restrict at) {
    static int (*real)(sem_t *, clockid_t, const struct timespec *);
    struct timespec room;
    if (!real) real = (int (*)(sem_t *, clockid_t, const struct timespec *))dlsym(RTLD_NEXT, "sem_clockwait");
    return real(s, which, back(at, &room));
}
