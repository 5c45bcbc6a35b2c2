"""On GPUs: stages replayed as CUDA graphs, two of them in one process, and tensors that go directly."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fxsplit
from fxsplit.runtime.recording import CudaRecorder
from fxsplit.runtime.slots import Slot
from fxsplit.runtime.streams import Streams, brought, mark, to_host
from tests.models import images, mobilenet, tokens, transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("repeatable"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def mean_square(output: Any) -> Any:
    return output.logits.square().mean()


def run(devices: list[str], kind: str, cuda_graphs: bool, steps: int = 4, **options: Any) -> dict[str, Any]:
    """Losses, gradients of the last two steps together, state, and how often a slot was used."""
    torch.manual_seed(1)
    home = torch.device(devices[0])
    if kind == "mobilenet":
        model, blocks = mobilenet().train(), ["features.0.2", "features.9", "features.14"]
        inputs: dict[str, Any] = {"x": images(16, 64).to(home)}
        given: dict[str, Any] = {"target": torch.arange(16).to(home) % 10, "loss_fn": F.cross_entropy}
    else:
        model = transformer("roberta", dropout=0.1).train()
        blocks = [f"roberta.encoder.layer.{i}" for i in (1, 2, 3)]
        inputs, given = {name: t.to(home) for name, t in tokens(8, padded=False).items()}, {"loss_fn": mean_square}
        del inputs["attention_mask"]
    settings: dict[str, Any] = {"cuts": blocks[: len(devices) - 1], "chunks": 4, "transport": "in_process"}
    with fxsplit.compile(model, devices, cuda_graphs=cuda_graphs, **{**settings, **options}) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-4, momentum=0.1)
        losses = []
        for step in range(steps):
            if step != steps - 1:
                optimizer.zero_grad()
            losses.append(pipe.step(**inputs, **given).loss)
            if step < steps - 2:
                optimizer.step()
        return {
            "losses": [loss.cpu() for loss in losses],
            "gradients": pipe.gradients(),
            "state": pipe.state_dict(),
        }


def assert_same(found: dict[str, Any], expected: dict[str, Any], exact: bool = True) -> None:
    tolerance: dict[str, Any] = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-3, "atol": 1e-4}
    for one, other in zip(found["losses"], expected["losses"], strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    for part in ("gradients", "state"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(found[part][name], value, msg=name, **tolerance)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stages that were replayed."""
    done: list[int] = []
    forward = Slot.forward

    def noted(self: Slot, inputs: Any) -> Any:
        done.append(self._kind.stage)
        return forward(self, inputs)

    monkeypatch.setattr(Slot, "forward", noted)
    return done


@pytest.mark.parametrize("schedule", ["gpipe", "zero-bubble"])
@pytest.mark.parametrize("kind", ["mobilenet", "roberta"])
def test_graphs_give_the_numbers_of_the_stages_as_they_are(kind: str, schedule: str, replays: list[int]) -> None:
    """Losses, gradients, updates, running statistics and dropout. One GPU, its stages behind each other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not replayed.*")
        found = run(["cuda:0"] * 3, kind, True, schedule=schedule)
    assert {0, 1, 2} == set(replays)
    expected = run(["cuda:0"] * 3, kind, False, schedule=schedule)
    assert_same(found, expected, exact=kind == "mobilenet")  # attention's backward may sum in any order


def test_a_cpu_client_and_a_gpu_server_with_graphs(replays: list[int]) -> None:
    found = run(["cpu", "server/cuda:0", "cpu"], "mobilenet", True)
    assert set(replays) == {1}
    assert_same(found, run(["cpu", "server/cuda:0", "cpu"], "mobilenet", False))


@pytest.mark.parametrize("transport", ["in_process", "rpc"])
@pytest.mark.parametrize("codec", ["none", "sortquant8"])
def test_a_cpu_client_through_a_codec(codec: str, transport: str) -> None:
    """Encoded and decoded on streams beside the computation: the same each time."""
    options: dict[str, Any] = {"compressor": codec, "transport": transport}
    devices = ["cpu", "server/cuda:0", "cpu"]
    assert_same(run(devices, "mobilenet", True, **options), run(devices, "mobilenet", False, **options))


@pytest.mark.parametrize("kind", ["mobilenet", "roberta"])
def test_compiled_stages(kind: str) -> None:
    """Within what torch.compile itself leaves, sums in another order, before updates make more of it."""
    found = run(["cuda:0"] * 2, kind, False, steps=2, compile_stages=True)
    expected = run(["cuda:0"] * 2, kind, False, steps=2)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
    for part in ("gradients", "state"):
        pairs = [(found[part][name].double(), value.double()) for name, value in expected[part].items()]
        difference = sum((one - other).square().sum() for one, other in pairs) ** 0.5
        # Of the whole: some gradients are zero but for rounding, as those of biases before a batch norm.
        assert difference <= 1e-3 * sum(other.square().sum() for _, other in pairs) ** 0.5, part


@pytest.mark.parametrize("policy", ["always", "except_last"])
def test_checkpointed_stages_are_said_to_run_as_they_are(policy: str, replays: list[int]) -> None:
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph: its activations are computed again"):
        found = run(["cuda:0"] * 2, "mobilenet", True, checkpoint=policy)
    assert not replays
    assert_same(found, run(["cuda:0"] * 2, "mobilenet", False))


def test_bf16_autocast_with_graphs(replays: list[int]) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        found = run(["cuda:0"] * 2, "mobilenet", True, verify=False)
        assert replays
        assert_same(found, run(["cuda:0"] * 2, "mobilenet", False, verify=False))


def test_calls_with_the_callers_backward(replays: list[int]) -> None:
    """GPipe's halves, evaluation in between, and gradients of inputs on the GPU."""
    results = []
    for cuda_graphs in (False, True):
        model, found = mobilenet().train(), []
        options: dict[str, Any] = {"cuts": ["features.5"], "chunks": 2, "transport": "in_process"}
        with fxsplit.compile(model, ["cuda:0", "cuda:0"], cuda_graphs=cuda_graphs, **options) as pipe:
            for turn in range(5):
                pipe.train(turn != 2)
                x = images(8, 64).cuda().requires_grad_()
                output = pipe(x)
                F.cross_entropy(output, torch.arange(8, device="cuda")).backward()
                assert x.grad is not None and x.grad.is_cuda
                with torch.no_grad():
                    found += [output.cpu(), x.grad.cpu(), pipe(x).cpu()]
            results.append({"losses": found, "gradients": pipe.gradients(), "state": pipe.state_dict()})
    assert replays
    assert_same(results[1], results[0])


@two_gpus
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("kind", ["mobilenet", "roberta"])
def test_two_gpus_of_one_process(kind: str, cuda_graphs: bool, replays: list[int]) -> None:
    """Stages dealt out in turn give the numbers of one GPU."""
    found = run(["cuda:0", "cuda:1", "cuda:0", "cuda:1"], kind, cuda_graphs, steps=6)
    assert bool(replays) == cuda_graphs
    expected = run(["cuda:0"] * 4, kind, False, steps=6)
    assert_same(found, expected, exact=kind == "mobilenet")


@two_gpus
@pytest.mark.parametrize("transport", ["in_process", "rpc"])
@pytest.mark.parametrize("codec", ["none", "uniform8"])
def test_two_gpus_and_a_codec(codec: str, transport: str) -> None:
    options: dict[str, Any] = {"compressor": codec, "transport": transport}
    found = run(["cuda:0", "server/cuda:1"], "mobilenet", True, **options)
    assert_same(found, run(["cuda:0", "server/cuda:1"], "mobilenet", False, **options))


@two_gpus
def test_copies_between_gpus_wait_for_what_they_copy() -> None:
    """A copy is queued behind long work, and read behind the copy; the host waits for neither."""
    for _ in range(5):
        with torch.cuda.device(0):
            x = torch.zeros(1 << 20, device="cuda:0")
            torch.cuda._sleep(20_000_000)
            x += 1.0
            marks = mark(x)
        lane = Streams()
        with lane.current([torch.device("cuda:1")]):
            (there,) = brought((x,), marks, torch.device("cuda:1"))
            arrived = mark(there)
        x_again = x.clone()
        del x
        (back,) = brought((there,), arrived, torch.device("cpu"))
        assert bool((back == 1.0).all()) and bool((x_again == 1.0).all())


@pytest.mark.parametrize("transport", ["in_process", "rpc"])
def test_spans_are_what_the_gpu_took(transport: str) -> None:
    """Beside events around all of a step, on a stage that has nearly all of the work."""
    model, x, y = mobilenet().train(), images(64, 224), torch.arange(64) % 10
    options: dict[str, Any] = {"cuts": ["features.0.2", "classifier"], "chunks": 1, "transport": transport}
    with fxsplit.compile(model, ["cpu", "server/cuda:0", "cpu"], cuda_graphs=True, **options) as pipe:
        for _ in range(4):
            pipe.step(x, target=y, loss_fn=F.cross_entropy)
        pipe.metrics.reset()
        for _ in range(4):
            pipe.step(x, target=y, loss_fn=F.cross_entropy)
        stage, whole_s = pipe.metrics.stages[1], pipe.metrics.total_s
        everything = [span for _, spans in pipe.metrics.reports for span in spans]
        spans = [span for span in everything if span.source == 1 and span.kind in ("F", "B")]
    alone: Any = mobilenet().train().cuda().features
    given = torch.randn(64, 32, 112, 112, device="cuda", requires_grad=True)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        begin.record()
        alone[1:](given).sum().backward()
        end.record()
        end.synchronize()
    assert len(spans) == 8
    assert 0.5 * 4 * begin.elapsed_time(end) / 1e3 < stage.compute_s < whole_s


def test_recording_does_nothing_and_replaying_does_it_again() -> None:
    device = torch.device("cuda:0")
    recorder = CudaRecorder(device)
    x, total = torch.ones(4, device=device), torch.zeros(4, device=device)
    replay = recorder.record(lambda: _add(total, x), recorder.new_pool())
    assert to_host(total).sum() == 0.0
    replay()
    x.fill_(2.0)
    replay()
    assert to_host(total).tolist() == [3.0] * 4


def test_after_a_recording_that_fails_all_goes_on() -> None:
    device = torch.device("cuda:0")
    recorder = CudaRecorder(device)
    x = torch.ones(4, device=device)

    def reads() -> None:
        if float(x.sum()) > 0.0:
            x.add_(1.0)

    with pytest.raises(RuntimeError):
        recorder.record(reads, recorder.new_pool())
    assert to_host(x).tolist() == [1.0] * 4
    replay = recorder.record(lambda: _double(x), recorder.new_pool())
    replay()
    assert to_host(x).tolist() == [2.0] * 4


def _add(total: Tensor, x: Tensor) -> None:
    total.add_(x)


def _double(x: Tensor) -> None:
    x.mul_(2.0)


def test_nothing_is_left_of_many_steps() -> None:
    """Memory of the GPU is flat once all is recorded."""
    model, x, y = mobilenet().train(), images(16, 64).cuda(), torch.arange(16).cuda() % 10
    options: dict[str, Any] = {"cuts": ["features.5"], "chunks": 4, "transport": "in_process"}
    with fxsplit.compile(model, ["cuda:0", "cuda:0"], cuda_graphs=True, **options) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-4)
        allocated = []
        for step in range(40):
            optimizer.zero_grad()
            pipe.step(x, target=y, loss_fn=F.cross_entropy)
            optimizer.step()
            if step in (10, 39):
                torch.cuda.synchronize()
                allocated.append(torch.cuda.memory_allocated())
    assert abs(allocated[1] - allocated[0]) < 1 << 20
