"""What each codec loses, on made and on recorded tensors."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from fxsplit.compressors import Compressor, compressor
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

from .data import KINDS, made
from .recorded import recorded

SHAPE = (32, 32, 32, 32)
"""Of the made tensors: that of the recorded one of MobileNetV2."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "casts": ("fp16", "bf16", "fp8"),
    "uniform": tuple(f"uniform{bits}" for bits in (2, 3, 4, 6, 8)),
    "uniform, channel": tuple(f"uniform{bits}(group=channel)" for bits in (2, 3, 4, 6, 8)),
    "uniform, stochastic": ("uniform4(group=channel, rounding=stochastic)",),
    "sort": tuple(f"sortquant{bits}" for bits in (2, 3, 4, 6, 8)),
    "sort, 1:1": ("sortquant4(split=2)", "sortquant8(split=4)"),
    "sort, channel": tuple(f"sortquant{bits}(group=channel)" for bits in (2, 3, 4, 6, 8)),
    "fast": tuple(f"fastquant{bits}" for bits in (4, 8)),
    "k-means": tuple(f"kmeans{bits}" for bits in (2, 3, 4)),
    "adaptive": tuple(f"adaptive{bits}" for bits in (2, 3, 4, 6)),
    "top-k": tuple(f"topk(ratio={ratio})" for ratio in (0.02, 0.05, 0.1, 0.2)),
    "power iteration": tuple(f"poweriter(ratio={ratio})" for ratio in (0.05, 0.1, 0.2, 0.4)),
    "SVD": tuple(f"svd(ratio={ratio})" for ratio in (0.05, 0.1, 0.2, 0.4)),
    "zstd": ("uniform4+zstd", "uniform8+zstd"),
}
"""Codecs of one kind, from few bytes to many."""


def measure_error(
    cifar: Path | None = None, steps: int = 60, families: Mapping[str, Sequence[str]] = FAMILIES
) -> dict[str, Any]:
    """Encodes and decodes each kind of tensor with each codec.

    Args:
        cifar: see `recorded.recorded`.
        steps: likewise.
        families: spellings of codecs.

    Returns:
        A dictionary for JSON: date, versions, and "rows", a list of {"family", "codec", "kind", "error", "bits"}:
        the norm of the difference over that of the tensor, and bits an element that are sent. What a codec
        refuses has {"refused"} instead of the last two.
    """
    tensors = {kind: made(kind, SHAPE) for kind in KINDS} | recorded(cifar, steps)
    rows = [
        {"family": family, "codec": str(compressor(spelling)), "kind": kind, **_loss(compressor(spelling), x)}
        for family, spellings in families.items()
        for spelling in spellings
        for kind, x in tensors.items()
    ]
    return {
        "error": True,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "images": "CIFAR-10" if cifar is not None else "made up",
        "steps": steps,
        "shapes": {kind: list(x.shape) for kind, x in tensors.items()},
        "rows": rows,
    }


def _loss(codec: Compressor, x: Tensor) -> dict[str, Any]:
    try:
        payload = codec.encode(x)
    except CompressorError as refusal:
        return {"refused": str(refusal).partition("\n")[0]}
    back = codec.decode(payload, TensorSpec.of(x)).double()
    error = float((back - x.double()).norm() / x.double().norm())
    return {"error": error, "bits": 8 * sum(part.nbytes for part in payload) / x.numel()}
