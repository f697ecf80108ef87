"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import attrs

from mer.errors import ConfigError
from mer.sched.heat import HeatProfile
from mer.sched.policies.cost_aware import CostAware
from mer.sched.policies.layer_lru import LayerLRU
from mer.sched.policies.lfru import LFRU
from mer.sched.policies.lfu import LFU
from mer.sched.policies.static import StaticHotSet
from mer.sched.policy import Policy


@attrs.frozen(kw_only=True)
class CacheShape:
    """Facts of the cache that policies may depend on."""

    n_layers: int
    n_experts: int  # per layer
    n_slots: int
    kinds: tuple[tuple[int, ...], ...] | None = None  # [L][E], class of slots that each expert fits; None: all the same
    slot_counts: tuple[int, ...] | None = None  # slots of each class; None: one class
    expert_bytes: tuple[int, ...] = ()  # of one expert, by layer; empty where unknown
    profile: HeatProfile | None = None

    def __attrs_post_init__(self) -> None:
        if (self.kinds is None) != (self.slot_counts is None):
            raise ValueError("kinds and slot_counts belong together")


def _static(shape: CacheShape) -> Policy:
    if shape.profile is None:
        raise ConfigError("the policy 'static' needs a heat profile")
    return StaticHotSet(shape.profile, kinds=shape.kinds)


def _cost(shape: CacheShape) -> Policy:
    if not shape.expert_bytes or not all(shape.expert_bytes):
        raise ConfigError("the policy 'cost' needs the sizes of the experts")
    return CostAware(shape.expert_bytes, shape.n_experts, kinds=shape.kinds)


POLICIES: Final[Mapping[str, Callable[[CacheShape], Policy]]] = MappingProxyType(
    {
        "lfru": lambda shape: LFRU(shape.n_layers, shape.n_experts, kinds=shape.kinds),
        "layer-lru": lambda shape: LayerLRU(
            shape.n_layers, shape.n_slots if shape.slot_counts is None else shape.slot_counts, kinds=shape.kinds
        ),
        "lfu": lambda shape: LFU(shape.n_layers, shape.n_experts, kinds=shape.kinds),
        "static": _static,
        "cost": _cost,
    }
)
"""{name: maker of a fresh policy}"""

DEFAULT_POLICY: Final = "lfru"


def make_policy(name: str, shape: CacheShape) -> Policy:
    """Return a fresh policy.

    Raises:
        ConfigError: there is none of that name, or it needs something that `shape` lacks.
    """
    if name not in POLICIES:
        raise ConfigError(f"no policy is named {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name](shape)
