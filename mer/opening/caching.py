"""Cache policy, heat profile and routing trace of an engine that opens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import attrs
import trio

from mer.config import EngineConfig
from mer.errors import ConfigError
from mer.model.loading import Model
from mer.plan.plan import MemoryPlan
from mer.sched.heat import HeatCounter, HeatProfile
from mer.sched.policies.registry import DEFAULT_POLICY, CacheShape, make_policy
from mer.sched.policy import Policy
from mer.sched.recorder import TraceRecorder
from mer.sched.trace import TraceHeader, TraceWriter


@attrs.frozen(kw_only=True)
class Residency:
    """Results of `open_residency`."""

    policy: Policy
    heat: HeatCounter
    recorder: TraceRecorder | None  # whose `run` is to be run, and which is to be closed

    def routed(self, layer: int, n_tokens: int, experts: Sequence[int]) -> None:
        """Note a layer's union of experts over a batch."""
        self.heat.use(layer, experts)
        if self.recorder is not None:
            self.recorder.routed(layer, n_tokens, experts)


async def open_residency(config: EngineConfig, model: Model, plan: MemoryPlan, fingerprint: bytes) -> Residency:
    """Make the policy, load its heat profile, and open the trace in a thread.

    Raises:
        ConfigError: there is no such policy, or it and the heat profile do not go together.
        ProfileError: the heat profile is malformed or of another model.
        TraceError: the trace exists and cannot be appended to.
        OSError: one of the files cannot be read or written.
    """
    spec = model.spec
    if not spec.routed:
        given = {"policy": config.policy, "heat": config.heat, "trace": config.trace}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name} is set, and the model is dense: it has no experts; drop it")
    name = DEFAULT_POLICY if config.policy is None else config.policy
    profile = None
    if config.heat is not None:
        if name != "static":
            raise ConfigError(
                f"heat is a profile for the policy 'static', and the policy is {name!r}; drop one of them"
            )
        profile = HeatProfile.load(
            config.heat, fingerprint=fingerprint, n_layers=spec.n_routed, n_experts=spec.n_experts
        )
    expert_bytes = tuple(sum(e.n_bytes for e in layer) // len(layer) for layer in model.experts.experts)
    policy = make_policy(
        name,
        CacheShape(
            n_layers=spec.n_routed,
            n_experts=spec.n_experts,
            n_slots=plan.slots,
            kinds=plan.classes.kinds,
            slot_counts=plan.slot_counts,
            expert_bytes=expert_bytes,
            profile=profile,
        ),
    )
    recorder = None
    if config.trace is not None:
        header = TraceHeader(spec.n_routed, spec.n_experts, spec.top_k, fingerprint, expert_bytes)
        writer = await trio.to_thread.run_sync(partial(TraceWriter, config.trace, header))
        recorder = TraceRecorder(writer)
    return Residency(policy=policy, heat=HeatCounter(fingerprint, spec.n_routed, spec.n_experts), recorder=recorder)
