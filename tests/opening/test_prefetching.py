"""What prefetching keeps from run to run: whatever is wrong with its file or folder, the engine runs and says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import mer
from tests._lib.tiny_models import TinyModel, tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the predictors; that of the kernels is already chosen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mer" / "predictors"


def run(tiny: TinyModel) -> None:
    """Open an engine, generate, and close it."""

    async def generate() -> None:
        async with mer.open_engine(tiny.path, memory="8GiB", slots=4, threads=1, prefetch="markov") as engine:
            assert len((await engine.generate([5, 6, 7], max_tokens=6, ignore_eos=True)).tokens) == 6

    trio.run(generate)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], int]] = {  # and the lines that it is worth
    "empty": (lambda path: os.truncate(path, 0), 1),
    "cut": (lambda path: os.truncate(path, 100), 1),
    "flipped": (flipped, 1),
    "other bytes": (lambda path: path.write_bytes(b"x" * 5000), 1),
    "fifo": (as_fifo, 1),
    "dangling link": (as_dangling_link, 0),
    "gone": (lambda path: path.unlink(), 0),
}


@pytest.mark.parametrize(("damage", "lines"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_predictor_is_learnt_anew(
    damage: Callable[[Path], Any], lines: int, tiny: TinyModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny)
    (path,) = folder.iterdir()
    damage(path)
    run(tiny)
    assert len(caplog.messages) == lines
    assert all("\n" not in message for message in caplog.messages)
    assert path.is_file()
    run(tiny)
    assert len(caplog.messages) == lines
    assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("obstacle", ["a folder in its place", "a file above", "no home"])
def test_without_a_place_for_the_predictor_the_engine_runs(
    obstacle: str, tiny: TinyModel, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if obstacle == "a folder in its place":
        run(tiny)
        (path,) = folder.iterdir()
        as_folder(path)
    elif obstacle == "a file above":
        folder.parent.write_text("no folder")
    else:

        def nobody(number: int) -> Any:
            raise KeyError(number)

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "")
        monkeypatch.setattr("pwd.getpwuid", nobody)
    run(tiny)
    assert 1 <= len(caplog.messages) <= 2
