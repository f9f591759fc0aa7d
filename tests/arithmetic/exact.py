"""Fused operations in exact arithmetic, one at a time: the definitions that the compiled loops are held against."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from simattn.arithmetic.tensor_cores import BFLOAT16, DotAdd


def exponent_of(value: float, least: int) -> int:
    return max(math.frexp(value)[1] - 1, least)


def truncated(value: Fraction, unit: Fraction) -> Fraction:
    return (abs(value) // unit) * unit * (1 if value > 0 else -1)


def nearest(value: Fraction, unit: Fraction) -> Fraction:
    return round(value / unit) * unit  # Python rounds halves to even


def rounded(total: Fraction, unit: DotAdd, rounding: Any) -> float:
    """Round a sum to the result's format."""
    if total == 0:
        return 0.0
    exponent = math.frexp(abs(total.numerator) / total.denominator)[1] - 1
    while abs(total) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(total) < Fraction(2) ** exponent:
        exponent -= 1
    if unit.rounding == "float16":
        result, limit = rounding(total, Fraction(2) ** max(exponent - 10, -24)), 2**16
    else:
        result, limit = rounding(total, Fraction(2) ** max(exponent - unit.kept_bits, -149)), 2**128
    if abs(result) >= limit:
        return math.copysign(math.inf, result)
    return float(result)


def dot_add(
    a: list[float], b: list[float], c: float, unit: DotAdd, *, rounding: Any = None, renormalised: bool = False
) -> float:
    """Compute one fused dot-add; ``rounding`` and ``renormalised`` make it another one than the hardware's."""
    if not all(map(math.isfinite, [*a, *b, c])):
        special = [x * y for x, y in zip(a, b, strict=True) if not (math.isfinite(x) and math.isfinite(y))]
        return sum([*special, 0.0 if math.isfinite(c) else c])
    terms: list[tuple[int, Fraction]] = []
    for x, y in zip(a, b, strict=True):
        if x and y:
            product = Fraction(x) * Fraction(y)
            exponent = exponent_of(x, unit.least_exponent) + exponent_of(y, unit.least_exponent)
            terms.append((math.frexp(float(product))[1] - 1 if renormalised else exponent, product))
    if c:
        terms.append((exponent_of(c, -14 if unit.rounding == "float16" else -126), Fraction(c)))
    if not terms:
        return 0.0
    highest = max(unit.lowest_exponent, *(exponent for exponent, _ in terms))
    last = Fraction(2) ** (highest - unit.fraction_bits)
    total = sum((truncated(value, last) for _, value in terms), Fraction(0))
    return rounded(total, unit, rounding or (nearest if unit.rounding == "float16" else truncated))


def chain(a: Any, b: Any, c: Any, unit: DotAdd, seen: Any = None, **other: Any) -> Any:
    """Compute a b + c element by element, a dot-add after the other."""
    result = np.array(c, np.float32)
    for row, column in np.ndindex(*result.shape):
        for start in range(0, a.shape[1], unit.depth):
            places = [k for k in range(start, min(start + unit.depth, a.shape[1])) if seen is None or seen[row, k]]
            left, right = [float(a[row, k]) for k in places], [float(b[k, column]) for k in places]
            result[row, column] = dot_add(left, right, float(result[row, column]), unit, **other)
    return result


def fused_multiply_add(a: Any, b: Any, c: Any) -> Any:
    """Return a · b + c of float32 with one rounding, to nearest."""
    with np.errstate(all="ignore"):
        if not (np.isfinite(a) and np.isfinite(b)):
            return np.float32(a) * np.float32(b) + np.float32(c)
        if not np.isfinite(c):
            return np.float32(c)
        product = Fraction(float(a)) * Fraction(float(b))
        total = product + Fraction(float(c))
        if total == 0:
            return np.float32(0) if product else np.float32(a) * np.float32(b) + np.float32(c)
        result = rounded(total, BFLOAT16, nearest)
        return np.float32(result if result else math.copysign(0.0, total))
