"""From Python functions to LLVM IR: numba types and lowers a kernel and its helpers, and compiles none of them.

By itself, numba would optimize and compile each helper before the kernel that takes it in, wrap it for calls from
Python, and link its own runtime library into each. Here a kernel's modules are only collected; `back_end.py` links
them and runs LLVM once.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
from llvmlite import ir
from numba import _dynfunc, types  # type: ignore[attr-defined]
from numba.core import cgutils, compiler, funcdesc, typed_passes, untyped_passes
from numba.core.codegen import CodeLibrary, CPUCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys

_OPTIONS = {"nopython": True, "error_model": "numpy"}  # division by zero gives infinity or NaN, no exception


class _KernelLibrary(CPUCodeLibrary):
    """The modules of one function, and the libraries of the functions that it calls."""

    def __init__(self, codegen: Any, name: str) -> None:
        CodeLibrary.__init__(self, codegen, name)
        self._own: list[str] = []
        self._used: list[Any] = []

    def add_ir_module(self, ir_module: Any) -> None:
        """Take a module of llvmlite's."""
        self._own.append(cgutils.normalize_ir_text(str(ir_module)))

    def add_linking_library(self, library: Any) -> None:
        """Take the library of a function that is called; kernels have no use for numba's reference counting."""
        if library is not rtsys.library:
            self._used.append(library)

    def finalize(self) -> None:
        """Let nothing be added any more."""
        self._finalized = True

    def collect(self, found: dict[int, list[str | bytes]]) -> None:
        """Add these modules and those of all functions called to `found`, each library once."""
        if id(self) in found:
            return
        found[id(self)] = list(self._own)
        for library in self._used:
            if isinstance(library, _KernelLibrary):
                library.collect(found)
            elif id(library) not in found:  # of a function that numba itself brings along, and compiles
                found[id(library)] = [library._get_module_for_linking().as_bitcode()]


@ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
def _refuse(_self: int, _arguments: int, _keywords: int) -> None:
    raise TypeError("a helper of kernels is called from Python; declare it a `nogil_function` for that")


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(typed_passes.NativeLowering):
    """Lowers a function into a library that is not compiled; numba knows it by an object that cannot be called."""

    _name = "mer_kernel_lowering"

    def run_pass(self, state: Any) -> bool:
        """See `numba.core.compiler_machinery.CompilerPass`."""
        context = state.targetctx
        if state.library is None:
            state.library = _KernelLibrary(context.codegen(), state.func_id.func_qualname)
        library = state.library
        described = funcdesc.PythonFunctionDescriptor.from_specialized_function(
            state.func_ir, state.typemap, state.return_type, state.calltypes, mangler=context.mangler,
            inline=state.flags.forceinline, noalias=state.flags.noalias, abi_tags=[state.flags.get_mangle_string()],
        )  # fmt: skip
        with context.push_code_library(library):
            lower = self.lowering_class(context, library, described, state.func_ir, metadata=state.metadata)
            lower.lower()
        library.finalize()
        name = described.qualname.split(".")[-1]
        address = ctypes.cast(_refuse, ctypes.c_void_p).value
        known = _dynfunc.make_function(described.lookup_module(), name, "", address, lower.env, (library,))
        context.insert_user_function(known, described, [library])
        state["cr"] = compiler._LowerResult(described, lower.call_helper, cfunc=known, env=lower.env)
        return True


class _KernelCompiler(compiler.CompilerBase):
    """Those passes of numba's that kernels need, up to the lowering, which is `_Lowering`.

    Kernels have no closures, `with`, exceptions made at run time, or functions to be inlined: numba's own pipeline
    looks for each of them, and works out the flow of control again after each look.
    """

    def define_pipelines(self) -> list[Any]:
        """See `numba.core.compiler.CompilerBase`."""
        return [_pipeline()]


@functools.cache
def _pipeline() -> Any:
    """Return the passes; made once, as numba takes its time to sort out which needs which."""
    passes = PassManager("mer_kernel")
    passes.add_pass(untyped_passes.TranslateByteCode, "analyze bytecode")
    passes.add_pass(untyped_passes.FixupArgs, "fix up arguments")
    passes.add_pass(untyped_passes.IRProcessing, "process IR")
    passes.add_pass(untyped_passes.RewriteSemanticConstants, "rewrite semantic constants")
    passes.add_pass(untyped_passes.DeadBranchPrune, "prune dead branches")
    passes.add_pass(untyped_passes.GenericRewrites, "rewrite constant indices")
    passes.add_pass(untyped_passes.ReconstructSSA, "assign each variable once")
    passes.add_pass(typed_passes.NopythonTypeInference, "infer types")
    passes.add_pass(typed_passes.PreLowerStripPhis, "remove phi nodes")
    passes.add_pass(typed_passes.NoPythonSupportedFeatureValidation, "ensure that features are supported")
    passes.add_pass(typed_passes.IRLegalization, "ensure that the IR can be lowered")
    passes.add_pass(typed_passes.AnnotateTypes, "annotate types")
    passes.add_pass(_Lowering, "lower without compiling")
    passes.add_pass(typed_passes.NoPythonBackend, "collect the result")
    passes.finalize()
    return passes


_CONSTANT = ("kind", "planes")  # parameters for each of whose values a helper has code of its own


def helper(function: Callable[..., Any]) -> Any:
    """Declare a function that kernels call.

    Other constants than those of `_CONSTANT` are passed as what they are, integers: by itself, numba would make another
    function for each of them that a caller writes down.
    """
    made: Any = numba.njit(error_model="numpy", pipeline_class=_KernelCompiler)(function)
    names, resolve = function.__code__.co_varnames, made.get_call_template

    def get_call_template(arguments: Any, keywords: Any) -> Any:
        pairs = zip(names, arguments, strict=False)
        return resolve(tuple(t if name in _CONSTANT else types.unliteral(t) for name, t in pairs), keywords)

    made.get_call_template = get_call_template
    return made


_SCALARS = (types.Integer, types.Float, types.Boolean, types.IntegerLiteral)
_signatures: dict[tuple[Any, ...], Any] = {}


@contextmanager
def _remembering(typing: Any) -> Iterator[None]:
    """Let numba resolve each call of a built-in on scalars once in a process, under the compiler's lock.

    By itself it tries all of NumPy's signatures of `+` again at each `+`, which takes a fifth of its time.
    """
    resolve = typing.resolve_function_type

    def remembered(function: Any, arguments: Any, keywords: Any) -> Any:
        if keywords or not isinstance(function, types.Function) or not all(isinstance(a, _SCALARS) for a in arguments):
            return resolve(function, arguments, keywords)
        key = function, *arguments
        signature = _signatures.get(key)
        if signature is None:
            signature = _signatures[key] = resolve(function, arguments, keywords)
        return signature

    typing.resolve_function_type = remembered
    try:
        yield
    finally:
        del typing.resolve_function_type


def modules_of(function: Callable[..., Any], signature: Any, symbol: str) -> list[str | bytes]:
    """Return the modules that make a C function of a kernel, as text or bitcode; `symbol` is the C function's name.

    The signature's types are int64, and void or int64 for the result.

    Raises:
        numba.core.errors.NumbaError: the function is none that numba can type and lower.
    """
    with global_compiler_lock:
        flags = compiler.Flags()
        cpu_target.options.parse_as_flags(flags, _OPTIONS)
        context = cpu_target.target_context
        library = _KernelLibrary(context.codegen(), symbol)
        with _remembering(cpu_target.typing_context):
            result = compiler.compile_extra(
                cpu_target.typing_context, context, function, signature.args, signature.return_type, flags, {},
                library=library, pipeline_class=_KernelCompiler,
            )  # fmt: skip
        found: dict[int, list[str | bytes]] = {}
        library.collect(found)
        entry = _entry(result.fndesc.llvm_func_name, len(signature.args), signature.return_type, symbol)
        return [entry, *(module for modules in found.values() for module in modules)]


def _entry(native: str, n_arguments: int, result: Any, symbol: str) -> str:
    """Return the module of a C function that calls a native one, which has room for a result and an exception first."""
    i64, i32, pointer = ir.IntType(64), ir.IntType(32), ir.PointerType()
    returned = ir.VoidType() if result is types.void else i64
    module = ir.Module(symbol)
    arguments = [i64] * n_arguments
    callee = ir.Function(module, ir.FunctionType(i32, [pointer, pointer, *arguments]), native)
    outer = ir.Function(module, ir.FunctionType(returned, arguments), symbol)
    b = ir.IRBuilder(outer.append_basic_block())
    room, exception = b.alloca(i64), b.alloca(ir.PointerType())
    b.call(callee, [room, exception, *outer.args])
    if result is types.void:
        b.ret_void()
    else:
        b.ret(b.load(room, typ=i64))
    return str(module)
