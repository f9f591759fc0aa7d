"""Compiled loops of fused multiply-adds, and the kernels' exponential and logarithm, each exact to the bit."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

EXP2_COEFFICIENTS = tuple(
    np.float32(float.fromhex(text))
    for text in (
        "0x1p0",
        "0x1.62e43p-1",
        "0x1.ebfbdcp-3",
        "0x1.c6aee8p-5",
        "0x1.3b2d4cp-7",
        "0x1.5f3e54p-10",
        "0x1.41fbbcp-13",
    )
)
"""2^f for |f| ≤ ½, lowest power first; 0.95 units in the last place."""

LOG2_COEFFICIENTS = tuple(
    np.float32(float.fromhex(text))
    for text in (
        "0x1.715476p+0",
        "-0x1.71547p-1",
        "0x1.ec73d4p-2",
        "-0x1.715c9cp-2",
        "0x1.26d41p-2",
        "-0x1.e94f12p-3",
        "0x1.b9b11ep-3",
        "-0x1.a8cc5cp-3",
        "0x1.025a2p-3",
    )
)
"""log₂(1 + f) / f for 1 + f in [√½, √2), lowest power first; Chebyshev fit, error 2e-8 absolute."""

ROUND_TO_INTEGER = np.float32(12582912.0)  # 1.5 · 2²³: adding it leaves the integer in the low bits
SQRT_HALF_BITS = 0x3F3504F3


@intrinsic
def fma32(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a · b + c with one rounding."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def bits_of(_context: Any, value: Any) -> Any:
    """Return the bits of a float32 as int32."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def float_of(_context: Any, value: Any) -> Any:
    """Return the float32 with the bits of an int32."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


C = EXP2_COEFFICIENTS
L = LOG2_COEFFICIENTS
EMPTY, ZERO, INFINITY = np.float32(-126.0), np.float32(0.0), np.float32(np.inf)
OVERFLOW, ONE = np.float32(128.0), np.float32(1.0)


@numba.vectorize(["float32(float32)"], cache=True)
def exp2(x: Any) -> Any:
    """Return 2^x by Cody–Waite reduction and a polynomial; 0 below −126, Inf from 128 on, NaN of NaN."""
    t = x + ROUND_TO_INTEGER
    f = x - (t - ROUND_TO_INTEGER)
    p = fma32(C[6], f, C[5])
    p = fma32(p, f, C[4])
    p = fma32(p, f, C[3])
    p = fma32(p, f, C[2])
    p = fma32(p, f, C[1])
    p = fma32(p, f, C[0])
    result = float_of(types.int32(bits_of(p) + types.int32(bits_of(t) << 23)))
    if x < EMPTY:
        result = ZERO
    if x >= OVERFLOW:
        result = INFINITY
    if x != x:  # noqa: PLR0124  (NaN)
        result = x
    return result


@numba.vectorize(["float32(float32)"], cache=True)
def log2(x: Any) -> Any:
    """Return log₂ x of a normal number, by exponent and a polynomial of the mantissa; Inf of Inf, NaN of NaN."""
    i = types.int32(bits_of(x) - types.int32(SQRT_HALF_BITS))
    exponent = types.int32(i >> 23)
    mantissa = float_of(types.int32((i & types.int32(0x007FFFFF)) + types.int32(SQRT_HALF_BITS)))
    f = mantissa - ONE
    p = fma32(L[8], f, L[7])
    p = fma32(p, f, L[6])
    p = fma32(p, f, L[5])
    p = fma32(p, f, L[4])
    p = fma32(p, f, L[3])
    p = fma32(p, f, L[2])
    p = fma32(p, f, L[1])
    p = fma32(p, f, L[0])
    result = fma32(f, p, types.float32(exponent))
    if not x < INFINITY:  # Inf and NaN
        result = x
    return result


@numba.vectorize(["float32(float32, float32, float32)"], cache=True)
def fused_multiply_add(a: Any, b: Any, c: Any) -> Any:
    """Return a · b + c with one rounding."""
    return fma32(a, b, c)


@numba.njit(parallel=True, cache=True)
def products(total: Any, left: Any, left_of: Any, right: Any, right_of: Any) -> None:
    """Add left[left_of[i]] right[right_of[i]] to total[i], ascending along the contracted axis."""
    rows = total.shape[1]
    for task in numba.prange(total.shape[0] * rows):
        matrix, row = task // rows, task % rows
        sums, weights, operand = total[matrix, row], left[left_of[matrix], row], right[right_of[matrix]]
        for k in range(weights.shape[0]):
            weight = weights[k]
            for column in range(sums.shape[0]):
                sums[column] = fma32(weight, operand[k, column], sums[column])


@numba.njit(parallel=True, cache=True)
def visible_products(total: Any, left: Any, left_of: Any, right: Any, right_of: Any, seen: Any, seen_of: Any) -> None:
    """Do as :func:`products`, leaving out the (row, contracted) elements that are not seen."""
    rows = total.shape[1]
    for task in numba.prange(total.shape[0] * rows):
        matrix, row = task // rows, task % rows
        sums, weights, operand = total[matrix, row], left[left_of[matrix], row], right[right_of[matrix]]
        visible = seen[seen_of[matrix], row]
        for k in range(weights.shape[0]):
            if visible[k]:
                weight = weights[k]
                for column in range(sums.shape[0]):
                    sums[column] = fma32(weight, operand[k, column], sums[column])
