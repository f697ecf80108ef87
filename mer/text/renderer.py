"""Renderer of chat templates in a separate process, so that a template can harm no other.

Templates are programs of strangers, and every interpreter of them is native code at its bottom: one that loops for
ever, takes all memory or overflows the stack can only be stopped by ending its process. That process
(`template_process`) has no more than it needs (`confinement`). This side believes nothing that it answers: lengths,
form and time are bounded.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import attrs

from mer.errors import TemplateError
from mer.text.exchange import ExchangeError, exchange
from mer.units import format_bytes

MAX_TEMPLATE_CHARS = 1 << 17  # the longest templates of real models have 30,000
START_BYTES = 12 << 20  # private memory of the process before it has seen a template: 10.7 MiB measured
WORK_BYTES = 20 << 20  # what rendering may take beyond that,
BYTES_PER_TEMPLATE_CHAR = 320  # for the compiled template (280 measured),
BYTES_PER_CONTENT_BYTE = 64  # for the messages: copies with up to four bytes a character,
BYTES_PER_MESSAGE = 2048  # and their objects
CPU_S = 2  # processor time of a call, all its renderings together,
TEMPLATE_CHARS_PER_S = 1 << 14  # with a second more for so many characters of the template,
CONTENT_BYTES_PER_S = 1 << 20  # and one for so many bytes of messages
TEXT_CHARS = 1 << 20  # the longest rendering has so many characters,
TEXT_CHARS_PER_MESSAGE = 1 << 10  # so many more for each message,
TEXT_CHARS_PER_CONTENT_BYTE = 8  # and so many for each byte of messages,
MOST_TEXT_CHARS = 1 << 26  # but never more than these
MOST_DETAIL_CHARS = 80  # of what a template says in an error
_PATIENCE_S = 60.0  # without an answer; a process that runs is ended before by the limit of its processor time

_log = logging.getLogger(__name__)


@attrs.frozen
class TemplateInput:
    """Input of a template.

    Attributes:
        roles: of the messages.
        contents: for each rendering that is wanted, the content of every message.
        variables: what else it is given, by name.
        now: the time that it is told.
    """

    roles: Sequence[str]
    contents: Sequence[Sequence[str]]
    variables: Mapping[str, str | bool | int]
    now: datetime


class Call:
    """One call of a renderer, which any thread may give up: its process ends, and the call raises TemplateError."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up = False

    def give_up(self) -> None:
        """End the call, whether it has begun or not; does not block, and does nothing to a call that is done."""
        with self._lock:
            self._given_up = True
            if self._process is not None:
                self._process.kill()

    def begin(self, process: subprocess.Popen[bytes]) -> bool:
        """Take note of who works for the call; return False if it was given up."""
        with self._lock:
            self._process = process
            return not self._given_up

    def end(self) -> None:
        """Take note that nobody works for the call any more."""
        with self._lock:
            self._process = None


def plan_bytes(template_chars: int) -> int:
    """Return the private memory that the process of a template may take, but for what messages add."""
    return START_BYTES + WORK_BYTES + BYTES_PER_TEMPLATE_CHAR * template_chars


class Renderer:
    """Renders one template, in a process that the first rendering starts and that is kept for further ones.

    May be called by any number of threads; it serves one call after the other. The process ends when the renderer is
    closed or collected, and when this process ends.

    Args:
        source: the template.
        path: the model file, for errors.
    """

    def __init__(self, source: str, path: str | os.PathLike[str] | None) -> None:
        self._source, self._path = source, path
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: Callable[[], object] | None = None  # ends the process
        self._closed = False
        _renderers.add(self)

    def render(self, chat: TemplateInput, call: Call | None = None) -> list[str]:
        """Return the text of each rendering; blocks for a millisecond or two, or until the template's time is used up.

        Raises:
            TemplateError: the template is malformed, failed, refused the messages or took too much, or the call was
                given up.
        """
        call = Call() if call is None else call
        n_bytes = sum(len(content.encode()) for contents in chat.contents for content in contents)
        bounds = _Bounds.of(len(self._source), len(chat.roles) * len(chat.contents), n_bytes)
        request = {
            "template": self._source,
            "roles": chat.roles,
            "contents": chat.contents,
            "variables": {**chat.variables, "tools": None, "documents": None},
            "now": [*chat.now.timetuple()[:6], chat.now.microsecond],
            **attrs.asdict(bounds),
        }
        data = json.dumps(request, ensure_ascii=False).encode()
        with self._turn:
            process = self._living()
            fields: list[bytes] = []
            try:
                if not call.begin(process) or self._closed:
                    raise ExchangeError("it was given up")
                fields = exchange(
                    process, data, len(chat.contents) * (4 * bounds.most_chars + 8) + 64, _PATIENCE_S + bounds.cpu_s
                )
            except ExchangeError as error:
                raise self._error(self._end_of(process, error, bounds.cpu_s)) from None
            finally:
                call.end()
                # One that large messages have made larger than planned is not kept.
                answered = bool(fields) and fields[0] != b"no memory"
                if not answered or _private_bytes(process.pid) > plan_bytes(len(self._source)):
                    self._discard()
        return self._texts(fields, len(chat.contents), bounds)

    def close(self) -> None:
        """End the process; running and later calls raise TemplateError. Closing twice is allowed."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._turn:  # a running call notices at once that the process has ended
            self._discard()

    def _living(self) -> subprocess.Popen[bytes]:
        """Return the process, started if there is none."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._discard()
        self._process = process = self._started()
        self._finalizer = weakref.finalize(self, _end, process, os.getpid())
        try:
            (hello,) = exchange(process, b"", 64, _PATIENCE_S)
        except (ExchangeError, ValueError) as error:
            self._discard()
            raise self._error(
                f"the process that renders the chat template does not start ({error}; exit code {process.returncode}): "
                "is Jinja2 installed?"
            ) from None
        if hello != b"filtered":
            _log.warning("the kernel cannot filter the system calls of chat templates; only limits confine them")
        return process

    def _started(self) -> subprocess.Popen[bytes]:
        main = Path(__file__).with_name("template_process.py")
        paths = [*_import_paths("jinja2", "markupsafe"), str(main.parent)]
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", "-W", "ignore", str(main), *paths],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                close_fds=True,
                cwd="/",
                # Where the interpreter's own library may be, and what time it is here.
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ},
                start_new_session=True,  # ctrl-C is not for it
            )
        except (OSError, ValueError) as error:
            raise self._error(f"the process that renders the chat template cannot be started: {error}") from error

    def _discard(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            assert self._finalizer is not None
            self._finalizer()
        self._process = self._finalizer = None

    def _end_of(self, process: subprocess.Popen[bytes], error: ExchangeError, cpu_s: int) -> str:
        """Return why a process gave no answer."""
        process.kill()
        code = process.wait()
        if code == -signal.SIGXCPU:
            return f"the chat template works for more than {cpu_s} s; it may be a malicious file"
        if code == -signal.SIGKILL:
            return f"rendering the chat template has ended without an answer ({error})"
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"the chat template has ended its process {how}; it may be a malicious file"

    def _texts(self, fields: list[bytes], n_texts: int, bounds: _Bounds) -> list[str]:
        """Return the texts of an answer, or raise the error that it tells of."""
        kind, *rest = fields
        try:
            texts = [field.decode() for field in rest]
        except UnicodeDecodeError:
            texts = []
        if kind == b"rendered" and len(texts) == n_texts:
            return texts
        if len(texts) != 2 or kind == b"rendered":
            raise self._error("the process of the chat template gave no answer that has a form")
        line = f" at line {texts[0]}" if texts[0].isdecimal() and len(texts[0]) < 8 else ""
        detail = _shortened(texts[1])
        if kind == b"refused":
            raise self._error(f"the chat template refuses these messages: {detail}")
        if kind == b"too long":
            raise self._error(f"the chat template makes more than {bounds.most_chars} characters{line}")
        if kind == b"no memory":
            raise self._error(
                f"the chat template needs more than {format_bytes(bounds.memory_bytes)} of memory{line}; it may be a "
                "malicious file"
            )
        raise self._error(f"the chat template failed{line}: {detail}")

    def _error(self, text: str) -> TemplateError:
        return TemplateError(text, self._path)

    def _forget(self) -> None:
        """Leave the process to the parent of a forked child, which may hold locks here that nobody will release."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # it is no child of this process
        self._turn = threading.Lock()
        self._process = self._finalizer = None


@attrs.frozen
class _Bounds:
    """Bounds of one call."""

    memory_bytes: int  # beyond what the process has at its start
    cpu_s: int
    most_chars: int  # of a rendering

    @classmethod
    def of(cls, template_chars: int, n_messages: int, content_bytes: int) -> _Bounds:
        """Return what a call may take, by the sizes of the template and of the messages in all renderings."""
        n_chars = TEXT_CHARS + TEXT_CHARS_PER_MESSAGE * n_messages + TEXT_CHARS_PER_CONTENT_BYTE * content_bytes
        return cls(
            memory_bytes=plan_bytes(template_chars)
            - START_BYTES
            + BYTES_PER_MESSAGE * n_messages
            + BYTES_PER_CONTENT_BYTE * content_bytes,
            cpu_s=CPU_S + math.ceil(template_chars / TEMPLATE_CHARS_PER_S + content_bytes / CONTENT_BYTES_PER_S),
            most_chars=min(n_chars, MOST_TEXT_CHARS),
        )


def _private_bytes(pid: int) -> int:
    """Return the memory of a child that is its own; proc_pid_statm(5)."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split())
    return (resident - shared) * resource.getpagesize()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End and reap the process, unless it is that of the process that this one was forked from."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def _import_paths(*packages: str) -> list[str]:
    """Return the folders that packages are in."""
    paths: list[str] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None:
            paths += (str(Path(place).parent) for place in spec.submodule_search_locations or ())
    return list(dict.fromkeys(paths))


def _shortened(text: str) -> str:
    """Return a text of the model file's as one short line that a terminal can show."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MOST_DETAIL_CHARS else line[: MOST_DETAIL_CHARS - 3] + "..."


_renderers: weakref.WeakSet[Renderer] = weakref.WeakSet()


def _after_fork() -> None:
    for renderer in list(_renderers):
        renderer._forget()


os.register_at_fork(after_in_child=_after_fork)
