"""Hyperparameters that a file gives layer by layer, as converters write them for some models."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs
import numpy as np

from mer.errors import UnsupportedModel
from mer.model.neutral import READ_KEYS

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile


def with_uniform_layers(gguf: GGUFFile, arch: str, n_layers: int) -> GGUFFile:
    """Return the header with one number in place of every array that gives each layer the same.

    Raises:
        GGUFError: an array has not as many numbers as there are layers.
        UnsupportedModel: the layers' numbers differ.
    """
    values, types = dict(gguf.metadata), dict(gguf.value_types)
    for key in (f"{arch}.{name}" for name in READ_KEYS if name != "block_count"):
        array = values.get(key)
        if not isinstance(array, np.ndarray):
            continue
        if len(array) != n_layers:
            raise gguf.error(
                key, f"is an array of {len(array)} numbers; it must be one number, or {n_layers} equal ones"
            )
        differs = (array != array[0]).nonzero()[0]
        if len(differs):
            layer = int(differs[0])
            raise UnsupportedModel(
                f"'{key}' is {array[0]} in layer 0 and {array[layer]} in layer {layer}; only layers that agree "
                "are implemented",
                gguf.paths[0],
            )
        values[key] = array[0].item()
        types[key] = types[key].removeprefix("array of ")
    return attrs.evolve(gguf, metadata=MappingProxyType(values), value_types=MappingProxyType(types))
