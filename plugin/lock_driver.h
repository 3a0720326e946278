/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */
#ifndef LEASEHOLD_LOCK_DRIVER_H
#define LEASEHOLD_LOCK_DRIVER_H

/* libvirt's lock-driver interface, in our own words.
 *
 * libvirt does not install a header for it, but the interface has been frozen since libvirt 1.0.0: libvirtd
 * dlopens LOCK_DRIVER_DIR/NAME.so, looks up the data symbol `virLockDriverImpl` and calls through this table.
 * Names are ours, layout is libvirt's; tests/plugin/abi_test.c pins every offset. Values were read in libvirt's
 * src/locking/lock_driver.h and checked against the stock daemon.
 *
 * All callbacks return 0 on success and -1 on error. Must compile as C. */

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The only version libvirt ever passed to init: 1.0.0. */
#define LOCK_DRIVER_VERSION 1000000u

enum LockParamType {
    LOCK_PARAM_STRING = 0,
    LOCK_PARAM_CSTRING = 1,
    LOCK_PARAM_INT = 2,
    LOCK_PARAM_LONG = 3,
    LOCK_PARAM_UINT = 4,
    LOCK_PARAM_ULONG = 5,
    LOCK_PARAM_DOUBLE = 6,
    LOCK_PARAM_UUID = 7,
};

enum LockObjectType { LOCK_OBJECT_DOMAIN = 0 };
enum LockResourceType { LOCK_RESOURCE_DISK = 0, LOCK_RESOURCE_LEASE = 1 };

/* Flags of addResource. */
#define LOCK_RESOURCE_READONLY (1u << 0)
#define LOCK_RESOURCE_SHARED (1u << 1)

/* Flag of create: this request is the forked child that is about to become QEMU. */
#define LOCK_NEW_STARTED (1u << 0)

/* Flags of acquire. REGISTER_ONLY: the guest does not run yet. RESTRICT: the caller loses its privileges soon. */
#define LOCK_ACQUIRE_REGISTER_ONLY (1u << 0)
#define LOCK_ACQUIRE_RESTRICT (1u << 1)

/* Driver flag. leasehold leaves it off and returns a state all the same: libvirt transports it anyway, and with the
 * flag on it refuses to migrate a guest that has no state yet (one started --paused). */
#define LOCK_DRIVER_USES_STATE (1u << 0)

struct LockParam {
    int type;
    const char* key;
    union {
        int iv;
        long long l;
        unsigned int ui;
        unsigned long long ul;
        double d;
        char* str;
        const char* cstr;
        unsigned char uuid[16];
    } value;
};

struct LockDriver;

struct LockManager {
    const struct LockDriver* driver;
    void* privateData;
};

struct LockDriver {
    unsigned int version;
    unsigned int flags;
    int (*init)(unsigned int version, const char* configFile, unsigned int flags);
    int (*deinit)(void);
    int (*create)(struct LockManager* man, unsigned int objectType, size_t nparams, const struct LockParam* params,
                  unsigned int flags);
    void (*destroy)(struct LockManager* man);
    int (*addResource)(struct LockManager* man, unsigned int resourceType, const char* name, size_t nparams,
                       const struct LockParam* params, unsigned int flags);
    int (*acquire)(struct LockManager* man, const char* state, unsigned int flags, int failureAction, int* fd);
    int (*release)(struct LockManager* man, char** state, unsigned int flags);
    int (*inquire)(struct LockManager* man, char** state, unsigned int flags);
};

/* What the plugin exports: the table, then zeros. One fork of libvirt appended entries to the table and calls them
 * when they are not NULL; the padding says that we have none. */
struct LockDriverExport {
    struct LockDriver table;
    void* padding[16];
};

extern const struct LockDriverExport virLockDriverImpl;

#ifdef __cplusplus
}
#endif

#endif
