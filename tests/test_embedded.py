from __future__ import annotations

import importlib.resources
from pathlib import Path

import gguf
import pytest

from mer.embedded import embedded_model_path
from mer.errors import ModelFileError


def test_the_embedded_model_is_a_mixture_of_experts_under_cc0() -> None:
    fields = gguf.GGUFReader(embedded_model_path()).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.expert_count"].contents() == 8
    assert fields["general.license"].contents() == "cc0-1.0"


def test_a_package_without_its_data_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(ModelFileError, match=r"embedded model is missing.*--model"):
        embedded_model_path()
