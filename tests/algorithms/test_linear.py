"""Attention without a softmax, whose keys a state stands for: every entry of the registry that is of this kind."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simattn
from simattn.algorithms import ALGORITHMS, linear
from simattn.algorithms.lightning2 import Lightning2Problem, alibi_slopes, fla_slopes, lightning_slopes
from simattn.algorithms.linear import FEATURE_MAPS, FeatureMap, LinearProblem, RecurrentProblem
from simattn.arithmetic.formats import numpy_dtype
from simattn.testing import (
    assert_same_bits,
    assert_within_error_budget,
    attention_inputs,
    plan_options,
    problems_of,
    tiles_for,
)

RECURRENT = [name for name, item in ALGORITHMS.items() if issubclass(item.problem_class, RecurrentProblem)]
PROGRAMS = [(name, direction) for name in RECURRENT for direction in ("forward", "backward")]
every_program = pytest.mark.parametrize(("name", "direction"), PROGRAMS)
every_algorithm = pytest.mark.parametrize("name", RECURRENT)

WHOLE = simattn.BlockMask.from_array(np.ones((1, 1), bool), q_block=8, kv_block=8)
RESULTS = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
SHAPE = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "dtype")
UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def semantics(problem):
    """What a problem says besides its shape."""
    return {
        item.name: getattr(problem, item.name) for item in fields(problem) if item.name not in (*SHAPE, "block_mask")
    }


def arguments_of(problem):
    return {name: getattr(problem, name) for name in SHAPE} | semantics(problem)


@st.composite
def cases(draw, name, direction, **arguments):
    """A problem, its inputs and the plan's arguments."""
    problem = draw(problems_of(ALGORITHMS[name], direction, **arguments))
    inputs = draw(attention_inputs(problem, backward=direction == "backward", kinds=["normal"]))
    plan = {
        "tiles": draw(tiles_for(problem)),
        "plan": draw(st.sampled_from(("gpu", "fit", "paper"))),
        "enforce_capacity": False,
        **draw(plan_options(ALGORITHMS[name])),
    }
    return problem, inputs, plan


def simulate(name, direction, problem, inputs, plan, arithmetic="float32"):
    call = simattn.run if direction == "forward" else simattn.run_backward
    return call(name, **inputs, **semantics(problem), arithmetic=arithmetic, **plan)


def wide(inputs, dtype=np.float64):
    return {key: array.astype(dtype) for key, array in inputs.items()}


def reference(name, problem, inputs):
    return linear.reference(problem, wide(inputs))


def low_precision(problem, inputs):
    stored = numpy_dtype(problem.dtype)
    results = linear.reference(
        problem, wide(inputs, np.float32), lambda values: values.astype(stored).astype(np.float32)
    )
    return {key: array.astype(stored) for key, array in results.items()}


def magnitudes(problem, inputs):
    """How large the terms are that each result sums: the reference's products, of absolute values.

    An error in what exp takes is a relative error of what it gives.
    """
    maps = problem.map
    q, k = (maps.function(array) for array in (wide(inputs)["q"], wide(inputs)["k"]))
    slopes = [np.abs(maps.derivative(wide(inputs)[key])) for key in "qk"]
    absolute = {key: np.abs(array) for key, array in {**wide(inputs), "q": q, "k": k}.items()}
    shape = {key: getattr(problem, key) for key in SHAPE}
    plain = LinearProblem(**shape, causal=problem.causal, feature_map="identity", normalised=problem.divides)
    growth = 1 + max((np.abs(array).max(initial=0.0) for array in wide(inputs).values()), default=0.0)
    out = linear.reference(plain, {key: absolute[key] for key in "qkv"})["out"]
    bounds = {"out": growth * out}
    if "dout" in inputs:
        # Both terms of a weight's gradient, which may cancel, added up.
        dout = absolute["dout"]
        inverse = _inverse_totals(plain, absolute)
        scaled = {**absolute, "dout": dout * inverse}
        unnormalised = replace(plain, normalised=False)
        terms = linear.reference(unnormalised, scaled)
        if problem.divides:
            totals = (scaled["dout"] * out).sum(axis=-1, keepdims=True)
            ones = {**absolute, "v": np.ones((*absolute["v"].shape[:-1], 1)), "dout": totals}
            more = linear.reference(replace(unnormalised, value_dim=1), ones)
            terms = {key: terms[key] + (more[key] if key != "dv" else 0) for key in ("dq", "dk", "dv")}
        bounds |= {"dq": growth * terms["dq"] * slopes[0], "dk": growth * terms["dk"] * slopes[1]}
        bounds["dv"] = growth * terms["dv"]
    return bounds


def _inverse_totals(problem, absolute):
    """1 / Σ weights of every query row, (batch, q_len, heads, 1)."""
    if not problem.divides:
        return 1.0
    ones = {"q": absolute["q"], "k": absolute["k"], "v": np.ones((*absolute["v"].shape[:-1], 1))}
    totals = linear.reference(replace(problem, normalised=False, value_dim=1), ones)["out"]
    return np.where(totals == 0, 0, 1 / np.where(totals == 0, 1, totals))


# 1. Bytes


@every_program
def test_bytes_of_a_token_do_not_depend_on_the_length(name, direction):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", "causal": True, "direction": direction}
    one, two = (simattn.count(name, q_len=length, **shape).hbm_bytes for length in (1 << 12, 1 << 24))
    assert two == one << 12


# 2. The numbers are right


@every_program
@given(data=st.data())
def test_float64_equals_the_definition(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction))
    run, expected, bounds = (
        simulate(name, direction, problem, inputs, plan, "float64"),
        reference(name, problem, inputs),
        magnitudes(problem, inputs),
    )
    for key in RESULTS[direction]:
        assert getattr(run, key).dtype == np.float64
        assert_within_error_budget(getattr(run, key), expected[key], expected[key], floor=1e-13 * bounds[key], name=key)


@every_program
@given(data=st.data())
def test_float32_is_within_the_error_budget(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction))
    run, expected, rough, bounds = (
        simulate(name, direction, problem, inputs, plan),
        reference(name, problem, inputs),
        low_precision(problem, inputs),
        magnitudes(problem, inputs),
    )
    # Each of the sums' terms rounds once, and what goes through memory as often as it does so.
    roundings = 1 + problem.group_size * (run.plan.grouped_gradients == "expand") + (direction == "backward")
    terms = problem.q_len + problem.kv_len + problem.head_dim + problem.value_dim
    relative = terms * UNITS["float32"] + roundings * UNITS[problem.dtype]
    for key in RESULTS[direction]:
        assert getattr(run, key).dtype == numpy_dtype(problem.dtype)
        assert_within_error_budget(getattr(run, key), expected[key], rough[key], floor=relative * bounds[key], name=key)


# 3. What is not seen does not matter


@every_program
@given(data=st.data(), special=st.sampled_from((np.nan, np.inf, -np.inf)))
def test_later_keys_reach_no_row(name, direction, data, special):
    problem, inputs, plan = data.draw(cases(name, direction, min_len=1, causal=True))
    row = data.draw(st.integers(0, problem.q_len - 1))
    changed = {key: array.copy() for key, array in inputs.items()}
    for key in "kv":
        changed[key][:, row] = special
    for key in {"q", "dout"} & set(inputs):
        changed[key][:, row] = special
    before, after = (simulate(name, direction, problem, some, plan) for some in (inputs, changed))
    key = "out" if direction == "forward" else "dq"
    assert_same_bits(getattr(after, key)[:, :row], getattr(before, key)[:, :row], name=key)
    # Where outputs are divided, later queries hand what they saw on to all their keys.
    if direction == "backward" and not problem.divides:
        for key in ("dk", "dv"):
            assert_same_bits(getattr(after, key)[:, row + 1 :], getattr(before, key)[:, row + 1 :], name=key)


# 4. Equivalences


@given(data=st.data())
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_lightning_without_decay_is_unnormalised_linear(direction, data):
    problem, inputs, plan = data.draw(cases("lightning2", direction))
    still = replace(problem, slopes=(0.0,) * problem.heads)
    shape = {key: getattr(problem, key) for key in SHAPE}
    plain = LinearProblem(**shape, causal=True, feature_map="identity", normalised=False)
    one, two = (
        simulate(kind, direction, some, inputs, plan) for kind, some in (("lightning2", still), ("linear", plain))
    )
    assert one.traffic.global_only() == two.traffic.global_only()
    for key in RESULTS[direction]:
        assert_same_bits(getattr(one, key), getattr(two, key), name=key)


@every_program
@given(data=st.data())
def test_grouped_heads_equal_repeated_heads(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction))
    repeated = {**inputs, **{key: np.repeat(inputs[key], problem.group_size, axis=2) for key in "kv"}}
    grouped, each = (
        simulate(name, direction, some, given_inputs, plan, "float64")
        for some, given_inputs in ((problem, inputs), (replace(problem, kv_heads=problem.heads), repeated))
    )
    bounds = magnitudes(problem, inputs)
    for key in RESULTS[direction]:
        expected = getattr(each, key)
        if key in ("dk", "dv"):
            expected = expected.reshape(
                *expected.shape[:2], problem.kv_heads, problem.group_size, expected.shape[3]
            ).sum(axis=3)
        assert_within_error_budget(getattr(grouped, key), expected, expected, floor=1e-13 * bounds[key], name=key)


def test_a_feature_map_of_your_own():
    square = FeatureMap("square", np.square, lambda x: 2 * x)
    generator = np.random.default_rng(0)
    q, k, v, dout = (generator.standard_normal((1, 9, 2, 4)).astype(np.float32) for _ in range(4))
    run = simattn.run("linear", q, k, v, causal=True, feature_map=square, arithmetic="float64", tiles=(4, 4))
    problem = LinearProblem(heads=2, q_len=9, head_dim=4, dtype="float32", causal=True, feature_map=square)
    expected = linear.reference(problem, wide({"q": q, "k": k, "v": v, "dout": dout}))
    np.testing.assert_allclose(run.out, expected["out"], rtol=1e-12, atol=1e-12)
    gradients = simattn.run_backward(
        "linear", q, k, v, dout, causal=True, feature_map=square, arithmetic="float64", tiles=(4, 4)
    )
    for key in ("dq", "dk", "dv"):
        np.testing.assert_allclose(getattr(gradients, key), expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [("linear", {}, ["out", "totals"]), ("linear", {"normalised": False}, []), ("lightning2", {}, [])],
    ids=str,
)
def test_the_backward_pass_takes_what_the_forward_pass_saved(name, arguments, names, arithmetic):
    generator = np.random.default_rng(0)
    q, k, v, dout = (generator.standard_normal((1, 9, 2, 4)).astype(np.float32) for _ in range(4))
    options = {"causal": True, "arithmetic": arithmetic, **arguments}
    saved = simattn.run(name, q, k, v, **options).saved
    assert sorted(saved) == names
    given_saved, found = (simattn.run_backward(name, q, k, v, dout, saved=left, **options) for left in (saved, None))
    assert given_saved.traffic == found.traffic
    for key in ("dq", "dk", "dv"):
        assert_same_bits(getattr(given_saved, key), getattr(found, key), name=key)
    if saved:
        zeros = {key: np.zeros_like(array) for key, array in saved.items()}
        other = simattn.run_backward(name, q, k, v, dout, saved=zeros, **options)
        assert all((getattr(other, key) != getattr(found, key)).any() for key in ("dq", "dk", "dv"))


# 5. Slopes


def test_slopes_by_convention():
    assert alibi_slopes(8) == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(12) == [2.0**-power for power in range(1, 9)] + [2.0 ** -(power / 2) for power in (1, 3, 5, 7)]
    assert fla_slopes(4, 0, 2) == [0, 2, 4, 6]
    assert fla_slopes(4, 1, 2) == [0, 1, 2, 3]
    assert lightning_slopes(8, 0, 3) == pytest.approx([slope * (1 + 1e-5) for slope in alibi_slopes(8)])
    assert lightning_slopes(8, 2, 3) == pytest.approx([slope * 1e-5 for slope in alibi_slopes(8)])
    made = Lightning2Problem(heads=8, q_len=1, slopes="alibi")
    np.testing.assert_allclose(made.decays, np.exp(-np.array(alibi_slopes(8))))


# 6. Empty and single


@every_program
@pytest.mark.parametrize("shape", [{"batch": 0, "q_len": 3}, {"q_len": 0}, {"q_len": 1}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_and_single(name, direction, shape, causal):
    batch, length = shape.get("batch", 1), shape["q_len"]
    inputs = {
        key: np.ones((batch, length, 2 if key in ("q", "dout") else 1, 4), np.float32)
        for key in ("q", "k", "v", "dout")
    }
    if direction == "forward":
        del inputs["dout"]
        run = simattn.run(name, **inputs, causal=causal)
        assert run.out.shape == inputs["q"].shape
        np.testing.assert_array_equal(run.out, 1 if name == "linear" else 4)
    else:
        run = simattn.run_backward(name, **inputs, causal=causal)
        assert [getattr(run, f"d{key}").shape for key in "qkv"] == [inputs[key].shape for key in "qkv"]


@pytest.mark.parametrize(
    "shape", [{"q_len": 5, "kv_len": 0}, {"q_len": 0, "kv_len": 5}, {"q_len": 3, "kv_len": 7}], ids=str
)
def test_cross_attention(shape):
    inputs = {"q": np.ones((1, shape["q_len"], 1, 4), np.float32)}
    inputs |= {key: np.ones((1, shape["kv_len"], 1, 4), np.float32) for key in "kv"}
    run = simattn.run("linear", **inputs)
    np.testing.assert_array_equal(run.out, 1 if shape["kv_len"] else 0)


# 7. Bad input


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"),
    [
        ("linear", {"scale": 0.5}, ValueError, "scale=0.5: expected 1"),
        ("linear", {"window": (3, 0)}, ValueError, r"window=\(3, 0\): expected None"),
        ("linear", {"block_mask": WHOLE}, ValueError, "block_mask is given: expected None"),
        ("linear", {"dtype": "float8_e4m3fn"}, ValueError, "dtype='float8_e4m3fn': expected float32"),
        ("linear", {"causal": True, "kv_len": 9}, ValueError, "kv_len=9 under a causal mask: expected q_len=8"),
        ("linear", {"feature_map": "gelu"}, ValueError, "feature_map='gelu': expected one of"),
        ("linear", {"feature_map": None}, TypeError, "feature_map=None: expected one of .*or a FeatureMap"),
        ("linear", {"feature_map": np.exp}, TypeError, "expected one of .*or a FeatureMap of your own"),
        ("linear", {"normalised": None}, TypeError, "normalised=None: expected a bool"),
        ("lightning2", {"causal": "x"}, TypeError, "causal='x': expected a bool; lightning2 is causal"),
        ("lightning2", {"slopes": None}, TypeError, "slopes=None: expected one of"),
        ("lightning2", {"slopes": {0.1, 0.2}}, TypeError, "expected one of .* or a number for each head"),
        ("lightning2", {"slopes": ["1", "2"]}, TypeError, "expected one of .* or a number for each head"),
        ("linear", {"normalised": 1}, TypeError, "normalised=1: expected a bool"),
        ("linear", {"grouped_gradients": "loop"}, ValueError, "grouped_gradients='loop': expected one of"),
        ("linear", {"slopes": "fla"}, TypeError, "slopes='fla': 'slopes' is no .*: .*'feature_map'.*'normalised'"),
        ("flash2", {"feature_map": "elu1"}, TypeError, "'feature_map' is no argument and no plan option of flash2"),
        ("lightning2", {"kv_len": 9}, ValueError, "kv_len=9 under a causal mask: expected q_len=8"),
        ("lightning2", {"slopes": "alibis"}, ValueError, "slopes='alibis': expected one of"),
        ("lightning2", {"slopes": 3}, TypeError, "slopes=3: expected one of .* or a number for each head"),
        ("lightning2", {"slopes": [0.1]}, ValueError, "slopes has 1 numbers: expected 2"),
        ("lightning2", {"slopes": [0.1, -1]}, ValueError, "finite numbers of at least 0"),
        ("lightning2", {"slopes": [0.1, np.nan]}, ValueError, "finite numbers of at least 0"),
        ("lightning2", {"layer": 2, "layers": 2}, ValueError, "layer=2: expected less than layers=2"),
        ("lightning2", {"layers": 0}, ValueError, "layers=0: expected an integer of at least 1"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(name, arguments, error, words):
    with pytest.raises(error, match=words):
        simattn.count(name, **{"q_len": 8, "heads": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, np.exp, np.exp), TypeError, "name=3: expected a text"),
        (("mine", None, np.exp), TypeError, "function=None: expected a function"),
        (("mine", np.exp, 1), TypeError, "derivative=1: expected a function"),
        (("mine", np.exp, np.exp, -1), ValueError, "exponentials=-1: expected an integer of at least 0"),
    ],
    ids=str,
)
def test_bad_feature_maps_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        FeatureMap(*arguments)


def test_a_feature_map_that_changes_the_shape_is_named():
    ones = np.ones((1, 3, 1, 2), np.float32)
    with pytest.raises(ValueError, match="the function of feature map 'sum' makes shape"):
        simattn.run("linear", ones, ones, ones, feature_map=FeatureMap("sum", np.sum, np.ones_like))


def test_a_feature_map_of_the_identitys_name_is_not_the_identity():
    ones = np.full((1, 3, 1, 2), 2, np.float32)
    square = FeatureMap("identity", np.square, lambda x: 2 * x)
    out = simattn.run("linear", ones, ones, ones, feature_map=square, normalised=False).out
    np.testing.assert_array_equal(out, 3 * 2 * 16 * 2)


@every_algorithm
@given(data=st.data(), special=st.sampled_from((np.nan, np.inf)))
def test_the_reference_keeps_to_what_is_seen(name, data, special):
    problem, inputs, _ = data.draw(cases(name, "forward", min_len=1, causal=True))
    row = data.draw(st.integers(0, problem.q_len - 1))
    changed = wide(inputs)
    changed["k"][:, row] = changed["v"][:, row] = special
    before, after = (linear.reference(problem, some)["out"][:, :row] for some in (wide(inputs), changed))
    assert np.isfinite(after).all()
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-12)


def test_feature_maps_and_their_derivatives():
    x = np.linspace(-3, 3, 61) + 0.01
    for item in FEATURE_MAPS.values():
        numerical = (item.function(x + 1e-6) - item.function(x - 1e-6)) / 2e-6
        np.testing.assert_allclose(item.derivative(x), numerical, rtol=1e-6, atol=1e-6)
