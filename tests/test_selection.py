"""Given selections of blocks: what is refused, how they are counted; and the rule by which the best are chosen."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simattn.algorithms.moba import BlockHistogram
from simattn.selection import BlockSelection, top_blocks
from simattn.selection_loops import choosing_tiles


@st.composite
def selections(draw):
    """Selections of up to 6 blocks, of any layout in memory."""
    batch, heads, rows, count = (draw(st.integers(least, most)) for least, most in ((0, 2), (0, 3), (0, 9), (0, 4)))
    indices = np.full((batch, heads, rows, count), -1, dtype=draw(st.sampled_from((np.int8, np.int32, np.int64))))
    for row in np.ndindex(batch, heads, rows):
        blocks = sorted(draw(st.sets(st.integers(0, 5), max_size=count)))
        indices[row][: len(blocks)] = blocks
    if draw(st.booleans()):
        indices = np.asfortranarray(indices)
    indices.flags.writeable = draw(st.booleans())
    return BlockSelection(indices, 4)


@given(selection=selections())
def test_histograms_count_every_choice(selection):
    indices = selection.indices
    expected = (indices[..., None] == np.arange(6)).sum(axis=(2, 3))
    np.testing.assert_array_equal(selection.histograms(6), expected)
    np.testing.assert_array_equal(BlockHistogram.of(selection, 6).counts, expected)


@given(selection=selections(), tile=st.integers(1, 5))
def test_tiles_count_once_for_each_block_that_a_row_chose(selection, tile):
    for stream in selection.streams:
        tiles = [stream[first : first + tile] for first in range(0, len(stream), tile)]
        expected = [sum(bool((rows == block).any()) for rows in tiles) for block in range(6)]
        np.testing.assert_array_equal(choosing_tiles(stream, tile, 6), expected)


@given(selection=selections(), data=st.data())
def test_the_first_misfit_is_that_of_the_definition(selection, data):
    rows = selection.indices.shape[2]
    least, highest = (
        np.array(data.draw(st.lists(st.integers(low, high), min_size=rows, max_size=rows)), dtype=np.int64)
        for low, high in ((0, 2), (-1, 5))
    )
    number, last = (selection.indices >= 0).sum(axis=-1), selection.indices.max(axis=-1, initial=-1)
    wrong = np.argwhere((number < least) | (last > highest))
    assert selection.first_misfit(least, highest) == (tuple(wrong[0].tolist()) if len(wrong) else None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([3, 3, -1], "indices[0, 1, 2] is [3, 3, -1]: expected ascending block indices, then -1"),
        ([3, 2, 4], "indices[0, 1, 2] is [3, 2, 4]: expected ascending"),
        ([-1, 3, -1], "indices[0, 1, 2] is [-1, 3, -1]: expected ascending block indices, then -1"),
        ([0, -1, 3], "indices[0, 1, 2] is [0, -1, 3]: expected ascending block indices, then -1"),
        ([0, -2, -1], "indices has -2: expected block indices below 2**31, or -1"),
        ([0, 1 << 32, -1], "indices has 4294967296: expected block indices below 2**31, or -1"),
    ],
)
def test_rows_that_are_not_ascending_blocks_are_refused(row, words):
    indices = np.full((1, 3, 4, 3), -1, dtype=np.int64)
    indices[0, 1, 2] = row
    indices[0, 2, 0] = 5
    with pytest.raises(ValueError, match=re.escape(words)):
        BlockSelection(indices, 4)


def test_small_numbers_below_none_are_refused():
    with pytest.raises(ValueError, match=re.escape("indices[0, 0, 0] is [-2]: expected ascending block indices")):
        BlockSelection(np.full((1, 1, 1, 1), -2, dtype=np.int32), 4)


def test_a_histogram_of_fewer_blocks_than_are_chosen_is_refused():
    selection = BlockSelection(np.array([[[[0, 7]]]]), 4)
    with pytest.raises(ValueError, match="indices name block 7: expected blocks below 7"):
        BlockHistogram.of(selection, 7)


def test_large_unsigned_numbers_are_refused():
    indices = np.full((1, 1, 1, 2), 2**32 - 1, dtype=np.uint32)
    with pytest.raises(
        ValueError, match=re.escape("indices has 4294967295: expected block indices below 2**31, or -1")
    ):
        BlockSelection(indices, 4)


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
