"""Adding an architecture: a function that makes records of metadata, and a line in the registry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mer.compute.reference.model import ReferenceModel
from mer.errors import UnsupportedModel
from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import GEGLU, RopeStyle, Routing, Scoring
from mer.model.registry import ARCHITECTURES
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_routing
from tests._lib.resident import batch
from tests._lib.tiny_models import hyperparameters, tiny_model
from tests._lib.workers import WORKERS, logits_of, run_on

TOKENS = [7, 250, 3, 99, 12, 12, 180, 41, 5]


def toy(keys: Keys) -> ModelSpec:
    """Return a model of routed networks with GELU, whose routers score by sigmoid; the first layer is dense."""
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    d_ff = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
    scale = keys.real("expert_weights_scale", default=1.0, maximum=100.0)
    rope = trunk.rope(RopeStyle.INTERLEAVED)
    routing = Routing(scoring=Scoring.SIGMOID, normalize=True, scale=scale)
    layers = []
    for i in range(trunk.n_layers):
        experts = trunk.experts(i, n, top_k, d_ff, routing=routing, activation=GEGLU)
        layers.append(trunk.layer(i, trunk.attention(i, rope), experts))
    return trunk.model(layers)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ARCHITECTURES, "toy", toy)
    model = tiny_model(tmp_path / "as-llama.gguf")
    keys = {f"toy{key.removeprefix('llama')}": value for key, value in hyperparameters(model.shape).items()}
    keys |= {"general.architecture": "toy", "toy.expert_weights_scale": 2.5}
    return tiny_model(tmp_path / "m.gguf", metadata=keys, drop=list(hyperparameters(model.shape))).path


@pytest.mark.parametrize("device", WORKERS)
def test_a_toy_runs_on_every_worker_as_the_reference_does(path: Path, device: str) -> None:
    want = ReferenceModel(path).logits(TOKENS)
    (done,) = run_on(device, path, [batch(TOKENS)])
    assert np.abs(logits_of(done) - want).max() < 1e-4 * np.abs(want).max()


def test_its_options_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as a llama give other logits."""
    got = ReferenceModel(path).logits(TOKENS)
    other = ReferenceModel(path.parent / "as-llama.gguf").logits(TOKENS)
    assert np.abs(got - other).max() > 0.01 * np.abs(other).max()


def test_a_key_that_it_does_not_ask_for_is_refused(path: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "other.gguf")
    keys = {f"toy{key.removeprefix('llama')}": value for key, value in hyperparameters(model.shape).items()}
    keys |= {"general.architecture": "toy", "toy.logit_scale": 2.0}
    other = tiny_model(tmp_path / "m2.gguf", metadata=keys, drop=list(hyperparameters(model.shape))).path
    with pytest.raises(UnsupportedModel, match=r"toy\.logit_scale"):
        ReferenceModel(other)
