"""The port at which TensorPipe takes connections: open until all members of a group are connected, and no longer.

TensorPipe believes whoever connects. One that says something else may end the process: eight bytes are taken for a
length, and so much memory asked for. Members connect with each other once, at the start, and keep their
connections; nobody else has any business there.
"""

from __future__ import annotations

import contextlib
import os
import socket

_port = 0
"""Of this process: `torch.distributed.rpc` is one to a process. 0: none is open."""


def opened(url: str) -> None:
    """TensorPipe listens now.

    Args:
        url: as it says it, "uv://127.0.0.1:38159".
    """
    global _port
    _port = int(url.rpartition(":")[2])


def shut() -> None:
    """Takes no more connections; those that there are go on. For every member to call once all are connected."""
    global _port
    port, _port = _port, 0
    for name in os.listdir("/dev/fd") if port else ():
        with contextlib.suppress(OSError):  # no socket, or closed meanwhile
            found = socket.socket(fileno=int(name))
            try:
                is_door = (
                    found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and found.getsockname()[1] == port
                )
            finally:
                found.detach()
            if is_door:
                _replace(int(name))


def _replace(descriptor: int) -> None:
    """Puts a socket in the place of another, to which nothing will ever happen.

    The other one is closed, and TensorPipe does not hear of it; after a mere `shutdown` its loop would ask the
    socket again and again, and take a core.
    """
    with socket.socket() as quiet:
        os.dup2(quiet.fileno(), descriptor, inheritable=False)
