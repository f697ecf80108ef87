"""The vocabulary that a GGUF file's `tokenizer.ggml.*` metadata describes, checked before anything is built from it."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import attrs

from mer.errors import TokenizerError, UnsupportedModel
from mer.io.gguf_file import GGUFFile
from mer.quoting import quoted
from mer.text.ends import end_ids

MAX_TOKEN_CHARS = 1024
MODELS = {"llama": "SentencePiece BPE", "gpt2": "byte-level BPE", "gemma4": "BPE of plain characters"}
_CONTROL_SHAPE = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_SPM_SPECIAL = {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"}


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
    """The checked vocabulary: every id is in range, and every token is text.

    Attributes:
        model: `tokenizer.ggml.model`, one of `MODELS`.
        tokens: [V] token texts as the file spells them; an empty one can neither be encoded nor decoded. Where several
            have the same text, text becomes the last of them, and each of them becomes the text.
        types: [V] a `TokenType` value each.
        bos_id: the beginning-of-sequence token, or None.
        eos_ids: every token that ends a generation.
        suppressed: tokens that the file forbids to draw.
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
    suppressed: frozenset[int]
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
        UnsupportedModel: the vocabulary is of another kind.
        TokenizerError: the metadata is missing, contradicts itself or names ids outside the vocabulary.
        GGUFError: a value has the wrong type.
    """
    _require(gguf, "tokenizer.ggml.model", "the file carries no tokenizer; convert the model with its vocabulary")
    model = gguf.get_str("tokenizer.ggml.model")
    if model not in MODELS:
        supported = "supported are " + ", ".join(f"{quoted(name)} ({kind})" for name, kind in MODELS.items())
        raise UnsupportedModel(f"tokenizer.ggml.model is {quoted(model)}; {supported}", gguf.paths[0])
    _require(gguf, "tokenizer.ggml.tokens", "the file carries no tokens; convert the model with its vocabulary")
    tokens = gguf.get_strings("tokenizer.ggml.tokens")
    _check_texts(gguf, tokens)
    types = _token_types(gguf, tokens)
    bos_id = _special_id(gguf, "bos", model, tokens, types)
    eos_id = _special_id(gguf, "eos", model, tokens, types)
    unknown_id = _special_id(gguf, "unknown", model, tokens, types)
    named = {eos_id, *_ids(gguf, "eos_token_ids", len(tokens))}
    named |= {_id(gguf, name, len(tokens)) for name in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")}
    ends = end_ids(tokens, frozenset(i for i in named if i is not None))
    for i in ends if bos_id is None else ends | {bos_id}:
        # Some converters mark these as text; a user's text must not be able to end a turn.
        types[i] = int(TokenType.CONTROL)
    if model != "gpt2" and unknown_id is not None and types[unknown_id] != TokenType.CONTROL:
        types[unknown_id] = int(TokenType.UNKNOWN)
    add_bos = gguf.get_bool("tokenizer.ggml.add_bos_token", None)
    if model == "gemma4":  # Early files say false, but the model needs the token.
        _require(gguf, "tokenizer.ggml.bos_token_id", "a 'gemma4' vocabulary needs it; convert the model again")
        add_bos = True
    add_eos = gguf.get_bool("tokenizer.ggml.add_eos_token", False)
    if add_bos and bos_id is None:
        raise refusal(gguf, "tokenizer.ggml.add_bos_token is true, but there is no tokenizer.ggml.bos_token_id")
    if add_eos and eos_id is None:
        raise refusal(gguf, "tokenizer.ggml.add_eos_token is true, but there is no tokenizer.ggml.eos_token_id")
    return Vocabulary(
        model=model,
        tokens=tokens,
        types=types,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=ends,
        suppressed=frozenset(_ids(gguf, "suppress_tokens", len(tokens))),
        unknown_id=unknown_id,
        add_bos=add_bos,
        add_eos=add_eos,
    )


def read_scores(gguf: GGUFFile, n_tokens: int) -> list[float]:
    """Return `tokenizer.ggml.scores`, [V] finite floats; a "llama" vocabulary cannot be used without them.

    Raises:
        TokenizerError: they are missing, or not one for each token.
        GGUFError: they are not floats, or not finite.
    """
    _require(gguf, "tokenizer.ggml.scores", "a 'llama' vocabulary needs one score for each token")
    scores: list[float] = gguf.get_floats("tokenizer.ggml.scores").tolist()
    _check_length(gguf, "scores", len(scores), n_tokens)
    return scores


def refusal(gguf: GGUFFile, reason: str) -> TokenizerError:
    """Return an error that names the file; the caller raises it."""
    return TokenizerError(reason, gguf.paths[0])


def _require(gguf: GGUFFile, key: str, why: str) -> None:
    if key not in gguf.metadata:
        raise refusal(gguf, f"{key} is missing: {why}")


def _check_length(gguf: GGUFFile, name: str, n: int, n_tokens: int) -> None:
    if n != n_tokens:
        raise refusal(gguf, f"tokenizer.ggml.{name} has {n} entries, but tokenizer.ggml.tokens has {n_tokens}")


def _check_texts(gguf: GGUFFile, tokens: Sequence[str]) -> None:
    if not tokens:
        raise refusal(gguf, "tokenizer.ggml.tokens is empty")
    longest = max(range(len(tokens)), key=lambda i: len(tokens[i]))
    if len(tokens[longest]) > MAX_TOKEN_CHARS:
        n = len(tokens[longest])
        raise refusal(gguf, f"token {longest} has {n} characters; at most {MAX_TOKEN_CHARS} are supported")
    for i, text in enumerate(tokens):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # Undecodable bytes arrive as lone surrogates.
                raise refusal(gguf, f"token {i} is not valid UTF-8: {quoted(text)}") from None


def _token_types(gguf: GGUFFile, tokens: Sequence[str]) -> list[int]:
    """Return the types of the tokens; where the file does not say, tokens that look like control tokens are some."""
    key = "tokenizer.ggml.token_type"
    if key not in gguf.metadata:
        control, normal = int(TokenType.CONTROL), int(TokenType.NORMAL)
        return [control if text[:1] == "<" and _CONTROL_SHAPE.fullmatch(text) else normal for text in tokens]
    types: list[int] = gguf.get_ints(key).tolist()
    _check_length(gguf, "token_type", len(types), len(tokens))
    known = frozenset(int(t) for t in TokenType)
    if not known.issuperset(types):
        bad = next(i for i, t in enumerate(types) if t not in known)
        raise refusal(gguf, f"{key}[{bad}] is {types[bad]}; the known types are 1 to 6")
    return types


def _special_id(gguf: GGUFFile, name: str, model: str, tokens: Sequence[str], types: Sequence[int]) -> int | None:
    """Return the id that a key names or, in a SentencePiece vocabulary without the key, that the usual text has."""
    stated = _id(gguf, name, len(tokens))
    if stated is not None or model != "llama":
        return stated
    text, typed = _SPM_SPECIAL[name], "tokenizer.ggml.token_type" in gguf.metadata
    fitting = (TokenType.CONTROL, TokenType.UNKNOWN) if typed else tuple(TokenType)
    return next((i for i in range(min(len(tokens), 3)) if tokens[i] == text and types[i] in fitting), None)


def _id(gguf: GGUFFile, name: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = gguf.get_int(key, None)
    if value is not None and not 0 <= value < n_tokens:
        raise refusal(gguf, f"{key} is {value}, but the vocabulary has the ids 0 to {n_tokens - 1}")
    return value


def _ids(gguf: GGUFFile, name: str, n_tokens: int) -> list[int]:
    key = f"tokenizer.ggml.{name}"
    found = gguf.get_ints(key, None)
    ids: list[int] = [] if found is None else found.tolist()
    for position, i in enumerate(ids):
        if not 0 <= i < n_tokens:
            raise refusal(gguf, f"{key}[{position}] is {i}, but the vocabulary has the ids 0 to {n_tokens - 1}")
    return ids
