"""The work of the quantizers on a CPU, by compiled loops; the numbers are those of `torch_kernels`.

Everything is done in blocks that stay in cache: what is allocated beside the result is below a twentieth of
the tensor, and a megabyte. The loops are single-threaded. If numba does not work here, a warning says so and
`torch_kernels` does the work.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxsplit.compressors import torch_kernels
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.packing import pack, packed_bytes, unpack
from fxsplit.compressors.ranges import RangeRule, Ranges, found_ranges
from fxsplit.compressors.scheme import Scheme
from fxsplit.compressors.scheme import seeds as seeds
from fxsplit.spec import TensorSpec

Array = npt.NDArray[Any]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

BLOCK = 1 << 17
"""Elements whose codes, or whose values in float32, stand in memory beside the result: a multiple of 8."""

SHORT_RUN = 8
"""Runs shorter than this are gone over by columns."""

COMPUTED_RUN = 128
"""In runs as long, computing the values of one range is faster than looking them up."""

SORTED_UP_TO = 1 << 14
"""Groups up to this size are sorted; of greater ones the ranks are selected."""

MAX_SELECTED_RANKS = 128
"""Up to so many ranks are selected; for more, a group is sorted."""

SELECTED_IN_PLACE = 64
"""Groups with shorter runs are gathered before ranks are selected."""

_INTEGERS: dict[int, tuple[torch.dtype, Any, Any]] = {
    2: (torch.int16, np.int16, np.uint16),
    4: (torch.int32, np.int32, np.uint32),
    8: (torch.int64, np.int64, np.uint64),
}
"""By the bytes of a float: the integers of that size."""

_UNITS: dict[int, Any] = {2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}
"""By the bytes of one or two floats: what copies them at once, bit for bit."""

_LEVELS: dict[int, tuple[list[int], int]] = {2: ([0], 1), 4: ([18, 9, 0], 9)}
"""By the bytes of a float: the shifts of the levels of a selection, and the bits of all but the first."""

_failed = False


def available() -> bool:
    """Whether numba is installed and has not failed in this process."""
    return not _failed and importlib.util.find_spec("numba") is not None


def _or_torch(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Does the work by the function of the same name in `torch_kernels` once numba has failed."""
    fallback: Callable[Parameters, Result] = getattr(torch_kernels, function.__name__)

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        global _failed
        if not _failed:
            try:
                return function(*args, **kwargs)
            except _errors() as error:
                _failed = True
                warnings.warn(f"numba does not work here, so that compressors are slow: {error}", stacklevel=2)
        return fallback(*args, **kwargs)

    return run


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    """What is raised when numba cannot be imported, cannot compile, or cannot write what it compiled."""
    try:
        from numba.core.errors import NumbaError
    except ImportError:
        return ImportError, OSError
    return ImportError, OSError, NumbaError


@_or_torch
def extremes(values: Tensor, layout: Layout) -> Tensor:
    """As `torch_kernels.extremes`."""
    from fxsplit.compressors import numba_quantization as loops

    signed, kind, _ = _INTEGERS[values.element_size()]
    bits, limits = values.view(signed).numpy(), np.iinfo(kind)
    columns = layout.inner if _by_columns(layout) else 1
    keys = np.empty((2, layout.groups * columns), kind)
    keys[0], keys[1] = limits.max, limits.min
    if _by_columns(layout):
        loops.column_extremes(bits.reshape(layout.outer, -1), kind(limits.max), keys)
    else:
        loops.extremes(bits.reshape(layout.outer, layout.groups, layout.inner), kind(limits.max), keys)
    keys = keys.reshape(2, layout.groups, columns)
    found = np.stack((keys[0].min(1), keys[1].max(1)))
    return torch.from_numpy(np.where(found < 0, found ^ kind(limits.max), found)).view(values.dtype).double()


@_or_torch
def order_statistics(values: Tensor, layout: Layout, ranks: Sequence[int]) -> Tensor:
    """As `torch_kernels.order_statistics`; large groups are not sorted, unless of float64."""
    size = layout.group_size
    selected = SORTED_UP_TO < size < 1 << 32 and len(ranks) <= MAX_SELECTED_RANKS
    if not selected or values.element_size() not in _LEVELS:
        return torch_kernels.order_statistics(values, layout, ranks)
    if layout.inner >= SELECTED_IN_PLACE:
        return _select(values.view(layout.outer, layout.groups, layout.inner), ranks)
    rows, at_once = layout.rows(values), max(1, layout.groups // 32)
    parts = [rows[first : first + at_once] for first in range(0, layout.groups, at_once)]
    return torch.cat([_select(part.reshape(1, -1, size), ranks) for part in parts])


def _select(values: Tensor, ranks: Sequence[int]) -> Tensor:
    """The values of the given ranks in each group of values [outer, groups, inner]: float64 [groups, ranks]."""
    from fxsplit.compressors import numba_selection

    outer, groups, inner = values.shape
    integer, signed, kind = _INTEGERS[values.element_size()]
    shifts, width = _LEVELS[values.element_size()]
    cells, others = 1 << 8 * values.element_size() - shifts[0], (len(ranks) + 1) << width
    found = np.empty(groups * len(ranks), kind)
    numba_selection.order_statistics(
        values.view(integer).numpy().view(kind),
        np.array(ranks, np.int64),
        np.array(shifts, kind),
        width,
        first=np.empty(2 * cells, np.uint32),
        counts=np.empty(others, np.uint32),
        tables=np.empty(cells + others, np.uint16),
        state=np.empty(5 * len(ranks), np.int64),
        zeros=np.empty(2, np.int64),
        kept=np.empty(1024 + outer * inner // 24, kind),
        found=found,
    )
    statistics = torch.from_numpy(found.view(signed)).view(values.dtype).view(groups, len(ranks))
    return statistics.double()


def ranges(values: Tensor, layout: Layout, rule: RangeRule, levels: int, dtype: torch.dtype) -> Ranges:
    """The ranges that a rule asks for; see `found_ranges`."""
    return found_ranges(values, layout, rule, levels, dtype, extremes, order_statistics)


@_or_torch
def encode(values: Tensor, minima: Tensor, inverse: Tensor, seeds: Tensor | None, scheme: Scheme) -> Tensor:
    """As `torch_kernels.encode`."""
    from fxsplit.compressors import numba_quantization as loops

    count, bits = values.numel(), scheme.bits
    packed = torch.empty(packed_bytes(count, bits), dtype=torch.uint8)
    out = packed.numpy().view(np.uint16) if bits == 16 else packed.numpy()
    quantize, nibbles = _quantizer(values, minima, inverse, seeds, scheme)
    direct, converted = bits in (8, 16) or nibbles, values.element_size() == 2
    size = count if direct and not converted else min(BLOCK, count)
    wide = torch.empty(size if converted else 0, dtype=torch.float32)
    codes = np.empty(0 if direct else size, np.uint8 if bits <= 8 else np.uint16)
    for start in range(0, count, size):
        part = values[start : start + size]
        length, stop = part.numel(), start + part.numel()
        numbers = (wide[:length].copy_(part) if converted else part).numpy()
        if nibbles:
            quantize(numbers, start, out[start // 2 : stop // 2])
        elif direct:
            quantize(numbers, start, out[start:stop])
        else:
            quantize(numbers, start, codes[:length])
            even = length // 8 * 8
            first, second = start * bits // 8, (start + even) * bits // 8
            loops.pack(codes[:even], bits, out[first:second])
            if even < length:
                packed[second:] = pack(torch.from_numpy(codes[even:length].astype(np.int32)), bits)
    return packed


def _quantizer(
    values: Tensor, minima: Tensor, inverse: Tensor, seeds: Tensor | None, scheme: Scheme
) -> tuple[Callable[[Array, int, Array], None], bool]:
    """The loop that fits: called with values, the first one's place, and codes; and whether it packs 4 bits."""
    from fxsplit.compressors import numba_quantization as loops

    layout, buckets, width = scheme.layout, scheme.buckets, scheme.levels + 1
    columns, inner = _by_columns(layout), layout.inner
    low, scale = _transposed(minima, layout), _transposed(inverse, layout)
    bounds = low.astype(np.float64 if values.dtype == torch.float64 else np.float32)
    if columns or seeds is not None or buckets not in (1, 2, 4):
        chosen = np.empty(0, np.uint64) if seeds is None else _transposed(seeds[:, None], layout)[0]
        seed, length = chosen.astype(np.uint64), 0 if columns else inner
        index, scratch = np.empty(loops.PART, np.uint16), np.empty(loops.PART)
        return lambda x, start, codes: loops.quantize_any(
            x, start, length, bounds, low, scale, width, seed, index, scratch, codes
        ), False
    if buckets == 1 and scheme.bits == 4 and inner % 2 == 0:
        return lambda x, start, codes: loops.quantize_nibbles(x, start, inner, low, scale, codes), True
    if buckets == 1:
        return lambda x, start, codes: loops.quantize_one(x, start, inner, low, scale, codes), False
    loop = loops.quantize_two if buckets == 2 else loops.quantize_four
    return lambda x, start, codes: loop(x, start, inner, bounds, low, scale, width, codes), False


@_or_torch
def decode(packed: Tensor, table: Tensor, scheme: Scheme, spec: TensorSpec) -> Tensor:
    """As `torch_kernels.decode`."""
    count, layout = spec.numel, scheme.layout
    decoded = torch.empty(count, dtype=spec.dtype)
    # A table of all the values, or of all pairs of them, if it is small beside the tensor and in cache.
    tabled = layout.groups << scheme.bits <= max(1 << scheme.bits, count // 20) and not _by_columns(layout)
    paired = layout.inner % 2 == 0 and layout.groups << 9 <= max(1 << 9, count // 20)
    computed = scheme.buckets == 1 and layout.inner >= COMPUTED_RUN and decoded.element_size() > 2
    if tabled and paired and scheme.bits == 4:
        values = torch_kernels.decoded_values(table, scheme, spec.dtype)
        codes = torch.arange(256)
        pairs = torch.stack((values[:, codes & 15], values[:, codes >> 4]), dim=2)
        _look_up(packed, 8, layout.inner // 2, pairs, decoded)
    elif tabled and not computed:
        values = torch_kernels.decoded_values(table, scheme, spec.dtype)
        _look_up(packed, scheme.bits, layout.inner, values[..., None], decoded)
    else:
        _compute_values(packed, table, decoded, scheme)
    return decoded.view(spec.shape)


def _look_up(packed: Tensor, bits: int, inner: int, values: Tensor, decoded: Tensor) -> None:
    """Fills `decoded` from values [groups, 2**bits, values to a code]."""
    from fxsplit.compressors import numba_quantization as loops

    integer, _, _ = _INTEGERS[values.element_size()]
    kind = _UNITS[values.element_size() * values.shape[2]]
    rows = values.contiguous().view(integer).numpy().view(kind)[..., 0]
    out = decoded.view(integer).numpy().view(kind)
    for start, codes in _read(packed, bits, out.size):
        loops.lookup(codes, start, inner, rows, out[start : start + codes.size])


def _compute_values(packed: Tensor, table: Tensor, decoded: Tensor, scheme: Scheme) -> None:
    """Fills `decoded` by arithmetic alone."""
    from fxsplit.compressors import numba_quantization as loops

    layout = scheme.layout
    minima, steps = (_transposed(half.double(), layout) for half in table)
    limit, inner = torch.finfo(decoded.dtype).max, 0 if _by_columns(layout) else layout.inner
    converted = decoded.element_size() == 2
    wide = torch.empty(min(BLOCK, decoded.numel()) if converted else 0, dtype=torch.float32)
    for start, codes in _read(packed, scheme.bits, decoded.numel(), BLOCK):
        part = decoded[start : start + codes.size]
        into = wide[: codes.size] if converted else part
        if scheme.buckets == 1 and inner > 0:
            loops.reconstruct_one(codes, start, inner, minima, steps, limit, into.numpy())
        else:
            loops.reconstruct(codes, start, inner, minima, steps, scheme.offset_bits, limit, into.numpy())
        if converted:
            part.copy_(into)


def _read(packed: Tensor, bits: int, count: int, size: int | None = None) -> Iterator[tuple[int, Array]]:
    """The codes, block by block, each with the place of its first; a block is valid until the next.

    Args:
        packed: as `packing.pack` makes it.
        bits: bits a code.
        count: number of codes.
        size: codes of a block; None: as many as is best.
    """
    from fxsplit.compressors import numba_quantization as loops

    octets = packed.contiguous().numpy()
    if bits in (8, 16):
        if bits == 16:
            octets = (octets.copy() if octets.ctypes.data % 2 else octets).view(np.uint16)
        for start in range(0, count, size or count):
            yield start, octets[start : start + (size or count)]
        return
    codes = np.empty(min(BLOCK, count), np.uint8 if bits < 8 else np.uint16)
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        even = length // 8 * 8
        first, second = start * bits // 8, (start + even) * bits // 8
        loops.unpack(octets[first:second], bits, codes[:even])
        if even < length:
            tail = torch.from_numpy(octets[second:].copy())
            codes[even:length] = unpack(tail, bits, length - even).numpy()
        yield start, codes[:length]


def _by_columns(layout: Layout) -> bool:
    return layout.inner < SHORT_RUN and layout.groups > 1


def _transposed(ranges: Tensor, layout: Layout) -> Array:
    """Of `[groups, buckets]`, the table that the loops take: `[buckets, groups]`, or by columns."""
    columns = ranges.repeat_interleave(layout.inner, 0) if _by_columns(layout) else ranges
    found: Array = columns.t().contiguous().numpy()
    return found
