"""Compares the kernels for Triton with those of torch, under Triton's interpreter: with TRITON_INTERPRET=1 set.

Small blocks, so that the ways of large tensors are gone with small ones: the interpreter takes a second where a
GPU takes microseconds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxsplit.compressors import (
    cuda_kernels,
    cuda_layout,
    cuda_ranges,
    cuda_selection,
    torch_kernels,
)
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.ranges import RangeRule
from fxsplit.compressors.scheme import Scheme
from fxsplit.compressors.triton_ranges import GREATEST, float_key, kth_key, value_of
from fxsplit.spec import TensorSpec
from tests.test_compressors_kernels import data

SELECTED = RangeRule(4, touching=False)
CASES = [
    *((Layout(1, 1, 1501), SELECTED, kind) for kind in ("gaussian", "relu", "integers", "heavy")),
    *((layout, RangeRule(1), "gaussian") for layout in (Layout(1, 1, 1501), Layout(60, 5, 1))),
    (Layout(1, 1, 1501), RangeRule(4, 3), "gaussian"),
    (Layout(1, 1, 1501), RangeRule(4, 9), "gaussian"),
    (Layout(2, 2, 300), RangeRule(2, touching=False), "gaussian"),
]


SMALL = {
    **{"BLOCK": 256, "PROGRAMS": 2, "MIN_GROUP": 50, "MIN_RUN": 16, "LAST": 256, "ROWS": 8, "COLUMNS": 4},
    **{"SAMPLE": 512, "LARGE": 1000, "ROOM": 128, "GATHER_BLOCK": 128, "SAMPLE_BLOCK": 128, "BIN": 16},
}


def shrink() -> None:
    """Blocks and limits of large tensors become those of small ones."""
    for module in (cuda_kernels, cuda_layout, cuda_ranges, cuda_selection):
        for name in SMALL.keys() & vars(module).keys():
            setattr(module, name, SMALL[name])


@triton.jit  # type: ignore[untyped-decorator]
def kth_kernel(
    values_at: tl.tensor,
    ranks_at: tl.tensor,
    found_at: tl.tensor,
    size: tl.tensor,
    SLACK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The value of a rank; grid (ranks,)."""
    lanes = tl.arange(0, BLOCK)
    keys = float_key(tl.load(values_at + lanes, mask=lanes < size, other=0.0))
    key = kth_key(tl.where(lanes < size, keys, GREATEST), tl.load(ranks_at + tl.program_id(0)), SLACK)
    tl.store(found_at + tl.program_id(0), value_of(key))


def check_ranks() -> None:
    """Every value that a sort has, with many that are equal, with far outliers, and with infinities."""
    ranks = torch.tensor([0, 1, 70, 249, 250, 251, 400, 498, 499], dtype=torch.int32)
    for kind in ("gaussian", "relu", "integers", "heavy", "outliers"):
        x = data(500, "gaussian" if kind == "outliers" else kind)
        if kind == "outliers":
            x[:6] = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 1e-45, 0.0])
        ordered = x.sort().values
        for slack in (0, 8):
            found = torch.full((len(ranks),), torch.nan)
            kth_kernel[len(ranks),](x, ranks, found, 500, SLACK=slack, BLOCK=512)
            for rank, value in zip(ranks.tolist(), found.tolist(), strict=True):
                allowed = ordered[max(0, rank - slack) : rank + 1]
                assert bool((allowed == value).any()), (kind, slack, rank, value)


def main() -> None:
    """Raises if a number differs; kernels that give up, which they may, say NaN."""
    check_ranks()
    shrink()
    gave_up = 0
    for layout, rule, kind in CASES:
        split = rule.buckets.bit_length() - 1
        scheme, spec = Scheme(layout, 4 + split, split), TensorSpec((layout.numel,), torch.float32)
        x = data(layout.numel, kind)
        found = cuda_kernels.ranges(x, layout, rule, scheme.levels, torch.float32)
        if not found.are_finite():
            gave_up += 1
            continue
        expected = torch_kernels.ranges(x, layout, rule, scheme.levels, torch.float32)
        codes = cuda_kernels.encode(x, found.minima, found.inverse, None, scheme)
        pairs = [(getattr(found, name), getattr(expected, name)) for name in ("table", "minima", "inverse")]
        pairs.append((codes, torch_kernels.encode(x, expected.minima, expected.inverse, None, scheme)))
        decoded = torch_kernels.decode(codes, expected.table, scheme, spec)
        pairs.append((cuda_kernels.decode(codes, found.table, scheme, spec), decoded))
        assert all(torch.equal(one, other) for one, other in pairs), (layout, rule, kind)
    assert gave_up <= 1, f"{gave_up} would have been sorted"


if __name__ == "__main__":
    main()
