"""Masks and the tiles they leave, against the whole mask as an array."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simattn import AttentionProblem, BlockMask
from simattn.masks import Rows, Visibility, all_rows
from simattn.testing import attention_problems, block_masks, tiles_for

EXAMPLES = settings.default.max_examples


def problem(q_len, kv_len, **masks):
    return AttentionProblem(q_len=q_len, kv_len=kv_len, head_dim=8, **masks)


def rows_of(text):
    return np.array([[int(cell) for cell in line.split()] for line in text.strip().splitlines()], dtype=bool)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "masks", "expected"),
    [
        (2, 5, {"causal": True}, "1 1 1 1 0\n1 1 1 1 1"),
        (5, 2, {"causal": True}, "0 0\n0 0\n0 0\n1 0\n1 1"),
        (3, 3, {"window": (1, 0)}, "1 0 0\n1 1 0\n0 1 1"),
        (3, 3, {"window": (0, 1)}, "1 1 0\n0 1 1\n0 0 1"),
        (3, 4, {"window": (1, None)}, "1 1 1 1\n0 1 1 1\n0 0 1 1"),
        (3, 3, {"window": (None, 1), "causal": True}, "1 0 0\n1 1 0\n1 1 1"),
        (2, 2, {"window": (None, None)}, "1 1\n1 1"),
    ],
)
def test_mask_conventions(q_len, kv_len, masks, expected):
    np.testing.assert_array_equal(problem(q_len, kv_len, **masks).visible_elements(), rows_of(expected))


def test_block_mask_hides_whole_blocks():
    mask = BlockMask.from_array(np.array([[True, False], [False, True]]), q_block=2, kv_block=3)
    expected = rows_of("1 1 1 0\n1 1 1 0\n0 0 0 1")
    np.testing.assert_array_equal(problem(3, 4, block_mask=mask).visible_elements(), expected)


@settings(max_examples=5 * EXAMPLES)
@given(data=st.data())
def test_tile_visits_equal_enumeration(data):
    drawn = data.draw(attention_problems(max_len=50))
    tiles = data.draw(tiles_for(drawn, max_tiles=50))
    seen = drawn.visible_elements()
    for visibility, elements, row_tile, column_tile in (
        (drawn.keys_of_queries, seen, tiles.q, tiles.kv),
        (drawn.queries_of_keys, seen.T, tiles.kv, tiles.q),
    ):
        length, columns = elements.shape
        full_columns = columns // column_tile
        for rows in all_rows(length, row_tile):
            full = clipped = 0
            for row in range(rows.first, rows.first + rows.count):
                part = elements[row * row_tile : (row + 1) * row_tile]
                starts = range(0, columns, column_tile)
                visited = [part[:, start : start + column_tile].any() for start in starts]
                full += sum(visited[:full_columns])
                clipped += sum(visited[full_columns:])
            assert visibility.tile_visits(rows, column_tile) == (full, clipped)


@settings(max_examples=2 * EXAMPLES)
@given(data=st.data())
def test_elements_of_any_tile_equal_the_mask(data):
    drawn = data.draw(attention_problems(min_len=1, max_len=30))
    seen = drawn.visible_elements()
    row_tile, column_tile = data.draw(st.integers(1, 35)), data.draw(st.integers(1, 35))
    for rows in all_rows(drawn.q_len, row_tile):
        for row in range(rows.first, rows.first + rows.count):
            for column in range(-(-drawn.kv_len // column_tile)):
                keys = Rows(drawn.kv_len, column_tile, column, 1)
                expected = seen[row * row_tile : (row + 1) * row_tile, keys.start : keys.stop]
                elements = drawn.keys_of_queries.elements(rows, row, keys)
                if elements is None:
                    assert expected.all()
                else:
                    np.testing.assert_array_equal(elements, expected)


@given(st.integers(0, 200), st.integers(1, 60))
def test_all_rows_covers_the_axis_once(length, tile):
    runs = all_rows(length, tile)
    covered = [row for run in runs for row in range(run.start, run.stop)]
    assert covered == list(range(length))
    assert all(run.count * run.size == run.stop - run.start for run in runs)


@given(data=st.data(), lengths=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_block_mask_round_trips(data, lengths):
    mask = data.draw(block_masks(*lengths))
    array = mask.to_array()
    sizes = {"q_block": mask.q_block, "kv_block": mask.kv_block}
    blocks = [(int(row), int(column)) for row, column in np.argwhere(array)]
    again = BlockMask.from_blocks(reversed(blocks + blocks), **sizes, shape=array.shape)
    assert again == mask == BlockMask.from_array(array, **sizes) == pickle.loads(pickle.dumps(mask))
    assert again.fingerprint() == mask.fingerprint()
    assert mask.stored_blocks == array.sum()
    np.testing.assert_array_equal(mask.transposed.to_array(), array.T)
    assert mask.transposed.transposed == mask


def test_different_masks_have_different_fingerprints():
    arrays = ([[True, False]], [[False, True]], [[True, True]])
    masks = [BlockMask.from_array(np.array(array), q_block=2, kv_block=2) for array in arrays]
    masks.append(BlockMask.from_array(np.array(arrays[0]), q_block=4, kv_block=2))
    assert len({mask.fingerprint() for mask in masks}) == len(masks)


def test_a_large_block_mask_costs_its_stored_blocks():
    blocks = 10**9
    mask = BlockMask.from_blocks([(0, 0), (blocks - 1, 5)], q_block=64, kv_block=64, shape=(blocks, blocks))
    visits = problem(64 * blocks, 64 * blocks, block_mask=mask).keys_of_queries
    (rows,) = all_rows(64 * blocks, 32)
    assert visits.tile_visits(rows, 16) == (2 * 2 * 4, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"blocks": np.ones((2, 2)), "q_block": 2, "kv_block": 2}, ["blocks", "float64", "boolean"]),
        ({"blocks": np.ones(3, bool), "q_block": 2, "kv_block": 2}, ["blocks", r"\(3,\)", "two dimensions"]),
        ({"blocks": np.ones((2, 2), bool), "q_block": 0, "kv_block": 2}, ["q_block=0", "positive"]),
        ({"blocks": np.ones((2, 2), bool), "q_block": 2, "kv_block": 2.5}, [r"kv_block=2\.5", "positive"]),
        ({"blocks": np.ones((2, 2), bool), "q_block": True, "kv_block": 2}, ["q_block=True", "positive"]),
    ],
)
def test_block_mask_from_array_refuses(arguments, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        BlockMask.from_array(**arguments)


def test_block_mask_from_blocks_refuses_fractions():
    with pytest.raises(TypeError, match=r"blocks names \(0, 1\.5\): expected integers"):
        BlockMask.from_blocks([(0, 1.5)], q_block=1, kv_block=1, shape=(2, 2))


def test_block_mask_from_blocks_refuses_indices_outside():
    with pytest.raises(ValueError, match=r"\(2, 0\).*shape=\(2, 2\)"):
        BlockMask.from_blocks([(0, 0), (2, 0)], q_block=1, kv_block=1, shape=(2, 2))


@pytest.mark.parametrize(
    ("row_runs", "words"),
    [
        (((2, ((0, 1),)),), "block row 2.*ascending rows below.*q_blocks=2"),
        (((1, ((0, 1),)), (0, ((0, 1),))), "block row 0.*ascending"),
        (((0, ((0, 3),)),), r"block row 0.*\(0, 3\).*kv_blocks=2"),
        (((0, ((1, 2), (0, 1))),), r"\(0, 1\).*disjoint"),
        (((0, ((1, 1),)),), r"\(1, 1\).*disjoint"),
    ],
)
def test_block_mask_refuses_malformed_runs(row_runs, words):
    with pytest.raises(ValueError, match=words):
        BlockMask(q_block=1, kv_block=1, q_blocks=2, kv_blocks=2, row_runs=row_runs)


@settings(max_examples=2 * EXAMPLES)
@given(
    lengths=st.tuples(st.integers(0, 40), st.integers(0, 12)),
    packed=st.integers(1, 7),
    offset=st.integers(-40, 40),
    sides=st.tuples(st.none() | st.integers(0, 5), st.none() | st.integers(0, 5)),
    tiles=st.tuples(st.integers(1, 12), st.integers(1, 5)),
)
def test_positions_may_begin_inside_the_rows_that_stand_at_one(lengths, packed, offset, sides, tiles):
    rows, columns = lengths
    before, after = sides
    visibility = Visibility(rows, columns, 1, before, after, packed=packed, row_offset=offset)
    position, column = (np.arange(rows)[:, None] + offset) // packed + 1, np.arange(columns)[None, :]
    seen = np.ones((rows, columns), dtype=bool)
    if before is not None:
        seen &= column >= position - before
    if after is not None:
        seen &= column <= position + after
    for relation, elements, (row_tile, column_tile) in (
        (visibility, seen, tiles),
        (visibility.transposed, seen.T, tiles[::-1]),
    ):
        for run in all_rows(elements.shape[0], row_tile):
            for index, members in relation.visits(run, column_tile):
                for member in members.tolist():
                    keys = Rows(elements.shape[1], column_tile, index, 1)
                    part = elements[(run.first + member) * row_tile :][:row_tile, keys.start : keys.stop]
                    found = relation.elements(run, run.first + member, keys)
                    np.testing.assert_array_equal(part if found is None else found, part)
                    assert found is not None or part.all()
            tile_count = sum(len(members) for _, members in relation.visits(run, column_tile))
            assert sum(relation.tile_visits(run, column_tile)) == tile_count
            expected = sum(
                elements[(run.first + member) * row_tile :][:row_tile, start : start + column_tile].any()
                for member in range(run.count)
                for start in range(0, elements.shape[1], column_tile)
            )
            assert tile_count == expected
