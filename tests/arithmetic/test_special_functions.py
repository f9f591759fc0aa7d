from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simattn.arithmetic import special_functions
from simattn.arithmetic.special_functions import FUNCTIONS, REDUCTIONS, Table, square, tables
from simattn.testing import assert_same_bits

# The definitions in Python integers

NAN, INFINITY = 0x7FFFFFFF, 0x7F800000


def truncated_square(r: int) -> int:
    """The sum of a square's partial products, those in the lowest 19 columns left out."""
    total = 0
    for i in range(r.bit_length()):
        for j in range(i, r.bit_length()):
            if r >> i & 1 and r >> j & 1:
                column = 2 * i if i == j else i + j + 1  # two equal products, one column further on
                # The rows of the array from the tenth on, and the diagonal from the eleventh, are whole.
                dropped = column < 19 and i < (10 if i == j else 9)
                total += 0 if dropped else 1 << column
    return total


def exponent_and_fraction(bits: int) -> tuple[int, int]:
    return (bits >> 23 & 0xFF) - 127, bits & 0x7FFFFF


def float_bits(negative: bool, exponent: int, fraction: int) -> int:
    return negative << 31 | exponent + 127 << 23 | fraction


def ex2_bits(bits: int, table: Table) -> int:
    exponent, fraction = exponent_and_fraction(bits)
    negative = bool(bits >> 31)
    if exponent == 128:
        return NAN if fraction else 0 if negative else INFINITY
    if exponent == -127:
        return float_bits(False, 0, 0)
    scaled = (1 << 23 | fraction) << (exponent + 127)  # in units of 2^-150
    magnitude, rest = scaled >> 127, scaled & (1 << 127) - 1
    if negative:
        if table.reduction == "complement":
            value = -magnitude - 1 if magnitude & 0x7FFFFF else -magnitude
        else:
            value = -magnitude - (1 if rest and table.reduction == "floor" else 0)
    else:
        value = magnitude
    integer, row, r = value >> 23, value >> 17 & 63, value & 0x1FFFF
    if integer > 127:
        return INFINITY
    if integer < -126:
        return 0
    c0, c1, c2 = table.rows[row].tolist()
    total = c0 * 2**32 + c1 * r * 2**19 + c2 * truncated_square(r) + table.bias
    return float_bits(False, integer, (total >> 34) & 0x7FFFFF)


def rcp_bits(bits: int, table: Table) -> int:
    exponent, fraction = exponent_and_fraction(bits)
    sign = bits & 1 << 31
    if exponent == 128:
        return NAN if fraction else sign
    if exponent == -127:
        return sign | INFINITY
    row, r = fraction >> 16, fraction & 0xFFFF
    c0, c1, c2 = table.rows[row].tolist()
    total = c0 * 2**30 - c1 * r * 2**17 + c2 * (truncated_square(2 * r) // 4) + table.bias
    result = -exponent if total >> 56 else -exponent - 1
    kept = total >> 33 if total >> 56 else total >> 32
    return sign if result < -126 else sign | float_bits(False, result, kept & 0x7FFFFF)


def lg2_bits(bits: int, table: Table) -> int:
    exponent, fraction = exponent_and_fraction(bits)
    if exponent == -127:
        return 1 << 31 | INFINITY
    if bits >> 31 or (exponent == 128 and fraction):
        return NAN
    if exponent == 128:
        return INFINITY
    if bits == 0x3F800000:
        return 0
    row, r = fraction >> 17, fraction & 0x1FFFF
    c0, c1, c2 = table.rows[row].tolist()
    total = abs(c0 * 2**30 + c1 * r * 2**18 - c2 * truncated_square(r) + table.bias + exponent * 2**56)
    total -= total % 2**20
    top = total.bit_length() - 1
    kept = total >> top - 23 if top >= 23 else total << 23 - top
    return float_bits(exponent < 0, top - 56, kept & 0x7FFFFF)


DEFINITIONS = {"ex2": ex2_bits, "rcp": rcp_bits, "lg2": lg2_bits}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def check(name: str, bits: Any, table: Table) -> None:
    inputs = np.array(bits, np.uint32).view(np.float32)
    found = FUNCTIONS[name](inputs, table=table).view(np.uint32)
    expected = [DEFINITIONS[name](one, table) for one in bits]
    assert found.tolist() == expected


def test_the_square_is_one_of_partial_products() -> None:
    random = np.random.default_rng(0)
    for r in [0, 1, 2, 511, 512, 1023, 0x1FFFF, *random.integers(0, 1 << 17, 300).tolist()]:
        assert square(r) == truncated_square(r)


@every_function
@given(bits=st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=50))
def test_any_bits(name: str, bits: list[int]) -> None:
    check(name, bits, tables()[name])


@every_function
@given(values=st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=50), reduction=st.sampled_from(REDUCTIONS))
def test_ordinary_numbers(name: str, values: list[float], reduction: str) -> None:
    stored = tables()[name]
    check(name, np.array(values, np.float32).view(np.uint32).tolist(), Table(stored.rows, stored.bias, reduction))


@every_function
def test_the_ends_of_every_binade(name: str) -> None:
    bits = [
        sign << 31 | field << 23 | fraction for sign in (0, 1) for field in range(256) for fraction in (0, 1, 0x7FFFFF)
    ]
    check(name, bits, tables()[name])


def test_errors_are_those_the_hardware_is_known_for() -> None:
    random = np.random.default_rng(1)
    x = random.uniform(-126, 128, 1 << 16).astype(np.float32)
    with np.errstate(all="ignore"):
        exact = np.exp2(x.astype(np.float64))
        assert np.abs(special_functions.ex2(x) / exact - 1).max() < 2.0**-22.4
        x = np.exp2(random.uniform(-100, 100, 1 << 16)).astype(np.float32)
        assert np.abs(special_functions.rcp(x) * x.astype(np.float64) - 1).max() < 2.0**-23
        exact = np.log2(x.astype(np.float64))
        error = np.abs(special_functions.lg2(x) - exact)
    assert (error <= np.maximum(2.0**-22, 2.0**-22 * np.abs(exact))).all()


def test_shapes_strides_and_places_for_results() -> None:
    values = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
    expected = special_functions.ex2(values)
    assert_same_bits(special_functions.ex2(values.T), expected.T)
    assert special_functions.ex2(np.float32(1)).shape == ()
    for out in (np.empty_like(values), np.empty((6, 4), np.float32).T, values):
        assert special_functions.ex2(values, out=out) is out
        assert_same_bits(out, expected)
