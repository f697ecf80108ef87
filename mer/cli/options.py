"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import attrs
from cyclopts import Group, Parameter

from mer.cli.settings import in_group, settings_given, with_settings
from mer.config import Sampling
from mer.errors import ConfigError

ENGINE = Group("Engine", sort_key=2)
CACHE = Group("Cache", sort_key=3)
GENERATION = Group("Generation", sort_key=1)


@Parameter(name="*", group=ENGINE)
@with_settings(in_group("engine"))
class EngineOptions:
    """How the engine is opened."""

    def arguments(self) -> dict[str, Any]:
        """Return them as keyword arguments of `open_engine` and `EngineConfig`."""
        return settings_given(self)


@Parameter(name="*", group=CACHE)
@with_settings(in_group("cache"))
class CacheOptions:
    """Which experts stay in memory, and what is kept of their use."""

    save_heat: Annotated[Path | None, Parameter(help="Write how often each expert was used to this file.")] = None

    def arguments(self) -> dict[str, Any]:
        """Return all but what is saved afterwards as keyword arguments of `open_engine`.

        Raises:
            ConfigError: what is to be saved could not be.
        """
        if self.save_heat is not None and (self.save_heat.is_dir() or not self.save_heat.parent.is_dir()):
            raise ConfigError(f"--save-heat {self.save_heat}: there can be no file of that name")
        return settings_given(self)


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
