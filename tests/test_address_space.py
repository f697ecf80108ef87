"""A limit on the address space is an error that says so, before a library ends the process for it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from mer import address_space
from mer.address_space import (
    HEAP_BYTES,
    LIBRARY_BYTES,
    LIBRARY_DATA_BYTES,
    check_address_space,
    check_libraries_fit,
    naming_refusals,
)
from mer.errors import ConfigError, NotEnoughMemory
from mer.units import format_bytes

LIMITED = """
import resource, sys
resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]), resource.RLIM_INFINITY))
sys.argv[1:] = sys.argv[3:]
from mer.cli import main
main()
"""


def limited(n_bytes: int, *arguments: str, limit: str = "RLIMIT_AS") -> tuple[int, str]:
    """Run the command in an address space of so many bytes; return its exit code and what it says of errors."""
    line = [sys.executable, "-c", LIMITED, limit, str(n_bytes), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.parametrize("mib", [100, 200, 300, 400, 500])
def test_what_libraries_do_not_fit_is_refused_at_once(mib: int) -> None:
    code, said = limited(mib << 20, "run", "Once", "-n", "1")
    assert code == 4
    assert said.startswith(f"mer: the address space is limited to {mib} MiB (RLIMIT_AS)")
    assert said.count("\n") == 1


@pytest.mark.parametrize("mib", [60, 80, 150])
def test_what_the_data_of_libraries_does_not_fit_is_refused_at_once(mib: int) -> None:
    code, said = limited(mib << 20, "run", "Once", "-n", "1", limit="RLIMIT_DATA")
    assert code == 4
    assert said.startswith(f"mer: the data of a process is limited to {format_bytes(mib << 20)} (RLIMIT_DATA)")
    assert said.count("\n") == 1


def test_memory_that_is_refused_in_between_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotEnoughMemory, match="refuses more memory: give a smaller --memory"), naming_refusals():
        bytearray(1 << 62)
    with pytest.raises(ConfigError, match="refuses a thread; raise the limit"), naming_refusals():
        raise RuntimeError("can't start new thread")
    with pytest.raises(RuntimeError, match="another"), naming_refusals():
        raise RuntimeError("another")


def test_a_budget_that_the_address_space_does_not_hold_is_refused() -> None:
    code, said = limited(700 << 20, "run", "Once", "-n", "1", "--memory", "600MiB")
    assert code == 4
    assert "for this budget and this model" in said


def test_the_limit_counts_what_is_mapped_and_what_is_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    for limit, needed, fits in (
        (None, 1 << 50, True),
        (mapped + HEAP_BYTES + (300 << 20), 100 << 20, True),
        (mapped + HEAP_BYTES + (100 << 20), 300 << 20, False),
        (mapped + HEAP_BYTES + (100 << 20), -(300 << 20), True),
    ):
        monkeypatch.setattr(address_space, "address_space_limit", lambda limit=limit: limit)
        if fits:
            check_address_space(needed)
        else:
            with pytest.raises(NotEnoughMemory, match="ulimit -v") as caught:
                check_address_space(needed)
            assert caught.value.needed_bytes > caught.value.budget_bytes == limit


def test_no_limit_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_space, "address_space_limit", lambda: None)
    check_libraries_fit()
    monkeypatch.setattr(address_space, "address_space_limit", lambda: LIBRARY_BYTES)
    check_libraries_fit()
    monkeypatch.setattr(address_space, "address_space_limit", lambda: LIBRARY_BYTES - 1)
    with pytest.raises(NotEnoughMemory):
        check_libraries_fit()
    monkeypatch.setattr(address_space, "address_space_limit", lambda: None)
    monkeypatch.setattr(address_space, "data_limit", lambda: LIBRARY_DATA_BYTES)
    check_libraries_fit()
    monkeypatch.setattr(address_space, "data_limit", lambda: LIBRARY_DATA_BYTES - 1)
    with pytest.raises(NotEnoughMemory, match="ulimit -d"):
        check_libraries_fit()
