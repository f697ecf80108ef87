"""Models with other operators than their files say."""

from __future__ import annotations

from typing import Any

import attrs

from mer.model.operators import Experts, Layer
from mer.model.spec import ModelSpec


def with_attention(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """Return a model each of whose layers has an attention with these fields."""

    def changed(layer: Layer) -> Layer:
        return attrs.evolve(layer, mixer=attrs.evolve(layer.mixer, **changes))

    return attrs.evolve(spec, layers=tuple(map(changed, spec.layers)))


def with_rope(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """Return a model each of whose layers has a RoPE with these fields."""
    return with_attention(spec, rope=attrs.evolve(spec.layers[0].mixer.rope, **changes))


def with_router(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """Return a model each of whose layers has a router with these fields."""

    def changed(layer: Layer) -> Layer:
        assert isinstance(layer.ffn, Experts)
        return attrs.evolve(layer, ffn=attrs.evolve(layer.ffn, router=attrs.evolve(layer.ffn.router, **changes)))

    return attrs.evolve(spec, layers=tuple(map(changed, spec.layers)))
