"""Cases of a whole-model benchmark, named as llama-bench names them, and prompts that no predictor can foresee."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from mer.errors import ConfigError

DEFAULT_PROMPT_TOKENS: Final = 512
DEFAULT_TOKENS: Final = 128
MAX_ROUNDS: Final = 1000


@attrs.frozen(kw_only=True)
class Case:
    """One test: a prompt is computed, or tokens are generated one after the other; one of the two counts is 0."""

    n_prompt: int = 0
    n_gen: int = 0
    depth: int = 0  # tokens whose keys and values are there before

    @property
    def name(self) -> str:
        """As llama-bench names it: "pp512", "tg128", "pp512 @ d1024"."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def n_tokens(self) -> int:
        """Tokens whose time is measured."""
        return self.n_prompt or self.n_gen

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt that is given; a generation needs one token to begin with."""
        return self.depth + self.n_prompt if self.n_prompt else max(1, self.depth)

    @property
    def max_tokens(self) -> int:
        """Tokens that are drawn: the first comes from the prompt, each other one costs a step."""
        return 1 if self.n_prompt else self.n_gen + 1

    @property
    def positions(self) -> int:
        """Context that it needs."""
        return self.prompt_tokens + self.max_tokens


def parse_counts(option: str, texts: Iterable[str]) -> list[int]:
    """Return the numbers of an option that may be given again, and that takes lists such as "128,512".

    Raises:
        ConfigError: one of them is not a whole number from 0 up.
    """
    parts = [part.strip() for text in texts for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and len(part) < 10):
            raise ConfigError(f"{option} {part}: write whole numbers from 0 up, such as 512 or 128,512")
    return [int(part) for part in parts]


def parse_memories(text: str) -> list[str]:
    """Return the budgets of a list such as "2GiB,4GiB".

    Raises:
        ConfigError: one is missing.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"--memories {text!r}: write sizes such as 2GiB,4GiB")
    return parts


def plan_cases(
    prompts: Sequence[int] | None, gens: Sequence[int] | None, depths: Sequence[int], context_length: int
) -> list[Case]:
    """Return the cases in llama-bench's order: for every depth first the prompts, then the generations; 0 is none.

    Args:
        prompts: tokens of the prompts; None is 512, halved until it fits the model's context.
        gens: tokens to generate; None is 128, halved likewise.
        depths: tokens that come before.
        context_length: positions the model was trained for.

    Raises:
        ConfigError: there is nothing to run, or a case needs more positions than the model has.
    """
    cases: list[Case] = []
    for depth in depths:
        for count in [DEFAULT_PROMPT_TOKENS] if prompts is None else prompts:
            case = Case(n_prompt=count, depth=depth)
            while prompts is None and case.n_prompt > 1 and case.positions > context_length:
                case = attrs.evolve(case, n_prompt=case.n_prompt // 2)
            cases += [case] if count else []
        for count in [DEFAULT_TOKENS] if gens is None else gens:
            case = Case(n_gen=count, depth=depth)
            while gens is None and case.n_gen > 1 and case.positions > context_length:
                case = attrs.evolve(case, n_gen=case.n_gen // 2)
            cases += [case] if count else []
    if not cases:
        raise ConfigError("there is nothing to measure: give --prompt-tokens or --tokens a number above 0")
    for case in cases:
        if case.positions > context_length:
            raise ConfigError(
                f"{case.name} needs {case.positions} positions; the model was trained for {context_length}"
            )
    return cases


def spread_tokens(n_tokens: int, vocab_size: int, seed: tuple[int, int]) -> list[int]:
    """Return token ids drawn evenly from the vocabulary: the same for a seed and a number, others for any other."""
    draw = random.Random(f"{seed[0]}/{seed[1]}")
    return [draw.randrange(vocab_size) for _ in range(n_tokens)]
