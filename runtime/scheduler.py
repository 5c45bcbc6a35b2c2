"""The orders of a pipeline's steps: from its schedule, and for `auto` from what was measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fxsplit.errors import PlanError
from fxsplit.planning import Plan
from fxsplit.runtime.report import Span
from fxsplit.schedules import Hop, Orders, Timeline, Times, check, schedule


class Scheduler:
    """Makes and checks orders before a step runs, and learns from the steps.

    What was measured is looked at after steps 1, 2, 4, 8 and so on: the first ones pay for compilation and
    allocation, and later ones hardly differ. The numbers of a step do not depend on the orders.

    Args:
        plan: names the schedule and the workers, and predicts the first times.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.times = plan.times
        self._schedule = schedule(plan.schedule)
        self._steps = 0
        self._made: tuple[Orders, Timeline] | None = None

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
            orders = self._schedule.orders(workers, chunks, self.times)
            timeline = check(orders, workers, chunks, self.times)
            for stage, live in enumerate(timeline.live):
                limit = self._schedule.live_limit(stage, len(workers), chunks)
                if live > limit:
                    raise PlanError(
                        f"{self._schedule.name} keeps more micro-batches than it may",
                        where=f"stage {stage}",
                        found=f"{live}",
                        allowed=f"{limit}",
                    )
            self._made = orders, timeline
        return self._made


def measured_times(before: Times, spans: Iterable[Span]) -> Times:
    """The medians over the micro-batches of a step; what was not measured stays as it was."""
    sums: defaultdict[tuple[str, int, int], defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        sums[span.kind, span.source, span.target][span.micro_batch] += span.seconds
    found = {key: statistics.median(by_micro_batch.values()) for key, by_micro_batch in sums.items()}
    stages = []
    for stage, times in enumerate(before.stages):
        back = found.get(("B", stage, stage), times.backward_s) / 2
        loss = found.get(("loss", stage, stage), 0.0)
        changed = replace(
            times,
            forward_s=found.get(("F", stage, stage), times.forward_s),
            input_s=found.get(("I", stage, stage), back) + loss,
            weight_s=found.get(("W", stage, stage), back),
        )
        stages.append(changed)
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
