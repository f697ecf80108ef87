"""The choice of the next layer that has experts, predicted from the stream before those of the layer before it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import trio

from mer.compute.cpu.scratch import Limits
from mer.compute.messages import Done
from mer.compute.reference.model import ReferenceModel
from tests._lib.families import mixtures
from tests._lib.families.family import VOCAB, Family, write
from tests._lib.resident import batch
from tests._lib.workers import WORKERS, open_worker

TOKENS = [int(token) for token in np.random.default_rng(7).integers(3, VOCAB, 19)]


@pytest.mark.parametrize("device", WORKERS)
@pytest.mark.parametrize(
    ("family", "variant"),
    [(mixtures.GLM4_MOE, "groups"), (mixtures.MINIMAX_M2, None), (mixtures.LAGUNA, None)],
    ids=lambda it: it.name if isinstance(it, Family) else it or "plain",
)
def test_routers_that_choose_by_score_predict_by_score(
    tmp_path: Path, family: Family, variant: str | None, device: str
) -> None:
    path = write(tmp_path / "m.gguf", family, variant=variant, seed=1).path
    reference = ReferenceModel(path)
    spec, hidden = reference.spec, reference.trace(TOKENS).hidden
    numbers = list(spec.routed)
    wanted, by_logits = [], []
    for before, after in itertools.pairwise(numbers):
        assert after == before + 1
        layer, following = spec.layers[before], spec.layers[after]
        x = hidden[before] + reference.attend(layer, hidden[before])
        logits, chosen, _ = reference.route(spec.routed[after], reference.norm(following.ffn_norm, x), x)
        wanted.append(chosen)
        by_logits.append(np.argsort(-logits, axis=1)[:, : spec.top_k])
    assert wanted
    assert not np.array_equal(wanted, by_logits)
    tokens = batch(TOKENS)
    limits = Limits(
        batch_tokens=19,
        outputs=19,
        sequences=1,
        sequence_blocks=tokens.tables.shape[1],
        kv_blocks=1 + int(tokens.tables.max()),
        threads=2,
    )

    async def main() -> list[Done]:
        results: list[Done] = []
        async with open_worker(device, path, limits) as it:
            await it.run(tokens, attended=results)
        return results

    *predicting, last = trio.run(main)
    assert last.predicted_ids is None
    for done, want in zip(predicting, wanted, strict=True):
        assert done.predicted_ids is not None
        assert np.array_equal(done.predicted_ids, want)
