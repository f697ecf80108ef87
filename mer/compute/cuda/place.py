"""The place where a device computes experts, and the ways of rows between memory and device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from mer.compute.cuda.device import Device
from mer.compute.cuda.experts import DeviceExperts, DevicePairs
from mer.compute.cuda.vram import DeviceSlot, VRAMTier
from mer.compute.messages import Float32Array, LoadedExpert
from mer.compute.places import Cost, ExpertPlace, Pairs
from mer.compute.rate import Rate

Tensor = torch.Tensor


class DevicePlace:
    """Experts computed on the device, in the slots that its tier gives them: an `ExpertPlace` of tensors.

    In the trio thread `claim` before a job and `landed` or `forget` after it; the rest in the worker's thread.

    Args:
        device: computes.
        experts: the slots.
        tier: says which expert is in which.
        y: [T * K, D], where outputs go.
        shared: whether the dense part reads them there.

    Attributes:
        hits: experts that were there when a job computed them.
        uploads: experts that were copied to the device.
        staged: of them, those that were not kept.
    """

    def __init__(self, device: Device, experts: DeviceExperts, tier: VRAMTier, y: Tensor, *, shared: bool) -> None:
        self._device, self._y, self._shared = device, y, shared
        self._experts: DeviceExperts | None = experts  # None once closed, as the memory is its
        self.tier, self.alike = tier, experts.alike
        self.hits = self.uploads = self.staged = 0
        self._rate = Rate()
        self._claims: dict[tuple[int, int], DeviceSlot] = {}  # of the job under way
        self._pairs: DevicePairs | None = None
        self._outputs: Tensor | None = None  # index of the rows under way, unless y is shared
        self._copied = 0  # bytes, of what is under way
        self._began_s = 0.0

    def close(self) -> None:
        """Let go of the device's memory."""
        self._experts = None

    @property
    def upload_bytes(self) -> int:
        """Bytes copied to the device so far; 0 once closed."""
        return 0 if self._experts is None else self._experts.upload_bytes

    def claim(
        self, layer: int, experts: Sequence[LoadedExpert]
    ) -> tuple[tuple[LoadedExpert, ...], tuple[LoadedExpert, ...]]:
        """Find slots for the experts of a job; return those that belong here, and those that would only pass through.

        The latter may be computed elsewhere.
        """
        slots = self.tier.place(layer, [it.expert for it in experts])
        self._claims.update(((layer, slot.expert), slot) for slot in slots)
        passing = {slot.expert for slot in slots if slot.arrives and not slot.kept}
        belonging = tuple(it for it in experts if it.expert not in passing)
        return belonging, tuple(it for it in experts if it.expert in passing)

    def landed(self, computed: Iterable[tuple[int, Sequence[LoadedExpert]]]) -> None:
        """Count what a job has computed here of its claims, layer by layer; the others it has computed elsewhere."""
        for layer, experts in computed:
            slots = [self._claims[layer, it.expert] for it in experts]
            self.hits += sum(not slot.arrives for slot in slots)
            self.uploads += sum(slot.arrives for slot in slots)
            self.staged += sum(slot.arrives and not slot.kept for slot in slots)
        self._claims.clear()

    def forget(self) -> None:
        """Drop the claims of a job that has failed: what should have come has not."""
        for (layer, _), slot in self._claims.items():
            self.tier.forget(layer, [slot])
        self._claims.clear()

    def cost(self, layer: int, experts: Sequence[LoadedExpert], rows: Sequence[int]) -> Cost | None:
        """See `ExpertPlace`; only copies take time, as what the device computes is hidden behind them."""
        copies = [self._open().n_bytes(layer, it.expert) if self._arrives(layer, it) else 0 for it in experts]
        seconds = self._rate.seconds(copies)
        return None if seconds is None else Cost(seconds)

    def start(self, layer: int, experts: Sequence[LoadedExpert], h: Tensor, pairs: Pairs) -> None:
        """See `ExpertPlace`; experts that have no claim are there."""
        if self._pairs is None or self._pairs.pairs is not pairs:
            self._pairs = DevicePairs(pairs, self._device)
        slots = [self._slot(layer, it.expert) for it in experts]
        self._copied = sum(self._open().n_bytes(layer, slot.expert) for slot in slots if slot.arrives)
        self._outputs = None
        if not self._shared:
            self._outputs = self._device.to_device(pairs.of([it.expert for it in experts]))
        self._began_s = time.perf_counter()
        self._open().run(layer, experts, slots, self._pairs, h, self._y[: pairs.ids.size])

    def finish(self, *, timed: bool) -> Tensor | None:
        """See `ExpertPlace`; only for the time it waits for the device, which has its work in order."""
        if timed:
            self._device.mark().block()
            if self._copied:
                self._rate.measured(self._copied, time.perf_counter() - self._began_s)
        return None if self._outputs is None else self._y[self._outputs]

    def run_chosen(self, layer: int, ids: Tensor, h: Tensor) -> None:
        """Compute the experts ids [T, K] of a layer, all of which are there, without asking the host which they are."""
        self._open().run_chosen(layer, self.tier, ids, h, self._y[: ids.numel()])

    def _arrives(self, layer: int, loaded: LoadedExpert) -> bool:
        return self._slot(layer, loaded.expert).arrives

    def _slot(self, layer: int, expert: int) -> DeviceSlot:
        return self._claims.get((layer, expert)) or self.tier.there(layer, expert)

    def _open(self) -> DeviceExperts:
        if self._experts is None:
            raise RuntimeError("the worker is closed")
        return self._experts


class ToDevice:
    """A place of tensors for a dense part in memory: h goes to the device, and y comes back."""

    def __init__(self, place: ExpertPlace[Tensor], device: Device) -> None:
        self._place, self._device = place, device
        self._pairs: Pairs | None = None  # of the layer whose h was sent
        self._h = device.zeros(0)

    def cost(self, layer: int, experts: Sequence[LoadedExpert], rows: Sequence[int]) -> Cost | None:
        """See `ExpertPlace`."""
        return self._place.cost(layer, experts, rows)

    def start(self, layer: int, experts: Sequence[LoadedExpert], h: Float32Array, pairs: Pairs) -> None:
        """See `ExpertPlace`."""
        if pairs is not self._pairs:
            self._pairs, self._h = pairs, self._device.to_device(np.ascontiguousarray(h))
        self._place.start(layer, experts, self._h, pairs)

    def finish(self, *, timed: bool) -> Float32Array | None:
        """See `ExpertPlace`."""
        y = self._place.finish(timed=timed)
        return None if y is None else self._device.to_host(y).numpy()


class ToHost:
    """A place of NumPy arrays for a dense part on the device: h comes to memory, and y goes to the device."""

    def __init__(self, place: ExpertPlace[Float32Array], device: Device) -> None:
        self._place, self._device = place, device

    def cost(self, layer: int, experts: Sequence[LoadedExpert], rows: Sequence[int]) -> Cost | None:
        """See `ExpertPlace`."""
        return self._place.cost(layer, experts, rows)

    def start(self, layer: int, experts: Sequence[LoadedExpert], h: Tensor, pairs: Pairs) -> None:
        """See `ExpertPlace`."""
        self._place.start(layer, experts, self._device.to_host(h).numpy(), pairs)

    def finish(self, *, timed: bool) -> Tensor | None:
        """See `ExpertPlace`."""
        y = self._place.finish(timed=timed)
        return None if y is None else self._device.to_device(y)
