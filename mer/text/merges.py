"""Merges of BPE vocabularies: which two tokens are joined, the first ones of the file first."""

from __future__ import annotations

from mer.io.gguf_file import GGUFFile
from mer.quoting import quoted
from mer.text.vocabulary import MAX_TOKEN_CHARS, refusal


def read_merges(gguf: GGUFFile) -> dict[str, int]:
    """Return the file's merges as they are written, two tokens with a space between, with their ranks.

    Raises:
        TokenizerError: they are missing or malformed.
        GGUFError: they are not strings.
    """
    key = "tokenizer.ggml.merges"
    if key not in gguf.metadata:
        model = gguf.get_str("tokenizer.ggml.model")
        raise refusal(gguf, f"{key} is missing: a {quoted(model)} vocabulary needs it; convert the model again")
    ranks: dict[str, int] = {}
    for i, line in enumerate(gguf.get_strings(key)):
        if line.count(" ") != 1 or line[0] == " " or line[-1] == " ":
            raise refusal(gguf, f"{key}[{i}] is {quoted(line)}; expected two tokens and one space between")
        if len(line) > 2 * MAX_TOKEN_CHARS + 1:
            raise refusal(
                gguf, f"{key}[{i}] has {len(line)} characters; at most {2 * MAX_TOKEN_CHARS + 1} are supported"
            )
        ranks.setdefault(line, i)
    return ranks
