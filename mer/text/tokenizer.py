"""Text to token ids and back, for the tokenizer that a GGUF file carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from mer.errors import RequestError, naming
from mer.io.gguf_file import GGUFFile
from mer.text.bpe import BpeCodec
from mer.text.gemma import GemmaCodec
from mer.text.spellings import Spellings
from mer.text.spm import SpmCodec
from mer.text.vocabulary import TokenType, Vocabulary, read_vocabulary


class Codec(Protocol):
    """Interface of the kinds of vocabulary: plain text to ids, and the bytes of one token."""

    add_bos: bool
    space_prefix: bool

    def encode(self, text: str, tick: Callable[[], None]) -> Iterator[list[int]]: ...
    def token_bytes(self, token_id: int) -> bytes: ...


CODECS: dict[str, Callable[[GGUFFile, Vocabulary], Codec]] = {
    "llama": SpmCodec,
    "gpt2": BpeCodec,
    "gemma4": GemmaCodec,
}


def unheard(n_ids: int) -> None:
    """Take no notice of how many ids there are."""


class Tokenizer:
    """The tokenizer of one model file.

    Control tokens never take part in the encoding of plain text: they are not in the vocabulary that text is encoded
    with, so that no spelling of one in a user's text can become one.

    Building one takes work and memory that grow with the bytes of the metadata, and no more. Decoding what text was
    encoded to gives the text again, except that SentencePiece's and Gemma's vocabularies write a space for U+2581, some
    byte-level ones compose characters (NFC), and what a vocabulary cannot spell is lost.

    Args:
        vocabulary: the checked vocabulary.
        codec: encodes plain text with it.
    """

    def __init__(self, vocabulary: Vocabulary, codec: Codec) -> None:
        self._vocabulary = vocabulary
        self._codec = codec
        silent = vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
        self._silent = frozenset(silent)
        self._control = Spellings({vocabulary.tokens[i]: i for i in silent})
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eos_ids = vocabulary.eos_ids
        self.suppressed = vocabulary.suppressed
        asked = codec.add_bos if vocabulary.add_bos is None else vocabulary.add_bos
        self.add_bos = asked and vocabulary.bos_id is not None
        self.add_eos = vocabulary.add_eos
        self.longest_token_bytes = max(map(len, map(self.token_bytes, range(self.vocab_size))))

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> Tokenizer:
        """Return the tokenizer that a GGUF file's metadata describes.

        Raises:
            UnsupportedModel: the vocabulary, or its pre-tokenizer, is of an unknown kind.
            TokenizerError: the description is missing or malformed.
            GGUFError: a metadata value has the wrong type.
        """
        with naming(gguf.paths[0]):
            vocabulary = read_vocabulary(gguf)
            return cls(vocabulary, CODECS[vocabulary.model](gguf, vocabulary))

    @property
    def space_prefix(self) -> bool:
        """Whether encoding puts a space before the text, which decoding takes away again."""
        return self._codec.space_prefix

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = None,
        parse_special: bool = False,
        progress: Callable[[int], None] = unheard,
    ) -> list[int]:
        """Return the token ids of a text; an end-of-sequence token is never appended, whatever `add_eos` says.

        Args:
            text: any text without lone surrogates.
            add_bos: whether the beginning-of-sequence token goes first; None is what the file asks for.
            parse_special: whether spellings of control tokens ("</s>", "<|im_end|>") become these tokens. Leave it
                False for text that is not the program's own.
            progress: told again and again how many ids there are already; what it raises ends the encoding.

        Raises:
            RequestError: the text is not valid Unicode, or has a word of more than 65,536 characters, or `add_bos` is
                asked of a vocabulary without that token.
        """
        parts = self.split_special(text) if parse_special else [text]
        return self.encode_parts(parts, add_bos=add_bos, progress=progress)

    def split_special(self, text: str) -> list[str | int]:
        """Return a text cut at the spellings of control tokens: plain text as str, control tokens as ids."""
        return list(self._control.split(text))

    def control_starts(self, text: str) -> list[int]:
        """Return where spellings of control tokens begin, including those that overlap or that the text's end cuts off.

        White space at the text's end is looked through, because what follows the text may stand in its place.
        """
        starts = self._control.starts(text) | self._control.begun(text) | self._control.begun(text.rstrip())
        return sorted(starts)

    def encode_parts(
        self,
        parts: Iterable[str | int],
        *,
        add_bos: bool | None = None,
        progress: Callable[[int], None] = unheard,
    ) -> list[int]:
        """Return the token ids of plain texts and ids in order; texts that follow one another are encoded as one.

        Raises:
            RequestError: a text is not valid Unicode, or has a word of more than 65,536 characters, or `add_bos` is
                asked of a vocabulary without that token.
        """
        ids: list[int] = []

        def encode_plain(text: str) -> None:
            for piece in self._encode_plain(text, lambda: progress(len(ids))):
                ids.extend(piece)
                progress(len(ids))

        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise RequestError("add_bos=True, but the model's vocabulary has no beginning-of-sequence token")
            ids.append(self.bos_id)
        pending: list[str] = []
        for part in parts:
            if isinstance(part, str):
                pending.append(part)
                continue
            encode_plain("".join(pending))
            pending.clear()
            ids.append(part)
        encode_plain("".join(pending))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids: control tokens are dropped, bytes that are not UTF-8 become U+FFFD.

        Raises:
            RequestError: an id is not in the vocabulary.
        """
        data = b"".join(map(self.token_bytes, ids))
        if self.space_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to a text; b"" for control tokens and the unknown token.

        Raises:
            RequestError: the id is not in the vocabulary.
        """
        self._check_id(token_id)
        return b"" if token_id in self._silent else self._codec.token_bytes(token_id)

    def is_control(self, token_id: int) -> bool:
        """Return whether a token stands for no text: a control token or the unknown token."""
        return token_id in self._silent

    def token_text(self, token_id: int) -> str:
        """Return a token as the model file spells it, control tokens included.

        Raises:
            RequestError: the id is not in the vocabulary.
        """
        self._check_id(token_id)
        return self._vocabulary.tokens[token_id]

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id {token_id} is not in the vocabulary, whose ids end at {self.vocab_size - 1}")

    def _encode_plain(self, text: str, tick: Callable[[], None]) -> Iterable[list[int]]:
        if not text:
            return ()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text has a lone surrogate at position {error.start}; give valid Unicode") from None
        return self._codec.encode(text, tick)
