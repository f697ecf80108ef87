"""One sequence: its prompt, what was generated, and how it ends. Pure but for the channel it is read from."""

from __future__ import annotations

import enum
from typing import Protocol

import attrs
import trio

from mer.errors import GenerationError, MerError
from mer.sched.events import Completion, Event, FinishReason, PrefillEvent, Timings, TokenEvent, Usage
from mer.sched.kv import Lease
from mer.sched.sampling import Drawn, Sampler

CHANNEL_EVENTS = 64  # events that a slow reader may leave unread before its sequence pauses


class TextOutput(Protocol):
    """Turns tokens into text that is certain, and knows when a stop string is complete."""

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text that `token` makes certain, and whether a stop string ended it."""

    def flush(self) -> str:
        """Return what was held back."""


class Status(enum.Enum):
    """Stages of a sequence's life."""

    WAITING = "waiting"  # for a place and KV blocks
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"  # without a place or KV blocks until its reader has caught up and there are some
    ENDED = "ended"  # finished, failed or cancelled


@attrs.define(eq=False, kw_only=True)
class Sequence:
    """A running generation; the scheduler alone changes it, except that its reader may cancel it."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampler: Sampler
    output: TextOutput
    end_tokens: frozenset[int]  # drawing one of them ends the sequence
    events: trio.MemorySendChannel[Event]
    submitted_s: float
    status: Status = Status.WAITING
    cancelled: bool = False
    error: MerError | None = None
    doubted: bool = False  # its last rows gave NaN; they are computed again, with experts that are read anew
    kv_tokens: int = 0  # positions whose KV is there, computed by this sequence or taken from others
    cached_tokens: int = 0  # prompt tokens among them that were taken from others
    tokens: list[int] = attrs.Factory(list)
    texts: list[str] = attrs.Factory(list)
    lease: Lease | None = None  # KV blocks, while it runs
    keeps_lease: bool = False  # when it has generated all it should, its reader takes the lease
    started_s: float = 0.0
    first_token_s: float = 0.0
    first_token_bytes: int = 0  # bytes read by the engine when the first token came

    @property
    def rows_left(self) -> int:
        """Rows to compute before the next token: 1 while decoding."""
        return len(self.prompt) + len(self.tokens) - self.kv_tokens if self.status is Status.PREFILL else 1

    @property
    def total_tokens(self) -> int:
        """KV positions that the sequence may need."""
        return len(self.prompt) + self.max_tokens

    @property
    def blocks(self) -> list[int]:
        """KV blocks in order of position."""
        return [] if self.lease is None else self.lease.blocks

    @property
    def n_known(self) -> int:
        """Tokens that are known: of the prompt, and those drawn."""
        return len(self.prompt) + len(self.tokens)

    def span(self, first: int, last: int) -> list[int]:
        """Return the known tokens from position `first` to before `last`."""
        n_prompt = len(self.prompt)
        return [*self.prompt[first:last], *self.tokens[max(0, first - n_prompt) : max(0, last - n_prompt)]]

    @property
    def has_room(self) -> bool:
        """Whether its reader has left room for another token event."""
        statistics = self.events.statistics()
        return statistics.current_buffer_used < statistics.max_buffer_size

    @property
    def caught_up(self) -> bool:
        """Whether its reader has emptied half of the channel: computing the KV again is then worth many tokens."""
        statistics = self.events.statistics()
        return 2 * statistics.current_buffer_used <= statistics.max_buffer_size

    def preempt(self) -> None:
        """Forget the KV: it is computed again, from the prompt and the tokens so far, before the next token."""
        self.status = Status.PREEMPTED
        self.kv_tokens = 0

    def reuse(self, n_tokens: int) -> int:
        """Note that the KV of the first `n_tokens` positions is there, and return for how many that is news."""
        gained = max(0, n_tokens - self.kv_tokens)
        self.kv_tokens += gained
        if not self.tokens:
            self.cached_tokens += gained
        return gained

    def next_rows(self, budget: int) -> tuple[list[int], int]:
        """Return the next tokens to compute, at most `budget`, and the position of the first."""
        if self.status is Status.PREFILL:
            return self.span(self.kv_tokens, self.kv_tokens + budget), self.kv_tokens
        return [self.tokens[-1]], self.n_known - 1

    def gives_token(self, n_tokens: int) -> bool:
        """Return whether the logits of the last of the next `n_tokens` rows give a token."""
        return self.kv_tokens + n_tokens == self.n_known

    def computed(self, n_tokens: int) -> None:
        """Note that the next `n_tokens` rows were computed.

        Progress through the prompt is reported once: not when it is computed again after a preemption.
        """
        self.kv_tokens += n_tokens
        if self.tokens:
            return
        statistics = self.events.statistics()
        if statistics.current_buffer_used + 1 < statistics.max_buffer_size:  # the last place is for a token
            progress = PrefillEvent(done=self.kv_tokens, total=len(self.prompt), cached=self.cached_tokens)
            self.events.send_nowait(progress)

    def advance(self, drawn: Drawn, now_s: float, bytes_read: int) -> None:
        """Send the token that was drawn; the sequence may end with it, or fail alone."""
        try:
            self._advance(self.sampler.took(drawn), now_s, bytes_read)
        except Exception as error:  # whatever one sequence's text raises, the others go on
            self.fail_with(error)

    def fail_with(self, error: Exception) -> None:
        """End with an error of any kind, which the reader raises as it is or as the cause of a GenerationError."""
        if isinstance(error, MerError):
            self.fail(error)
            return
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        failure = GenerationError(f"the generation failed after {len(self.tokens)} tokens: {what}")
        failure.__cause__ = error
        self.fail(failure)

    def _advance(self, token: int, now_s: float, bytes_read: int) -> None:
        self.status = Status.DECODE
        if not self.tokens:
            self.first_token_s, self.first_token_bytes = now_s, bytes_read
        self.tokens.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in self.end_tokens:
            reason = "stop"
        else:
            text, stopped = self.output.push(token)
            reason = "stop" if stopped else "length" if len(self.tokens) == self.max_tokens else None
            if stopped:
                self._send(token, text, reason, now_s, bytes_read)
                return
        if reason is not None:
            text += self.output.flush()
        self._send(token, text, reason, now_s, bytes_read)

    def fail(self, error: MerError) -> None:
        """End with an error, which the reader raises."""
        self.error = error
        self.end()

    def end(self) -> None:
        """Close the channel; nothing more comes."""
        self.status = Status.ENDED
        self.events.close()

    def _send(self, token: int, text: str, reason: FinishReason | None, now_s: float, bytes_read: int) -> None:
        self.texts.append(text)
        done = None
        if reason is not None:
            done = Completion(
                text="".join(self.texts),
                tokens=tuple(self.tokens),
                finish_reason=reason,
                usage=Usage(
                    prompt_tokens=len(self.prompt),
                    completion_tokens=len(self.tokens),
                    cached_tokens=self.cached_tokens,
                ),
                timings=Timings(
                    queue_s=self.started_s - self.submitted_s,
                    prefill_s=self.first_token_s - self.submitted_s,
                    decode_s=now_s - self.first_token_s,
                    decode_bytes_read=bytes_read - self.first_token_bytes,
                ),
                seed=self.sampler.seed,
            )
        index = len(self.tokens) - 1
        self.events.send_nowait(TokenEvent(token=token, text=text, index=index, finish_reason=reason, completion=done))
        if reason is not None:
            self.end()
