"""The largest numbers that a file may claim: caps that no real model meets, checked before anything of that size is
built. docs/limits.md says how far above real models each is.
"""

from __future__ import annotations

from typing import Final

# Hyperparameters of a model, and of what is saved of one: traces, heat profiles, predictors.
MAX_LAYERS: Final = 1024
MAX_EXPERTS_PER_LAYER: Final = 4096
MAX_EXPERTS: Final = 1 << 16
"""Routed experts of all layers together."""
MAX_TOP_K: Final = 128
"""Experts that a token uses in a layer."""
MAX_GROUPS: Final = 32
"""Of a layer's experts."""
MAX_WIDTH: Final = 1 << 18
"""Of the residual stream (D), and of an expert's hidden layer (F)."""
MAX_HEADS: Final = 1024
MAX_HEAD_DIM: Final = 2048
MAX_VOCAB: Final = 1 << 20
MAX_CONTEXT: Final = 1 << 31

# The structure of a GGUF model, all of its parts together where nothing else is said.
MAX_PARTS: Final = 1024
MAX_HEADER_BYTES: Final = 256 << 20
MAX_KEYS: Final = 1 << 12
"""Of one part."""
MAX_TENSORS: Final = 1 << 15
MAX_STRINGS: Final = 1 << 20
"""In arrays of strings: tokens and merges of the largest vocabularies are three quarters of it."""
MAX_KEY_BYTES: Final = (1 << 16) - 1
MAX_NAME_BYTES: Final = 64
"""Of a tensor's name."""
MAX_DIMS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20

MAX_MATRICES: Final = 3
"""Most matrices of an expert: tables have room for as many."""
