#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: lab-init            the init of a lab host: mounts, modules, the agent. It is saved then, and each host begins there.
#        lab-init NUMBER     by the agent: from here on it is that host, with a name, a network and disks.
# What else runs is started through the agent.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root

begin() {
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    for directory in /dev/shm /run /tmp; do
        mount -t tmpfs tmpfs "$directory"
    done
    mkdir -p /run/lock /run/rpcbind /run/samba /run/gluster
    modprobe -a virtio_net virtio_rng virtio_scsi sd_mod 9p 9pnet_virtio configfs
    mount -t configfs none /sys/kernel/config
    # eth0 is for the agent alone and reaches nobody else; eth1 is the network that can be cut.
    ip link set lo up
    ip addr add 10.0.2.15/24 dev eth0
    ip link set eth0 up
    /sbin/lab-agent &
    echo "LAB-READY after $(cut -d' ' -f1 /proc/uptime) s" >/dev/console
    while :; do
        wait -n 2>/dev/null
        sleep 1
    done
}

become() {
    local number=$1 place=0 name
    hwclock --hctosys --utc
    echo "h$number" | tee /etc/hostname >/proc/sys/kernel/hostname
    printf '%032x\n' "$number" >/etc/machine-id
    ip link set eth1 address "52:54:00:00:01:0$number"
    ip addr add "10.77.0.$number/24" dev eth1
    ip link set eth1 up
    # SCSI disks get their names as they are found. So one is looked for after the other: the kernel would look at all at
    # once.
    for name in sda sdb sdc; do
        echo "0 $place 0" >/sys/class/scsi_host/host0/scan
        until [ -b "/dev/$name" ]; do
            sleep 0.1
        done
        place=$((place + 1))
    done
    blockdev --rereadpt /dev/vd[b-e] # as they are now, not as empty as they were then
    mount -t 9p -o trans=virtio,version=9p2000.L,cache=none,msize=131072 share /share
}

if [ $# = 0 ]; then
    begin
else
    set -e
    become "$1"
fi
