"""Choice of the device that computes: the processor, or a GPU through torch, imported only if there may be one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import attrs

from mer.errors import ConfigError

CPU = "cpu"
TORCH_CPU = "torch-cpu"  # the CUDA worker on torch's `cpu` device: for tests, see docs/cuda.md
TORCH_CPU_BYTES = 1 << 30
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
_INSTALL = "pip install 'mer-engine[cuda]' installs it"


@attrs.frozen(kw_only=True)
class DeviceChoice:
    """A device, and why it is this one."""

    name: str  # "cpu", "cuda:N" or "torch-cpu"
    label: str  # the same with the card's name
    reason: str
    free_bytes: int = 0  # of its own memory
    total_bytes: int = 0

    @property
    def is_cpu(self) -> bool:
        """Whether the CPU worker computes, without torch."""
        return self.name == CPU


def choose_device(setting: str) -> DeviceChoice:
    """Return the device for a setting: "cpu", "cuda", "cuda:N", "torch-cpu", or "auto", which takes a GPU if it can.

    Raises:
        ConfigError: the device that is asked for cannot be used.
    """
    if setting == CPU:
        return DeviceChoice(name=CPU, label=CPU, reason="as set")
    if setting == TORCH_CPU:
        if importlib.util.find_spec("torch") is None:
            raise ConfigError(f"device {setting!r} needs torch, which is not installed; {_INSTALL}")
        return DeviceChoice(name=TORCH_CPU, label=TORCH_CPU, reason="as set", free_bytes=TORCH_CPU_BYTES)
    index = int(setting.partition(":")[2] or 0)
    failure = _cuda_failure(index)
    if failure is None:
        from mer.compute.cuda.probe import cuda_memory

        name, free, total = cuda_memory(index)
        reason = "auto: torch can use it" if setting == "auto" else "as set"
        label = f"cuda:{index} ({name})"
        return DeviceChoice(name=f"cuda:{index}", label=label, reason=reason, free_bytes=free, total_bytes=total)
    if setting == "auto":
        return DeviceChoice(name=CPU, label=CPU, reason=f"auto: {failure}")
    raise ConfigError(f"device {setting!r} cannot be used: {failure}; device 'cpu' works without")


def _cuda_failure(index: int) -> str | None:
    """Return why there is no such GPU, looking for a driver before torch is imported."""
    if not any(path.exists() for path in _DRIVERS):
        return "no NVIDIA driver is loaded"
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed ({_INSTALL})"
    from mer.compute.cuda.probe import cuda_failure

    return cuda_failure(index)
