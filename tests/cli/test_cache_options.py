"""`mer run --policy --heat --save-heat --trace`: what they refuse with the fake engine, and do with the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mer
from mer.cli.app import run_app
from mer.cli.exits import Exit
from mer.embedded import embedded_model_path
from mer.io.gguf import read_gguf
from mer.sched.fingerprint import model_fingerprint
from mer.sched.heat import HeatProfile
from mer.sched.trace import TraceReader
from tests.cli.fake_engine import FakeEngine

RUN = ("run", "--memory", "2GiB", "-n", "8", "--slots", "9")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr("mer.opening.engine.open_engine", engine.open)
    return engine


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_the_heat_of_a_run_is_saved(fake: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "h.json"
    assert run_app(["run", "Tell me", "--save-heat", str(path)]) == Exit.OK
    back = HeatProfile.load(path, fingerprint=bytes(32), n_layers=1, n_experts=2)
    assert back.counts.tolist() == [[1, 2]]


def test_a_heat_profile_that_could_not_be_saved_is_refused_before_loading(
    fake: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "none" / "h.json"):
        assert run_app(["run", "Tell me", "--save-heat", str(path)]) == Exit.USAGE
        assert "there can be no file of that name" in said(capsys)
    assert not fake.opened


def test_an_answer_whose_heat_cannot_be_saved_is_there_all_the_same(
    fake: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: HeatProfile, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(HeatProfile, "save", full)
    assert run_app(["run", "Tell me", "--save-heat", str(tmp_path / "h")]) == Exit.FAILED
    out, err = capsys.readouterr()
    assert out.startswith("Once upon a time")
    assert "No space left on device" in " ".join(err.split())


def test_record_profile_and_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's trace, replayed with its policy and slots, hits as the run did; its heat is that of the trace.

    If no job reads by itself: those go by what the policy knew before the token.
    """
    trace, heat = tmp_path / "t", tmp_path / "h.json"

    def run_json(*arguments: str) -> dict[str, Any]:
        settings = ("--prefetch", "off", "--io-engine", "threads", "--json")
        assert run_app([*RUN, "Once upon a time", *arguments, *settings]) == Exit.OK
        return json.loads(capsys.readouterr().out)

    first = run_json("--trace", str(trace), "--save-heat", str(heat))
    assert (first["settings"]["policy"], first["settings"]["trace"]) == ("lfru", str(trace))
    fingerprint = model_fingerprint(read_gguf(embedded_model_path()))
    with TraceReader(trace) as reader:
        header, events = reader.header, list(reader)
    assert (header.n_layers, header.n_experts, header.top_k, header.fingerprint) == (6, 8, 2, fingerprint)
    assert set(header.expert_bytes) == {3 * 192 * 384 // 32 * 34}
    assert [event.layer for event in events] == [0, 1, 2, 3, 4, 5] * (len(events) // 6)
    assert [event.n_tokens for event in events][::6] == [6] + [1] * 7
    assert all(len(event.experts) == 2 for event in events[6:])
    stats = first["stats"]
    assert sum(len(event.experts) for event in events) == stats["cache_hits"] + stats["cache_misses"]
    assert run_app(["simulate", str(trace), "--policy", "lfru", "--slots", "9", "--json"]) == Exit.OK
    replayed = json.loads(capsys.readouterr().out)["results"][0]
    assert (replayed["hits"], replayed["misses"]) == (stats["cache_hits"], stats["cache_misses"])
    profile = HeatProfile.load(heat, fingerprint=fingerprint, n_layers=6, n_experts=8)
    counted = HeatProfile.count(fingerprint, 6, 8, [(event.layer, event.experts) for event in events])
    assert profile.counts.tolist() == counted.counts.tolist()

    static = run_json("--policy", "static", "--heat", str(heat), "--trace", str(trace))
    assert static["tokens"] == first["tokens"]
    assert (static["settings"]["policy"], static["settings"]["heat"]) == ("static", str(heat))
    with TraceReader(trace) as reader:
        assert list(reader) == [*events, *events]

    assert run_app(["simulate", str(trace), "--policy", "static", "--heat", str(heat), "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["events"] == 2 * len(events)


def test_unfit_files_and_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heat, other = tmp_path / "h.json", tmp_path / "other.json"
    HeatProfile.count(model_fingerprint(read_gguf(embedded_model_path())), 6, 8, []).save(heat)
    HeatProfile.count(bytes(32), 6, 8, []).save(other)
    trace = tmp_path / "t"
    trace.write_bytes(b"something else")

    def refused(code: Exit, *arguments: str) -> str:
        assert run_app([*RUN, "Once", *arguments]) == code
        return said(capsys)

    assert "no policy is named 'fifo'" in refused(Exit.USAGE, "--policy", "fifo")
    assert "needs a heat profile" in refused(Exit.USAGE, "--policy", "static")
    assert "the policy is 'lfru'; drop one of them" in refused(Exit.USAGE, "--heat", str(heat))
    assert "of another model" in refused(Exit.FAILED, "--policy", "static", "--heat", str(other))
    assert "No such file" in refused(Exit.FAILED, "--policy", "static", "--heat", str(tmp_path / "none"))
    assert "no routing trace" in refused(Exit.FAILED, "--trace", str(trace))
    assert trace.read_bytes() == b"something else"
    assert "No such file" in refused(Exit.FAILED, "--trace", str(tmp_path / "none" / "t"))


async def test_settings_of_a_wrong_kind_are_refused() -> None:
    for arguments in ({"policy": 5}, {"heat": 5}, {"trace": 5}):
        with pytest.raises(mer.ConfigError):
            async with mer.open_engine("m.gguf", **arguments):  # type: ignore[arg-type]
                pass
