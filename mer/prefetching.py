"""What an engine guesses with: predictors that learn from run to run."""

from __future__ import annotations

import logging
from pathlib import Path

import attrs
import trio

from mer.config import EngineConfig
from mer.io.chunks import DEFAULT_CHUNK_BYTES
from mer.io.file_reader import FileReader
from mer.paths import cache_folder
from mer.plan import MemoryPlan, Model
from mer.sched.fingerprint import model_fingerprint
from mer.sched.governor import PrefetchMode
from mer.sched.predictor_file import PredictorFileError, load_predictor, save_predictor
from mer.sched.predictors.markov import MarkovPredictor
from mer.sched.prefetch import DiskFacts, Prefetcher
from mer.sched.store import ExpertStore

logger = logging.getLogger(__name__)


def prefetch_mode(config: EngineConfig, plan: MemoryPlan) -> PrefetchMode:
    """Return the mode in force: off where every expert has a slot, so that nothing is left to guess."""
    return "off" if plan.slots == plan.total_experts else config.prefetch


@attrs.frozen
class Guessing:
    """A prefetcher, and the file in which its Markov chains are kept."""

    prefetcher: Prefetcher
    path: Path
    fingerprint: bytes

    def save(self) -> None:
        """Keep what has been learnt; a failure is logged, as it costs the next run its experience and nothing else."""
        markov = self.prefetcher.markov
        if markov is None or not any(markov.visits):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_predictor(self.path, markov, self.fingerprint)
        except OSError as error:
            logger.warning("what was learnt for prefetching is lost: %s", error)


async def open_guessing(
    config: EngineConfig, model: Model, plan: MemoryPlan, store: ExpertStore, reader: FileReader
) -> Guessing | None:
    """Make the prefetcher, with what earlier runs have learnt of the model; None if the mode in force is off."""
    mode = prefetch_mode(config, plan)
    if mode == "off":
        return None
    spec, fingerprint = model.spec, model_fingerprint(model.gguf)
    path = cache_folder() / "predictors" / f"{fingerprint.hex()}.markov"

    def bytes_per_s() -> float:
        statistics = reader.statistics()
        return statistics.bytes_read / statistics.busy_s if statistics.busy_s else 0.0

    def load() -> MarkovPredictor | None:
        try:
            return load_predictor(
                path, fingerprint=fingerprint, n_layers=spec.n_layers, n_experts=spec.n_experts, top_k=spec.top_k
            )
        except FileNotFoundError:
            return None
        except (OSError, PredictorFileError) as error:
            logger.warning("prefetching learns from the start: %s", error)
            return None

    prefetcher = Prefetcher(
        mode,
        store,
        DiskFacts(
            expert_bytes=lambda key: model.experts.experts[key[0]][key[1]].n_bytes,
            bytes_per_s=bytes_per_s,
            chunk_bytes=DEFAULT_CHUNK_BYTES,
        ),
        n_layers=spec.n_layers,
        n_experts=spec.n_experts,
        top_k=spec.top_k,
        markov=None if mode == "gate" else await trio.to_thread.run_sync(load),
    )
    return Guessing(prefetcher, path, fingerprint)
