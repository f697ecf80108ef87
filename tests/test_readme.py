from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def block(marker: str, language: str) -> str:
    """Return the code block that follows a marker comment of the README."""
    text = README.read_text(encoding="utf-8")
    match = re.search(rf"^<!-- {marker} -->\n```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"the README has no {language} block marked {marker!r}"
    return match[1]


def test_the_commands_are_one_line_each() -> None:
    assert block("install-and-run", "sh").count("\n") == 1
    assert block("test", "sh").count("\n") == 1


def test_the_example_generates_text(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block("example", "python")],
        capture_output=True,
        text=True,
        cwd=README.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5
