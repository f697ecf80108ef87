from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import mer
from mer.cli import demo, interrupt
from mer.cli.app import run_app
from mer.demo.files import DemoError
from mer.paths import cache_folder
from tests.cli.fake_engine import STORY, FakeEngine

TEXT = "".join(STORY)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, dict[str, Any]]]:
    """The calls of a `prepare_demo_model` that makes an empty file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MER_MEMORY", raising=False)
    calls: list[tuple[Path, dict[str, Any]]] = []

    def prepare(folder: Path, **options: Any) -> Path:
        calls.append((folder, options))
        for stage in ("download", "unpack", "convert"):
            options["on_progress"](stage, 0, 10)
            options["on_progress"](stage, 10, 10)
        path = tmp_path / "demo.gguf"
        path.touch()
        return path

    monkeypatch.setattr(demo, "prepare_demo_model", prepare)
    monkeypatch.setattr(demo, "default_memory", lambda path, options: "118MiB")
    return calls


@pytest.fixture
def engine(prepared: object, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr("mer.opening.engine.open_engine", fake.open)
    return fake


def test_answers_a_prompt_once(
    engine: FakeEngine, prepared: list[tuple[Path, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["demo", "Why?", "--experts", "32", "--from", "some.whl", "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == "Once upon a time\n"
    assert "Apache License 2.0" in err
    assert "Modified by mer" in err
    assert "making experts" in err
    assert "tokens/s" in err
    ((folder, options),) = prepared
    assert folder == cache_folder()
    assert (options["n_experts"], options["source"]) == (32, Path("some.whl"))
    assert engine.opened[0][1]["memory"] == "118MiB"
    assert engine.encoded[-1] == [mer.Message("user", "Why?")]


def test_converses_line_by_line_and_forgets_the_oldest(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n\n  \nHow?\nWho?"))
    engine.context = 79  # room for three messages and the answer to them
    assert run_app(["demo", "--memory", "1GiB", "--max-tokens", "49"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{TEXT}\n" * 3
    why, how, who = (mer.Message("user", text) for text in ("Why?", "How?", "Who?"))
    answer = mer.Message("assistant", TEXT)
    asked = [engine.encoded[i] for i in (0, 2, 5)]
    assert asked == [[why], [why, answer, how], [how, answer, who]]
    assert err.count("forgotten") == 1
    assert err.count("75.0% of 40 lookups hit; read 4.00 KiB") == 3, "figures are of one answer"
    assert engine.opened[0][1]["memory"] == "1GiB"


def test_a_message_that_cannot_fit_is_refused_and_forgotten(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.context = 10
    assert run_app(["demo", "Why?"]) == 2
    assert "mer: too long" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\nHow?\n"))
    assert run_app(["demo"]) == 0
    assert capsys.readouterr().err.count("mer: too long") == 2
    assert engine.encoded[-1] == [mer.Message("user", "How?")]


def test_ctrl_c_stops_an_answer_and_not_the_conversation(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\nHow?\n"))
    engine.hangs_after, engine.on_hang = 2, lambda: signal.raise_signal(signal.SIGINT)
    assert run_app(["demo"]) == 0
    assert capsys.readouterr().out == "Once upon\n" * 2
    assert run_app(["demo", "Why?"]) == 130


class Left(BaseException):
    """Stands for the end of the process."""


def test_ctrl_c_at_the_question_leaves_at_once(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        raise Left

    class Terminal(io.TextIOBase):
        def isatty(self) -> bool:
            return True

        def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
            signal.raise_signal(signal.SIGINT)
            raise AssertionError

    monkeypatch.setattr(interrupt, "leave_now", leave)
    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(Left):
        run_app(["demo"])


def test_a_model_that_cannot_be_made_fails(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(folder: Path, **options: Any) -> Path:
        raise DemoError("no pip; use --from")

    monkeypatch.setattr(demo, "prepare_demo_model", prepare)
    assert run_app(["demo"]) == 1
    assert "mer: no pip; use --from" in capsys.readouterr().err
    assert not engine.opened


def test_the_number_of_experts_is_checked_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_app(["demo", "--experts", "1"]) == 2
    assert "1 <= used <= experts <= 256" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
