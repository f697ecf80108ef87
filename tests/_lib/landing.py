"""Waiting for a fetch from a task: production hears of its end through a listener alone."""

from __future__ import annotations

import copy

import trio

from mer.io.fetch import Fetch, FetchListener


class _Events:
    """Hears of a fetch in front of its listener."""

    def __init__(self, behind: FetchListener | None) -> None:
        self.behind = behind
        self.inner, self.over = trio.Event(), trio.Event()

    def inner_landed(self, fetch: Fetch) -> None:
        self.inner.set()
        if self.behind is not None:
            self.behind.inner_landed(fetch)

    def landed(self, fetch: Fetch) -> None:
        self.inner.set()
        self.over.set()
        if self.behind is not None:
            self.behind.landed(fetch)


def _events(fetch: Fetch) -> _Events:
    listener = fetch._listener
    if not isinstance(listener, _Events):
        listener = _Events(listener)
        fetch.hand_over(listener)
    return listener


async def gate_up_landed(fetch: Fetch) -> None:
    """Wait until gate and up are in memory, or raise an instance of its own of the error that the fetch failed with."""
    await trio.lowlevel.checkpoint()
    if not fetch.inner_landed and not fetch.done:
        await _events(fetch).inner.wait()
    _check(fetch)


async def landed(fetch: Fetch) -> None:
    """Wait until all three are in memory, or raise an instance of its own of the error that the fetch failed with."""
    await trio.lowlevel.checkpoint()
    if not fetch.done:
        await _events(fetch).over.wait()
    _check(fetch)


def _check(fetch: Fetch) -> None:
    if fetch.error is not None:
        raise copy.copy(fetch.error) from fetch.error
    assert not (fetch.done and fetch.missing), "an abandoned fetch is waited for"
