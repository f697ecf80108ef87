"""From LLVM IR to machine code in this process: one run of LLVM's optimizer for a kernel with all its helpers."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from typing import Any

import numba
from llvmlite import binding

from mer.compute.kernels.target import host_cpu

_SPEED_LEVEL = 3


def facts() -> str:
    """Return what the machine code of a kernel depends on besides the kernels' sources and their form."""
    versions = numba.__version__, ".".join(map(str, binding.llvm_version_info)), platform.python_version()
    return "\n".join((*versions, binding.get_process_triple(), *host_cpu(), str(_SPEED_LEVEL)))


def compile_object(modules: Sequence[str | bytes], symbol: str) -> bytes:
    """Link modules, text or bitcode, optimize them, and return an object file that defines `symbol` and nothing else.

    Only other threads' calls of LLVM wait meanwhile; the interpreter goes on.
    """
    machine = _machine()
    return bytes(machine.emit_object(_optimized(modules, symbol, machine)))


def assembly(modules: Sequence[str | bytes], symbol: str) -> str:
    """Return as text what `compile_object` would make of the modules."""
    machine = _machine()
    return str(machine.emit_assembly(_optimized(modules, symbol, machine)))


def load_object(content: bytes, symbol: str) -> int:
    """Put an object file into executable memory for good, and return the address of `symbol`."""
    engine = _engine()
    engine.add_object_file(binding.ObjectFileRef.from_data(content))
    engine.finalize_object()
    return int(engine.get_function_address(symbol))


def _optimized(modules: Sequence[str | bytes], symbol: str, machine: Any) -> Any:
    first, *others = map(_parsed, modules)
    first.triple, first.data_layout = binding.get_process_triple(), str(machine.target_data)
    for other in others:
        other.triple, other.data_layout = first.triple, first.data_layout
        first.link_in(other)
    for defined in (*first.functions, *first.global_variables):
        if not defined.is_declaration and defined.name != symbol:
            defined.linkage = "internal"
    first.verify()
    options = binding.create_pipeline_tuning_options(speed_level=_SPEED_LEVEL)
    options.loop_vectorization, options.slp_vectorization = True, False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(first, builder)
    return first


def _parsed(module: str | bytes) -> Any:
    return binding.parse_bitcode(module) if isinstance(module, bytes) else binding.parse_assembly(module)


def _machine() -> Any:
    """Return a new target machine for this processor, with the options that numba takes for compiling at run time."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = host_cpu()
    reloc = "static" if platform.machine() == "x86_64" else "default"
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(
        cpu=name, features=features, opt=_SPEED_LEVEL, reloc=reloc, codemodel="jitdefault", jit=True
    )


@functools.cache
def _engine() -> Any:
    return binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
