"""The device that the worker computes on: its streams, events and transfers; torch's `cpu` device has them in form."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import attrs
import torch

from mer.errors import ConfigError, DeviceError
from mer.units import format_bytes

T = TypeVar("T")
TORCH_CPU = "torch-cpu"
"""The name of the device that tests use: torch's `cpu`, through the same code, transfers included."""


@attrs.frozen
class Event:
    """A point in a stream; on torch's `cpu` device everything before it has happened already."""

    cuda: Any = None  # torch.cuda.Event

    def block(self) -> None:
        """Block this thread, without spinning, until the device has come to this point."""
        if self.cuda is not None:
            self.cuda.synchronize()


class Device:
    """One torch device.

    Work goes to the `compute` stream inside `computing()`, copies of experts to a stream of their own. Except for
    `name` and `free_bytes`, use it from one thread.

    Args:
        name: "cuda:N" or "torch-cpu".

    Raises:
        ConfigError: torch cannot use this device.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cuda = name != TORCH_CPU
        try:
            self.torch = torch.device(name if self.is_cuda else "cpu")
            if self.is_cuda:
                with torch.cuda.device(self.torch):
                    self._compute = torch.cuda.Stream()
                    self._copies = torch.cuda.Stream()
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"torch cannot use the device {name!r} ({error}); --device cpu works") from error
        self.label = f"{name} ({torch.cuda.get_device_name(self.torch)})" if self.is_cuda else name
        self.gemm_type = torch.bfloat16 if self.is_cuda else torch.float32
        self._registered: list[int] = []

    @property
    def free_bytes(self) -> tuple[int, int] | None:
        """Free and total bytes of the device's own memory; None if it has none."""
        return torch.cuda.mem_get_info(self.torch) if self.is_cuda else None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Send what torch does in the block to the compute stream, and keep no history for gradients."""
        with torch.inference_mode():
            if not self.is_cuda:
                yield
                return
            with torch.cuda.device(self.torch), torch.cuda.stream(self._compute):
                yield

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return zeroed memory of the device."""
        return torch.zeros(shape, dtype=dtype, device=self.torch)

    def to_device(self, array: Any) -> torch.Tensor:
        """Return a copy of a small NumPy array on the device, in order with what the compute stream does."""
        host = torch.as_tensor(array)
        if self.is_cuda:
            return host.pin_memory().to(self.torch, non_blocking=True)
        return host.clone()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy in memory once the device has come to it: the one transfer back, waited for by an event."""
        if not self.is_cuda:
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        self.mark().block()
        return host

    def mark(self) -> Event:
        """Return an event at the end of what the compute stream has been given so far."""
        return self._mark(self._compute) if self.is_cuda else Event()

    def upload(self, target: torch.Tensor, address: int, *, after: Event) -> Event:
        """Copy bytes from memory to the device on the stream of copies, and return the event of their arrival.

        Args:
            target: uint8 [n] of the device, contiguous.
            address: of n bytes that stay as they are until the event.
            after: an event of the compute stream from which on the target may be overwritten.
        """
        source = host_bytes(address, len(target))
        if not self.is_cuda:
            target.copy_(source)
            return Event()
        with torch.cuda.stream(self._copies):
            if after.cuda is not None:
                self._copies.wait_event(after.cuda)
            target.copy_(source, non_blocking=True)
        return self._mark(self._copies)

    def wait(self, event: Event) -> None:
        """Let what the compute stream is given from now on wait for an event of the stream of copies."""
        if event.cuda is not None:
            self._compute.wait_event(event.cuda)

    def capture(self, function: Callable[[], T]) -> tuple[Any, T]:
        """Return a CUDA graph of what a function gives the device, and what it returns: tensors that replays fill."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._compute, capture_error_mode="thread_local"):
            result = function()
        return graph, result

    def finish_loading(self) -> None:
        """Block until all that was done outside `computing` is done: the worker's streams do not wait for it."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def settle(self) -> None:
        """Block until both streams are empty, so that no copy reads from memory any more."""
        if self.is_cuda:
            self._copies.synchronize()
            self._compute.synchronize()

    def register(self, address: int, n_bytes: int) -> str:
        """Pin memory for the life of the engine, so that copies from it run beside everything else.

        Returns:
            What is in force: "pinned", or why it is not.
        """
        if not self.is_cuda:
            return "not pinned: the device is in memory itself"
        code = int(torch.cuda.cudart().cudaHostRegister(address, n_bytes, 0))
        if code != 0:
            with contextlib.suppress(RuntimeError):  # CUDA reports it once more, to whoever comes next
                torch.zeros(1, device=self.torch)
            return f"not pinned: cudaHostRegister of {format_bytes(n_bytes)} gave error {code}; copies are slower"
        self._registered.append(address)
        return "pinned"

    def close(self) -> None:
        """Unpin what was pinned and give the device's unused memory back."""
        if self.is_cuda:
            while self._registered:
                torch.cuda.cudart().cudaHostUnregister(self._registered.pop())
            torch.cuda.empty_cache()

    def _mark(self, stream: Any) -> Event:
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return Event(event)


def host_bytes(address: int, n_bytes: int) -> torch.Tensor:
    """Return a view uint8 [n_bytes] of memory at an address, which must outlive it."""
    return torch.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), dtype=torch.uint8)


def as_error(error: Exception) -> DeviceError | None:
    """Return what torch raised as an error of ours, if the device is to blame; None if it is not.

    An error of CUDA itself is `fatal`: it stays with the process's context, and nothing can be computed on the device
    any more. Running out of its memory is not.
    """
    if isinstance(error, torch.OutOfMemoryError):
        text = str(error).split(". ")[0]
        return DeviceError(f"the device ran out of memory ({text}); lower --vram, which bounds all parts", fatal=False)
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
        return DeviceError(
            f"the device failed ({str(error).splitlines()[0]}); the engine must be opened again, in a new process",
            fatal=True,
        )
    return None
