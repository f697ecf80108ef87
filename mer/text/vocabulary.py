"""The vocabulary that a GGUF file's `tokenizer.ggml.*` metadata describes, checked before anything is built from it."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import attrs

from mer.errors import TokenizerError
from mer.io.gguf_file import GGUFFile

MAX_TOKEN_CHARS = 1024


class TokenType(enum.IntEnum):
    """The values of `tokenizer.ggml.token_type` in the GGUF specification."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@attrs.frozen(eq=False)
class Vocabulary:
    """The checked vocabulary: every id is in range, every token is text, and no two tokens share their text.

    Attributes:
        model: `tokenizer.ggml.model`, "llama" (SentencePiece BPE) or "gpt2" (byte-level BPE).
        tokens: [V] token texts as the file spells them; an empty one can neither be encoded nor decoded.
        types: [V] a `TokenType` value each.
        bos_id: the beginning-of-sequence token, or None.
        eos_ids: every token that ends a generation: end of sequence, of turn and of message.
        unknown_id: the token for text that the vocabulary cannot spell, or None.
        add_bos: whether the file asks for `bos_id` before a prompt, or None where it does not say.
        add_eos: whether the file asks for the end-of-sequence token after a prompt.
        eos_id: the end-of-sequence token itself, or None.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    unknown_id: int | None
    add_bos: bool | None
    add_eos: bool

    def ids_of(self, *types: TokenType) -> list[int]:
        """Return the ids of all tokens of these types that have a text, in order."""
        wanted = frozenset(int(t) for t in types)
        return [i for i, (t, text) in enumerate(zip(self.types, self.tokens, strict=True)) if t in wanted and text]


def read_vocabulary(gguf: GGUFFile) -> Vocabulary:
    """Return the vocabulary that a GGUF file describes.

    Raises:
        TokenizerError: the metadata is missing, contradicts itself or names ids outside the vocabulary.
        GGUFError: a value has the wrong type.
    """
    _require(gguf, "tokenizer.ggml.model", "the file carries no tokenizer; convert the model with its vocabulary")
    model = gguf.get_str("tokenizer.ggml.model")
    if model not in ("llama", "gpt2"):
        raise TokenizerError(
            f"tokenizer.ggml.model is {model!r}; supported are 'llama' (SentencePiece BPE) and 'gpt2' (byte-level BPE)"
        )
    _require(gguf, "tokenizer.ggml.tokens", "the file carries no tokens; convert the model with its vocabulary")
    tokens = gguf.get_strings("tokenizer.ggml.tokens")
    _check_texts(tokens)
    types = _token_types(gguf, len(tokens))
    bos_id = _special_id(gguf, "bos", len(tokens))
    eos_id = _special_id(gguf, "eos", len(tokens))
    ends = (eos_id, _special_id(gguf, "eot", len(tokens)), _special_id(gguf, "eom", len(tokens)))
    for i in (bos_id, *ends):
        if i is not None:
            # Some converters mark these as text; a user's text must not be able to end a turn.
            types[i] = int(TokenType.CONTROL)
    add_bos = gguf.get_bool("tokenizer.ggml.add_bos_token", None)
    add_eos = gguf.get_bool("tokenizer.ggml.add_eos_token", False)
    if add_bos and bos_id is None:
        raise TokenizerError("tokenizer.ggml.add_bos_token is true, but there is no tokenizer.ggml.bos_token_id")
    if add_eos and eos_id is None:
        raise TokenizerError("tokenizer.ggml.add_eos_token is true, but there is no tokenizer.ggml.eos_token_id")
    return Vocabulary(
        model=model,
        tokens=tokens,
        types=types,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=frozenset(i for i in ends if i is not None),
        unknown_id=_special_id(gguf, "unknown", len(tokens)),
        add_bos=add_bos,
        add_eos=add_eos,
    )


def read_scores(gguf: GGUFFile, n_tokens: int) -> list[float]:
    """Return `tokenizer.ggml.scores`, [V] finite floats; a "llama" vocabulary cannot be used without them.

    Raises:
        TokenizerError: they are missing, not one for each token, or not finite.
        GGUFError: they are not floats.
    """
    _require(gguf, "tokenizer.ggml.scores", "a 'llama' vocabulary needs one score for each token")
    scores: list[float] = gguf.get_floats("tokenizer.ggml.scores").tolist()
    _check_length("scores", len(scores), n_tokens)
    bad = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
    if bad is not None:
        raise TokenizerError(f"tokenizer.ggml.scores[{bad}] is {scores[bad]}; a score must be finite")
    return scores


def _require(gguf: GGUFFile, key: str, why: str) -> None:
    if key not in gguf.metadata:
        raise TokenizerError(f"{key} is missing: {why}")


def _check_length(name: str, n: int, n_tokens: int) -> None:
    if n != n_tokens:
        raise TokenizerError(f"tokenizer.ggml.{name} has {n} entries, but tokenizer.ggml.tokens has {n_tokens}")


def _check_texts(tokens: Sequence[str]) -> None:
    if not tokens:
        raise TokenizerError("tokenizer.ggml.tokens is empty")
    first_id: dict[str, int] = {}
    for i, text in enumerate(tokens):
        if len(text) > MAX_TOKEN_CHARS:
            raise TokenizerError(f"token {i} has {len(text)} characters; at most {MAX_TOKEN_CHARS} are supported")
        other = first_id.setdefault(text, i)
        if other != i and text:
            raise TokenizerError(f"tokens {other} and {i} have the same text {text!r}; each token needs its own")
    try:
        "".join(tokens).encode("utf-8")
    except UnicodeEncodeError:
        # Undecodable bytes arrive as lone surrogates.
        bad = next(i for i, text in enumerate(tokens) if any("\ud800" <= c <= "\udfff" for c in text))
        raise TokenizerError(f"token {bad} is not valid UTF-8: {tokens[bad]!r}") from None


def _token_types(gguf: GGUFFile, n_tokens: int) -> list[int]:
    key = "tokenizer.ggml.token_type"
    if key not in gguf.metadata:
        raise TokenizerError(f"{key} is missing: without it control tokens cannot be told from text")
    types: list[int] = gguf.get_ints(key).tolist()
    _check_length("token_type", len(types), n_tokens)
    known = frozenset(int(t) for t in TokenType)
    if not known.issuperset(types):
        bad = next(i for i, t in enumerate(types) if t not in known)
        raise TokenizerError(f"{key}[{bad}] is {types[bad]}; the known types are 1 to 6")
    return types


def _special_id(gguf: GGUFFile, name: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = gguf.get_int(key, None)
    if value is not None and not 0 <= value < n_tokens:
        raise TokenizerError(f"{key} is {value}, but the vocabulary has the ids 0 to {n_tokens - 1}")
    return value
