"""The jobs of the CUDA worker, operation by operation, in the thread that gives the device work."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch

from mer.compute.cpu.dense_forward import DenseForward, Routed
from mer.compute.cuda.device import Device
from mer.compute.cuda.forward import DeviceForward
from mer.compute.cuda.passes import TokenPasses
from mer.compute.cuda.place import DevicePlace
from mer.compute.division import Division, Shares
from mer.compute.messages import (
    AWAY,
    Advance,
    Batch,
    Begin,
    Combine,
    Float32Array,
    Int32Array,
    Job,
    LoadedExpert,
    ReadBlocks,
    RunExperts,
    RunResident,
    RunShared,
    Uint8Array,
    WriteBlocks,
)
from mer.compute.places import Pairs
from mer.model.spec import ModelSpec


@attrs.define
class Answer:
    """What a job has given."""

    routed: Routed | None = None
    routes: Int32Array | None = None
    through: bool = True  # whether a RunResident has come to the end, or there was none
    logits: Float32Array | None = None
    damaged: Int32Array | None = None
    kv: tuple[Uint8Array, ...] | None = None


class DeviceJobs:
    """Runs jobs of a dense part, and of places that compute experts for it; in the worker's thread.

    Args:
        spec: the model.
        device: waited for at the end of each job.
        dense: attention, router and head.
        place: the experts on the device.
        division: of experts among that place, the first, and others.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: Device,
        dense: DeviceForward | DenseForward,
        place: DevicePlace,
        division: Division[Any],
    ) -> None:
        self._device, self._dense, self._place, self._division = device, dense, place, division
        self._n_routed = spec.n_routed
        self._passes: TokenPasses | None = None
        if isinstance(dense, DeviceForward):
            self._passes = TokenPasses(device, dense, self._run_chosen, spec.n_routed)
        self.pairs: Pairs | None = None  # of the routed layer under way

    def close(self) -> None:
        """Let go of the device's memory."""
        self._passes = None
        self._place.close()

    @property
    def n_captured(self) -> int:
        """CUDA graphs captured so far."""
        return 0 if self._passes is None else self._passes.n_captured

    def divide(self, layer: int, experts: Sequence[LoadedExpert]) -> Shares:
        """Find slots on the device for experts of a job, and return which place computes which of them.

        Those that only pass through the device are divided among all places. To be called in the trio thread.
        """
        belonging, passing = self._place.claim(layer, experts)
        if not passing or self.pairs is None or self._division.n_places == 1:
            return self._division.undivided(layer, experts)
        bound = (belonging, *((),) * (self._division.n_places - 1))
        return self._division.divide(layer, bound, passing, self.pairs)

    def run(self, job: Job, shares: Sequence[Shares]) -> Answer:
        """Give the device everything that a job asks for, and wait for it.

        Args:
            job: the operations.
            shares: who computes which experts of each RunExperts.
        """
        try:
            with self._device.computing():
                return self._operate(job, deque(shares))
        except Exception:
            self.pairs = None
            with contextlib.suppress(RuntimeError):  # a device that has failed for good copies nothing any more
                self._device.settle()  # no copy may read a slot that others are given next
            raise

    def _operate(self, job: Job, shares: deque[Shares]) -> Answer:
        dense, answer = self._dense, Answer()
        if (batch := self._whole_pass(job)) is not None:
            assert self._passes is not None
            answer.routes, answer.logits, answer.damaged = self._passes.run(batch)
            return answer
        routed, last = False, self._n_routed
        for operation in job.operations:
            match operation:
                case Begin(batch):
                    dense.begin(batch)
                case Advance(to, predict) if to < last:
                    dense.advance(to, predict=predict)
                    routed = True
                case RunExperts():
                    self._compute(shares.popleft())
                case RunShared(layer):
                    dense.run_shared(layer)
                case Combine(layer):
                    dense.combine(layer)
                case RunResident(layer):
                    self._walk(layer, answer)
                case Advance() if answer.through:
                    dense.advance(last)
                    answer.logits, answer.damaged = dense.results()
                case ReadBlocks(blocks):
                    answer.kv = tuple(dense.read_block(block) for block in blocks)
                case WriteBlocks(blocks, kv):
                    for block, content in zip(blocks, kv, strict=True):
                        dense.write_block(block, content)
                case _:
                    pass
        if routed and answer.logits is None:
            self._note(answer, answer.routed or dense.routed())
        self._device.mark().block()
        return answer

    def _whole_pass(self, job: Job) -> Batch | None:
        """Return the batch of a job that is a whole pass of `TokenPasses`, or None if it is another one."""
        match job.operations:
            case (Begin(batch), Advance(0, predict=False), RunResident(0), Advance()):
                if self._passes is not None and self._place.tier.full and TokenPasses.takes(batch):
                    return batch
        return None

    def _run_chosen(self, layer: int) -> None:
        """Compute the experts of a layer that the router has chosen, all of which are there, and add their outputs."""
        dense = self._dense
        assert isinstance(dense, DeviceForward)
        self._place.run_chosen(layer, dense.ids, dense.h)
        dense.combine(layer)

    def _compute(self, shares: Shares) -> None:
        if any(shares.experts):
            assert self.pairs is not None
            self._division.compute(shares, self._dense.h, self.pairs, self._dense.take)

    def _walk(self, layer: int, answer: Answer) -> None:
        """Go through all layers after the attention of this one, as long as the tier has their experts."""
        dense, tier = self._dense, self._place.tier
        routes = []
        if isinstance(dense, DeviceForward) and tier.full:
            chosen = []
            while True:
                chosen.append(dense.ids)
                self._run_chosen(layer)
                layer += 1
                if layer == self._n_routed:
                    break
                dense.advance(layer)
            answer.routes = self._device.to_host(torch.stack(chosen).int()).numpy()
            return
        while True:
            routed = dense.routed()
            routes.append(routed.expert_ids)
            union = np.unique(routed.expert_ids).tolist()
            self._note(answer, routed)
            if not all(tier.resident(layer, expert) for expert in union):
                answer.through = False
                break
            there = [LoadedExpert(expert, AWAY, (False, False)) for expert in union]
            self._compute(self._division.undivided(layer, there))
            dense.combine(layer)
            layer += 1
            if layer == self._n_routed:
                break
            dense.advance(layer)
        answer.routes = np.stack(routes)

    def _note(self, answer: Answer, routed: Routed) -> None:
        """Take a layer's routing over: its experts may follow in the next job."""
        answer.routed, answer.damaged = routed, routed.damaged
        self.pairs = Pairs(routed.expert_ids)
