"""The architectures that can be run: one file and one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mer.errors import UnsupportedModel
from mer.model import gemma4, granitemoe, llama, qwen2, qwen2moe, qwen3, qwen3moe
from mer.model.keys import Keys
from mer.model.spec import ModelSpec
from mer.quoting import quoted

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile

ARCHITECTURES: Final[dict[str, Callable[[Keys], ModelSpec]]] = {
    "gemma4": gemma4.model,
    "granitemoe": granitemoe.model,
    "llama": llama.model,
    "qwen2": qwen2.model,
    "qwen2moe": qwen2moe.model,
    "qwen3": qwen3.model,
    "qwen3moe": qwen3moe.model,
}


def model_spec(gguf: GGUFFile) -> ModelSpec:
    """Return the model in a file, by its `general.architecture`.

    Raises:
        GGUFError: a hyperparameter is missing, out of range or contradicts another one.
        UnsupportedModel: the architecture, or a feature that the model uses, is not implemented.
    """
    arch = gguf.get_str("general.architecture")
    read = ARCHITECTURES.get(arch)
    if read is None:
        raise UnsupportedModel(
            f"architecture {quoted(arch)} is not implemented; these are: {', '.join(sorted(ARCHITECTURES))}",
            gguf.paths[0],
        )
    keys = Keys(gguf)
    spec = read(keys)
    keys.finish()
    return spec
