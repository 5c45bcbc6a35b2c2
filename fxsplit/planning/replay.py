"""The simulation of a schedule whose orders do not depend on times, for very many candidates at once.

The orders are run through as `fxsplit.schedules.simulate` does, with an array of times in place of each. Where a
worker receives from several others, packets pass its decoder in an order that does depend on times: there they do
not wait for those of other senders. So this is never more than the simulation, and the same for two workers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fxsplit.errors import PlanError
from fxsplit.planning.bounds import FloatArray, HopBound
from fxsplit.planning.bounds import Work as Seconds
from fxsplit.schedules import Action, Times, Work, schedule
from fxsplit.schedules.replicas import replica_for, single_workers
from fxsplit.schedules.simulation import replayed


@lru_cache(maxsize=64)
def actions_of(name: str, workers: tuple[str, ...], chunks: int) -> tuple[Action, ...]:
    """The actions of a step, each after all that it needs; none if the orders depend on times, or are refused."""
    kind, times = schedule(name), Times.unit(len(workers))
    if kind.follows_times:
        return ()
    try:
        return replayed(kind.orders(workers, chunks, times), workers, times).actions
    except PlanError:
        return ()


def step_bound(actions: Sequence[Action], seconds: Seconds) -> FloatArray:
    """Seconds of a training step at least.

    Args:
        actions: of `actions_of`.
        seconds: of a micro-batch, arrays over the candidates.
    """
    found = none = np.zeros(())
    free: dict[object, FloatArray] = defaultdict(lambda: none)
    ready: dict[tuple[int, int, bool], FloatArray] = defaultdict(lambda: none)  # stage, micro-batch, is forward
    workers, last = seconds.workers, len(seconds.workers) - 1

    def send(sender: int, receiver: int, m: int, hop: HopBound | None, made: FloatArray) -> FloatArray:
        here, there = replica_for(workers[sender], m), replica_for(workers[receiver], m)
        if hop is None or here == there:
            return made
        encoded = _occupy(free, (here, "encode"), made, hop.encode)
        sent = _occupy(free, (here, there), encoded, hop.wire)
        return _occupy(free, (here, there, "decode"), sent + hop.latency, hop.decode)

    for action in actions:
        stage, m = action.stage, action.micro_batch
        worker = replica_for(workers[stage], m)
        begin = np.maximum(free[worker], ready[stage, m, action.is_forward])
        if action.is_forward:
            end = free[worker] = begin + seconds.forward[stage]
            ready[stage, m, False] = np.maximum(ready[stage, m, False], end)
            for target in range(stage + 1, last + 1):
                hop = seconds.there.get((stage, target))
                if hop is not None or target == stage + 1:
                    came = send(stage, target, m, hop, end)
                    ready[target, m, True] = np.maximum(ready[target, m, True], came)
            continue
        share = 1.0 if action.work is Work.BACKWARD else 0.5
        end = free[worker] = begin + share * seconds.backward[stage]
        if seconds.reduce:
            found = np.maximum(found, end + seconds.reduce[stage])
        for source in range(stage) if action.sends_gradients else ():
            hop = seconds.back.get((source, stage))
            if hop is not None or source == stage - 1:
                came = send(stage, source, m, hop, end)
                ready[source, m, False] = np.maximum(ready[source, m, False], came)
    for worker in single_workers(workers):
        found = np.maximum(found, free[worker])
    return found


def _occupy(
    free: dict[object, FloatArray], resource: object, begin: FloatArray, seconds: FloatArray
) -> FloatArray:
    """When a resource has done its work; who has none for it does not wait for it."""
    is_used = seconds > 0
    end = np.where(is_used, np.maximum(begin, free[resource]) + seconds, begin)
    free[resource] = np.where(is_used, end, free[resource])
    return end
