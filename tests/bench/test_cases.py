"""Names, order and prompts of the cases of a whole-model benchmark."""

from __future__ import annotations

import itertools

import pytest

from mer.bench.cases import Case, parse_counts, parse_memories, plan_cases, spread_tokens
from mer.errors import ConfigError


@pytest.mark.parametrize(
    ("case", "name", "prompt_tokens", "max_tokens"),
    [
        (Case(n_prompt=512), "pp512", 512, 1),
        (Case(n_gen=128), "tg128", 1, 129),
        (Case(n_prompt=512, depth=1024), "pp512 @ d1024", 1536, 1),
        (Case(n_gen=128, depth=1024), "tg128 @ d1024", 1024, 129),
    ],
)
def test_names_are_those_of_llama_bench(case: Case, name: str, prompt_tokens: int, max_tokens: int) -> None:
    assert (case.name, case.prompt_tokens, case.max_tokens) == (name, prompt_tokens, max_tokens)
    assert case.positions == prompt_tokens + max_tokens
    assert case.n_tokens == (case.n_prompt or case.n_gen)


def test_depths_come_first_then_prompts_then_generations() -> None:
    cases = plan_cases([16, 0, 8], [4], [0, 32], 4096)
    assert [case.name for case in cases] == ["pp16", "pp8", "tg4", "pp16 @ d32", "pp8 @ d32", "tg4 @ d32"]


@pytest.mark.parametrize(
    ("context", "depth", "names"),
    [
        (4096, 0, ["pp512", "tg128"]),
        (513, 0, ["pp512", "tg128"]),
        (512, 0, ["pp256", "tg128"]),
        (256, 0, ["pp128", "tg128"]),
        (256, 200, ["pp32 @ d200", "tg32 @ d200"]),
        (3, 0, ["pp2", "tg1"]),
    ],
)
def test_defaults_fit_the_context(context: int, depth: int, names: list[str]) -> None:
    cases = plan_cases(None, None, [depth], context)
    assert [case.name for case in cases] == [name.removesuffix(" @ d0") for name in names]


@pytest.mark.parametrize(
    ("prompts", "gens", "depth", "reason"),
    [
        ([0], [0], 0, "nothing to measure"),
        ([256], [0], 0, "pp256 needs 257 positions; the model was trained for 256"),
        ([0], [255], 0, "tg255 needs 257"),
        ([8], None, 250, "pp8 @ d250 needs 259"),
        (None, None, 256, "needs 258"),
    ],
)
def test_what_cannot_be_run(prompts: list[int] | None, gens: list[int] | None, depth: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan_cases(prompts, gens, [depth], 256)


def test_lists_of_counts() -> None:
    assert parse_counts("-p", ["128,512", " 8 ", "0"]) == [128, 512, 8, 0]
    for text in ("", "x", "1,,2", "-1", "1.5", "\u0661", "9" * 4000):
        with pytest.raises(ConfigError, match="-p"):
            parse_counts("-p", [text])
    assert parse_memories("2GiB, 4GiB") == ["2GiB", "4GiB"]
    with pytest.raises(ConfigError, match="--memories"):
        parse_memories("2GiB,")


def test_prompts_are_spread_and_never_alike() -> None:
    prompts = [spread_tokens(512, 4096, (7, number)) for number in range(20)]
    assert prompts[3] == spread_tokens(512, 4096, (7, 3))
    assert len({tuple(prompt[:3]) for prompt in [*prompts, spread_tokens(3, 4096, (8, 3))]}) == 21
    for prompt in prompts:
        assert len(prompt) == 512
        assert 0 <= min(prompt) < 200
        assert 3896 < max(prompt) < 4096
    pairs = [{*itertools.pairwise(prompt)} for prompt in prompts]
    assert not pairs[0] & pairs[1]
