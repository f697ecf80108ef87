"""A model as data: its layers, and what stands before and after them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import attrs

from mer.model.operators import Attention, Experts, ExpertWeights, Layer, Linear, Norm, Rope, Tensor

_NUMBER = re.compile(r"blk\.(\d+)\.", re.ASCII)


@attrs.frozen(kw_only=True, slots=False)
class ModelSpec:
    """One model: logits = head(norm(layers(embedding_scale * embedding[token]))).

    Routed layers, those with experts, are also numbered by themselves, from 0: cache, predictors, traces and scheduler
    know no other layers. All of them have as many experts, and as many that a token uses.
    """

    architecture: str
    name: str  # general.name, or the file's name without its suffix
    context_length: int  # positions the model was trained for
    embedding: Tensor  # [V, D]
    embedding_scale: float = 1.0  # what its rows are multiplied by
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear  # [V, D]; the embedding again where the file has no output head
    n_skipped: int = 0  # blocks of the file after these layers, which predict further tokens and are not run
    softcap: float | None = None  # c: logits are c * tanh(logits / c)

    @property
    def vocab_size(self) -> int:
        """Tokens, V."""
        return self.embedding.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream, D."""
        return self.embedding.shape[1]

    @property
    def tied_head(self) -> bool:
        """Whether the output head is the token embedding."""
        return self.head.weight.name == self.embedding.name

    @cached_property
    def routed(self) -> Mapping[int, Experts]:
        """The experts of each layer that has routed ones, by the layer's number in the file, in order."""
        return {number: layer.ffn for number, layer in enumerate(self.layers) if isinstance(layer.ffn, Experts)}

    @cached_property
    def expert_weights(self) -> tuple[ExpertWeights, ...]:
        """The routed experts' weights of each routed layer."""
        return tuple(experts.weights for experts in self.routed.values())

    @property
    def n_routed(self) -> int:
        """Routed layers."""
        return len(self.routed)

    @property
    def streams_dense(self) -> bool:
        """Whether its routed layers are the networks of a dense model; see `mer.model.streamed`."""
        return any(experts.router.linear is None for experts in self.routed.values())

    @property
    def shared_layers(self) -> frozenset[int]:
        """Routed layers whose experts share a network."""
        return frozenset(number for number, it in enumerate(self.routed.values()) if it.shared is not None)

    @property
    def n_experts(self) -> int:
        """Experts of a routed layer, E; 0 if there is none."""
        return next((experts.n for experts in self.routed.values()), 0)

    @property
    def top_k(self) -> int:
        """Experts that a token uses in a routed layer, K; 0 if there is none."""
        return next((experts.top_k for experts in self.routed.values()), 0)

    @property
    def attention(self) -> Attention:
        """The attention of every layer."""
        return self.layers[0].mixer

    @property
    def d_ff(self) -> int:
        """Hidden size of every expert, F; 0 if there is none."""
        return next((experts.d_ff for experts in self.routed.values()), 0)

    @cached_property
    def distinct_layers(self) -> tuple[Layer, ...]:
        """One layer of each kind: others differ from it in nothing but their tensors' names."""
        kinds: dict[str, Layer] = {}
        for layer in self.layers:
            kinds.setdefault(_NUMBER.sub("", repr(layer)), layer)
        return tuple(kinds.values())

    @cached_property
    def ropes(self) -> tuple[Rope, ...]:
        """The ways in which layers rotate their heads, each once."""
        return tuple(dict.fromkeys(layer.mixer.rope for layer in self.layers))

    def norm_factors(self) -> Mapping[str, float]:
        """Return what the weights of norms are multiplied by when they are loaded, where it is not 1, by tensor."""
        norms = [self.norm, *(norm for layer in self.layers for norm in layer.norms())]
        return {norm.weight.name: norm.factor for norm in norms if norm.factor != 1}

    def skips(self, name: str) -> bool:
        """Return whether a tensor belongs to a block that is not run."""
        match = _NUMBER.match(name)
        number = -1 if match is None else int(match[1][:9])
        return len(self.layers) <= number < len(self.layers) + self.n_skipped

    def tensors(self) -> Mapping[str, Tensor]:
        """Return every dense tensor by name, in the order in which a token meets them."""
        every = [self.embedding, *(tensor for layer in self.layers for tensor in layer.tensors())]
        every += [self.norm.weight, *self.head.tensors()]
        return {tensor.name: tensor for tensor in every}
