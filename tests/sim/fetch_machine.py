"""The fetcher against a dictionary, on a simulated disk that fails, hangs and pauses."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable

import attrs
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from mer.errors import FileSuspended, ReadError
from mer.io.arena import Arena
from mer.io.fetch import Fetch
from mer.io.fetcher import Fetcher
from mer.io.pool import BufferPool, Priority, SlotState, Ticket
from mer.testing.machines import TrioStateMachine
from mer.testing.simdisk import DiskProfile, open_sim_disk
from mer.testing.simengine import make_experts
from mer.testing.simworker import SimModel
from tests._lib.landing import gate_up_landed

N_SLOTS = 4
MODEL = SimModel(n_layers=2, n_experts=3)
MOST_HANGS = 2  # of 2 threads with as many replacements, so that there always is one to read

KEYS = [(layer, expert) for layer in range(MODEL.n_layers) for expert in range(MODEL.n_experts)]


@attrs.define(eq=False)
class Known:
    """What the model knows of a fetch."""

    fetch: Fetch
    state: str = "flying"  # then "landed", "failed" or "abandoned"
    kept: bool = True  # its slot is still its own
    holds: int = 0
    told_inner: bool = False  # that gate and up have landed alone


def flying(known: Known) -> bool:
    return known.state == "flying"


def kept(known: Known) -> bool:
    return known.kept


def held(known: Known) -> bool:
    return known.holds > 0


def half_way(known: Known) -> bool:
    return flying(known) and known.fetch.inner_landed


def idle(known: Known) -> bool:
    return known.state == "landed" and known.kept and not known.holds


def lower_than_demand(known: Known) -> bool:
    return flying(known) and known.fetch.priority is not Priority.DEMAND


class FetchMachine(TrioStateMachine):
    """Every fetch ends once, with the right bytes or for a reason, and its slot is never given away too early."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, sizes = make_experts(MODEL)
        classes = self.experts.slot_classes(4096)
        profile = DiskProfile(jitter=3.0, bytes_per_s=1e7)
        self.disk = self.enter(open_sim_disk(sizes, profile=profile, n_threads=2, chunk_bytes=4096))
        self.pool = BufferPool((N_SLOTS,))
        self.arena = Arena((N_SLOTS,), classes.slot_bytes)
        self.fetcher = Fetcher(
            self.pool,
            self.arena,
            classes,
            self.experts,
            self.disk,
            read_deadline_s=1.0,
        )
        self.start(self.fetcher.run)
        self.flying: dict[tuple[int, int], Known] = {}
        self.all: list[Known] = []
        self.doubtful: set[tuple[int, int]] = set()  # experts of which a read may have failed
        self.hangs = 0
        self.frozen, self.frozen_s = False, 0.0

    # --- what the fetcher tells ---

    def inner_landed(self, fetch: Fetch) -> None:
        known = self.flying[fetch.key]
        assert known.fetch is fetch
        assert known.state == "flying"
        assert fetch.inner_landed
        assert not fetch.done
        assert fetch.missing == {2}
        assert not known.told_inner, "told twice"
        known.told_inner = True
        self.check_bytes(fetch, 2)

    def landed(self, fetch: Fetch) -> None:
        known = self.flying.pop(fetch.key)
        assert known.fetch is fetch
        assert fetch.done
        if fetch.error is None:
            known.state = "landed"
            assert self.pool.state(fetch.slot) is SlotState.READY
            self.check_bytes(fetch, 3)
        else:
            known.state = "failed"
            assert fetch.key in self.doubtful, f"failed for no reason: {fetch.error}"

    def check_bytes(self, fetch: Fetch, n_parts: int) -> None:
        memory, base = self.arena.view(fetch.slot), self.arena.address(fetch.slot)
        matrices = self.experts.experts[fetch.layer][fetch.expert].parts
        for part, address in zip(matrices[:n_parts], fetch.addresses, strict=False):
            begin = address - base
            expected = self.disk.content(part.file, part.offset, part.n_bytes)
            assert np.array_equal(memory[begin : begin + part.n_bytes], expected), "the bytes are not the file's"

    # --- rules ---

    def those(self, which: Callable[[Known], bool]) -> list[Known]:
        return [known for known in self.all if which(known)]

    def has_room(self) -> bool:
        return self.pool.statistics().free > 0 and len(self.flying) < MODEL.n_layers * MODEL.n_experts

    @precondition(has_room)
    @rule(data=st.data(), priority=st.sampled_from(Priority))
    def fetch(self, data: st.DataObject, priority: Priority) -> None:
        self.fetch_one(data.draw(st.sampled_from([key for key in KEYS if key not in self.flying])), priority)

    @precondition(has_room)
    @rule(
        data=st.data(),
        part=st.integers(0, 2),
        number=st.sampled_from([errno.EIO, errno.EAGAIN, errno.ESTALE]),
        times=st.sampled_from([1, 2, 4, None]),
    )
    def fetch_what_fails(self, data: st.DataObject, part: int, number: int, times: int | None) -> None:
        key = data.draw(st.sampled_from([key for key in KEYS if key not in self.flying]))
        self.spoil(key, part, number, times)
        self.fetch_one(key, Priority.DEMAND)

    @precondition(lambda self: self.has_room() and self.hangs < MOST_HANGS)
    @rule(data=st.data(), part=st.integers(0, 2))
    def fetch_what_hangs(self, data: st.DataObject, part: int) -> None:
        key = data.draw(st.sampled_from([key for key in KEYS if key not in self.flying]))
        self.hangs += 1
        self.spoil(key, part, None, 1)
        self.fetch_one(key, Priority.DEMAND)

    def fetch_one(self, key: tuple[int, int], priority: Priority) -> None:
        self.slots_are_accounted_for()  # what has become free since is not confused with what is leased now
        ticket = Ticket(key, 0, Priority.DEMAND, lambda _: None)
        self.pool.request(ticket)
        assert ticket.slot is not None
        refusal = self.fetcher.refusal(*key)
        try:
            fetch = self.fetcher.start(*key, ticket.slot, priority, self)
        except FileSuspended:
            assert refusal is not None
            assert self.doubtful, "a file that nothing is wrong with was left alone"
            self.pool.release(ticket.slot)
        else:
            assert refusal is None
            self.flying[key] = known = Known(fetch)
            self.all.append(known)

    @precondition(lambda self: self.those(lower_than_demand))
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from(self.those(lower_than_demand)))
        priority = data.draw(st.sampled_from(list(Priority)[: known.fetch.priority + 1]))
        self.fetcher.promote(known.fetch, priority)
        assert known.fetch.priority is priority

    @precondition(lambda self: self.those(flying))
    @rule(data=st.data(), held_one=st.booleans())
    def abandon(self, data: st.DataObject, held_one: bool) -> None:
        at_work = self.those(lambda known: flying(known) and held(known)) if held_one else []
        known = data.draw(st.sampled_from(at_work or self.those(flying)))
        del self.flying[known.fetch.key]
        known.state = "abandoned"
        self.fetcher.abandon(known.fetch)

    @precondition(lambda self: self.those(flying))
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Wait for two matrices of a fetch, and let a job work on them if they come before the third."""
        known = data.draw(st.sampled_from(self.those(flying)))
        self.change_the_disk("thaw")
        with contextlib.suppress(ReadError):
            self.await_(gate_up_landed(known.fetch))
        if half_way(known):
            self.fetcher.hold(known.fetch)
            known.holds += 1

    @precondition(lambda self: self.those(held))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from(self.those(held)))
        known.holds -= 1
        self.fetcher.let_go(known.fetch)

    @precondition(lambda self: self.those(idle))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Let the owner of a landed expert give up its slot."""
        known = data.draw(st.sampled_from(self.those(idle)))
        known.kept = False
        self.pool.release(known.fetch.slot)

    # --- the disk ---

    def spoil(self, key: tuple[int, int], part: int, number: int | None, times: int | None) -> None:
        layer, expert = key
        matrix = self.experts.experts[layer][expert].parts[part]
        page = matrix.offset // 4096 * 4096
        if number is None:
            self.disk.hang(matrix.file, page, page + 4096, times=times)
        else:
            self.disk.fail(matrix.file, page, page + 4096, number=number, times=times)
        self.doubtful |= {
            (extents.layer, extents.expert)
            for row in self.experts.experts
            for extents in row
            for p in extents.parts
            if p.file == matrix.file and p.offset < page + 4096 and page < p.offset + p.n_bytes
        }

    @rule(what=st.sampled_from(["heal", "let_return", "freeze", "thaw"]))
    def change_the_disk(self, what: str) -> None:
        getattr(self.disk, what)()
        if what == "freeze":
            self.frozen = True
        elif what == "thaw":
            self.frozen, self.frozen_s = False, 0.0

    @rule(seconds=st.sampled_from([1e-4, 2e-4, 5e-4, 1e-3, 6e-3, 0.02, 0.1]))
    def pass_time(self, seconds: float) -> None:
        self.frozen_s += seconds * self.frozen
        if self.frozen_s > 0.5:  # all that is in flight would time out
            self.change_the_disk("thaw")
        self.sleep(seconds)

    @rule()
    def pass_much_time(self) -> None:
        self.change_the_disk("thaw")
        self.sleep(2.0)

    # --- what must hold ---

    @invariant()
    def slots_are_accounted_for(self) -> None:
        holders: dict[int, Known] = {}
        for known in self.all:
            slot = known.fetch.slot
            state = self.pool.state(slot)
            if known.state == "flying":
                expected = state is SlotState.FILLING
            elif known.state == "landed":
                expected = not known.kept or state is SlotState.READY
            else:
                if known.kept and state is SlotState.FREE:
                    assert not known.holds, "a slot was freed while a job worked in it"
                    known.kept = False
                expected = not known.kept or state is SlotState.QUARANTINED
            assert expected, f"the slot of a fetch that is {known.state} is {state.name}"
            if known.kept:
                assert slot not in holders, "a slot in two fetches"
                holders[slot] = known
        statistics = self.pool.statistics()
        assert statistics.free == N_SLOTS - len(holders)
        for read in self.disk.in_flight:
            slots = [slot for slot in range(N_SLOTS) if np.shares_memory(read.buffer, self.arena.view(slot))]
            assert slots
            assert set(slots) <= set(holders), "a read writes into a slot that is free"

    @invariant()
    def counts_add_up(self) -> None:
        statistics = self.fetcher.statistics()
        assert statistics.started == len(self.all)
        assert statistics.in_flight == len(self.flying)
        for state in ("landed", "failed", "abandoned"):
            assert getattr(statistics, state) == sum(known.state == state for known in self.all)
        assert statistics.reads_started == 3 * statistics.started + statistics.retried
        assert statistics.reads_started == (
            statistics.reads_landed + statistics.reads_failed + statistics.reads_cancelled + statistics.reads_in_flight
        )
        for key, known in self.flying.items():
            assert self.fetcher.in_flight(*key) is known.fetch

    @invariant()
    def the_listener_hears(self) -> None:
        self.settle()
        for known in self.all:
            fetch = known.fetch
            assert fetch.done == (known.state != "flying"), "the end of a fetch was not told, or too early"
            if not fetch.done:
                assert known.told_inner == fetch.inner_landed == (fetch.missing <= {2}), "so with gate and up"
            assert (known.state == "landed") == (not fetch.missing)
            assert (known.state == "failed") == isinstance(fetch.error, ReadError)

    def teardown(self) -> None:
        for known in self.all:
            while known.holds:
                known.holds -= 1
                self.fetcher.let_go(known.fetch)
        self.disk.heal()
        self.disk.let_return()
        self.disk.thaw()
        self.sleep(100.0)
        assert not self.flying, "a fetch never ended"
        self.slots_are_accounted_for()
        assert self.pool.statistics().quarantined == 0, "a slot was lost"
        self.counts_add_up()
