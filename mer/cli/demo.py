"""`mer demo`: make the demo model once, then chat with it in a budget below its size."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from mer.cli.console import AnswerStream, Bars, load_reporter, note, stderr_console
from mer.cli.exits import Exit
from mer.cli.interrupt import Interrupt
from mer.cli.options import EngineOptions, GenerationOptions
from mer.cli.session import INTERRUPTED, generate, say_statistics
from mer.config import default_max_tokens
from mer.demo.fetch import demo_model_name, prepare_demo_model
from mer.demo.upcycle import MODIFIED_NOTICE
from mer.errors import RequestError
from mer.paths import cache_folder
from mer.text.chat import Message
from mer.units import format_bytes

if TYPE_CHECKING:
    from mer.engine import Engine

_STAGES = {"download": "downloading SmolLM2", "unpack": "unpacking", "convert": "making experts"}


def demo(
    prompt: str | None,
    *,
    n_experts: int,
    source: Path | None,
    generation: GenerationOptions,
    engine_options: EngineOptions,
) -> Exit:
    """Prepare the model, then answer the prompt, or converse until the input ends; return the exit code.

    Raises:
        MerError: the model cannot be made or run.
    """
    generation.arguments()  # a sampling setting out of range is an error before anything is downloaded
    folder = cache_folder()
    if not (folder / demo_model_name(n_experts)).is_file():
        note(MODIFIED_NOTICE)
    with Bars() as bars:
        model = prepare_demo_model(
            folder,
            n_experts=n_experts,
            source=source,
            on_progress=partial(_report, bars),
            show_pip=bars.enabled,
        )
    settings = engine_options.arguments()
    if settings["memory"] is None:
        settings["memory"] = default_memory(model, settings)
    note(f"{model} ({format_bytes(os.path.getsize(model))}) in {settings['memory']} of memory")
    with Interrupt() as interrupt:
        return trio.run(partial(_converse, model, prompt, generation, settings, interrupt))


def _report(bars: Bars, stage: str, done: int, total: int) -> None:
    bars.say_once(_STAGES[stage])
    if stage == "download":
        bars.clear()  # pip draws its own
    else:
        bars.show(_STAGES[stage], done, total, "bytes")


def default_memory(model: Path, settings: Mapping[str, Any]) -> str:
    """Return half of the model's size as text, or what holds a tenth of its experts where that is more."""
    from mer.config import EngineConfig
    from mer.model.loading import load_model
    from mer.plan.plan import plan_memory

    config = EngineConfig(path=model, **settings)
    parsed = load_model(config)
    needed_bytes = plan_memory(parsed, config).floor_bytes + parsed.experts.total_bytes // 10
    return f"{-(-max(needed_bytes, os.path.getsize(model) // 2) // 2**20)}MiB"


async def _converse(
    model: Path,
    prompt: str | None,
    generation: GenerationOptions,
    settings: Mapping[str, Any],
    interrupt: Interrupt,
) -> Exit:
    """Answer one prompt, or every line of standard input in turn."""
    code = Exit.INTERRUPTED
    with Bars() as bars, interrupt.stopping():
        bars.start()
        from mer.opening.engine import open_engine

        async with open_engine(model, **settings, on_progress=load_reporter(bars)) as engine:
            bars.clear()
            chat = Conversation(engine, generation, bars, interrupt)
            if prompt is not None:
                code = await chat.answer(prompt)
            else:
                code = await chat.answer_lines()
    return code


@attrs.define
class Conversation:
    """A chat whose every turn repeats the turns before that fit the context."""

    engine: Engine
    generation: GenerationOptions
    bars: Bars
    interrupt: Interrupt
    said: list[Message] = attrs.Factory(list)

    async def answer_lines(self) -> Exit:
        """Answer line by line until the input ends; an interrupted or refused answer does not end the conversation.

        Raises:
            BrokenPipeError: nobody reads the answers.
        """
        if sys.stdin.isatty():
            note("Ask something. ctrl-C stops an answer, ctrl-D ends the conversation.")
        while (line := _ask(self.interrupt)) is not None:
            if not line.strip():
                continue
            try:
                await self.answer(line)
            except RequestError as error:
                note(f"mer: {error}")
                self.said.pop()
        return Exit.OK

    async def answer(self, text: str) -> Exit:
        """Answer one message.

        Raises:
            RequestError: the message alone does not fit the context.
            BrokenPipeError: nobody reads the answer.
        """
        self.said.append(Message("user", text))
        await self._forget()
        output = AnswerStream()
        result = await generate(
            self.engine,
            self.said,
            self.generation,
            write=output.write,
            bars=self.bars,
            interrupt=self.interrupt,
            show_tokens=not output.is_terminal,
        )
        if result.reader_gone:
            raise BrokenPipeError
        output.end()
        say_statistics(result, self.engine.statistics())
        self.said.append(Message("assistant", result.text))
        return Exit.INTERRUPTED if result.finish_reason == INTERRUPTED else Exit.OK

    async def _forget(self) -> None:
        """Drop the oldest questions with their answers until the context has room for a new answer."""
        context = self.engine.plan.context
        answer_tokens = self.generation.max_tokens or default_max_tokens(context // 2)
        while len(self.said) > 2 and len(await self.engine.encode_prompt(self.said)) + answer_tokens > context:
            note("The context is full: the oldest question and its answer are forgotten.")
            del self.said[:2]


def _ask(interrupt: Interrupt) -> str | None:
    """Return the next line of standard input, or None at its end; ctrl-C leaves at once while it waits.

    Blocks the event loop, which has nothing to do between two answers.
    """
    with interrupt.leaving():
        if sys.stdin.isatty():
            stderr_console().print("> ", end="", style="bold")
        line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
