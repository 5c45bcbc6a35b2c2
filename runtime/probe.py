"""Measures the links between the client and its workers, and between these, over the transport of their work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from fxsplit.errors import DeviceError
from fxsplit.planning.devices import Placement, parse_devices, single_placements
from fxsplit.planning.links import Link
from fxsplit.runtime.engine import Engine
from fxsplit.runtime.link_speed import measured
from fxsplit.runtime.transport import CLIENT_NAME
from fxsplit.runtime.transports import listening
from fxsplit.runtime.transports import transport as find_transport


def probe(
    devices: Sequence[str], *, listen: str | None = None, token: str | None = None, transport: str = "rpc"
) -> dict[tuple[str, str], Link]:
    """Measures bandwidth and latency between this process and every worker of a device list, and between these.

    The latency is half of a message's way there and back, handlers included; the bandwidth is that of a message of
    megabytes, as many as take a quarter of a second, 64 at most. One pair after the other, so that links which
    share a wire are measured as if it were theirs alone.

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

            links[CLIENT_NAME, worker], links[worker, CLIENT_NAME] = measured(exchange)
        for one, other in combinations(workers, 2):
            links[one, other], links[other, one] = engine.call(one, "probe_link", other)
    finally:
        engine.close()
    return links
