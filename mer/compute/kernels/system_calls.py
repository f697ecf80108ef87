"""The numbers of the Linux system calls that kernels make."""

from __future__ import annotations

import platform
from typing import Final

from mer.errors import ConfigError

_MACHINE: Final = platform.machine()
# in the order of the names below
_NUMBERS: Final = {"x86_64": (202, 1, 24, 228, 271), "aarch64": (98, 64, 124, 113, 73)}.get(_MACHINE)
if _NUMBERS is None:
    raise ConfigError(f"mer computes on x86_64 and aarch64 processors, not on {_MACHINE}")
FUTEX, WRITE, SCHED_YIELD, CLOCK_GETTIME, PPOLL = _NUMBERS
IO_URING_ENTER: Final = 426  # on every architecture
