/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* Stands in for QEMU where only its being a process matters, and what it has open: it is exec'ed, keeps the descriptors
 * that it inherited, never looks at them, takes orders (orders.h), and ends when its standard input does, which is when
 * the test that started it closes the pipe or dies. Arguments are accepted and ignored: `-name guest=NAME` makes it
 * readable in ps. */

#include "tests/support/orders.h"

#include <errno.h>
#include <poll.h>

int main(void) {
    char unread[64];
    struct pollfd events[2] = {{STDIN_FILENO, POLLIN, 0}, {openOrders(), POLLIN, 0}};
    ssize_t got;

    while (poll(events, 2, -1) > 0 || errno == EINTR) {
        if (events[0].revents) {
            got = read(STDIN_FILENO, unread, sizeof unread);
            if (got == 0 || (got < 0 && errno != EINTR))
                return got < 0;
        }
        if (events[1].revents)
            obeyOrders(events[1].fd);
    }
    return 1;
}
