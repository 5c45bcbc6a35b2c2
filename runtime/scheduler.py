"""The orders of a pipeline's steps: from its schedule, and for `auto` from what was measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fxsplit.errors import PlanError
from fxsplit.planning import Plan
from fxsplit.runtime.report import Span
from fxsplit.schedules import Hop, Orders, StageTimes, Timeline, Times, check, schedule, simulate

_WORTH_A_CHANGE = 0.05
"""Share of the step by which other orders have to be shorter to take the place of those there are."""


class Scheduler:
    """Makes and checks orders before a step runs, and learns from the steps.

    What was measured is looked at after steps 1, 2, 4, 8 and so on: the first ones pay for compilation and
    allocation, and later ones hardly differ. Orders stay unless others are clearly better: what is measured
    varies from step to step. The numbers of a step do not depend on the orders.

    Args:
        plan: names the schedule and the workers, and predicts the first times.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.times = plan.times
        self._schedule = schedule(plan.schedule)
        self._steps = 0
        self._made: tuple[Orders, Timeline] | None = None
        self._last: Orders | None = None

    def orders(self) -> Orders:
        """The orders of the next step.

        Raises:
            PlanError: the schedule breaks its own rules.
        """
        return self._checked()[0]

    def timeline(self) -> Timeline:
        """The simulation of the next step."""
        return self._checked()[1]

    def observe(self, spans: Iterable[Span]) -> None:
        """Learns from what a step was measured to take."""
        self._steps += 1
        if self._steps & (self._steps - 1) == 0:
            self.times = measured_times(self.times, spans)
            if self._schedule.follows_times:
                self._made = None

    def learn_bytes(self, stage_bytes: Mapping[int, int]) -> None:
        """Learns what one micro-batch of each stage was counted to keep."""
        stages = tuple(
            replace(times, live_bytes=stage_bytes.get(stage, times.live_bytes))
            for stage, times in enumerate(self.times.stages)
        )
        self.times = replace(self.times, stages=stages)
        self._made = None

    def _checked(self) -> tuple[Orders, Timeline]:
        if self._made is None:
            workers, chunks = self.plan.workers, self.plan.chunks
            orders: Orders = self._schedule.orders(workers, chunks, self.times)
            if self._last is not None and self._schedule.follows_times:
                known_s = simulate(self._last, workers, self.times).step_s
                if simulate(orders, workers, self.times).step_s > (1.0 - _WORTH_A_CHANGE) * known_s:
                    orders = self._last
            self._last = orders
            timeline = check(orders, workers, chunks, self.times)
            for stage, live in enumerate(timeline.live):
                limit = self._schedule.live_limit(stage, workers, chunks)
                if live > limit:
                    raise PlanError(
                        f"{self._schedule.name} keeps more micro-batches than it may",
                        where=f"stage {stage}",
                        found=f"{live}",
                        allowed=f"{limit}",
                    )
            self._made = orders, timeline
        return self._made


def _measured_stage(before: StageTimes, found: Mapping[str, float]) -> StageTimes:
    """The backward as it was not run, in one piece or in two parts, changes as the one that was."""
    loss_s, forward_s = found.get("loss", 0.0), found.get("F", before.forward_s)
    reduce_s = found.get("reduce", before.reduce_s)
    if "B" in found:
        backward_s = found["B"] + loss_s
        ratio = backward_s / before.backward_s if before.backward_s else 1.0
        parts = ratio * before.input_s, ratio * before.weight_s
    elif "I" in found:
        parts = found["I"] + loss_s, found.get("W", 0.0)
        known = before.input_s + before.weight_s
        backward_s = before.backward_s * (sum(parts) / known if known else 1.0)
    else:
        return replace(before, forward_s=forward_s, reduce_s=reduce_s)
    return replace(
        before,
        forward_s=forward_s,
        input_s=parts[0],
        weight_s=parts[1],
        backward_s=backward_s,
        reduce_s=reduce_s,
    )


def measured_times(before: Times, spans: Iterable[Span]) -> Times:
    """The medians over the micro-batches of a step; what was not measured stays as it was."""
    sums: defaultdict[tuple[str, int, int], defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        sums[span.kind, span.source, span.target][span.micro_batch] += span.seconds
    found = {key: statistics.median(by_micro_batch.values()) for key, by_micro_batch in sums.items()}
    stages = []
    for stage, times in enumerate(before.stages):
        stages.append(_measured_stage(times, {kind: s for (kind, of, _), s in found.items() if of == stage}))
    pairs = set(before.forward) | {(s, t) for kind, s, t in found if kind == "send" and 0 <= s < t < len(stages)}

    def hop(known: Hop, source: int, target: int) -> Hop:
        return Hop(
            found.get(("encode", source, target), known.encode_s),
            found.get(("send", source, target), known.wire_s),
            0.0 if ("send", source, target) in found else known.latency_s,  # `send` ends when it has arrived
            found.get(("decode", source, target), known.decode_s),
        )

    return Times(
        tuple(stages),
        {(s, t): hop(before.forward.get((s, t), Hop()), s, t) for s, t in pairs},
        {(s, t): hop(before.backward.get((s, t), Hop()), t, s) for s, t in pairs},
    )
