"""Words (int64) by which a compute job and a reader share reads; see `mer.io.loan.loan`.

The control block names all other tables. The numbers below are those of words in it, and in a row of each table.
"""

from __future__ import annotations

from typing import Final

from mer.limits import MAX_MATRICES

MAX_LOGGED: Final = 1024
"""Most experts that one job reads."""

# the control block
STOP: Final = 0  # whether the job is to begin no more reads
RING: Final = 1  # file descriptor of the ring
SQ_TAIL: Final = 2  # addresses of words and tables of the ring
SQ_MASK: Final = 3  # of indices
SQES: Final = 4
CQ_HEAD: Final = 5
CQ_TAIL: Final = 6
CQ_MASK: Final = 7
CQES: Final = 8
DEPTH: Final = 9  # reads that may be in flight at once
N_LAYERS: Final = 10
N_EXPERTS: Final = 11  # of a layer
EXPERTS: Final = 12  # address of the table of experts, [L, E, EXPERT_WORDS]
ADDRESSES: Final = 13  # address of the table of residents, see `RunResident`
FREE: Final = 14  # address of [classes]: whether a slot of the class is free, so that none has to be taken
USED: Final = 15  # address of [L, E]: the SERIAL of the last job that needed the expert to stay
VALUES: Final = 16  # addresses of what residents are worth, see `Ranks`
WEIGHTS: Final = 17
PATIENCE: Final = 18
LOG: Final = 19  # address of the log
N_LOGGED: Final = 20
SERIAL: Final = 21  # of the log's first entry; serials are never used twice
NEXT: Final = 22  # the first read, N_PARTS * entry + part, that the kernel does not have yet
IN_FLIGHT: Final = 23  # reads that it has
WAITED_NS: Final = 24  # time that the job had nothing to do but to wait
GIVE_UP_NS: Final = 25  # how long after its reads of a layer began a job waits for them
SCRATCH: Final = 26  # three words for system calls
N_PARTS: Final = 29  # matrices of an expert
CONTROL_WORDS: Final = 30
# an expert: the class of its slot, and for each matrix what is read and where to
KIND: Final = 0
PART: Final = 1  # the first matrix's words begin here; there is room for those of `MAX_MATRICES`
FILE, START, LENGTH, NEEDED, BEGIN, LEAD = range(6)  # descriptor; bytes of the file; in the slot; before the matrix
PART_WORDS: Final = 6
EXPERT_WORDS: Final = PART + MAX_MATRICES * PART_WORDS

# an entry of the log
LAYER, EXPERT, BASE, VICTIM, ARRANGED, BEGUN_NS, ENDED_NS, RESULT = range(8)
# BASE: address of the slot; VICTIM: layer * E + expert of whose slot it was; ARRANGED: whether the job has computed
# with it, so that it is not raw any more; RESULT: a word for each matrix
LOG_WORDS: Final = RESULT + MAX_MATRICES
PENDING: Final = -(1 << 40)  # a result that is not known yet

TOKEN_BIT: Final = 1 << 62
"""Tells the tokens of a job's reads, TOKEN_BIT + 4 * serial + part, from a reader's own."""
