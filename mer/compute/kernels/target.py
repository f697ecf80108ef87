"""Which instruction-set form the kernels take, decided once, before numba is imported.

On Intel processors LLVM prefers 256-bit vectors; `NUMBA_CPU_FEATURES` then becomes the host's own feature list with
`-prefer-256-bit`, unless the user has set that variable. Compiled kernels go to the user's cache folder, keyed by mer's
version, a hash of the kernel sources, and the form.
"""

from __future__ import annotations

import enum
import hashlib
import os
import sys
from pathlib import Path

from llvmlite import binding

from mer.errors import ConfigError
from mer.paths import cache_folder
from mer.version import VERSION


class Form(enum.Enum):
    """An instruction-set form of the kernels; all forms of a kernel keep one summation order."""

    AVX512_VNNI = "avx512-vnni"
    PORTABLE = "portable"


_VNNI_NEEDS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")


def _host_features() -> dict[str, bool]:
    """The features that numba will compile for; the CPU name "generic" alone stands for none of them."""
    generic = os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic"
    chosen = os.environ.get("NUMBA_CPU_FEATURES", "" if generic else None)
    if chosen is None:
        return dict(binding.get_host_cpu_features())
    return {item[1:]: item[0] == "+" for item in chosen.split(",") if item}


def _choose_form() -> Form:
    forced = os.environ.get("MER_KERNELS")
    features = _host_features()
    able = all(features.get(name, False) for name in _VNNI_NEEDS)
    if not forced:
        return Form.AVX512_VNNI if able else Form.PORTABLE
    try:
        form = Form(forced)
    except ValueError:
        raise ConfigError(f"MER_KERNELS={forced!r}; it may be {', '.join(f.value for f in Form)}") from None
    if form is Form.AVX512_VNNI and not able:
        missing = ", ".join(name for name in _VNNI_NEEDS if not features.get(name, False))
        raise ConfigError(f"MER_KERNELS={forced!r}, but this processor lacks {missing}; use 'portable'")
    return form


def _source_hash() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _prepare_numba(form: Form) -> bool:
    """Set numba's environment and return whether LLVM was told to use 512-bit vectors."""
    wide = form is Form.AVX512_VNNI
    if "numba" in sys.modules:
        return "-prefer-256-bit" in os.environ.get("NUMBA_CPU_FEATURES", "")
    if wide and "NUMBA_CPU_FEATURES" not in os.environ and "NUMBA_CPU_NAME" not in os.environ:
        os.environ["NUMBA_CPU_FEATURES"] = binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"
    return wide


FORM = _choose_form()
WIDE_VECTORS = _prepare_numba(FORM)
KERNEL_CACHE = cache_folder() / "kernels" / f"{VERSION}-{_source_hash()}-{FORM.value}"
