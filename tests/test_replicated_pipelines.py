"""Pipelines with replicated stages: the numbers of one worker, whatever is asked of them, and when they fail."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import WorkerError
from fxsplit.runtime import replication
from fxsplit.schedules import SCHEDULES
from tests.comparison import MOBILENET, TRANSPORTS, assert_same_gradients
from tests.faults.scripts import CUTS, assert_same, batch, small_model, train
from tests.models import images, mobilenet, transformer
from tests.processes import worker_processes
from tests.test_joining import TOKEN, free_port, joining

PAIR = ["cpu", "a/cpu+b/cpu"]
SANDWICH = ["cpu", "a/cpu+b/cpu", "cpu"]
TWO_PAIRS = ["cpu", "a/cpu+b/cpu", "c/cpu+d/cpu"]
LABELS = torch.arange(12) % 10
HALF_EPS = torch.finfo(torch.float32).eps / 2


def loop(model: nn.Module, x: Tensor, y: Tensor, chunks: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batches one after another; the loss, and the sums of the gradients' absolute values."""
    total, sums = torch.zeros(()), dict[str, Tensor]()
    for part, target in zip(x.tensor_split(chunks), y.tensor_split(chunks), strict=True):
        before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        loss = F.cross_entropy(model(part), target) * (len(target) / len(y))
        loss.backward()
        total = total + loss.detach()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            own = parameter.grad - before[name] if name in before else parameter.grad
            sums[name] = sums.get(name, torch.zeros_like(own)) + own.abs()
    return total, sums


def assert_same_sums(pipe: fxsplit.Pipeline, model: nn.Module, sums: dict[str, Tensor], chunks: int) -> None:
    """Two orders of a sum of n numbers differ by at most 2 (n - 1) roundings of the sum of absolute values."""
    found = pipe.gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        allowed = 2 * chunks * HALF_EPS * sums[name]
        assert bool(((found[name] - parameter.grad).abs() <= allowed).all()), name


def assert_close_state(pipe: fxsplit.Pipeline, model: nn.Module) -> None:
    """Weights and running statistics to rounding, everything else exactly."""
    found = pipe.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=1e-7)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", [kind.name for kind in SCHEDULES])
@pytest.mark.parametrize("devices", [PAIR, SANDWICH, TWO_PAIRS], ids=["pair", "sandwich", "two pairs"])
def test_a_step_is_that_of_one_worker(name: str, devices: list[str]) -> None:
    """Loss and outputs bit for bit, gradients but for the order of their sums, for uneven micro-batches."""
    if name == "1f1b" and devices is SANDWICH:
        return
    model, x = mobilenet(), images(12)
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": MOBILENET[len(devices)], "chunks": 5, "transport": "in_process"}
    with fxsplit.compile(model, devices, schedule=name, verify=False, **options) as pipe:
        result = pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
        loss, sums = loop(reference, x, LABELS, 5)
        assert torch.equal(result.loss, loss)
        assert_same_sums(pipe, reference, sums, 5)
        assert_close_state(pipe, reference)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_micro_batch_a_replica_is_bit_for_bit(transport: str) -> None:
    """A sum of two is the same in either order: training is that of one worker, exactly, weights and all."""
    model, x = mobilenet().eval(), images(8)  # frozen statistics, trained weights
    reference = copy.deepcopy(model)
    adam = torch.optim.AdamW(reference.parameters(), lr=1e-3)
    options: dict[str, Any] = {"cuts": MOBILENET[2], "chunks": 2, "transport": transport, "verify": False}
    with fxsplit.compile(model, PAIR, **options) as pipe:
        optimizer = pipe.optimizer(torch.optim.AdamW, lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            adam.zero_grad()
            result = pipe.step(x, target=LABELS[:8], loss_fn=F.cross_entropy)
            loss, _ = loop(reference, x, LABELS[:8], 2)
            assert torch.equal(result.loss, loss)
            assert_same_gradients(pipe, reference)
            optimizer.step()
            adam.step()
        assert_same(pipe.state_dict(), reference.state_dict())
        pipe._engine.check_replicas()


def test_deferred_statistics_are_bit_for_bit() -> None:
    """Those of the whole batch are merged on each replica in the order of the micro-batches."""
    x, options = images(12), {"cuts": MOBILENET[2], "chunks": 4, "transport": "in_process", "verify": False}
    found = []
    for devices in (["cpu", "a/cpu"], PAIR):
        with fxsplit.compile(mobilenet(), devices, deferred_batch_norm=True, **options) as pipe:  # type: ignore[arg-type]
            pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
            found.append(pipe.state_dict())
            pipe._engine.check_replicas()
    assert_same(*found)


def test_calls_accumulation_and_clipping() -> None:
    """Two calls with their own backwards add up, and the norm counts each gradient once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    reference, batches = copy.deepcopy(model), torch.randn(2, 4, 6)
    options: dict[str, Any] = {"cuts": ["2"], "chunks": 2, "transport": "in_process", "verify": False}
    with fxsplit.compile(model, PAIR, **options) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.5, momentum=0.9)
        sgd = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            sgd.zero_grad()
            for x in batches:
                x.requires_grad_()
                pipe(x).square().sum().backward()
                there, x.grad = x.grad, None
                reference(x).square().sum().backward()
                assert there is not None and x.grad is not None
                torch.testing.assert_close(there, x.grad)
                x.grad = None
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            torch.testing.assert_close(pipe.clip_grad_norm_(0.5), norm)
            for name, parameter in reference.named_parameters():
                torch.testing.assert_close(pipe.gradients()[name], parameter.grad)
            optimizer.step()
            sgd.step()
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(pipe.state_dict()[name], value)
        pipe._engine.check_replicas()


def test_dropout_drops_what_it_drops_on_one_worker() -> None:
    """Random numbers are a micro-batch's, whoever computes it."""
    x = torch.randint(0, 128, (8, 12), generator=torch.Generator().manual_seed(1))
    outputs = []
    for devices in (["cpu", "a/cpu"], PAIR):
        options: dict[str, Any] = {"cuts": ["roberta.encoder.layer.1"], "chunks": 4, "transport": "in_process"}
        with fxsplit.compile(transformer("roberta", 0.3), devices, verify=False, **options) as pipe:
            torch.manual_seed(7)
            outputs.append(pipe.step(x, target=LABELS[:8] % 2, loss_fn=_logits_loss).output.logits)
    assert torch.equal(*outputs)


def _logits_loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, target)


def test_three_replicas_over_processes() -> None:
    """Gloo adds in an order of its own: the same on all replicas, and the sum of one worker but for rounding."""
    model, x = mobilenet(), images(12)
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": MOBILENET[2], "chunks": 6, "schedule": "auto", "verify": False}
    with fxsplit.compile(model, ["cpu", "a/cpu+b/cpu+c/cpu"], **options) as pipe:
        result = pipe.step(x, target=LABELS, loss_fn=F.cross_entropy)
        loss, sums = loop(reference, x, LABELS, 6)
        assert torch.equal(result.loss, loss)
        assert_same_sums(pipe, reference, sums, 6)
        assert_close_state(pipe, reference)
        pipe._engine.check_replicas()
    assert worker_processes() == []


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.inner(self.embed(tokens)))).mean(1)
        return result


def test_a_parameter_of_the_client_and_of_replicas() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(24).view(8, 3) % 11
    reference = copy.deepcopy(model)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
    options: dict[str, Any] = {"cuts": ["inner"], "chunks": 2, "transport": "in_process", "verify": False}
    with fxsplit.compile(model, PAIR, **options) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            sgd.zero_grad()
            pipe.step(tokens, target=LABELS[:8], loss_fn=F.cross_entropy)
            loop(reference, tokens, LABELS[:8], 2)
            for name, parameter in reference.named_parameters():
                torch.testing.assert_close(pipe.gradients()[name], parameter.grad)
            optimizer.step()
            sgd.step()
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(pipe.state_dict()[name], value)
        pipe._engine.check_replicas()


class Chooses(nn.Module):
    """Uses one of two layers, by what comes in; fails on what is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        largest = float(x.detach().abs().max())
        if largest > 100:
            raise ValueError("too large")
        result: Tensor = self.high(x) if float(x.detach()[0, 0]) > 0 else self.low(x)
        return result


def choosing(transport: str, **options: Any) -> fxsplit.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Identity(), Chooses(), nn.Linear(4, 3))
    return fxsplit.compile(model, PAIR, cuts=["2"], chunks=2, transport=transport, verify=False, **options)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_gradient_on_some_replicas_only(transport: str) -> None:
    """The first micro-batch uses one layer, the second the other: no replica waits for what never comes."""
    x = torch.ones(4, 4)
    x[2:] = -1.0
    with choosing(transport) as pipe:
        pipe.step(x, target=LABELS[:4] % 3, loss_fn=F.cross_entropy)
        found = pipe.gradients()
        assert {"2.low.weight", "2.high.weight"} <= found.keys() and "2.never.weight" not in found
        assert all(bool(found[f"2.{name}.weight"].any()) for name in ("low", "high"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_failure_on_one_replica_changes_nothing(transport: str) -> None:
    """In a step, and in the forward of a call; afterwards all replicas go on together."""
    x = torch.ones(4, 4)
    bad = x.clone()
    bad[3] = 1000.0
    with choosing(transport) as pipe:
        pipe.step(x, target=LABELS[:4] % 3, loss_fn=F.cross_entropy)
        before = pipe.gradients()
        for _ in range(2):
            with pytest.raises(WorkerError, match="too large"):
                pipe.step(bad, target=LABELS[:4] % 3, loss_fn=F.cross_entropy)
            assert_same(pipe.gradients(), before)
        with pytest.raises(WorkerError, match="too large"):
            pipe(bad)
        pipe.step(x, target=LABELS[:4] % 3, loss_fn=F.cross_entropy)
        for name, gradient in pipe.gradients().items():
            torch.testing.assert_close(gradient, 2 * before[name])


class FailsBackward(torch.autograd.Function):
    """A backward that refuses large gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if float(gradients[0].abs().max()) > 100:
            raise ValueError("a large gradient")
        return gradients[0]


class Refusing(nn.Module):
    """See `FailsBackward`."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = FailsBackward.apply(x)
        return result


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_backward_that_fails_on_one_replica_leaves_gradients_as_they_were(transport: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Refusing(), nn.Linear(4, 3))
    options: dict[str, Any] = {"cuts": ["1"], "chunks": 4, "transport": transport, "verify": False}
    with fxsplit.compile(model, PAIR, **options) as pipe:
        pipe(torch.ones(4, 4)).sum().backward()
        before = {name: g for name, g in pipe.gradients().items() if not name.startswith("0.")}
        with pytest.raises(WorkerError, match="a large gradient"):
            (pipe(torch.ones(4, 4)) * torch.tensor([[1.0], [1.0], [1.0], [1e6]])).sum().backward()
        after = pipe.gradients()
        for name, gradient in before.items():
            assert torch.equal(after[name], gradient), name
        pipe._engine.check_replicas()
        pipe(torch.ones(4, 4)).sum().backward()


def test_buckets_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are summed in many pieces are those that are summed in one."""
    found = []
    for nbytes in (1 << 25, 1000):
        monkeypatch.setattr(replication, "BUCKET_BYTES", nbytes)
        options: dict[str, Any] = {"cuts": MOBILENET[2], "chunks": 2, "transport": "in_process", "verify": False}
        with fxsplit.compile(mobilenet(), PAIR, **options) as pipe:
            pipe.step(images(8), target=LABELS[:8], loss_fn=F.cross_entropy)
            found.append(pipe.gradients())
    assert_same(*found)


def test_other_parameters_are_trained_from_a_step_on() -> None:
    """As many as before, but others: their gradients are summed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    options: dict[str, Any] = {"cuts": ["1"], "chunks": 2, "transport": "in_process", "verify": False}
    x = torch.ones(4, 4)
    with fxsplit.compile(model, PAIR, example_inputs=x, **options) as pipe:
        pipe.step(x, target=LABELS[:4], loss_fn=F.cross_entropy)
        assert {"2.weight", "2.bias"} <= pipe.gradients().keys()
        handles = dict(pipe.named_parameters())
        for name, parameter in handles.items():
            parameter.requires_grad_(name.startswith("1."))
        pipe.step(x, target=LABELS[:4], loss_fn=F.cross_entropy)
        F.cross_entropy(model.requires_grad_(True)(x), LABELS[:4]).backward()
        torch.testing.assert_close(pipe.gradients()["1.weight"], model[1].weight.grad)


def test_a_replica_that_has_drifted_is_found() -> None:
    options: dict[str, Any] = {"cuts": MOBILENET[2], "chunks": 2, "transport": "in_process", "verify": False}
    with fxsplit.compile(mobilenet(), PAIR, example_inputs=images(2), **options) as pipe:
        pipe._engine.check_replicas()
        pipe._engine.call("b", "load_state", {"classifier.1.bias": torch.ones(10)})
        with pytest.raises(WorkerError, match=r"different parameters or buffers[^$]*a: [^$]*b: "):
            pipe._engine.check_replicas()


def test_metrics_and_trace_of_the_sum() -> None:
    """Seconds and bytes of the all-reduce, by replica."""
    options: dict[str, Any] = {"cuts": MOBILENET[2], "chunks": 2, "transport": "in_process", "verify": False}
    model = mobilenet()
    with fxsplit.compile(model, PAIR, **options) as pipe:
        pipe.step(images(8), target=LABELS[:8], loss_fn=F.cross_entropy)
        times, links = pipe.metrics.workers, pipe.metrics.links
        assert times["a"].reduce_s > 0 and times["b"].reduce_s > 0 and times["client"].reduce_s == 0
        held = [p for n, p in model.named_parameters() if n.startswith("classifier") or int(n.split(".")[1]) >= 5]
        # Of two replicas each sends all gradients once, and a flag for each.
        expected = sum(4 * p.numel() + 4 for p in held)
        assert links["a", "b", True].wire_bytes == links["b", "a", True].wire_bytes == expected
        reduces = [event for event in pipe.events() if event.get("cat") == "reduce"]
        assert [event["name"] for event in sorted(reduces, key=lambda e: e["name"])] == [
            "reduce 1.0",
            "reduce 1.1",
        ]
        assert pipe._engine.scheduler.times.stages[1].reduce_s > 0


# ---------------------------------------------------------------------- saving, losing, joining


def test_a_checkpoint_goes_from_replicas_to_one_worker_and_back(tmp_path: Path) -> None:
    """Weights, buffers, gradients and optimizer states, bit for bit."""
    options: dict[str, Any] = {"cuts": ["3"], "chunks": 2, "transport": "in_process", "verify": False}
    x, y = batch(0)
    states: list[Any] = []
    previous = None
    for devices in (PAIR, ["cpu", "z/cpu"], PAIR):
        with fxsplit.compile(small_model(0.0), devices, example_inputs=x, **options) as pipe:
            optimizer = pipe.optimizer(torch.optim.Adam, lr=1e-2)
            if previous is None:
                pipe.step(x, target=y, loss_fn=F.cross_entropy)
                optimizer.step()
            else:
                pipe.restore(fxsplit.load(previous))
                pipe._engine.check_replicas()
            states.append((pipe.state_dict(), pipe.gradients(), optimizer.state_dict()["state"]))
            previous = tmp_path / f"{len(states)}"
            pipe.save(previous)
    for weights, gradients, adam in states[1:]:
        assert_same(weights, states[0][0])
        assert_same(gradients, states[0][1])
        for index, entry in adam.items():
            assert_same(entry, states[0][2][index])


def test_lost_replicas_change_nothing(tmp_path: Path) -> None:
    """Both are killed, one after the other: training ends as if nothing had happened."""
    options: dict[str, Any] = {"cuts": CUTS[:1], "chunks": 4, "verify": False}
    with fxsplit.compile(small_model(), PAIR, transport="in_process", **options) as pipe:
        torch.manual_seed(1)
        expected = train(pipe, 6)
    snapshots = fxsplit.Snapshots(tmp_path / "snapshots", every=2)
    with fxsplit.compile(small_model(), PAIR, snapshots=snapshots, **options) as pipe:

        def fault(step: int) -> None:
            pids = {worker.name: worker.pid for worker in pipe.workers}
            if step in (2, 4):
                os.kill(pids["b" if step == 2 else "a"], signal.SIGKILL)

        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="all workers are started again, from step"):
            found = train(pipe, 6, fault)
        pipe._engine.check_replicas()
    assert_same(found, expected)
    assert worker_processes() == []


class Dies(nn.Module):
    """Kills its process in the backward of a micro-batch that is asked for it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and bool((x.detach() == 7.0).any()):
            x.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return x * 1.0


def test_a_replica_that_dies_before_the_sum_is_named() -> None:
    """The others have done their part and wait for it: they are not taken for the cause."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4), Dies(), nn.Linear(4, 3))
    options: dict[str, Any] = {"cuts": ["1"], "chunks": 2, "example_inputs": torch.zeros(4, 4), "verify": False}
    with fxsplit.compile(model, PAIR, **options) as pipe:
        pipe.load_state_dict({**pipe.state_dict(), "1.weight": torch.eye(4), "1.bias": torch.zeros(4)})
        pipe.step(torch.ones(4, 4), target=LABELS[:4] % 3, loss_fn=F.cross_entropy)
        x = torch.ones(4, 4)
        x[2:] = 7.0
        with pytest.raises(WorkerError, match=r"worker b[^$]*SIGKILL"):
            pipe.step(x, target=LABELS[:4] % 3, loss_fn=F.cross_entropy)


def test_replicas_that_join() -> None:
    """Both come from elsewhere; the numbers are those of threads in one process."""
    x, port = images(8), free_port()
    options: dict[str, Any] = {"cuts": MOBILENET[2], "chunks": 2, "verify": False}
    with fxsplit.compile(mobilenet(), PAIR, transport="in_process", **options) as pipe:
        expected = pipe.step(x, target=LABELS[:8], loss_fn=F.cross_entropy)
        gradients = pipe.gradients()
    with joining(port, "a") as a, joining(port, "b") as b:
        options |= {"listen": f"127.0.0.1:{port}", "token": TOKEN}
        with fxsplit.compile(mobilenet(), PAIR, **options) as pipe:
            assert {w.name: w.pid for w in pipe.workers} == {"client": os.getpid(), "a": a.pid, "b": b.pid}
            result = pipe.step(x, target=LABELS[:8], loss_fn=F.cross_entropy)
            assert torch.equal(result.loss, expected.loss) and torch.equal(result.output, expected.output)
            assert_same(pipe.gradients(), gradients)
