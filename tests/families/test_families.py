"""Every architecture that can be run, against transformers: see `tests/_lib/families/registry.py`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio

import mer
from mer.compute.messages import Batch
from mer.compute.reference.model import ReferenceModel
from mer.model.registry import ARCHITECTURES
from tests._lib.families.family import CONTEXT, VOCAB, Family, FamilyModel, Type, write
from tests._lib.families.registry import CASES, FAMILIES
from tests._lib.resident import batch
from tests._lib.workers import WORKERS, logits_of, run_on

MEMORY = "8GiB"
CASE_NAMES = [family.name if variant is None else f"{family.name}-{variant}" for family, variant in CASES]
Floats = npt.NDArray[np.floating]


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCAB, n)]


def relative_error(got: Floats, want: Floats) -> float:
    return float(errors(got, want).max())


def errors(got: Floats, want: Floats) -> Floats:
    """Return each position's largest error, relative to the largest logit."""
    return np.abs(got - want).max(-1) / np.abs(want).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[tuple[str, str | None, Type], FamilyModel]:
    return {}


@pytest.fixture
def case(
    request: pytest.FixtureRequest, folder: Path, made: dict[tuple[str, str | None, Type], FamilyModel]
) -> tuple[Family, FamilyModel]:
    """The family and its model in F32, made once."""
    family, variant = request.param
    key = family.name, variant, Type.F32
    if key not in made:
        made[key] = write(folder / f"{family.name}-{variant}.gguf", family, variant=variant)
    return family, made[key]


every_case = pytest.mark.parametrize("case", CASES, ids=CASE_NAMES, indirect=True)


def test_every_architecture_has_a_family() -> None:
    assert {family.arch for family in FAMILIES} == set(ARCHITECTURES)


@every_case
def test_the_reference_gives_the_logits_of_transformers(case: tuple[Family, FamilyModel]) -> None:
    family, model = case
    tokens = tokens_of(family.longer_than)
    assert relative_error(ReferenceModel(model.path).logits(tokens), model.logits(tokens)) < 3e-5


def in_chunks(tokens: list[int], sizes: list[int]) -> list[Batch]:
    starts = np.cumsum([0, *sizes])
    assert starts[-1] == len(tokens)
    return [batch(tokens[a:b], int(a)) for a, b in itertools.pairwise(starts)]


@every_case
@pytest.mark.parametrize("device", WORKERS)
def test_workers_give_the_logits_of_transformers_whatever_the_chunks(
    case: tuple[Family, FamilyModel], device: str
) -> None:
    family, model = case
    tokens = tokens_of(family.longer_than)
    want = model.logits(tokens)
    (whole,) = run_on(device, model.path, [batch(tokens)])
    assert relative_error(logits_of(whole), want) < 1e-4
    n = len(tokens)
    chunks = run_on(device, model.path, in_chunks(tokens, [7, 1, 1, n - 11, 2]))
    joined = np.concatenate([logits_of(done) for done in chunks])
    if device == "cpu":
        assert np.array_equal(joined, logits_of(whole))
    else:
        assert relative_error(joined, want) < 1e-4


@every_case
def test_engines_continue_as_transformers_does_whatever_is_in_memory(case: tuple[Family, FamilyModel]) -> None:
    """Greedy tokens are equal for 32 steps, with every expert resident and with the fewest slots that work."""
    family, model = case
    prompt = tokens_of(family.longer_than - 16, seed=1)
    want = model.greedy(prompt, 32)

    async def generate(slots: int | None) -> tuple[int, ...]:
        settings: dict[str, Any] = {"memory": MEMORY, "slots": slots, "batch_tokens": 24}
        if slots and not spec.routed:
            settings["stream_dense"] = "on"
        async with mer.open_engine(model.path, **settings) as engine:
            if slots:
                assert (engine.statistics().settings.stream_dense == "on") == (not spec.routed)
            done = await engine.generate(prompt, max_tokens=32, ignore_eos=True)
            return done.tokens

    spec = ReferenceModel(model.path).spec
    counts = [None, spec.top_k + 1, spec.n_experts + 2] if spec.routed else [None, 2, 3]

    async def main() -> None:
        for slots in counts:
            assert list(await generate(slots)) == want, slots

    trio.run(main)


@every_case
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0])
def test_quantized_weights_stay_near_the_reference(
    case: tuple[Family, FamilyModel], folder: Path, request: pytest.FixtureRequest, kind: Type
) -> None:
    family, _ = case
    variant = request.node.callspec.params["case"][1]
    model = write(folder / "quantized.gguf", family, variant=variant, weight_type=kind)
    tokens = tokens_of(family.longer_than, seed=2)
    plain, rounded = (ReferenceModel(model.path, int8_activations=it).logits(tokens) for it in (False, True))
    (done,) = run_on("cpu", model.path, [batch(tokens)])
    apart = np.median(errors(logits_of(done), rounded))  # where sums round otherwise, an int8 may be the next one
    assert apart < 2e-2
    assert apart < np.median(errors(logits_of(done), plain)) / 2
    (done,) = run_on("torch-cpu", model.path, [batch(tokens)])
    assert np.median(errors(logits_of(done), plain)) < 1e-4


def test_prompts_fit_the_context() -> None:
    assert all(family.longer_than + 16 <= CONTEXT for family in FAMILIES)
