"""Chats in an engine: a template that never ends costs its own caller alone, and no process is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

import mer
from tests._lib.tiny_models import TinyModel, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}
{%- if 'for ever' in messages[0].content %}
{%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"""
HI = [mer.Message("user", "hi")]
FOR_EVER = [mer.Message("user", "for ever")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", metadata={"tokenizer.chat_template": TEMPLATE})


@pytest.fixture
async def engine(tiny: TinyModel) -> mer.Engine:  # type: ignore[misc]
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=1) as opened:
        yield opened


def process_of(engine: mer.Engine) -> int:
    template = engine._template
    assert template is not None
    process = template._renderer._process
    assert process is not None
    return process.pid


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_cancelling_ends_a_rendering_while_others_generate(
    engine: mer.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mer.text.renderer.CPU_S", 1 << 20)
    for calls in (engine.generate, engine.encode_prompt):
        await engine.encode_prompt(HI)
        pid = process_of(engine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls, FOR_EVER)
            nursery.start_soon(calls, FOR_EVER)  # waits for the first
            done = await engine.generate("the cat", max_tokens=2)
            nursery.cancel_scope.cancel()
        assert len(done.tokens) == 2
        assert engine.encode(HI) == engine.encode("<user>hi") == await engine.encode_prompt(HI)
        assert process_of(engine) != pid or not is_there(pid)


async def test_a_chat_as_a_prompt_tells_its_template_more(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{{ ' thinks' if thinking is defined and thinking }}"
    model = tiny_model(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": template})
    async with mer.open_engine(model.path, memory=MEMORY, threads=1) as engine:
        for variables, text in (({}, "hi"), ({"thinking": False}, "hi"), ({"thinking": True}, "hi thinks")):
            chat = mer.Chat(HI, variables)
            assert engine.encode(chat) == await engine.encode_prompt(chat) == engine.encode(text)
            done = await engine.generate(chat, max_tokens=1)
            assert done.usage.prompt_tokens == len(engine.encode(text))


async def test_a_template_that_never_ends_fails_its_call(engine: mer.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mer.text.renderer.CPU_S", 0)
    with pytest.raises(mer.TemplateError, match="works for more than 1 s"):
        await engine.generate(FOR_EVER)
    assert engine.encode(HI) == engine.encode("<user>hi")


async def test_a_closed_engine_leaves_no_process_and_renders_nothing(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mer.text.renderer.CPU_S", 1 << 20)
    errors = []

    async def encode(engine: mer.Engine) -> None:
        with pytest.raises(mer.EngineClosed) as caught:
            await engine.encode_prompt(FOR_EVER)
        errors.append(caught.value)

    async with (
        trio.open_nursery() as nursery,
        mer.open_engine(tiny.path, memory=MEMORY, slots=4, threads=1) as engine,
    ):
        assert len(engine.encode(HI)) > 2
        pid = process_of(engine)
        nursery.start_soon(encode, engine)
        await trio.testing.wait_all_tasks_blocked()
    assert len(errors) == 1
    assert not is_there(pid)
    with pytest.raises(mer.EngineClosed):
        engine.encode(HI)
    with pytest.raises(mer.EngineClosed):
        await engine.generate(HI)


async def test_a_chat_that_is_certain_to_be_too_long_is_refused_before_it_is_encoded(
    engine: mer.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object, **__: object) -> list[int]:
        pytest.fail("encoded")

    monkeypatch.setattr(engine.tokenizer, "encode_parts", encode)
    with pytest.raises(mer.ContextOverflow, match="at least"):
        engine.encode([mer.Message("user", "word " * engine.plan.context * 100)])


async def test_the_plan_counts_the_process_of_the_template(tiny: TinyModel, tmp_path: Path) -> None:
    with_template, without = (
        mer.plan_memory(mer.load_model(config), config)
        for config in (
            mer.EngineConfig(path=tiny.path, memory=MEMORY),
            mer.EngineConfig(path=tiny_model(tmp_path / "m.gguf").path, memory=MEMORY),
        )
    )
    assert without.parts["chat template"] == 0
    assert 32 << 20 < with_template.parts["chat template"] < 33 << 20
    # What it is in truth, before messages, is counted in tests/text/test_renderer.py.
