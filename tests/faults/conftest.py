"""What several tests of snapshots read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsplit


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two snapshots of a model as small as can be."""
    directory = tmp_path_factory.mktemp("snapshots")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    settings = fxsplit.Snapshots(directory, every=1)
    with fxsplit.compile(
        model, ["cpu", "b/cpu"], cuts=["1"], transport="in_process", snapshots=settings, verify=False
    ) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):
            pipe.step(torch.ones(2, 2), target=torch.ones(2, 1), loss_fn=F.mse_loss)
            optimizer.step()
            optimizer.zero_grad()
            pipe._engine._snapshotter.wait(10.0)  # type: ignore[attr-defined]
    assert sorted(p.name for p in directory.glob("step-*")) == ["step-00000001", "step-00000002"]
    return directory
