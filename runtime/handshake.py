"""How a worker of another machine makes itself known, before it takes part in anything.

Client and worker prove to each other that they know the same token, without sending it (HMAC over both sides'
random numbers), and compare versions. Messages are JSON, four bytes of length before each. Nothing that arrives
here is unpickled or run.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import platform
import re
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fxsplit.compressors.registry import COMPRESSORS
from fxsplit.errors import DeviceError, WorkerError
from fxsplit.planning.devices import available_devices

PROTOCOL = 1
"""Of the messages; another number is refused."""

_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.%\w]+)\]|(?P<host>[^:\[\]\s]+)):(?P<port>\d{1,5})")
_LIMIT_BYTES = 1 << 20
_LENGTH = struct.Struct("!I")
_SIOCGIFADDR = 0x8915
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class Refused(WorkerError):
    """One side does not take the other; the other is told why."""


@dataclass(frozen=True)
class Identity:
    """What a worker says of itself.

    Attributes:
        name: as in the client's devices.
        devices: the devices that it offers.
        host: for people.
        pid: its process.
        fxsplit: version.
        torch: version, without what it was built for.
        python: major and minor version.
        codecs: the compressors that it knows.
        protocol: of the handshake.
    """

    name: str
    devices: tuple[str, ...]
    host: str
    pid: int
    fxsplit: str
    torch: str
    python: str
    codecs: tuple[str, ...]
    protocol: int = PROTOCOL

    @classmethod
    def of_this_process(cls, name: str, devices: Sequence[str] | None = None) -> Identity:
        """That of this process, with all its devices if none are given."""
        return cls(
            name,
            tuple(devices) if devices else available_devices(),
            socket.gethostname(),
            os.getpid(),
            package_version(),
            torch.__version__.partition("+")[0],
            platform.python_version().rpartition(".")[0],
            tuple(kind.name for kind in COMPRESSORS),
        )

    def to_json(self) -> dict[str, Any]:
        """As it is sent."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Identity:
        """As it was received.

        Raises:
            Refused: it is none.
        """
        texts, numbers = ("name", "host", "fxsplit", "torch", "python"), ("pid", "protocol")
        lists = ("devices", "codecs")
        if (
            not isinstance(data, dict)
            or any(not isinstance(data.get(key), str) for key in texts)
            or any(not isinstance(data.get(key), int) for key in numbers)
            or any(
                not isinstance(data.get(key), list) or any(not isinstance(item, str) for item in data[key])
                for key in lists
            )
        ):
            raise Refused("the other side does not say what it is", allowed="a worker of fxsplit")
        known: dict[str, Any] = {key: data[key] for key in (*texts, *numbers)}
        known.update((key, tuple(data[key])) for key in lists)
        return cls(**known)

    def check_versions(self, client: Identity) -> None:
        """Refuses a worker that would compute or pickle otherwise than the client.

        Raises:
            Refused: names what differs.
        """
        where = f"worker {self.name} on {self.host}"
        for what in ("protocol", "fxsplit", "torch", "python"):
            found, allowed = getattr(self, what), getattr(client, what)
            if found != allowed:
                raise Refused(
                    f"a worker has another version of {what}",
                    where=where,
                    found=f"{what} {found}",
                    allowed=f"{what} {allowed}, as the client has",
                    hint="install the same versions on both machines",
                )
        missing = [name for name in client.codecs if name not in self.codecs]
        if missing:
            raise Refused("a worker does not know all compressors", where=where, found=f"no {', '.join(missing)}")

    def check_devices(self, wanted: Sequence[str]) -> None:
        """Refuses a worker that has not the devices of its stages.

        Raises:
            Refused: names the first that is missing.
        """
        indexed = {_indexed(device) for device in self.devices}
        for device in wanted:
            if _indexed(device) not in indexed:
                raise Refused(
                    f"worker {self.name} has no device '{device}'",
                    where=f"{self.host}, process {self.pid}",
                    found=", ".join(self.devices),
                    allowed=", ".join(wanted),
                )


def package_version() -> str:
    """The version of fxsplit; "unknown" in a checkout that was never installed."""
    try:
        return version("fxsplit")
    except PackageNotFoundError:
        return "unknown"


def _indexed(device: str) -> str:
    return device if ":" in device else f"{device}:0"


def proof(token: str, side: str, *said: str) -> str:
    """What only someone with the token can say about both sides' random numbers."""
    message = json.dumps([PROTOCOL, side, *said]).encode()
    return hmac.new(token.encode(), message, hashlib.sha256).hexdigest()


def is_proof(found: object, expected: str) -> bool:
    """Whether a proof is right; in the same time whatever it is."""
    return isinstance(found, str) and hmac.compare_digest(found.encode(), expected.encode())


def parse_address(text: str, where: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; an IPv6 address is in brackets.

    Raises:
        DeviceError: it is no address.
    """
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or not 0 < int(match["port"]) < 65536:
        raise DeviceError("not an address", where=where, found=repr(text), allowed="HOST:PORT, port 1 to 65535")
    return match["six"] or match["host"], int(match["port"])


def join_address(host: str, port: int) -> str:
    """What `parse_address` takes apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def send_message(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends one message."""
    data = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive_message(connection: socket.socket) -> dict[str, Any]:
    """The next message.

    Raises:
        ConnectionError: the other side has gone.
        Refused: it sends something else, or said that it refuses this side.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    if length > _LIMIT_BYTES:
        raise Refused("the other side does not speak fxsplit's handshake", found=f"a message of {length} bytes")
    try:
        message = json.loads(_receive_exactly(connection, length))
    except (ValueError, RecursionError) as error:
        raise Refused("the other side does not speak fxsplit's handshake", found=str(error)) from error
    if not isinstance(message, dict):
        raise Refused("the other side does not speak fxsplit's handshake", found=type(message).__name__)
    if isinstance(refusal := message.get("refused"), dict):
        details = {key: refusal.get(key) for key in ("where", "found", "allowed", "hint")}
        raise Refused(str(refusal.get("what")), **{k: v for k, v in details.items() if isinstance(v, str)})
    return message


def refusal_of(error: WorkerError) -> dict[str, Any]:
    """The message that tells the other side why it is refused."""
    texts = {key: getattr(error, key) for key in ("what", "where", "found", "allowed", "hint")}
    return {"refused": {key: None if value is None else str(value) for key, value in texts.items()}}


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the other side closed the connection")
        data += part
    return bytes(data)


def keep_alive(connection: socket.socket) -> None:
    """Lets the kernel notice within some 30 s that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address of this host.

    Raises:
        DeviceError: none has.
    """
    if sys.platform.startswith("linux"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                except OSError:
                    continue  # an interface without an IPv4 address
                if socket.inet_ntoa(packed[20:24]) == address:
                    return name
    raise DeviceError(
        "no network interface has the address of this connection",
        found=address,
        allowed="an IPv4 address of this host, on Linux",
    )
