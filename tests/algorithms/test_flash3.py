"""FlashAttention-3: query heads whose rows share tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from simattn.algorithms.flash3 import (
    FORWARD_TILES,
    SHORT_FORWARD_TILES,
    SHORT_MASKED_FORWARD_TILES,
    Flash3Plan,
    keys_of_a_row,
    packed_rows,
    unpacked_rows,
)
from simattn.problem import PackedProblem
from simattn.testing import attention_inputs, attention_problems, tiles_for

PACKED = (2, 3, 4)


@st.composite
def packed_cases(draw, **options):
    """Draw a problem, a plan that packs its heads, and the same plan without."""
    problem = draw(attention_problems(block_sparse=False, **options))
    packed = draw(st.sampled_from(PACKED))
    problem = replace(problem, heads=problem.heads * packed)
    plan = Flash3Plan(tiles=draw(tiles_for(PackedProblem.of(problem, packed))), packed_heads=packed)
    return problem, plan


def arguments_of(problem):
    names = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "dtype", "causal", "window")
    return {name: getattr(problem, name) for name in names}


def keys_loaded(problem, plan):
    """Walk the tiles of packed rows, position by position."""
    packed, tiles, shift = plan.packed_heads, plan.tiles, problem.kv_len - problem.q_len
    left, right = problem.window or (None, None)
    right = 0 if problem.causal else right
    keys = 0
    for first in range(0, problem.q_len * packed, tiles.q):
        last = min(first + tiles.q, problem.q_len * packed) - 1
        start = 0 if left is None else max(0, first // packed + shift - left)
        stop = problem.kv_len if right is None else min(problem.kv_len, last // packed + shift + right + 1)
        if start < stop:
            for tile in range(start // tiles.kv, -(-stop // tiles.kv)):
                keys += min(tiles.kv, problem.kv_len - tile * tiles.kv)
    return keys * problem.batch * problem.heads // packed


@settings(max_examples=200)
@given(packed_cases())
def test_packed_heads_load_keys_once(case):
    problem, plan = case
    counted = simattn.count("flash3", **arguments_of(problem), plan=plan, enforce_capacity=False)
    assert counted.global_only() == simattn.closed_form("flash3", **arguments_of(problem), plan=plan)
    loaded = keys_loaded(problem, plan) * problem.head_dim * problem.item_bytes
    assert counted.global_only().by_array.get("k", simattn.ArrayTraffic()).hbm_read_bytes == loaded


@settings(max_examples=30)
@given(packed_cases(max_len=40), st.data())
def test_packed_heads_change_no_number(case, data):
    problem, plan = case
    problem = replace(problem, dtype="float32")
    inputs = data.draw(attention_inputs(problem))
    options = {"causal": problem.causal, "window": problem.window, "arithmetic": "float64", "scale": problem.scale}
    arrays = [inputs[name] for name in "qkv"]
    runs = [
        simattn.run("flash3", *arrays, **options, plan=replace(plan, packed_heads=packed, enforce_capacity=False))
        for packed in (1, plan.packed_heads)
    ]
    np.testing.assert_allclose(runs[1].out, runs[0].out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(runs[1].lse, runs[0].lse, rtol=1e-12, atol=1e-12)
    assert runs[1].traffic == simattn.count("flash3", **arguments_of(problem), plan=plan, enforce_capacity=False)


def test_rows_are_packed_by_position():
    values = np.arange(24).reshape(1, 4, 3, 2)
    packed = packed_rows(values, 2)
    assert packed.shape == (1, 2, 6, 2)
    assert packed[0, 0, :, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert (unpacked_rows(packed, 2) == values).all()


@pytest.mark.parametrize(
    ("shape", "options", "named"),
    [
        ({"heads": 6, "kv_heads": 2}, {"packed_heads": 2}, "packed_heads=2: expected a divisor of the 3 query heads"),
        ({}, {"packed_heads": 0}, "packed_heads=0"),
        ({}, {"packed_heads": 2, "repeat_kv": True}, "repeat_kv=True"),
    ],
)
def test_refuses(shape, options, named):
    with pytest.raises(ValueError, match=named):
        simattn.count("flash3", q_len=8, **shape, **options)


# The tiles of a GPU's plan


@given(attention_problems(block_sparse=False))
def test_keys_of_a_row_are_the_most_that_a_query_sees(problem):
    def seen(some):
        return np.count_nonzero(some.visible_elements(), axis=1).max(initial=0)

    assert seen(problem) <= keys_of_a_row(problem)
    # With a query for every key, some query sees the whole window, or all keys.
    assert seen(replace(problem, q_len=problem.kv_len)) == keys_of_a_row(problem)


@pytest.mark.parametrize(
    ("mask", "beyond"),
    [
        ({}, None),
        ({"causal": True}, None),
        # However long sequences are, it is the window that counts.
        ({"window": (100, "rest")}, 1 << 20),
        ({"window": (100, "rest")}, 0),
        ({"window": ("rest", 100), "causal": True}, 1 << 20),
        # One side of it alone, unless a causal mask is the other.
        ({"window": (4, None)}, None),
        ({"window": (None, 4)}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128, 192, 256])
def test_tiles_depend_on_the_mask_and_on_how_many_keys_a_row_sees(mask, beyond, head_dim):
    """``beyond`` says how many more keys there are than a row sees; "rest" is the side that makes up what it sees."""
    bucket = next(limit for limit in FORWARD_TILES if head_dim <= limit)
    short = SHORT_MASKED_FORWARD_TILES if mask else SHORT_FORWARD_TILES
    length, short_tiles = short.get(bucket, (1000, FORWARD_TILES[bucket]))
    for seen, expected in ((length - 1, short_tiles), (length, FORWARD_TILES[bucket])):
        options = dict(mask)
        if beyond is not None:
            right = 0 if mask.get("causal") else 100
            options["window"] = tuple(seen - 1 - right if side == "rest" else side for side in mask["window"])
        for shape in ({"head_dim": head_dim}, {"head_dim": 8, "value_dim": head_dim}):
            plan = simattn.default_plan(
                "flash3", q_len=4096, kv_len=seen + (beyond or 0), **shape, dtype="float16", **options
            )
            assert (plan.tiles.q, plan.tiles.kv) == expected


def test_a_window_and_a_causal_mask_together_count_once():
    length, tiles = SHORT_MASKED_FORWARD_TILES[64]
    shape = {"q_len": 4096, "kv_len": 1 << 20, "head_dim": 64, "dtype": "float16", "causal": True}
    plan = simattn.default_plan("flash3", **shape, window=(length - 2, 99))
    assert (plan.tiles.q, plan.tiles.kv) == tiles != FORWARD_TILES[64]
    plan = simattn.default_plan("flash3", **shape, window=(length - 1, 99))
    assert (plan.tiles.q, plan.tiles.kv) == FORWARD_TILES[64]


def test_every_length_of_the_tables_changes_the_tiles():
    """Else the tests above would say little."""
    assert SHORT_MASKED_FORWARD_TILES != SHORT_FORWARD_TILES
    for table in (SHORT_FORWARD_TILES, SHORT_MASKED_FORWARD_TILES):
        assert all(tiles != FORWARD_TILES[bucket] for bucket, (_, tiles) in table.items())
