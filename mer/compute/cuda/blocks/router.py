"""The router."""

from __future__ import annotations

import torch

from mer.compute.cuda.blocks.tools import Tools
from mer.model.operators import Experts, Norm

Tensor = torch.Tensor


class RouterBlock:
    """The choice of a layer's experts.

    Args:
        record: the layer's experts.
        norm: before them.
        tools: weights and products.
    """

    def __init__(self, record: Experts, norm: Norm, tools: Tools) -> None:
        self._router, self._norm, self._tools = record.router, norm, tools

    def normalized(self, x: Tensor) -> Tensor:
        """Return what the router and the experts read, [T, D]."""
        return self._tools.norm(self._norm, x)

    def choose(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the choice [T, K], by falling logits and of equal ones the lower number first, and logits [T, E]."""
        logits = self._tools.linear(self._router.linear, h, exact=True)
        return logits.sort(dim=1, descending=True, stable=True).indices[:, : self._router.top_k], logits

    def shares(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return the weights [T, K] of the chosen experts."""
        if self._router.normalize:
            return logits.gather(1, ids).softmax(1)
        return logits.softmax(1).gather(1, ids)
