"""What the tests share: deterministic torch, and small models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fxsplit", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fxsplit")  # the same examples each time, however busy the machine


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Fixed seed and one thread: the machine's number of cores must not change results."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was measured on this machine before must not change plans."""
    folder: Path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FXSPLIT_CACHE", str(folder))
    return folder


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same algorithms each time on a GPU: some of CUDA's sum in any order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before
