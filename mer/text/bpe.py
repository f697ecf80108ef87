"""Byte-level BPE vocabularies (`tokenizer.ggml.model` "gpt2"): merges in the file, words cut by a pattern.

Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.
"""

from __future__ import annotations

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from mer.errors import RequestError, TokenizerError
from mer.io.gguf_file import GGUFFile
from mer.text.pretokenizers import pre_tokenizer
from mer.text.vocabulary import TokenType, Vocabulary


def byte_characters() -> list[str]:
    """Return the 256 characters that stand for the byte values 0 to 255 in the texts of byte-level tokens.

    Printable Latin-1 characters stand for themselves; the other byte values get the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


_CHARACTERS = byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(_CHARACTERS)}


class BpeCodec:
    """Encodes plain text and spells tokens for one byte-level BPE vocabulary.

    Args:
        gguf: the file's metadata.
        vocabulary: the same file's checked vocabulary.

    Raises:
        TokenizerError: the merges are missing or malformed, or the pre-tokenizer is not known.
    """

    space_prefix = False

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        self._types = vocabulary.types
        for key in ("tokenizer.ggml.pre", "tokenizer.ggml.merges"):
            if key not in gguf.metadata:
                raise TokenizerError(f"{key} is missing: a 'gpt2' vocabulary needs it; convert the model again")
        cutter = pre_tokenizer(gguf.get_str("tokenizer.ggml.pre"))
        self.add_bos = cutter.add_bos
        user = vocabulary.ids_of(TokenType.USER_DEFINED)
        vocab = {vocabulary.tokens[i]: i for i in [*vocabulary.ids_of(TokenType.NORMAL), *user]}
        self._unspeakable = frozenset(b for b, character in enumerate(_CHARACTERS) if character not in vocab)
        merges = _merges(gguf, vocab, vocabulary)
        self._backend = Backend(models.BPE(vocab, merges, ignore_merges=cutter.ignore_merges))
        self._backend.pre_tokenizer = cutter.splitter()
        normalizer = cutter.normalizer()
        if normalizer is not None:
            self._backend.normalizer = normalizer
        self._backend.add_tokens([AddedToken(vocabulary.tokens[i], normalized=False) for i in user])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a plain text.

        Raises:
            RequestError: the text has a byte that the vocabulary has no token for.
        """
        if self._unspeakable:
            missing = self._unspeakable.intersection(text.encode())
            if missing:
                raise RequestError(f"the model's vocabulary has no token for the byte 0x{min(missing):02X} of the text")
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token with a text stands for."""
        text = self._tokens[token_id]
        if self._types[token_id] != TokenType.USER_DEFINED:
            try:
                return bytes([_BYTE_OF[character] for character in text])
            except KeyError:
                pass  # A text with other characters stands for itself.
        return text.encode()


def _merges(gguf: GGUFFile, vocab: dict[str, int], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the file's merges as pairs, without those that would turn plain text into a control or unused token."""
    merges: list[tuple[str, str]] = []
    others: frozenset[str] | None = None
    for i, line in enumerate(gguf.get_strings("tokenizer.ggml.merges")):
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError(f"tokenizer.ggml.merges[{i}] is {line!r}; expected two tokens and one space between")
        if left in vocab and right in vocab and left + right in vocab:
            merges.append((left, right))
            continue
        if others is None:
            others = frozenset(vocabulary.tokens)
        for part in (left, right, left + right):
            if part not in others:
                raise TokenizerError(f"tokenizer.ggml.merges[{i}] is {line!r}, but {part!r} is not in the vocabulary")
    return merges
