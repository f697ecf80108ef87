"""`mer bench`: measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter

from mer.bench.geometry import DEFAULT

bench_app = App(name="bench", help="Measure what this machine reaches.")

WORKLOAD = Group("Workload", sort_key=0)
EXPERTS = Group("Experts", sort_key=1)
RUN = Group("Run", sort_key=2)


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
