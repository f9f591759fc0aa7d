"""Decoding steps: on caches cut into parts, on pages, and from a state; what they have in common with each other."""

from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simattn
from simattn import machine
from simattn.algorithms import ALGORITHMS, parts
from simattn.algorithms.linear import RecurrentProblem
from simattn.algorithms.paged import PagedProblem
from simattn.algorithms.parts import CacheProblem, Cut, DecodePlan
from simattn.algorithms.split_kv import SplitKVProblem
from simattn.bounds import compulsory_traffic
from simattn.masks import all_rows
from simattn.problem import AttentionProblem
from simattn.sums import ceil_div
from simattn.testing import assert_same_bits, attention_inputs, problems_of

SHAPE = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "dtype")
RECURRENT = [name for name, item in ALGORITHMS.items() if issubclass(item.problem_class, RecurrentProblem)]


def semantics(problem):
    return {item.name: getattr(problem, item.name) for item in fields(problem) if item.name not in SHAPE}


def step(name, problem, inputs, **options):
    return simattn.run_decode(name, **inputs, **semantics(problem), enforce_capacity=False, **options)


def close(actual, expected, tolerance=1e-11):
    finite = np.isfinite(expected)
    assert (actual[~finite] == expected[~finite]).all()
    assert (
        np.abs(actual[finite] - expected[finite]) <= tolerance * (1 + np.abs(expected[finite]).max(initial=0))
    ).all()


@st.composite
def steps(draw, name, **arguments):
    """A decoding step of few queries, and its inputs."""
    problem = draw(problems_of(ALGORITHMS[name], "decode", **arguments))
    return problem, draw(attention_inputs(problem, direction="decode", kinds=["normal"]))


def contiguous(problem, inputs, row):
    """The caches of one sequence of a paged problem, in the order of its keys."""
    length, page = problem.lengths[row], problem.page_size
    entries = inputs["block_table"][row, : ceil_div(length, page)]
    made = {"q": inputs["q"][row : row + 1]}
    for key in ("k", "v"):
        pool = inputs[key]
        made[key] = pool[entries].reshape(1, len(entries) * page, *pool.shape[2:])[:, :length]
    return made


def alone(problem, row):
    """The problem of one sequence of a paged problem, as one on a contiguous cache."""
    base = {item.name: getattr(problem, item.name) for item in fields(AttentionProblem)}
    return SplitKVProblem(**{**base, "batch": 1, "kv_len": problem.lengths[row]})


heads = st.sampled_from(("packed", "one_per_block"))


# 1. Pages


@given(data=st.data(), query_heads=heads, splits=st.integers(1, 5))
def test_pages_in_any_order_give_the_bits_of_a_contiguous_cache(data, query_heads, splits):
    problem, inputs = data.draw(steps("paged"))
    tiles = (data.draw(st.integers(1, 5)), problem.key_tile(data.draw(st.integers(1, 20))))
    options = {"tiles": tiles, "query_heads": query_heads, "splits": splits}
    found = step("paged", problem, inputs, **options)
    for row in range(problem.batch):
        one = alone(problem, row)
        expected = step("split_kv", one, contiguous(problem, inputs, row), **options)
        assert_same_bits(found.out[row : row + 1], expected.out)
        assert_same_bits(found.lse[row : row + 1], expected.lse)


@given(data=st.data())
def test_another_order_of_pages_changes_nothing(data):
    problem, inputs = data.draw(steps("paged"))
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(problem.pages)
    moved = {**inputs, **{key: inputs[key].copy() for key in ("k", "v", "block_table")}}
    for key in ("k", "v"):
        moved[key][order] = inputs[key]
    used = inputs["block_table"] >= 0
    moved["block_table"][used] = order[inputs["block_table"][used]]
    one, two = (step("paged", problem, some) for some in (inputs, moved))
    assert_same_bits(one.out, two.out)
    assert one.traffic == two.traffic


@given(data=st.data(), splits=st.sampled_from((1, 3, "v2")))
def test_sequences_of_their_own_lengths_move_what_each_moves_alone(data, splits):
    problem, _ = data.draw(steps("paged"))
    options = {"splits": splits, "direction": "decode", "tiles": (4, problem.page_size), "enforce_capacity": False}
    arguments = {name: getattr(problem, name) for name in SHAPE} | semantics(problem)
    together = simattn.count("paged", **arguments, **options)
    single = {**arguments, "batch": 1, "pages": None, "table_columns": None, "kv_len": None}
    each = [simattn.count("paged", **{**single, "cache_lengths": length}, **options) for length in problem.lengths]
    assert together == sum(each, simattn.Traffic())


def test_sequences_may_share_pages():
    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, 1, 4, 8))
    k, v = generator.standard_normal((2, 3, 4, 2, 8))
    shared = np.array([[2, 0], [2, 1]], np.int32)
    run = simattn.run_decode(
        "paged",
        *(x.astype(np.float32) for x in (q, k, v)),
        block_table=shared,
        cache_lengths=(7, 6),
        arithmetic="float64",
    )
    copied = [np.concatenate([pool[[2, 0]], pool[[2, 1]]]) for pool in (k, v)]
    table = np.array([[0, 1], [2, 3]], np.int32)
    again = simattn.run_decode(
        "paged", *(x.astype(np.float32) for x in (q, *copied)), block_table=table, cache_lengths=(7, 6),
        arithmetic="float64",
    )  # fmt: skip
    assert_same_bits(run.out, again.out)
    assert run.traffic == again.traffic


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_what_lies_beyond_a_sequence_reaches_nothing(special):
    generator = np.random.default_rng(0)
    q = generator.standard_normal((1, 2, 2, 8)).astype(np.float32)
    k, v = generator.standard_normal((2, 4, 4, 2, 8)).astype(np.float32)
    table = np.array([[3, 1, -1, 99]], np.int32)  # 6 keys: entries beyond two pages are not looked at
    one = simattn.run_decode("paged", q, k, v, block_table=table, cache_lengths=6)
    for pool in (k, v):
        pool[1, 2:] = pool[[0, 2]] = special
    two = simattn.run_decode("paged", q, k, v, block_table=table, cache_lengths=6)
    assert np.isfinite(two.out).all()
    assert_same_bits(two.out, one.out)


# 2. Parts


@given(data=st.data(), query_heads=heads)
def test_any_number_of_parts_merges_to_the_whole(data, query_heads):
    problem, inputs = data.draw(steps("split_kv"))
    tiles = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)))
    options = {"tiles": tiles, "query_heads": query_heads, "arithmetic": "float64"}
    whole = step("split_kv", problem, inputs, splits=1, **options)
    for splits in (2, 3, 7, 50):
        merged = step("split_kv", problem, inputs, splits=splits, **options)
        close(merged.out, whole.out)
        close(merged.lse, whole.lse)


@given(data=st.data())
def test_partitions_merge_to_the_whole(data):
    lengths = data.draw(st.lists(st.integers(0, 1500), min_size=1, max_size=3))
    problem = PagedProblem(
        batch=len(lengths), heads=4, kv_heads=2, q_len=data.draw(st.integers(1, 3)), head_dim=4, dtype="float32",
        cache_lengths=lengths,
    )  # fmt: skip
    inputs = data.draw(attention_inputs(problem, direction="decode", kinds=["normal"]))
    one, two = (step("paged", problem, inputs, splits=splits, arithmetic="float64") for splits in (1, "v2"))
    close(two.out, one.out)
    close(two.lse, one.lse)


@given(data=st.data(), splits=st.integers(1, 4))
def test_packed_heads_read_each_key_once(data, splits):
    problem, inputs = data.draw(steps("split_kv"))
    tiles = (problem.q_len * problem.group_size + 1, data.draw(st.integers(1, 9)))
    packed, apart = (
        step("split_kv", problem, inputs, tiles=tiles, splits=splits, query_heads=name, arithmetic="float64")
        for name in ("packed", "one_per_block")
    )
    close(apart.out, packed.out)
    close(apart.lse, packed.lse)
    for name in set(packed.traffic.by_array) | set(apart.traffic.by_array):
        times = problem.group_size if name in ("k", "v") else 1
        assert apart.traffic.global_only().by_array[name] == packed.traffic.global_only().by_array[name] * times


@given(
    data=st.data(),
    problem=problems_of(ALGORITHMS["split_kv"], "decode", max_len=60, min_len=1),
    packed=heads,
    count=st.integers(1, 30),
)
def test_parts_that_are_counted_together_cost_the_same(data, problem, packed, count):
    plan = DecodePlan(tiles=(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))), query_heads=packed)
    caches = CacheProblem.of(problem, plan, batch=1, length=problem.kv_len)
    cut = Cut.into(problem.kv_len, plan.tiles.kv, count)

    def cost(index):
        part = caches.part(cut, index)
        visits = [part.keys_of_queries.tile_visits(rows, plan.tiles.kv) for rows in all_rows(part.q_len, plan.tiles.q)]
        return part.kv_len, visits

    runs = list(cut.alike(caches))
    assert [index for first, times in runs for index in range(first, first + times)] == list(range(count))
    for first, times in runs:
        assert all(cost(index) == cost(first) for index in range(first, first + times))
    assert sum(stop - start for start, stop in map(cut.bounds, range(count))) == problem.kv_len


@given(
    lengths=st.lists(st.integers(0, 1 << 20) | st.integers(0, 2000), min_size=1, max_size=4),
    q_len=st.integers(1, 40),
    group=st.sampled_from((1, 3, 8)),
    page=st.sampled_from((8, 16, 24, 256)),
    tile=st.integers(1, 300),
    splits=st.sampled_from((1, 5, 1000, "v2")),
    window=st.none() | st.tuples(st.integers(0, 10_000), st.none()),
    query_heads=heads,
)
def test_long_caches_move_what_the_formula_says(lengths, q_len, group, page, tile, splits, window, query_heads):
    problem = PagedProblem(
        batch=len(lengths), heads=2 * group, kv_heads=2, q_len=q_len, head_dim=16, cache_lengths=lengths,
        page_size=page, window=window,
    )  # fmt: skip
    arguments = {name: getattr(problem, name) for name in SHAPE} | semantics(problem)
    arguments |= {"tiles": (16, problem.key_tile(tile)), "splits": splits, "query_heads": query_heads}
    counted, formula = (call("paged", **arguments, direction="decode") for call in (simattn.count, simattn.closed_form))
    assert counted.global_only() == formula
    least = compulsory_traffic(problem, "decode").by_array
    for name in ("k", "v"):
        assert name not in least or formula.by_array[name].hbm_read_bytes >= least[name].hbm_read_bytes


def test_the_cost_does_not_depend_on_the_number_of_parts():
    shape = {"q_len": 4, "kv_len": 1 << 24, "heads": 8, "causal": True, "direction": "decode", "tiles": (16, 128)}
    for window in (None, (100_000, 0)):
        caches = CacheProblem(q_len=4, kv_len=1 << 24, cache_length=1 << 24, causal=True, window=window)
        assert len(list(Cut.into(1 << 24, 128, 1 << 17).alike(caches))) <= 12
        traffic = simattn.count("split_kv", **shape, window=window, splits=1 << 17)
        assert traffic.global_only() == simattn.closed_form("split_kv", **shape, window=window, splits=1 << 17)


@given(
    batch=st.integers(0, 300), kv_heads=st.integers(1, 16), group=st.integers(1, 8), length=st.integers(0, 100_000),
    packed=heads,
)  # fmt: skip
def test_default_parts_fill_the_multiprocessors_once_and_none_is_empty(batch, kv_heads, group, length, packed):
    shape = {"batch": batch, "heads": kv_heads * group, "kv_heads": kv_heads, "q_len": 1, "kv_len": length}
    plan = simattn.default_plan("split_kv", **shape, query_heads=packed, direction="decode", hardware="A100-40GB")
    assert plan.multiprocessors == 108
    tiles = ceil_div(length, plan.tiles.kv)
    cut = Cut.into(length, plan.tiles.kv, plan.splits)
    assert all(start < stop for start, stop in map(cut.bounds, range(plan.splits))) or length == 0
    blocks = batch * (kv_heads if packed == "packed" else kv_heads * group)
    assert plan.splits == 1 or plan.splits * blocks <= 108
    if blocks and cut.rows > plan.tiles.kv:  # parts that are a tile shorter would be too many to run at once
        assert ceil_div(tiles, cut.rows // plan.tiles.kv - 1) * blocks > 108


@pytest.mark.parametrize("window", [None, (5, 0), (3, 2)])
def test_keys_that_no_query_sees_may_hold_anything(window):
    generator = np.random.default_rng(0)
    q = generator.standard_normal((1, 3, 4, 8)).astype(np.float32)
    k, v = generator.standard_normal((2, 1, 30, 2, 8)).astype(np.float32)
    options = {"causal": window is None, "window": window, "tiles": (5, 4), "splits": 4}
    one = simattn.run_decode("split_kv", q, k, v, **options)
    problem = AttentionProblem(q_len=3, kv_len=30, causal=window is None, window=window)
    hidden = ~problem.visible_elements().any(axis=0)
    k[:, hidden] = v[:, hidden] = np.nan
    two = simattn.run_decode("split_kv", q, k, v, **options)
    assert_same_bits(two.out, one.out)
    k[:, 29] = np.nan  # under the causal mask the last query sees it, the others do not
    three = simattn.run_decode("split_kv", q, k, v, **options)
    assert np.isnan(three.out[:, 2]).all()
    if window in (None, (5, 0)):
        assert_same_bits(three.out[:, :2], one.out[:, :2])


# 3. States


@pytest.mark.parametrize("name", RECURRENT)
@given(data=st.data())
def test_prefill_and_decoding_steps_are_the_whole(name, data):
    problem = data.draw(problems_of(ALGORITHMS[name], causal=True, min_len=1))
    inputs = data.draw(attention_inputs(problem, kinds=["normal"]))
    options = {**semantics(problem), "arithmetic": "float64", "enforce_capacity": False}
    tiles = (data.draw(st.integers(1, 9)), 4)
    whole = simattn.run(name, **inputs, **options, tiles=tiles)
    first = data.draw(st.integers(0, problem.q_len))
    ends = [0, first, *range(first + 1, problem.q_len + 1)]
    empty = {key: shape for key, shape in problem.inputs("decode").items() if key in problem.own_inputs}
    states = {key: np.zeros(shape.user_shape(problem)) for key, shape in empty.items()}
    rows = []
    for start, stop in itertools.pairwise(ends):
        new = {key: array[:, start:stop] for key, array in inputs.items()}
        run = simattn.run_decode(name, **new, **states, **options, tiles=tiles)
        states = {key: run.results[key] for key in states}
        rows.append(run.out)
    bound = 1 + np.abs(whole.out).max(initial=0)
    if getattr(problem, "normalised", False) is False or bound < 1e3:
        close(np.concatenate(rows, axis=1), whole.out, 1e-9)
    expected = ALGORITHMS[name].reference(problem, {key: array.astype(np.float64) for key, array in inputs.items()} | {
        key: np.zeros(shape.user_shape(problem)) for key, shape in empty.items()
    })  # fmt: skip
    for key, state in states.items():
        close(state, expected[key], 1e-10)


def test_states_are_of_kv_heads_where_heads_decay_alike():
    shape = {"batch": 2, "heads": 8, "kv_heads": 2, "q_len": 1, "head_dim": 16, "value_dim": 32, "dtype": "bfloat16"}
    linear, lightning2 = (simattn.count(name, **shape, direction="decode").by_array for name in RECURRENT)
    for moved, states in ((linear, 2), (lightning2, 8)):
        once = 2 * states * 16 * 32 * 4
        assert (moved["state"].hbm_read_bytes, moved["state"].hbm_write_bytes) == (once, once)
        assert moved["k"].hbm_read_bytes == 2 * states * 16 * 2
        assert moved["v"].hbm_read_bytes == 2 * states * 32 * 2
        assert moved["q"].hbm_read_bytes == 2 * 8 * 16 * 2
        assert moved["out"].hbm_write_bytes == 2 * 8 * 32 * 2
    assert linear["state_sum"].hbm_read_bytes == linear["state_sum"].hbm_write_bytes == 2 * 2 * 16 * 4


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("length", [2, 1 << 20])
def test_a_step_moves_what_it_must_however_many_keys_there_were(name, length):
    problem = ALGORITHMS[name].problem_class(batch=3, heads=4, q_len=2, kv_len=length, head_dim=8, causal=True)
    arguments = {key: getattr(problem, key) for key in SHAPE} | semantics(problem)
    counted = simattn.count(name, **arguments, direction="decode", tiles=(4, 4)).global_only()
    assert counted == compulsory_traffic(problem, "decode")


@pytest.mark.parametrize("name", ["split_kv", "paged", *RECURRENT])
@pytest.mark.parametrize("stack", [1, 300])
@given(data=st.data())
def test_what_is_simulated_together_changes_nothing(name, stack, data):
    problem, inputs = data.draw(steps(name))
    options = {"tiles": (2, problem.key_tile(5)), "arithmetic": "float64"}
    options |= {"splits": 3} if name in ("split_kv", "paged") else {}
    whole = step(name, problem, inputs, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "STACKED_ELEMENTS", stack)
        parted = step(name, problem, inputs, **options)
    assert parted.traffic == whole.traffic
    for key, values in whole.results.items():
        close(parted.results[key], values)


# 4. Hand-counted


def test_a_cut_cache_by_hand():
    shape = {"batch": 3, "heads": 8, "kv_heads": 2, "q_len": 1, "kv_len": 1000, "head_dim": 16, "value_dim": 32}
    moved = simattn.count("split_kv", **shape, tiles=(16, 64), splits=4, direction="decode").by_array
    rows, item = 3 * 8, 2
    assert moved["q"].hbm_read_bytes == 4 * rows * 16 * item  # every part loads the queries
    assert moved["k"].hbm_read_bytes == 3 * 2 * 1000 * 16 * item
    assert moved["v"].hbm_read_bytes == 3 * 2 * 1000 * 32 * item
    assert moved["partial_out"].hbm_read_bytes == moved["partial_out"].hbm_write_bytes == 4 * rows * 32 * 4
    assert moved["partial_lse"].hbm_read_bytes == moved["partial_lse"].hbm_write_bytes == 4 * rows * 4
    assert moved["out"].hbm_write_bytes == rows * 32 * item
    assert moved["lse"].hbm_write_bytes == rows * 4
    roles = simattn.profile("split_kv", **shape, tiles=(16, 64), splits=4, direction="decode").hbm_bytes_by_role
    assert roles["workspace"] == 4 * rows * (32 + 1) * 4


@pytest.mark.parametrize(
    ("tile", "entries"),
    [(16, 7 + 2), (32, 7 + 2), (4, 25 + 5), (8, 13 + 3)],
)
def test_a_block_table_by_hand(tile, entries):
    shape = {"batch": 2, "cache_lengths": (100, 20), "heads": 8, "kv_heads": 2, "q_len": 1, "head_dim": 16}
    moved = simattn.count("paged", **shape, tiles=(16, tile), direction="decode").by_array
    assert moved["k"].hbm_read_bytes == moved["v"].hbm_read_bytes == 2 * 120 * 16 * 2
    assert moved["block_table"].hbm_read_bytes == 2 * entries * 4  # a thread block for each KV head
    apart = simattn.count("paged", **shape, tiles=(16, tile), query_heads="one_per_block", direction="decode").by_array
    assert apart["block_table"].hbm_read_bytes == 8 * entries * 4


def test_partitions_by_hand():
    shape = {"batch": 3, "cache_lengths": (1300, 512, 513), "heads": 4, "kv_heads": 2, "q_len": 1, "head_dim": 16}
    run = simattn.profile("paged", **shape, tiles=(16, 64), splits="v2", direction="decode")
    moved = run.traffic.by_array
    assert moved["partial_lse"].hbm_write_bytes == (3 + 2) * 4 * 4  # the second sequence is one partition
    assert moved["q"].hbm_read_bytes == (3 + 1 + 2) * 4 * 16 * 2
    assert run.hbm_bytes_by_role["workspace"] == 3 * 3 * 4 * (16 + 1) * 4  # as many as the longest has, for all
    wide = simattn.count("paged", **shape, tiles=(16, 96), splits="v2", direction="decode", page_size=32).by_array
    assert wide["partial_lse"].hbm_write_bytes == 3 * 4 * 4  # partitions of 576 keys, six tiles


def test_compulsory_traffic_of_pages():
    problem = PagedProblem(batch=3, cache_lengths=(70, 0, 33), heads=4, kv_heads=2, q_len=2, head_dim=8, window=(9, 0))
    moved = compulsory_traffic(problem, "decode").by_array
    assert moved["k"].hbm_read_bytes == moved["v"].hbm_read_bytes == 2 * (11 + 0 + 11) * 8 * 2
    assert moved["q"].hbm_read_bytes == (2 + 0 + 2) * 4 * 8 * 2  # the queries of an empty cache see no key
    assert moved["out"].hbm_write_bytes == 3 * 2 * 4 * 8 * 2
    assert set(moved) == {"q", "k", "v", "out"}


# 5. Empty and single


@pytest.mark.parametrize("name", ["split_kv", "paged"])
@pytest.mark.parametrize(
    "shape",
    [{"batch": 0}, {"q_len": 0}, {"kv_len": 0}, {"kv_len": 1}, {"kv_len": 1, "splits": 5}, {"kv_len": 0, "splits": 3}],
    ids=str,
)
def test_empty_and_single(name, shape):
    splits = {"splits": shape["splits"]} if "splits" in shape else {}
    batch, q_len, length = shape.get("batch", 2), shape.get("q_len", 2), shape.get("kv_len", 5)
    q = np.ones((batch, q_len, 4, 8), np.float32)
    if name == "paged":
        k = v = np.ones((batch * (length > 0), 16, 2, 8), np.float32)
        table = np.arange(batch, dtype=np.int32)[:, None]
        given = {"block_table": table, "cache_lengths": length}
    else:
        k = v = np.ones((batch, length, 2, 8), np.float32)
        given = {"causal": True}
    run = simattn.run_decode(name, q, k, v, **given, **splits)
    assert run.out.shape == q.shape
    seen = np.arange(q_len) + length - q_len >= 0
    assert (run.out == seen[None, :, None, None]).all()
    assert (np.isneginf(run.lse) == ~seen).all()


# 6. Mistakes


POOL = np.zeros((4, 16, 2, 8), np.float32)
QUERY = np.zeros((2, 1, 4, 8), np.float32)
TABLE = np.array([[0, 1], [2, 3]], np.int32)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"block_table": None}, TypeError, r"without \['block_table'\]"),
        ({"block_table": TABLE.astype(np.int64)}, TypeError, "block_table has dtype int64: expected int32"),
        ({"block_table": TABLE[:1]}, ValueError, r"block_table has shape \(1, 2\): expected \(2, 2\)"),
        ({"block_table": TABLE[:, 0]}, ValueError, r"block_table has shape \(2,\): expected \(2, 2\)"),
        (
            {"block_table": TABLE[:, :1]},
            ValueError,
            r"table_columns=1: expected at least 2, the pages of a sequence of 32",
        ),
        ({"block_table": TABLE - 1}, ValueError, r"block_table\[0, 0\] is -1: expected a page from 0 to 3"),
        ({"block_table": TABLE + 1}, ValueError, r"block_table\[1, 1\] is 4: expected a page from 0 to 3"),
        ({"cache_lengths": (32, 5, 5)}, ValueError, "cache_lengths has 3 numbers: expected 2, one for each sequence"),
        ({"cache_lengths": (32, -1)}, ValueError, r"cache_lengths\[1\]=-1: expected an integer of at least 0"),
        ({"cache_lengths": (32, 1.5)}, TypeError, r"cache_lengths\[1\]=1\.5 is a float"),
        ({"cache_lengths": "all"}, TypeError, "cache_lengths='all': expected an integer, or one for each sequence"),
        ({"cache_lengths": None}, ValueError, "cache_lengths=None: expected the number of keys of each sequence"),
        ({"cache_lengths": np.array(32)}, TypeError, r"cache_lengths=array\(32\): expected an integer, or one"),
        (
            {"cache_lengths": np.array([[32, 5]])},
            TypeError,
            "cache_lengths=array.*: expected an integer, or one for each",
        ),
        (
            {"block_table": TABLE + 0.5, "arithmetic": "float64"},
            TypeError,
            "block_table has dtype float64: expected int32",
        ),
        ({"cache_lengths": 33}, ValueError, "table_columns=2: expected at least 3, the pages of a sequence of 33 keys"),
        ({"page_size": 32}, ValueError, "page_size=32: expected 16, as the arrays have it"),
        ({"pages": 9}, ValueError, "pages=9: expected 4, as the arrays have it"),
        ({"v": POOL[:3]}, ValueError, r"v has shape \(3, 16, 2, 8\): expected \(4, 16, 2, 8\), \(pages, page_size"),
        ({"k": POOL[..., :4]}, ValueError, r"k has shape \(4, 16, 2, 4\): expected \(4, 16, 2, 8\)"),
        ({"tiles": (16, 24)}, ValueError, r"tiles\.kv=24: expected whole pages or an equal part of one.*page_size=16"),
        ({"tiles": (16, 6)}, ValueError, r"tiles\.kv=6: expected whole pages"),
        ({"splits": "v3"}, ValueError, "splits='v3': expected an integer of at least 1 or 'v2'"),
        ({"splits": 0}, ValueError, "splits=0: expected an integer of at least 1"),
        ({"query_heads": "both"}, ValueError, "query_heads='both': expected one of"),
        ({"repeat_kv": True}, ValueError, "repeat_kv=True: expected one of"),
        ({"causal": 2}, TypeError, "causal=2: expected a bool; paged is causal whatever it is"),
    ],
    ids=str,
)
def test_mistakes_with_pages_are_named(changed, error, words):
    given = {"q": QUERY, "k": POOL, "v": POOL, "block_table": TABLE, "cache_lengths": 32, **changed}
    with pytest.raises(error, match=words):
        simattn.run_decode("paged", **{name: value for name, value in given.items() if value is not None})


BLOCKS = simattn.BlockMask.from_array(np.ones((1, 1), bool), q_block=8, kv_block=32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"algorithm": "split_kv", "block_mask": BLOCKS}, "block_mask is given: expected None"),
        ({"algorithm": "paged", "kv_len": 9, "block_mask": BLOCKS}, "block_mask is given: expected None"),
        ({"algorithm": "split_kv", "dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn': expected float32"),
        ({"algorithm": "split_kv", "direction": "forward"}, r"direction='forward' of split_kv: expected .*'decode'"),
        ({"algorithm": "paged", "direction": "backward"}, r"direction='backward' of paged: expected .*'decode'"),
        ({"algorithm": "paged", "kv_len": 9, "cache_lengths": 8}, "kv_len=9: expected 8, the largest of cache_lengths"),
        ({"algorithm": "paged", "kv_len": 9, "pages": -1}, "pages=-1: expected"),
        ({"algorithm": "paged", "kv_len": 9, "pages": 0}, "pages=0: expected an integer of at least 1"),
        ({"algorithm": "paged", "kv_len": -9}, "kv_len=-9: expected an integer of at least 0"),
        ({"algorithm": "paged", "kv_len": 9, "page_size": 0}, "page_size=0: expected an integer of at least 1"),
        ({"algorithm": "paged"}, "cache_lengths=None: expected the number of keys of each sequence, or kv_len"),
        ({"algorithm": "split_kv", "multiprocessors": 0}, "multiprocessors=0: expected an integer of at least 1"),
        ({"algorithm": "split_kv", "stages": 0}, "stages=0: expected an integer of at least 1"),
        ({"algorithm": "linear", "q_len": 2, "kv_len": 1}, "kv_len=1 in a decoding step: expected at least q_len=2"),
    ],
    ids=str,
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        simattn.count(**{"q_len": 1, "direction": "decode", "kv_len": None, **arguments})


@pytest.mark.parametrize("name", RECURRENT)
def test_a_step_needs_its_state(name):
    q = np.zeros((1, 1, 2, 4), np.float32)
    with pytest.raises(TypeError, match=r"without \['state"):
        simattn.run_decode(name, q, q, q)
    names = list(ALGORITHMS[name].problem_class(heads=2, q_len=1, head_dim=4).inputs("decode"))[3:]
    states = {key: np.zeros((1, 2, 4, 4) if key == "state" else (1, 2, 4), np.float32) for key in names}
    with pytest.raises(ValueError, match=r"state has shape \(1, 2, 4\): expected \(1, 2, 4, 4\)"):
        simattn.run_decode(name, q, q, q, **{**states, "state": states["state"][..., 0]})
    with pytest.raises(TypeError, match="state has dtype float16: expected float32"):
        simattn.run_decode(name, q, q, q, **{**states, "state": states["state"].astype(np.float16)})
    with pytest.raises(TypeError, match=r"with \['state"):
        simattn.run(name, q, q, q, **states)


def test_a_reference_is_whole_matrices():
    problem = AttentionProblem(batch=1, heads=2, q_len=2, kv_len=3, head_dim=2, dtype="float32", causal=True)
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal((1, rows, 2, 2)) for rows in (2, 3, 3))
    out, lse = simattn.testing.reference_attention(problem, q, k, v)
    found = parts.reference(problem, {"q": q, "k": k, "v": v})
    np.testing.assert_allclose(found["out"], out, rtol=1e-14)
    np.testing.assert_allclose(found["lse"], lse, rtol=1e-14)
