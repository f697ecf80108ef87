"""The file that the streaming benchmark reads: a GGUF of nothing but experts, random but always the same."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs
import numpy as np
from numpy.typing import NDArray

from mer.bench.geometry import Geometry
from mer.demo.files import written_whole
from mer.errors import ConfigError, GGUFError, MerError
from mer.io.arena import PAGE_BYTES
from mer.io.extents import PROJECTIONS, ExpertMap, round_up
from mer.io.ggml import GGMLType
from mer.io.gguf import GGUFFile, read_gguf
from mer.model.experts import map_experts
from mer.model.operators import ExpertWeights, gated_experts
from mer.paths import make_private_folder
from mer.units import format_bytes

ARCHITECTURE: Final = "mer-bench-stream"
VERSION: Final = 1  # of the bytes that a geometry gives
VERSION_KEY: Final = "mer.bench.stream.version"
MAX_EXPERTS: Final = 1 << 16  # of all layers: each needs three entries in the file's header
_HEADER_BYTES_PER_EXPERT: Final = 3 * 96  # at least; what the header takes is nothing compared with the data
_RESERVE_BYTES: Final = 256 << 20  # of disk space that is left to others


class NotEnoughDisk(MerError):
    """The benchmark's data file does not fit on the disk."""


class DataFileBusy(MerError):
    """Another process is making a data file."""


@attrs.frozen(kw_only=True)
class DataPlan:
    """The data file of a workload: where it lies and how large it is."""

    path: Path
    folder: Path  # of data files that nobody has named another place for
    geometry: Geometry
    n_layers: int
    n_experts: int  # per layer

    @property
    def stride_bytes(self) -> int:
        """Bytes from one expert to the next: its matrices lie one after the other, each on whole pages."""
        return len(PROJECTIONS) * round_up(self.geometry.part_bytes, PAGE_BYTES)

    @property
    def n_bytes(self) -> int:
        """Bytes of the file, about."""
        total = self.n_layers * self.n_experts
        return total * (self.stride_bytes + _HEADER_BYTES_PER_EXPERT)


@attrs.frozen(kw_only=True)
class DataFile:
    """A data file that is there."""

    plan: DataPlan
    gguf: GGUFFile
    experts: ExpertMap

    def extent(self, layer: int, expert: int) -> tuple[int, int]:
        """Return offset and length of all of one expert's bytes; the offset is a multiple of a page."""
        parts = self.experts.experts[layer][expert].parts
        return parts[0].offset, parts[2].offset + parts[2].n_bytes - parts[0].offset


def plan_data(folder: Path, geometry: Geometry, n_layers: int, n_experts: int, *, path: Path | None = None) -> DataPlan:
    """Return the plan of a data file, by default one in `folder` that is named after what it holds.

    Raises:
        ConfigError: there are too many experts for one file.
    """
    if n_layers * n_experts > MAX_EXPERTS:
        raise ConfigError(
            f"{n_layers} layers of {n_experts} experts are {n_layers * n_experts} experts; a data file holds up to "
            f"{MAX_EXPERTS}"
        )
    if path is None:
        shape = f"{n_layers}x{n_experts}-{geometry.d_model}x{geometry.d_ff}"
        path = folder / f"stream-{shape}-{geometry.type.name.lower()}.gguf"
    return DataPlan(path=path, folder=folder, geometry=geometry, n_layers=n_layers, n_experts=n_experts)


def open_data(plan: DataPlan) -> DataFile | None:
    """Return the data file of a plan, proven to hold what the plan says; None if there is no file yet.

    Raises:
        GGUFError: the file is malformed, was cut off, or holds other experts.
        ReadError: it cannot be read.
    """
    if not plan.path.exists():
        return None
    gguf, geometry = read_gguf(plan.path), plan.geometry
    remedy = "delete it, or name another file with --data"
    if gguf.metadata.get("general.architecture") != ARCHITECTURE or gguf.metadata.get(VERSION_KEY) != VERSION:
        raise GGUFError(plan.path, None, f"not a data file of this version of `mer bench stream`; {remedy}")
    try:
        experts = map_experts(gguf, dict(enumerate(expert_weights(plan))))
    except GGUFError as error:
        raise GGUFError(plan.path, error.offset, f"a data file of other experts ({error.reason}); {remedy}") from error
    if any(tensor.type != geometry.type for tensor in gguf.tensors.values()):
        raise GGUFError(plan.path, None, f"a data file of weights that are not {geometry.type.name}; {remedy}")
    return DataFile(plan=plan, gguf=gguf, experts=experts)


def make_data(plan: DataPlan, on_progress: Callable[[int, int], None]) -> None:
    """Write the data file of a plan; it is there whole or not at all.

    Args:
        plan: what to write, and where.
        on_progress: called with the bytes written and the bytes in all, after every expert.

    Raises:
        NotEnoughDisk: the file would not fit.
        ConfigError: the folder that was named does not exist.
        DataFileBusy: another process is making a data file.
        OSError: the file cannot be written.
    """
    make_private_folder(plan.folder)
    folder = plan.path.parent
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; make it, or name another file with --data")
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < plan.n_bytes + _RESERVE_BYTES:
        raise NotEnoughDisk(
            f"the data file {plan.path} takes {format_bytes(plan.n_bytes)}; {folder} has {format_bytes(free_bytes)} of "
            f"free disk space, of which {format_bytes(_RESERVE_BYTES)} are left alone; choose smaller experts with "
            "--geometry, or a file on a larger disk with --data"
        )
    with _only_one(plan.folder), written_whole(plan.path) as part:
        _write(part, plan, on_progress)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold a lock inside the block, which ends with the process, however that ends."""
    with open(folder / "stream.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataFileBusy("another process is making a data file for `mer bench stream`; wait for it") from None
        yield


def _write(path: Path, plan: DataPlan, on_progress: Callable[[int, int], None]) -> None:
    """Write header and experts; one matrix is in memory at a time."""
    import gguf

    geometry = plan.geometry
    total, done = plan.n_layers * plan.n_experts * geometry.expert_bytes, 0
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    with contextlib.closing(writer):
        writer.add_custom_alignment(PAGE_BYTES)
        writer.add_uint32(VERSION_KEY, VERSION)
        writer.add_description("Random experts for `mer bench stream`; this is no language model.")
        for name, rows, cols in _matrices(plan):
            writer.add_tensor_info(
                name, (rows, cols), np.dtype(np.float32), geometry.part_bytes, gguf.GGMLQuantizationType(geometry.type)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, (_, rows, cols) in enumerate(_matrices(plan)):
            writer.write_tensor_data(random_matrix(geometry.type, rows, cols, number))
            done += geometry.part_bytes
            if number % len(PROJECTIONS) == len(PROJECTIONS) - 1:
                on_progress(done, total)


def expert_weights(plan: DataPlan) -> list[ExpertWeights]:
    """Return the experts of each layer."""
    shape = plan.n_experts, plan.geometry.d_model, plan.geometry.d_ff
    return [gated_experts(layer, *shape) for layer in range(plan.n_layers)]


def _matrices(plan: DataPlan) -> Iterator[tuple[str, int, int]]:
    """Yield name, rows and columns of every matrix in the order of the file: expert by expert."""
    for experts in expert_weights(plan):
        for expert in range(experts.n):
            for matrix in experts.matrices:
                yield matrix.single(expert), matrix.rows, matrix.cols


def random_matrix(kind: GGMLType, rows: int, cols: int, number: int) -> NDArray[np.uint8]:
    """Return the bytes of matrix `number`, the same on every machine and with every release of NumPy.

    Weights are as large as they have to be for `rows` sums over `cols` products with values around 1 to be around 1 as
    well: about 1 / sqrt(cols). Every bit that does not decide that is random, signs too.
    """
    n_bytes = rows * cols // kind.block_size * kind.block_bytes
    generator = np.random.PCG64(np.random.SeedSequence([VERSION, number]))
    raw = np.asarray(generator.random_raw(-(-n_bytes // 8)), "<u8").view(np.uint8)[:n_bytes]
    octaves = (cols.bit_length() - 1) // 2  # cols is about 4 ** octaves
    if kind == GGMLType.F32:
        floats = raw.view("<u4")
        floats &= 0x807FFFFF
        floats |= (127 - octaves - 1) << 23
    else:  # Q4_0: a float16 scale and 32 weights of -8 to 7, whose root mean square is 4.6
        scales = raw.reshape(-1, kind.block_bytes)[:, :2].view("<u2")
        scales &= 0x83FF
        scales |= (15 - octaves - 3) << 10
    return raw
