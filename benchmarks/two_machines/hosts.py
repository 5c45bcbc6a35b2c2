"""Two network namespaces of this host, joined by one link of a given rate: two machines as far as a network goes.

Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.78.0.1", "10.78.0.2")
NAMESPACES = ("fxsplit0", "fxsplit1")
INTERFACES = ("fxs0", "fxs1")


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)


@contextmanager
def two_hosts(rate: str | None) -> Iterator[None]:
    """The two hosts, while inside.

    Args:
        rate: of each direction of the link, in tc's words ("50mbit"); None: as fast as the kernel copies.
    """
    _down()
    try:
        for space in NAMESPACES:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        first, second = INTERFACES
        peer = ("type", "veth", "peer", "name", second, "netns", NAMESPACES[1])
        _ip("link", "add", first, "netns", NAMESPACES[0], *peer)
        for space, interface, address in zip(NAMESPACES, INTERFACES, ADDRESSES, strict=True):
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", space, "link", "set", interface, "up")
            if rate is not None:
                shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
                _ip("netns", "exec", space, "tc", "qdisc", "add", "dev", interface, *shape)
        yield
    finally:
        _down()


def _down() -> None:
    for space in NAMESPACES:
        _ip("netns", "del", space, check=False)


def on_host(number: int, *command: str) -> list[str]:
    """The command that runs another one on one of the hosts."""
    return ["ip", "netns", "exec", NAMESPACES[number], *command]


def interface_bytes(number: int) -> tuple[int, int]:
    """Bytes that this process's host has sent and received on the link, by the kernel's own counters."""
    folder = Path("/sys/class/net") / INTERFACES[number] / "statistics"
    sent, received = (int((folder / name).read_text()) for name in ("tx_bytes", "rx_bytes"))
    return sent, received
