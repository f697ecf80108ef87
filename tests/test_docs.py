"""What the documents link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import models_page

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Return the targets of a page's links, other than addresses in the web."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return what can be linked to within a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), f"{page.name} links to {target}, and there is no such file"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}, and there is no such heading"


def test_links_are_found() -> None:
    assert "docs/cache-policies.md" in links(ROOT / "README.md")
    assert "workloads" in anchors(ROOT / "docs" / "bench-stream.md")


def test_the_tables_of_models_are_those_of_the_registries() -> None:
    """If not, `python -m tests.models_page` writes them."""
    page = models_page.PAGE.read_text(encoding="utf-8")
    assert models_page.made(page) == page
    assert len(models_page.MARK.findall(page)) == len(models_page.TABLES)
