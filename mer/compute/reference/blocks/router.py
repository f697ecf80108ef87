"""The choice of experts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mer.compute.reference.blocks.feed_forward import sigmoid
from mer.compute.reference.products import F64
from mer.model.operators import LEAST_SUM, Groups, Routing, Scoring


def softmax(x: F64) -> F64:
    """Return the softmax along the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    out: F64 = powers / powers.sum(-1, keepdims=True)
    return out


def route(
    logits: F64, top_k: int, routing: Routing, bias: npt.ArrayLike | None = None
) -> tuple[npt.NDArray[np.int64], F64]:
    """Return `(ids, weights)`, both [T, K], of the experts chosen by logits [T, E] and a bias [E]; see `Router`.

    They come in falling order of their scores; of equal ones the lower id is first.
    """
    shares = sigmoid(logits) if routing.scoring is Scoring.SIGMOID else softmax(logits)
    scores: npt.NDArray[np.floating] = logits
    if bias is not None or routing.groups is not None:
        scores = (shares + (0 if bias is None else np.asarray(bias, np.float64))).astype(np.float32)
    if routing.groups is not None:
        scores = _within_the_best(scores, routing.groups)
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(shares, ids, -1)
    if routing.scoring is Scoring.CHOSEN:
        weights = weights / weights.sum(-1, keepdims=True)
    if routing.normalize:
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), LEAST_SUM)
    return ids, weights * routing.scale


def _within_the_best(scores: npt.NDArray[np.floating], groups: Groups) -> npt.NDArray[np.floating]:
    """Return scores [T, E] with minus infinity for the experts of groups that are not used."""
    parts = scores.reshape(len(scores), groups.count, -1)
    of_group = np.sort(parts, axis=-1)[..., -2:].sum(-1)  # of two float32: rounded once
    unused = np.argsort(-of_group, axis=-1, kind="stable")[:, groups.used :]
    out = parts.copy()
    np.put_along_axis(out, unused[..., None], -np.inf, axis=1)
    return out.reshape(scores.shape)
