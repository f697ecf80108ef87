"""What a family's tests need to know of it, and the file that they make of transformers' model."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import gguf
import numpy as np
import numpy.typing as npt

from tests._lib.quantize import encode
from tests._lib.tiny_models import add_key, sentencepiece_tokenizer

Array = npt.NDArray[np.float32]
Type = gguf.GGMLQuantizationType
Rename = Callable[[str, Array], Iterable[tuple[str, Array]]]

VOCAB = 300
CONTEXT = 512


@attrs.frozen(kw_only=True)
class Family:
    """An architecture as transformers knows it.

    Attributes:
        arch: GGUF's name of it.
        name: of the family, where an architecture has several.
        model: transformers' class.
        config: transformers' class of its settings.
        settings: of the tiny model, odd on purpose.
        keys: the metadata that a converter writes for the settings, below the architecture's name.
        rename: the file's tensors for one of transformers', or None where the usual names fit.
        variants: other settings by name, each joined to `settings`; their keys follow from `keys`.
        longer_than: tokens that a prompt must have to come past every window and every original context.
        absent: tensors of transformers' that converters leave out.
        extra: returns tensors that converters make of a model's settings.
        fused: whether files store Q, K and V as one tensor, with their biases, and gate and up of the experts.
        beside: settings of parts beside the language model, whose own settings are then a part too.
    """

    arch: str
    model: str
    config: str
    settings: Mapping[str, Any]
    keys: Callable[[Any], dict[str, Any]]
    rename: Callable[[Any], Rename] | None = None
    variants: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    longer_than: int = 40
    absent: tuple[str, ...] = ()
    extra: Callable[[Any], dict[str, Array]] = lambda model: {}
    fused: bool = False
    beside: Mapping[str, Any] | None = None
    name: str = attrs.field(default=attrs.Factory(lambda self: self.arch, takes_self=True))


@attrs.frozen(eq=False)
class FamilyModel:
    """A tiny model and its file."""

    path: Path
    hf: Any = attrs.field(repr=False)

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float64]:
        """Return transformers' logits [T, V] of one sequence."""
        import torch

        with torch.no_grad():
            logits = self.hf(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return np.asarray(logits.numpy(), np.float64)

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """Return transformers' greedy continuation, which never ends."""
        tokens = list(prompt)
        for _ in range(n):
            logits = self.logits(tokens)[-1]
            logits[self.hf.config.get_text_config().eos_token_id] = -np.inf
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]


def common(**settings: Any) -> dict[str, Any]:
    """Return the settings that nearly every family's class has, and more."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "attn_implementation": "eager",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | settings


def common_keys(config: Any) -> dict[str, Any]:
    """Return the metadata that every family has."""
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return keys | rope_keys(config.rope_parameters)


def rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a scaled RoPE; none for an ordinary one."""
    kind = rope["rope_type"]
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        scaling = {"rope.scaling.factor": float(rope["factor"]), "rope.scaling.original_context_length": original}
        return {"rope.scaling.type": "yarn"} | scaling
    assert kind in ("default", "llama3"), kind  # the factors of llama3 are a tensor
    return {}


@functools.lru_cache(maxsize=64)
def _name_map(arch: str, n_layers: int) -> Any:
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(number, n_layers)


def usual_names(arch: str, n_layers: int) -> Rename:
    """Return the renaming that the `gguf` package knows, with merged experts cut into gate and up."""
    names = _name_map(arch, n_layers)

    def rename(name: str, array: Array) -> Iterable[tuple[str, Array]]:
        if name.endswith("experts.gate_up_proj"):
            block = f"blk.{name.split('.')[2]}.ffn_"
            gate, up = np.split(array, 2, axis=1)
            return [(f"{block}gate_exps.weight", gate), (f"{block}up_exps.weight", up)]
        if name.endswith("experts.down_proj"):
            return [(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", array)]
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise AssertionError(f"no GGUF name is known for {name}")
        return [(found, array)]

    return rename


def random_state(model: Any, seed: int) -> None:
    """Give a model random weights that spread logits and routing well; norms near 1, biases that show."""
    import torch

    rng = np.random.default_rng(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or "inv_freq" in name or "embed_scale" in name:
            continue
        shape = tuple(tensor.shape)
        if "norm" in name and len(shape) == 1 and not name.endswith("bias"):
            values = 1 + 0.25 * rng.normal(size=shape)
        elif "gate_up_proj_bias" in name:
            values = 4 * rng.normal(size=shape)  # clamps of gate and up are to clamp
        elif len(shape) <= 1 or name.endswith("bias"):
            values = 0.4 * rng.normal(size=shape)
        elif "embed_tokens" in name:
            values = rng.normal(size=shape)
        else:
            values = rng.normal(0, 1.6 / math.sqrt(shape[-1]), shape)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(np.asarray(values, np.float32)))


def build(family: Family, seed: int = 0, variant: str | None = None) -> Any:
    """Return transformers' model with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing them warns of their own dependencies
        import transformers
    settings = {**family.settings, **(family.variants[variant] if variant else {})}
    if family.beside is not None:
        settings = {"text_config": settings, **family.beside}
    config = getattr(transformers, family.config)(**settings)
    model = getattr(transformers, family.model)(config)
    random_state(model, seed)
    model.tie_weights()
    return model.eval()


def with_fused(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors with Q, K and V, and gate and up of the experts, as one each."""
    out = dict(tensors)
    for name in tensors:
        if ".attn_q." in name:
            parts = [out.pop(name.replace(".attn_q.", f".attn_{part}.")) for part in "qkv"]
            out[name.replace(".attn_q.", ".attn_qkv.")] = np.concatenate(parts)
        elif "ffn_gate_exps." in name:
            parts = [out.pop(name.replace("gate_exps", f"{part}_exps")) for part in ("gate", "up")]
            out[name.replace("gate_exps", "gate_up_exps")] = np.concatenate(parts, 1)
    return out


def predictor(tensors: Mapping[str, Array], config: Any) -> dict[str, Array]:
    """Return the tensors of a block that predicts the token after the next one."""
    last, d = config.num_hidden_layers - 1, config.hidden_size
    block = {
        name.replace(f"blk.{last}.", f"blk.{last + 1}."): array
        for name, array in tensors.items()
        if name.startswith(f"blk.{last}.")
    }
    more = {"eh_proj.weight": (d, 2 * d), "enorm.weight": (d,), "hnorm.weight": (d,), "shared_head_norm.weight": (d,)}
    return block | {f"blk.{last + 1}.nextn.{name}": np.ones(shape, np.float32) for name, shape in more.items()}


def write(
    path: Path,
    family: Family,
    *,
    seed: int = 0,
    variant: str | None = None,
    weight_type: Type = Type.F32,
    metadata: Mapping[str, Any] | None = None,
    fused: bool = False,
    predicting: bool = False,
    expert_type: Type | None = None,
) -> FamilyModel:
    """Write a family's tiny model and return it.

    Args:
        path: the file.
        family: whose.
        seed: of the weights.
        variant: name of one of its variants.
        weight_type: of the matrices whose rows are whole blocks of it; of the router never.
        metadata: more keys, under their full names.
        fused: as if the family's files were.
        expert_type: of the routed experts, where it is another.
        predicting: add a block that predicts further tokens: the last layer again, and what such blocks have beside.
    """
    model = build(family, seed, variant)
    config = model.config.get_text_config()
    rename = (family.rename or (lambda config: usual_names(family.arch, config.num_hidden_layers)))(config)
    writer = gguf.GGUFWriter(path, family.arch)
    keys = {f"{family.arch}.{key}": value for key, value in family.keys(config).items()}
    keys |= {"general.name": f"tiny {family.arch}"} | sentencepiece_tokenizer(config.vocab_size) | dict(metadata or {})
    if predicting:
        keys |= {f"{family.arch}.block_count": config.num_hidden_layers + 1, f"{family.arch}.nextn_predict_layers": 1}
    for key, value in keys.items():
        add_key(writer, key, value)
    tensors: dict[str, Array] = dict(family.extra(model))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if any(part in name for part in family.absent):
            continue
        tensors |= rename(name, tensor.numpy().astype(np.float32))
    if fused or family.fused:
        tensors = with_fused(tensors)
    if predicting:
        tensors |= predictor(tensors, config)
    for target, array in tensors.items():
        kind = expert_type if expert_type is not None and "_exps." in target else weight_type
        if array.ndim == 1 or "gate_inp" in target or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Type.F32
        if target.endswith(".bias"):
            kind = Type.F32
        writer.add_tensor(target, encode(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return FamilyModel(path, model)
