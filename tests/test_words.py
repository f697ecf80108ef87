"""Words of the project: headings name the thing, and every word is one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted((ROOT / "mer").rglob("*.py"))
QUESTION = re.compile(r"(What|Who|Whose|Whom|Whoever|Which|Whether|How|Where|When|Why)\b", re.IGNORECASE)
NO_WORDS = re.compile(r"\bmani?e?th\b", re.IGNORECASE)


def heading(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def test_module_headings_name_the_thing() -> None:
    asking = {path.relative_to(ROOT).as_posix() for path in MODULES if QUESTION.match(heading(path))}
    assert asking == set(), "say 'Priorities of reads.' instead of 'What is read before what.'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_headings_name_the_thing(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE) if QUESTION.match(line)] == []


def test_every_word_is_one() -> None:
    assert [path for path in [*PAGES, *MODULES] if NO_WORDS.search(path.read_text(encoding="utf-8"))] == []
