"""On GPUs: replicas of a stage, their gradients summed by NCCL between two GPUs and by gloo on one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fxsplit
from fxsplit.errors import WorkerError
from tests.comparison import MOBILENET, TRANSPORTS
from tests.models import images, mobilenet
from tests.test_replicated_pipelines import LABELS, Chooses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("repeatable"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

PAIRS = ["a/cuda:0+b/cuda:0", pytest.param("a/cuda:0+b/cuda:1", marks=two_gpus)]


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("cuts", [MOBILENET[2], ["features.0"]], ids=["shared", "all in the replicas"])
@pytest.mark.parametrize(
    ("client", "transport"), [*(("cpu", transport) for transport in TRANSPORTS), ("cuda:0", "in_process")]
)
@pytest.mark.parametrize("replicas", PAIRS)
def test_training_is_that_of_one_gpu(
    replicas: str, client: str, transport: str, cuts: list[str], cuda_graphs: bool
) -> None:
    """A sum of two is the same in either order; afterwards the replicas have the same bits.

    With a client on a GPU, too, one thread queues the work of all.
    """
    options: dict[str, Any] = {"cuts": cuts, "chunks": 2, "transport": transport, "verify": False}
    x, y, found = images(8).to(client), LABELS[:8].to(client), []
    for devices in ([client, "a/cuda:0"], [client, replicas]):
        graphs = cuda_graphs and devices[1] == replicas
        model = mobilenet().to(client)
        with (
            warnings.catch_warnings(),
            fxsplit.compile(model, devices, cuda_graphs=graphs, **options) as pipe,
        ):
            warnings.filterwarnings("error", ".*not replayed.*")
            optimizer = pipe.optimizer(torch.optim.SGD, lr=1e-5)
            losses = []
            for _ in range(4):
                optimizer.zero_grad()
                losses.append(pipe.step(x, target=y, loss_fn=F.cross_entropy).loss)
                optimizer.step()
            pipe._engine.check_replicas()
            found.append((losses, pipe.gradients(), pipe.state_dict()))
    for name, value in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], value, rtol=1e-4, atol=1e-5)
    for ours, one in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(ours, one)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("replicas", PAIRS)
def test_a_failure_on_one_gpu_gives_the_step_up_on_both(replicas: str, transport: str) -> None:
    """The group that one of them waits in is dropped, and the next step makes another."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity(), Chooses(), torch.nn.Linear(4, 3))
    x = torch.ones(4, 4)
    bad = x.clone()
    bad[3] = 1000.0
    options: dict[str, Any] = {"cuts": ["2"], "chunks": 2, "transport": transport, "verify": False}
    with fxsplit.compile(model, ["cpu", replicas], **options) as pipe:
        pipe.step(x, target=LABELS[:4] % 3, loss_fn=F.cross_entropy)
        before = pipe.gradients()
        with pytest.raises(WorkerError, match="too large"):
            pipe.step(bad, target=LABELS[:4] % 3, loss_fn=F.cross_entropy)
        for name, gradient in pipe.gradients().items():
            assert torch.equal(gradient, before[name]), name
        pipe.step(x, target=LABELS[:4] % 3, loss_fn=F.cross_entropy)
        pipe._engine.check_replicas()
