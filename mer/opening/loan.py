"""Loan of the reader to jobs, so that they read missing experts themselves, or the reason against it."""

from __future__ import annotations

from mer.compute.messages import Tier
from mer.io.arena import Arena
from mer.io.extents import ExpertMap, SlotClasses
from mer.io.loan.lender import Lender
from mer.io.loan.loan import Loan, small_enough
from mer.sched.cache import ExpertCache
from mer.units import format_bytes


def open_loan(
    experts: ExpertMap,
    classes: SlotClasses,
    arena: Arena,
    lender: Lender | None,
    reason: str,
    cache: ExpertCache,
    tier: Tier | None,
) -> tuple[Loan | None, str]:
    """Return the loan to jobs that read missing experts, and "on", or None and why there is none.

    Experts with a matrix of more than a chunk are left to the reader: compared with such reads, a way through the event
    loop takes no time.

    Args:
        experts: where every expert lies.
        classes: the sizes of the slots.
        arena: their memory.
        lender: the reader, if it can be lent.
        reason: why it cannot.
        cache: the residents.
        tier: experts in the worker's own memory.
    """
    ranks = cache.ranks
    if not experts.experts:
        return None, "off: the model has no routed experts"
    if tier is not None:
        return None, "off: the device's own memory is looked at first"
    if lender is None:
        return None, f"off: {reason}"
    if ranks is None:
        return None, f"off: the policy {cache.statistics().policy} has to be asked who leaves"
    if not small_enough(experts, classes.alignment, lender.chunk_bytes):
        return None, f"off: a matrix of an expert is larger than {format_bytes(lender.chunk_bytes)}"
    if lender.mirrored:
        return None, "off: mirrors share what there is to read"
    assert cache.addresses is not None
    return Loan(experts, classes, arena, lender, cache.addresses, ranks), "on"
