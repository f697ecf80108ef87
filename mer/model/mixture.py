"""Feed-forward halves of models in which some layers are dense, and experts may share a network."""

from __future__ import annotations

import attrs

from mer.limits import MAX_GROUPS, MAX_LAYERS, MAX_WIDTH
from mer.model.keys import REQUIRED, Keys
from mer.model.operators import Experts, FeedForward, Groups, Routing, Scoring
from mer.model.transformer import Trunk, read_routing, refuse_dense


@attrs.frozen(kw_only=True)
class Mixture:
    """The feed-forward half of every layer of a model; letters as in `operators`."""

    trunk: Trunk
    n: int  # E
    top_k: int  # K
    d_ff: int  # F of an expert
    dense_ff: int  # of a dense layer; 0 if there is none
    shared_ff: int  # of the network that a layer's experts share; 0 if there is none
    routed: tuple[bool, ...]  # of each layer: whether it has experts
    routing: Routing
    selection_bias: bool | None  # see `Trunk.linear`

    @classmethod
    def read(
        cls,
        trunk: Trunk,
        scoring: Scoring,
        *,
        normalize: bool,
        selection_bias: bool | None = None,
        n_shared: object = REQUIRED,
    ) -> Mixture:
        """Read the numbers of a file.

        Args:
            trunk: of the model.
            scoring: of files that do not name one.
            normalize: whether weights are normalized where the file does not say.
            selection_bias: whether layers have one; None: the file has the tensor or not.
            n_shared: how many experts wide the shared network is where the file does not say.

        Raises:
            GGUFError: a number is missing, out of range or contradicts another one.
            UnsupportedModel: something is not implemented.
        """
        keys = trunk.keys
        refuse_dense(keys)
        routed = _moe_layers(keys)
        n, top_k = read_routing(keys, trunk.n_layers)
        d_ff = keys.integer("expert_feed_forward_length", maximum=MAX_WIDTH)
        dense_ff = 0
        if all(routed):
            keys.ignore("feed_forward_length")  # of a dense layer, which there is none of
        else:
            dense_ff = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
        return cls(
            trunk=trunk,
            n=n,
            top_k=top_k,
            d_ff=d_ff,
            dense_ff=dense_ff,
            shared_ff=_shared_width(keys, d_ff, default=n_shared),
            routed=routed,
            routing=read_scoring(keys, n, top_k, scoring, normalize=normalize),
            selection_bias=selection_bias,
        )

    def ffn(self, layer: int) -> FeedForward | Experts:
        """Return a layer's half."""
        trunk = self.trunk
        if not self.routed[layer]:
            return trunk.feed_forward(layer, self.dense_ff)
        return trunk.experts(
            layer,
            self.n,
            self.top_k,
            self.d_ff,
            routing=self.routing,
            selection_bias=self.selection_bias,
            shared=trunk.feed_forward(layer, self.shared_ff, "_shexp") if self.shared_ff else None,
        )


def _moe_layers(keys: Keys) -> tuple[bool, ...]:
    """Return of each layer whether it has experts: of those after the leading dense ones, every n-th.

    Raises:
        GGUFError: a number is out of range, or no layer has experts.
    """
    leading = keys.integer("leading_dense_block_count", default=0, minimum=0, maximum=keys.n_layers)
    step = keys.integer("interleave_moe_layer_step", default=1, minimum=0, maximum=MAX_LAYERS)
    which = tuple(i >= leading and (i + 1) % max(step, 1) == 0 for i in range(keys.n_layers))
    if not any(which):
        reason = f"is {leading}; of {keys.n_layers} layers none is left that has experts"
        raise keys.error("leading_dense_block_count", reason)
    return which


def read_scoring(keys: Keys, n_experts: int, top_k: int, scoring: Scoring, *, normalize: bool) -> Routing:
    """Return how logits become weights; a file that does not say so has the numbers of its architecture.

    Args:
        keys: the file's.
        n_experts: E.
        top_k: K.
        scoring: of files that do not name one.
        normalize: what files without that key mean.

    Raises:
        GGUFError: a number is out of range or contradicts another one.
        UnsupportedModel: another scoring, or groups by shares of a softmax.
    """
    key = "expert_gating_func"
    code = keys.integer(key, default=0, minimum=0, maximum=MAX_LAYERS)
    known = {0: scoring, 1: Scoring.SOFTMAX, 2: Scoring.SIGMOID}
    if code not in known:
        raise keys.unsupported(f"{keys.name(key)} = {code} is not implemented; 1 (softmax) and 2 (sigmoid) work")
    groups = _groups(keys, n_experts, top_k)
    if groups is not None and known[code] is Scoring.SOFTMAX:
        # DeepSeek-V2 takes the largest share of a group for its score, llama.cpp the sum of two
        what = f"{keys.name('expert_group_count')} = {groups.count} with a softmax"
        raise keys.unsupported(f"{what}: what a group's score is then is not settled; groups by sigmoid work")
    return Routing(
        scoring=known[code],
        groups=groups,
        normalize=keys.flag("expert_weights_norm", default=normalize),
        scale=_weights_scale(keys),
    )


def _groups(keys: Keys, n_experts: int, top_k: int) -> Groups | None:
    """Return the groups of experts, unless all of them are chosen from."""
    key, used_key = "expert_group_count", "expert_group_used_count"
    count = keys.integer(key, default=0, minimum=0, maximum=MAX_GROUPS)
    used = keys.integer(used_key, default=0, minimum=0, maximum=max(count, 1))
    if count <= 1 or used == count:
        return None
    if n_experts % count or n_experts // count < 2:
        raise keys.error(key, f"is {count}; it must divide {n_experts} experts into groups of two or more")
    if used * (n_experts // count) < top_k:
        raise keys.error(used_key, f"is {used}, with fewer experts than the {top_k} that a token uses")
    return Groups(count=count, used=used)


def _weights_scale(keys: Keys) -> float:
    """Return what weights are multiplied by; 0 means that they are not."""
    key = "expert_weights_scale"
    if keys.gguf.metadata.get(keys.name(key)) == 0:
        keys.ignore(key)
        return 1.0
    return keys.real(key, default=1.0, maximum=1e3)


def _shared_width(keys: Keys, d_ff: int, *, default: object = REQUIRED) -> int:
    """Return the hidden size of the network that experts share; without a key for it, so many experts'; 0: none.

    Args:
        keys: the file's.
        d_ff: of an expert.
        default: how many experts' it is where the file does not say so either.

    Raises:
        GGUFError: a number is missing or out of range.
    """
    count = keys.integer("expert_shared_count", default=default, minimum=0, maximum=MAX_WIDTH // d_ff)
    key = "expert_shared_feed_forward_length"
    return keys.integer(key, default=count * d_ff, minimum=0, maximum=MAX_WIDTH)
