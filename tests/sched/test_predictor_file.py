"""Predictor files: what was learnt goes on where it was, and nothing that is wrong is believed."""

from __future__ import annotations

import errno
import os
import struct
import tracemalloc
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.sched import predictor_file
from mer.sched.predictor_file import PredictorFileError, load_predictor, save_predictor
from mer.sched.predictors.markov import MarkovPredictor
from mer.sched.simulate import Event
from tests._lib.chains import Chain, uniform

MODEL = bytes(range(32))
L, E, K = 3, 6, 2
SECOND = L * E  # number of the first context of second order
HEADER = struct.Struct("<8sHHIIII32sII")
HEADER_BYTES = HEADER.size + 4
SHARED = {"first_bytes": 12 * 24, "second_bytes": 40 * 24}  # 11 rows for 18 contexts, 39 for 108

Arrays = dict[str, npt.NDArray[Any]]


def kinds(n_contexts: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the arrays as docs/prefetch.md describes them."""
    return {
        "visits": ("<i8", (L,)),
        "uses": ("<i8", (L, E)),
        "averages": ("<f4", (L, 4, E)),
        "sizes": ("<f8", (L,)),
        "weights": ("<f8", (L, 5)),
        "moments": ("<f8", (L, 6, 6)),
        "samples": ("<f8", (L,)),
        "contexts": ("<i8", (n_contexts,)),
        "counts": ("<u2", (n_contexts, E + 1)),
    }


def parse(content: bytes) -> Arrays:
    header = HEADER.unpack(content[: HEADER.size])
    assert header[:6] == (b"MERMARKV", 1, 0, L, E, K)
    assert header[7:] == (MODEL, len(content) - HEADER_BYTES, zlib.crc32(content[HEADER_BYTES:]))
    assert struct.unpack("<I", content[HEADER.size : HEADER_BYTES])[0] == zlib.crc32(content[: HEADER.size])
    payload, arrays = zlib.decompress(content[HEADER_BYTES:]), {}
    for name, (kind, shape) in kinds(header[6]).items():
        array = np.frombuffer(payload, kind, int(np.prod(shape))).reshape(shape)
        payload = payload[array.nbytes :]
        arrays[name] = array.copy()
    assert not payload
    return arrays


def build(arrays: Arrays | None = None, *, payload: bytes | None = None, **changes: Any) -> bytes:
    """Return a file with valid checksums, of arrays or of a payload."""
    if payload is None:
        assert arrays is not None
        payload = zlib.compress(b"".join(arrays[name].tobytes() for name in kinds(0)))
    values = {
        "magic": b"MERMARKV",
        "version": 1,
        "flags": 0,
        "n_layers": L,
        "n_experts": E,
        "top_k": K,
        "n_contexts": 0 if arrays is None else len(arrays["contexts"]),
        "fingerprint": MODEL,
        "n_bytes": len(payload),
        "checksum": zlib.crc32(payload),
        **changes,
    }
    header = HEADER.pack(*values.values())
    return header + struct.pack("<I", zlib.crc32(header)) + payload


def load(path: Path, **changes: Any) -> MarkovPredictor:
    arguments: dict[str, Any] = {"fingerprint": MODEL, "n_layers": L, "n_experts": E, "top_k": K, **changes}
    return load_predictor(path, **arguments)


def routing(n_passes: int, seed: int) -> list[Event]:
    return [event for event, _ in Chain.draw(L, E, seed=1, width=2).events(n_passes, seed=seed)]


def widened(events: Sequence[Event]) -> list[Event]:
    """Return events that use one expert more."""
    return [(layer, tuple(sorted({*experts, (experts[0] + 1) % E}))) for layer, experts in events]


def learn(predictor: MarkovPredictor, events: Sequence[Event]) -> MarkovPredictor:
    for layer, experts in events:
        predictor.observe(layer, experts)
    return predictor


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small file."""
    path = tmp_path / "model.markov"
    save_predictor(path, learn(MarkovPredictor(L, E, K), routing(3, seed=2)), MODEL)
    return path


# --- what was learnt goes on where it was ---


@pytest.mark.parametrize("sizes", [{}, SHARED], ids=["roomy", "shared"])
@pytest.mark.parametrize("large", [False, True])
def test_a_loaded_predictor_says_what_the_saved_one_would(sizes: dict[str, int], large: bool, tmp_path: Path) -> None:
    """Up to the next fit weights may be some events apart; with fits at the same time all is the same from there on.

    Only of contexts that share a row another one may win it later on. Larger batches, which are predicted without
    second order, need what the features have in common.
    """
    path = tmp_path / "model.markov"
    events = [*routing(400, seed=2), *widened(routing(40, seed=3)), (0, (1, 2))]
    saved = learn(MarkovPredictor(L, E, K, **sizes), events)
    save_predictor(path, saved, MODEL)
    back = load(path, **sizes)
    assert (back.visits, back.uses, back.sizes) == (saved.visits, saved.uses, saved.sizes)
    assert (back.averages == saved.averages).all()
    for regression, other in zip(saved.regressions, back.regressions, strict=True):
        other._events = regression._events
        for n_missing in range(3):
            assert other.weights(n_missing) == pytest.approx(regression.weights(n_missing), abs=0.01)
    for seed in range(4):
        differences, different, predicted = [], 0, 0
        for layer, experts in widened(routing(20, seed=seed)) if large else routing(20, seed=seed):
            saved.observe(layer, experts)
            back.observe(layer, experts)
            assert back.shares == pytest.approx(saved.shares, abs=1e-5)
            for target in range(layer + 1, L):
                differences.append(np.abs(back._probabilities(target) - saved._probabilities(target)))
                ours, theirs = ({key for key, _ in one.predict(target)} for one in (saved, back))
                different += len(ours ^ theirs)
                predicted += len(ours)
        assert different <= (0.2 if sizes else 0.02) * predicted
        if sizes:
            assert np.mean(differences) < 0.03
        else:
            assert np.max(differences) < (1e-4 if seed else 0.02)


def test_what_is_counted_is_in_the_file(tmp_path: Path) -> None:
    """Against plain counters."""
    path = tmp_path / "model.markov"
    events = routing(30, seed=3)
    save_predictor(path, learn(MarkovPredictor(L, E, K), events), MODEL)
    arrays = parse(path.read_bytes())
    visits: Counter[int] = Counter()
    follow: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for at, (layer, used) in enumerate(events):
        before = [set(experts) for _, experts in events[max(0, at - 2) : at]]
        contexts = [layer * E + a for a in before[-1]] if before else []
        if len(before) == 2:
            contexts += [SECOND + layer * E * E + a * E + b for a in before[0] for b in before[1]]
        for context in contexts:
            visits[context] += 1
            follow[context].update(used)
    assert arrays["contexts"].tolist() == sorted(visits)
    assert arrays["counts"].tolist() == [[*(follow[c][e] for e in range(E)), visits[c]] for c in sorted(visits)]
    uses = Counter((layer, expert) for layer, experts in events for expert in experts)
    assert arrays["uses"].tolist() == [[uses[layer, e] for e in range(E)] for layer in range(L)]
    assert arrays["visits"].tolist() == [30] * L


def test_a_new_predictor_can_be_saved(tmp_path: Path) -> None:
    save_predictor(tmp_path / "new", MarkovPredictor(L, E, K), MODEL)
    back = load(tmp_path / "new")
    assert back.visits == [0] * L
    events = routing(80, seed=2)
    assert learn(back, events).predict(0) == learn(MarkovPredictor(L, E, K), events).predict(0) != []


def test_the_commonest_contexts_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.markov"
    predictor = learn(MarkovPredictor(L, E, K), routing(60, seed=4))
    save_predictor(path, predictor, MODEL)
    visits = parse(path.read_bytes())["counts"][:, -1]
    monkeypatch.setattr(predictor_file, "MAX_COUNT_BYTES", 30 * (2 * (E + 1) + 8))
    save_predictor(path, predictor, MODEL)
    fewer = parse(path.read_bytes())
    assert len(fewer["contexts"]) == 30 < len(visits)
    assert sorted(fewer["counts"][:, -1]) == sorted(visits)[-30:]
    assert load(path).table.rows(100)[0].tolist() == fewer["contexts"].tolist()


# --- what is refused ---


@pytest.mark.parametrize(
    "other", [{"fingerprint": bytes(32)}, {"n_layers": L + 1}, {"n_experts": E + 1}, {"top_k": K + 1}]
)
def test_another_model_is_refused(other: dict[str, Any], saved: Path) -> None:
    with pytest.raises(PredictorFileError, match="for another model"):
        load(saved, **other)


def test_every_truncation_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        with pytest.raises(PredictorFileError):
            load(saved)


def test_every_flipped_byte_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        saved.write_bytes(damaged)
        with pytest.raises(PredictorFileError):
            load(saved)


@pytest.mark.parametrize(("version", "flags"), [(0, 0), (2, 0), (1, 1)])
def test_another_version_is_refused(version: int, flags: int, saved: Path) -> None:
    saved.write_bytes(build(parse(saved.read_bytes()), version=version, flags=flags))
    with pytest.raises(PredictorFileError, match=f"of version {version}, flags {flags}; this release reads 1"):
        load(saved)


def test_bytes_more_or_less_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content + b"\0")
    with pytest.raises(PredictorFileError, match=f"it has {len(content) + 1} bytes instead of {len(content)}"):
        load(saved)
    arrays = parse(content)
    stream = content[HEADER_BYTES:]
    for payload in (stream + b"\0", stream[:-1], zlib.compress(zlib.decompress(stream) + b"\0")):
        saved.write_bytes(build(arrays, payload=payload))
        with pytest.raises(PredictorFileError, match="its counts are not"):
            load(saved)


@pytest.mark.parametrize("payload", [b"", b"no zlib", zlib.compress(b""), zlib.compress(bytes(10_000))[:-1]])
def test_other_payloads_are_refused(payload: bytes, saved: Path) -> None:
    saved.write_bytes(build(parse(saved.read_bytes()), payload=payload))
    with pytest.raises(PredictorFileError, match="its counts are not"):
        load(saved)


@pytest.mark.parametrize(
    ("n_contexts", "match"),
    [
        (0, "compressed bytes are more than"),
        (2**20, "its counts are not"),
        (2**32 - 1, "4294967295 contexts are more than"),
    ],
)
def test_what_would_take_much_memory_is_refused(n_contexts: int, match: str, saved: Path) -> None:
    """Of 48 MB of zeros no more is inflated than the contexts account for, at most 32 MiB; zlib has that twice."""
    saved.write_bytes(build(payload=zlib.compress(bytes(48_000_000), 1), n_contexts=n_contexts))
    most = n_contexts * 22 if n_contexts <= 2**20 else 0
    tracemalloc.start()
    try:
        with pytest.raises(PredictorFileError, match=match):
            load(saved)
        assert tracemalloc.get_traced_memory()[1] < 2 * most + 1_000_000
    finally:
        tracemalloc.stop()


def test_a_payload_that_no_counts_fill_is_refused_unread(saved: Path) -> None:
    """Of a file of 64 MiB of holes nothing but the header is read."""
    n_bytes = 64 << 20
    saved.write_bytes(build(payload=b"", n_bytes=n_bytes))
    os.truncate(saved, saved.stat().st_size + n_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(PredictorFileError, match=f"{n_bytes} compressed bytes are more than"):
            load(saved)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "at", "value", "match"),
    [
        ("visits", 0, -1, "less than never"),
        ("visits", 0, 2**53 + 1, "too often"),
        ("uses", (0, 0), -1, "an expert has been used"),
        ("uses", (0, 0), 4, "an expert has been used"),
        ("averages", (0, 0, 0), NAN, "no probability"),
        ("averages", (0, 0, 0), -0.01, "no probability"),
        ("averages", (2, 3, 5), 1.01, "no probability"),
        ("averages", (1, 3), 0.0, "no expert of a layer"),
        ("sizes", 0, 0.0, "more experts than there are, or none"),
        ("sizes", 0, 6.01, "more experts than there are, or none"),
        ("sizes", 0, NAN, "more experts than there are, or none"),
        ("weights", (0, 0), -0.01, "weights must be"),
        ("weights", (0, 0), 1.01, "weights must be"),
        ("weights", (0, 0), NAN, "weights must be"),
        ("moments", (0, 0, 1), INF, "moments must be"),
        ("moments", (0, 0, 1), -2e18, "moments must be"),
        ("moments", (0, 1, 1), -1.0, "moments must be"),
        ("moments", (0, 1, 1), NAN, "moments must be"),
        ("samples", 0, NAN, "samples must be"),
        ("samples", 0, INF, "samples must be"),
        ("samples", 0, 0.0, "samples must be"),
        ("contexts", 0, -1, "contexts must be"),
        ("contexts", -1, SECOND * (E + 1), f"contexts must be ascending numbers below {SECOND * (E + 1)}"),
        ("contexts", 1, 0, "contexts must be"),
        ("counts", (0, 0), 7, "a context has been visited"),
        ("counts", (0, -1), 0, "a context has been visited"),
        ("counts", (0, -1), 9217, "a context has been visited"),
    ],
)
def test_numbers_that_cannot_be_are_refused(name: str, at: Any, value: float, match: str, saved: Path) -> None:
    arrays = parse(saved.read_bytes())
    arrays[name][at] = value
    saved.write_bytes(build(arrays))
    with pytest.raises(PredictorFileError, match=match):
        load(saved)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_what_is_not_refused_can_be_used(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("predictor") / "model.markov"
    save_predictor(path, learn(MarkovPredictor(L, E, K), routing(6, seed=2)), MODEL)
    arrays = parse(path.read_bytes())
    extremes: dict[str, list[float]] = {
        "visits": [0, 2**53 - 40],
        "sizes": [5e-324, 6.0],
        "counts": [0, 1, 9216],
        "moments": [0.0, 1.0, -1e18, 1e18],
        "samples": [0.0, 1e18],
    }
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=4)):
        array = arrays[name]
        value = data.draw(st.sampled_from(extremes.get(name, [0.0, 1.0])))
        if data.draw(st.booleans()):
            array[data.draw(st.integers(0, len(array) - 1))] = value
        else:
            array.reshape(-1)[data.draw(st.integers(0, array.size - 1))] = value
    path.write_bytes(build(arrays))
    try:
        predictor = load(path)
    except PredictorFileError:
        return
    for layer, experts in uniform(L, E, K, 40, seed=data.draw(st.integers(0, 9))):
        for target in range(L):
            assert all(0 <= probability <= 1 for _, probability in predictor.predict(target))
        predictor.observe(layer, experts)
    save_predictor(path, predictor, MODEL)
    assert load(path).visits == predictor.visits


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    """A pipe without a writer would keep whoever opens it waiting."""
    os.mkfifo(tmp_path / "fifo")
    n_open = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(PredictorFileError, match="no regular file"):
            load(path)
    assert len(os.listdir("/proc/self/fd")) == n_open
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"MERMARK", b"GGUF" + bytes(200)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(PredictorFileError, match="it does not begin with b'MERMARKV'") as caught:
            load(tmp_path / "other")
        assert (caught.value.path, caught.value.offset) == (tmp_path / "other", 0)


# --- the file is there whole, or as it was before ---


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_what_was_there(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.markov"
    if existing:
        save_predictor(path, MarkovPredictor(L, E, K), MODEL)
    before = path.read_bytes() if existing else None

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_predictor(path, learn(MarkovPredictor(L, E, K), routing(6, seed=2)), MODEL)
    assert (path.read_bytes() if existing else None) == before
    assert sorted(os.listdir(tmp_path)) == (["model.markov"] if existing else [])
