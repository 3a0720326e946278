(* SPDX-License-Identifier: LGPL-2.1-or-later *)
(* SPDX-FileCopyrightText: The leasehold authors *)

module Test_libvirtd_leasehold =
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
lease_backing_files = 0
storage_locks = [ \"/mnt/a=ofd\",
  \"/mnt/b=flock\" ]
image_user = \"qemu\"
image_group = \"+107\"
"

   test Libvirtd_leasehold.lns get conf =
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
     { "lease_backing_files" = "0" }
     { "storage_locks"
       { "1" = "/mnt/a=ofd" }
       { "2" = "/mnt/b=flock" } }
     { "image_user" = "qemu" }
     { "image_group" = "+107" }

   (* blanks, single quotes and a remark behind the value *)
   test Libvirtd_leasehold.lns get "  qemu_locks='warn' \t# until the backup job is gone\n" =
     { "qemu_locks" = "warn"
       { "#comment" = "until the backup job is gone" } }

   test Libvirtd_leasehold.lns put conf after
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
lease_backing_files = 0
storage_locks = [ \"/mnt/a=ofd\",
  \"/mnt/b=flock\" ]
image_user = \"qemu\"
image_group = \"+107\"
"

   (* a new option is written in libvirt's manner *)
   test Libvirtd_leasehold.lns put "" after
       set "/guests_without_lease" "allow"
     = "guests_without_lease = \"allow\"\n"

   (* what leasehold refuses, augeas refuses too *)
   test Libvirtd_leasehold.lns get "handoff_wait = 61\n" = *
   test Libvirtd_leasehold.lns get "storage_timeout = 0\n" = *
   test Libvirtd_leasehold.lns get "auto_disk_leases = 2\n" = *
   test Libvirtd_leasehold.lns get "auto_disk_leases = \"1\"\n" = *
   test Libvirtd_leasehold.lns get "lease_backing_files = 2\n" = *
   test Libvirtd_leasehold.lns get "qemu_locks = warn\n" = *
   test Libvirtd_leasehold.lns get "qemu_locks = \"warn'\n" = *
   test Libvirtd_leasehold.lns get "file_lockspace_dir = \"leases\"\n" = *
   test Libvirtd_leasehold.lns get "storage_locks = \"/mnt/a=ofd\"\n" = *
   test Libvirtd_leasehold.lns get "storage_locks = [ \"/mnt/a=lockd\" ]\n" = *
