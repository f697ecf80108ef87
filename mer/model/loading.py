"""A model file's header, read and checked."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from mer.config import EngineConfig
from mer.io.extents import ExpertMap
from mer.io.gguf import GGUFFile, TensorInfo, read_gguf
from mer.model.dense import dense_tensors
from mer.model.experts import map_experts
from mer.model.registry import model_spec
from mer.model.spec import ModelSpec
from mer.model.streamed import streamed


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
    return check_model(read_gguf(config.path))


def check_model(gguf: GGUFFile, *, stream_dense: bool = False) -> Model:
    """Return the model in a file whose header is read, with every shape and type proven.

    Args:
        gguf: the file.
        stream_dense: let the feed-forward networks of a dense model stream; see `mer.model.streamed`.

    Raises:
        ModelFileError: the file is malformed or not supported.
    """
    spec = model_spec(gguf)
    if stream_dense and not spec.routed:
        spec = streamed(spec)
    dense = dense_tensors(spec, gguf)
    experts = map_experts(gguf, {layer: it.weights for layer, it in spec.routed.items()}, spec.skips)
    return Model(gguf=gguf, spec=spec, dense=dense, experts=experts)
