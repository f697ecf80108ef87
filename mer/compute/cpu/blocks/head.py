"""The output head."""

from __future__ import annotations

from mer.compute.cpu.blocks.workspace import Workspace
from mer.compute.cpu.matrix import Activations, float_stride
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits
from mer.compute.kernels.elementwise import cap_rows
from mer.model.operators import Linear, Norm


class HeadBlock:
    """logits = head(norm(x)) of the rows that the batch asks for.

    Args:
        head: the output head.
        norm: before it.
        softcap: see `ModelSpec`.
        space: memory and weights.
    """

    def __init__(self, head: Linear, norm: Norm, softcap: float | None, space: Workspace) -> None:
        self._head, self._norm, self._softcap, self._space = head, norm, softcap, space

    @staticmethod
    def areas(head: Linear, norm: Norm, softcap: float | None, limits: Limits) -> Areas:
        """Return what it needs of the scratch memory; x and h are everybody's."""
        logits = limits.outputs * float_stride(head.rows)
        constants = (norm.eps,) if softcap is None else (norm.eps, softcap)
        return Areas({"logits": logits}, {"input": (limits.outputs, head.cols)}, constants)

    def add(self, program: Program, n: int) -> None:
        """Add the steps for n rows, whose numbers lie in `outputs`."""
        space, s = self._space, self._space.scratch
        a, head = s.address, space.matrix(self._head)
        h = Activations(n, a["h"], float_stride(head.cols), s.packed["input"])
        space.norm(program, self._norm, a["x"], n, a["h"], index=a["outputs"])
        program.barrier()
        h.pack(program, head.cols, {head.type})
        program.barrier()
        space.multiply(program, self._head, h, a["logits"])  # [N, V]
        program.barrier()
        if self._softcap is not None:
            cap = s.constant(self._softcap)
            program.add(cap_rows.row(x=a["logits"], stride=float_stride(head.rows), n=n, cap=cap))  # [N, V]
            program.barrier()
