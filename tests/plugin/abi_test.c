/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* libvirt's lock-driver interface in numbers, on 64-bit systems: plugin/lock_driver.h says it in our words, and this
 * file holds it to what libvirt's own compiler makes of its src/locking/lock_driver.h. Compiled as C, because that is
 * what the other side is. Run with the plugin's path it looks at the table that libvirtd would find. */

#include "plugin/lock_driver.h"

#include <dlfcn.h>
#include <stdio.h>

#define OFFSET(type, member, offset)                                                                                   \
    _Static_assert(offsetof(type, member) == (offset), #type "." #member " is at " #offset)
#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type " has " #size " bytes")
#define VALUE(constant, value) _Static_assert((constant) == (value), #constant " is " #value)

OFFSET(struct LockDriver, version, 0x00);
OFFSET(struct LockDriver, flags, 0x04);
OFFSET(struct LockDriver, init, 0x08);
OFFSET(struct LockDriver, deinit, 0x10);
OFFSET(struct LockDriver, create, 0x18);
OFFSET(struct LockDriver, destroy, 0x20);
OFFSET(struct LockDriver, addResource, 0x28);
OFFSET(struct LockDriver, acquire, 0x30);
OFFSET(struct LockDriver, release, 0x38);
OFFSET(struct LockDriver, inquire, 0x40);
SIZE(struct LockDriver, 0x48);

OFFSET(struct LockDriverExport, table, 0x00);
OFFSET(struct LockDriverExport, padding, 0x48);
SIZE(struct LockDriverExport, 0x48 + 16 * 8);

OFFSET(struct LockManager, driver, 0);
OFFSET(struct LockManager, privateData, 8);
SIZE(struct LockManager, 16);

OFFSET(struct LockParam, type, 0);
OFFSET(struct LockParam, key, 8);
OFFSET(struct LockParam, value, 16);
OFFSET(struct LockParam, value.iv, 16);
OFFSET(struct LockParam, value.l, 16);
OFFSET(struct LockParam, value.ui, 16);
OFFSET(struct LockParam, value.ul, 16);
OFFSET(struct LockParam, value.d, 16);
OFFSET(struct LockParam, value.str, 16);
OFFSET(struct LockParam, value.cstr, 16);
OFFSET(struct LockParam, value.uuid, 16);
SIZE(struct LockParam, 32);
SIZE(((struct LockParam*)0)->value, 16);
SIZE(((struct LockParam*)0)->value.uuid, 16);
SIZE(((struct LockParam*)0)->value.l, 8);
SIZE(((struct LockParam*)0)->value.ul, 8);

VALUE(LOCK_DRIVER_VERSION, 1000000);
VALUE(LOCK_PARAM_STRING, 0);
VALUE(LOCK_PARAM_CSTRING, 1);
VALUE(LOCK_PARAM_INT, 2);
VALUE(LOCK_PARAM_LONG, 3);
VALUE(LOCK_PARAM_UINT, 4);
VALUE(LOCK_PARAM_ULONG, 5);
VALUE(LOCK_PARAM_DOUBLE, 6);
VALUE(LOCK_PARAM_UUID, 7);
VALUE(LOCK_OBJECT_DOMAIN, 0);
VALUE(LOCK_RESOURCE_DISK, 0);
VALUE(LOCK_RESOURCE_LEASE, 1);
VALUE(LOCK_RESOURCE_READONLY, 1);
VALUE(LOCK_RESOURCE_SHARED, 2);
VALUE(LOCK_NEW_STARTED, 1);
VALUE(LOCK_ACQUIRE_REGISTER_ONLY, 1);
VALUE(LOCK_ACQUIRE_RESTRICT, 2);
VALUE(LOCK_DRIVER_USES_STATE, 1);

static int failures;

static void check(int holds, const char* sentence) {
    if (holds)
        return;
    fprintf(stderr, "not true: %s\n", sentence);
    failures++;
}

int main(int count, char** arguments) {
    /* As libvirtd does it. */
    void* handle = count > 1 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    const struct LockDriverExport* driver = handle ? dlsym(handle, "virLockDriverImpl") : NULL;
    if (!driver) {
        fprintf(stderr, "%s\n", count > 1 ? dlerror() : "usage: abi_test PLUGIN");
        return 1;
    }
    const struct LockDriver* table = &driver->table;
    check(table->version == 1000000, "the table's version is 1000000");
    check(table->flags == 0, "the table has no flags, not even USES_STATE");
    check(table->init && table->deinit && table->create && table->destroy && table->addResource && table->acquire &&
              table->release && table->inquire,
          "every entry of the table is there");
    for (size_t i = 0; i < sizeof driver->padding / sizeof driver->padding[0]; i++)
        check(driver->padding[i] == NULL, "behind the table are zeros");

    /* libvirt never calls anything between a failed create and the next one, but destroy it may. */
    struct LockManager manager = {table, NULL};
    table->destroy(&manager);
    return failures != 0;
}
