"""Priorities of reads."""

from __future__ import annotations

import enum


class Priority(enum.IntEnum):
    """Of a read, and of the slot that it needs; the smaller goes first."""

    DEMAND = 0  # the running layer computes with it
    READ_AHEAD = 1  # a layer that comes next is certain to need it
    PREFETCH = 2  # a guess
