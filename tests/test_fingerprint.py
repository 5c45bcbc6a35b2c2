"""A worker whose code is not the client's is refused before it computes, with both fingerprints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxsplit

MODEL = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * {factor}
"""
SCRIPT = """
import os, sys
import torch, fxsplit
from torch import nn
import blocks
folder = os.path.dirname(blocks.__file__)
sys.path[sys.path.index(folder)] = os.environ["OTHER"]  # where workers of this host look for modules
model = nn.Sequential(nn.Linear(4, 4), blocks.Block())
try:
    with fxsplit.compile(model, ["cpu", "server/cpu"], cuts=["1"], example_inputs=torch.randn(2, 4)) as pipe:
        print("shape", tuple(pipe(torch.randn(2, 4)).shape))
except fxsplit.FxsplitError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("factor", [2, 3])
def test_other_code_on_a_worker_is_refused(tmp_path: Path, factor: int) -> None:
    for name, own in (("client", 2), ("worker", factor)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "blocks.py").write_text(MODEL.format(factor=own))
    paths = os.pathsep.join([str(tmp_path / "client"), str(Path(fxsplit.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OTHER": str(tmp_path / "worker")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120
    )
    if factor == 2:
        assert done.stdout.startswith("shape (2, 4)"), done
    else:
        assert done.stdout.startswith("refused a worker has other code of blocks.Block"), done
        assert done.stdout.count("fingerprint") == 2, done
