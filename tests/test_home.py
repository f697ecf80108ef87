"""Calls of an engine from elsewhere: another run, another thread, asyncio, a forked child."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import outcome
import pytest
import trio

import mer
from tests._lib.tiny_models import TinyModel, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
async def engine(tiny: TinyModel) -> mer.Engine:  # type: ignore[misc]
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=1) as opened:
        yield opened


async def stream(engine: mer.Engine) -> None:
    async with engine.stream([5], max_tokens=1):
        pass


async def close(engine: mer.Engine) -> None:
    engine.close()


CALLS: list[Callable[[mer.Engine], Awaitable[object]]] = [
    lambda engine: engine.generate([5], max_tokens=1),
    lambda engine: engine.generate("x" * 100_000, max_tokens=1),  # which a thread would encode
    lambda engine: engine.save_prefix([5] * 70, "/nowhere/prefix"),
    lambda engine: engine.load_prefix("/nowhere/prefix"),
    stream,
    close,
]


def without_a_run(call: Callable[[], Awaitable[object]]) -> None:
    call().__await__().send(None)


Run: TypeAlias = Callable[[Callable[[], Any]], object]
RUNS: dict[str, Run] = {
    "trio": lambda call: trio.run(call),
    "asyncio": lambda call: asyncio.run(call()),
    "nothing": without_a_run,
}


async def errors_in_a_thread(calls: list[Callable[[], Any]], run: Run) -> list[object]:
    """Return what each call raises when it is run in a thread of its own."""
    results: list[object] = []

    def attempt() -> None:
        for call in calls:
            try:
                results.append(run(call))
            except Exception as error:
                results.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    await trio.to_thread.run_sync(thread.join)
    return results


@pytest.mark.parametrize("run", RUNS)
async def test_calls_from_elsewhere_are_refused_and_the_engine_goes_on(engine: mer.Engine, run: str) -> None:
    want = await engine.generate([5, 6], max_tokens=3)
    errors = await errors_in_a_thread([lambda call=call: call(engine) for call in CALLS], RUNS[run])  # type: ignore[misc]
    assert [type(error) for error in errors] == [mer.ForeignCall] * len(CALLS)
    assert all(isinstance(error, mer.RequestError) and "\n" not in str(error) for error in errors)
    assert engine.statistics().scheduler.submitted == 1
    assert (await engine.generate([5, 6], max_tokens=3)).tokens == want.tokens


async def test_a_stream_is_read_and_left_where_it_was_opened(engine: mer.Engine) -> None:
    async with engine.stream([5, 6], max_tokens=3) as events:

        async def cancel() -> None:
            events.cancel()

        errors = await errors_in_a_thread([events.receive, events.aclose, cancel], trio.run)
        assert [type(error) for error in errors] == [mer.ForeignCall] * 3
        assert [event async for event in events]


async def test_a_thread_may_call_by_way_of_the_run(engine: mer.Engine) -> None:
    want = await engine.generate([5, 6], max_tokens=3)

    async def call() -> mer.Completion:
        return await engine.generate([5, 6], max_tokens=3)

    got = await trio.to_thread.run_sync(lambda: trio.from_thread.run(call))
    assert got.tokens == want.tokens


async def test_any_task_of_the_run_may_use_an_engine(tiny: TinyModel) -> None:
    engines: list[mer.Engine] = []
    leave = trio.Event()

    async def owner(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=1) as engine:
            engines.append(engine)
            task_status.started()
            await leave.wait()

    async with trio.open_nursery() as nursery:
        await nursery.start(owner)
        assert (await engines[0].generate([5], max_tokens=1)).tokens
        leave.set()


def test_an_engine_does_not_outlive_its_run(tiny: TinyModel) -> None:
    engines: list[mer.Engine] = []

    config = mer.EngineConfig(path=tiny.path, memory=MEMORY, slots=4)

    async def leave_without_closing() -> None:
        async with trio.open_nursery() as nursery:
            engines.append(await nursery.start(mer.run_engine, config))
            nursery.cancel_scope.cancel()

    trio.run(leave_without_closing)

    async def use() -> None:
        with pytest.raises(mer.EngineClosed):
            await engines[0].generate([5], max_tokens=1)

    trio.run(use)
    engines[0].close()


def test_asyncio_cannot_open_an_engine(tiny: TinyModel) -> None:
    async def use() -> None:
        async with mer.open_engine(tiny.path):
            pass

    with pytest.raises(mer.ForeignCall, match=r"trio\.run"):
        asyncio.run(use())


def test_a_guest_run_serves_its_own_tasks_only(tiny: TinyModel) -> None:
    """Asyncio's tasks run in the same thread as trio's then."""

    async def host() -> tuple[int, object]:
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        opened, leave = asyncio.Event(), trio.Event()
        engines: list[mer.Engine] = []
        counts: list[int] = []

        async def guest() -> None:
            async with mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=1) as engine:
                counts.append(len((await engine.generate([5], max_tokens=2)).tokens))
                engines.append(engine)
                opened.set()
                await leave.wait()

        def ended(result: outcome.Outcome[None]) -> None:
            done.set_result(result)

        trio.lowlevel.start_guest_run(guest, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=ended)
        await opened.wait()
        error: object = None
        try:
            await engines[0].generate([5], max_tokens=1)
        except mer.MerError as refused:
            error = refused
        loop.call_soon(leave.set)
        (await done).unwrap()
        return counts[0], error

    n_tokens, error = asyncio.run(host())
    assert n_tokens == 2
    assert isinstance(error, mer.ForeignCall)


CHILDREN = """
import json, multiprocessing, os, sys, threading, time
import mer, trio

said = {}

def attempt(engine, call):
    try:
        trio.run(call) if call is not None else engine.close()
    except mer.MerError as error:
        return type(error).__name__
    return "nothing"

def leave_by(how):
    if how == "exit":
        sys.exit(7)
    if how == "error":
        raise KeyError(7)

def wait_for(pid):
    for _ in range(1200):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    said["hung"] = pid

def fork_while_held(lock):
    held, forked = threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            forked.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if pid:
        forked.set()
        thread.join()
    return pid

async def main(path, io_engine):
    async with mer.open_engine(path, memory="8GiB", slots=6, threads=2, io_engine=io_engine) as engine:
        want = await engine.generate([5, 6, 7], max_tokens=20)
        begun = trio.Event()

        async def busy():
            async with engine.stream([5, 6, 7], max_tokens=20) as events:
                async for _ in events:
                    begun.set()

        for how in ("call", "close", "leave", "exit", "error"):
            read, write = os.pipe()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(busy)
                await begun.wait()
                pid = fork_while_held(trio.lowlevel.current_trio_token()._reentry_queue.lock)
                if pid == 0:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                    if how == "call":
                        try:
                            await engine.generate([5], max_tokens=1)
                        except mer.MerError as error:
                            os.write(write, type(error).__name__.encode())
                        os._exit(0)
                    if how == "close":
                        engine.close()
                        os.write(write, b"closed")
                    nursery.cancel_scope.cancel()
                    leave_by(how)
                    await trio.sleep(0)
                    return
                await trio.to_thread.run_sync(wait_for, pid)
                os.close(write)
                said[how] = os.read(read, 100).decode()
                os.close(read)
            said[how + " after"] = (await engine.generate([5, 6, 7], max_tokens=20)).tokens == want.tokens
        child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(attempt(engine, None) == "nothing"))
        await trio.to_thread.run_sync(child.start)
        await trio.to_thread.run_sync(child.join, 60)
        said["outside"] = child.exitcode
        if child.exitcode is None:
            child.kill()
            said["hung"] = child.pid
        said["end"] = (await engine.generate([5, 6, 7], max_tokens=20)).tokens == want.tokens

pid = os.getpid()
try:
    trio.run(main, sys.argv[1], sys.argv[2])
finally:
    if os.getpid() == pid:
        print(json.dumps(said))
"""


@pytest.mark.parametrize("io_engine", ["auto", "threads"])
def test_a_forked_child_is_refused_and_leaves_without_harm(tiny: TinyModel, io_engine: str, tmp_path: Path) -> None:
    script = [sys.executable, "-W", "ignore", "-c", CHILDREN, str(tiny.path), io_engine]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "hung" not in said
    assert (said["call"], said["close"]) == ("ForeignCall", "closed")
    assert said["outside"] == 1, "closing where no run is does nothing"
    assert all(value is True for name, value in said.items() if "after" in name or name == "end"), said
