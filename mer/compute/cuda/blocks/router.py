"""The router."""

from __future__ import annotations

import torch

from mer.compute.cuda.blocks.tools import Tools
from mer.model.operators import LEAST_SUM, Experts, Norm, Scoring

Tensor = torch.Tensor


class RouterBlock:
    """The choice of a layer's experts.

    Args:
        record: the layer's experts.
        norm: before them.
        tools: weights and products.
    """

    def __init__(self, record: Experts, norm: Norm, tools: Tools) -> None:
        self._router, self._norm, self._own_norm, self._tools = record.router, norm, record.router_norm, tools

    def normalized(self, x: Tensor) -> Tensor:
        """Return what the experts read, and the router unless it has a norm of its own, [T, D]."""
        return self._tools.norm(self._norm, x)

    def choose(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the choice [T, K] for a stream x with h = normalized(x), and logits [T, E].

        The choice falls by scores; of equal ones the lower number is first.
        """
        h = h if self._own_norm is None else self._tools.norm(self._own_norm, x)
        if self._router.linear is None:
            logits = h.new_zeros(len(h), 1)
        else:
            logits = self._tools.linear(self._router.linear, h, exact=True)
        scores = self._scores(logits)
        return scores.sort(dim=1, descending=True, stable=True).indices[:, : self._router.top_k], logits

    def weights(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return the weights [T, K] of the chosen experts."""
        routing = self._router.routing
        if routing.scoring is Scoring.CHOSEN:
            weights = logits.gather(1, ids).softmax(1)
        else:
            weights = self._shares(logits).gather(1, ids)
        if routing.normalize:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=LEAST_SUM)
        if routing.scale != 1:
            weights = weights * routing.scale
        scale = self._router.expert_scale
        return weights if scale is None else weights * self._tools.weights.vector(scale.name)[ids]

    def damaged(self, logits: Tensor) -> Tensor:
        """Return for which rows a logit [T, E], or what is added to it for the choice, is not finite: [T]."""
        damaged = ~logits.isfinite().all(1)
        if self._router.selection_bias is None:
            return damaged
        return damaged | ~self._tools.weights.vector(self._router.selection_bias.name).isfinite().all()

    def _shares(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self._router.routing.scoring is Scoring.SIGMOID else logits.softmax(1)

    def _scores(self, logits: Tensor) -> Tensor:
        """Return by what experts are chosen, [T, E]."""
        router = self._router
        bias, groups = router.selection_bias, router.routing.groups
        if bias is None and groups is None:
            return logits
        scores = self._shares(logits.double())  # rounded once, with the bias: all forms choose alike
        if bias is not None:
            scores = scores + self._tools.weights.vector(bias.name)
        scores = scores.float()
        if groups is None:
            return scores
        parts = scores.view(len(scores), groups.count, -1)
        of_group = parts.topk(2, dim=2).values.sum(2)
        order = of_group.sort(dim=1, descending=True, stable=True).indices
        unused = torch.ones_like(of_group, dtype=torch.bool).scatter(1, order[:, : groups.used], False)
        return parts.masked_fill(unused[:, :, None], -torch.inf).flatten(1)
