"""`mer bench`: measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter

from mer.bench.geometry import DEFAULT
from mer.cli.settings import OPTIONS, settings_given, with_settings

bench_app = App(name="bench", help="Measure what this machine reaches.")

WORKLOAD = Group("Workload", sort_key=0)
EXPERTS = Group("Experts", sort_key=1)
RUN = Group("Run", sort_key=2)
TESTS = Group("Tests", sort_key=0)
ENGINE = Group("Engine", sort_key=1)
OUTPUT = Group("Output", sort_key=2)

NOT_MEASURED = {
    "context": "the tests say how long it must be",
    "mirrors": "the disk that is probed beside the results is the model's own",
    "trace": "recording would be measured too",
}


@Parameter(name="*", group=ENGINE)
@with_settings([name for name in OPTIONS if name not in NOT_MEASURED])
class BenchEngineOptions:
    """How the engine is opened that is measured."""

    def arguments(self) -> dict[str, Any]:
        """Return them as keyword arguments of `open_engine` and `EngineConfig`."""
        return settings_given(self)


@bench_app.default
def model_command(
    model: Annotated[
        str | None, Parameter(name="MODEL", show_default=False, help="A GGUF file. [default: the one inside mer]")
    ] = None,
    /,
    *,
    prompt_tokens: Annotated[
        tuple[str, ...],
        Parameter(
            alias="-p",
            group=TESTS,
            negative="",
            show_default=False,
            help="Compute prompts of so many tokens; 128,512 or given again is several, 0 is none. "
            "[default: 512, or what the model's context holds]",
        ),
    ] = (),
    tokens: Annotated[
        tuple[str, ...],
        Parameter(
            alias="-n",
            group=TESTS,
            negative="",
            show_default=False,
            help="Generate so many tokens, likewise. [default: 128, or what the model's context holds]",
        ),
    ] = (),
    depth: Annotated[
        tuple[str, ...],
        Parameter(
            alias="-d",
            group=TESTS,
            negative="",
            show_default=False,
            help="Tokens that are there before, likewise. [default: 0]",
        ),
    ] = (),
    rounds: Annotated[int, Parameter(alias="-r", group=TESTS, help="Runs of each test.")] = 5,
    warmup: Annotated[
        bool,
        Parameter(negative="--no-warmup", group=TESTS, help="Run each test once more before, unmeasured."),
    ] = True,
    vs: Annotated[
        Path | None,
        Parameter(group=TESTS, help="Let this llama-bench take turns with mer on the same file, and compare."),
    ] = None,
    memories: Annotated[
        str | None, Parameter(group=TESTS, help="Run all tests with each of these budgets, such as 2GiB,4GiB.")
    ] = None,
    output: Annotated[
        Literal["md", "csv", "json"], Parameter(group=OUTPUT, alias="-o", help="What is printed.")
    ] = "md",
    plot: Annotated[
        Path | None,
        Parameter(group=OUTPUT, help="Draw tokens/s against --memories into this .png; needs matplotlib."),
    ] = None,
    engine: BenchEngineOptions = BenchEngineOptions(),  # noqa: B008 - frozen
) -> int:
    """Measure tokens per second of a whole model: computing prompts and generating, named as llama-bench names them.

    Every prompt is other tokens, so that nothing is known beforehand. The first ctrl-C stops and prints what was
    measured so far. A model whose name is that of a command is written ./stream.
    """
    from mer.cli.bench_model import ModelOptions, bench_model
    from mer.cli.run import model_path

    return bench_model(
        ModelOptions(
            model=model_path(model),
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            depths=depth,
            rounds=rounds,
            warm_up=warmup,
            memories=memories,
            settings=engine.arguments(),
            vs=vs,
            plot=plot,
            output=output,
        )
    )


@bench_app.command(name="stream", usage="Usage: mer bench stream [OPTIONS]")
def stream_command(
    *,
    stream: Annotated[
        str, Parameter(group=WORKLOAD, help="article, skewed, or the file of a routing trace.")
    ] = "article",
    iterations: Annotated[
        int | None, Parameter(group=WORKLOAD, help="How many. [default: 500, or all of a trace]")
    ] = None,
    policy: Annotated[
        tuple[str, ...],
        Parameter(
            group=WORKLOAD,
            negative="",
            show_default=False,
            help="A cache policy by name, or seed. Given again, the policies take turns and are compared. "
            "[default: mer's own]",
        ),
    ] = (),
    slots: Annotated[int, Parameter(group=WORKLOAD, help="Experts that the cache holds.")] = 16,
    geometry: Annotated[
        str,
        Parameter(
            group=EXPERTS,
            help="mixtral or qwen3-30b, also with d_ff divided (mixtral/4), or d_model x d_ff (2048x768).",
        ),
    ] = DEFAULT,
    weights: Annotated[Literal["q4_0", "f32"], Parameter(group=EXPERTS, help="Their type.")] = "q4_0",
    data: Annotated[
        Path | None,
        Parameter(group=EXPERTS, help="Read this file, or make it. [default: one in the user's cache folder]"),
    ] = None,
    simulate: Annotated[
        bool,
        Parameter(group=RUN, negative="", show_default=False, help="Run the cache alone: no reading, no computing."),
    ] = False,
    rounds: Annotated[
        int | None, Parameter(group=RUN, help="Runs of each policy. [default: 3 if there are several, else 1]")
    ] = None,
    threads: Annotated[
        int | None,
        Parameter(group=RUN, alias="-t", env_var="MER_THREADS", help="Compute threads. [default: one per core]"),
    ] = None,
    output: Annotated[Literal["md", "json"], Parameter(group=RUN, alias="-o", help="What is printed.")] = "md",
) -> int:
    """Measure how fast experts stream from the disk through a cache: iterations, not tokens, per second.

    An iteration looks up the experts of one layer, reads those that the cache misses, applies each to a vector, and
    takes the mean. The experts are random weights in a file that is made once. The first ctrl-C stops and prints what
    was measured so far.
    """
    from mer.cli.bench_stream import StreamOptions, bench_stream

    return bench_stream(
        StreamOptions(
            stream=stream,
            iterations=iterations,
            policies=policy,
            slots=slots,
            geometry=geometry,
            weights=weights,
            data=data,
            simulate=simulate,
            rounds=rounds,
            threads=threads,
            as_json=output == "json",
        )
    )
