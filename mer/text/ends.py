"""Tokens that end a text: those that the file names, and those whose text says so."""

from __future__ import annotations

from collections.abc import Sequence

END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)


def end_ids(tokens: Sequence[str], named: frozenset[int]) -> frozenset[int]:
    """Return the ids of all tokens that end a text.

    A file names at most a few of them, and often only the one that ended the documents of the first training: so do
    Llama 3's files not always name what ends a turn, and Qwen's not what ends a text.

    Args:
        tokens: [V] the texts of the vocabulary.
        named: the ids that the file's metadata names.
    """
    found = {i: text for i, text in enumerate(tokens) if text in END_TEXTS}
    texts = frozenset(found.values())
    ends = set(named).union(found)
    if {"<|return|>", "<|call|>"} <= texts:  # gpt-oss: <|end|> ends a message, and the answer may follow
        ends -= {i for i, text in found.items() if text == "<|end|>"}
    if "<|tool_response>" in texts:  # Gemma 4: </s> is text
        ends -= {i for i, text in found.items() if text == "</s>"}
    return frozenset(ends)
