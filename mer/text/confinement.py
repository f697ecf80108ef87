"""Takes from the process that renders templates everything that rendering does not need, and for good.

A template is a program of a stranger. Jinja2's sandbox keeps it from Python's objects; should it get out of there, this
is what holds it: no descriptor but the three that it has, no new ones, no file, no socket, no other process, bounded
memory. Imports the standard library alone, because the process that uses it knows nothing else.
References: seccomp(2), getrlimit(2), prctl(2); the numbers are those of asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct

MOST_BYTES = 1 << 30  # address space beyond that of the start which no rendering may exceed, whatever it is granted

# Reading, writing, memory, time, and the end: what an interpreter needs that opens nothing.
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CALLS = {
    "x86_64": {
        "read": 0,
        "write": 1,
        "mmap": 9,
        "mprotect": 10,
        "munmap": 11,
        "brk": 12,
        "rt_sigprocmask": 14,
        "rt_sigreturn": 15,
        "sched_yield": 24,
        "mremap": 25,
        "madvise": 28,
        "exit": 60,
        "gettimeofday": 96,
        "futex": 202,
        "restart_syscall": 219,
        "clock_gettime": 228,
        "exit_group": 231,
        "prlimit64": 302,
        "getrandom": 318,
    },
    "aarch64": {
        "read": 63,
        "write": 64,
        "exit": 93,
        "exit_group": 94,
        "futex": 98,
        "clock_gettime": 113,
        "sched_yield": 124,
        "restart_syscall": 128,
        "rt_sigprocmask": 135,
        "rt_sigreturn": 139,
        "gettimeofday": 169,
        "brk": 214,
        "munmap": 215,
        "mremap": 216,
        "mmap": 222,
        "mprotect": 226,
        "madvise": 233,
        "prlimit64": 261,
        "getrandom": 278,
    },
}
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class Confinement:
    """The limits of this process, tightened once; what one rendering may take is set before it and lifted after it."""

    def __init__(self) -> None:
        self._start_bytes = _address_space_bytes()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = self._start_bytes + MOST_BYTES
        self._most_bytes = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (self._most_bytes, self._most_bytes))
        for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
            resource.setrlimit(limit, (0, 0))
        _, self._most_cpu_s = resource.getrlimit(resource.RLIMIT_CPU)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)  # which an ignoring parent would have handed down
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.filtered = _filter_calls()

    def grant(self, memory_bytes: int, cpu_s: int, used_s: float) -> None:
        """Let what follows take so much memory and processor time beyond what has been used; more ends the process.

        Args:
            memory_bytes: address space beyond that of the start.
            cpu_s: seconds of processor time.
            used_s: the processor time that the process has used so far.
        """
        soft = min(self._start_bytes + memory_bytes, self._most_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (soft, self._most_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (int(used_s) + 1 + cpu_s, self._most_cpu_s))

    def lift(self) -> None:
        """Take these bounds away, so that an error can be reported and the next request be read."""
        resource.setrlimit(resource.RLIMIT_AS, (self._most_bytes, self._most_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (self._most_cpu_s, self._most_cpu_s))


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _filter_calls() -> bool:
    """Refuse all system calls but those of `_CALLS`; return False where kernel or processor has no such filter."""
    machine = os.uname().machine
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # neither core dumps nor debuggers
    if machine not in _CALLS or prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    program = _Program(*_instructions(_AUDIT_ARCH[machine], _CALLS[machine]))
    return bool(prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def _instructions(audit_arch: int, calls: dict[str, int]) -> tuple[int, bytes]:
    """Return the filter as the number of its instructions and their bytes (struct sock_filter)."""
    numbers = [number for name, number in calls.items() if name != "prlimit64"]
    n = len(numbers)
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, n + 4, audit_arch),  # another architecture's numbers mean other calls: to EPERM
        (_LOAD, 0, 0, _NUMBER),
        *((_EQUAL, n + 3 - i, 0, number) for i, number in enumerate(numbers)),  # to ALLOW
        (_EQUAL, 0, 2, calls["prlimit64"]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 1, 0, 0),  # this process's own limits: to ALLOW
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    # Jumps count from the instruction after the jump. ALLOW is the last one, EPERM the one before.
    return len(code), b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
