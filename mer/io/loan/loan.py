"""The loan: memory that compiled code works on, in the int64 words of `mer.io.loan.words`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from mer.io.arena import Arena
from mer.io.extents import ExpertMap, SlotClasses, aligned_hull
from mer.io.loan.lender import Lender
from mer.io.loan.ranks import Ranks
from mer.io.loan.words import (
    ADDRESSES,
    BEGIN,
    CONTROL_WORDS,
    CQES,
    DEPTH,
    EXPERT_WORDS,
    EXPERTS,
    FREE,
    GIVE_UP_NS,
    IN_FLIGHT,
    LEAD,
    LENGTH,
    LOG,
    LOG_WORDS,
    MAX_LOGGED,
    N_EXPERTS,
    N_LAYERS,
    N_LOGGED,
    N_PARTS,
    NEEDED,
    NEXT,
    PART,
    PART_WORDS,
    PATIENCE,
    PENDING,
    RING,
    SERIAL,
    STOP,
    TOKEN_BIT,
    USED,
    VALUES,
    WAITED_NS,
    WEIGHTS,
)

_GIVE_UP_NS: Final = 50_000_000


@attrs.frozen(kw_only=True)
class JobRead:
    """An expert that a job has begun to read.

    Attributes:
        layer: of the expert.
        expert: its number.
        victim: layer and number of the expert that was evicted from the slot.
        slot: where to.
        addresses: where its matrices begin in memory.
        lengths: bytes of the reads, one for each matrix.
        begun_s: when, on the clock of `time.monotonic`.
        ended_s: when the last matrix was there; 0 if one is not.
        results: of the reads: bytes read or a negative error number, None if that is not known yet.
        tokens: of the reads in the ring; None for those that the kernel does not have yet.
        landed: whether all of the expert is in memory.
        late: whether it has begun and the job has not waited for it, though none of its reads has failed.
        arranged: whether the job has computed with it, and so has re-arranged it.
    """

    layer: int
    expert: int
    victim: tuple[int, int]
    slot: int
    addresses: tuple[int, ...]
    lengths: tuple[int, ...]
    begun_s: float
    ended_s: float
    results: tuple[int | None, ...]
    tokens: tuple[int | None, ...]
    landed: bool
    late: bool
    arranged: bool


class Loan:
    """The memory by which jobs are lent slots and a ring; used again from job to job.

    A job reads a missing expert into the slot of the least valuable resident. As long as a class has free slots, the
    event loop reads its experts instead: the pages of free slots may not be there yet, and computing while the kernel
    clears pages takes three times as long.

    Attributes:
        address: of the control block.
        control: the control block, [CONTROL_WORDS]; and the tables that it names:
        experts: [L, E, EXPERT_WORDS].
        addresses: [L, E, MAX_MATRICES].
        free: [classes].
        used: [L, E].
        ranks: what residents are worth.
        log: [MAX_LOGGED, LOG_WORDS].
        lender: whose ring is lent.

    Args:
        experts: where every expert lies.
        classes: the sizes of slots.
        arena: their memory.
        lender: see above.
        addresses: where the residents are; see `RunResident`.
        ranks: see above.
    """

    def __init__(
        self,
        experts: ExpertMap,
        classes: SlotClasses,
        arena: Arena,
        lender: Lender,
        addresses: npt.NDArray[np.int64],
        ranks: Ranks,
    ) -> None:
        self.lender = lender
        self._arena = arena
        self.control = np.zeros(CONTROL_WORDS, np.int64)
        self.experts = _expert_table(experts, classes, lender.filenos())
        self.free = np.zeros(len(classes.slot_bytes), np.int64)
        self.used = np.zeros(self.experts.shape[:2], np.int64)
        self.log = np.zeros((MAX_LOGGED, LOG_WORDS), np.int64)
        self.addresses, self.ranks = addresses, ranks
        tables = {
            EXPERTS: self.experts,
            ADDRESSES: self.addresses,
            FREE: self.free,
            USED: self.used,
            VALUES: ranks.values,
            WEIGHTS: ranks.weights,
            PATIENCE: ranks.patience,
            LOG: self.log,
        }
        for word, table in tables.items():
            assert table.flags.c_contiguous
            assert table.itemsize == 8
            self.control[word] = table.ctypes.data
        self._n_parts = experts.n_matrices
        self.control[[N_LAYERS, N_EXPERTS, SERIAL, GIVE_UP_NS, N_PARTS]] = (
            *self.used.shape,
            1,
            _GIVE_UP_NS,
            self._n_parts,
        )
        ring = lender.ring_addresses()
        self.control[RING : CQES + 1] = (
            ring.fileno, ring.sq_tail, ring.sq_mask, ring.sqes, ring.cq_head, ring.cq_tail, ring.cq_mask, ring.cqes,
        )  # fmt: skip
        self.control[DEPTH] = lender.depth
        self.address = int(self.control.ctypes.data)

    @property
    def waited_s(self) -> float:
        """How long the last job waited for its reads."""
        return float(self.control[WAITED_NS]) / 1e9

    def lend(self, free: Sequence[bool], kept: Sequence[tuple[int, int]]) -> bool:
        """Lend a job the ring and slots, and return whether the ring could be had.

        Args:
            free: of each class, whether it has free slots.
            kept: layer and number of residents that the job must not evict.
        """
        if not self.lender.lend():
            return False
        control = self.control
        control[SERIAL] += control[N_LOGGED] + 1
        control[[STOP, N_LOGGED, NEXT, IN_FLIGHT, WAITED_NS]] = 0
        self.free[:] = free
        serial = control[SERIAL]
        for key in kept:
            self.used[key] = serial
        return True

    def stop(self) -> None:
        """Keep the job that runs from beginning more reads."""
        self.control[STOP] = 1

    def take_back(self) -> list[JobRead]:
        """End the loan after the job and return the experts that it has begun to read, in order.

        Before anything else, the reader must `adopt` the reads that have not landed.
        """
        self.lender.take_back()
        n, serial, n_given = (int(self.control[word]) for word in (N_LOGGED, SERIAL, NEXT))
        return [self._read(number, words, serial, n_given) for number, words in enumerate(self.log[:n].tolist())]

    def _read(self, number: int, words: list[int], serial: int, n_given: int) -> JobRead:
        """Return the read that an entry of the log records."""
        layer, expert, base, victim, arranged, begun_ns, ended_ns, *results = words
        n_parts = self._n_parts
        del results[n_parts:]
        parts = self.experts[layer, expert, PART:].reshape(-1, PART_WORDS)[:n_parts]
        token, first_read = TOKEN_BIT + 4 * (serial + number), n_parts * number
        whole = [result >= least for result, least in zip(results, parts[:, NEEDED].tolist(), strict=True)]
        failed = any(result != PENDING and not one for result, one in zip(results, whole, strict=True))
        return JobRead(
            layer=layer,
            expert=expert,
            victim=divmod(victim, len(self.used[0])),
            slot=self._arena.slot_at(base),
            addresses=tuple((base + parts[:, BEGIN] + parts[:, LEAD]).tolist()),
            lengths=tuple(parts[:, LENGTH].tolist()),
            begun_s=begun_ns / 1e9,
            ended_s=ended_ns / 1e9,
            results=tuple(None if result == PENDING else result for result in results),
            tokens=tuple(token + part if first_read + part < n_given else None for part in range(n_parts)),
            landed=all(whole),
            late=first_read < n_given and not all(whole) and not failed,
            arranged=bool(arranged),
        )


def _expert_table(experts: ExpertMap, classes: SlotClasses, filenos: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the words of every expert, [L, E, EXPERT_WORDS]."""
    table = np.zeros((len(experts.experts), len(experts.experts[0]), EXPERT_WORDS), np.int64)
    for layer in experts.experts:
        for extents in layer:
            words = [classes.kind_of(extents.layer, extents.expert)]
            for part, begin in zip(extents.parts, extents.layout(classes.alignment).part_offsets, strict=True):
                start, length, lead = aligned_hull(part.offset, part.n_bytes, classes.alignment)
                words += [filenos[part.file], start, length, lead + part.n_bytes, begin, lead]
            table[extents.layer, extents.expert, : len(words)] = words
    return table


def small_enough(experts: ExpertMap, alignment: int, chunk_bytes: int) -> bool:
    """Return whether every matrix of an expert can be read as one chunk."""
    parts = (part for layer in experts.experts for extents in layer for part in extents.parts)
    return all(aligned_hull(part.offset, part.n_bytes, alignment)[1] <= chunk_bytes for part in parts)
