"""One tree of errors: everything `mer` raises on purpose is a `MerError` whose text says what, where and what would
work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mer.quoting import escaped_lines, one_line


class MerError(Exception):
    """Base of every error that `mer` raises on purpose; its text is one line, and it can be copied and pickled."""

    def __str__(self) -> str:
        return one_line(super().__str__())

    def __reduce__(self) -> tuple[Callable[..., MerError], tuple[type[MerError], tuple[Any, ...], dict[str, Any]]]:
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[MerError], args: tuple[Any, ...], attributes: dict[str, Any]) -> MerError:
    """Make an error again without its constructor, whose arguments its text was made of."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigError(MerError, ValueError):
    """A setting is malformed or contradicts another one."""


class RequestError(MerError, ValueError):
    """A generation request is malformed: prompt, sampling parameters, stop strings or limits."""


class ForeignCall(RequestError):
    """An engine was called outside the trio run, or the process, that it was opened in; it goes on unharmed."""


class ContextOverflow(RequestError):
    """A prompt and its `max_tokens` need more KV positions than the engine has."""


class _AboutFile(MerError):
    """An error about a file, raised where the file may not be known; `naming` fills it in.

    Args:
        reason: what is wrong, and what would work.
        path: the file, or None where it is not known.
    """

    def __init__(self, reason: str, path: str | os.PathLike[str] | None = None) -> None:
        self.reason = reason
        self.path = None if path is None else Path(path)
        super().__init__(reason)

    def __str__(self) -> str:
        return one_line(self.reason if self.path is None else f"{self.path}: {self.reason}")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors that come out of the block name the file they are about: those of `mer`, and the system's."""
    try:
        yield
    except _AboutFile as error:
        if error.path is None:
            error.path = Path(path)
            error.reason = error.reason.removeprefix(f"{error.path}: ")  # named where it was raised
        raise
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


class ModelFileError(_AboutFile):
    """A model file cannot be used; the subclasses say why."""


class GGUFError(ModelFileError):
    """A GGUF file is malformed.

    Args:
        path: the file.
        offset: byte offset of the offending field, or None where no single field is to blame.
        reason: what is wrong, and what would have been valid.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int | None, reason: str) -> None:
        super().__init__(reason, path)
        self.offset = offset

    def __str__(self) -> str:
        return _at_byte(self.path, self.offset, self.reason)


class UnsupportedModel(ModelFileError):
    """A well-formed model file needs something that `mer` does not implement."""


class FileChanged(ModelFileError):
    """A model file is not the one whose header was read: it was replaced or written to while it was being opened."""


class MirrorMismatch(ModelFileError):
    """A mirror is not an identical copy of the model file.

    Args:
        path: the mirror.
        offset: of the first byte that differs, among those compared.
        reason: what differs.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int, reason: str) -> None:
        super().__init__(reason, path)
        self.offset = offset

    def __str__(self) -> str:
        return _at_byte(self.path, self.offset, self.reason)


class TokenizerError(ModelFileError):
    """The tokenizer described by a model file's metadata cannot be built."""


class TemplateError(_AboutFile):
    """A chat template is missing, malformed, or failed to render."""


class NotEnoughMemory(MerError):
    """The memory budget is below what the model needs; the text carries the plan's arithmetic, a line for each part.

    Args:
        message: the arithmetic as text.
        budget_bytes: the budget that was given.
        needed_bytes: the smallest budget that works.
    """

    def __init__(self, message: str, *, budget_bytes: int, needed_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.needed_bytes = needed_bytes
        super().__init__(message)

    def __str__(self) -> str:
        return escaped_lines(self.args[0])


class ReadError(MerError):
    """Bytes of a model file could not be read.

    Args:
        path: the file.
        offset: first byte of the failed read.
        n_bytes: its length, or 0 if the file could not be opened.
        reason: the cause as text.
        errno: the operating system's error number, or None (a truncated file has none).
        tries: how often it was tried.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        offset: int,
        n_bytes: int,
        reason: str,
        errno: int | None = None,
        *,
        tries: int = 1,
    ) -> None:
        self.path = Path(path)
        self.offset = offset
        self.n_bytes = n_bytes
        self.reason = reason
        self.errno = errno
        self.tries = tries
        often = f" {tries} times" if tries > 1 else ""
        what = f"reading {n_bytes} bytes at byte {offset}" if n_bytes else "opening it"
        super().__init__(f"{self.path}: {what} failed{often}: {reason}")

    def after(self, tries: int) -> ReadError:
        """Return this error as that of a read that was tried so often; the caller raises it from this one."""
        return ReadError(self.path, self.offset, self.n_bytes, self.reason, self.errno, tries=tries)


class ReadTimeout(ReadError):
    """A read gave no answer within the deadline; the disk or its connection hangs."""


class FileSuspended(ReadError):
    """A file is left alone for a while after several fetches from it have failed.

    Args:
        path: the file.
        offset: first byte of the read that was not tried.
        n_bytes: its length.
        failures: how many fetches have failed in a row.
        next_try_s: in how many seconds the file is tried again.
    """

    def __init__(
        self, path: str | os.PathLike[str], offset: int, n_bytes: int, *, failures: int, next_try_s: float
    ) -> None:
        self.failures = failures
        self.next_try_s = next_try_s
        super().__init__(
            path,
            offset,
            n_bytes,
            f"not tried, as {failures} fetches in a row failed with this file; it is tried again in {next_try_s:.3g} s",
            tries=0,
        )


class SavedFileError(_AboutFile):
    """A file that mer has once written cannot be used: malformed, damaged, of another version, or of another model.

    Args:
        path: the file.
        offset: byte offset of what is wrong, or None where no single place is to blame.
        reason: what is wrong, and what would work.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int | None, reason: str) -> None:
        super().__init__(reason, path)
        self.offset = offset

    def __str__(self) -> str:
        return _at_byte(self.path, self.offset, self.reason)


class NumericsError(MerError):
    """The model computed NaN or infinity where a finite number was needed: the weights are damaged."""


class ComputeError(MerError):
    """A compute worker failed while running a job."""


class DeviceError(ComputeError):
    """The device of the CUDA worker failed.

    Args:
        message: what failed, and what would work.
        fatal: whether the device can compute nothing more in this process, so that the engine closes.
    """

    def __init__(self, message: str, *, fatal: bool) -> None:
        self.fatal = fatal
        super().__init__(message)


class GenerationError(MerError):
    """Drawing a token of one generation, or making text of it, failed; other generations go on."""


class EngineClosed(MerError):
    """The engine is closed, or can no longer serve requests."""


def _at_byte(path: Path | None, offset: int | None, reason: str) -> str:
    """Return the text of an error about one place of a file."""
    return one_line(f"{path}{'' if offset is None else f' at byte {offset}'}: {reason}")
