"""One frozen snapshot of every actor, and the settings in force."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from mer.compute.messages import WorkerStatistics
from mer.io.fetch_counts import FetcherStatistics
from mer.io.files import IoMode
from mer.io.metering import ReaderStatistics
from mer.io.pool import PoolStatistics
from mer.sched.cache import CacheStatistics
from mer.sched.kv import KVStatistics
from mer.sched.prefetch import PrefetchStatistics
from mer.sched.recorder import TraceStatistics
from mer.sched.scheduler import SchedulerStatistics
from mer.sched.speculation import SpeculationStatistics


@attrs.frozen(kw_only=True)
class VRAMSettings:
    """Division of the device's own memory."""

    budget_bytes: int
    budget_source: str
    parts: Mapping[str, int]  # name -> bytes
    slots: int  # that keep experts
    slot_counts: tuple[int, ...]  # per class of slots
    slot_bytes: tuple[int, ...]
    dense: str  # where attention, router, head and KV are: "device" or "cpu"
    dense_reason: str
    hybrid: str  # "auto" or "off"
    pinned: str  # whether the slots in memory are pinned for copies, or why not


@attrs.frozen(kw_only=True)
class Settings:
    """Settings in force, set or chosen."""

    memory_bytes: int
    memory_source: str
    threads: int  # that may compute; `WorkerStatistics.active_threads` are those that do
    threads_source: str  # who set how many, or what limits them
    io_threads: int  # reads that each drive sees at once
    io_engine: str  # what reads: "io_uring" or "threads"
    io_reason: str  # why it does
    job_reads: str  # whether jobs read missing experts by themselves: "on", or "off: " and why
    mirrors: tuple[str, ...]  # copies on further drives
    slots: int
    slot_counts: tuple[int, ...]  # per class of slots
    slot_bytes: tuple[int, ...]  # of one slot of each class
    context: int
    kv_tokens: int
    prefix_reuse: bool
    max_sequences: int
    batch_tokens: int
    max_waiting: int  # requests that may be queued
    device: str  # "cpu", or the device with the card's name
    device_reason: str  # why it is this one
    vram: VRAMSettings | None  # None on the CPU
    kernels: str  # instruction-set form; on a device "triton" or "torch"
    wide_vectors: bool  # LLVM may use 512-bit vectors; false if numba was imported before it could be told so
    kernel_cache: str  # folder, or why compiled kernels are not kept
    activations: str  # precision of activations that meet the weights: int8, int15, or float32 for float weights
    kv_type: str  # of keys and values: f32, f16 or q8_0
    policy: str
    stream_dense: str  # "on" if the feed-forward networks of a dense model stream, else "off"
    prefetch: str  # mode in force
    heat: str | None  # path of the heat profile in use
    trace: str | None  # path of the routing trace that is being written
    io_modes: tuple[IoMode, ...]  # per file
    huge_pages: bool
    types: Mapping[str, int]  # weight type -> bytes in the file


@attrs.frozen(kw_only=True)
class Statistics:
    """A snapshot of the whole engine."""

    load_s: float  # from opening to ready
    dense_bytes_read: int  # at load
    bytes_read: int  # all reads of the files, header and alignment padding included
    stalled_s: float  # in which the scheduler waited for experts and had nothing to compute
    private_bytes: int  # anonymous memory and page tables now
    peak_rss_bytes: int
    settings: Settings
    scheduler: SchedulerStatistics
    cache: CacheStatistics
    read_ahead: SpeculationStatistics  # experts read because a layer to come is certain to need them
    prefetch: SpeculationStatistics  # experts read on a guess
    predictors: PrefetchStatistics | None  # None where prefetching is off
    pool: PoolStatistics
    fetcher: FetcherStatistics
    reader: ReaderStatistics
    worker: WorkerStatistics
    kv: KVStatistics
    trace: TraceStatistics | None
