"""The step of attention's gates, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from mer.compute.cpu.matrix import float_stride
from mer.compute.kernels.gate import gate_heads
from tests._lib.steps import Areas, address, run_step


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(("n", "n_gates", "width"), [(1, 3, 24), (5, 7, 20), (4, 90, 1), (9, 1, 700)])
def test_values_are_multiplied_by_the_softplus_of_their_gate(n: int, n_gates: int, width: int, n_threads: int) -> None:
    rng = np.random.default_rng(n)
    values = rng.normal(size=(n, n_gates * width)).astype(np.float32)
    gates = rng.normal(0, 30, (n, n_gates)).astype(np.float32)  # far beyond what float32 can add to one
    areas = Areas()
    stride, gates_stride = float_stride(n_gates * width), float_stride(n_gates)
    room = areas.floats(n, stride // 4)
    room[:, : n_gates * width] = values
    run_step(
        gate_heads, address(room), stride, n, n_gates, width, areas.put_rows(gates), gates_stride, n_threads=n_threads
    )
    areas.check()
    want = values * np.repeat(np.logaddexp(0, gates.astype(np.float64)), width, 1)
    assert np.allclose(room[:, : n_gates * width], want, rtol=3e-7, atol=1e-44)
    assert np.isnan(room[:, n_gates * width :]).all()
