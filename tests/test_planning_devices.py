"""The device list."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxsplit.errors import DeviceError
from fxsplit.planning import Placement, check_available, parse_devices
from fxsplit.planning.devices import DEVICE_TYPES
from fxsplit.planning.profile import CODEC_BYTES_PER_S, MACS_PER_S, OPERATION_S


def workers(*devices: str) -> list[str]:
    return [placement.worker for placement in parse_devices(devices)]


def test_the_first_device_and_its_equals_are_the_clients() -> None:
    assert parse_devices(["cpu", "server/cuda:0", "cpu"]) == (
        Placement("cpu", "client", "cpu"),
        Placement("server/cuda:0", "server", "cuda:0"),
        Placement("cpu", "client", "cpu"),
    )


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["cpu"], ["client"]),
        (["cpu", "cpu"], ["client", "client"]),
        (["cpu", "cuda", "cuda:0"], ["client", "cuda", "cuda:0"]),
        (["cuda:0", "cpu", "cuda:0"], ["client", "cpu", "client"]),
        (["cpu", "a/cuda:0", "a/cuda:1", "b/cuda:0"], ["client", "a", "a", "b"]),
        (["cpu", "a.b-c_1/cpu"], ["client", "a.b-c_1"]),
    ],
)
def test_worker_names(devices: list[str], expected: list[str]) -> None:
    assert workers(*devices) == expected


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ([], "empty"),
        ("cpu", "not a list"),
        (None, "not a list"),
        (["cpu", 3], "not a string"),
        (["cpu", torch.device("cpu")], "not a string"),
        (["cpu", "gpu"], "not a device"),
        (["cpu", "CUDA"], "not a device"),
        (["cpu", "cuda:"], "not a device"),
        (["cpu", "cuda:01"], "not a device"),
        (["cpu", "cuda:-1"], "not a device"),
        (["cpu", "meta"], "not a device"),
        (["cpu", ""], "not a device"),
        (["cpu", "cpu "], "not a device"),
        (["cpu", "cpu\n"], "not a device"),
        (["cpu", "/cpu"], "not a worker name"),
        (["cpu", "a/b/cpu"], "not a worker name"),
        (["cpu", "a b/cpu"], "not a worker name"),
        (["cpu", "ä/cpu"], "not a worker name"),
        (["cpu", "client/cpu"], "'client' is reserved"),
        (["cpu", "cpu/cuda:0"], "has the name of a device"),
        (["server/cpu", "cpu"], "the first device is the client's"),
    ],
)
def test_bad_lists_are_refused(devices: Any, says: str) -> None:
    with pytest.raises(DeviceError, match=says):
        parse_devices(devices)


def test_an_error_names_the_entry() -> None:
    with pytest.raises(DeviceError, match=r"where: +devices\[1\][^$]*found: +'tpu'[^$]*cuda:0"):
        parse_devices(["cpu", "tpu", "cpu"])


def test_only_devices_of_this_host_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_available(parse_devices(["cpu", "cpu:0", "cuda", "cuda:1", "far/cuda:7", "far/mps"]))
    with pytest.raises(DeviceError, match=r"'cuda:2' here[^$]*allowed: cpu, cuda:0, cuda:1"):
        check_available(parse_devices(["cpu", "cuda:2"]))
    with pytest.raises(DeviceError, match="'mps' here"):
        check_available(parse_devices(["mps"]))


def test_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"no device 'cuda' here[^$]*allowed: cpu\n"):
        check_available(parse_devices(["cpu", "cuda"]))


def test_every_type_of_device_has_a_rate() -> None:
    assert set(DEVICE_TYPES) == set(MACS_PER_S) == set(OPERATION_S) == set(CODEC_BYTES_PER_S)
