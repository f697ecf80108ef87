"""The CUDA worker: jobs run by one thread that gives the device work and waits for its events."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence

import attrs
import numpy as np
import torch
import trio

from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.device import Device, as_error
from mer.compute.cuda.experts import DeviceExperts, Pairs
from mer.compute.cuda.forward import DeviceForward, Routed
from mer.compute.cuda.host import HostExperts, HostForward
from mer.compute.cuda.passes import TokenPasses
from mer.compute.cuda.products import TorchKernels
from mer.compute.cuda.split import Split, work_bytes
from mer.compute.cuda.thread import CallThread
from mer.compute.cuda.vram import Place, VRAMTier
from mer.compute.messages import (
    Advance,
    Batch,
    Begin,
    Combine,
    Done,
    Float32Array,
    Int32Array,
    Job,
    JobCounters,
    LoadedExpert,
    ReadBlocks,
    RunExperts,
    RunResident,
    RunShared,
    Stage,
    Uint8Array,
    VRAMStatistics,
    WorkerStatistics,
    WriteBlocks,
)
from mer.errors import ComputeError, DeviceError, MerError
from mer.model.spec import ModelSpec

Tensor = torch.Tensor


@attrs.define
class _Counters(JobCounters):
    hits: int = 0
    uploads: int = 0
    staged: int = 0
    cpu_runs: int = 0


@attrs.frozen
class _Share:
    """The experts of one RunExperts: those of the device and their places, and those of the processor."""

    layer: int
    loaded: tuple[LoadedExpert, ...]
    places: list[Place]
    host: tuple[LoadedExpert, ...]
    host_bytes: float = 0.0  # what the processor's cost, see `work_bytes`
    copy_bytes: float = 0.0  # that are copied meanwhile


@attrs.define
class _Answer:
    """What a job has given so far, in the worker's thread."""

    routed: Routed | None = None
    routes: Int32Array | None = None
    through: bool = True  # whether a RunResident has come to the end, or there was none
    logits: Float32Array | None = None
    damaged: Int32Array | None = None
    kv: tuple[Uint8Array, ...] | None = None


class CUDAWorker:
    """Runs jobs on a device of torch's, experts from the device's own memory as far as its tier has them.

    Use it as the CPU worker: `start_threads`, then `run` in a nursery, then `close`. A job that has begun is finished
    even if `run` is cancelled; `close` waits for it. Experts are not computed in stages, and no byte of them changes in
    memory. When a job's result is there, nothing is under way on the device.

    An error of the device fails the job's batch with DeviceError. If it is fatal, the worker stops after that, and
    with it the engine.

    Args:
        spec: the model.
        limits: the largest batch.
        device: computes.
        kernels: in force.
        dense: attention, router and head.
        experts: the slots of the device.
        tier: says which expert is in which.
        host: the processor's part, if it has one: threads that run programs.
        hybrid: whether it computes experts that are only in memory.
    """

    staged_pairs = 0  # see `ComputeWorker`

    def __init__(
        self,
        spec: ModelSpec,
        limits: Limits,
        device: Device,
        kernels: TorchKernels,
        dense: DeviceForward | HostForward,
        experts: DeviceExperts,
        tier: VRAMTier,
        *,
        host: HostExperts | None = None,
        hybrid: bool = False,
    ) -> None:
        self._spec, self._device, self._kernels, self._dense = spec, device, kernels, dense
        self._experts: DeviceExperts | None = experts  # None once closed, as the memory is its
        self.tier = tier
        self._host, self._hybrid, self._split = host, hybrid, Split()
        self.resident_rows = limits.resident_rows(spec.top_k) if experts.alike else 0  # see `ComputeWorker`
        self.shared_layers = spec.shared_layers  # see `ComputeWorker`
        self._y = device.zeros(limits.batch_tokens * spec.top_k, spec.d_model)
        self._passes = None
        self._failure = ""
        if isinstance(dense, DeviceForward):
            self._passes = TokenPasses(device, dense, self._run_chosen, spec.n_routed)
        self._thread = CallThread("mer-cuda-0")
        self._counters = _Counters()
        self._pairs: Pairs | None = None
        self._ids: Int32Array | None = None
        self._batch: Batch | None = None
        self.jobs, self._jobs = trio.open_memory_channel[Job](1)
        self._results, self.results = trio.open_memory_channel[Done](1)

    def start_threads(self) -> None:
        """Start the thread.

        Raises:
            ConfigError: the system refuses it.
        """
        self._thread.open()
        if self._host is not None:
            self._host.open()

    def close(self) -> None:
        """Stop the thread once a running job has finished, and let go of the device. Closing twice is allowed."""
        self._thread.close()
        if self._host is not None:
            self._host.close()
        if self._experts is not None:
            self._experts = self._passes = None
            self._device.close()

    @property
    def failure(self) -> str:
        """Why nothing can be computed any more; empty as long as it can."""
        return self._failure

    def disown(self) -> None:
        """Let a forked child be: its copy of the thread does not run, so that no job of its gets to the device."""

    async def run(self) -> None:
        """Serve jobs in order until the job channel is closed, the task is cancelled or the device fails for good."""
        with self._results:
            async for job in self._jobs:
                done = await self._run_job(job)
                await self._results.send(done)
                if isinstance(done.error, DeviceError) and done.error.fatal:
                    self._failure = f"its device failed: {done.error}"
                    return

    def statistics(self) -> WorkerStatistics:
        """Return a snapshot of the counters."""
        c = self._counters
        return WorkerStatistics(
            name=self._device.label,
            kernels=self._kernels.form,
            n_threads=1,
            active_threads=1,
            active_reason="one gives the device its work",
            jobs=c.jobs,
            tokens=c.tokens,
            expert_runs=c.expert_runs,
            compute_s=c.compute_s,
            vram=VRAMStatistics(
                slots=sum(self.tier.counts),
                resident=self.tier.n_resident,
                held=self.tier.n_held,
                hits=c.hits,
                uploads=c.uploads,
                staged=c.staged,
                upload_bytes=0 if self._experts is None else self._experts.upload_bytes,
                evictions=self.tier.evictions,
                cpu_runs=c.cpu_runs,
                graphs=0 if self._passes is None else self._passes.n_captured,
            ),
        )

    async def _run_job(self, job: Job) -> Done:
        begun = time.perf_counter()
        shares: list[_Share] = []  # of each RunExperts
        try:
            for operation in job.operations:
                if isinstance(operation, RunExperts):
                    self._refuse_stages(operation)
                    shares.append(self._divide(operation))
            running = self._thread.start(lambda: self._work(job, shares))
            job.on_started()
            answer = await running()
            done = self._done(job, answer, shares)
        except trio.Cancelled:
            raise
        except Exception as error:
            for share in shares:
                self.tier.forget(share.layer, share.places)
            done = Done(error=_as_mer_error(error))
        self._counters.jobs += 1
        seconds = time.perf_counter() - begun
        self._counters.compute_s += seconds
        return attrs.evolve(done, compute_s=seconds)

    def _refuse_stages(self, operation: RunExperts) -> None:
        for loaded in operation.experts:
            if loaded.stage is not Stage.WHOLE:
                raise ComputeError(
                    f"the CUDA worker runs experts whole, not in stages; run expert {loaded.expert} of layer "
                    f"{operation.layer} whole"
                )

    def _divide(self, operation: RunExperts) -> _Share:
        """Return which experts of a job the device computes, and where, and which the processor."""
        layer, loaded = operation.layer, operation.experts
        places = self.tier.place(layer, [it.expert for it in loaded])
        passing = [place for place in places if place.arrives and not place.kept]
        if not self._hybrid or not passing or self._pairs is None:
            return _Share(layer, loaded, places, ())
        sizes = [self._open_experts().n_bytes(layer, place.expert) for place in passing]
        costs = [
            work_bytes(size, self._pairs.spans.get(place.expert, (0, 0))[1])
            for size, place in zip(sizes, passing, strict=True)
        ]
        already = sum(self._open_experts().n_bytes(layer, p.expert) for p in places if p.arrives and p.kept)
        n = self._split.choose(costs, sizes, already)
        numbers = {place.expert for place in passing[len(passing) - n :]}
        return _Share(
            layer,
            tuple(it for it in loaded if it.expert not in numbers),
            [place for place in places if place.expert not in numbers],
            tuple(it for it in loaded if it.expert in numbers),
            host_bytes=sum(costs[len(passing) - n :]),
            copy_bytes=already + sum(sizes[: len(passing) - n]),
        )

    # In the worker's thread

    def _work(self, job: Job, shares: Sequence[_Share]) -> _Answer:
        """Give the device everything that a job asks for, and wait for it; in the worker's thread."""
        try:
            with self._device.computing():
                return self._operate(job, deque(shares))
        except Exception:
            self._pairs = None
            if self._host is not None:
                self._host.finish()
            with contextlib.suppress(RuntimeError):  # a device that has failed for good copies nothing any more
                self._device.settle()  # no copy may read a slot that others are given next
            raise

    def _operate(self, job: Job, shares: deque[_Share]) -> _Answer:
        dense, answer = self._dense, _Answer()
        if (batch := self._whole_pass(job)) is not None:
            assert self._passes is not None
            self._batch = batch
            answer.routes, answer.logits, answer.damaged = self._passes.run(batch)
            return answer
        routed, last = False, self._spec.n_routed
        for operation in job.operations:
            match operation:
                case Begin(batch):
                    self._batch = batch
                    dense.begin(batch)
                case Advance(to, predict) if to < last:
                    dense.advance(to, predict=predict)
                    routed = True
                case RunExperts():
                    self._run_share(shares.popleft())
                case RunShared(layer):
                    dense.run_shared(layer)
                case Combine(layer):
                    dense.combine(layer, self._rows())
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
                if self._passes is not None and self.tier.full and TokenPasses.takes(batch):
                    return batch
        return None

    def _run_chosen(self, layer: int) -> None:
        """Compute the experts of a layer that the router has chosen, all of which are there, and add their outputs."""
        dense = self._dense
        assert isinstance(dense, DeviceForward)
        rows = self._y[: dense.ids.numel()]
        self._open_experts().run_chosen(layer, self.tier, dense.ids, dense.h, rows)
        dense.combine(layer, rows)

    def _run_share(self, share: _Share) -> None:
        """Let device and processor compute their experts at the same time, and join the outputs."""
        if not share.places and not share.host:
            return
        dense, experts, pairs, y = self._dense, self._open_experts(), self._pairs, self._rows()
        assert pairs is not None
        host = self._host if share.host else None
        if host is not None:
            assert self._ids is not None
            program = host.start(share.layer, share.host, self._device.to_host(dense.h), self._ids)
        begun_s = time.perf_counter()
        if share.places:
            experts.run(share.layer, share.loaded, share.places, pairs, dense.h, y)
        if host is not None:
            host_s = host.finish()
            del program
            self._device.mark().block()
            copy_s = time.perf_counter() - begun_s
            copied = (share.copy_bytes, copy_s) if share.copy_bytes else None
            self._split.measured(host=(share.host_bytes, host_s), copy=copied)
        elif share.copy_bytes:
            self._split.measured(host=None, copy=None)  # the copies alone are not waited for to take their time
        if isinstance(dense, HostForward):
            dense.take(y, pairs, [place.expert for place in share.places])
        elif host is not None:
            for loaded in share.host:
                if (first_n := pairs.spans.get(loaded.expert)) is not None:
                    y[pairs.sorted_pairs(*first_n)] = self._device.to_device(host.outputs(*first_n))

    def _walk(self, layer: int, answer: _Answer) -> None:
        """Go through all layers after the attention of this one, as long as the tier has their experts."""
        dense, tier = self._dense, self.tier
        routes = []
        if isinstance(dense, DeviceForward) and self.tier.full:
            chosen = []
            while True:
                chosen.append(dense.ids)
                self._run_chosen(layer)
                layer += 1
                if layer == self._spec.n_routed:
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
            there = [tier.there(layer, expert) for expert in union]
            self._run_share(_Share(layer, (), there, ()))
            dense.combine(layer, self._rows())
            layer += 1
            if layer == self._spec.n_routed:
                break
            dense.advance(layer)
        answer.routes = np.stack(routes)

    def _note(self, answer: _Answer, routed: Routed) -> None:
        """Take a layer's routing over: its experts may follow in the next job."""
        answer.routed, answer.damaged = routed, routed.damaged
        self._ids = routed.expert_ids
        self._pairs = Pairs(routed.expert_ids, self._device)

    def _rows(self) -> Tensor:
        """Return the expert outputs [T * K, D] of the batch."""
        assert self._batch is not None
        return self._y[: len(self._batch.tokens) * self._spec.top_k]

    def _open_experts(self) -> DeviceExperts:
        if self._experts is None:
            raise RuntimeError("the worker is closed")
        return self._experts

    # In the trio thread again

    def _done(self, job: Job, answer: _Answer, shares: Sequence[_Share]) -> Done:
        """Count what a job has done, tell the tier, and return what the scheduler wants to know."""
        c, last = self._counters, 0
        for operation in job.operations:
            match operation:
                case Begin(batch):
                    c.tokens += len(batch.tokens)
                case Advance(to) if to < self._spec.n_routed:
                    last = to
        for share in shares:
            there = share.places
            c.expert_runs += len(there) + len(share.host)
            c.cpu_runs += len(share.host)
            c.hits += sum(not place.arrives for place in there)
            c.uploads += sum(place.arrives for place in there)
            c.staged += sum(place.arrives and not place.kept for place in there)
        routes = answer.routes
        if routes is None and answer.routed is not None:
            self.tier.routed(last, np.unique(answer.routed.expert_ids).tolist())
        if routes is not None:
            for number, ids in enumerate(routes, last):
                union = np.unique(ids).tolist()
                self.tier.routed(number, union)
                if answer.through or number < last + len(routes) - 1:
                    c.expert_runs += len(union)
                    c.hits += len(union)
        ids = predicted = None
        if answer.routed is not None:
            ids, predicted = answer.routed.expert_ids, answer.routed.predicted_ids
        elif routes is not None:
            ids = routes[-1]
        return Done(
            expert_ids=ids,
            predicted_ids=predicted,
            routes=routes,
            logits=answer.logits,
            damaged=answer.damaged,
            kv=answer.kv,
            arranged=frozenset(loaded.expert for share in shares for loaded in share.host),
        )


def _as_mer_error(error: Exception) -> MerError:
    """Return an exception of a job as one of ours."""
    if isinstance(error, MerError):
        return error
    failure = as_error(error) or ComputeError(f"a compute job failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
