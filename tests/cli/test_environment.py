"""Environment variables of the command, and budgets in the forms in which it prints them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from mer.cli.app import run_app
from mer.cli.environment import forget_empty


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    names = ("MER_MEMORY", "MER_THREADS", "MER_DEVICE")
    for name in names:
        monkeypatch.setenv(name, value)
    forget_empty()
    assert not set(names) & set(os.environ)
    monkeypatch.setenv("MER_THREADS", "3")
    forget_empty()
    assert os.environ["MER_THREADS"] == "3"


@pytest.mark.parametrize(
    ("variable", "value", "option", "code"),
    [
        ("MER_MEMORY", "much", "--memory=8GiB", 2),
        ("MER_MEMORY", "1MiB", "--memory=8GiB", 4),
        ("MER_THREADS", "0", "--threads=1", 2),
        ("MER_THREADS", "two", "-t=1", 2),
        ("MER_DEVICE", "abacus", "--device=cpu", 2),
    ],
)
def test_messages_name_the_variable(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    option: str,
    code: int,
) -> None:
    memory = () if variable == "MER_MEMORY" else ("--memory=8GiB",)
    monkeypatch.setenv(variable, value)
    assert run_app(["plan", *memory]) == code
    assert variable in capsys.readouterr().err
    assert run_app(["plan", *memory, option]) == 0  # what is given goes before
    name, _, given = option.partition("=")
    bad = {"-t": "0", "--threads": "0", "--memory": "much", "--device": "abacus"}[name]
    assert run_app(["plan", *memory, f"{name}={bad}"]) == 2
    assert given
    assert variable not in capsys.readouterr().err


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Plan for the embedded model in a process of its own: what this one holds already would count."""
    command = [sys.executable, "-m", "mer", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_smallest_budget_is_taken_in_every_form_in_which_it_is_printed() -> None:
    refused = plan("--memory", "1MiB")
    assert refused.returncode == 4
    said = re.search(r"the smallest that works is ((\d+) bytes) \(--memory (\w+)\)", refused.stderr)
    assert said is not None
    printed = re.search(r"the smallest that works is (.*)", plan("--memory", "8GiB").stdout)
    assert printed is not None
    exact = int(said[2])
    for text in (*said.groups(), printed[1], f"{exact:,}", f"{exact:,} bytes"):
        done = plan("--memory", text)
        assert done.returncode == 0, (text, done.stderr)
    assert plan("--memory", str(exact - 1)).returncode == 4
