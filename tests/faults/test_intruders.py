"""Whoever connects without the token changes nothing for those who have it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fxsplit
from benchmarks.reliability.faults import descriptors, listening_ports
from benchmarks.reliability.garbage import disturbed
from fxsplit.errors import DeviceError, WorkerError
from fxsplit.runtime.gate import Gate
from fxsplit.runtime.join import join
from tests.faults.scripts import assert_same, batch, small_model, train
from tests.test_joining import TOKEN, free_port, joining

OPTIONS: dict[str, Any] = {"cuts": ["3"], "chunks": 2, "verify": False}


def undisturbed(devices: list[str]) -> dict[str, torch.Tensor]:
    """What comes of six steps where nobody connects."""
    with fxsplit.compile(small_model(), devices, transport="in_process", **OPTIONS) as pipe:
        torch.manual_seed(1)
        return train(pipe, 6)


def test_noise_at_every_port_does_not_disturb_training() -> None:
    """That of the client for workers to join at is the only one."""
    devices = ["cpu", "server/cpu"]
    expected = undisturbed(devices)
    port = free_port()
    address: dict[str, Any] = {"listen": f"127.0.0.1:{port}", "token": TOKEN}
    with joining(port, "server"), fxsplit.compile(small_model(), devices, **address, **OPTIONS) as pipe:
        pids = [worker.pid for worker in pipe.workers]
        assert [port for pid in pids for port in listening_ports(pid)] == [port]
        torch.manual_seed(1)
        with disturbed([port]):
            found = train(pipe, 6)
        assert [worker.pid for worker in pipe.workers] == pids
    assert_same(found, expected)


@pytest.mark.faults
def test_noise_at_the_ports_of_replicas_does_not_disturb_training() -> None:
    """Each keeps one open, at which the others have found it."""
    devices = ["cpu", "one/cpu+two/cpu"]
    expected = undisturbed(devices)
    noise = contextlib.ExitStack()
    with noise, fxsplit.compile(small_model(), devices, **OPTIONS) as pipe:

        def connect(step: int) -> None:
            if step == 1:  # all are connected
                ports = [port for worker in pipe.workers for port in listening_ports(worker.pid)]
                assert len(ports) == 2
                noise.enter_context(disturbed(ports))

        torch.manual_seed(1)
        found = train(pipe, 6, connect)
    assert_same(found, expected)


@pytest.mark.faults
def test_noise_at_the_gate_shuts_nobody_out() -> None:
    """Before a worker has joined, and afterwards; threads and descriptors come back."""
    port, (x, y) = free_port(), batch(0)
    before = descriptors(os.getpid())

    def shout() -> None:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                break
            time.sleep(0.05)
        with disturbed([port]):
            time.sleep(1.0)

    thread = threading.Thread(target=shout)
    thread.start()
    options: dict[str, Any] = {"cuts": ["3"], "listen": f"127.0.0.1:{port}", "token": TOKEN, "verify": False}
    with joining(port, "server"), fxsplit.compile(small_model(0.0), ["cpu", "server/cpu"], **options) as pipe:
        thread.join()
        with disturbed([port]):
            loss: Tensor = pipe.step(x, target=y, loss_fn=F.cross_entropy).loss
        reference = F.cross_entropy(small_model(0.0)(x), y)
        assert torch.allclose(loss, reference)
    end_s = time.monotonic() + 15.0
    while descriptors(os.getpid()) > before + 2 or sum(t.name == "fxsplit joined" for t in threading.enumerate()):
        assert time.monotonic() < end_s, "connections are left"
        time.sleep(0.1)


HALF_OPEN = {
    "nothing is said": (b"", False),
    "half a length": (b"\0\0", False),
    "half a message": (b"\0\0\0\x40" + b'{"nonce": "0", "proof"', False),
    "one end is shut": (b"", True),
}


@pytest.mark.parametrize("case", HALF_OPEN)
def test_half_open_connections_do_not_fill_the_gate(case: str) -> None:
    said, is_shut = HALF_OPEN[case]
    port = free_port()
    gate = Gate(f"127.0.0.1:{port}", TOKEN, {"server": ["cpu"]}, "session", 1)
    with contextlib.ExitStack() as silent:
        try:
            for _ in range(200):
                peer = silent.enter_context(socket.create_connection(("127.0.0.1", port), timeout=2.0))
                with contextlib.suppress(OSError):  # the gate has given it up for later ones already
                    peer.sendall(said)
                    if is_shut:
                        peer.shutdown(socket.SHUT_WR)
            member = join(f"127.0.0.1:{port}", "server", TOKEN, None, 5.0)
            assert gate.missing == [] and len(gate._pending) <= 65
            member.connection.close()
        finally:
            gate.close()


def test_a_guessed_token_is_refused_and_the_right_one_taken() -> None:
    port = free_port()
    gate = Gate(f"127.0.0.1:{port}", TOKEN, {"server": ["cpu"]}, "session", 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for guess in ("", "a", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é" * 40):
                with pytest.raises(WorkerError, match="the token is not the client's"):
                    join(f"127.0.0.1:{port}", "server", guess, None, 5.0)
        assert gate.has_problem is None and gate.missing == ["server"]
        join(f"127.0.0.1:{port}", "server", TOKEN, None, 5.0).connection.close()
    finally:
        gate.close()


def test_a_second_client_at_the_port_leaves_the_first_as_it_is() -> None:
    port = free_port()
    gate = Gate(f"127.0.0.1:{port}", TOKEN, {"server": ["cpu"]}, "session", 1)
    options: dict[str, Any] = {"cuts": ["3"], "listen": f"127.0.0.1:{port}", "token": TOKEN, "verify": False}
    try:
        with pytest.raises(DeviceError, match="in use already"):
            fxsplit.compile(small_model(), ["cpu", "server/cpu"], example_inputs=batch(0)[0], **options)
        member = join(f"127.0.0.1:{port}", "server", TOKEN, None, 5.0)
        assert member.session == "session" and gate.missing == []
        member.connection.close()
    finally:
        gate.close()
