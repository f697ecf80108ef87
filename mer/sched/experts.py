"""Which experts are resident, in which slots, and which of them must stay."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from mer.sched.policy import ExpertKey, Policy


@attrs.define
class Resident:
    """A resident expert."""

    slot: int
    addresses: tuple[int, int, int]  # gate, up, down
    fresh: bool = True  # never used yet: its bytes are as the file has them
    pins: int = 0


@attrs.frozen(kw_only=True)
class CacheStatistics:
    """Counters of the expert cache; `hits + misses == lookups`, counted after the union over a batch."""

    policy: str
    lookups: int
    hits: int
    misses: int
    evictions: int
    resident: int


class ExpertCache:
    """The table of resident experts; pure and synchronous, it knows slots by number only."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._resident: dict[ExpertKey, Resident] = {}
        self._hits = self._misses = self._evictions = 0

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._resident

    def __getitem__(self, key: ExpertKey) -> Resident:
        return self._resident[key]

    def lookup(self, layer: int, experts: Iterable[int]) -> tuple[list[int], list[int]]:
        """Return the resident and the missing ones of a layer's experts, in the given order, and count them."""
        union = list(experts)
        self._policy.use(layer, union)
        hits: list[int] = []
        misses: list[int] = []
        for expert in union:
            (hits if (layer, expert) in self._resident else misses).append(expert)
        self._hits += len(hits)
        self._misses += len(misses)
        return hits, misses

    def insert(self, key: ExpertKey, slot: int, addresses: tuple[int, int, int]) -> None:
        """Note that an expert has landed in a slot."""
        if key in self._resident:
            raise RuntimeError(f"expert {key} is resident already")
        self._resident[key] = Resident(slot, addresses)
        self._policy.insert(key)

    def evict_for(self, layer: int) -> int | None:
        """Drop the expert that the policy gives up for one of `layer` and return its slot; None if all are pinned."""
        key = self._policy.victim(layer, lambda candidate: self._resident[candidate].pins == 0)
        if key is None:
            return None
        self._evictions += 1
        return self.drop(key)

    def drop(self, key: ExpertKey) -> int:
        """Forget a resident expert and return the slot it was in."""
        self._policy.remove(key)
        return self._resident.pop(key).slot

    def statistics(self) -> CacheStatistics:
        """Return a snapshot."""
        return CacheStatistics(
            policy=self._policy.name,
            lookups=self._hits + self._misses,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            resident=len(self._resident),
        )
