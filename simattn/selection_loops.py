"""Compiled loops over selections of blocks, which may take gigabytes: each reads a selection once and copies nothing.

Selections are (streams, rows, blocks chosen), a stream for each batch entry and head that chooses.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

NONE = -1
"""In place of a block or of a row."""


@numba.njit(cache=True)
def first_unordered(indices: Any) -> Any:
    """Return the first row of each stream that is not ascending block indices and then −1, or −1."""
    found = np.full(indices.shape[0], NONE, dtype=np.int64)
    for stream in range(indices.shape[0]):
        for row in range(indices.shape[1]):
            last, ended, wrong = NONE, False, False
            for place in range(indices.shape[2]):
                block = indices[stream, row, place]
                if block == NONE:
                    ended = True
                else:
                    wrong |= ended or block <= last
                    last = block
            if wrong:
                found[stream] = row
                break
    return found


@numba.njit(cache=True)
def first_misfit(indices: Any, least: Any, highest: Any) -> Any:
    """Return the first row of each stream with less blocks than its least, or one above its highest, or −1.

    Rows are ascending block indices and then −1.
    """
    found = np.full(indices.shape[0], NONE, dtype=np.int64)
    for stream in range(indices.shape[0]):
        for row in range(indices.shape[1]):
            number = indices.shape[2]
            while number > 0 and indices[stream, row, number - 1] == NONE:
                number -= 1
            if number < least[row] or (number > 0 and indices[stream, row, number - 1] > highest[row]):
                found[stream] = row
                break
    return found


@numba.njit(cache=True)
def histograms(indices: Any, blocks: int) -> Any:
    """Return how many rows of each stream have chosen each block, and behind these how often one beyond them."""
    counts = np.zeros((indices.shape[0], blocks + 1), dtype=np.int64)
    for stream in range(indices.shape[0]):
        for row in range(indices.shape[1]):
            for place in range(indices.shape[2]):
                block = indices[stream, row, place]
                if block != NONE:
                    counts[stream, min(block, blocks)] += 1
    return counts


@numba.njit(cache=True)
def choosing_tiles(indices: Any, tile: int, blocks: int) -> Any:
    """Return how many tiles of so many rows of a stream have a row that has chosen each block."""
    counts, last = np.zeros(blocks, dtype=np.int64), np.full(blocks, NONE, dtype=np.int64)
    for row in range(indices.shape[0]):
        for place in range(indices.shape[1]):
            block = indices[row, place]
            if block != NONE and last[block] != row // tile:
                last[block] = row // tile
                counts[block] += 1
    return counts
