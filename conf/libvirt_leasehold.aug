(* SPDX-License-Identifier: LGPL-2.1-or-later *)
(* SPDX-FileCopyrightText: The leasehold authors *)

(* /etc/libvirt/qemu-leasehold.conf, the options of leasehold.
   Values are limited to what leasehold accepts: augeas then refuses to write
   a file that would keep libvirtd's driver from starting. How they may be
   written is as free as for leasehold itself (core/settings). *)

module Libvirt_leasehold =
   autoload xfm

   let end_of_line = del /[ \t]*\r?\n/ "\n"
   let remark = [ label "#comment" . del /[ \t]*#[ \t]*/ " # " . store /[^ \t\r\n]([^\r\n]*[^ \t\r\n])?/ . end_of_line ]
   let no_remark = del /[ \t]*(#[ \t]*)?\r?\n/ "\n"
   let eol = no_remark | remark
   let indent = del /[ \t]*/ ""
   let value_sep = del /[ \t]*=[ \t]*/ " = "

   let number_entry (name:string) (allowed:regexp) =
     [ indent . key name . value_sep . del /(\+?0*)?/ "" . store allowed . eol ]

   let word_entry (name:string) (allowed:regexp) =
     [ indent . key name . value_sep . Quote.do_quote (store allowed) . eol ]

   (* [ "/mnt/shared=ofd", '/mnt/other=flock' ], also over several lines, with
      remarks between them and a comma behind the last *)
   let space = del /([ \t\r\n]|#[^\n]*\n)*/ " "
   let comma = del /([ \t\r\n]|#[^\n]*\n)*,([ \t\r\n]|#[^\n]*\n)*/ ", "
   let list_end = del /([ \t\r\n]|#[^\n]*\n)*(,([ \t\r\n]|#[^\n]*\n)*)?\]/ " ]"
   let list_entry (name:string) (allowed:regexp) =
     let item = [ seq "item" . Quote.do_quote (store allowed) ] in
     [ indent . key name . value_sep . counter "item" . Util.del_str "["
       . ( space . item . ( comma . item ) * ) ? . list_end . eol ]

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
             | number_entry "single_host" bool
             | word_entry "host_devices" /refuse|warn|ignore/
             | number_entry "device_layers" bool
             | number_entry "lease_backing_files" bool
             | list_entry "storage_locks" /\/[^"'\n]*=(ofd|flock|local|refuse)/
             | word_entry "image_user" /[^"'\n]*/
             | word_entry "image_group" /[^"'\n]*/

   let comment = [ indent . label "#comment" . del /#[ \t]*/ "# " . store /[^ \t\r\n]([^\r\n]*[^ \t\r\n])?/ . end_of_line ]
   let empty = [ del /[ \t]*(#[ \t]*)?\r?\n/ "\n" ]

   let lns = ( entry | comment | empty ) *

   let filter = incl "/etc/libvirt/qemu-leasehold.conf"
              . Util.stdexcl

   let xfm = transform lns filter
