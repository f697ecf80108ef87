"""Joining the halves of gated networks, in torch."""

from __future__ import annotations

import torch
from torch.nn import functional

from mer.model.operators import SWIGLU, Activation

Tensor = torch.Tensor


def activated(record: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """Return what `down` reads, of what gate and up give [T, F]."""
    if record == SWIGLU:
        return functional.silu(gate) * up
    gate, up = gate.clamp(max=record.limit), up.clamp(-record.limit, record.limit)
    inner = record.alpha * gate * (1 + record.beta * gate * gate)
    return gate * inner.sigmoid() * (up + record.shift)
