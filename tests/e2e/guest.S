/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */

/* The guest of the end-to-end tests: one boot sector, no operating system. It says R on the serial port when it
 * runs, then sleeps until a key comes (virsh send-key) and does one thing per key:
 *
 *   p  power off (ACPI, as an operating system does)      r  reboot
 *   d  dirty every page from 1 MB to 8 MB, 18 times a second, for ever: a migration takes as long as we let it
 *   c  crash: tell the pvpanic device                    b  let the watchdog (ib700) bite
 *   w  write sector 32 of the first disk, and say W or E (an I/O error there is what error_policy= is about)
 *
 * Built by hosts.py: as --32, ld -m elf_i386 --oformat binary -Ttext 0x7c00. */

        .code16
        .globl _start
_start:
        cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $0x7c00, %sp
        sti
        mov     $'R', %al
        call    say

key:
        xor     %ax, %ax
        int     $0x16
        cmp     $'p', %al
        je      poweroff
        cmp     $'r', %al
        je      reboot
        cmp     $'d', %al
        je      dirty
        cmp     $'w', %al
        je      write
        cmp     $'c', %al
        je      crash
        cmp     $'b', %al
        je      bite
        jmp     key

/* PM1a control register where SeaBIOS puts it on the pc machine: SLP_EN, S5. */
poweroff:
        mov     $0x604, %dx
        mov     $0x2000, %ax
        out     %ax, %dx
        jmp     key

/* Reset control register of the PIIX: a hard reset. */
reboot:
        mov     $0xcf9, %dx
        mov     $0x06, %al
        out     %al, %dx
        jmp     key

/* QEMU, hw/misc/pvpanic-isa.c: bit 0 says that the guest has panicked. */
crash:
        mov     $0x505, %dx
        mov     $1, %al
        out     %al, %dx
        jmp     key

/* QEMU, hw/watchdog/wdt_ib700.c: 0xf arms it with no time left. */
bite:
        mov     $0x443, %dx
        mov     $0xf, %al
        out     %al, %dx
        jmp     key

write:
        mov     $0x0301, %ax            /* write one sector ... */
        mov     $0x0020, %cx            /* ... cylinder 0, sector 32 ... */
        mov     $0x0080, %dx            /* ... head 0, first disk ... */
        mov     $0x7c00, %bx            /* ... with ourselves in it */
        int     $0x13
        mov     $'W', %al
        jnc     1f
        mov     $'E', %al
1:      call    say
        jmp     key

say:
        mov     $0x3f8, %dx
        out     %al, %dx
        ret

/* Real mode with 4 GB segments, so that the BIOS timer still wakes us from hlt. */
dirty:
        mov     $'D', %al
        call    say
        in      $0x92, %al              /* the A20 gate */
        or      $2, %al
        out     %al, $0x92
        cli
        lgdt    gdtr
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        mov     $8, %bx
        mov     %bx, %fs
        and     $0xfe, %al
        mov     %eax, %cr0
        sti
        xor     %ecx, %ecx
1:      inc     %ecx
        mov     $0x100000, %edi
2:      mov     %ecx, %fs:(%edi)
        add     $0x1000, %edi
        cmp     $0x800000, %edi
        jb      2b
        hlt
        jmp     1b

gdt:    .quad   0
        .quad   0x00cf92000000ffff
gdtr:   .word   15
        .long   gdt

        .org    510
        .word   0xaa55
