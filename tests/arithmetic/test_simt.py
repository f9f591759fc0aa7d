from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import simattn
from simattn import machine
from simattn.algorithms import ALGORITHMS
from simattn.arithmetic import simt_loops
from simattn.arithmetic.formats import numpy_dtype
from simattn.arithmetic.simt import ROW_SUM_LANES, SIMT
from simattn.testing import (
    assert_same_bits,
    assert_within_error_budget,
    attention_cases,
    gradient_floors,
    low_precision_attention_backward,
    plan_options,
    reference_attention_backward,
    tiles_for,
)

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


# One operation after the other: what the threads of the kernels do. Rows are 1-D arrays in float32.

ZERO, ONE, LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)
ALL = slice(None)
LN2, LOG2_E = np.float32(math.log(2)), np.float32(math.log2(math.e))
fma: Any = simt_loops.fused_multiply_add


def chain(total: Any, weights: Any, operands: Any, seen: Any = None) -> Any:
    """Continue a chain of fused multiply-adds; with ``seen``, by the elements that are seen."""
    for index, (weight, operand) in enumerate(zip(weights, operands, strict=True)):
        if seen is None or seen[index]:
            total = fma(weight, operand, total)
    return total


def sum_of_lanes(lanes: Any) -> Any:
    """Add 16 lanes in a butterfly, which gives every lane the same sum."""
    for apart in (8, 4, 2, 1):
        lanes = [lanes[lane] + lanes[lane ^ apart] for lane in range(ROW_SUM_LANES)]
    return lanes[0]


def row_sum_of(row: Any) -> Any:
    lanes = [ZERO] * ROW_SUM_LANES
    for column, value in enumerate(row):
        lanes[column % ROW_SUM_LANES] = lanes[column % ROW_SUM_LANES] + value
    return sum_of_lanes(lanes)


def row_dot_of(a: Any, b: Any) -> Any:
    lanes = [ZERO] * ROW_SUM_LANES
    for column in range(len(a)):
        lanes[column % ROW_SUM_LANES] = fma(a[column], b[column], lanes[column % ROW_SUM_LANES])
    return sum_of_lanes(lanes)


def base_of(row_max: Any) -> Any:
    return ZERO if row_max == LOWEST else row_max


def divisor(row_sum: Any) -> Any:
    return ONE if row_sum == 0 else row_sum


def log_sum_exp_of(row_max: Any, row_sum: Any) -> Any:
    return LOWEST if row_sum == 0 else (row_max + simt_loops.log2(row_sum)) * LN2


def tiles_of(length: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


@dataclass
class Group:
    """One KV head and its query heads; arrays widened to float32.

    ``q``, ``dout`` and whatever belongs to query heads have the heads first, ``seen`` is (q_len, kv_len).
    """

    q: Any
    k: Any
    v: Any
    seen: Any
    scale: float
    stored: Any
    dout: Any = None

    def rows(self) -> Iterator[tuple[int, int]]:
        """Every query head and row."""
        for head in range(len(self.q)):
            for row in range(len(self.seen)):
                yield head, row

    def dots(self, head: int, row: int, keys: slice = ALL) -> Any:
        """The row of q kᵀ, times scale · log₂e."""
        products = [chain(ZERO, self.q[head, row], key) for key in self.k[keys]]
        return np.array(products, np.float32) * np.float32(self.scale * math.log2(math.e))

    def scores(self, head: int, row: int, keys: slice = ALL) -> Any:
        return np.where(self.seen[row, keys], self.dots(head, row, keys), LOWEST)

    def rounded(self, values: Any) -> Any:
        """Values as they come back from memory."""
        return np.asarray(values, np.float32).astype(self.stored).astype(np.float32)

    def zeros(self, columns: int) -> Any:
        return np.zeros((*self.q.shape[:2], columns), np.float32)


def take_tile(state: tuple[Any, Any, Any], scores: Any, v: Any, seen: Any) -> tuple[Any, Any, Any]:
    """Take one tile of keys into the row maximum, row sum and output of a row."""
    row_max, row_sum, out = state
    new_max = np.maximum(row_max, scores.max())
    correction = simt_loops.exp2(row_max - base_of(new_max))
    weights = simt_loops.exp2(scores - base_of(new_max))
    row_sum = fma(row_sum, correction, row_sum_of(weights))
    return new_max, row_sum, chain(out * correction, weights, v, seen)


def scalar_flash2(group: Group, tiles: tuple[int, int]) -> dict[str, Any]:
    out, lse = group.zeros(group.v.shape[1]), group.zeros(1)[..., 0]
    for head, row in group.rows():
        query_tile = group.seen[row // tiles[0] * tiles[0] :][: tiles[0]]
        state = (LOWEST, ZERO, out[head, row])
        scores = group.scores(head, row)
        for keys in tiles_of(len(group.k), tiles[1]):
            if query_tile[:, keys].any():
                state = take_tile(state, scores[keys], group.v[keys], group.seen[row, keys])
        row_max, row_sum, sums = state
        out[head, row] = sums / divisor(row_sum)
        lse[head, row] = log_sum_exp_of(row_max, row_sum)
    return {"out": out, "lse": lse}


def scalar_flash1(group: Group, tiles: tuple[int, int], hbm_accumulator: str) -> dict[str, Any]:
    out, statistic = group.zeros(group.v.shape[1]), group.zeros(1)[..., 0]
    row_max, row_sum, lse = statistic + LOWEST, statistic.copy(), statistic.copy()
    for keys in tiles_of(len(group.k), tiles[1]):
        for queries in tiles_of(len(group.seen), tiles[0]):
            if group.seen[queries, keys].any():
                for head in range(len(group.q)):
                    for row in range(queries.start, queries.stop):
                        state = (row_max[head, row], row_sum[head, row], out[head, row] * row_sum[head, row])
                        scores = group.scores(head, row, keys)
                        highest, total, sums = take_tile(state, scores, group.v[keys], group.seen[row, keys])
                        row_max[head, row], row_sum[head, row] = highest, total
                        sums = sums / divisor(total)
                        out[head, row] = group.rounded(sums) if hbm_accumulator == "storage" else sums
    for head, row in group.rows():
        lse[head, row] = log_sum_exp_of(row_max[head, row], row_sum[head, row])
    return {"out": out, "lse": lse, "row_max": row_max, "row_sum": row_sum}


def scalar_standard(group: Group, key_tile: int, softmax_passes: int) -> dict[str, Any]:
    out, lse = group.zeros(group.v.shape[1]), group.zeros(1)[..., 0]
    probabilities = group.zeros(len(group.k))
    for head, row in group.rows():
        scores = np.where(group.seen[row], group.rounded(group.dots(head, row)), LOWEST)
        tiles = tiles_of(len(group.k), len(group.k) if softmax_passes == 1 else key_tile)
        row_max, row_sum = LOWEST, ZERO
        if softmax_passes == 2:
            for keys in tiles:
                higher = np.maximum(row_max, scores[keys].max())
                correction = simt_loops.exp2(row_max - base_of(higher))
                weights = simt_loops.exp2(scores[keys] - base_of(higher))
                row_max, row_sum = higher, fma(row_sum, correction, row_sum_of(weights))
        else:
            row_max = np.maximum(row_max, scores.max())
            for keys in tiles:
                row_sum = row_sum + row_sum_of(simt_loops.exp2(scores[keys] - base_of(row_max)))
        row_of_p = simt_loops.exp2(scores - base_of(row_max)) / divisor(row_sum)
        probabilities[head, row] = group.rounded(np.where(group.seen[row], row_of_p, ZERO))
        out[head, row] = chain(out[head, row], probabilities[head, row], group.v, group.seen[row])
        lse[head, row] = log_sum_exp_of(row_max, row_sum)
    return {"out": out, "lse": lse, "probabilities": probabilities}


def key_chains(group: Group, weights: Any, operand: Any, factor: Any, grouped_gradients: str) -> Any:
    """Σ weightsᵀ operand · factor over the query heads of the group, in the way that the plan says."""

    def chains(heads: range) -> Any:
        total = np.zeros((len(group.k), operand.shape[-1]), np.float32)
        for key in range(len(group.k)):
            for head in heads:
                column = weights[head][:, key]
                total[key] = chain(total[key], column, operand[head], group.seen[:, key])
        return total * factor

    heads = range(len(group.q))
    if grouped_gradients == "loop":
        return chains(heads)
    total = np.zeros((len(group.k), operand.shape[-1]), np.float32)
    for head in heads:
        part = chains(range(head, head + 1))
        total = total + (group.rounded(part) if grouped_gradients == "expand" else part)
    return total


def score_gradients(group: Group, delta: Any, probabilities_of: Any) -> tuple[Any, Any]:
    """P and dS of a recomputing backward pass, 0 where hidden."""
    probabilities, dscores = group.zeros(len(group.k)), group.zeros(len(group.k))
    for head, row in group.rows():
        seen = group.seen[row]
        weights = probabilities_of(head, row, group.scores(head, row))
        dweights = np.array([chain(ZERO, group.dout[head, row], value) for value in group.v], np.float32)
        probabilities[head, row] = np.where(seen, weights, ZERO)
        dscores[head, row] = np.where(seen, weights * (dweights - delta[head, row]), ZERO)
    return probabilities, dscores


def delta_of(group: Group, out: Any) -> Any:
    delta = group.zeros(1)[..., 0]
    for head, row in group.rows():
        delta[head, row] = row_dot_of(out[head, row], group.dout[head, row])
    return delta


def scalar_flash2_backward(
    group: Group, saved: dict[str, Any], tiles: tuple[int, int], dq: str, grouped_gradients: str
) -> dict[str, Any]:
    scale = np.float32(group.scale)

    def probabilities_of(head: int, row: int, scores: Any) -> Any:
        return simt_loops.exp2(scores - base_of(saved["lse"][head, row] * LOG2_E))

    probabilities, dscores = score_gradients(group, delta_of(group, saved["out"]), probabilities_of)
    dq_sums = group.zeros(group.q.shape[-1])
    for head, row in group.rows():
        for keys in tiles_of(len(group.k), len(group.k) if dq == "deterministic" else tiles[1]):
            part = chain(
                group.zeros(group.q.shape[-1])[head, row],
                dscores[head, row, keys],
                group.k[keys],
                group.seen[row, keys],
            )
            dq_sums[head, row] = dq_sums[head, row] + part * scale
    return {
        "dq": dq_sums,
        "dk": key_chains(group, dscores, group.q, scale, grouped_gradients),
        "dv": key_chains(group, probabilities, group.dout, ONE, grouped_gradients),
    }


def scalar_flash1_backward(
    group: Group, saved: dict[str, Any], tiles: tuple[int, int], hbm_accumulator: str, grouped_gradients: str
) -> dict[str, Any]:
    def probabilities_of(head: int, row: int, scores: Any) -> Any:
        weights = simt_loops.exp2(scores - base_of(saved["row_max"][head, row]))
        return weights / divisor(saved["row_sum"][head, row])

    probabilities, dscores = score_gradients(group, delta_of(group, saved["out"]), probabilities_of)
    dscores = dscores * np.float32(group.scale)
    dq = group.zeros(group.q.shape[-1])
    for head, row in group.rows():
        for keys in tiles_of(len(group.k), tiles[1]):
            sums = chain(dq[head, row], dscores[head, row, keys], group.k[keys], group.seen[row, keys])
            dq[head, row] = group.rounded(sums) if hbm_accumulator == "storage" else sums
    return {
        "dq": dq,
        "dk": key_chains(group, dscores, group.q, ONE, grouped_gradients),
        "dv": key_chains(group, probabilities, group.dout, ONE, grouped_gradients),
    }


def scalar_standard_backward(
    group: Group, saved: dict[str, Any], key_tile: int, softmax_passes: int, grouped_gradients: str
) -> dict[str, Any]:
    scale, probabilities = np.float32(group.scale), saved["probabilities"]
    dscores, dq = group.zeros(len(group.k)), group.zeros(group.q.shape[-1])
    for head, row in group.rows():
        dots = np.array([chain(ZERO, group.dout[head, row], value) for value in group.v], np.float32)
        dweights = np.where(group.seen[row], group.rounded(dots), ZERO)
        delta = ZERO
        for keys in tiles_of(len(group.k), len(group.k) if softmax_passes == 1 else key_tile):
            delta = delta + row_dot_of(probabilities[head, row, keys], dweights[keys])
        gradients = probabilities[head, row] * (dweights - delta)
        dscores[head, row] = group.rounded(np.where(group.seen[row], gradients, ZERO))
        dq[head, row] = chain(dq[head, row], dscores[head, row], group.k, group.seen[row]) * scale
    return {
        "dq": dq,
        "dk": key_chains(group, dscores, group.q, scale, grouped_gradients),
        "dv": key_chains(group, probabilities, group.dout, ONE, grouped_gradients),
    }


# The simulated machine, held against them


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64, 100])
def test_sums_of_a_row_add_lanes_pairwise(columns: int) -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 1, 1, 1, 1, columns)).astype(np.float32)
    assert_same_bits(SIMT.row_sum(a**2).reshape(()), np.asarray(row_sum_of(a.ravel() ** 2)))
    assert_same_bits(SIMT.row_dot(a, b).reshape(()), np.asarray(row_dot_of(a.ravel(), b.ravel())))


MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (4, 1)},
    {"causal": True, "window": (3, None), "scale": 0.9},
]
SHAPES = [(5, 21), (9, 6), (1, 1)]
BACKWARD_SHAPES: dict[str, dict[str, int]] = {
    "float32": {"q_len": 6, "kv_len": 23, "heads": 6, "kv_heads": 2},
    "float16": {"q_len": 12, "kv_len": 7, "heads": 2, "kv_heads": 1},
    "bfloat16": {"q_len": 5, "kv_len": 18, "heads": 2, "kv_heads": 2},
}
BACKWARD_MASKS = [MASKS[0], {"causal": True, "window": (6, None), "scale": 0.9}]
every_mask = pytest.mark.parametrize("mask", MASKS, ids=str)
every_backward_mask = pytest.mark.parametrize("mask", BACKWARD_MASKS, ids=str)
every_shape = pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
TILES = (4, 5)


def random_inputs(q_len: int, kv_len: int, dtype: str = "float32", *, heads: int = 4, kv_heads: int = 2) -> Any:
    random = np.random.default_rng(q_len)
    shapes = {
        "q": (q_len, heads, 8),
        "k": (kv_len, kv_heads, 8),
        "v": (kv_len, kv_heads, 20),
        "dout": (q_len, heads, 20),
    }
    return {name: random.standard_normal((1, *shape)).astype(numpy_dtype(dtype)) for name, shape in shapes.items()}


def groups_of(run: simattn.Run, inputs: Any) -> Iterator[tuple[slice, Group]]:
    """The KV heads of a problem of one batch entry, each with the query heads that belong to it."""
    problem = run.problem
    wide = {name: np.moveaxis(array[0].astype(np.float32), 1, 0) for name, array in inputs.items()}
    for head in range(problem.kv_heads):
        heads = slice(head * problem.group_size, (head + 1) * problem.group_size)
        yield (
            heads,
            Group(
                q=wide["q"][heads],
                k=wide["k"][head],
                v=wide["v"][head],
                dout=wide["dout"][heads],
                seen=problem.visible_elements(),
                scale=problem.scale,
                stored=inputs["q"].dtype,
            ),
        )


def by_head(name: str, values: Any, heads: slice) -> Any:
    """Values of some query heads, those first, of a result of one batch entry; widened to float32."""
    values = values[0].astype(np.float32)
    return (np.moveaxis(values, 1, 0) if name in ("out", "dq") else values)[heads]


def check_forward(run: simattn.Run, inputs: Any, scalar: Any) -> None:
    assert run.saved is not None
    for heads, group in groups_of(run, inputs):
        expected = scalar(group)
        for name, values in {"out": run.out, "lse": run.lse, **run.saved}.items():
            assert values is not None
            wanted = group.rounded(expected[name]) if name == "out" else expected[name]
            assert_same_bits(by_head(name, values, heads), wanted, name=name)


def check_backward(run: simattn.Run, saved: Any, inputs: Any, scalar: Any) -> None:
    for index, (heads, group) in enumerate(groups_of(run, inputs)):
        expected = scalar(group, {name: by_head(name, values, heads) for name, values in saved.items()})
        actual = {"dq": by_head("dq", run.dq, heads)}
        for name, values in (("dk", run.dk), ("dv", run.dv)):
            assert values is not None
            actual[name] = values[0, :, index].astype(np.float32)
        for name, values in actual.items():
            assert_same_bits(values, group.rounded(expected[name]), name=name)


def forward_run(algorithm: str, inputs: Any, **arguments: Any) -> simattn.Run:
    values = {name: inputs[name] for name in "qkv"}
    return simattn.run(algorithm, **values, arithmetic="simt", **arguments)


def backward_run(algorithm: str, inputs: Any, **arguments: Any) -> simattn.Run:
    return simattn.run_backward(algorithm, **inputs, arithmetic="simt", **arguments)


@every_mask
@every_shape
@every_dtype
def test_flash2_forward_is_its_operations_one_by_one(dtype: str, q_len: int, kv_len: int, mask: Any) -> None:
    inputs = random_inputs(q_len, kv_len, dtype)
    run = forward_run("flash2", inputs, tiles=TILES, **mask)
    check_forward(run, inputs, lambda group: scalar_flash2(group, TILES))


@every_mask
@every_shape
@every_dtype
@pytest.mark.parametrize("hbm_accumulator", ["float32", "storage"])
def test_flash1_forward_is_its_operations_one_by_one(
    hbm_accumulator: str, dtype: str, q_len: int, kv_len: int, mask: Any
) -> None:
    inputs = random_inputs(q_len, kv_len, dtype)
    run = forward_run("flash1", inputs, tiles=TILES, hbm_accumulator=hbm_accumulator, **mask)
    check_forward(run, inputs, lambda group: scalar_flash1(group, TILES, hbm_accumulator))


@every_mask
@every_shape
@every_dtype
@pytest.mark.parametrize("softmax_passes", [1, 2, 3])
def test_standard_forward_is_its_operations_one_by_one(
    softmax_passes: int, dtype: str, q_len: int, kv_len: int, mask: Any
) -> None:
    inputs = random_inputs(q_len, kv_len, dtype)
    run = forward_run("standard", inputs, tiles=(*TILES, 3), softmax_passes=softmax_passes, **mask)
    check_forward(run, inputs, lambda group: scalar_standard(group, TILES[1], softmax_passes))


@every_backward_mask
@every_dtype
@pytest.mark.parametrize("dq", ["deterministic", "reduce", "load_add_store"])
@pytest.mark.parametrize("grouped_gradients", ["loop", "expand", "reduce"])
def test_flash2_backward_is_its_operations_one_by_one(dq: Any, grouped_gradients: Any, dtype: str, mask: Any) -> None:
    inputs = random_inputs(**BACKWARD_SHAPES[dtype], dtype=dtype)
    saved = forward_run("flash2", inputs, **mask).saved
    plan = {"dq": dq, "grouped_gradients": grouped_gradients}
    run = backward_run("flash2", inputs, saved=saved, tiles=TILES, **plan, **mask)
    check_backward(run, saved, inputs, lambda group, left: scalar_flash2_backward(group, left, TILES, **plan))


@every_backward_mask
@every_dtype
@pytest.mark.parametrize("hbm_accumulator", ["float32", "storage"])
@pytest.mark.parametrize("grouped_gradients", ["loop", "expand", "reduce"])
def test_flash1_backward_is_its_operations_one_by_one(
    hbm_accumulator: Any, grouped_gradients: Any, dtype: str, mask: Any
) -> None:
    inputs = random_inputs(**BACKWARD_SHAPES[dtype], dtype=dtype)
    saved = forward_run("flash1", inputs, **mask).saved
    plan = {"hbm_accumulator": hbm_accumulator, "grouped_gradients": grouped_gradients}
    run = backward_run("flash1", inputs, saved=saved, tiles=TILES, **plan, **mask)
    check_backward(run, saved, inputs, lambda group, left: scalar_flash1_backward(group, left, TILES, **plan))


@every_backward_mask
@every_dtype
@pytest.mark.parametrize("softmax_passes", [1, 2, 3])
@pytest.mark.parametrize("grouped_gradients", ["loop", "expand", "reduce"])
def test_standard_backward_is_its_operations_one_by_one(
    softmax_passes: Any, grouped_gradients: Any, dtype: str, mask: Any
) -> None:
    inputs = random_inputs(**BACKWARD_SHAPES[dtype], dtype=dtype)
    saved = forward_run("standard", inputs, **mask).saved
    plan = {"softmax_passes": softmax_passes, "grouped_gradients": grouped_gradients}
    run = backward_run("standard", inputs, saved=saved, tiles=(*TILES, 3), **plan, **mask)
    check_backward(run, saved, inputs, lambda group, left: scalar_standard_backward(group, left, TILES[1], **plan))


@pytest.mark.parametrize("algorithm", ["standard", "flash1", "flash2"])
@every_shape
def test_backward_runs_the_forward_pass_that_is_not_given(algorithm: str, q_len: int, kv_len: int) -> None:
    inputs = random_inputs(q_len, kv_len)
    saved = forward_run(algorithm, inputs, causal=True).saved
    given, found = (backward_run(algorithm, inputs, saved=left, causal=True) for left in (saved, None))
    for name in ("dq", "dk", "dv"):
        assert_same_bits(getattr(given, name), getattr(found, name), name=name)


def test_of_zeros_the_positive_one_is_the_row_maximum() -> None:
    lowest, minus, plus = LOWEST, np.float32(-0.0), ZERO
    for row_max, scores, expected in (
        (lowest, [minus, plus, minus], plus),
        (lowest, [minus, minus, lowest], minus),
        (plus, [minus, minus, minus], plus),
        (minus, [lowest, plus, lowest], plus),
        (minus, [lowest, lowest, lowest], minus),
    ):
        row = np.array(scores, np.float32).reshape(1, 1, 1, 1, 3)
        higher = SIMT.row_maximum(np.full((1, 1, 1, 1, 1), row_max), row)
        assert_same_bits(higher.reshape(()), np.asarray(expected))


# What does not depend on the tiles, or on which blocks are simulated together


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.sampled_from([None, (3, 2), (20, 0)]))
def test_forward_bits_do_not_depend_on_the_query_tile(
    q_len: int, kv_len: int, query_tile: int, window: tuple[int, int] | None
) -> None:
    """A row's operations depend on the key tiles it sees; a tile it does not see changes no bit of it."""
    inputs = random_inputs(q_len, kv_len)
    one, other = (forward_run("flash2", inputs, tiles=(tile, 16), window=window) for tile in (query_tile, 64))
    assert_same_bits(one.out, other.out)
    assert_same_bits(one.lse, other.lse)


TILE_FREE: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("flash2", {"dq": "deterministic"}, ("dq", "dk", "dv")),
    ("flash2", {"dq": "reduce"}, ("dk", "dv")),
    ("flash2", {"dq": "load_add_store"}, ("dk", "dv")),
    ("flash2", {"dq": "reduce", "grouped_gradients": "reduce"}, ("dk", "dv")),
    ("flash2", {"dq": "deterministic", "grouped_gradients": "expand"}, ("dq", "dk", "dv")),
    ("flash1", {"hbm_accumulator": "float32"}, ("dq", "dk", "dv")),
    ("flash1", {"hbm_accumulator": "storage"}, ("dk", "dv")),
    ("standard", {"softmax_passes": 1}, ("dq", "dk", "dv")),
]


@pytest.mark.parametrize(("algorithm", "plan", "names"), TILE_FREE, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_gradients_do_not_depend_on_the_tiles(algorithm: str, plan: Any, names: tuple[str, ...], data: Any) -> None:
    problem, inputs = data.draw(attention_cases(backward=True))
    masks = masks_of(problem)
    saved = forward_run(algorithm, inputs, **masks).saved
    one, other = (
        backward_run(algorithm, inputs, saved=saved, tiles=data.draw(tiles_for(problem)), **plan, **masks)
        for _ in range(2)
    )
    for name in names:
        assert_same_bits(getattr(one, name), getattr(other, name), name=name)


@pytest.mark.parametrize("elements", [1, 300])
@pytest.mark.parametrize("grouped_gradients", ["loop", "expand", "reduce"])
@pytest.mark.parametrize("algorithm", ["standard", "flash1", "flash2"])
def test_bits_do_not_depend_on_what_is_simulated_together(
    algorithm: str, grouped_gradients: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(9, 21)
    arguments = {"tiles": TILES, "window": (7, 2), "grouped_gradients": grouped_gradients}
    one = backward_run(algorithm, inputs, **arguments)
    monkeypatch.setattr(machine, "STACKED_ELEMENTS", elements)
    other = backward_run(algorithm, inputs, **arguments)
    for name in ("dq", "dk", "dv"):
        assert_same_bits(getattr(one, name), getattr(other, name), name=name)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_standard_forward_in_one_pass_does_not_depend_on_the_tiles(data: Any) -> None:
    problem, inputs = data.draw(attention_cases())
    one, other = (
        forward_run(
            "standard",
            inputs,
            softmax_passes=1,
            tiles=data.draw(tiles_for(problem, with_depth=True)),
            **masks_of(problem),
        )
        for _ in range(2)
    )
    assert_same_bits(one.out, other.out)
    assert_same_bits(one.lse, other.lse)


# Any problem, any plan

EXACT = [
    (name, direction)
    for name, algorithm in ALGORITHMS.items()
    for direction in algorithm.directions
    if "simt" in algorithm.exact_arithmetics.get(direction, ())
]
every_exact_program = pytest.mark.parametrize(("name", "direction"), EXACT)
RESULTS = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}


def test_the_exact_programs() -> None:
    assert {name for name, _ in EXACT} == {"standard", "flash1", "flash2"}
    assert len(EXACT) == 6


def masks_of(problem: simattn.AttentionProblem) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in ("scale", "causal", "window", "block_mask")}


def drawn_plan(data: Any, name: str, problem: simattn.AttentionProblem) -> dict[str, Any]:
    algorithm = ALGORITHMS[name]
    tiles = data.draw(tiles_for(problem, with_depth=algorithm.chunks_columns))
    return {"tiles": tiles, "enforce_capacity": False, **data.draw(plan_options(algorithm))}


@every_exact_program
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_nobody_sees_changes_no_bit(name: str, direction: str, data: Any) -> None:
    """NaN and Inf in keys and values that no query sees, and in queries that see no key, are as good as zeros."""
    problem, inputs = data.draw(attention_cases(backward=direction == "backward", hidden_is_finite=False))
    plan = drawn_plan(data, name, problem)
    cleared = {key: np.where(np.isfinite(array), array, np.zeros_like(array)) for key, array in inputs.items()}
    call = forward_run if direction == "forward" else backward_run
    poisoned, clean = (call(name, values, **plan, **masks_of(problem)) for values in (inputs, cleared))
    for key in RESULTS[direction]:
        values = getattr(poisoned, key)
        assert (np.isfinite(values) | (np.isneginf(values) & (key == "lse"))).all()
        assert_same_bits(values, getattr(clean, key), name=key)


@every_exact_program
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_simt_moves_what_is_counted(name: str, direction: Any, data: Any) -> None:
    problem, inputs = data.draw(attention_cases(backward=direction == "backward"))
    plan = drawn_plan(data, name, problem)
    run = (forward_run if direction == "forward" else backward_run)(name, inputs, **plan, **masks_of(problem))
    shape = {item.name: getattr(problem, item.name) for item in fields(problem)}
    assert run.traffic == simattn.count(name, **shape, **plan, direction=direction)


@pytest.mark.parametrize("name", [name for name, direction in EXACT if direction == "backward"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gradients_are_within_the_error_budget(name: str, data: Any) -> None:
    problem, inputs = data.draw(attention_cases(backward=True))
    plan = drawn_plan(data, name, problem)
    run = backward_run(name, inputs, **plan, **masks_of(problem))
    exact = reference_attention_backward(problem, **inputs)
    rough = low_precision_attention_backward(problem, **inputs)
    floors = gradient_floors(problem, **inputs, roundings=roundings(run))
    for key, reference, budget, floor in zip(RESULTS["backward"], exact, rough, floors, strict=True):
        actual = getattr(run, key)
        assert actual.dtype == numpy_dtype(problem.dtype)
        assert_within_error_budget(actual, reference, budget, floor=floor, name=key)


def roundings(run: simattn.Run) -> int:
    """How often a plan rounds a gradient to the storage format."""
    count = 1
    if getattr(run.plan, "hbm_accumulator", None) == "storage":
        count += -(-run.problem.kv_len // run.plan.tiles.kv)
    if run.plan.grouped_gradients == "expand":
        count += run.problem.group_size
    return count


# What the forward pass leaves


@pytest.mark.parametrize("arithmetic", ["float32", "float64", "simt"])
@pytest.mark.parametrize(
    "algorithm", [name for name, entry in ALGORITHMS.items() if entry.takes_any_mask and "backward" in entry.programs]
)
def test_backward_takes_what_the_forward_pass_saved(algorithm: str, arithmetic: str) -> None:
    if arithmetic == "simt" and (algorithm, "forward") not in EXACT:
        pytest.skip("refused")
    options = {"passes": 1} if algorithm == "online_softmax" else {}
    inputs = random_inputs(9, 13, "float16")
    values = {name: inputs[name] for name in "qkv"}
    saved = simattn.run(algorithm, **values, causal=True, arithmetic=arithmetic, **options).saved
    assert saved
    given, found = (
        simattn.run_backward(algorithm, **inputs, causal=True, arithmetic=arithmetic, saved=left, **options)
        for left in (saved, None)
    )
    assert given.traffic == found.traffic
    for name in ("dq", "dk", "dv"):
        assert_same_bits(getattr(given, name), getattr(found, name), name=name)
    other = simattn.run_backward(
        algorithm,
        **inputs,
        causal=True,
        arithmetic=arithmetic,
        saved={name: np.zeros_like(array) for name, array in saved.items()},
        **options,
    )
    assert (other.dv != given.dv).any()


def test_saved_arrays_have_the_shapes_of_the_documentation() -> None:
    inputs = random_inputs(9, 13, "float16")
    out, statistic = ((1, 9, 4, 20), np.float16), ((1, 4, 9), np.float32)
    for algorithm, expected in (
        ("standard", {"probabilities": ((1, 4, 9, 13), np.float16)}),
        ("flash1", {"out": out, "row_max": statistic, "row_sum": statistic}),
        ("flash2", {"out": out, "lse": statistic}),
    ):
        run = forward_run(algorithm, inputs)
        assert run.saved is not None
        assert {name: (array.shape, array.dtype) for name, array in run.saved.items()} == expected
    for algorithm in ("online_softmax", "small_cache"):
        assert simattn.run(algorithm, *(inputs[name] for name in "qkv")).saved == {}
    assert simattn.run_backward("flash2", **inputs).saved is None
    assert simattn.profile("flash2", q_len=9).saved is None


SAVED_REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lse": None}, ValueError, r"saved has the arrays \['out'\]: expected \['lse', 'out'\], as flash2 forward leaves"),
    (
        {"row_max": np.ones(3)},
        ValueError,
        r"saved has the arrays \['lse', 'out', 'row_max'\]: expected \['lse', 'out'\]",
    ),
    (
        {"lse": np.ones((1, 9, 4), np.float32)},
        ValueError,
        r"saved\['lse'\] has shape \(1, 9, 4\): expected \(1, 4, 9\)",
    ),
    ({"out": np.ones((1, 4, 9, 20), np.float16)}, ValueError, r"saved\['out'\] has shape .*: expected \(1, 9, 4, 20\)"),
    (
        {"out": np.ones((1, 9, 4, 20), np.float32)},
        TypeError,
        r"saved\['out'\] has dtype float32: expected float16 for float16 inputs and arithmetic='simt'",
    ),
]


@pytest.mark.parametrize(("changes", "error", "words"), SAVED_REFUSED, ids=[case[2][:40] for case in SAVED_REFUSED])
def test_saved_arrays_are_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    inputs = random_inputs(9, 13, "float16")
    saved = {**(forward_run("flash2", inputs).saved or {}), **changes}
    with pytest.raises(error, match=words):
        backward_run("flash2", inputs, saved={name: array for name, array in saved.items() if array is not None})


def test_saved_must_be_a_mapping() -> None:
    with pytest.raises(TypeError, match="saved is a list: expected a mapping of arrays by name"):
        backward_run("flash2", random_inputs(9, 13), saved=[])


# Refusals


@pytest.mark.parametrize(
    ("algorithm", "direction"),
    [("online_softmax", "forward"), ("online_softmax", "backward"), ("flash3", "backward"), ("small_cache", "forward")],
)
def test_simt_is_refused_where_no_order_is_fixed(algorithm: str, direction: str) -> None:
    inputs = random_inputs(4, 4)
    call = forward_run if direction == "forward" else backward_run
    with pytest.raises(ValueError, match=f"arithmetic='simt': {algorithm} {direction} fixes no order"):
        call(algorithm, inputs)
