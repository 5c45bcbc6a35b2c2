"""Connections that say what they should not, or nothing: `python garbage.py COUNT PORT PORT...`.

As a program it opens them all, writes a line, and holds some of them open until its input ends. It imports nothing
that takes time. Without ports it connects to COUNT of its own: all that differs then is who is disturbed.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
from collections.abc import Iterator

CONNECTIONS = 200
"""To each port."""

SILENT = 10
"""More of them, that stay open."""


def noise(seed: int) -> list[bytes]:
    """Random bytes, frames of right and wrong length, JSON that is no handshake, other protocols' first words."""
    numbers = random.Random(seed)
    said = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-x\r\n", b"\xff" * 64]
    for text in (b"[" * 100_000, b"{}", b"null", b'{"nonce": 1}', b'{"proof": []}', b'{"refused": {"what": 1}}'):
        said.append(len(text).to_bytes(4, "big") + text)
    while len(said) < CONNECTIONS:
        length = numbers.choice([0, 1, 4, 100, 2**20, 2**32 - 1])
        said.append(length.to_bytes(4, "big") + numbers.randbytes(numbers.randint(0, 300)))
    return said


@contextlib.contextmanager
def disturbed(ports: list[int]) -> Iterator[None]:
    """All the noise to each port, and ten connections that stay open and say nothing."""
    with contextlib.ExitStack() as open_ones:
        for port in ports:
            for said in noise(port):
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port), timeout=2.0) as peer,
                ):
                    peer.sendall(said)
            for _ in range(SILENT):
                with contextlib.suppress(OSError):
                    open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=2.0))
        yield


def _port_of_its_own() -> int:
    server = socket.create_server(("127.0.0.1", 0), backlog=64)

    def accept() -> None:
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 20)

    threading.Thread(target=accept, daemon=True).start()
    port: int = server.getsockname()[1]
    return port


def main() -> None:
    """Disturbs, and waits."""
    count, *ports = (int(argument) for argument in sys.argv[1:])
    with disturbed(ports or [_port_of_its_own() for _ in range(count)]):
        print("said", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
