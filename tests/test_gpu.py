"""On a GPU: the same pipelines, with stages there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fxsplit
from tests.models import images, mobilenet, tokens, transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_call_of_the_readme_runs_as_written() -> None:
    model, x, y = mobilenet(), images(16, 64), torch.arange(16) % 10
    reference = copy.deepcopy(model)
    with fxsplit.compile(model, devices=["cpu", "cuda"], compressor="sortquant8") as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.005, momentum=0.1)
        losses = []
        for _ in range(8):
            loss = F.cross_entropy(pipe(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert losses[0] == pytest.approx(F.cross_entropy(reference(x), y).item(), abs=0.05)
        assert {worker.device for worker in pipe.workers} == {"cpu", "cuda"}
        assert pipe.metrics.ratio < 0.5


@pytest.mark.parametrize("transport", ["in_process", "rpc"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_cpu_client_and_gpu_server(transport: str, chunks: int) -> None:
    """Uncompressed, the numbers are those of the CPU but for the GPU's rounding."""
    torch.backends.cudnn.allow_tf32 = False  # the worker takes it over; with TF32 gradients differ by 8 %
    model, x, y = mobilenet().eval(), images(8, 64), torch.arange(8)
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": ["features.0.2", "classifier"], "chunks": chunks, "transport": transport}
    with fxsplit.compile(model, ["cpu", "cuda", "cpu"], example_inputs=x, **options) as pipe:
        output = pipe(x)
        assert output.device.type == "cpu"
        F.cross_entropy(output, y).backward()
        F.cross_entropy(reference(x), y).backward()
        assert torch.allclose(output, reference(x), rtol=1e-2, atol=1e-3)
        found = pipe.gradients()
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            error = (found[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
            assert error < 1e-3, f"{name}: {error}"


def test_a_client_on_the_gpu() -> None:
    """Both processes on one GPU: the numbers of the unsplit model there."""
    model = transformer("roberta")
    batch = {name: tensor.cuda() for name, tensor in tokens(8).items()}
    reference = copy.deepcopy(model).cuda()
    with fxsplit.compile(model, ["cuda:0", "server/cuda:0"], cuts=["roberta.encoder.layer.2"]) as pipe:
        for training in (True, False):
            pipe.train(training)
            reference.train(training)
            output = pipe(**batch).logits
            assert output.device.type == "cuda"
            assert torch.allclose(output, reference(**batch).logits, rtol=1e-4, atol=1e-5)


def test_transformers_with_masks_on_the_gpu() -> None:
    for name, cut in (("bert", "bert.encoder.layer.2"), ("gpt2", "transformer.h.2"), ("llama", "model.layers.2")):
        model = transformer(name).eval()
        with fxsplit.compile(model, ["cpu", "cuda"], cuts=[cut], transport="in_process") as pipe, torch.no_grad():
            assert torch.allclose(pipe(**tokens(4)).logits, model(**tokens(4)).logits, rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize("chunks", [1, 4])
def test_deferred_batch_norm_on_the_gpu(chunks: int) -> None:
    """Running statistics of the whole batch: of every layer with one chunk, of the first one with several."""
    torch.backends.cudnn.allow_tf32 = False
    model, x = mobilenet().train().cuda(), images(10, 64).cuda()
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"cuts": ["features.5"], "chunks": chunks}
    with fxsplit.compile(model, ["cuda", "server/cuda"], deferred_batch_norm=True, **options) as pipe:
        for _ in range(3):
            pipe(x)
            reference(x)
        state = pipe.state_dict()
        for name, expected in reference.named_buffers():
            if chunks == 1 or name.startswith("features.0."):
                torch.testing.assert_close(state[name], expected.cpu(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("codec", ["uniform8", "sortquant4", "fastquant8"])
def test_codecs_on_the_gpu_give_the_cpus_numbers(codec: str) -> None:
    compressor = fxsplit.compressor(codec)
    x = torch.randn(4, 32, 28, 28)
    on_gpu, on_cpu = compressor.encode(x.cuda()), compressor.encode(x)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, on_cpu, strict=True))


@pytest.mark.parametrize("server", ["a/cuda:0", "a/cuda:0+b/cuda:0"])
def test_a_client_and_workers_on_one_gpu_in_one_process(server: str) -> None:
    """The client's backward waits for theirs, in the only thread that autograd has for the GPU."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).cuda()
    reference, x = copy.deepcopy(model), torch.randn(4, 6, device="cuda:0")
    options: dict[str, Any] = {"cuts": ["2"], "chunks": 2, "transport": "in_process", "verify": False}
    with fxsplit.compile(model, ["cuda:0", server], **options) as pipe:
        for _ in range(2):
            pipe(x).square().sum().backward()
            reference(x).square().sum().backward()
        found = pipe.gradients()
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(found[name].cpu(), parameter.grad.cpu(), rtol=1e-4, atol=1e-5)
