"""`mer bench MODEL`: opens the engine, runs every case in rounds, and prints rows with the limits."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from mer.bench import llama, plot, tables
from mer.bench.cases import MAX_ROUNDS, Case, parse_counts, parse_memories, plan_cases
from mer.bench.llama import Answer, LlamaBenchError
from mer.bench.model_results import Limits, Measured, Setup, describe
from mer.bench.model_run import run_case
from mer.cli.console import Bars, load_reporter, note, printable
from mer.cli.exits import Exit
from mer.cli.interrupt import Interrupt
from mer.cli.rates import disk_bytes_per_s, memory_bytes_per_s
from mer.config import EngineConfig, Progress, default_threads
from mer.errors import ConfigError
from mer.model.loading import Model, load_model
from mer.plan.plan import load_and_plan
from mer.units import format_bytes, format_duration

if TYPE_CHECKING:
    from mer.engine import Engine


@attrs.frozen(kw_only=True)
class ModelOptions:
    """What the command line says."""

    model: Path
    prompt_tokens: tuple[str, ...]  # none: 512
    tokens: tuple[str, ...]  # none: 128
    depths: tuple[str, ...]
    rounds: int
    warm_up: bool
    memories: str | None
    settings: dict[str, Any]  # of the engine
    vs: Path | None
    plot: Path | None
    output: str


@attrs.define(kw_only=True)
class _Turn:
    """A case with its rounds so far, and those of llama-bench."""

    measured: Measured
    answers: list[Answer] = attrs.Factory(list)
    command: list[str] = attrs.Factory(list)


class _KernelTimer:
    """An engine's `on_progress` that also takes the time that kernels need."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report
        self._begun_s = 0.0
        self.compile_s = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.unit == "kernels":  # they are loaded, and those that are missing compiled
            if progress.stage == "kernels" and progress.done == 0:
                self._begun_s = time.monotonic()
            self.compile_s = time.monotonic() - self._begun_s
        self._report(progress)


def bench_model(options: ModelOptions) -> Exit:
    """Run the benchmark and print its rows; return the exit code.

    Raises:
        MerError: an option makes no sense, the model cannot be run, or a run failed.
    """
    if not 1 <= options.rounds <= MAX_ROUNDS:
        raise ConfigError(f"--rounds {options.rounds}: write a number from 1 to {MAX_ROUNDS}")
    prompts, gens = (
        parse_counts(option, texts) if texts else None
        for option, texts in (("--prompt-tokens", options.prompt_tokens), ("--tokens", options.tokens))
    )
    depths = parse_counts("--depth", options.depths) if options.depths else [0]
    budgets = [options.settings["memory"]] if options.memories is None else parse_memories(options.memories)
    binary = _binary(options)
    figure_class = _figure(options, gens)
    model = load_model(EngineConfig(path=options.model))
    cases = plan_cases(prompts, gens, depths, model.spec.context_length)
    arguments = [_arguments(options, memory, cases) for memory in budgets]
    for one in arguments:
        load_and_plan(EngineConfig(path=options.model, **one))  # refused, if at all, before anything is measured
    threads = options.settings["threads"] or default_threads()
    turns: list[_Turn] = []
    with Bars() as bars:
        before = _probe(model, threads)
        with Interrupt() as interrupt:
            trio.run(partial(_run, options, model, cases, arguments, binary, turns, bars, interrupt))
            interrupted = interrupt.pressed
    turns = [turn for turn in turns if turn.measured.rounds]
    if not turns:
        note("interrupted before the first round ended")
        return Exit.INTERRUPTED
    probes = [before]
    if not interrupted:
        try:
            probes.append(_probe(model, threads))
        except KeyboardInterrupt:
            interrupted = True
    limits = Limits(
        memory_bytes_per_s=tuple(memory for memory, _ in probes), disk_bytes_per_s=tuple(disk for _, disk in probes)
    )
    _print(_rows(turns, limits, interrupted=interrupted), options.output)
    if figure_class is not None:
        _draw(figure_class, turns, limits, options)
    return Exit.INTERRUPTED if interrupted else Exit.OK


def _binary(options: ModelOptions) -> Path | None:
    if options.vs is None:
        return None
    if options.memories is not None:
        raise ConfigError("--vs and --memories exclude each other: llama-bench knows no memory budget")
    found = shutil.which(options.vs)
    if found is None:
        raise LlamaBenchError(f"--vs {options.vs}: there is no program of that name; give the path of llama-bench")
    return Path(found)


def _figure(options: ModelOptions, gens: Sequence[int] | None) -> Any:
    """Return what draws, or None, once it is sure that there will be something to draw."""
    if options.plot is None:
        return None
    if options.memories is None:
        raise ConfigError("--plot draws tokens/s against memory budgets; name them, such as --memories 2GiB,4GiB")
    if gens is not None and not any(gens):
        raise ConfigError("--plot draws a test that generates; give --tokens a number above 0")
    plot.check_path(options.plot)
    return plot.load_figure()


def _arguments(options: ModelOptions, memory: str | None, cases: Sequence[Case]) -> dict[str, Any]:
    """Return the keyword arguments of `open_engine`."""
    context = max(case.positions for case in cases)
    return options.settings | {"memory": memory, "context": context, "prefix_reuse": False}


def _probe(model: Model, threads: int) -> tuple[float, float]:
    """Return what memory and disk give to plain reads, in bytes per second."""
    return memory_bytes_per_s(threads), disk_bytes_per_s(model.gguf, model.experts)


async def _run(
    options: ModelOptions,
    model: Model,
    cases: Sequence[Case],
    arguments: Sequence[dict[str, Any]],
    binary: Path | None,
    turns: list[_Turn],
    bars: Bars,
    interrupt: Interrupt,
) -> None:
    """Run every case with every budget until all are done or ctrl-C is pressed; `turns` gets what was measured."""
    bars.start()
    from mer.opening.engine import open_engine

    seed = secrets.randbits(32)  # what is learnt in one run of the command does not help the next one
    number = 0
    with interrupt.stopping():
        for budget in arguments:
            timer = _KernelTimer(load_reporter(bars))
            async with open_engine(options.model, **budget, on_progress=timer) as engine:
                bars.clear()
                setup = _setup(engine, model, timer.compile_s, seed)
                for case in cases:
                    turn = _Turn(measured=Measured(case=case, setup=setup))
                    turns.append(turn)
                    for at in range(0 if options.warm_up else 1, options.rounds + 1):
                        stage = f"{case.name}, round {at} of {options.rounds}" if at else f"{case.name}, warm-up"
                        show = partial(_show, bars, stage, case.n_tokens)
                        number += 1
                        done = await run_case(engine, case, (seed, number), show)
                        if not at:
                            continue
                        turn.measured.rounds.append(done)
                        if binary is not None:
                            bars.show(f"llama-bench {stage}", 0, 0, "")
                            turn.command = llama.command(
                                binary, options.model, case, setup.threads, setup.settings["kv_type"]
                            )
                            try:
                                turn.answers.append(await _ask(turn.command, case))
                            except LlamaBenchError:
                                if not interrupt.pressed:
                                    raise
                                await trio.sleep_forever()  # one ctrl-C has ended it and is cancelling this


def _show(bars: Bars, stage: str, total: int, done: int) -> None:
    bars.show(stage, done, total, "tokens")


async def _ask(command: list[str], case: Case) -> Answer:
    """Run llama-bench once; if cancelled, it is ended.

    Raises:
        LlamaBenchError: it cannot be run, or it failed.
    """
    try:
        done = await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)
    except OSError as error:
        raise LlamaBenchError(f"{command[0]} cannot be run: {error}") from error
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return llama.parse(case, command, done.returncode, out, err)


def _setup(engine: Engine, model: Model, compile_s: float, seed: int) -> Setup:
    """Return what the rounds run on."""
    statistics, plan, spec = engine.statistics(), engine.plan, engine.spec
    settings = statistics.settings
    return Setup(
        model=spec.name or model.gguf.paths[0].name,
        path=str(model.gguf.paths[0]),
        size_bytes=sum(tensor.n_bytes for tensor in model.gguf.tensors.values()),
        kernels=settings.kernels,
        threads=settings.threads,
        memory_bytes=settings.memory_bytes,
        lookup_bytes=plan.expert_bytes_per_token / max(1, spec.n_routed * spec.top_k),
        dense_bytes=plan.dense_bytes_per_token,
        compile_s=compile_s,
        load_s=statistics.load_s,
        settings=attrs.asdict(settings) | {"seed": seed},
    )


def _rows(turns: Sequence[_Turn], limits: Limits, *, interrupted: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for turn in turns:
        ours = describe(turn.measured, limits, interrupted=interrupted)
        rows += llama.describe(ours, turn.answers, turn.command) if turn.answers else [ours]
    return rows


def _print(rows: Sequence[dict[str, Any]], output: str) -> None:
    """Print the rows; a person also gets the ratios, the settings in force and the limits."""
    if output == "json":
        print(tables.to_json(rows))
        return
    if output == "csv":
        print(tables.to_csv(rows))
        if rows[0]["interrupted"]:
            note("interrupted: these are the figures so far")
        return
    print(printable(tables.to_markdown(rows)) + "\n")
    for row in rows:
        if row.get("vs_ratio") is not None:
            n = len(row["vs_ratios"])
            print(f"{row['test']}: mer / llama-bench {row['vs_ratio']:.3f}, the median of {n} rounds")
    for row in {row["memory_bytes"]: row for row in rows if row["memory_bytes"] is not None}.values():
        print(_in_force(row))
    print(_probed(rows[0]))
    if rows[0]["interrupted"]:
        print("interrupted: these are the figures so far")


def _in_force(row: dict[str, Any]) -> str:
    """Return the settings of one engine, and what opening it took, as a line of text."""
    settings = row["settings"]
    reads = "direct" if all(mode["direct"] for mode in settings["io_modes"]) else "buffered"
    return (
        f"in force: {row['kernels']} kernels, {settings['activations']} activations, {settings['kv_type']} KV, "
        f"{reads} reads by {settings['io_engine']}, {settings['policy']} cache, "
        f"prefetch {settings['prefetch']}, context {settings['context']}, "
        f"prefill chunk {settings['batch_tokens']}, memory budget {format_bytes(row['memory_bytes'])}; "
        f"loaded in {format_duration(row['load_s'])}, {format_duration(row['compile_s'])} of it for kernels"
    )


def _probed(row: dict[str, Any]) -> str:
    memory, disk = (
        ", ".join(f"{rate / 1e9:.2f}" for rate in row[name]) for name in ("memory_bytes_per_s", "disk_bytes_per_s")
    )
    return f"probed: memory {memory} GB/s, disk {disk} GB/s"


def _draw(figure_class: Any, turns: Sequence[_Turn], limits: Limits, options: ModelOptions) -> None:
    assert options.plot is not None
    rows = [describe(turn.measured, limits) for turn in turns]
    if plot.first_generation(rows):
        plot.draw(figure_class, rows, options.plot)
        note(f"drawn: {options.plot}")
