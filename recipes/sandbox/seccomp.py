"""The system-call filter of the sandbox: a BPF program, as bytes.

A deny list, because programs (and the C library under them) use hundreds of calls: what is listed returns EPERM, so that the program reads
"Operation not permitted" instead of dying without a word. Denied is what would leave the other walls or go round a limit:

- sockets of any family (socketpair stays: event loops need it); Unix sockets also reach services of the host by path
- other processes' memory, descriptors and execution; kernel keys, BPF, performance events, io_uring (its work passes no filter)
- namespaces, mounts, file handles, kernel modules
- memory that no process limit counts: memfd, System V and POSIX message queues and shared memory

`clone3` returns ENOSYS: its flags lie in memory that a filter cannot read, and C libraries then fall back to `clone`, whose flags it can.

Source: Linux `Documentation/userspace-api/seccomp_filter.rst`; numbers from the kernel's `syscall.tbl` (x86-64) and `unistd.h` (arm64).
Cost: about 60 comparisons per system call.
"""

import errno
import platform
import struct

_NEW = {
    **dict(io_uring_setup=425, io_uring_enter=426, io_uring_register=427, open_tree=428, move_mount=429, fsopen=430, fsconfig=431),
    **dict(fsmount=432, fspick=433, pidfd_getfd=438, mount_setattr=442, memfd_secret=447),
}
"""Calls newer than 2019 have one number on every architecture."""
_X86 = {
    **dict(socket=41, ptrace=101, shmget=29, semget=64, msgget=68, mq_open=240, unshare=272, setns=308, mount=165, umount2=166),
    **dict(pivot_root=155, chroot=161, personality=135, add_key=248, request_key=249, keyctl=250, bpf=321, perf_event_open=298),
    **dict(userfaultfd=323, process_vm_readv=310, process_vm_writev=311, kcmp=312, memfd_create=319, name_to_handle_at=303),
    **dict(open_by_handle_at=304, kexec_load=246, init_module=175, delete_module=176, finit_module=313),
}
_ARM = {
    **dict(socket=198, ptrace=117, shmget=194, semget=190, msgget=186, mq_open=180, unshare=97, setns=268, mount=40, umount2=39),
    **dict(pivot_root=41, chroot=51, personality=92, add_key=217, request_key=218, keyctl=219, bpf=280, perf_event_open=241),
    **dict(userfaultfd=282, process_vm_readv=270, process_vm_writev=271, kcmp=272, memfd_create=279, name_to_handle_at=264),
    **dict(open_by_handle_at=265, kexec_load=104, init_module=105, delete_module=106, finit_module=273),
}
DENIED = {"x86_64": _X86 | _NEW, "aarch64": _ARM | _NEW}
"""Machine -> name -> number of every call that returns EPERM."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_X32 = 0x40000000
"""x86-64 numbers from here on belong to a second ABI with the same calls: denied as a whole."""
_NAMESPACES = 0x7E020000
"""The CLONE_NEW* flags that `clone` takes."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`; both machines are little-endian, so the low half of an argument comes first."""


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def filter_program(machine: str | None = None) -> bytes:
    """The filter for `machine` (this one if None), 8 bytes per instruction; empty where the numbers are not known."""
    machine = machine or platform.machine()
    if machine not in DENIED:
        return b""
    deny = _instruction(_RETURN, _ERRNO | errno.EPERM)
    program = [_instruction(_LOAD, _ARCH), _instruction(_EQUAL, _AUDIT_ARCH[machine], yes=1), _instruction(_RETURN, _KILL)]
    program.append(_instruction(_LOAD, _NUMBER))
    if machine == "x86_64":
        program += [_instruction(_AT_LEAST, _X32, no=1), deny]
    for number in sorted(DENIED[machine].values()):
        program += [_instruction(_EQUAL, number, no=1), deny]
    program += [_instruction(_EQUAL, _CLONE3, no=1), _instruction(_RETURN, _ERRNO | errno.ENOSYS)]
    program += [_instruction(_EQUAL, _CLONE[machine], no=3), _instruction(_LOAD, _FIRST_ARGUMENT)]
    program += [_instruction(_ANY_BIT, _NAMESPACES, no=1), deny, _instruction(_RETURN, _ALLOW)]
    return b"".join(program)
