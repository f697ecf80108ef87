"""Replaying routing through a cache policy, without weights, slots or time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeAlias, overload

import attrs

from mer.errors import ConfigError
from mer.io.extents import ExpertKey
from mer.sched.policy import Policy

Event: TypeAlias = tuple[int, Sequence[int]]
"""(layer, its union of experts over a batch, each once)"""


class EventList(Sequence[Event]):
    """Events in little memory: two bytes for each expert, and ten for each event."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._layers, self._experts, self._ends = array("H"), array("H"), array("Q", [0])
        for layer, experts in events:
            self._layers.append(layer)
            self._experts.extend(experts)
            self._ends.append(len(self._experts))

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, at: int) -> Event: ...
    @overload
    def __getitem__(self, at: slice) -> list[Event]: ...
    def __getitem__(self, at: int | slice) -> Event | list[Event]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        return self._layers[number], tuple(self._experts[self._ends[number] : self._ends[number + 1]])


@attrs.define
class Simulation:
    """Results of a replay, by layer."""

    policy: str
    n_slots: int
    n_layers: int
    layer_hits: list[int] = attrs.Factory(lambda self: [0] * self.n_layers, takes_self=True)
    layer_lookups: list[int] = attrs.Factory(lambda self: [0] * self.n_layers, takes_self=True)

    def count(self, layer: int, hits: int, lookups: int) -> None:
        """Add an event."""
        self.layer_hits[layer] += hits
        self.layer_lookups[layer] += lookups

    @property
    def hits(self) -> int:
        """Lookups that found their expert."""
        return sum(self.layer_hits)

    @property
    def lookups(self) -> int:
        """Experts looked up, after the union over each batch."""
        return sum(self.layer_lookups)

    @property
    def hit_rate(self) -> float:
        """Hits per lookup, 0 without lookups."""
        return self.hits / self.lookups if self.lookups else 0.0

    def missed_bytes(self, expert_bytes: Sequence[int]) -> int:
        """Return the bytes of all misses where an expert of layer l has `expert_bytes[l]`."""
        missed = (n - hits for n, hits in zip(self.layer_lookups, self.layer_hits, strict=True))
        return sum(n * size for n, size in zip(missed, expert_bytes, strict=True))


def simulate(
    events: Iterable[Event], policy: Policy, n_slots: int, *, n_layers: int, bypass: bool = False
) -> Simulation:
    """Replay events through a policy with `n_slots` slots, empty at first.

    An event is atomic: all its experts are looked up before any is inserted, and none of them leaves as long as another
    expert can.

    Args:
        events: (layer, experts) in order.
        policy: a fresh one; it is used up.
        n_slots: experts that can be kept.
        n_layers: layers of the model.
        bypass: ask the policy whether a newcomer should be kept at all; one that should not takes no slot, as in an
            engine that has buffers beyond its slots. Otherwise every newcomer takes a slot, as in one that has not.

    Raises:
        ConfigError: there is no slot.
    """
    if n_slots < 1:
        raise ConfigError(f"a cache needs at least 1 slot, not {n_slots}")
    result = Simulation(policy.name, n_slots, n_layers)
    kept: set[ExpertKey] = set()
    for layer, experts in events:
        policy.use(layer, experts)
        idle = partial(_is_other, frozenset((layer, expert) for expert in experts))
        missing = [expert for expert in experts if (layer, expert) not in kept]
        result.count(layer, len(experts) - len(missing), len(experts))
        for expert in missing:
            if len(kept) == n_slots:
                newcomer = expert if bypass else None
                victim = policy.victim(layer, idle, newcomer)
                if victim is None:  # an event larger than the cache runs in waves
                    victim = policy.victim(layer, lambda _: True, newcomer)
                assert victim is not None
                if victim == (layer, expert):
                    continue
                kept.remove(victim)
                policy.remove(victim)
            kept.add((layer, expert))
            policy.insert((layer, expert))
    return result


def _is_other(running: frozenset[ExpertKey], key: ExpertKey) -> bool:
    return key not in running
