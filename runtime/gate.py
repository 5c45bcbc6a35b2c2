"""The client's side of joining: lets workers of other machines in, one connection each while they live."""

from __future__ import annotations

import base64
import contextlib
import datetime
import errno
import math
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch._C._distributed_c10d import Store

from fxsplit.errors import DeviceError, WorkerError
from fxsplit.runtime.handshake import (
    Identity,
    Refused,
    is_proof,
    keep_alive,
    parse_address,
    proof,
    receive_message,
    refusal_of,
    send_message,
)
from fxsplit.runtime.place import Place
from fxsplit.runtime.transport import LostWorker

JOIN_TIMEOUT = "FXSPLIT_JOIN_TIMEOUT_S"
"""Environment variable of the seconds for which workers that join are waited for; 300 if it is not set."""

_HANDSHAKE_S = 10.0
_LINGER_S = 60.0  # longer than `keep_alive` waits for the other machine
_POLL_S = 0.05
_MOST_PENDING = 64


def join_timeout_s() -> float:
    """How long workers that join are waited for.

    Raises:
        DeviceError: the environment says something else.
    """
    text = os.environ.get(JOIN_TIMEOUT, "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise DeviceError("not a time to wait", where=JOIN_TIMEOUT, found=repr(text), allowed="seconds, above 0")
    return seconds


class MeetingStore(Store):
    """Where the members of the RPC group leave their addresses: a dictionary in the client's process."""

    def __init__(self, give_up: Callable[[], None]) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._give_up = give_up

    def set(self, key: str, value: bytes | str) -> None:
        """Sets a value."""
        with self._changed:
            self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """A value, waited for."""
        self.wait([key])
        with self._changed:
            return self._values[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Returns when all keys are there; raises when the gate gives up."""
        with self._changed:
            while any(key not in self._values for key in keys):
                self._give_up()
                self._changed.wait(_POLL_S)

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """Sets a value if it is what is expected, or if nothing is expected and it is not there."""
        wanted = expected.encode() if isinstance(expected, str) else bytes(expected)
        with self._changed:
            known = self._values.get(key)
            if (known is None and not wanted) or known == wanted:
                self._values[key] = desired.encode() if isinstance(desired, str) else bytes(desired)
                self._changed.notify_all()
            return self._values.get(key, wanted)


@dataclass
class Member:
    """A worker that has joined.

    Attributes:
        identity: what it said of itself.
        connection: open for as long as it lives.
        address: the client's own address as the worker reaches it.
        ending: how it ended, if it did.
    """

    identity: Identity
    connection: socket.socket
    address: str
    ending: str | None = None


@dataclass
class Gate:
    """Listens for workers, and holds a connection to each that has joined.

    Args:
        listen: "HOST:PORT".
        token: what workers must know.
        wanted: the devices of each worker that is waited for, by name.
        session: names this group of workers; they are told it.
        threads: of one operation; they are told it, too.
        heard: told what a member says that it is at.
        is_restart: whether a worker that was taken for dead may come back beside the one in its place.

    Raises:
        DeviceError: the address is none, or cannot be listened at.
    """

    listen: str
    token: str
    wanted: Mapping[str, Sequence[str]]
    session: str
    threads: int
    heard: Callable[[str, Place], None] = lambda name, place: None
    is_restart: bool = False
    members: dict[str, Member] = field(default_factory=dict)
    has_problem: WorkerError | None = None

    def __post_init__(self) -> None:
        """Begins to listen."""
        host, port = parse_address(self.listen, "listen")
        self.store = MeetingStore(self.check)
        self._identity = Identity.of_this_process("client")
        self._lock = threading.Lock()
        self._is_closed = False
        self._pending: dict[socket.socket, None] = {}  # oldest first
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._server = socket.create_server((host, port), family=family, backlog=64)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise DeviceError(
                "the address is in use already" if taken else "cannot listen at this address",
                where="listen",
                found=f"{self.listen}: {error.strerror or error}",
                allowed="a free port of an address of this host",
                hint="another port; or close the other pipeline" if taken else "an address of this host (ip addr)",
            ) from error
        threading.Thread(target=self._accept, name="fxsplit gate", daemon=True).start()

    @property
    def missing(self) -> list[str]:
        """The workers that have not joined."""
        with self._lock:
            return [name for name in self.wanted if name not in self.members]

    def check(self) -> None:
        """Raises what went wrong with a worker that has joined, or wanted to.

        Raises:
            WorkerError: that.
        """
        if self.has_problem is not None:
            raise self.has_problem
        if self._is_closed:
            raise WorkerError("the pipeline was closed while workers joined")
        if lost := self.lost():
            raise WorkerError(f"a worker did not start: worker {lost.name}, {lost.cause}")

    def await_all(self, timeout_s: float, check: Callable[[], None]) -> None:
        """Returns when all workers have joined.

        Raises:
            WorkerError: one is refused, or they did not come in time.
        """
        end = time.monotonic() + timeout_s
        while missing := self.missing:
            self.check()
            check()
            if time.monotonic() > end:
                raise WorkerError(
                    "workers did not join in time",
                    where=f"listening at {self.listen}",
                    found=", ".join(missing),
                    allowed=f"{timeout_s:.0f} s",
                    hint=f"on their machines: fxsplit worker --join {self.listen} --name {missing[0]}",
                )
            time.sleep(_POLL_S)

    def lost(self) -> LostWorker | None:
        """The first worker whose connection has ended."""
        with self._lock:
            ended = [member for member in self.members.values() if member.ending is not None]
        if not ended:
            return None
        who = ended[0].identity
        return LostWorker(who.name, f"process {who.pid} on {who.host} {ended[0].ending}")

    def close(self, rejoins: bool = False) -> None:
        """Stops listening and hangs up: a worker that loses its connection ends, or joins again if told to."""
        self._is_closed = True
        _close(self._server)
        with self._lock:
            pending, members = list(self._pending), [member.connection for member in self.members.values()]
        for connection in pending:
            _close(connection)
        for connection in members:
            (_ask_again if rejoins else _close)(connection)

    # ------------------------------------------------------------------ threads

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with self._lock:
                self._pending[connection] = None
                oldest = next(iter(self._pending)) if len(self._pending) > _MOST_PENDING else None
                if oldest is not None:
                    del self._pending[oldest]
            if oldest is not None:
                _close(oldest)  # whoever opens connections and says nothing shuts nobody out for long
            threading.Thread(target=self._serve, args=(connection,), name="fxsplit joined", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """One worker, from its first word to its last."""
        member = None
        late = threading.Timer(_HANDSHAKE_S, _close, (connection,))
        late.daemon = True
        late.start()
        try:
            connection.settimeout(_HANDSHAKE_S)
            member = self._admit(connection)
            late.cancel()
            with self._lock:
                self._pending.pop(connection, None)
            connection.settimeout(None)
            keep_alive(connection)
            while True:
                request = receive_message(connection)
                if request.get("do") == "beat":
                    self.heard(member.identity.name, Place.of_message(request.get("place")))
                else:
                    send_message(connection, self._answer(request))
        except Refused as error:
            self._refuse(connection, error)
        except (OSError, WorkerError, LookupError, TypeError, ValueError) as error:
            if member is not None:
                member.ending = f"ended its connection ({error})"
        finally:
            late.cancel()
            _close(connection)
            with self._lock:
                self._pending.pop(connection, None)

    def _refuse(self, connection: socket.socket, error: Refused) -> None:
        with contextlib.suppress(OSError):
            send_message(connection, refusal_of(error))
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(1.0)
            connection.recv(1)  # or a reset would overtake the message
        if self.missing and not self._is_closed:
            if isinstance(error, _Stranger):
                warnings.warn(f"a worker was refused: {error}", stacklevel=2)
            else:
                self.has_problem = error

    def _admit(self, connection: socket.socket) -> Member:
        """The handshake.

        Raises:
            Refused: who is there does not know the token, is not waited for, or does not fit.
        """
        ours = secrets.token_hex(16)
        send_message(connection, {"fxsplit": "client", "nonce": ours})
        try:
            hello = receive_message(connection)
        except Refused as error:
            raise ConnectionError("no worker of fxsplit") from error
        theirs = str(hello.get("nonce"))
        if not is_proof(hello.get("proof"), proof(self.token, "worker", ours, theirs)):
            peer = connection.getpeername()[0]
            raise _Stranger(
                "the token is not the client's",
                where=f"a worker from {peer}",
                allowed="the token that the client was given or has printed",
                hint="set FXSPLIT_TOKEN to the same value on both sides",
            )
        identity = Identity.from_json(hello.get("identity"))
        identity.check_versions(self._identity)
        if identity.name not in self.wanted:
            raise Refused(
                "a worker has a name that the client does not know",
                where=f"{identity.host}, process {identity.pid}",
                found=identity.name,
                allowed=", ".join(self.wanted),
                hint="--name of the worker must be a name in the client's devices",
            )
        identity.check_devices(self.wanted[identity.name])
        with self._lock:
            if identity.name in self.members:
                first = self.members[identity.name].identity
                raise (_Stranger if self.is_restart else Refused)(
                    "a worker of this name has joined already",
                    where=f"{identity.host}, process {identity.pid}",
                    found=f"{identity.name}, which is process {first.pid} on {first.host}",
                    allowed="one worker of each name",
                )
            member = Member(identity, connection, connection.getsockname()[0])
            rank = 1 + list(self.wanted).index(identity.name)
            welcome = {"session": self.session, "rank": rank, "world_size": 1 + len(self.wanted)}
            answer = proof(self.token, "client", theirs, ours)
            send_message(connection, {**welcome, "threads": self.threads, "proof": answer})
            self.members[identity.name] = member
        return member

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the store says to a member."""
        kind, key = request.get("do"), str(request.get("key"))
        if kind == "set":
            self.store.set(key, base64.b64decode(request["value"]))
            return {}
        if kind == "get":
            return {"value": base64.b64encode(self.store.get(key)).decode()}
        if kind == "wait":
            self.store.wait([str(key) for key in request["keys"]])
            return {}
        if kind == "compare_set":
            expected, desired = base64.b64decode(request["expected"]), base64.b64decode(request["desired"])
            return {"value": base64.b64encode(self.store.compare_set(key, expected, desired)).decode()}
        raise Refused("an unknown request", found=repr(kind), allowed="set, get, wait, compare_set")


class _Stranger(Refused):
    """Someone without the token, or out of date: no reason to give up, since anybody can connect."""


def _ask_again(connection: socket.socket) -> None:
    """Has a worker join again, or end if it does not hear of it in time.

    Its connection is read on until it goes: if it was cut off, what it has sent meanwhile may arrive first, and a
    socket that is closed would answer with a reset, by which the worker would end.
    """
    with contextlib.suppress(OSError):
        connection.settimeout(_LINGER_S)
        send_message(connection, {"rejoin": True})
        connection.shutdown(socket.SHUT_WR)
    late = threading.Timer(_LINGER_S, _close, (connection,))
    late.daemon = True
    late.start()


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
    connection.close()
