"""Exact sums of floors, so that counting never walks the tiles it counts."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """Return ⌈numerator / denominator⌉ for a positive denominator."""
    return -(-numerator // denominator)


def floor_sum(count: int, slope: int, intercept: int, divisor: int) -> int:
    """Return Σ ⌊(slope·i + intercept) / divisor⌋ over i = 0 … count-1, exactly.

    The sum is reduced as in Euclid's algorithm, so its cost grows with the logarithm of the arguments.

    Parameters
    ----------
    count
        Number of terms, at least 0.
    slope, intercept
        Any integers.
    divisor
        A positive integer.
    """
    total = 0
    while count > 0:
        total += (slope // divisor) * (count * (count - 1) // 2) + (intercept // divisor) * count
        slope %= divisor
        intercept %= divisor
        last = slope * count + intercept
        if last < divisor:
            break
        # Count the lattice points under the line by columns instead of by rows.
        count, intercept = divmod(last, divisor)
        slope, divisor = divisor, slope
    return total


def clamped_floor_sum(start: int, stop: int, slope: int, intercept: int, low: int, high: int, divisor: int) -> int:
    """Return Σ ⌊clamp(slope·i + intercept, low, high) / divisor⌋ over i = start … stop-1.

    Parameters
    ----------
    start, stop
        The range of i; empty if ``stop <= start``.
    slope
        A positive integer.
    intercept
        Any integer.
    low, high
        The clamp, with ``low <= high``.
    divisor
        A positive integer.
    """
    if stop <= start:
        return 0
    first_above_low = min(max(ceil_div(low - intercept, slope), start), stop)
    first_at_high = min(max(ceil_div(high - intercept, slope), first_above_low), stop)
    inside = floor_sum(first_at_high - first_above_low, slope, slope * first_above_low + intercept, divisor)
    return (first_above_low - start) * (low // divisor) + inside + (stop - first_at_high) * (high // divisor)
