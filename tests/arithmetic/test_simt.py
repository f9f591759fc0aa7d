from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import simattn
from simattn.arithmetic import simt_loops
from simattn.arithmetic.simt import ROW_SUM_LANES, SIMT
from simattn.testing import assert_same_bits

# Overflow and NaN are results here, as they are in a kernel.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

single = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_float32(value: Fraction) -> np.float32:
    """Round an exact value to the nearest float32, ties to even."""
    if value == 0:
        return np.float32(0)
    exponent = max(math.floor(math.log2(abs(value))) if abs(value) < 2**1000 else 1000, -126)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    rounded = round(value / unit) * unit  # Python rounds halves to even
    return np.float32(np.inf if rounded > 0 else -np.inf) if abs(rounded) >= 2**128 else np.float32(float(rounded))


@settings(max_examples=2000, deadline=None)
@given(single, single, single)
@example(1.0000001192092896, 1.0000001192092896, -1.0)
@example(1e-30, 1e-15, 0.0)
@example(-1e-30, 1e-30, 0.0)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    result = simt_loops.fused_multiply_add(np.float32(a), np.float32(b), np.float32(c))
    expected = nearest_float32(exact)
    assert result == expected or (np.isinf(result) and np.isinf(expected) and (result > 0) == (expected > 0))


def test_exp2_is_within_a_unit_in_the_last_place_and_saturates() -> None:
    x = np.linspace(-126, 127.99, 400_001, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    result = simt_loops.exp2(x)
    assert np.isfinite(result).all()
    assert (np.abs(result - exact) / np.spacing(exact.astype(np.float32))).max() < 0.96
    edges = np.array([-np.inf, -126.00001, -126.0, 0.0, -0.0, 128.0, np.inf], np.float32)
    assert_same_bits(simt_loops.exp2(edges), np.array([0, 0, 2.0**-126, 1, 1, np.inf, np.inf], np.float32))
    with np.errstate(invalid="ignore"):
        assert np.isnan(simt_loops.exp2(np.float32(np.nan)))


def test_log2_is_exact_at_powers_of_two_and_close_between() -> None:
    powers = np.exp2(np.arange(-20, 60)).astype(np.float32)
    assert_same_bits(simt_loops.log2(powers), np.arange(-20, 60).astype(np.float32))
    x = np.exp2(np.linspace(0, 30, 200_001)).astype(np.float32)
    error = np.abs(simt_loops.log2(x) - np.log2(x.astype(np.float64)))
    assert error.max() <= 0.51 * np.spacing(np.float32(30)) + 4e-8
    assert simt_loops.log2(np.float32(np.inf)) == np.inf


def test_row_sum_adds_lanes_pairwise() -> None:
    random = np.random.default_rng(0)
    row = random.standard_normal(64).astype(np.float32) ** 2
    lanes = [np.float32(0)] * ROW_SUM_LANES
    for column, value in enumerate(row):
        lanes[column % ROW_SUM_LANES] = lanes[column % ROW_SUM_LANES] + value
    for apart in (8, 4, 2, 1):
        lanes = [lanes[lane] + lanes[lane ^ apart] for lane in range(ROW_SUM_LANES)]
    assert len({float(lane) for lane in lanes}) == 1
    assert_same_bits(SIMT.row_sum(row.reshape(1, 1, 1, 1, 64)).reshape(()), np.asarray(lanes[0]))


def scalar_flash2(q: Any, k: Any, v: Any, seen: Any, scale: float, key_tile: int) -> tuple[Any, Any]:
    """Run one head row by row, operation by operation: what a thread of the kernel does."""
    fma = simt_loops.fused_multiply_add
    factor = np.float32(scale * math.log2(math.e))
    out, lse = np.zeros((len(q), v.shape[1]), np.float32), np.full(len(q), -np.inf, np.float32)
    for row in range(len(q)):
        row_max, row_sum = np.float32(-np.inf), np.float32(0)
        sums = np.zeros(v.shape[1], np.float32)
        for start in range(0, len(k), key_tile):
            keys = range(start, min(start + key_tile, len(k)))
            if not seen[:, keys.start : keys.stop].any():
                continue
            scores = np.full(len(keys), -np.inf, np.float32)
            for index, key in enumerate(keys):
                total = np.float32(0)
                for column in range(q.shape[1]):
                    total = fma(q[row, column], k[key, column], total)
                if seen[row, key]:
                    scores[index] = total * factor
            new_max = max(row_max, scores.max())
            base = np.float32(0) if new_max == -np.inf else new_max
            correction = simt_loops.exp2(row_max - base)
            weights = simt_loops.exp2(scores - base)
            lanes = [np.float32(0)] * ROW_SUM_LANES
            for index, weight in enumerate(weights):
                lanes[index % ROW_SUM_LANES] += weight
            for apart in (8, 4, 2, 1):
                lanes = [lanes[lane] + lanes[lane ^ apart] for lane in range(ROW_SUM_LANES)]
            row_sum, row_max = fma(row_sum, correction, lanes[0]), new_max
            sums = sums * correction
            for index, key in enumerate(keys):
                if seen[row, key]:
                    sums = fma(weights[index], v[key], sums)
        if row_sum > 0:
            out[row] = sums / row_sum
            lse[row] = (row_max + simt_loops.log2(row_sum)) * np.float32(math.log(2))
    return out, lse


@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window": (4, 1)}, {"causal": True, "window": (3, None)}], ids=str
)
@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 21), (13, 7), (1, 1)])
def test_flash2_returns_the_bits_of_its_operations_one_by_one(mask: Any, q_len: int, kv_len: int) -> None:
    random = np.random.default_rng(q_len)
    q, k, v = (
        random.standard_normal((1, length, 1, columns)).astype(np.float32)
        for length, columns in ((q_len, 8), (kv_len, 8), (kv_len, 16))
    )
    run = simattn.run("flash2", q, k, v, arithmetic="simt", tiles=(13, 5), **mask)
    expected = scalar_flash2(
        q[0, :, 0], k[0, :, 0], v[0, :, 0], run.problem.visible_elements(), run.problem.scale, key_tile=5
    )
    assert_same_bits(run.out[0, :, 0], expected[0])
    assert_same_bits(run.lse[0, 0], expected[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.sampled_from([None, (3, 2), (20, 0)]))
def test_bits_do_not_depend_on_the_query_tile(
    q_len: int, kv_len: int, query_tile: int, window: tuple[int, int] | None
) -> None:
    """A row's operations depend on the key tiles it sees; a tile it does not see changes no bit of it."""
    random = np.random.default_rng(q_len)
    q, k, v = (random.standard_normal((1, length, 2, 16)).astype(np.float32) for length in (q_len, kv_len, kv_len))
    one, other = (
        simattn.run("flash2", q, k, v, arithmetic="simt", tiles=(tile, 16), window=window) for tile in (query_tile, 64)
    )
    assert_same_bits(one.out, other.out)
    assert_same_bits(one.lse, other.lse)


def test_simt_is_refused_where_no_order_is_fixed() -> None:
    ones = np.ones((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match="arithmetic='simt': standard forward fixes no order"):
        simattn.run("standard", ones, ones, ones, arithmetic="simt")
    with pytest.raises(ValueError, match="arithmetic='simt': flash2 backward fixes no order"):
        simattn.run_backward("flash2", ones, ones, ones, ones, arithmetic="simt")
