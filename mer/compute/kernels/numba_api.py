"""The parts of numba that kernels are written with; numba has no complete type hints, so they are untyped here."""

from __future__ import annotations

from typing import Any

import numba
import numba.core.cgutils
import numba.core.extending

from mer.compute.kernels.front_end import helper

cgutils: Any = numba.core.cgutils
intrinsic: Any = numba.core.extending.intrinsic
literally: Any = numba.literally  # type: ignore[attr-defined]
njit: Any = helper
