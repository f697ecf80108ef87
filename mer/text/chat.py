"""Chat messages to token ids, with the template that a model file carries.

The template is a program of the file's author and the messages are text of a user, so both are kept from doing harm.
The template runs in a confined process (`renderer`). A message that spells a control token ("<|im_end|>") is encoded as
plain text: only the template's own spellings become control tokens.
Reference: Jinja templates as `tokenizer.chat_template` in the GGUF specification.
"""

from __future__ import annotations

import datetime
import os
import re
import secrets
import string
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs

from mer.errors import RequestError, TemplateError
from mer.io.gguf_file import GGUFFile
from mer.text.renderer import MAX_TEMPLATE_CHARS, Call, Renderer, TemplateInput
from mer.text.tokenizer import Tokenizer, unheard

MAX_CHAT_CHARS = 1 << 23  # two million tokens
MAX_TEMPLATE_KWARGS = 32
RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"),
    }
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9_.\-]{0,64}")
ROLES = ("system", "developer", "user", "assistant", "tool")


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


def _messages(given: Iterable[Message]) -> Sequence[Message]:
    """Return messages as a sequence of their own, if they are such."""
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        raise RequestError(f"a chat is a list of messages, not {type(given).__name__}")
    messages = tuple(given)
    for message in messages:
        if not isinstance(message, Message):
            raise RequestError(f"a chat has messages, not {type(message).__name__}")
    return messages


def _variables(given: Mapping[str, str | bool | int]) -> Mapping[str, str | bool | int]:
    """Return the variables of a template as a mapping of its own, if they are one."""
    if not isinstance(given, Mapping):
        raise RequestError(f"template_kwargs is a mapping of names to values, not {type(given).__name__}")
    return dict(given)


@attrs.frozen
class Chat:
    """A chat as a prompt, with what its template is told besides the messages.

    Attributes:
        messages: the chat so far.
        template_kwargs: variables of the template by name, such as `enable_thinking`, `thinking` and
            `reasoning_effort`. Templates ask whether these are defined: what is not here is not.

    Raises:
        RequestError: a message is none; or a name is none that a template can use, or is one that the program gives; or
            a value is not a bool, a whole number or a word (up to 64 ASCII letters, digits, "_", "." and "-").
    """

    messages: Sequence[Message] = attrs.field(converter=_messages)
    template_kwargs: Mapping[str, str | bool | int] = attrs.field(factory=dict, converter=_variables)

    def __attrs_post_init__(self) -> None:
        if len(self.template_kwargs) > MAX_TEMPLATE_KWARGS:
            raise RequestError(
                f"{len(self.template_kwargs)} variables of a chat template; at most {MAX_TEMPLATE_KWARGS} are allowed"
            )
        for name, value in self.template_kwargs.items():
            if not isinstance(name, str) or _NAME.fullmatch(name) is None:
                raise RequestError(f"{name!r} is no name of a chat template's variable; try 'enable_thinking'")
            if name in RESERVED:
                raise RequestError(f"{name!r} is given to chat templates by the program; choose another variable")
            # A text of any characters could forge a control token, as a message's could.
            if not isinstance(value, bool | int | str) or (isinstance(value, str) and _WORD.fullmatch(value) is None):
                raise RequestError(
                    f"the chat template's variable {name} is {value!r}; it must be a bool, a whole number or a word of "
                    "letters, digits, '_', '.' and '-'"
                )
            if not isinstance(value, str) and abs(value) >= 1 << 63:
                raise RequestError(f"the chat template's variable {name} is a number of more than 63 bits")


class ChatTemplate:
    """Renders chats for one model.

    Whether the template is well-formed shows when it first renders. It runs in a separate process (`Renderer`), which
    ends when the template is closed or collected.

    Args:
        source: the Jinja template.
        tokenizer: the tokenizer of the same model.
        path: the model file, for errors.

    Raises:
        TemplateError: the template is too long or not valid Unicode.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, path: str | os.PathLike[str] | None = None) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are supported", path
            )
        try:
            source.encode()
        except UnicodeEncodeError as error:
            raise TemplateError(
                f"the chat template is not valid UTF-8 at character {error.start}; convert the model again", path
            ) from None
        self._path = path
        self._tokenizer = tokenizer
        self._renderer = Renderer(source, path)

    @classmethod
    def from_gguf(cls, gguf: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate:
        """Return the template that a GGUF file carries as `tokenizer.chat_template`.

        Raises:
            TemplateError: there is none, it is too long or not valid Unicode.
            GGUFError: it is not a string.
        """
        source = gguf.get_str("tokenizer.chat_template", None)
        if source is None:
            raise TemplateError(
                "the file has no chat template (tokenizer.chat_template): it can continue a text, not a chat",
                gguf.paths[0],
            )
        return cls(source, tokenizer, gguf.paths[0])

    def close(self) -> None:
        """End the template's process; running and later calls raise TemplateError."""
        self._renderer.close()

    def render(self, chat: Chat | Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the chat as text, for people to read; encoding it would let messages forge control tokens.

        Blocks as `render_parts` does.

        Raises:
            TemplateError: the template is malformed, failed, refused the messages, or took too much.
        """
        chat = _chat(chat)
        (text,) = self._render(chat, [[m.content for m in chat.messages]], add_generation_prompt, None)
        return text

    def render_tokens(self, chat: Chat | Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the chat as token ids that the model can continue; blocks and raises as `render_parts` does."""
        return self.encode_parts(self.render_parts(chat, add_generation_prompt=add_generation_prompt))

    def encode_parts(self, parts: Sequence[str | int], *, progress: Callable[[int], None] = unheard) -> list[int]:
        """Return the token ids of what `render_parts` gives.

        The beginning-of-sequence token that the file asks for goes first, unless the template has written it. What
        `progress` raises, which is told again and again how many ids there are already, ends the encoding.
        """
        begins = bool(parts) and parts[0] == self._tokenizer.bos_id
        return self._tokenizer.encode_parts(parts, add_bos=False if begins else None, progress=progress)

    def render_parts(
        self, chat: Chat | Sequence[Message], *, add_generation_prompt: bool = True, call: Call | None = None
    ) -> list[str | int]:
        """Return the chat as plain texts and the ids of the control tokens between them.

        The chat is rendered with the first character of everything in the messages that might spell a control token, or
        a part of one, replaced by an unguessable mark. The control tokens found in that rendering are therefore the
        template's own. The marks are undone in the text between them.

        Blocks while the template runs: a millisecond or two, at the first call a tenth of a second, and some seconds
        if the template is malicious. Threads wait for one another.

        Args:
            chat: the chat so far, of at least one message.
            add_generation_prompt: whether the beginning of the assistant's answer is part of it.
            call: by which another thread can give up.

        Raises:
            RequestError: there are no messages, or they have more than 8,388,608 characters.
            TemplateError: the template is malformed, failed, refused the messages, took too much, or mixes them so with
                control tokens that the two cannot be told apart.
        """
        chat = _chat(chat)
        if not chat.messages:
            raise RequestError("a chat needs at least one message")
        contents = [m.content for m in chat.messages]
        n_chars = sum(map(len, contents))
        if n_chars > MAX_CHAT_CHARS:
            raise RequestError(
                f"the messages have {n_chars} characters; chats of at most {MAX_CHAT_CHARS} are rendered"
            )
        # Letters, because control tokens often end in digits, and a mark must not end one that a message begins.
        key = "".join(secrets.choice(string.ascii_lowercase) for _ in range(28))
        marked = [self._mark(content, key) for content in contents]
        fence = secrets.token_hex(8)
        wanted = [marked, [_fence(content, fence) for content in marked]]
        if marked != contents:
            wanted.append(contents)
        rendered, fenced, *unmarked = self._render(chat, wanted, add_generation_prompt, call)
        parts = self._tokenizer.split_special(rendered)
        restored: list[str | int] = [_restore(part, key) if isinstance(part, str) else part for part in parts]
        # A control token that the template's text begins and a message ends would fall apart between fences.
        tokens = _control_ids(self._tokenizer.split_special(fenced))
        if _control_ids(parts) != tokens or any(self._spell(restored) != plain for plain in unmarked):
            raise TemplateError(
                "the chat template treats control tokens inside of messages in a way that cannot be told from its own; "
                "remove them from the messages",
                self._path,
            )
        return restored

    def _render(
        self,
        chat: Chat,
        contents: Sequence[Sequence[str]],
        add_generation_prompt: bool,
        call: Call | None,
    ) -> list[str]:
        """Render the messages once with each of the contents."""
        tokenizer = self._tokenizer
        variables: dict[str, str | bool | int] = {
            **chat.template_kwargs,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
            "eos_token": "" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id),
        }
        given = TemplateInput(
            roles=[m.role for m in chat.messages], contents=contents, variables=variables, now=datetime.datetime.now()
        )
        return self._renderer.render(given, call)

    def _mark(self, content: str, key: str) -> str:
        """Replace the first character of whatever may spell a control token, or begin one at the content's end."""
        starts = set(self._tokenizer.control_starts(content))
        return "".join(f"{key}{ord(c):06x}" if i in starts else c for i, c in enumerate(content)) if starts else content

    def _spell(self, parts: Sequence[str | int]) -> str:
        return "".join(self._tokenizer.token_text(part) if isinstance(part, int) else part for part in parts)


def _chat(chat: Chat | Sequence[Message]) -> Chat:
    return chat if isinstance(chat, Chat) else Chat(chat)


def _restore(text: str, key: str) -> str:
    return re.sub(key + "([0-9a-f]{6})", lambda match: chr(int(match[1], 16)), text)


def _fence(content: str, key: str) -> str:
    """Put unguessable text at both ends, inside of the white space that a template may trim."""
    core = content.strip()
    return content.replace(core, f"{key}{core}{key}", 1) if core else content


def _control_ids(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]
