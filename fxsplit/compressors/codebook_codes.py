"""Codes by codebooks: of each element the nearest value of its group's, or one of the two around it at random."""

from __future__ import annotations

import torch
from torch import Tensor

from fxsplit.compressors.floating import wide_dtype
from fxsplit.compressors.grouping import Layout
from fxsplit.compressors.kernels import Kernels
from fxsplit.compressors.packing import pack, packed_bytes
from fxsplit.compressors.scheme import Scheme, seeds, value_table
from fxsplit.compressors.torch_kernels import BucketSearch, block_size, blocks, dither_of, element_groups
from fxsplit.spec import TensorSpec


def encode(values: Tensor, codebook: Tensor, layout: Layout, kernels: Kernels) -> Tensor:
    """The packed codes of the nearest values: those of ranges that begin where the cells of the codebook do.

    Args:
        values: flat, not empty.
        codebook: `[groups, 2**bits]`, ascending, float32 or float64.
        layout: the groups.
        kernels: of the device.
    """
    wide, bits = codebook.double(), codebook.shape[1].bit_length() - 1
    # The code of an element is that of the last value whose cell begins up to it.
    bounds = torch.cat((wide[:, :1], wide[:, :-1] / 2 + wide[:, 1:] / 2), dim=1)
    return kernels.encode(values, bounds, torch.zeros_like(bounds), None, Scheme(layout, bits, bits))


def decode(packed: Tensor, codebook: Tensor, layout: Layout, spec: TensorSpec, kernels: Kernels) -> Tensor:
    """The tensor that codes stand for; arguments as for `encode`."""
    bits = codebook.shape[1].bit_length() - 1
    return kernels.decode(packed, value_table(codebook), Scheme(layout, bits, bits), spec)


def encode_at_random(values: Tensor, codebook: Tensor, layout: Layout, first: int = 0) -> Tensor:
    """The packed codes of the value up to each element or of the next one, with the chance that keeps the mean.

    Args:
        values: flat, not empty, none outside of its group's codebook.
        codebook: as for `encode`; it is what the random numbers depend on, together with an element's place.
        layout: the groups.
        first: the place of the first element.
    """
    count, bits, device = values.numel(), codebook.shape[1].bit_length() - 1, values.device
    seed = seeds(codebook.view(layout.groups, 2, -1).transpose(0, 1))
    packed = values.new_empty(packed_bytes(count, bits), dtype=torch.uint8)
    size, last, wide = min(block_size(device), count), codebook.shape[1] - 1, codebook.double()
    search = BucketSearch(wide, wide_dtype(values.dtype), size)
    for start, length in blocks(count, size):
        block = values[start : start + length].double()
        group = element_groups(start, length, layout, device)
        lower = search(values[start : start + length], group)
        index = torch.stack((lower, (lower + 1).clamp_(max=last))).long()
        below, above = wide.view(-1)[index if group is None else index.add_(group, alpha=last + 1)]
        span = above - below
        share = torch.where(span > 0, (block - below) / torch.where(span > 0, span, 1.0), 0.0)
        codes = lower + share.add_(dither_of(first + start, length, seed, group)).floor_().to(torch.int32)
        place = start * bits // 8
        packed[place : place + packed_bytes(length, bits)] = pack(codes, bits)
    return packed
