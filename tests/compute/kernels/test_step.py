"""Compiling, caching and forms of the kernels, each in processes of their own."""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llvmlite import binding

import mer
from mer.compute.kernels import target
from mer.compute.kernels.target import FORM, Form, sources
from mer.io.extents import MATRIX_TYPES
from tests._lib.tiny_models import Type, tiny_model

ROOT = Path(__file__).parents[3]
VNNI_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
HOST_FEATURES = binding.get_host_cpu_features()

HASWELL = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.2"  # what has AVX2 and nothing later

needs_vnni = pytest.mark.skipif(
    not all(HOST_FEATURES.get(name, False) for name in VNNI_FEATURES), reason="the processor lacks AVX-512 VNNI"
)
needs_avx2 = pytest.mark.skipif(
    not all(HOST_FEATURES.get(name, False) for name in ("avx2", "fma", "f16c")), reason="the processor lacks AVX2"
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


COMPILE_ALL = "from tests._lib.all_kernels import main; main([])"


@pytest.mark.slow
def test_the_second_process_finds_every_kernel_in_the_cache() -> None:
    first, second = output(python(COMPILE_ALL)), output(python(COMPILE_ALL))
    assert len(first) == len(second) >= 40
    assert [line for line in second if not line.endswith(" True")] == []


RUNTIME = """
from mer.compute.cpu.prepare import RUNTIME
print(*(function.compile() for function in RUNTIME))
"""


def test_the_second_process_finds_the_runtime_in_the_cache() -> None:
    output(python(RUNTIME))
    assert output(python(RUNTIME)) == [" ".join(["True"] * 5)]


LOGITS = """
import sys
import numpy as np
from mer.compute.kernels.target import FORM
from tests._lib.resident import logits
out, small, *paths = sys.argv[1:]
tokens = np.random.default_rng(0).integers(0, 300, 70).tolist()
results = [logits(path, tokens, chunks=[64, 5, 1], planes=planes) for path in paths for planes in (1, 2)]
results += [logits(small, tokens, chunks=[64, 5, 1], kv_type=kind) for kind in ("f32", "f16", "q8_0")]
np.savez(out, *results)
print(FORM.value)
"""


ALL = [Type(int(kind)) for kind in sorted(MATRIX_TYPES)]


@needs_vnni
def test_every_form_gives_the_same_bits(tmp_path: Path) -> None:
    """AVX-VNNI has no code of its own but one instruction; four types have it in all ways that it is used."""
    kinds_of = dict.fromkeys(Form, ALL) | {Form.AVX_VNNI: [Type.Q4_1, Type.Q8_0, Type.Q6_K, Type.IQ4_XS]}
    shape: dict[str, Any] = {"d_model": 256, "d_ff": 256, "n_heads": 8, "n_layers": 1}
    paths = {
        kind: tiny_model(tmp_path / f"{kind.name}.gguf", "qwen3moe", weight_type=kind, **shape).path for kind in ALL
    }
    small = tiny_model(  # 8 query heads to a KV head of whole blocks of Q8_0, and a window
        tmp_path / "small.gguf", "qwen3moe", head_dim=32, n_heads=8, n_kv_heads=1, n_layers=1,
        metadata={"qwen3moe.attention.sliding_window": 41},
    ).path  # fmt: skip
    want: dict[Type, list[Any]] = {}
    kept: list[Any] = []
    for form, kinds in kinds_of.items():
        out = tmp_path / f"{form.value}.npz"
        assert output(python(LOGITS, out, small, *(paths[kind] for kind in kinds), MER_KERNELS=form.value)) == [
            form.value
        ]
        with np.load(out) as file:
            logits = [file[name] for name in file.files]
        assert len(logits) == 2 * len(kinds) + 3
        kept = kept or logits[-3:]
        assert all(map(np.array_equal, logits[-3:], kept))
        for number, kind in enumerate(kinds):
            got = logits[2 * number : 2 * number + 2]
            assert all(map(np.array_equal, got, want.setdefault(kind, got)))
    assert all(np.isfinite(planes).all() for logits in [*want.values(), kept] for planes in logits)
    assert len({logits.tobytes() for logits in kept}) == 3


@pytest.mark.parametrize(
    ("form", "chosen"),
    [
        pytest.param(Form.AVX2, ["tests/compute/kernels", "--ignore", __file__], marks=needs_avx2, id="avx2"),
        pytest.param(Form.PORTABLE, ["tests/compute/kernels/test_matmul.py"], id="portable"),
    ],
)
def test_the_other_forms_pass_the_tests_of_the_kernels(form: Form, chosen: list[str]) -> None:
    """In the portable form those of products, whose instructions the forms write differently."""
    if form is FORM:
        pytest.skip("this process uses the form already")
    done = python(
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "-p", "no:cacheprovider", *chosen,
        MER_KERNELS=form.value,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


SHOW_FORM = "from mer.compute.kernels.target import FORM, WIDE_VECTORS; print(FORM.value, WIDE_VECTORS)"


def test_a_form_that_does_not_exist_is_an_error() -> None:
    done = python(SHOW_FORM, MER_KERNELS="avx1024")
    assert done.returncode == 1
    assert "ConfigError: MER_KERNELS='avx1024'; it may be avx512-vnni, avx-vnni, avx2, portable" in done.stderr


@pytest.mark.parametrize(
    ("form", "features", "message"),
    [
        ("avx512-vnni", "+avx512f,+avx512bw,-avx512vl", "lacks avx512vl, avx512dq, avx512vnni; use 'portable'"),
        ("avx-vnni", HASWELL, "lacks avxvnni; use 'avx2'"),
        ("avx2", "+avx2,+f16c", "lacks fma; use 'portable'"),
    ],
)
def test_a_form_that_the_processor_lacks_is_an_error(form: str, features: str, message: str) -> None:
    done = python(SHOW_FORM, MER_KERNELS=form, NUMBA_CPU_FEATURES=features)
    assert done.returncode == 1
    assert f"MER_KERNELS={form!r}, but this processor {message}" in done.stderr


@pytest.mark.parametrize(
    ("features", "form"),
    [
        ("+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni", "avx512-vnni"),
        (HASWELL + ",+avx512f,+avx512bw,+avx512vl,+avx512dq", "avx2"),  # Skylake's AVX-512 has no VNNI
        (HASWELL + ",+avxvnni", "avx-vnni"),
        (HASWELL, "avx2"),
        ("+avx2,+fma", "portable"),
        ("+sse2", "portable"),
    ],
)
def test_the_best_form_that_the_processor_has_is_chosen(features: str, form: str) -> None:
    wide = form == "avx512-vnni"
    assert output(python(SHOW_FORM, NUMBA_CPU_FEATURES=features)) == [f"{form} {wide}"]


def test_an_empty_choice_is_none() -> None:
    assert output(python(SHOW_FORM, MER_KERNELS="", NUMBA_CPU_FEATURES="")) == output(python(SHOW_FORM))


SHOW_FEATURES = """
from mer.compute.kernels.target import host_cpu
print(host_cpu()[1])
"""


@needs_vnni
def test_llvm_is_told_to_use_wide_vectors_unless_the_user_chose_features() -> None:
    (features,) = output(python(SHOW_FEATURES))
    assert features == HOST_FEATURES.flatten() + ",-prefer-256-bit"
    assert output(python(SHOW_FEATURES, NUMBA_CPU_FEATURES="+avx2")) == ["+avx2"]
    assert output(python(SHOW_FEATURES, MER_KERNELS="portable")) == [HOST_FEATURES.flatten()]
    (features,) = output(python(SHOW_FEATURES, MER_KERNELS="avx2"))
    changed = [name for name in features.split(",") if name not in HOST_FEATURES.flatten().split(",")]
    assert {"-avx512f", "-avx512vl"} <= set(changed)
    assert [name for name in changed if not name.startswith("-avx512")] == []


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
    assert cached == "False"
    assert int(wide) >= 8 * (8 + 4 + 2 + 1)  # 8 for each column of each tile width
    assert int(narrow) == 0


NARROW_ASSEMBLY = """
import re, sys
from mer.compute.cpu.forward import steps_for
from mer.compute.kernels.q8_0 import matmul_q8_0
from mer.compute.kernels.target import FORM
from mer.io.ggml import GGMLType
patterns = "vpmaddubsw.*ymm", "vpdpbusd.*ymm", "ymm", "zmm|[xy]mm(1[6-9]|[23][0-9])|%k[0-7]"
print(FORM.value)
kinds = [GGMLType[name] for name in sys.argv[1].split()]
for step in [matmul_q8_0, *(steps_for(kinds, 1, "f16") if kinds else [])]:
    step.compile()
    print(step.name, *(len(re.findall(pattern, step.assembly)) for pattern in patterns))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are instructions of x86-64")
@pytest.mark.parametrize("form", ["avx2", "haswell", "avx-vnni"])
def test_256_bit_forms_need_nothing_later(form: str, tmp_path: Path) -> None:
    """No register of AVX-512, whether the form is forced on a processor that has it, or taken on one that has not."""
    chosen: dict[str, str] = {"MER_KERNELS": form}
    if form == "haswell":
        chosen = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": HASWELL}
    if form == "avx-vnni":
        chosen = {"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": HASWELL + ",+avxvnni"}
    name, *lines = output(
        python(NARROW_ASSEMBLY, "F16 Q6_K" if form == "haswell" else "", XDG_CACHE_HOME=str(tmp_path), **chosen)
    )
    assert name == ("avx-vnni" if form == "avx-vnni" else "avx2")
    counts = {line.split()[0]: [int(count) for count in line.split()[1:]] for line in lines}
    assert [step for step, (*_, late) in counts.items() if late] == []
    least = 2 * 8 * (8 + 4 + 2 + 1)  # 8 for each column of each tile width, for each 8 rows
    for step, (pairs, fours, wide, _) in counts.items():
        if step.startswith("matmul_q"):
            assert (pairs, fours >= least) == (0, True) if form == "avx-vnni" else (pairs >= least, fours) == (True, 0)
        if not step.startswith(
            ("dispatch", "fill_", "clear_rows", "gate_heads", "gather", "begin_reads", "await_reads", "next_turn")
        ):
            assert wide >= 8, step


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
    assert done.stderr == f"compiled kernels cannot be kept: {failure}\n"


CUT = """
from mer.compute.kernels.elementwise import gather
print(gather.compile())
"""


def test_a_kernel_whose_file_is_damaged_is_compiled_and_kept_again(tmp_path: Path) -> None:
    assert output(python(CUT, XDG_CACHE_HOME=str(tmp_path))) == ["False"]
    (path,) = tmp_path.rglob("*.kernel")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    done = python(CUT, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == "False\n"
    assert done.stderr == f"{path} cannot be used and is compiled again: its check sum is wrong\n"
    assert path.read_bytes() == whole
    assert output(python(CUT, XDG_CACHE_HOME=str(tmp_path))) == ["True"]


def test_a_user_without_a_home_has_no_cache_and_kernels_work() -> None:
    code = f"import pwd\ndef nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n{CUT}"
    done = python(code, HOME="", XDG_CACHE_HOME="")
    assert done.stdout == "False\n"
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("compiled kernels cannot be kept: there is no cache folder: HOME is not set")


def test_compiled_code_is_kept_by_all_that_goes_into_it() -> None:
    """What kernels import from the rest of mer is no constant of theirs, or its file counts too."""
    hashed = {path.resolve() for path in sources()}
    kernels = Path(target.__file__).parent
    assert set(kernels.glob("*.py")) <= hashed
    harmless = {"mer.errors", "mer.paths", "mer.version", "mer.io", "mer.io.loan", "mer.io.new_file"}
    for path in kernels.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if name.startswith("mer.") and not name.startswith("mer.compute.kernels") and name not in harmless:
                assert Path(mer.__file__).parents[1] / (name.replace(".", "/") + ".py") in hashed
