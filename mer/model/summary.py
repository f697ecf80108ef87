"""A model's hyperparameters in one flat table, for people and for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import attrs

from mer.model.operators import GEGLU, SWIGLU, Attention, Experts, ExpertWeights, FeedForward, Router
from mer.model.spec import ModelSpec

T = TypeVar("T")


def summary(spec: ModelSpec) -> dict[str, Any]:
    """Return name and value of each hyperparameter: one value where all layers agree, else a list, layer by layer."""
    mixers = [layer.mixer for layer in spec.layers]
    experts = list(spec.routed.values())
    dense = [layer.ffn.gate.rows for layer in spec.layers if isinstance(layer.ffn, FeedForward)]
    networks = [it.ffn if isinstance(it.ffn, FeedForward) else it.ffn.weights for it in spec.layers]

    def mixer(read: Callable[[Attention], Any]) -> Any:
        return _agreed(map(read, mixers))

    def routed(read: Callable[[Experts], Any]) -> Any:
        return _agreed(map(read, experts))

    return {
        "n_layers": len(spec.layers),
        "n_routed_layers": spec.n_routed,
        "n_skipped_layers": spec.n_skipped,
        "d_model": spec.d_model,
        "d_ff": routed(lambda it: it.d_ff),
        "dense_d_ff": _agreed(dense),
        "shared_d_ff": routed(lambda it: None if it.shared is None else it.shared.gate.rows),
        "n_experts": spec.n_experts,
        "top_k": spec.top_k,
        "activation": _agreed(map(_activation, networks)),
        "expert_bias": routed(lambda it: bool(it.weights.biases)),
        "routing": routed(lambda it: _routing(it.router)),
        "n_heads": mixer(lambda it: it.n_heads),
        "n_kv_heads": mixer(lambda it: it.n_kv_heads),
        "head_dim": mixer(lambda it: it.head_dim),
        "vocab_size": spec.vocab_size,
        "context_length": spec.context_length,
        "rms_eps": spec.norm.eps,
        "rope_base": mixer(lambda it: it.rope.base),
        "rope_dim": mixer(lambda it: it.rope.dim),
        "rope_scale": mixer(lambda it: it.rope.scale),
        "rope_style": mixer(lambda it: it.rope.style.value),
        "qk_norm": mixer(lambda it: it.q_norm is not None),
        "qkv_bias": mixer(lambda it: it.q.bias is not None),
        "rope_yarn": mixer(lambda it: None if it.rope.yarn is None else it.rope.yarn.factor),
        "sinks": mixer(lambda it: it.sinks is not None),
        "sliding_window": mixer(lambda it: it.window),
        "tied_head": spec.tied_head,
    }


def _activation(network: FeedForward | ExpertWeights) -> str:
    """Return an activation's name, or its numbers where it has none."""
    record = network.activation
    names = {SWIGLU: "swiglu", GEGLU: "geglu"}
    return names.get(record) or ", ".join(f"{name} {number:g}" for name, number in attrs.asdict(record).items())


def _routing(router: Router) -> str:
    """Return in words how experts are chosen and weighed."""
    routing = router.routing
    parts = [routing.scoring.value]
    if router.selection_bias is not None:
        parts.append("chosen with a bias")
    if routing.groups is not None:
        parts.append(f"within {routing.groups.used} of {routing.groups.count} groups")
    if routing.normalize:
        parts.append("normalized")
    if routing.scale != 1:
        parts.append(f"times {routing.scale:g}")
    return ", ".join(parts)


def _agreed(values: Iterable[T]) -> T | list[T] | None:
    """Return the value if there is one, None if there is none, or all of them if they differ."""
    every = list(values)
    if not every:
        return None
    return every[0] if all(value == every[0] for value in every) else every
