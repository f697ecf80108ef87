"""The families, by architecture: the tests run over all that can be run, and fail where one is missing here."""

from __future__ import annotations

from typing import Final

from tests._lib.families import dense, experts, gemma, gpt_oss, mixtures
from tests._lib.families.family import Family

FAMILIES: Final[tuple[Family, ...]] = (
    dense.LLAMA,
    dense.QWEN2,
    dense.QWEN3,
    experts.MIXTRAL,
    experts.QWEN2_MOE,
    experts.QWEN3_MOE,
    mixtures.BAILING_MOE2,
    mixtures.DOTS1,
    mixtures.ERNIE4_5_MOE,
    mixtures.GLM4_MOE,
    mixtures.HUNYUAN_MOE,
    mixtures.LAGUNA,
    mixtures.MELLUM,
    mixtures.MINIMAX_M2,
    mixtures.OLMOE,
    mixtures.QWEN3_VL_MOE,
    experts.GRANITE_MOE,
    experts.GRANITE_SHARED,
    gemma.GEMMA4,
    gpt_oss.GPT_OSS,
)

CASES: Final[tuple[tuple[Family, str | None], ...]] = tuple(
    (family, variant) for family in FAMILIES for variant in (None, *family.variants)
)
"""Every family as it is, and in each of its variants."""
