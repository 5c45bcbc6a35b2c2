"""Wrong input: an error that names the thing, what was found, what is allowed, what to try; nothing is left."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsplit
from fxsplit.errors import FxsplitError, PipelineError, PlanError
from tests.models import images, mobilenet
from tests.processes import worker_processes

SANDWICH = ["cpu", "server/cpu", "cpu"]
CUTS = ["features.0.2", "classifier"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No worker process before or after."""
    assert worker_processes() == []
    yield
    assert worker_processes() == []


class Tiny(nn.Module):
    """One place to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "not a module": ({"model": Tiny}, ["torch.nn.Module", "found", "try"]),
    "a state_dict": ({"model": {"a": 1}}, ["torch.nn.Module"]),
    "unknown compressor": (
        {"compressor": "sortqant8"},
        ["sortqant8", "sortquant", "uniform", "fastquant", "none"],
    ),
    "unknown gradient compressor": ({"gradient_compressor": "unifrm8"}, ["unifrm8", "uniform"]),
    "unknown argument": ({"compressor": "sortquant8(splitt=3)"}, ["splitt", "split"]),
    "too many bits": ({"compressor": "sortquant17"}, ["17", "16"]),
    "no bits": ({"compressor": "uniform0"}, ["0", "2"]),
    "split too large": ({"compressor": "sortquant8(split=8)"}, ["split", "8", "7"]),
    "unknown device": ({"devices": ["cpu", "gpu"]}, ["gpu", "cpu"]),
    "a GPU that is not here": ({"devices": ["cpu", "cuda:77"]}, ["cuda:77", "cpu"]),
    "no devices": ({"devices": []}, ["device"]),
    "devices as a string": ({"devices": "cpu"}, ["devices"]),
    "more stages than places": (
        {"devices": ["cpu", "a/cpu", "b/cpu", "c/cpu", "d/cpu"]},
        ["places to cut", "5 stages", "at most 2"],
    ),
    "too few cuts": ({"cuts": ["second"], "devices": SANDWICH}, ["cut", "1", "2"]),
    "unknown cut": ({"cuts": ["secnd"]}, ["secnd", "second"]),
    "no chunks": ({"chunks": 0}, ["chunks", "0", "1 or more"]),
    "chunks are no number": ({"chunks": "four"}, ["chunks", "four"]),
    "unknown schedule": ({"schedule": "zigzag"}, ["zigzag", "gpipe"]),
    "a time-out that is no number": ({"timeout_s": "5"}, ["time-out", "'5'", "above 0"]),
    "a time-out that never comes": ({"timeout_s": float("nan")}, ["time-out", "nan", "above 0"]),
    "unknown transport": ({"transport": "pigeon"}, ["pigeon", "rpc", "in_process"]),
    "empty batch": ({"example_inputs": torch.empty(0, 3)}, ["empty", "0 samples"]),
    "wrong device": ({"example_inputs": torch.empty(4, 3, device="meta")}, ["meta", "cpu", "to("]),
    "wrong number of inputs": ({"example_inputs": (torch.ones(2, 3), 1, 2)}, ["cannot be called", "forward"]),
    "a plan that is not there": ({"plan": "/nowhere/plan.json"}, ["/nowhere/plan.json"]),
    "a budget that nothing meets": (
        {"budget": fxsplit.Budget(macs={"cpu": 1})},
        ["macs of cpu", "missed by 35", "allowed", "nearest plan"],
    ),
    "a budget of another device": ({"budget": fxsplit.Budget(macs={"tpu": 1})}, ["tpu", "cpu"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_any_worker_starts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: object) -> None:
        raise AssertionError("a worker is started")

    monkeypatch.setattr("fxsplit.runtime.rpc.WorkerProcess", start)
    changed, words = CASES[case]
    arguments: dict[str, Any] = {
        "model": Tiny(),
        "devices": ["cpu", "server/cpu"],
        "example_inputs": torch.ones(4, 3),
    }
    arguments.update(changed)
    with pytest.raises(FxsplitError) as caught:
        fxsplit.compile(**arguments)
    for word in words:
        assert word in str(caught.value), f"'{word}' is not in: {caught.value}"


def test_calls_of_a_pipeline() -> None:
    with fxsplit.compile(mobilenet().eval(), SANDWICH, cuts=CUTS, chunks=4, transport="in_process") as pipe:
        for x, words in (
            (torch.empty(0, 3, 32, 32), ["empty"]),
            (images(3), ["fewer samples than chunks", "3 samples", "at least 4", "drop_last"]),
            (images(4).to("meta"), ["meta", "cpu", "to("]),
        ):
            for _ in range(2):  # before and after the first good call
                with pytest.raises(FxsplitError) as caught:
                    pipe(x)
                for word in words:
                    assert word in str(caught.value)
                pipe(images(4))
    for _ in range(2):
        pipe.close()
    for use in (lambda: pipe(images(4)), pipe.state_dict, pipe.gradients, lambda: pipe.workers, lambda: pipe.plan):
        with pytest.raises(FxsplitError, match="closed"):
            use()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("transport", ["in_process", "rpc"])
def test_non_finite_values_are_refused_and_the_pipeline_goes_on(value: float, transport: str) -> None:
    """Policy: a lossy compressor refuses NaN and infinity, naming edge and worker; no compressor sends them on."""
    if transport == "rpc" and value != value:
        pytest.skip("one kind over processes is enough")
    model = Tiny()
    bad = torch.full((4, 3), value)
    options: dict[str, Any] = {"cuts": ["second"], "transport": transport, "example_inputs": torch.ones(4, 3)}
    with fxsplit.compile(model, ["cpu", "server/cpu"], compressor="sortquant8", **options) as pipe:
        with pytest.raises(FxsplitError) as caught:
            pipe(bad)
        for word in ("first", "stage 0 to 1", "micro-batch 0", "worker client", "finite", "12"):
            assert word in str(caught.value), caught.value
        assert torch.equal(pipe(torch.ones(4, 3)), pipe.rewritten(torch.ones(4, 3)))
        output = pipe(torch.ones(4, 3))
        with pytest.raises(FxsplitError, match="worker server") as caught:
            output.backward(torch.full_like(output, value))
        assert "gradient of" in str(caught.value)
        pipe(torch.ones(4, 3)).sum().backward()
    if transport == "in_process":
        with fxsplit.compile(model, ["cpu", "server/cpu"], **options) as pipe:
            assert torch.allclose(pipe(bad), model(bad), equal_nan=True)


def test_a_second_backward_is_refused() -> None:
    with fxsplit.compile(Tiny(), ["cpu", "server/cpu"], cuts=["second"], transport="in_process") as pipe:
        loss = pipe(torch.ones(4, 3)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(FxsplitError, match="run already"):
            loss.backward()


def test_before_the_first_call() -> None:
    with fxsplit.compile(Tiny(), ["cpu", "server/cpu"], cuts=["second"], transport="in_process") as pipe:
        for use in (lambda: pipe.plan, pipe.gradients, pipe.zero_grad, lambda: pipe.load_state_dict({})):
            with pytest.raises(FxsplitError, match="before the first call"):
                use()


def test_state_dicts_and_optimizers_that_do_not_fit() -> None:
    x = torch.ones(4, 3)
    with fxsplit.compile(
        Tiny(), ["cpu", "server/cpu"], cuts=["second"], example_inputs=x, transport="in_process"
    ) as pipe:
        state = pipe.state_dict()
        with pytest.raises(FxsplitError, match=r"missing: first\.weight"):
            pipe.load_state_dict({k: v for k, v in state.items() if k != "first.weight"})
        with pytest.raises(FxsplitError, match=r"nearest.*first\.weight"):
            pipe.load_state_dict({**state, "firs.weight": torch.ones(1)})
        with pytest.raises(FxsplitError, match="shape"):
            pipe.load_state_dict({**state, "first.weight": torch.ones(2, 2)})
        with pytest.raises(FxsplitError, match="LBFGS"):
            pipe.optimizer(torch.optim.LBFGS)
        with pytest.raises(FxsplitError, match="own parameters"):
            pipe.optimizer(torch.optim.SGD, [torch.nn.Parameter(torch.ones(1))], lr=0.1)
        with pytest.raises(FxsplitError, match="not an optimizer class"):
            pipe.optimizer("sgd", lr=0.1)  # type: ignore[arg-type]
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        pipe(x).sum().backward()
        torch.nn.utils.clip_grad_value_(pipe.parameters(), 0.01)
        with pytest.raises(FxsplitError, match="more than one common factor"):
            optimizer.step()


class Breaks(nn.Module):
    """Raises in the second stage on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = Breaker()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


class Breaker(nn.Module):
    """Breaks on batches of five."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 5:
            raise ValueError("five is right out")
        return x * 2


@pytest.mark.parametrize("transport", ["in_process", "rpc"])
def test_an_exception_in_a_stage_arrives_with_its_place(transport: str) -> None:
    with fxsplit.compile(
        Breaks(), ["cpu", "server/cpu"], cuts=["second"], example_inputs=torch.ones(4, 3), transport=transport
    ) as pipe:
        for _ in range(2):
            with pytest.raises(FxsplitError) as caught:
                pipe(torch.ones(5, 3))
            for word in (
                "ValueError",
                "five is right out",
                "worker server",
                "stage 1",
                "micro-batch 0",
                "in forward",
            ):
                assert word in str(caught.value)
            assert torch.equal(pipe(torch.ones(4, 3)), pipe.rewritten(torch.ones(4, 3)))


class SharesMemory(nn.Module):
    """Changes a view in the second stage; the third one uses what it is a view of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        part = y[:, :2]
        z = self.second(x)
        part.add_(1)
        return self.third(y + z)  # type: ignore[no-any-return]


def test_memory_that_is_shared_over_a_cut_is_found() -> None:
    x = torch.ones(4, 4)
    model = SharesMemory()
    with fxsplit.compile(
        model, ["cpu", "server/cpu"], cuts=["third"], example_inputs=x, transport="in_process"
    ) as pipe:
        assert torch.equal(pipe(x), model(x))
    with pytest.raises(FxsplitError, match="does not reproduce") as caught:
        fxsplit.compile(model, SANDWICH, cuts=["second", "third"], example_inputs=x, transport="in_process")
    for word in ("split into 3 stages", "in place", "output 0 differs"):
        assert word in str(caught.value)


@pytest.mark.parametrize("chunks", [0, -1, "four", True, 1.5])
def test_chunks_are_checked_before_the_first_call(chunks: Any) -> None:
    with pytest.raises(FxsplitError, match="chunks must count micro-batches"):
        fxsplit.compile(Tiny(), ["cpu", "server/cpu"], chunks=chunks)


class SharedNorm(nn.Module):
    """One batch norm, called before and behind a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(self.first(x))))  # type: ignore[no-any-return]


def test_two_workers_cannot_share_what_the_forward_changes() -> None:
    """Each would keep running statistics of its own; on one worker, or in eval mode alone, all is well."""
    x = torch.randn(4, 4)
    with pytest.raises(PlanError, match=r"norm\."):
        fxsplit.compile(SharedNorm(), ["cpu", "a/cpu"], cuts=["second"], example_inputs=x, transport="in_process")
    model = SharedNorm()
    with fxsplit.compile(model, ["cpu", "cpu"], cuts=["second"], example_inputs=x, transport="in_process") as pipe:
        pipe(x)
        model(x)
        assert torch.equal(pipe.state_dict()["norm.running_mean"], model.norm.running_mean)  # type: ignore[arg-type]


class Ensemble(nn.Module):
    """What only torch.export takes: vmap in an opened forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.func.vmap(lambda row: row * self.first.weight.sum())(x)
        return self.second(self.norm(y))  # type: ignore[no-any-return]


def test_deferred_batch_norm_needs_layers() -> None:
    with pytest.raises(PipelineError, match=r"torch.export has taken them apart"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxsplit.compile(
            Ensemble(), ["cpu", "a/cpu"], cuts=["second"], example_inputs=torch.randn(4, 4),
            transport="in_process", deferred_batch_norm=True,
        )  # fmt: skip
