"""The sum of a layer's routed experts and of the network that they share, and its addition to the residual stream."""

from __future__ import annotations

from mer.compute.cpu.blocks.feed_forward import FeedForwardBlock
from mer.compute.cpu.blocks.workspace import NO_EPS, Workspace, addition_areas
from mer.compute.cpu.matrix import FLOAT_BYTES, float_stride
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits
from mer.compute.kernels.elementwise import clear_rows, combine
from mer.model.operators import PLAIN, Addition, Experts


class TotalBlock:
    """x plus the shared network's output and the weighted outputs of the experts, which lie in `y`.

    Where nothing is done to their sum, each is added to x: that takes one barrier. Else they are summed apart.

    Args:
        record: the layer's experts.
        addition: how the sum is added to x.
        space: memory and weights.
    """

    def __init__(self, record: Experts, addition: Addition, space: Workspace) -> None:
        self._record, self._addition, self._space = record, addition, space
        self._adds = record.adds_to_x(addition)
        self._shared: FeedForwardBlock | None = None
        if record.shared is not None:
            own = PLAIN if self._adds else None
            self._shared = FeedForwardBlock(record.shared, record.shared_norm, own, space)

    @staticmethod
    def areas(record: Experts, addition: Addition, limits: Limits) -> Areas:
        """Return what it needs of the scratch memory beyond what the experts do."""
        adds, d_model = record.adds_to_x(addition), record.weights.matrices[-1].rows
        parts = []
        if record.shared is not None:
            own = PLAIN if adds else None
            parts.append(FeedForwardBlock.areas(record.shared, record.shared_norm, own, limits))
        if not adds:
            eps = tuple(norm.eps for norm in (record.routed_post, record.shared_post) if norm is not None)
            half = {"half": limits.batch_tokens * float_stride(d_model)}
            parts += [addition_areas(addition, d_model, limits), Areas(half, constants=(NO_EPS, *eps))]
        return Areas.union(parts)

    def add_shared(self, program: Program, n: int) -> None:
        """Add the shared network's steps for n tokens, if there is one."""
        if self._shared is None:
            return
        if not self._adds:
            self._clear(program, n)
        self._shared.add(program, n, 0)

    def add(self, program: Program, n: int) -> None:
        """Add the steps of the sum for n tokens, after those of the experts and of the shared network."""
        space, record, a = self._space, self._record, self._space.scratch.address
        if self._adds:
            self._combine(program, n, a["x"])
            program.barrier()
            return
        half, shared = a["half"], a.get(FeedForwardBlock.apart, 0)
        if self._shared is None:
            self._clear(program, n)
            program.barrier()
        self._combine(program, n, half)
        if self._shared is not None and record.shared_post is not None:
            space.norm(program, record.shared_post, shared, n, shared)
        program.barrier()
        if self._shared is not None:
            space.add(program, Addition(record.routed_post), shared, n, half)
            program.barrier()
        elif record.routed_post is not None:
            space.norm(program, record.routed_post, half, n, half)
            program.barrier()
        space.add(program, self._addition, a["x"], n, half if self._shared is None else shared)
        program.barrier()

    def _clear(self, program: Program, n: int) -> None:
        out = self._space.scratch.address["half"]
        program.add(clear_rows.row(x=out, stride=float_stride(self._space.d_model), n=n))  # [T, D]

    def _combine(self, program: Program, n: int, out: int) -> None:
        """Add the step that adds the experts' weighted outputs to rows of D."""
        a, d = self._space.scratch.address, float_stride(self._space.d_model)
        program.add(
            combine.row(
                x=out,  # [T, D]
                stride=d,
                n=n,
                padded_d=d // FLOAT_BYTES,
                y=a["y"],  # [T * K, D]
                weights=a["expert_weights"],  # [T, K]
                places=a["places"],  # [T, K]
                k=self._record.top_k,
            )
        )
