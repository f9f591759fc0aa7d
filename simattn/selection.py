"""Blocks of keys that queries choose: given selections, and the one rule by which the best are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.masks import is_integer

Indices = npt.NDArray[np.int32]

LARGEST_INDEX = int(np.iinfo(np.int32).max)
"""The largest block index that there is room for."""


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The blocks of keys that each query attends to.

    Attributes
    ----------
    indices
        Integers, shape (batch, heads, q_len, blocks chosen): the indices of a row's blocks, ascending, then −1 where
        there are fewer. Heads are those that choose.
    block
        Keys of a block.

    Raises
    ------
    ValueError, TypeError
        If the indices are no such array; the message names the first wrong row.
    """

    indices: Indices
    block: int

    def __post_init__(self) -> None:
        if not is_integer(self.block):
            raise TypeError(f"block={self.block!r}: expected an integer")
        if self.block < 1:
            raise ValueError(f"block={self.block!r}: expected an integer of at least 1")
        given = np.asarray(self.indices)
        if given.dtype.kind not in "iu" or given.ndim != 4:
            raise TypeError(
                f"indices has shape {given.shape} and dtype {given.dtype}: expected integers of shape (batch, heads, "
                "q_len, blocks chosen)"
            )
        before, after = given[..., :-1], given[..., 1:]
        wrong = ~(((before >= 0) & (after > before)) | (after == -1)).all(axis=-1)
        wrong |= ((given < -1) | (given > LARGEST_INDEX)).any(axis=-1)
        if wrong.any():
            row = tuple(int(number) for number in np.argwhere(wrong)[0])
            raise ValueError(
                f"indices{list(row)} is {given[row].tolist()}: expected ascending block indices up to {LARGEST_INDEX}, "
                "then -1 where there are fewer"
            )
        object.__setattr__(self, "indices", given.astype(np.int32, copy=False))

    def __repr__(self) -> str:
        return f"BlockSelection(indices of shape {self.indices.shape}, block={self.block})"


def top_blocks(
    scores: npt.NDArray[Any], visible: npt.NDArray[np.bool_], forced: npt.NDArray[np.bool_], count: int
) -> Indices:
    """Choose the blocks of the highest scores.

    The order is: forced blocks, then higher scores, then lower block indices. A score of NaN ranks below every other.
    Blocks that are not visible are never chosen, forced or not.

    Parameters
    ----------
    scores
        Shape (…, blocks).
    visible, forced
        Which blocks may and which must be chosen, shapes that broadcast to the scores'.
    count
        Blocks to choose, the forced ones included; at least as many as are forced.

    Returns
    -------
    array of int32, shape (…, count)
        Ascending block indices, then −1 where fewer are visible.
    """
    blocks = scores.shape[-1]
    visible, forced = np.broadcast_to(visible, scores.shape), np.broadcast_to(forced, scores.shape)
    known = np.where(np.isnan(scores), -np.inf, scores)
    rank = np.where(visible, np.where(forced, 0, np.where(np.isnan(scores), 2, 1)), 3)
    # The last key sorts first, and equal keys keep the order of their indices.
    order = np.lexsort((-known, rank), axis=-1)[..., :count]
    chosen = np.where(np.take_along_axis(visible, order, axis=-1), order, blocks)
    chosen.sort(axis=-1)
    indices = np.where(chosen == blocks, -1, chosen).astype(np.int32)
    padding = np.full((*scores.shape[:-1], max(0, count - blocks)), -1, dtype=np.int32)
    return np.concatenate([indices, padding], axis=-1)
