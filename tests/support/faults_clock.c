/* The wall clock of a process, moved at run time: LD_PRELOAD=this, FAULTS_CLOCK=a file of three int64 (nanoseconds).
 *
 * Slot 0 is for the queue server, 1 for the API, 2 for every other process; a process is told by its command line. The file is mapped,
 * so that whoever writes it moves the clocks of all running processes at once. What asks for the wall clock gets the kernel's time plus
 * the offset. What waits until an instant of it looks at it again every SLICE_NS, so that a jump wakes a sleeper early or late as a real
 * one would. Monotonic clocks and the times of files stay as they are. Linux with glibc 2.30 or newer.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define BILLION 1000000000LL
#define SLICE_NS 20000000LL
#define NUM_SLOTS 3
/* Deadlines before 2001 are of the monotonic clock: a condition variable does not show which of the two it was made for. */
#define FIRST_WALL_S 1000000000

static const volatile int64_t none = 0;
static const volatile int64_t *offset_ns = &none;

/* The slot of this process. /proc/self/cmdline: words with a zero byte behind each. */
static int own_slot(void) {
    static char words[1 << 16];
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 2;
    ssize_t size = read(fd, words, sizeof words - 1);
    close(fd);
    if (size <= 0) return 2;
    const char *name = strrchr(words, '/');
    name = name ? name + 1 : words;
    if (!strncmp(name, "valkey-server", 13) || !strncmp(name, "redis-server", 12)) return 0;
    for (char *word = words; word < words + size; word += strlen(word) + 1)
        if (!strcmp(word, "gradstream.api")) return 1;
    return 2;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    const volatile int64_t *slots = mmap(NULL, NUM_SLOTS * sizeof *slots, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (slots != MAP_FAILED) offset_ns = slots + own_slot();
}

static int64_t ns_of(const struct timespec *time) { return time->tv_sec * BILLION + time->tv_nsec; }

static struct timespec timespec_of(int64_t ns) {
    return (struct timespec){.tv_sec = ns / BILLION, .tv_nsec = ns % BILLION};
}

static int64_t kernels_ns(clockid_t clock) {
    struct timespec now;
    syscall(SYS_clock_gettime, clock, &now);
    return ns_of(&now);
}

static int64_t wall_ns(void) { return kernels_ns(CLOCK_REALTIME) + *offset_ns; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (syscall(SYS_clock_gettime, clock, now)) return -1;
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_TAI)
        *now = timespec_of(ns_of(now) + *offset_ns);
    return 0;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    int64_t ns = wall_ns();
    *now = (struct timeval){.tv_sec = ns / BILLION, .tv_usec = ns % BILLION / 1000};
    return 0;
}

time_t time(time_t *now) {
    time_t seconds = wall_ns() / BILLION;
    if (now) *now = seconds;
    return seconds;
}

int timespec_get(struct timespec *now, int base) {
    if (base != TIME_UTC) return 0;
    *now = timespec_of(wall_ns());
    return base;
}

/* The end of the next slice of a wait until `until` of the wall clock, on the monotonic one. */
static struct timespec slice_end(const struct timespec *until) {
    int64_t left = ns_of(until) - wall_ns();
    return timespec_of(kernels_ns(CLOCK_MONOTONIC) + (left < 0 ? 0 : left < SLICE_NS ? left : SLICE_NS));
}

static int is_over(const struct timespec *until) { return wall_ns() >= ns_of(until); }

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    if (until->tv_sec < FIRST_WALL_S) return pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, until);
    for (;;) {
        struct timespec end = slice_end(until);
        int error = pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &end);
        if (error != ETIMEDOUT || is_over(until)) return error;
    }
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    for (;;) {
        struct timespec end = slice_end(until);
        int error = pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &end);
        if (error != ETIMEDOUT || is_over(until)) return error;
    }
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    for (;;) {
        struct timespec end = slice_end(until);
        int result = sem_clockwait(semaphore, CLOCK_MONOTONIC, &end);
        if (!result || errno != ETIMEDOUT || is_over(until)) return result;
    }
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    /* The library's answer is the error itself, the system call's is in errno. */
    if (clock != CLOCK_REALTIME || !(flags & TIMER_ABSTIME))
        return syscall(SYS_clock_nanosleep, clock, flags, until, left) ? errno : 0;
    while (!is_over(until)) {
        struct timespec end = slice_end(until);
        if (syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL)) return errno;
    }
    return 0;
}
