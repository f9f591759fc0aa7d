"""What every registered algorithm promises, on random problems, tiles and plan options."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import simattn
from simattn import machine
from simattn.algorithms import ALGORITHMS
from simattn.arithmetic.formats import FLOAT8, ITEM_BYTES, numpy_dtype
from simattn.sums import ceil_div
from simattn.testing import (
    assert_same_bits,
    assert_within_error_budget,
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

PROGRAMS = [
    (name, direction)
    for name, algorithm in ALGORITHMS.items()
    if algorithm.takes_any_mask
    for direction in algorithm.directions
]
every_program = pytest.mark.parametrize(("name", "direction"), PROGRAMS)
every_forward = pytest.mark.parametrize("name", [name for name, direction in PROGRAMS if direction == "forward"])
every_backward = pytest.mark.parametrize("name", [name for name, direction in PROGRAMS if direction == "backward"])

MASK_ARGUMENTS = ("scale", "causal", "window", "block_mask")
RESULTS = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv"), "decode": ("out", "lse")}
CALLS = {"forward": simattn.run, "backward": simattn.run_backward, "decode": simattn.run_decode}


def arguments_of(problem, names=None):
    """The arguments of a count that make a problem."""
    names = [item.name for item in fields(problem)] if names is None else names
    return {name: getattr(problem, name) for name in names}


@st.composite
def plans(draw, name, problem):
    """Arguments that choose a plan: tiles, options, and which kind's defaults fill in the rest."""
    return {
        "tiles": draw(tiles_for(problem, with_depth=ALGORITHMS[name].chunks_columns)),
        "plan": draw(st.sampled_from(("gpu", "fit", "paper"))),
        "enforce_capacity": False,
        **draw(plan_options(ALGORITHMS[name])),
    }


@st.composite
def cases(draw, name, direction, *, input_arguments=None, **arguments):
    """A problem, its inputs and the plan's arguments."""
    problem = draw(attention_problems(**arguments))
    inputs = draw(attention_inputs(problem, backward=direction == "backward", **(input_arguments or {})))
    return problem, inputs, draw(plans(name, problem))


stack_sizes = st.sampled_from((machine.STACKED_ELEMENTS, 1, 300))
"""Elements simulated together: everything that these small problems hold, one thread block, a few."""


def simulate(name, direction, problem, inputs, plan, arithmetic="float32", *, stack=None, **descales):
    """Run the program that a case describes."""
    masks = arguments_of(problem, MASK_ARGUMENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "STACKED_ELEMENTS", stack or machine.STACKED_ELEMENTS)
        return CALLS[direction](name, **inputs, **masks, **descales, arithmetic=arithmetic, **plan)


def results(run):
    return {name: getattr(run, name) for name in RESULTS[run.direction]}


def reference_results(direction, problem, inputs, **descales):
    if direction != "backward":
        values = reference_attention(problem, **inputs, **descales)
    else:
        values = reference_attention_backward(problem, **inputs)
    return dict(zip(RESULTS[direction], values, strict=True))


def low_precision_results(direction, problem, inputs, **descales):
    if direction != "backward":
        values = low_precision_attention(problem, **inputs, **descales)
    else:
        values = low_precision_attention_backward(problem, **inputs)
    return dict(zip(RESULTS[direction], values, strict=True))


def by_query_head(problem, array):
    return np.repeat(array, problem.heads // array.shape[2], axis=2)


def by_kv_head(problem, array):
    batch, rows, _, columns = array.shape
    return array.reshape(batch, rows, problem.kv_heads, problem.group_size, columns).sum(axis=3)


def magnitudes(problem, inputs, direction):
    """How large the terms are that each result sums, and by how much rounding grows: one bound per element.

    Rounding errors are relative to the terms, not to what cancellation leaves of them, and an error in a score
    becomes a relative error of its probability.
    """
    absolute = {name: np.abs(array.astype(np.float64)) for name, array in inputs.items()}
    q, k, v = (by_query_head(problem, absolute[name]) for name in "qkv")
    scores = problem.scale * np.einsum("bihd,bjhd->bhij", q, k)
    growth = 1 + scores.max(initial=0.0)
    wide = replace(problem, value_dim=max(1, problem.kv_len))
    identity = np.broadcast_to(
        np.eye(problem.kv_len, wide.value_dim)[None, :, None],
        (problem.batch, problem.kv_len, problem.kv_heads, wide.value_dim),
    )
    weights, _ = reference_attention(wide, inputs["q"], inputs["k"], identity)
    weights = np.moveaxis(weights, 1, 2)[..., : problem.kv_len]  # (batch, heads, q_len, kv_len)
    out = np.einsum("bhij,bjhd->bihd", weights, v)
    if direction != "backward":
        return {"out": growth * out, "lse": growth * np.ones(scores.shape[:3])}
    dout = absolute["dout"]
    dprobabilities = np.einsum("bihd,bjhd->bhij", dout, v)
    delta = np.einsum("bihd,bihd->bhi", dout, out)[..., None]
    dscores = problem.scale * weights * (dprobabilities + delta)
    return {
        "dq": growth * np.einsum("bhij,bjhd->bihd", dscores, k),
        "dk": growth * by_kv_head(problem, np.einsum("bhij,bihd->bjhd", dscores, q)),
        "dv": growth * by_kv_head(problem, np.einsum("bhij,bihd->bjhd", weights, dout)),
    }


def descaled(problem, inputs, descales):
    """Inputs times their descale factors, if any, which serve all query heads of a group."""
    result = dict(inputs)
    for key in "qkv" if descales else "":
        factors = np.repeat(descales[f"{key}_descale"], inputs[key].shape[2] // problem.kv_heads, axis=1)
        result[key] = inputs[key].astype(np.float64) * factors[:, None, :, None]
    return result


def check_simulated_counts(name, direction, problem, inputs, plan, stack=None):
    run = simulate(name, direction, problem, inputs, plan, stack=stack)
    arguments = {**arguments_of(problem), **plan, "direction": direction}
    profile = simattn.profile(name, **arguments)
    assert run.traffic == profile.traffic
    assert run.operations == profile.operations
    assert run.peak_sram_bytes == profile.peak_sram_bytes
    assert run.peak_register_bytes == profile.peak_register_bytes
    assert run.hbm_bytes_by_role == profile.hbm_bytes_by_role
    assert run.plan == profile.plan
    assert run.traffic.global_only() == simattn.closed_form(name, **arguments)


def check_float64(name, direction, problem, inputs, plan, stack=None, **descales):
    run = simulate(name, direction, problem, inputs, plan, "float64", stack=stack, **descales)
    bounds = magnitudes(problem, descaled(problem, inputs, descales), direction)
    for key, expected in reference_results(direction, problem, inputs, **descales).items():
        actual = getattr(run, key)
        assert actual.dtype == np.float64
        assert_within_error_budget(actual, expected, expected, floor=1e-13 * bounds[key], name=key)


def check_float32(name, direction, problem, inputs, plan, stack=None):
    run = simulate(name, direction, problem, inputs, plan, stack=stack)
    bounds = magnitudes(problem, inputs, direction)
    expected = reference_results(direction, problem, inputs)
    budget = low_precision_results(direction, problem, inputs)
    for key, actual in results(run).items():
        stored = "float32" if key == "lse" else problem.output_dtype
        assert actual.dtype == numpy_dtype(stored)
        assert_within_error_budget(
            actual, expected[key], budget[key], floor=rounding_floor(run, bounds[key], stored), name=key
        )


# 1. The three counters agree


@every_program
@settings(max_examples=3 * EXAMPLES)
@given(data=st.data())
def test_count_equals_closed_form(name, direction, data):
    problem = data.draw(attention_problems(max_len=300, max_heads=8, head_dims=(1, 16, 100, 256)))
    arguments = {**arguments_of(problem), **data.draw(plans(name, problem)), "direction": direction}
    assert simattn.count(name, **arguments).global_only() == simattn.closed_form(name, **arguments)


@every_program
@given(data=st.data(), stack=stack_sizes)
def test_simulation_moves_what_is_counted(name, direction, data, stack):
    check_simulated_counts(name, direction, *data.draw(cases(name, direction)), stack)


# 2. The numbers are right


@every_program
@given(data=st.data(), stack=stack_sizes)
def test_float64_equals_the_definition(name, direction, data, stack):
    check_float64(name, direction, *data.draw(cases(name, direction)), stack)


@every_program
@given(data=st.data(), stack=stack_sizes)
def test_float32_is_within_the_error_budget(name, direction, data, stack):
    check_float32(name, direction, *data.draw(cases(name, direction)), stack)


def rounding_floor(run, bound, stored):
    """What rounding to memory may cost where the low-precision reference is exact by luck."""
    problem, plan = run.problem, run.plan
    unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    roundings = 1
    if getattr(plan, "hbm_accumulator", None) == "storage":
        roundings += ceil_div(problem.kv_len, plan.tiles.kv)
    if plan.grouped_gradients == "expand":
        roundings += problem.group_size
    return (4 * unit["float32"] + roundings * unit[stored]) * bound


@every_forward
@given(data=st.data(), stack=stack_sizes)
def test_float8_forward_scales_and_counts_its_descales(name, data, stack):
    problem, inputs, plan = data.draw(cases(name, "forward", dtypes=FLOAT8))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = (problem.batch, problem.kv_heads)
    descales = {f"{key}_descale": generator.uniform(0.25, 2, shape).astype(np.float32) for key in "qkv"}
    check_float64(name, "forward", problem, inputs, plan, stack, **descales)
    check_simulated_counts(name, "forward", problem, inputs, plan, stack)
    run = simulate(name, "forward", problem, inputs, plan, stack=stack)
    assert run.out.dtype == numpy_dtype("bfloat16")
    if problem.batch and problem.visible_elements().any():
        for key in descales:
            once = problem.batch * problem.kv_heads * ITEM_BYTES["float32"]
            assert run.traffic.by_array[key].hbm_read_bytes >= once


@pytest.mark.parametrize("dtype", FLOAT8)
@every_backward
def test_float8_backward_is_refused(name, dtype):
    with pytest.raises(ValueError, match=rf"backward.*{dtype}|direction='backward'"):
        simattn.count(name, q_len=8, dtype=dtype, direction="backward")


# 3. NaN and infinity stay where they are seen


@st.composite
def poisoned_rows(draw, problem):
    """Some query rows and some key rows, of one batch entry and KV head."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from((0.05, 0.3, 1.0)))
    return {
        "queries": generator.random(problem.q_len) < share if draw(st.booleans()) else np.zeros(problem.q_len, bool),
        "keys": generator.random(problem.kv_len) < share,
        "where": (draw(st.integers(0, problem.batch - 1)), draw(st.integers(0, problem.kv_heads - 1))),
    }


def with_rows(problem, inputs, rows, query_value, key_value, value_value):
    """The inputs with poisoned rows set to a value, in one batch entry and the heads of one KV head."""
    changed = {name: array.copy() for name, array in inputs.items()}
    batch, head = rows["where"]
    group = slice(head * problem.group_size, (head + 1) * problem.group_size)
    for name in {"q", "dout"} & set(inputs):
        changed[name][batch, rows["queries"], group] = query_value
    changed["k"][batch, rows["keys"], head] = key_value
    changed["v"][batch, rows["keys"], head] = value_value
    return changed


def affected_rows(problem, rows):
    """Which query rows see a poisoned key or are poisoned, and which keys those queries see."""
    seen = problem.visible_elements()
    queries = seen[:, rows["keys"]].any(axis=1) | rows["queries"]
    return queries, seen[queries].any(axis=0)


def unaffected(problem, rows, name, array):
    """The array with 0 where poisoned rows may have changed it."""
    queries, keys = affected_rows(problem, rows)
    batch, head = rows["where"]
    group = slice(head * problem.group_size, (head + 1) * problem.group_size)
    kept = array.copy()
    if name == "lse":
        kept[batch, group][:, queries] = 0
    elif name in ("out", "dq"):
        kept[batch, queries, group] = 0
    else:
        kept[batch, keys, head] = 0
    return kept


@every_program
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data(), arithmetic=st.sampled_from(("float32", "float64")), stack=stack_sizes)
def test_non_finite_rows_reach_only_what_sees_them(name, direction, data, arithmetic, stack):
    case = cases(name, direction, min_len=1)
    problem, inputs, plan = data.draw(case)
    rows = data.draw(poisoned_rows(problem))
    special = data.draw(st.tuples(*[st.sampled_from((np.nan, np.inf, -np.inf))] * 3))
    runs = [
        simulate(name, direction, problem, with_rows(problem, inputs, rows, *values), plan, arithmetic, stack=stack)
        for values in (special, (0, 0, 0))
    ]
    for key in RESULTS[direction]:
        poisoned, clean = (unaffected(problem, rows, key, getattr(run, key)) for run in runs)
        assert_same_bits(poisoned, clean, name=key)
        assert np.isfinite(poisoned[~np.isneginf(clean)]).all()


@every_program
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data(), which=st.sampled_from("kv"), stack=stack_sizes)
def test_visible_nan_propagates(name, direction, data, which, stack):
    problem, inputs, plan = data.draw(cases(name, direction, min_len=1))
    rows = {**data.draw(poisoned_rows(problem)), "queries": np.zeros(problem.q_len, bool)}
    changed = with_rows(problem, inputs, rows, 0, np.nan, np.nan)
    changed = {**inputs, which: changed[which]}
    run = simulate(name, direction, problem, changed, plan, stack=stack)
    queries, keys = affected_rows(problem, rows)
    batch, head = rows["where"]
    group = slice(head * problem.group_size, (head + 1) * problem.group_size)
    if direction != "backward":
        assert np.isnan(run.out[batch, queries, group]).all()
        assert np.isnan(run.lse[batch, group][:, queries]).all() == (which == "k") or not queries.any()
    else:
        assert np.isnan(run.dq[batch, queries, group]).all()
        assert np.isnan(run.dk[batch, keys, head]).all()


@every_program
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_hidden_inputs_may_hold_anything(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction, input_arguments={"hidden_is_finite": False}))
    for key, values in results(simulate(name, direction, problem, inputs, plan)).items():
        assert np.isfinite(values).all() or key == "lse"


# 4. Ordinary, empty and single


@every_program
@pytest.mark.parametrize(
    ("plan", "mask"), [("gpu", {"causal": True}), ("fit", {"window": (100, 20)}), ("paper", {})], ids=str
)
def test_plans_chosen_for_ordinary_shapes(name, direction, plan, mask):
    problem = simattn.AttentionProblem(
        heads=2, kv_heads=1, q_len=301, kv_len=334, head_dim=64, value_dim=40, dtype="bfloat16", **mask
    )
    inputs = find(
        attention_inputs(problem, backward=direction == "backward", kinds=["normal"]),
        lambda _: True,
        settings=settings(max_examples=1, database=None),
    )
    for check in (check_simulated_counts, check_float64, check_float32):
        check(name, direction, problem, inputs, {"plan": plan})


@every_program
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 0, "q_len": 3},
        {"q_len": 0},
        {"q_len": 0, "kv_len": 5},
        {"q_len": 5, "kv_len": 0},
        {"q_len": 1},
        {"q_len": 1, "kv_len": 7, "causal": True},
        {"q_len": 7, "kv_len": 1, "causal": True},
    ],
    ids=str,
)
def test_empty_and_single(name, direction, shape):
    problem = simattn.AttentionProblem(**shape, heads=2, kv_heads=1, head_dim=4, dtype="float32")
    sizes = {"q": (problem.q_len, 2), "k": (problem.kv_len, 1), "v": (problem.kv_len, 1), "dout": (problem.q_len, 2)}
    inputs = {key: np.ones((problem.batch, *size, 4), np.float32) for key, size in sizes.items()}
    if direction != "backward":
        del inputs["dout"]
    check_simulated_counts(name, direction, problem, inputs, {})
    run = simulate(name, direction, problem, inputs, {})
    for key, values in results(run).items():
        assert values.shape == (
            (problem.batch, 2, problem.q_len) if key == "lse" else inputs[{"out": "q"}.get(key, key[1:])].shape
        )
    sees = problem.visible_elements().any(axis=1)
    if direction != "backward":
        np.testing.assert_array_equal(run.out[:, sees], 1)
        np.testing.assert_array_equal(run.out[:, ~sees], 0)
        np.testing.assert_array_equal(run.lse[:, :, ~sees], -np.inf)
    else:
        np.testing.assert_allclose(run.dq, 0, atol=1e-6)


# 5. Grouped heads are repeated heads


@every_program
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_grouped_heads_equal_repeated_heads(name, direction, data):
    problem, inputs, plan = data.draw(cases(name, direction))
    grouped = simulate(name, direction, problem, inputs, plan, "float64")
    repeated_inputs = {**inputs, **{key: by_query_head(problem, inputs[key]) for key in "kv"}}
    repeated_problem = replace(problem, kv_heads=problem.heads)
    repeated = simulate(name, direction, repeated_problem, repeated_inputs, plan, "float64")
    bounds = magnitudes(problem, inputs, direction)
    for key, values in results(repeated).items():
        expected = by_kv_head(problem, values) if key in ("dk", "dv") else values
        assert_within_error_budget(getattr(grouped, key), expected, expected, floor=1e-13 * bounds[key], name=key)


# 6. Any size, exactly


@every_program
@settings(max_examples=3 * EXAMPLES // 2)
@given(data=st.data())
def test_counts_of_any_size_equal_the_closed_form(name, direction, data):
    lengths = st.integers(0, 10**12)
    problem = data.draw(attention_problems(max_len=10**12, head_dims=(64, 128, 100), block_sparse=False))
    tiles = st.integers(1, 2**20)
    arguments = {
        **arguments_of(problem),
        **data.draw(plan_options(ALGORITHMS[name])),
        "tiles": (data.draw(tiles), data.draw(tiles)),
        "direction": direction,
        "enforce_capacity": False,
    }
    if problem.window is not None:
        arguments["window"] = data.draw(st.tuples(lengths, lengths))
    counted = simattn.count(name, **arguments)
    assert counted.global_only() == simattn.closed_form(name, **arguments)
    for counters in counted.by_array.values():
        assert all(type(getattr(counters, item.name)) is int for item in fields(counters))


@every_program
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (4095, 0)}], ids=str)
def test_the_work_of_counting_does_not_grow(name, direction, mask, monkeypatch):
    calls = []
    original = machine.Machine._charge_hbm

    def charge(self, *arguments):
        calls.append(arguments)
        original(self, *arguments)

    monkeypatch.setattr(machine.Machine, "_charge_hbm", charge)
    work = []
    for length in (10**6 + 1, 10**12 + 1):  # the last tile is clipped in both
        calls.clear()
        shape = {"q_len": length, "heads": 32, "kv_heads": 8, "head_dim": 128, "tiles": (64, 64)}
        arguments = {**shape, **mask, "direction": direction}
        counted = simattn.count(name, **arguments)
        assert counted.global_only() == simattn.closed_form(name, **arguments)
        work.append(len(calls))
    assert work[0] == work[1] > 0


@every_program
def test_counts_do_not_depend_on_the_score_scale(name, direction):
    shape = {"q_len": 100, "head_dim": 16, "direction": direction}
    assert simattn.count(name, **shape, scale=0.5) == simattn.count(name, **shape, scale=3.0)


# 8. Batch entries and heads add up


@every_program
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_counts_are_additive_over_batch_and_heads(name, direction, data):
    problem = data.draw(attention_problems(max_batch=5, max_heads=8, max_len=200))
    arguments = {**arguments_of(problem), **data.draw(plans(name, problem)), "direction": direction}
    one = {**arguments, "batch": 1, "heads": problem.group_size, "kv_heads": 1}
    streams = problem.batch * problem.kv_heads
    assert simattn.count(name, **arguments) == streams * simattn.count(name, **one)


# 9. Visited tiles, by looking at the mask


def visited_tiles(problem, tiles):
    """Clipped shapes of the tiles that hold a visible element."""
    seen = problem.visible_elements()
    for first in range(0, problem.q_len, tiles.q):
        for column in range(0, problem.kv_len, tiles.kv):
            tile = seen[first : first + tiles.q, column : column + tiles.kv]
            if tile.any():
                yield tile.shape


def read_bytes(traffic, name):
    return traffic.by_array[name].hbm_read_bytes if name in traffic.by_array else 0


@settings(max_examples=3 * EXAMPLES)
@given(data=st.data())
def test_flash2_loads_keys_and_multiplies_once_for_every_visited_tile(data):
    problem = data.draw(attention_problems(max_len=60))
    tiles = data.draw(tiles_for(problem))
    run = simattn.profile("flash2", **arguments_of(problem), tiles=tiles, enforce_capacity=False)
    shapes = list(visited_tiles(problem, tiles))
    heads = problem.batch * problem.heads
    keys = heads * sum(columns for _, columns in shapes)
    assert read_bytes(run.traffic, "k") == keys * problem.head_dim * problem.item_bytes
    assert read_bytes(run.traffic, "v") == keys * problem.value_dim * problem.item_bytes
    elements = heads * sum(rows * columns for rows, columns in shapes)
    assert run.operations.matmul_flops == 2 * elements * (problem.head_dim + problem.value_dim)


@settings(max_examples=3 * EXAMPLES)
@given(data=st.data())
def test_flash1_loads_queries_once_for_every_visited_tile(data):
    problem = data.draw(attention_problems(max_len=60))
    tiles = data.draw(tiles_for(problem))
    counted = simattn.count("flash1", **arguments_of(problem), tiles=tiles, enforce_capacity=False)
    queries = problem.batch * problem.heads * sum(rows for rows, _ in visited_tiles(problem, tiles))
    assert read_bytes(counted, "q") == queries * problem.head_dim * problem.item_bytes


# By hand, as the papers count: elements, every tile whole, one head, every element of four bytes

N, D, Q_TILE, KV_TILE = 256, 64, 64, 32
T_R, T_C = N // Q_TILE, N // KV_TILE
INITIALISE, CONVERT = N * D, 2 * N * D

BY_HAND = {
    # Q Kᵀ, softmax, P V: S written and read, P written and read
    ("standard", "forward"): 4 * N**2 + N * D * (T_C + 2 * T_R + 1) + N,
    # dV = Pᵀ dO; dP = dO Vᵀ; dS from P and dP; dQ = dS K; dK = dSᵀ Q
    ("standard", "backward"): (2 + 2 + 3) * N**2 + N * D * (3 * T_C + 2 * T_R + 3),
    # two passes over K, one over V
    ("online_softmax", "forward"): 2 * N * D + 3 * N * D * T_R + N,
    ("online_softmax", "backward"): 3 * N * D + 4 * N * D * T_R + 2 * (INITIALISE + N * D * T_R + CONVERT),
    # arXiv 2205.14135, Algorithms 1 and 4; the first with O, ℓ, m initialised and the log-sum-exp made of ℓ and m
    ("flash1", "forward"): 2 * N * D + T_C * N * (3 * D + 4) + INITIALISE + 2 * N + 3 * N,
    ("flash1", "backward"): 4 * N * D + T_C * (5 * N * D + 2 * N) + INITIALISE,
    ("flash2", "forward"): 2 * N * D + 2 * N * D * T_R + N,
    ("flash2", "backward"): 9 * N * D + N + T_C * (3 * N * D + 2 * N),
    ("flash3", "forward"): 2 * N * D + 2 * N * D * T_R + N,
    ("flash3", "backward"): 9 * N * D + N + T_C * (3 * N * D + 2 * N),
    # Q and O (both ways) once per key tile, K and V once per query tile; O initialised and normalised
    ("small_cache", "forward"): 3 * N * D * T_C + 2 * N * D * T_R + INITIALISE + 2 * N * D + N,
}


@every_program
def test_counts_by_hand(name, direction):
    counted = simattn.count(
        name,
        q_len=N,
        head_dim=D,
        dtype="float32",
        tiles=(Q_TILE, KV_TILE),
        direction=direction,
        plan="paper",
    )
    assert counted.hbm_bytes == 4 * BY_HAND[name, direction]


def test_causal_flash2_by_hand():
    tiles, size = 8, N // 8
    counted = simattn.count("flash2", q_len=N, head_dim=D, dtype="bfloat16", tiles=(size, size), causal=True)
    keys = tiles * (tiles + 1) // 2 * size * D * 2
    assert counted.by_array["k"].hbm_read_bytes == counted.by_array["v"].hbm_read_bytes == keys
    assert counted.hbm_bytes == 2 * keys + 2 * N * D * 2 + N * 4


# Cases that failed once

FOUND = {
    "no batch entry": ({"batch": 0, "q_len": 0}, {}),
    "descale factors of a stack of blocks": (
        {"q_len": 4, "causal": True, "dtype": "float8_e4m3fn"},
        {"tiles": (1, 1)},
    ),
    "whole score rows under a block mask": (
        {
            "q_len": 4,
            "dtype": "float32",
            "block_mask": simattn.BlockMask.from_array(np.array([[True, False], [False, True]]), q_block=2, kv_block=2),
        },
        {"tiles": (2, 2)},
    ),
}


@every_program
@pytest.mark.parametrize("found", list(FOUND))
def test_cases_that_failed_once(name, direction, found):
    shape, plan = FOUND[found]
    problem = simattn.AttentionProblem(**shape, head_dim=2)
    if problem.is_float8 and direction == "backward":
        pytest.skip("eight-bit storage is forward only")
    generator = np.random.default_rng(0)
    inputs = {
        key: generator.standard_normal((problem.batch, problem.q_len, 1, 2)).astype(numpy_dtype(problem.dtype))
        for key in ("q", "k", "v", *(["dout"] if direction == "backward" else []))
    }
    check_simulated_counts(name, direction, problem, inputs, plan)
    check_float64(name, direction, problem, inputs, plan)


@every_backward
def test_a_row_of_nan_leaves_the_keys_it_does_not_see(name):
    problem = simattn.AttentionProblem(q_len=5, kv_len=2, head_dim=1, dtype="float32", causal=True)
    shapes = {"q": 5, "k": 2, "v": 2, "dout": 5}
    inputs = {key: np.ones((1, length, 1, 1), np.float32) for key, length in shapes.items()}
    clean = simulate(name, "backward", problem, inputs, {"tiles": (1, 2)})
    inputs["q"][0, 3] = np.nan  # sees the first key only
    poisoned = simulate(name, "backward", problem, inputs, {"tiles": (1, 2)})
    for key in ("dk", "dv"):
        assert np.isnan(getattr(poisoned, key)[0, 0]).all()
        assert np.isfinite(getattr(poisoned, key)[0, 1]).all()
    assert_same_bits(poisoned.dq[0, 4], clean.dq[0, 4])
