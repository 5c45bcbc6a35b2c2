"""Extremes, order statistics and ranges of the groups of a tensor on a GPU, by Triton."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxsplit.compressors import torch_kernels, triton_ranges, triton_selection
from fxsplit.compressors.cuda_layout import (
    BLOCK,
    PROGRAMS,
    indexing,
    is_scattered,
    is_taken,
    on_device,
    power_of_2,
    programs_of,
    sizes_of,
    warps_of,
)
from fxsplit.compressors.cuda_selection import Plan, Selection
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.ranges import RangeRule, Ranges, found_ranges
from fxsplit.compressors.triton_launch import Launcher

ROWS, COLUMNS = 32, 32
"""Elements of a table that a program looks at together, for the extremes of its columns."""

LAST = 1 << 15
"""Up to so many elements are searched by one program; a power of two."""

MAX_ROUNDS = 5
"""So many times three boundaries are found; for more, sorting is faster."""

_extremes = Launcher(triton_ranges.extremes_kernel)
_extreme_values = Launcher(triton_ranges.extreme_values_kernel)
_sorted = Launcher(triton_ranges.sorted_kernel)
_sampled_ranges = Launcher(triton_ranges.sampled_ranges_kernel)
_touching_ranges = Launcher(triton_ranges.touching_ranges_kernel)
_column_ranges = Launcher(triton_ranges.column_ranges_kernel)
_find = Launcher(triton_selection.find_kernel)
_selected_ranges = Launcher(triton_selection.selected_ranges_kernel)


def extremes(values: Tensor, layout: Layout) -> Tensor:
    """As `torch_kernels.extremes`."""
    if not is_taken(values, layout) or is_scattered(layout):
        return torch_kernels.extremes(values, layout)
    parts, programs = _extreme_parts(values, layout)
    found = values.new_empty(2, layout.groups, dtype=torch.float64)
    with on_device(values.device):
        _extreme_values((layout.groups, 2), (parts, found), (programs,), {"PARTS": power_of_2(programs)})
    return found


def order_statistics(values: Tensor, layout: Layout, ranks: Sequence[int]) -> Tensor:
    """As `torch_kernels.order_statistics`; NaN, rarely, where the values would have to be sorted."""
    size = layout.group_size
    plan = Plan.of(tuple(ranks), size, values.device)
    rounds = 0 if size <= LAST else len(plan.rounds) or MAX_ROUNDS + 1
    if not is_taken(values, layout) or rounds > MAX_ROUNDS:
        return torch_kernels.order_statistics(values, layout, ranks)
    if is_scattered(layout):
        values, layout = layout.rows(values).reshape(-1), Layout(1, layout.groups, size)
    values = values.contiguous()  # a sample is every so many-th element of a tensor
    found = values.new_empty(layout.groups, len(ranks), dtype=torch.float64)
    with on_device(values.device):
        if size <= LAST:
            block = power_of_2(size)
            _sorted(
                (layout.groups, len(ranks)),
                (values, plan.ranks, found),
                sizes_of(layout),
                {**indexing(layout), "BLOCK": block},
                num_warps=warps_of(block),
            )
        for boundaries, wanted in plan.rounds[:rounds]:
            selection = Selection.of(values, layout, boundaries)
            _find(
                (layout.groups, len(wanted)),
                (wanted, selection.work, found),
                (selection.words, selection.programs, len(ranks)),
                selection.constants,
            )
    return found


def _extreme_parts(values: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """Extremes of parts of each group, float32 [groups, 2, programs], and how many parts there are."""
    programs = programs_of(layout)
    parts = values.new_empty(layout.groups, 2, programs, dtype=torch.float32)
    with on_device(values.device):
        _extremes(
            (layout.groups, programs),
            (values, parts),
            sizes_of(layout),
            {**indexing(layout), "BLOCK": BLOCK},
            num_warps=8,
        )
    return parts, programs


def ranges(values: Tensor, layout: Layout, rule: RangeRule, levels: int, dtype: torch.dtype) -> Ranges:
    """As `torch_kernels.ranges`, in fewer launches than by the functions above, which cost more than the work.

    The table is not finite where the values would have to be sorted.
    """
    launch = _launch_for(layout, rule) if is_taken(values, layout) else None
    if launch is None:
        return found_ranges(values, layout, rule, levels, dtype, extremes, order_statistics)
    with on_device(values.device):
        found = launch(values, layout, rule, levels)
        found.message.send()
    return Ranges(found.table, found.minima, found.inverse, found.message.read)


def _launch_for(layout: Layout, rule: RangeRule) -> Callable[[Tensor, Layout, RangeRule, int], _Found] | None:
    """What launches the kernels for a rule's ranges; None if there are none."""
    samples = -(-layout.group_size // rule.stride)
    if is_scattered(layout):
        return _launch_column_ranges if rule.buckets == 1 and layout.inner == 1 else None
    if rule.buckets == 1 or (rule.touching and samples <= LAST):
        return _launch_touching_ranges
    if not rule.touching and rule.stride == 1:
        if samples <= LAST:
            return _launch_sampled_ranges
        return _launch_selected_ranges if rule.buckets <= 4 else None
    return None


def _launch_touching_ranges(values: Tensor, layout: Layout, rule: RangeRule, levels: int) -> _Found:
    programs, groups, found = programs_of(layout), layout.groups, _Found.of(values, layout, rule)
    samples = 1 if rule.buckets == 1 else power_of_2(-(-layout.group_size // rule.stride))
    block = max(BLOCK, samples)
    work = values.new_empty(groups * (2 * programs + rule.buckets - 1), dtype=torch.float32)
    _touching_ranges(
        (groups, rule.buckets - 1 + programs),
        (values, work, found.message.tickets, *found.tensors),
        (*sizes_of(layout), rule.stride),
        {
            "BUCKETS": rule.buckets,
            "PARTS": power_of_2(programs),
            "LEVELS": levels,
            **indexing(layout),
            "BLOCK": block,
            "SAMPLES": samples,
        },
        num_warps=warps_of(block),
        enable_fp_fusion=False,
    )
    return found


def _launch_column_ranges(values: Tensor, layout: Layout, rule: RangeRule, levels: int) -> _Found:
    rows, columns, found = layout.outer, layout.groups, _Found.of(values, layout, rule)
    blocks = -(-columns // COLUMNS)
    programs = min(-(-rows // ROWS), max(1, PROGRAMS // blocks))
    work = values.new_empty(programs * 2 * columns, dtype=torch.float32)
    _column_ranges(
        (blocks, programs),
        (values, work, found.message.tickets, *found.tensors),
        (rows, columns),
        {"LEVELS": levels, "INDEX": indexing(layout)["INDEX"], "ROWS": ROWS, "COLUMNS": COLUMNS},
        num_warps=4,
        enable_fp_fusion=False,
    )
    return found


def _launch_sampled_ranges(values: Tensor, layout: Layout, rule: RangeRule, levels: int) -> _Found:
    block, found = power_of_2(layout.group_size), _Found.of(values, layout, rule)
    _sampled_ranges(
        (layout.groups, rule.buckets),
        (values, *found.tensors),
        sizes_of(layout),
        {"BUCKETS": rule.buckets, "LEVELS": levels, **indexing(layout), "BLOCK": block},
        num_warps=max(4, warps_of(block)),
        enable_fp_fusion=False,
    )
    return found


def _launch_selected_ranges(values: Tensor, layout: Layout, rule: RangeRule, levels: int) -> _Found:
    selection = Selection.of(values, layout, Plan.between(rule, layout.group_size, values.device))
    found = _Found.of(values, layout, rule)  # while the GPU is at work already
    _selected_ranges(
        (layout.groups, rule.buckets),
        (selection.work, *found.tensors),
        (selection.words, selection.programs),
        {**selection.constants, "LEVELS": levels},
        enable_fp_fusion=False,
    )
    return found


@dataclass(frozen=True)
class _Found:
    """Memory for the ranges, see `ranges.Ranges`, and what tells whether they are finite."""

    table: Tensor
    minima: Tensor
    inverse: Tensor
    message: _Message

    @classmethod
    def of(cls, values: Tensor, layout: Layout, rule: RangeRule) -> _Found:
        """New memory."""
        shape = (layout.groups, rule.buckets)
        wide = values.new_empty(shape, dtype=torch.float64), values.new_empty(shape, dtype=torch.float64)
        message = _Message.take(values.device, layout.groups)
        return cls(values.new_empty(2, *shape, dtype=torch.float32), *wide, message)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What kernels fill."""
        return self.table, self.minima, self.inverse, self.message.is_finite


class _Message:
    """What kernels tell the host, and an event after which they have; and tickets by which they know the last.

    They are kept for later: making pinned memory and an event takes as long as a launch.

    Attributes:
        is_finite: int32 [1] on the host, which kernels may turn from 1 to 0.
        tickets: int32 zeros on the device, which kernels leave zeros.
    """

    _kept: ClassVar[dict[torch.device, deque[_Message]]] = defaultdict(deque)

    def __init__(self, device: torch.device) -> None:
        self.is_finite = torch.ones(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.tickets = torch.zeros(1024, dtype=torch.int32, device=device)
        self._array = self.is_finite.numpy()
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    @classmethod
    def take(cls, device: torch.device, tickets: int) -> _Message:
        """One that says 1, with so many tickets at least."""
        try:
            message = cls._kept[device].pop()
        except IndexError:
            message = cls(device)
        if len(message.tickets) < tickets:
            message.tickets = torch.zeros(tickets, dtype=torch.int32, device=device)
        message._array[0] = 1
        return message

    def send(self) -> None:
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
