"""Experts that the processor computes beside the device, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.device import TORCH_CPU, Device
from mer.compute.cuda.experts import Pairs
from mer.compute.cuda.host import HostExperts
from mer.compute.reference.model import ReferenceModel
from tests._lib.resident import Experts
from tests._lib.tiny_models import Type, tiny_model


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q6_K, Type.F16])
def test_outputs_are_the_references(tmp_path: Path, kind: Type, n: int) -> None:
    shape: dict[str, Any] = {"d_model": 256, "d_ff": 256, "n_heads": 8} if kind is Type.Q6_K else {}
    path = tiny_model(tmp_path / "m.gguf", weight_type=kind, merged=False, **shape).path
    reference = ReferenceModel(path)
    limits = Limits(batch_tokens=8, outputs=8, sequences=1, sequence_blocks=1, kv_blocks=1, threads=2, planes=2)
    host = HostExperts(reference.spec, limits, reference.experts)
    memory = Experts(reference.gguf, reference.experts, keep=True)
    rng = np.random.default_rng(n)
    host.open()
    try:
        for layer in (1, 0, 1):  # the last time as they were re-arranged
            h = rng.normal(0.2, 1, (n, reference.spec.d_model)).astype(np.float32)
            ids = np.stack([rng.permutation(5)[:2] for _ in range(n)]).astype(np.int32)
            numbers = np.unique(ids).tolist()[:2]
            program = host.start(layer, [memory.load(layer, number) for number in numbers], torch.from_numpy(h), ids)
            assert host.finish() > 0
            del program
            pairs = Pairs(ids, Device(TORCH_CPU))
            for number in numbers:
                first, count = pairs.spans[number]
                want = reference.expert(layer, number, h[pairs.order[first : first + count] // 2].astype(np.float64))
                got = host.outputs(first, count)
                assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()
    finally:
        host.close()
        host.close()
