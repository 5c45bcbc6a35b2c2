"""Entropy coding of what another compressor makes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxsplit.compressors.base import Compressor
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

PART = 1 << 18
"""Bytes that are coded at a time: beside the result there are no more of them."""

_STORED, _COMPRESSED = 0, 1


@dataclass(frozen=True)
class Entropy(Compressor):
    """Zstandard (RFC 8878) over packed codes, behind a quantizer: `uniform8+zstd`.

    It takes bytes and passes everything else by. Lossless; what it gains depends on the data: much behind
    `uniform8` on activations with a peak, next to nothing behind sort quantization, whose codes are about equally
    frequent. Works on the CPU: on an accelerator the codes are copied there and back.

    Wire: one byte that says how, and at most as many bytes as there are codes. `wire` tells this bound; what is
    sent is smaller where it can be.

    Args:
        level: 1 (fast) to 19 (small).

    Raises:
        CompressorError: `level` is no integer in its range.

    >>> str(Entropy(level=5))
    'zstd(level=5)'
    """

    name: ClassVar[str] = "zstd"
    has_exact_wire: ClassVar[bool] = False

    level: int = 1

    def __post_init__(self) -> None:
        self.check_integer("level", 1, 19)

    def takes(self, spec: TensorSpec) -> bool:
        """Bytes: packed codes."""
        return spec.dtype == torch.uint8

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """A byte and the codes, as a bound.

        Raises:
            CompressorError: not bytes.
        """
        if not self.takes(spec):
            raise CompressorError(
                "zstd codes bytes only",
                found=spec,
                allowed="the codes of a quantizer",
                hint="write it behind one: uniform8+zstd",
            )
        return (TensorSpec((spec.numel + 1,), torch.uint8),)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """One byte tensor, on the device of `x`.

        Raises:
            CompressorError: not bytes.
        """
        zstandard = _library()
        self.wire(TensorSpec.of(x))
        raw = x.detach().cpu().contiguous().view(-1).numpy()
        coder, sent = (
            zstandard.ZstdCompressor(level=self.level).compressobj(size=raw.size),
            bytearray([_COMPRESSED]),
        )
        for start in range(0, raw.size, PART):
            sent += coder.compress(raw[start : start + PART])
        sent += coder.flush()
        if len(sent) > raw.size:
            return (torch.cat((torch.tensor([_STORED], dtype=torch.uint8), torch.from_numpy(raw))).to(x.device),)
        return (torch.frombuffer(sent, dtype=torch.uint8).to(x.device),)  # which keeps the bytes

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """The bytes that were encoded.

        Raises:
            CompressorError: the payload is damaged, or of other bytes than `spec` says.
        """
        content = payload[0].detach().cpu().contiguous().numpy()
        raw = np.empty(spec.numel, np.uint8)
        try:
            found = self._read(content, raw)
        except (_library().ZstdError, IndexError) as error:
            raise CompressorError("a payload of zstd is damaged", found=str(error)) from error
        if found != raw.size:
            raise CompressorError("a payload of zstd is damaged", found=f"{found} bytes", allowed=raw.size)
        return torch.from_numpy(raw).view(spec.shape).to(payload[0].device)

    @staticmethod
    def _read(content: np.ndarray, raw: np.ndarray) -> int:
        """Fills `raw`; how many bytes there are, as far as one behind those that may be there."""
        if content[0] == _STORED:
            size = min(raw.size, content.size - 1)
            raw[:size] = content[1 : 1 + size]
            return content.size - 1
        # The size that the frame claims is not trusted: what is read ends one byte behind what may be there.
        reader, found = _library().ZstdDecompressor().stream_reader(content[1:]), 0
        while found < raw.size and (more := reader.readinto(raw[found:])):
            found += more
        return found + len(reader.read(1))


def _library() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise CompressorError(
            "the library that zstd needs is not installed", found=str(error), hint="pip install zstandard"
        ) from error
