"""The tables of docs/models.md, made of the registries; run as a script, they are written there."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from mer.io.extents import MATRIX_TYPES
from mer.model.registry import ARCHITECTURES
from mer.text.pretokenizers import PRE_TOKENIZERS

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MARK = re.compile(r"(<!-- (\w+): made by tests/models_page\.py -->\n).*?(<!-- end -->)", re.DOTALL)


def architectures() -> Iterator[str]:
    """Yield the rows of the architectures, as their modules' first sentences have them."""
    yield "| `general.architecture` | models |"
    yield "| --- | --- |"
    for name, read in sorted(ARCHITECTURES.items()):
        doc = importlib.import_module(read.__module__).__doc__
        assert doc is not None
        models = doc.split("\n\n")[0].replace("\n", " ").partition("architecture")[2].lstrip(": ").rstrip(".")
        yield f"| `{name}` | {models[0].upper()}{models[1:]} |"


def types() -> Iterator[str]:
    """Yield the rows of the weight types."""
    yield "| type | bits per weight | weights in a block |"
    yield "| --- | --- | --- |"
    for kind in sorted(MATRIX_TYPES, key=lambda it: (-it.block_bytes / it.block_size, it.name)):
        bits = 8 * kind.block_bytes / kind.block_size
        yield f"| {kind.name} | {bits:.4g} | {kind.block_size} |"


def tokenizers() -> Iterator[str]:
    """Yield the list of the pre-tokenizers."""
    yield ", ".join(f"`{name}`" for name in sorted(PRE_TOKENIZERS))


TABLES = {"architectures": architectures, "types": types, "tokenizers": tokenizers}


def made(page: str) -> str:
    """Return the page with its tables as the registries have them."""
    return MARK.sub(lambda match: match[1] + "\n".join(TABLES[match[2]]()) + "\n" + match[3], page)


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
