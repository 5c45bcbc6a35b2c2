"""Extremes, order statistics and ranges of the groups of a tensor on a GPU, by Triton; see `triton_selection`."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxsplit.compressors import torch_kernels, triton_brackets, triton_ranges, triton_selection
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.ranges import RangeRule, Ranges, found_ranges
from fxsplit.compressors.triton_launch import Launcher

BLOCK = 4096
"""Elements that a program looks at together when it goes over all of them."""

PROGRAMS = 1024
"""At most so many programs go over one group, unless it is huge; a power of two."""

SAMPLE = 1 << 14
"""Elements of a sample of a group from `LARGE` elements on; of smaller ones, half as many."""

LARGE = 1 << 21

LAST = 1 << 15
"""Up to so many elements are searched by one program; a power of two."""

ROOM = 4096
"""Keys for which there is room behind each boundary."""

BIN = 512
"""About how many elements there are to be in a bin."""

MAX_ROUNDS = 5
"""So many times three boundaries are found; for more, sorting is faster."""

MIN_GROUP = 1024
"""Groups up to this size are left to torch, which does many of them at a time."""

MIN_RUN = 32
"""Shorter runs are scattered: reading them one by one wastes most of what is read."""


_extremes = Launcher(triton_ranges.extremes_kernel)
_extreme_values = Launcher(triton_ranges.extreme_values_kernel)
_sorted = Launcher(triton_ranges.sorted_kernel)
_sampled_ranges = Launcher(triton_ranges.sampled_ranges_kernel)
_bracket = Launcher(triton_brackets.bracket_kernel)
_count = Launcher(triton_brackets.count_kernel)
_locate = Launcher(triton_selection.locate_kernel)
_collect = Launcher(triton_selection.collect_kernel)
_find = Launcher(triton_selection.find_kernel)
_selected_ranges = Launcher(triton_selection.selected_ranges_kernel)


def extremes(values: Tensor, layout: Layout) -> Tensor:
    """As `torch_kernels.extremes`."""
    if not _is_taken(values, layout) or _is_scattered(layout):
        return torch_kernels.extremes(values, layout)
    parts, programs = _extreme_parts(values, layout)
    found = values.new_empty(2, layout.groups, dtype=torch.float64)
    with on_device(values.device):
        _extreme_values(
            (layout.groups, 2), (parts, found), (programs,), {"PARTS": triton.next_power_of_2(programs)}
        )
    return found


def order_statistics(values: Tensor, layout: Layout, ranks: Sequence[int]) -> Tensor:
    """As `torch_kernels.order_statistics`; NaN, rarely, where the values would have to be sorted."""
    size = layout.group_size
    plan = _Plan.of(tuple(ranks), size, values.device)
    rounds = 0 if size <= LAST else len(plan.rounds) or MAX_ROUNDS + 1
    if not _is_taken(values, layout) or rounds > MAX_ROUNDS:
        return torch_kernels.order_statistics(values, layout, ranks)
    if _is_scattered(layout):
        values, layout = layout.rows(values).reshape(-1), Layout(1, layout.groups, size)
    found = values.new_empty(layout.groups, len(ranks), dtype=torch.float64)
    with on_device(values.device):
        if size <= LAST:
            block = triton.next_power_of_2(size)
            _sorted(
                (layout.groups, len(ranks)),
                (values, plan.ranks, found),
                _sizes(layout),
                {**_indexing(layout), "BLOCK": block},
                num_warps=_warps(block),
            )
        for boundaries, wanted in plan.rounds[:rounds]:
            selection = _Selection.of(values, layout, boundaries)
            _find(
                (layout.groups, len(wanted)),
                (wanted, *selection.tensors, found),
                (selection.programs, len(ranks)),
                selection.constants,
            )
    return found


def ranges(values: Tensor, layout: Layout, rule: RangeRule, levels: int, dtype: torch.dtype) -> Ranges:
    """As `torch_kernels.ranges`, in fewer launches than by the functions above, which cost more than the work.

    The table is not finite where the values would have to be sorted.
    """
    samples = -(-layout.group_size // rule.stride)
    is_sampled = samples <= LAST or rule.buckets == 1
    is_selected = not rule.touching and rule.buckets <= 4 and samples > LAST
    if not _is_taken(values, layout) or _is_scattered(layout) or not (is_sampled or is_selected):
        return found_ranges(values, layout, rule, levels, dtype, extremes, order_statistics)
    shape = (layout.groups, rule.buckets)
    table = values.new_empty(2, *shape, dtype=torch.float32)
    minima, inverse = values.new_empty(2, *shape, dtype=torch.float64)
    finite = _Flag.take(values.device)
    with on_device(values.device):
        if is_selected:
            selection = _Selection.of(values, layout, _Plan.between(rule, layout.group_size, values.device))
            _selected_ranges(
                shape,
                (*selection.tensors, table, minima, inverse, finite.memory),
                (selection.programs,),
                {**selection.constants, "LEVELS": levels},
                enable_fp_fusion=False,
            )
        else:
            parts, programs = _extreme_parts(values, layout) if rule.touching else (table, 1)
            block = triton.next_power_of_2(samples) if rule.buckets > 1 else 1
            _sampled_ranges(
                shape,
                (values, parts, table, minima, inverse, finite.memory),
                (*_sizes(layout), rule.stride, programs),
                {
                    "TOUCHING": rule.touching,
                    "BUCKETS": rule.buckets,
                    "PARTS": triton.next_power_of_2(programs),
                    "LEVELS": levels,
                    **_indexing(layout),
                    "BLOCK": block,
                },
                num_warps=max(4, _warps(block)),
                enable_fp_fusion=False,
            )
        finite.record()
    return Ranges(table, minima, inverse, finite.read)


class _Flag:
    """A number that the device may turn from 1 to 0, and an event after which it stands.

    They are kept for later: making pinned memory and an event takes as long as a launch.
    """

    _kept: ClassVar[dict[torch.device, deque[_Flag]]] = defaultdict(deque)

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.ones(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._array = self.memory.numpy()
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    @classmethod
    def take(cls, device: torch.device) -> _Flag:
        """One that is 1."""
        try:
            flag = cls._kept[device].pop()
        except IndexError:
            return cls(device)
        flag._array[0] = 1
        return flag

    def record(self) -> None:
        """The kernels that may change it are launched, on the current stream."""
        if self._event is not None:
            self._event.record()

    def read(self) -> bool:
        """Whether it is still 1, once these kernels are over; to be called once."""
        if self._event is not None:
            self._event.synchronize()
        is_one = bool(self._array[0])
        self._kept[self._device].append(self)
        return is_one


@dataclass(frozen=True)
class _Plan:
    """The wanted ranks of every group; made once for a size, as it goes to the device."""

    ranks: Tensor
    """int32 [ranks]."""
    rounds: tuple[tuple[Tensor, Tensor], ...]
    """What is found at once: boundaries int32 [up to 3, 2], the lower and the upper rank of each; and what goes
    where, int32 [wanted, 2]: the place among the ranks; twice the boundary and its side, or -1 for the least
    element and -2 for the greatest."""

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, ranks: tuple[int, ...], size: int, device: torch.device) -> _Plan:
        """The plan for ascending ranks of groups of a size."""
        ends = {0: -1, size - 1: -2}
        boundaries: list[list[int]] = []
        for rank in sorted(set(ranks) - set(ends)):
            if boundaries and boundaries[-1] == [rank - 1, rank - 1]:
                boundaries[-1][1] = rank
            else:
                boundaries.append([rank, rank])
        rounds = []
        for first in range(0, len(boundaries), 3):
            some = boundaries[first : first + 3]
            numbers = {rank: 2 * i + side for i, pair in enumerate(some) for side, rank in enumerate(pair)}
            numbers |= {} if first else ends
            wanted = [[place, numbers[rank]] for place, rank in enumerate(ranks) if rank in numbers]
            rounds.append((_integers(some, device), _integers(wanted, device)))
        return cls(_integers(list(ranks), device), tuple(rounds))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def between(rule: RangeRule, size: int, device: torch.device) -> Tensor:
        """The boundaries between the chunks of a rule, int32 [buckets - 1, 2]."""
        return _integers([list(pair) for pair in zip(*[iter(rule.ranks(size)[1:-1])] * 2, strict=True)], device)


def _integers(numbers: list[Any], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32).to(device)


@dataclass(frozen=True)
class _Selection:
    """What was counted and copied; see `triton_selection`.

    Attributes:
        tensors: counts, places, windows, kept keys, and parts of the extremes.
        programs: parts of each group.
        constants: of the room and of the parts, as kernels want them.
    """

    tensors: tuple[Tensor, ...]
    programs: int
    constants: dict[str, int]

    @classmethod
    def of(cls, values: Tensor, layout: Layout, boundaries: Tensor) -> _Selection:
        """Counts and copies around up to three boundaries, int32 [boundaries, 2]; on the current device."""
        groups, size, device = layout.groups, layout.group_size, values.device
        sample = SAMPLE if size >= LARGE else SAMPLE // 2
        stride = -(-size // sample)
        while math.gcd(stride, size) != 1:  # or the sample would see a few columns only
            stride += 1
        # A bracket is 4 standard deviations wide to both sides, at most 2 * sqrt(sample) elements of the sample.
        expected = size * (4 * math.isqrt(sample) + 8) // sample
        bins = min(2048, max(64, triton.next_power_of_2(expected // BIN)))
        programs = _programs(layout, limit=511)  # of 1023 halves of blocks
        lengths = [groups * n for n in (16, 24, 24, 12, 3 * ROOM, 3 * bins, 2 * programs)]
        memory = torch.empty(sum(lengths), dtype=torch.int32, device=device)
        counts, places, windows, ends, kept, bin_counts, parts = memory.split(lengths)
        windows = windows.view(torch.float32)
        ends, parts = ends.view(torch.float32), parts.view(torch.float32)
        sizes, count = _sizes(layout), len(boundaries)
        shared: dict[str, Any] = {"BINS": bins, **_indexing(layout)}
        _bracket(
            (groups, 6),
            (values, boundaries, ends, counts, bin_counts, kept),
            (*sizes, stride),
            {**shared, "BOUNDARIES": count, "ROOM": ROOM, "BLOCK": sample},
            num_warps=_warps(sample),
        )
        _count(
            (groups, programs),
            (values, ends, counts, bin_counts, parts),
            sizes,
            {**shared, "BLOCK": BLOCK // 2},
            num_warps=8,
        )
        _locate((groups, 2 * count), (boundaries, ends, counts, bin_counts, places, windows), (), {"BINS": bins})
        _collect(
            (groups, programs),
            (values, ends, counts, places, windows, kept),
            sizes,
            {**shared, "BOUNDARIES": count, "ROOM": ROOM, "BLOCK": BLOCK},
            num_warps=8,
        )
        constants = {"ROOM": ROOM, "PARTS": triton.next_power_of_2(programs)}
        return cls((counts, places, windows, kept, parts), programs, constants)


def _extreme_parts(values: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """Extremes of parts of each group, float32 [groups, 2, programs], and how many parts there are."""
    programs = _programs(layout)
    parts = values.new_empty(layout.groups, 2, programs, dtype=torch.float32)
    with on_device(values.device):
        _extremes(
            (layout.groups, programs),
            (values, parts),
            _sizes(layout),
            {**_indexing(layout), "BLOCK": BLOCK},
            num_warps=8,
        )
    return parts, programs


def _warps(block: int) -> int:
    """Warps of a program that holds a whole block: 16 to 32 elements a thread, up to 32 warps."""
    return min(32, max(1, block // 512))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _is_taken(values: Tensor, layout: Layout) -> bool:
    """Whether there are kernels for it: not for float64, many small groups, and more than ranks can count."""
    many = layout.group_size <= MIN_GROUP and layout.groups > 1
    return values.element_size() <= 4 and not many and layout.group_size < 1 << 31


def _is_scattered(layout: Layout) -> bool:
    """Whether the elements of a group are too far apart to be read one after the other."""
    return layout.outer > 1 and layout.inner < MIN_RUN


def _programs(layout: Layout, limit: int | None = None) -> int:
    """Into how many programs a group is divided; `limit` is how many blocks one may do."""
    blocks = -(-layout.group_size // BLOCK)
    programs = min(blocks, max(1, PROGRAMS // layout.groups))
    return programs if limit is None else max(programs, -(-blocks // limit))


def _sizes(layout: Layout) -> tuple[int, int, int]:
    return layout.group_size, layout.groups, layout.inner


def _indexing(layout: Layout) -> dict[str, Any]:
    """How kernels find elements of a group."""
    wide = layout.numel >= (1 << 31) - (1 << 20)
    return {"INDEX": tl.int64 if wide else tl.int32, "ONE_RUN": layout.outer == 1}
