"""Given selections of blocks, and the rule by which the best are chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simattn.selection import BlockSelection, top_blocks

SCORES = st.sampled_from((-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf, math.nan))


@given(data=st.data(), blocks=st.integers(0, 8), more=st.integers(0, 9))
def test_the_best_blocks_are_those_of_a_sorted_list(data, blocks, more):
    scores = data.draw(st.lists(SCORES, min_size=blocks, max_size=blocks))
    visible, forced = (data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks)) for _ in range(2))
    must = [block for block in range(blocks) if visible[block] and forced[block]]
    count = len(must) + more
    others = [block for block in range(blocks) if visible[block] and not forced[block]]
    ranked = sorted((block for block in others if not math.isnan(scores[block])), key=lambda block: -scores[block])
    ranked += [block for block in others if math.isnan(scores[block])]
    expected = sorted(must + ranked[:more])
    found = top_blocks(np.array([scores]), np.array(visible, dtype=bool), np.array(forced, dtype=bool), count)
    assert found.tolist() == [expected + [-1] * (count - len(expected))]


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint32])
def test_indices_are_kept_as_int32(dtype):
    selection = BlockSelection(np.array([[[[0, 2, 7]]]], dtype=dtype), 4)
    assert selection.indices.dtype == np.int32
    assert selection.indices.tolist() == [[[[0, 2, 7]]]]


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        ([1, 0], np.int64),
        ([1, 1], np.int64),
        ([-1, 0], np.int64),
        ([-1, 0], np.int8),
        ([-2, 0], np.int64),
        ([0, 2**31], np.int64),
        ([0, 2**32], np.int64),
        ([0, 2**32 - 1], np.uint32),
        ([2**32 - 1, 2**32 - 1], np.uint32),
    ],
)
def test_rows_that_are_no_selection_are_named(row, dtype):
    indices = np.array([[[[0, 1], row]]], dtype=dtype)
    words = rf"indices\[0, 0, 1\] is \[{row[0]}, {row[1]}\]: expected ascending block indices up to 2147483647, then -1"
    with pytest.raises(ValueError, match=words):
        BlockSelection(indices, 4)


@pytest.mark.parametrize(
    ("indices", "block", "error", "words"),
    [
        (np.zeros((1, 1, 1, 1)), 4, TypeError, "dtype float64: expected integers of shape"),
        (np.zeros((1, 1, 1), dtype=int), 4, TypeError, r"indices has shape \(1, 1, 1\)"),
        (np.zeros((1, 1, 1, 1), dtype=int), 0, ValueError, "block=0: expected an integer of at least 1"),
        (np.zeros((1, 1, 1, 1), dtype=int), 2.0, TypeError, r"block=2\.0: expected an integer"),
    ],
)
def test_what_is_no_selection_is_refused(indices, block, error, words):
    with pytest.raises(error, match=words):
        BlockSelection(indices, block)
