"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
from cyclopts import Group, Parameter

from mer.config import Sampling
from mer.errors import ConfigError

ENGINE = Group("Engine", sort_key=2)
CACHE = Group("Cache", sort_key=3)
GENERATION = Group("Generation", sort_key=1)


@Parameter(name="*", group=ENGINE)
@attrs.frozen(kw_only=True)
class EngineOptions:
    """How the engine is opened."""

    memory: Annotated[
        str | None,
        Parameter(
            env_var="MER_MEMORY",
            help="Bytes the whole process may use, such as 8GiB or 512MiB. [default: what the machine can spare]",
        ),
    ] = None
    threads: Annotated[
        int | None, Parameter(alias="-t", env_var="MER_THREADS", help="Compute threads. [default: one per core]")
    ] = None
    mirrors: Annotated[
        tuple[Path, ...],
        Parameter(
            name="--mirror",
            negative="",
            show_default=False,
            help="A copy of the model on another drive, which shares the reading; may be given again.",
        ),
    ] = ()
    slots: Annotated[
        int | None, Parameter(help="Keep at most so many experts in memory. [default: what the memory holds]")
    ] = None
    context: Annotated[
        int | None, Parameter(alias=("-c", "--ctx-size"), help="Tokens that prompt and answer may have together.")
    ] = None

    io_engine: Annotated[
        Literal["auto", "io_uring", "threads"],
        Parameter(help="What reads: the kernel's io_uring, or threads. [default: the first that can be had]"),
    ] = "auto"

    activations: Annotated[
        Literal["auto", "int8", "int15"],
        Parameter(help="Precision of activations that meet quantized weights; int15 doubles a prefill's arithmetic."),
    ] = "auto"

    kv_type: Annotated[
        Literal["f32", "f16", "q8_0"] | None,
        Parameter(
            name="--kv-type", help="How keys and values are kept. [default: f32 for a model of F32 weights, else f16]"
        ),
    ] = None

    device: Annotated[
        str,
        Parameter(
            env_var="MER_DEVICE",
            help="What computes: cpu, cuda, cuda:N, or auto, which takes a GPU if torch can use one.",
        ),
    ] = "auto"
    vram: Annotated[
        str | None,
        Parameter(help="Bytes of the GPU's memory the engine may use, such as 6GiB. [default: what is free there]"),
    ] = None
    hybrid: Annotated[
        Literal["auto", "off"],
        Parameter(help="Beside a GPU, let the processor compute experts that are only in memory where that is faster."),
    ] = "auto"
    vram_slots: Annotated[
        int | None, Parameter(help="Keep at most so many experts on the GPU. [default: what its memory holds]")
    ] = None

    prefetch: Annotated[
        Literal["off", "markov", "gate", "auto"],
        Parameter(help="Which guesses at what the next layer needs are read while the disk is idle."),
    ] = "auto"

    def arguments(self) -> dict[str, Any]:
        """Return them as keyword arguments of `open_engine` and `plan_memory`."""
        return attrs.asdict(self)


@Parameter(name="*", group=CACHE)
@attrs.frozen(kw_only=True)
class CacheOptions:
    """Which experts stay in memory, and what is kept of their use."""

    policy: Annotated[
        str | None,
        Parameter(help="Which experts stay in memory: lfru, layer-lru, lfu, static or cost. [default: lfru]"),
    ] = None
    heat: Annotated[Path | None, Parameter(help="Heat profile of the model, for the policy 'static'.")] = None
    save_heat: Annotated[Path | None, Parameter(help="Write how often each expert was used to this file.")] = None
    trace: Annotated[
        Path | None, Parameter(help="Record which experts every batch uses, for mer simulate; continues a trace.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Return all but what is saved afterwards as keyword arguments of `open_engine`.

        Raises:
            ConfigError: what is to be saved could not be.
        """
        if self.save_heat is not None and (self.save_heat.is_dir() or not self.save_heat.parent.is_dir()):
            raise ConfigError(f"--save-heat {self.save_heat}: there can be no file of that name")
        return {"policy": self.policy, "heat": self.heat, "trace": self.trace}


@Parameter(name="*", group=GENERATION)
@attrs.frozen(kw_only=True)
class GenerationOptions:
    """What is generated, and how tokens are chosen."""

    max_tokens: Annotated[
        int | None,
        Parameter(alias="-n", help="Stop after so many tokens. [default: 256, or what the context has left]"),
    ] = None
    temperature: Annotated[float, Parameter(help="0 always takes the most probable token.")] = 0.0
    top_k: Annotated[int, Parameter(help="Choose among the most probable so many tokens; 0 is all.")] = 0
    top_p: Annotated[float, Parameter(help="Choose among the fewest tokens that have this probability together.")] = 1.0
    min_p: Annotated[float, Parameter(help="Leave out tokens below this share of the highest probability.")] = 0.0
    seed: Annotated[int | None, Parameter(help="The same seed gives the same text. [default: random]")] = None
    stop: Annotated[
        tuple[str, ...], Parameter(help="Stop before this text; may be given again.", negative="", show_default=False)
    ] = ()
    ignore_eos: Annotated[
        bool, Parameter(negative="", help="Never end the text before --max-tokens.", show_default=False)
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Return all but the number of tokens as keyword arguments of `Engine.stream`."""
        sampling = Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self.seed
        )
        return {
            "sampling": sampling,
            "stop": self.stop,
            "ignore_eos": self.ignore_eos,
        }


def parse_token_ids(text: str) -> list[int]:
    """Return the token ids of a text such as "1,2,3".

    Raises:
        ConfigError: it is not such a list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ConfigError(f"--tokens {text!r} is not a list of token ids such as 1,2,3")
    return [int(part) for part in parts]
