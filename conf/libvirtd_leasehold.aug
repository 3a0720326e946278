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

   let bool = /[01]/
   let upto60 = /[0-9]|[1-5][0-9]|60/
   let upto600 = /[1-9]|[1-9][0-9]|[1-5][0-9][0-9]|600/

   let entry = number_entry "auto_disk_leases" bool
             | number_entry "require_lease_for_disks" bool
             | number_entry "handoff_wait" upto60
             | number_entry "storage_timeout" upto600
             | word_entry "guests_without_lease" /refuse|allow/
             | word_entry "qemu_locks" /refuse|warn|ignore/

   let lns = ( entry | Util.comment | Util.empty ) *

   let filter = incl "/etc/libvirt/qemu-leasehold.conf"
              . Util.stdexcl

   let xfm = transform lns filter
