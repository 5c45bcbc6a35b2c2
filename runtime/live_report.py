"""What a step's activations take on every worker: counted, and as the simulation of its schedule says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fxsplit.runtime.engine import Engine


@dataclass(frozen=True)
class LiveMemory:
    """Activations that are kept at one time, at most: what autograd saves and what the executor holds.

    Attributes:
        counted_bytes: by worker, in a step.
        simulated_bytes: by worker, by the schedule's simulation, from what one micro-batch of each stage keeps.
        planned_bytes: by worker, by the simulation, from the plan's estimate before any micro-batch ran.
        counted: micro-batches that each stage kept in that step.
        simulated: micro-batches that each stage keeps by the simulation.
    """

    counted_bytes: Mapping[str, int]
    simulated_bytes: Mapping[str, int]
    planned_bytes: Mapping[str, int]
    counted: tuple[int, ...]
    simulated: tuple[int, ...]


def live_memory(engine: Engine, step: Callable[[], Any]) -> LiveMemory:
    """Runs a step twice, counting: what one micro-batch keeps, and then the peak.

    Args:
        engine: of the pipeline.
        step: runs one `Pipeline.step`.
    """
    engine.broadcast("count_memory", True)
    try:
        planned = engine.scheduler.timeline().live_bytes
        step()
        engine.scheduler.learn_bytes(engine.metrics.stage_bytes)
        timeline = engine.scheduler.timeline()
        engine.metrics.live_bytes.clear()
        engine.metrics.live_micro_batches.clear()
        step()
    finally:
        engine.broadcast("count_memory", False)
    live = engine.metrics.live_micro_batches
    return LiveMemory(
        dict(engine.metrics.live_bytes),
        timeline.live_bytes,
        planned,
        tuple(live[stage] for stage in sorted(live)),
        timeline.live,
    )
