"""`mer run`: generate once from a prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from mer.cli.console import AnswerStream, Bars, load_reporter, note, printable, stderr_console
from mer.cli.exits import Exit
from mer.cli.interrupt import Interrupt
from mer.cli.options import CacheOptions, EngineOptions, GenerationOptions, parse_token_ids
from mer.cli.prefix import SavedPrefix
from mer.cli.session import INTERRUPTED, generate, say_statistics, settings_object, statistics_object
from mer.errors import ConfigError
from mer.json_text import json_text


@attrs.frozen
class Task:
    """Which model answers what."""

    model: Path
    prompt: str | list[int]


def resolve(positionals: Sequence[str], *, model: str | None, tokens: str | None, stdin: bool) -> Task:
    """Return model and prompt after the rules of `mer run [MODEL] [PROMPT]`.

    A single positional is the model if it names a file that exists or looks like the path of one (see `_is_model`), or
    the prompt is given by `tokens` or `stdin`; otherwise it is the prompt, and the embedded model answers. With `model`
    it is always the prompt.

    Raises:
        ConfigError: model or prompt is given twice, or there is no prompt.
    """
    elsewhere = [option for option, given in (("--tokens", tokens is not None), ("--stdin", stdin)) if given]
    prompt: str | None = None
    if model is not None:
        if len(positionals) > 1:
            raise ConfigError(f"the model is given twice: {positionals[0]!r} and --model {model!r}")
        prompt = positionals[0] if positionals else None
    elif len(positionals) == 2:
        model, prompt = positionals
    elif positionals and (elsewhere or _is_model(positionals[0])):
        model = positionals[0]
    elif positionals:
        prompt = positionals[0]
    given = ([] if prompt is None else [repr(prompt)]) + elsewhere
    if len(given) > 1:
        raise ConfigError(f"the prompt is given twice: {' and '.join(given)}")
    if tokens is not None:
        return Task(model_path(model), parse_token_ids(tokens))
    if stdin:
        return Task(model_path(model), sys.stdin.read())
    if prompt is None:
        what = "a prompt" if model is None else f"a prompt for {model}"
        raise ConfigError(f'{what} is missing; try: mer run {"" if model is None else model + " "}"Once upon a time"')
    return Task(model_path(model), prompt)


def model_path(model: str | None) -> Path:
    """Return the path of a model, by default the embedded one."""
    if model is None:
        from mer.embedded import embedded_model_path

        return embedded_model_path()
    return Path(model)


def _is_model(text: str) -> bool:
    """Return whether a lone positional names a model.

    It does if it ends in `.gguf`, if there is such a file or folder, or if it is one word that begins as paths do or
    whose folder exists. A slash alone makes no path of a sentence: "What is TCP/IP?" is a prompt.
    """
    if text.endswith(".gguf"):
        return True
    one_word = not any(c.isspace() for c in text)
    if one_word and text.startswith(("/", "./", "../", "~")):
        return True
    try:
        path = Path(text)
        return ("/" in text and path.exists()) or path.is_file() or (one_word and "/" in text and path.parent.is_dir())
    except (OSError, ValueError):  # too long for a file name, or with a NUL
        return False


def _json_object(text: str | None) -> dict[str, Any]:
    """Return the JSON object that an option gives, by default an empty one."""
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError("--chat-template-kwargs is a JSON object, such as '{\"enable_thinking\": false}'")
    return value


async def run(
    task: Task,
    engine_options: EngineOptions,
    generation: GenerationOptions,
    cache_options: CacheOptions,
    *,
    chat: bool,
    template_kwargs: str | None,
    as_json: bool,
    prefix: Path | None,
    interrupt: Interrupt,
) -> Exit:
    """Open the engine, generate once, print, and return the exit code.

    Raises:
        MerError: what the engine raises.
    """
    answer = AnswerStream()
    prompt: Any = task.prompt
    if chat:
        if not isinstance(prompt, str):
            raise ConfigError("--chat takes a text, not --tokens")
        from mer.text.chat import Chat, Message

        prompt = Chat([Message("user", prompt)], _json_object(template_kwargs))
    elif template_kwargs is not None:
        raise ConfigError("--chat-template-kwargs is for --chat; add it")

    def echo() -> None:
        """Show a person at a terminal the beginning that the text continues."""
        if isinstance(prompt, str) and answer.is_terminal and sys.stderr.isatty() and not as_json:
            stderr_console().print(printable(prompt), end="", style="dim")

    generation.arguments()  # a sampling setting out of range is an error before anything is loaded
    saved = None if prefix is None else SavedPrefix(prefix)
    options = engine_options.arguments() | cache_options.arguments()
    result = None
    kept = ""
    with Bars() as bars, interrupt.stopping():
        bars.start()
        from mer.opening.engine import open_engine

        async with open_engine(task.model, **options, on_progress=load_reporter(bars)) as engine:
            bars.clear()
            if cache_options.save_heat is not None:
                engine.heat_profile()  # a dense model has none, which is said before anything is generated
            if saved is not None:
                await saved.restore(engine)
            result = await generate(
                engine,
                prompt,
                generation,
                write=(lambda piece: None) if as_json else answer.write,
                before_text=echo,
                bars=bars,
                interrupt=interrupt,
                show_tokens=as_json or not answer.is_terminal,
            )
            statistics = engine.statistics()
            heat = engine.heat_profile() if cache_options.save_heat is not None else None
            if saved is not None:
                kept = await saved.keep(engine, prompt, result, interrupt)
    if result is None:
        note("interrupted while loading")
        return Exit.INTERRUPTED
    if as_json:
        print(
            json_text(
                {
                    "text": result.text,
                    "tokens": result.tokens,
                    "finish_reason": result.finish_reason,
                    "seed": result.seed,
                    "stats": statistics_object(result, statistics),
                    "settings": settings_object(statistics),
                }
            ),
            flush=True,
        )
    elif not result.reader_gone:
        answer.end()
        say_statistics(result, statistics)
    if kept:
        note(kept, "dim")
    if cache_options.save_heat is not None and heat is not None:
        heat.save(cache_options.save_heat)
    interrupted = result.finish_reason == INTERRUPTED and not result.reader_gone
    return Exit.INTERRUPTED if interrupted else Exit.OK
