"""Tiny random models as GGUF files, with Hugging Face's model of the same weights as oracle."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
import gguf
import numpy as np
import numpy.typing as npt

from tests._lib.quantize import decode, encode

Array = npt.NDArray[np.float32]
Arch = Literal["llama", "qwen2moe", "qwen3", "qwen3moe"]
"""Architectures of tiny models."""
TINY_ARCHITECTURES: tuple[Arch, ...] = get_args(Arch)
_QK_NORM = ("qwen3", "qwen3moe")
Type = gguf.GGMLQuantizationType


@attrs.frozen(kw_only=True)
class TinyShape:
    """Hyperparameters of a tiny model, awkward on purpose; letters as in ModelSpec."""

    arch: Arch = "llama"
    n_layers: int = 2
    d_model: int = 96
    d_ff: int = 160
    shared_d_ff: int = 112  # of qwen2moe
    n_experts: int = 5
    top_k: int = 2
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int | None = None  # None: 24 for qwen3 and qwen3moe, d_model / n_heads for the others
    vocab_size: int = 300
    context_length: int = 256
    rope_base: float = 10000.0
    rope_factor: float | None = None  # linear RoPE scaling
    rms_eps: float = 1e-5
    tied: bool = False
    sliding_window: int | None = None

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        if self.head_dim is not None:
            return self.head_dim
        return 24 if self.arch in _QK_NORM else self.d_model // self.n_heads


@attrs.frozen
class TinyModel:
    """A tiny model: its file, its hyperparameters, and its weights as the file's types round them."""

    path: Path  # the first part, if the file is split
    shape: TinyShape
    # By GGUF name, experts merged, the rows of Q and K in Hugging Face's order.
    weights: Mapping[str, Array] = attrs.field(repr=False)

    def hf_logits(self, tokens: list[int]) -> npt.NDArray[np.float64]:
        """Return the Hugging Face model's logits [T, V] of one sequence; the first call imports torch."""
        model = self._hf_model
        import torch

        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return np.asarray(logits.numpy(), np.float64)

    @functools.cached_property
    def _hf_model(self) -> Any:
        return hf_model(self.shape, self.weights)


def tiny_model(
    path: str | Path,
    arch: Arch = "llama",
    *,
    seed: int = 0,
    weight_type: Type = Type.F32,
    expert_type: Type | None = None,
    down_type: Type | None = None,
    merged: bool = True,
    tokenizer: bool = True,
    permute: bool = True,
    alignment: int | None = None,
    split_max_tensors: int = 0,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
    types: Mapping[str, Type] | None = None,
    drop: Collection[str] = (),
    **shape: Any,
) -> TinyModel:
    """Write a random model to a GGUF file; needs no torch until `hf_logits` is called.

    Args:
        path: file to write; with `split_max_tensors` the parts get llama.cpp's `-00001-of-0000N` names.
        arch: architecture.
        seed: of all weights.
        weight_type: type of every matrix but the router; one whose rows are not whole blocks of it stays F32.
        expert_type: type of the experts' matrices where it differs.
        down_type: type of the experts' down matrices where it differs from that.
        merged: experts as one tensor per layer and projection, or as one tensor each.
        tokenizer: whether to write a SentencePiece-style tokenizer.
        permute: whether a llama file gets its Q and K rows permuted, as it must; False makes a broken file.
        alignment: of tensor data, if not the usual 32; not for split files, whose later parts GGUFWriter does not tell.
        split_max_tensors: tensors per part of a split file; 0 writes one file.
        metadata: more keys, or other values for keys.
        tensors: more tensors, or other values of tensors, as they are to be stored; the oracle does not know them.
        types: other types of single tensors, by GGUF name with the experts merged, or of one expert's matrix if they
            are not, such as blk.0.ffn_up.3.weight.
        drop: names of tensors and keys to leave out.
        **shape: fields of TinyShape.
    """
    if alignment is not None and split_max_tensors:
        raise ValueError("a split file cannot have an alignment of its own")
    model = TinyShape(arch=arch, **shape)
    expert_type = weight_type if expert_type is None else expert_type
    down_type = expert_type if down_type is None else down_type
    rounded: dict[str, Array] = {}
    stored: dict[str, tuple[npt.NDArray[np.uint8], Type]] = {}
    for name, array in random_weights(model, seed).items():
        kind = down_type if "down_exps" in name else expert_type if "_exps" in name else weight_type
        if array.ndim == 1 or "gate_inp" in name or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Type.F32
        kind = (types or {}).get(name, kind)
        single = not merged and "_exps" in name
        parts = {name.replace("_exps", f".{i}"): matrix for i, matrix in enumerate(array)} if single else {name: array}
        kinds = {part: (types or {}).get(part, kind) for part in parts}
        raws = {part: encode(matrix, kinds[part]) for part, matrix in parts.items()}
        decoded = [decode(raw, kinds[part]) for part, raw in raws.items()]
        rounded[name] = np.stack(decoded) if single else decoded[0]
        if arch == "llama" and permute and ("attn_q." in name or "attn_k." in name):
            raws[name] = permute_rows(raws[name], model.n_heads if "attn_q." in name else model.n_kv_heads)
        stored |= {part: (raw, kinds[part]) for part, raw in raws.items()}
    keys = (
        hyperparameters(model) | (sentencepiece_tokenizer(model.vocab_size) if tokenizer else {}) | dict(metadata or {})
    )
    stored |= {name: (encode(array, Type.F32), Type.F32) for name, array in (tensors or {}).items()}
    path = Path(path)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in keys.items():
        if key not in drop:
            add_key(writer, key, value)
    for name, (raw, kind) in stored.items():
        if name not in drop:
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if split_max_tensors:
        path = min(path.parent.glob(f"{path.stem}-00001-of-*{path.suffix}"))
    return TinyModel(path, model, rounded)


def random_gguf(path: str | Path, arch: Arch = "llama", **kwargs: Any) -> Path:
    """Write a random model as `tiny_model` does and return the path of its (first) file."""
    return tiny_model(path, arch, **kwargs).path


def random_weights(shape: TinyShape, seed: int) -> dict[str, Array]:
    """Return random weights by GGUF name, scaled so that logits and routing are well spread."""
    rng = np.random.default_rng(seed)

    def matrix(*size: int, gain: float = 1.0) -> Array:
        return rng.normal(0, gain / math.sqrt(size[-1]), size).astype(np.float32)

    def norm(size: int) -> Array:
        return (1 + 0.25 * rng.normal(size=size)).astype(np.float32)

    d_model, head = shape.d_model, shape.head_size
    experts = shape.n_experts

    def network(suffix: str, d_ff: int) -> dict[str, Array]:
        return {
            f"ffn_gate{suffix}": matrix(d_ff, d_model),
            f"ffn_up{suffix}": matrix(d_ff, d_model),
            f"ffn_down{suffix}": matrix(d_model, d_ff, gain=2.0),
        }

    weights = {"token_embd.weight": matrix(shape.vocab_size, d_model, gain=math.sqrt(d_model))}
    for layer in range(shape.n_layers):
        block = {
            "attn_norm": norm(d_model),
            "attn_q": matrix(shape.n_heads * head, d_model, gain=1.5),
            "attn_k": matrix(shape.n_kv_heads * head, d_model, gain=1.5),
            "attn_v": matrix(shape.n_kv_heads * head, d_model),
            "attn_output": matrix(d_model, shape.n_heads * head),
            "ffn_norm": norm(d_model),
        }
        if shape.arch == "qwen3":
            block |= network("", shape.d_ff)
        else:
            block |= {
                "ffn_gate_inp": matrix(experts, d_model, gain=2.0),
                "ffn_gate_exps": matrix(experts, shape.d_ff, d_model),
                "ffn_up_exps": matrix(experts, shape.d_ff, d_model),
                "ffn_down_exps": matrix(experts, d_model, shape.d_ff, gain=2.0),
            }
        if shape.arch in _QK_NORM:
            block |= {"attn_q_norm": norm(head), "attn_k_norm": norm(head)}
        weights |= {f"blk.{layer}.{name}.weight": array for name, array in block.items()}
        if shape.arch == "qwen2moe":
            shared = network("_shexp", shape.shared_d_ff) | {"ffn_gate_inp_shexp": matrix(1, d_model, gain=2.0)[0]}
            weights |= {f"blk.{layer}.{name}.weight": array for name, array in shared.items()}
            sizes = {"q": shape.n_heads * head, "k": shape.n_kv_heads * head, "v": shape.n_kv_heads * head}
            weights |= {f"blk.{layer}.attn_{x}.bias": matrix(1, size, gain=size**0.5)[0] for x, size in sizes.items()}
    weights["output_norm.weight"] = norm(d_model)
    if not shape.tied:
        weights["output.weight"] = matrix(shape.vocab_size, d_model, gain=2.0)
    return weights


def hyperparameters(shape: TinyShape) -> dict[str, Any]:
    """Return the metadata that describes the model."""
    values: dict[str, Any] = {
        "block_count": shape.n_layers,
        "context_length": shape.context_length,
        "embedding_length": shape.d_model,
        "feed_forward_length": shape.d_ff if shape.arch in ("llama", "qwen3") else 4 * shape.d_model,
        "attention.head_count": shape.n_heads,
        "attention.head_count_kv": shape.n_kv_heads,
        "attention.layer_norm_rms_epsilon": shape.rms_eps,
        "rope.freq_base": shape.rope_base,
        "vocab_size": shape.vocab_size,
    }
    if shape.arch != "qwen3":
        values |= {"expert_count": shape.n_experts, "expert_used_count": shape.top_k}
    if shape.arch in ("qwen2moe", "qwen3moe"):
        values["expert_feed_forward_length"] = shape.d_ff
    if shape.arch == "qwen2moe":
        values["expert_shared_feed_forward_length"] = shape.shared_d_ff
    if shape.arch == "llama":
        values["rope.dimension_count"] = shape.head_size
    if shape.arch in _QK_NORM or shape.head_dim is not None:
        values |= {"attention.key_length": shape.head_size, "attention.value_length": shape.head_size}
    if shape.sliding_window is not None:
        values["attention.sliding_window"] = shape.sliding_window
    if shape.rope_factor is not None:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": shape.rope_factor}
    return {"general.name": f"tiny {shape.arch}"} | {f"{shape.arch}.{key}": value for key, value in values.items()}


def sentencepiece_tokenizer(vocab_size: int) -> dict[str, Any]:
    """Return the metadata of a tokenizer in the form of llama files: control tokens, bytes if V >= 260, then pieces.

    Pieces are single characters, then pairs and longer strings, so that each can be built by merging; scores fall.
    """
    tokens = ["<unk>", "<s>", "</s>"]
    types = [2, 3, 3]  # unknown, control
    if vocab_size >= 260:
        tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        types += [6] * 256  # byte
    letters = "\u2581etaoinshrdlucmfwypvbgkjqxz.,!?'-0123456789ETAOINSHRDLUCMFWYPVBGKJQXZ"
    pieces = list(letters)
    for head in pieces:  # grows as it is walked
        if len(tokens) + len(pieces) >= vocab_size:
            break
        pieces += [head + letter for letter in letters[1:27]]
    pieces = pieces[: vocab_size - len(tokens)]
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(len(pieces))]
    types += [1] * len(pieces)
    tokens += pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write one metadata value with the GGUF type that converters use for its Python type."""
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_int32 if isinstance(value, int) and value < 0 else writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def permute_rows(rows: npt.NDArray[np.uint8], n_heads: int) -> npt.NDArray[np.uint8]:
    """Return rows of Q or K in the order of llama files: each head's two halves interleaved."""
    halves = rows.reshape(n_heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(rows.shape)


def hf_model(shape: TinyShape, weights: Mapping[str, Array]) -> Any:
    """Return the transformers model with these weights, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing them warns of their own dependencies
        import torch
        import transformers

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_base}
    if shape.rope_factor is not None:
        rope |= {"rope_type": "linear", "factor": shape.rope_factor}
    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.rms_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": shape.tied,
        "attn_implementation": "eager",
        "sliding_window": shape.sliding_window,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if shape.arch != "qwen3":
        common["num_experts_per_tok"] = shape.top_k
    model: Any
    if shape.arch == "llama":
        mixtral = transformers.MixtralConfig(intermediate_size=shape.d_ff, num_local_experts=shape.n_experts, **common)
        model = transformers.MixtralForCausalLM(mixtral)
    elif shape.arch == "qwen2moe":
        qwen2 = transformers.Qwen2MoeConfig(
            moe_intermediate_size=shape.d_ff,
            shared_expert_intermediate_size=shape.shared_d_ff,
            num_experts=shape.n_experts,
            norm_topk_prob=False,
            use_sliding_window=shape.sliding_window is not None,
            layer_types=None if shape.sliding_window is None else ["sliding_attention"] * shape.n_layers,
            **common,
        )
        model = transformers.Qwen2MoeForCausalLM(qwen2)
    elif shape.arch == "qwen3":
        qwen3 = transformers.Qwen3Config(
            intermediate_size=shape.d_ff,
            use_sliding_window=shape.sliding_window is not None,
            max_window_layers=0,
            **common,
        )
        model = transformers.Qwen3ForCausalLM(qwen3)
    else:
        qwen = transformers.Qwen3MoeConfig(
            moe_intermediate_size=shape.d_ff,
            num_experts=shape.n_experts,
            norm_topk_prob=True,
            use_sliding_window=shape.sliding_window is not None,
            **common,
        )
        model = transformers.Qwen3MoeForCausalLM(qwen)
    state = {name: torch.from_numpy(array) for name, array in hf_state(shape, weights).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if shape.tied else set()):
        raise AssertionError(f"the state does not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def hf_state(shape: TinyShape, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return the weights under Hugging Face's names."""
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    }
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    if not shape.tied:
        state["lm_head.weight"] = weights["output.weight"]
    for layer in range(shape.n_layers):
        block = f"blk.{layer}."
        target = f"model.layers.{layer}."
        for ours, theirs in names.items():
            if block + ours + ".weight" in weights:
                state[f"{target}{theirs}.weight"] = weights[f"{block}{ours}.weight"]
            if block + ours + ".bias" in weights:
                state[f"{target}{theirs}.bias"] = weights[f"{block}{ours}.bias"]
        if shape.arch == "qwen2moe":
            state[f"{target}mlp.shared_expert_gate.weight"] = weights[f"{block}ffn_gate_inp_shexp.weight"][None]
        if shape.arch == "qwen3":
            continue
        gate, up, down = (weights[f"{block}ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        state[f"{target}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        state[f"{target}mlp.experts.down_proj"] = down
    return state
