"""Chat messages to token ids, with the template that a model file carries.

The template is a program of the file's author and the messages are text of a user, so both are kept from doing harm.
The template runs in minijinja, which gives it no access to Python and a limited amount of work. A message that spells a
control token ("<|im_end|>") is encoded as plain text: only the template's own spellings become control tokens.
Reference: Jinja templates as `tokenizer.chat_template` in the GGUF specification.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import minijinja

from mer.errors import RequestError, TemplateError
from mer.io.gguf_file import GGUFFile
from mer.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 1 << 20
_NAME = "chat template"
_FUEL = 1_000_000
_FUEL_PER_CHARACTER = 50
_MAX_TIME_FORMAT_CHARS = 100
_MAX_INDENT = 16


@attrs.frozen
class Message:
    """One message of a chat.

    Attributes:
        role: one of "system", "developer", "user", "assistant" and "tool"; templates build control tokens from it.
        content: the text, which is never more than text.

    Raises:
        RequestError: the role is another one, or the content is not valid Unicode text.
    """

    role: str
    content: str

    def __attrs_post_init__(self) -> None:
        if self.role not in ROLES:
            raise RequestError(f"{self.role!r} is not a role of a message; the roles are {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise RequestError(f"the content of a message must be text, not {type(self.content).__name__}")
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"a message has a lone surrogate at position {error.start}; give valid Unicode"
            ) from None


class ChatTemplate:
    """Renders chats for one model.

    Args:
        source: the Jinja template.
        tokenizer: the tokenizer of the same model.

    Raises:
        TemplateError: the template is not well-formed.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are supported"
            )
        self._tokenizer = tokenizer
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            auto_escape_callback=lambda _name: False,
            filters={"tojson": _to_json, "trim": _trim},
            globals={"raise_exception": _raise_exception},
            debug=False,
        )
        try:
            self._environment.add_template(_NAME, source)
        except (minijinja.TemplateError, UnicodeEncodeError) as error:
            raise TemplateError(f"the model file's chat template is malformed: {error}") from error

    @classmethod
    def from_gguf(cls, gguf: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate:
        """Return the template that a GGUF file carries as `tokenizer.chat_template`.

        Raises:
            TemplateError: there is none, or it is malformed.
            GGUFError: it is not a string.
        """
        source = gguf.get_str("tokenizer.chat_template", None)
        if source is None:
            raise TemplateError(
                "the model file has no chat template (tokenizer.chat_template): it can continue a text, not a chat"
            )
        return cls(source, tokenizer)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the chat as text, for people to read; encoding it would let messages forge control tokens.

        Raises:
            TemplateError: the template failed, refused the messages, or worked too long.
        """
        return self._render(messages, [m.content for m in messages], add_generation_prompt, datetime.datetime.now())

    def render_tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the chat as token ids, ready to be continued by the model.

        The chat is rendered with the first character of everything in the messages that might spell a control token, or
        a part of one, replaced by an unguessable mark. The control tokens found in that rendering are therefore the
        template's own. The marks are undone in the text between them.

        Args:
            messages: the chat so far, at least one.
            add_generation_prompt: whether the beginning of the assistant's answer is part of it.

        Raises:
            RequestError: there are no messages.
            TemplateError: the template failed, refused the messages, worked too long, or mixes them so with control
                tokens that the two cannot be told apart.
        """
        if not messages:
            raise RequestError("a chat needs at least one message")
        now = datetime.datetime.now()  # One time for all renderings.

        def rendering(contents: list[str]) -> str:
            return self._render(messages, contents, add_generation_prompt, now)

        plain = rendering([m.content for m in messages])
        key = secrets.token_hex(16)
        marked = [self._mark(m.content, key) for m in messages]
        parts = self._tokenizer.split_special(rendering(marked))
        restored: list[str | int] = [_restore(part, key) if isinstance(part, str) else part for part in parts]
        # A control token that the template's text begins and a message ends would fall apart between fences.
        fenced = self._tokenizer.split_special(rendering([_fence(content) for content in marked]))
        if self._spell(restored) != plain or _control_ids(parts) != _control_ids(fenced):
            raise TemplateError(
                "the chat template treats control tokens inside of messages in a way that cannot be told from its own; "
                "remove them from the messages"
            )
        begins = bool(restored) and restored[0] == self._tokenizer.bos_id
        return self._tokenizer.encode_parts(restored, add_bos=False if begins else None)

    def _render(
        self, messages: Sequence[Message], contents: Sequence[str], add_generation_prompt: bool, now: datetime.datetime
    ) -> str:
        """Run the template: the only place that does."""
        tokenizer = self._tokenizer
        self._environment.fuel = _FUEL + _FUEL_PER_CHARACTER * sum(map(len, contents))
        try:
            return self._environment.render_template(
                _NAME,
                messages=[{"role": m.role, "content": c} for m, c in zip(messages, contents, strict=True)],
                add_generation_prompt=add_generation_prompt,
                bos_token="" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
                eos_token="" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id),
                strftime_now=_clock(now),
                tools=None,
                documents=None,
            )
        except _RefusedError as refused:
            raise TemplateError(f"the model's chat template refuses these messages: {refused}") from None
        except minijinja.TemplateError as error:
            if error.kind == "OutOfFuel":
                raise TemplateError(
                    "the model's chat template does too much work; it may be a malicious file"
                ) from error
            raise TemplateError(f"the model's chat template failed: {error}") from error
        except (TypeError, ValueError) as error:  # from the functions that it may call
            raise TemplateError(f"the model's chat template failed: {error}") from error

    def _mark(self, content: str, key: str) -> str:
        """Replace the first character of whatever may spell a control token, or begin one at the content's end."""
        starts = set(self._tokenizer.control_starts(content))
        return "".join(f"{key}{ord(c):06x}" if i in starts else c for i, c in enumerate(content)) if starts else content

    def _spell(self, parts: Sequence[str | int]) -> str:
        return "".join(self._tokenizer.token_text(part) if isinstance(part, int) else part for part in parts)


class _RefusedError(Exception):
    """The template called `raise_exception`."""


def _raise_exception(message: object = "") -> None:
    raise _RefusedError(str(message))


def _clock(now: datetime.datetime) -> Callable[[str], str]:
    def strftime_now(time_format: str) -> str:
        if len(time_format) > _MAX_TIME_FORMAT_CHARS:
            raise ValueError(f"strftime_now: the format has more than {_MAX_TIME_FORMAT_CHARS} characters")
        return now.strftime(time_format)

    return strftime_now


def _trim(value: object, chars: str | None = None) -> str:
    """Take white space off both ends as Jinja2 does: what Python calls so, with the separators U+001C to U+001F."""
    return "" if value is None else str(value).strip(chars)


def _to_json(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as templates expect it: no HTML escapes, and by default characters as they are and keys in order."""
    if indent is not None and not 0 <= indent <= _MAX_INDENT:
        raise ValueError(f"tojson: the indent must be 0 to {_MAX_INDENT}")
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)


def _restore(text: str, key: str) -> str:
    return re.sub(key + "([0-9a-f]{6})", lambda match: chr(int(match[1], 16)), text)


def _fence(content: str) -> str:
    """Put unguessable text at both ends, inside of the white space that a template may trim."""
    core = content.strip()
    return content.replace(core, f"{secrets.token_hex(8)}{core}{secrets.token_hex(8)}", 1) if core else content


def _control_ids(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]
