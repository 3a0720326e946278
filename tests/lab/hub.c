/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* The network of the lab: gives every Ethernet frame that comes from one host to all others, except where the cable is
 * cut. Usage: hub FD..., for each host a datagram socket that is connected to its QEMU, or a tap device (this machine's
 * own kernel). Orders come on standard input, one a line, and are confirmed on standard output: "cut A B", "heal A B"
 * (positions of the sockets, from 1). Ends with its standard input. */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_HOSTS = 8, LARGEST_FRAME = 70000 };

static int sockets[MOST_HOSTS], hosts;
static bool is_cut[MOST_HOSTS][MOST_HOSTS];

/* False when there is nobody any more at that end: a tap device that went with its network namespace. */
static bool forward(int from) {
    static char frame[LARGEST_FRAME];
    ssize_t length;
    int to;

    while ((length = read(sockets[from], frame, sizeof frame)) > 0) {
        for (to = 0; to < hosts; to++)
            /* A host that is frozen, dead or too slow loses the frame, as on a real wire. */
            if (to != from && !is_cut[from][to])
                (void)!write(sockets[to], frame, length);
    }
    return length >= 0 || errno != EBADFD;
}

static void obey(const char* order) {
    char word[8];
    int a, b;

    if (sscanf(order, "%7s %d %d", word, &a, &b) != 3 || a < 1 || b < 1 || a > hosts || b > hosts) {
        printf("what? %s\n", order);
    } else {
        is_cut[a - 1][b - 1] = is_cut[b - 1][a - 1] = strcmp(word, "cut") == 0;
        printf("done\n");
    }
    fflush(stdout);
}

/* The lab waits for each confirmation, so a read never holds more than one order. */
static bool take_order(void) {
    char order[64];
    ssize_t length = read(STDIN_FILENO, order, sizeof order - 1);

    if (length <= 0)
        return false;
    order[length] = '\0';
    obey(order);
    return true;
}

int main(int argc, char** argv) {
    struct pollfd polls[MOST_HOSTS + 1] = {{.fd = STDIN_FILENO, .events = POLLIN}};
    int i;

    hosts = argc - 1 < MOST_HOSTS ? argc - 1 : MOST_HOSTS;
    for (i = 0; i < hosts; i++) {
        sockets[i] = atoi(argv[i + 1]);
        fcntl(sockets[i], F_SETFL, O_NONBLOCK);
        polls[i + 1] = (struct pollfd){.fd = sockets[i], .events = POLLIN};
    }
    for (;;) {
        if (poll(polls, hosts + 1, -1) < 0 && errno != EINTR)
            return 1;
        if (polls[0].revents && !take_order())
            return 0;
        for (i = 0; i < hosts; i++)
            if (polls[i + 1].revents && !forward(i))
                polls[i + 1].fd = -1;
    }
}
