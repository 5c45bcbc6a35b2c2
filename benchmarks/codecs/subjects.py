"""What is measured: the compressors, and what they stand beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsplit.compressors import Compressor, compressor
from fxsplit.spec import TensorSpec

CODECS = (
    "none",
    "fp16",
    "bf16",
    "fp8",
    "uniform8",
    "uniform4",
    "uniform8(group=channel)",
    "uniform4(group=channel, rounding=stochastic)",
    "sortquant8",
    "sortquant4",
    "fastquant8",
    "fastquant4",
    "kmeans4",
    "adaptive4",
    "topk(ratio=0.1)",
    "poweriter(rank=3)",
    "svd(rank=3)",
    "uniform8+zstd",
)
"""What is measured if nothing else is asked for."""

ALGORITHM_1 = "Algorithm 1, 8 bit, full sort"
TORCH_UNIFORM = "uniform 8 bit, plain torch"
TORCH_QUANTIZE = "torch.quantize_per_tensor, 8 bit"

Payload = Sequence[Any]


@dataclass(frozen=True)
class Subject:
    """Something that encodes and decodes.

    Attributes:
        name: how the tables call it.
        encode: from a float32 tensor to what would be sent.
        decode: and back to a new tensor of that shape.
        wire_bytes: of a payload.
    """

    name: str
    encode: Callable[[Tensor], Payload]
    decode: Callable[[Payload], Tensor]
    wire_bytes: Callable[[Payload], int]


def subjects(spellings: Sequence[str], spec: TensorSpec) -> list[Subject]:
    """The baselines, and the compressors of these spellings, for tensors of one spec.

    Raises:
        CompressorError: no compressor is called so.
    """
    return [*_baselines(spec), *(_codec(compressor(spelling), spec) for spelling in spellings)]


def _codec(codec: Compressor, spec: TensorSpec) -> Subject:
    """A compressor as an edge uses it, with the memory that each end keeps."""
    sending: dict[str, Tensor] = {}
    receiving: dict[str, Tensor] = {}
    return Subject(
        str(codec),
        lambda x: codec.encode_next(x, sending),
        lambda payload: codec.decode_next(payload, spec, receiving),
        _nbytes,
    )


def _baselines(spec: TensorSpec) -> list[Subject]:
    return [
        Subject(ALGORITHM_1, algorithm_1, lambda payload: algorithm_1_back(payload, spec), _nbytes),
        Subject(TORCH_UNIFORM, torch_uniform, torch_uniform_back, _nbytes),
        Subject(TORCH_QUANTIZE, torch_quantize, lambda p: p[0].dequantize(), lambda p: p[0].numel() + 8),
    ]


def _nbytes(payload: Payload) -> int:
    return sum(tensor.nbytes for tensor in payload)


def algorithm_1(x: Tensor, split_bits: int = 2, offset_bits: int = 6) -> Payload:
    """Sort quantization as it is written down: sort, cut into chunks, quantize each, put the codes back in place.

    Args:
        x: any shape, at least 2**split_bits elements.
        split_bits: S; there are 2**S chunks.
        offset_bits: Q; a chunk is quantized uniformly to 2**Q values. S + Q is at most 8.

    Returns:
        Codes uint8 `[n]`, minima and steps of the chunks, `[2**S]` each.
    """
    values, places = x.reshape(-1).sort()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=x.device)
    minima, steps = [], []
    chunks = zip(values.chunk(1 << split_bits), places.chunk(1 << split_bits), strict=True)
    for number, (chunk, where) in enumerate(chunks):
        step = (chunk[-1] - chunk[0]) / ((1 << offset_bits) - 1)
        codes[where] = (((chunk - chunk[0]) / step).round() + (number << offset_bits)).to(torch.uint8)
        minima.append(chunk[0])
        steps.append(step)
    return codes, torch.stack(minima), torch.stack(steps)


def algorithm_1_back(payload: Payload, spec: TensorSpec, offset_bits: int = 6) -> Tensor:
    """Bucket and place within it from each code, and the value from these."""
    codes, minima, steps = payload
    buckets = (codes >> offset_bits).long()
    values: Tensor = minima[buckets] + steps[buckets] * (codes & ((1 << offset_bits) - 1))
    return values.view(spec.shape)


def torch_uniform(x: Tensor) -> Payload:
    """Uniform quantization to 8 bits by the formula, one torch operation after the other."""
    low, high = torch.aminmax(x)
    step = (high - low) / 255
    return ((x - low) / step).round().to(torch.uint8), low, step


def torch_uniform_back(payload: Payload) -> Tensor:
    """The values that the codes of `torch_uniform` stand for."""
    codes, low, step = payload
    values: Tensor = codes * step + low
    return values


def torch_quantize(x: Tensor) -> Payload:
    """Uniform quantization to 8 bits by torch's own quantized tensors; zero is exact."""
    low, high = torch.aminmax(x)
    step = ((high - low) / 255).item()
    return (torch.quantize_per_tensor(x, step, round(-low.item() / step), torch.quint8),)
