"""Gathering around wanted ranks and finding their places on a GPU, by Triton; see `triton_brackets`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsplit.compressors import triton_brackets, triton_selection
from fxsplit.compressors.cuda_layout import PROGRAMS, indexing, power_of_2, programs_of, sizes_of, warps_of
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.ranges import RangeRule
from fxsplit.compressors.triton_launch import Launcher

SAMPLE = 1 << 14
"""Elements of the small sample of a group from `LARGE` elements on; of smaller ones, half as many."""

LARGE = 1 << 21

SPACING = 8
"""The large sample of a group from `LARGE` elements on is one in so many; of smaller ones, all."""

SAMPLE_BLOCK, GATHER_BLOCK = 1024, 512
"""Elements that a program looks at together of the large sample and of what was gathered, and of all."""

ROOM = 4096
"""Keys for which there is room behind each boundary."""

BIN = 512
"""About how many elements there are to be in a bin of a bracket."""

KEPT, MAX_SEGMENTS = int(triton_brackets.KEPT.value), int(triton_brackets.MAX_SEGMENTS.value)
SLACK = int(triton_brackets.SLACK.value)

_bracket = Launcher(triton_brackets.bracket_kernel)
_sample = Launcher(triton_brackets.sample_kernel)
_window = Launcher(triton_brackets.window_kernel)
_gather = Launcher(triton_brackets.gather_kernel)
_bin = Launcher(triton_selection.bin_kernel)
_locate = Launcher(triton_selection.locate_kernel)
_collect = Launcher(triton_selection.collect_kernel)


@dataclass(frozen=True)
class Plan:
    """The wanted ranks of every group; made once for a size, as it goes to the device."""

    ranks: Tensor
    """int32 [ranks]."""
    rounds: tuple[tuple[Tensor, Tensor], ...]
    """What is found at once: boundaries int32 [up to 3, 2], the lower and the upper rank of each; and what goes
    where, int32 [wanted, 2]: the place among the ranks; twice the boundary and its side, or -1 for the least
    element and -2 for the greatest."""

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, ranks: tuple[int, ...], size: int, device: torch.device) -> Plan:
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
class Recipe:
    """The numbers of a selection, which follow from the layout.

    Attributes:
        sample: elements of the small sample, at most, a power of two.
        stride: their distance.
        samples: elements of the large one.
        spacing: the distance of its runs of 8, in runs.
        programs: parts of each group, whose extremes are found, too.
        room: gathered elements of each segment for which there is room.
        words: of the memory of a group, of 32 bits.
        constants: where things are in that memory, as kernels want them; with the number of segments.
        indexing: how kernels find elements of a group.
    """

    sample: int
    stride: int
    samples: int
    spacing: int
    programs: int
    room: int
    words: int
    constants: dict[str, int]
    indexing: dict[str, Any]

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, layout: Layout, boundaries: int) -> Recipe:
        """The numbers for so many boundaries."""
        size = layout.group_size
        sample, spacing = (SAMPLE, SPACING) if size >= LARGE else (SAMPLE // 2, 1)
        stride, spacing = _prime_to(size, -(-size // sample)), _prime_to(size, spacing)
        runs = -(-size // (8 * spacing))
        samples = 8 * (runs - 1) + min(8, size - 8 * spacing * (runs - 1))
        # A bracket is 4 standard deviations wide to both sides, at most 2 * sqrt(sample) elements of the sample,
        # and twice its slack; a window is 6 of the large sample, and a bin.
        bracketed = size * (4 * math.isqrt(sample) + 8 + 2 * (sample // SLACK)) // sample
        bins = min(2048, max(64, power_of_2(bracketed // BIN)))
        gathered = boundaries * (size // samples * 6 * math.isqrt(samples) + 4 * bracketed // bins)
        # Of up to 1023 blocks each.
        programs = max(4 * programs_of(layout), -(-size // (1023 * GATHER_BLOCK)))
        segments = min(MAX_SEGMENTS, power_of_2(programs + 1) // 2)
        room = 2 * gathered // segments + ROOM // 4
        words = KEPT + 3 * ROOM + 6 * bins + 2 * programs + room * segments
        constants = {"BINS": bins, "ROOM": ROOM, "SEGMENTS": segments}
        return cls(sample, stride, samples, spacing, programs, room, words, constants, indexing(layout))


def _prime_to(size: int, step: int) -> int:
    """The next step that is prime to a size, or a sample would see a few columns only."""
    while math.gcd(step, size) != 1:
        step += 1
    return step


@dataclass(frozen=True)
class Selection:
    """What was gathered and found; see `triton_brackets` and `triton_selection`.

    Attributes:
        work: the memory of the groups, int32 [groups * words].
        words: of a group.
        programs: parts of each group.
        constants: where things are in that memory, as kernels want them.
    """

    work: Tensor
    words: int
    programs: int
    constants: dict[str, int]

    @classmethod
    def of(cls, values: Tensor, layout: Layout, boundaries: Tensor) -> Selection:
        """Gathers and finds up to three boundaries, int32 [boundaries, 2]; on the current device."""
        groups, size, count = layout.groups, layout.group_size, len(boundaries)
        recipe, sizes = Recipe.of(layout, count), sizes_of(layout)
        words, room, constants = recipe.words, recipe.room, recipe.constants
        shape = {"BINS": constants["BINS"], "ROOM": ROOM}
        work = values.new_empty(groups * words, dtype=torch.int32)
        _bracket(
            (groups, 6),
            (values, boundaries, work),
            (*sizes, recipe.stride, words),
            {"BOUNDARIES": count, **shape, **recipe.indexing, "BLOCK": recipe.sample},
            num_warps=warps_of(recipe.sample),
        )
        _sample(
            (groups, min(-(-recipe.samples // SAMPLE_BLOCK), max(1, PROGRAMS // groups))),
            (values, work),
            (*sizes, words, recipe.samples, recipe.spacing),
            {**shape, **recipe.indexing, "BLOCK": SAMPLE_BLOCK},
        )
        ends = groups, 2 * count
        _window(ends, (boundaries, work), (size, words, recipe.samples), {**shape, "PROBES": 256})
        _gather(
            (groups, recipe.programs),
            (values, work),
            (*sizes, words, room),
            {**constants, **recipe.indexing, "BLOCK": GATHER_BLOCK},
        )
        segments = constants["SEGMENTS"]
        few = groups, segments * min(-(-room // SAMPLE_BLOCK), max(1, PROGRAMS // segments // groups))
        _bin(few, (work,), (words, room), {**constants, "BLOCK": SAMPLE_BLOCK})
        _locate(ends, (boundaries, work), (words, room), constants)
        _collect(few, (work,), (words, room), {"BOUNDARIES": count, **constants, "BLOCK": SAMPLE_BLOCK})
        return cls(work, words, recipe.programs, {**shape, "PARTS": power_of_2(recipe.programs)})
