"""The choice of experts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mer.compute.reference.products import F64


def softmax(x: F64) -> F64:
    """Return the softmax along the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    out: F64 = powers / powers.sum(-1, keepdims=True)
    return out


def route(logits: F64, top_k: int, *, normalize: bool) -> tuple[npt.NDArray[np.int64], F64]:
    """Return `(ids, weights)`, both [T, K], of the experts chosen by logits [T, E]; see `Router`.

    They come in falling order of their logits; of equal ones the lower id is first.
    """
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    shares = np.take_along_axis(softmax(logits), ids, -1)
    return ids, shares / shares.sum(-1, keepdims=True) if normalize else shares
