"""Packets are what was sent: each once, for its own place, and undamaged."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._C._distributed_c10d import HashStore

import fxsplit
from fxsplit.errors import PipelineError
from fxsplit.runtime import device_maps, rpc
from fxsplit.runtime.arrivals import LATEST, Arrivals
from fxsplit.runtime.lanes import Lanes
from fxsplit.runtime.packet import Key, Packet, checksum_of
from fxsplit.runtime.rpc import RpcEndpoint
from fxsplit.runtime.transport import Mailbox
from fxsplit.spec import TensorSpec
from tests.models import images, mobilenet

KEY = Key(3, "relu", 0, 1, 2, False)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def test_a_packet_is_taken_once() -> None:
    box = Mailbox()
    box.deliver(KEY, Packet(()))
    box.deliver(KEY, Packet((), value="again"))
    assert box.refused == 1 and box.receive(KEY).result().value is None
    box.forget(KEY)
    box.deliver(KEY, Packet((), value="late"))
    assert box.refused == 2 and not box.receive(KEY).done()


def test_packets_of_runs_that_are_over_are_refused() -> None:
    box = Mailbox()
    box.receive(KEY)
    box.deliver(KEY._replace(micro_batch=0), Packet(()))
    box.finish(3)
    box.deliver(KEY._replace(micro_batch=1), Packet(()))
    assert box.refused == 1 and not box._slots
    box.abort(4, "given up")
    box.deliver(KEY._replace(run=4), Packet(()))
    assert box.refused == 1, "it was under way"
    with pytest.raises(PipelineError, match="given up"):
        box.receive(KEY._replace(run=4)).result()
    for run in range(5, 5000):
        box.finish(run)
    assert len(box._over) + len(box._taken) + len(box._slots) < 1000


def test_packets_that_overtake_each_other_are_told_apart() -> None:
    box, waiting = Mailbox(), {}
    for micro_batch in range(4):
        waiting[micro_batch] = box.receive(KEY._replace(micro_batch=micro_batch))
    for micro_batch in (2, 0, 3, 1):
        box.deliver(KEY._replace(micro_batch=micro_batch), Packet((), value=micro_batch))
    assert all(slot.result().value == micro_batch for micro_batch, slot in waiting.items())


@given(st.lists(st.integers(1, 12), max_size=40))
def test_each_number_is_taken_once_in_any_order(numbers: list[int]) -> None:
    arrivals = Arrivals()
    found = [arrivals.take(number) for number in numbers]
    assert found == [number not in numbers[:index] for index, number in enumerate(numbers)]


def test_what_thousands_have_overtaken_is_stale() -> None:
    """Number 1 is lost on its way: what is remembered does not grow without end, and it is refused in the end."""
    arrivals = Arrivals()
    for number in range(2, 10 * LATEST):
        assert arrivals.take(number)
        assert len(arrivals.ahead) <= LATEST
    assert not any(arrivals.take(number) for number in (1, 2, LATEST, 10 * LATEST - 1))


def test_a_packet_of_long_ago_is_refused_by_its_number() -> None:
    """Its run is forgotten: nothing but the number tells that it is old. Who sends it again under another name,
    or with another number, changes what the checksum covers."""
    box, packet = Mailbox(), Packet((), value="old", origin=("one", 1))
    box.deliver(KEY, packet)
    box.receive(KEY).result()
    box.forget(KEY)
    for run in range(3, 1000):
        box.finish(run)
    for key in (KEY, KEY._replace(run=2000), KEY._replace(micro_batch=7)):
        box.deliver(key, packet)
        assert not box.receive(key).done()
    assert box.refused == 3
    box.deliver(KEY._replace(run=2001), replace(packet, origin=("two", 1)))
    assert box.receive(KEY._replace(run=2001)).done(), "each sender counts its own"
    assert len({checksum_of(KEY, replace(packet, origin=o)) for o in (("one", 1), ("one", 2), ("two", 1))}) == 3


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_flipped_bit_goes_unnoticed(data: st.DataObject) -> None:
    """In the payload, or in what the packet says that it is."""
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if len(shape) == 3 and data.draw(st.booleans()):
        tensor = tensor.permute(2, 0, 1)
    packet = Packet((tensor,), TensorSpec.of(tensor))
    before = checksum_of(KEY, packet)
    assert checksum_of(KEY, Packet((tensor.clone(),), TensorSpec.of(tensor))) == before
    if tensor.numel():
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        index, bit = data.draw(st.integers(0, len(flat) - 1)), data.draw(st.integers(0, 7))
        flat[index] ^= 1 << bit
        assert checksum_of(KEY, packet) != before
        flat[index] ^= 1 << bit
    changes: dict[str, Any] = {
        "run": 4,
        "value": "x",
        "source": 5,
        "target": 5,
        "micro_batch": 5,
        "backward": True,
    }
    name = data.draw(st.sampled_from(sorted(changes)))
    assert checksum_of(KEY._replace(**{name: changes[name]}), packet) != before


def test_messages_that_come_twice_and_in_reverse_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over real connections: what the client sends to a worker, four at a time, and those of before again."""
    send, held, sent = RpcEndpoint._invoke, list[Any](), list[Any]()

    def disorderly(self: RpcEndpoint, to: str, function: Any, *arguments: Any) -> Future[Any]:
        if function is not rpc._deliver:
            return send(self, to, function, *arguments)
        held.append(arguments)
        answers = []
        if len(held) == 4:
            for message in (*reversed(held), *held, *sent):
                answers.append(send(self, to, function, *message))
            sent.extend(held)
            held.clear()
        return answers[0] if answers else Future()

    with fxsplit.compile(mobilenet(), ["cpu", "one/cpu"], cuts=["features.5"], chunks=4) as pipe, torch.no_grad():
        pipe.eval()
        batches = [images(8), images(8) * 2.0, images(8) - 1.0]
        expected = [pipe(batch) for batch in batches]
        monkeypatch.setattr(Lanes, "send", lambda *_: False)  # these come in order, and once
        monkeypatch.setattr(RpcEndpoint, "_invoke", disorderly)
        found = [pipe(batch) for batch in batches]
    assert len(sent) == 12 and not held
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_damaged_packet_ends_the_step_and_not_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's third packet is changed behind its checksum, as a broken link would do."""
    sent = []

    def damaging(key: Key, packet: Packet) -> int:
        found = checksum_of(key, packet)
        if key.source == 0:  # not what comes from the worker meanwhile
            sent.append(key)
        if key.source == 0 and len(sent) == 3:
            first: Tensor = packet.payload[0]
            first.view(-1)[0] += 1.0
        return found

    with fxsplit.compile(mobilenet(), ["cpu", "one/cpu"], cuts=["features.5"], chunks=4) as pipe, torch.no_grad():
        expected = pipe(images(8))
        sent.clear()
        monkeypatch.setattr("fxsplit.runtime.packet.checksum_of", damaging)
        with pytest.raises(PipelineError, match="was damaged on its way to one"):
            pipe(images(8))
        assert torch.equal(pipe.eval()(images(8)), pipe(images(8))) and expected.shape == (8, 10)


def test_tensors_go_from_gpu_to_gpu_on_one_host_alone() -> None:
    """What crosses a network goes by way of host memory, and has a checksum of its bytes."""
    store = HashStore()
    gpus = {"client": 0, "near": 1, "far": 0}
    store.set("devices/far", "another host")
    assert device_maps.exchange(store, "cpu only", 0, gpus) == {}
    store.set("devices/client", device_maps._host())
    assert device_maps.exchange(store, "near", 1, {}) == {"client": 0, "near": 1}
    assert device_maps.exchange(store, "client", 0, gpus) == {"client": 0, "near": 1}
    assert set(device_maps.peers_of("client", device_maps.exchange(store, "client", 0, gpus))) == {"near"}
