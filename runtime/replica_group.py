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
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, ProcessGroupGloo, Store

from fxsplit.errors import WorkerError
from fxsplit.runtime.packet import Key, Packet
from fxsplit.runtime.stopwatch import CPU
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

    def sum(self, tensor: Tensor, run: int, check: Check) -> None:
        """Replaces a tensor by its sum over all replicas, with the same bits on each.

        Between GPUs that is queued on the tensor's current stream, and done when `finish` returns.

        Args:
            tensor: contiguous, floating point or complex; of the same shape, dtype and kind of device on all.
            run: under way; when it is given up, this raises.
            check: raises if waiting makes no more sense.

        Raises:
            PipelineError: the run was given up.
            WorkerError: the replicas cannot reach each other.
        """
        check = self._until_given_up(run, check)
        plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        if self._group is None:
            self._group = self._formed(run, plain.device, check)
        own = plain if plain.device.type == self._device.type else plain.to(self._device)
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
        if own is not plain:
            plain.copy_(own)

    def finish(self, run: int, check: Check) -> None:
        """Waits for the sums that are queued; the arguments and errors are those of `sum`."""
        check = self._until_given_up(run, check)
        try:
            while self._last is not None and not self._last.is_completed():
                check()
                time.sleep(_POLL_S)
        except RuntimeError as error:
            self._explain(error, check)

    def gather(self, what: str, tensors: list[Tensor], run: int, check: Check) -> list[list[Tensor]]:
        """The tensors that each replica has, in their order; on the CPU, of any number and size."""
        check = self._until_given_up(run, check)
        mailbox = self._endpoint.mailbox
        keys = {name: Key(run, f"{what} of {name}", CLIENT, CLIENT, 0, False) for name in self.names}
        for peer in self._peers:
            self._endpoint.send(peer, keys[self._endpoint.name], Packet(tuple(tensors)))
        found = {self._endpoint.name: tensors}
        for peer in self._peers:
            packet: Packet = wait(mailbox.receive(keys[peer]), check)
            mailbox.forget(keys[peer])
            found[peer] = list(packet.payload)
        return [found[name] for name in self.names]

    def drop(self) -> None:
        """Forgets the process group: what is under way in it was given up, and another one is made when needed.

        Its end waits for what is under way, which ends when all members have dropped it; that is not waited for.
        """
        group, self._group = self._group, None
        self._last = None
        if group is not None:
            threading.Thread(target=_end, args=(group,), name="fxsplit replicas", daemon=True).start()

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
