"""The recipes of docs/security.md, between two hosts: the pipeline is inside the private network alone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.two_machines.hosts import ADDRESSES, on_host, two_hosts
from tests.faults.scripts import assert_same, await_true
from tests.faults.test_links import can_make_hosts, expected, training

__all__ = ["expected"]  # a fixture

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc"),
]


def run(number: int, command: str) -> None:
    """A command on one of the hosts."""
    subprocess.run(on_host(number, *command.split()), check=True)


@contextmanager
def running(number: int, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program on one of the hosts, while inside."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(on_host(number, *command), **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def wireguard(folder: Path) -> Iterator[str]:
    """WireGuard between the two hosts; gives the client's address in it."""
    if shutil.which("wg") is None or shutil.which("wireguard-go") is None:
        pytest.skip("needs wg and wireguard-go")
    names, own = ("fxswg0", "fxswg1"), ("10.79.0.1", "10.79.0.2")
    public = []
    for number in (0, 1):
        private = subprocess.run(["wg", "genkey"], capture_output=True, check=True).stdout
        (folder / f"{number}.key").write_bytes(private)
        (folder / f"{number}.key").chmod(0o600)
        public.append(subprocess.run(["wg", "pubkey"], input=private, capture_output=True, check=True).stdout)
    with ExitStack() as stack:
        for number, name in enumerate(names):
            stack.enter_context(running(number, "wireguard-go", "-f", name))
            socket = Path(f"/var/run/wireguard/{name}.sock")
            await_true(socket.exists, 60.0, "wireguard-go does not run")
            other = 1 - number
            peer = f"peer {public[other].decode().strip()} allowed-ips {own[other]}/32"
            how = f"endpoint {ADDRESSES[0]}:51820 persistent-keepalive 25" if number else ""
            port = "" if number else "listen-port 51820"
            run(number, f"wg set {name} {port} private-key {folder}/{number}.key {peer} {how}")
            run(number, f"ip addr add {own[number]}/24 dev {name}")
            run(number, f"ip link set {name} up")
        yield own[0]


@contextmanager
def ssh(folder: Path) -> Iterator[str]:
    """An SSH tunnel from the client's host to the worker's; gives the client's address in it."""
    server = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if server is None or shutil.which("ssh") is None or not Path("/dev/net/tun").exists():
        pytest.skip("needs ssh, sshd and /dev/net/tun")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"ListenAddress {ADDRESSES[1]}:2222\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPermitTunnel point-to-point\n"
    )
    options = ["-F", "none", "-i", str(folder / "user"), "-p", "2222", "-o", "StrictHostKeyChecking=no"]
    options += ["-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectionAttempts=30", "-w", "0:0"]
    there = "ip addr add 10.79.1.2/30 dev tun0 && ip link set tun0 up && echo up && cat"  # until this end goes
    with (
        running(1, server, "-D", "-f", str(folder / "sshd_config")),
        running(0, "ssh", *options, f"root@{ADDRESSES[1]}", there) as tunnel,
    ):
        assert tunnel.stdout is not None
        assert tunnel.stdout.readline() == b"up\n"
        run(0, "ip addr add 10.79.1.1/30 dev tun0")
        run(0, "ip link set tun0 up")
        yield "10.79.1.1"


SSH_PORT = f":{2222:04X}"


def pipeline_addresses(pid: int) -> set[str]:
    """The local addresses of the TCP sockets on a process's host, but for those of SSH itself."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    own = [row[1] for row in rows if not row[1].endswith(SSH_PORT) and not row[2].endswith(SSH_PORT)]
    packed = {place.partition(":")[0] for place in own}
    return {".".join(str(byte) for byte in reversed(bytes.fromhex(each))) for each in packed}


@pytest.mark.parametrize("network", [wireguard, ssh])
def test_the_pipeline_is_inside(
    network: Callable[[Path], AbstractContextManager[str]], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with (
        two_hosts(None),
        network(tmp_path) as address,
        training(tmp_path, 30.0, address=address) as (client, worker),
    ):
        assert pipeline_addresses(client.pid) == {address}
        assert pipeline_addresses(worker.pid) == {f"{address[:-1]}2"}
        said, _ = client.communicate(timeout=200)
        assert client.returncode == 0, said
        assert worker.wait(timeout=30) == 0
    assert_same(torch.load(tmp_path / "state.pt"), expected)
