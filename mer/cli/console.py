"""Output for a person: text made safe for a terminal, notes on standard error, and bars where there is a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

from mer.config import Progress
from mer.units import format_bytes

# Everything but tab and newline that a terminal may obey: C0, DEL, C1, and the Unicode controls of text direction.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return text with every control character but tab and newline replaced, and lone surrogates too.

    What comes from a model or from its file is not trusted: escape sequences could move the cursor, set the clipboard
    or hide text.
    """
    return _CONTROLS.sub("\ufffd", text).encode("utf-8", "replace").decode()


class StdoutConsole(Console):
    """A console on standard output that raises BrokenPipeError when its reader has gone."""

    def on_broken_pipe(self) -> None:
        """Let the error go on that rich is handling when it calls this; its own way is to end the process."""
        raise


def stderr_console() -> Console:
    """Return a console on standard error that prints text as it is, without markup; `NO_COLOR` is respected."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


def note(text: str, style: str | None = None) -> None:
    """Print a line on standard error; nobody to read it is no error."""
    try:
        stderr_console().print(Text(printable(text)), style=style)
    except (BrokenPipeError, OSError):  # standard error is closed
        return


class AnswerStream:
    """Standard output as the sink of a generated text: every piece is seen at once, and never obeyed by a terminal.

    Raises:
        BrokenPipeError: from `write` and `end`, when the reader has gone.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.is_terminal = self._stream.isatty()
        self._last = "\n"

    def write(self, piece: str) -> None:
        """Write a piece of text."""
        if not piece:
            return
        self._last = piece[-1]
        encoding = self._stream.encoding or "utf-8"
        text = printable(piece) if self.is_terminal else piece
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()

    def end(self) -> None:
        """End the last line."""
        if self._last != "\n":
            self.write("\n")


class _Amount(rich_progress.ProgressColumn):
    """Done and total, in the unit of the task."""

    def render(self, task: rich_progress.Task) -> Text:
        """Return the amounts as text."""
        done, total, unit = task.completed, task.total, task.fields["unit"]
        if total is None:
            return Text("")
        if unit == "bytes":
            return Text(f"{format_bytes(done)} of {format_bytes(total)}")
        return Text(f"{int(done)} of {int(total)} {unit}")


class Bars:
    """Transient progress bars on standard error, one per stage; where that is no terminal they are silent.

    A stage that can take long says one line instead where no bar can be drawn.
    """

    def __init__(self) -> None:
        dumb = os.environ.get("TERM", "") in ("", "dumb", "unknown")
        self.enabled = sys.stderr.isatty() and not dumb
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._said: set[str] = set()
        self._progress: rich_progress.Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()

    def show(self, stage: str, done: int, total: int, unit: str) -> None:
        """Draw a stage at `done` of `total`; a total of 0 is a stage of unknown length."""
        if not self.enabled:
            return
        if self._progress is None:
            left = rich_progress.TimeRemainingColumn(elapsed_when_finished=True)
            columns = (rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(), _Amount(), left)
            self._progress = rich_progress.Progress(*columns, console=stderr_console(), transient=True)
            self._progress.start()
        if stage not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, visible=False)
            self._tasks[stage] = self._progress.add_task(stage, total=total or None, unit=unit)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)

    def start(self) -> None:
        """Draw that something goes on, before what an engine imports is imported, which takes a while."""
        self.show("starting", 0, 0, "")

    def say_once(self, text: str) -> None:
        """Print a line the first time it is said and no bars are drawn."""
        if not self.enabled and text not in self._said:
            self._said.add(text)
            note(text)

    def clear(self) -> None:
        """Take all bars off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()


def load_reporter(bars: Bars) -> Callable[[Progress], None]:
    """Return the `on_progress` of an engine that is opened under these bars.

    A person should know when kernels are compiled, as it takes its time and happens once.
    """

    def report(progress: Progress) -> None:
        stage = progress.stage
        if stage == "kernels":
            stage = "loading kernels"
        elif stage == "compiling kernels":
            from mer.compute.kernels.step import cache_failure  # imported long before a kernel compiles

            kept = "not kept" if cache_failure() else "they are kept, so that this happens once"
            bars.say_once(f"compiling {progress.total} kernels for this processor; {kept}")
        bars.show(stage, progress.done, progress.total, progress.unit)

    return report
