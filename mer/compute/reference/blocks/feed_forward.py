"""Gated feed-forward networks."""

from __future__ import annotations

import numpy as np

from mer.compute.reference.products import F64
from mer.compute.reference.weights import Weights
from mer.model.operators import Activation, FeedForward


def feed_forward(record: FeedForward, weights: Weights, x: F64) -> F64:
    """Return what a network of dense weights gives for x [T, D]."""
    inner = activated(record.activation, weights.linear(record.gate, x), weights.linear(record.up, x))
    out = weights.linear(record.down, inner)
    if record.gate_by is None:
        return out
    logit = x @ weights.matrix(record.gate_by.weight.name).weights.T
    return out * sigmoid(logit)


def activated(record: Activation, gate: F64, up: F64) -> F64:
    """Return what `down` reads, of what gate and up give [T, F]."""
    gate, up = np.minimum(gate, record.limit), np.clip(up, -record.limit, record.limit)
    return gate * sigmoid(record.alpha * (gate + record.beta * gate**3)) * (up + record.shift)


def sigmoid(x: F64) -> F64:
    """Return the logistic sigmoid of x."""
    power = np.exp(-np.abs(x))
    out: F64 = np.where(x < 0, power, 1) / (1 + power)
    return out


def silu(x: F64) -> F64:
    """Return x times its logistic sigmoid."""
    return x * sigmoid(x)
