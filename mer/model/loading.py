"""A model file's header, read and checked."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from mer.config import EngineConfig
from mer.io.extents import ExpertMap, map_experts
from mer.io.gguf import GGUFFile, TensorInfo, read_gguf
from mer.model.dense import dense_tensors
from mer.model.registry import model_spec
from mer.model.spec import ModelSpec


@attrs.frozen(kw_only=True)
class Model:
    """A model file, understood and checked, with nothing but its header read."""

    gguf: GGUFFile
    spec: ModelSpec
    dense: Mapping[str, TensorInfo]
    experts: ExpertMap


def load_model(config: EngineConfig) -> Model:
    """Read and check a model's header.

    Raises:
        ModelFileError: the file is malformed or not supported.
    """
    gguf = read_gguf(config.path)
    spec = model_spec(gguf)
    experts = map_experts(gguf, n_layers=spec.n_layers, n_experts=spec.n_experts, d_model=spec.d_model, d_ff=spec.d_ff)
    return Model(gguf=gguf, spec=spec, dense=dense_tensors(spec, gguf), experts=experts)
