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
   test Libvirtd_leasehold.lns get "qemu_locks = warn\n" = *
   test Libvirtd_leasehold.lns get "qemu_locks = \"warn'\n" = *
   test Libvirtd_leasehold.lns get "file_lockspace_dir = \"/leases\"\n" = *
