"""The slow NumPy twin of the whole model: the oracle that tests compare everything else with.

Weights are dequantized as GGML does, in float32; all other arithmetic is float64. Activations can be rounded to int8
blocks as the integer kernels do it, so that what remains of the difference is only the kernels' float32 summation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt

from mer.compute.reference.blocks.attention import attend
from mer.compute.reference.blocks.feed_forward import activated, feed_forward
from mer.compute.reference.blocks.norm import rms_norm
from mer.compute.reference.blocks.router import route
from mer.compute.reference.products import F64, Matrix
from mer.compute.reference.types import F32
from mer.compute.reference.weights import Weights
from mer.config import KVType
from mer.io.gguf import read_gguf
from mer.model.loading import check_model
from mer.model.operators import Addition, Experts, Layer, Norm


@attrs.frozen
class Trace:
    """What a forward pass computed for T tokens."""

    logits: F64  # [T, V]
    hidden: F64  # [layers + 1, T, D]: the residual stream before each layer and after the last
    router_logits: F64  # [L, T, E] of the routed layers
    expert_ids: npt.NDArray[np.int64]  # [L, T, K], in router order
    expert_weights: F64  # [L, T, K]


class ReferenceModel:
    """A model computed slowly and plainly from its GGUF file.

    Args:
        path: the file.
        int8_activations: round what meets quantized matrices to int8, as the integer kernels do; the router
            and norms never are.
        kv_type: how keys and values are kept.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, int8_activations: bool = False, kv_type: KVType = "f32"
    ) -> None:
        model = check_model(read_gguf(path))
        self.gguf, self.spec, self.experts = model.gguf, model.spec, model.experts
        self.int8_activations = int8_activations
        self.kv_type: KVType = kv_type
        self._weights = Weights(model, int8_activations=int8_activations)

    def logits(self, tokens: Sequence[int]) -> F64:
        """Return the logits [T, V] after each of the tokens of one sequence."""
        return self.trace(tokens).logits

    def trace(self, tokens: Sequence[int]) -> Trace:
        """Return logits, residual stream and routing of one sequence."""
        x = self.spec.embedding_scale * self.matrix(self.spec.embedding.name).weights[np.asarray(tokens, np.int64)]
        hidden, routers, weights = [x], list[F64](), list[F64]()
        experts: list[npt.NDArray[np.int64]] = []
        for layer in self.spec.layers:
            x = self.add(layer.mixer_add, x, self.attend(layer, x))
            h = self.norm(layer.ffn_norm, x)
            if isinstance(layer.ffn, Experts):
                record = layer.ffn
                logits, chosen, shares = self.route(record, h, x)
                y = self.optional(record.routed_post, self.mixture(len(routers), h, chosen, shares))
                if record.shared is not None:
                    own = h if record.shared_norm is None else self.norm(record.shared_norm, x)
                    y = self.optional(record.shared_post, feed_forward(record.shared, self._weights, own)) + y
                routers.append(logits)
                experts.append(chosen)
                weights.append(shares)
            else:
                y = feed_forward(layer.ffn, self._weights, h)
            x = self.add(layer.ffn_add, x, y)
            hidden.append(x)
        n_layers, n, top_k = len(routers), len(x), self.spec.top_k
        return Trace(
            self.head(x),
            np.stack(hidden),
            np.array(routers).reshape(n_layers, n, self.spec.n_experts),
            np.array(experts, np.int64).reshape(n_layers, n, top_k),
            np.array(weights).reshape(n_layers, n, top_k),
        )

    def attend(self, layer: Layer, x: F64) -> F64:
        """Return what a layer's mixer adds to the residual stream x [T, D] of a whole sequence."""
        return attend(layer.mixer, self._weights, self.norm(layer.mixer_norm, x), self.kv_type)

    def add(self, record: Addition, x: F64, y: F64) -> F64:
        """Return the residual stream after half a layer that gives y."""
        total = x + self.optional(record.norm, y)
        return total if record.scale is None else total * self.vector(record.scale.name)[0]

    def optional(self, record: Norm | None, x: F64) -> F64:
        """Return x normalized if there is a norm."""
        return x if record is None else self.norm(record, x)

    def route(self, record: Experts, h: F64, x: F64) -> tuple[F64, npt.NDArray[np.int64], F64]:
        """Return the router's logits [T, E], its choice and weights [T, K], for the stream x with h = ffn_norm(x)."""
        router = record.router
        h = h if record.router_norm is None else self.norm(record.router_norm, x)
        assert router.linear is not None, "a model that streams its dense networks: compute it as it is in the file"
        logits = h @ self.matrix(router.linear.weight.name).weights.T
        if router.linear.bias is not None:
            logits = logits + self.vector(router.linear.bias.name)
        bias = None if router.selection_bias is None else self.vector(router.selection_bias.name)
        chosen, weights = route(logits, record.top_k, router.routing, bias)
        if router.expert_scale is not None:
            weights = weights * self.vector(router.expert_scale.name)[chosen]
        return logits, chosen, weights

    def mixture(self, layer: int, h: F64, expert_ids: npt.NDArray[np.int64], expert_weights: F64) -> F64:
        """Return the weighted sum, in router order, of the experts' outputs for normalized h [T, D]."""
        outputs = np.zeros((*expert_ids.shape, h.shape[1]))  # [T, K, D]
        for expert in np.unique(expert_ids):
            t, k = np.nonzero(expert_ids == expert)
            outputs[t, k] = self.expert(layer, int(expert), h[t])
        out = np.zeros_like(h)
        for rank in range(expert_ids.shape[1]):
            out += expert_weights[:, rank, None] * outputs[:, rank]
        return out

    def expert(self, layer: int, expert: int, h: F64) -> F64:
        """Return what an expert of a routed layer gives for normalized h [T, D]."""
        gate, up, down = map(self._weights.part, self.experts.experts[layer][expert].parts)
        int8 = self.int8_activations
        record = self.spec.expert_weights[layer]
        biases = [self.matrix(tensor.name).weights[expert] for tensor in record.biases] or [np.zeros(1)] * 3
        g, u = (m.matmul(h, int8_activations=int8) + b for m, b in zip((gate, up), biases, strict=False))
        out: F64 = down.matmul(activated(record.activation, g, u), int8_activations=int8) + biases[-1]
        return out

    def norm(self, record: Norm, x: F64) -> F64:
        """Return x [T, D] normalized."""
        return record.factor * rms_norm(x, self.vector(record.weight.name), record.eps)

    def head(self, x: F64) -> F64:
        """Return the logits [T, V] of the last layer's residual stream x [T, D]."""
        logits, cap = self._weights.linear(self.spec.head, self.norm(self.spec.norm, x)), self.spec.softcap
        return logits if cap is None else cap * np.tanh(logits / cap)

    def matrix(self, name: str) -> Matrix:
        """Return a dense matrix by its tensor's name."""
        return self._weights.matrix(name)

    def vector(self, name: str) -> F32:
        """Return a dense vector by its tensor's name."""
        return self._weights.vector(name)
