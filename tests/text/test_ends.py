"""Tokens that end a text, in the vocabularies of the families and at the ids that they have there."""

from __future__ import annotations

import pytest

from mer.text.ends import end_ids

# Per family: size of the vocabulary, texts by id, ids that the file names, and the ids that end a text.
QWEN35 = (248320, {248044: "<|endoftext|>", 248045: "<|im_start|>", 248046: "<|im_end|>", 248055: "<|vision_pad|>"})
QWEN3 = (151936, {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"})
GEMMA4 = (
    262144,
    {
        **{0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 46: "<|tool>", 50: "<|tool_response>"},
        **{51: "<tool_response|>", 105: "<|turn>", 106: "<turn|>", 212: "</s>"},
    },
)
GPT_OSS = (
    201088,
    {
        **{199998: "<|startoftext|>", 199999: "<|endoftext|>", 200002: "<|return|>", 200003: "<|constrain|>"},
        **{200005: "<|channel|>", 200006: "<|start|>", 200007: "<|end|>", 200008: "<|message|>", 200012: "<|call|>"},
    },
)
GLM = (
    154880,
    {
        **{154820: "<|endoftext|>", 154822: "[gMASK]", 154824: "<sop>", 154826: "<|system|>", 154827: "<|user|>"},
        **{154828: "<|assistant|>", 154829: "<|observation|>"},
    },
)
GRANITE = (100352, {100256: "<|pad|>", 100257: "<|end_of_text|>", 100264: "<|start_of_role|>"})
PHI = (200064, {199999: "<|endoftext|>", 200020: "<|end|>", 200021: "<|user|>"})  # whose <|end|> does end a turn
FAMILIES = {
    "qwen35": (QWEN35, {248046}, {248044, 248046}),
    "qwen3 chat": (QWEN3, {151645}, {151643, 151645}),
    "qwen3 base": (QWEN3, {151643}, {151643, 151645}),
    "gemma4": (GEMMA4, {1}, {1, 50, 106}),
    "gemma4, eot named": (GEMMA4, {1, 106}, {1, 50, 106}),
    "gpt-oss": (GPT_OSS, {200002}, {199999, 200002, 200012}),
    "gpt-oss, <|end|> named": (GPT_OSS, {200002, 200007}, {199999, 200002, 200012}),
    "glm": (GLM, {154820, 154827, 154829}, {154820, 154827, 154829}),
    "glm, only eos named": (GLM, {154820}, {154820}),
    "granite": (GRANITE, {100257}, {100257}),
    "phi": (PHI, {199999}, {199999, 200020}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_ends_its_texts_as_it_should(family: str) -> None:
    (n_tokens, texts), named, ends = FAMILIES[family]
    tokens = ["a"] * n_tokens
    for i, text in texts.items():
        tokens[i] = text
    assert end_ids(tokens, frozenset(named)) == ends
