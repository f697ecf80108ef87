"""The device among places, on torch's `cpu` device: its claims, and rows on their ways between memory and device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mer.compute.cpu.place import CPUPlace
from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.device import TORCH_CPU, Device
from mer.compute.cuda.experts import DeviceExperts
from mer.compute.cuda.place import DevicePlace, ToDevice, ToHost
from mer.compute.cuda.products import TorchKernels
from mer.compute.cuda.sizes import vram_classes
from mer.compute.cuda.vram import VRAMTier
from mer.compute.division import Division
from mer.compute.places import ExpertPlace, Pairs
from mer.compute.reference.model import ReferenceModel
from mer.sched.policies.layer_lru import LayerLRU
from tests._lib.resident import Experts
from tests._lib.tiny_models import Type, tiny_model

N_EXPERTS, SLOTS, LAYER = 7, 2, 1
IDS = np.array([[6, 1, 4], [1, 3, 0], [5, 6, 1], [2, 1, 6]], np.int32)
PAIRS = Pairs(IDS)


class Side:
    """A device with two slots, and a dense part on either side of the bus."""

    def __init__(self, path: Path, *, dense_on_device: bool) -> None:
        self.reference = ReferenceModel(path)
        self.device = Device(TORCH_CPU)
        spec, experts = self.reference.spec, self.reference.experts
        classes = vram_classes(experts)
        slots = DeviceExperts(
            self.device,
            TorchKernels(self.device),
            experts,
            spec.expert_weights,
            lambda name: self.device.to_device(self.reference.vector(name)),
            classes,
            (SLOTS,),
            hybrid=True,
        )
        self.tier = VRAMTier(LayerLRU(spec.n_routed, SLOTS), classes, (SLOTS,))
        self.on_device = dense_on_device
        self.y = self.device.zeros(IDS.size, spec.d_model)
        self.place = DevicePlace(self.device, slots, self.tier, self.y, shared=dense_on_device)
        limits = Limits(batch_tokens=8, outputs=8, sequences=1, sequence_blocks=1, kv_blocks=1, threads=1, planes=2)
        self.cpu = CPUPlace(spec, limits, experts)
        self.rows = np.zeros((IDS.size, spec.d_model), np.float32)
        self.experts = Experts(self.reference.gguf, experts, keep=False)
        self.h = np.random.default_rng(3).normal(0.2, 1, (len(IDS), spec.d_model)).astype(np.float32)

    def places(self) -> list[ExpertPlace[Any]]:
        """Return device and processor as the dense part sees them."""
        if self.on_device:
            return [self.place, ToHost(self.cpu, self.device)]
        return [ToDevice(self.place, self.device), self.cpu]

    def take(self, pairs: Pairs, experts: list[int], y: Any) -> None:
        """Take rows over as the dense part does."""
        if self.on_device:
            self.y[torch.from_numpy(pairs.of(experts))] = y
        else:
            assert isinstance(y, np.ndarray)
            self.rows[pairs.of(experts)] = y

    def outputs(self) -> np.ndarray:
        """Return the rows y [T * K, D] that the dense part has."""
        return self.y.numpy().copy() if self.on_device else self.rows


@pytest.fixture(params=["device", "processor"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    path = tiny_model(tmp_path / "m.gguf", weight_type=Type.F32, n_experts=N_EXPERTS, top_k=3).path
    it = Side(path, dense_on_device=request.param == "device")
    it.cpu.open()
    try:
        yield it
    finally:
        it.cpu.close()
        it.place.close()


def test_device_and_processor_compute_a_layer_together(side: Side) -> None:
    """Twice: what stays on the device is there the second time, and what has been computed beside it is not."""
    division = Division(side.places())
    h: Any = torch.from_numpy(side.h) if side.on_device else side.h
    want = np.stack([side.reference.expert(LAYER, n, side.h[i : i + 1].astype(np.float64))[0] for i, row in
                     enumerate(IDS) for n in row])  # fmt: skip
    for turn in range(2):
        union = list(range(N_EXPERTS))
        belonging, passing = side.place.claim(LAYER, [side.experts.load(LAYER, it) for it in union])
        assert sorted(it.expert for it in (*belonging, *passing)) == union
        assert len(belonging) == SLOTS
        shares = division.divide(LAYER, (belonging, ()), passing, PAIRS)
        if not turn:
            assert [len(own) for own in shares.experts] == [4, 3]  # no side has been measured
        side.y.zero_()
        side.rows[:] = 0
        division.compute(shares, h, PAIRS, side.take)  # type: ignore[arg-type]
        assert np.abs(side.outputs() - want).max() < 1e-5 * np.abs(want).max()
        before = side.place.hits, side.place.uploads, side.place.staged
        side.place.landed([(LAYER, shares.experts[0])])
        gained = [a - b for a, b in zip((side.place.hits, side.place.uploads, side.place.staged), before, strict=True)]
        n = len(shares.experts[0])
        assert gained == ([SLOTS, n - SLOTS, n - SLOTS] if turn else [0, n, n - SLOTS])
        assert all(side.tier.resident(LAYER, it.expert) for it in belonging)


def test_what_should_have_come_is_forgotten_when_the_job_fails(side: Side) -> None:
    kept = [side.experts.load(LAYER, 5)]
    side.place.claim(LAYER, kept)
    side.place.landed([(LAYER, kept)])
    belonging, _ = side.place.claim(LAYER, [side.experts.load(LAYER, it) for it in (1, 5, 2, 6)])
    assert {it.expert for it in belonging} >= {5}
    side.place.forget()
    assert [it for it in range(N_EXPERTS) if side.tier.resident(LAYER, it)] == [5]


def test_the_cost_is_that_of_the_copies(side: Side) -> None:
    """Of experts that are there none, however many rows there are."""
    there = side.experts.load(LAYER, 1)
    side.place.claim(LAYER, [there])
    assert side.place.cost(LAYER, [there], [4]) is None
    h = torch.from_numpy(side.h)
    with side.device.computing():
        side.place.start(LAYER, [there], h, PAIRS)
        side.place.finish(timed=False)
        assert side.place.cost(LAYER, [there], [4]) is None
        side.place.landed([(LAYER, [there])])
        side.place.start(LAYER, [there], h, PAIRS)  # nothing is copied
        side.place.finish(timed=True)
        assert side.place.cost(LAYER, [there], [4]) is None
        other = side.experts.load(LAYER, 2)
        side.place.claim(LAYER, [other])
        side.place.start(LAYER, [other], h, PAIRS)
        side.place.finish(timed=True)
        side.place.landed([(LAYER, [other])])
    new = [side.experts.load(LAYER, it) for it in (3, 4)]
    side.place.claim(LAYER, [there, *new])
    cost = side.place.cost(LAYER, [there, *new], [400, 1, 4])
    assert cost is not None
    assert cost.start_s == 0
    assert cost.expert_s[0] == 0
    assert cost.expert_s[1] == cost.expert_s[2] > 0


def test_a_closed_place_computes_nothing(side: Side) -> None:
    side.place.close()
    assert side.place.upload_bytes == 0
    with pytest.raises(RuntimeError, match="the worker is closed"):
        side.place.run_chosen(LAYER, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3))
