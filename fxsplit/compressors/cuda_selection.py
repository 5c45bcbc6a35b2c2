"""Order statistics and extremes of the groups of a tensor on a GPU, by Triton; nothing waits for the device."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxsplit.compressors import torch_kernels, triton_kernels, triton_selection
from fxsplit.compressors.grouping import Layout

BLOCK = 4096
"""Elements that a program looks at together when it goes over all of them."""

PROGRAMS = 1024
"""At most so many programs go over one group; a power of two."""

ROWS, COLUMNS = 16, 256
"""Elements that a program divides together: so many for each of so many threads."""

SAMPLE = 1 << 14
"""Elements of a sample of a group from `LARGE` elements on; of smaller ones, half as many."""

LARGE = 1 << 21

LAST = 1 << 15
"""Up to so many elements are searched by one program; a power of two."""

MAX_ROUNDS = 5
"""So many times three boundaries are found; for more, sorting is faster."""

MIN_GROUP = 1024
"""Groups up to this size are left to torch, which does many of them at a time."""

MIN_RUN = 32
"""Shorter runs are scattered: reading them one by one wastes most of what is read."""

BITS: dict[int, tuple[torch.dtype, Any, int]] = {
    2: (torch.int16, tl.int16, 0x7FFF),
    4: (torch.int32, tl.int32, 0x7FFFFFFF),
    8: (torch.int64, tl.int64, 0x7FFFFFFFFFFFFFFF),
}
"""By the bytes of a float: the integers of that size, and all of their bits but the sign."""

FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def extremes(values: Tensor, layout: Layout) -> Tensor:
    """As `torch_kernels.extremes`."""
    if layout.group_size <= MIN_GROUP or _scattered(layout):
        return torch_kernels.extremes(values, layout)
    wide = values.element_size() == 8
    programs = _programs(layout)
    signed, bits, flip = BITS[values.element_size()]
    parts = values.new_empty(layout.groups, 2, programs, dtype=torch.int64 if wide else torch.int32)
    found = values.new_empty(2, layout.groups, dtype=torch.float64)
    key = tl.int64 if wide else tl.int32
    with on_device(values.device):
        triton_kernels.extremes_kernel[(layout.groups, programs)](
            values.view(signed),
            parts,
            *_sizes(layout),
            KEY=key,
            FLIP=flip,
            **_indexing(layout),
            BLOCK=BLOCK,
            num_warps=8,
        )
        triton_kernels.join_extremes_kernel[(layout.groups,)](
            parts,
            found,
            programs,
            KEY=key,
            FLIP=flip,
            BITS=bits,
            FLOAT=FLOATS[values.dtype],
            BLOCK=triton.next_power_of_2(programs),
        )
    return found


def order_statistics(values: Tensor, layout: Layout, ranks: Sequence[int]) -> Tensor:
    """As `torch_kernels.order_statistics`; NaN, rarely, where the values would have to be sorted."""
    size = layout.group_size
    if values.dtype == torch.float64 or size >= 1 << 31 or (size <= MIN_GROUP and layout.groups > 1):
        return torch_kernels.order_statistics(values, layout, ranks)
    if _scattered(layout):
        values, layout = layout.rows(values).reshape(-1), Layout(1, layout.groups, size)
    if len(ranks) > 6 * MAX_ROUNDS + 2:
        return torch_kernels.order_statistics(values, layout, ranks)
    plan = _Plan.of(tuple(ranks), size, values.device)
    return _sorted(values, layout, plan) if size <= LAST or not plan.rounds else _select(values, layout, plan)


@dataclass(frozen=True)
class _Plan:
    """The wanted ranks of every group; made once for a size, as it goes to the device."""

    ranks: Tensor
    """int32 [ranks, 2]: their places, and themselves."""
    rounds: tuple[tuple[Tensor, Tensor], ...]
    """What is found at once: boundaries int32 [up to 3, 2], the lower and the upper rank of each; and the ranks
    among them, as above, but -1 for the least element and -2 for the greatest, which the first round finds."""

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
            members = {rank: rank for pair in some for rank in pair} | ({} if first else ends)
            wanted = [[place, members[rank]] for place, rank in enumerate(ranks) if rank in members]
            rounds.append((_integers(some, device), _integers(wanted, device)))
        return cls(_integers([[place, rank] for place, rank in enumerate(ranks)], device), tuple(rounds))


def _integers(rows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).to(device)


def _sorted(values: Tensor, layout: Layout, plan: _Plan) -> Tensor:
    """Every rank by a program that holds the whole group."""
    signed, bits, flip = BITS[values.element_size()]
    found = values.new_empty(layout.groups, len(plan.ranks), dtype=torch.float64)
    block = triton.next_power_of_2(layout.group_size)
    with on_device(values.device):
        triton_selection.sorted_kernel[(layout.groups, len(plan.ranks))](
            values.view(signed),
            plan.ranks,
            found,
            *_sizes(layout),
            FLIP=flip,
            BITS=bits,
            FLOAT=FLOATS[values.dtype],
            **_indexing(layout),
            BLOCK=block,
            num_warps=_warps(block),
        )
    return found


def _select(values: Tensor, layout: Layout, plan: _Plan) -> Tensor:
    """By samples; see `triton_selection`."""
    size = layout.group_size
    sample = SAMPLE if size >= LARGE else SAMPLE // 2
    stride = -(-size // sample)
    while math.gcd(stride, size) != 1:  # or the sample would see a few columns only
        stride += 1
    found = values.new_empty(layout.groups, len(plan.ranks), dtype=torch.float64)
    for boundaries, wanted in plan.rounds:
        rooms = _rooms(size, sample, len(boundaries), values.device)
        _select_round(values, layout, boundaries, wanted, sample, stride, rooms, found)
    return found


@functools.lru_cache(maxsize=256)
def _rooms(size: int, sample: int, boundaries: int, device: torch.device) -> tuple[list[int], Tensor]:
    """For how many keys there is room at each level, here and on the device: 1.5 times what is expected."""
    rooms: list[int] = []
    expected = size
    while not rooms or rooms[-1] > LAST:
        # A bracket is 4 standard deviations wide to both sides, at most 2 * sqrt(sample) elements of the sample.
        expected = expected * boundaries * (4 * math.isqrt(sample) + 8) // sample
        rooms.append(LAST if 1.3 * expected <= LAST else (expected * 3 // 2 + 4096) // 128 * 128)
    return rooms, torch.tensor(rooms, dtype=torch.int32).to(device)


def _select_round(
    values: Tensor,
    layout: Layout,
    boundaries: Tensor,
    wanted: Tensor,
    sample: int,
    stride: int,
    rooms: tuple[list[int], Tensor],
    found: Tensor,
) -> None:
    """Fills the columns of `found` that belong to up to three boundaries."""
    signed, bits, flip = BITS[values.element_size()]
    groups, (room_list, room_tensor) = layout.groups, rooms
    levels, device = len(room_list), values.device
    counts = torch.zeros(levels, groups, 16, dtype=torch.int32, device=device)
    ends = torch.empty(levels, groups, 12, dtype=torch.int32, device=device)
    shared: dict[str, Any] = {"FLIP": flip, **_indexing(layout)}
    source, source_room, tile = values.view(signed), 0, ROWS * COLUMNS
    most = -(-layout.group_size // tile)
    programs = max(min(most, max(1, PROGRAMS // groups)), -(-most // (1023 // ROWS)))
    parts = torch.empty(groups, 2, programs, dtype=torch.int32, device=device)
    with on_device(device):
        for level, room in enumerate(room_list):
            kept = torch.empty(groups, room, dtype=torch.int32, device=device)
            triton_selection.bracket_kernel[(groups, 6)](
                source,
                boundaries,
                counts,
                ends,
                room_tensor,
                *_sizes(layout),
                stride,
                source_room,
                LEVEL=level,
                BOUNDARIES=len(boundaries),
                **shared,
                BLOCK=sample,
                num_warps=_warps(sample),
            )
            triton_selection.divide_kernel[
                (groups, min(programs, -(-source_room // tile)) if level else programs)
            ](
                source,
                counts,
                ends,
                kept,
                parts,
                *_sizes(layout),
                source_room,
                room,
                LEVEL=level,
                **shared,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                num_warps=max(1, COLUMNS // 32),
            )
            source, source_room = kept, room
        triton_selection.find_kernel[(groups, len(wanted))](
            wanted,
            counts,
            ends,
            room_tensor,
            source,
            parts,
            found,
            layout.group_size,
            groups,
            source_room,
            programs,
            found.shape[1],
            LEVELS=levels,
            FLIP=flip,
            BITS=bits,
            FLOAT=FLOATS[values.dtype],
            INDEX=shared["INDEX"],
            PARTS_BLOCK=triton.next_power_of_2(programs),
            BLOCK=LAST,
            num_warps=_warps(LAST),
        )


def _warps(block: int) -> int:
    """Warps of a program that holds a whole block: 16 to 32 elements a thread, up to 32 warps."""
    return min(32, max(1, block // 512))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _scattered(layout: Layout) -> bool:
    """Whether the elements of a group are too far apart to be read one after the other."""
    return layout.outer > 1 and layout.inner < MIN_RUN


def _programs(layout: Layout) -> int:
    """Into how many programs a group is divided."""
    return min(-(-layout.group_size // BLOCK), max(1, PROGRAMS // layout.groups))


def _sizes(layout: Layout) -> tuple[int, int, int]:
    return layout.group_size, layout.groups, layout.inner


def _indexing(layout: Layout) -> dict[str, Any]:
    """How kernels find elements of a group."""
    wide = layout.numel >= (1 << 31) - (1 << 20)
    return {"INDEX": tl.int64 if wide else tl.int32, "ONE_RUN": layout.outer == 1}
