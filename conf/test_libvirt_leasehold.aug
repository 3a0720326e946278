(* SPDX-License-Identifier: LGPL-2.1-or-later *)
(* SPDX-FileCopyrightText: The leasehold authors *)

module Test_libvirt_leasehold =
   let conf = "# Every option
auto_disk_leases = 1
require_lease_for_disks = 0

handoff_wait = 5
storage_timeout = 30
guests_without_lease = \"refuse\"
qemu_locks = \"refuse\"
file_lockspace_dir = \"/leases\"
lvm_lockspace_dir = \"\"
scsi_lockspace_dir = \"/leases\"
require_cluster_leases = 1
single_host = 0
host_devices = \"warn\"
device_layers = 1
lease_backing_files = 0
storage_locks = [ \"/mnt/a=ofd\",
  \"/mnt/b=flock\" ]
image_user = \"qemu\"
image_group = \"+107\"
"

   test Libvirt_leasehold.lns get conf =
     { "#comment" = "Every option" }
     { "auto_disk_leases" = "1" }
     { "require_lease_for_disks" = "0" }
     { }
     { "handoff_wait" = "5" }
     { "storage_timeout" = "30" }
     { "guests_without_lease" = "refuse" }
     { "qemu_locks" = "refuse" }
     { "file_lockspace_dir" = "/leases" }
     { "lvm_lockspace_dir" = "" }
     { "scsi_lockspace_dir" = "/leases" }
     { "require_cluster_leases" = "1" }
     { "single_host" = "0" }
     { "host_devices" = "warn" }
     { "device_layers" = "1" }
     { "lease_backing_files" = "0" }
     { "storage_locks"
       { "1" = "/mnt/a=ofd" }
       { "2" = "/mnt/b=flock" } }
     { "image_user" = "qemu" }
     { "image_group" = "+107" }

   (* blanks, single quotes and a remark behind the value *)
   test Libvirt_leasehold.lns get "  qemu_locks='warn' \t# until the backup job is gone\n" =
     { "qemu_locks" = "warn"
       { "#comment" = "until the backup job is gone" } }

   (* as wide as leasehold's own reader: signs, single quotes, a last comma,
      remarks in a list, lines of another system *)
   test Libvirt_leasehold.lns get "handoff_wait = +5\r\nstorage_timeout=007\n" =
     { "handoff_wait" = "5" }
     { "storage_timeout" = "7" }
   test Libvirt_leasehold.lns get "storage_locks = [ # ours\n  '/mnt/a=ofd', # the cluster\n  # gone\n  \"/mnt/b=flock\", # last\n] # end\n" =
     { "storage_locks"
       { "1" = "/mnt/a=ofd" }
       { "2" = "/mnt/b=flock" }
       { "#comment" = "end" } }
   test Libvirt_leasehold.lns put "storage_locks = [\n  '/mnt/a=ofd', # the cluster\n]\n" after
       set "/storage_locks/1" "/mnt/a=local"
     = "storage_locks = [\n  '/mnt/a=local', # the cluster\n]\n"
   test Libvirt_leasehold.lns put "" after
       set "/storage_locks/1" "/mnt/a=ofd" ;
       set "/storage_locks/2" "/mnt/b=flock"
     = "storage_locks = [ \"/mnt/a=ofd\", \"/mnt/b=flock\" ]\n"

   test Libvirt_leasehold.lns put conf after
       set "/handoff_wait" "60" ;
       rm "/auto_disk_leases" ;
       set "/qemu_locks" "ignore"
     = "# Every option
require_lease_for_disks = 0

handoff_wait = 60
storage_timeout = 30
guests_without_lease = \"refuse\"
qemu_locks = \"ignore\"
file_lockspace_dir = \"/leases\"
lvm_lockspace_dir = \"\"
scsi_lockspace_dir = \"/leases\"
require_cluster_leases = 1
single_host = 0
host_devices = \"warn\"
device_layers = 1
lease_backing_files = 0
storage_locks = [ \"/mnt/a=ofd\",
  \"/mnt/b=flock\" ]
image_user = \"qemu\"
image_group = \"+107\"
"

   (* a new option is written in libvirt's manner *)
   test Libvirt_leasehold.lns put "" after
       set "/guests_without_lease" "allow"
     = "guests_without_lease = \"allow\"\n"

   (* what leasehold refuses, augeas refuses too *)
   test Libvirt_leasehold.lns get "handoff_wait = 61\n" = *
   test Libvirt_leasehold.lns get "storage_timeout = 0\n" = *
   test Libvirt_leasehold.lns get "auto_disk_leases = 2\n" = *
   test Libvirt_leasehold.lns get "auto_disk_leases = \"1\"\n" = *
   test Libvirt_leasehold.lns get "lease_backing_files = 2\n" = *
   test Libvirt_leasehold.lns get "qemu_locks = warn\n" = *
   test Libvirt_leasehold.lns get "qemu_locks = \"warn'\n" = *
   test Libvirt_leasehold.lns get "file_lockspace_dir = \"leases\"\n" = *
   test Libvirt_leasehold.lns get "storage_locks = \"/mnt/a=ofd\"\n" = *
   test Libvirt_leasehold.lns get "storage_locks = [ \"/mnt/a=lockd\" ]\n" = *
