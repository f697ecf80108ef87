"""Coverage-guided fuzzing of tokenizers: whatever vocabulary is accepted must give back the text that it has encoded.

    pip install atheris
    python fuzz/fuzz_tokenizer.py -max_total_time=300 NEW_FOLDER fuzz/corpus/tokenizer

An input is read as the words of a small description: kinds, texts out of a few characters that mean something to a
tokenizer, scores, merges, ids. Whatever it finds goes to `fuzz/regressions/tokenizer`, which the tests replay without
atheris.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mer.errors import GGUFError, RequestError, TokenizerError, UnsupportedModel
from mer.io.gguf_file import GGUFFile, MetadataValue
from mer.quoting import one_line
from mer.text.bpe import byte_characters
from mer.text.detokenizer import StreamDetokenizer
from mer.text.pretokenizers import PRE_TOKENIZERS
from mer.text.spaced import SPACE
from mer.text.tokenizer import Tokenizer
from mer.text.vocabulary import TokenType

PATH = Path("fuzz.gguf")
_BYTES = byte_characters()
_PIECES = (
    *"ab1 .'<>|\n\0\x14", SPACE, "\u0120", "\u010a", "\u00e9", "e\u0301", "\u4e16", "\U0001f600", "ab", "aa", "the",
    "  ", "<0x0A>", "<0xE4>", "<0xB8>", "<0x96>", "<|im_end|>", "<s>", "</s>", "<unk>", _BYTES[0], _BYTES[0x14],
    _BYTES[0xE4], _BYTES[0xB8], _BYTES[0x96], _BYTES[0xC3], _BYTES[0xA9], "\u00e2\u013e", "",
)  # fmt: skip
_SPECIAL = ("bos", "eos", "eot", "unknown")


def describe(model: str, tokens: list[str], **settings: object) -> dict[str, MetadataValue]:
    """Return the metadata of a vocabulary; lists of numbers become the arrays that a file has."""
    metadata: dict[str, MetadataValue] = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": tokens}
    for name, value in settings.items():
        if isinstance(value, list) and not (value and isinstance(value[0], str)) and name != "merges":
            value = np.array(value, np.float32 if name == "scores" else np.int32)
        metadata[f"tokenizer.ggml.{name}"] = value  # type: ignore[assignment]
    return metadata


def check_vocabulary(metadata: Mapping[str, MetadataValue], texts: list[str]) -> bool:
    """Fail unless a vocabulary is refused in one line, or gives back each text; return whether it is accepted.

    What it cannot spell may be lost, and nothing else.
    """
    header = GGUFFile(
        paths=(PATH,), version=3, alignment=32, metadata=metadata, tensors={}, header_bytes_read=0, header_bytes=0,
        file_bytes=(0,), identities=(), value_types=dict.fromkeys(metadata, "value"), value_offsets={},
    )  # fmt: skip
    try:
        tokenizer = Tokenizer.from_gguf(header)
    except (GGUFError, TokenizerError, UnsupportedModel) as error:
        text = str(error)
        if not text.startswith(str(PATH)) or text != one_line(text) or len(text) > 1000:
            raise AssertionError(f"an error that is not one line about {PATH}: {text!r}") from error
        return False
    for text in texts:
        try:
            ids = tokenizer.encode(text, add_bos=False)
        except RequestError:
            continue
        check_text(metadata, tokenizer, text, ids)
    return True


def check_text(metadata: Mapping[str, MetadataValue], tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    """Fail unless ids stand for a text, and the pieces of a stream for the same."""
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    usual = next((i for i, token in enumerate(tokens[:3]) if token == "<unk>"), None)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", usual)
    for i in ids:
        if not 0 <= i < tokenizer.vocab_size or (tokenizer.is_control(i) and i != unknown):
            raise AssertionError(f"{text!r} becomes the token {i}")
    decoded = tokenizer.decode(ids)
    stream = StreamDetokenizer(tokenizer)
    pieces = "".join(map(stream.push, ids)) + stream.flush()
    if pieces != decoded:
        raise AssertionError(f"{text!r} is {decoded!r} at once and {pieces!r} in pieces")
    types = metadata.get("tokenizer.ggml.token_type")
    kinds = [TokenType.NORMAL] * len(tokens) if types is None else [TokenType(int(t)) for t in types]  # type: ignore[union-attr]
    spaced = metadata["tokenizer.ggml.model"] != "gpt2"
    composed = False
    plain = {
        token for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if token and not tokenizer.is_control(i) and kind is not TokenType.UNUSED
        and (spaced or kind is not TokenType.USER_DEFINED or "!" <= token <= "~")  # such a one is no text of bytes
    }  # fmt: skip
    if spaced:
        text = text.replace(SPACE, " ")
        whole_bytes = {f"<0x{byte:02X}>" for byte in range(256)} <= plain

        def spoken(character: str) -> bool:
            return whole_bytes or character.replace(" ", SPACE) in plain

        if tokenizer.space_prefix and not spoken(" "):
            text, decoded = text.lstrip(" "), decoded.lstrip(" ")
    else:
        composed = PRE_TOKENIZERS[str(metadata.get("tokenizer.ggml.pre") or "default")].nfc

        def spoken(character: str) -> bool:
            return all(_BYTES[byte] in plain for byte in character.encode())

    if composed and not plain.issuperset(_BYTES):  # a character may be lost because of what it is composed to
        if not _is_part(unicodedata.normalize("NFD", decoded), unicodedata.normalize("NFD", text)):
            raise AssertionError(f"{text!r} comes back as {decoded!r}")
    elif all(map(spoken, text)):
        if decoded != text and not (composed and _composed(decoded) == _composed(text)):
            raise AssertionError(f"{text!r} comes back as {decoded!r}")
    elif not _is_part(decoded, text) or not _is_part("".join(filter(spoken, text)), decoded):
        raise AssertionError(f"{text!r} loses what could be spelled: {decoded!r}")


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _is_part(part: str, whole: str) -> bool:
    """Return whether leaving out characters makes the one of the other."""
    rest = iter(whole)
    return all(character in rest for character in part)


class Words:
    """Numbers and texts out of the bytes of an input; zeros and empty texts behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, n: int) -> int:
        """Return a number below n."""
        byte = self._data[self._at] if self._at < len(self._data) else 0
        self._at += 1
        return byte % n

    def pairs(self) -> list[tuple[str, str]]:
        """Return up to 31 pairs of texts."""
        return [(self.text() or "a", self.text() or "b") for _ in range(self.number(32))]

    def text(self) -> str:
        """Return up to seven pieces."""
        return "".join(_PIECES[self.number(len(_PIECES))] for _ in range(self.number(8)))


def check(data: bytes) -> None:
    """Build the vocabulary that `data` describes, and have it encode texts."""
    words = Words(data)
    model = ("llama", "gpt2")[words.number(2)]
    tokens = [words.text() for _ in range(words.number(48))]
    complete = words.number(4)
    if complete:  # otherwise hardly any vocabulary could spell anything
        tokens += [f"<0x{byte:02X}>" for byte in range(256)] if model == "llama" else _BYTES
    n = len(tokens)
    settings: dict[str, object] = {}
    if words.number(4):
        kinds = [1 + words.number(6) for _ in tokens]
        if complete > 1:
            kinds[-256:] = [TokenType.BYTE if model == "llama" else TokenType.NORMAL] * 256
        settings["token_type"] = kinds
    for name in _SPECIAL:
        if words.number(3) == 1:
            settings[f"{name}_token_id"] = words.number(256)
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if words.number(3):
            settings[name] = bool(words.number(2))
    if model == "llama":
        settings["scores"] = [float(words.number(7)) for _ in range(n)]
    else:
        settings["pre"] = ("gpt-2", "default", "llama-bpe", "qwen2", "smollm", "qwen35")[words.number(6)]
        settings["merges"] = [" ".join(pair) for pair in words.pairs()]
    texts = [words.text() for _ in range(4)]
    if model == "llama" and words.number(2):  # behind the texts, so that inputs found before this keep their meaning
        model = "gemma4"
        settings["merges"] = [" ".join(part.replace(" ", SPACE) for part in pair) for pair in words.pairs()]
        settings.setdefault("bos_token_id", 0)
    check_vocabulary(describe(model, tokens, **settings), texts)


def main() -> None:
    """Fuzz until a limit given on the command line, or for ever; see libFuzzer's options."""
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
