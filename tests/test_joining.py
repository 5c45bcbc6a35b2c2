"""Workers that join over a socket: the handshake, its refusals on both sides, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import fxsplit
from fxsplit.cli import app
from fxsplit.errors import DeviceError, FxsplitError, PlanError, WorkerError
from fxsplit.planning import parse_devices
from fxsplit.runtime import gate as gate_module
from fxsplit.runtime import handshake
from fxsplit.runtime.handshake import Identity, proof, receive_message, send_message
from fxsplit.runtime.join import join
from fxsplit.runtime.transports import listening
from tests.models import images, mobilenet
from tests.processes import SOON_S

ROOT = Path(__file__).parent.parent
TOKEN = "a token of the tests"
LABELS = torch.arange(4)


def free_port() -> int:
    """A port that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def joining(port: int, name: str, token: str = TOKEN) -> Iterator[subprocess.Popen[str]]:
    """A worker process that joins."""
    command = [sys.executable, "-m", "fxsplit", "worker", "--join", f"127.0.0.1:{port}", "--name", name]
    environment = {**os.environ, "FXSPLIT_TOKEN": token, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def options(port: int) -> dict[str, Any]:
    return {"cuts": ["features.5"], "listen": f"127.0.0.1:{port}", "token": TOKEN, "chunks": 2, "verify": False}


def test_a_worker_joins_trains_and_ends_with_its_client() -> None:
    """One that joins and one that the client starts; the numbers are those of local workers."""
    port, x = free_port(), images(4)
    devices, cuts = ["cpu", "server/cpu", "cpu:0"], ["features.5", "features.14"]
    with fxsplit.compile(
        mobilenet(), ["cpu", "a/cpu", "b/cpu"], cuts=cuts, transport="in_process", chunks=2
    ) as pipe:
        expected = pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
    with joining(port, "server") as process:
        with fxsplit.compile(mobilenet(), devices, schedule="auto", **{**options(port), "cuts": cuts}) as pipe:
            places = {worker.name: worker.pid for worker in pipe.workers}
            assert places["server"] == process.pid and places["cpu:0"] not in (process.pid, os.getpid())
            result = pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
            assert torch.equal(result.loss, expected.loss) and torch.equal(result.output, expected.output)
        assert process.wait(timeout=SOON_S) == 0
    with socket.create_server(("127.0.0.1", port)):
        pass  # the client has stopped listening


def test_a_joined_worker_that_dies_is_named() -> None:
    port = free_port()
    with (
        joining(port, "server") as process,
        fxsplit.compile(mobilenet(), ["cpu", "server/cpu"], **options(port)) as pipe,
    ):
        pipe(images(4))
        process.kill()
        start = time.monotonic()
        with pytest.raises(WorkerError, match=f"server.*{process.pid}"):
            pipe(images(4))
        assert time.monotonic() - start < SOON_S


REFUSED: dict[str, tuple[str, str, str, bool]] = {
    "unknown name": ("sever", TOKEN, "a name that the client does not know[^$]*sever[^$]*server", True),
    "wrong token": ("server", "guess", "the token is not the client's", False),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_said_on_both_sides(case: str) -> None:
    name, token, message, ends_client = REFUSED[case]
    port = free_port()
    with joining(port, name, token) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FXSPLIT_JOIN_TIMEOUT_S", "20" if ends_client else "15")
            warns = contextlib.nullcontext() if ends_client else pytest.warns(UserWarning, match=message)
            with warns, pytest.raises(WorkerError, match=message if ends_client else "did not join in time"):
                fxsplit.compile(mobilenet(), ["cpu", "server/cpu"], **options(port))
        assert process.wait(timeout=SOON_S) == 1
        assert process.stderr is not None
        said = process.stderr.read()
        assert message.split("[^$]")[0] in said and "Traceback" not in said


class Knock:
    """A client that waits in a thread, for handshakes made by hand."""

    def __init__(self, devices: tuple[str, ...] = ("server/cpu",)) -> None:
        self.port = free_port()
        self.error: FxsplitError | None = None
        self.listens = threading.Event()
        self.thread = threading.Thread(target=self._wait, args=(devices,), daemon=True)

    def _wait(self, devices: tuple[str, ...]) -> None:
        names = {device.partition("/")[0]: [device.partition("/")[2]] for device in devices}
        gate = gate_module.Gate(f"127.0.0.1:{self.port}", TOKEN, names, "session", 1)
        self.listens.set()
        try:
            gate.await_all(10.0, lambda: None)
        except FxsplitError as error:
            self.error = error
        finally:
            gate.close()

    def __enter__(self) -> Knock:
        self.thread.start()
        assert self.listens.wait(5.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.join(15.0)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("what", ["torch", "fxsplit", "python", "codecs", "devices"])
def test_other_versions_are_refused_on_both_sides(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Identity.of_this_process("server")
    changed: Any = {"codecs": own.codecs[1:], "devices": ("mps",)}.get(what, "0.0")
    other = Identity(**{**own.to_json(), what: changed})
    with Knock() as client:
        monkeypatch.setattr(
            "fxsplit.runtime.join.Identity", type("Other", (), {"of_this_process": lambda *_: other})
        )
        with pytest.raises(WorkerError) as worker_side:
            join(f"127.0.0.1:{client.port}", "server", TOKEN, None, 5.0)
    assert client.error is not None
    for error in (worker_side.value, client.error):
        assert "server" in str(error)
        assert {"codecs": "compressors", "devices": "mps"}.get(what, "0.0") in str(error), error


def test_a_name_taken_twice_ends_everything() -> None:
    with Knock(("server/cpu", "other/cpu")) as client:
        first = join(f"127.0.0.1:{client.port}", "server", TOKEN, None, 5.0)
        with pytest.raises(WorkerError, match="joined already"):
            join(f"127.0.0.1:{client.port}", "server", TOKEN, None, 5.0)
        client.thread.join(10.0)
        assert client.error is not None and "joined already" in str(client.error)
        assert first.connection.recv(1) == b"", "the first one is told by the end of its connection"
        first.connection.close()


def test_a_false_client_is_not_served() -> None:
    """Somebody else who listens there, without the token: the worker does not go on."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                send_message(connection, {"fxsplit": "client", "nonce": "0"})
                hello = receive_message(connection)
                lie = {"session": "s", "rank": 1, "world_size": 2, "threads": 1}
                send_message(connection, {**lie, "proof": proof("guess", "client", str(hello["nonce"]), "0")})

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(WorkerError, match="does not know the token"):
            join(f"127.0.0.1:{server.getsockname()[1]}", "server", TOKEN, None, 5.0)
        thread.join(5.0)


def test_noise_is_not_a_worker() -> None:
    with Knock() as client:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x05hello", b"\x00\x00\x00\x02[]", b""):
            with socket.create_connection(("127.0.0.1", client.port)) as connection:
                connection.sendall(noise)
        member = join(f"127.0.0.1:{client.port}", "server", TOKEN, None, 5.0)
        client.thread.join(10.0)
        member.connection.close()
    assert client.error is None


def test_addresses_that_cannot_be() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(DeviceError, match="in use already"):
        fxsplit.compile(mobilenet(), ["cpu", "server/cpu"], **options(port))
    for address in ("nowhere", "localhost:0", "localhost:99999", "::1:80"):
        with pytest.raises(DeviceError, match="not an address"):
            fxsplit.compile(mobilenet(), ["cpu", "server/cpu"], **{**options(port), "listen": address})
    with pytest.raises(PlanError, match="no device names one"):
        fxsplit.compile(mobilenet(), ["cpu", "cpu"], **options(port))
    with pytest.raises(PlanError, match="'rpc'"):
        fxsplit.compile(mobilenet(), ["cpu", "server/cpu"], transport="in_process", **options(port))
    with pytest.raises(WorkerError, match="no client listens"):
        join(f"127.0.0.1:{port}", "server", TOKEN, None, 0.3)
    assert handshake.parse_address("[::1]:80", "here") == ("::1", 80)


def test_listening_beyond_this_host_says_what_peers_could_do() -> None:
    """An address of the loopback interface, which is all that there is without `listen=`, needs no warning."""
    placements = parse_devices(["cpu", "server/cpu"])
    for address in ("0.0.0.0:1", "10.0.0.1:29500", "example.org:1", "[fd00::1]:1"):
        with pytest.warns(UserWarning, match=r"can run code as this user[^$]*docs/security\.md") as caught:
            listening(address, TOKEN, placements, "rpc")
        assert address in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for address in ("127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"):
            listening(address, TOKEN, placements, "rpc")


TIMES = {
    "soon": "--patience",
    "": "--patience",
    "nan": "not a time to wait",
    "-1": "not a time to wait",
    "0": "not an address",  # a worker may ask once
}


@pytest.mark.parametrize("text", TIMES)
def test_how_long_is_waited_is_a_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides: one that no clock reaches would be waited for without an end."""
    monkeypatch.setenv("FXSPLIT_JOIN_TIMEOUT_S", text)
    with pytest.raises(DeviceError, match=r"FXSPLIT_JOIN_TIMEOUT_S[^$]*above 0"):
        fxsplit.compile(mobilenet(), ["cpu", "server/cpu"], example_inputs=images(4), **options(free_port()))
    arguments = ["worker", "--join", "nowhere", "--name", "a", f"--patience={text}"]
    result = CliRunner().invoke(app, arguments, env={"FXSPLIT_TOKEN": TOKEN})
    assert result.exit_code != 0 and TIMES[text] in result.stderr and "Traceback" not in result.stderr


SCRIPT = """
import torch, fxsplit
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
pipe = fxsplit.compile(model, ["cpu", "rank1/cpu", "rank2/cpu"], cuts=["2", "3"], chunks=3, schedule="1f1b",
                       listen="torchrun")
result = pipe.step(torch.ones(6, 4), target=torch.zeros(6, dtype=torch.long), loss_fn=F.cross_entropy)
loss = F.cross_entropy(model(torch.ones(6, 4)), torch.zeros(6, dtype=torch.long))
assert torch.allclose(result.loss, loss), (result.loss, loss)
print("workers", sorted(worker.name for worker in pipe.workers), flush=True)
pipe.close()
"""


def test_the_same_script_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "3",
        "--master-port",
        str(free_port()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=environment, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "workers ['client', 'rank1', 'rank2']" in result.stdout


def test_serve_is_for_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(FxsplitError, match="not started by torchrun"):
        fxsplit.serve()
    with pytest.raises(FxsplitError, match="not started by torchrun"):
        fxsplit.compile(mobilenet(), ["cpu", "rank1/cpu"], listen="torchrun")
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(FxsplitError, match="rank 0 is the client"):
        fxsplit.serve()
