/* A kernel that GRUB loads: 64-bit mode, one flat mapping, AVX-512 switched on, then main(). Low memory appears a second
   time at 0x700000000000, where the recorded arrays lie. An exception is written to the serial port. */
        .code32
        .section .head, "ax"
        .globl  start
head:   .long   0x1BADB002, 0x00010000, -(0x1BADB002 + 0x00010000)
        .long   head, head, 0, bss_end, start   /* header, load, load end (the whole file), bss end, entry */

start:  cli
        movl    $stack_end, %esp
        movl    $bss_begin, %edi
        movl    $bss_end, %ecx
        subl    %edi, %ecx
        xorl    %eax, %eax
        rep stosb
        movl    $pdpt + 3, pml4
        movl    $pdpt + 3, pml4 + 8 * 224
        movl    $0x83, pdpt                     /* pages of 1 GB */
        movl    $0x40000083, pdpt + 8
        movl    $0x80000083, pdpt + 16
        movl    $0xC0000083, pdpt + 24
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    %cr4, %eax
        orl     $0x40620, %eax                  /* PAE, OSFXSR, OSXMMEXCPT, OSXSAVE */
        movl    %eax, %cr4
        movl    $0xC0000080, %ecx
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        andl    $~0xC, %eax
        orl     $0x80000023, %eax
        movl    %eax, %cr0
        lgdt    gdt_at
        ljmp    $8, $long

        .code64
long:   movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $13, %eax
        xorl    %ecx, %ecx
        cpuid
        andl    $0xE7, %eax                     /* the states of x87, SSE, AVX and AVX-512 */
        xorl    %edx, %edx
        xorl    %ecx, %ecx
        xsetbv
        pushq   $0x1F80
        ldmxcsr (%rsp)
        addq    $8, %rsp
        movl    $stubs, %eax
        movl    $idt, %edi
        movl    $32, %ecx
1:      movw    %ax, (%rdi)
        movw    $8, 2(%rdi)
        movw    $0x8E00, 4(%rdi)
        movl    %eax, %edx
        shrl    $16, %edx
        movw    %dx, 6(%rdi)
        addl    $16, %edi
        addl    $16, %eax
        loop    1b
        lidt    idt_at
        call    main
        cli
2:      hlt
        jmp     2b

        .balign 16
stubs:  .set    k, 0
        .rept   32
        .balign 16
        movl    $k, %edi
        jmp     caught
        .set    k, k + 1
        .endr
caught: movq    (%rsp), %rsi                    /* an error code or the address */
        movq    8(%rsp), %rdx
        subq    $256, %rsp
        andq    $-64, %rsp
        call    exception

        .balign 8
gdt:    .quad   0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF
gdt_at: .word   23
        .long   gdt
        .long   0
idt_at: .word   511
        .quad   idt

        .section .bss
        .balign 4096
pml4:   .skip   4096
pdpt:   .skip   4096
idt:    .skip   512
        .skip   65536
        .balign 64
stack_end:
