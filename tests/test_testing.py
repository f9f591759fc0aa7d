"""The tools for testing kernels, tested: strategies, references and comparisons."""

from __future__ import annotations

import doctest
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import simattn.testing
from simattn import AttentionProblem
from simattn.algorithms import ALGORITHMS
from simattn.arithmetic.formats import ITEM_BYTES, numpy_dtype
from simattn.testing import (
    INPUT_KINDS,
    assert_same_bits,
    assert_within_error_budget,
    attention_cases,
    attention_inputs,
    attention_problems,
    low_precision_attention,
    low_precision_attention_backward,
    plan_options,
    reference_attention,
    reference_attention_backward,
    tiles_for,
)

EXAMPLES = settings.default.max_examples


def test_the_documented_example_runs():
    results = doctest.testmod(simattn.testing)
    assert results.attempted > 5
    assert results.failed == 0


def test_public_names_exist():
    assert all(hasattr(simattn.testing, name) for name in simattn.testing.__all__)


# Strategies


SITUATIONS = {
    "empty queries": lambda problem: problem.q_len == 0 < problem.kv_len,
    "empty keys": lambda problem: problem.kv_len == 0 < problem.q_len,
    "no batch": lambda problem: problem.batch == 0,
    "one query": lambda problem: problem.q_len == 1 < problem.kv_len,
    "multi-query": lambda problem: problem.kv_heads == 1 < problem.heads,
    "grouped-query": lambda problem: 1 < problem.kv_heads < problem.heads,
    "other value dimension": lambda problem: problem.value_dim != problem.head_dim,
    "causal and more queries than keys": lambda problem: problem.causal and problem.q_len > problem.kv_len > 0,
    "window to both sides": lambda problem: problem.window is not None and None not in problem.window,
    "block mask under causal": lambda problem: problem.block_mask is not None and problem.causal,
    "a fully masked row": lambda problem: (
        problem.kv_len > 0 and problem.q_len > 0 and not problem.visible_elements().any(axis=1).all()
    ),
    "an unseen key": lambda problem: problem.q_len > 0 and not problem.visible_elements().any(axis=0).all(),
}


@pytest.mark.parametrize("situation", list(SITUATIONS))
def test_problems_of_every_sort_are_drawn(situation):
    find(attention_problems(), SITUATIONS[situation], settings=settings(max_examples=2000))


@given(attention_problems(min_len=2, max_len=9, causal=True, windowed=False, block_sparse=False, grouped=False))
def test_problem_bounds_hold(problem):
    assert problem.batch >= 1
    assert 2 <= problem.q_len <= 9
    assert 2 <= problem.kv_len <= 9
    assert problem.causal
    assert problem.window is problem.block_mask is None
    assert problem.group_size == 1


@given(data=st.data())
def test_tiles_divide_blocks_and_bound_the_work(data):
    problem = data.draw(attention_problems(max_len=200))
    tiles = data.draw(tiles_for(problem, max_tiles=5, with_depth=True))
    if problem.block_mask is None:
        assert -(-problem.q_len // tiles.q) <= 5
        assert -(-problem.kv_len // tiles.kv) <= 5
    else:
        assert problem.block_mask.q_block % tiles.q == 0
        assert problem.block_mask.kv_block % tiles.kv == 0


@pytest.mark.parametrize("name", list(ALGORITHMS))
@given(data=st.data())
def test_plan_options_make_plans(name, data):
    options = data.draw(plan_options(ALGORITHMS[name]))
    assert "tiles" not in options
    ALGORITHMS[name].plan_class(tiles=(1, 1), **options)


@given(data=st.data())
def test_inputs_fit_their_problem(data):
    problem = data.draw(attention_problems(dtypes=list(ITEM_BYTES)))
    inputs = data.draw(attention_inputs(problem, backward=True))
    assert inputs["q"].shape == (problem.batch, problem.q_len, problem.heads, problem.head_dim)
    assert inputs["k"].shape == (problem.batch, problem.kv_len, problem.kv_heads, problem.head_dim)
    assert inputs["v"].shape == (problem.batch, problem.kv_len, problem.kv_heads, problem.value_dim)
    assert inputs["dout"].shape == (problem.batch, problem.q_len, problem.heads, problem.value_dim)
    for array in inputs.values():
        assert array.dtype == numpy_dtype(problem.dtype)
        assert np.isfinite(array).all()


@given(attention_cases(hidden_is_finite=False, backward=True))
def test_only_hidden_inputs_are_not_finite(case):
    problem, inputs = case
    seen = problem.visible_elements()
    for name, array in inputs.items():
        visible = seen.any(axis=1 if name in ("q", "dout") else 0)
        assert np.isfinite(array[:, visible]).all()
        assert not np.isfinite(array[:, ~visible]).any()


def scores_of(kind, dtype="float32"):
    problem = AttentionProblem(q_len=64, kv_len=64, head_dim=16, dtype=dtype)
    inputs = find(attention_inputs(problem, kinds=[kind]), lambda _: True)
    q, k = (inputs[name][0, :, 0].astype(np.float64) for name in "qk")
    return inputs, problem.scale * q @ k.T


def test_repeated_maxima_repeat():
    _, scores = scores_of("repeated_maxima")
    assert ((scores == scores.max(axis=1, keepdims=True)).sum(axis=1) > 1).mean() > 0.9


def test_wide_exponents_are_wide_but_their_scores_are_not():
    inputs, scores = scores_of("wide_exponents")
    for array in inputs.values():
        magnitude = np.abs(array[array != 0])
        assert magnitude.max() > 2.0**40 * magnitude.min()
    assert np.abs(scores).max() < 10


def test_peaked_scores_are_large():
    _, scores = scores_of("peaked")
    assert np.abs(scores).max() > 20


# References


def test_a_case_by_hand():
    problem = AttentionProblem(q_len=2, kv_len=2, head_dim=1, dtype="float32", scale=1.0, causal=True)
    q = np.float32([1, 2]).reshape(1, 2, 1, 1)
    k = np.float32([0, np.log(3) / 2]).reshape(1, 2, 1, 1)
    v = np.float32([8, 4]).reshape(1, 2, 1, 1)
    out, lse = reference_attention(problem, q, k, v)
    assert out.ravel() == pytest.approx([8, (8 + 3 * 4) / 4], rel=1e-6)
    assert lse.ravel() == pytest.approx([0, np.log(4)], abs=1e-6)


def gradient_by_differences(problem, inputs, name, index, step):
    def loss(shift):
        changed = {key: array.astype(np.float64) for key, array in inputs.items() if key != "dout"}
        changed[name][index] += shift
        out, _ = reference_attention(problem, **changed)
        return (out * inputs["dout"].astype(np.float64)).sum()

    # Fourth-order central difference.
    return (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)


@settings(max_examples=2 * EXAMPLES)
@given(data=st.data())
def test_reference_gradients_are_derivatives(data):
    problem = data.draw(attention_problems(min_len=1, max_len=8, head_dims=(1, 3), dtypes=["float32"]))
    inputs = data.draw(attention_inputs(problem, backward=True, kinds=["normal"]))
    gradients = reference_attention_backward(problem, **inputs)
    for name, gradient in zip("qkv", gradients, strict=True):
        assert gradient.shape == inputs[name].shape
        index = tuple(data.draw(st.integers(0, size - 1)) for size in gradient.shape)
        expected = gradient_by_differences(problem, inputs, name, index, 1e-3)
        assert gradient[index] == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("score", [-np.inf, np.nan, np.inf])
def test_reference_rows_without_a_finite_score(score):
    problem = AttentionProblem(q_len=1, kv_len=2, head_dim=1, dtype="float32", scale=1.0)
    ones = np.ones((1, 2, 1, 1))
    out, lse = reference_attention(problem, np.ones((1, 1, 1, 1)), score * ones, ones)
    if score == -np.inf:
        assert out[0, 0, 0, 0] == 0
        assert lse[0, 0, 0] == -np.inf
    else:
        assert np.isnan(out).all()
        assert np.isnan(lse).all()


@given(attention_cases(hidden_is_finite=False, backward=True))
def test_references_ignore_what_is_hidden(case):
    problem, inputs = case
    seen = problem.visible_elements()
    clean = {
        name: np.where(seen.any(axis=1 if name in ("q", "dout") else 0)[None, :, None, None], array, 0)
        for name, array in inputs.items()
    }
    forward, forward_clean = ({key: case[key] for key in "qkv"} for case in (inputs, clean))
    # Sums of another length may round otherwise; a low-precision intermediate then moves by one unit.
    for results, expected_results, tolerance in (
        (reference_attention(problem, **forward), reference_attention(problem, **forward_clean), 1e-12),
        (reference_attention_backward(problem, **inputs), reference_attention_backward(problem, **clean), 1e-12),
        (low_precision_attention(problem, **forward), low_precision_attention(problem, **forward_clean), 0.1),
        (low_precision_attention_backward(problem, **inputs), low_precision_attention_backward(problem, **clean), 0.1),
    ):
        for actual, expected in zip(results, expected_results, strict=True):
            finite = np.isfinite(expected)
            assert (np.isfinite(actual) == finite).all()
            largest = np.abs(expected[finite].astype(float)).max(initial=0)
            np.testing.assert_allclose(actual.astype(float), expected.astype(float), atol=tolerance * largest)


@given(attention_cases(backward=True))
def test_low_precision_is_rounded_and_near(case):
    problem, inputs = case
    stored = numpy_dtype(problem.dtype)
    forward = {name: inputs[name] for name in "qkv"}
    out, lse = low_precision_attention(problem, **forward)
    assert out.dtype == stored
    assert lse.dtype == np.float32
    exact, exact_lse = reference_attention(problem, **forward)
    assert out.shape == exact.shape
    assert lse.shape == exact_lse.shape
    largest = np.abs(inputs["v"].astype(float)).max(initial=0)
    tolerance = {"float32": 1e-4, "float16": 0.2, "bfloat16": 1.0}[problem.dtype]
    assert np.abs(out.astype(float) - exact).max(initial=0) <= tolerance * largest
    for gradient in low_precision_attention_backward(problem, **inputs):
        assert gradient.dtype == stored


def test_descales_multiply_the_inputs():
    problem = AttentionProblem(batch=2, heads=4, kv_heads=2, q_len=3, head_dim=8, dtype="float8_e4m3fn")
    inputs = find(attention_inputs(problem, kinds=["normal"]), lambda _: True)
    factors = {
        f"{name}_descale": np.float32([[1, 2], [0.5, 4]]) * size for name, size in zip("qkv", (1, 2, 3), strict=True)
    }
    repeats = {"q": 2, "k": 1, "v": 1}
    scaled = {
        name: inputs[name].astype(float)
        * np.repeat(factors[f"{name}_descale"], repeats[name], axis=1)[:, None, :, None]
        for name in "qkv"
    }
    for actual, expected in zip(
        reference_attention(problem, **inputs, **factors),
        reference_attention(replace(problem, dtype="float32"), **scaled),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)


# Comparisons


EVERY_TYPE = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", EVERY_TYPE)
def test_same_bits_accepts_equal_arrays_and_any_nan(dtype):
    array = np.array([[0.0, -0.0, 1.5], [np.nan, -np.nan, 2.0]]).astype(dtype)
    assert_same_bits(array, array.copy())
    assert_same_bits(array.T, array.T.copy())
    assert_same_bits(array[0, 0], array[0, 0])
    assert_same_bits(array[:0], array[:0])


def test_nans_of_any_pattern_are_equal():
    patterns = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    assert_same_bits(patterns, np.full(4, np.nan, np.float32))


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        (
            np.float32([1, 0]),
            np.float32([1, -0.0]),
            "differs in 1 of 2 elements, first at (1,): 0x00000000 (0.0), expected 0x80000000 (-0.0)",
        ),
        (
            np.float16([[1, 2], [3, 4]]),
            np.float16([[1, 2.002], [3, 5]]),
            "differs in 2 of 4 elements, first at (0, 1): 0x4000 (2.0), expected 0x4001",
        ),
        (np.float32([np.nan]), np.float32([np.inf]), "0x7fc00000 (nan), expected 0x7f800000 (inf)"),
        (
            np.array([1.0], ml_dtypes.bfloat16),
            np.array([1.0078125], ml_dtypes.bfloat16),
            "0x3f80 (1.0), expected 0x3f81",
        ),
        (np.float32([1]), np.float64([1]), "dtype float32, expected float64"),
        (np.float32([1]), np.float32([[1]]), "shape (1,), expected (1, 1)"),
    ],
)
def test_same_bits_refuses(actual, expected, words):
    with pytest.raises(AssertionError, match=re.escape(words)):
        assert_same_bits(actual, expected)


REFERENCE = np.array([1.0, -2.0, 4.0])
ROUGH = REFERENCE + np.array([0.01, 0.0, -0.02])


def test_budget_is_twice_the_largest_low_precision_error():
    assert_within_error_budget(REFERENCE + 0.039, REFERENCE, ROUGH, floor=0)
    with pytest.raises(
        AssertionError, match=r"error 0\.041 exceeds the budget 0\.04, 2\.0 times.*error 0\.02 .*3 of 3"
    ):
        assert_within_error_budget(REFERENCE + 0.041, REFERENCE, ROUGH, floor=0)
    assert_within_error_budget(REFERENCE + 0.041, REFERENCE, ROUGH, floor=0.002)
    assert_within_error_budget(REFERENCE + 0.059, REFERENCE, ROUGH, factor=3, floor=0)


def test_the_worst_element_is_named():
    with pytest.raises(AssertionError, match=r"out is -3\.0 at \(1,\), expected -2: the error 1 "):
        assert_within_error_budget(np.array([1.2, -3.0, 4.0]), REFERENCE, ROUGH, name="out")


def test_the_floor_may_differ_by_element():
    actual = REFERENCE + np.array([0.5, 0, 0])
    assert_within_error_budget(actual, REFERENCE, REFERENCE, floor=np.array([0.5, 0, 0]))
    with pytest.raises(AssertionError, match=r"at \(0,\)"):
        assert_within_error_budget(actual, REFERENCE, REFERENCE, floor=np.array([0, 0.5, 0]))


@pytest.mark.parametrize("dtype", EVERY_TYPE)
def test_the_default_floor_is_one_unit_in_the_last_place_of_the_largest(dtype):
    unit = float(ml_dtypes.finfo(dtype).eps)
    exact = np.array([1.0, 0.0])
    assert_within_error_budget(np.array([1 + unit, 0]).astype(dtype), exact, exact)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_error_budget(np.array([1 + 2 * unit, 0]).astype(dtype), exact, exact)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite_comes_first(value):
    actual = REFERENCE.copy()
    actual[1] = value
    with pytest.raises(AssertionError, match=r"at \(1,\), expected -2\.0; 1 of 3 elements are infinite or NaN"):
        assert_within_error_budget(actual, REFERENCE, ROUGH, factor=np.inf, floor=np.inf)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_infinities_and_nans_must_be_where_the_reference_has_them(value):
    reference = np.array([1.0, value])
    assert_within_error_budget(reference.copy(), reference, reference)
    for other in {0.0, np.inf, -np.inf} - {value}:
        with pytest.raises(AssertionError, match=r"at \(1,\)"):
            assert_within_error_budget(np.array([1.0, other]), reference, reference)


def test_a_low_precision_reference_that_overflows_gives_no_budget():
    with pytest.raises(ValueError, match="low_precision is not finite where the reference is"):
        assert_within_error_budget(REFERENCE, REFERENCE, np.array([1.0, np.inf, 4.0]))


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(3,\)"):
        assert_within_error_budget(REFERENCE[:2], REFERENCE, ROUGH)
    with pytest.raises(ValueError, match=r"low_precision has shape \(2,\): expected \(3,\)"):
        assert_within_error_budget(REFERENCE, REFERENCE, ROUGH[:2])


def test_empty_results_are_within_any_budget():
    assert_within_error_budget(np.ones((0, 3)), np.ones((0, 3)), np.ones((0, 3)))


def test_a_wrong_kernel_is_caught():
    """Causal attention aligned at the top left, as some libraries have it, fails where the lengths differ."""

    @settings(max_examples=200, database=None)
    @given(
        attention_cases(dtypes=["float32"], min_len=1, causal=True, windowed=False, block_sparse=False, grouped=False)
    )
    def check(case):
        problem, inputs = case
        window = (None, problem.q_len - problem.kv_len) if problem.q_len > problem.kv_len else None
        other = replace(problem, causal=window is None, window=window)
        out, _ = low_precision_attention(other, **inputs)
        reference, _ = reference_attention(problem, **inputs)
        assert_within_error_budget(out, reference, low_precision_attention(problem, **inputs)[0])

    with pytest.raises(AssertionError, match=r"exceeds the budget|infinite or NaN"):
        check()


def test_every_kind_of_input_is_documented():
    assert set(INPUT_KINDS) == {"normal", "peaked", "wide_exponents", "repeated_maxima"}
