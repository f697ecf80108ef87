"""The router: which experts of a layer a token uses, and how much each weighs."""

from __future__ import annotations

from mer.compute.cpu.blocks.workspace import Workspace
from mer.compute.cpu.experts import RoutedExperts
from mer.compute.cpu.matrix import FLOAT_BYTES, Activations, float_stride
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits
from mer.compute.kernels.router import route
from mer.model.operators import Experts, Norm


class RouterBlock:
    """ids, weights = router(h) with h = norm(x), which the experts read too.

    Args:
        record: the layer's experts.
        norm: before them.
        space: memory and weights.
        experts: prepare what they read while the router computes.
        number: of the routed layer.
    """

    def __init__(self, record: Experts, norm: Norm, space: Workspace, experts: RoutedExperts, number: int) -> None:
        self._record, self._norm, self._space, self._experts, self._number = record, norm, space, experts, number

    @staticmethod
    def areas(record: Experts, norm: Norm, limits: Limits) -> Areas:
        """Return what it needs of the scratch memory; x and h are everybody's."""
        t, k = limits.batch_tokens, record.top_k
        logits = t * float_stride(record.n)
        return Areas(
            sizes={
                "router": logits,
                "expert_ids": t * FLOAT_BYTES * k,
                "expert_weights": t * FLOAT_BYTES * k,
                "next_h": t * float_stride(norm.weight.shape[0]),  # normalized for the next layer's router
                "next_router": logits,
                "predicted_ids": t * FLOAT_BYTES * k,
                "predicted_weights": t * FLOAT_BYTES * k,
            },
            constants=(norm.eps,),
        )

    def add(self, program: Program, n: int, ahead: RouterBlock | None) -> None:
        """Add the steps, and side by side with them those of another router that is to predict its choice.

        Both read the residual stream as it is. One after the other they would wait at three more barriers.
        """
        space, a = self._space, self._space.scratch.address
        targets = [(self, a["h"], a["router"], (a["expert_ids"], a["expert_weights"], a["damaged"]))]
        if ahead is not None:
            results = a["predicted_ids"], a["predicted_weights"], 0
            targets.append((ahead, a["next_h"], a["next_router"], results))
        for it, h, _, _ in targets:
            space.norm(program, it._norm, a["x"], n, h)
        program.barrier()
        for it, h, logits, _ in targets:
            gate = space.matrix(it._record.router.linear)
            x = Activations(n, h, float_stride(gate.cols), {})
            space.multiply(program, it._record.router.linear, x, logits)  # [T, E]
        self._experts.prepare_token(program, self._number)
        program.barrier()
        for it, _, logits, results in targets:
            e, k = it._record.n, it._record.top_k
            ids, weights, damaged = results
            program.add(
                route.row(
                    logits=logits,  # [T, E]
                    stride=float_stride(e),
                    n=n,
                    n_experts=e,
                    k=k,
                    ids=ids,  # [T, K]
                    weights=weights,  # [T, K]
                    damaged=damaged,  # [T]
                    over_all=int(not it._record.router.normalize),
                )
            )
        program.barrier()
