"""Nothing that takes long runs on the event loop, with a vocabulary of 250 thousand tokens under load."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trio

import mer
from mer.compute.cpu import worker
from mer.compute.cpu.forward import Forward
from mer.engine import LONG_IDS, LONG_STOPS, LONG_TEXT, Engine, Prompt
from mer.model import loading
from mer.opening import engine as opening
from mer.sched.sampling import Draw
from mer.testing.loop import watch_loop
from mer.text.bpe import BpeCodec
from mer.text.chat import ChatTemplate
from mer.text.renderer import Renderer
from mer.text.spaced import SpacedCodec
from mer.text.spellings import Spellings
from mer.text.tokenizer import Tokenizer
from tests._lib.tiny_models import random_gguf

VOCABULARY = 250_000
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SAMPLED = mer.Sampling(temperature=0.8, top_p=0.95, seed=1)
TEXT = "the cat sat on the mat " * (LONG_TEXT // 4)
N_SHORT = 3
PROMPTS: list[Prompt] = [
    *([9 + i, 10] for i in range(N_SHORT)),
    [mer.Message("user", TEXT), mer.Message("assistant", TEXT)],
    TEXT,
    [300 + i % 7 for i in range(LONG_IDS)],
]
LONG = (
    (Draw, "compute"),
    (Forward, "logits"),
    (Tokenizer, "__init__"),
    (Tokenizer, "from_gguf"),
    (Tokenizer, "encode_parts"),
    (SpacedCodec, "__init__"),
    (BpeCodec, "__init__"),
    (Spellings, "__init__"),
    (ChatTemplate, "render_parts"),
    (Renderer, "render"),
    (Engine, "_checked_ids"),
    (Engine, "_prepare"),
    (loading, "check_model"),
    (opening, "model_fingerprint"),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_gguf(
        tmp_path_factory.mktemp("model") / "large.gguf",
        vocab_size=VOCABULARY,
        d_model=32,
        n_heads=2,
        n_kv_heads=1,
        n_layers=1,
        context_length=3 * LONG_IDS,
        metadata={"tokenizer.chat_template": TEMPLATE},
    )


async def test_under_load_all_that_takes_long_runs_elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only short prompts are looked at on the loop; a vocabulary's logits count as many from the first row on."""
    monkeypatch.setattr(worker, "_INLINE_LOGITS", VOCABULARY - 1)
    with watch_loop(*LONG) as watch:
        async with mer.open_engine(path, memory="8GiB", threads=1, context=3 * LONG_IDS, max_sequences=8) as engine:
            meanwhile = watch.elsewhere.copy()
            async with trio.open_nursery() as nursery:
                for prompt in PROMPTS:
                    nursery.start_soon(ask, engine, prompt)
            stops = ["x" * 512 + str(number) for number in range(LONG_STOPS // 512)]
            await engine.generate(PROMPTS[0], max_tokens=1, sampling=SAMPLED, stop=stops)
    assert watch.on_loop == {"Engine._checked_ids": N_SHORT + 1, "Engine._prepare": len(PROMPTS) - 1}  # of few tokens
    assert watch.elsewhere - meanwhile == Counter(
        {
            "Draw.compute": 3 * len(PROMPTS) + 1,
            "Tokenizer.encode_parts": 2,
            "ChatTemplate.render_parts": 1,
            "Renderer.render": 1,
            "Engine._checked_ids": 1,
            "Engine._prepare": 2,  # one has many tokens, the other many stop strings
            "Forward.logits": watch.elsewhere["Forward.logits"],
        }
    )
    assert meanwhile == {
        "loading.check_model": 1,
        "engine.model_fingerprint": 1,
        "Tokenizer.from_gguf": 1,
        "Tokenizer.__init__": 1,
        "SpacedCodec.__init__": 1,
        "Spellings.__init__": 2,
    }
    assert watch.steps > 0


async def ask(engine: mer.Engine, prompt: Prompt) -> None:
    done = await engine.generate(prompt, max_tokens=3, sampling=SAMPLED, ignore_eos=True)
    assert len(done.tokens) == 3
