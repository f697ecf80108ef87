"""The instruction-set form of the kernels, decided once, and the features of the processor that LLVM may use for it.

The best form that the processor is able to run is taken, unless `MER_KERNELS` names another one. Unless the user has
set `NUMBA_CPU_FEATURES`, LLVM is given the host's own feature list with a change: with `-prefer-256-bit` for AVX-512,
which it would use by halves on Intel processors, and without AVX-512 for the AVX2 form. Compiled kernels go to a folder
that is named by mer's version, a hash of the kernel sources, and the form.
"""

from __future__ import annotations

import enum
import hashlib
import os
from pathlib import Path

from llvmlite import binding

from mer import limits
from mer.errors import ConfigError
from mer.io.loan import words
from mer.version import VERSION


class Form(enum.Enum):
    """An instruction-set form of the kernels, the best one first; all forms keep one summation order."""

    AVX512_VNNI = "avx512-vnni"
    AVX_VNNI = "avx-vnni"
    AVX2 = "avx2"
    PORTABLE = "portable"


_AVX2_NEEDS = ("avx2", "fma", "f16c")
# {form: the sets of features of which one is enough}
_NEEDS: dict[Form, tuple[tuple[str, ...], ...]] = {
    Form.AVX512_VNNI: (("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"),),
    Form.AVX_VNNI: ((*_AVX2_NEEDS, "avxvnni"), (*_AVX2_NEEDS, "avx512f", "avx512vl", "avx512vnni")),
    Form.AVX2: (_AVX2_NEEDS,),
    Form.PORTABLE: ((),),
}


def _host_features() -> dict[str, bool]:
    """The features that numba will compile for; the CPU name "generic" alone stands for none of them."""
    generic = os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic"
    chosen = os.environ.get("NUMBA_CPU_FEATURES", "")
    if not chosen and not generic:
        return dict(binding.get_host_cpu_features())
    return {item[1:]: item[0] == "+" for item in chosen.split(",") if item}


def _missing(form: Form, features: dict[str, bool]) -> tuple[str, ...]:
    """Return what the processor lacks for a form."""
    return min((tuple(name for name in needs if not features.get(name, False)) for needs in _NEEDS[form]), key=len)


def _choose_form() -> Form:
    forced = os.environ.get("MER_KERNELS")
    features = _host_features()
    able = [form for form in Form if not _missing(form, features)]
    if not forced:
        return able[0]
    try:
        form = Form(forced)
    except ValueError:
        raise ConfigError(f"MER_KERNELS={forced!r}; it may be {', '.join(f.value for f in Form)}") from None
    if form not in able:
        missing = ", ".join(_missing(form, features))
        raise ConfigError(f"MER_KERNELS={forced!r}, but this processor lacks {missing}; use {able[0].value!r}")
    return form


def sources() -> list[Path]:
    """Return the files that the compiled code depends on: all kernels, and the constants that they import."""
    return [*sorted(Path(__file__).parent.glob("*.py")), Path(words.__file__), Path(limits.__file__)]


def _source_hash() -> str:
    digest = hashlib.sha256()
    for source in sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _features_for(form: Form) -> str:
    """Return the features to compile a form for on the processor at hand."""
    features = binding.get_host_cpu_features()
    if form is Form.AVX512_VNNI:
        return str(features.flatten()) + ",-prefer-256-bit"
    if form is Form.AVX2 and features.get("avx512f", False):
        wide = {name: False for name in features if name.startswith(("avx512", "avx10"))}
        return ",".join(f"{'+' if on else '-'}{name}" for name, on in sorted((features | wide).items()))
    return str(features.flatten())


def host_cpu() -> tuple[str, str]:
    """Return name and features of the processor that kernels are compiled for, as LLVM takes them."""
    name, features = os.environ.get("NUMBA_CPU_NAME", ""), os.environ.get("NUMBA_CPU_FEATURES", "")
    if not features and name.lower() != "generic":
        features = _features_for(FORM)
    return name or str(binding.get_host_cpu_name()), features


FORM = _choose_form()
WIDE_VECTORS = FORM is Form.AVX512_VNNI
KERNEL_FOLDER = f"{VERSION}-{_source_hash()}-{FORM.value}"
