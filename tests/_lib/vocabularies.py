"""Small tokenizers trained on this project's own source text, and the GGUF metadata that describes them."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

import mer
from mer.io.gguf import read_gguf
from mer.io.gguf_file import GGUFFile
from tests._lib import gguf_bytes

USER_DEFINED = ("<tool>", "##")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def training_lines() -> list[str]:
    """Return text of some length that every checkout has."""
    package = Path(mer.__file__).parent
    files = [package / "errors.py", package / "units.py", *sorted((package / "text").glob("*.py"))]
    text = "\n".join(path.read_text() for path in files)
    extra = ["Café crème, naïve Straße, 世界 hello 12345", "the aaaa aaab ababa    hahaha ==== ---- ...."] * 5
    return [line for line in text.splitlines() if line.strip()] + extra


@functools.cache
def sentencepiece_model(
    *, byte_fallback: bool = True, space_prefix: bool = True
) -> sentencepiece.SentencePieceProcessor:
    """Train a SentencePiece BPE model of a few hundred tokens."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_lines()),
        model_writer=out,
        vocab_size=800 if byte_fallback else 540,
        model_type="bpe",
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=space_prefix,
        user_defined_symbols=list(USER_DEFINED),
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def sentencepiece_metadata(model: sentencepiece.SentencePieceProcessor, *, space_prefix: bool = True) -> dict[str, Any]:
    """Return the metadata of a file that carries this model."""

    def kind(i: int) -> int:
        if model.is_unknown(i):
            return 2
        if model.is_control(i):
            return 3
        if model.is_byte(i):
            return 6
        return 4 if model.id_to_piece(i) in USER_DEFINED else 1

    ids = range(model.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


@functools.cache
def byte_level_bpe(pattern: str, *, nfc: bool = False) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer whose words are cut by one pattern; its control tokens are `CONTROL`."""
    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if nfc:
        made.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(training_lines(), trainer)
    made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in USER_DEFINED])
    return made


def byte_level_metadata(made: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """Return the metadata of a file that carries this tokenizer."""
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    merges = json.loads(made.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in CONTROL else 4 if t in USER_DEFINED else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def parsed(folder: Path, metadata: Mapping[str, Any]) -> GGUFFile:
    """Write metadata as a GGUF file and read it back."""
    path = folder / "tokenizer.gguf"
    path.write_bytes(gguf_bytes.build([_entry(key, value) for key, value in metadata.items()], [gguf_bytes.Tensor()]))
    return read_gguf(path)


def _entry(key: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return gguf_bytes.scalar(key, gguf_bytes.BOOL, value)
    if isinstance(value, int):
        return gguf_bytes.scalar(key, gguf_bytes.I32, value)
    if isinstance(value, float):
        return gguf_bytes.scalar(key, gguf_bytes.F32, value)
    if isinstance(value, str):
        return gguf_bytes.text(key, value.encode("utf-8", "surrogateescape"))
    if value and isinstance(value[0], str):
        return gguf_bytes.strings(key, [text.encode("utf-8", "surrogateescape") for text in value])
    return gguf_bytes.array(key, gguf_bytes.F32 if value and isinstance(value[0], float) else gguf_bytes.I32, value)
