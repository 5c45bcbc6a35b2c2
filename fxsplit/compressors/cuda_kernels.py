"""The work of the quantizers on a GPU, by Triton; the numbers are those of `torch_kernels`.

Nothing here waits for the device. What Triton has no kernel for (ranges of float64, many ranks, groups of
awkward size) is done by `torch_kernels`.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fxsplit.compressors import triton_kernels
from fxsplit.compressors.cuda_layout import on_device, power_of_2
from fxsplit.compressors.cuda_ranges import extremes as extremes
from fxsplit.compressors.cuda_ranges import order_statistics as order_statistics
from fxsplit.compressors.cuda_ranges import ranges as ranges
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.packing import packed_bytes
from fxsplit.compressors.ranges import RangeRule
from fxsplit.compressors.scheme import Scheme
from fxsplit.compressors.triton_launch import Launcher
from fxsplit.spec import TensorSpec

ROWS = 512
"""Rows of 8 elements that a program encodes or decodes."""

_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}

_seeds, _encode, _decode = map(
    Launcher, (triton_kernels.seeds_kernel, triton_kernels.encode_kernel, triton_kernels.decode_kernel)
)

_UNITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


@functools.cache
def available(device: torch.device) -> bool:
    """Whether Triton compiles and runs for a device: it needs a C compiler, and not every GPU will do."""
    values, layout = torch.arange(64.0, device=device), Layout(1, 1, 64)
    scheme, spec = Scheme(layout, 6, 0), TensorSpec.of(values)
    try:
        for _ in range(2):  # the second launch goes another way than the first
            found = ranges(values, layout, RangeRule(1), scheme.levels, torch.float32)
            codes = encode(values, found.minima, found.inverse, None, scheme)
            if not found.are_finite() or not torch.equal(decode(codes, found.table, scheme, spec), values):
                raise RuntimeError("its kernels give wrong numbers")
        return True
    except Exception as error:  # whatever a broken installation raises
        warnings.warn(f"Triton does not work on {device}, so that compressors are slow: {error}", stacklevel=2)
        return False


def seeds(table: Tensor) -> Tensor:
    """As `scheme.seeds`, but uint32."""
    groups = table.shape[1]
    words = table.shape[2] * table.element_size() // 4
    found = torch.empty(groups, dtype=torch.uint32, device=table.device)
    with on_device(table.device):
        _seeds(
            (groups,),
            (table.view(torch.int32), found),
            (groups * words, words),
            {"BLOCK": min(1024, power_of_2(2 * words))},
        )
    return found


def encode(values: Tensor, minima: Tensor, inverse: Tensor, seeds: Tensor | None, scheme: Scheme) -> Tensor:
    """As `torch_kernels.encode`; the result may be the beginning of a slightly longer memory."""
    count, bits = values.numel(), scheme.bits
    rows = -(-count // 8)
    packed = values.new_empty(rows * bits, dtype=torch.uint8)
    wide = tl.float64 if values.dtype == torch.float64 else tl.float32
    with on_device(values.device):
        _encode(
            (-(-rows // ROWS),),
            (
                *(values, packed.view(_UNITS[math.gcd(bits, 8)]), minima, inverse),
                minima if seeds is None else seeds,
            ),
            (count, scheme.layout.groups, scheme.layout.inner),
            {"STOCHASTIC": seeds is not None, "WIDE": wide, **_constants(scheme, count)},
            **_OPTIONS,
        )
    return packed if count % 8 == 0 else packed[: packed_bytes(count, bits)]


def decode(packed: Tensor, table: Tensor, scheme: Scheme, spec: TensorSpec) -> Tensor:
    """As `torch_kernels.decode`."""
    count, bits = spec.numel, scheme.bits
    unit, rows = math.gcd(bits, 8), -(-count // 8)
    decoded = torch.empty(spec.shape, dtype=spec.dtype, device=packed.device)
    if count == 0:
        return decoded
    packed, table = packed.contiguous(), table.contiguous()
    if packed.numel() < rows * bits or packed.data_ptr() % unit:
        padded = packed.new_empty(rows * bits)
        padded[: packed.numel()] = packed
        packed = padded
    with on_device(packed.device):
        _decode(
            (-(-rows // ROWS),),
            (packed.view(_UNITS[unit]) if unit > 1 else packed, table, decoded),
            (count, scheme.layout.groups, scheme.layout.inner),
            {"LIMIT": torch.finfo(spec.dtype).max, **_constants(scheme, count)},
            **_OPTIONS,
        )
    return decoded


def _constants(scheme: Scheme, count: int) -> dict[str, Any]:
    """What `encode_kernel` and `decode_kernel` share."""
    return {
        "BITS": scheme.bits,
        "SPLIT": scheme.split_bits,
        "ONE_GROUP": scheme.layout.groups == 1,
        "ALIGNED": scheme.layout.inner % 8 == 0,
        "INDEX": tl.int64 if count >= (1 << 31) - (1 << 20) else tl.int32,
        "ROWS": ROWS,
    }
