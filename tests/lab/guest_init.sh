#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# The init of a lab host: mounts, network, the agent. What else runs is started through the agent.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for directory in /dev/shm /run /tmp; do
    mount -t tmpfs tmpfs "$directory"
done
mkdir -p /run/lock /run/rpcbind /run/samba /run/gluster

number=$(sed -n 's/.*lab.host=\([0-9]\).*/\1/p' /proc/cmdline)
echo "h$number" | tee /etc/hostname >/proc/sys/kernel/hostname
printf '%032x\n' "$number" >/etc/machine-id

# eth0 is for the agent alone and reaches nobody else; eth1 is the network that can be cut.
modprobe -a virtio_net virtio_rng virtio_scsi sd_mod 9p 9pnet_virtio configfs
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip addr add "10.77.0.$number/24" dev eth1
ip link set eth1 up

# SCSI disks get their names as they are found. So one is looked for after the other: the kernel would look at all at once.
place=0
for name in sda sdb sdc; do
    echo "0 $place 0" >/sys/class/scsi_host/host0/scan
    until [ -b "/dev/$name" ]; do
        sleep 0.1
    done
    place=$((place + 1))
done

mount -t 9p -o trans=virtio,version=9p2000.L,cache=none,msize=131072 share /share
mount -t configfs none /sys/kernel/config

/sbin/lab-agent &
echo "LAB-READY after $(cut -d' ' -f1 /proc/uptime) s" >/dev/console
while :; do
    wait -n 2>/dev/null
    sleep 1
done
