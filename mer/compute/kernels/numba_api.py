"""The parts of numba that kernels are written with; numba has no complete type hints, so they are untyped here."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numba.core.cgutils
import numba.core.extending

cgutils: Any = numba.core.cgutils
intrinsic: Any = numba.core.extending.intrinsic
literally: Any = numba.literally  # type: ignore[attr-defined]
njit: Any = functools.partial(numba.njit, error_model="numpy")  # division by zero gives infinity or NaN, no exception
numba_config: Any = numba.config
