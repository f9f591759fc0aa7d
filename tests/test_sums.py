"""Floor sums against plain loops."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from simattn.sums import ceil_div, clamped_floor_sum, floor_sum

EXAMPLES = settings.default.max_examples


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**20))
def test_ceil_div_is_the_smallest_multiple_not_below(numerator, denominator):
    quotient = ceil_div(numerator, denominator)
    assert (quotient - 1) * denominator < numerator <= quotient * denominator


@settings(max_examples=5 * EXAMPLES)
@given(st.integers(0, 60), st.integers(-50, 50), st.integers(-200, 200), st.integers(1, 40))
@example(count=0, slope=3, intercept=-1, divisor=7)
@example(count=9, slope=-3, intercept=-1, divisor=7)
def test_floor_sum_equals_the_loop(count, slope, intercept, divisor):
    assert floor_sum(count, slope, intercept, divisor) == sum(
        (slope * index + intercept) // divisor for index in range(count)
    )


@settings(max_examples=5 * EXAMPLES)
@given(
    st.integers(-20, 40),
    st.integers(-20, 60),
    st.integers(1, 30),
    st.integers(-300, 300),
    st.tuples(st.integers(-50, 200), st.integers(-50, 200)).map(sorted),
    st.integers(1, 30),
)
def test_clamped_floor_sum_equals_the_loop(start, stop, slope, intercept, clamp, divisor):
    low, high = clamp
    assert clamped_floor_sum(start, stop, slope, intercept, low, high, divisor) == sum(
        min(max(slope * index + intercept, low), high) // divisor for index in range(start, stop)
    )


@given(st.integers(0, 10**15), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 10**9))
def test_floor_sum_is_additive_at_any_size(count, slope, intercept, divisor):
    half = count // 2
    rest = floor_sum(count - half, slope, slope * half + intercept, divisor)
    assert floor_sum(count, slope, intercept, divisor) == floor_sum(half, slope, intercept, divisor) + rest


def test_floor_sum_is_exact_beyond_machine_integers():
    count = 10**30
    assert floor_sum(count, 6, 5, 3) == 2 * (count * (count - 1) // 2) + count
