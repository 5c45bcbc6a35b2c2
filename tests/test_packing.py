"""Bit packing: the layout, exact sizes and round trips."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsplit.compressors.packing import pack, packed_bytes, unpack
from fxsplit.errors import CompressorError

BITS = range(1, 17)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]


def reference(codes: Sequence[int], bits: int) -> list[int]:
    """The layout as it is defined: one long little-endian number."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 16))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))


@given(coded())
@settings(deadline=None, derandomize=True)
def test_layout_is_one_little_endian_number(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int32), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_at_every_length(bits: int, device: str) -> None:
    for count in range(19):
        codes = torch.full((count,), 2**bits - 1, dtype=torch.int64, device=device)
        codes[1::3] = 0
        packed = pack(codes, bits)
        assert packed.shape == (packed_bytes(count, bits),) == (-(-count * bits // 8),)
        assert packed.is_contiguous() and packed.device.type == device
        assert packed.tolist() == reference(codes.tolist(), bits)
        assert unpack(packed, bits, count).tolist() == codes.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", BITS)
def test_any_integer_dtype_and_strides_and_the_codes_stay(bits: int, dtype: torch.dtype) -> None:
    limit = min(2**bits, torch.iinfo(dtype).max + 1)
    codes = torch.randint(0, limit, (9, 10), generator=torch.Generator().manual_seed(bits)).to(dtype)
    for view in (codes, codes.T, codes[:, ::3]):
        before = view.clone()
        assert unpack(pack(view, bits), bits, view.numel()).tolist() == view.flatten().tolist()
        assert torch.equal(view, before)


@pytest.mark.parametrize("bits", BITS)
def test_unpacks_from_the_middle_of_a_buffer(bits: int) -> None:
    codes = torch.arange(21, dtype=torch.int32) % 2**bits
    packed = pack(codes, bits)
    for offset in (1, 2, 3):
        buffer = torch.cat((torch.full((offset,), 255, dtype=torch.uint8), packed))
        assert unpack(buffer[offset:], bits, 21).tolist() == codes.tolist()
        assert buffer[offset:].tolist() == packed.tolist()


def test_dtypes_of_the_codes() -> None:
    for bits in BITS:
        packed = torch.zeros(packed_bytes(5, bits), dtype=torch.uint8)
        assert unpack(packed, bits, 5).dtype == (torch.uint8 if bits <= 8 else torch.int32)


def test_eight_and_sixteen_bits_are_views() -> None:
    octets, words = torch.arange(5, dtype=torch.uint8), torch.arange(5, dtype=torch.int16)
    assert pack(octets, 8).data_ptr() == octets.data_ptr()
    assert pack(words, 16).data_ptr() == words.data_ptr()
    assert unpack(octets, 8, 5).data_ptr() == octets.data_ptr()


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(CompressorError, match=r"found: +-?\d+\n  allowed: 1 to 16"):
        pack(torch.zeros(3, dtype=torch.int32), bits)
    with pytest.raises(CompressorError, match="allowed: 1 to 16"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_codes_are_integers(dtype: torch.dtype) -> None:
    with pytest.raises(CompressorError, match="codes are integers"):
        pack(torch.zeros(3, dtype=dtype), 4)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.int8),
        torch.zeros(3, 1, dtype=torch.uint8),
    ],
)
def test_wrong_bytes(packed: torch.Tensor) -> None:
    with pytest.raises(CompressorError, match=r"allowed: torch\.uint8 of shape \(3,\)"):
        unpack(packed, 12, 2)
