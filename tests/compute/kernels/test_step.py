"""Compiling, caching and forms of the kernels, each in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llvmlite import binding

from mer.compute.kernels.target import FORM, Form
from mer.io.extents import MATRIX_TYPES
from tests._lib.tiny_models import Type, tiny_model

ROOT = Path(__file__).parents[3]
VNNI_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
HOST_FEATURES = binding.get_host_cpu_features()

needs_vnni = pytest.mark.skipif(
    not all(HOST_FEATURES.get(name, False) for name in VNNI_FEATURES), reason="the processor lacks AVX-512 VNNI"
)


def python(code: str, *arguments: str | Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose kernels no variable steers but those given; None removes one."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_") and k != "MER_KERNELS"}
    variables |= {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900, check=False)


def output(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines that a process printed; it must have ended well and in silence."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


COMPILE_ALL = """
from mer.compute.forward import steps_for
from mer.compute.kernels.matmul import STEPS
from mer.io.ggml import GGMLType
kinds = [GGMLType(kind) for kind in STEPS]
steps = {step.name: step for planes in (1, 2) for step in steps_for(kinds, planes)}
print(*(f"{name} {step.compile()}" for name, step in steps.items()), sep="\\n")
"""


def test_the_second_process_finds_every_kernel_in_the_cache() -> None:
    first, second = output(python(COMPILE_ALL)), output(python(COMPILE_ALL))
    assert len(first) == len(second) >= 40
    assert [line for line in second if not line.endswith(" True")] == []


RUNTIME = """
import numba
hits = []
njit = numba.njit
def spy(*args, **options):
    declare = njit(*args, **options)
    if not options.get("cache"):
        return declare
    def wrapped(function):
        dispatcher = declare(function)
        hits.append(sum(dispatcher.stats.cache_hits.values()))
        return dispatcher
    return wrapped
numba.njit = spy
import mer.compute.kernels.runtime
print(*hits)
"""


def test_the_second_process_finds_the_runtime_in_the_cache() -> None:
    output(python(RUNTIME))
    assert output(python(RUNTIME)) == ["1 1 1 1"]


LOGITS = """
import sys
import numpy as np
from mer.compute.kernels.target import FORM
from tests._lib.resident import logits
paths, out = sys.argv[2:], sys.argv[1]
tokens = np.random.default_rng(0).integers(0, 300, 70).tolist()
np.savez(out, *(logits(path, tokens, chunks=[64, 5, 1], planes=planes) for path in paths for planes in (1, 2)))
print(FORM.value)
"""


@needs_vnni
def test_every_form_gives_the_same_bits(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"d_model": 256, "d_ff": 256, "n_heads": 8, "n_layers": 1}
    kinds = [Type(int(kind)) for kind in sorted(MATRIX_TYPES)]
    paths = [tiny_model(tmp_path / f"{kind.name}.gguf", "qwen3moe", weight_type=kind, **shape).path for kind in kinds]
    wide, portable = tmp_path / "wide.npz", tmp_path / "portable.npz"
    assert output(python(LOGITS, wide, *paths, MER_KERNELS="avx512-vnni")) == ["avx512-vnni"]
    assert output(python(LOGITS, portable, *paths, MER_KERNELS="portable")) == ["portable"]
    with np.load(wide) as one, np.load(portable) as other:
        assert len(one.files) == 2 * len(kinds)
        for name in one.files:
            assert np.array_equal(one[name], other[name])


@pytest.mark.skipif(FORM is Form.PORTABLE, reason="this process uses the portable form already")
def test_the_portable_form_passes_the_tests_of_the_kernels() -> None:
    """Those of products, whose instructions the forms write differently."""
    done = python(
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "-p", "no:cacheprovider",
        "tests/compute/kernels/test_matmul.py", MER_KERNELS="portable",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


SHOW_FORM = "from mer.compute.kernels.target import FORM, WIDE_VECTORS; print(FORM.value, WIDE_VECTORS)"


def test_a_form_that_does_not_exist_is_an_error() -> None:
    done = python(SHOW_FORM, MER_KERNELS="avx1024")
    assert done.returncode == 1
    assert "ConfigError: MER_KERNELS='avx1024'; it may be avx512-vnni, portable" in done.stderr


def test_a_form_that_the_processor_lacks_is_an_error() -> None:
    done = python(SHOW_FORM, MER_KERNELS="avx512-vnni", NUMBA_CPU_FEATURES="+avx512f,+avx512bw,-avx512vl")
    assert done.returncode == 1
    assert "this processor lacks avx512vl, avx512dq, avx512vnni; use 'portable'" in done.stderr


def test_the_best_form_that_the_processor_has_is_chosen() -> None:
    able = all(HOST_FEATURES.get(name, False) for name in VNNI_FEATURES)
    assert output(python(SHOW_FORM, MER_KERNELS="")) == ["avx512-vnni True" if able else "portable False"]
    assert output(python(SHOW_FORM, NUMBA_CPU_FEATURES="+avx2,+fma")) == ["portable False"]


SHOW_FEATURES = """
import os
import mer.compute.kernels.target
print(os.environ.get("NUMBA_CPU_FEATURES", "unset"))
"""


@needs_vnni
def test_llvm_is_told_to_use_wide_vectors_unless_the_user_chose_features() -> None:
    (features,) = output(python(SHOW_FEATURES))
    assert features == HOST_FEATURES.flatten() + ",-prefer-256-bit"
    assert output(python(SHOW_FEATURES, NUMBA_CPU_FEATURES="+avx2")) == ["+avx2"]
    assert output(python(SHOW_FEATURES, MER_KERNELS="portable")) == ["unset"]


ASSEMBLY = """
from mer.compute.kernels.q4_0 import matmul_q4_0
import re
text = matmul_q4_0.assembly
print(matmul_q4_0.compile(), len(re.findall("vpdpbusd.*zmm", text)), len(re.findall("vpdpbusd.*ymm", text)))
"""


@needs_vnni
@pytest.mark.parametrize("cpu", [None, "icelake-server"])
def test_products_use_512_bit_integer_dot_products(cpu: str | None, tmp_path: Path) -> None:
    """Also where numba takes the processor for one for which LLVM prefers 256 bits; mer then leaves its variables."""
    features = None if cpu is None else HOST_FEATURES.flatten() + ",-prefer-256-bit"
    done = python(ASSEMBLY, XDG_CACHE_HOME=str(tmp_path), NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
    cached, wide, narrow = output(done)[0].split()
    assert cached == "False"  # numba does not show the assembly of what it finds in a cache
    assert int(wide) >= 8 * (8 + 4 + 2 + 1)  # 8 for each column of each tile width
    assert int(narrow) == 0


INSTRUCTIONS = """
import re
from mer.compute.kernels.iq4_nl import matmul_iq4_nl
from mer.compute.kernels.q4_k import matmul_q4_k
print(len(re.findall("vpshufb.*zmm", matmul_iq4_nl.assembly)), len(re.findall("vpdpwssd.*zmm", matmul_q4_k.assembly)))
"""


@needs_vnni
def test_tables_of_values_and_minima_have_their_instructions(tmp_path: Path) -> None:
    """A shuffle looks up each vector of values, and minima meet their sums in pairs."""
    shuffles, pairs = map(int, output(python(INSTRUCTIONS, XDG_CACHE_HOME=str(tmp_path)))[0].split())
    assert shuffles >= 8 * 4  # in the code of each tile width
    assert pairs >= 3 * (8 + 4 + 2 + 1)  # the first of four is a product alone


GENERIC = """
from mer.compute.kernels.q8_0 import matmul_q8_0
from mer.compute.kernels.target import FORM
from mer.compute.kernels.floats import matmul_f16
print(FORM.value, matmul_q8_0.compile(), matmul_f16.compile())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere 'generic' is another processor")
def test_numbas_generic_processor_compiles_the_portable_form(tmp_path: Path) -> None:
    done = python(GENERIC, XDG_CACHE_HOME=str(tmp_path), NUMBA_CPU_NAME="generic")
    assert output(done) == ["portable False False"]


UNWRITABLE = """
import numpy as np
from mer.compute.kernels.router import route
from mer.compute.kernels.step import cache_failure
print(route.compile())
print(cache_failure())
"""


@pytest.mark.parametrize("obstacle", ["file", "folder"])
def test_a_cache_that_cannot_be_written_is_reported_and_kernels_work(obstacle: str, tmp_path: Path) -> None:
    if obstacle == "file":
        (tmp_path / "mer").write_text("not a folder")
    else:
        (tmp_path / "mer").mkdir()
        (tmp_path / "mer").chmod(0o500)
        if os.access(tmp_path / "mer", os.W_OK):
            pytest.skip("this user may write everywhere")
    done = python(UNWRITABLE, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    compiled, failure = done.stdout.splitlines()
    assert compiled == "False"
    assert str(tmp_path / "mer" / "kernels") in failure
    assert f"compiled kernels cannot be kept in {tmp_path}" in done.stderr


GUARDED = """
import ctypes, mmap, sys
import numpy as np
import tests._lib.steps as steps
from mer.io.ggml import GGMLType
from tests.compute.kernels.test_matmul import exact_activations, random_weights

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

class Guarded(steps.Areas):
    def room(self, n_bytes, shift=0):
        start = -n_bytes % 4096
        area = mmap.mmap(-1, start + n_bytes + 4096)
        view = np.frombuffer(area, np.uint8)
        assert libc.mprotect(view.ctypes.data + start + n_bytes, 4096, 0) == 0
        self._kept = getattr(self, "_kept", []) + [view]
        view[: start + n_bytes] = steps.CANARY
        return view[start : start + n_bytes]
    def check(self):
        pass

steps.Areas = Guarded
rng = np.random.default_rng(0)
for name, planes, rows, cols in [line.split(":") for line in sys.argv[1:]]:
    kind = GGMLType[name]
    rows, cols, planes = int(rows), int(cols), int(planes)
    raw, x = random_weights(kind, rows, cols, rng), exact_activations(15, cols, rng, planes)
    out = steps.product(kind, raw, rows, x, planes=planes, n_threads=2)
    assert np.isfinite(out).all()
    print(name)
"""


def test_products_touch_no_byte_behind_any_of_their_areas() -> None:
    """Every area ends at a page that may not be touched."""
    cases = ["F32:1:7:21", "F16:1:7:21", "BF16:1:7:21"]
    quantized = [kind.name for kind in sorted(MATRIX_TYPES) if kind.block_size > 1]
    cases += [f"{name}:{planes}:37:256" for name in quantized for planes in (1, 2)]
    assert output(python(GUARDED, *cases)) == [case.split(":")[0] for case in cases]
