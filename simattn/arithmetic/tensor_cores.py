"""Products of matrices as tensor cores compute them: fused dot-adds, chained along the contracted axis.

One dot-add takes ``depth`` products and the sum so far. A product's exponent is the sum of its factors' exponents, not
renormalised; subnormal numbers have the exponent of the smallest normal one. Every term is truncated toward zero to a
multiple of 2^(highest exponent − fraction bits), the terms are added exactly, and the sum is rounded once. So the order
inside a dot-add does not matter, and the order of the dot-adds does.

Sources: Fasi et al. 2021 (PeerJ CS 7:e330), MMA-Sim (arXiv 2511.10909), Khattak & Mikaitis (arXiv 2512.07004);
``python -m cupy_kernels.prove_tensor_cores`` holds those of 16-bit inputs with sums in float32 against a GPU; the other
formats are as the sources say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

from simattn.arithmetic.simt_loops import bits_of, float_of

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class DotAdd:
    """How an instruction adds products.

    Attributes
    ----------
    least_exponent
        Exponent of the input format's smallest normal number.
    significand_bits
        Bits of an input's significand, the leading one included.
    depth
        Products in one dot-add.
    fraction_bits
        Bits that a term keeps below the highest exponent.
    kept_bits
        Fraction bits of the result, which is truncated toward zero.
    lowest_exponent
        Floor of the highest exponent.
    rounding
        "float32" truncates to float32, "float16" rounds to the nearest float16, ties to even.
    """

    least_exponent: int
    significand_bits: int
    depth: int = 16
    fraction_bits: int = 25
    kept_bits: int = 23
    lowest_exponent: int = -133
    rounding: Literal["float32", "float16"] = "float32"

    @property
    def loop_arguments(self) -> tuple[int, ...]:
        """The parameters as the loops take them."""
        return (
            self.depth,
            self.fraction_bits,
            self.kept_bits,
            self.lowest_exponent,
            self.significand_bits,
            int(self.rounding == "float16"),
        )


BFLOAT16 = DotAdd(least_exponent=-126, significand_bits=8)
FLOAT16 = DotAdd(least_exponent=-14, significand_bits=11)
TFLOAT32 = DotAdd(least_exponent=-126, significand_bits=11, depth=8)
FLOAT16_SUM = DotAdd(least_exponent=-14, significand_bits=11, lowest_exponent=-21, rounding="float16")
FLOAT8_E4M3 = DotAdd(least_exponent=-6, significand_bits=4, depth=32, fraction_bits=13, kept_bits=13)
FLOAT8_E5M2 = DotAdd(least_exponent=-14, significand_bits=3, depth=32, fraction_bits=13, kept_bits=13)

WGMMA = {
    "bfloat16": BFLOAT16,
    "float16": FLOAT16,
    "float8_e4m3fn": FLOAT8_E4M3,
    "float8_e5m2": FLOAT8_E5M2,
}
"""The dot-add of ``wgmma`` with sums in float32, by storage format."""

# Exponents as the loops see them. Sums of two keep apart: a hidden factor makes no term whatever the other is, a zero
# makes none unless the other is infinite or NaN, and of those every visible one is seen.
HIDDEN, ZERO, SPECIAL = -10000, -2000, 4000
NO_TERM = -1000
FAST_LOWEST, FAST_HIGHEST = -100, 120
"""Highest exponents for which float32 holds every product that is not truncated to zero, and the sum."""

ROWS = 8
"""Rows of a product that one task computes, so that they share the operand in a core's cache."""

ALL_OUTSIDE = 2

PARALLEL_FROM = 1 << 16
"""Multiplications from which a product is worth more than one thread."""

NAN_BITS = 0x7FFFFFFF


@intrinsic
def bits_of64(_context: Any, value: Any) -> Any:
    """Return the bits of a float64 as int64."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int64))

    return types.int64(types.float64), generate


@intrinsic
def float_of64(_context: Any, value: Any) -> Any:
    """Return the float64 with the bits of an int64."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate


def add_products(
    total: Values,
    left: Values,
    left_of: Values,
    right: Values,
    right_of: Values,
    unit: DotAdd,
    seen: Values | None = None,
    seen_of: Values | None = None,
) -> None:
    """Add left[left_of[i]] right[right_of[i]] to total[i], ``depth`` contracted elements at a time, ascending.

    Parameters
    ----------
    total
        Float32, shape (products, rows, columns), changed in place.
    left, left_of
        Matrices of shape (·, rows, contracted), float32 that hold numbers of the input format, and which of them each
        product has.
    right, right_of
        Matrices of shape (·, contracted, columns), and which of them each product has.
    unit
        The instruction.
    seen, seen_of
        Of shape (·, rows, contracted): False where an element of ``left`` takes no part in a sum, even if ``right``
        holds NaN or Inf there. Default: all take part.
    """
    contracted = left.shape[2]
    if not total.size or not contracted:
        return
    whole = -(-contracted // unit.depth) * unit.depth
    left_exponents = _exponents(left, unit.least_exponent)
    if seen is not None and seen_of is not None:
        # From here on one matrix for every pair of a matrix and what is seen of it.
        pairs, pair_of = np.unique(np.stack([left_of, seen_of]), axis=1, return_inverse=True)
        visible = seen[pairs[1]]
        left = np.where(visible, left[pairs[0]], np.float32(0))
        left_exponents = np.where(visible, left_exponents[pairs[0]], np.int16(HIDDEN))
        left_of = pair_of.reshape(-1)
    left, left_exponents = _padded(left, 2, whole, 0), _padded(left_exponents, 2, whole, ZERO)
    right = _padded(right, 1, whole, 0)
    right_exponents = _exponents(right, unit.least_exponent)
    loop = _products if total.size * contracted >= PARALLEL_FROM else _few_products
    loop(
        total,
        (left, _finite(left), left_exponents),
        left_of,
        (right, _finite(right), right_exponents),
        right_of,
        unit.loop_arguments,
    )


def _finite(values: Values) -> Values:
    """Return the values with 0 for Inf and NaN."""
    finite = np.isfinite(values)
    return values if finite.all() else np.where(finite, values, np.float32(0))


def _padded(array: Values, axis: int, size: int, fill: int) -> Values:
    """Return the array extended along an axis."""
    if array.shape[axis] == size:
        return array
    shape = list(array.shape)
    shape[axis] = size
    padded = np.full(shape, fill, array.dtype)
    padded[tuple(slice(length) for length in array.shape)] = array
    return padded


def _exponents(values: Values, least: int) -> Values:
    """Return the exponent of every number, as the loops see it."""
    exponents = np.empty(values.shape, np.int16)
    _exponent_loop(values.reshape(-1), least, exponents.reshape(-1))
    return exponents


@numba.njit(cache=True)
def _exponent(value: Any, least: Any) -> Any:
    bits = bits_of(value)
    exponent = max(types.int32((bits >> 23) & 255) - 127, least)
    if bits & 0x7FFFFFFF == 0:
        exponent = ZERO
    if exponent == 128:
        exponent = SPECIAL
    return types.int16(exponent)


@numba.njit(cache=True)
def _exponent_loop(values: Any, least: Any, exponents: Any) -> None:
    for index in range(values.size):
        exponents[index] = _exponent(values[index], least)


@numba.njit(cache=True)
def _power(exponent: Any) -> Any:
    """Return 2^exponent, a normal float32."""
    return float_of(types.int32(types.int32(exponent + 127) << 23))


@numba.njit(cache=True)
def _power64(exponent: Any) -> Any:
    """Return 2^exponent, a normal float64."""
    return float_of64((types.int64(exponent) + 1023) << 52)


@numba.njit(cache=True, inline="always")
def _higher(a: Any, b: Any, c: Any) -> Any:
    """Return max(a + b, c) of three int16."""
    added = types.int16(a + b)
    return added if added > c else c


# The rows are inlined there because inside a parallel loop LLVM knows that arrays do not overlap.
@numba.njit(parallel=True, cache=True)
def _products(total: Any, left: Any, left_of: Any, right: Any, right_of: Any, unit: Any) -> None:
    """Compute as :func:`add_products` says; operands are their values, those with 0 for Inf and NaN, and exponents."""
    blocks = (total.shape[1] + ROWS - 1) // ROWS
    for task in numba.prange(total.shape[0] * blocks):
        matrix, first = task // blocks, task % blocks * ROWS
        _product_rows(total[matrix], left, left_of[matrix], right, right_of[matrix], first, unit)


@numba.njit(cache=True)
def _few_products(total: Any, left: Any, left_of: Any, right: Any, right_of: Any, unit: Any) -> None:
    """Do as :func:`_products` without waking other threads."""
    for matrix in range(total.shape[0]):
        for first in range(0, total.shape[1], ROWS):
            _product_rows(total[matrix], left, left_of[matrix], right, right_of[matrix], first, unit)


@numba.njit(cache=True, inline="always")
def _product_rows(total: Any, left: Any, left_of: Any, right: Any, right_of: Any, first: Any, unit: Any) -> None:
    """Compute up to ROWS rows of a product from the first on."""
    (rows, columns), depth, contracted = total.shape, unit[0], left[0].shape[2]
    highest, terms = np.empty(columns, np.int16), np.empty(columns, np.int32)
    scales = np.empty(columns, np.float32)
    for start in range(0, contracted, depth):
        stop = start + depth
        values, finite, exponents = (
            right[0][right_of, start:stop],
            right[1][right_of, start:stop],
            right[2][right_of, start:stop],
        )
        for row in range(first, min(first + ROWS, rows)):
            sums = total[row]
            offsets = left[2][left_of, row, start:stop]
            if _all_hidden(offsets):
                for column in range(columns):
                    sums[column] += types.float32(0)  # of zeros, +0
                continue
            weights = left[1][left_of, row, start:stop]
            outside = _add_dots(sums, weights, offsets, finite, exponents, highest, terms, scales, unit)
            if outside:
                for column in range(columns):
                    if outside == ALL_OUTSIDE or _is_outside(highest[column], unit):
                        sums[column] = _dot_add(
                            left[0][left_of, row, start:stop],
                            offsets,
                            values[:, column],
                            exponents[:, column],
                            sums[column],
                            unit,
                        )


@numba.njit(cache=True)
def _all_hidden(offsets: Any) -> Any:
    hidden = True
    for offset in offsets:
        hidden &= offset == HIDDEN
    return hidden


@numba.njit(cache=True, inline="always")
def _is_outside(highest: Any, unit: Any) -> Any:
    """Say whether terms of this highest exponent are not for float32."""
    e = types.int32(highest)
    return e >= NO_TERM and not max(FAST_LOWEST, unit[3]) <= e <= FAST_HIGHEST


@numba.njit(cache=True, inline="always")
def _add_dots(
    sums: Any,
    weights: Any,
    offsets: Any,
    operand: Any,
    exponents: Any,
    highest: Any,
    terms: Any,
    scales: Any,
    unit: Any,
) -> Any:
    """Add a dot product to the sums whose highest exponent is in range; return 0, 1 if some are not, or ALL_OUTSIDE.

    In units of 2^(highest exponent − fraction bits) a term is an integer after truncation, which is what converting a
    float32 to int32 does; the sum of the products fits in an int32, with the sum so far in a float64.
    """
    depth, fraction_bits, kept_bits, lowest_exponent, significand_bits, to_float16 = unit
    columns = sums.shape[0]
    largest, shift = (1 << significand_bits) - 1, fraction_bits + 2 - 2 * significand_bits
    largest_sum = depth * largest * largest << shift if shift > 0 else depth << (fraction_bits + 2)
    if to_float16 or largest_sum >= 1 << 31:
        return types.int32(ALL_OUTSIDE)
    for column in range(columns):
        highest[column] = _exponent(sums[column], -126)
    for k in range(0, depth, 4):
        a, b, c, d = offsets[k], offsets[k + 1], offsets[k + 2], offsets[k + 3]
        for column in range(columns):
            e = _higher(a, exponents[k, column], highest[column])
            e = _higher(b, exponents[k + 1, column], e)
            e = _higher(c, exponents[k + 2, column], e)
            highest[column] = _higher(d, exponents[k + 3, column], e)
    outside, least = types.int32(0), max(FAST_LOWEST, types.int32(lowest_exponent))
    for column in range(columns):
        e = types.int32(highest[column])
        clamped = min(max(e, least), FAST_HIGHEST)
        outside |= types.int32(e != clamped) & types.int32(e >= NO_TERM)
        scales[column] = _power(fraction_bits - clamped)
        terms[column] = 0
    for k in range(0, depth, 4):
        a, b, c, d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for column in range(columns):
            scale = scales[column]
            terms[column] += (
                types.int32(a * operand[k, column] * scale)
                + types.int32(b * operand[k + 1, column] * scale)
                + types.int32(c * operand[k + 2, column] * scale)
                + types.int32(d * operand[k + 3, column] * scale)
            )
    dropped = types.int64(-1) << (52 - kept_bits)
    for column in range(columns):
        scale, before = scales[column], sums[column]
        exact = types.float64(terms[column]) + types.float64(types.int32(before * scale))
        kept = float_of64(bits_of64(exact) & dropped)
        e = types.int32(highest[column])
        inside = e < NO_TERM or least <= e <= FAST_HIGHEST
        sums[column] = types.float32(kept / types.float64(scale)) if inside else before
    return outside


@numba.njit(cache=True)
def _dot_add(a: Any, a_exponents: Any, b: Any, b_exponents: Any, c: Any, unit: Any) -> Any:
    """Compute one sum for any operands."""
    _, fraction_bits, kept_bits, lowest_exponent, significand_bits, to_float16 = unit
    special = types.float32(0)  # the sum of the infinite terms
    least_sum_exponent = -14 if to_float16 else -126
    highest = types.int32(_exponent(c, least_sum_exponent))
    for k in range(a.size):
        e = types.int32(a_exponents[k]) + types.int32(b_exponents[k])
        highest = max(highest, e)
        if e > SPECIAL // 4:
            special += a[k] * b[k]
    if not np.isfinite(c):
        special += c
    if special != 0:  # Inf or NaN
        return special if special == special else float_of(types.int32(NAN_BITS))  # noqa: PLR0124
    if highest < NO_TERM:
        return types.float32(0)
    highest = max(highest, types.int32(lowest_exponent))
    last = highest - fraction_bits
    # Significands are integers in units of the last bit, a term's is shifted to units of 2^last.
    fraction, total = significand_bits - 1, types.int64(0)
    for k in range(a.size):
        e = types.int32(a_exponents[k]) + types.int32(b_exponents[k])
        if e > NO_TERM:
            product = _significand(a[k], a_exponents[k], fraction) * _significand(b[k], b_exponents[k], fraction)
            total += _shifted(product, e - 2 * fraction - last)
    e = types.int32(_exponent(c, least_sum_exponent))
    if e > NO_TERM:
        total += _shifted(_significand(c, e, 23), e - 23 - last)
    if to_float16:
        return _nearest_float16(total, last)
    magnitude = abs(total)
    width = _width(magnitude)
    # Bits below the last that is kept: of a normal number, and of float32's smallest one.
    spare = max(width - 1 - kept_bits, -149 - last, 0)
    magnitude = magnitude >> spare << spare if spare < 63 else types.int64(0)
    result = types.float32(types.float64(magnitude) * _power64(last))
    return -result if total < 0 and magnitude else result


@numba.njit(cache=True)
def _width(magnitude: Any) -> Any:
    """Return how many bits a number below 2^53 has."""
    return (bits_of64(types.float64(magnitude)) >> 52) - 1022 if magnitude else types.int64(0)


@numba.njit(cache=True)
def _significand(value: Any, exponent: Any, fraction: Any) -> Any:
    return types.int64(types.float64(value) * _power64(types.int64(fraction) - types.int64(exponent)))


@numba.njit(cache=True)
def _shifted(value: Any, places: Any) -> Any:
    """Return value · 2^places, truncated toward zero."""
    if places >= 0:
        return value << places
    if places < -62:
        return types.int64(0)
    return value >> -places if value >= 0 else -(-value >> -places)


@numba.njit(cache=True)
def _nearest_float16(total: Any, last: Any) -> Any:
    """Return total · 2^last rounded to the nearest float16, ties to even."""
    magnitude = abs(total)
    width = _width(magnitude)
    spare = max(width - 11, -24 - last, 0)
    if spare > 62:
        return types.float32(0)
    half, rest = (types.int64(1) << spare) >> 1, magnitude & ((types.int64(1) << spare) - 1)
    kept = magnitude >> spare
    if spare and (rest > half or (rest == half and kept & 1)):
        kept += 1
    result = types.float64(kept) * _power64(last + spare)
    if result >= 65536:
        result = np.inf
    return types.float32(-result if total < 0 and kept else result)
