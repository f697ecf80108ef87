"""The metadata keys of one architecture: what a model reads of them, and the refusal of what it does not.

Key names follow the GGUF specification (ggml-org/ggml, docs/gguf.md) and the constants of the `gguf` package.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from mer.errors import GGUFError, UnsupportedModel
from mer.limits import MAX_LAYERS
from mer.model.neutral import NEUTRAL_VALUES, is_neutral
from mer.quoting import echo, quoted

if TYPE_CHECKING:
    from mer.io.gguf import GGUFFile, MetadataValue

REQUIRED: Final = object()
_N_BLOCKS: Final = "block_count"  # never an array


class Keys:
    """Typed reads of the keys below an architecture's name; `finish` refuses what nobody has asked for.

    A file may give a number layer by layer; where all layers agree, it reads as that number.

    Args:
        gguf: the file; its `general.architecture` is the prefix of the keys.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.architecture = gguf.get_str("general.architecture")
        self._asked: set[str] = set()
        self._n_blocks = self.integer(_N_BLOCKS, maximum=MAX_LAYERS)
        # blocks that predict further tokens: files count them among the layers
        self.n_skipped = self.integer("nextn_predict_layers", minimum=0, maximum=self._n_blocks, default=0)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self._n_blocks - self.n_skipped

    def name(self, key: str) -> str:
        """Return the full name of a key."""
        return f"{self.architecture}.{key}"

    def has(self, key: str) -> bool:
        """Return whether the file has a key; asking for it counts as reading it."""
        self._asked.add(key)
        return self.name(key) in self.gguf.metadata

    def integer(self, key: str, *, maximum: int, minimum: int = 1, default: object = REQUIRED) -> int:
        """Return an integer.

        Raises:
            GGUFError: it is missing and has no default, is no integer, or is out of bounds.
            UnsupportedModel: the layers' numbers differ.
        """
        if default is not REQUIRED and not self.has(key):
            assert isinstance(default, int)
            return default
        return self._uniform(key).get_int(self.name(key), minimum=minimum, maximum=maximum)

    def per_layer(self, key: str, *, maximum: int, minimum: int = 0) -> tuple[int, ...]:
        """Return an integer for each layer; a key that is one number gives it to all, and booleans are 0 and 1.

        Raises:
            GGUFError: it is missing, is no integer, is out of bounds, or has another length.
        """
        array = self.gguf.metadata.get(self.name(key))
        if not isinstance(array, np.ndarray):
            return (self.integer(key, maximum=maximum, minimum=minimum),) * self.n_layers
        self._asked.add(key)
        if array.dtype.kind not in "iub":
            raise self.error(key, "is an array of something else than integers or booleans")
        if len(array) != self._n_blocks:
            raise self.error(key, f"is an array of {len(array)} numbers; there are {self._n_blocks} layers")
        numbers = tuple(int(number) for number in array.tolist()[: self.n_layers])
        for layer, number in enumerate(numbers):
            if not minimum <= number <= maximum:
                raise self.error(key, f"is {number} in layer {layer}; it must be from {minimum} to {maximum}")
        return numbers

    def real(self, key: str, *, maximum: float, default: object = REQUIRED) -> float:
        """Return a float that is finite, above zero and at most `maximum`.

        Raises:
            GGUFError: it is missing and has no default, is no float, or is out of bounds.
            UnsupportedModel: the layers' numbers differ.
        """
        if default is not REQUIRED and not self.has(key):
            assert isinstance(default, float)
            return default
        value = self._uniform(key).get_float(self.name(key))
        if not 0 < value <= maximum:
            raise self.error(key, f"is {value}; it must be above 0 and at most {maximum:g}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a bool.

        Raises:
            GGUFError: it is none.
            UnsupportedModel: the layers' differ.
        """
        return self._uniform(key).get_bool(self.name(key), default=default)

    def pattern(self, key: str, *, default: object) -> tuple[bool, ...]:
        """Return a bool for each layer; an integer n means that every n-th has False, the others True.

        Raises:
            GGUFError: it is neither, has another length, or is missing and has no default.
        """
        if isinstance(self.gguf.metadata.get(self.name(key)), np.ndarray):
            return tuple(map(bool, self.per_layer(key, maximum=1)))
        every = self.integer(key, default=default, minimum=0, maximum=MAX_LAYERS)
        return tuple(every == 0 or (i + 1) % every != 0 for i in range(self.n_layers))

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        self._asked.add(key)
        return self.gguf.get_str(self.name(key), default=default)

    def neutral(self, key: str, *values: object) -> None:
        """Accept a key with these values alone, which say that a feature is not used.

        Raises:
            UnsupportedModel: it has another one.
        """
        self._asked.add(key)
        value = self.gguf.metadata.get(self.name(key))
        if value is not None and not is_neutral(value, values):
            raise self._not_implemented(self.name(key), value, values)

    def ignore(self, *keys: str) -> None:
        """Let keys say what they like: this model computes the same."""
        self._asked.update(keys)

    def error(self, key: str, reason: str) -> GGUFError:
        """Return the error of a key whose value contradicts the format or another key; the caller raises it."""
        return self.gguf.error(self.name(key), reason)

    def malformed(self, reason: str) -> GGUFError:
        """Return the error of a file that contradicts itself; the caller raises it."""
        return GGUFError(self.gguf.paths[0], None, reason)

    def unsupported(self, reason: str) -> UnsupportedModel:
        """Return the error of a model that cannot be computed; the caller raises it."""
        return UnsupportedModel(reason, self.gguf.paths[0])

    def finish(self) -> None:
        """Refuse every key that was not asked for, unless its value says that its feature is not used.

        What a model reads is a fact of that model: a key that one architecture computes with must not pass in another
        that does not, so the table of neutral values knows no exceptions.

        Raises:
            UnsupportedModel: there is one; it may change the arithmetic.
        """
        prefix = self.architecture + "."
        for full, value in self.gguf.metadata.items():
            key = full.removeprefix(prefix)
            neutral = NEUTRAL_VALUES.get(key, ())
            if key == full or key in self._asked or is_neutral(value, neutral):
                continue
            raise self._not_implemented(full, value, neutral)

    def _not_implemented(self, full: str, value: MetadataValue, neutral: tuple[object, ...]) -> UnsupportedModel:
        works = " or ".join(map(repr, neutral))
        known = f"only {works} (not used) works" if works else "whether it changes the arithmetic is not known"
        return self.unsupported(f"{quoted(full, 50)} = {echo(value, 30)} is not implemented; {known}")

    def _uniform(self, key: str) -> GGUFFile:
        """Return the header with one number in place of an array of this key that gives each layer the same."""
        self._asked.add(key)
        full = self.name(key)
        array = self.gguf.metadata.get(full)
        if key == _N_BLOCKS or not isinstance(array, np.ndarray):
            return self.gguf
        if len(array) != self._n_blocks:
            raise self.error(
                key, f"is an array of {len(array)} numbers; it must be one number, or {self._n_blocks} equal ones"
            )
        differs = (array[: self.n_layers] != array[0]).nonzero()[0]
        if len(differs):
            layer = int(differs[0])
            raise self.unsupported(
                f"'{full}' is {array[0]} in layer 0 and {array[layer]} in layer {layer}; only layers that agree "
                "are implemented"
            )
        kind = self.gguf.value_types[full].removeprefix("array of ")
        return attrs.evolve(
            self.gguf,
            metadata=MappingProxyType({**self.gguf.metadata, full: array[0].item()}),
            value_types=MappingProxyType({**self.gguf.value_types, full: kind}),
        )
