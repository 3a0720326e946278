#!/bin/busybox sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# The first process of a lab host: the root image, shared by all hosts and never written, under a tmpfs.

fail() {
    busybox echo "LAB-FAILED $*"
    busybox poweroff -f
}

alias busybox=/bin/busybox
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
for module in $(busybox cat /modules/order); do
    busybox insmod "/modules/$module" || fail "insmod $module"
done
tries=0
until [ -b /dev/vda ]; do
    [ $((tries += 1)) -lt 600 ] || fail "no root disk"
    busybox sleep 0.05
done
busybox mount -t ext4 -o ro,noload /dev/vda /image || fail "root image"
busybox mount -t tmpfs -o size=60% tmpfs /changes
busybox mkdir /changes/upper /changes/work
busybox mount -t overlay -o lowerdir=/image,upperdir=/changes/upper,workdir=/changes/work root /root || fail "overlay"
busybox umount /proc /sys /dev
exec busybox switch_root /root /sbin/lab-init
