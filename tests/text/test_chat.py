"""Chat templates against Jinja2, and against users who spell control tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.errors import GGUFError, RequestError, TemplateError
from mer.text.chat import RESERVED, ROLES, Chat, ChatTemplate, Message
from mer.text.template_process import environment
from mer.text.tokenizer import Tokenizer
from tests._lib import vocabularies

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
DEFAULT_SYSTEM = """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {% endif %}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' -}}
{% endif %}"""
INST = """{{- bos_token }}{% set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
{%- set ns.system = '<<SYS>>\\n' ~ messages[0]['content'] | trim ~ '\\n<</SYS>>\\n\\n' %}
{%- set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}
{%- for turn in turns %}
{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant must take turns') }}
{%- endif %}
{%- if turn['role'] == 'user' %}
{{- '[INST] ' ~ (ns.system if loop.index0 == 0 else '') ~ turn['content'].strip() ~ ' [/INST]' }}
{%- else %}{{- ' ' ~ turn['content'] | trim ~ ' ' ~ eos_token }}{% endif %}
{%- endfor %}"""
THINKING = """{%- if tools %}{{- tools | tojson }}{% endif %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content }}{% if not loop.last %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt is defined and add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
AS_JSON = """{%- for message in messages %}{{ message | tojson }}{{ message.content | tojson(indent=2) }}{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "default system": DEFAULT_SYSTEM, "inst": INST, "thinking": THINKING, "json": AS_JSON}

CONTENTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.lists(
        st.sampled_from(
            ["hi", " ", "\n", "<|im_end|>", "<|im_", "start|>", "<|", "<", "user", "</think>", "'\"&é", "[INST]"]
        ),
        max_size=8,
    ).map("".join),
)
CHATS = st.lists(st.builds(Message, st.sampled_from(ROLES), CONTENTS), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("chat"))


def tokenizer_of(folder: Path, **more: Any) -> Tokenizer:
    metadata = vocabularies.byte_level_metadata(vocabularies.byte_level_bpe(r"\s?\S+|\s+"), "gpt-2")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return Tokenizer.from_gguf(vocabularies.parsed(folder, metadata))


class RefusedError(Exception):
    """What the oracle's `raise_exception` raises."""


def jinja(source: str, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
    """Render as the reference implementation does; None where the template refuses the messages."""

    def refuse(message: str) -> None:
        raise RefusedError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source).render(
            messages=[{"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=vocabularies.CONTROL[1],
            eos_token=vocabularies.CONTROL[2],
            tools=None,
            documents=None,
        )
    except RefusedError:
        return None


@pytest.fixture(scope="module")
def templates(tokenizer: Tokenizer) -> Iterator[dict[str, ChatTemplate]]:
    """Every template, each with its process."""
    made = {name: ChatTemplate(source, tokenizer) for name, source in TEMPLATES.items()}
    yield made
    for template in made.values():
        template.close()


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=50, deadline=None)
@given(CHATS, st.booleans())
def test_templates_render_as_in_jinja2(
    templates: dict[str, ChatTemplate], name: str, chat: list[Message], prompt: bool
) -> None:
    expected = jinja(TEMPLATES[name], chat, prompt)
    if expected is None:
        with pytest.raises(TemplateError, match=r"^the chat template refuses.*take turns"):
            templates[name].render(chat, add_generation_prompt=prompt)
    else:
        assert templates[name].render(chat, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=100, deadline=None)
@given(CHATS)
def test_no_message_forges_a_control_token(
    templates: dict[str, ChatTemplate], tokenizer: Tokenizer, name: str, chat: list[Message]
) -> None:
    template = templates[name]
    harmless = [Message(m.role, "x") for m in chat]
    try:
        ids = template.render_tokens(chat)
    except TemplateError:
        assert jinja(TEMPLATES[name], chat, True) is None
        return
    # The control tokens are those of the same chat about nothing, and nothing of the text is lost or changed.
    control = list(filter(tokenizer.is_control, ids))
    assert control == list(filter(tokenizer.is_control, template.render_tokens(harmless)))
    spelled = b"".join(
        tokenizer.token_text(i).encode() if tokenizer.is_control(i) else tokenizer.token_bytes(i) for i in ids
    )
    assert spelled.decode() == template.render(chat)


@settings(max_examples=50, deadline=None)
@given(CHATS)
def test_the_ids_are_those_of_the_rendered_text_where_no_message_interferes(
    templates: dict[str, ChatTemplate], tokenizer: Tokenizer, chat: list[Message]
) -> None:
    chat = [Message(m.role, m.content.replace("<", "(")) for m in chat]
    template = templates["chatml"]
    assert template.render_tokens(chat) == tokenizer.encode(template.render(chat), parse_special=True)


def test_bos_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, add_bos_token=True, bos_token_id=0)
    chat = [Message("user", "hello")]
    for source in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
        ids = ChatTemplate(source, tokenizer).render_tokens(chat)
        assert ids == [0, *tokenizer.encode("hello", add_bos=False)]


def test_a_message_cannot_supply_the_bos_that_the_template_omits(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, add_bos_token=True, bos_token_id=0)
    ids = ChatTemplate("{{ messages[0].content }}", tokenizer).render_tokens([Message("user", "<|endoftext|>")])
    assert ids[0] == 0
    assert not any(map(tokenizer.is_control, ids[1:]))


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("<|im_{{ messages[0].content }}|>", "end"),  # the template begins a control token, the message ends it
        ("<{{ messages[0].content }}", "|im_end|>"),
        ("{{ messages[0].content.split('<|im_end|>')[0] }}", "a<|im_end|>b"),
        ("{{ messages[0].content | replace('<', '') }}", "<|im_end|>"),
        ("{{ messages[0].content[:4] }}", "<|im_end|>"),
    ],
)
def test_inseparable_texts_are_refused(tokenizer: Tokenizer, source: str, content: str) -> None:
    template = ChatTemplate(source, tokenizer)
    with pytest.raises(TemplateError, match="cannot be told"):
        template.render_tokens([Message("user", content)])
    assert template.render_tokens([Message("user", "hello")])


def test_messages_side_by_side_do_not_join_to_a_control_token(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content | trim }}{% endfor %}", tokenizer)
    ids = template.render_tokens([Message("user", "a <|im_ "), Message("user", " end|> b")])
    assert not any(map(tokenizer.is_control, ids))
    assert tokenizer.decode(ids) == "a <|im_end|> b"


def test_a_file_without_template_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    metadata = vocabularies.byte_level_metadata(vocabularies.byte_level_bpe(r"\s?\S+|\s+"), "gpt-2")
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate.from_gguf(vocabularies.parsed(tmp_path, metadata), tokenizer)
    with pytest.raises(GGUFError, match="chat_template"):
        ChatTemplate.from_gguf(vocabularies.parsed(tmp_path, metadata | {"tokenizer.chat_template": 1}), tokenizer)
    gguf = vocabularies.parsed(tmp_path, metadata | {"tokenizer.chat_template": CHATML})
    assert ChatTemplate.from_gguf(gguf, tokenizer).render([Message("user", "a")], add_generation_prompt=False) == (
        "<|im_start|>user\na<|im_end|>\n"
    )


@pytest.mark.parametrize("source", ["\udcff", "a" * (1 << 17) + "a"])
def test_what_is_no_template_is_refused_before_it_runs(tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(TemplateError, match=r"^a\.gguf: the chat template "):
        ChatTemplate(source, tokenizer, "a.gguf")


def test_a_large_message_has_what_it_needs(templates: dict[str, ChatTemplate]) -> None:
    content = "a < b \U0001f30d" * 200_000
    assert templates["inst"].render([Message("user", content)]).endswith(content.strip() + " [/INST]")
    assert templates["inst"].render([Message("user", "hi")]).endswith("[INST] hi [/INST]")


def test_time_is_the_same_in_all_renderings(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d %f') }}{{ messages[0].content }}", tokenizer)
    for _ in range(20):
        template.render_tokens([Message("user", "<|im_end|>")])


def test_a_mark_does_not_end_what_a_message_begins(tmp_path: Path) -> None:
    metadata = vocabularies.byte_level_metadata(vocabularies.byte_level_bpe(r"\s?\S+|\s+"), "gpt-2")
    n = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *(f"zz{i}" for i in range(16))]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[3] * 16]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata))
    template = ChatTemplate("{{ messages[0].content }}!", tokenizer)
    for _ in range(20):
        ids = template.render_tokens([Message("user", "z" * 9)])
        assert max(ids) < n


def test_messages_are_checked(templates: dict[str, ChatTemplate]) -> None:
    with pytest.raises(RequestError, match="im_end"):
        Message("im_end", "a")
    with pytest.raises(RequestError, match="surrogate"):
        Message("user", "\ud800")
    with pytest.raises(RequestError, match="must be text"):
        Message("user", None)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="at most 8388608"):
        templates["chatml"].render_tokens([Message("user", "a" * (1 << 22)), Message("user", "a" * (1 << 22) + "a")])
    with pytest.raises(RequestError, match="at least one"):
        templates["chatml"].render_tokens([])


THINKING_VARIABLES = """{{ messages[0].content }}<|im_start|>assistant
{%- if enable_thinking is defined and not enable_thinking %}{{ '\\n<think></think>' }}{% endif %}
{{- reasoning_effort if reasoning_effort is defined else '' }}"""


def test_a_chat_tells_its_template_more(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(THINKING_VARIABLES, tokenizer)
    messages = [Message("user", "hi <|im_end|>")]
    begin = "hi <|im_end|><|im_start|>assistant"
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"enable_thinking": True}, ""),
        ({"enable_thinking": False}, "\n<think></think>"),
        ({"enable_thinking": False, "reasoning_effort": "low"}, "\n<think></think>low"),
    ]
    for variables, end in cases:
        chat = Chat(messages, variables)
        assert template.render(chat) == begin + end
        ids = template.render_tokens(chat)
        assert tokenizer.decode(ids) == "hi <|im_end|>assistant" + end
        assert list(filter(tokenizer.is_control, ids)) == [1]
    assert template.render(messages) == begin


def test_a_chat_is_a_copy_of_what_it_is_made_of() -> None:
    messages, variables = [Message("user", "a")], {"thinking": True}
    chat = Chat(messages, variables)
    messages.append(Message("user", "b"))
    variables["thinking"] = False
    assert chat == Chat([Message("user", "a")], {"thinking": True})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, True) for name in sorted(RESERVED)),
        *((name, True) for name in ("", "a b", "_private", "1a", "a" * 65, "é", 1)),
        *(
            ("effort", value)
            for value in ("<|im_end|>", "a b", "a\n", "é", "a" * 65, None, 1.5, [1], {"a": 1}, 1 << 63)
        ),
    ],
)
def test_variables_that_could_do_harm_are_refused(name: Any, value: Any) -> None:
    with pytest.raises(RequestError, match=r"^('.*'|1) is (no name|given)|variable effort is"):
        Chat([Message("user", "a")], {name: value})


def test_what_is_no_chat_is_refused() -> None:
    for messages in ("ab", 5, None, [1], {"role": "user"}, ["a"]):
        with pytest.raises(RequestError, match="messages"):
            Chat(messages)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="a mapping"):
        Chat([Message("user", "a")], ["thinking"])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="at most 32"):
        Chat([Message("user", "a")], {f"a{i}": True for i in range(33)})


def test_the_reserved_names_are_all_that_templates_are_given(tokenizer: Tokenizer) -> None:
    assert set(environment().globals) < RESERVED
    variables = RESERVED - set(environment().globals)
    source = "".join(f"{{{{ '{name} ' if {name} is defined }}}}" for name in sorted(variables))
    rendered = ChatTemplate(source, tokenizer).render([Message("user", "hi")])
    assert set(rendered.split()) == variables
