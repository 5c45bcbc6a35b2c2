"""Threads beside the one that computes: one encodes and sends, one receives and decodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_all
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxsplit.runtime.packet import Key, Packet
from fxsplit.runtime.report import RunReport, Span
from fxsplit.runtime.stopwatch import CPU, moment
from fxsplit.runtime.streams import Marks, Streams, mark, wait_for, wait_on
from fxsplit.runtime.transport import Endpoint, wait
from fxsplit.schedules import Action

Decode = Callable[[Packet], Any]

SMALL_BYTES = 1 << 16
"""Of a packet whose sending costs more than its bytes do."""


class SendError(Exception):
    """What went wrong with a packet, and which action had made it."""

    def __init__(self, action: Action, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.action = action
        self.cause = cause


class Courier:
    """Takes packets away and brings them, so that a worker's computation goes on meanwhile.

    Packets leave in the order in which they were handed over. What arrives is decoded as soon as it is there if
    it was announced with `expect`: a worker announces what its next actions need, and no more, since what is
    decoded takes more memory than what is encoded.

    On a GPU both work on streams of their own. What needs no more there than a copy to be queued, or on the CPU no
    more than a small message, is done by the thread that hands it over: waking another one takes longer.

    Args:
        endpoint: this worker's end of the transport.
        threads: threads of one operation, as in the thread that computes: they can change the last bits.
    """

    def __init__(self, endpoint: Endpoint, threads: int) -> None:
        self._endpoint = endpoint
        self._sender = ThreadPoolExecutor(1, "fxsplit encode", torch.set_num_threads, (threads,))
        self._receiver = ThreadPoolExecutor(1, "fxsplit decode", torch.set_num_threads, (threads,))
        self._sending: list[tuple[Action, Future[None]]] = []
        self._expected: dict[Key, Future[Any]] = {}
        self._encoding, self._decoding = Streams(), Streams()
        self._lock = threading.Lock()
        self._links: list[Span] = []
        self._links_free_s: dict[str, float] = {}

    # ------------------------------------------------------------------ out

    def send(
        self,
        action: Action,
        to: str,
        key: Key,
        value: Any,
        make: Callable[[Any], Packet],
        report: RunReport,
        is_plain: bool = False,
    ) -> Future[None]:
        """Encodes and sends a packet in the background.

        Args:
            action: what made its content.
            to: the receiving worker, another than this one.
            key: its name.
            value: its content, for the current stream.
            make: encodes it.
            report: what is measured goes here.
            is_plain: whether encoding is nothing.

        Returns:
            done when it is encoded and handed to the transport.
        """

        # What goes as it is between GPUs of a process its receiver copies, behind the stream that is current here.
        is_queued = is_plain and isinstance(value, Tensor) and value.is_cuda and self._endpoint.is_immediate
        marks = () if is_queued else mark(value)

        def work() -> None:
            device = marks[0][0] if marks else CPU
            with self._encoding.current(device for device, _ in marks), torch.no_grad():
                wait_for(marks, value)
                start = moment(device)
                packet = make(value)
                report.encoded(key, packet, start, moment(device))
                handed_over_s = time.perf_counter()
                report.add_packet(to, key, packet)
                sent = self._endpoint.send(to, key, packet)
            sent.add_done_callback(lambda _: self._note(to, key, packet.wire_bytes, handed_over_s))

        job = _done(work) if is_queued or (is_plain and is_small(value)) else self._sender.submit(work)
        self._sending.append((action, job))
        return job

    def check(self) -> None:
        """Raises what went wrong with a packet since the last time.

        Raises:
            SendError: its cause and the action that the packet came from.
        """
        waiting = []
        for action, job in self._sending:
            if not job.done():
                waiting.append((action, job))
            elif (error := job.exception()) is not None:
                raise SendError(action, error) from error
        self._sending = waiting

    def finish(self) -> None:
        """Returns when all packets have been handed to the transport; raises as `check`.

        On a GPU, what is queued from now on comes after their encoding.
        """
        wait_all([job for _, job in self._sending])
        self._encoding.join()
        self.check()

    def send_all(self, to: str, packets: Sequence[tuple[Key, Packet]], report: RunReport) -> None:
        """Sends packets that are small and not encoded, together."""
        if packets:
            for key, packet in packets:
                report.add_packet(to, key, packet)
            self._endpoint.send_all(to, packets)

    # ------------------------------------------------------------------ in

    def expected(self, key: Key) -> Future[Any] | None:
        """What comes of a packet that was announced and not taken yet."""
        return self._expected.get(key)

    def expect(
        self, key: Key, decode: Decode, report: RunReport, device: torch.device, is_plain: bool = False
    ) -> None:
        """Announces a packet: it is decoded as soon as it is there.

        Args:
            key: its name.
            decode: what is done with it.
            report: what is measured goes here.
            device: where it is decoded.
            is_plain: whether decoding is nothing but to bring it there.
        """
        value = self._endpoint.mailbox.arrival()
        self._expected[key] = value

        def arrived(slot: Future[Packet]) -> None:
            if slot.exception() is not None:
                value.set_exception(slot.exception())
                return
            packet = slot.result()
            is_there = all(tensor.device.type == device.type for tensor in packet.payload)
            if is_plain and is_there and device.type == "cuda" and packet.marks:
                # Between GPUs what is there is queued, not done. It is copied when it is taken: a GPU has fewer
                # queues than there are streams, and a copy that waits may hold up what is queued on others later.
                value.set_result(partial(opened, packet))
            elif is_plain and is_there and device.type == "cpu":
                open_it(packet)
            elif not _submit(self._receiver, open_it, packet):
                value.cancel()

        def opened(packet: Packet) -> tuple[Any, Marks]:
            clock = CPU if is_plain else device  # a copy alone is not measured: its events take longer to queue
            with self._decoding.current([device]), torch.no_grad():
                wait_on(clock, packet.marks)
                start = moment(clock)
                decoded = decode(packet)
                marks: Marks = mark(decoded)
                end = moment(clock)
            with self._lock:
                report.decoded(key, packet, start, end)
            return decoded, marks

        def open_it(packet: Packet) -> None:
            try:
                found = opened(packet)
            except BaseException as error:
                value.set_exception(error)
            else:
                value.set_result(found)

        self._endpoint.mailbox.receive(key).add_done_callback(arrived)

    def take(self, key: Key, check: Callable[[], None]) -> Any:
        """What `decode` made of an announced packet, for the current stream; the host waits until it is queued."""
        value = self._expected[key]
        found = wait(value, check)
        result, marks = found() if callable(found) else found
        wait_for(marks, result)
        del self._expected[key]
        self._endpoint.mailbox.forget(key)
        return result

    # ------------------------------------------------------------------ ends

    def drain(self) -> None:
        """A run was given up: nothing of it is waited for any more."""
        wait_all([job for _, job in self._sending])
        self._sending.clear()
        self._expected.clear()

    def close(self) -> None:
        """Ends the threads after what they are doing."""
        self._sender.shutdown(wait=False, cancel_futures=True)
        self._receiver.shutdown(wait=False, cancel_futures=True)

    def links(self) -> list[Span]:
        """When packets were on their way, since the last time: until the receiver had them."""
        with self._lock:
            links, self._links = self._links, []
        return links

    def _note(self, to: str, key: Key, wire_bytes: int, handed_over_s: float) -> None:
        with self._lock:
            start = max(handed_over_s, self._links_free_s.get(to, 0.0))
            end = self._links_free_s[to] = time.perf_counter()
            self._links.append(Span.of_packet("send", key, wire_bytes, to).at(start, end))


def is_small(value: Any) -> bool:
    """Whether a tensor on the CPU is sent in less time than it takes to wake a thread for it."""
    return isinstance(value, Tensor) and not value.is_cuda and value.nbytes <= SMALL_BYTES


def _done(work: Callable[[], None]) -> Future[None]:
    """The future of work that is done here and now."""
    job: Future[None] = Future()
    try:
        work()
        job.set_result(None)
    except BaseException as error:
        job.set_exception(error)
    return job


def _submit(pool: ThreadPoolExecutor, work: Callable[[Packet], None], packet: Packet) -> bool:
    try:
        pool.submit(work, packet)
    except RuntimeError:  # the pipeline was closed
        return False
    return True
