"""Every setting of an engine: taken by `open_engine`, offered by the command line, and reported as it is in force."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

import mer
from mer.cli.app import app, run_app
from mer.cli.bench import NOT_MEASURED, BenchEngineOptions
from mer.cli.options import CacheOptions, EngineOptions
from mer.cli.settings import spellings
from mer.config import EngineConfig, Progress
from mer.embedded import embedded_model_path

FIELDS: tuple[attrs.Attribute[Any], ...] = tuple(attrs.fields(EngineConfig))
NAMES = {field.name for field in FIELDS}

# What each may be given as; the ones of a GPU are tested on torch's own device for the CPU.
GIVEN: dict[str, Any] = {
    "memory": "2GiB",
    "threads": 1,
    "slots": 9,
    "context": 96,
    "max_sequences": 3,
    "batch_tokens": 24,
    "max_waiting": 5,
    "io_threads": 3,
    "io_engine": "threads",
    "activations": "int15",
    "kv_type": "q8_0",
    "prefix_reuse": False,
    "stream_dense": "off",
    "device": "cpu",
    "prefetch": "markov",
    "policy": "static",
}
GIVEN_FILES = ("mirrors", "heat", "trace", "on_progress")  # made in the test
GIVEN_GPU: dict[str, Any] = {
    "memory": "8GiB",
    "device": "torch-cpu",
    "vram": "256MiB",
    "vram_slots": 12,
    "hybrid": "off",
}

# Where `Settings` reports what goes by another name there.
REPORTED_AS = {"memory": "memory_bytes", "vram": "budget_bytes", "vram_slots": "slots"}
NOT_REPORTED = {
    "path": "Engine.gguf.paths tells the files",
    "on_progress": "it is the caller's own",
}
NOT_ON_THE_COMMAND_LINE = {
    "path": "it is the argument MODEL",
    "max_sequences": "a command makes one request at a time",
    "max_waiting": "a command makes one request at a time",
    "prefix_reuse": "a command computes no prompt twice; mer bench switches it off",
    "batch_tokens": "by the plan: a larger chunk takes slots, a smaller one reads experts more often",
    "io_threads": "by the reader: what a drive needs to be busy",
    "on_progress": "the command draws bars",
}


def in_force(settings: mer.Settings, name: str) -> object:
    """Return what is reported of a setting."""
    owner: object = settings
    if name in ("vram", "vram_slots", "hybrid"):
        owner = settings.vram
    return getattr(owner, REPORTED_AS.get(name, name))


def as_reported(config: EngineConfig, name: str) -> object:
    """Return what is to be reported of a setting that was given."""
    value = getattr(config, name)
    if isinstance(value, tuple):
        return tuple(map(str, value))
    return str(value) if isinstance(value, Path) else value


def test_a_new_setting_is_tested_here() -> None:
    assert set(GIVEN) | set(GIVEN_FILES) | set(GIVEN_GPU) | {"path"} == NAMES


@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
async def test_every_setting_is_in_force_and_reported(gpu: bool, tmp_path: Path) -> None:
    path = embedded_model_path()
    told: list[Progress] = []
    given: Mapping[str, Any] = GIVEN_GPU
    if not gpu:
        heat, mirror = tmp_path / "heat.json", tmp_path / path.name
        shutil.copyfile(path, mirror)
        async with mer.open_engine(path, memory="2GiB", threads=1) as engine:
            engine.heat_profile().save(heat)
        given = GIVEN | {"heat": heat, "trace": tmp_path / "trace", "mirrors": [mirror], "on_progress": told.append}
    async with mer.open_engine(path, **given) as engine:
        settings = engine.statistics().settings
    config = EngineConfig(path=path, **given)
    for name in given.keys() - NOT_REPORTED.keys():
        expected = as_reported(config, name)
        assert expected != next(field.default for field in FIELDS if field.name == name), f"{name}: the default"
        assert in_force(settings, name) == expected, name
    assert bool(told) is not gpu


@pytest.mark.parametrize(("name", "reason"), NOT_REPORTED.items())
def test_what_is_not_reported_has_a_reason(name: str, reason: str) -> None:
    assert reason
    assert name in NAMES - {field.name for field in attrs.fields(mer.Settings)}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_setting_is_an_option_or_has_a_reason_not_to_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MER_MEMORY", "MER_THREADS", "MER_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    value = (GIVEN | {"vram": "1GiB", "vram_slots": 7, "hybrid": "off"}).get(name, "some/file")
    option = "--" + name.replace("_", "-")
    if name in NOT_ON_THE_COMMAND_LINE:
        assert NOT_ON_THE_COMMAND_LINE[name]
        assert run_app(["run", "Once", option, str(value)]) == 2
        return
    for command in (["run", "Once"], ["bench"]):
        if command == ["bench"] and name in NOT_MEASURED:
            continue
        for written in spellings(name):
            _, bound, _ = app.parse_args([*command, written, str(value)], exit_on_error=False, print_error=False)
            settings: dict[str, Any] = {}
            for options in bound.arguments.values():
                if isinstance(options, EngineOptions | CacheOptions | BenchEngineOptions):
                    settings |= options.arguments()
            expected: dict[str, Any] = {name: [value] if name == "mirrors" else value}
            assert EngineConfig(path="m", **settings) == EngineConfig(path="m", **expected)


def test_commands_and_open_engine_have_the_same_defaults() -> None:
    for options in (EngineOptions(), CacheOptions(), BenchEngineOptions()):
        assert EngineConfig(path="m", **options.arguments()) == EngineConfig(path="m")


@pytest.mark.parametrize("max_waiting", [0, -1, True, 1.0, None])
def test_a_queue_without_places_is_refused(max_waiting: Any) -> None:
    async def open_it() -> None:
        async with mer.open_engine("no.gguf", max_waiting=max_waiting):
            pass

    with pytest.raises(mer.ConfigError, match=r"^max_waiting is .*; it must be a whole number from 1 up"):
        trio.run(open_it)
