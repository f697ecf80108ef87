"""Runs every code block of docs/testing.md, and looks at the names that `mer.testing` makes public."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mer.testing

GUIDE = Path(__file__).parent.parent / "docs" / "testing.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
FILES = {text.splitlines()[0].removeprefix("# "): text for language, text in BLOCKS if language == "python"}
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(GUIDE.parent.parent), "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_every_block_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert len(FILES) == sum(language == "python" for language, _ in BLOCKS)
    assert all(re.fullmatch(r"\w+\.py", name) for name in FILES)
    imported = set(re.findall(r"^from (\w+) import", "".join(FILES.values()), re.MULTILINE))
    assert {name for name in FILES if not name.startswith("test_")} <= {f"{name}.py" for name in imported}


@pytest.mark.slow
def test_the_tests_pass(folder: Path) -> None:
    done = run(folder, sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = set(re.findall(r"^PASSED (\w+\.py)::", done.stdout, re.MULTILINE))
    assert passed == {name for name in FILES if name.startswith("test_")}


NO_SHRINKING = """
from hypothesis import Phase, settings

settings.register_profile("fast", phases=[Phase.generate], database=None)
settings.load_profile("fast")
"""
LEAK = "        finally:\n            self.active -= 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_cancel.py", "test_machine.py"])
def test_the_tests_find_a_caller_that_is_lost(folder: Path, name: str) -> None:
    text = FILES["service.py"]
    assert LEAK in text
    text = text.replace(LEAK, "        except MerError:\n            pass\n        self.active -= 1\n")
    (folder / "conftest.py").write_text(NO_SHRINKING, encoding="utf-8")
    (folder / "service.py").write_text("from mer.errors import MerError\n" + text, encoding="utf-8")
    done = run(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "AssertionError" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_pass(tmp_path: Path, command: str) -> None:
    python, *arguments = command.split()
    assert python == "python"
    done = run(tmp_path, sys.executable, *arguments)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+ seeds passed|seed \d+: [0-9a-f]{16}", done.stdout)


def test_the_guide_is_short() -> None:
    assert len(GUIDE.read_text(encoding="utf-8").splitlines()) < 160


@pytest.mark.parametrize("name", mer.testing.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    value = getattr(mer.testing, name)
    module = importlib.import_module(f"mer.testing.{mer.testing._MODULE_OF[name]}")
    assert vars(module)[name] is value
    if inspect.isclass(value) or inspect.isroutine(value):
        assert inspect.getdoc(value)
        members = vars(value) if inspect.isclass(value) else {}
        undocumented = [
            key
            for key, member in members.items()
            if not key.startswith("_") and inspect.isfunction(member) and not member.__doc__
        ]
        assert not undocumented
    else:
        assert re.search(rf'^{name}\b.*?^"""', inspect.getsource(module), re.MULTILINE | re.DOTALL)


def test_public_names_are_those_that_are_known() -> None:
    assert sorted(mer.testing.__all__) == sorted(mer.testing._MODULE_OF)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mer.testing.nonsense  # noqa: B018
