"""Small packets between processes of one host: a message on a Unix socket each.

A call of torch's RPC passes through some ten threads on its way there and back, and each has to be woken; for a
packet of a few kilobytes that takes longer than all else (measured: 0.9 ms for one there and one back, where a
socket between two processes takes 0.04 ms). The sockets lie in a folder that no other user can enter, keep
messages whole, and are never waited for: what does not fit in at once goes by RPC. Only Linux has such sockets;
elsewhere all packets go by RPC.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from fxsplit.runtime.packet import Key, Packet, elements_of
from fxsplit.spec import TensorSpec

MESSAGE_BYTES = 1 << 16
"""The longest message."""

IS_SUPPORTED = sys.platform.startswith("linux")

_LENGTH = struct.Struct("=I")
_PLAIN = (bool, int, float, str, type(None), torch.Size, TensorSpec)


def encode_message(packets: Sequence[tuple[Key, Packet]]) -> bytes | None:
    """Packets as one message; None if they are too long for that, not on the CPU, or an object of some class."""
    tensors = [tensor for _, packet in packets for tensor in packet.payload]
    if sum(tensor.nbytes for tensor in tensors) > MESSAGE_BYTES or not all(map(_is_plain, tensors)):
        return None
    if not all(isinstance(packet.value, _PLAIN) for _, packet in packets):
        return None
    rows = [
        (
            tuple(key),
            [(tensor.dtype, tuple(tensor.shape), tensor.stride()) for tensor in packet.payload],
            packet.spec,
            packet.requires_grad,
            packet.value,
            packet.checksum,
            packet.origin,
        )
        for key, packet in packets
    ]
    described = pickle.dumps(rows, pickle.HIGHEST_PROTOCOL)
    message = b"".join((_LENGTH.pack(len(described)), described, *map(_bytes_of, tensors)))
    return message if len(message) <= MESSAGE_BYTES else None


def decode_message(message: bytearray) -> list[tuple[Key, Packet]]:
    """The packets of a message, in memory of their own."""
    (length,) = _LENGTH.unpack_from(message)
    offset = _LENGTH.size + length
    packets = []
    rows = pickle.loads(memoryview(message)[_LENGTH.size : offset])
    for key, layouts, *described in rows:
        payload = []
        for dtype, shape, strides in layouts:
            tensor = torch.empty_strided(shape, strides, dtype=dtype)
            if count := tensor.numel():
                flat = torch.frombuffer(message, dtype=dtype, count=count, offset=offset)
                elements_of(tensor).copy_(flat)
                offset += tensor.nbytes
            payload.append(tensor)
        packets.append((Key(*key), _packet(tuple(payload), *described)))
    return packets


def _packet(
    payload: tuple[Tensor, ...], spec: Any, requires_grad: bool, value: Any, checksum: int, origin: Any
) -> Packet:
    return Packet(payload, spec, requires_grad, value, checksum, origin=origin)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is all of its memory, as what RPC sends is made to be, on the CPU."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() == tensor.nbytes


def _bytes_of(tensor: Tensor) -> bytes:
    return elements_of(tensor).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@contextlib.contextmanager
def _short_name(folder: str) -> Iterator[str]:
    """Another name of a folder: that of a socket has 107 bytes at most, and temporary folders may lie deep."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


class Lanes:
    """One process's sockets to the other processes of its host.

    There is no thread that reads: whoever waits for a packet does, so that nobody else has to be woken for it.

    Args:
        name: the worker.
        deliver: takes packets that have come.
    """

    def __init__(self, name: str, deliver: Callable[[Sequence[tuple[Key, Packet]]], None]) -> None:
        self._name = name
        self._deliver = deliver
        self._peers: dict[str, socket.socket] = {}
        self._listener: socket.socket | None = None
        self._waiters = threading.local()

    def listen(self, folder: str, rank: int, world_size: int) -> None:
        """Lets others connect.

        Args:
            folder: private to this user; it may be removed once all are connected.
            rank: of this process.
            world_size: processes.
        """
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with _short_name(folder) as short:
            self._listener.bind(f"{short}/lane{rank}")
        self._listener.listen(world_size)

    def connect(self, folder: str, rank: int, world_size: int, timeout_s: float) -> None:
        """Connects each process with each, once all listen.

        Raises:
            OSError: one of them is gone.
        """
        assert self._listener is not None
        with self._listener as listener:
            listener.settimeout(timeout_s)
            found = []
            for other in range(rank):
                found.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                found[-1].settimeout(timeout_s)
                with _short_name(folder) as short:
                    found[-1].connect(f"{short}/lane{other}")
            for _ in range(rank + 1, world_size):
                found.append(listener.accept()[0])
                found[-1].settimeout(timeout_s)
            for peer in found:
                peer.send(self._name.encode())
            for peer in found:
                self._peers[peer.recv(MESSAGE_BYTES).decode()] = peer
                peer.setblocking(False)

    def send(self, to: str, packets: Sequence[tuple[Key, Packet]]) -> bool:
        """Sends packets together, if they are small and there is room for them now; else says that it has not."""
        peer = self._peers.get(to)
        message = None if peer is None else encode_message(packets)
        if peer is None or message is None:
            return False
        try:
            return peer.send(message) == len(message)
        except OSError:  # no room, or nobody there: of the latter RPC knows more
            return False

    def fetch(self, future: Future[Any], timeout_s: float | None) -> None:
        """Takes what comes until a future is done or the time is over."""
        if not hasattr(self._waiters, "waiter"):
            self._waiters.waiter = _Waiter(self._peers.values())
        waiter: _Waiter = self._waiters.waiter
        future.add_done_callback(waiter.wake)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not future.done() and (end is None or time.monotonic() < end):
            for message in waiter.messages(end):
                self._deliver(decode_message(message))

    def close(self) -> None:
        """Ends the connections; may be called twice."""
        if self._listener is not None:
            self._listener.close()
        while self._peers:
            self._peers.popitem()[1].close()


class _Waiter:
    """A thread that waits for messages of peers, and for other threads that wake it."""

    def __init__(self, peers: Iterable[socket.socket]) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.get_ident()
        self._peers = {peer.fileno(): peer for peer in peers}
        self._buffer = bytearray(MESSAGE_BYTES)
        self._poll = select.poll()
        for descriptor in (self._event, *self._peers):
            self._poll.register(descriptor, select.POLLIN)

    def wake(self, _: Any) -> None:
        """Ends the wait of the thread, if this is another one."""
        if threading.get_ident() != self._thread:
            os.eventfd_write(self._event, 1)

    def messages(self, end: float | None) -> Iterator[bytearray]:
        """Those that are there, waited for until a time by `time.monotonic`."""
        wait_ms = None if end is None else max(0.0, end - time.monotonic()) * 1e3
        for descriptor, _ in self._poll.poll(wait_ms):
            try:
                if descriptor == self._event:
                    os.eventfd_read(self._event)
                    continue
                size = self._peers[descriptor].recv_into(self._buffer)
            except BlockingIOError:  # another thread was here before
                continue
            except OSError:
                size = 0
            if size:
                yield self._buffer[:size]
            else:
                self._poll.unregister(descriptor)

    def __del__(self) -> None:
        os.close(self._event)
