from __future__ import annotations

import copy
import pickle

import pytest

import mer

ERRORS = [
    mer.ReadError("a.gguf", 5, 7, "gone", 19),
    mer.ReadError("a.gguf", 5, 7, "gone", 19, tries=4),
    mer.ReadTimeout("a.gguf", 5, 7, "no answer for 30 s"),
    mer.FileSuspended("a.gguf", 5, 7, failures=5, next_try_s=1.5),
    mer.MirrorMismatch("b.gguf", 5, "it differs"),
    mer.FileChanged("changed"),
    mer.GGUFError("a.gguf", None, "odd"),
    mer.NotEnoughMemory("text", budget_bytes=1, needed_bytes=2),
    mer.EngineClosed("closed"),
    mer.ContextOverflow("long"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("again", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_errors_can_be_copied_and_sent_to_other_processes(error: mer.MerError, again: object) -> None:
    twin = again(error)  # type: ignore[operator]
    assert type(twin) is type(error)
    assert twin is not error
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)
