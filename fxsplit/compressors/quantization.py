"""What the range quantizers share: tables, codes, the wire format and its refusals.

A range quantizer lays 2**S ranges, the buckets, over the values of a tensor and 2**Q equally spaced values
over each bucket, S + Q = bits. The code of an element is

    bucket << Q | round((x - minimum[bucket]) / step[bucket])        step = (maximum - minimum) / (2**Q - 1)

so that a receiver needs no more than a table of 2**bits values, which the minima and steps give. The code is
a monotone function of the value: which elements share a bucket follows from the minima alone, and no
element's position has to be kept. An element equal to a bound decodes to itself from either side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsplit.compressors.base import Compressor
from fxsplit.compressors.packing import pack, packed_bytes, unpack
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that a quantizer takes."""

MAX_COMPARED_BUCKETS = 65
"""Up to so many buckets, comparing with each minimum in turn is faster than a binary search an element."""


@dataclass(frozen=True)
class Quantization(Compressor):
    """Base of the range quantizers. A subclass says how many buckets there are and what their ranges are.

    Wire, for a tensor of n elements: the codes, uint8 `[ceil(n * bits / 8)]`, in logical order, packed; and
    the table `[2, 2**S]` of minima and steps, float64 for a float64 tensor and float32 for all others.

    Codes are computed in float64 from minima and steps in float64, in blocks that stay in cache; the receiver
    uses the table as it is sent. So an element is off by at most step / 2 of its bucket, and the rounding of
    the step (up to (2**Q - 1) * step * 2**-24, at the top of the bucket) and of the output's dtype.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        """Checks the options, so that construction in Python is refused like a spelling."""
        self.check_integer("bits", 2, 16)

    @property
    @abstractmethod
    def split_bits(self) -> int:
        """S: how many of the bits choose the bucket."""

    @abstractmethod
    def ranges(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Minima and maxima of the buckets for `values` (flat, not empty): float64 `[2**S]` each, ascending.

        The first minimum is the least value and the greatest value lies in the last range, NaN and infinity
        included: `encode` recognises them by these.
        """

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The specs of codes and table.

        Raises:
            CompressorError: the dtype is not a floating point type of 16, 32 or 64 bits.
        """
        if spec.dtype not in DTYPES:
            raise CompressorError(
                f"{self} quantizes floating point tensors only",
                found=spec,
                allowed=", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES),
                hint="send this edge with the compressor 'none'",
            )
        codes = TensorSpec((packed_bytes(spec.numel, self.bits),), torch.uint8)
        return codes, TensorSpec((2, 1 << self.split_bits), _table_dtype(spec.dtype))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes and table of `x`, of any shape and strides; see the class for their form.

        On an accelerator this waits for the device once, to know that the values are finite.

        Raises:
            CompressorError: `x` is not floating point, holds NaN or infinity, or spans more than its table.
        """
        codes_spec, table_spec = self.wire(TensorSpec.of(x))
        values = x.detach().resolve_neg().contiguous().view(-1)
        codes = values.new_empty(codes_spec.shape, dtype=torch.uint8)
        if values.numel() == 0:
            return codes, values.new_zeros(table_spec.shape, dtype=table_spec.dtype)
        # Adding zero turns -0.0 into 0.0: of these equals a sort may put either first.
        minima, maxima = (bounds + 0.0 for bounds in self.ranges(values))
        # Divided by a tensor: CUDA multiplies by the reciprocal of a number, which rounds differently.
        steps = (maxima - minima) / torch.full_like(minima, self._levels)
        table = torch.stack((minima, steps)).to(table_spec.dtype)
        if not bool(table.isfinite().all()):
            raise self._not_finite(values)
        _encode_blocks(values, minima, steps, self.bits, codes)
        return codes, table

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """The values that the codes stand for, a new contiguous tensor of `spec`.

        Raises:
            CompressorError: the payload is not what `wire(spec)` announces.
        """
        self.check_payload(payload, spec)
        codes, table = payload
        minima, steps = table.double()
        offsets = torch.arange(self._levels + 1, dtype=torch.float64, device=table.device)
        values = (minima[:, None] + steps[:, None] * offsets).view(-1)  # [2**bits]
        # The step is rounded, so the last value of a range that ends at the greatest number could overflow.
        limits = torch.finfo(spec.dtype)
        return _decode_blocks(codes, values.clamp(limits.min, limits.max).to(spec.dtype), self.bits, spec)

    @property
    def _levels(self) -> int:
        return (1 << (self.bits - self.split_bits)) - 1

    def _not_finite(self, values: Tensor) -> CompressorError:
        nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
        if nans or infinities:
            return CompressorError(
                f"{self} quantizes finite values only",
                found=f"{nans} NaN and {infinities} infinite of {values.numel()} elements",
                allowed="finite values",
                hint="find what made them (torch.autograd.set_detect_anomaly), lower the learning rate or "
                "the loss scale, or send this edge with the compressor 'none', which keeps them",
            )
        return CompressorError(
            f"the values span more than a step of {self} can hold",
            found=f"{values.min().item():g} to {values.max().item():g}",
            allowed=f"a step below {torch.finfo(_table_dtype(values.dtype)).max:g}",
            hint="use more bits, or send this edge with the compressor 'none'",
        )


def _table_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _block_size(device: torch.device) -> int:
    """Elements done at a time, a multiple of 8 so that a block's codes begin on a byte.

    On a CPU: the least that torch spreads over all its threads (32,768 for each), whose temporaries about
    fill a core's second-level cache. Elsewhere: so many that the time to launch the operations does not
    count. The temporaries together take 40 bytes an element.
    """
    return 32768 * torch.get_num_threads() if device.type == "cpu" else 1 << 24


def _encode_blocks(values: Tensor, minima: Tensor, steps: Tensor, bits: int, packed: Tensor) -> None:
    """Fills `packed` uint8 [ceil(n * bits / 8)] with the codes of `values` [n]."""
    count, buckets, device = values.numel(), minima.numel(), values.device
    levels = (1 << bits) // buckets - 1
    # Where the step is zero the whole bucket equals its minimum, and any divisor gives code 0.
    divisors = torch.where(steps > 0, steps, torch.ones_like(steps))
    size = min(_block_size(device), count)
    scaled = torch.empty(size, dtype=torch.float64, device=device)
    codes = torch.empty(size, dtype=torch.int32, device=device)
    search = _BucketSearch(minima, _table_dtype(values.dtype), size) if buckets > 1 else None
    index, gathered = torch.empty_like(codes, dtype=torch.int64), torch.empty_like(scaled)
    for start in range(0, count, size):
        block = values[start : start + size]
        if block.numel() < size:  # the last one
            scaled, codes, index, gathered = (b[: block.numel()] for b in (scaled, codes, index, gathered))
        scaled.copy_(block)
        if search is None:
            codes.copy_(scaled.sub_(minima).div_(divisors).round_().clamp_(0, levels))
        else:
            bucket = search(block)
            index.copy_(bucket)
            scaled.sub_(torch.index_select(minima, 0, index, out=gathered))
            scaled.div_(torch.index_select(divisors, 0, index, out=gathered))
            codes.copy_(scaled.round_().clamp_(0, levels)).add_(bucket, alpha=levels + 1)
        first = start * bits // 8
        packed[first : first + packed_bytes(block.numel(), bits)] = pack(codes, bits)


def _decode_blocks(packed: Tensor, values: Tensor, bits: int, spec: TensorSpec) -> Tensor:
    """Looks every code up in `values` [2**bits]."""
    decoded = values.new_empty(spec.numel)
    size = min(_block_size(packed.device), spec.numel)
    index = torch.empty(size, dtype=torch.int64, device=packed.device)
    for start in range(0, spec.numel, size or 1):
        block = decoded[start : start + size]
        first = start * bits // 8
        codes = packed[first : first + packed_bytes(block.numel(), bits)]
        index[: block.numel()] = unpack(codes, bits, block.numel())
        torch.index_select(values, 0, index[: block.numel()], out=block)
    return decoded.view(spec.shape)


class _BucketSearch:
    """Finds the buckets of a block of values, in buffers that are kept from block to block.

    The bucket is the number of minima, the first left out, that are not above the value. Comparing in the
    dtype of the values is exact, since a minimum is one of them, and moves half the memory that float64
    would.
    """

    def __init__(self, minima: Tensor, dtype: torch.dtype, size: int) -> None:
        self._bounds = minima[1:].to(dtype)
        self._bucket = torch.empty(size, dtype=torch.int32, device=minima.device)
        self._sum, self._above = torch.empty(2, size, dtype=dtype, device=minima.device)

    def __call__(self, block: Tensor) -> Tensor:
        """Buckets of `block`: int32 of its length, valid until the next call."""
        count = block.numel()
        block, bucket = block.to(self._bounds.dtype), self._bucket[:count]
        if self._bounds.numel() >= MAX_COMPARED_BUCKETS:
            return torch.bucketize(block, self._bounds, out_int32=True, right=True, out=bucket)
        total, above = self._sum[:count], self._above[:count]
        torch.ge(block, self._bounds[0], out=total)
        for bound in self._bounds[1:]:
            total.add_(torch.ge(block, bound, out=above))
        return bucket.copy_(total)
