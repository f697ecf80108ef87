"""Making the CUDA worker: device, weights and slots, in this order, with the plan's arithmetic if the memory ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
import trio

from mer.compute.cpu.dense_forward import DenseForward
from mer.compute.cpu.forward import Forward
from mer.compute.cpu.place import CPUPlace
from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.device import Device
from mer.compute.cuda.experts import DeviceExperts
from mer.compute.cuda.forward import DeviceForward
from mer.compute.cuda.jobs import DeviceJobs
from mer.compute.cuda.place import DevicePlace, ToDevice, ToHost
from mer.compute.cuda.products import TorchKernels
from mer.compute.cuda.sizes import VRAMClasses
from mer.compute.cuda.vram import Ranking, VRAMTier
from mer.compute.cuda.weights import DeviceMatrix, DeviceWeights
from mer.compute.cuda.worker import CUDAWorker
from mer.compute.division import Division
from mer.compute.places import ExpertPlace
from mer.errors import NotEnoughMemory
from mer.io.extents import ExpertMap
from mer.io.ggml import GGMLType
from mer.io.gguf import TensorInfo
from mer.io.reader import Reader
from mer.model.spec import ModelSpec


@attrs.frozen(kw_only=True)
class Opened:
    """A CUDA worker that is ready to start, and what is in force in it."""

    worker: CUDAWorker
    kernels: str  # "triton", or "torch" and why
    activations: str
    pin: Callable[[int, int], str]


async def open_device(
    name: str,
    *,
    spec: ModelSpec,
    limits: Limits,
    dense: Mapping[str, TensorInfo],
    experts: ExpertMap,
    classes: VRAMClasses,
    counts: Sequence[int],
    policy: Ranking,
    reader: Reader,
    on_read: Callable[[int, int], None],
    arithmetic: str,
    hybrid: bool,
    forward: Forward | None,
) -> Opened:
    """Take the device's memory, read the dense weights, and make the worker.

    Args:
        name: "cuda:N" or "torch-cpu".
        spec: the model.
        limits: the largest batch.
        dense: the dense tensors.
        experts: types and shapes of the routed experts.
        classes: the sizes of the device's slots.
        counts: slots of each class to keep experts in.
        policy: ranks the experts in these.
        reader: reads the dense weights.
        on_read: called with the bytes read so far and in all.
        arithmetic: the plan as text, for the error.
        hybrid: whether the processor computes experts that are only in memory.
        forward: the CPU worker's arithmetic, with the dense weights read, if the dense part is not the device's.

    Raises:
        ConfigError: torch cannot use the device.
        NotEnoughMemory: it has not the memory that the plan counts on.
        ReadError: bytes could not be read.
    """
    device = Device(name)
    kernels = choose_kernels(device)
    weights = None
    host = CPUPlace(spec, limits, experts, forward) if hybrid or forward is not None else None
    try:
        if forward is None:
            weights = DeviceWeights(dense, device, spec.norm_factors())
            vector: Callable[[str], torch.Tensor] = weights.vector
            part: DeviceForward | DenseForward = DeviceForward(spec, limits, weights, device, kernels)
        else:
            assert host is not None
            part = DenseForward(spec, forward, host)
            vector = functools.partial(_uploaded, device, forward)
        slots = DeviceExperts(device, kernels, experts, spec.expert_weights, vector, classes, counts, hybrid=hybrid)
        tier = VRAMTier(policy, classes, counts)
        places: list[ExpertPlace[Any]]  # of tensors or of arrays, as the dense part has its rows
        if isinstance(part, DeviceForward):
            place = DevicePlace(device, slots, tier, part.y, shared=True)
            places = [place] if host is None else [place, ToHost(host, device)]
        else:
            y = device.zeros(limits.batch_tokens * spec.top_k, spec.d_model)
            place = DevicePlace(device, slots, tier, y, shared=False)
            places = [ToDevice(place, device), host] if hybrid and host is not None else [ToDevice(place, device)]
        jobs = DeviceJobs(spec, device, part, place, Division(places))
        worker = CUDAWorker(spec, limits, device, kernels, jobs, place, host=host)
    except torch.OutOfMemoryError as error:
        free = device.free_bytes
        there = f"; {free[0]} of its {free[1]} bytes were free" if free else ""
        raise NotEnoughMemory(
            f"{device.label} ran out of memory while the engine was opened{there}. The plan counted on:\n{arithmetic}\n"
            "Set a smaller --vram, or end what else uses the device.",
            budget_bytes=0 if free is None else free[0],
            needed_bytes=0 if free is None else free[0],
        ) from error
    if weights is not None:
        await weights.load(reader, on_read)
        if host is not None:
            host.load_biases(lambda name: device.to_host(weights.vector(name)))
    await trio.to_thread.run_sync(device.finish_loading)
    return Opened(
        worker=worker,
        kernels=kernels.form,
        activations=str(device.gemm_type).removeprefix("torch."),
        pin=device.register,
    )


def _uploaded(device: Device, forward: Forward, name: str) -> torch.Tensor:
    """Return a copy on the device of a dense tensor of float32."""
    return device.to_device(forward.floats(name))


def choose_kernels(device: Device) -> TorchKernels:
    """Return the fused kernels if the device is a GPU and Triton can compile one for it, else the torch form.

    Its `form` says which, and why it is not Triton.
    """
    if not device.is_cuda:
        return TorchKernels(device)
    try:
        from mer.compute.cuda.fused import TritonKernels

        fused = TritonKernels(device)
        with device.computing():
            ones = DeviceMatrix.of(GGMLType.F32, 2, 4, torch.ones(8, device=device.torch).view(torch.uint8))
            got = device.to_host(fused.matmul(ones, torch.ones((1, 4), device=device.torch)))
        if got.tolist() != [[4.0, 4.0]]:
            raise ValueError(f"a product of ones gave {got.tolist()}")
    except Exception as error:  # no Triton, no compiler for its launchers, a card that it does not know, ...
        return TorchKernels(device, f"torch, as Triton failed: {type(error).__name__}: {error}".splitlines()[0])
    return fused
