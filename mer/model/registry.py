"""The architectures that can be run: one file and one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mer.errors import UnsupportedModel
from mer.model import (
    bailingmoe2,
    dots1,
    ernie4_5_moe,
    gemma4,
    glm4moe,
    gpt_oss,
    granitemoe,
    hunyuan_moe,
    laguna,
    llama,
    mellum,
    minimax_m2,
    olmoe,
    qwen2,
    qwen2moe,
    qwen3,
    qwen3moe,
    qwen3vlmoe,
)
from mer.model.keys import Keys
from mer.model.spec import ModelSpec
from mer.quoting import quoted

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile

ARCHITECTURES: Final[dict[str, Callable[[Keys], ModelSpec]]] = {
    "bailingmoe2": bailingmoe2.model,
    "dots1": dots1.model,
    "ernie4_5-moe": ernie4_5_moe.model,
    "gemma4": gemma4.model,
    "glm4moe": glm4moe.model,
    "gpt-oss": gpt_oss.model,
    "granitemoe": granitemoe.model,
    "hunyuan-moe": hunyuan_moe.model,
    "laguna": laguna.model,
    "llama": llama.model,
    "mellum": mellum.model,
    "minimax-m2": minimax_m2.model,
    "olmoe": olmoe.model,
    "qwen2": qwen2.model,
    "qwen2moe": qwen2moe.model,
    "qwen3": qwen3.model,
    "qwen3moe": qwen3moe.model,
    "qwen3vlmoe": qwen3vlmoe.model,
}

NO_MODELS: Final[dict[str, str]] = {
    "clip": "it makes images or sound readable for a language model; use the file of that model",
    "dflash": "it drafts tokens for another model; use the file of that model",
    "gptoss": "Ollama's files name tensors in their own way; use a GGUF of 'gpt-oss' made by llama.cpp",
    "mmproj": "it makes images or sound readable for a language model; use the file of that model",
}
"""Architectures of files that people take for models, and what to use instead."""


def model_spec(gguf: GGUFFile) -> ModelSpec:
    """Return the model in a file, by its `general.architecture`.

    Raises:
        GGUFError: a hyperparameter is missing, out of range or contradicts another one.
        UnsupportedModel: the architecture, or a feature that the model uses, is not implemented.
    """
    arch = gguf.get_str("general.architecture")
    read = ARCHITECTURES.get(arch)
    if read is None and arch in NO_MODELS:
        raise UnsupportedModel(f"architecture {quoted(arch)} is none that runs: {NO_MODELS[arch]}", gguf.paths[0])
    if read is None:
        raise UnsupportedModel(
            f"architecture {quoted(arch)} is not implemented; these are: {', '.join(sorted(ARCHITECTURES))}",
            gguf.paths[0],
        )
    keys = Keys(gguf)
    spec = read(keys)
    keys.finish()
    return spec
