"""Small packets between processes of one host."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.runtime.lanes import IS_SUPPORTED, MESSAGE_BYTES, Lanes, decode_message, encode_message
from fxsplit.runtime.packet import Key, Packet, checksum_of, ready_to_send
from fxsplit.runtime.transport import Arrival, Mailbox
from fxsplit.spec import TensorSpec

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="these sockets are Linux's")

KEY = Key(3, "relu", 0, 1, 2, False)


def packet_of(*tensors: Tensor, **more: Any) -> Packet:
    return ready_to_send(KEY, Packet(tensors, TensorSpec.of(tensors[0]), **more), None)


def test_a_message_is_its_packets_again() -> None:
    sent = [
        (KEY, packet_of(torch.randn(3, 4).T, torch.arange(5, dtype=torch.int64), requires_grad=True)),
        (KEY._replace(micro_batch=3), packet_of(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))),
        (KEY._replace(micro_batch=4), packet_of(torch.tensor([True, False]), torch.empty(0, 3))),
        (KEY._replace(micro_batch=5), packet_of(torch.randn(10).to(torch.bfloat16)[::2])),
        (KEY._replace(backward=True), ready_to_send(KEY, Packet(()), None)),
        (KEY._replace(value="size"), Packet((), value=torch.Size((2, 3)))),
    ]
    message = encode_message(sent)
    assert message is not None
    found = decode_message(bytearray(message))
    assert [key for key, _ in found] == [key for key, _ in sent]
    for (key, after), (_, before) in zip(found, sent, strict=True):
        assert (after.spec, after.requires_grad, after.value) == (before.spec, before.requires_grad, before.value)
        assert after.checksum == before.checksum
        if before.payload:
            assert checksum_of(key, after) == checksum_of(key, before)
        for one, other in zip(after.payload, before.payload, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype


def test_what_is_no_message() -> None:
    """It goes by RPC."""
    long = packet_of(torch.zeros(MESSAGE_BYTES // 4))
    assert encode_message([(KEY, long)]) is None
    assert encode_message([(KEY, packet_of(torch.zeros(MESSAGE_BYTES // 8 - 1000)))] * 2) is not None
    assert encode_message([(KEY, Packet((), value=object()))]) is None
    assert encode_message([(KEY, Packet((torch.zeros(4)[:2],)))]) is None, "a slice would take its storage along"


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Lanes, Lanes, Mailbox]]:
    """Two ends, and the mailbox of the second one; they meet in a folder whose path is too long for a socket."""
    folder = tmp_path / ("deep" * 40)
    folder.mkdir()
    boxes = [Mailbox(), Mailbox()]

    def end(name: str, number: int) -> Lanes:
        def deliver(packets: Sequence[tuple[Key, Packet]]) -> None:
            for key, packet in packets:
                boxes[number].deliver(key, packet)

        return Lanes(name, deliver)

    one, other = end("one", 0), end("other", 1)
    boxes[1] = Mailbox(other.fetch)
    for rank, lanes in enumerate((one, other)):
        lanes.listen(str(folder), rank, 2)
    thread = threading.Thread(target=one.connect, args=(str(folder), 0, 2, 30.0))
    thread.start()
    other.connect(str(folder), 1, 2, 30.0)
    thread.join()
    yield one, other, boxes[1]
    one.close()
    other.close()


def test_packets_come_to_whoever_waits(ends: tuple[Lanes, Lanes, Mailbox]) -> None:
    one, _, box = ends
    x = torch.randn(3)
    assert one.send("other", [(KEY, packet_of(x)), (KEY._replace(micro_batch=9), packet_of(x))])
    assert not one.send("nobody", [(KEY, packet_of(x))])
    first = box.receive(KEY)
    assert not first.done()
    assert torch.equal(first.result(30.0).payload[0], x)
    assert box.receive(KEY._replace(micro_batch=9)).done(), "they came together"
    with pytest.raises(TimeoutError):
        box.receive(KEY._replace(micro_batch=10)).result(0.01)


def test_what_there_is_no_room_for_is_not_sent_and_nothing_is_lost(ends: tuple[Lanes, Lanes, Mailbox]) -> None:
    one, _, box = ends
    packet, sent = packet_of(torch.zeros(1000)), 0
    while one.send("other", [(KEY._replace(micro_batch=sent), packet)]):
        sent += 1
    assert sent > 3
    for micro_batch in range(sent):
        box.receive(KEY._replace(micro_batch=micro_batch)).result(30.0)
    assert one.send("other", [(KEY._replace(run=4), packet)]), "there is room again"


def test_other_threads_wake_the_one_that_waits(ends: tuple[Lanes, Lanes, Mailbox]) -> None:
    """What comes by RPC is delivered by threads of its own."""
    _, other, box = ends
    made: Arrival = Arrival(other.fetch)
    threading.Thread(target=made.set_result, args=(1,)).start()
    assert made.result() == 1
    waiting = box.receive(KEY)
    threading.Thread(target=box.abort, args=(KEY.run, "given up")).start()
    with pytest.raises(fxsplit.FxsplitError, match="given up"):
        waiting.result()


def test_a_peer_that_is_gone(ends: tuple[Lanes, Lanes, Mailbox]) -> None:
    """Nothing is sent there, and waiting ends in time."""
    one, _, box = ends
    assert one.send("other", [(KEY, packet_of(torch.ones(2)))])
    one.close()
    one.close()
    assert not one.send("other", [(KEY, packet_of(torch.ones(2)))])
    assert box.receive(KEY).result(30.0).payload[0].sum() == 2.0, "what was sent before has come"
    with pytest.raises(TimeoutError):
        box.receive(KEY._replace(micro_batch=1)).result(0.01)


@pytest.mark.parametrize("has_room", [True, False])
def test_steps_are_the_same_by_either_way(has_room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's packets go by lanes, or by RPC where there is no room; the workers' by lanes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x, y = torch.randn(12, 4), torch.randn(12, 4)
    done: list[bool] = []
    send = Lanes.send

    def noted(self: Lanes, to: str, packets: Any) -> bool:
        done.append(has_room and send(self, to, packets))
        return done[-1]

    monkeypatch.setattr(Lanes, "send", noted)
    results = []
    for transport in ("rpc", "in_process"):
        options: dict[str, Any] = {"cuts": ["1", "2"], "chunks": 6, "schedule": "1f1b", "transport": transport}
        with fxsplit.compile(model, ["cpu", "a/cpu", "b/cpu"], **options) as pipe:
            steps = [pipe.step(x, target=y, loss_fn=nn.functional.mse_loss) for _ in range(3)]
            results.append((steps, pipe.gradients()))
    assert done and all(sent == has_room for sent in done)
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one.loss, other.loss) and torch.equal(one.output, other.output)
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
