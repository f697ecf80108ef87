"""Expert cache: the resident experts and their slots."""

from __future__ import annotations

from collections.abc import Callable, Collection, ItemsView, Iterable, Sequence

import attrs
import numpy as np

from mer.compute.messages import Int64Array, LoadedExpert
from mer.io.extents import ExpertKey
from mer.io.loan.ranks import Ranks
from mer.io.pool import Priority
from mer.limits import MAX_MATRICES
from mer.sched.policy import Policy


@attrs.define
class Resident:
    """A resident expert."""

    slot: int
    addresses: tuple[int, ...]  # of its matrices
    raw: tuple[bool, bool]  # whether those of the inner stage, and that of the outer, are still as the file has them
    speculation: Priority | None  # the class it was read in, until it is used for the first time; None if on demand
    arranged: LoadedExpert | None = None  # for the worker, once all matrices are re-arranged


@attrs.frozen(kw_only=True)
class CacheStatistics:
    """Counters of the expert cache; `hits + misses == lookups`, counted after the union over a batch."""

    policy: str
    lookups: int
    hits: int  # in memory when they were needed, read ahead and prefetched ones included
    misses: int
    evictions: int
    resident: int


class ExpertCache:
    """The table of resident experts; pure and synchronous, it knows slots by number only.

    The policy learns of lookups late, by `settle` or when it is asked next, so that its learning takes no time from a
    layer that waits for its experts.

    Attributes:
        addresses: where the matrices of every expert lie that is resident and arranged, [L, E, MAX_MATRICES]; -1 for
            those that are resident and raw, 0 for the others; None without `shape`.

    Args:
        policy: ranks the residents.
        shape: layers, and experts of a layer, if `addresses` are wanted.
    """

    def __init__(self, policy: Policy, shape: tuple[int, int] | None = None) -> None:
        self._policy = policy
        self.addresses: Int64Array | None = None if shape is None else np.zeros((*shape, MAX_MATRICES), np.int64)
        self._unsettled: list[tuple[int, Sequence[int]]] = []  # lookups that the policy has not learnt of
        self._resident: dict[ExpertKey, Resident] = {}
        self._told: frozenset[ExpertKey] = frozenset()  # misses that the next lookup is not to count again
        self._lookups = self._hits = self._misses = self._evictions = 0

    @property
    def ranks(self) -> Ranks | None:
        """The numbers that the policy goes by; see `Policy`."""
        return self._policy.ranks

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._resident

    def __getitem__(self, key: ExpertKey) -> Resident:
        return self._resident[key]

    def items(self) -> ItemsView[ExpertKey, Resident]:
        """Return the resident experts with their records."""
        return self._resident.items()

    def lookup(self, layer: int, experts: Iterable[int], held: Collection[int] = ()) -> tuple[list[int], list[int]]:
        """Return the resident and the missing ones of a layer's experts, in the given order, and count them.

        Args:
            layer: whose experts they are.
            experts: all that the layer needs.
            held: those of them that the worker has in its own memory: hits, and in neither list.
        """
        union = list(experts)
        self._unsettled.append((layer, union))
        hits: list[int] = []
        misses: list[int] = []
        for expert in union:
            if expert not in held:
                (hits if (layer, expert) in self._resident else misses).append(expert)
        told, self._told = self._told, frozenset()
        self._lookups += sum((layer, expert) not in told for expert in union)
        self._misses += sum((layer, expert) not in told for expert in misses)
        self._hits += len(union) - len(misses) - sum((layer, expert) in told for expert in hits)
        return hits, misses

    def lookup_all(self, layer: int, experts: Sequence[int], held: Collection[int] = ()) -> list[Resident] | None:
        """Return those of a layer's experts that are not `held`, in order, and count all of them as hits.

        If one is missing, return None and count nothing.
        """
        resident = self._resident
        found = [resident.get((layer, expert)) for expert in experts if expert not in held]
        if None in found:
            return None
        told, self._told = self._told, frozenset()
        self.passed(layer, experts)
        self._lookups -= sum((layer, expert) in told for expert in experts)
        self._hits -= sum((layer, expert) in told for expert in experts)
        return found  # type: ignore[return-value]

    def passed(self, layer: int, experts: Sequence[int], n_missing: int = 0) -> None:
        """Count a layer's experts that the worker found by `addresses`, and those that it had to read."""
        self._lookups += len(experts)
        self._hits += len(experts) - n_missing
        self._misses += n_missing
        self._unsettled.append((layer, experts))

    def missed(self, keys: Iterable[ExpertKey]) -> None:
        """Count misses of a layer that the worker has begun to read; the next lookup is this layer's."""
        self._told = frozenset(keys)
        self._lookups += len(self._told)
        self._misses += len(self._told)

    def arranged(self, key: ExpertKey) -> None:
        """Note that all matrices of a resident expert are re-arranged."""
        resident = self._resident[key]
        resident.raw = (False, False)
        resident.arranged = LoadedExpert(key[1], resident.addresses, resident.raw)
        if self.addresses is not None:
            self.addresses[key][: len(resident.addresses)] = resident.addresses

    def settle(self) -> None:
        """Report the lookups so far to the policy."""
        if self._unsettled:
            unsettled, self._unsettled = self._unsettled, []
            for layer, experts in unsettled:
                self._policy.use(layer, experts)

    def insert(self, key: ExpertKey, resident: Resident) -> None:
        """Note that an expert has landed."""
        if key in self._resident:
            raise RuntimeError(f"expert {key} is resident already")
        self._resident[key] = resident
        if self.addresses is not None:
            self.addresses[key] = -1
        self.settle()
        self._policy.insert(key)

    def victim_for(self, layer: int, evictable: Callable[[ExpertKey], bool], *, kind: int = 0) -> ExpertKey | None:
        """Return the evictable expert that the policy would evict for one of `layer`, or None.

        Args:
            layer: of the expert that needs the room.
            evictable: returns whether a resident may be evicted.
            kind: the class of slots that is needed.
        """
        self.settle()
        return self._policy.victim(layer, evictable, kind=kind)

    def evict_for(self, layer: int, evictable: Callable[[ExpertKey], bool], *, kind: int = 0) -> Resident | None:
        """Evict the expert that `victim_for` returns and return its record, or None."""
        key = self.victim_for(layer, evictable, kind=kind)
        return None if key is None else self.evict(key)

    def evict(self, key: ExpertKey) -> Resident:
        """Drop a resident expert whose slot another takes, and return its record."""
        self._evictions += 1
        return self.drop(key)

    def likelihood(self, key: ExpertKey) -> float:
        """Return the policy's estimate of the probability that an expert is used at its layer's next visit."""
        self.settle()
        return self._policy.likelihood(key)

    def drop(self, key: ExpertKey) -> Resident:
        """Drop a resident expert and return its record."""
        self.settle()
        self._policy.remove(key)
        if self.addresses is not None:
            self.addresses[key] = 0
        return self._resident.pop(key)

    def unused(self, priority: Priority) -> int:
        """Return the number of residents that were read in this class of speculation and not used so far."""
        return sum(resident.speculation is priority for resident in self._resident.values())

    def statistics(self) -> CacheStatistics:
        """Return a snapshot."""
        return CacheStatistics(
            policy=self._policy.name,
            lookups=self._lookups,  # counted apart, so that a wrong count of the others shows
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            resident=len(self._resident),
        )
