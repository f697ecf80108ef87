"""Prefixes saved and restored while simulated engines run; files are real, threads are not."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import trio
from trio.testing import MockClock

from mer.compute.messages import ReadBlocks, WriteBlocks
from mer.errors import ComputeError, ConfigError, ContextOverflow, EngineClosed, MerError, RequestError
from mer.sched.events import Completion
from mer.sched.kv_file import PrefixFileError, PrefixReader
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.simworker import JobCost, SimModel

BLOCK = 4  # SimWorker.block_tokens
PROMPT = tuple(2 + i * i % 14 for i in range(22))
WHOLE = len(PROMPT) // BLOCK * BLOCK
SMALL = SimModel(n_layers=1, n_experts=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.prefix"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prompt's prefix as a quiet engine saves it."""
    path = tmp_path_factory.mktemp("saved") / "quiet.prefix"

    async def main() -> None:
        async with open_sim_engine(model=SMALL) as sim:
            assert await sim.engine.save_prefix(PROMPT, path) == WHOLE
            await sim.check_quiet()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


async def generate(sim: SimEngine, prompt: tuple[int, ...], max_tokens: int = 4) -> Completion:
    """Generate and compare."""
    done = await sim.engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
    assert done.tokens == sim.expected(prompt, max_tokens)[0]
    return done


# --- what comes back ---


async def test_a_restored_prefix_spares_its_computation(autojump_clock: MockClock, saved: Path) -> None:
    async with open_sim_engine(model=SMALL) as sim:
        assert await sim.engine.load_prefix(saved) == WHOLE
        await sim.check_quiet()
        assert sim.worker.statistics().tokens == 0
        assert (await generate(sim, PROMPT)).usage.cached_tokens == WHOLE
        assert (await generate(sim, (*PROMPT[:WHOLE], 9, 9))).usage.cached_tokens == WHOLE
        assert (await generate(sim, PROMPT[:WHOLE])).usage.cached_tokens == WHOLE - BLOCK
        await sim.check_quiet()


async def test_saving_what_is_cached_computes_nothing(autojump_clock: MockClock, path: Path, saved: Path) -> None:
    async with open_sim_engine(model=SMALL) as sim:
        await generate(sim, PROMPT)
        before = sim.worker.statistics().tokens
        assert await sim.engine.save_prefix(PROMPT, path) == WHOLE
        assert await sim.engine.save_prefix("".join(chr(ord("a") + token) for token in PROMPT), path) == WHOLE
        assert sim.worker.statistics().tokens == before
        assert content(path) == content(saved)
        await sim.check_quiet()


async def test_saving_computes_what_is_missing(autojump_clock: MockClock, path: Path, saved: Path) -> None:
    async with open_sim_engine(model=SMALL) as sim:
        await generate(sim, PROMPT[:10], 1)
        before = sim.worker.statistics().tokens
        await sim.engine.save_prefix(PROMPT, path)
        assert sim.worker.statistics().tokens - before == len(PROMPT) - 8
        assert content(path) == content(saved)
        await sim.check_quiet()


async def test_without_reuse_a_prefix_is_saved_and_not_restored(
    autojump_clock: MockClock, path: Path, saved: Path
) -> None:
    async with open_sim_engine(model=SMALL, prefix_reuse=False) as sim:
        await sim.engine.save_prefix(PROMPT, path)
        assert content(path) == content(saved)
        with pytest.raises(ConfigError, match="prefix_reuse is off"):
            await sim.engine.load_prefix(path)
        await sim.check_quiet()


@pytest.mark.parametrize("piece_bytes", [1, 200, 1 << 20])
async def test_pieces_of_any_size_give_the_same(
    autojump_clock: MockClock, path: Path, saved: Path, piece_bytes: int
) -> None:
    with patch("mer.sched.prefix_files.PIECE_BYTES", piece_bytes):
        async with open_sim_engine(model=SMALL) as sim:
            await sim.engine.load_prefix(saved)
            await sim.engine.save_prefix(PROMPT[:WHOLE], path)
            assert content(path) == content(saved)
            n_jobs = {1: 2 * 5, 200: 2 * 2, 1 << 20: 2}[piece_bytes]  # a block is 64 bytes
            assert sim.worker.statistics().jobs == n_jobs


async def test_restoring_what_is_partly_cached_writes_the_rest(autojump_clock: MockClock, saved: Path) -> None:
    async with open_sim_engine(model=SMALL, kv_blocks=8) as sim:
        await generate(sim, PROMPT[:9], 1)
        assert sim.kv.statistics().cached == 2
        for _ in range(2):
            assert await sim.engine.load_prefix(saved) == WHOLE
            assert sim.kv.statistics().cached == 5
        assert (await generate(sim, PROMPT)).usage.cached_tokens == WHOLE
        await sim.check_quiet()


# --- while others run ---


async def test_saving_and_restoring_while_others_run_and_want_the_blocks(
    autojump_clock: MockClock, tmp_path: Path, saved: Path
) -> None:
    async with open_sim_engine(model=SMALL, kv_blocks=20, cost=JobCost(job_s=1e-3), max_waiting=99) as sim:

        async def save(number: int) -> None:
            await trio.sleep(number * 0.01)
            await sim.engine.save_prefix(PROMPT, tmp_path / f"{number}")

        async def load(number: int) -> None:
            await trio.sleep(number * 0.02)
            with suppress(PrefixFileError):  # when it does not fit beside the others
                assert await sim.engine.load_prefix(saved) == WHOLE

        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                for number in range(6):
                    nursery.start_soon(save, number)
                    nursery.start_soon(load, number)
                for number in range(30):
                    nursery.start_soon(generate, sim, (2 + number % 14, 2 + number // 14, *PROMPT[:10]), 12)
                    nursery.start_soon(generate, sim, PROMPT, 6)
        assert sim.kv.statistics().evictions > 20
        assert sorted(os.listdir(tmp_path)) == [f"{number}" for number in range(6)]
        for number in range(6):
            assert content(tmp_path / f"{number}") == content(saved)
        await sim.check_quiet()


async def test_a_stream_goes_on_while_a_prefix_is_saved(autojump_clock: MockClock, path: Path) -> None:
    with patch("mer.sched.prefix_files.PIECE_BYTES", 1):
        cost = JobCost(job_s=1e-3)
        async with open_sim_engine(model=SMALL, cost=cost) as sim, trio.open_nursery() as nursery:
            await generate(sim, PROMPT)
            log = len(sim.worker.log)
            nursery.start_soon(generate, sim, (3, 4), 50)
            await sim.engine.save_prefix(PROMPT, path)
            kinds = [isinstance(job.operations[0], ReadBlocks) for _, job in sim.worker.log[log:]]
            assert kinds.count(True) == 5
            pieces = [i for i, is_piece in enumerate(kinds) if is_piece]
            assert all(after - before > 1 for before, after in pairwise(pieces)), "two pieces without a batch between"


async def test_a_prefix_that_does_not_fit_now_changes_nothing(autojump_clock: MockClock, saved: Path) -> None:
    async with open_sim_engine(model=SMALL, kv_blocks=10, context=40, cost=JobCost(job_s=1)) as sim:
        async with sim.engine.stream((3, 4), max_tokens=22, ignore_eos=True) as events:  # 6 blocks
            await events.receive()
            before = sim.kv.statistics()
            with pytest.raises(PrefixFileError, match=r"5 blocks do not fit .* 4 of 10 can be had now"):
                await sim.engine.load_prefix(saved)
            assert sim.kv.statistics() == before
        await trio.sleep(10)
        assert await sim.engine.load_prefix(saved) == WHOLE
    async with open_sim_engine(model=SMALL, kv_blocks=4, context=16) as sim:
        with pytest.raises(PrefixFileError, match=r"5 blocks .* KV memory for 4"):
            await sim.engine.load_prefix(saved)


async def test_who_waits_for_the_blocks_of_a_saving_gets_them_when_it_ends(
    autojump_clock: MockClock, path: Path
) -> None:
    async with open_sim_engine(model=SMALL, kv_blocks=10, context=40) as sim:
        await generate(sim, PROMPT)
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                sim.worker.frozen = frozen = trio.Event()
                nursery.start_soon(sim.engine.save_prefix, PROMPT, path)
                await trio.sleep(1)
                sim.worker.frozen = None
                nursery.start_soon(generate, sim, (9,), 38)  # every block
                await trio.sleep(1)
                assert sim.scheduler.statistics().waiting == 1
                frozen.set()
        assert os.listdir(path.parent) == [path.name]
        await sim.check_quiet()


# --- what cannot be ---


async def test_requests_that_cannot_be_are_refused(autojump_clock: MockClock, tmp_path: Path, saved: Path) -> None:
    async with open_sim_engine(model=SMALL, context=24) as sim:
        for prompt, kind, text in (
            ((), RequestError, "0 tokens"),
            (PROMPT[:3], RequestError, "3 tokens; a prefix is saved in blocks of 4"),
            ((*PROMPT, 2, 3), ContextOverflow, "24 prompt tokens"),
            ((99,) * 8, RequestError, "not in the vocabulary"),
        ):
            with pytest.raises(kind, match=text):
                await sim.engine.save_prefix(prompt, tmp_path / "x")
        assert os.listdir(tmp_path) == []
        with pytest.raises(FileNotFoundError):
            await sim.engine.load_prefix(tmp_path / "x")
        with pytest.raises(OSError, match="Is a directory"):
            await sim.engine.save_prefix(PROMPT, tmp_path)
        assert sim.kv.statistics().available == sim.kv.n_blocks
        assert not [name for name in os.listdir(tmp_path.parent) if name.startswith(f".{tmp_path.name}")]
    for call in (sim.engine.load_prefix(saved), sim.engine.save_prefix(PROMPT, tmp_path / "x")):
        with pytest.raises(EngineClosed):
            await call


async def test_the_prefix_of_another_model_is_refused(autojump_clock: MockClock, saved: Path) -> None:
    for model, seed in ((SimModel(n_layers=2), 0), (SMALL, 1)):
        async with open_sim_engine(model=model, seed=seed) as sim:
            with pytest.raises(PrefixFileError, match="another model"):
                await sim.engine.load_prefix(saved)


async def test_damaged_files_change_nothing(autojump_clock: MockClock, path: Path, saved: Path) -> None:
    data = content(saved)
    async with open_sim_engine(model=SMALL, kv_blocks=6, context=24) as sim:
        await generate(sim, (9,) * 20, 1)
        before = sim.kv.statistics()
        for offset in range(0, len(data), 7):
            for damaged in (data[:offset], data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]):
                put(path, damaged)
                with pytest.raises(PrefixFileError):
                    await sim.engine.load_prefix(path)
        assert sim.kv.statistics() == before
        assert (await generate(sim, PROMPT, 1)).usage.cached_tokens == 0
        await sim.check_quiet()


async def test_a_file_that_is_cut_off_after_it_was_checked_leaves_nothing_to_use(
    autojump_clock: MockClock, path: Path, saved: Path
) -> None:
    put(path, content(saved))
    verify = PrefixReader.verify

    def verify_and_cut(reader: PrefixReader) -> None:
        verify(reader)
        os.truncate(path, path.stat().st_size - 1)

    async with open_sim_engine(model=SMALL) as sim:
        with patch.object(PrefixReader, "verify", verify_and_cut), pytest.raises(PrefixFileError, match="shorter"):
            await sim.engine.load_prefix(path)
        await sim.check_quiet()
        assert sim.kv.statistics().cached == 0
        assert (await generate(sim, PROMPT)).usage.cached_tokens == 0


async def test_a_disk_that_is_full_leaves_no_file(
    autojump_clock: MockClock, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with open_sim_engine(model=SMALL) as sim:
        with monkeypatch.context() as broken:
            broken.setattr("mer.io.new_file.os.fsync", full)
            with pytest.raises(OSError, match="No space"):
                await sim.engine.save_prefix(PROMPT, path)
        assert os.listdir(path.parent) == []
        await sim.check_quiet()
        await sim.engine.save_prefix(PROMPT, path)


async def test_a_job_that_fails_leaves_nothing(autojump_clock: MockClock, path: Path, saved: Path) -> None:
    async with open_sim_engine(model=SMALL) as sim:
        await generate(sim, PROMPT)
        n_jobs = sim.worker.statistics().jobs
    async with open_sim_engine(model=SMALL, failures=frozenset({n_jobs})) as sim:
        await generate(sim, PROMPT)
        with pytest.raises(ComputeError):
            await sim.engine.save_prefix(PROMPT, path)
        assert os.listdir(path.parent) == []
        await sim.check_quiet()
        assert (await generate(sim, PROMPT)).usage.cached_tokens == WHOLE
    async with open_sim_engine(model=SMALL, failures=frozenset({0})) as sim:
        with pytest.raises(ComputeError):
            await sim.engine.load_prefix(saved)
        await sim.check_quiet()
        assert sim.kv.statistics().cached == 0
        assert (await generate(sim, PROMPT)).usage.cached_tokens == 0


@pytest.mark.parametrize("n_events", range(12))
@pytest.mark.parametrize("what", ["save", "load"])
async def test_closing_the_engine_meanwhile_leaves_nothing(
    autojump_clock: MockClock, path: Path, saved: Path, what: str, n_events: int
) -> None:
    errors: list[MerError | None] = []
    async with open_sim_engine(model=SMALL, cost=JobCost(job_s=5e-4)) as sim:

        async def call() -> None:
            try:
                await (sim.engine.load_prefix(saved) if what == "load" else sim.engine.save_prefix(PROMPT, path))
            except MerError as error:
                errors.append(error)
            else:
                errors.append(None)

        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await trio.sleep(n_events * 6e-4)
                sim.engine.close()
        await sim.check_quiet()
    assert os.listdir(path.parent) == ([path.name] if what == "save" and errors == [None] else [])
    assert errors == [None] or isinstance(errors[0], EngineClosed)


# --- cancellation ---


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_cancelling_a_saving_at_any_step_leaves_nothing_behind(tmp_path: Path, saved: Path, cached: bool) -> None:
    finished: list[bool] = []

    async def scenario(subject: Subject) -> None:
        folder = tmp_path / str(len(finished))
        folder.mkdir()
        async with open_sim_engine(model=SMALL, kv_blocks=8, max_sequences=1) as sim:
            with trio.fail_after(3600):
                if cached:
                    await generate(sim, PROMPT)
                done = await subject.run(partial(sim.engine.save_prefix, PROMPT, folder / "x"))
                finished.append(done)
                names = os.listdir(folder)
                assert names in ([], ["x"])
                if names:
                    assert content(folder / "x") == content(saved)
                else:
                    assert not done
                await sim.check_quiet()
                await generate(sim, (9,), 31)  # every block
                await sim.check_quiet()

    with patch("mer.sched.prefix_files.PIECE_BYTES", 128):
        assert cancel_at_every_step(scenario) >= (12 if cached else 15)


def test_cancelling_a_restoring_at_any_step_leaves_nothing_behind(saved: Path) -> None:
    async def scenario(subject: Subject) -> None:
        async with open_sim_engine(model=SMALL, kv_blocks=8, max_sequences=1) as sim:
            with trio.fail_after(3600):
                done = await subject.run(partial(sim.engine.load_prefix, saved))
                await sim.check_quiet()
                assert sim.kv.statistics().cached == (5 if done else 0)
                await generate(sim, PROMPT, 4)
                await generate(sim, (9,), 31)  # every block
                await sim.check_quiet()

    with patch("mer.sched.prefix_files.PIECE_BYTES", 128):
        assert cancel_at_every_step(scenario) >= 10


async def test_blocks_that_were_to_be_written_are_left_alone_after_cancellation(
    autojump_clock: MockClock, saved: Path
) -> None:
    async with open_sim_engine(model=SMALL, cost=JobCost(job_s=1)) as sim, trio.open_nursery() as nursery:
        nursery.start_soon(generate, sim, (3, 4), 3)
        await trio.sleep(0.5)  # in a batch of two seconds
        with trio.move_on_after(1):
            await sim.engine.load_prefix(saved)
        assert sim.kv.statistics().available == sim.kv.n_blocks - 2
        await trio.sleep(100)
        assert not [o for _, job in sim.worker.log for o in job.operations if isinstance(o, ReadBlocks | WriteBlocks)]


def test_cancelling_one_that_waits_for_its_turn_leaves_the_other_alone(tmp_path: Path, saved: Path) -> None:
    async def scenario(subject: Subject) -> None:
        async with open_sim_engine(model=SMALL) as sim:
            with trio.fail_after(3600):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(sim.engine.save_prefix, PROMPT, tmp_path / "x")
                    await trio.sleep(1e-3)
                    await subject.run(partial(sim.engine.load_prefix, saved))
                assert content(tmp_path / "x") == content(saved)
                await sim.check_quiet()

    assert cancel_at_every_step(scenario) >= 4
