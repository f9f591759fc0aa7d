"""What every algorithm with problems of its own promises: its counters agree, and its numbers are its definition's."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from simattn.algorithms import ALGORITHMS
from simattn.arithmetic.formats import numpy_dtype
from simattn.bounds import compulsory_traffic
from simattn.testing import (
    assert_same_bits,
    assert_within_error_budget,
    attention_inputs,
    plan_options,
    problems_of,
    tiles_for,
)
from simattn.traffic import ArrayTraffic

EXAMPLES = settings.default.max_examples

PROGRAMS = [
    (name, direction)
    for name, algorithm in ALGORITHMS.items()
    if not algorithm.takes_any_mask
    for direction in algorithm.directions
]
every_program = pytest.mark.parametrize(("name", "direction"), PROGRAMS)

CALLS = {"forward": simattn.run, "backward": simattn.run_backward, "decode": simattn.run_decode}
SHAPE = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "dtype")
UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def semantics(problem):
    """What a problem says besides its shape."""
    return {item.name: getattr(problem, item.name) for item in fields(problem) if item.name not in SHAPE}


def arguments_of(problem):
    return {name: getattr(problem, name) for name in SHAPE} | semantics(problem)


@st.composite
def plans(draw, name, problem):
    return {
        "tiles": draw(tiles_for(problem)),
        "plan": draw(st.sampled_from(("gpu", "fit", "paper"))),
        "enforce_capacity": False,
        **draw(plan_options(ALGORITHMS[name])),
    }


@st.composite
def cases(draw, name, direction, **arguments):
    """A problem, its inputs and the plan's arguments."""
    problem = draw(problems_of(ALGORITHMS[name], direction, **arguments))
    inputs = draw(attention_inputs(problem, direction=direction, kinds=["normal"]))
    return problem, inputs, draw(plans(name, problem))


def simulate(name, direction, problem, inputs, plan, arithmetic="float32"):
    return CALLS[direction](name, **inputs, **semantics(problem), arithmetic=arithmetic, **plan)


def wide(inputs, dtype=np.float64):
    return {key: array.astype(dtype) for key, array in inputs.items()}


def low_precision(name, problem, inputs):
    stored = numpy_dtype(problem.dtype)
    return ALGORITHMS[name].reference(
        problem, wide(inputs, np.float32), lambda values: values.astype(stored).astype(np.float32)
    )


def compared(run, direction, problem):
    """Names of the results to compare with the reference: of a backward pass all gradients."""
    if direction == "backward":
        return [f"d{name}" for name, shape in problem.inputs(direction).items() if shape.gradient]
    return list(run.results)


# 1. The three counters agree


@every_program
@settings(max_examples=2 * EXAMPLES)
@given(data=st.data())
def test_count_equals_closed_form(name, direction, data):
    spec = ALGORITHMS[name]
    problem = data.draw(problems_of(spec, direction, max_len=300, max_heads=8, head_dims=(1, 16, 100, 256)))
    arguments = {**arguments_of(problem), **data.draw(plans(name, problem)), "direction": direction}
    assert simattn.count(name, **arguments).global_only() == simattn.closed_form(name, **arguments)


@every_program
@given(data=st.data())
def test_simulation_moves_what_is_counted(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction))
    problem = problem.settled(wide(inputs))
    run = simulate(name, direction, problem, inputs, plan)
    arguments = {**arguments_of(problem), **plan, "direction": direction}
    profile = simattn.profile(name, **arguments)
    assert run.traffic == profile.traffic
    assert run.operations == profile.operations
    assert run.peak_sram_bytes == profile.peak_sram_bytes
    assert run.peak_register_bytes == profile.peak_register_bytes
    assert run.hbm_bytes_by_role == profile.hbm_bytes_by_role
    assert run.traffic.global_only() == simattn.closed_form(name, **arguments)


@every_program
@given(data=st.data())
def test_no_program_moves_less_than_every_implementation_must(name, direction, data):
    problem = data.draw(problems_of(ALGORITHMS[name], direction))
    plan = data.draw(plans(name, problem)) | {"repeat_kv": False}  # copies have names of their own
    counted = simattn.count(name, **arguments_of(problem), **plan, direction=direction).by_array
    for array, least in compulsory_traffic(problem, direction).by_array.items():
        moved = counted.get(array, ArrayTraffic())
        assert moved.hbm_read_bytes >= least.hbm_read_bytes, array
        assert moved.hbm_write_bytes >= least.hbm_write_bytes, array


# 2. The numbers are right


@every_program
@given(data=st.data())
def test_float64_equals_the_definition(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction))
    run = simulate(name, direction, problem, inputs, plan, "float64")
    expected = ALGORITHMS[name].reference(problem, wide(inputs))
    for key in compared(run, direction, problem):
        assert run.results[key].dtype == np.float64
        assert run.results[key].shape == expected[key].shape
        finite = expected[key][np.isfinite(expected[key])]
        floor = 1e-10 * (1 + np.abs(finite).max(initial=0.0))
        assert_within_error_budget(run.results[key], expected[key], expected[key], floor=floor, name=key)


@every_program
@given(data=st.data())
def test_float32_is_within_the_error_budget(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction))
    problem = problem.settled(wide(inputs))
    run = simulate(name, direction, problem, inputs, plan)
    expected, rough = ALGORITHMS[name].reference(problem, wide(inputs)), low_precision(name, problem, inputs)
    terms = problem.q_len + problem.kv_len + problem.head_dim + problem.value_dim
    for key in compared(run, direction, problem):
        finite = expected[key][np.isfinite(expected[key])]
        # Each of the sums' terms rounds once, and what goes through memory as often as it does so.
        relative = terms * UNITS["float32"] + (3 + problem.group_size) * UNITS[problem.dtype]
        floor = relative * (1 + np.abs(finite).max(initial=0.0)) * (1 + problem.group_size * (direction == "backward"))
        assert_within_error_budget(run.results[key], expected[key], rough[key], floor=floor, name=key)


@pytest.mark.parametrize("name", [name for name, direction in PROGRAMS if direction == "backward"])
@settings(max_examples=EXAMPLES // 5)
@given(data=st.data())
def test_gradients_are_those_of_numerical_differentiation(name, data):
    spec, step = ALGORITHMS[name], 1e-6
    shape = {"min_len": 1, "max_len": 6, "max_batch": 1, "max_heads": 2, "head_dims": (1, 3), "dtypes": ["float32"]}
    problem = data.draw(problems_of(spec, "backward", **shape))
    inputs = data.draw(attention_inputs(problem, direction="backward", kinds=["normal"]))
    problem = problem.settled(wide(inputs))
    run = simulate(name, "backward", problem, inputs, {"tiles": (2, 2)}, "float64")
    exact = wide(inputs)
    forward = {key: array for key, array in exact.items() if key != "dout"}
    for key, given_shape in problem.inputs("backward").items():
        if not given_shape.gradient:
            continue
        numerical = np.zeros_like(exact[key])
        for index in np.ndindex(exact[key].shape):
            ends = []
            for side in (step, -step):
                moved = exact[key].copy()
                moved[index] += side
                ends.append((spec.reference(problem, {**forward, key: moved})["out"] * exact["dout"]).sum())
            numerical[index] = (ends[0] - ends[1]) / (2 * step)
        gradient = run.results[f"d{key}"]
        assert np.isfinite(gradient).all()
        assert (np.abs(gradient - numerical) <= 1e-6 * (1 + np.abs(gradient).max(initial=0.0))).all(), key


# 3. Calls


@every_program
@given(data=st.data())
def test_results_have_the_shapes_and_types_of_their_inputs(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction))
    before = {key: array.copy() for key, array in inputs.items()}
    one, two = (simulate(name, direction, problem, inputs, plan) for _ in range(2))
    if direction == "backward":
        for key in compared(one, direction, problem):
            assert one.results[key].shape == inputs[key[1:]].shape
            assert one.results[key].dtype == inputs[key[1:]].dtype
    else:
        assert one.out.shape == (problem.batch, problem.q_len, problem.heads, problem.value_dim)
        assert one.out.dtype == numpy_dtype(problem.output_dtype)
    for key, values in one.results.items():
        assert_same_bits(values, two.results[key], name=key)
    for key, array in before.items():
        assert_same_bits(inputs[key], array, name=key)


@every_program
@given(data=st.data())
def test_inputs_of_other_shapes_are_refused(name, direction, data):
    problem, inputs, _ = data.draw(cases(name, direction, min_len=1))
    for key in problem.own_inputs:
        if key in inputs:
            longer = {**inputs, key: np.concatenate([inputs[key], inputs[key][-1:]])}
            with pytest.raises(ValueError, match=f"{key} has shape"):
                simulate(name, direction, problem, longer, {})
            without = {other: array for other, array in inputs.items() if other != key}
            with pytest.raises(TypeError, match=f"without \\['{key}'\\]"):
                simulate(name, direction, problem, without, {})
