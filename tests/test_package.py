"""The package's public names: there as soon as they are asked for, and imported no sooner."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mer


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(("module", "own"), [("mer", ["mer"]), ("mer.cli", ["mer", "mer.cli"])])
def test_importing_the_package_imports_hardly_anything(module: str, own: list[str]) -> None:
    """The sooner `mer.cli` is there, the sooner the command listens for ctrl-C."""
    code = f"import sys; before = set(sys.modules); import {module}; print(*sorted(set(sys.modules) - before))"
    loaded = python(code).split()
    assert [name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names] == own
    assert not {"typing", "dataclasses", "inspect", "importlib.resources"} & set(loaded)


def test_every_public_name_can_be_had() -> None:
    code = (
        "from mer import *; import mer; print(*(name for name in mer.__all__ if globals()[name] is getattr(mer, name)))"
    )
    assert python(code).split() == mer.__all__
    for name in mer.__all__:
        assert getattr(mer, name).__name__ == name


def test_a_new_process_lists_them_and_refuses_others() -> None:
    code = "import mer; print(*dir(mer)); print(hasattr(mer, 'Enigne'), hasattr(mer, 'typing'))"
    listed, others = python(code).splitlines()
    assert set(mer.__all__) <= set(listed.split())
    assert others == "False False"
