/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* What a stand-in of QEMU has open is up to its test. Orders come to a socket of its own (orders.hpp sends them):
 *     rPATH, wPATH   open the file for reading, for reading and writing
 *     cPATH          close what is open by this path: one of its descriptors, the highest
 */

#ifndef LEASEHOLD_TESTS_ORDERS_H
#define LEASEHOLD_TESTS_ORDERS_H

#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/un.h>
#include <unistd.h>

static void obeyOrder(const char* order) {
    struct stat wanted, found;
    char link[64], target[4097];
    ssize_t length;
    int fd, gone;

    if (*order == 'r' || *order == 'w') {
        (void)!open(order + 1, (*order == 'r' ? O_RDONLY : O_RDWR) | O_NONBLOCK);
    } else if (*order == 'c') {
        gone = stat(order + 1, &wanted) < 0;
        for (fd = 4096; fd > 2; fd--) {
            if (!gone && fstat(fd, &found) == 0 && found.st_dev == wanted.st_dev && found.st_ino == wanted.st_ino) {
                close(fd);
                return;
            }
            if (!gone)
                continue;
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
            length = readlink(link, target, sizeof target - 1);
            if (length <= 0)
                continue;
            target[length] = 0;
            if (strncmp(target, order + 1, strlen(order + 1)) == 0) {
                close(fd);
                return;
            }
        }
    }
}

/* The socket, or -1. Abstract: it vanishes with the process. In the place of the standard output, which a stand-in has
 * no use for: tests count its descriptors. */
static int openOrders(void) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "leasehold-fake-qemu-%d", (int)getpid());
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || dup2(fd, STDOUT_FILENO) < 0)
        return -1;
    close(fd);
    /* Last: whoever reaches it counts our descriptors, and takes the next that goes for an order obeyed. */
    return bind(STDOUT_FILENO, (struct sockaddr*)&name, size) < 0 ? -1 : STDOUT_FILENO;
}

static void obeyOrders(int fd) {
    static char order[8192];
    ssize_t got = recv(fd, order, sizeof order - 1, MSG_DONTWAIT);

    if (got <= 0)
        return;
    order[got] = 0;
    obeyOrder(order);
}

#endif
