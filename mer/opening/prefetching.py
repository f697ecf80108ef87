"""Prefetching of an engine: the mode in force, and predictors that learn from run to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import attrs
import trio

from mer.config import EngineConfig, PrefetchMode
from mer.errors import ConfigError
from mer.io.file_reader import FileReader
from mer.model.loading import Model
from mer.paths import cache_folder, make_private_folder
from mer.plan.plan import MemoryPlan
from mer.sched.predictor_file import PredictorFileError, load_predictor, save_predictor
from mer.sched.predictors.markov import MarkovPredictor

logger = logging.getLogger(__name__)


def prefetch_mode(config: EngineConfig, plan: MemoryPlan) -> PrefetchMode:
    """Return the mode in force: off where every expert has a slot, so that nothing is left to guess."""
    return "off" if plan.slots == plan.total_experts else config.prefetch


@attrs.frozen
class Experience:
    """Markov chains of earlier runs, and the file in which they are kept, if there is a place for it."""

    markov: MarkovPredictor | None
    path: Path | None
    fingerprint: bytes

    def save(self, markov: MarkovPredictor | None) -> None:
        """Keep what has been learnt; a failure is logged, as it costs the next run its experience and nothing else."""
        if self.path is None or markov is None or not any(markov.visits):
            return
        try:
            make_private_folder(self.path.parent)
            save_predictor(self.path, markov, self.fingerprint)
        except OSError as error:
            logger.warning("what was learnt for prefetching is lost: %s", error)


def _path(fingerprint: bytes) -> Path | None:
    """Return the file of a model's Markov chains, or None if there is no cache folder, which is logged."""
    try:
        return cache_folder() / "predictors" / f"{fingerprint.hex()}.markov"
    except ConfigError as error:
        logger.warning("what is learnt for prefetching is not kept: %s", error)
        return None


async def load_experience(model: Model, mode: PrefetchMode, fingerprint: bytes) -> Experience:
    """Load what earlier runs have learnt of the model, if the mode has use for it."""
    spec = model.spec
    path = None if mode in ("off", "gate") else _path(fingerprint)

    def load(path: Path) -> MarkovPredictor | None:
        try:
            return load_predictor(
                path, fingerprint=fingerprint, n_layers=spec.n_routed, n_experts=spec.n_experts, top_k=spec.top_k
            )
        except FileNotFoundError:
            return None
        except (OSError, PredictorFileError) as error:
            logger.warning("prefetching learns from the start: %s", error)
            return None

    return Experience(None if path is None else await trio.to_thread.run_sync(load, path), path, fingerprint)


def measured_rate(reader: FileReader) -> Callable[[], float]:
    """Return what tells the rate of a reader while it reads, in bytes per second; 0 as long as it is unknown."""

    def bytes_per_s() -> float:
        statistics = reader.statistics()
        return statistics.bytes_read / statistics.busy_s if statistics.busy_s else 0.0

    return bytes_per_s
