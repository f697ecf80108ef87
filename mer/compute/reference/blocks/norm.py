"""RMSNorm."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mer.compute.reference.products import F64


def rms_norm(x: F64, weight: npt.ArrayLike, eps: float) -> F64:
    """Return x scaled to a root mean square of one along the last axis, times the weight (Zhang & Sennrich 2019)."""
    out: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    return out
