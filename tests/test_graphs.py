"""Stages that are recorded and replayed: on the CPU a recording is the work run again, all else is as on a GPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsplit
from fxsplit.runtime import recording
from fxsplit.runtime.recording import Inspector, Rerun
from fxsplit.runtime.run_state import RunState, Saved
from fxsplit.runtime.slots import GradientBuffers, Slot
from fxsplit.split_backward import SplitBackward
from fxsplit.stage import Mode
from tests.models import images, mobilenet, tokens, transformer


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Recording on the CPU, and what was replayed."""
    done: list[str] = []
    forward, backward, finish = Slot.forward, Slot.backward, Slot.finish

    def noting(name: str, method: Any) -> Any:
        def noted(self: Slot, *arguments: Any) -> Any:
            done.append(name)
            return method(self, *arguments)

        return noted

    monkeypatch.setitem(recording.RECORDERS, "cpu", Rerun)
    for name, method in (("forward", forward), ("backward", backward), ("finish", finish)):
        monkeypatch.setattr(Slot, name, noting(name, method))
    yield done


def mean_square(output: Any) -> Any:
    return output.logits.square().mean()


def run(kind: str, schedule: str, steps: int, cuda_graphs: bool, **options: Any) -> tuple[list[Tensor], Any, Any]:
    """Losses, gradients of the last two steps together, and state after some steps of training."""
    torch.manual_seed(1)
    losses = []
    if kind == "mobilenet":
        model, cuts = mobilenet().train(), ["features.0.2", "features.9"]
        inputs: dict[str, Any] = {"x": images(16)}
        given: dict[str, Any] = {"target": torch.arange(16) % 10, "loss_fn": F.cross_entropy}
    else:
        model = transformer("roberta", dropout=0.1).train()
        cuts, inputs = ["roberta.encoder.layer.1", "roberta.encoder.layer.3"], dict(tokens(8))
        given = {"loss_fn": mean_square}
    with fxsplit.compile(
        model, ["cpu", "a/cpu", "b/cpu"], cuts=cuts, chunks=4, schedule=schedule, transport="in_process",
        cuda_graphs=cuda_graphs, **options,
    ) as pipe:  # fmt: skip
        optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-4, momentum=0.1)
        for step in range(steps):
            if step != steps - 1:  # the last two are summed
                optimizer.zero_grad()
            losses.append(pipe.step(**inputs, **given).loss)
            if step < steps - 2:
                optimizer.step()
        return losses, pipe.gradients(), pipe.state_dict()


def same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble"])
@pytest.mark.parametrize("kind", ["mobilenet", "roberta"])
def test_training_is_the_same_bit_for_bit(kind: str, schedule: str, replays: list[str]) -> None:
    """Running statistics, dropout, accumulated gradients, updates: as without."""
    expected = run(kind, schedule, 4, cuda_graphs=False)
    assert not replays
    found = run(kind, schedule, 4, cuda_graphs=True)
    assert replays.count("forward") >= 3 * 4 * 3, "all but the first step"
    assert replays.count("backward") == replays.count("forward")
    assert replays.count("finish") == (replays.count("forward") if schedule == "zero-bubble" else 0)
    assert all(map(torch.equal, found[0], expected[0]))
    same(found[1], expected[1])
    same(found[2], expected[2])


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("devices", [["cpu", "a/cpu"], ["cpu", "a/cpu+b/cpu"]], ids=["one", "replicas"])
def test_deferred_statistics_are_the_same_bit_for_bit(
    devices: list[str], deferred: bool, replays: list[str]
) -> None:
    """What a recorded layer saw is collected at each replay: by replicas, too, of uneven micro-batches."""
    results = []
    options: dict[str, Any] = {"cuts": ["features.0"], "chunks": 4, "transport": "in_process", "verify": False}
    for cuda_graphs in (False, True):
        with fxsplit.compile(
            mobilenet().train(), devices, deferred_batch_norm=deferred, cuda_graphs=cuda_graphs, **options
        ) as pipe:
            optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-5, momentum=0.1)
            losses = []
            for step in range(4):
                if step != 2:  # two are summed
                    optimizer.zero_grad()
                losses.append(pipe.step(images(10), target=torch.arange(10), loss_fn=F.cross_entropy).loss)
                optimizer.step()
            with torch.no_grad():
                losses.append(pipe(images(10)))  # updates, too
            pipe._engine.check_replicas()
            results.append((losses, pipe.gradients(), pipe.state_dict()))
    assert replays.count("backward") >= 2 * 4
    assert all(map(torch.equal, results[1][0], results[0][0]))
    same(results[1][1], results[0][1])
    same(results[1][2], results[0][2])


def test_calls_modes_frozen_parameters_and_uneven_batches(replays: list[str]) -> None:
    """Each kind of micro-batch has recordings of its own."""
    results = []
    for cuda_graphs in (False, True):
        model, y = mobilenet().train(), torch.arange(7) % 10
        found: list[Tensor] = []
        with fxsplit.compile(
            model, ["cpu", "a/cpu"], cuts=["features.5"], chunks=2, transport="in_process", cuda_graphs=cuda_graphs
        ) as pipe:
            for turn in range(6):
                pipe.train(turn % 3 != 2)
                if turn == 3:
                    dict(pipe.named_parameters())["features.0.0.weight"].requires_grad_(False)
                output = pipe(images(7))
                F.cross_entropy(output, y).backward()
                with torch.no_grad():
                    found += [output, pipe(images(7))]
            results.append((found, pipe.gradients(), pipe.state_dict()))
    assert "backward" in replays
    assert all(map(torch.equal, results[1][0], results[0][0]))
    same(results[1][1], results[0][1])
    same(results[1][2], results[0][2])


def test_outputs_of_an_earlier_call_stay(replays: list[str]) -> None:
    """A slot is not used again while its micro-batch is alive, and what was returned is not written to."""
    model = mobilenet().eval()
    reference = copy.deepcopy(model)
    with fxsplit.compile(
        model, ["cpu", "a/cpu"], cuts=["features.5"], transport="in_process", cuda_graphs=True
    ) as pipe:
        pipe(images(2)).sum().backward()
        outputs = [pipe(images(2) * factor) for factor in (1.0, 2.0, 3.0)]
        for factor, output in zip((1.0, 2.0, 3.0), outputs, strict=True):
            assert torch.equal(output, reference(images(2) * factor))
        for output in reversed(outputs):
            output.sum().backward()
        assert replays.count("backward") == 6
        del output, outputs
        pipe(images(2))  # its backward never comes: the next run forgets it
        pipe(images(2)).sum().backward()
    assert replays.count("forward") == 10


class Picky(nn.Module):
    """Looks at its numbers in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x / x.detach().abs().max().item()


@pytest.mark.parametrize(("checkpoint", "reason"), [("never", "reads numbers on the host"), ("always", "again")])
def test_a_stage_that_cannot_be_recorded_runs_as_it_is(checkpoint: str, reason: str, replays: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Picky())
    options: dict[str, Any] = {"cuts": ["1"], "transport": "in_process", "checkpoint": checkpoint}
    x = torch.randn(4, 4)
    with (
        warnings.catch_warnings(record=True) as caught,
        fxsplit.compile(model, ["cpu", "a/cpu"], cuda_graphs=True, **options) as pipe,
    ):
        warnings.simplefilter("always")
        for _ in range(4):
            assert torch.equal(pipe.step(x, loss_fn=torch.sum).output, model(x))
    said = [str(w.message) for w in caught if "stage 1 is not replayed as a CUDA graph" in str(w.message)]
    assert len(said) == 1 and reason in said[0]
    assert len(replays) == (6 if checkpoint == "never" else 0), "the other stage is recorded"


def test_another_loss_is_refused(replays: list[str]) -> None:
    """A recorded backward is that of the outputs whose gradients came first."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x)
            return self.one(x), self.two(x)

    x = torch.randn(4, 4)
    with fxsplit.compile(Two(), ["cpu", "a/cpu"], cuts=["one"], transport="in_process", cuda_graphs=True) as pipe:
        for _ in range(2):
            pipe.step(x, loss_fn=lambda output: output[0].sum())
        with pytest.raises(fxsplit.errors.PipelineError, match="other outputs"):
            pipe.step(x, loss_fn=lambda output: output[1].sum())
        assert pipe.step(x, loss_fn=lambda output: output[0].sum()).loss.dim() == 0
    assert replays


def test_what_the_inspector_refuses() -> None:
    x = torch.randn(4)
    for work, word in (
        (lambda: x.sum().item(), "_local_scalar_dense"),
        (lambda: x.nonzero(), "nonzero"),
        (lambda: torch.rand(2, generator=torch.Generator()), "generator"),
        (lambda: x.to_sparse() * 2, "layout"),
    ):
        with Inspector(torch.device("cpu")) as inspector:
            work()
        assert inspector.reason is not None and word in inspector.reason
    with Inspector(torch.device("cpu")) as inspector:
        F.dropout(torch.relu(x), 0.5).sum()
    assert inspector.reason is None
    with Inspector(torch.device("cuda")) as inspector:
        torch.relu(x)
    assert inspector.reason is not None and "on cpu" in inspector.reason


def test_attention_keeps_its_seed_on_the_host() -> None:
    """Where it runs on a GPU as it is; recorded, the seed is on the GPU."""
    inspector, seed = Inspector(torch.device("cuda")), torch.tensor(7)
    attention = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    assert inspector._reason(attention, ((seed,), {})) is None
    assert "on cpu" in str(inspector._reason(attention, ((torch.zeros(2),), {})))
    assert "on cpu" in str(inspector._reason(torch.ops.aten.mul.Tensor, ((seed,), {})))


def test_buffers_take_over_what_is_there() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad = torch.tensor([1.0, 2.0])
    buffers = GradientBuffers()
    buffers.of(parameters)[1].fill_(5.0)
    buffers.take_over(parameters)
    assert [p.grad is b for p, b in zip(parameters, buffers.of(parameters), strict=True)] == [True, True]
    assert parameters[0].grad.tolist() == [1.0, 2.0]
    assert parameters[1].grad is not None and parameters[1].grad.tolist() == [0.0, 0.0]


def test_nothing_is_recorded_while_a_graph_of_autograds_is_alive() -> None:
    """Not even one of which only the second part of a backward is left: its nodes belong to other streams."""
    state = RunState(Mode(0, True))
    assert not state.has_graph
    x = torch.randn(2, requires_grad=True)
    state.saved[0, 0] = Saved({}, {"y": x * 2})
    assert state.has_graph
    first_part_done = Saved({}, {})
    first_part_done.weights = SplitBackward([x * 2], [torch.ones(2)], [x])
    state.saved = {(0, 0): first_part_done}
    assert state.has_graph
    state.saved = {(0, 0): Saved({}, {})}
    assert not state.has_graph
