"""Compares the kernels for Triton with those of torch, under Triton's interpreter: with TRITON_INTERPRET=1 set.

Small blocks, so that the ways of large tensors are gone with small ones: the interpreter takes a second where a
GPU takes microseconds.
"""

from __future__ import annotations

import torch

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


def main() -> None:
    """Raises if a number differs; kernels that give up, which they may, say NaN."""
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
