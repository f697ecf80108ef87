"""Operators of a layer as data: which tensors each reads, and how it computes. No arithmetic.

Shape letters: D d_model, F hidden size of a feed-forward network, E experts, K experts used, H heads, G kv heads, C
head dim, V vocab. Shapes are [rows, columns]; a matrix maps columns to rows.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from math import inf, pi, sqrt
from typing import Final

import attrs

from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType

VECTOR_TYPES: Final = frozenset({GGMLType.F32})
ROUTER_TYPES: Final = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})


@attrs.frozen
class Rows:
    """Neighbouring rows of a tensor, or elements of a vector, which a file stores as one for several uses."""

    name: str  # of that tensor
    first: int
    of: int  # that it has in all


@attrs.frozen
class Tensor:
    """A dense tensor that a model reads: its name in the file, its shape, and the types that it may have.

    With `within` the file has no tensor of that name: its rows are some of another one's.
    """

    name: str
    shape: tuple[int, ...]  # slowest axis first
    types: frozenset[GGMLType] = MATRIX_TYPES
    within: Rows | None = None

    @property
    def stored(self) -> str:
        """The name of the tensor that the file has."""
        return self.name if self.within is None else self.within.name


def vector(name: str, n: int, within: Rows | None = None) -> Tensor:
    """Return a float32 vector of n elements."""
    return Tensor(name, (n,), VECTOR_TYPES, within)


@attrs.frozen
class Linear:
    """x @ weight.T + bias; without a bias, the product alone."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """Elements of a result."""
        return self.weight.shape[0]

    @property
    def cols(self) -> int:
        """Elements of an input."""
        return self.weight.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that it reads."""
        yield self.weight
        if self.bias is not None:
            yield self.bias


@attrs.frozen
class Norm:
    """RMSNorm (Zhang & Sennrich 2019): factor * weight * x / sqrt(mean(x**2) + eps).

    A factor is multiplied into the weight when it is loaded, so that no step is spent on it.
    """

    weight: Tensor
    eps: float
    factor: float = 1.0


class RopeStyle(enum.Enum):
    """Which pairs of a head's elements RoPE rotates together."""

    INTERLEAVED = "interleaved"  # (2i, 2i + 1): llama-arch files, whose Q and K rows are stored permuted for it
    NEOX = "neox"  # (i, i + dim / 2)


@attrs.frozen(kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023): frequencies for a context longer than the original one; see `mer.model.rope`."""

    factor: float  # by which slow pairs are slowed down
    original: int  # positions of the original context
    magnitude: float  # cosines and sines are multiplied by it
    beta_fast: float = 32.0  # rotations within the original context from which on a pair stays as it is
    beta_slow: float = 1.0  # rotations up to which a pair is slowed down by the whole factor
    whole_pairs: bool = True  # whether the limits between these are rounded outwards to whole pairs


@attrs.frozen
class Rope:
    """Rotary position embedding (Su et al. 2021): pair i turns by position * scale * base ** (-2 i / dim).

    With `factors`, pair i turns by that divided by its factor; with `yarn`, as that has it.
    """

    dim: int  # leading elements of each head that are rotated, even, <= C
    base: float
    scale: float  # positions are multiplied by it (1 / linear scaling factor)
    style: RopeStyle
    factors: Tensor | None = None  # [dim / 2]
    yarn: Yarn | None = None


class HeadNorms(enum.Enum):
    """Where Q and K are normalized."""

    BEFORE = "each head before RoPE"
    AFTER = "each head after RoPE"
    WHOLE = "all heads at once before RoPE"


@attrs.frozen(kw_only=True)
class Attention:
    """Causal grouped-query attention; query head h attends with kv head h // (H / G).

    With `q_norm` and `k_norm` Q and K are normalized where `norms` says. With `sinks` a head's softmax has one more
    logit, which takes its share and has no value (OpenAI 2025, "gpt-oss").
    """

    q: Linear  # [H * C, D]
    k: Linear  # [G * C, D]
    v: Linear  # [G * C, D]
    out: Linear  # [D, H * C]
    n_heads: int  # H
    n_kv_heads: int  # G
    head_dim: int  # C
    rope: Rope
    q_norm: Norm | None  # [C], or [H * C] for all heads at once
    k_norm: Norm | None  # [C], or [G * C]
    norms: HeadNorms = HeadNorms.BEFORE
    window: int | None  # positions that a token attends to, its own included; None: all before it
    scale: float  # what the products of queries and keys are multiplied by, 1 / sqrt(C) as a rule
    v_eps: float | None = None  # each head of V is normalized without a weight, with this eps
    sinks: Tensor | None = None  # [H]
    # [H, D] or [H * C, D]: of what is attended, each head or each element is multiplied by the softplus of its row
    gate: Linear | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that it reads, in the order in which a token meets them."""
        for linear in (self.q, self.k, self.v):
            yield from linear.tensors()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield norm.weight
        if self.rope.factors is not None:
            yield self.rope.factors
        if self.sinks is not None:
            yield self.sinks
        if self.gate is not None:
            yield from self.gate.tensors()
        yield from self.out.tensors()


@attrs.frozen(kw_only=True)
class Activation:
    """How a gated network joins its halves (Shazeer 2020), g = gate(x) and u = up(x), into what `down` reads.

    First g = min(g, limit) and u = clamp(u, -limit, limit); then

        g * sigmoid(alpha * (g + beta * g**3)) * (u + shift)
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = inf
    shift: float = 0.0


SWIGLU: Final = Activation()
"""silu(g) * u."""

GEGLU: Final = Activation(alpha=2 * sqrt(2 / pi), beta=0.044715)
"""gelu(g) * u in the tanh form of Hendrycks and Gimpel (2016), as (1 + tanh(z)) / 2 is sigmoid(2 z)."""


@attrs.frozen
class FeedForward:
    """A gated network whose weights are always in memory: down of gate and up, joined by the activation.

    With `gate_by`, the result is multiplied by the logistic sigmoid of that row's product with x.
    """

    gate: Linear  # [F, D]
    up: Linear  # [F, D]
    down: Linear  # [D, F]
    gate_by: Linear | None = None  # [1, D]
    activation: Activation = SWIGLU

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that it reads, in the order in which a token meets them."""
        for linear in (self.gate, self.up, self.down):
            yield from linear.tensors()
        if self.gate_by is not None:
            yield from self.gate_by.tensors()


class Scoring(enum.Enum):
    """What an expert's logit says of it."""

    SOFTMAX = "softmax over all"  # its share of the softmax over all E logits
    CHOSEN = "softmax over the chosen"  # its share of the softmax over the K chosen ones
    SIGMOID = "sigmoid"  # the logistic sigmoid of its own logit


LEAST_SUM: Final = 2.0**-14
"""By which weights are divided where their sum is less: llama.cpp's number, so that a GGUF gives what it gives there.

transformers adds 1e-20 to the sum instead; the two differ by more than rounding only where the sum is below this one,
for which all K sigmoids have to be.
"""


@attrs.frozen(kw_only=True)
class Groups:
    """Experts in groups of neighbours, of which only the best are chosen from (DeepSeek-AI 2024, "DeepSeek-V3").

    A group's score is the sum of the two largest in it; of equal groups the first one is better.
    """

    count: int  # divides E into groups of two or more
    used: int  # groups that are chosen from; they have K experts or more


@attrs.frozen(kw_only=True)
class Routing:
    """How router logits become weights, and what is done to these."""

    scoring: Scoring
    groups: Groups | None = None
    normalize: bool = False  # the K weights are divided by their sum, or by `LEAST_SUM` if that is more
    scale: float = 1.0  # by which they are then multiplied

    def __attrs_post_init__(self) -> None:
        if self.scoring is Scoring.CHOSEN and (self.groups or self.normalize):
            raise ValueError("a softmax over the chosen sums to one already, and says nothing of groups")


@attrs.frozen
class Router:
    """The choice of a token's experts: the K best scores, of equal ones the lower number first.

    Scores are the logits; with a selection bias or groups they are what `Routing.scoring` makes of these plus the bias,
    in float32. The bias has no part in the weights.
    """

    linear: Linear | None  # [E, D]; None: there is one expert, and every token uses it
    top_k: int  # K
    routing: Routing
    selection_bias: Tensor | None = None  # [E]
    expert_scale: Tensor | None = None  # [E]: an expert's weight is multiplied by its own in the end

    def __attrs_post_init__(self) -> None:
        if self.routing.scoring is Scoring.CHOSEN and self.selection_bias is not None:
            raise ValueError("a softmax over the chosen makes no scores that a bias could be added to")
        if self.routing.scoring is Scoring.CHOSEN and self.expert_scale is not None:
            raise ValueError("scales of experts go with a softmax over all, normalized: it gives the same weights")

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that it reads."""
        if self.linear is not None:
            yield from self.linear.tensors()
        if self.selection_bias is not None:
            yield self.selection_bias
        if self.expert_scale is not None:
            yield self.expert_scale


@attrs.frozen
class ExpertMatrix:
    """One matrix of every expert of a layer: E slices of one tensor `STEM_exps`, or E tensors `STEM.0` and so on.

    With `within`, of each of the E slices of that tensor it is some rows.
    """

    stem: str  # blk.3.ffn_gate
    rows: int
    cols: int
    within: Rows | None = None

    @property
    def merged(self) -> str:
        """The name of the tensor that holds it for all experts."""
        return f"{self.stem}_exps.weight" if self.within is None else self.within.name

    def single(self, expert: int) -> str:
        """Return the name of the tensor that holds it for one expert."""
        return f"{self.stem}.{expert}.weight"


@attrs.frozen
class ExpertWeights:
    """The matrices of a layer's routed experts, in the order in which they are computed.

    They are not dense: they are streamed. The last one reads what the others give.
    """

    n: int  # E
    matrices: tuple[ExpertMatrix, ...]  # gate [F, D], up [F, D], down [D, F]
    activation: Activation = SWIGLU  # of gate and up
    biases: tuple[Tensor, ...] = ()  # of each matrix [E, rows], added to its product; none without; these are dense

    @property
    def named(self) -> bool:
        """Whether each matrix says itself where it is: the file has no tensors of experts."""
        return all(matrix.within is not None for matrix in self.matrices)


def gated_experts(
    layer: int,
    n: int,
    d_model: int,
    d_ff: int,
    *,
    activation: Activation = SWIGLU,
    fused: bool = False,
    bias: bool = False,
) -> ExpertWeights:
    """Return the matrices of n gated networks, and their biases, with the names that llama.cpp gives them.

    With `fused`, each expert's rows of up follow those of gate in one tensor.
    """
    block = f"blk.{layer}.ffn_"
    gate, up = (Rows(f"{block}gate_up_exps.weight", i * d_ff, 2 * d_ff) if fused else None for i in (0, 1))
    matrices = (
        ExpertMatrix(block + "gate", d_ff, d_model, gate),
        ExpertMatrix(block + "up", d_ff, d_model, up),
        ExpertMatrix(block + "down", d_model, d_ff),
    )
    biases = (Tensor(f"{it.stem}_exps.bias", (n, it.rows), VECTOR_TYPES) for it in matrices if bias)
    return ExpertWeights(n, matrices, activation, tuple(biases))


@attrs.frozen
class Experts:
    """Routed experts, each a gated network as `FeedForward`; the router's weights scale what they give.

    A `shared` network adds its result for every token, before theirs. Experts, shared network and router read the
    layer's `ffn_norm`, unless one of the latter two has a norm of its own. What experts give together, and what the
    shared network gives, may each be normalized before the two are added.
    """

    router: Router
    weights: ExpertWeights
    shared: FeedForward | None = None
    router_norm: Norm | None = None
    shared_norm: Norm | None = None
    routed_post: Norm | None = None
    shared_post: Norm | None = None

    @property
    def n(self) -> int:
        """Experts, E."""
        return self.weights.n

    @property
    def top_k(self) -> int:
        """Experts that a token uses, K."""
        return self.router.top_k

    @property
    def d_ff(self) -> int:
        """Hidden size of an expert, F."""
        return self.weights.matrices[-1].cols

    def tensors(self) -> Iterator[Tensor]:
        """Yield the dense tensors that it reads, in the order in which a token meets them."""
        yield from self.router.tensors()
        yield from self.weights.biases
        if self.shared is not None:
            yield from self.shared.tensors()
        yield from (norm.weight for norm in self.norms())

    def norms(self) -> Iterator[Norm]:
        """Yield its norms."""
        for norm in (self.router_norm, self.shared_norm, self.routed_post, self.shared_post):
            if norm is not None:
                yield norm

    def adds_to_x(self, addition: Addition) -> bool:
        """Whether outputs can be added to the residual stream one by one: nothing is done to their sum before.

        A shared network with a norm of its own reads the stream, so that the stream has to stay until it has run.
        """
        return addition.plain and not any((self.routed_post, self.shared_post, self.shared_norm))


@attrs.frozen
class Addition:
    """How y, what half a layer gives, gets into the residual stream: x = (x + norm(y)) * scale."""

    norm: Norm | None = None
    scale: Tensor | None = None  # [1]

    @property
    def plain(self) -> bool:
        """Whether y is added as it is, so that products can add to x themselves."""
        return self.norm is None and self.scale is None

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that it reads."""
        if self.norm is not None:
            yield self.norm.weight
        if self.scale is not None:
            yield self.scale


PLAIN: Final = Addition()


@attrs.frozen
class Layer:
    """x plus mixer(mixer_norm(x)), then plus ffn(ffn_norm(x)); how they are added, `Addition` says."""

    mixer_norm: Norm
    mixer: Attention
    ffn_norm: Norm
    ffn: FeedForward | Experts
    mixer_add: Addition = PLAIN
    ffn_add: Addition = PLAIN

    def tensors(self) -> Iterator[Tensor]:
        """Yield the dense tensors that it reads, in the order in which a token meets them."""
        for norm, half, addition in (
            (self.mixer_norm, self.mixer, self.mixer_add),
            (self.ffn_norm, self.ffn, self.ffn_add),
        ):
            yield norm.weight
            yield from half.tensors()
            yield from addition.tensors()

    def norms(self) -> Iterator[Norm]:
        """Yield its norms."""
        mixer = self.mixer_norm, self.mixer.q_norm, self.mixer.k_norm, self.mixer_add.norm
        for norm in (*mixer, self.ffn_norm, self.ffn_add.norm):
            if norm is not None:
                yield norm
        if isinstance(self.ffn, Experts):
            yield from self.ffn.norms()
