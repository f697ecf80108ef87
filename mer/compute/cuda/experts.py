"""Experts on the device: the memory of their slots, their way there, and their feed-forward networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mer.compute.cuda.dequantize import file_order
from mer.compute.cuda.device import Device, Event
from mer.compute.cuda.layout import file_layout, tile_layout
from mer.compute.cuda.products import Biases, DeviceExpert, ExpertCut, TorchKernels, Work
from mer.compute.cuda.sizes import STAGING_SLOTS, VRAMClasses
from mer.compute.cuda.vram import DeviceSlot, VRAMTier
from mer.compute.messages import LoadedExpert
from mer.compute.places import Pairs
from mer.io.extents import ExpertMap, ExpertPart
from mer.model.operators import ExpertWeights

Tensor = torch.Tensor


class DevicePairs:
    """The (token, choice) pairs of a batch in one layer, on the device too, in one transfer."""

    def __init__(self, pairs: Pairs, device: Device) -> None:
        self.pairs = pairs
        self._numbers = np.stack([pairs.order, pairs.order // pairs.ids.shape[1]])
        self._sorted = device.to_device(self._numbers)

    def work(self, number: int, expert: DeviceExpert) -> Work | None:
        """Return what an expert of this number has to do, or None if no row was routed to it."""
        first, n = self.pairs.spans.get(number, (0, 0))
        if not n:
            return None
        pairs, rows = self._sorted[:, first : first + n].unbind()
        return Work(expert, self._numbers[:, first : first + n], pairs, rows)


class DeviceExperts:
    """The slots of the device, cut as the tier says, and what is computed in them.

    At the end of a job no copy is under way, so that within a job only slots that are used twice must be waited for.

    Args:
        device: holds them.
        kernels: compute.
        experts: types and shapes.
        weights: of each layer's experts, how they are computed.
        vector: returns a dense tensor on the device by its name, float32 [n]: biases, which it may not have read yet.
        classes: the sizes of the slots.
        counts: slots of each class to keep experts in; there are `STAGING_SLOTS` more of each.
        hybrid: whether experts may come as the CPU kernels have re-arranged them.
    """

    def __init__(
        self,
        device: Device,
        kernels: TorchKernels,
        experts: ExpertMap,
        weights: Sequence[ExpertWeights],
        vector: Callable[[str], Tensor],
        classes: VRAMClasses,
        counts: Sequence[int],
        *,
        hybrid: bool,
    ) -> None:
        self._device, self._kernels, self._classes = device, kernels, classes
        self._slabs = [
            device.zeros(count + STAGING_SLOTS, size, dtype=torch.uint8)
            for count, size in zip(counts, classes.slot_bytes, strict=True)
        ]
        self._parts = [[extents.parts for extents in layer] for layer in experts.experts]
        self._cuts = [
            [_cut(parts, record) for parts in layer] for layer, record in zip(self._parts, weights, strict=True)
        ]
        self._biases = [
            Biases(*(vector(it.name).view(it.shape) for it in record.biases)) if record.biases else None
            for record in weights
        ]
        self.alike = all(cut == layer[0] for layer in self._cuts for cut in layer)
        sizes = [tile_layout(parts).n_bytes for layer in self._parts for parts in layer]
        room = max(sizes, default=0) if hybrid else 0
        self._tiles = [device.zeros(room, dtype=torch.uint8) for _ in range(2)] if hybrid else []
        self._tile_free = [Event() for _ in self._tiles]
        self._tables: list[Tensor] = []
        self.upload_bytes = 0

    def run(
        self,
        layer: int,
        loaded: Sequence[LoadedExpert],
        slots: Sequence[DeviceSlot],
        pairs: DevicePairs,
        h: Tensor,
        y: Tensor,
    ) -> None:
        """Compute experts of a layer for the rows of h that were routed to them, into their rows of y.

        Those that are there come first, while others are being copied; these follow in their order.
        """
        there = [slot for slot in slots if not slot.arrives]
        arriving = [(slot, it) for slot, it in zip(slots, loaded, strict=True) if slot.arrives]
        staged = [(slot, it) for slot, it in arriving if not slot.kept]
        first = [(slot, it) for slot, it in arriving if slot.kept] + staged[:STAGING_SLOTS]
        coming = [(slot, self._upload(layer, it, slot, Event())) for slot, it in first]
        waiting = staged[STAGING_SLOTS:]
        self._compute(layer, there, pairs, h, y)
        while coming:
            slot, arrival = coming.pop(0)
            self._device.wait(arrival)
            self._compute(layer, [slot], pairs, h, y)
            if not slot.kept and waiting:
                following, it = waiting.pop(0)
                coming.append((following, self._upload(layer, it, following, self._device.mark())))

    def run_chosen(self, layer: int, tier: VRAMTier, ids: Tensor, h: Tensor, y: Tensor) -> None:
        """Compute the experts ids [T, K] of a layer, all of which are there, without asking the host which they are."""
        if not self._tables:
            slots = [[tier.there(number, it).slot for it in range(len(row))] for number, row in enumerate(self._cuts)]
            self._tables = [self._device.to_device(np.array(row, np.int64)) for row in slots]
        kind = self._classes.kind_of(layer, 0)
        cut, biases = self._cuts[layer][0], self._biases[layer]
        self._kernels.chosen(self._slabs[kind], self._tables[layer][ids], ids, cut, biases, h, y)

    def n_bytes(self, layer: int, expert: int) -> int:
        """Return the bytes of an expert's matrices."""
        return sum(self._cuts[layer][expert].sizes)

    def expert(self, layer: int, slot: DeviceSlot) -> DeviceExpert:
        """Return an expert's matrices in its slot."""
        biases = self._biases[layer]
        own = None if biases is None else biases.of(slot.expert)
        return self._cuts[layer][slot.expert].expert(self._slabs[slot.kind][slot.slot], own)

    def _compute(self, layer: int, slots: Sequence[DeviceSlot], pairs: DevicePairs, h: Tensor, y: Tensor) -> None:
        works = [pairs.work(slot.expert, self.expert(layer, slot)) for slot in slots]
        self._kernels.experts([work for work in works if work is not None], h, y)

    def _upload(self, layer: int, loaded: LoadedExpert, slot: DeviceSlot, after: Event) -> Event:
        """Begin to copy an expert into its slot, once the device has come to `after`; return when it is there."""
        parts, cut = self._parts[layer][loaded.expert], self._cuts[layer][loaded.expert]
        room = self._slabs[slot.kind][slot.slot]
        self.upload_bytes += sum(cut.sizes)
        raw = (loaded.raw[0], loaded.raw[0], loaded.raw[1])
        tiled = tile_layout(parts)
        buffer = 0
        arrival = Event()
        if not all(raw):
            self._tiles.reverse()
            self._tile_free.reverse()
        for number, part in enumerate(parts):
            target = room[cut.offsets[number] : cut.offsets[number] + cut.sizes[number]]
            if raw[number]:
                arrival = self._device.upload(target, loaded.addresses[number], after=after)
                continue
            n_bytes, offset = tiled.sizes[number], tiled.offsets[number]
            tiles = self._tiles[buffer][offset : offset + n_bytes]
            came = self._device.upload(tiles, loaded.addresses[number], after=self._tile_free[buffer])
            self._device.wait(came)
            target.copy_(file_order(part.type, tiles, part.rows).reshape(-1))
        if not all(raw):
            self._tile_free[buffer] = self._device.mark()
        return arrival


def _cut(parts: Sequence[ExpertPart], record: ExpertWeights) -> ExpertCut:
    layout = file_layout(parts)
    gate, up, down = parts
    return ExpertCut(
        types=(gate.type, up.type, down.type),
        shapes=((gate.rows, gate.cols), (up.rows, up.cols), (down.rows, down.cols)),
        offsets=layout.offsets,
        sizes=layout.sizes,
        activation=record.activation,
    )
