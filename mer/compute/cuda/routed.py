"""The result of a layer's router."""

from __future__ import annotations

import attrs

from mer.compute.messages import Int32Array


@attrs.frozen(eq=False)
class Routed:
    """What comes back of a layer's router, in one transfer."""

    expert_ids: Int32Array  # [T, K]
    predicted_ids: Int32Array | None  # [T, K] in the next layer
    damaged: Int32Array  # rows whose router logits were not finite so far
