"""Readers that can be lent to a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mer.io.reader import Reader, ReadOperation
from mer.io.ring import RingAddresses


class Lender(Reader, Protocol):
    """A reader that can lend its ring to a job."""

    depth: int
    chunk_bytes: int

    @property
    def mirrored(self) -> bool:
        """Whether drives share the reading, so that nothing can be lent."""

    def lend(self) -> bool:
        """Leave the ring to a job until `take_back`, unless a read is in flight or queued; return whether it is lent.

        Operations that are started meanwhile wait.
        """

    def ring_addresses(self) -> RingAddresses:
        """Return where the ring is, as long as the reader is open."""

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors of the files."""

    def take_back(self) -> None:
        """Take over the ring again; `adopt` must follow for every read that the job has begun and not seen end."""

    def adopt(self, operation: ReadOperation, token: int, result: int | None, begun_s: float) -> ReadOperation:
        """Go on with a read that a job has begun, as if it had been started here.

        Args:
            operation: the read, of one chunk.
            token: of the read in the ring.
            result: bytes read or a negative error number; None if it is in flight.
            begun_s: when the job began it.

        Returns:
            The operation that will land in its place, with its `on_landed`; as a rule itself.
        """

    def account(self, lengths: Sequence[int], begun_s: float, ended_s: Sequence[float]) -> None:
        """Count reads of so many bytes that a job has begun together, and that have landed, in this order."""
