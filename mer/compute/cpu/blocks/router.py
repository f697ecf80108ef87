"""The router: which experts of a layer a token uses, and how much each weighs."""

from __future__ import annotations

from mer.compute.cpu.blocks.workspace import Workspace
from mer.compute.cpu.experts import RoutedExperts
from mer.compute.cpu.matrix import FLOAT_BYTES, Activations, float_stride
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits
from mer.compute.kernels.elementwise import clear_rows
from mer.compute.kernels.router import route, route_by_score
from mer.model.operators import LEAST_SUM, Experts, Norm, Router, Routing, Scoring


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
        scores = 0 if is_plain(record.router) else t * score_stride(record)
        norms = [it for it in (norm, record.router_norm) if it is not None]
        own = {} if record.router_norm is None else {"router_h": t * float_stride(norm.weight.shape[0])}
        return Areas(
            sizes={
                **own,
                "router_scores": scores,
                "next_scores": scores,
                "router": logits,
                "expert_ids": t * FLOAT_BYTES * k,
                "expert_weights": t * FLOAT_BYTES * k,
                "next_h": t * float_stride(norm.weight.shape[0]),  # normalized for the next layer's router
                "next_router": logits,
                "predicted_ids": t * FLOAT_BYTES * k,
                "predicted_weights": t * FLOAT_BYTES * k,
            },
            constants=(*(it.eps for it in norms), record.router.routing.scale, LEAST_SUM),
        )

    def add(self, program: Program, n: int, ahead: RouterBlock | None) -> None:
        """Add the steps, and side by side with them those of another router that is to predict its choice.

        Both read the residual stream as it is. One after the other they would wait at three more barriers.
        """
        space, a = self._space, self._space.scratch.address
        own = self._record.router_norm is not None
        h = a["router_h"] if own else a["h"]
        targets = [(self, h, a["router"], ("expert_ids", "expert_weights", "router_scores"), a["damaged"])]
        if ahead is not None:
            results = "predicted_ids", "predicted_weights", "next_scores"
            targets.append((ahead, a["next_h"], a["next_router"], results, 0))
        if own:
            space.norm(program, self._norm, a["x"], n, a["h"])
        for it, h, logits, _, _ in targets:
            space.norm(program, it._record.router_norm or it._norm, a["x"], n, h)
            if it._record.router.linear is None:
                # One expert, which any logit chooses: the steps below are for a few threads' time, not a kind of layer.
                program.add(clear_rows.row(x=logits, stride=float_stride(it._record.n), n=n))  # [T, 1]
            else:
                space.seed(program, it._record.router.linear, n, logits)
        program.barrier()
        for it, h, logits, _, _ in targets:
            linear = it._record.router.linear
            if linear is not None:
                x = Activations(n, h, float_stride(linear.cols), {})
                space.multiply(program, linear, x, logits, seeded=True)  # [T, E]
        self._experts.prepare_token(program, self._number)
        program.barrier()
        for it, _, logits, results, damaged in targets:
            ids, weights, scores = (a[name] for name in results)
            it._choose(program, n, logits, ids, weights, scores, damaged)
        program.barrier()

    def _choose(self, program: Program, n: int, logits: int, ids: int, weights: int, scores: int, damaged: int) -> None:
        """Add the step that chooses experts by logits [T, E]: ids and weights [T, K], damaged [T] or 0."""
        record, space = self._record, self._space
        e, k, router = record.n, record.top_k, record.router
        routing, groups, bias = router.routing, router.routing.groups, router.selection_bias
        factor = router.expert_scale
        words = {
            "logits": logits,
            "stride": float_stride(e),
            "n": n,
            "n_experts": e,
            "k": k,
            "ids": ids,
            "weights": weights,
            "damaged": damaged,
        }
        if is_plain(router):
            program.add(route.row(**words, over_all=int(routing.scoring is Scoring.SOFTMAX)))
            return
        program.add(
            route_by_score.row(
                **words,
                scores=scores,
                scores_stride=score_stride(record),
                bias=0 if bias is None else space.weights.vector(bias.name),  # [E]
                sigmoid=int(routing.scoring is Scoring.SIGMOID),
                groups=0 if groups is None else groups.count << 32 | groups.used,
                least=space.scratch.constant(LEAST_SUM) if routing.normalize else 0,
                scale=space.scratch.constant(routing.scale),
                expert_scale=0 if factor is None else space.weights.vector(factor.name),  # [E]
            )
        )


def is_plain(router: Router) -> bool:
    """Return whether `route` does all that a router needs: a softmax, by which the experts are chosen too."""
    routing, softmax = router.routing, router.routing.scoring is not Scoring.SIGMOID
    own = router.selection_bias is None and router.expert_scale is None
    return softmax and own and routing == Routing(scoring=routing.scoring)


def score_stride(record: Experts) -> int:
    """Return the bytes from one row of scores to the next, those of groups included."""
    groups = record.router.routing.groups
    return float_stride(record.n) + (0 if groups is None else float_stride(groups.count))
