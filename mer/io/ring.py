"""Reads through the kernel's io_uring: the rings shared with the kernel, and the three system calls that work on them.

The layouts are those of <linux/io_uring.h>; see io_uring(7), io_uring_setup(2), io_uring_enter(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from typing import Final

import attrs

_SETUP: Final = 425  # numbers of the system calls, the same on every architecture
_ENTER: Final = 426
_REGISTER: Final = 427
_REGISTER_EVENTFD: Final = 4
_OP_READ: Final = 22  # since Linux 5.6
_ASIDE: Final = 1 << 4  # IOSQE_ASYNC
_FEAT_SINGLE_MMAP: Final = 1
_FEAT_NODROP: Final = 2
_OFFSET_SQES: Final = 0x10000000
_SQE_BYTES: Final = 64
_CQE_BYTES: Final = 16
_PARAMS_BYTES: Final = 120

_SQE: Final = struct.Struct("<BBHiQQIIQQQQ")  # opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, padding
_CQE: Final = struct.Struct("<QiI")  # user_data, res, flags
_PARAMS: Final = struct.Struct("<5I")  # sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle
_OFFSETS: Final = struct.Struct("<7I")  # head, tail, ring_mask, ring_entries, ..., array; or ..., cqes, flags
_EVENTFD_DISABLED: Final = 1  # IORING_CQ_EVENTFD_DISABLED, since Linux 5.8
_WORD: Final = struct.Struct("<I")
_WORD_MASK: Final = 0xFFFFFFFF
_FRUITLESS_CALLS: Final = 8  # in a row that the kernel may be interrupted in, or take nothing, before reads fail

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 7


@attrs.frozen(kw_only=True)
class RingAddresses:
    """Addresses of the words of a ring that is shared with the kernel."""

    fileno: int
    sq_tail: int
    sq_mask: int
    sqes: int
    cq_head: int
    cq_tail: int
    cq_mask: int
    cqes: int


class Ring:
    """A submission and a completion ring, and an eventfd that becomes readable when a read has completed.

    To be used from one thread. Memory that is read into must stay mapped until its read has completed, or until the
    ring is closed: the kernel holds the pages themselves, so that what a late read brings reaches nobody else.

    Attributes:
        entries: reads that may be in flight at once.

    Args:
        entries: at least so many of them.

    Raises:
        OSError: the system has no io_uring, or does not allow it.
    """

    def __init__(self, entries: int) -> None:
        params = bytearray(_PARAMS_BYTES)
        self._fd = _call(_SETUP, entries, _address(params))
        self._event = -1
        self._mappings: list[mmap.mmap] = []
        try:
            self._map(params)
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            number = ctypes.c_int(self._event)
            _call(_REGISTER, self._fd, _REGISTER_EVENTFD, ctypes.addressof(number), 1)
        except BaseException:
            self.close()
            raise

    def _map(self, params: bytearray) -> None:
        self.entries, completions = _PARAMS.unpack_from(params)[:2]
        features = _WORD.unpack_from(params, 20)[0]
        submission, completion = _OFFSETS.unpack_from(params, 40), _OFFSETS.unpack_from(params, 80)
        if features & (_FEAT_SINGLE_MMAP | _FEAT_NODROP) != _FEAT_SINGLE_MMAP | _FEAT_NODROP:
            raise OSError(errno.ENOSYS, "the kernel's io_uring is too old: it needs Linux 5.6")
        n_bytes = max(submission[6] + self.entries * 4, completion[5] + completions * _CQE_BYTES)
        self._rings = mmap.mmap(self._fd, n_bytes)
        self._mappings.append(self._rings)
        self._sqes = mmap.mmap(self._fd, self.entries * _SQE_BYTES, offset=_OFFSET_SQES)
        self._mappings.append(self._sqes)
        self._sq_tail, self._sq_mask, array = submission[1], submission[2], submission[6]
        self._sq_mask = _WORD.unpack_from(self._rings, self._sq_mask)[0]
        self._cq_head, self._cq_tail, self._cqes = completion[0], completion[1], completion[5]
        self._cq_mask = _WORD.unpack_from(self._rings, completion[2])[0]
        self._cq_flags = completion[6]
        for entry in range(self.entries):
            _WORD.pack_into(self._rings, array + 4 * entry, entry)
        self._tail = _WORD.unpack_from(self._rings, self._sq_tail)[0]
        self._prepared: list[int] = []  # tokens of reads that the kernel has not taken yet
        self._known: list[tuple[int, int]] = []  # what `completed` is to say besides

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._event

    def read(self, fd: int, address: int, length: int, offset: int, token: int, *, aside: bool = False) -> None:
        """Prepare a read of a file into memory, for `submit`; `completed` gives its token back.

        At most `entries` reads may be in flight. One that would keep the caller waiting for pages of memory can be
        begun `aside`, by a thread of the kernel.
        """
        entry = (self._tail & self._sq_mask) * _SQE_BYTES
        flags = _ASIDE if aside else 0
        _SQE.pack_into(self._sqes, entry, _OP_READ, flags, 0, fd, offset, address, length, 0, token, 0, 0, 0)
        self._tail = (self._tail + 1) & _WORD_MASK
        self._prepared.append(token)

    def submit(self) -> None:
        """Let the kernel begin what was prepared; what it refuses completes with the error number.

        So does, with EINTR or EAGAIN, what it has not taken after a few calls that were interrupted or took nothing.
        """
        fruitless = 0
        while self._prepared:
            _WORD.pack_into(self._rings, self._sq_tail, self._tail)
            try:
                taken, refusal = _call(_ENTER, self._fd, len(self._prepared)), errno.EAGAIN
            except OSError as error:
                taken, refusal = 0, error.errno or errno.EIO
                if refusal != errno.EINTR:
                    fruitless = _FRUITLESS_CALLS
            del self._prepared[:taken]
            fruitless = 0 if taken else fruitless + 1
            if fruitless >= _FRUITLESS_CALLS:
                self._refuse(refusal)

    def _refuse(self, number: int) -> None:
        """Take back what was prepared and let it complete with an error number."""
        self._known += [(token, -number) for token in self._prepared]
        self._tail = (self._tail - len(self._prepared)) & _WORD_MASK
        _WORD.pack_into(self._rings, self._sq_tail, self._tail)
        self._prepared.clear()
        os.eventfd_write(self._event, 1)

    def completed(self) -> list[tuple[int, int]]:
        """Return what has completed since the last call: tokens, and bytes read or negative error numbers."""
        head = _WORD.unpack_from(self._rings, self._cq_head)[0]
        tail = _WORD.unpack_from(self._rings, self._cq_tail)[0]
        done, self._known = self._known, []
        while head != tail:
            token, result, _ = _CQE.unpack_from(self._rings, self._cqes + (head & self._cq_mask) * _CQE_BYTES)
            done.append((token, result))
            head = (head + 1) & _WORD_MASK
        _WORD.pack_into(self._rings, self._cq_head, head)
        return done

    def lend(self) -> None:
        """Leave the rings to a borrower until `resume`; meanwhile the eventfd is silent."""
        self._notify(_EVENTFD_DISABLED)

    def addresses(self) -> RingAddresses:
        """Return the addresses of the rings, for a borrower; they hold until the ring is closed."""
        rings, sqes = _address(self._rings), _address(self._sqes)
        return RingAddresses(
            fileno=self._fd,
            sq_tail=rings + self._sq_tail,
            sq_mask=self._sq_mask,
            sqes=sqes,
            cq_head=rings + self._cq_head,
            cq_tail=rings + self._cq_tail,
            cq_mask=self._cq_mask,
            cqes=rings + self._cqes,
        )

    def resume(self) -> None:
        """Take over the rings again; `adopt` what was begun meanwhile and not heard of."""
        self._tail = _WORD.unpack_from(self._rings, self._sq_tail)[0]
        self._notify(0)

    def adopt(self, token: int, result: int | None) -> None:
        """Let `completed` tell of a read that somebody else has begun, and has heard of if there is a result."""
        if result is not None:
            self._known.append((token, result))
        os.eventfd_write(self._event, 1)  # it may have completed before `resume`

    def _notify(self, flags: int) -> None:
        """Let the eventfd tell of completions or not, if the kernel can: before 5.8 it always does."""
        if self._cq_flags:
            _WORD.pack_into(self._rings, self._cq_flags, flags)

    def reset(self) -> None:
        """Make the eventfd unreadable until something completes; to be called before `completed`."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._event, 8)

    def close(self) -> None:
        """Close the ring; reads in flight end without a completion. Closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            for mapping in self._mappings:  # each has the ring open too
                mapping.close()
            if self._event >= 0:
                os.close(self._event)
                self._event = -1


def _call(number: int, *arguments: int) -> int:
    """Make a system call.

    Raises:
        OSError: it fails.
    """
    result: int = _syscall(number, *arguments, *(0,) * (6 - len(arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _address(memory: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
