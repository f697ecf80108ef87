"""Feed-forward networks of dense weights."""

from __future__ import annotations

import torch

from mer.compute.cuda.activation import activated
from mer.compute.cuda.blocks.tools import Tools
from mer.model.operators import FeedForward, Norm

Tensor = torch.Tensor


class FeedForwardBlock:
    """network(norm(x)), or network(x) without a norm.

    Args:
        record: the network.
        norm: before it, or None.
        tools: weights and products.
    """

    def __init__(self, record: FeedForward, norm: Norm | None, tools: Tools) -> None:
        self._record, self._norm, self._tools = record, norm, tools

    def __call__(self, x: Tensor) -> Tensor:
        """Return y [T, D]."""
        record, tools = self._record, self._tools
        h = x if self._norm is None else tools.norm(self._norm, x)
        inner = activated(record.activation, tools.linear(record.gate, h), tools.linear(record.up, h))
        out = tools.linear(record.down, inner)
        if record.gate_by is None:
            return out
        return out * torch.sigmoid(tools.linear(record.gate_by, h, exact=True))
