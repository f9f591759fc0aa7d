"""Which keys a query sees: causal, window and block-sparse masks, and the tiles they leave.

Conventions
-----------
Queries and keys are aligned at their ends (bottom-right): query row ``r`` stands at key position
``r + kv_len - q_len``. ``causal`` hides the keys after that position; ``window=(left, right)`` shows ``left``
keys before it and ``right`` keys after it, both ends included, ``None`` meaning no limit. Two queries on five
keys, and five queries on two keys, causal::

    1 1 1 1 0        0 0
    1 1 1 1 1        0 0
                     0 0
                     1 0
                     1 1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.sums import ceil_div, clamped_floor_sum

Runs = tuple[tuple[int, int], ...]
"""Disjoint ascending half-open ranges."""


@dataclass(frozen=True)
class Rows:
    """A run of tiles along one axis, all of the same size.

    Attributes
    ----------
    length
        Rows of the whole axis.
    tile
        Rows of a tile that the end of the axis does not clip.
    first, count
        The tiles ``first … first + count - 1``.
    """

    length: int
    tile: int
    first: int
    count: int

    @property
    def size(self) -> int:
        """Rows of each tile, clipped at the end of the axis."""
        return min(self.tile, self.length - self.first * self.tile)

    @property
    def start(self) -> int:
        """First row."""
        return self.first * self.tile

    @property
    def stop(self) -> int:
        """One past the last row."""
        return min(self.length, (self.first + self.count) * self.tile)

    def runs(self, first: int, stop: int) -> Iterator[Rows]:
        """Split the tiles ``first … stop-1`` of this axis into runs of equal size."""
        full = min(stop, self.length // self.tile)
        if full > first:
            yield Rows(self.length, self.tile, first, full - first)
        if stop > max(full, first):
            yield Rows(self.length, self.tile, max(full, first), stop - max(full, first))


def all_rows(length: int, tile: int) -> tuple[Rows, ...]:
    """Return the tiles of an axis: those of full size, then the clipped one, if any."""
    return tuple(Rows(length, tile, 0, 0).runs(0, ceil_div(length, tile)))


@dataclass(frozen=True)
class BlockMask:
    """A block-sparse mask: the blocks of the score matrix that are computed.

    Attributes
    ----------
    q_block, kv_block
        Rows and columns of one block.
    q_blocks, kv_blocks
        Blocks of the whole score matrix.
    row_runs
        For every row of blocks that stores any, its index and the runs of stored columns.
    """

    q_block: int
    kv_block: int
    q_blocks: int
    kv_blocks: int
    row_runs: tuple[tuple[int, Runs], ...] = field(repr=False)

    def __post_init__(self) -> None:
        for name in ("q_block", "kv_block"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer")
        previous_row = -1
        for row, runs in self.row_runs:
            if not previous_row < row < self.q_blocks:
                raise ValueError(f"row_runs names block row {row}: expected ascending rows below {self.q_blocks=}")
            previous_row, end = row, 0
            for start, stop in runs:
                if not end <= start < stop <= self.kv_blocks:
                    raise ValueError(
                        f"row_runs of block row {row} has the run {(start, stop)}: "
                        f"expected disjoint ascending runs below {self.kv_blocks=}"
                    )
                end = stop

    @classmethod
    def from_array(cls, blocks: npt.ArrayLike, *, q_block: int, kv_block: int) -> BlockMask:
        """Make a mask from a boolean array of shape (q_blocks, kv_blocks)."""
        array = np.asarray(blocks)
        if array.ndim != 2 or array.dtype != np.bool_:
            raise ValueError(
                f"blocks has shape {array.shape} and dtype {array.dtype}: expected a boolean array of two dimensions"
            )
        rows, columns = np.nonzero(array)
        return cls._from_sorted(
            rows.tolist(),
            columns.tolist(),
            q_block=q_block,
            kv_block=kv_block,
            shape=(array.shape[0], array.shape[1]),
        )

    @classmethod
    def from_blocks(
        cls, blocks: Iterable[tuple[int, int]], *, q_block: int, kv_block: int, shape: tuple[int, int]
    ) -> BlockMask:
        """Make a mask from the (row, column) indices of its stored blocks.

        Parameters
        ----------
        blocks
            Indices, in any order; a repeated one counts once.
        q_block, kv_block
            Rows and columns of one block.
        shape
            (q_blocks, kv_blocks): blocks of the whole score matrix.
        """
        pairs = list(blocks)
        for row, column in pairs:
            if not (is_integer(row) and is_integer(column)):
                raise TypeError(f"blocks names {(row, column)}: expected integers")
        ordered = sorted({(int(row), int(column)) for row, column in pairs})
        for row, column in ordered:
            if not (0 <= row < shape[0] and 0 <= column < shape[1]):
                raise ValueError(f"blocks names {(row, column)}: expected indices inside {shape=}")
        return cls._from_sorted(
            [row for row, _ in ordered],
            [column for _, column in ordered],
            q_block=q_block,
            kv_block=kv_block,
            shape=shape,
        )

    @classmethod
    def _from_sorted(
        cls, rows: list[int], columns: list[int], *, q_block: int, kv_block: int, shape: tuple[int, int]
    ) -> BlockMask:
        row_runs: list[tuple[int, list[tuple[int, int]]]] = []
        for row, column in zip(rows, columns, strict=True):
            if not row_runs or row_runs[-1][0] != row:
                row_runs.append((row, [(column, column + 1)]))
            elif row_runs[-1][1][-1][1] == column:
                row_runs[-1][1][-1] = (row_runs[-1][1][-1][0], column + 1)
            else:
                row_runs[-1][1].append((column, column + 1))
        return cls(
            q_block=q_block,
            kv_block=kv_block,
            q_blocks=shape[0],
            kv_blocks=shape[1],
            row_runs=tuple((row, tuple(runs)) for row, runs in row_runs),
        )

    @cached_property
    def stored_blocks(self) -> int:
        """Number of blocks that are computed."""
        return sum(stop - start for _, runs in self.row_runs for start, stop in runs)

    @cached_property
    def runs_of_row(self) -> dict[int, Runs]:
        """The stored runs, by block row."""
        return dict(self.row_runs)

    @cached_property
    def transposed(self) -> BlockMask:
        """The mask with queries and keys exchanged."""
        pairs = sorted((column, row) for row, runs in self.row_runs for run in runs for column in range(*run))
        return BlockMask._from_sorted(
            [column for column, _ in pairs],
            [row for _, row in pairs],
            q_block=self.kv_block,
            kv_block=self.q_block,
            shape=(self.kv_blocks, self.q_blocks),
        )

    def to_array(self) -> npt.NDArray[np.bool_]:
        """Return the mask as a boolean array of shape (q_blocks, kv_blocks)."""
        array = np.zeros((self.q_blocks, self.kv_blocks), dtype=np.bool_)
        for row, runs in self.row_runs:
            for start, stop in runs:
                array[row, start:stop] = True
        return array

    def fingerprint(self) -> str:
        """Return a digest that is equal for equal masks, in every process."""
        import hashlib

        text = repr((self.q_block, self.kv_block, self.q_blocks, self.kv_blocks, self.row_runs))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Visibility:
    """For every row of one axis, the columns of the other axis that it sees.

    Row ``r`` sees the columns ``r + shift - before … r + shift + after``, both ends included, that lie inside
    ``columns`` and inside a stored block. The same class serves keys seen by queries and queries seeing keys. Where
    rows are packed or columns spread, row ``r`` stands at ``(r + row_offset) // packed`` and column ``c`` at
    ``(c + column_offset) // spread``.

    Attributes
    ----------
    rows, columns
        Lengths of the two axes.
    shift
        Column at which row 0 stands.
    before, after
        Columns seen on either side; None is no limit.
    blocks
        The block-sparse mask, its rows along the rows of this object.
    packed, spread
        Adjacent rows that stand at one position, and columns; one of them is 1. Without a block-sparse mask.
    row_offset, column_offset
        Rows and columns by which the first position begins earlier; without a block-sparse mask.
    """

    rows: int
    columns: int
    shift: int
    before: int | None
    after: int | None
    blocks: BlockMask | None = None
    packed: int = 1
    spread: int = 1
    row_offset: int = 0
    column_offset: int = 0

    @cached_property
    def transposed(self) -> Visibility:
        """The same relation, seen from the columns."""
        return Visibility(
            rows=self.columns,
            columns=self.rows,
            shift=-self.shift,
            before=self.after,
            after=self.before,
            blocks=None if self.blocks is None else self.blocks.transposed,
            packed=self.spread,
            spread=self.packed,
            row_offset=self.column_offset,
            column_offset=self.row_offset,
        )

    def interval(self, start: int, stop: int) -> tuple[int, int]:
        """Return the half-open range of columns that the band shows to any of the rows start … stop-1."""
        start, stop = (start + self.row_offset) // self.packed, ceil_div(stop + self.row_offset, self.packed)
        low = 0
        if self.before is not None:
            low = max(0, (start + self.shift - self.before) * self.spread - self.column_offset)
        high = self.columns
        if self.after is not None:
            high = min(self.columns, (stop + self.shift + self.after) * self.spread - self.column_offset)
        return (low, high) if start < stop and low < high else (0, 0)

    def column_tiles(self, rows: Rows, index: int, column_tile: int) -> tuple[int, int]:
        """Return the half-open range of column tiles that the band shows to row tile ``index``."""
        start = index * rows.tile
        low, high = self.interval(start, min(start + rows.tile, self.rows))
        return low // column_tile, ceil_div(high, column_tile)

    def visits(self, rows: Rows, column_tile: int) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
        """Walk the column tiles that a run of equal row tiles visits, ascending.

        Yields
        ------
        index, members
            A column tile and the row tiles of the run that see it, ascending and counted from its first.
        """
        ranges = [self.column_tiles(rows, rows.first + member, column_tile) for member in range(rows.count)]
        lows, highs = np.array(ranges).T
        for index in range(int(lows.min()), int(highs.max())):
            seen = (lows <= index) & (index < highs)
            if self.blocks is not None:
                seen &= [
                    self.tile_is_stored((rows.first + member) * rows.tile, index * column_tile)
                    for member in range(rows.count)
                ]
            members = np.flatnonzero(seen)
            if len(members):
                yield index, members

    def tiles_seen(self, rows: Rows, column_tile: int) -> npt.NDArray[np.intp]:
        """Return the column tiles that the first of a run of row tiles sees, ascending."""
        tiles = np.arange(*self.column_tiles(rows, rows.first, column_tile), dtype=np.intp)
        if self.blocks is None:
            return tiles
        stored = [self.tile_is_stored(rows.start, int(index) * column_tile) for index in tiles]
        return tiles[np.array(stored, dtype=np.bool_)]

    def tile_is_stored(self, row: int, column: int) -> bool:
        """Say whether the block that holds this row and column is stored."""
        if self.blocks is None:
            return True
        runs = self.blocks.runs_of_row.get(row // self.blocks.q_block, ())
        return any(start <= column // self.blocks.kv_block < stop for start, stop in runs)

    def elements(self, rows: Rows, index: int, columns: Rows) -> npt.NDArray[np.bool_] | None:
        """Return which elements of a tile are seen, or None when all are.

        Returns
        -------
        array of bool, shape (rows, columns) of the tile, or None
        """
        start = index * rows.tile
        stop = min(start + rows.tile, self.rows)
        band = self._band_elements(start, stop, columns)
        stored = self._stored_elements(start, stop, columns)
        if band is None or stored is None:
            return stored if band is None else band
        return band & stored

    def hidden(
        self, rows: Rows, row_tiles: npt.NDArray[np.intp], columns: Rows, column_tiles: npt.NDArray[np.intp]
    ) -> dict[int, npt.NDArray[np.bool_]]:
        """Return, for each of some pairs of row and column tiles that is partly hidden, its hidden elements."""
        found = {}
        for place, (row_tile, column_tile) in enumerate(zip(row_tiles.tolist(), column_tiles.tolist(), strict=True)):
            seen = self.elements(rows, row_tile, Rows(columns.length, columns.tile, column_tile, 1))
            if seen is not None:
                found[place] = ~seen
        return found

    def _band_elements(self, start: int, stop: int, columns: Rows) -> npt.NDArray[np.bool_] | None:
        first_row, last_row = ((row + self.row_offset) // self.packed for row in (start, stop - 1))
        first_column, last_column = (
            (column + self.column_offset) // self.spread for column in (columns.start, columns.stop - 1)
        )
        if (self.before is None or last_row + self.shift - self.before <= first_column) and (
            self.after is None or last_column <= first_row + self.shift + self.after
        ):
            return None
        position = (np.arange(start, stop)[:, None] + self.row_offset) // self.packed + self.shift
        column = (np.arange(columns.start, columns.stop)[None, :] + self.column_offset) // self.spread
        seen = np.ones((stop - start, columns.stop - columns.start), dtype=np.bool_)
        if self.before is not None:
            seen &= column >= position - self.before
        if self.after is not None:
            seen &= column <= position + self.after
        return seen

    def _stored_elements(self, start: int, stop: int, columns: Rows) -> npt.NDArray[np.bool_] | None:
        blocks = self.blocks
        if blocks is None:
            return None
        seen = np.zeros((stop - start, columns.stop - columns.start), dtype=np.bool_)
        for block_row in range(start // blocks.q_block, ceil_div(stop, blocks.q_block)):
            first, end = (max(0, row * blocks.q_block - start) for row in (block_row, block_row + 1))
            for run in blocks.runs_of_row.get(block_row, ()):
                left, right = (max(0, column * blocks.kv_block - columns.start) for column in run)
                seen[first:end, left:right] = True
        return None if seen.all() else seen

    def tile_visits(self, rows: Rows, column_tile: int) -> tuple[int, int]:
        """Count the column tiles that a run of equal row tiles visits, without walking them.

        Returns
        -------
        full, clipped
            Visits of column tiles of full size, and of the one that the end of the axis clips.
        """
        full = clipped = 0
        for first, stop, column_start, column_stop in self._rectangles(rows):
            visits, last = self._visits_inside(rows, first, stop, column_start, column_stop, column_tile)
            full += visits - last
            clipped += last
        return full, clipped

    def _rectangles(self, rows: Rows) -> Iterator[tuple[int, int, int, int]]:
        """Yield ranges of row tiles with the columns that the block mask leaves them."""
        if self.blocks is None:
            yield rows.first, rows.first + rows.count, 0, self.columns
            return
        tiles_per_block = self.blocks.q_block // rows.tile
        for block_row, runs in self.blocks.row_runs:
            first = max(rows.first, block_row * tiles_per_block)
            stop = min(rows.first + rows.count, (block_row + 1) * tiles_per_block)
            if first < stop:
                for run_start, run_stop in runs:
                    start, end = run_start * self.blocks.kv_block, run_stop * self.blocks.kv_block
                    yield first, stop, start, min(self.columns, end)

    def _visits_inside(
        self, rows: Rows, first: int, stop: int, column_start: int, column_stop: int, column_tile: int
    ) -> tuple[int, int]:
        """Count visits of the row tiles first … stop-1 inside a range of columns: all, and of the clipped one.

        Row tile i sees the columns low(i) … high(i)-1, both clamped to the range; of packed rows, so many times them
        are linear in i, rounded down and up.
        """
        if column_stop <= column_start:
            return 0, 0
        packed, step = self.packed, self.packed * self.spread
        origin = self.spread * self.row_offset - packed * self.column_offset
        tile, size, divisor = self.spread * rows.tile, self.spread * rows.size, packed * column_tile
        column_start, column_stop = packed * column_start, packed * column_stop
        low_intercept = None if self.before is None else origin + step * (self.shift - self.before)
        high_intercept = None if self.after is None else origin + size + step * (self.shift + self.after)
        if low_intercept is not None:  # low(i) < column_stop
            stop = min(stop, ceil_div(column_stop - low_intercept, tile))
        if high_intercept is not None:  # high(i) > column_start
            first = max(first, (column_start - high_intercept) // tile + 1)
        if stop <= first:
            return 0, 0
        if high_intercept is None:
            ends = (stop - first) * ceil_div(column_stop, divisor)
        else:
            up = divisor - packed
            ends = clamped_floor_sum(
                first, stop, tile, high_intercept + packed - 1 + up, column_start + up, column_stop + up, divisor
            )
        if low_intercept is None:
            starts = (stop - first) * (column_start // divisor)
        else:
            starts = clamped_floor_sum(first, stop, tile, low_intercept, column_start, column_stop, divisor)
        full_columns = self.columns // column_tile * divisor
        clipped = 0
        if column_stop > full_columns:
            reaches = first
            if high_intercept is not None:
                reaches = max(first, (full_columns - high_intercept) // tile + 1)
            clipped = max(0, stop - reaches)
        return ends - starts, clipped


@dataclass(frozen=True)
class Windows:
    """For each tile of a run, the rows of a longer axis that it is made of.

    Row ``i`` of the run is made of the rows ``i · stride … i · stride + width - 1`` of the longer axis, so the rows of
    one tile overlap those of the next where the width exceeds the stride.

    Attributes
    ----------
    of
        The tiles.
    stride, width
        See above.
    """

    of: Rows
    stride: int
    width: int

    @property
    def tile(self) -> int:
        """Rows that a tile which is not clipped is made of."""
        return (self.of.tile - 1) * self.stride + self.width

    @property
    def size(self) -> int:
        """Rows that each tile is made of."""
        return (self.of.size - 1) * self.stride + self.width

    @property
    def start(self) -> int:
        """First row."""
        return self.of.start * self.stride

    @property
    def stop(self) -> int:
        """One past the last row."""
        return (self.of.stop - 1) * self.stride + self.width


@dataclass(frozen=True)
class VisibleRows:
    """The rows of one axis that a run of tiles along the other axis sees.

    Attributes
    ----------
    visibility
        The relation, its rows along the axis of ``seen_by``.
    seen_by
        The tiles that look.
    """

    visibility: Visibility
    seen_by: Rows


def is_integer(value: Any) -> bool:
    """Say whether a value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
