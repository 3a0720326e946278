/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* LD_PRELOADed into QEMU by the end-to-end tests, so that on one machine leasehold alone decides: QEMU's own image
 * locks (open-file-description locks on bytes 100-104 and 200-204, QEMU's block/file-posix.c) are always "granted" and
 * never "seen". That is how QEMU finds its locks on storage where they do not cross hosts, such as OCFS2 on o2cb.
 * Everything else, QEMU's probe on /dev/null and the locks that leasehold parked in QEMU, is left alone. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>

enum { FIRST_LOCK_BYTE = 100, LAST_LOCK_BYTE = 204 };

static int isImageLock(int command, const struct flock* lock) {
    return (command == F_OFD_SETLK || command == F_OFD_SETLKW || command == F_OFD_GETLK) &&
           lock->l_whence == SEEK_SET && lock->l_start >= FIRST_LOCK_BYTE && lock->l_start <= LAST_LOCK_BYTE;
}

static int answer(const char* function, int fd, int command, void* argument) {
    if (isImageLock(command, argument)) {
        if (command == F_OFD_GETLK)
            ((struct flock*)argument)->l_type = F_UNLCK;
        return 0;
    }
    int (*next)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, function);
    return next(fd, command, argument);
}

/* struct flock and struct flock64 are one type on 64-bit systems, and fcntl's third argument is one register wide
 * whatever its type is. */
_Static_assert(sizeof(struct flock) == sizeof(struct flock64), "this shim is for 64-bit systems");

int fcntl(int fd, int command, ...) {
    va_list list;
    va_start(list, command);
    void* argument = va_arg(list, void*);
    va_end(list);
    return answer("fcntl", fd, command, argument);
}

int fcntl64(int fd, int command, ...) {
    va_list list;
    va_start(list, command);
    void* argument = va_arg(list, void*);
    va_end(list);
    return answer("fcntl64", fd, command, argument);
}
