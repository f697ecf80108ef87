"""The engine's configuration."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import attrs
import pytest

import mer
from mer import config
from mer.config import EngineConfig, default_threads
from mer.errors import ConfigError


def test_sizes_come_as_text_or_bytes() -> None:
    assert EngineConfig(path="m.gguf", memory="8GiB").memory == 8 << 30
    assert EngineConfig(path="m.gguf", memory=123).memory == 123
    assert EngineConfig(path="m.gguf").path == Path("m.gguf")


@pytest.mark.parametrize("name", ["threads", "io_threads", "slots", "context", "max_sequences", "batch_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1"])
def test_numbers_are_checked_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .* whole number from 1 up"):
        EngineConfig(path=Path("m"), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [{"path": None}, {"on_progress": 3}], ids=str)
def test_paths_and_callbacks_are_checked(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} is "):
        EngineConfig(**{"path": Path("m"), **setting})  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", ["lots", -1, 1.5, True])
def test_a_size_that_is_none_is_refused(memory: object) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(path=Path("m"), memory=memory)  # type: ignore[arg-type]


def test_threads_follow_the_processors_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "usable_cpus", lambda: (3, "three"))
    assert default_threads() == 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"memroy": "8GiB"}, "unexpected keyword argument 'memroy'. Did you mean 'memory'?"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'. The settings are path, memory, threads, "),
    ],
)
def test_an_unknown_setting_is_named_at_once_with_what_it_may_be(settings: dict[str, object], text: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(f'open_engine() got an {text}')}"):
        mer.open_engine("m.gguf", **settings)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^open_engine\(\) missing a required argument: 'path'$"):
        mer.open_engine(**{})


@pytest.mark.parametrize("what", [mer.open_engine, EngineConfig], ids=["open_engine", "EngineConfig"])
def test_help_tells_every_setting(what: object) -> None:
    text = pydoc.plain(pydoc.render_doc(what))
    _, _, arguments = text.partition("Args:\n")
    told = re.findall(r"^[ |]*(\w+): .*\w", arguments.partition("Raises:")[0], re.MULTILINE)
    assert told == [field.name for field in attrs.fields(EngineConfig)]
