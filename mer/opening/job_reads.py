"""Whether jobs read missing experts by themselves."""

from __future__ import annotations

from mer.compute.messages import Tier
from mer.io.arena import Arena
from mer.io.job_reads import JobReads, small_enough
from mer.io.open_reader import OpenReader
from mer.io.ring_reader import RingReader
from mer.model.loading import Model
from mer.plan.plan import MemoryPlan
from mer.sched.cache import ExpertCache
from mer.units import format_bytes


def open_job_reads(
    model: Model, plan: MemoryPlan, arena: Arena, opened: OpenReader, cache: ExpertCache, tier: Tier | None
) -> tuple[JobReads | None, str]:
    """Return what jobs are lent for reads of their own, and "on", or None and why they are not.

    Experts of which a matrix is more than a chunk are left to the reader: beside such reads, a way through the event
    loop takes no time.
    """
    ranks, reader = cache.ranks, opened.reader
    if tier is not None:
        return None, "off: the device's own memory is looked at first"
    if not isinstance(reader, RingReader):
        return None, f"off: only io_uring can be lent ({opened.reason})"
    if ranks is None:
        return None, f"off: the policy {cache.statistics().policy} has to be asked who leaves"
    if not small_enough(model.experts, plan.classes.alignment, reader.chunk_bytes):
        return None, f"off: a matrix of an expert is larger than {format_bytes(reader.chunk_bytes)}"
    if reader.mirrored:
        return None, "off: mirrors share what there is to read"
    assert cache.addresses is not None
    return JobReads(model.experts, plan.classes, arena, reader, cache.addresses, ranks), "on"
