/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* A QEMU in the hands of an attacker, or of a test that needs to move its hands: it inherits its vessel like any other
 * and then does with it what it is told over a socket (environment variable HOSTILE_QEMU_CONTROL: a path to connect
 * to). One command a line, one answer each: "ok", or what went wrong. Ends like fake_qemu when its standard input does.
 *
 * Knows the layout of the vessel's messages on purpose, and from nowhere else than the comment in core/qemu/vessel.cpp:
 * an attacker does not include our headers either. */

#include "tests/support/orders.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    MAX_MESSAGE = 64 * 1024,
    MAX_FDS = 253, /* SCM_MAX_FD, include/net/scm.h */
    MAX_MESSAGES = 512,
    OFFSET_HEADER_SIZE = 12,
    OFFSET_NAME_LENGTH = 36,
};

struct Message {
    size_t length;
    int count;
    int fds[MAX_FDS];
    char* data;
};

static struct Message messages[MAX_MESSAGES];
static int messageCount;
static int sender = -1, receiver = -1;

static const char* problem(const char* what) {
    static char text[256];
    snprintf(text, sizeof text, "%s: %s", what, strerror(errno));
    return text;
}

/* The receiving end is the one in whose queue something is. */
static const char* findVessel(void) {
    int ends[2], found = 0;
    for (int fd = 3; fd < 1024; fd++) {
        int type = 0;
        socklen_t size = sizeof type;
        if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_SEQPACKET && found < 2)
            ends[found++] = fd;
    }
    if (found < 2)
        return "no vessel";
    char byte;
    int first = recv(ends[0], &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0;
    receiver = ends[!first];
    sender = ends[first];
    return NULL;
}

/* Takes everything out of the queue and keeps it here. */
static const char* takeAll(void) {
    static char control[CMSG_SPACE(MAX_FDS * sizeof(int))] __attribute__((aligned(sizeof(size_t))));
    messageCount = 0;
    while (messageCount < MAX_MESSAGES) {
        struct Message* message = &messages[messageCount];
        if (!message->data)
            message->data = malloc(MAX_MESSAGE);
        struct iovec data = {message->data, MAX_MESSAGE};
        struct msghdr header = {
            .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        ssize_t length = recvmsg(receiver, &header, MSG_DONTWAIT);
        if (length < 0)
            return errno == EAGAIN ? NULL : problem("recvmsg");
        if (length == 0)
            return NULL;
        message->length = (size_t)length;
        message->count = 0;
        struct cmsghdr* rights = CMSG_FIRSTHDR(&header);
        if (rights) {
            message->count = (int)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(message->fds, CMSG_DATA(rights), (size_t)message->count * sizeof(int));
        }
        messageCount++;
    }
    return "too many messages";
}

static int sendBytes(const void* bytes, size_t length, const int* fds, int count) {
    static char control[CMSG_SPACE(MAX_FDS * sizeof(int))] __attribute__((aligned(sizeof(size_t))));
    struct iovec data = {(void*)(uintptr_t)bytes, length};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1};
    if (count > 0) {
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        struct cmsghdr* rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(rights), fds, (size_t)count * sizeof(int));
    }
    return (int)sendmsg(sender, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static const char* sendAll(void) {
    for (int i = 0; i < messageCount; i++)
        if (sendBytes(messages[i].data, messages[i].length, messages[i].fds, messages[i].count) < 0)
            return problem("sendmsg");
    return NULL;
}

/* What is not kept must be closed here: an open descriptor would keep the lease alive. */
static void closeTaken(void) {
    for (int i = 0; i < messageCount; i++)
        for (int j = 0; j < messages[i].count; j++)
            close(messages[i].fds[j]);
}

static const char* takeAndSend(void (*change)(struct Message*)) {
    const char* failure = takeAll();
    if (failure)
        return failure;
    for (int i = 0; i < messageCount; i++)
        change(&messages[i]);
    failure = sendAll();
    closeTaken();
    return failure;
}

static long argument[3];
static char argumentPath[512];

static void patch(struct Message* message) {
    if ((size_t)(argument[0] + argument[1]) <= message->length)
        memcpy(message->data + argument[0], &argument[2], (size_t)argument[1]);
}

static void cut(struct Message* message) {
    if ((size_t)argument[0] < message->length)
        message->length = (size_t)argument[0];
}

static void lengthen(struct Message* message) {
    memset(message->data + message->length, 'x', (size_t)argument[0]);
    message->length += (size_t)argument[0];
}

static void strip(struct Message* message) {
    while (message->count > 0)
        close(message->fds[--message->count]);
}

static void swap(struct Message* message) {
    for (int i = 0; i < message->count; i++) {
        close(message->fds[i]);
        message->fds[i] = open(argumentPath, O_RDWR);
    }
}

/* A consistent lie: the first entry names the other file, too. */
static void point(struct Message* message) {
    struct stat status;
    uint16_t headerSize;
    uint32_t nameLength;
    swap(message);
    if (stat(argumentPath, &status) < 0)
        return;
    memcpy(&headerSize, message->data + OFFSET_HEADER_SIZE, sizeof headerSize);
    memcpy(&nameLength, message->data + OFFSET_NAME_LENGTH, sizeof nameLength);
    uint64_t file[2] = {status.st_dev, status.st_ino};
    memcpy(message->data + headerSize + nameLength, file, sizeof file);
}

static const char* dropFirst(void) {
    if (takeAll() || messageCount == 0)
        return "nothing to drop";
    for (int i = 0; i < messages[0].count; i++)
        close(messages[0].fds[i]);
    struct Message first = messages[0];
    memmove(messages, messages + 1, sizeof messages[0] * (size_t)--messageCount);
    messages[messageCount] = first;
    const char* failure = sendAll();
    closeTaken();
    return failure;
}

/* The queue as libvirtd leaves it when it dies within a change: the complete new set behind the old one, of which the
 * first `gone` messages have been consumed; of the new one only the first `arrived` were sent. */
static const char* interrupt(long gone, long arrived) {
    const char* failure = takeAll();
    int old = messageCount;
    for (int i = 0; !failure && i < old; i++)
        if (i >= gone && sendBytes(messages[i].data, messages[i].length, messages[i].fds, messages[i].count) < 0)
            failure = problem("sendmsg");
    for (int i = 0; !failure && i < old && i < arrived; i++) {
        uint64_t generation;
        memcpy(&generation, messages[i].data + 40, sizeof generation);
        generation++;
        memcpy(messages[i].data + 40, &generation, sizeof generation);
        if (sendBytes(messages[i].data, messages[i].length, messages[i].fds, messages[i].count) < 0)
            failure = problem("sendmsg");
    }
    closeTaken();
    return failure;
}

static const char* flood(const char* bytes, size_t length) {
    while (sendBytes(bytes, length, NULL, 0) >= 0)
        continue;
    return errno == EAGAIN ? NULL : problem("sendmsg");
}

/* Takes the messages away and brings them back for ever, the first byte of the magic now and then wrong: what libvirtd
 * has checked may be something else by the time it acts. */
static void* race(void* unused) {
    (void)unused;
    for (unsigned round = 0;; round++) {
        if (takeAll() == NULL) {
            if (messageCount > 0)
                messages[0].data[0] = round % 3 == 0 ? 'x' : 'l';
            sendAll();
            closeTaken();
        }
        usleep(50);
    }
    return NULL;
}

/* QEMU's own locks of a writer, block/file-posix.c: it writes (101), and nobody else may (201). */
static const char* openLikeQemu(int flags) {
    int fd = open(argumentPath, flags);
    if (fd < 0)
        return problem("open");
    int bytes[] = {100, 201, 101};
    for (int i = 0; i < ((flags & O_ACCMODE) == O_RDWR ? 3 : 2); i++) {
        struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = bytes[i], .l_len = 1};
        if (fcntl(fd, F_OFD_SETLK, &lock) < 0)
            return problem("lock");
    }
    return NULL;
}

static const char* openSockets(void) {
    struct rlimit limit = {(rlim_t)argument[0] * 2 + 512, (rlim_t)argument[0] * 2 + 512};
    (void)setrlimit(RLIMIT_NOFILE, &limit);
    for (long i = 0; i < argument[0]; i++) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) < 0)
            return problem("socketpair");
        (void)!write(pair[0], "leasehld, or so it says", 20);
    }
    return NULL;
}

static const char* obey(const char* line) {
    char word[32] = "";
    memset(argument, 0, sizeof argument);
    sscanf(line, "%31s %ld %ld %ld", word, &argument[0], &argument[1], &argument[2]);
    argumentPath[0] = '\0';
    sscanf(line, "%*s %511s", argumentPath);
#define IS(name) (strcmp(word, name) == 0)
    if (IS("open"))
        return openLikeQemu(O_RDWR);
    if (IS("open-to-read"))
        return openLikeQemu(O_RDONLY);
    if (IS("hold-directory"))
        return flock(open("/proc/self/fd", O_RDONLY | O_DIRECTORY), LOCK_EX) < 0 ? problem("flock") : NULL;
    const char* failure = findVessel();
    if (failure)
        return failure;
    if (IS("keep")) /* takes the leases out and holds them itself */
        return takeAll();
    if (IS("drain")) {
        failure = takeAll();
        closeTaken();
        return failure;
    }
    if (IS("flood"))
        return flood("garbage", 7);
    if (IS("flood-empty"))
        return sendBytes("", 0, NULL, 0) < 0 ? problem("sendmsg") : NULL;
    if (IS("refill")) { /* the true messages once more and more, as generations that do not count up */
        failure = takeAll();
        while (!failure && sendAll() == NULL)
            continue;
        closeTaken();
        return failure;
    }
    if (IS("close-sender"))
        return close(sender) < 0 ? problem("close") : NULL;
    if (IS("close-receiver"))
        return close(receiver) < 0 ? problem("close") : NULL;
    if (IS("close-both"))
        return close(sender) < 0 || close(receiver) < 0 ? problem("close") : NULL;
    if (IS("shutdown"))
        return shutdown(sender, SHUT_RDWR) < 0 ? problem("shutdown") : NULL;
    if (IS("move")) /* libvirtd looks at a certain number first */
        return dup2(receiver, (int)argument[0]) < 0 || close(receiver) < 0 ? problem("dup2") : NULL;
    if (IS("peek-off")) {
        int offset = (int)argument[0];
        return setsockopt(receiver, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof offset) < 0 ? problem("setsockopt") : NULL;
    }
    if (IS("patch"))
        return takeAndSend(patch);
    if (IS("cut"))
        return takeAndSend(cut);
    if (IS("lengthen"))
        return takeAndSend(lengthen);
    if (IS("strip"))
        return takeAndSend(strip);
    if (IS("swap"))
        return takeAndSend(swap);
    if (IS("point"))
        return takeAndSend(point);
    if (IS("drop-first"))
        return dropFirst();
    if (IS("interrupt"))
        return interrupt(argument[0], argument[1]);
    if (IS("sockets"))
        return openSockets();
    if (IS("race")) {
        pthread_t thread;
        return pthread_create(&thread, NULL, race, NULL) != 0 ? "no thread" : NULL;
    }
    return "unknown command";
#undef IS
}

static int connectTo(const char* path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int control = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (connect(control, (struct sockaddr*)&address, sizeof address) < 0) {
        perror(path);
        exit(1);
    }
    return control;
}

int main(void) {
    const char* path = getenv("HOSTILE_QEMU_CONTROL");
    int control = path ? connectTo(path) : -1;
    struct pollfd events[3] = {{.fd = STDIN_FILENO, .events = POLLIN},
                               {.fd = control, .events = POLLIN},
                               {.fd = openOrders(), .events = POLLIN}};
    char line[600];
    for (;;) {
        if (poll(events, 3, -1) < 0 && errno != EINTR)
            return 1;
        if (events[0].revents)
            return 0;
        if (events[2].revents)
            obeyOrders(events[2].fd);
        if (!events[1].revents)
            continue;
        ssize_t length = read(control, line, sizeof line - 1);
        if (length <= 0) {
            events[1].fd = -1;
            continue;
        }
        line[length] = '\0';
        const char* failure = obey(line);
        const char* reply = failure ? failure : "ok";
        if (write(control, reply, strlen(reply)) < 0)
            return 1;
    }
}
