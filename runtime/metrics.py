"""What was measured: bytes and seconds of every link, worker and stage, always on."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field, fields

from rich.console import Group
from rich.table import Table

from fxsplit.planning.units import format_bytes, format_seconds
from fxsplit.runtime.report import LinkTraffic, RunReport, Span

KEPT_REPORTS = 256
"""Reports whose spans are kept for a trace: one a worker and phase."""

_WORK = frozenset("FBIW") | {"loss"}


@dataclass(frozen=True)
class WorkerTime:
    """Seconds of one worker, or stage, over all steps: computing, coding, waiting for packets, and all-reduce."""

    compute_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    wait_s: float = 0.0
    reduce_s: float = 0.0

    def __add__(self, other: WorkerTime) -> WorkerTime:
        return WorkerTime(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def busy_s(self) -> float:
        """Seconds of the thread that computes."""
        return self.compute_s


@dataclass(frozen=True)
class Bandwidth:
    """What one direction between two workers carried, over all steps.

    Attributes:
        wire_bytes: as sent, values and gradients.
        busy_s: seconds that a packet was on its way.
        peak_bytes_per_s: of the fastest packet of at least `COUNTED_BYTES`.
    """

    COUNTED_BYTES = 1 << 10

    wire_bytes: int = 0
    busy_s: float = 0.0
    peak_bytes_per_s: float = 0.0

    def __add__(self, other: Bandwidth) -> Bandwidth:
        peak = max(self.peak_bytes_per_s, other.peak_bytes_per_s)
        return Bandwidth(self.wire_bytes + other.wire_bytes, self.busy_s + other.busy_s, peak)

    @classmethod
    def of(cls, span: Span) -> Bandwidth:
        """Of one packet."""
        is_counted = span.wire_bytes >= cls.COUNTED_BYTES and span.seconds > 0
        return cls(span.wire_bytes, span.seconds, span.wire_bytes / span.seconds if is_counted else 0.0)

    @property
    def busy_bytes_per_s(self) -> float:
        """Bytes over the seconds in which a packet was on its way."""
        return self.wire_bytes / self.busy_s if self.busy_s else 0.0


@dataclass
class Metrics:
    """Sums over the steps since the pipeline began, or since `reset()`.

    Attributes:
        calls: calls of the pipeline, and steps: batches.
        samples: samples in them.
        total_s: wall-clock seconds of the client in forward and backward.
        workers: seconds by worker.
        stages: seconds by stage; what is encoded counts for the stage that sends it.
        links: bytes by (source, target, backward).
        bandwidths: by (source, target): values and gradients that go this way.
        peak_memory_bytes: by worker: the most that its CUDA devices' memory, or else its process, has held.
        live_bytes: by worker: activations kept at one time, at most; counted in `Pipeline.live_memory` alone.
        live_micro_batches: the same by stage, in micro-batches.
        stage_bytes: by stage: what one micro-batch keeps.
        stage_count: of the pipeline.
        predicted_step_s: seconds of a training step as the plan predicted it; None where there is no plan.
        reports: the latest, for `Pipeline.trace`.
    """

    calls: int = 0
    samples: int = 0
    total_s: float = 0.0
    workers: dict[str, WorkerTime] = field(default_factory=dict)
    stages: dict[int, WorkerTime] = field(default_factory=dict)
    links: dict[tuple[str, str, bool], LinkTraffic] = field(default_factory=dict)
    bandwidths: dict[tuple[str, str], Bandwidth] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    live_bytes: dict[str, int] = field(default_factory=dict)
    live_micro_batches: dict[int, int] = field(default_factory=dict)
    stage_bytes: dict[int, int] = field(default_factory=dict)
    stage_count: int = 0
    predicted_step_s: float | None = None
    reports: deque[tuple[str, list[Span]]] = field(default_factory=lambda: deque(maxlen=KEPT_REPORTS))

    def reset(self) -> None:
        """Begins again at zero."""
        self.calls, self.samples, self.total_s = 0, 0, 0.0
        for sums in (self.workers, self.stages, self.links, self.bandwidths, self.peak_memory_bytes, self.reports):
            sums.clear()
        for most in (self.live_bytes, self.live_micro_batches, self.stage_bytes):
            most.clear()

    def add(self, report: RunReport) -> None:
        """Adds what a worker measured."""
        own = WorkerTime(report.compute_s, report.encode_s, report.decode_s, report.wait_s, report.reduce_s)
        self.workers[report.worker] = self.workers.get(report.worker, WorkerTime()) + own
        known = self.peak_memory_bytes.get(report.worker, 0)
        self.peak_memory_bytes[report.worker] = max(known, report.peak_memory_bytes)
        self.live_bytes[report.worker] = max(self.live_bytes.get(report.worker, 0), report.live_bytes)
        for found, known_of in (
            (report.live_micro_batches, self.live_micro_batches),
            (report.stage_bytes, self.stage_bytes),
        ):
            known_of |= {stage: max(number, known_of.get(stage, 0)) for stage, number in found.items()}
        for traffic in report.traffic.values():
            self.add_traffic(traffic)
        of_stages: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        for span in report.spans:
            if span.kind == "send":
                link = report.worker, span.peer
                self.bandwidths[link] = self.bandwidths.get(link, Bandwidth()) + Bandwidth.of(span)
                continue
            stage = span.target if span.kind == "decode" else span.source
            if 0 <= stage < self.stage_count:  # not the inputs and outputs of the model
                of_stages[stage]["compute_s" if span.kind in _WORK else f"{span.kind}_s"] += span.seconds
        for stage, seconds in of_stages.items():
            self.stages[stage] = self.stages.get(stage, WorkerTime()) + WorkerTime(**seconds)
        self.reports.append((report.worker, report.spans))

    def add_traffic(self, traffic: LinkTraffic) -> None:
        """Adds bytes of a link."""
        key = traffic.source, traffic.target, traffic.backward
        known = self.links.get(key)
        self.links[key] = traffic if known is None else known + traffic

    @property
    def raw_bytes(self) -> int:
        """Bytes of all links before compression."""
        return sum(link.raw_bytes for link in self.links.values())

    @property
    def wire_bytes(self) -> int:
        """Bytes of all links as sent."""
        return sum(link.wire_bytes for link in self.links.values())

    @property
    def ratio(self) -> float:
        """Bytes after compression over bytes before; 1 if nothing was sent."""
        return self.wire_bytes / self.raw_bytes if self.raw_bytes else 1.0

    @property
    def compute_s(self) -> float:
        """Seconds that all workers computed, together: the computation time."""
        return sum(worker.compute_s for worker in self.workers.values())

    @property
    def batch_s(self) -> float:
        """Wall-clock seconds of a batch."""
        return self.total_s / self.calls if self.calls else 0.0

    @property
    def over_predicted(self) -> float | None:
        """Measured seconds of a batch over the predicted seconds of a training step; None without either."""
        return self.batch_s / self.predicted_step_s if self.predicted_step_s and self.calls else None

    @property
    def samples_per_s(self) -> float:
        """Throughput."""
        return self.samples / self.total_s if self.total_s else 0.0

    def average_bytes_per_s(self, source: str, target: str) -> float:
        """Average bandwidth from one worker to another: bytes sent over the computation time of all workers."""
        sent = sum(link.wire_bytes for (s, t, _), link in self.links.items() if (s, t) == (source, target))
        return sent / self.compute_s if self.compute_s else 0.0

    def bubble_share(self, worker: str) -> float:
        """The share of the total time in which a worker did not compute."""
        return 1.0 - min(1.0, self.workers[worker].compute_s / self.total_s) if self.total_s else 0.0

    def __rich__(self) -> Group:
        return Group(self._link_table(), self._worker_table())

    def _link_table(self) -> Table:
        rate = f", {self.samples_per_s:.1f} samples/s" if self.total_s else ""
        if (ratio := self.over_predicted) is not None and self.predicted_step_s is not None:
            rate += f", {format_seconds(self.batch_s)} a batch"
            rate += f" (step predicted {format_seconds(self.predicted_step_s)}, {ratio:.2f} times that)"
        table = Table(title=f"{self.calls} calls, {self.samples} samples, {format_seconds(self.total_s)}{rate}")
        for column in ("link", "carries", "raw", "wire", "ratio", "packets", "average/s", "peak/s"):
            table.add_column(column, justify="left" if column in ("link", "carries") else "right")
        for (source, target, backward), link in sorted(self.links.items()):
            peak = self.bandwidths.get((source, target), Bandwidth()).peak_bytes_per_s
            table.add_row(
                f"{source} -> {target}",
                "gradients" if backward else "values",
                format_bytes(link.raw_bytes),
                format_bytes(link.wire_bytes),
                f"{link.wire_bytes / link.raw_bytes:.3f}" if link.raw_bytes else "-",
                str(link.packets),
                format_bytes(int(self.average_bytes_per_s(source, target))),
                format_bytes(int(peak)) if peak else "-",
            )
        return table

    def _worker_table(self) -> Table:
        table = Table()
        is_reduced = any(time.reduce_s for time in self.workers.values())
        columns = ("worker", "compute", "waiting", "encode", "decode", *(("all-reduce",) if is_reduced else ()))
        for column in (*columns, "bubble", "peak memory"):
            table.add_column(column, justify="left" if column == "worker" else "right")
        stages = [(f"  stage {stage}", time) for stage, time in sorted(self.stages.items())]
        for name, time in [*self.workers.items(), *stages]:
            is_worker = name in self.workers
            seconds = (time.compute_s, time.wait_s, time.encode_s, time.decode_s, time.reduce_s)[
                : len(columns) - 1
            ]
            table.add_row(
                name,
                *(format_seconds(value) for value in seconds),
                f"{self.bubble_share(name):.0%}" if is_worker else "",
                format_bytes(self.peak_memory_bytes.get(name, 0)) if is_worker else "",
            )
        return table
