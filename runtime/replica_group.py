"""The process group of the replicas of a stage: torch's own gloo or NCCL, with no other worker in it.

It is made directly, not by `torch.distributed.init_process_group`: that is one to a process, and in-process
workers are threads of one. Its members meet by packets between them, so that they need no store that outlives the
start of the workers, and no address that the client would have to know.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, ProcessGroupGloo, Store

from fxsplit.errors import WorkerError
from fxsplit.runtime.packet import Key, Packet
from fxsplit.runtime.stopwatch import CPU
from fxsplit.runtime.streams import Marks, Streams, mark, wait_for
from fxsplit.runtime.transport import Endpoint, wait, wait_done
from fxsplit.schedules.replicas import replicas_of
from fxsplit.stage import CLIENT

_MEET_S = 60.0
_NEVER = datetime.timedelta(days=7)  # a peer may compute for long; whether it lives is the client's to find out
_BROKEN_WAIT_S = 60.0
_POLL_S = 1e-4

Check = Callable[[], None]
"""Raises if waiting makes no more sense."""


class PacketStore(Store):
    """A store for a few members, each of which sends what it sets to all others.

    Args:
        endpoint: of this worker.
        peers: the other members.
        run: with which the store ends.
        about: what is stored, for the packets' names.
        check: raises to end a wait.
    """

    def __init__(self, endpoint: Endpoint, peers: tuple[str, ...], run: int, about: str, check: Check) -> None:
        super().__init__()
        self._endpoint, self._peers, self._run, self._about, self._check = endpoint, peers, run, about, check
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        """Sets a value, once."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        for peer in self._peers:
            packet = Packet((torch.frombuffer(bytearray(data), dtype=torch.uint8),))
            self._endpoint.send(peer, self._key(key), packet)

    def get(self, key: str) -> bytes:
        """A value, waited for."""
        if key not in self._values:
            packet: Packet = wait(self._endpoint.mailbox.receive(self._key(key)), self._check)
            self._values[key] = packet.payload[0].numpy().tobytes()
            self._endpoint.mailbox.forget(self._key(key))
        return self._values[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Returns when all keys are there."""
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there already."""
        return all(key in self._values or self._endpoint.mailbox.receive(self._key(key)).done() for key in keys)

    def _key(self, key: str) -> Key:
        return Key(self._run, f"{key} of {self._about}", CLIENT, CLIENT, 0, False)


class ReplicaGroup:
    """The replicas of a stage, as one of them sees them.

    Args:
        endpoint: of this worker.
        worker: all replicas, as the worker of their stages.

    Attributes:
        names: of the replicas.
        rank: of this one.
        is_within_process: whether all are in one process.
    """

    def __init__(self, endpoint: Endpoint, worker: str) -> None:
        self.names = replicas_of(worker)
        self.rank = self.names.index(endpoint.name)
        self.is_within_process = endpoint.is_immediate
        self._endpoint = endpoint
        self._peers = tuple(name for name in self.names if name != endpoint.name)
        self._worker = worker
        self._group: Any = None
        self._store: PacketStore | None = None  # torch's own reference does not keep a store of Python's alive
        self._is_on_gpus = False
        self._device = CPU  # on which its sums are made
        self._last: Any = None  # that is queued
        self._turn = 0
        self._pool: ThreadPoolExecutor | None = None
        self._streams = Streams()

    def sum(self, tensor: Tensor, run: int, check: Check) -> Future[Marks]:
        """Replaces a tensor by its sum over all replicas, with the same bits on each, in a thread of the group's.

        The connections are made there, too, for which all replicas are waited for; the caller may be the thread of
        several replicas.

        Args:
            tensor: contiguous, floating point or complex; of the same shape, dtype and kind of device on all.
            run: under way; when it is given up, this fails.
            check: raises if waiting makes no more sense.

        Returns:
            Done when the sum is made, or on GPUs queued; then what to wait for before the tensor is read. It fails
            with a PipelineError if the run was given up, a WorkerError if replicas cannot reach each other.
        """
        plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        return self._work().submit(self._sum, plain, mark(plain), run, self._until_given_up(run, check))

    def _sum(self, tensor: Tensor, marks: Marks, run: int, check: Check) -> Marks:
        with self._streams.current([tensor.device]), torch.no_grad():
            wait_for(marks, tensor)
            if self._group is None:
                self._group = self._formed(run, tensor.device, check)
            if self.is_within_process:
                self._meet(run, check)
            own = tensor if tensor.device.type == self._device.type else tensor.to(self._device)
            options = AllreduceOptions()
            options.timeout = _NEVER
            try:
                work = self._group.allreduce([own], options)
                if self._is_on_gpus:
                    work.wait()  # the stream waits, not the host
                    self._last = work
                else:
                    _await(work, check)
            except RuntimeError as error:
                self._explain(error, check)
            if own is not tensor:
                tensor.copy_(own)
            return mark(tensor)

    def _meet(self, run: int, check: Check) -> None:
        """Returns when all replicas are here: until then nobody's GPU waits for another's.

        One thread may queue the work of all of them, and must not wait for a GPU that waits for its next work.
        """
        self._turn += 1
        slots = self.exchange(f"turn {self._turn}", torch.empty(0), run)
        for slot in slots.values():
            wait(slot, check)

    def finish(self, run: int, check: Check) -> Future[None]:
        """Done when the sums are that were asked for; the arguments and errors are those of `sum`."""
        return self._work().submit(self._finish, self._until_given_up(run, check))

    def _finish(self, check: Check) -> None:
        try:
            while self._last is not None and not self._last.is_completed():
                check()
                time.sleep(_POLL_S)
        except RuntimeError as error:
            self._explain(error, check)

    def exchange(self, what: str, tensor: Tensor, run: int) -> dict[str, Future[Packet]]:
        """Gives a tensor on the CPU to all replicas, and returns what comes from each, this one included."""
        mailbox = self._endpoint.mailbox
        keys = {name: Key(run, f"{what} of {name}", CLIENT, CLIENT, 0, False) for name in self.names}
        own = self._endpoint.name
        for peer in self._peers:
            self._endpoint.send(peer, keys[own], Packet((tensor,)))
        mailbox.deliver(keys[own], Packet((tensor,)))
        return {name: mailbox.receive(keys[name]) for name in self.names}

    def drop(self) -> None:
        """Forgets the process group: what is under way in it was given up, and another one is made when needed.

        Its end waits for what is under way, which ends when all members have dropped it; that is not waited for.
        """
        group, self._group = self._group, None
        self._last, self._turn = None, 0
        if self._pool is not None:  # its thread may be waiting for a replica that does not come
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        if group is not None:
            threading.Thread(target=_end, args=(group,), name="fxsplit replicas", daemon=True).start()

    def _work(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "fxsplit replicas")
        return self._pool

    # ------------------------------------------------------------------ making it

    def _formed(self, run: int, device: torch.device, check: Check) -> Any:
        """A process group; every replica makes it at the same place of the same run."""
        about = f"the replicas {self._worker}"
        self._store = store = PacketStore(self._endpoint, self._peers, run, about, check)
        store.set(f"device/{self.rank}", _unique_name(device))
        devices = [store.get(f"device/{rank}").decode() for rank in range(len(self.names))]
        # NCCL takes no two members on one GPU.
        self._is_on_gpus = device.type == "cuda" and len(set(devices)) == len(devices)
        self._device = device if self._is_on_gpus else CPU
        try:
            if self._is_on_gpus:
                return _nccl(store, self.rank, len(self.names))
            gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._devices = [ProcessGroupGloo.create_device(interface=self._endpoint.interface)]
            gloo._timeout = datetime.timedelta(seconds=_MEET_S)
            return ProcessGroupGloo(store, self.rank, len(self.names), gloo)
        except RuntimeError as error:
            self._explain(error, check)

    def _explain(self, error: RuntimeError, check: Check) -> None:
        """A peer has gone, most likely: then the client says so, and gives the run up."""
        self.drop()
        end = time.monotonic() + _BROKEN_WAIT_S
        while time.monotonic() < end:
            check()
            time.sleep(10 * _POLL_S)
        raise WorkerError(
            "the replicas of a stage cannot reach each other",
            where=f"worker {self._endpoint.name}",
            found=str(error).partition("\n")[0],
            allowed=f"connections between {', '.join(self.names)}",
            hint="open the network between their hosts",
        ) from error

    def _until_given_up(self, run: int, check: Check) -> Check:
        # Nobody sends this packet: its slot fails when the run is given up.
        slot = self._endpoint.mailbox.receive(Key(run, f"the end of {self._worker}", CLIENT, CLIENT, 0, False))

        def look() -> None:
            if slot.done():
                slot.result()
            check()

        return look


def _await(work: Any, check: Check) -> None:
    done: Future[None] = Future()
    work.get_future().add_done_callback(lambda _: done.set_result(None))
    wait_done(done, check)
    work.wait()  # raises what went wrong


def _unique_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).uuid)


def _nccl(store: Store, rank: int, size: int) -> Any:
    from torch._C._distributed_c10d import ProcessGroupNCCL  # torch for the CPU alone has none

    options = ProcessGroupNCCL.Options()
    options._timeout = _NEVER
    return ProcessGroupNCCL(store, rank, size, options)


def _end(group: Any) -> None:
    with suppress(RuntimeError):
        group.abort()
    del group
