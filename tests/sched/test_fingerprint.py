"""A model's fingerprint: other for another header or other weights, the same wherever the model lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mer.io.gguf import read_gguf
from mer.sched.fingerprint import FINGERPRINT_BYTES, SAMPLE_BYTES, SAMPLES, model_fingerprint
from tests._lib.gguf_bytes import F32, I32, U32, Tensor, array, build, scalar, strings, text

ENTRIES = {
    "name": text("general.name", "a"),
    "count": scalar("x.count", U32, 7),
    "eps": scalar("x.eps", F32, 0.5),
    "tokens": strings("x.tokens", ["a", "bc"]),
    "types": array("x.types", I32, [1, 2, 3]),
}
TENSORS = {"a": Tensor("a"), "b": Tensor("b", dims=(4, 8))}
OTHERS: dict[str, bytes | Tensor] = {
    "name": text("general.name", "b"),
    "count": scalar("x.count", U32, 8),
    "eps": scalar("x.eps", F32, 0.25),
    "tokens": strings("x.tokens", ["ab", "c"]),  # the same text in all
    "types": array("x.types", I32, [1, 2, 4]),
    "a": Tensor("c"),
    "b": Tensor("b", dims=(8, 4)),
}


def fingerprint(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    return model_fingerprint(read_gguf(path))


def content(changes: dict[str, Any] | None = None, **more: Any) -> bytes:
    parts = {**ENTRIES, **TENSORS, **(changes or {})}
    return build([parts[key] for key in ENTRIES], [parts[key] for key in TENSORS], **more)


@pytest.mark.parametrize("changed", OTHERS)
def test_every_value_and_tensor_counts(changed: str, tmp_path: Path) -> None:
    mine = fingerprint(tmp_path / "a", content())
    assert len(mine) == FINGERPRINT_BYTES
    assert fingerprint(tmp_path / "b", content({changed: OTHERS[changed]})) != mine


def test_the_type_of_a_value_counts(tmp_path: Path) -> None:
    mine = fingerprint(tmp_path / "a", content())
    assert fingerprint(tmp_path / "b", content({"count": scalar("x.count", I32, 7)})) != mine
    assert fingerprint(tmp_path / "c", content({"types": array("x.types", U32, [1, 2, 3])})) != mine


def test_one_value_more_counts(tmp_path: Path) -> None:
    more = build([*ENTRIES.values(), scalar("x.more", U32, 0)], TENSORS.values())
    assert fingerprint(tmp_path / "a", content()) != fingerprint(tmp_path / "b", more)


def test_it_is_the_same_wherever_the_model_lies_and_in_whatever_order_it_says_things(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    mine = fingerprint(tmp_path / "a.gguf", content())
    assert fingerprint(tmp_path / "folder" / "other name.gguf", content()) == mine
    (tmp_path / "link").symlink_to(tmp_path / "a.gguf")
    assert model_fingerprint(read_gguf(tmp_path / "link")) == mine
    turned = build(reversed(ENTRIES.values()), TENSORS.values())
    assert fingerprint(tmp_path / "b.gguf", turned) == mine


def test_weights_tell_a_model_from_its_fine_tune(tmp_path: Path) -> None:
    """The first bytes of tensors count, at the model's beginning and its end; what lies behind them does not."""
    n_tensors, n_bytes = 3 * SAMPLES, 2 * SAMPLE_BYTES
    tensors = [Tensor(f"t{i}", dims=(n_bytes // 4,), n_bytes=n_bytes) for i in range(n_tensors)]
    data = bytearray(n_tensors * n_bytes)
    mine = fingerprint(tmp_path / "a", build(ENTRIES.values(), tensors, data=bytes(data)))
    sampled = [i * n_tensors // SAMPLES for i in range(SAMPLES)]
    for number, tensor in enumerate((sampled[0], sampled[7], sampled[-1])):
        changed = data.copy()
        changed[tensor * n_bytes + SAMPLE_BYTES - 1] = 1
        path = tmp_path / f"b{number}"
        assert fingerprint(path, build(ENTRIES.values(), tensors, data=bytes(changed))) != mine
    changed = data.copy()
    changed[SAMPLE_BYTES] = 1
    assert fingerprint(tmp_path / "c", build(ENTRIES.values(), tensors, data=bytes(changed))) == mine


def test_a_model_without_tensors_has_one_too(tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "a", build([])) != fingerprint(tmp_path / "b", build([ENTRIES["name"]]))
