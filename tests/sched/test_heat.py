"""Heat profiles: counted, kept whole through failures, and refused when they are another model's or malformed."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.sched.heat import HeatCounter, HeatProfile, ProfileError
from mer.sched.simulate import Event
from tests._lib.routing import routings

MODEL = bytes(range(32))


def profile(counts: list[list[int]] | None = None, visits: list[int] | None = None) -> HeatProfile:
    table = np.array([[1, 2, 0], [0, 5, 4]] if counts is None else counts, dtype=np.int64)
    return HeatProfile(MODEL, table, np.array([3, 5] if visits is None else visits, dtype=np.int64))


def load(path: Path, fingerprint: bytes = MODEL, n_layers: int = 2, n_experts: int = 3) -> HeatProfile:
    return HeatProfile.load(path, fingerprint=fingerprint, n_layers=n_layers, n_experts=n_experts)


@given(routing=routings())
@settings(max_examples=50, deadline=None)
def test_counts_uses_and_visits(routing: tuple[int, int, list[Event]]) -> None:
    n_layers, n_experts, events = routing
    counted = HeatProfile.count(MODEL, n_layers, n_experts, events)
    uses = Counter((layer, expert) for layer, experts in events for expert in experts)
    assert counted.counts.tolist() == [[uses[layer, e] for e in range(n_experts)] for layer in range(n_layers)]
    assert counted.visits.tolist() == [sum(visited == layer for visited, _ in events) for layer in range(n_layers)]
    assert counted.fingerprint == MODEL


def test_a_profile_is_a_snapshot_of_its_counter() -> None:
    counter = HeatCounter(MODEL, 1, 2)
    counter.use(0, [1])
    before = counter.profile()
    counter.use(0, [0, 1])
    assert before.counts.tolist() == [[0, 1]]
    assert counter.profile().counts.tolist() == [[1, 2]]


@given(data=st.data(), n_layers=st.integers(1, 4), n_experts=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_comes_back_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n_layers: int, n_experts: int
) -> None:
    path = tmp_path_factory.mktemp("heat") / "profile.json"
    visits = data.draw(st.lists(st.integers(0, 1 << 53), min_size=n_layers, max_size=n_layers))
    counts = [data.draw(st.lists(st.integers(0, most), min_size=n_experts, max_size=n_experts)) for most in visits]
    profile(counts, visits).save(path)
    back = load(path, n_layers=n_layers, n_experts=n_experts)
    assert (back.fingerprint, back.counts.tolist(), back.visits.tolist()) == (MODEL, counts, visits)
    assert back.counts.dtype == back.visits.dtype == np.int64


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    with pytest.raises(ProfileError, match=r"of another model .*; record one with this model"):
        load(path, fingerprint=bytes(32))
    with pytest.raises(ProfileError, match="visits must be 3 integers"):
        load(path, n_layers=3)
    with pytest.raises(ProfileError, match="2 lists of 4 integers"):
        load(path, n_experts=4)


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.0, 10**30])
def test_another_version_is_refused(version: object, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    document = json.loads(path.read_text())
    document["version"] = version
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=re.escape("a heat profile of version")):
        load(path)


NO_PROFILES: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(100),
    "no json": b"{",
    "a list": b"[]",
    "a number": b"1",
    "another object": b'{"format": "something else", "version": 1}',
    "no utf-8": b'{"format": "\xff"}',
    "deep": b"[" * 100_000,
    "a long number": b'{"format": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", NO_PROFILES)
def test_what_is_no_profile_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(NO_PROFILES[name])
    with pytest.raises(ProfileError, match="no heat profile"):
        load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("counts", None),
        ("counts", {}),
        ("counts", []),
        ("counts", [[1, 2, 0]]),
        ("counts", [[1, 2, 0], [0, 5]]),
        ("counts", [[1, 2, 0], [0, 5, 6]]),  # more uses than visits
        ("counts", [[1, 2, 0], [0, 5, -1]]),
        ("counts", [[1, 2, 0], [0, 5, True]]),
        ("counts", [[1, 2, 0], [0, 5, 1.0]]),
        ("counts", [[1, 2, 0], [0, 5, float("nan")]]),
        ("counts", [[1, 2, 0], "abc"]),
        ("visits", None),
        ("visits", [3]),
        ("visits", [3, 5, 5]),
        ("visits", [3, -5]),
        ("visits", [3, 2**53 + 1]),
        ("visits", [3, 10**400]),
        ("visits", "35"),
        ("fingerprint", None),
        ("fingerprint", MODEL.hex().upper()),
        ("fingerprint", MODEL.hex()[:-2]),
        ("fingerprint", ["x"] * 1000),
    ],
)
def test_hostile_fields_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    document = json.loads(path.read_text())
    document[field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError) as caught:
        load(path)
    assert len(str(caught.value)) < 400 + len(str(path))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_is_an_error_or_a_valid_profile(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("heat") / "profile.json"
    profile().save(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        back = load(path)
    except ProfileError:
        return
    assert back.fingerprint == MODEL
    assert back.counts.shape == (2, 3)
    assert (back.counts >= 0).all()
    assert (back.counts <= back.visits[:, None]).all()


def test_a_large_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(b"[" + b"[]," * (1 << 20) + b"[]]")
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ProfileError, match=r"profile\.json: no heat profile of this model: larger than the 4416 bytes"):
        load(path)


def test_an_indented_profile_of_large_counts_is_not_too_large(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    large = HeatProfile(MODEL, np.full((50, 60), 2**53), np.full(50, 2**53))
    large.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert HeatProfile.load(path, fingerprint=MODEL, n_layers=50, n_experts=60).counts.min() == 2**53


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json")


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # which nobody writes to
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ProfileError, match=f"{path}: no regular file but a"):
            load(path)


# --- the file is there whole, or as it was before ---


def test_a_disk_that_is_full_leaves_the_old_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            profile([[9, 9, 9], [9, 9, 9]], [9, 9]).save(path)
    assert load(path).visits.tolist() == [3, 5]
    assert os.listdir(tmp_path) == ["profile.json"]


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        profile().save(tmp_path / "no such folder" / "profile.json")


def test_a_profile_may_be_read_by_whom_files_usually_may(tmp_path: Path) -> None:
    """As any file that a program writes: what the umask allows."""
    path, plain = tmp_path / "profile.json", tmp_path / "plain"
    plain.touch()
    profile().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
