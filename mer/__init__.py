"""Run Mixture-of-Experts language models that are bigger than memory.

async with mer.open_engine("mixtral-8x7b.Q4_0.gguf", memory="8GiB") as engine:
    done = await engine.generate("Once upon a time", max_tokens=64)
    print(done.text)
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it to be true; importing it would take as long as all else here

if TYPE_CHECKING:
    from typing import Any

    from mer.config import EngineConfig, Progress, Sampling
    from mer.embedded import embedded_model_path
    from mer.engine import Engine, TokenStream
    from mer.errors import (
        ComputeError,
        ConfigError,
        ContextOverflow,
        DeviceError,
        EngineClosed,
        FileChanged,
        FileSuspended,
        ForeignCall,
        GenerationError,
        GGUFError,
        MerError,
        MirrorMismatch,
        ModelFileError,
        NotEnoughMemory,
        NumericsError,
        ReadError,
        ReadTimeout,
        RequestError,
        SavedFileError,
        TemplateError,
        TokenizerError,
        UnsupportedModel,
    )
    from mer.model.loading import Model, load_model
    from mer.opening.engine import open_engine, run_engine
    from mer.plan.plan import MemoryPlan, plan_memory
    from mer.sched.events import Completion, PrefillEvent, Timings, TokenEvent, Usage
    from mer.sched.heat import HeatProfile, ProfileError
    from mer.sched.kv_file import PrefixFileError
    from mer.sched.trace import TraceError
    from mer.stats import Settings, Statistics
    from mer.text.chat import Chat, Message

# Every public name is imported when it is first asked for: the command listens for ctrl-C as soon as this is imported,
# and a program that wants an error's class need not wait for numba. All other public names are errors.
_HOMES = {
    "Chat": "mer.text.chat",
    "Completion": "mer.sched.events",
    "Engine": "mer.engine",
    "EngineConfig": "mer.config",
    "HeatProfile": "mer.sched.heat",
    "MemoryPlan": "mer.plan.plan",
    "Message": "mer.text.chat",
    "Model": "mer.model.loading",
    "PrefillEvent": "mer.sched.events",
    "PrefixFileError": "mer.sched.kv_file",
    "ProfileError": "mer.sched.heat",
    "Progress": "mer.config",
    "Sampling": "mer.config",
    "Settings": "mer.stats",
    "Statistics": "mer.stats",
    "Timings": "mer.sched.events",
    "TokenEvent": "mer.sched.events",
    "TokenStream": "mer.engine",
    "TraceError": "mer.sched.trace",
    "Usage": "mer.sched.events",
    "embedded_model_path": "mer.embedded",
    "load_model": "mer.model.loading",
    "open_engine": "mer.opening.engine",
    "plan_memory": "mer.plan.plan",
    "run_engine": "mer.opening.engine",
}

__all__ = [
    "Chat",
    "Completion",
    "ComputeError",
    "ConfigError",
    "ContextOverflow",
    "DeviceError",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "FileChanged",
    "FileSuspended",
    "ForeignCall",
    "GGUFError",
    "GenerationError",
    "HeatProfile",
    "MemoryPlan",
    "MerError",
    "Message",
    "MirrorMismatch",
    "Model",
    "ModelFileError",
    "NotEnoughMemory",
    "NumericsError",
    "PrefillEvent",
    "PrefixFileError",
    "ProfileError",
    "Progress",
    "ReadError",
    "ReadTimeout",
    "RequestError",
    "Sampling",
    "SavedFileError",
    "Settings",
    "Statistics",
    "TemplateError",
    "Timings",
    "TokenEvent",
    "TokenStream",
    "TokenizerError",
    "TraceError",
    "UnsupportedModel",
    "Usage",
    "embedded_model_path",
    "load_model",
    "open_engine",
    "plan_memory",
    "run_engine",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'mer' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES.get(name, "mer.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
