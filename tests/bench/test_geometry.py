from __future__ import annotations

import pytest

from mer.bench.geometry import DEFAULT, PRESETS, parse_geometry
from mer.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "weight_type", "d_model", "d_ff", "expert_bytes"),
    [
        ("mixtral", "q4_0", 4096, 14336, 99_090_432),
        ("mixtral", "f32", 4096, 14336, 704_643_072),
        ("mixtral/4", "q4_0", 4096, 3584, 24_772_608),
        (DEFAULT, "q4_0", 4096, 896, 6_193_152),
        ("qwen3-30b", "q4_0", 2048, 768, 2_654_208),
        ("64x32", "q4_0", 64, 32, 3 * 64 * 18),
        ("64x32", "f32", 64, 32, 3 * 64 * 32 * 4),
    ],
)
def test_sizes(text: str, weight_type: str, d_model: int, d_ff: int, expert_bytes: int) -> None:
    geometry = parse_geometry(text, weight_type)
    assert (geometry.name, geometry.d_model, geometry.d_ff) == (text, d_model, d_ff)
    assert geometry.expert_bytes == expert_bytes == 3 * geometry.part_bytes


def test_every_divisor_that_is_offered_works() -> None:
    for name, (_, d_ff) in PRESETS.items():
        with pytest.raises(ConfigError, match="can be divided by") as caught:
            parse_geometry(f"{name}/{d_ff}", "q4_0")
        for divisor in str(caught.value).rpartition(" by ")[2].split(", "):
            assert parse_geometry(f"{name}/{divisor}", "q4_0").d_ff == d_ff // int(divisor)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no geometry is named"),
        ("mixtrall", "no geometry is named"),
        ("mixtral/", "no geometry is named"),
        ("mixtral/0", "no geometry is named"),
        ("mixtral/00", "no geometry is named"),
        ("mixtral/-4", "no geometry is named"),
        ("mixtral/\u0664", "no geometry is named"),
        ("mixtral/5", "not a multiple of 32"),
        ("mixtral/999999", "not a multiple of 32"),
        ("64", "no geometry is named"),
        ("64x", "no geometry is named"),
        ("64x33", "must be multiples of 32"),
        ("0x32", "above 0"),
        ("32x0", "above 0"),
        ("9999968x32", "no larger than"),
        ("9" * 5000 + "x32", "no geometry is named"),
    ],
)
def test_hostile_texts(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_geometry(text, "q4_0")


def test_an_unknown_weight_type() -> None:
    with pytest.raises(ConfigError, match="there are q4_0, f32"):
        parse_geometry("mixtral", "q3_k")
