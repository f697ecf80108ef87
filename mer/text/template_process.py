"""The process that renders the chat template of one model file; `mer.text.renderer` starts it and talks to it.

It runs Jinja2 as transformers sets it up, because templates are written for that: the same sandbox, tags and functions.
It knows the standard library and Jinja2 alone, so that it starts fast and is small. It reads requests from its standard
input and writes answers to its standard output, each with its length before it, until its standard input ends.

A request is JSON: the template, what it sees, and what it may take. An answer is a list of byte strings, each with its
length before it: `RENDERED` and the texts; or what went wrong, the line of the template, and what Jinja2 says of it.
Reference: transformers, utils/chat_template_utils.py.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if __name__ == "__main__":  # an isolated interpreter: arguments say where Jinja2 and the file next to this one are
    sys.path += sys.argv[1:]

import jinja2
import jinja2.debug  # which Jinja2 itself imports when a template fails, and then it is too late
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

if TYPE_CHECKING or __name__ != "__main__":
    from mer.text.confinement import Confinement
else:
    from confinement import Confinement

RENDERED, REFUSED, FAILED, TOO_LONG, NO_MEMORY = b"rendered", b"refused", b"failed", b"too long", b"no memory"
_MOST_DETAIL = 1000  # characters of what Jinja2 says; the other side shows fewer
_TEMPLATE_FILE = "<template>"  # what Jinja2 calls it in tracebacks

# What Jinja2 imports only when it needs it, and what reads the time zone: there are no files later.
_WARM_UP = (
    "{% macro m(x) %}{{ x }}{% endmacro %}"
    "{% for a in [{'b': 'c\\n\\u00e9'}] %}{{ m(a) | wordwrap | pprint }}{% endfor %}"
    "{{ strftime_now('%c %Z') }}{{ lipsum(1) }}{{ '<b>' | striptags }}{{ 'a'.encode('utf-16') }}"
)


class Refused(Exception):
    """The template called `raise_exception`."""


class TooLong(Exception):
    """The text is longer than it may be."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, by which transformers finds what the assistant said; the block renders as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja2 declares it

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Return the block as a call of its body, so that names in it have the scope that they have in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """`namespace()`, which keeps no names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in it
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Dictionary:
    """`dict()`, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return a dictionary with these keys."""
        return dict.fromkeys(*args, **kwargs)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _raise_exception(message: object = "") -> NoReturn:
    raise Refused(message)


def _clock(now: datetime.datetime) -> Callable[[str], str]:
    def strftime_now(time_format: str) -> str:
        return now.strftime(time_format)

    strftime_now.__qualname__ = "strftime_now"  # which errors show
    return strftime_now


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as templates expect it: no HTML escapes, and by default characters as they are and keys in order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """Return Jinja2 as transformers sets it up, with more that templates of model files need.

    These are the filter `from_json` (DeepSeek), and methods that change lists and dictionaries: all that a template can
    change was made for its rendering.
    """
    made = jinja2.sandbox.SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.filters["from_json"] = json.loads
    made.globals |= {"raise_exception": _raise_exception, "dict": Dictionary(), "namespace": Namespace}
    return made


class Renderer:
    """Renders one template after another, and keeps the last one compiled."""

    def __init__(self) -> None:
        self._environment = environment()
        self._source: str | None = None
        self._template = self._compiled(_WARM_UP)
        self._render({"strftime_now": _clock(datetime.datetime.now())}, 1 << 20)

    def answer(self, request: dict[str, Any], confinement: Confinement) -> list[bytes]:
        """Return the texts of a request, or what went wrong."""
        try:
            try:
                confinement.grant(request["memory_bytes"], request["cpu_s"], time.process_time())
                self._template = self._compiled(request["template"])
                texts = [self._text(request, contents) for contents in request["contents"]]
            finally:
                confinement.lift()
            return [RENDERED, *texts]
        except Refused as refused:
            return self._failure(REFUSED, refused, _said(refused))
        except TooLong as error:
            return self._failure(TOO_LONG, error, "")
        except MemoryError as error:
            return self._failure(NO_MEMORY, error, "")
        except RecursionError as error:
            return self._failure(FAILED, error, "it nests too deep")
        except UnicodeEncodeError as error:
            return self._failure(FAILED, error, "it makes text that is not valid Unicode")
        except (jinja2.TemplateError, SyntaxError) as error:
            return self._failure(FAILED, error, _said(error))
        except Exception as error:  # whatever the functions raise that it calls: the other side raises its own error
            return self._failure(FAILED, error, f"{type(error).__name__}: {_said(error)}")

    def _compiled(self, source: str) -> jinja2.Template:
        if source != self._source:
            self._source = None
            self._template = self._environment.from_string(source)
            self._source = source
        return self._template

    def _text(self, request: dict[str, Any], contents: list[str]) -> bytes:
        now = datetime.datetime(*request["now"])  # one time for all renderings

        variables = request["variables"] | {
            "messages": [{"role": r, "content": c} for r, c in zip(request["roles"], contents, strict=True)],
            "strftime_now": _clock(now),
        }
        return self._render(variables, request["most_chars"]).encode()

    def _render(self, variables: dict[str, Any], most_chars: int) -> str:
        """Run the template: the only place that does."""
        template = self._template
        pieces: list[str] = []
        n_chars = 0
        for piece in template.root_render_func(template.new_context(variables)):
            pieces.append(piece)
            n_chars += len(piece)
            if n_chars > most_chars:
                raise TooLong
        return "".join(pieces)

    def _failure(self, kind: bytes, error: BaseException, said: str) -> list[bytes]:
        line = getattr(error, "lineno", None) if isinstance(error, jinja2.TemplateSyntaxError) else None
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == _TEMPLATE_FILE:
                line = self._template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        return [kind, str(line or "").encode(), said[:_MOST_DETAIL].encode(errors="replace")]


def _said(error: BaseException) -> str:
    """Return the text of an error, which templates may choose and may make unprintable."""
    try:
        return str(error)
    except Exception as another:  # a namespace within itself, for example
        return f"(its text cannot be shown: {type(another).__name__})"


def _read(n_bytes: int) -> bytes:
    """Return so many bytes of standard input, or fewer at its end."""
    data = bytearray()
    while len(data) < n_bytes and (piece := os.read(0, min(n_bytes - len(data), 1 << 20))):
        data += piece
    return bytes(data)


def _write(fields: list[bytes]) -> None:
    payload = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    data = memoryview(len(payload).to_bytes(8, "little") + payload)
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    """Confine the process, say whether the kernel filters its calls, and answer requests until there are no more."""
    renderer = Renderer()
    confinement = Confinement()
    _write([b"filtered" if confinement.filtered else b"not filtered"])
    while len(length := _read(8)) == 8:
        request = json.loads(_read(int.from_bytes(length, "little")))
        _write(renderer.answer(request, confinement))


if __name__ == "__main__":
    main()
