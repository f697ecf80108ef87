"""One-off reads of byte ranges, which production starts first and awaits later."""

from __future__ import annotations

import numpy as np
import trio
from numpy.typing import NDArray

from mer.io.reader import Reader, start_extent


async def read_extent(reader: Reader, file: int, offset: int, n_bytes: int) -> NDArray[np.uint8]:
    """Read any byte range of a file, as `start_extent` and `PendingExtent.wait` do; it may be empty.

    If cancelled, the memory goes back to the system as soon as the read has landed.
    """
    if n_bytes == 0:
        await trio.lowlevel.checkpoint()
        return np.empty(0, dtype=np.uint8)
    return await start_extent(reader, file, offset, n_bytes).wait()
