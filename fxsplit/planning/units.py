"""Quantities as people write them: '2GiB', '50Mbit/s', '20ms', '300M', and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real

from fxsplit.errors import BudgetError

Quantity = int | float | str
"""A number in the base unit, or a string with a unit."""

LARGEST = 2**63 - 1
"""Nothing above this is accepted, so that every amount fits a 64-bit integer."""

_NUMBER = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(.*)", re.DOTALL)
_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

# One tuple a unit list: prefix by prefix, so that error messages list them in rising order.
_BYTES: dict[str, Decimal] = {f"{p}B": Decimal(factor) for p, factor in {**_DECIMAL, **_BINARY}.items()}
_BANDWIDTH: dict[str, Decimal] = {
    **{f"{unit}/s": factor for unit, factor in _BYTES.items()},
    **{f"{p}bit/s": Decimal(factor) / 8 for p, factor in {**_DECIMAL, **_BINARY}.items()},
    **{f"{p}bps": Decimal(factor) / 8 for p, factor in _DECIMAL.items()},
}
_SECONDS: dict[str, Decimal] = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),  # micro sign
    "μs": Decimal("1e-6"),  # the Greek letter: it looks the same and is typed as often
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
}
_COUNT: dict[str, Decimal] = {
    f"{p}{suffix}": Decimal(factor) for suffix in ("", "MACs") for p, factor in _DECIMAL.items()
}


def parse_bytes(quantity: Quantity, name: str = "bytes") -> int:
    """Bytes of `quantity`: a number is bytes, a string may carry B, kB, MB, GB, TB, KiB, MiB, GiB or TiB.

    Fractions of a byte are dropped. `name` is what error messages call the quantity.

    Raises:
        BudgetError: not a number, an unknown unit, negative, not finite, or beyond 64 bits.

    >>> parse_bytes("2GiB"), parse_bytes("512 KiB"), parse_bytes(8e6)
    (2147483648, 524288, 8000000)
    """
    return int(_amount(quantity, name, _BYTES))


def parse_bandwidth(quantity: Quantity, name: str = "bandwidth") -> float:
    """Bytes per second of `quantity`: a number is bytes/s, a string may count bits ('bit/s', 'bps').

    Raises:
        BudgetError: as `parse_bytes`, and for zero, over which nothing would ever arrive.

    >>> parse_bandwidth("50Mbit/s"), parse_bandwidth("6.25MB/s")
    (6250000.0, 6250000.0)
    """
    amount = float(_amount(quantity, name, _BANDWIDTH))
    if amount == 0.0:
        raise BudgetError(f"{name} must be more than zero", found=quantity, allowed="more than 0 bytes/s")
    return amount


def parse_seconds(quantity: Quantity, name: str = "seconds") -> float:
    """Seconds of `quantity`: a number is seconds, a string may carry ns, us, ms, s, min or h.

    Raises:
        BudgetError: as `parse_bytes`.

    >>> parse_seconds("20ms"), parse_seconds("1.5s"), parse_seconds("400 us")
    (0.02, 1.5, 0.0004)
    """
    return float(_amount(quantity, name, _SECONDS))


def parse_count(quantity: Quantity, name: str = "MACs") -> int:
    """A count such as MACs: a number, or a string that may carry k, M, G or T, with or without 'MACs'.

    Raises:
        BudgetError: as `parse_bytes`.

    >>> parse_count("1e9"), parse_count("2G"), parse_count("300 MMACs")
    (1000000000, 2000000000, 300000000)
    """
    return int(_amount(quantity, name, _COUNT))


def format_bytes(count: float) -> str:
    """Bytes in decimal units, three significant digits.

    >>> format_bytes(19_267_584), format_bytes(512), format_bytes(999_999)
    ('19.3 MB', '512 B', '1.00 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit, factor in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if count < 999.5 * factor:  # beyond this, rounding to three digits would reach the next unit
            return f"{_three_digits(count / factor)} {unit}"
    return f"{_three_digits(count / 1e12)} TB"


def format_macs(count: float) -> str:
    """MACs with three significant digits in powers of ten; plain below a thousand.

    >>> format_macs(745_472_000), format_macs(120), format_macs(999_999)
    ('7.45e8', '120', '1.00e6')
    """
    if count < 1000:
        return f"{count:.0f}"
    mantissa, exponent = f"{count:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_seconds(seconds: float) -> str:
    """A time with three significant digits in ns, us, ms or s.

    >>> format_seconds(0.0123), format_seconds(1.5), format_seconds(0.0004), format_seconds(0)
    ('12.3 ms', '1.50 s', '400 us', '0 s')
    """
    if seconds == 0:
        return "0 s"
    for unit, factor in (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * factor:
            return f"{_three_digits(seconds / factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    """`value` with three significant digits and no exponent; whole numbers from 100 on."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _amount(quantity: object, name: str, units: Mapping[str, Decimal]) -> Decimal:
    """`quantity` in the base unit of `units`, checked; decimal, so that '0.1GB' is exactly what it says."""
    known = ", ".join(unit for unit in units if unit)
    if isinstance(quantity, str):
        number, factor = _split(quantity, name, units, known)
    elif isinstance(quantity, Real) and not isinstance(quantity, bool):
        number = str(int(quantity)) if isinstance(quantity, Integral) else repr(float(quantity))
        factor = Decimal(1)
    else:
        allowed = f"a number, or a string with a unit ({known})"
        raise BudgetError(f"{name} is not a quantity", found=repr(quantity), allowed=allowed)
    value = float(number)
    if math.isnan(value) or math.isinf(value):
        raise BudgetError(f"{name} is not a finite number", found=quantity, allowed="a finite number")
    if value < 0:
        raise BudgetError(f"{name} is negative", found=quantity, allowed="0 or more")
    # The float bound comes first: an exponent of a million must not reach the decimal arithmetic.
    if value > LARGEST or (amount := Decimal(number) * factor) > LARGEST:
        raise BudgetError(f"{name} is too large", found=quantity, allowed=f"at most {LARGEST:.3e}")
    return amount


def _split(text: str, name: str, units: Mapping[str, Decimal], known: str) -> tuple[str, Decimal]:
    """The number of `text` and the factor of its unit; no unit is the base unit."""
    if not text.strip():
        raise BudgetError(f"{name} is empty", found=repr(text), allowed=f"a number, with or without {known}")
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        allowed = f"a finite number, with or without {known}"
        raise BudgetError(f"{name} does not begin with a number", found=repr(text), allowed=allowed)
    number, unit = match.groups()
    if unit and unit not in units:
        raise BudgetError(f"{name} has an unknown unit", found=repr(text), allowed=known)
    return number, units[unit] if unit else Decimal(1)
