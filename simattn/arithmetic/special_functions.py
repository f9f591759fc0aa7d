"""What a GPU's special-function unit returns for ``ex2.approx.ftz``, ``rcp.approx.ftz`` and ``lg2.approx.ftz``.

The unit interpolates: the leading bits of a fraction choose a row (c0, c1, c2) of a table, the others are r, and the
result is c0 ± c1 · r ± c2 · r² in fixed point, the square without its least significant partial products. This
structure is Oberman & Siu's (ARITH 2005), its widths and the truncated square are those that ptx-math found
(github.com/bcarlet/ptx-math). The coefficients in ``special_functions.json`` were fitted to the results of a GPU by
``python -m cupy_kernels.derive_special_functions``, which also compares every one of the 2³² inputs of each function.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types

from simattn.arithmetic.simt_loops import bits_of, float_of

Values = npt.NDArray[Any]
TABLE_FILE = Path(__file__).with_name("special_functions.json")


PARALLEL_FROM = 1 << 14
"""Values for which more than one thread is worth waking."""


@dataclass(frozen=True)
class Structure:
    """Widths of an interpolation in fixed point.

    Attributes
    ----------
    row_bits
        Leading fraction bits that choose a row.
    shifts
        Places by which c0, c1 · r and c2 · r² are shifted to the unit of the sum.
    signs
        Signs of the three terms.
    weight
        Binary logarithm of what stands for 1 in the sum.
    whole_bias
        Whole units of c0 in the constant that is added for rounding. Results determine c0 and this constant together;
        this part of it is a convention.
    square_shift
        Places by which r is shifted left before it is squared; its square is shifted back.
    """

    row_bits: int
    shifts: tuple[int, int, int]
    signs: tuple[int, int, int]
    weight: int
    whole_bias: int
    square_shift: int = 0

    @property
    def rest_bits(self) -> int:
        """Bits of r."""
        return 23 - self.row_bits


STRUCTURES = {
    "ex2": Structure(row_bits=6, shifts=(32, 19, 0), signs=(1, 1, 1), weight=57, whole_bias=1),
    "rcp": Structure(row_bits=7, shifts=(30, 17, 0), signs=(1, -1, 1), weight=56, whole_bias=3, square_shift=1),
    "lg2": Structure(row_bits=6, shifts=(30, 18, 0), signs=(1, 1, -1), weight=56, whole_bias=4),
}
LG2_DROPPED_BITS = 20
"""Bits of the sum of lg2 that are cut off before it is normalised."""

REDUCTIONS = ("complement", "negative", "floor")
"""How ex2 makes the integer and the fraction of a negative number from the magnitude, truncated to 23 fraction bits.

"complement" inverts its bits unless the fraction is 0, "negative" negates it, "floor" negates it after rounding the
magnitude up instead of truncating it.
"""


@dataclass(frozen=True, eq=False)
class Table:
    """Coefficients of one function.

    Attributes
    ----------
    rows
        int64, shape (2^row_bits, 3).
    bias
        Constant that is added, in the unit of the sum.
    reduction
        "complement", "negative" or "floor", of ex2 alone.
    """

    rows: Values
    bias: int
    reduction: str = REDUCTIONS[0]

    @property
    def constants(self) -> tuple[Values, int, int]:
        """What the loops take."""
        return self.rows, self.bias, REDUCTIONS.index(self.reduction)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Table:
        """Return the table of an entry of the file."""
        rows = np.array([[int(number, 16) for number in row.split()] for row in record["rows"]], np.int64)
        return cls(rows, int(record["bias"], 16), record.get("reduction", REDUCTIONS[0]))

    def record(self, name: str) -> dict[str, Any]:
        """Return the entry of the file."""
        found: dict[str, Any] = {"bias": f"{self.bias:x}"}
        if name == "ex2":
            found["reduction"] = self.reduction
        return {**found, "rows": [" ".join(f"{number:x}" for number in row) for row in self.rows.tolist()]}


@functools.cache
def tables() -> dict[str, Table]:
    """Return the tables of the file by function."""
    stored = json.loads(TABLE_FILE.read_text())
    return {name: Table.of_record(stored[name]) for name in STRUCTURES}


def ex2(values: Values, *, out: Values | None = None, table: Table | None = None) -> Values:
    """Return ``ex2.approx.ftz`` of float32 values: about 2^x."""
    return _applied((_few_ex2, _many_ex2), values, out, table or tables()["ex2"])


def rcp(values: Values, *, out: Values | None = None, table: Table | None = None) -> Values:
    """Return ``rcp.approx.ftz`` of float32 values: about 1 / x."""
    return _applied((_few_rcp, _many_rcp), values, out, table or tables()["rcp"])


def lg2(values: Values, *, out: Values | None = None, table: Table | None = None) -> Values:
    """Return ``lg2.approx.ftz`` of float32 values: about log₂ x."""
    return _applied((_few_lg2, _many_lg2), values, out, table or tables()["lg2"])


FUNCTIONS = {"ex2": ex2, "rcp": rcp, "lg2": lg2}


def _applied(loops: tuple[Any, Any], values: Values, out: Values | None, table: Table) -> Values:
    given = np.ascontiguousarray(values, np.float32)
    loop = loops[given.size >= PARALLEL_FROM]
    result = out if out is not None and out.flags.c_contiguous else np.empty_like(given)
    loop(given.reshape(-1), result.reshape(-1), *table.constants)
    if out is None:
        return result.reshape(np.shape(values))
    if out is not result:
        out[...] = result
    return out


SIGN, MAGNITUDE, FRACTION, HIDDEN_BIT = -(1 << 31), 0x7FFFFFFF, 0x7FFFFF, 0x800000
NAN, INFINITY, ONE = 0x7FFFFFFF, 0x7F800000, 0x3F800000

DROPPED_COLUMNS = 19
"""Columns of the partial products of a square that are left out."""


@numba.njit(cache=True, inline="always")
def square(r: Any) -> Any:
    """Return r² of a number of up to 17 bits, without the partial products in the lowest 19 columns."""
    dropped = types.int32(0)
    for bit in range(10):
        one = types.int32(r >> bit) & types.int32(1)
        dropped += one << (2 * bit)
        if bit < 9:
            low, high = (1 << (2 * bit + 2)) - 1, (1 << DROPPED_COLUMNS) - 1
            dropped += types.int32(types.int32(r) << (bit + 1)) & types.int32(high & ~low) & -one
    return types.int64(r) * types.int64(r) - types.int64(dropped)


@numba.njit(cache=True, inline="always")
def _ex2(bits: Any, rows: Any, bias: Any, reduction: Any) -> Any:
    magnitude = bits & MAGNITUDE
    exponent = (magnitude >> 23) - 127
    significand = types.int64(magnitude & FRACTION | HIDDEN_BIT)
    # Fixed point with 23 fraction bits; beyond 2^8 the result is known.
    places = min(max(exponent, -25), 8)
    fixed = significand << places if places >= 0 else significand >> -places
    if bits < 0:
        if reduction == 0:
            fixed = ~fixed if fixed & FRACTION else -fixed
        elif reduction == 1:
            fixed = -fixed
        else:
            fixed = -fixed if places >= 0 else -((significand + (1 << -places) - 1) >> -places)
    whole, fraction = fixed >> 23, fixed & FRACTION
    row, r = fraction >> 17, fraction & 0x1FFFF
    total = (rows[row, 0] << 32) + (rows[row, 1] * r << 19) + rows[row, 2] * square(r) + bias
    result = types.int32((total >> 34) & FRACTION) | types.int32((whole + 127) << 23)
    if whole > 127:
        result = types.int32(INFINITY)
    if whole < -126:
        result = types.int32(0)
    if exponent == -127:
        result = types.int32(ONE)
    if magnitude > INFINITY:
        result = types.int32(NAN)
    return result


@numba.njit(cache=True, inline="always")
def _rcp(bits: Any, rows: Any, bias: Any) -> Any:
    magnitude, sign = bits & MAGNITUDE, bits & types.int32(SIGN)
    exponent = (magnitude >> 23) - 127
    row, r = (magnitude >> 16) & 0x7F, types.int64(magnitude & 0xFFFF)
    total = (rows[row, 0] << 30) - (rows[row, 1] * r << 17) + rows[row, 2] * (square(r << 1) >> 2) + bias
    whole = types.int32(total >> 56)
    fraction = types.int32(total >> (33 - (1 - whole))) & FRACTION
    biased = 126 + whole - exponent
    result = types.int32(biased << 23) | fraction
    if biased <= 0:  # flushed, as is the reciprocal of Inf
        result = types.int32(0)
    if exponent == -127:
        result = types.int32(INFINITY)
    result |= sign
    if magnitude > INFINITY:
        result = types.int32(NAN)
    return result


@numba.njit(cache=True, inline="always")
def _lg2(bits: Any, rows: Any, bias: Any) -> Any:
    magnitude = bits & MAGNITUDE
    exponent = (magnitude >> 23) - 127
    if magnitude < HIDDEN_BIT:
        return types.int32(INFINITY | SIGN)
    if bits < 0 or magnitude > INFINITY:
        return types.int32(NAN)
    if magnitude == INFINITY:
        return types.int32(INFINITY)
    if magnitude == ONE:
        return types.int32(0)
    row, r = (magnitude >> 17) & 0x3F, types.int64(magnitude & 0x1FFFF)
    total = (rows[row, 0] << 30) + (rows[row, 1] * r << 18) - rows[row, 2] * square(r) + bias
    total = abs(total + (types.int64(exponent) << 56)) >> LG2_DROPPED_BITS
    width = 0
    while total >> width > 1:
        width += 1
    fraction = total << (23 - width) if width <= 23 else total >> (width - 23)
    result = types.int32(fraction & FRACTION) | types.int32((width + LG2_DROPPED_BITS - 56 + 127) << 23)
    return result | types.int32(SIGN) if exponent < 0 else result


@numba.njit(cache=True)
def _few_ex2(values: Any, out: Any, rows: Any, bias: Any, reduction: Any) -> None:
    for index in range(values.size):
        out[index] = float_of(types.int32(_ex2(bits_of(values[index]), rows, bias, reduction)))


@numba.njit(parallel=True, cache=True)
def _many_ex2(values: Any, out: Any, rows: Any, bias: Any, reduction: Any) -> None:
    for index in numba.prange(values.size):
        out[index] = float_of(types.int32(_ex2(bits_of(values[index]), rows, bias, reduction)))


@numba.njit(cache=True)
def _few_rcp(values: Any, out: Any, rows: Any, bias: Any, _reduction: Any) -> None:
    for index in range(values.size):
        out[index] = float_of(types.int32(_rcp(bits_of(values[index]), rows, bias)))


@numba.njit(parallel=True, cache=True)
def _many_rcp(values: Any, out: Any, rows: Any, bias: Any, _reduction: Any) -> None:
    for index in numba.prange(values.size):
        out[index] = float_of(types.int32(_rcp(bits_of(values[index]), rows, bias)))


@numba.njit(cache=True)
def _few_lg2(values: Any, out: Any, rows: Any, bias: Any, _reduction: Any) -> None:
    for index in range(values.size):
        out[index] = float_of(types.int32(_lg2(bits_of(values[index]), rows, bias)))


@numba.njit(parallel=True, cache=True)
def _many_lg2(values: Any, out: Any, rows: Any, bias: Any, _reduction: Any) -> None:
    for index in numba.prange(values.size):
        out[index] = float_of(types.int32(_lg2(bits_of(values[index]), rows, bias)))
