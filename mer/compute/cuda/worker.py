"""The CUDA worker: jobs run by one thread that gives the device work and waits for its events."""

from __future__ import annotations

import time
from collections.abc import Sequence

import attrs
import numpy as np
import trio

from mer.compute.cpu.place import CPUPlace
from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.device import Device, as_error
from mer.compute.cuda.jobs import Answer, DeviceJobs
from mer.compute.cuda.place import DevicePlace
from mer.compute.cuda.products import TorchKernels
from mer.compute.cuda.thread import CallThread
from mer.compute.division import Shares
from mer.compute.messages import (
    Advance,
    Begin,
    Done,
    Job,
    JobCounters,
    RunExperts,
    Stage,
    VRAMStatistics,
    WorkerStatistics,
)
from mer.errors import ComputeError, DeviceError, MerError
from mer.model.spec import ModelSpec


@attrs.define
class _Counters(JobCounters):
    elsewhere: int = 0  # experts that other places than the device have computed


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
        jobs: what they are made of, dense part and places.
        place: of these the device.
        host: the processor's part, if it has one: threads that run programs.
    """

    staged_pairs = 0  # see `ComputeWorker`

    def __init__(
        self,
        spec: ModelSpec,
        limits: Limits,
        device: Device,
        kernels: TorchKernels,
        jobs: DeviceJobs,
        place: DevicePlace,
        *,
        host: CPUPlace | None = None,
    ) -> None:
        self._n_routed, self._device, self._kernels = spec.n_routed, device, kernels
        self._work, self._place, self._host = jobs, place, host
        self.tier = place.tier
        self.resident_rows = limits.resident_rows(spec.top_k) if place.alike else 0  # see `ComputeWorker`
        self.shared_layers = spec.shared_layers  # see `ComputeWorker`
        self._failure = ""
        self._closed = False
        self._thread = CallThread("mer-cuda-0")
        self._counters = _Counters()
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
        if not self._closed:
            self._closed = True
            self._work.close()
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
        c, place, tier = self._counters, self._place, self.tier
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
                slots=sum(tier.counts),
                resident=tier.n_resident,
                held=tier.n_held,
                hits=place.hits,
                uploads=place.uploads,
                staged=place.staged,
                upload_bytes=place.upload_bytes,
                evictions=tier.evictions,
                cpu_runs=c.elsewhere,
                graphs=self._work.n_captured,
            ),
        )

    async def _run_job(self, job: Job) -> Done:
        begun = time.perf_counter()
        try:
            shares = [self._divide(it) for it in job.operations if isinstance(it, RunExperts)]
            running = self._thread.start(lambda: self._work.run(job, shares))
            job.on_started()
            answer = await running()
            done = self._done(job, answer, shares)
        except trio.Cancelled:
            raise
        except Exception as error:
            self._place.forget()
            done = Done(error=_as_mer_error(error))
        self._counters.jobs += 1
        seconds = time.perf_counter() - begun
        self._counters.compute_s += seconds
        return attrs.evolve(done, compute_s=seconds)

    def _divide(self, operation: RunExperts) -> Shares:
        """Return which place computes which experts."""
        for loaded in operation.experts:
            if loaded.stage is not Stage.WHOLE:
                raise ComputeError(
                    f"the CUDA worker runs experts whole, not in stages; run expert {loaded.expert} of layer "
                    f"{operation.layer} whole"
                )
        return self._work.divide(operation.layer, operation.experts)

    def _done(self, job: Job, answer: Answer, shares: Sequence[Shares]) -> Done:
        """Count what a job has done, tell the tier, and return what the scheduler wants to know."""
        c, place, last = self._counters, self._place, 0
        for operation in job.operations:
            match operation:
                case Begin(batch):
                    c.tokens += len(batch.tokens)
                case Advance(to) if to < self._n_routed:
                    last = to
        elsewhere = [it.expert for share in shares for others in share.experts[1:] for it in others]
        c.elsewhere += len(elsewhere)
        c.expert_runs += len(elsewhere) + sum(len(share.experts[0]) for share in shares)
        place.landed((share.layer, share.experts[0]) for share in shares)
        routes = answer.routes
        if routes is None and answer.routed is not None:
            self.tier.routed(last, np.unique(answer.routed.expert_ids).tolist())
        if routes is not None:
            for number, ids in enumerate(routes, last):
                union = np.unique(ids).tolist()
                self.tier.routed(number, union)
                if answer.through or number < last + len(routes) - 1:
                    c.expert_runs += len(union)
                    place.hits += len(union)
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
            arranged=frozenset(elsewhere),
        )


def _as_mer_error(error: Exception) -> MerError:
    """Return an exception of a job as one of ours."""
    if isinstance(error, MerError):
        return error
    failure = as_error(error) or ComputeError(f"a compute job failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
