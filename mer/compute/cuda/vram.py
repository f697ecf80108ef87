"""Experts in the device's memory and their slots: bookkeeping without torch, for the trio thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import attrs

from mer.compute.cuda.sizes import STAGING_SLOTS, VRAMClasses
from mer.io.extents import ExpertKey

_UNSETTLED = 256  # lookups that the policy is not told of before they are so many, or it is asked


class Ranking(Protocol):
    """What the tier asks of a cache policy; see `mer.sched.policy.Policy`."""

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """Note that a batch uses these experts of a layer."""

    def insert(self, key: ExpertKey) -> None:
        """Note that an expert is kept from now on."""

    def remove(self, key: ExpertKey) -> None:
        """Note that an expert is no longer kept."""

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None, *, kind: int = 0
    ) -> ExpertKey | None:
        """Return the kept expert that should make room, or the newcomer itself if all others are worth more."""


@attrs.frozen
class DeviceSlot:
    """The slot that a job computes an expert in.

    Attributes:
        expert: its number.
        kind: class of the slot.
        slot: its number in the class; from `VRAMTier.counts[kind]` on these are for experts that are not kept.
        arrives: whether its bytes must be copied there first.
        kept: whether it stays.
    """

    expert: int
    kind: int
    slot: int
    arrives: bool
    kept: bool


class VRAMTier:
    """A `Tier` whose experts come and go by a cache policy.

    An expert moves up when a job computes it and there is room for it, or the policy gives up another one for it; an
    expert that is worth less than all that are there passes through one of two further slots of its class. What leaves
    is forgotten: it stays in memory as long as the policy of the slots there lets it.

    Args:
        policy: ranks what is there.
        classes: the sizes of the experts.
        counts: slots of each class to keep experts in.
    """

    def __init__(self, policy: Ranking, classes: VRAMClasses, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.complete = all(have >= need for have, need in zip(counts, classes.n_experts, strict=True))
        self.evictions = 0
        self._total = sum(classes.n_experts)
        self._policy, self._classes = policy, classes
        self._slots: dict[ExpertKey, int] = {}
        self._free = [list(reversed(range(count))) for count in counts]
        self._next_staging = [0] * len(counts)
        self._holds: Counter[ExpertKey] = Counter()
        self._unsettled: list[tuple[int, Sequence[int]]] = []

    @property
    def n_resident(self) -> int:
        """Number of experts that are there."""
        return len(self._slots)

    @property
    def full(self) -> bool:
        """See `Tier`."""
        return len(self._slots) == self._total

    @property
    def n_held(self) -> int:
        """Number of experts that are held."""
        return len(self._holds)

    def resident(self, layer: int, expert: int) -> bool:
        """See `Tier`."""
        return (layer, expert) in self._slots

    def hold(self, layer: int, expert: int) -> bool:
        """See `Tier`."""
        if (layer, expert) not in self._slots:
            return False
        self._holds[layer, expert] += 1
        return True

    def release(self, layer: int, expert: int) -> None:
        """See `Tier`.

        Raises:
            RuntimeError: it is not held.
        """
        key = layer, expert
        if not self._holds[key]:
            raise RuntimeError(f"expert {expert} of layer {layer} is not held")
        self._holds[key] -= 1
        if not self._holds[key]:
            del self._holds[key]

    def there(self, layer: int, expert: int) -> DeviceSlot:
        """Return the slot of an expert that is there.

        Raises:
            KeyError: it is not.
        """
        kind = self._classes.kind_of(layer, expert)
        return DeviceSlot(expert, kind, self._slots[layer, expert], arrives=False, kept=True)

    def routed(self, layer: int, experts: Sequence[int]) -> None:
        """Let the policy hear of a layer's union of experts over a batch, in time for the next `place`."""
        if self.complete:
            return  # nothing ever leaves
        self._unsettled.append((layer, experts))
        if len(self._unsettled) > _UNSETTLED:
            self._settle()

    def place(self, layer: int, experts: Sequence[int]) -> list[DeviceSlot]:
        """Return where a job computes these experts of a layer, and take in those that come to stay.

        If the job fails, `forget` those that arrive.
        """
        self._settle()
        busy = {(layer, expert) for expert in experts}
        return [self._place((layer, expert), busy) for expert in experts]

    def forget(self, layer: int, slots: Iterable[DeviceSlot]) -> None:
        """Drop experts whose bytes did not arrive."""
        for slot in slots:
            if slot.arrives and slot.kept:
                self._drop((layer, slot.expert))

    def _place(self, key: ExpertKey, busy: set[ExpertKey]) -> DeviceSlot:
        layer, expert = key
        kind = self._classes.kind_of(layer, expert)
        slot = self._slots.get(key)
        if slot is not None:
            return DeviceSlot(expert, kind, slot, arrives=False, kept=True)
        if not self._free[kind]:
            classes, holds = self._classes, self._holds

            def evictable(other: ExpertKey) -> bool:
                return classes.kind_of(*other) == kind and other not in busy and other not in holds

            victim = self._policy.victim(layer, evictable, expert, kind=kind)
            if victim is None or victim == key:
                number = self._next_staging[kind]
                self._next_staging[kind] = (number + 1) % STAGING_SLOTS
                return DeviceSlot(expert, kind, self.counts[kind] + number, arrives=True, kept=False)
            self._drop(victim)
            self.evictions += 1
        slot = self._slots[key] = self._free[kind].pop()
        self._policy.insert(key)
        return DeviceSlot(expert, kind, slot, arrives=True, kept=True)

    def _drop(self, key: ExpertKey) -> None:
        self._free[self._classes.kind_of(*key)].append(self._slots.pop(key))
        self._policy.remove(key)

    def _settle(self) -> None:
        unsettled, self._unsettled = self._unsettled, []
        for layer, experts in unsettled:
            self._policy.use(layer, experts)
