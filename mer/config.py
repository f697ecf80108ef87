"""What a user can set: the engine's configuration and a request's sampling parameters."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import attrs
from attrs.validators import optional

from mer.errors import ConfigError, RequestError
from mer.system import usable_cpus
from mer.units import parse_bytes


@attrs.frozen
class Progress:
    """How far a stage of opening an engine has come."""

    stage: str  # "kernels", "compiling kernels" if the cache lacks any, or "dense weights"
    done: int
    total: int
    unit: str  # "kernels" or "bytes"


Activations: TypeAlias = Literal["auto", "int8", "int15"]
"""How activations that meet quantized weights are rounded: int8 per block as ggml does, or 15 bits, whose error is 128
times smaller and whose prefill takes about twice the arithmetic. auto: 15 bits for models with d_model below 2048."""

IoEngine: TypeAlias = Literal["auto", "io_uring", "threads"]
PrefetchSetting: TypeAlias = Literal["off", "markov", "gate", "auto"]
"""Which guesses are read: those of Markov chains, of the next layer's router, or of the better one where it pays."""

KVType: TypeAlias = Literal["f32", "f16", "q8_0"]
"""How keys and values are kept: as float32, as half floats, or as ggml's Q8_0: int8, and a half float for every 32."""

Hybrid: TypeAlias = Literal["auto", "off"]
"""Beside a GPU, whether the processor computes experts that are only in memory, as many as measure faster."""

SMALL_MODEL = 2048  # d_model from which auto means int8
DEFAULT_MAX_TOKENS = 256


def _ignore(_progress: Progress) -> None:
    pass


def _at_least(minimum: int) -> Callable[[Any, attrs.Attribute[Any], int], None]:
    def check(_instance: Any, attribute: attrs.Attribute[Any], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{attribute.name} is {value!r}; it must be a whole number from {minimum} up")

    return check


def _one_of(*names: str) -> Callable[[Any, attrs.Attribute[Any], str], None]:
    def check(_instance: Any, attribute: attrs.Attribute[Any], value: str) -> None:
        if value not in names:
            raise ConfigError(f"{attribute.name} is {value!r}; it may be {', '.join(names)}")

    return check


def _bool(_instance: Any, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name} is {value!r}; it may be True or False")


def _path(value: str | os.PathLike[str]) -> Path:
    try:
        return Path(value)
    except TypeError:
        raise ConfigError(f"path is {value!r}; it must be the path of a GGUF file") from None


def _optional_path(value: str | os.PathLike[str] | None) -> Path | None:
    try:
        return None if value is None else Path(value)
    except TypeError:
        raise ConfigError(f"{value!r} is given as a file; it must be a path") from None


def _paths(values: Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    try:
        if not isinstance(values, str | os.PathLike):
            return tuple(map(Path, values))
    except TypeError:
        pass
    raise ConfigError(f"mirrors is {values!r}; it must be a list of paths of copies of the model")


def _text(_instance: Any, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{attribute.name} is {value!r}; it must be a name")


def _callable(_instance: Any, attribute: attrs.Attribute[Any], value: object) -> None:
    if not callable(value):
        raise ConfigError(f"{attribute.name} is {value!r}; it must be a function")


def _bytes(name: str, value: int | str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _memory_bytes(value: int | str | None) -> int | None:
    return _bytes("memory", value)


def _vram_bytes(value: int | str | None) -> int | None:
    return _bytes("vram", value)


def _device(_instance: Any, _attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|torch-cpu", value, re.ASCII):
        raise ConfigError(f"device is {value!r}; it may be auto, cpu, cuda or cuda:N")


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Everything that `open_engine` takes; None means chosen from the machine and the model, and reported.

    Raises:
        ConfigError: a value is out of range; the text names it.
    """

    path: Path = attrs.field(converter=_path)  # the GGUF file, or any part of a split one
    memory: int | None = attrs.field(default=None, converter=_memory_bytes)  # bytes for the whole process
    threads: int | None = attrs.field(default=None, validator=optional(_at_least(1)))  # compute threads
    io_threads: int | None = attrs.field(
        default=None, validator=optional(_at_least(1))
    )  # reads that each disk sees at once
    io_engine: IoEngine = attrs.field(default="auto", validator=_one_of(*get_args(IoEngine)))
    mirrors: tuple[Path, ...] = attrs.field(default=(), converter=_paths)  # copies on further drives
    slots: int | None = attrs.field(default=None, validator=optional(_at_least(1)))  # caps the expert slots
    context: int | None = attrs.field(
        default=None, validator=optional(_at_least(1))
    )  # positions of the longest sequence
    max_sequences: int | None = attrs.field(
        default=None, validator=optional(_at_least(1))
    )  # sequences that run at once
    batch_tokens: int | None = attrs.field(
        default=None, validator=optional(_at_least(1))
    )  # rows of a batch: the prefill chunk
    activations: Activations = attrs.field(default="auto", validator=_one_of("auto", "int8", "int15"))
    kv_type: KVType | None = attrs.field(default=None, validator=optional(_one_of("f32", "f16", "q8_0")))
    policy: str | None = attrs.field(default=None, validator=optional(_text))  # which experts stay, by name
    heat: Path | None = attrs.field(default=None, converter=_optional_path)  # a heat profile, for the policy "static"
    trace: Path | None = attrs.field(default=None, converter=_optional_path)  # a routing trace to make or continue
    prefix_reuse: bool = attrs.field(default=True, validator=_bool)  # of what was computed for the same tokens before
    prefetch: PrefetchSetting = attrs.field(default="auto", validator=_one_of("off", "markov", "gate", "auto"))
    device: str = attrs.field(default="auto", validator=_device)  # "auto", "cpu", "cuda" or "cuda:N"
    vram: int | None = attrs.field(default=None, converter=_vram_bytes)  # bytes of the device's own memory
    hybrid: Hybrid = attrs.field(default="auto", validator=_one_of("auto", "off"))
    vram_slots: int | None = attrs.field(default=None, validator=optional(_at_least(1)))  # caps the slots there
    on_progress: Callable[[Progress], None] = attrs.field(default=_ignore, validator=_callable)


def default_threads() -> int:
    """Return how many processors this process may use, by its affinity and by the quotas of its control groups."""
    return usable_cpus()[0]


def default_max_tokens(n_positions: int) -> int:
    """Return how many tokens a request gets at most that does not say so.

    Args:
        n_positions: what its prompt leaves of the context.
    """
    return max(1, min(DEFAULT_MAX_TOKENS, n_positions))


def _fraction(_instance: Any, attribute: attrs.Attribute[Any], value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value <= 1):
        raise RequestError(f"{attribute.name} is {value!r}; it must lie between 0 and 1")


def _temperature(_instance: Any, _attribute: attrs.Attribute[Any], value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value <= sys.float_info.max):
        raise RequestError(f"temperature is {value!r}; it must be a finite number from 0 up (0 is greedy)")


def _count(_instance: Any, attribute: attrs.Attribute[Any], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"{attribute.name} is {value!r}; it must be a whole number from 0 up")


@attrs.frozen
class Sampling:
    """How the next token is drawn from the logits.

    Filters apply in the order top-k, top-p, min-p, all on the probabilities at the given temperature.

    Raises:
        RequestError: a value is out of range; the text names it.
    """

    temperature: float = attrs.field(default=0.0, validator=_temperature)  # 0: greedy, the largest logit
    top_k: int = attrs.field(default=0, validator=_count)  # keep the k most likely; 0 keeps all
    top_p: float = attrs.field(default=1.0, validator=_fraction)  # keep the smallest set with this much probability
    min_p: float = attrs.field(default=0.0, validator=_fraction)  # drop what is below this share of the most likely
    seed: int | None = attrs.field(
        default=None, validator=optional(_count)
    )  # None draws a fresh one, which is reported
