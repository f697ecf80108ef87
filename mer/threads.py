"""Starting threads with a small stack."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

STACK_BYTES = 512 << 10
_lock = threading.Lock()  # threading.stack_size is one setting for the whole process


def _begin_child() -> None:
    """Replace the lock in a forked child, as a thread that is not there may have held it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_child)


def start_thread(target: Callable[..., Any], *arguments: Any, name: str) -> threading.Thread:
    """Start a daemon thread whose stack reserves `STACK_BYTES` of the process's data limit instead of 8 MiB.

    Raises:
        RuntimeError: the system refuses the thread.
    """
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    with _lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread
