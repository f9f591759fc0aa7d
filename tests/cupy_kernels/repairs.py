"""What flash3 reads again for rows that infinite or NaN values of hidden keys got into."""

from __future__ import annotations

import numpy as np

from cupy_kernels.flash3 import GROUP_ROWS, WARP_ROWS
from simattn.algorithms.flash3 import is_masked

CHUNK = 16
"""Keys, and columns, that a tensor core instruction of the repair takes at a time."""

COPIES_OF_QUERY = 8
"""Lanes of a warp that load the same numbers of the query."""


def repaired_bytes(case, expected):
    """Return the least and the most bytes that the kernel may read again.

    They differ where a warp has rows past the last query: what those hold is nobody's business.
    """
    if case.lengths is None:
        return _of_sequence(case, expected.results["out"], expected.results["lse"])
    total = np.zeros(2, np.int64)
    starts = case.offsets["cu_seqlens_q"].tolist()
    for sequence, start, stop in zip(case.sequences(), starts, starts[1:], strict=False):
        out, lse = expected.results["out"][None, start:stop], expected.results["lse"][None, :, start:stop]
        total += _of_sequence(sequence, out, lse)
    return tuple(total.tolist())


def _of_sequence(case, out, lse):
    problem, packed, tiles = case.problem, case.plan.packed_heads, case.plan.tiles
    if not is_masked(problem):
        return 0, 0
    has_special = ~np.isfinite(case.inputs["v"].astype(np.float32)).all(axis=-1)
    ends_nan = np.isnan(out.astype(np.float32)).any(axis=-1)
    rows, least, most = problem.q_len * packed, 0, 0
    for batch in range(problem.batch):
        for first_head in range(0, problem.heads, packed):
            special = has_special[batch, :, first_head // problem.group_size]
            for warp in range(0, rows, WARP_ROWS):
                tiles_taken = _tiles_of_warpgroup(problem, packed, tiles, warp // GROUP_ROWS * GROUP_ROWS)
                taken = np.zeros(problem.kv_len, bool)
                taken[slice(*(tile * tiles.kv for tile in tiles_taken))] = True
                certain, size = False, 0
                for row in range(warp, min(warp + WARP_ROWS, rows)):
                    position, head = row // packed, first_head + row % packed
                    start, stop = _keys_of(problem, position)
                    hidden = taken.copy()
                    hidden[start:stop] = False
                    gets_nan = ends_nan[batch, position, head] or (special & hidden).any()
                    certain |= gets_nan and not np.isnan(lse[batch, head, position])
                    size += _bytes_of_row(problem, tiles.kv, start, stop)
                possible = certain or (warp + WARP_ROWS > rows and (special & taken).any())
                least, most = least + certain * size, most + possible * size
    return least, most


def _keys_of(problem, position):
    """Return the first key that a query sees, and the one after the last; the same if it sees none."""
    left, right = problem.window or (None, None)
    right = 0 if problem.causal else right
    at = position + problem.kv_len - problem.q_len
    start = 0 if left is None else max(0, at - left)
    stop = problem.kv_len if right is None else min(problem.kv_len, at + right + 1)
    return start, max(start, stop)


def _tiles_of_warpgroup(problem, packed, tiles, first_row):
    """Return the first tile of keys that a warpgroup takes, and the one after the last.

    At least one, if another warpgroup of the query tile takes one.
    """

    def tiles_of(first, last):
        start, _ = _keys_of(problem, first // packed)
        _, stop = _keys_of(problem, min(last // packed, problem.q_len - 1))
        return start // tiles.kv, -(-stop // tiles.kv) if start < stop else start // tiles.kv

    tile_row = first_row // tiles.q * tiles.q
    all_first, all_stop = tiles_of(tile_row, tile_row + tiles.q - 1)
    if all_first >= all_stop:
        return all_first, all_first
    first, stop = tiles_of(first_row, first_row + GROUP_ROWS - 1)
    first = max(all_first, min(all_stop - 1, first))
    return first, max(first + 1, min(all_stop, stop))


def _bytes_of_row(problem, key_rows, start, stop):
    """Return what is read for a row: keys and values that it sees once, the query once for each chunk of keys."""
    if start == stop:
        return 0
    chunks = (-(-stop // key_rows) - start // key_rows) * (key_rows // CHUNK)
    numbers = (stop - start) * (problem.head_dim + problem.value_dim) + chunks * COPIES_OF_QUERY * problem.head_dim
    return numbers * problem.item_bytes
