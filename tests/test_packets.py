"""Packets are what was sent: each once, for its own place, and undamaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxsplit
from fxsplit.errors import PipelineError
from fxsplit.runtime.packet import Key, Packet, checksum_of
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


def test_a_damaged_packet_ends_the_step_and_not_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's third packet is changed behind its checksum, as a broken link would do."""
    sent = []

    def damaging(key: Key, packet: Packet) -> int:
        found = checksum_of(key, packet)
        sent.append(key)
        if len(sent) == 3:
            first: Tensor = packet.payload[0]
            first.view(-1)[0] += 1.0
        return found

    with fxsplit.compile(mobilenet(), ["cpu", "one/cpu"], cuts=["features.5"], chunks=4) as pipe, torch.no_grad():
        expected = pipe(images(8))
        sent.clear()
        monkeypatch.setattr("fxsplit.runtime.rpc.checksum_of", damaging)
        with pytest.raises(PipelineError, match="was damaged on its way to one"):
            pipe(images(8))
        assert torch.equal(pipe.eval()(images(8)), pipe(images(8))) and expected.shape == (8, 10)
