/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* Stands in for QEMU in the torture, and is the witness: it writes to the images that it has been let write to, all the
 * time, and says when somebody else does so, too. Knows nothing of leasehold.
 *
 * It notices another one in two ways. What it has claimed of an image it has locked in a file beside it, which nobody
 * else locks: that shows whoever comes while it is there, however shortly. And it looks whether what is in the image is
 * what it wrote there last, and does so once more before it stops.
 *
 * Orders are lines on a socket of its own, each of which gets an answer:
 *     w PATH, r PATH            open for reading and writing, for reading
 *     c PATH, C PATH            close: any descriptor of it, the one for writing
 *     E PATH, S PATH, R PATH    claim for itself, together with others, for reading only; or change to that
 *     d PATH                    give the claim up
 *     g                         run
 *     p                         stop; claims stay, as those of a suspended guest do
 *     x                         stop, and give up all claims: a migration's source, when its last write is out
 * It ends with its standard input. As `witness_qemu --program PATH` it claims the image, runs, and takes no orders.
 *
 * WITNESS_DIR is where the files beside the images are, and the history, to which it adds what it claims. */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { kClaims = 16, kTokenAt = 4096, kSlotsAt = 8192, kDescriptors = 250 };

struct token {
    uint64_t writer, number;
};

struct claim {
    char path[256];
    char mode; /* E, S, R; 0: none */
    int image, witness;
    struct token last; /* what has to be in the image */
};

static struct claim claims[kClaims];
static int history = -1, running;
static const char* directory;
static char answer[512];

/* One line of the history: in one write, so that it stays whole. */
static void note(const char* format, ...) {
    char line[512], text[400];
    struct timespec now;
    va_list arguments;
    int length;

    clock_gettime(CLOCK_MONOTONIC, &now);
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    length = snprintf(line, sizeof line, "%lld.%09ld %d %s\n", (long long)now.tv_sec, now.tv_nsec, (int)getpid(), text);
    (void)!write(history, line, (size_t)length);
}

static void complain(const char* what, const char* path) {
    snprintf(answer, sizeof answer, "DOUBLE %s %s", what, path);
    note("%s", answer);
}

static const char* name_of(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int try_lock(int fd, int type, int start, int length) {
    struct flock lock = {.l_type = (short)type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(fd, F_OFD_SETLK, &lock);
}

static int is_locked(int fd, int start) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = 1};
    return fcntl(fd, F_OFD_GETLK, &lock) < 0 || lock.l_type != F_UNLCK;
}

/* Byte 0 is the readers', byte 1 the sharers', both are of whoever has the image for himself. */
static int try_witness(int fd, char mode) {
    if (mode == 'E')
        return try_lock(fd, F_WRLCK, 0, 2);
    if (try_lock(fd, F_RDLCK, mode == 'S', 1) < 0)
        return -1;
    try_lock(fd, F_UNLCK, mode == 'R', 1);
    return is_locked(fd, mode == 'R') ? -1 : 0;
}

/* A QEMU that was killed may hold its locks for an instant longer than its lease: the kernel closes one file after the
 * other. */
static int take_witness(int fd, char mode) {
    const struct timespec pause = {0, 5000000};
    int tries;

    for (tries = 0; tries < 50; tries++) {
        if (try_witness(fd, mode) == 0)
            return 0;
        nanosleep(&pause, NULL);
    }
    return -1;
}

static int open_witness(const char* name) {
    char path[512];
    snprintf(path, sizeof path, "%s/witness-%s", directory, name);
    return open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
}

/* The highest descriptor of the file that was opened so; `access` is O_RDONLY, O_RDWR, or -1. */
static int find_open(const char* path, int access) {
    struct stat wanted, found;
    int fd;

    if (stat(path, &wanted) < 0)
        return -1;
    for (fd = kDescriptors - 1; fd > 2; fd--)
        if (fstat(fd, &found) == 0 && found.st_dev == wanted.st_dev && found.st_ino == wanted.st_ino &&
            (access == -1 || (fcntl(fd, F_GETFL) & O_ACCMODE) == access))
            return fd;
    return -1;
}

static struct claim* find_claim(const char* path, int make) {
    struct claim* free_one = NULL;
    int i;

    for (i = 0; i < kClaims; i++) {
        if (claims[i].mode && strcmp(claims[i].path, path) == 0)
            return &claims[i];
        if (!claims[i].mode && !free_one)
            free_one = &claims[i];
    }
    if (!make || !free_one)
        return NULL;
    memset(free_one, 0, sizeof *free_one);
    snprintf(free_one->path, sizeof free_one->path, "%s", path);
    free_one->witness = open_witness(name_of(path));
    return free_one;
}

static off_t place_of(const struct claim* claim) {
    return claim->mode == 'S' ? kSlotsAt + (off_t)getpid() * (off_t)sizeof claim->last : kTokenAt;
}

static void put_token(struct claim* claim) {
    claim->last.writer = (uint64_t)getpid();
    claim->last.number++;
    if (pwrite(claim->image, &claim->last, sizeof claim->last, place_of(claim)) != sizeof claim->last)
        complain("cannot write", claim->path);
}

static void check_token(struct claim* claim) {
    struct token found = {0, 0};

    if (pread(claim->image, &found, sizeof found, place_of(claim)) != sizeof found)
        return; /* the end of a program whose descriptor is closed */
    if (found.writer == claim->last.writer && found.number == claim->last.number)
        return;
    snprintf(answer, sizeof answer, "DOUBLE found-other-data %s %c mine %llu:%llu found %llu:%llu", claim->path,
             claim->mode, (unsigned long long)claim->last.writer, (unsigned long long)claim->last.number,
             (unsigned long long)found.writer, (unsigned long long)found.number);
    note("%s", answer);
    claim->last = found;
}

static void unclaim(struct claim* claim) {
    check_token(claim);
    note("unclaim %c %s", claim->mode, claim->path);
    claim->mode = 0;
    close(claim->witness);
}

static void claim_image(char mode, const char* path) {
    struct claim* claim = find_claim(path, 1);

    if (!claim || claim->witness < 0) {
        snprintf(answer, sizeof answer, "cannot claim %s: %s", path, strerror(errno));
        return;
    }
    if (claim->mode == mode)
        return;
    if (claim->mode)
        note("unclaim %c %s", claim->mode, path);
    claim->image = find_open(path, mode == 'R' ? O_RDONLY : O_RDWR);
    if (claim->image < 0)
        snprintf(answer, sizeof answer, "not open: %s", path);
    if (take_witness(claim->witness, mode) < 0)
        complain(mode == 'E' ? "claim-for-itself" : mode == 'S' ? "claim-shared" : "claim-reading", path);
    claim->mode = mode;
    note("claim %c %s", mode, path);
    if (mode == 'R')
        (void)!pread(claim->image, &claim->last, sizeof claim->last, place_of(claim));
    else
        put_token(claim);
}

static void look_at_all(void) {
    int i;
    for (i = 0; i < kClaims; i++)
        if (claims[i].mode) {
            check_token(&claims[i]);
            if (running && claims[i].mode != 'R')
                put_token(&claims[i]);
        }
}

static void stop(void) {
    look_at_all();
    running = 0;
}

static void obey(char* line) {
    const char* path = line[0] && line[1] ? line + 2 : "";
    struct claim* claim;
    int i;

    strcpy(answer, "ok");
    switch (line[0]) {
    case 'w':
    case 'r':
        if (open(path, (line[0] == 'w' ? O_RDWR : O_RDONLY) | O_CLOEXEC) < 0)
            snprintf(answer, sizeof answer, "cannot open %s: %s", path, strerror(errno));
        break;
    case 'c':
    case 'C':
        close(find_open(path, line[0] == 'C' ? O_RDWR : -1));
        break;
    case 'E':
    case 'S':
    case 'R':
        claim_image(line[0], path);
        break;
    case 'd':
        if ((claim = find_claim(path, 0)))
            unclaim(claim);
        break;
    case 'g':
        running = 1;
        break;
    case 'x':
    case 'p':
        stop();
        for (i = 0; line[0] == 'x' && i < kClaims; i++)
            if (claims[i].mode)
                unclaim(&claims[i]);
        break;
    default:
        strcpy(answer, "what?");
    }
}

/* Bytes as they come; a line at a time is obeyed. Gives 0 at the end. */
static int hear(int fd) {
    static char lines[4096];
    static size_t filled;
    ssize_t got = read(fd, lines + filled, sizeof lines - 1 - filled);
    char* end;

    if (got <= 0)
        return 0;
    filled += (size_t)got;
    lines[filled] = 0;
    while ((end = strchr(lines, '\n'))) {
        *end = 0;
        obey(lines);
        strcat(answer, "\n");
        (void)!send(fd, answer, strlen(answer), MSG_NOSIGNAL);
        filled -= (size_t)(end + 1 - lines);
        memmove(lines, end + 1, filled + 1);
    }
    return 1;
}

static int listen_for_orders(void) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "leasehold-torture-%d", (int)getpid());
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0 ||
        bind(fd, (struct sockaddr*)&name, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length)) < 0)
        return -1;
    return listen(fd, 1) < 0 ? -1 : fd;
}

int main(int argc, char** argv) {
    enum { kEnd, kKnock, kOrders, kAll };
    struct pollfd events[kAll] = {{STDIN_FILENO, POLLIN, 0}, {-1, POLLIN, 0}, {-1, POLLIN, 0}};
    char path[512], program[300];

    directory = getenv("WITNESS_DIR");
    if (!directory)
        return 2;
    snprintf(path, sizeof path, "%s/history", directory);
    history = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (argc == 3 && strcmp(argv[1], "--program") == 0) {
        snprintf(program, sizeof program, "w %s", argv[2]);
        obey(program);
        program[0] = 'E';
        obey(program);
        obey(strcpy(program, "g"));
    } else {
        events[kKnock].fd = listen_for_orders();
    }
    for (;;) {
        if (poll(events, kAll, 5) < 0 && errno != EINTR)
            return 1;
        if (events[kEnd].revents) {
            stop();
            return 0;
        }
        if (events[kKnock].revents && events[kOrders].fd < 0)
            events[kOrders].fd = accept4(events[kKnock].fd, NULL, NULL, SOCK_CLOEXEC);
        if (events[kOrders].revents && !hear(events[kOrders].fd)) {
            close(events[kOrders].fd);
            events[kOrders].fd = -1;
        }
        look_at_all();
    }
}
