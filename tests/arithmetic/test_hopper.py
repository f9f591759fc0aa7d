from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from exact import chain, fused_multiply_add
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from simattn import machine
from simattn.algorithms import ALGORITHMS
from simattn.arithmetic import special_functions
from simattn.arithmetic.formats import numpy_dtype
from simattn.arithmetic.tensor_cores import WGMMA
from simattn.testing import (
    assert_same_bits,
    assert_within_error_budget,
    attention_cases,
    low_precision_attention,
    plan_options,
    reference_attention,
    tiles_for,
)

STORAGE_TYPES = ("bfloat16", "float16")
every_dtype = pytest.mark.parametrize("dtype", STORAGE_TYPES)

# One operation after the other: what the threads of the kernel do with a row.

ZERO, LOWEST = np.float32(0), np.float32(-np.inf)
STEP, PARTS = 16, 8
LN2 = np.float32(float.fromhex("0x1.62e43p-1"))


def padded(array: Any, rows: int, columns: int) -> Any:
    whole = np.zeros((rows, columns), np.float32)
    whole[: array.shape[0], : array.shape[1]] = array
    return whole


@dataclass
class Row:
    """A query row of one head: what the kernel keeps of it.

    ``unit`` is the tensor cores' dot-add, ``stored`` the storage format, ``factor`` the scale times log₂e.
    """

    unit: Any
    stored: Any
    factor: Any
    row_max: Any = LOWEST
    parts: Any = None
    out: Any = None

    def base(self) -> Any:
        with np.errstate(over="ignore"):
            return ZERO if self.row_max * self.factor == LOWEST else self.row_max

    def take(self, q: Any, k: Any, v: Any, seen: Any) -> None:
        """Take a tile of keys."""
        depth, keys = -(-len(q) // STEP) * STEP, -(-len(k) // STEP) * STEP
        zeros = np.zeros((1, len(k)), np.float32)
        products = chain(padded(q[None], 1, depth), padded(k, len(k), depth).T, zeros, self.unit)[0]
        scores = np.where(seen, products, LOWEST)
        before = self.row_max
        for score in scores:
            self.row_max = np.fmax(self.row_max, score)
        offset = self.base() * self.factor
        weights = [exp2(fused_multiply_add(score, self.factor, -offset)) for score in scores]
        correction = exp2((before - self.base()) * self.factor)
        whole = np.zeros(-(-len(k) // PARTS) * PARTS, np.float32)
        whole[: len(k)] = weights
        first = self.parts is None
        if first:
            self.parts, self.out = whole[:PARTS].copy(), np.zeros(v.shape[1], np.float32)
        else:
            for part in range(PARTS):
                self.parts[part] = fused_multiply_add(self.parts[part], correction, whole[part])
            self.out = self.out * correction
        for column in range(PARTS, len(whole)):
            self.parts[column % PARTS] = self.parts[column % PARTS] + whole[column]
        rounded = np.array(weights, np.float32).astype(self.stored).astype(np.float32)
        visible = np.zeros((1, keys), np.bool_)
        visible[0, : len(k)] = seen
        left, right = padded(rounded[None], 1, keys), padded(v, keys, v.shape[1])
        self.out = chain(left, right, self.out[None], self.unit, visible)[0]

    def finish(self) -> tuple[Any, Any]:
        if self.parts is None:
            return None, LOWEST
        quads = [self.parts[2 * quad] + self.parts[2 * quad + 1] for quad in range(4)]
        total = (quads[0] + quads[1]) + (quads[2] + quads[3])
        if total == 0:
            return self.out * ZERO, LOWEST
        lse = fused_multiply_add(self.base(), self.factor, log2(total)) * LN2
        return self.out * reciprocal(total), lse


def exp2(x: Any) -> Any:
    return special_functions.ex2(np.float32(x))[()]


def log2(x: Any) -> Any:
    return special_functions.lg2(np.float32(x))[()]


def reciprocal(x: Any) -> Any:
    return special_functions.rcp(np.float32(x))[()]


def scalar_flash3(problem: simattn.AttentionProblem, inputs: Any, tiles: tuple[int, int]) -> tuple[Any, Any]:
    """Compute out and lse of a problem of one batch entry, row by row."""
    stored = numpy_dtype(problem.dtype)
    q, k, v = (np.moveaxis(inputs[name][0].astype(np.float32), 1, 0) for name in "qkv")
    factor, seen = np.float32(problem.scale * np.log2(np.e)), problem.visible_elements()
    out = np.zeros((problem.q_len, problem.heads, problem.value_dim), np.float32)
    lse = np.full((problem.heads, problem.q_len), LOWEST)
    with np.errstate(all="ignore"):
        for head in range(problem.heads):
            keys, values = k[head // problem.group_size], v[head // problem.group_size]
            for row in range(problem.q_len):
                state = Row(WGMMA[problem.dtype], stored, factor)
                block = seen[row // tiles[0] * tiles[0] :][: tiles[0]]
                for start in range(0, problem.kv_len, tiles[1]):
                    tile = slice(start, min(start + tiles[1], problem.kv_len))
                    if block[:, tile].any():
                        state.take(q[head, row], keys[tile], values[tile], seen[row, tile])
                finished, lse[head, row] = state.finish()
                if finished is not None:
                    out[row, head] = finished
        return out.astype(stored), lse


# The simulated machine, held against it

MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (4, 1)},
    {"causal": True, "window": (9, None), "scale": 0.9},
]
SHAPES = [(5, 21), (9, 6), (1, 1)]
TILES = [(4, 16), (3, 5), (8, 32)]


def random_inputs(
    q_len: int, kv_len: int, dtype: str, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 20, value_dim: int = 5
) -> Any:
    random = np.random.default_rng(q_len + kv_len)
    shapes = {"q": (q_len, heads, head_dim), "k": (kv_len, kv_heads, head_dim), "v": (kv_len, kv_heads, value_dim)}
    return {name: random.standard_normal((1, *shape)).astype(numpy_dtype(dtype)) for name, shape in shapes.items()}


def hopper_run(inputs: Any, **arguments: Any) -> simattn.Run:
    return simattn.run("flash3", **inputs, arithmetic="hopper", **arguments)


def check(inputs: Any, tiles: tuple[int, int], **arguments: Any) -> None:
    run = hopper_run(inputs, tiles=tiles, **arguments)
    out, lse = scalar_flash3(run.problem, inputs, tiles)
    assert_same_bits(run.out, out[None], name="out")
    assert_same_bits(run.lse, lse[None], name="lse")


@every_dtype
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_flash3_forward_is_its_operations_one_by_one(
    tiles: tuple[int, int], q_len: int, kv_len: int, mask: Any, dtype: str
) -> None:
    check(random_inputs(q_len, kv_len, dtype, heads=2, kv_heads=1), tiles, **mask)


SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 65504.0, -65504.0, 6e-8, 1.0)


@every_dtype
@settings(max_examples=60)
@given(data=st.data())
def test_special_values_and_sizes_go_the_same_way(dtype: str, data: Any) -> None:
    """NaN and Inf among scores and values, hidden or not; scores that overflow; rows that see nothing."""
    q_len, kv_len = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    inputs = random_inputs(q_len, kv_len, dtype, heads=2, kv_heads=1, head_dim=data.draw(st.sampled_from([3, 16, 17])))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    with np.errstate(over="ignore"):
        for array in inputs.values():
            size = data.draw(st.sampled_from([1, 0.01, 30, 1e4 if dtype == "float16" else 1e15]))
            np.multiply(array, np.asarray(size, array.dtype), out=array)
            places = generator.integers(0, array.size, data.draw(st.integers(0, 4)))
            array.reshape(-1)[places] = generator.choice(SPECIAL, len(places)).astype(array.dtype)
    mask = data.draw(st.sampled_from(MASKS))
    check(inputs, (data.draw(st.sampled_from([1, 4])), data.draw(st.sampled_from([3, 8, 16]))), **mask)


# What changes no bit


@every_dtype
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_flash2_on_mma_does_the_same_operations(dtype: str, mask: Any) -> None:
    inputs = random_inputs(40, 37, dtype)
    one = hopper_run(inputs, tiles=(16, 16), **mask)
    other = simattn.run("flash2", **inputs, arithmetic="mma", tiles=(16, 16), **mask)
    assert_same_bits(one.out, other.out)
    assert_same_bits(one.lse, other.lse)


@every_dtype
@settings(max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.sampled_from([None, (3, 2), (20, 0)]))
def test_bits_do_not_depend_on_the_query_tile(
    dtype: str, q_len: int, kv_len: int, query_tile: int, window: tuple[int, int] | None
) -> None:
    inputs = random_inputs(q_len, kv_len, dtype)
    one, other = (hopper_run(inputs, tiles=(tile, 16), window=window) for tile in (query_tile, 64))
    assert_same_bits(one.out, other.out)
    assert_same_bits(one.lse, other.lse)


@every_dtype
@settings(max_examples=40)
@given(data=st.data(), extra=st.integers(1, 40))
def test_columns_of_zeros_change_nothing(dtype: str, data: Any, extra: int) -> None:
    problem, inputs = data.draw(attention_cases(dtypes=(dtype,), head_dims=(1, 3, 16, 24), block_sparse=False))
    wider = {name: np.pad(array, ((0, 0),) * 3 + ((0, extra),)) for name, array in inputs.items()}
    masks = masks_of(problem)
    one, other = (hopper_run(values, tiles=(16, 16), **masks) for values in (inputs, wider))
    assert other.out is not None
    assert_same_bits(one.out, other.out[..., : problem.value_dim])
    assert_same_bits(one.lse, other.lse)


@every_dtype
@settings(max_examples=40)
@given(
    length=st.integers(1, 60), before=st.integers(0, 20), extra=st.integers(1, 40), tile=st.sampled_from([16, 32, 80])
)
def test_keys_that_come_later_change_nothing(dtype: str, length: int, before: int, extra: int, tile: int) -> None:
    """A tile that is clipped where the keys end, and one whose other keys are hidden, are the same."""
    inputs = random_inputs(length + extra, before + length + extra, dtype)
    fewer = {name: array[:, : array.shape[1] - extra] for name, array in inputs.items()}
    one, other = (hopper_run(values, tiles=(16, tile), causal=True) for values in (fewer, inputs))
    assert other.out is not None
    assert other.lse is not None
    assert_same_bits(one.out, other.out[:, :length])
    assert_same_bits(one.lse, other.lse[..., :length])


def masks_of(problem: simattn.AttentionProblem) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in ("scale", "causal", "window", "block_mask")}


def drawn_plan(data: Any, problem: simattn.AttentionProblem) -> dict[str, Any]:
    options = data.draw(plan_options(ALGORITHMS["flash3"]))
    return {"tiles": data.draw(tiles_for(problem)), "enforce_capacity": False, **options}


@settings(max_examples=60)
@given(data=st.data())
def test_what_nobody_sees_changes_no_bit(data: Any) -> None:
    problem, inputs = data.draw(attention_cases(dtypes=STORAGE_TYPES, hidden_is_finite=False))
    plan = drawn_plan(data, problem)
    cleared = {key: np.where(np.isfinite(array), array, np.zeros_like(array)) for key, array in inputs.items()}
    poisoned, clean = (hopper_run(values, **plan, **masks_of(problem)) for values in (inputs, cleared))
    assert poisoned.out is not None
    assert np.isfinite(poisoned.out).all()
    assert_same_bits(poisoned.out, clean.out)
    assert_same_bits(poisoned.lse, clean.lse)


@every_dtype
def test_a_value_counts_for_the_rows_that_see_it(dtype: str) -> None:
    inputs = random_inputs(40, 40, dtype)
    poisoned = {**inputs, "v": inputs["v"].copy()}
    poisoned["v"][:, 25] = np.nan
    clean, found = (hopper_run(values, tiles=(16, 16), causal=True) for values in (inputs, poisoned))
    assert clean.out is not None
    assert found.out is not None
    assert_same_bits(found.out[:, :25], clean.out[:, :25])
    assert np.isnan(found.out[:, 25:]).all()


@pytest.mark.parametrize("elements", [1, 300])
def test_bits_do_not_depend_on_what_is_simulated_together(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(40, 37, "bfloat16")
    one = hopper_run(inputs, tiles=(4, 16), window=(7, 2))
    monkeypatch.setattr(machine, "STACKED_ELEMENTS", elements)
    other = hopper_run(inputs, tiles=(4, 16), window=(7, 2))
    assert_same_bits(one.out, other.out)
    assert_same_bits(one.lse, other.lse)


# What it moves, and how accurate it is


@settings(max_examples=40)
@given(data=st.data())
def test_hopper_moves_what_is_counted(data: Any) -> None:
    problem, inputs = data.draw(attention_cases(dtypes=STORAGE_TYPES))
    plan = drawn_plan(data, problem)
    run = hopper_run(inputs, **plan, **masks_of(problem))
    shape = {item.name: getattr(problem, item.name) for item in fields(problem)}
    profile = simattn.profile("flash3", **shape, **plan)
    assert run.traffic == profile.traffic
    assert run.operations == profile.operations
    assert run.peak_register_bytes == profile.peak_register_bytes
    assert run.peak_sram_bytes == profile.peak_sram_bytes


@settings(max_examples=100)
@given(data=st.data())
def test_outputs_are_within_the_error_budget(data: Any) -> None:
    problem, inputs = data.draw(attention_cases(dtypes=STORAGE_TYPES, max_len=100, head_dims=(8, 16, 40)))
    run = hopper_run(inputs, **drawn_plan(data, problem), **masks_of(problem))
    out, lse = reference_attention(problem, **inputs)
    rough_out, rough_lse = low_precision_attention(problem, **inputs)
    assert_within_error_budget(run.out, out, rough_out, name="out")
    assert_within_error_budget(run.lse, lse, rough_lse, name="lse")


@every_dtype
def test_errors_are_those_of_the_storage_format(dtype: str) -> None:
    """Against exact arithmetic on the same inputs, about what rounding P and the output to the format costs."""
    inputs = random_inputs(256, 512, dtype, head_dim=64, value_dim=64)
    run = hopper_run(inputs)
    exact = simattn.run("flash3", **inputs, arithmetic="float64")
    assert run.out is not None
    assert exact.out is not None
    error = np.sqrt(np.mean((run.out.astype(np.float64) - exact.out) ** 2) / np.mean(exact.out**2))
    assert error < {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert np.abs(run.lse - exact.lse).max() < 4e-6


# Refusals


@pytest.mark.parametrize(
    "algorithm", [name for name, item in ALGORITHMS.items() if "forward" in item.programs and name != "flash3"]
)
def test_hopper_is_refused_where_no_order_is_fixed(algorithm: str) -> None:
    inputs = random_inputs(4, 4, "bfloat16")
    usual = ALGORITHMS[algorithm].problem_class.usual_arguments("forward", 4)
    own = {name: value for name, value in usual.items() if name != "q_len"}
    with pytest.raises(ValueError, match=f"arithmetic='hopper': {algorithm} forward fixes no order"):
        simattn.run(algorithm, **inputs, **own, arithmetic="hopper")


def test_hopper_is_refused_backward() -> None:
    inputs = random_inputs(4, 4, "bfloat16")
    with pytest.raises(ValueError, match="arithmetic='hopper': flash3 backward fixes no order"):
        simattn.run_backward("flash3", **inputs, dout=inputs["v"].repeat(2, axis=2), arithmetic="hopper")


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn", "float8_e5m2"])
def test_other_formats_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"arithmetic='hopper' with dtype='{dtype}': expected"):
        hopper_run(random_inputs(4, 4, dtype))


@pytest.mark.parametrize("scale", [1e39, 1e-60])
def test_scales_that_float32_does_not_hold_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="arithmetic='hopper' with scale="):
        hopper_run(random_inputs(4, 4, "bfloat16"), scale=scale)


def test_other_arithmetic_keeps_its_name() -> None:
    with pytest.raises(ValueError, match=r"arithmetic='gpu' is unknown; expected one of .*'simt', 'hopper'"):
        simattn.run("flash3", **random_inputs(4, 4, "bfloat16"), arithmetic="gpu")
