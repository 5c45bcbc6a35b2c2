"""What the client gives to the stages and gets from them, beside its own stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxsplit.planning import Plan
from fxsplit.runtime.courier import SMALL_BYTES
from fxsplit.runtime.group import Group
from fxsplit.runtime.metrics import Metrics
from fxsplit.runtime.packet import Key, Packet, pack, unpack
from fxsplit.runtime.randomness import Randomness, set_states, state_key
from fxsplit.runtime.report import LinkTraffic, RunReport
from fxsplit.runtime.run import Run
from fxsplit.runtime.streams import brought
from fxsplit.runtime.transport import CLIENT_NAME, Transport, wait
from fxsplit.schedules.replicas import replica_for
from fxsplit.stage import CLIENT, Edge


class Feeding(Group):
    """Sends inputs, targets and gradients to stages, and collects outputs and losses."""

    _plan: Plan

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        super().__init__(transport, timeout_s)
        self.metrics = Metrics()
        self._together: dict[str, list[tuple[Key, Packet]]] = {}  # fed and not sent yet
        self._together_bytes: Counter[str] = Counter()

    def _collect_all(self, run: Run, check: Callable[[], None], randomness: Randomness | None) -> list[list[Any]]:
        """The values of the output edges by micro-batch; the generators go on where the last stage left them."""
        edges = range(len(run.edges))
        outputs = [[self._collect(run, i, m, check) for i in edges] for m in range(run.chunks)]
        if randomness is not None and randomness.seed is None:
            last = state_key(run.number, len(self._plan.workers) - 1)
            set_states(self._take(last, check).payload, self._device())
        return outputs

    def _feed(self, run: Run, edge: Edge, micro_batch: int, value: Any, backward: bool) -> None:
        """Sends an input to the stage that uses it, or a gradient to the one that made the output."""
        key = Key(run.number, edge.value, edge.source, edge.target, micro_batch, backward)
        stage = edge.source if backward else edge.target
        ends = (*self._plan.workers, run.outputs_at)
        to = CLIENT_NAME if stage == CLIENT else replica_for(ends[stage], micro_batch)
        packet = pack(value, edge, key)
        endpoint = self._open()
        if to == CLIENT_NAME:
            endpoint.mailbox.deliver(key, packet)
        else:
            self.metrics.add_traffic(
                LinkTraffic(CLIENT_NAME, to, backward, packet.raw_bytes, packet.wire_bytes, 1)
            )
            self._together.setdefault(to, []).append((key, packet))
            self._together_bytes[to] += packet.wire_bytes
            if self._together_bytes[to] > SMALL_BYTES:
                self._send_fed(to)

    def _send_fed(self, *workers: str) -> None:
        """Sends what was fed to workers and is still here: small packets go together."""
        for to in workers:
            self._together_bytes[to] = 0
            if packets := self._together.pop(to, []):
                self._open().send_all(to, packets)

    def _forget_fed(self) -> None:
        """Drops what is left of a run that was given up."""
        self._together.clear()
        self._together_bytes.clear()

    def _collect(self, run: Run, index: int, micro_batch: int, check: Callable[[], None]) -> Any:
        edge = run.edges[index]
        packet = self._take(Key(run.number, edge.value, edge.source, edge.target, micro_batch, False), check)
        if packet.requires_grad and edge.source != CLIENT:
            run.needs_gradient.add((micro_batch, index))
        return unpack(packet, edge, False, self._device())

    def _take(self, key: Key, check: Callable[[], None]) -> Packet:
        mailbox = self._open().mailbox
        packet: Packet = wait(mailbox.receive(key), check)
        mailbox.forget(key)
        return packet

    def _brought(self, report: RunReport) -> Iterator[tuple[int, Tensor]]:
        """The losses of a report by micro-batch, on the client's device."""
        losses = brought(list(report.losses.values()), report.marks, self._device())
        return zip(report.losses, losses, strict=True)

    def _device(self) -> torch.device:
        return torch.device(self._plan.devices[0].rpartition("/")[2])
