"""The common transformer: GQA, RoPE and RMSNorm in every layer, with the tensor names that llama.cpp gives them.

An architecture's file makes its layers of what `Trunk` gives and adds what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Final

import attrs

from mer.errors import GGUFError
from mer.limits import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_EXPERTS_PER_LAYER,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_TOP_K,
    MAX_VOCAB,
    MAX_WIDTH,
)
from mer.model.keys import Keys
from mer.model.operators import (
    ROUTER_TYPES,
    SWIGLU,
    Activation,
    Attention,
    Experts,
    FeedForward,
    HeadNorms,
    Layer,
    Linear,
    Norm,
    Rope,
    RopeStyle,
    Router,
    Routing,
    Rows,
    Scoring,
    Tensor,
    Yarn,
    gated_experts,
    vector,
)
from mer.model.spec import ModelSpec
from mer.quoting import quoted

OVER_CHOSEN: Final = Routing(scoring=Scoring.CHOSEN)


@attrs.frozen(kw_only=True)
class Trunk:
    """What the layers of a transformer share, and the operators made of it; letters as in `operators`."""

    keys: Keys
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    vocab_size: int
    context_length: int
    window: int | None
    n_skipped: int

    @classmethod
    def read(cls, keys: Keys, *, n_heads: int | None = None, n_kv_heads: int | None = None) -> Trunk:
        """Read the sizes, each checked against the others; numbers of heads too, unless layers differ in them.

        The last blocks of some files predict further tokens (MTP); they are not layers here.

        Raises:
            GGUFError: a hyperparameter is missing, out of range or contradicts another one.
            UnsupportedModel: layers differ, keys are longer than values, or there is nothing but MTP blocks.
        """
        n_layers, n_skipped = keys.n_layers, keys.n_skipped
        if n_skipped and (not n_layers or "blk.0.attn_norm.weight" not in keys.gguf.tensors):
            raise keys.unsupported(
                "a file of the blocks that predict further tokens (MTP), without the model that they belong to; "
                "use the model's own file"
            )
        d_model = keys.integer("embedding_length", maximum=MAX_WIDTH)
        if n_heads is None:
            n_heads = keys.integer("attention.head_count", maximum=MAX_HEADS)
        if n_kv_heads is None:
            n_kv_heads = keys.integer("attention.head_count_kv", maximum=MAX_HEADS, default=n_heads)
        if n_heads % n_kv_heads:
            must = f"it must divide {keys.name('attention.head_count')} = {n_heads}"
            raise keys.error("attention.head_count_kv", f"is {n_kv_heads}; {must}")
        context = keys.integer("context_length", maximum=MAX_CONTEXT)
        window = keys.integer("attention.sliding_window", default=0, minimum=0, maximum=MAX_CONTEXT)
        keys.ignore("tensor_data_layout")  # who wrote the file, in words
        return cls(
            keys=keys,
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=_head_dim(keys, d_model, n_heads),
            eps=keys.real("attention.layer_norm_rms_epsilon", maximum=1.0),
            vocab_size=_vocab_size(keys),
            context_length=context,
            window=window if 0 < window < context else None,
            n_skipped=n_skipped,
        )

    def norm(self, name: str, n: int | None = None, *, factor: float = 1.0) -> Norm:
        """Return a norm by its tensor's name, of D elements or of n."""
        return Norm(vector(f"{name}.weight", self.d_model if n is None else n), self.eps, factor)

    def linear(self, name: str, rows: int, cols: int, *, bias: bool | None = False) -> Linear:
        """Return a linear map by its tensor's name, with a bias if the architecture has one there.

        With None for `bias`, models of the architecture differ in that, and the file has the tensor or not.
        """
        has_bias = f"{name}.bias" in self.keys.gguf.tensors if bias is None else bias
        return Linear(Tensor(f"{name}.weight", (rows, cols)), vector(f"{name}.bias", rows) if has_bias else None)

    def joined(self, name: str, parts: Mapping[str, int], cols: int, *, bias: bool | None = False) -> list[Linear]:
        """Return linear maps of so many rows each, by the names of their tensors, which the file may store as one.

        Args:
            name: of that one.
            parts: rows of each map by its own name, in the order in which the one has them.
            cols: columns of them all.
            bias: see `linear`.
        """
        tensors, of = self.keys.gguf.tensors, sum(parts.values())
        if f"{name}.weight" not in tensors:
            return [self.linear(part, rows, cols, bias=bias) for part, rows in parts.items()]
        has_bias = f"{name}.bias" in tensors if bias is None else bias
        linears, first = [], 0
        for part, rows in parts.items():
            weight, its_bias = (Rows(f"{name}.{kind}", first, of) for kind in ("weight", "bias"))
            linear = Linear(Tensor(f"{part}.weight", (rows, cols), within=weight))
            linears.append(attrs.evolve(linear, bias=vector(f"{part}.bias", rows, its_bias) if has_bias else None))
            first += rows
        return linears

    def rope(self, style: RopeStyle, *, factors: bool = False, whole_pairs: bool = True) -> Rope:
        """Read how positions rotate the heads.

        Args:
            style: which elements are pairs.
            factors: whether the file may have a tensor of them.
            whole_pairs: see `Yarn`.

        Raises:
            GGUFError: a number is out of range.
            UnsupportedModel: another scaling than the linear one and YaRN.
        """
        keys, head_dim = self.keys, self.head_dim
        dim = keys.integer("rope.dimension_count", maximum=MAX_HEAD_DIM, default=head_dim)
        if dim % 2 or dim > head_dim:
            raise keys.error(
                "rope.dimension_count", f"is {dim}; it must be even and at most the head dimension {head_dim}"
            )
        base = keys.real("rope.freq_base", default=10000.0, maximum=1e15)
        keys.ignore("rope.scaling.finetuned")  # says how a scaling was made
        scale, yarn = _rope_scaling(keys, self.context_length, whole_pairs=whole_pairs)
        name = "rope_freqs.weight"
        has_factors = factors and name in keys.gguf.tensors
        return Rope(dim, base, scale, style, vector(name, dim // 2) if has_factors else None, yarn)

    def window_rope(self, head_dim: int, *, base: float, dim: int) -> Rope:
        """Read how positions rotate the heads of layers with a window, where those of the others rotate otherwise.

        Args:
            head_dim: of these layers.
            base: where the file does not say.
            dim: likewise.

        Raises:
            GGUFError: a number is out of range.
        """
        keys, key = self.keys, "rope.dimension_count_swa"
        base = keys.real("rope.freq_base_swa", default=base, maximum=1e15)
        dim = keys.integer(key, default=dim, maximum=MAX_HEAD_DIM)
        if dim % 2 or dim > head_dim:
            raise keys.error(key, f"is {dim}; it must be even and at most the head dimension {head_dim}")
        return Rope(dim, base, 1.0, RopeStyle.NEOX)

    def attention(
        self,
        layer: int,
        rope: Rope,
        *,
        qk_norm: bool | None = False,
        norms: HeadNorms = HeadNorms.BEFORE,
        qkv_bias: bool | None = False,
        out_bias: bool | None = False,
        scale: float | None = None,
        sinks: bool = False,
    ) -> Attention:
        """Return a layer's attention; for the biases see `linear`. By default scores are divided by sqrt(C).

        With None for `qk_norm`, models of the architecture differ in that, and the file has the norms or not.
        """
        block, d, c = f"blk.{layer}.attn_", self.d_model, self.head_dim
        if qk_norm is None:
            qk_norm = f"{block}q_norm.weight" in self.keys.gguf.tensors
        q_dim, kv_dim = self.n_heads * c, self.n_kv_heads * c
        parts = {block + "q": q_dim, block + "k": kv_dim, block + "v": kv_dim}
        q, k, v = self.joined(block + "qkv", parts, d, bias=qkv_bias)
        return Attention(
            q=q,
            k=k,
            v=v,
            out=self.linear(block + "output", d, q_dim, bias=out_bias),
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=c,
            rope=rope,
            q_norm=self.norm(block + "q_norm", q_dim if norms is HeadNorms.WHOLE else c) if qk_norm else None,
            k_norm=self.norm(block + "k_norm", kv_dim if norms is HeadNorms.WHOLE else c) if qk_norm else None,
            norms=norms,
            window=self.window,
            scale=c**-0.5 if scale is None else scale,
            sinks=vector(f"{block}sinks.weight", self.n_heads) if sinks else None,
        )

    def feed_forward(
        self,
        layer: int,
        d_ff: int,
        suffix: str = "",
        *,
        gated: bool = False,
        bias: bool | None = False,
        activation: Activation = SWIGLU,
    ) -> FeedForward:
        """Return a network of dense weights, such as `ffn_gate` or, with a suffix, `ffn_gate_shexp`."""
        block, d = f"blk.{layer}.ffn_", self.d_model
        gate, up = (self.linear(f"{block}{name}{suffix}", d_ff, d, bias=bias) for name in ("gate", "up"))
        by = Linear(Tensor(f"{block}gate_inp{suffix}.weight", (1, d), ROUTER_TYPES)) if gated else None
        return FeedForward(gate, up, self.linear(f"{block}down{suffix}", d, d_ff, bias=bias), by, activation)

    def experts(
        self,
        layer: int,
        n: int,
        top_k: int,
        d_ff: int,
        *,
        routing: Routing = OVER_CHOSEN,
        selection_bias: bool | None = False,
        shared: FeedForward | None = None,
        activation: Activation = SWIGLU,
        bias: bool = False,
    ) -> Experts:
        """Return a layer's routed experts.

        For the selection bias see `linear`; `bias` says whether the router and every matrix of an expert have one.
        """
        gate = f"blk.{layer}.ffn_gate_inp"
        weight = Tensor(f"{gate}.weight", (n, self.d_model), ROUTER_TYPES)
        linear = Linear(weight, vector(f"{gate}.bias", n) if bias else None)
        name = f"blk.{layer}.exp_probs_b.bias"
        has_bias = name in self.keys.gguf.tensors if selection_bias is None else selection_bias
        router = Router(linear, top_k, routing, vector(name, n) if has_bias else None)
        fused = f"blk.{layer}.ffn_gate_up_exps.weight" in self.keys.gguf.tensors
        weights = gated_experts(layer, n, self.d_model, d_ff, activation=activation, fused=fused, bias=bias)
        return Experts(router, weights, shared)

    def layer(self, layer: int, mixer: Attention, ffn: FeedForward | Experts, *, ffn_norm: str = "ffn_norm") -> Layer:
        """Return a layer with norms before its two halves; files name the second one in different ways."""
        return Layer(self.norm(f"blk.{layer}.attn_norm"), mixer, self.norm(f"blk.{layer}.{ffn_norm}"), ffn)

    def model(self, layers: Sequence[Layer], *, embedding_scale: float = 1.0, logit_scale: float = 1.0) -> ModelSpec:
        """Return the model of these layers; the output head is the embedding where the file has no other.

        The logits' scale is a factor of the norm before them.
        """
        gguf, shape = self.keys.gguf, (self.vocab_size, self.d_model)
        embedding = Tensor("token_embd.weight", shape)
        return ModelSpec(
            architecture=self.keys.architecture,
            name=gguf.get_str("general.name", default="").encode(errors="replace").decode() or gguf.paths[0].stem,
            context_length=self.context_length,
            embedding=embedding,
            embedding_scale=embedding_scale,
            layers=tuple(layers),
            norm=self.norm("output_norm", factor=logit_scale),
            n_skipped=self.n_skipped,
            head=Linear(Tensor("output.weight", shape) if "output.weight" in gguf.tensors else embedding),
        )


def is_dense(keys: Keys) -> bool:
    """Return whether a model has no experts; reading the numbers of experts counts as asking for them."""
    count = keys.gguf.metadata.get(keys.name("expert_count"), 0)
    if type(count) is not int or count != 0:
        return False
    for key in ("expert_count", "expert_used_count"):
        keys.neutral(key, 0)
    return True


def refuse_dense(keys: Keys) -> None:
    """Refuse a model without experts.

    Raises:
        UnsupportedModel: it has none.
    """
    if is_dense(keys):
        raise keys.unsupported(
            f"a dense '{keys.architecture}' model: {keys.name('expert_count')} is absent or 0. Every weight takes part "
            "in every token, so there are no experts to stream; use a Mixture-of-Experts file, such as Mixtral or "
            "Qwen3-30B-A3B"
        )


def read_routing(keys: Keys, n_layers: int) -> tuple[int, int]:
    """Return E and K, which bound what is built for every expert, and for every expert that a token uses.

    Raises:
        GGUFError: one is missing, out of range or contradicts the other.
        UnsupportedModel: layers differ.
    """
    n_experts = keys.integer("expert_count", maximum=MAX_EXPERTS_PER_LAYER)
    if n_layers * n_experts > MAX_EXPERTS:
        more = f"is {n_experts} in {n_layers} layers; all layers together may have {MAX_EXPERTS}"
        raise keys.error("expert_count", more)
    top_k = keys.integer("expert_used_count", maximum=MAX_TOP_K)
    if top_k > n_experts:
        raise keys.error("expert_used_count", f"is {top_k}; {keys.name('expert_count')} = {n_experts} is the most")
    return n_experts, top_k


def read_expert_width(keys: Keys, top_k: int) -> int:
    """Return the experts' hidden size; where only that of a token's K experts together is given, its K-th part.

    Raises:
        GGUFError: it is missing, out of range or too small for K experts.
        UnsupportedModel: layers differ.
    """
    key, together = "expert_feed_forward_length", "feed_forward_length"
    d_ff = keys.integer(key, default=0, minimum=0, maximum=MAX_WIDTH)
    if d_ff:
        keys.ignore(together)  # of a dense layer, which there is none of
        return d_ff
    d_ff = keys.integer(together, maximum=MAX_WIDTH) // top_k
    if not d_ff:
        raise keys.error(together, f"is less than the {top_k} experts of a token, and {keys.name(key)} is not given")
    return d_ff


def _head_dim(keys: Keys, d_model: int, n_heads: int) -> int:
    key, value_key = "attention.key_length", "attention.value_length"
    if keys.has(key):
        head_dim = keys.integer(key, maximum=MAX_HEAD_DIM)
    elif d_model % n_heads:
        must = f"it must divide {keys.name('embedding_length')} = {d_model}, or {keys.name(key)} be given"
        raise keys.error("attention.head_count", f"is {n_heads}; {must}")
    else:
        head_dim = d_model // n_heads
    if head_dim % 2:
        raise keys.malformed(f"the head dimension is {head_dim}; it must be even, RoPE rotates pairs of elements")
    value_length = keys.integer(value_key, default=head_dim, maximum=MAX_HEAD_DIM)
    if value_length != head_dim:
        raise keys.unsupported(
            f"{keys.name(value_key)} = {value_length} differs from the key length {head_dim}; only heads with keys "
            "and values of one length are implemented"
        )
    return head_dim


def _vocab_size(keys: Keys) -> int:
    """Return the number of rows of the token embedding, one for each token if the file has any.

    `vocab_size` may differ from it, as llama.cpp has it: files say there how many tokens the model had before tokens
    were added or its embedding was padded.
    """
    gguf = keys.gguf
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise keys.malformed("tensor 'token_embd.weight' is missing")
    vocab_size = embedding.shape[0]
    if len(embedding.shape) != 2 or vocab_size > MAX_VOCAB:
        reason = f"tensor 'token_embd.weight' has shape {embedding.shape}, not (V, D) with V at most {MAX_VOCAB}"
        raise GGUFError(gguf.paths[embedding.file], embedding.offset, reason)
    keys.integer("vocab_size", default=vocab_size, maximum=MAX_VOCAB)
    tokens = gguf.get_strings("tokenizer.ggml.tokens", default=None)
    if tokens is not None and len(tokens) != vocab_size:
        reason = f"has {len(tokens)} entries, but 'token_embd.weight' has {vocab_size} rows"
        raise gguf.error("tokenizer.ggml.tokens", reason)
    return vocab_size


def _rope_scaling(keys: Keys, context: int, *, whole_pairs: bool) -> tuple[float, Yarn | None]:
    """Return what positions are multiplied by, and YaRN's numbers.

    A factor without a type means linear, and a factor of 0 is none, as in llama.cpp.
    """
    spellings = ("rope.scaling.factor", "rope.scale_linear")  # the second is the older name
    factor_key = next((key for key in spellings if keys.has(key)), spellings[0])
    keys.ignore(*spellings)
    # how often a pair turns in the original context is fixed for all models that are run here
    keys.ignore("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
    kind = keys.text("rope.scaling.type", "")
    original_key = "rope.scaling.original_context_length"
    keys.ignore(original_key)
    if kind == "none":
        return 1.0, None
    if kind not in ("", "linear", "yarn"):
        named = keys.name("rope.scaling.type")
        raise keys.unsupported(f"{named} = {quoted(kind)} is not implemented; 'none', 'linear' and 'yarn' work")
    if keys.gguf.get_float(keys.name(factor_key), default=0.0) == 0:
        return 1.0, None
    factor = keys.real(factor_key, maximum=1e6)
    if kind != "yarn":
        return 1.0 / factor, None
    original = keys.integer(original_key, default=context, maximum=MAX_CONTEXT)
    by = keys.real("rope.scaling.attn_factor", default=1.0, maximum=1e3)
    magnitude = (1 + 0.1 * log(factor)) * by
    return 1.0, Yarn(factor=factor, original=original, magnitude=magnitude, whole_pairs=whole_pairs)
