"""The work of the quantizers in plain torch: the reference, and what runs where nothing faster is at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fxsplit.compressors.floating import wide_dtype
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.packing import pack, packed_bytes, unpack
from fxsplit.compressors.ranges import RangeRule, Ranges, found_ranges
from fxsplit.compressors.scheme import Scheme, dither
from fxsplit.compressors.scheme import seeds as seeds
from fxsplit.spec import TensorSpec

MAX_COMPARED_BUCKETS = 65
"""Up to so many buckets, comparing with each minimum in turn is faster than a binary search an element."""


def extremes(values: Tensor, layout: Layout) -> Tensor:
    """The least and the greatest value of each group: float64 `[2, groups]`.

    If a group holds NaN or infinity, so do its extremes.
    """
    if layout.groups == 1:
        found = torch.stack(torch.aminmax(values)).view(2, 1)
    else:
        spread = values.view(layout.outer, layout.groups, layout.inner)
        found = torch.stack((spread.amin((0, 2)), spread.amax((0, 2))))
    return found.double()


def order_statistics(values: Tensor, layout: Layout, ranks: Sequence[int]) -> Tensor:
    """The values of the given ranks, ascending from 0, in each group: float64 `[groups, ranks]`.

    NaN is the greatest or the least.
    """
    chosen = torch.tensor(ranks, device=values.device)
    rows = layout.rows(values)
    at_once = max(1, block_size(values.device) // max(1, layout.group_size))
    found = values.new_empty(layout.groups, len(ranks), dtype=torch.float64)
    for first in range(0, layout.groups, at_once):
        some = rows[first : first + at_once]
        found[first : first + at_once] = sorted_rows(some.reshape(some.shape[0], -1))[:, chosen]
    return found


def ranges(values: Tensor, layout: Layout, rule: RangeRule, levels: int, dtype: torch.dtype) -> Ranges:
    """The ranges that a rule asks for; see `found_ranges`."""
    return found_ranges(values, layout, rule, levels, dtype, extremes, order_statistics)


def encode(values: Tensor, minima: Tensor, inverse: Tensor, seeds: Tensor | None, scheme: Scheme) -> Tensor:
    """The packed codes of all values, uint8.

    Args:
        values: flat, not empty.
        minima: float64 `[groups, buckets]`, ascending in a group; no value is below the first of its group.
        inverse: float64 `[groups, buckets]`.
        seeds: int64 `[groups]`, if the scheme is stochastic.
        scheme: the layout and the numbers of bits.
    """
    count, bits, device = values.numel(), scheme.bits, values.device
    packed = values.new_empty(packed_bytes(count, bits), dtype=torch.uint8)
    size = min(block_size(device), count)
    kinds = (torch.float64, torch.int32, torch.int64, torch.float64)
    buffers = [torch.empty(size, dtype=kind, device=device) for kind in kinds]
    search = BucketSearch(minima, wide_dtype(values.dtype), size) if scheme.buckets > 1 else None
    for start, length in blocks(count, size):
        block = values[start : start + length]
        scaled, codes, rows, gathered = (buffer[:length] for buffer in buffers)
        group = element_groups(start, length, scheme.layout, device)
        bucket = None if search is None else search(block, group)
        scaled.copy_(block)
        if group is None and bucket is None:
            scaled.sub_(minima.view(())).mul_(inverse.view(()))
        else:
            _rows(group, bucket, scheme.buckets, rows)
            scaled.sub_(torch.index_select(minima.view(-1), 0, rows, out=gathered))
            scaled.mul_(torch.index_select(inverse.view(-1), 0, rows, out=gathered))
        if seeds is None:
            scaled.round_()
        else:
            scaled.add_(dither_of(start, length, seeds, group)).floor_()
        codes.copy_(scaled.clamp_(0, scheme.levels))
        if bucket is not None:
            codes.add_(bucket, alpha=scheme.levels + 1)
        first = start * bits // 8
        packed[first : first + packed_bytes(length, bits)] = pack(codes, bits)
    return packed


def decode(packed: Tensor, table: Tensor, scheme: Scheme, spec: TensorSpec) -> Tensor:
    """The tensor that codes and table `[2, groups, buckets]` stand for: minimum + step * code, held to its dtype.

    Computed in float64, every operation rounded on its own, and then rounded to the dtype: to float32 first
    if that is one of 16 bits.
    """
    count, bits, layout = spec.numel, scheme.bits, scheme.layout
    limits = torch.finfo(spec.dtype)
    decoded = torch.empty(count, dtype=spec.dtype, device=packed.device)
    values, (minima, steps) = None, table.double().view(2, -1)
    if layout.groups << bits <= max(1 << 16, count // 16):
        values = decoded_values(table, scheme, spec.dtype).view(-1)
    for start, length in blocks(count, min(block_size(packed.device), count)):
        first = start * bits // 8
        codes = unpack(packed[first : first + packed_bytes(length, bits)], bits, length).long()
        block, group = decoded[start : start + length], element_groups(start, length, layout, packed.device)
        if values is not None:
            codes = codes if group is None else codes.add_(group, alpha=1 << bits)
            torch.index_select(values, 0, codes, out=block)
        else:
            rows = (codes >> scheme.offset_bits) + (0 if group is None else group * scheme.buckets)
            found = minima[rows] + steps[rows] * (codes & scheme.levels)
            block.copy_(_narrow(found.clamp_(limits.min, limits.max), spec.dtype))
    return decoded.view(spec.shape)


def decoded_values(table: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """What each code of each group decodes to: `[groups, 2**bits]`."""
    minima, steps = table.double()
    offsets = torch.arange(scheme.levels + 1, dtype=torch.float64, device=table.device)
    values = (minima[..., None] + steps[..., None] * offsets).view(scheme.layout.groups, 1 << scheme.bits)
    # The step is rounded, so the last value of a range that ends at the greatest number could overflow.
    limits = torch.finfo(dtype)
    return _narrow(values.clamp_(limits.min, limits.max), dtype)


def _narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values in a dtype, by way of float32 if it has 16 bits, as all processors can do it."""
    return values.to(wide_dtype(dtype)).to(dtype)


def block_size(device: torch.device) -> int:
    """Elements done at a time, a multiple of 8 so that a block's codes begin on a byte.

    On a CPU: the least that torch spreads over all its threads (32,768 for each), whose temporaries about
    fill a core's second-level cache. Elsewhere: so many that the time to launch the operations does not
    count. The temporaries together take 40 bytes an element.
    """
    return 32768 * torch.get_num_threads() if device.type == "cpu" else 1 << 24


def blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of each block; only the last may be shorter."""
    return ((start, min(size, count - start)) for start in range(0, count, size or 1))


def element_groups(start: int, length: int, layout: Layout, device: torch.device) -> Tensor | None:
    """The groups of consecutive elements: int64 `[length]`; None if there is one group."""
    if layout.groups == 1:
        return None
    elements = torch.arange(start, start + length, device=device)
    return elements.div_(layout.inner, rounding_mode="floor").remainder_(layout.groups)


def dither_of(start: int, length: int, seeds: Tensor, group: Tensor | None) -> Tensor:
    """What consecutive elements are rounded with, float64 `[length]`; `group` as `element_groups` says."""
    elements = torch.arange(start, start + length, device=seeds.device)
    return dither(elements, seeds if group is None else seeds[group])


def _rows(group: Tensor | None, bucket: Tensor | None, buckets: int, rows: Tensor) -> None:
    """Fills `rows` int64 [n] with the places of the elements' ranges in `[groups * buckets]`."""
    if group is None:
        rows.zero_()
    else:
        torch.mul(group, buckets, out=rows)
    if bucket is not None:
        rows.add_(bucket)


def sorted_rows(rows: Tensor) -> Tensor:
    """The values of each row [groups, n] in ascending order, NaN last; 16-bit floats may come back as float32.

    On a CPU by numpy, which sorts by vector instructions. `torch.sort` carries every value's position along
    and takes some twenty times as long. Selecting the ranks alone, by `numpy.partition`, is no better: a list
    of ranks takes longer than the sort, and so does a single one where many values are equal, as behind a
    ReLU.
    """
    if rows.device.type != "cpu":
        return rows.sort().values
    half = rows.dtype in (torch.float16, torch.bfloat16)  # numpy has no bfloat16, and no fast float16
    return torch.from_numpy(np.sort((rows.float() if half else rows).numpy()))


class BucketSearch:
    """Finds the buckets of a block of values, in buffers that are kept from block to block.

    The bucket is the number of minima of the value's group, the first left out, that are not above the value.
    Comparing in the dtype of the values is exact, since a minimum is one of them, and moves half the memory
    that float64 would.
    """

    def __init__(self, minima: Tensor, dtype: torch.dtype, size: int) -> None:
        self._minima = minima.to(dtype).contiguous()
        self._bucket = torch.empty(size, dtype=torch.int32, device=minima.device)
        self._sum, self._above = torch.empty(2, size, dtype=dtype, device=minima.device)

    def __call__(self, block: Tensor, group: Tensor | None) -> Tensor:
        """Buckets of `block`: int32 of its length, valid until the next call."""
        count = block.numel()
        block, bucket = block.to(self._minima.dtype), self._bucket[:count]
        if group is not None:
            return self._search(block, group)
        bounds = self._minima[0, 1:].contiguous()
        if bounds.numel() >= MAX_COMPARED_BUCKETS:
            return torch.bucketize(block, bounds, out_int32=True, right=True, out=bucket)
        total, above = self._sum[:count], self._above[:count]
        torch.ge(block, bounds[0], out=total)
        for bound in bounds[1:]:
            total.add_(torch.ge(block, bound, out=above))
        return bucket.copy_(total)

    def _search(self, block: Tensor, group: Tensor) -> Tensor:
        """By halving: every element in the row of its own group."""
        buckets, flat = self._minima.shape[1], self._minima.view(-1)
        first = group * buckets
        low, half = first.clone(), buckets // 2
        while half:
            low.add_(block >= flat[low + half], alpha=half)
            half //= 2
        return low.sub_(first).to(torch.int32)
