"""Heat profile: counts of the uses of each expert of a model, kept between runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from mer.errors import SavedFileError
from mer.io.new_file import SHARED, write_whole
from mer.io.saved import open_saved
from mer.quoting import echo

FORMAT: Final = "mer heat profile"
VERSION: Final = 1
_BYTES_PER_NUMBER: Final = 40
_OTHER_BYTES: Final = 4096
"""A profile may take so many bytes for each of its numbers, and besides: a tidy one takes 10 to 30."""


class ProfileError(SavedFileError):
    """A heat profile cannot be used."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, None, reason)


@attrs.frozen(eq=False)
class HeatProfile:
    """Counts of uses, and the fingerprint of the model they belong to."""

    fingerprint: bytes
    counts: npt.NDArray[np.int64]  # [L, E], visits that used an expert
    visits: npt.NDArray[np.int64]  # [L], of each layer; no count of the layer is larger

    @classmethod
    def count(
        cls, fingerprint: bytes, n_layers: int, n_experts: int, events: Iterable[tuple[int, Sequence[int]]]
    ) -> HeatProfile:
        """Return the profile of (layer, experts) events."""
        counter = HeatCounter(fingerprint, n_layers, n_experts)
        for layer, experts in events:
            counter.use(layer, experts)
        return counter.profile()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile; the file is there whole or as it was before.

        Raises:
            OSError: the file cannot be written.
        """
        document = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint.hex(),
            "visits": self.visits.tolist(),
            "counts": self.counts.tolist(),
        }
        write_whole(path, (json.dumps(document) + "\n").encode("ascii"), SHARED)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, fingerprint: bytes, n_layers: int, n_experts: int) -> HeatProfile:
        """Read the profile of a model.

        Raises:
            ProfileError: the file is malformed, of another version, or of another model.
            OSError: it cannot be read.
        """
        document = _read(path, _OTHER_BYTES + _BYTES_PER_NUMBER * n_layers * (n_experts + 1))
        version = document.get("version")
        if type(version) is not int or version != VERSION:
            raise ProfileError(path, f"a heat profile of version {echo(version)}; this release reads {VERSION}")
        if document.get("fingerprint") != fingerprint.hex():
            raise ProfileError(
                path,
                f"a heat profile of another model ({echo(document.get('fingerprint'))}, and this model is "
                f"{fingerprint.hex()[:16]}...); record one with this model",
            )
        visits: Any = document.get("visits")
        counts: Any = document.get("counts")
        if not _is_row(visits, n_layers, 1 << 53):
            raise ProfileError(path, f"visits must be {n_layers} integers from 0 to 2**53")
        is_table = isinstance(counts, list) and len(counts) == n_layers
        rows = counts if is_table else []
        if not is_table or not all(_is_row(row, n_experts, most) for row, most in zip(rows, visits, strict=True)):
            raise ProfileError(
                path, f"counts must be {n_layers} lists of {n_experts} integers from 0 to the visits of their layer"
            )
        return cls(
            fingerprint,
            np.array(counts, dtype=np.int64).reshape(n_layers, n_experts),
            np.array(visits, dtype=np.int64),
        )


class HeatCounter:
    """Counts uses while an engine runs."""

    def __init__(self, fingerprint: bytes, n_layers: int, n_experts: int) -> None:
        self._fingerprint = fingerprint
        self._counts = [[0] * n_experts for _ in range(n_layers)]
        self._visits = [0] * n_layers

    def use(self, layer: int, experts: Iterable[int]) -> None:
        """Count a batch that uses these experts of a layer, each named once."""
        self._visits[layer] += 1
        counts = self._counts[layer]
        for expert in experts:
            counts[expert] += 1

    def profile(self) -> HeatProfile:
        """Return what has been counted so far."""
        return HeatProfile(
            self._fingerprint, np.array(self._counts, dtype=np.int64), np.array(self._visits, dtype=np.int64)
        )


def _read(path: str | os.PathLike[str], most: int) -> dict[str, Any]:
    """Return the JSON object of at most so many bytes in a file that names itself a heat profile."""
    with open_saved(path, lambda path, _, reason: ProfileError(path, reason)) as (stream, _):
        content = stream.read(most + 1)
    if len(content) > most:
        raise ProfileError(path, f"no heat profile of this model: larger than the {most} bytes that one may take")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ProfileError(path, "no heat profile: it is not JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(path, f'no heat profile: it is no JSON object with "format": "{FORMAT}"')
    return document


def _is_row(row: object, n: int, most: int) -> bool:
    """Return whether this is a list of `n` integers from 0 to `most`."""
    return isinstance(row, list) and len(row) == n and all(type(count) is int and 0 <= count <= most for count in row)
