"""The door: prompts, stops, refusals, faults under a running engine, and how an engine opens and closes."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numba
import numpy as np
import pytest
import trio

import mer
from mer.config import IoEngine
from mer.io.files import ModelFile
from mer.sched.events import PrefillEvent, TokenEvent
from mer.sched.sampling import Draw, Drawn
from mer.testing.cancel import MOST_STEPS, Subject
from tests._lib.tiny_models import TinyModel, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", metadata={"tokenizer.chat_template": TEMPLATE})


@pytest.fixture
async def engine(tiny: TinyModel) -> mer.Engine:  # type: ignore[misc]
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=1) as opened:
        yield opened


# --- prompts ---


async def test_a_prompt_is_text_or_ids_or_messages(engine: mer.Engine) -> None:
    text = await engine.generate("the cat", max_tokens=5)
    ids = engine.encode("the cat")
    for same in (ids, tuple(ids), np.array(ids), np.array(ids, np.int16), [np.int64(i) for i in ids], iter(ids)):
        done = await engine.generate(same, max_tokens=5)  # type: ignore[arg-type]
        assert (done.tokens, done.text) == (text.tokens, text.text)
    assert text.usage == mer.Usage(prompt_tokens=len(ids), completion_tokens=5)
    chat = await engine.generate([mer.Message("user", "the cat"), mer.Message("assistant", "sat")], max_tokens=5)
    assert chat.tokens == (await engine.generate("<user>the cat<assistant>sat", max_tokens=5)).tokens


@pytest.mark.parametrize(
    "prompt",
    [
        *("\ud800", [], (), 5, None, b"the cat", [1.5], [True], ["the"], [1, "the"], [-1], [300], [2**70]),
        *(np.zeros((2, 2)), mer.Message("user", "x"), [mer.Message("user", "x"), 5], {1: 2}, [None], object()),
    ],
    ids=lambda prompt: repr(prompt)[:20],
)
async def test_what_is_no_prompt_is_refused(engine: mer.Engine, prompt: object) -> None:
    with pytest.raises(mer.RequestError):
        await engine.generate(prompt, max_tokens=5)  # type: ignore[arg-type]
    assert engine.statistics().scheduler.submitted == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 2.0},
        {"max_tokens": True},
        {"stop": [""]},
        {"stop": ""},
        {"stop": None},
        {"stop": [5]},
        {"stop": 5},
        {"stop": ["x" * 5000]},
        {"stop": ["x"] * 100},
        {"sampling": {"temperature": 1}},
        {"sampling": 0},
    ],
    ids=repr,
)
async def test_what_is_no_request_is_refused(engine: mer.Engine, arguments: dict[str, object]) -> None:
    with pytest.raises(mer.RequestError):
        await engine.generate("the cat", **arguments)  # type: ignore[arg-type]


async def test_the_context_is_a_limit_to_the_token(tiny: TinyModel) -> None:
    async with mer.open_engine(tiny.path, memory=MEMORY, context=20) as engine:
        context = engine.statistics().settings.context
        assert context == engine.plan.context == 20
        done = await engine.generate([5] * 10, max_tokens=context - 10, ignore_eos=True)
        assert len(done.tokens) == context - 10
        with pytest.raises(mer.ContextOverflow, match=f"11 prompt tokens .* need {context + 1} .* has {context}"):
            await engine.generate([5] * 11, max_tokens=context - 10)
        with pytest.raises(mer.ContextOverflow):
            await engine.generate([5], max_tokens=2**70)


async def test_without_a_limit_the_context_is_one(tiny: TinyModel) -> None:
    async with mer.open_engine(tiny.path, memory="2GiB", context=128) as engine:
        assert engine.plan.context == 128
        done = await engine.generate([5, 6, 7], ignore_eos=True)
        assert len(done.tokens) == 125
        done = await engine.generate([5] * 127, ignore_eos=True)
        assert len(done.tokens) == 1
        with pytest.raises(mer.ContextOverflow):
            await engine.generate([5] * 128)


async def test_a_file_without_a_chat_template_says_so(tmp_path: Path) -> None:
    async with mer.open_engine(tiny_model(tmp_path / "m.gguf").path, memory=MEMORY) as engine:
        with pytest.raises(mer.TemplateError):
            await engine.generate([mer.Message("user", "hi")])
        await engine.generate("hi", max_tokens=1)


# --- how a generation ends ---


async def test_a_stop_string_ends_the_text_before_itself() -> None:
    async with mer.open_engine(mer.embedded_model_path(), memory=MEMORY) as engine:
        whole = await engine.generate("Once upon a time", max_tokens=40)
        assert whole.finish_reason == "length"
        for start, end in ((0, 1), (5, 9), (20, 23), (len(whole.text) - 2, len(whole.text))):
            stop = whole.text[start:end]
            at = whole.text.index(stop)
            for stops in (stop, [stop], ["never in it", stop]):
                done = await engine.generate("Once upon a time", max_tokens=40, stop=stops)
                assert done.text == whole.text[:at]
                assert done.finish_reason == "stop"
                assert done.tokens == whole.tokens[: len(done.tokens)]
            async with engine.stream("Once upon a time", max_tokens=40, stop=[stop]) as events:
                texts = [event.text async for event in events if isinstance(event, TokenEvent)]
            assert "".join(texts) == whole.text[:at]
        done = await engine.generate("Once upon a time", max_tokens=40, stop=[whole.text + "and more"])
        assert (done.text, done.finish_reason) == (whole.text, "length")


async def test_an_end_token_ends_the_generation_unless_it_is_ignored(tmp_path: Path, tiny: TinyModel) -> None:
    async with mer.open_engine(tiny.path, memory=MEMORY) as engine:
        free = await engine.generate("the cat", max_tokens=8)
    end = free.tokens[4]
    at = free.tokens.index(end)
    model = tiny_model(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eos_token_id": end})
    async with mer.open_engine(model.path, memory=MEMORY) as engine:
        done = await engine.generate("the cat", max_tokens=8)
        assert done.finish_reason == "stop"
        assert done.tokens == free.tokens[: at + 1]
        assert done.usage.completion_tokens == at + 1
        ignored = await engine.generate("the cat", max_tokens=8, ignore_eos=True)
        assert ignored.finish_reason == "length"
        assert ignored.tokens[:at] == free.tokens[:at]
        assert end not in ignored.tokens
        assert len(ignored.tokens) == 8


async def test_tokens_that_the_file_suppresses_are_never_drawn(tmp_path: Path, tiny: TinyModel) -> None:
    hot = mer.Sampling(temperature=20.0, seed=3)
    async with mer.open_engine(tiny.path, memory=MEMORY) as engine:
        free = await engine.generate("the cat", max_tokens=8, ignore_eos=True)
    few = sorted({1, *range(40, 44)} - set(free.tokens))
    rest = [i for i in range(tiny.shape.vocab_size) if i not in few]
    for suppressed in (sorted(set(free.tokens)), rest):
        model = tiny_model(tmp_path / "m.gguf", metadata={"tokenizer.ggml.suppress_tokens": suppressed})
        async with mer.open_engine(model.path, memory=MEMORY) as engine:
            for sampling in (mer.Sampling(), hot):
                done = await engine.generate("the cat", max_tokens=16, sampling=sampling)
                assert not set(done.tokens) & set(suppressed)


async def test_progress_through_the_prompt_comes_before_the_tokens(tiny: TinyModel) -> None:
    async with (
        mer.open_engine(tiny.path, memory=MEMORY, batch_tokens=4) as engine,
        engine.stream([5] * 10, max_tokens=3, ignore_eos=True) as stream,
    ):
        events = [event async for event in stream]
    assert [event.done for event in events[:3] if isinstance(event, PrefillEvent)] == [4, 8, 10]
    tokens = [event for event in events[3:] if isinstance(event, TokenEvent)]
    assert [event.index for event in tokens] == [0, 1, 2]
    assert [event.finish_reason for event in tokens] == [None, None, "length"]
    assert tokens[-1].completion is not None


async def test_twenty_callers_at_once(engine: mer.Engine) -> None:
    done: dict[int, mer.Completion] = {}

    async def one(number: int) -> None:
        done[number] = await engine.generate([5 + number % 4] * 3, max_tokens=4)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)
    for number in range(20):
        assert done[number].tokens == done[number % 4].tokens
    s = engine.statistics()
    assert (s.scheduler.submitted, s.scheduler.finished) == (20, 20)
    assert s.cache.hits + s.cache.misses == s.cache.lookups


# --- damage ---


async def test_a_file_cut_short_fails_the_calls_that_miss_bytes_and_not_the_engine(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf").path
    whole = path.read_bytes()
    async with mer.open_engine(path, memory=MEMORY, slots=1) as engine:
        want = await engine.generate([7], max_tokens=4)
        starts = [part.offset for e in mer.load_model(engine_config(path)).experts.experts[0] for part in e.parts]
        os.truncate(path, min(starts))
        with pytest.raises(mer.ReadError, match=r"m\.gguf.* failed"):
            await engine.generate([7], max_tokens=4)
        async with engine.stream([7], max_tokens=4) as events:
            with pytest.raises(mer.ReadError):
                await events.receive()
        path.write_bytes(whole)
        assert (await engine.generate([7], max_tokens=4)).tokens == want.tokens
        assert engine.statistics().scheduler.failed == 2
        assert engine.statistics().pool.pinned == 0


def engine_config(path: Path) -> mer.EngineConfig:
    return mer.EngineConfig(path=path)


@pytest.mark.parametrize("slots", [3, 16])
async def test_experts_that_are_damaged_in_memory_are_read_again(tiny: TinyModel, slots: int) -> None:
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=slots, prefetch="off") as engine:
        want = await engine.generate([7, 8, 9], max_tokens=6)
        cache = engine._scheduler._store.residents.cache
        for layer in range(engine.spec.n_routed):
            for key, resident in cache.items():
                if key[0] == layer:
                    ctypes.memset(resident.addresses[2], 0xFF, 64)  # NaN in the first row of the down matrix
            before = engine.statistics().bytes_read
            assert (await engine.generate([7, 8, 9], max_tokens=6)).tokens == want.tokens
            assert engine.statistics().bytes_read > before
        assert engine.statistics().scheduler.failed == 0
        assert engine.statistics().pool.pinned == 0


async def test_experts_that_are_damaged_in_the_file_are_read_twice_and_named(tmp_path: Path) -> None:
    rows = np.full_like(tiny_model(tmp_path / "sound.gguf").weights["blk.1.ffn_down_exps.weight"], np.nan)
    path = tiny_model(tmp_path / "damaged.gguf", tensors={"blk.1.ffn_down_exps.weight": rows}).path
    async with mer.open_engine(path, memory=MEMORY) as engine:
        with pytest.raises(mer.NumericsError, match=r"damaged\.gguf: .*also with experts read again.* get the file"):
            await engine.generate([7], max_tokens=2)
        assert engine.statistics().scheduler.batches == 2


async def test_a_sampler_that_raises_fails_its_own_generation(
    engine: mer.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Draw.compute

    def bad_compute(draw: Draw) -> Drawn:
        if draw.sampling.seed == 13:
            raise IndexError("index 5 is out of bounds")
        return compute(draw)

    monkeypatch.setattr(Draw, "compute", bad_compute)

    async def unlucky() -> None:
        with pytest.raises(mer.GenerationError, match="after 0 tokens: IndexError: index 5 is out of bounds") as caught:
            await engine.generate("the cat", sampling=mer.Sampling(seed=13))
        assert isinstance(caught.value.__cause__, IndexError)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(unlucky)
        done = await engine.generate("the cat", max_tokens=8)
    assert len(done.tokens) == 8
    assert (await engine.generate("the cat", max_tokens=8)).tokens == done.tokens


async def test_a_vocabulary_of_ends_only_can_be_asked_but_not_to_ignore_them(tmp_path: Path) -> None:
    tokens, ends = ["<unk>", "</s>", "<|im_end|>"], {"eos": 1, "eot": 2, "eom": 0}
    metadata = {f"tokenizer.ggml.{name}_token_id": token for name, token in ends.items()} | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 3,
        "tokenizer.ggml.token_type": [2, 3, 3],
        "tokenizer.ggml.add_bos_token": False,
    }
    path = tmp_path / "ends.gguf"
    tiny_model(path, vocab_size=3, metadata=metadata)
    async with mer.open_engine(path, memory=MEMORY, threads=1) as engine:
        for sampling in (mer.Sampling(), mer.Sampling(temperature=1.0, seed=1)):
            with pytest.raises(mer.RequestError, match=r"every token .* ends a text, .* with ignore_eos"):
                await engine.generate([0], max_tokens=3, ignore_eos=True, sampling=sampling)
            done = await engine.generate([0], max_tokens=3, sampling=sampling)
            assert (len(done.tokens), done.text, done.finish_reason) == (1, "", "stop")
        assert engine.encode("no token spells this") == [0]


# --- opening and closing ---


class Own(Exception):
    """An error of the program that uses the engine."""


async def test_the_bodys_error_comes_out_bare_and_whole(tiny: TinyModel) -> None:
    cause, context = KeyError("cause"), ValueError("context")

    def fail() -> None:
        try:
            raise context
        except ValueError:
            raise Own from cause

    with pytest.raises(Own) as caught:
        async with mer.open_engine(tiny.path, memory=MEMORY):
            fail()
    assert caught.value.__cause__ is cause
    assert caught.value.__context__ is context


async def test_the_bodys_error_group_is_its_own(tiny: TinyModel) -> None:
    own = Own()
    with pytest.raises(ExceptionGroup) as caught:
        async with mer.open_engine(tiny.path, memory=MEMORY):
            raise ExceptionGroup("mine", [own])
    assert caught.value.message == "mine"
    assert caught.value.exceptions == (own,)


@pytest.mark.parametrize("own_nursery", [False, True], ids=["open_engine", "run_engine"])
async def test_a_disk_that_fails_while_loading_is_one_error(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, own_nursery: bool
) -> None:
    def fail(_file: ModelFile, _memory: memoryview, start: int, needed: int) -> None:
        raise mer.ReadError("disk", start, needed, "input/output error", errno.EIO)

    monkeypatch.setattr(ModelFile, "read_into", fail)

    async def opening() -> None:
        if own_nursery:
            await mer.run_engine(mer.EngineConfig(path=tiny.path, memory=MEMORY, io_engine="threads"))
        async with mer.open_engine(tiny.path, memory=MEMORY, io_engine="threads"):
            raise AssertionError("opened")

    with pytest.raises(mer.ReadError, match="input/output error"):
        await opening()


async def test_a_progress_callback_that_fails_ends_the_opening(tiny: TinyModel) -> None:
    def fail(progress: mer.Progress) -> None:
        if progress.stage == "dense weights":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with mer.open_engine(tiny.path, memory=MEMORY, on_progress=fail):
            raise AssertionError("opened")


async def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with mer.open_engine(tiny.path, memory=MEMORY) as engine:
        monkeypatch.setattr(type(engine.tokenizer), "encode", None)
        with pytest.raises(mer.ContextOverflow, match="at least"):
            await engine.generate("a" * 10_000_000)


async def test_all_reads_of_the_files_are_counted(tiny: TinyModel) -> None:
    async with mer.open_engine(tiny.path, memory=MEMORY) as engine:
        await engine.generate([5, 6, 7], max_tokens=3)
        counted = engine.statistics()
        assert counted.bytes_read == engine.gguf.header_bytes_read + counted.reader.bytes_read
        assert engine.gguf.header_bytes_read >= engine.gguf.header_bytes


async def test_errors_of_opening_come_out_bare(tmp_path: Path, tiny: TinyModel) -> None:
    with pytest.raises(mer.MerError):
        async with mer.open_engine(tmp_path / "missing.gguf"):
            pass
    with pytest.raises(mer.NotEnoughMemory):
        async with mer.open_engine(tiny.path, memory="1MiB"):
            pass
    with pytest.raises(mer.ConfigError):
        async with mer.open_engine(tiny.path, memory=MEMORY, context=100_000):
            pass
    async with trio.open_nursery() as nursery:
        with pytest.raises(mer.NotEnoughMemory):
            await nursery.start(mer.run_engine, mer.EngineConfig(path=tiny.path, memory=1 << 20))


async def test_cancellation_from_outside_passes_through(tiny: TinyModel) -> None:
    with trio.CancelScope() as scope:
        async with mer.open_engine(tiny.path, memory=MEMORY) as engine:
            scope.cancel()
            await engine.generate("the cat", max_tokens=3)
        raise AssertionError("not reached")
    assert scope.cancelled_caught


async def test_an_engine_that_is_closed_says_so(tiny: TinyModel) -> None:
    async with mer.open_engine(tiny.path, memory=MEMORY) as engine:
        engine.close()
        engine.close()
        with pytest.raises(mer.EngineClosed):
            await engine.generate("the cat", max_tokens=3)
    for _ in range(2):
        with pytest.raises(mer.EngineClosed):
            await engine.generate("the cat", max_tokens=3)
        with pytest.raises(mer.EngineClosed):
            async with engine.stream("the cat", max_tokens=3):
                pass
    assert engine.statistics().scheduler.submitted == 0


async def test_closing_ends_generations_under_way(tiny: TinyModel) -> None:
    errors: list[mer.MerError] = []

    async def one(engine: mer.Engine) -> None:
        try:
            await engine.generate("the cat", max_tokens=200, ignore_eos=True)
        except mer.MerError as error:
            errors.append(error)

    async with (
        trio.open_nursery() as nursery,
        mer.open_engine(tiny.path, memory=MEMORY, slots=1, max_sequences=2) as engine,
    ):
        for _ in range(5):
            nursery.start_soon(one, engine)
        async with engine.stream("the cat", max_tokens=200, ignore_eos=True) as events:
            await events.receive()
    assert [type(error) for error in errors] == [mer.EngineClosed] * 5
    s = engine.statistics()
    assert s.kv.available == s.kv.n_blocks
    assert s.pool.pinned == 0


async def test_an_engine_in_a_nursery_of_the_callers(tiny: TinyModel) -> None:
    async with trio.open_nursery() as nursery:
        engine = await nursery.start(mer.run_engine, mer.EngineConfig(path=tiny.path, memory=8 << 30))
        one = await engine.generate("the cat", max_tokens=3)
        other = await nursery.start(mer.run_engine, mer.EngineConfig(path=tiny.path, memory=8 << 30, slots=1))
        engine.close()
        assert (await other.generate("the cat", max_tokens=3)).tokens == one.tokens
        with pytest.raises(mer.EngineClosed):
            await engine.generate("the cat", max_tokens=3)
        nursery.cancel_scope.cancel()
    with pytest.raises(mer.EngineClosed):
        await other.generate("the cat", max_tokens=3)


async def test_two_engines_at_once_do_not_disturb_each_other(tiny: TinyModel) -> None:
    async with (
        mer.open_engine(tiny.path, memory=MEMORY, slots=2) as one,
        mer.open_engine(mer.embedded_model_path(), memory=MEMORY, slots=3) as two,
    ):
        results: list[tuple[int, ...]] = []

        async def ask(engine: mer.Engine) -> None:
            results.append((await engine.generate("the cat", max_tokens=8)).tokens)

        for engine in (one, two):
            await ask(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, one)
            nursery.start_soon(ask, two)
        assert sorted(results[:2]) == sorted(results[2:])


async def test_opening_tells_how_far_it_is(tiny: TinyModel) -> None:
    told: list[mer.Progress] = []
    async with mer.open_engine(tiny.path, memory=MEMORY, on_progress=told.append) as engine:
        assert engine.statistics().load_s > 0
    for stage in ("kernels", "dense weights"):
        steps = [progress for progress in told if progress.stage == stage]
        assert [p.done for p in steps] == sorted(p.done for p in steps)
        assert steps[-1].done == steps[-1].total > 0
    assert {progress.stage for progress in told} - {"compiling kernels"} == {"kernels", "dense weights"}


def threads_of_the_engine() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mer-")]


def files_left() -> int:
    """Return the number of open files once every thread of an engine has ended."""
    for thread in threads_of_the_engine():
        thread.join(60)  # a reader's threads end by themselves
    assert threads_of_the_engine() == []
    return len(os.listdir("/proc/self/fd"))


def cancel_on_a_real_clock(scenario: Callable[[Subject], Awaitable[None]], files: int) -> int:
    """As `cancel_at_every_step`, for code whose threads a simulated clock would not wait for."""
    for step in range(MOST_STEPS):
        subject = Subject(step)
        trio.run(scenario, subject)
        assert files_left() == files
        if not subject.fired:
            return step
    raise AssertionError("too many steps")


def test_cancelling_at_any_step_of_a_whole_life_leaves_no_thread_and_no_file(tiny: TinyModel) -> None:
    async def body() -> None:
        async with mer.open_engine(tiny.path, memory=MEMORY, slots=1, threads=2, io_threads=2) as engine:
            async with engine.stream("the cat", max_tokens=2) as events:
                async for _ in events:
                    pass
            await engine.generate([5], max_tokens=1)

    async def scenario(subject: Subject) -> None:
        await subject.run(body)

    trio.run(body)
    files = files_left()
    assert cancel_on_a_real_clock(scenario, files) >= 5


def test_cancelling_an_engine_in_a_nursery_at_any_step_of_opening_leaves_nothing(tiny: TinyModel) -> None:
    config = mer.EngineConfig(path=tiny.path, memory=8 << 30, threads=1, io_threads=1)

    async def scenario(subject: Subject) -> None:
        async def body() -> None:
            opened = trio.Event()

            class Status:
                def started(self, engine: mer.Engine) -> None:
                    engine.close()
                    opened.set()

            await mer.run_engine(config, task_status=Status())  # type: ignore[arg-type]
            assert opened.is_set()

        await subject.run(body)

    trio.run(scenario, Subject(MOST_STEPS))
    files = files_left()
    assert cancel_on_a_real_clock(scenario, files) >= 10


@pytest.mark.parametrize("named", ["file", "folder"])
async def test_copies_on_further_drives_share_the_reading(tmp_path: Path, named: str) -> None:
    path = tiny_model(tmp_path / "m.gguf").path
    copy = tmp_path / "other" / ("m.gguf" if named == "folder" else "copy.gguf")
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    async with mer.open_engine(path, memory=MEMORY, slots=1) as engine:
        want = await engine.generate("the cat", max_tokens=8)
    mirror = copy if named == "file" else copy.parent
    async with mer.open_engine(path, memory=MEMORY, slots=1, mirrors=[mirror]) as engine:
        assert (await engine.generate("the cat", max_tokens=8)).tokens == want.tokens
        assert engine.statistics().settings.mirrors == (str(mirror),)
        shares = [drive.bytes_read for drive in engine.statistics().reader.copies]
    assert len(shares) == 2
    assert sum(shares) > 0


async def test_a_mirror_that_is_no_copy_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf").path
    other = tiny_model(tmp_path / "other.gguf", n_experts=8).path
    with pytest.raises(mer.ModelFileError, match=r"other\.gguf"):
        async with mer.open_engine(path, memory=MEMORY, mirrors=[other]):
            pass
    with pytest.raises(mer.ConfigError, match="another drive"):
        async with mer.open_engine(path, memory=MEMORY, mirrors=[path]):
            pass


# --- what an engine cannot do without ---


async def test_a_compute_thread_that_dies_closes_the_engine_with_its_reason(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(control: int, number: int, n_threads: int) -> None:
        raise MemoryError("for the test")

    monkeypatch.setattr("mer.compute.cpu.team.follow", dying)
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=2) as engine:
        with pytest.raises(mer.ComputeError, match=r"compute thread . died: MemoryError: for the test"):
            await engine.generate([5], max_tokens=1)
        with pytest.raises(mer.EngineClosed, match=r"compute thread . died: MemoryError: for the test"):
            await engine.generate([5], max_tokens=1)


@pytest.mark.parametrize(
    ("io_engine", "method"),
    [("auto", "RingReader._collect"), ("threads", "ThreadReader._finish")],
    ids=["auto", "threads"],
)
async def test_a_reader_that_dies_closes_the_engine_with_its_reason(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, io_engine: IoEngine, method: str
) -> None:
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=1, io_engine=io_engine) as engine:
        if io_engine == "auto" and engine.statistics().settings.io_engine != "io_uring":
            pytest.skip("this system has no io_uring")

        def dying(*_arguments: object) -> None:
            raise ValueError("for the test")

        place = {"RingReader": "mer.io.ring_reader", "ThreadReader": "mer.io.thread_reader"}[method.split(".")[0]]
        monkeypatch.setattr(f"{place}.{method}", dying)
        with pytest.raises(mer.EngineClosed):
            await engine.generate([5], max_tokens=1)
        with pytest.raises(mer.EngineClosed, match="reading has stopped: ValueError: for the test"):
            await engine.generate([5], max_tokens=1)


async def test_a_reader_that_dies_while_an_engine_opens_is_why_it_does_not(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_arguments: object) -> None:
        raise ValueError("for the test")

    monkeypatch.setattr("mer.io.thread_reader.ThreadReader._finish", dying)
    with pytest.raises(mer.EngineClosed, match="not be opened: reading has stopped: ValueError: for the test"):
        async with mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=1, io_engine="threads"):
            pass


async def test_without_compiled_kernels_an_engine_does_not_open(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(mer.ConfigError, match="NUMBA_DISABLE_JIT is set"):
        async with mer.open_engine(tiny.path, memory=MEMORY):
            pass
