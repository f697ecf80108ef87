"""SentencePiece BPE vocabularies (`tokenizer.ggml.model` "llama"): merges rebuilt from scores, byte fallback.

SentencePiece stores no merges. It joins, again and again, the neighbouring pair whose joined text is the token with the
best score, the leftmost one of equals. A BPE with ranked merges does the same when every way to split a token in two
tokens is a merge and the merges are ranked by the score of what they make.
Reference: Kudo and Richardson, "SentencePiece", 2018, section 3.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Sequence

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from mer.errors import TokenizerError
from mer.io.gguf_file import GGUFFile
from mer.text.vocabulary import TokenType, Vocabulary, read_scores

SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class SpmCodec:
    """Encodes plain text and spells tokens for one SentencePiece vocabulary.

    Args:
        gguf: the file's metadata.
        vocabulary: the same file's checked vocabulary.

    Raises:
        TokenizerError: scores or byte tokens are malformed, or some text could not be encoded at all.
    """

    add_bos = True

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        self.space_prefix = gguf.get_bool("tokenizer.ggml.add_space_prefix", True)
        scores = read_scores(gguf, len(vocabulary.tokens))
        self._bytes = _byte_tokens(vocabulary)
        normal = {vocabulary.tokens[i]: i for i in vocabulary.ids_of(TokenType.NORMAL)}
        for i in vocabulary.ids_of(TokenType.USER_DEFINED):
            text = vocabulary.tokens[i].replace(" ", SPACE)
            if normal.setdefault(text, i) != i:
                raise TokenizerError(f"tokens {normal[text]} and {i} have the same text {text!r}; each needs its own")
        vocab = normal | {vocabulary.tokens[i]: i for i in self._bytes}
        unknown = vocabulary.tokens[vocabulary.unknown_id] if vocabulary.unknown_id is not None else None
        if len(self._bytes) < 256 and not unknown:
            raise TokenizerError(
                f"the vocabulary has {len(self._bytes)} of 256 byte tokens and no tokenizer.ggml.unknown_token_id: "
                "some text could not be encoded"
            )
        if unknown:
            vocab[unknown] = int(vocabulary.unknown_id or 0)
        merges = rebuild_merges(normal, scores)
        self._backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token=unknown or None, fuse_unk=True))
        user = [vocabulary.tokens[i].replace(" ", SPACE) for i in vocabulary.ids_of(TokenType.USER_DEFINED)]
        self._backend.add_tokens([AddedToken(text, normalized=False) for text in user])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a plain text that opens a prompt or follows a control token; it must not be empty."""
        if self.space_prefix:
            text = " " + text
        ids: list[int] = self._backend.encode(text.replace(" ", SPACE), add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token with a text stands for."""
        value = self._bytes.get(token_id)
        return self._tokens[token_id].replace(SPACE, " ").encode() if value is None else value


def rebuild_merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that join to a token, best score first.

    Tokens of one score are common for runs of spaces. A run is joined from its left end, so that its parts get shorter
    to the right, and the pair further left is the one whose left part, or else right part, is longer.

    Args:
        vocab: text to id of every token that may be joined.
        scores: [V] score by id.

    Raises:
        TokenizerError: other tokens of one score compete for a part: SentencePiece would take the one further left,
            which no ranking does.
    """
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for text, token_id in vocab.items():
        for cut in range(1, len(text)):
            left = text[:cut]
            if left in vocab:
                right = text[cut:]
                if right in vocab:
                    ranked.append((-scores[token_id], -cut, -len(text), token_id, left, right))
    ranked.sort()
    merges = [(left, right) for *_, left, right in ranked]
    start = 0
    for score, tied in itertools.groupby(ranked, key=operator.itemgetter(0)):
        n = sum(1 for _ in tied)
        _check_tie(merges[start : start + n], -score)
        start += n
    return merges


def _check_tie(merges: list[tuple[str, str]], score: float) -> None:
    begun: dict[str, set[str]] = {}  # {left part: tokens that begin with it}
    for left, right in merges:
        begun.setdefault(left, set()).add(left + right)
    for left, right in merges:
        text = left + right
        rivals = begun.get(right)
        if rivals is None or rivals == {text} or all(len(set(token)) == 1 for token in (text, *rivals)):
            continue
        other = next(token for token in rivals if token != text)
        raise TokenizerError(
            f"tokens {text!r} and {other!r} compete for the part {right!r} with the same score {score}; "
            "the scores must rank the tokens"
        )


def _byte_tokens(vocabulary: Vocabulary) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for i in vocabulary.ids_of(TokenType.BYTE):
        match = _BYTE_TOKEN.fullmatch(vocabulary.tokens[i])
        if match is None:
            raise TokenizerError(
                f"token {i} is a byte token but reads {vocabulary.tokens[i]!r}, not '<0x00>' to '<0xFF>'"
            )
        found[i] = bytes([int(match[1], 16)])
    return found
