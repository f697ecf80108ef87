"""Sizes of the experts of the streaming benchmark."""

from __future__ import annotations

import re
from typing import Final

import attrs

from mer.errors import ConfigError
from mer.io.extents import PROJECTIONS
from mer.io.ggml import GGMLType, tensor_bytes

PRESETS: Final = {"mixtral": (4096, 14336), "qwen3-30b": (2048, 768)}
"""{name: (d_model, d_ff of one expert)}, of Mixtral 8x7B and of Qwen3-30B-A3B"""

DEFAULT: Final = "mixtral/16"

WEIGHT_TYPES: Final = {"q4_0": GGMLType.Q4_0, "f32": GGMLType.F32}

STEP: Final = 32
"""Both widths are multiples of it: a block of Q4_0, and two of the kernels' groups of rows."""

_PRESET = re.compile(r"([a-z0-9-]+)(?:/(\d{1,6}))?", re.ASCII)
_WIDTHS = re.compile(r"(\d{1,7})x(\d{1,7})", re.ASCII)


@attrs.frozen(kw_only=True)
class Geometry:
    """The shape and the weight type of every expert; a SwiGLU FFN of three matrices."""

    name: str
    d_model: int  # D
    d_ff: int  # F
    type: GGMLType

    @property
    def part_bytes(self) -> int:
        """Bytes of one matrix; gate, up and down have as many."""
        return tensor_bytes(self.type, (self.d_ff, self.d_model))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return len(PROJECTIONS) * self.part_bytes


def parse_geometry(text: str, weight_type: str) -> Geometry:
    """Return the geometry that a text names: a preset, a preset with d_ff divided as in "mixtral/16", or "DxF".

    Raises:
        ConfigError: there is no such preset or weight type, or a width is not a multiple of `STEP` or is absurd.
    """
    if weight_type not in WEIGHT_TYPES:
        raise ConfigError(f"no weight type is named {weight_type!r}; there are {', '.join(WEIGHT_TYPES)}")
    d_model, d_ff = _widths(text)
    if d_model % STEP or d_ff % STEP or not (0 < d_model <= 1 << 20 and 0 < d_ff <= 1 << 20):
        raise ConfigError(
            f"geometry {text!r} means d_model {d_model} and d_ff {d_ff}; both must be multiples of {STEP}, "
            f"above 0 and no larger than {1 << 20}"
        )
    return Geometry(name=text, d_model=d_model, d_ff=d_ff, type=WEIGHT_TYPES[weight_type])


def _widths(text: str) -> tuple[int, int]:
    """Return d_model and d_ff, not yet checked."""
    if (widths := _WIDTHS.fullmatch(text)) is not None:
        return int(widths[1]), int(widths[2])
    preset = _PRESET.fullmatch(text)
    if preset is None or preset[1] not in PRESETS or not int(preset[2] or 1):
        names = ", ".join(PRESETS)
        raise ConfigError(
            f"no geometry is named {text[:80]!r}; there are {names}, each also with d_ff divided as in {DEFAULT}, "
            "and widths such as 2048x768"
        )
    d_model, d_ff = PRESETS[preset[1]]
    divisor = int(preset[2] or 1)
    if d_ff % (divisor * STEP):
        works = [n for n in range(1, d_ff // STEP + 1) if d_ff % (n * STEP) == 0]
        raise ConfigError(
            f"geometry {text!r}: {d_ff} / {divisor} is not a multiple of {STEP}; "
            f"{preset[1]} can be divided by {', '.join(map(str, works))}"
        )
    return d_model, d_ff // divisor
