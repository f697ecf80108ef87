"""Token ids to text while they are being generated."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class Pieces(Protocol):
    """The part of a tokenizer that the detokenizer needs."""

    @property
    def space_prefix(self) -> bool: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class StreamDetokenizer:
    """Turns a growing sequence of token ids into text that never has to be taken back.

    The pushed texts and the flushed one together are what must be appended to the prompt's text: `Tokenizer.decode` of
    the prompt and the generated ids, less the text of the prompt. The space that a SentencePiece vocabulary puts before
    the first word is therefore dropped only where the prompt has no text; a character whose bytes are spread over
    several tokens comes out with its last one, and bytes that cannot be UTF-8 become U+FFFD.

    Args:
        tokenizer: the tokenizer of the model.
        prompt: the ids that the generated ones follow. A character that it leaves incomplete counts as generated.
    """

    def __init__(self, tokenizer: Pieces, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt):
            tail = tokenizer.token_bytes(token_id) + tail
            if len(tail) >= 4:  # The longest character: nothing before it can still be open.
                break
        self._drop_space = tokenizer.space_prefix and not tail
        self._decoder.decode(tail)

    def push(self, token_id: int) -> str:
        """Return the text that has become certain with one more token; it may be empty.

        Raises:
            RequestError: the id is not in the vocabulary.
        """
        data = self._tokenizer.token_bytes(token_id)
        if data and self._drop_space:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for a character that stayed incomplete, else an empty text."""
        return self._decoder.decode(b"", final=True)
