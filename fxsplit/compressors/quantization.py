"""What the range quantizers share: options, tables, codes, the wire format and its refusals.

A range quantizer lays 2**S ranges, the buckets, over the values of each group of elements and 2**Q equally
spaced values over each bucket, S + Q = bits. The code of an element is

    bucket << Q | round((x - minimum[bucket]) / step[bucket])        step = (maximum - minimum) / (2**Q - 1)

so that a receiver needs no more than a table of 2**bits values a group, which the minima and steps give. The
code is a monotone function of the value: which elements share a bucket follows from the minima alone, and no
element's position has to be kept. An element equal to a bound decodes to itself from either side.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors import torch_kernels
from fxsplit.compressors.base import Compressor
from fxsplit.compressors.floating import DTYPES as DTYPES
from fxsplit.compressors.floating import check_floating, not_finite, plain, wide_dtype
from fxsplit.compressors.grouping import Layout, check_group, check_rounding, group_of
from fxsplit.compressors.kernels import Kernels, kernels_for
from fxsplit.compressors.packing import packed_bytes
from fxsplit.compressors.ranges import RangeRule
from fxsplit.compressors.scheme import Scheme
from fxsplit.errors import CompressorError
from fxsplit.spec import TensorSpec


@dataclass(frozen=True)
class Quantization(Compressor):
    """Base of the range quantizers. A subclass says how many buckets there are and what their ranges are.

    Args:
        bits: bits an element, 2 to 16.
        group: which elements share ranges: "tensor", all of them, as in the documents; "sample", those of one
            index of dimension 0; "channel", those of one index of dimension 1, or of the last dimension if there
            are three ([batch, tokens, channels]); "auto", as "channel", but as "tensor" where the tables of the
            channels would be more than an eighth of the codes (`grouping.group_of`); or an integer from 8, blocks
            of so many elements one after the other, which must divide the size of the tensor. A tensor that
            lacks the dimension is one group.
        rounding: "nearest", ties to even; or "stochastic", up or down at random, so that the mean of what is
            received is the value sent. The random numbers depend on the element's place and the ranges of its
            group alone (`scheme.dither`); the ends of a range stay as they are.

    Wire, for a tensor of n elements: the codes, uint8 `[ceil(n * bits / 8)]`, in logical order, packed; and
    the table of minima and steps, `[2, 2**S]` for group "tensor" and `[2, groups, 2**S]` for others, float64
    for a float64 tensor and float32 for all others.

    Codes are computed in float64 from minima and maxima in float64 (see `scheme.Scheme`), in blocks that stay
    in cache; the receiver uses the table as it is sent. So an element is off by at most step / 2 of its
    bucket (a step, if rounding is stochastic), and the rounding of the step (up to (2**Q - 1) * step *
    2**-24, at the top of the bucket) and of the output's dtype.
    """

    DEFAULT_GROUP: ClassVar[str | int] = "tensor"

    bits: int = 8
    group: str | int = field(default=DEFAULT_GROUP, kw_only=True)
    rounding: str = field(default="nearest", kw_only=True)

    def __post_init__(self) -> None:
        """Checks the options, so that construction in Python is refused like a spelling."""
        self.check_integer("bits", 2, 16)
        check_group(self.group, f"{self.name}: group")
        check_rounding(self.rounding, f"{self.name}: rounding")

    @property
    @abstractmethod
    def split_bits(self) -> int:
        """S: how many of the bits choose the bucket."""

    @abstractmethod
    def rule(self, layout: Layout) -> RangeRule:
        """Which ranges the 2**S buckets of each group have."""

    def wire(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The specs of codes and table.

        Raises:
            CompressorError: the dtype is not a floating point type of 16, 32 or 64 bits, or the tensor cannot
                be divided into blocks of `group` elements.
        """
        form = _form(self, spec)
        return form.codes, form.table

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes and table of `x`, of any shape and strides; see the class for their form.

        On an accelerator this waits for the device once, to know that the values are finite.

        Raises:
            CompressorError: `x` is not floating point, holds NaN or infinity, cannot be divided into blocks of
                `group` elements, or spans more than its table.
        """
        form, values = _form(self, TensorSpec.of(x)), plain(x).view(-1)
        if values.numel() == 0:
            codes = values.new_empty(form.codes.shape, dtype=torch.uint8)
            return codes, values.new_zeros(form.table.shape, dtype=form.table.dtype)
        kernels = kernels_for(values.device, values.numel())
        coded = self._coded(values, form, kernels)
        if coded is None:
            if not bool(values.isfinite().all()):
                raise not_finite(self, values)
            # Or these kernels gave up, which they say by NaN.
            coded = self._coded(values, form, torch_kernels)
        if coded is None:
            raise CompressorError(
                f"the values span more than a step of {self} can hold",
                found=f"{values.min().item():g} to {values.max().item():g}",
                allowed=f"a step below {torch.finfo(form.table.dtype).max:g}",
                hint="use more bits, or send this edge with the compressor 'none'",
            )
        codes, table = coded
        return codes, table.view(form.table.shape)

    def _coded(self, values: Tensor, form: _Form, kernels: Kernels) -> tuple[Tensor, Tensor] | None:
        """Codes and table; None if the table is not finite.

        An accelerator is under way with the codes while the host waits to hear whether it is.
        """
        scheme = form.scheme
        ranges = kernels.ranges(values, scheme.layout, form.rule, scheme.levels, form.table.dtype)
        if values.device.type == "cpu" and not ranges.are_finite():
            return None
        seeds = kernels.seeds(ranges.table) if scheme.stochastic else None
        codes = kernels.encode(values, ranges.minima, ranges.inverse, seeds, scheme)
        if values.device.type != "cpu" and not ranges.are_finite():
            return None
        return codes, ranges.table

    def decode(self, payload: Sequence[Tensor], spec: TensorSpec) -> Tensor:
        """The values that the codes stand for, a new contiguous tensor of `spec`.

        Raises:
            CompressorError: the payload is not what `wire(spec)` announces.
        """
        self.check_payload(payload, spec)
        codes, table = payload
        scheme = _form(self, spec).scheme
        table = table.reshape(2, scheme.layout.groups, scheme.buckets)
        return kernels_for(codes.device, spec.numel).decode(codes, table, scheme, spec)

    def group_for(self, spec: TensorSpec) -> str | int:
        """The groups of a tensor of this spec: `group`, with "auto" decided."""
        table_bytes = 2 * wide_dtype(spec.dtype).itemsize << self.split_bits
        return group_of(self.group, spec, self.bits, table_bytes)


@dataclass(frozen=True)
class _Form:
    """What follows from the spec of a tensor; see `Quantization`."""

    codes: TensorSpec
    table: TensorSpec
    scheme: Scheme
    rule: RangeRule


@functools.lru_cache(maxsize=4096)
def _form(codec: Quantization, spec: TensorSpec) -> _Form:
    """That of a tensor, kept, since finding it takes longer than launching a kernel."""
    check_floating(codec, spec)
    group = codec.group_for(spec)
    layout = Layout.of(spec, group)
    groups = () if group == "tensor" else (layout.groups,)
    return _Form(
        TensorSpec((packed_bytes(spec.numel, codec.bits),), torch.uint8),
        TensorSpec((2, *groups, 1 << codec.split_bits), wide_dtype(spec.dtype)),
        Scheme(layout, codec.bits, codec.split_bits, stochastic=codec.rounding == "stochastic"),
        codec.rule(layout),
    )
