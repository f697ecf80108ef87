"""Feed-forward networks of dense weights: a layer's own, or the one that a layer's routed experts share."""

from __future__ import annotations

from mer.compute.cpu.blocks.workspace import Workspace, addition_areas
from mer.compute.cpu.matrix import Activations, block_sizes, float_stride, rows_entry
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits, activation_constants
from mer.compute.kernels.elementwise import activate, add_gated
from mer.model.operators import Addition, FeedForward, Norm


class FeedForwardBlock:
    """x plus network(h), with h = norm(x) unless there is no norm: then h is what the router has left there.

    Args:
        record: the network.
        norm: before it, or None.
        addition: how its result is added to x; None if that is left to others, who find it in `apart`.
        space: memory and weights.
    """

    apart = "shared_out"
    """The area of a result that is not added to x, [T, D]."""

    def __init__(self, record: FeedForward, norm: Norm | None, addition: Addition | None, space: Workspace) -> None:
        if record.gate_by is not None and (addition is None or not addition.plain):
            raise ValueError("a gated network is added to x as it is")
        self._record, self._norm, self._addition, self._space = record, norm, addition, space

    @staticmethod
    def areas(record: FeedForward, norm: Norm | None, addition: Addition | None, limits: Limits) -> Areas:
        """Return what it needs of the scratch memory; x and h are everybody's.

        Its inner activations do not share those of the routed experts: these may lie there, half computed, when it
        runs.
        """
        t, d_model, d_ff = limits.batch_tokens, record.down.rows, record.down.cols
        sizes = {"dense_gate": t * float_stride(d_ff), "dense_up": t * float_stride(d_ff)}
        h, packed_h = _h_areas(addition)
        packed = {packed_h: (t, d_model), "dense_inner": (t, d_ff)}
        if record.gate_by is not None:
            sizes |= {"gated": t * float_stride(d_model), "gate_logit": t * float_stride(1)}
        if addition is None:
            sizes |= {h: t * float_stride(d_model), FeedForwardBlock.apart: t * float_stride(d_model)}
        eps = () if norm is None else (norm.eps,)
        own = Areas(sizes, packed, (*eps, *activation_constants(record.activation)))
        return own if addition is None else Areas.union([own, addition_areas(addition, d_model, limits)])

    def add(self, program: Program, n: int, n_blocks: int) -> None:
        """Add the steps; see `Block`.

        The network's result is added to x by its last product. Only where a logit gates it does it get an area of its
        own first: for all of them that would be one more pass over the batch.
        """
        record, space, s = self._record, self._space, self._space.scratch
        a = s.address
        gate, up, down = map(space.matrix, (record.gate, record.up, record.down))
        d, f = float_stride(down.rows), float_stride(down.cols)
        h_area, packed_h = _h_areas(self._addition)
        h = Activations(n, a[h_area], d, s.packed[packed_h])  # [T, D]
        if self._norm is not None:
            space.norm(program, self._norm, a["x"], n, h.address)
            program.barrier()
        h.pack(program, gate.cols, {gate.type, up.type})
        space.seed(program, record.gate, n, a["dense_gate"])
        space.seed(program, record.up, n, a["dense_up"])
        program.barrier()
        space.multiply(program, record.gate, h, a["dense_gate"], seeded=True)  # [T, F]
        space.multiply(program, record.up, h, a["dense_up"], seeded=True)  # [T, F]
        if record.gate_by is not None:
            space.multiply(program, record.gate_by, h, a["gate_logit"])  # [T, 1]
        program.barrier()
        inner = Activations(n, a["dense_gate"], f, s.packed["dense_inner"])  # [T, F]
        sizes, numbers = block_sizes([down.type]), s.activation(record.activation)
        if sizes:
            area, between = s.packed["dense_inner"][sizes[0]], a["dense_up"] - a["dense_gate"]
            joined = area.pack(down.cols, a["dense_gate"], f, up=between, activation=numbers)
        else:
            joined = activate.row(gate=a["dense_gate"], up=a["dense_up"], stride=f, activation=numbers)
        program.add_alone(joined, rows_entry(n))  # [T, F]
        # Nothing is to be done to the result before it is added to x: the product does that itself.
        plain = self._addition is not None and self._addition.plain and record.gate_by is None
        if self._addition is None:
            out = a[self.apart]
        else:
            out = a["x"] if plain else a["gated"] if record.gate_by is not None else a["half"]
        space.seed(program, record.down, n, out, add=plain)
        program.barrier()
        space.multiply(program, record.down, inner, out, add=plain, seeded=True)  # [T, D]
        program.barrier()
        if plain or self._addition is None:
            return
        if record.gate_by is None:
            space.add(program, self._addition, a["x"], n, out)
        else:
            program.add(
                add_gated.row(
                    x=a["x"],  # [T, D]
                    stride=d,
                    n=n,
                    y=out,  # [T, D]
                    logits=a["gate_logit"],  # [T, 1]
                    logit_stride=float_stride(1),
                )
            )
        program.barrier()


def _h_areas(addition: Addition | None) -> tuple[str, str]:
    """Return the names of the areas of h, as float32 and packed: the experts' or, for a result apart, its own.

    Experts may be about to read theirs when a network runs whose result is not added to x.
    """
    return ("h", "input") if addition is not None else ("shared_h", "shared_input")
