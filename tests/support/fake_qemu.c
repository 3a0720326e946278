/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* Stands in for QEMU where only its being a process matters: it is exec'ed, keeps the descriptors that it inherited,
 * never looks at them, and ends when its standard input does, which is when the test that started it closes the pipe
 * or dies. Arguments are accepted and ignored: `-name guest=NAME` makes it readable in ps. */

#include <errno.h>
#include <unistd.h>

int main(void) {
    char byte;
    ssize_t got;

    do
        got = read(STDIN_FILENO, &byte, 1);
    while (got > 0 || (got < 0 && errno == EINTR));
    return got < 0;
}
