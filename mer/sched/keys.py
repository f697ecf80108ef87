"""The name of an expert within a model."""

from __future__ import annotations

from typing import TypeAlias

ExpertKey: TypeAlias = tuple[int, int]
"""(layer, expert)"""
