"""The feed-forward networks of routed experts as programs of kernel steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import numpy as np

from mer.compute.cpu.matrix import (
    FLOAT_BYTES,
    Activations,
    Matrix,
    RawRoom,
    block_sizes,
    float_stride,
    is_tiled,
    product,
    raw_bytes,
    rows_entry,
)
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits, Scratch, activation_constants
from mer.compute.kernels.elementwise import activate, fill_entries, gather
from mer.compute.kernels.entry import ENTRY_WORDS, EXPERT_BIT, PAIR, RAW_INNER, RAW_OUTER, ROW, ZERO, flags
from mer.compute.kernels.step import Row
from mer.compute.messages import Int32Array, LoadedExpert, Stage
from mer.errors import ComputeError
from mer.io.extents import ExpertMap, ExpertPart
from mer.model.operators import ExpertWeights

_STAGES = {Stage.OUTER: 0, Stage.WHOLE: 1, Stage.INNER: 2}  # the order of a table's entries
_RAW = {Stage.OUTER: RAW_OUTER, Stage.WHOLE: RAW_INNER | RAW_OUTER, Stage.INNER: RAW_INNER}
_FEW = 64  # (token, choice) pairs up to which Python sorts faster than NumPy
_ENTRY_BYTES = 8 * ENTRY_WORDS


@attrs.frozen(eq=False)
class _Steps:
    """The steps of experts whose matrices have the same types and shapes."""

    prepare: tuple[Row, ...]  # bring the tokens' activations into the form that gate and up read; their biases
    inner: tuple[Row, ...]  # gate and up
    activate: Row  # gate and up joined, and the packing for down
    seed: tuple[Row, ...]  # the bias of down
    outer: Row  # down


class RoutedExperts:
    """Adds the steps of experts to programs; keeps which tokens were routed to which expert.

    Of a batch of at most `staged_pairs` (token, choice) pairs every pair has a row of its own among the inner
    activations, so that stages may be in different jobs. Larger batches go through these rows group by group.

    Args:
        experts: types and shapes of the routed experts, at least one.
        weights: of each layer's, how they are computed.
        biases: returns where the biases of that name lie in memory, float32 [E, n].
        top_k: experts that a token uses.
        limits: the largest batch.
        scratch: its memory.
    """

    def __init__(
        self,
        experts: ExpertMap,
        weights: Sequence[ExpertWeights],
        biases: Callable[[str], int],
        top_k: int,
        limits: Limits,
        scratch: Scratch,
    ) -> None:
        self._top_k, self._limits, self._scratch = top_k, limits, scratch
        self._d_model, self._d_ff = widths(experts)
        self._biases = biases
        self._raw = RawRoom(scratch.address["raw"], _raw_bytes(experts))
        self.staged_pairs = limits.ffn_rows(top_k)
        made: dict[tuple[object, ...], tuple[_Steps, _Steps]] = {}
        self._steps: list[list[tuple[_Steps, _Steps]]] = []  # of each expert: for one token, for more
        self._sizes: list[list[int]] = []  # of each layer: blocks in which gate and up take activations
        for layer, record in zip(experts.experts, weights, strict=True):
            self._sizes.append(block_sizes(p.type for e in layer for p in e.parts[:2]))
            self._steps.append([])
            for expert in layer:
                key = record.activation, record.biases, *((p.type, p.rows, p.cols) for p in expert.parts)
                if key not in made:
                    one, more = (self._make(expert.parts, record, one=it) for it in (True, False))
                    made[key] = one, more
                self._steps[-1].append(made[key])
        # whether all experts of a layer have matrices of the same types and shapes
        self.alike = all(steps == layer[0] for layer in self._steps for steps in layer)
        self._n_tokens = 0
        self._spans: dict[int, tuple[int, int]] = {}  # {expert: (first of its pairs in `order`, number of them)}
        self._inner: set[int] = set()  # experts whose INNER has run, and not their OUTER
        self._places, self._order = scratch.ints("places"), scratch.ints("order")

    @staticmethod
    def areas(experts: ExpertMap, weights: Sequence[ExpertWeights], top_k: int, limits: Limits) -> Areas:
        """Return what the experts need of the scratch memory; h and the router's results are the router's."""
        d_model, d_ff = widths(experts)
        t, r, d, f = limits.batch_tokens, limits.ffn_rows(top_k), float_stride(d_model), float_stride(d_ff)
        n_layers, n_experts, rows = len(experts.experts), len(experts.experts[0]), limits.resident_rows(top_k)
        table = 8 * ENTRY_WORDS * min(n_experts, rows * top_k)
        return Areas(
            sizes={
                "places": t * FLOAT_BYTES * top_k,
                "order": t * FLOAT_BYTES * top_k,
                "expert_ends": FLOAT_BYTES * n_experts,
                "table_entries": table,
                "table_missing": table,
                "stop": 4 * 8,
                "routes": FLOAT_BYTES * n_layers * rows * top_k,
                "gathered": r * d,  # the rows of one group, for float weights
                "gate": r * f,
                "up": r * f,
                "y": t * top_k * d,  # expert outputs, one row per (token, choice)
                "raw": limits.threads * _raw_bytes(experts),  # an expert's rows as they are in the file
            },
            packed={"input": (r, d_model), "inner": (r, d_ff)},
            constants=tuple(it for record in weights for it in activation_constants(record.activation)),
        )

    def _make(self, parts: Sequence[ExpertPart], record: ExpertWeights, *, one: bool) -> _Steps:
        """Return the steps for batches of one token, whose activations `prepare_token` has prepared, or of more.

        They are made once for each shape, and told their table when they are added. Made again for each job they would
        be Python's work between two layers of every token.
        """
        s, a, threads, raw = self._scratch, self._scratch.address, self._limits.threads, self._raw
        d, f = float_stride(self._d_model), float_stride(self._d_ff)
        gate, up, down = (Matrix(p.type, p.rows, p.cols, 0) for p in parts)
        kinds = {gate.type, up.type}
        x = Activations(1, a["h"] if one else a["gathered"], d, s.packed["input"])  # [1, D] or [R, D]
        z = Activations(1, a["gate"], f, s.packed["inner"])  # [R, F]
        prepare: list[Row] = []
        if not one:
            if any(not is_tiled(kind) for kind in kinds):
                prepare.append(gather.row(x=a["h"], stride=d, index=a["order"], out=a["gathered"]))  # [R, D]
            for size in block_sizes(kinds):
                prepare.append(s.packed["input"][size].pack(self._d_model, a["h"], d, index=a["order"]))
        seed: list[Row] = []
        if record.biases:
            gates, ups, downs = (self._biases(tensor.name) for tensor in record.biases)
            for out, biases in ((a["gate"], gates), (a["up"], ups)):
                n_bytes = FLOAT_BYTES * self._d_ff
                prepare.append(fill_entries.row(out=out, stride=f, first=ROW, biases=biases, n_bytes=n_bytes))
            n_bytes = FLOAT_BYTES * self._d_model
            seed.append(fill_entries.row(out=a["y"], stride=d, first=PAIR, biases=downs, n_bytes=n_bytes))
        source, add = ZERO if one else ROW, bool(record.biases)
        between = a["up"] - a["gate"]
        if gate.type == up.type:
            settings = flags(0, 2, x=source, add=add)
            inner = [product(gate, x, a["gate"], f, threads, settings, out_step=between, raw=raw)]  # [2, R, F]
        else:
            inner = [
                product(matrix, x, a["gate"] + number * between, f, threads, flags(number, x=source, add=add), raw=raw)
                for number, matrix in enumerate((gate, up))
            ]
        sizes, numbers = block_sizes([down.type]), s.activation(record.activation)
        if sizes:
            area = s.packed["inner"][sizes[0]]
            joined = area.pack(self._d_ff, a["gate"], f, up=between, activation=numbers)
        else:
            joined = activate.row(gate=a["gate"], up=a["up"], stride=f, activation=numbers)
        outer = product(down, z, a["y"], d, threads, flags(2, out=PAIR, add=add), raw=raw)  # [T * K, D]
        return _Steps(tuple(prepare), tuple(inner), joined, tuple(seed), outer)

    def prepare_token(self, program: Program, layer: int) -> None:
        """Add the packing of `h` for the layer's experts, if the batch is one token; experts may follow a barrier."""
        if self._n_tokens == 1:
            h, d = self._scratch.address["h"], float_stride(self._d_model)
            for size in self._sizes[layer]:
                program.add_alone(self._scratch.packed["input"][size].pack(self._d_model, h, d), rows_entry(1))

    def begin(self, n_tokens: int) -> None:
        """Take over a batch of so many tokens."""
        self._n_tokens = n_tokens

    def begin_layer(self) -> None:
        """Forget the stages that have run."""
        self._inner.clear()

    def assign(self, ids: Int32Array) -> None:
        """Sort the (token, choice) pairs by expert, from the router's choice [T * K]."""
        k = len(ids) // self._n_tokens
        spans = self._spans = {}
        if len(ids) > _FEW:
            order = np.argsort(ids, kind="stable")
            self._places[order] = np.arange(len(ids), dtype=np.int32)
            self._order[: len(ids)] = order // k
            experts, firsts, counts = np.unique(ids[order], return_index=True, return_counts=True)
            spans.update(zip(experts.tolist(), zip(firsts.tolist(), counts.tolist(), strict=True), strict=True))
            return
        places, tokens, numbers = self._places.data, self._order.data, ids.tolist()
        for place, pair in enumerate(sorted(range(len(numbers)), key=numbers.__getitem__)):
            places[pair], tokens[place] = place, pair // k
            first, count = spans.get(numbers[pair], (place, 0))
            spans[numbers[pair]] = first, count + 1

    def run(self, program: Program, layer: int, experts: Sequence[LoadedExpert]) -> None:
        """Add the feed-forward networks of loaded experts, or stages of them.

        Raises:
            ComputeError: a stage that the batch is too large for, or that comes out of turn.
        """
        pairs = self._n_tokens * self._top_k
        staged = pairs <= self.staged_pairs
        steps, which = self._steps[layer], self._n_tokens > 1
        filled = 0
        group: dict[_Steps, tuple[list[int], list[int], list[int]]] = {}  # entries of OUTER, WHOLE, INNER
        for loaded in experts:
            number, stage = loaded.expert, loaded.stage
            if stage is not Stage.WHOLE:
                self._check(loaded, layer, staged, pairs)
            pair, count = self._spans.get(number, (0, 0))
            if not staged and filled + count > self.staged_pairs:
                self._add(program, group)
                group, filled = {}, 0
            raw = (loaded.raw[0] | loaded.raw[1] << 1) & _RAW[stage]
            entries = group.setdefault(steps[number][which], ([], [], []))[_STAGES[stage]]
            entries += (*loaded.addresses, count, pair if staged else filled, pair, raw | number << EXPERT_BIT, 0)
            filled += count
        self._add(program, group)

    def run_table(self, program: Program, layer: int) -> None:
        """Add the feed-forward networks of the experts in a table, for a layer whose experts are alike.

        That is `table_steps` steps; steps before them tell them their table and how many entries it has.
        """
        for stage in self._stages(layer):
            for made in stage:
                program.add_on(made, 0, 0)
            program.barrier()

    def table_steps(self, layer: int) -> int:
        """Return how many steps `run_table` adds."""
        return sum(map(len, self._stages(layer)))

    def _stages(self, layer: int) -> tuple[tuple[Row, ...], ...]:
        steps = self._steps[layer][0][self._n_tokens > 1]
        return steps.prepare, steps.inner, (steps.activate, *steps.seed), (steps.outer,)

    def _check(self, loaded: LoadedExpert, layer: int, staged: bool, pairs: int) -> None:
        """Refuse a stage that cannot be computed, and keep account of those that can."""
        number, stage = loaded.expert, loaded.stage
        if not staged:
            raise ComputeError(
                f"a batch of {pairs} (token, choice) pairs cannot run stages of experts, only one of at most "
                f"{self.staged_pairs}; run expert {number} of layer {layer} whole"
            )
        if (stage is Stage.INNER) == (number in self._inner):
            turn = "comes twice" if stage is Stage.INNER else "comes before its inner stage"
            raise ComputeError(f"the {stage.value} stage of expert {number} of layer {layer} {turn}")
        self._inner ^= {number}

    def _add(self, program: Program, group: dict[_Steps, tuple[list[int], list[int], list[int]]]) -> None:
        """Add the steps of experts whose rows together fit the scratch rows."""
        inner: list[tuple[_Steps, int, int]] = []
        outer: list[tuple[_Steps, int, int]] = []
        for steps, stages in group.items():
            n_outer, n_whole, n_inner = (len(words) // ENTRY_WORDS for words in stages)
            table = program.table([*stages[0], *stages[1], *stages[2]])
            if n_whole + n_inner:
                inner.append((steps, table + n_outer * _ENTRY_BYTES, n_whole + n_inner))
            if n_outer + n_whole:
                outer.append((steps, table, n_outer + n_whole))
        for steps, table, n in inner:
            for made in steps.prepare:
                program.add_on(made, table, n)
        program.barrier()
        for steps, table, n in inner:
            for made in steps.inner:
                program.add_on(made, table, n)
        program.barrier()
        for steps, table, n in inner:
            program.add_on(steps.activate, table, n)
        for steps, table, n in outer:
            for made in steps.seed:
                program.add_on(made, table, n)
        program.barrier()
        for steps, table, n in outer:
            program.add_on(steps.outer, table, n)
        program.barrier()


def expert_areas(experts: ExpertMap, weights: Sequence[ExpertWeights], top_k: int, limits: Limits) -> Areas:
    """Return the scratch memory of routed experts that run without the dense part of their model."""
    rows = {"h": limits.batch_tokens * float_stride(widths(experts)[0])}
    return Areas.union([Areas(rows), RoutedExperts.areas(experts, weights, top_k, limits)])


def widths(experts: ExpertMap) -> tuple[int, int]:
    """Return D and F of routed experts."""
    down = experts.experts[0][0].parts[-1]
    return down.rows, down.cols


def _raw_bytes(experts: ExpertMap) -> int:
    """Return the room that a thread needs to arrange any expert's matrix."""
    return max(raw_bytes(*shape) for shape in experts.formats)
