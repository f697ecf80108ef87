"""Dense models whose feed-forward networks stream from the disk, as experts do."""

from __future__ import annotations

import attrs

from mer.model.operators import (
    VECTOR_TYPES,
    ExpertMatrix,
    Experts,
    ExpertWeights,
    FeedForward,
    Layer,
    Router,
    Routing,
    Rows,
    Scoring,
    Tensor,
)
from mer.model.spec import ModelSpec

ALWAYS = Router(None, 1, Routing(scoring=Scoring.CHOSEN))
"""The router of a layer with one expert, which every token uses, with a weight of one."""


def streamed(spec: ModelSpec) -> ModelSpec:
    """Return a model that computes the same, each of whose feed-forward networks is the one expert of a routed layer.

    So slots, cache, reads and read-ahead, which is certain here, serve dense models too. Attention stays in memory: it
    is a fifth of such a model's weights, and what a layer does while its network is read.
    """
    return attrs.evolve(spec, layers=tuple(map(_streamed, spec.layers)))


def _streamed(layer: Layer) -> Layer:
    if isinstance(layer.ffn, Experts):
        return layer
    return attrs.evolve(layer, ffn=Experts(ALWAYS, _weights(layer.ffn)))


def _weights(network: FeedForward) -> ExpertWeights:
    linears = network.gate, network.up, network.down
    matrices = []
    for linear in linears:
        rows, tensor = linear.rows, linear.weight
        within = tensor.within or Rows(tensor.name, 0, rows)
        matrices.append(ExpertMatrix(tensor.name.removesuffix(".weight"), rows, linear.cols, within))
    biases = tuple(
        Tensor(linear.bias.name, (1, linear.rows), VECTOR_TYPES, linear.bias.within)
        for linear in linears
        if linear.bias is not None
    )
    return ExpertWeights(1, tuple(matrices), network.activation, biases)
