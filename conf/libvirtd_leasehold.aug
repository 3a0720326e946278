(* SPDX-License-Identifier: LGPL-2.1-or-later *)
(* SPDX-FileCopyrightText: The leasehold authors *)

(* /etc/libvirt/qemu-leasehold.conf, the options of leasehold.
   Values are limited to what leasehold accepts: augeas then refuses to write
   a file that would keep libvirtd's driver from starting. *)

module Libvirtd_leasehold =
   autoload xfm

   let eol = Util.comment_or_eol
   let indent = del /[ \t]*/ ""
   let value_sep = del /[ \t]*=[ \t]*/ " = "

   let number_entry (name:string) (allowed:regexp) =
     [ indent . key name . value_sep . store allowed . eol ]

   let word_entry (name:string) (allowed:regexp) =
     [ indent . key name . value_sep . Quote.do_quote (store allowed) . eol ]

   (* [ "/mnt/shared=ofd", "/mnt/other=flock" ], also over several lines *)
   let space = del /[ \t\n]*/ " "
   let list_entry (name:string) (allowed:regexp) =
     let item = [ seq "item" . Util.del_str "\"" . store allowed . Util.del_str "\"" ] in
     let comma = del /[ \t\n]*,[ \t\n]*/ ", " in
     [ indent . key name . value_sep . counter "item" . Util.del_str "[" . space
       . ( item . ( comma . item ) * . space ) ? . Util.del_str "]" . eol ]

   let bool = /[01]/
   let directory = /(\/[^"'\n]*)?/
   let upto60 = /[0-9]|[1-5][0-9]|60/
   let upto600 = /[1-9]|[1-9][0-9]|[1-5][0-9][0-9]|600/

   let entry = number_entry "auto_disk_leases" bool
             | number_entry "require_lease_for_disks" bool
             | number_entry "handoff_wait" upto60
             | number_entry "storage_timeout" upto600
             | word_entry "guests_without_lease" /refuse|allow/
             | word_entry "qemu_locks" /refuse|warn|ignore/
             | word_entry "file_lockspace_dir" directory
             | word_entry "lvm_lockspace_dir" directory
             | word_entry "scsi_lockspace_dir" directory
             | number_entry "require_cluster_leases" bool
             | number_entry "lease_backing_files" bool
             | list_entry "storage_locks" /\/[^"\n]*=(ofd|flock|local|refuse)/
             | word_entry "image_user" /[^"'\n]*/
             | word_entry "image_group" /[^"'\n]*/

   let lns = ( entry | Util.comment | Util.empty ) *

   let filter = incl "/etc/libvirt/qemu-leasehold.conf"
              . Util.stdexcl

   let xfm = transform lns filter
