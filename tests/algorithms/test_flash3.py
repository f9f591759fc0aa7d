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
    MASKED_FORWARD_TILES,
    SHORT_FORWARD_TILES,
    SHORT_LENGTH,
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


UNMASKED, MASKED = (FORWARD_TILES, SHORT_FORWARD_TILES), (MASKED_FORWARD_TILES, SHORT_MASKED_FORWARD_TILES)


@pytest.mark.parametrize(
    ("mask", "kv_len", "tables", "is_short"),
    [
        ({}, SHORT_LENGTH, UNMASKED, False),
        ({}, SHORT_LENGTH - 1, UNMASKED, True),
        ({"causal": True}, SHORT_LENGTH, MASKED, False),
        ({"causal": True}, SHORT_LENGTH - 1, MASKED, True),
        # However long sequences are, it is the window that counts.
        ({"window": (1000, 535)}, 1 << 20, MASKED, False),
        ({"window": (1000, 534)}, 1 << 20, MASKED, True),
        ({"window": (1000, 535)}, SHORT_LENGTH - 1, MASKED, True),
        # One side of it alone, unless a causal mask is the other.
        ({"window": (4, None)}, SHORT_LENGTH, MASKED, False),
        ({"window": (None, 4)}, SHORT_LENGTH, MASKED, False),
        ({"window": (4, None), "causal": True}, SHORT_LENGTH, MASKED, True),
        ({"window": (SHORT_LENGTH - 1, 0), "causal": True}, 1 << 20, MASKED, False),
        ({"window": (SHORT_LENGTH - 2, 99), "causal": True}, 1 << 20, MASKED, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128, 192, 256])
def test_tiles_depend_on_the_mask_and_on_how_many_keys_a_row_sees(mask, kv_len, tables, is_short, head_dim):
    bucket = next(limit for limit in FORWARD_TILES if head_dim <= limit)
    expected = tables[is_short][bucket]
    for shape in ({"head_dim": head_dim}, {"head_dim": 8, "value_dim": head_dim}):
        plan = simattn.default_plan("flash3", q_len=4096, kv_len=kv_len, **shape, dtype="float16", **mask)
        assert (plan.tiles.q, plan.tiles.kv) == expected


def test_the_tables_of_tiles_differ():
    """Else the test above would say little."""
    assert len({tuple(sorted(table.items())) for table in (*UNMASKED, *MASKED)}) == 4
    assert all(set(table) == set(FORWARD_TILES) for table in (*UNMASKED, *MASKED))
