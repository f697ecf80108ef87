"""Reads within a simulated job: the twin of the compiled code, in Python and on trio's clock."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from math import inf

import trio

from mer.compute.messages import LoadedExpert
from mer.io.arena import Arena
from mer.io.loan.loan import Loan
from mer.io.loan.words import (
    ARRANGED,
    BASE,
    BEGIN,
    BEGUN_NS,
    ENDED_NS,
    EXPERT,
    GIVE_UP_NS,
    IN_FLIGHT,
    KIND,
    LAYER,
    LEAD,
    LENGTH,
    MAX_LOGGED,
    N_LOGGED,
    N_PARTS,
    NEEDED,
    NEXT,
    PART,
    PART_WORDS,
    PENDING,
    RESULT,
    SERIAL,
    START,
    STOP,
    TOKEN_BIT,
    WAITED_NS,
)
from mer.io.reader import ReadOperation
from mer.limits import MAX_MATRICES
from mer.testing.simdisk import SimDisk


class SimReads:
    """Makes the reads of one job.

    Args:
        reads: what the job was lent.
        disk: what it reads from.
        arena: what it reads into.
    """

    def __init__(self, reads: Loan, disk: SimDisk, arena: Arena) -> None:
        self._reads, self._control, self._disk, self._arena = reads, reads.control, disk, arena
        self._n_parts = int(self._control[N_PARTS])
        self._changed = trio.Event()
        self._failed = False

    def keep(self, layer: int, experts: Sequence[int]) -> None:
        """Let experts stay for as long as the job runs."""
        self._reads.used[layer, list(experts)] = self._control[SERIAL]

    def begin(self, layer: int, missing: Sequence[int]) -> list[LoadedExpert] | None:
        """Begin to read a layer's missing experts; return where they will be, or None if the job is to end here."""
        if self._control[STOP]:
            return None
        begun_ns = round(trio.current_time() * 1e9)
        found = []
        for expert in missing:
            base = self._log(layer, expert, begun_ns)
            if base is None:
                return None
            addresses = tuple(base + begin + lead for _, _, _, _, begin, lead in self._parts(layer, expert))
            found.append(LoadedExpert(expert, addresses, (True, True)))
        self._submit()
        return found

    async def wait(self, n_waiting: int) -> int:
        """Wait for the first of so many experts that were begun last.

        Returns:
            How many of them have landed, in their order; 0 if a read has failed or takes too long. They count as
            arranged from here on.
        """
        first, began_s = int(self._control[N_LOGGED]) - n_waiting, trio.current_time()
        with trio.move_on_at((int(self._reads.log[first, BEGUN_NS]) + int(self._control[GIVE_UP_NS])) / 1e9):
            await self._landed_or_failed(first)
        self._control[WAITED_NS] += round((trio.current_time() - began_s) * 1e9)
        n = 0
        while not self._failed and n < n_waiting and self._reads.log[first + n, ENDED_NS]:
            self._reads.log[first + n, ARRANGED] = 1
            n += 1
        return n

    async def _landed_or_failed(self, number: int) -> None:
        """Wait until an expert of the log has landed or any read has failed."""
        while not self._failed and not self._reads.log[number, ENDED_NS]:
            await self._changed.wait()

    def _parts(self, layer: int, expert: int) -> list[list[int]]:
        """Return the words of an expert's matrices, [matrices][PART_WORDS]."""
        words: list[list[int]] = self._reads.experts[layer, expert, PART:].reshape(-1, PART_WORDS).tolist()
        return words[: self._n_parts]

    def _log(self, layer: int, expert: int, begun_ns: int) -> int | None:
        """Find a slot for an expert and note that it is to be read there; return where it begins."""
        reads, control = self._reads, self._control
        number, kind = int(control[N_LOGGED]), int(reads.experts[layer, expert, KIND])
        if number == MAX_LOGGED:
            return None
        if reads.free[kind]:
            return None
        found = self._victim(layer, kind)
        if found is None:
            return None
        base = int(reads.addresses[(*found, 0)]) - int(reads.experts[(*found, PART + LEAD)])
        reads.addresses[found] = 0
        victim = found[0] * len(reads.used[0]) + found[1]
        reads.log[number] = layer, expert, base, victim, 0, begun_ns, 0, *[PENDING] * MAX_MATRICES
        control[N_LOGGED] = number + 1
        return base

    def _victim(self, layer: int, kind: int) -> tuple[int, int] | None:
        """Return the resident that is worth least, for one of a layer; None if none may leave."""
        reads, least = self._reads, inf
        victim: tuple[int, int] | None = None
        n_layers, n_experts = len(reads.used), len(reads.used[0])
        for place in range(n_layers):
            at = (layer - place) % n_layers
            for expert in range(n_experts):
                key = at, expert
                if reads.addresses[at, expert, 0] <= 0 or reads.used[key] == self._control[SERIAL]:
                    continue
                worth = reads.ranks.values[key] * reads.ranks.weights[at] * reads.ranks.patience[place]
                if worth < least and reads.experts[at, expert, KIND] == kind:
                    least, victim = worth, key
        return victim

    def _submit(self) -> None:
        """Hand reads to the disk until as many are in flight as it may have."""
        control = self._control
        while control[NEXT] < self._n_parts * control[N_LOGGED] and control[IN_FLIGHT] < self._disk.depth:
            number, part = divmod(int(control[NEXT]), self._n_parts)
            layer, expert, base = self._reads.log[number, [LAYER, EXPERT, BASE]].tolist()
            words = self._parts(layer, expert)[part]
            begin = words[BEGIN]
            operation = ReadOperation(
                file=words[0],
                start=words[START],
                length=words[LENGTH],
                needed=words[NEEDED],
                buffer=self._arena.view(self._arena.slot_at(base))[begin : begin + words[LENGTH]],
                on_landed=partial(self._landed, number, part),
            )
            control[[NEXT, IN_FLIGHT]] += 1
            self._disk.start_for_job(operation, TOKEN_BIT + 4 * (int(control[SERIAL]) + number) + part)

    def _landed(self, number: int, part: int, operation: ReadOperation) -> None:
        entry = self._reads.log[number]
        self._control[IN_FLIGHT] -= 1
        entry[RESULT + part] = operation.needed if operation.error is None else -errno.EIO
        if PENDING not in entry[RESULT : RESULT + self._n_parts]:
            entry[ENDED_NS] = round(trio.current_time() * 1e9)
        self._failed |= operation.error is not None
        self._submit()
        self._changed.set()
        self._changed = trio.Event()
