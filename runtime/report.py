"""What a worker measures while it runs: what it did when, and what it sent."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxsplit.runtime.packet import Key, Packet
from fxsplit.runtime.stopwatch import CPU, Moment, Untimed, moment
from fxsplit.runtime.streams import Marks
from fxsplit.schedules import Action


class Span(NamedTuple):
    """Something that took time on a worker or a link.

    Attributes:
        kind: "F", "B", "I", "W" as in `fxsplit.schedules.Work`; "loss"; "wait" of the thread that computes;
            "encode", "send" and "decode" of a packet; "reduce" of a replica, whose number is the micro-batch.
        source: the stage at work, or the one that the packet comes from.
        target: the same stage, or the one that it goes to.
        micro_batch: of the batch.
        start_s: by the worker's `time.perf_counter`; of what a GPU does, when it did it.
        end_s: the same.
        wire_bytes: of the packet.
        peer: the worker that it goes to; "" if it stays.
    """

    kind: str
    source: int
    target: int
    micro_batch: int
    start_s: float = 0.0
    end_s: float = 0.0
    wire_bytes: int = 0
    peer: str = ""

    @classmethod
    def of_packet(cls, kind: str, key: Key, wire_bytes: int, peer: str = "") -> Span:
        """A span of a packet, whose gradients go the other way than its values; its times are still to be set."""
        source, target = (key.target, key.source) if key.backward else (key.source, key.target)
        return cls(kind, source, target, key.micro_batch, wire_bytes=wire_bytes, peer=peer)

    def at(self, start_s: float, end_s: float) -> Span:
        """The span with its times."""
        return self._replace(start_s=start_s, end_s=end_s)

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end_s - self.start_s


_OWN_SUMS = frozenset({"encode", "decode", "wait", "reduce"})


@dataclass(frozen=True)
class LinkTraffic:
    """Bytes that one worker sent to another.

    Attributes:
        source: the sending worker.
        target: the receiving worker.
        backward: gradients, or values.
        raw_bytes: before compression.
        wire_bytes: as sent.
        packets: how many packets they were.
    """

    source: str
    target: str
    backward: bool
    raw_bytes: int
    wire_bytes: int
    packets: int

    def __add__(self, other: LinkTraffic) -> LinkTraffic:
        return replace(
            self,
            raw_bytes=self.raw_bytes + other.raw_bytes,
            wire_bytes=self.wire_bytes + other.wire_bytes,
            packets=self.packets + other.packets,
        )


@dataclass
class RunReport:
    """What one worker measured in one phase of a step, in seconds of its own clock.

    What GPUs did is known later: `Stopwatch` keeps that, and a report has it of an earlier phase. The threads
    that encode and decode write into it beside the one that computes, each what is its own.

    Attributes:
        worker: its name.
        compute_s: seconds of forwards, backwards and losses.
        encode_s: seconds of its encoder.
        decode_s: seconds of its decoder.
        wait_s: seconds that the thread which computes had nothing to compute.
        reduce_s: seconds of the all-reduce of a replica's gradients, waiting for the other replicas included.
        traffic: what it sent, by (receiver, backward).
        spans: what it did when.
        untimed: what GPUs do, with the moments at which they do it; empty in a report that is sent.
        losses: by micro-batch, weighted, if the loss is made here.
        notes: what the user is to be told, once.
        marks: behind the work that makes them, if they are on a GPU of this process.
        peak_memory_bytes: the most that its devices' memory (CUDA), or else its process, has held so far.
        live_bytes: of activations that were kept at one time, at most; as the next two, if that is counted.
        live_micro_batches: the same in micro-batches, by stage.
        stage_bytes: what one micro-batch keeps, by stage.
    """

    worker: str
    compute_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    wait_s: float = 0.0
    reduce_s: float = 0.0
    traffic: dict[tuple[str, bool], LinkTraffic] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    untimed: list[Untimed[Span]] = field(default_factory=list)
    losses: dict[int, Tensor] = field(default_factory=dict)
    marks: Marks = ()
    notes: list[str] = field(default_factory=list)
    peak_memory_bytes: int = 0
    live_bytes: int = 0
    live_micro_batches: dict[int, int] = field(default_factory=dict)
    stage_bytes: dict[int, int] = field(default_factory=dict)

    def timing(self, kind: str, action: Action, device: torch.device = CPU) -> AbstractContextManager[None]:
        """What is inside is an action's, or its "wait" or "loss"; or the "reduce" at the end of a step.

        Args:
            kind: of the span.
            action: that it belongs to.
            device: that does it, on its current stream.
        """
        return _Timing(self, Span(kind, action.stage, action.stage, action.micro_batch), device)

    def add(self, span: Span, start: Moment, end: Moment) -> None:
        """Adds something that took time, once it is known how much."""
        if isinstance(start, float):
            assert isinstance(end, float)
            what = f"{span.kind}_s" if span.kind in _OWN_SUMS else "compute_s"
            setattr(self, what, getattr(self, what) + end - start)
            self.spans.append(span.at(start, end))
        else:
            assert not isinstance(end, float)
            self.untimed.append((span, start, end))

    def kept(self, stage: int, micro_batches: int, own_bytes: int) -> None:
        """A forward is done: what is kept of its stage, and the bytes that this micro-batch has added."""
        self.live_micro_batches[stage] = max(self.live_micro_batches.get(stage, 0), micro_batches)
        self.stage_bytes[stage] = max(self.stage_bytes.get(stage, 0), own_bytes)

    def encoded(self, key: Key, packet: Packet, start: Moment, end: Moment) -> None:
        """A packet was encoded."""
        self.add(Span.of_packet("encode", key, packet.wire_bytes), start, end)

    def decoded(self, key: Key, packet: Packet, start: Moment, end: Moment) -> None:
        """A packet was decoded."""
        self.add(Span.of_packet("decode", key, packet.wire_bytes), start, end)

    def add_packet(self, to: str, key: Key, packet: Packet) -> None:
        """Counts a packet that is sent to a worker."""
        traffic = LinkTraffic(self.worker, to, key.backward, packet.raw_bytes, packet.wire_bytes, 1)
        key_of = to, key.backward
        known = self.traffic.get(key_of)
        self.traffic[key_of] = traffic if known is None else known + traffic


class _Timing(AbstractContextManager[None]):
    """Adds what is within to a report. A class: there are many in a micro-batch, and generators take longer."""

    def __init__(self, report: RunReport, span: Span, device: torch.device) -> None:
        self._report, self._span, self._device = report, span, device

    def __enter__(self) -> None:
        self._start = moment(self._device)

    def __exit__(self, *_: object) -> None:
        self._report.add(self._span, self._start, moment(self._device))
