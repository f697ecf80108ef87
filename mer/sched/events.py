"""Events and results that a caller receives from a generation."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

FinishReason: TypeAlias = Literal["stop", "length"]
"""stop: an end-of-sequence token or a stop string; length: `max_tokens` tokens."""


@attrs.frozen(kw_only=True)
class Usage:
    """Token counts of one generation."""

    prompt_tokens: int
    completion_tokens: int  # an end-of-sequence token included
    cached_tokens: int = 0  # prompt tokens that were not computed, because their keys and values were there already


@attrs.frozen(kw_only=True)
class Timings:
    """Times of one generation by stage; `decode_s` is 0 for a single token."""

    queue_s: float  # from submission to the start of the prompt's first chunk
    prefill_s: float  # from submission to the first token
    decode_s: float  # from the first token to the last
    decode_bytes_read: int  # bytes of experts read in that interval, for all sequences together


@attrs.frozen(kw_only=True)
class Completion:
    """A finished generation."""

    text: str  # without the end-of-sequence token or the stop string that ended it
    tokens: tuple[int, ...]  # every token drawn, an end-of-sequence token included
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int  # of the sampler: with it the same request gives the same tokens again


@attrs.frozen(kw_only=True)
class PrefillEvent:
    """Progress through the prompt."""

    done: int  # prompt tokens whose keys and values are there
    total: int
    cached: int = 0  # of `done`, those that were there already


@attrs.frozen(kw_only=True)
class TokenEvent:
    """One token; its text may be empty while a character or a possible stop string is incomplete."""

    token: int
    text: str
    index: int  # 0 for the first token
    finish_reason: FinishReason | None = None  # set on the last event
    completion: Completion | None = None  # set on the last event


Event: TypeAlias = PrefillEvent | TokenEvent
