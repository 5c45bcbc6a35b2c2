"""A worker's side of joining: `fxsplit worker --join HOST:PORT --name NAME`."""

from __future__ import annotations

import base64
import contextlib
import datetime
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import Store

from fxsplit.errors import WorkerError
from fxsplit.runtime.handshake import (
    Identity,
    Refused,
    is_proof,
    keep_alive,
    parse_address,
    proof,
    receive_message,
    send_message,
)
from fxsplit.runtime.place import Place

_HANDSHAKE_S = 10.0


@dataclass(frozen=True)
class Membership:
    """What a worker is told when it is let in.

    Attributes:
        connection: to the client; when it ends, the worker does.
        session: the pipeline's random name.
        rank: in the RPC group.
        world_size: members of the group, the client included.
        threads: for one operation.
        address: this worker's own, as it reaches the client.
    """

    connection: socket.socket
    session: str
    rank: int
    world_size: int
    threads: int
    address: str


class JoinedStore(Store):
    """The client's `MeetingStore`, asked over the worker's connection."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._lock = threading.Lock()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            send_message(self._connection, request)
            return receive_message(self._connection)

    def set(self, key: str, value: bytes | str) -> None:
        """Sets a value."""
        self._ask({"do": "set", "key": key, "value": _text(value)})

    def get(self, key: str) -> bytes:
        """A value, waited for."""
        return base64.b64decode(self._ask({"do": "get", "key": key})["value"])

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Returns when all keys are there."""
        self._ask({"do": "wait", "keys": keys})

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """Sets a value if it is what is expected."""
        request = {"do": "compare_set", "key": key, "expected": _text(expected), "desired": _text(desired)}
        return base64.b64decode(self._ask(request)["value"])

    def beat(self, place: Place) -> None:
        """Tells the client what this worker is at; there is no answer."""
        with self._lock:
            send_message(self._connection, {"do": "beat", "place": place})


def _text(value: bytes | str) -> str:
    return base64.b64encode(value.encode() if isinstance(value, str) else bytes(value)).decode()


def join(address: str, name: str, token: str, devices: Sequence[str] | None, patience_s: float) -> Membership:
    """Joins the client that listens at an address.

    Args:
        address: "HOST:PORT".
        name: by which the client's devices name this worker.
        token: the client's.
        devices: what this worker offers; all devices of this host if None.
        patience_s: how long to wait for the client to listen.

    Raises:
        DeviceError: the address is none.
        WorkerError: nobody listens there, or the client refuses this worker, or it is not one.
    """
    host, port = parse_address(address, "--join")
    connection = _connect(host, port, patience_s)
    try:
        connection.settimeout(_HANDSHAKE_S)
        ours = secrets.token_hex(16)
        theirs = str(receive_message(connection).get("nonce"))
        identity = Identity.of_this_process(name, devices)
        hello = {"nonce": ours, "proof": proof(token, "worker", theirs, ours), "identity": identity.to_json()}
        send_message(connection, hello)
        welcome = receive_message(connection)
        if not is_proof(welcome.get("proof"), proof(token, "client", ours, theirs)):
            raise Refused("the client does not know the token", where=address, hint="somebody else listens there")
    except (OSError, Refused) as error:
        connection.close()
        if isinstance(error, Refused):
            raise
        raise WorkerError("the client ended the handshake", where=address, found=str(error)) from error
    connection.settimeout(None)
    keep_alive(connection)
    rank, world_size, threads = (int(welcome[key]) for key in ("rank", "world_size", "threads"))
    own = connection.getsockname()[0]
    return Membership(connection, str(welcome["session"]), rank, world_size, threads, own)


def _connect(host: str, port: int, patience_s: float) -> socket.socket:
    end = time.monotonic() + patience_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=_HANDSHAKE_S)
        except OSError as error:
            if time.monotonic() > end:
                raise WorkerError(
                    "no client listens there",
                    where=f"{host}:{port}",
                    found=str(error),
                    hint="start the client first: fxsplit.compile(..., listen='HOST:PORT')",
                ) from error
            time.sleep(0.2)


def end_with_client(connection: socket.socket, again: Callable[[], None]) -> None:
    """Ends this process as soon as the connection to the client does. Nothing here is worth a tidy exit.

    Args:
        connection: to the client.
        again: called instead, if the client has said that it waits for this worker to join again.
    """

    def watch() -> None:
        rejoins = False
        with contextlib.suppress(OSError, Refused):
            while True:
                rejoins = bool(receive_message(connection).get("rejoin"))
        if rejoins:
            again()
        os._exit(0)

    threading.Thread(target=watch, name="client watch", daemon=True).start()
