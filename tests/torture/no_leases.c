/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* A lock driver that lets everybody have everything, as libvirt's own "nop" does: with it the torture has to find that
 * two write to one image. */

#include "plugin/lock_driver.h"

static int init(unsigned int version, const char* config, unsigned int flags) {
    (void)version, (void)config, (void)flags;
    return 0;
}

static int deinit(void) {
    return 0;
}

static int create(struct LockManager* man, unsigned int type, size_t count, const struct LockParam* params,
                  unsigned int flags) {
    (void)man, (void)type, (void)count, (void)params, (void)flags;
    return 0;
}

static void destroy(struct LockManager* man) {
    (void)man;
}

static int add(struct LockManager* man, unsigned int type, const char* name, size_t count,
               const struct LockParam* params, unsigned int flags) {
    (void)man, (void)type, (void)name, (void)count, (void)params, (void)flags;
    return 0;
}

static int acquire(struct LockManager* man, const char* state, unsigned int flags, int action, int* fd) {
    (void)man, (void)state, (void)flags, (void)action, (void)fd;
    return 0;
}

static int release(struct LockManager* man, char** state, unsigned int flags) {
    (void)man, (void)state, (void)flags;
    return 0;
}

__attribute__((visibility("default"))) const struct LockDriverExport virLockDriverImpl = {
    {LOCK_DRIVER_VERSION, 0, init, deinit, create, destroy, add, acquire, release, release}, {0}};
