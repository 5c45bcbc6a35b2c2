"""The RPC transport: workers are processes, connected by `torch.distributed.rpc` (TensorPipe)."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch._C._distributed_c10d import FileStore, Store
from torch._C._distributed_rpc import TensorPipeAgent, WorkerInfo
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc

from fxsplit.errors import PipelineError, WorkerError
from fxsplit.runtime import device_maps, door
from fxsplit.runtime.arrivals import Departures
from fxsplit.runtime.gate import Gate, join_timeout_s
from fxsplit.runtime.handshake import interface_of
from fxsplit.runtime.lanes import IS_SUPPORTED, Lanes
from fxsplit.runtime.launch import WorkerProcess, WorkerSettings
from fxsplit.runtime.packet import Key, Packet, checksum_of, ready_to_send
from fxsplit.runtime.pulse import Heartbeats
from fxsplit.runtime.transport import CLIENT_NAME, LOOPBACK, CommandHandler, Endpoint, LostWorker, Mailbox

START_TIMEOUT_S = 60.0

_endpoint: RpcEndpoint | None = None
"""This process's end: `torch.distributed.rpc` is one to a process, and calls functions, not methods."""


def _deliver(packets: Sequence[tuple[Key, Packet]]) -> None:
    if (endpoint := _endpoint) is None:
        return
    for key, packet in packets:
        if packet.checksum == checksum_of(key, packet):
            endpoint.mailbox.deliver(key, packet)
        else:
            endpoint.mailbox.refuse(key, f"the {key} was damaged on its way to {endpoint.name}")


def _hello() -> None:
    """Nothing: the connection is what counts."""


def _call_all(addresses: Sequence[str], function: Callable[[], None]) -> None:
    for answer in [rpc.rpc_async(address, function, timeout=START_TIMEOUT_S) for address in addresses]:
        answer.wait()


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _command(command: str, arguments: tuple[Any, ...]) -> torch.futures.Future[Any]:
    result: torch.futures.Future[Any] = torch.futures.Future()
    endpoint = _endpoint
    if endpoint is None:
        result.set_exception(RuntimeError("this worker is shutting down"))
        return result
    endpoint.handler(command, arguments).add_done_callback(lambda done: _copy(done, result))
    return result


def _copy(done: Future[Any], result: torch.futures.Future[Any]) -> None:
    error = done.exception()
    if error is not None:
        result.set_exception(error)
    else:
        result.set_result(done.result())


class RpcEndpoint:
    """One process's end of the RPC transport.

    Args:
        name: the worker.
        session: makes the names of RPC workers unique: torch remembers those of earlier pipelines.
        handler: runs commands that arrive.
    """

    is_immediate = False

    def __init__(self, name: str, session: str, handler: CommandHandler) -> None:
        self.name = name
        self._lanes = Lanes(name, _deliver)
        self.mailbox = Mailbox(self._lanes.fetch if IS_SUPPORTED else None)
        self.handler = handler
        self.interface = LOOPBACK
        self._session = session
        self._direct: dict[str, torch.device] = {}
        self._infos: dict[str, WorkerInfo] = {}
        self._departures = Departures(name)

    def join(
        self,
        store: Store,
        rank: int,
        world_size: int,
        interface: str = LOOPBACK,
        gpus: Mapping[str, int] | None = None,
        folder: str | None = None,
    ) -> None:
        """Becomes a member of the RPC group, listening on one interface; returns when all are there.

        Args:
            store: by which they meet.
            rank: the client's is 0.
            world_size: members of the group.
            interface: of the network.
            gpus: of the workers, as the client knows them; see `device_maps.sole_gpus`.
            folder: where they meet if all are processes of this host; private to this user.
        """
        global _endpoint
        _endpoint, self.interface = self, interface
        maps = device_maps.peers_of(self.name, device_maps.exchange(store, self.name, rank, gpus or {}))
        self._direct = {peer: next(iter(pairs)) for peer, pairs in maps.items()}
        by_address = {self._address(peer): dict(pairs) for peer, pairs in maps.items()}
        channels, reverse, devices = device_maps.options_of(by_address)
        # Sockets alone: the shared memory transport polls with a thread that is never idle, in every process, and
        # on few cores the stages then compute several times slower (measured: 7 s a step instead of 1).
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=4, rpc_timeout=0, _transports=["uv"], _channels=channels
        )
        for address, pairs in by_address.items():
            options.set_device_map(address, pairs)  # type: ignore[arg-type]
        with warnings.catch_warnings(), _environment(TP_SOCKET_IFNAME=interface):
            warnings.simplefilter("ignore")  # torch warns of its own use of a deprecated function at each start
            dist_autograd._init(rank)  # type: ignore[attr-defined]
            # Not init_rpc: it prefixes the store with a counter that differs between a client with its second
            # pipeline and a fresh worker, and makes a process group of gloo, which waits for ever for a peer that
            # has died.
            address = self._address(self.name)
            agent = TensorPipeAgent(store, address, rank, world_size, options, reverse, devices)
            rpc.api._init_rpc_states(agent)
        door.opened(store.get(f"addrs/{address}").decode())
        others = [info.name for info in agent.get_worker_infos() if info.name != address]
        folder = folder if IS_SUPPORTED else None
        if folder is not None:
            self._lanes.listen(folder, rank, world_size)
        for word in ("member", "ready to go"):  # twice: the client's store ends with this call
            store.set(f"{word}/{rank}", "1")
            if word == "member" or rank == 0:
                store.wait([f"{word}/{other}" for other in range(world_size)])
            if word == "member":  # TensorPipe connects at the first call
                _call_all(others, _hello)
                if folder is not None:
                    self._lanes.connect(folder, rank, world_size, START_TIMEOUT_S)
        if rank == 0:
            _call_all(others, door.shut)
            door.shut()

    def send(self, to: str, key: Key, packet: Packet) -> Future[None]:
        """Hands the packet to TensorPipe, which sends it in the background."""
        return self.send_all(to, [(key, packet)])

    def send_all(self, to: str, packets: Sequence[tuple[Key, Packet]]) -> Future[None]:
        """Hands packets to TensorPipe as one message, or to a process of this host if they are small."""
        direct = self._direct.get(to)
        ready = [(key, ready_to_send(key, packet, direct, self._departures.origin(to))) for key, packet in packets]
        if self._lanes.send(to, ready):
            sent: Future[None] = Future()
            sent.set_result(None)
            return sent
        return self._invoke(to, _deliver, ready)

    def call(self, to: str, command: str, *arguments: Any) -> Future[Any]:
        """Runs a command there."""
        return self._invoke(to, _command, command, arguments)

    def close(self) -> None:
        """Leaves the group at once; a graceful shutdown would wait for peers that may be dead."""
        global _endpoint
        self._lanes.close()
        if _endpoint is self:
            _endpoint = None
            with _without_agent_warnings():
                rpc.shutdown(graceful=False)

    def _address(self, name: str) -> str:
        return f"{name.replace('.', '_')}-{self._session}"

    def _invoke(self, to: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        result: Future[Any] = Future()
        try:
            if to not in self._infos:
                self._infos[to] = rpc.get_worker_info(self._address(to))
            answer = rpc.rpc_async(self._infos[to], function, args=arguments, timeout=0)
        except RuntimeError as error:
            result.set_exception(WorkerError(f"worker {to} cannot be reached", where=to, found=str(error)))
            return result
        answer.add_done_callback(lambda done: _resolve(to, done, result))
        return result


def _resolve(to: str, done: torch.futures.Future[Any], result: Future[Any]) -> None:
    if result.cancelled():
        return
    try:
        result.set_result(done.value())
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        result.set_exception(WorkerError(f"worker {to} did not answer", where=to, found=first_line))


@contextmanager
def _without_agent_warnings() -> Iterator[None]:
    """Drops what TensorPipe says of connections that end, which is what a shutdown is; all else goes through."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as lines:
        os.dup2(lines.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            lines.seek(0)
            for line in lines:
                if b"tensorpipe_agent.cpp" not in line:
                    os.write(2, line)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, variables):
        yield


class Rpc:
    """Worker processes, connected by TensorPipe.

    Those of this host are started by `python -m fxsplit.runtime.worker_main`; they meet in a private temporary
    folder, so that no port listens for them, and TensorPipe is bound to the loopback interface. With `listen`,
    workers of other machines are waited for instead, and TensorPipe is bound to the interface that they reach. A
    worker ends when the client's process does, however that ends.

    Args:
        listen: "HOST:PORT" at which named workers join; None: all are started here.
        token: what they must know.
        joining: the devices of each worker that joins, by name.
        is_restart: whether workers join again, and a stray one of before may, too.

    Attributes:
        gpus: the workers between which tensors go from GPU to GPU, each with its device; see `device_maps`.
    """

    name = "rpc"

    def __init__(
        self,
        listen: str | None = None,
        token: str = "",
        joining: Mapping[str, Sequence[str]] | None = None,
        is_restart: bool = False,
    ) -> None:
        self._listen = listen
        self._token = token
        self._joining = dict(joining or {})
        self._is_restart = is_restart
        self.gpus: Mapping[str, int] = {}
        self._processes: list[WorkerProcess] = []
        self._gate: Gate | None = None
        self._endpoint: RpcEndpoint | None = None
        self._closed = threading.Event()
        self._heartbeats = Heartbeats()

    def start(self, workers: Sequence[str], handler: CommandHandler) -> Endpoint:
        """Starts one process a worker, or waits for it, and joins the group with them."""
        if _endpoint is not None:
            raise PipelineError(
                "this process has an open pipeline already",
                found="a second pipeline over RPC",
                allowed="one pipeline over RPC in a process at a time",
                hint='close the first one (pipe.close()), or use transport="in_process"',
            )
        session = os.urandom(4).hex()
        try:
            self._endpoint = RpcEndpoint(CLIENT_NAME, session, handler)
            if self._listen is None:
                self._start_here(workers, session, self._endpoint)
            else:
                self._let_in(workers, session, self._endpoint)
            self._heartbeats.begin(tuple(workers))
        except BaseException:
            self.close()
            raise
        return self._endpoint

    def _start_here(self, workers: Sequence[str], session: str, endpoint: RpcEndpoint) -> None:
        folder = tempfile.mkdtemp(prefix="fxsplit-")  # readable by this user alone
        try:
            path = os.path.join(folder, "store")
            store = FileStore(path, len(workers) + 1)
            store.set_timeout(datetime.timedelta(seconds=START_TIMEOUT_S))
            for rank, name in enumerate(workers, start=1):
                settings = WorkerSettings(name, session, rank, len(workers) + 1, path, torch.get_num_threads())
                with self._heartbeats.line_to(name) as (pulse, page):
                    self._processes.append(WorkerProcess(replace(settings, pulse=pulse, page=page)))
            self._await_ready(store)
            endpoint.join(store, 0, len(workers) + 1, gpus=self.gpus, folder=folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _let_in(self, workers: Sequence[str], session: str, endpoint: RpcEndpoint) -> None:
        """Workers with a name join from where they are; the others are started here and join, too."""
        assert self._listen is not None
        patience_s = join_timeout_s()
        wanted = {name: self._joining.get(name, ()) for name in workers}
        heard = self._heartbeats.heard
        self._gate = Gate(
            self._listen, self._token, wanted, session, torch.get_num_threads(), heard, self._is_restart
        )
        for name in workers:
            if name not in self._joining:
                settings = WorkerSettings(
                    name, session, 0, 0, "", torch.get_num_threads(), join=self._listen, token=self._token
                )
                with self._heartbeats.page_for(name) as page:
                    self._processes.append(WorkerProcess(replace(settings, page=page)))
        self._gate.await_all(patience_s, self._check_processes)
        address = self._gate.members[workers[0]].address if workers else "127.0.0.1"
        endpoint.join(self._gate.store, 0, len(workers) + 1, interface_of(address), self.gpus)

    def _check_processes(self) -> None:
        if lost := self._lost_process():
            raise WorkerError(
                f"a worker did not start: worker {lost.name}, {lost.cause}", hint="its own message is above"
            )

    def _await_ready(self, store: Store) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        waiting = [process.settings.name for process in self._processes]
        while waiting:
            self._check_processes()
            if time.monotonic() > end:
                raise WorkerError(
                    "workers did not start in time",
                    found=", ".join(waiting),
                    allowed=f"{START_TIMEOUT_S:.0f} s",
                )
            waiting = [name for name in waiting if not store.check([f"ready/{name}"])]
            time.sleep(0.02)

    def describe(self) -> dict[str, tuple[str, int]]:
        """Host and process id of each worker, the client's included."""
        here = socket.gethostname()
        places = {CLIENT_NAME: (here, os.getpid())}
        places |= {process.settings.name: (here, process.pid) for process in self._processes}
        if self._gate is not None:
            places |= {n: (m.identity.host, m.identity.pid) for n, m in self._gate.members.items()}
        return places

    def in_this_thread(self) -> Mapping[str, Any]:
        """Workers are processes."""
        return {}

    def lost(self, timeout_s: float) -> LostWorker | None:
        """The first worker whose process, or connection, has ended; or which has been silent for so long."""
        if lost := self._lost_process():
            return replace(lost, place=self._heartbeats.place(lost.name))
        if self._gate is not None and (ended := self._gate.lost()):
            return replace(ended, place=self._heartbeats.place(ended.name))
        if (silent := self._heartbeats.silent(timeout_s)) is None:
            return None
        name, silence_s = silent
        host, pid = self.describe()[name]
        cause = f"process {pid} on {host} has not been heard of for {silence_s:.1f} s: it hangs, or is cut off"
        return LostWorker(name, cause, self._heartbeats.place(name))

    def _lost_process(self) -> LostWorker | None:
        for process in self._processes:
            if (ending := process.ending()) is not None:
                return LostWorker(process.settings.name, f"process {process.pid} {ending}")
        return None

    def restarted(self) -> Rpc:
        """Ends the processes at once; workers that have joined are told to join again."""
        for process in self._processes:
            process.kill()
        self.close(rejoins=True)
        other = Rpc(self._listen, self._token, self._joining, is_restart=True)
        other.gpus = self.gpus
        return other

    def close(self, rejoins: bool = False) -> None:
        """Leaves the group and ends the processes; those that do not end by themselves are killed.

        Args:
            rejoins: whether workers that have joined are to join again.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self._heartbeats.close()
        if self._endpoint is not None:
            self._endpoint.close()
        if self._gate is not None:
            self._gate.close(rejoins)
        for process in self._processes:
            process.hang_up()
        for process in self._processes:
            process.end()
