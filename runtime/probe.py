"""Measures the links between the client and its workers, over the transport by which they will work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fxsplit.errors import DeviceError
from fxsplit.planning.devices import Placement, parse_devices, single_placements
from fxsplit.planning.links import MEASURED, Link
from fxsplit.runtime.engine import Engine
from fxsplit.runtime.transport import CLIENT_NAME
from fxsplit.runtime.transports import listening
from fxsplit.runtime.transports import transport as find_transport

_MESSAGES, _REPEATS = 20, 3
_FIRST_BYTES, _MOST_BYTES, _ENOUGH_S = 1 << 20, 1 << 26, 0.25


def probe(
    devices: Sequence[str], *, listen: str | None = None, token: str | None = None, transport: str = "rpc"
) -> dict[tuple[str, str], Link]:
    """Measures bandwidth and latency between this process and every worker of a device list.

    The latency is half of a message's way there and back, handlers included; the bandwidth is that of a message of
    megabytes, as many as take a quarter of a second, 64 at most. Links between two workers are not measured.

    Args:
        devices: as for `fxsplit.compile`.
        listen: as for `fxsplit.compile`.
        token: as for `fxsplit.compile`.
        transport: as for `fxsplit.compile`.

    Returns:
        (sending worker, receiving worker) -> their link; 'client' is this process.

    Raises:
        DeviceError: the list names no worker beside the client.
        WorkerError: a worker did not come, or was lost.
    """
    placements: tuple[Placement, ...] = single_placements(parse_devices(devices))
    workers = tuple(dict.fromkeys(p.worker for p in placements if not p.is_client))
    if not workers:
        raise DeviceError("there is no link to measure", found=", ".join(devices), allowed="two workers, or more")
    chosen = find_transport(transport) if listen is None else listening(listen, token, placements, transport)
    engine = Engine(chosen)
    links = {}
    try:
        engine.start(workers)
        for worker in workers:

            def exchange(payload: Tensor, reply_bytes: int, worker: str = worker) -> None:
                engine.call(worker, "echo", payload, reply_bytes)

            links[CLIENT_NAME, worker], links[worker, CLIENT_NAME] = _links(exchange)
    finally:
        engine.close()
    return links


def _links(exchange: Callable[[Tensor, int], None]) -> tuple[Link, Link]:
    """There and back."""
    nothing = torch.empty(0, dtype=torch.uint8)
    small = torch.zeros(1 << 10, dtype=torch.uint8)  # so that it goes as tensors go
    exchange(small, 1 << 10)
    round_trip_s = statistics.median(_seconds(lambda: exchange(small, 1 << 10)) for _ in range(_MESSAGES))
    there = _bytes_per_s(lambda count: exchange(torch.zeros(count, dtype=torch.uint8), 0), round_trip_s)
    back = _bytes_per_s(lambda count: exchange(nothing, count), round_trip_s)
    return Link(there, round_trip_s / 2, MEASURED), Link(back, round_trip_s / 2, MEASURED)


def _bytes_per_s(send: Callable[[int], None], round_trip_s: float) -> float:
    count = _FIRST_BYTES
    while (seconds := _seconds(partial(send, count))) < _ENOUGH_S and count < _MOST_BYTES:
        count *= 2
    found = [seconds, *(_seconds(partial(send, count)) for _ in range(_REPEATS - 1))]
    return count / max(statistics.median(found) - round_trip_s, 1e-9)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
