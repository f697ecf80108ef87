"""The memory plan as a function of the budget and the settings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mer
from mer.compute.cpu.forward import kv_layout
from mer.compute.kernels.kv_layout import KV_TILE
from mer.io.extents import MATRIX_TYPES, ExpertMap
from mer.io.ggml import GGMLType
from mer.model.loading import Model, load_model
from mer.plan import memory as planner_module
from mer.plan import plan as plan_module
from mer.plan.memory import slot_order
from mer.plan.plan import MemoryPlan, load_and_plan, plan_memory
from mer.units import format_bytes
from tests._lib.specs import with_attention
from tests._lib.tiny_models import Type, tiny_model

MIB = 1 << 20
PRIVATE = 80 * MIB


@pytest.fixture(autouse=True, scope="module")
def a_process_of_one_size() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_module, "private_bytes", lambda: PRIVATE)
        yield


class Models(list[Model]):
    """Models, with a short text for reports."""

    def __repr__(self) -> str:
        return "models"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Three models of which nothing but the headers is left."""
    folder = tmp_path_factory.mktemp("models")
    paths = [
        tiny_model(folder / "f32.gguf", n_experts=16).path,
        tiny_model(folder / "mixed.gguf", weight_type=Type.Q4_0, down_type=Type.Q6_K, d_ff=256, n_layers=5).path,
    ]
    loaded = [load_model(mer.EngineConfig(path=path)) for path in (*paths, mer.embedded_model_path())]
    for path in paths:
        path.unlink()
    return Models(loaded)


def wide(model: Model, n_layers: int, context: int) -> Model:
    """Return a model with longer contexts and more layers in its KV cache than its file has."""
    spec = attrs.evolve(model.spec, context_length=context)
    spec = with_attention(spec, n_kv_heads=spec.attention.n_heads * n_layers)
    return attrs.evolve(model, spec=spec)


EXPERT_TYPES = [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16]
mixes = st.lists(st.lists(st.sampled_from(EXPERT_TYPES), min_size=1, max_size=3), max_size=7)


def mixed(model: Model, mix: list[list[GGMLType]], weights: int = 256 * 1024) -> Model:
    """Return a model whose experts' down matrices are larger and of several types.

    Args:
        model: the model.
        mix: types for each layer, taken in turn by its experts; layers take them in turn, too. Empty: as they are.
        weights: in a matrix.
    """
    if not mix:
        return model
    layers = []
    for layer, row in enumerate(model.experts.experts):
        kinds = mix[layer % len(mix)]
        experts = []
        for number, extents in enumerate(row):
            kind = kinds[number % len(kinds)]
            n_bytes = weights // kind.block_size * kind.block_bytes
            down = extents.parts[2]._replace(type=kind, rows=1024, cols=weights // 1024, n_bytes=n_bytes)
            experts.append(extents._replace(parts=(*extents.parts[:2], down)))
        layers.append(tuple(experts))
    return attrs.evolve(model, experts=ExpertMap(tuple(layers)))


configs = st.fixed_dictionaries(
    {
        "threads": st.integers(1, 64),
        "io_threads": st.integers(1, 16),
        "max_sequences": st.integers(1, 32),
    },
    optional={
        "context": st.integers(1, 256),
        "batch_tokens": st.integers(64, 700),
        "slots": st.integers(5, 100),
        "activations": st.sampled_from(["auto", "int8", "int15"]),
        "kv_type": st.sampled_from(["f32", "f16"]),
    },
)


def plan(model: Model, budget: int, **arguments: Any) -> MemoryPlan:
    return plan_memory(model, mer.EngineConfig(path="no file", memory=budget, **arguments))


def floor_of(model: Model, **arguments: Any) -> tuple[int, str]:
    with pytest.raises(mer.NotEnoughMemory) as caught:
        plan(model, 0, **arguments)
    return caught.value.needed_bytes, str(caught.value)


@settings(deadline=None)
@given(st.integers(0, 2), st.booleans(), mixes, configs, st.integers(0, 2**37) | st.integers(0, 2**26))
def test_from_the_floor_up_the_parts_fit_the_budget(
    models: Models, which: int, long: bool, mix: list[list[GGMLType]], config: dict[str, Any], more: int
) -> None:
    model = mixed(wide(models[which], 8, 32768) if long else models[which], mix)
    floor, _ = floor_of(model, **config)
    made = plan(model, floor + more, **config)
    assert made.floor_bytes == floor
    assert made.budget_bytes == floor + more
    assert made.used_bytes == sum(made.parts.values()) <= made.budget_bytes
    assert min(made.parts.values()) >= 0
    assert plan(model, floor + more, **config) == made, "the same question has the same answer"
    # what the parts are made of
    limits, spec = made.limits, model.spec
    classes = made.classes
    slot_bytes = [n * size for n, size in zip(made.slot_counts, classes.slot_bytes, strict=True)]
    assert made.parts["expert slots"] == sum(slot_bytes)
    assert made.parts["KV cache"] == limits.kv_blocks * kv_layout(spec, limits.kv_type).block_bytes
    assert classes == model.experts.slot_classes(4096)
    # every class has slots, none more than experts
    most = config.get("slots", made.total_experts)
    assert made.slots == sum(made.slot_counts)
    assert all(1 <= have <= experts for have, experts in zip(made.slot_counts, classes.n_experts, strict=True))
    # settings are kept to
    assert len(classes.slot_bytes) <= made.slots <= min(made.total_experts, most)
    assert limits.threads == config["threads"]
    assert limits.batch_tokens == config.get("batch_tokens", limits.batch_tokens)
    assert config.get("context", made.context) == made.context <= spec.context_length
    assert limits.sequences == limits.outputs == config["max_sequences"]
    # and the scheduler can live with them: decoding leaves room for a prompt, and the longest sequence has its blocks
    assert limits.sequences <= max(1, limits.batch_tokens // 2)
    assert limits.sequence_blocks * KV_TILE >= made.context
    assert limits.kv_blocks >= limits.sequence_blocks
    # slots get all but 5 / 24 of what is beyond the floor, page tables apart, and KV blocks what the last slot leaves
    if made.slots < min(made.total_experts, most):
        got = made.parts["expert slots"] + made.parts["load buffers"] + max(classes.slot_bytes)
        assert got >= sum(classes.slot_bytes) + more * 19 // 24 * 512 // 513 - 3
        block = kv_layout(spec, limits.kv_type).block_bytes
        full = limits.kv_blocks == limits.sequences * limits.sequence_blocks
        assert full or made.used_bytes + block + block // 512 + 2 > made.budget_bytes


@settings(deadline=None)
@given(st.integers(0, 2), st.booleans(), mixes, configs, st.integers(0, 2**30), st.integers(0, 2**26))
def test_more_memory_never_means_fewer_slots_nor_a_shorter_context(
    models: Models, which: int, long: bool, mix: list[list[GGMLType]], config: dict[str, Any], first: int, more: int
) -> None:
    model = mixed(wide(models[which], 8, 32768) if long else models[which], mix)
    floor, _ = floor_of(model, **config)
    small, large = (plan(model, floor + extra, **config) for extra in (first, first + more))
    assert small.context <= large.context
    assert all(a <= b for a, b in zip(small.slot_counts, large.slot_counts, strict=True))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2), configs, st.integers(1, 2**40))
def test_below_the_floor_the_arithmetic_is_told(models: Models, which: int, config: dict[str, Any], less: int) -> None:
    model = models[which]
    floor, _ = floor_of(model, **config)
    parts = plan(model, floor, **config | {"slots": 1}).parts
    budget = max(0, floor - less)
    with pytest.raises(mer.NotEnoughMemory) as caught:
        plan(model, budget, **config)
    error = caught.value
    assert (error.budget_bytes, error.needed_bytes) == (budget, floor)
    for name, size in parts.items():
        assert (name in str(error)) == (size > 0)
        assert size == 0 or f"{name}  {format_bytes(size)}" in str(error)
    advice = re.search(r"--memory (\S+)\)", str(error))
    assert advice is not None
    assert plan_memory(model, mer.EngineConfig(path="no file", memory=advice[1], **config)).slots >= 1


def test_the_floor_is_one_slot(models: Models) -> None:
    for model in models:
        floor, _ = floor_of(model, threads=2)
        assert plan(model, floor, threads=2).slots >= 1
        one = plan(model, 1 << 40, threads=2, slots=1)
        assert one.slots == 1
        everything = plan(model, 1 << 40, threads=2)
        assert everything.slots == everything.total_experts
        assert everything.resident_share == 1.0
        assert everything.expected_read_bytes_per_token == 0
        assert one.expected_read_bytes_per_token == round(one.expert_bytes_per_token * (1 - 1 / one.total_experts))
        assert plan(model, 1 << 40, threads=2, slots=10**6).slots == everything.total_experts


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 12), st.data())
def test_classes_get_slots_for_a_token_first_and_then_like_shares(
    experts: list[int], first: int, data: st.DataObject
) -> None:
    order = slot_order(experts, first)
    assert Counter(order) == Counter(dict(enumerate(experts))), "in the end, all experts have slots"
    slots = data.draw(st.integers(len(experts), len(order)))
    have = [order[:slots].count(kind) for kind in range(len(experts))]
    assert min(have) >= 1
    lacking = [n for n, want in zip(have, experts, strict=True) if n < min(first, want)]
    if lacking:
        assert max(have) - min(lacking) <= 1, "slots go round until each class has those for a token"
    for mine, my_experts in zip(have, experts, strict=True):
        for others, their_experts in zip(have, experts, strict=True):
            if mine > first and others < their_experts:  # no class is ahead of another by more than half a slot of each
                assert mine / my_experts - others / their_experts <= 0.5 / my_experts + 0.5 / their_experts + 1e-9


def three_sizes(model: Model) -> Model:
    """Return the model with experts of three sizes, per expert as well as per layer."""
    return mixed(model, [[GGMLType.Q4_0, GGMLType.Q8_0], [GGMLType.F16], [GGMLType.Q4_0]])


def test_the_floor_of_mixed_experts_is_a_slot_of_each_size(models: Models) -> None:
    model = three_sizes(models[1])
    floor, text = floor_of(model, threads=2)
    made = plan(model, floor, threads=2, slots=3)
    assert made.slot_counts == (1, 1, 1)
    assert made.parts["expert slots"] == sum(made.classes.slot_bytes)
    assert f"expert slots  {format_bytes(sum(made.classes.slot_bytes))}" in text
    everything = plan(model, 1 << 40, threads=2)
    assert everything.slot_counts == made.classes.n_experts
    assert everything.resident_share == 1.0
    assert max(made.slot_waste, everything.slot_waste) < 0.02, "no more than alignment makes them differ"


def test_fewer_slots_than_sizes_of_experts_are_refused_with_the_numbers(models: Models) -> None:
    model = three_sizes(models[1])
    sizes = ", ".join(format_bytes(size) for size in plan(model, 1 << 40).classes.slot_bytes)
    for slots in (1, 2):
        with pytest.raises(mer.ConfigError, match=rf"slots is {slots}; .* 3 sizes \({sizes}\).* at least 3"):
            plan(model, 1 << 40, slots=slots)
    assert plan(model, 1 << 40, slots=4).slots == 4


@settings(deadline=None)
@given(st.integers(0, 2), mixes.filter(bool), st.integers(0, 2**26))
def test_slots_of_mixed_experts_waste_at_most_a_20th(
    models: Models, which: int, mix: list[list[GGMLType]], more: int
) -> None:
    """The share that is told is that of the slots there are; with all of them it is bounded."""
    model = mixed(models[which], mix, weights=2**20)
    made = plan(model, floor_of(model)[0] + more)
    have = made.parts["expert slots"]
    sizes = [[e.layout(4096).n_bytes for e in row] for row in model.experts.experts]
    means = [0.0] * len(made.slot_counts)
    for layer, row in enumerate(sizes):
        for number, size in enumerate(row):
            kind = made.classes.kind_of(layer, number)
            means[kind] += size / made.classes.n_experts[kind]
    needed = sum(n * mean for n, mean in zip(made.slot_counts, means, strict=True))
    assert made.slot_waste == pytest.approx(1 - needed / have, abs=1e-9)
    if made.slots == made.total_experts:
        assert have <= 1.05 * needed


def test_the_process_as_it_is_counts(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = floor_of(models[0])
    monkeypatch.setattr(planner_module, "private_bytes", lambda: PRIVATE + 700 * MIB)
    large, text = floor_of(models[0])
    assert large - small >= 600 * MIB
    assert "interpreter and libraries" in text


def test_a_context_beyond_the_models_is_refused_with_both_numbers(models: Models) -> None:
    with pytest.raises(mer.ConfigError, match=r"context is 257; the model was trained for 256"):
        plan(models[0], 1 << 40, context=257)


def test_without_a_budget_the_default_is_taken_and_told(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "default_budget", lambda: (1 << 33, "somewhere"))
    made = plan_memory(models[0], mer.EngineConfig(path=Path("no file")))
    assert (made.budget_bytes, made.budget_source) == (1 << 33, "somewhere")
    assert plan(models[0], 1 << 33).budget_source == "given"
    monkeypatch.setattr(plan_module, "default_budget", lambda: (MIB, "somewhere"))
    with pytest.raises(mer.NotEnoughMemory, match=r"1\.00 MiB \(somewhere\)"):
        plan_memory(models[0], mer.EngineConfig(path=Path("no file")))


def test_bytes_a_token_touches(models: Models) -> None:
    for model in models:
        made, spec = plan(model, 1 << 40), model.spec
        every = [sum(p.n_bytes for p in e.parts) for row in model.experts.experts for e in row]
        assert made.expert_bytes_per_token == spec.n_routed * spec.top_k * (sum(every) // len(every))
        dense = {name: tensor.n_bytes for name, tensor in model.dense.items()}
        rows_of_embedding = spec.vocab_size if spec.tied_head else 1
        embedding = dense.pop("token_embd.weight") // spec.vocab_size * rows_of_embedding
        assert made.dense_bytes_per_token == sum(dense.values()) + embedding


def test_batches_too_small_for_their_sequences_are_refused(models: Models) -> None:
    with pytest.raises(mer.ConfigError, match=r"max_sequences is 9 and batch_tokens 17.* here 18"):
        plan(models[0], 1 << 30, max_sequences=9, batch_tokens=17)
    assert plan(models[0], 1 << 30, max_sequences=1, batch_tokens=1).limits.batch_tokens == 1
    assert plan(models[0], 1 << 30, max_sequences=300).limits.batch_tokens == 600


def test_memory_that_experts_leave_goes_to_kv(models: Models) -> None:
    model = wide(models[0], 8, 4096)
    made = plan(model, 8 << 30, max_sequences=6)
    assert made.slots == made.total_experts
    assert made.limits.kv_blocks == made.limits.sequences * made.limits.sequence_blocks
    tight = plan(model, made.used_bytes - (32 << 20), max_sequences=6)
    assert tight.slots == tight.total_experts
    assert tight.limits.kv_blocks < made.limits.kv_blocks
    assert tight.used_bytes + (1 << 20) + tight.parts["KV cache"] // tight.limits.kv_blocks > tight.budget_bytes


def test_page_tables_grow_with_the_rest(models: Models) -> None:
    made = plan(wide(models[0], 64, 4096), 1 << 40, max_sequences=32)
    rest = made.used_bytes - made.parts["page tables"]
    assert rest > 1 << 30
    assert made.parts["page tables"] >= rest // 4096 * 8  # an entry for each page


def test_a_dense_model_streams_where_it_does_not_fit(tmp_path: Path) -> None:
    """And only there; by hand, it streams or is refused whatever the budget."""
    path = tiny_model(tmp_path / "m.gguf", "qwen3", n_layers=8, d_ff=4096).path
    config = mer.EngineConfig(path=path, memory="8GiB")
    whole, plan = load_and_plan(config)
    assert (whole.spec.routed, plan.slots) == ({}, 0)
    with pytest.raises(mer.NotEnoughMemory) as caught:
        load_and_plan(attrs.evolve(config, memory="1MiB"))
    floor = caught.value.needed_bytes
    assert floor < plan.floor_bytes
    tight = attrs.evolve(config, memory=(floor + plan.floor_bytes) // 2)
    model, streamed = load_and_plan(tight)
    assert model.spec.streams_dense
    assert (model.spec.n_routed, model.spec.n_experts, model.spec.top_k) == (8, 1, 1)
    assert 0 < streamed.slots < 8
    assert streamed.floor_bytes == floor
    assert streamed.dense_bytes_per_token + streamed.expert_bytes_per_token == plan.dense_bytes_per_token
    assert load_and_plan(attrs.evolve(config, stream_dense="on"))[1].slots == 8
    with pytest.raises(mer.NotEnoughMemory):
        load_and_plan(attrs.evolve(tight, stream_dense="off"))


def test_experts_stream_anyway(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf").path
    with pytest.raises(mer.ConfigError, match="the model has experts"):
        load_and_plan(mer.EngineConfig(path=path, memory="8GiB", stream_dense="on"))


@pytest.mark.parametrize("kind", sorted(MATRIX_TYPES), ids=lambda kind: kind.name)
def test_every_weight_type_has_its_share_of_the_compilers_memory(kind: GGMLType) -> None:
    assert planner_module.compiler_bytes([kind]) > planner_module.compiler_bytes([])
