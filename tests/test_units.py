"""Quantities as people write them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsplit.errors import BudgetError, FxsplitError
from fxsplit.planning import units
from fxsplit.planning.units import Quantity, parse_bandwidth, parse_bytes, parse_count, parse_seconds

PARSERS: list[Callable[[Quantity], float]] = [parse_bytes, parse_bandwidth, parse_seconds, parse_count]


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_bytes, "2GiB", 2 * 2**30),
        (parse_bytes, "8MB", 8_000_000),
        (parse_bytes, "8 kB", 8_000),
        (parse_bytes, "0.1GB", 100_000_000),
        (parse_bytes, 8e6, 8_000_000),
        (parse_bytes, np.int64(7), 7),
        (parse_bytes, "512 KiB", 512 * 1024),
        (parse_bytes, " 12 ", 12),
        (parse_bytes, 2**62 + 1, 2**62 + 1),
        (parse_bandwidth, "50Mbit/s", 6.25e6),
        (parse_bandwidth, "50Mbps", 6.25e6),
        (parse_bandwidth, "6.25MB/s", 6.25e6),
        (parse_bandwidth, "1MiB/s", 2**20),
        (parse_bandwidth, 1e9, 1e9),
        (parse_seconds, "20ms", 0.02),
        (parse_seconds, "1.5s", 1.5),
        (parse_seconds, "400 us", 4e-4),
        (parse_seconds, "400 µs", 4e-4),
        (parse_seconds, 0, 0.0),
        (parse_count, "1e9", 10**9),
        (parse_count, "2G", 2 * 10**9),
        (parse_count, "300M", 300_000_000),
        (parse_count, "0.3 GMACs", 300_000_000),
    ],
)
def test_reads(parse: Callable[[Quantity], float], text: Quantity, expected: float) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    ("quantity", "says"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("nan", "does not begin with a number"),
        ("inf", "does not begin with a number"),
        (math.nan, "not a finite number"),
        (math.inf, "not a finite number"),
        ("1e400", "not a finite number"),
        (-1, "is negative"),
        ("-3", "is negative"),
        ("3 parsecs", "unknown unit"),
        ("1e-999999999 parsecs", "unknown unit"),
        ("1e30", "too large"),
        (True, "not a quantity"),
        (None, "not a quantity"),
        ([1], "not a quantity"),
    ],
)
def test_refuses(parse: Callable[[Quantity], float], quantity: Quantity, says: str) -> None:
    with pytest.raises(BudgetError, match=says) as caught:
        parse(quantity)
    assert caught.value.found is not None and caught.value.allowed is not None


def test_an_unknown_unit_lists_the_known() -> None:
    with pytest.raises(BudgetError, match=r"memory has an unknown unit[^$]*found: +'2 Gb'[^$]*MB, GB[^$]*GiB"):
        parse_bytes("2 Gb", "memory")


def test_a_link_of_no_bandwidth_is_refused() -> None:
    with pytest.raises(BudgetError, match="more than zero"):
        parse_bandwidth(0)


def test_a_tiny_exponent_is_zero_and_fast() -> None:
    assert parse_bytes("1e-999999999 TB") == 0


@given(st.integers(0, 10**18))
def test_formatted_bytes_are_read_back_within_half_a_percent(count: int) -> None:
    text = units.format_bytes(count)
    assert parse_bytes(text) == pytest.approx(count, rel=0.0051, abs=0.5)
    assert len(text.split()[0]) <= 4 or count >= 10**15


@given(st.integers(0, 10**18))
def test_formatted_counts_are_read_back_within_half_a_percent(count: int) -> None:
    assert parse_count(units.format_macs(count)) == pytest.approx(count, rel=0.0051)


@given(st.floats(1e-8, 1e5))
def test_formatted_seconds_are_read_back_within_half_a_percent(seconds: float) -> None:
    assert parse_seconds(units.format_seconds(seconds)) == pytest.approx(seconds, rel=0.0051)


@given(st.text() | st.floats() | st.integers(), st.sampled_from(PARSERS))
def test_whatever_is_given_is_read_or_refused(quantity: Quantity, parse: Callable[[Quantity], float]) -> None:
    with contextlib.suppress(FxsplitError):
        assert 0 <= parse(quantity) <= units.LARGEST
