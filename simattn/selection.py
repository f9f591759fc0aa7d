"""Blocks of keys that queries choose: given selections, and the one rule by which the best are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.masks import is_integer

Indices = npt.NDArray[np.int32]


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
        from simattn import selection_loops  # loads Numba

        if not np.can_cast(given.dtype, np.int32):
            for number in (given.min(initial=0), given.max(initial=0)):
                if not -1 <= number <= np.iinfo(np.int32).max:
                    raise ValueError(f"indices has {int(number)}: expected block indices below 2**31, or -1")
        object.__setattr__(self, "indices", given.astype(np.int32, copy=False))
        row = self._first(selection_loops.first_unordered(self.streams))
        if row is not None:
            raise ValueError(
                f"indices{list(row)} is {given[row].tolist()}: expected ascending block indices, then -1 where there "
                "are fewer"
            )

    @property
    def streams(self) -> Indices:
        """The indices as (batch · heads, q_len, blocks chosen)."""
        batch, heads, rows, count = self.indices.shape
        return np.ascontiguousarray(self.indices).reshape(batch * heads, rows, count)

    def first_misfit(self, least: npt.NDArray[np.int64], highest: npt.NDArray[np.int64]) -> tuple[int, int, int] | None:
        """Return batch entry, head and query of the first row that does not fit its query, or None.

        Parameters
        ----------
        least
            How many blocks each query chooses at least.
        highest
            The last block that it may choose.
        """
        from simattn import selection_loops

        return self._first(selection_loops.first_misfit(self.streams, least, highest))

    def histograms(self, blocks: int) -> npt.NDArray[np.int64]:
        """Return how many queries have chosen each of so many blocks, shape (batch, heads, blocks).

        Raises
        ------
        ValueError
            If one has chosen a block beyond these.
        """
        from simattn import selection_loops

        counts = selection_loops.histograms(self.streams, blocks)
        if counts[:, blocks].any():
            raise ValueError(f"indices name block {int(self.indices.max())}: expected blocks below {blocks}")
        found: npt.NDArray[np.int64] = counts[:, :blocks].reshape(*self.indices.shape[:2], blocks)
        return found

    def _first(self, rows: npt.NDArray[np.int64]) -> tuple[int, int, int] | None:
        """Return batch entry, head and query of the first row of those found in the streams, −1 being none."""
        found = np.flatnonzero(rows >= 0)
        if not len(found):
            return None
        return (*divmod(int(found[0]), self.indices.shape[1]), int(rows[found[0]]))

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
