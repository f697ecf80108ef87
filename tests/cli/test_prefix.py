"""`mer run --prefix FILE`: with a fake of the engine's door, and with the engine itself."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

import mer
from mer.cli import interrupt
from mer.cli.app import run_app
from mer.errors import RequestError
from tests.cli.fake_engine import FakeEngine

LONG = "Once upon a time there was a little girl who had a red ball. " * 8
MEMORY = ("--memory", "2GiB")


@attrs.define
class SavingEngine(FakeEngine):
    """A fake that saves prompts as text."""

    too_short: bool = False
    presses_while_saving: bool = False
    saved: list[Path] = attrs.Factory(list)

    async def load_prefix(self, path: Path) -> int:
        return len(await trio.Path(path).read_text())

    async def save_prefix(self, prompt: Any, path: Path) -> int:
        assert self.asked, "saved before the prompt was read"
        if self.too_short:
            raise RequestError("it is short")
        if self.presses_while_saving:
            self.on_hang()
            await trio.sleep_forever()
        self.saved.append(path)
        await trio.Path(path).write_text("".join(map(chr, self.encode(prompt))))
        return 3


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SavingEngine:
    fake = SavingEngine()
    monkeypatch.setattr("mer.opening.engine.open_engine", fake.open)
    return fake


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what was said about the prefix."""
    return [line.removeprefix("prefix: ") for line in capsys.readouterr().err.splitlines() if "prefix: " in line]


def run(arguments: Iterable[str], path: Path) -> int:
    return run_app(["run", *arguments, "--prefix", str(path)])


def test_a_prompt_is_saved_where_there_is_no_file(
    engine: SavingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x"
    assert run(["Tell me"], path) == 0
    assert notes(capsys) == [f"3 of 4 prompt tokens saved to {path}"]
    assert path.read_text() == "Tell me"
    engine.saved.clear()
    assert run(["Tell me more"], path) == 0
    assert notes(capsys) == [
        f"7 tokens restored from {path}",
        "nothing of it was reused, as the prompt begins otherwise",
    ]
    assert not engine.saved


def test_a_short_prompt_is_no_failure(engine: SavingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine.too_short = True
    assert run(["Tell me"], tmp_path / "x") == 0
    assert notes(capsys) == ["not saved: it is short"]


@pytest.mark.parametrize(
    ("when", "n_tokens", "want"),
    [
        ("reading", 0, "not saved, as the prompt was not read to its end"),
        ("generating", 2, "3 of 4 prompt tokens saved to {path}"),
        ("saving", 9, "not saved: interrupted"),
    ],
)
def test_ctrl_c(
    engine: SavingEngine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    n_tokens: int,
    want: str,
) -> None:
    monkeypatch.setattr(interrupt, "leave_now", lambda: pytest.fail("left at once"))
    engine.on_hang = lambda: signal.raise_signal(signal.SIGINT)
    engine.hangs_after = None if when == "saving" else n_tokens
    engine.presses_while_saving = when == "saving"
    assert run(["Tell me"], tmp_path / "x") == (0 if when == "saving" else 130)
    assert notes(capsys) == [want.format(path=tmp_path / "x")]
    assert bool(engine.saved) == (when == "generating")


def test_a_folder_that_is_not_there_is_refused_before_loading(
    engine: SavingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["Tell me"], tmp_path / "no" / "x") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not engine.opened


# --- the engine itself ---


def test_the_second_run_reads_only_the_rest_and_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "story.prefix"
    printed = []
    for _ in range(2):
        assert run([*MEMORY, LONG + "One day", "-n", "12", "--json"], path) == 0
        out, err = capsys.readouterr()
        printed.append((json.loads(out), [line for line in err.splitlines() if "prefix" in line]))
    (first, said_first), (second, said_second) = printed
    assert os.listdir(tmp_path) == [path.name]
    n_prompt = first["stats"]["prompt_tokens"]
    whole = n_prompt // 64 * 64
    assert whole >= 64
    assert second["tokens"] == first["tokens"]
    assert (first["stats"]["reused_tokens"], second["stats"]["reused_tokens"]) == (
        0,
        min(whole, (n_prompt - 1) // 64 * 64),
    )
    assert said_first == [f"prefix: {whole} of {n_prompt} prompt tokens saved to {path}"]
    assert said_second == [
        f"prefix: {whole} tokens restored from {path}",
        f"prefix: {second['stats']['reused_tokens']} of {n_prompt} prompt tokens reused",
    ]
    assert run([*MEMORY, LONG + "Then", "-n", "2"], path) == 0
    assert f" ({whole} reused), " in capsys.readouterr().err


def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    path.write_bytes(mer.embedded_model_path().read_bytes()[:5000])
    assert run([*MEMORY, "Once"], path) == 1
    assert "no saved prefix" in capsys.readouterr().err
    assert run([*MEMORY, "Once"], tmp_path) == 1
    assert "no regular file" in capsys.readouterr().err
