"""Settings that a user can make: the engine's configuration and a request's sampling parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import attrs
from attrs.validators import optional

from mer import checks
from mer.errors import RequestError
from mer.setting import Option, about, documented
from mer.system import usable_cpus


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
StreamDense: TypeAlias = Literal["auto", "on", "off"]
PrefetchMode: TypeAlias = Literal["off", "markov", "gate", "auto"]
"""Which guesses are read: those of Markov chains, of the next layer's router, or of the better one where it pays."""

KVType: TypeAlias = Literal["f32", "f16", "q8_0"]
"""How keys and values are kept: as float32, as half floats, or as ggml's Q8_0: int8, and a half float for every 32."""

Hybrid: TypeAlias = Literal["auto", "off"]
"""Beside a GPU, whether the processor computes experts that are only in memory, as many as measure faster."""

SMALL_MODEL = 2048  # d_model from which auto means int8
DEFAULT_MAX_TOKENS = 256


def _ignore(_progress: Progress) -> None:
    pass


def _listener(value: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
    return _ignore if value is None else value


@attrs.frozen
class _ModelFile:
    """The one setting that may be given by its place: `EngineConfig(path)`, `open_engine(path)`."""

    path: Path = attrs.field(converter=checks.model_path, metadata=about("the GGUF file, or any part of a split one."))


@documented
@attrs.frozen(kw_only=True)
class EngineConfig(_ModelFile):
    """The settings of an engine, which `open_engine` takes; None is chosen from the machine and the model.

    `Engine.statistics().settings` reports what is in force.

    Raises:
        ConfigError: a value is out of range; the text names it.
    """

    # A setting is written here, and in `Settings` and `settings_in_force`, which report it. From here come the
    # parameters of `open_engine` and the options of the command line, in this order, and what is said of both.

    memory: int | None = attrs.field(
        default=None,
        converter=checks.memory_bytes,
        metadata=about(
            'bounds the whole process, in bytes or as text such as "8GiB"; by default the control group\'s limit or '
            "what is available.",
            Option(
                "Bytes the whole process may use, such as 8GiB or 512MiB. [default: what the machine can spare]",
                type=str | None,
                variable="MER_MEMORY",
            ),
        ),
    )
    threads: int | None = attrs.field(
        default=None,
        validator=optional(checks.at_least(1)),
        metadata=about(
            "compute threads; by default one per processor.",
            Option("Compute threads. [default: one per core]", short=("-t",), variable="MER_THREADS"),
        ),
    )
    mirrors: tuple[Path, ...] = attrs.field(
        default=(),
        converter=checks.mirror_paths,
        metadata=about(
            "identical copies of the file, or of all parts of a split one under the same names, on further drives: "
            "each a path of the copy or of its folder. They are compared with the original by header and samples, and "
            "share the reading by how fast they are.",
            Option(
                "A copy of the model on another drive, which shares the reading; may be given again.", name="--mirror"
            ),
        ),
    )
    slots: int | None = attrs.field(
        default=None,
        validator=optional(checks.at_least(1)),
        metadata=about(
            "caps the expert slots below what the budget allows.",
            Option("Keep at most so many experts in memory. [default: what the memory holds]"),
        ),
    )
    context: int | None = attrs.field(
        default=None,
        validator=optional(checks.at_least(1)),
        metadata=about(
            "positions of the longest sequence.",
            Option("Tokens that prompt and answer may have together.", short=("-c", "--ctx-size")),
        ),
    )
    max_sequences: int | None = attrs.field(
        default=None,
        validator=optional(checks.at_least(1)),
        metadata=about("sequences that run at once; by default 8, or what a small prefill chunk allows."),
    )
    batch_tokens: int | None = attrs.field(
        default=None,
        validator=optional(checks.at_least(1)),
        metadata=about("rows of a batch, which is also the prefill chunk."),
    )
    max_waiting: int = attrs.field(
        default=64,
        validator=checks.at_least(1),  # every request goes through the queue, also when nothing runs
        metadata=about(
            "requests that may be queued; while so many are, `Engine.generate` and `stream` wait to be queued."
        ),
    )
    io_threads: int | None = attrs.field(
        default=None,
        validator=optional(checks.at_least(1)),
        metadata=about("reads that each disk sees at once; by default 8 with io_uring and 4 with threads."),
    )
    io_engine: IoEngine = attrs.field(
        default="auto",
        validator=checks.one_of(*get_args(IoEngine)),
        metadata=about(
            'what makes them: "io_uring", "threads", or "auto", which takes the first if the system and the files '
            "allow it.",
            Option("What reads: the kernel's io_uring, or threads. [default: the first that can be had]"),
        ),
    )
    activations: Activations = attrs.field(
        default="auto",
        validator=checks.one_of(*get_args(Activations)),
        metadata=about(
            'precision of activations that meet quantized weights: "int8", "int15", or "auto" by the model\'s size.',
            Option(
                "Precision of activations that meet quantized weights; int15 doubles a prefill's arithmetic.",
            ),
        ),
    )
    kv_type: KVType | None = attrs.field(
        default=None,
        validator=optional(checks.one_of(*get_args(KVType))),
        metadata=about(
            'how keys and values are kept: "f32", "f16" or "q8_0"; by default "f32" for a model of F32 weights, else '
            '"f16".',
            Option("How keys and values are kept. [default: f32 for a model of F32 weights, else f16]"),
        ),
    )
    prefix_reuse: bool = attrs.field(
        default=True,
        validator=checks.true_or_false,
        metadata=about("whether prompts use what was computed for the same tokens before."),
    )
    device: str = attrs.field(
        default="auto",
        validator=checks.device,
        metadata=about(
            '"cpu", "cuda", "cuda:N", or "auto", which takes the first GPU that torch can use; see docs/cuda.md.',
            Option(
                "What computes: cpu, cuda, cuda:N, or auto, which takes a GPU if torch can use one.",
                variable="MER_DEVICE",
            ),
        ),
    )
    vram: int | None = attrs.field(
        default=None,
        converter=checks.vram_bytes,
        metadata=about(
            "bounds what the engine takes of the GPU's memory, in bytes or as text; by default what is free there.",
            Option(
                "Bytes of the GPU's memory the engine may use, such as 6GiB. [default: what is free there]",
                type=str | None,
            ),
        ),
    )
    hybrid: Hybrid = attrs.field(
        default="auto",
        validator=checks.one_of(*get_args(Hybrid)),
        metadata=about(
            'whether the processor computes experts that are only in memory beside the GPU: "auto", as many as '
            'measure faster, or "off". With "auto" tokens may depend on what is where.',
            Option("Beside a GPU, let the processor compute experts that are only in memory where that is faster."),
        ),
    )
    vram_slots: int | None = attrs.field(
        default=None,
        validator=optional(checks.at_least(1)),
        metadata=about(
            "caps the expert slots on the GPU below what its memory allows.",
            Option("Keep at most so many experts on the GPU. [default: what its memory holds]"),
        ),
    )
    stream_dense: StreamDense = attrs.field(
        default="auto",
        validator=checks.one_of(*get_args(StreamDense)),
        metadata=about(
            'whether the feed-forward networks of a dense model stream from the disk as experts do: "on", "off", or '
            '"auto", which lets them where the model is larger than the memory.',
            Option("Whether a dense model's feed-forward networks stream; auto: where the model does not fit."),
        ),
    )
    prefetch: PrefetchMode = attrs.field(
        default="auto",
        validator=checks.one_of(*get_args(PrefetchMode)),
        metadata=about(
            'which guesses at what the next layer needs are read while the disk is idle: "off", "markov", "gate" or '
            '"auto", which reads what is worth it and tries out whether it pays; see docs/prefetch.md.',
            Option("Which guesses at what the next layer needs are read while the disk is idle."),
        ),
    )
    policy: str | None = attrs.field(
        default=None,
        validator=optional(checks.name),
        metadata=about(
            'which experts stay in memory: "lfru", "layer-lru", "lfu", "static" or "cost"; by default "lfru".',
            Option(
                "Which experts stay in memory: lfru, layer-lru, lfu, static or cost. [default: lfru]", group="cache"
            ),
        ),
    )
    heat: Path | None = attrs.field(
        default=None,
        converter=checks.optional_path,
        metadata=about(
            'a heat profile of this model, which the policy "static" needs.',
            Option("Heat profile of the model, for the policy 'static'.", group="cache"),
        ),
    )
    trace: Path | None = attrs.field(
        default=None,
        converter=checks.optional_path,
        metadata=about(
            "a file that the routing is recorded in, made or appended to; see docs/traces.md. If it cannot be written "
            "any more, it ends with a warning in the log, and the engine goes on.",
            Option(
                "Record which experts every batch uses, for mer simulate; continues a trace.",
                group="cache",
            ),
        ),
    )
    on_progress: Callable[[Progress], None] = attrs.field(
        default=None,
        converter=_listener,
        validator=checks.function,
        metadata=about("called in the trio thread as kernels are compiled and weights are read."),
    )


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
