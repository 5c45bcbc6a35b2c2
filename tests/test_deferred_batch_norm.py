"""Batch norm with the running statistics of whole batches, against torch's own layers on the whole batches."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import fxsplit
from fxsplit.errors import PipelineError
from fxsplit.runtime.deferred_batch_norm import DeferredBatchNorm
from tests.comparison import (
    CHAIN2,
    SANDWICH,
    assert_same_gradients,
    assert_same_state,
    loss_of,
    reference_step,
)
from tests.models import images, mobilenet

SAMPLES = 10
LABELS = torch.arange(SAMPLES) % 10
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Small(nn.Module):
    """A small MobileNetV2: batch norm of one, two and three dimensions, alone and inside whole modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.BatchNorm2d(3)  # sees the same whatever the weights are, so it can be compared with eager
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8, momentum=None), nn.ReLU6(), nn.Conv2d(8, 16, 1)
        )
        self.deep = nn.BatchNorm3d(4, affine=False)
        self.head = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.first(self.inputs(x)))
        y = self.deep(y.unflatten(1, (4, 4))).flatten(1, 2)
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer for two places of very different values."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.linear, self.end = nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.inputs(self.linear(self.inputs(x)) * 5 + 100))  # type: ignore[no-any-return]


class Reference:
    """The model run on micro-batches, beside it its batch norm layers run by torch on what these saw together."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.layers = {n: copy.deepcopy(m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        self._seen: dict[str, dict[int, list[Tensor]]] = {}
        self._calls: defaultdict[str, int] = defaultdict(int)
        for name in self.layers:
            self.model.get_submodule(name).register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen.setdefault(name, {}).setdefault(self._calls[name], []).append(inputs[0].detach())
            self._calls[name] += 1

        return note

    def step(self, chunks: tuple[Tensor, ...]) -> Tensor:
        """Forwards and backwards; then each layer takes each of its calls, whole batches."""
        output = reference_step(self.model, chunks, self._call, LABELS)
        self._update()
        return output

    def forward(self, chunks: tuple[Tensor, ...]) -> None:
        """The same without backwards."""
        for chunk in chunks:
            self._call(self.model, chunk)
        self._update()

    def _call(self, model: nn.Module, chunk: Tensor) -> Tensor:
        self._calls.clear()
        return model(chunk)  # type: ignore[no-any-return]

    def _update(self) -> None:
        for name, calls in self._seen.items():
            for parts in calls.values():
                self.layers[name](torch.cat(parts))
        self._seen.clear()

    def assert_same(self, state: dict[str, Any], rtol: float = 2e-6) -> None:
        """Every running statistic, to some units in the last place."""
        for name, layer in self.layers.items():
            for kind in STATISTICS:
                torch.testing.assert_close(
                    state[f"{name}.{kind}"], getattr(layer, kind), rtol=rtol, atol=1e-6, msg=f"{name}.{kind}"
                )


def deferred(
    model: nn.Module, devices: list[str], cuts: list[str], chunks: int, **options: Any
) -> fxsplit.Pipeline:
    """A pipeline with the option, in this process if nothing else is said."""
    options = {"transport": "in_process", "deferred_batch_norm": True, **options}
    return fxsplit.compile(model, devices, cuts=cuts, chunks=chunks, **options)


def compare_training(model: nn.Module, x: Tensor, first: str, pipe: fxsplit.Pipeline, chunks: int) -> None:
    """Three steps: numbers bit for bit, statistics as torch's on whole batches.

    Those of the first layer are also those of the model on whole batches, as long as what it sees depends on no
    weights (`inputs`) or on untrained ones; deeper layers see what micro-batches have been normalised to.
    """
    before = copy.deepcopy(model.state_dict())
    reference, eager = Reference(model), copy.deepcopy(model)
    optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-3)
    plain = torch.optim.SGD(reference.model.parameters(), lr=1e-3)
    for step in range(3):
        batch = x * (1 + step)
        output = pipe(batch)
        loss_of(output, LABELS).backward()
        assert torch.equal(output, reference.step(batch.tensor_split(chunks)))
        assert_same_gradients(pipe, reference.model)
        eager(batch)
        state = pipe.state_dict()
        reference.assert_same(state)
        for kind in STATISTICS if step == 0 or first == "inputs" else ():
            expected = eager.get_submodule(first).get_buffer(kind)
            torch.testing.assert_close(state[f"{first}.{kind}"], expected, rtol=2e-6, atol=1e-6)
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
    assert list(state) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "forward" not in vars(model.get_submodule(first)), "the user's model was touched"


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_small_network(chunks: int) -> None:
    """Ten samples do not divide by four chunks."""
    model = Small()
    with deferred(model, SANDWICH, ["block", "head"], chunks) as pipe:
        compare_training(model, images(SAMPLES, 16), "inputs", pipe, chunks)


@pytest.mark.parametrize("chunks", [1, 4])
def test_mobilenet(chunks: int) -> None:
    model = mobilenet()
    with deferred(model, SANDWICH, ["features.0.2", "classifier"], chunks) as pipe:
        compare_training(model, images(SAMPLES, 64), "features.0.1", pipe, chunks)


def test_worker_processes() -> None:
    model = Small()
    with deferred(model, SANDWICH, ["first.1", "head"], 4, transport="rpc") as pipe:
        compare_training(model, images(SAMPLES, 16), "inputs", pipe, 4)


def test_one_chunk_is_the_model() -> None:
    """Ten steps without gradients, which update, too; then evaluation gives what the model gives."""
    model = Small()
    reference = copy.deepcopy(model)
    with deferred(model, CHAIN2, ["block"], 1) as pipe, torch.no_grad():
        for step in range(10):
            assert torch.equal(pipe(images(SAMPLES + step, 16)), reference(images(SAMPLES + step, 16)))
        state = pipe.state_dict()
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7, msg=name)
        found, expected = pipe.eval()(images(SAMPLES, 16)), reference.eval()(images(SAMPLES, 16))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(state[name], value) for name, value in pipe.state_dict().items())


def test_without_the_option_each_micro_batch_updates() -> None:
    model, x = Small(), images(SAMPLES, 16)
    plain, reference = copy.deepcopy(model), Reference(model)
    with deferred(model, CHAIN2, ["block"], 4, deferred_batch_norm=False) as pipe:
        loss_of(pipe(x), LABELS).backward()
        reference_step(plain, x.tensor_split(4), lambda m, c: m(c), LABELS)
        assert_same_state(pipe, plain)
        reference.step(x.tensor_split(4))
        with pytest.raises(AssertionError):
            reference.assert_same(pipe.state_dict())


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("cuts", [["end"], ["linear", "end"]], ids=["in one stage", "in two stages"])
def test_a_layer_that_is_called_twice(cuts: list[str], chunks: int) -> None:
    """It is updated twice a batch: by the first calls of all micro-batches together, then by the second ones."""
    model, x = Twice(), torch.randn(SAMPLES, 6) + 1
    reference, eager = Reference(model), copy.deepcopy(model)
    with deferred(model, [*["cpu"] * len(cuts), "server/cpu"], cuts, chunks) as pipe:
        for _ in range(2):
            loss_of(pipe(x), LABELS).backward()
            reference.step(x.tensor_split(chunks))
            eager(x)
            reference.assert_same(pipe.state_dict())
        assert pipe.state_dict()["inputs.num_batches_tracked"] == 4
        if chunks == 1:
            for kind in STATISTICS:
                expected = eager.inputs.get_buffer(kind)
                torch.testing.assert_close(pipe.state_dict()[f"inputs.{kind}"], expected, rtol=1e-6, atol=1e-7)


def test_frozen_layers_and_layers_without_statistics_stay_as_they_are() -> None:
    model = Small().train()
    model.first[1].eval()
    model.block[1] = nn.BatchNorm2d(8, track_running_stats=False)
    before, x = copy.deepcopy(model.state_dict()), images(SAMPLES, 16)
    reference = copy.deepcopy(model)
    with deferred(model, CHAIN2, ["block"], 4) as pipe:
        assert torch.equal(pipe(x), torch.cat([reference(c) for c in x.tensor_split(4)]))
        state = pipe.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(before[name], state[name]) for name in state if name.startswith("first.1"))
        assert not torch.equal(before["inputs.running_mean"], state["inputs.running_mean"])


class ChannelsLast(nn.BatchNorm1d):
    """A layer of a user's own, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_with_its_own_forward_and_other_types(dtype: torch.dtype) -> None:
    """Means far from zero, where a difference of sums of squares would lose the variance."""
    model = nn.Sequential(ChannelsLast(6), nn.Linear(6, 10)).to(dtype)
    x = (torch.randn(SAMPLES, 5, 6) * torch.arange(1, 7) + (1000 if dtype != torch.bfloat16 else 1)).to(dtype)
    layer = copy.deepcopy(model[0])
    with deferred(model, CHAIN2, ["1"], 4) as pipe:
        pipe(x)
        layer(x)
        rtol = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
        for kind in STATISTICS:
            found = pipe.state_dict()[f"0.{kind}"]
            torch.testing.assert_close(found, layer.get_buffer(kind), rtol=rtol, atol=rtol)


class Turns(nn.Module):
    """Takes another way if its input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y + x if x.sum() > 30 else y)  # type: ignore[no-any-return]


class Fails(nn.Module):
    """Its second part fails if the input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), Last()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x)  # type: ignore[no-any-return]


class Last(nn.Linear):
    """A linear layer that looks at a second input."""

    def __init__(self) -> None:
        super().__init__(4, 10)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.sum() > 30:
            raise ValueError("too large")
        return super().forward(y)


@pytest.mark.parametrize(
    ("kind", "error", "transport"),
    [(Turns, "different ways", "in_process"), (Fails, "too large", "in_process"), (Fails, "too large", "rpc")],
)
@pytest.mark.filterwarnings("ignore:Turns is traced again")
def test_a_run_that_is_given_up_leaves_nothing(kind: type[nn.Module], error: str, transport: str) -> None:
    """The last micro-batch ends it, when the first worker may have done all; the next run begins from before."""
    model = kind()
    reference = Reference(model)
    small, mixed = torch.rand(8, 4), torch.rand(8, 4)
    mixed[-2:] += 20
    with deferred(model, CHAIN2, ["second"], 4, transport=transport) as pipe, torch.no_grad():
        for batch in (small, mixed, small * 0.5):
            before = pipe.state_dict()
            if batch is not mixed:
                pipe(batch)
                reference.forward(batch.tensor_split(4))
                reference.assert_same(pipe.state_dict())
                continue
            with pytest.raises(fxsplit.FxsplitError, match=error):
                pipe(batch)
            assert all(torch.equal(before[name], value) for name, value in pipe.state_dict().items())


class Recomputes(nn.Module):
    """A part that is run again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_what_is_run_again_in_the_backward_does_not_count() -> None:
    first, part, last, x = nn.Linear(6, 6), Recomputes(), nn.Linear(6, 10), torch.randn(SAMPLES, 6)
    model, reference = nn.Sequential(first, part, last), Reference(nn.Sequential(first, part.inner, last))
    with deferred(model, CHAIN2, ["1"], 4) as pipe:
        loss_of(pipe(x), LABELS).backward()
        reference.step(x.tensor_split(4))
        gradients = pipe.gradients()
        for name, parameter in reference.model.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(gradients[name.replace("1.", "1.inner.", 1)], parameter.grad), name
        state = {name.replace("1.inner.", "1."): value for name, value in pipe.state_dict().items()}
        reference.assert_same(state)


def test_sync_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4))
    with pytest.raises(PipelineError, match="SyncBatchNorm"):
        deferred(model, CHAIN2, ["1"], 2)


def test_each_layer_has_its_own_precision() -> None:
    """One in double precision behind one in single precision loses nothing."""
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6).double())
    collects = DeferredBatchNorm([model])
    x = torch.randn(SAMPLES, 6, dtype=torch.float64) * 1e-6 + 1000
    expected = copy.deepcopy(model[1])
    del expected.forward
    expected(x)
    with collects.collecting(0, 0):
        model[1](x)
    collects.commit()
    torch.testing.assert_close(model[1].running_mean, expected.running_mean, rtol=1e-13, atol=0.0)
