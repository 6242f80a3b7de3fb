"""A seccomp filter for programs that a model wrote: no new processes, and no system call that a program has no use for.

Threads may start, programs may not fork: ``clone`` is allowed with CLONE_THREAD only, ``clone3``, whose flags a filter
cannot see, is not there (glibc then takes ``clone``). ``execve`` is allowed, since the sandbox itself needs it; without
fork it replaces the program, under the same filter and limits. Numbers are those of Linux's unistd.h and audit.h.
"""

from __future__ import annotations

import errno
import platform
import struct

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld word, jeq, jset, ret
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; low word of a little-endian one
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_CLONE_THREAD = 0x10000
_X32 = 0x40000000  # bit of x86_64's second numbering, which would pass under other numbers

#: machine -> (AUDIT_ARCH, call -> number); those that exist there.
_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "clone": 56, "clone3": 435, "fork": 57, "vfork": 58,
            "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438,
            "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308,
            "fsopen": 430, "fsmount": 432, "move_mount": 429, "open_tree": 428, "mount_setattr": 442,
            "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425,
            "add_key": 248, "request_key": 249, "keyctl": 250, "kexec_load": 246, "init_module": 175,
            "finit_module": 313, "reboot": 169, "swapon": 167, "syslog": 103, "personality": 135,
            "memfd_create": 319, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220, "clone3": 435,
            "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "pidfd_getfd": 438,
            "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268,
            "fsopen": 430, "fsmount": 432, "move_mount": 429, "open_tree": 428, "mount_setattr": 442,
            "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425,
            "add_key": 217, "request_key": 218, "keyctl": 219, "kexec_load": 104, "init_module": 105,
            "finit_module": 273, "reboot": 142, "swapon": 224, "syslog": 116, "personality": 92,
            "memfd_create": 279, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180,
        },
    ),
}  # fmt: skip


def program_filter() -> bytes | None:
    """The filter as the array of ``struct sock_filter`` that bubblewrap's ``--seccomp`` reads.

    Returns None on a machine whose numbers are not known here.
    """
    known = _MACHINES.get(platform.machine())
    if known is None:
        return None
    architecture, calls = known
    code = [
        _op(_LOAD, _ARCHITECTURE),
        _op(_EQUAL, architecture, yes=1),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
        _op(_ANY_BIT, _X32, no=1),
        _op(_RETURN, _KILL),
    ]
    for name, number in calls.items():
        if name == "clone":
            code += [
                _op(_EQUAL, number, no=4),
                _op(_LOAD, _FIRST_ARGUMENT),
                _op(_ANY_BIT, _CLONE_THREAD, yes=1),
                _op(_RETURN, _ERRNO | errno.EPERM),
                _op(_RETURN, _ALLOW),
            ]
        else:
            refusal = errno.ENOSYS if name == "clone3" else errno.EPERM
            code += [_op(_EQUAL, number, no=1), _op(_RETURN, _ERRNO | refusal)]
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; ``yes`` and ``no`` are instructions to skip."""
    return struct.pack("=HBBI", code, yes, no, value)
