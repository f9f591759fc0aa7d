"""The machine that runs a tiled program: memory arrays, on-chip tiles with a capacity, byte counters.

One program text runs in two modes. *Counting* (no arithmetic) enters every loop once for each size of tile and
multiplies by how often that tile occurs, so its cost does not depend on the sequence length. *Simulating* walks
the tiles, evaluates independent thread blocks stacked, and charges each block by itself; it returns the numbers
and the same bytes.

What is charged
---------------
- ``load``, ``store`` and ``reduce`` charge the in-bounds bytes of the tile to the array.
- A copy into an SRAM tile writes it, a copy out of one reads it.
- Every operation reads each of its SRAM operands once and writes its SRAM result once. Registers are free.
- Masks are computed from indices and cost nothing; block masks decide which tiles are visited.
- A tile occupies its unclipped size, as a statically sized buffer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from simattn.arithmetic.floating import FloatArithmetic, HiddenElements, add_in_place
from simattn.arithmetic.formats import INDEX_DTYPES, STORED_BYTES, numpy_dtype
from simattn.masks import Rows, Visibility, VisibleRows, Windows, all_rows
from simattn.problem import AttentionProblem, Heads
from simattn.selection import top_blocks
from simattn.tables import byte_text
from simattn.traffic import COUNTERS, ArrayTraffic, Traffic

Values = npt.NDArray[Any]
RowsT = TypeVar("RowsT", bound=Rows)
Place = Literal["sram", "registers"]
Role = Literal["input", "output", "saved", "workspace"]

STACKED_ELEMENTS = 1 << 20
"""Elements of a simulated tile stack: about what a core's cache holds, so memory stays independent of the length."""


class CapacityError(ValueError):
    """The tiles of a plan do not fit the on-chip memory."""


@dataclass(eq=False)
class Array:
    """An array in device memory.

    Attributes
    ----------
    name
        Name in the traffic table.
    heads
        Whether there is a matrix for every query head or KV head, or one for all batch entries and heads.
    rows, columns
        Shape of each matrix.
    dtype
        Storage format.
    role
        "input", "output", "saved" for the backward pass, or "workspace".
    values
        Shape (batch · kv_heads, group or 1, rows, columns) when simulating, of one matrix for all (1, 1, rows,
        columns), else None.
    """

    name: str
    heads: Heads
    rows: int
    columns: int
    dtype: str
    role: Role
    values: Values | None = None


@dataclass(eq=False)
class Tile:
    """An on-chip tile of one thread block, its values stacked over the blocks simulated together.

    Attributes
    ----------
    name
        Name in the traffic table and in capacity errors.
    place
        "sram" or "registers".
    rows, columns
        Shape, clipped at the ends of the arrays.
    item_bytes
        Bytes of one element.
    capacity_rows, capacity_columns
        Shape of its buffer, not clipped.
    stages
        Buffers it has in a pipeline.
    level
        Loop depth at which it was made.
    values
        Shape (streams, stack, group, rows, columns) when simulating, else None.
    borrowed
        Whether ``values`` is a view of an array, to be copied before an update in place.
    """

    name: str
    place: Place
    rows: int
    columns: int
    item_bytes: int
    capacity_rows: int
    capacity_columns: int
    stages: int
    level: int
    values: Values | None = None
    borrowed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the clipped tile."""
        return self.rows * self.columns * self.item_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes it occupies: its unclipped buffers, one for each pipeline stage."""
        return self.capacity_rows * self.capacity_columns * self.item_bytes * self.stages


@dataclass(frozen=True)
class ListedRows(Rows):
    """Tiles of a list of rows, in the places of rows that follow one another.

    Attributes
    ----------
    numbers
        What the listed numbers are below. An array of as many rows has a row for each of them; one of fewer rows has a
        row for every ``numbers / rows`` of them.
    listed
        The whole list when simulating.
    """

    numbers: int = 1
    listed: Values | None = field(default=None, compare=False)


@dataclass(frozen=True)
class GatheredRows(Rows):
    """Tiles of an axis that do not follow one another; ``first`` is the first of them.

    Attributes
    ----------
    tiles
        All of them, ascending.
    """

    tiles: npt.NDArray[np.intp] = field(compare=False, default_factory=lambda: np.arange(0))

    @property
    def elements(self) -> npt.NDArray[np.intp]:
        """All rows of all tiles."""
        return (self.tiles[:, None] * self.tile + np.arange(self.size)).ravel()


@dataclass(eq=False)
class RowLists:
    """Lists of rows, of any lengths: one for every stream and query head.

    Attributes
    ----------
    array
        Where they stand in memory: a matrix of one column for every query head, of as many streams as the problem or of
        fewer, each of which then serves several streams that follow one another. So may the arrays be from which rows
        are taken.
    counts
        Length of each list, shape (streams, group).
    starts
        Row of the array at which each list starts, shaped alike, when simulating.
    numbers
        As for :class:`ListedRows`.
    """

    array: Array
    counts: npt.NDArray[np.int64]
    numbers: int
    starts: npt.NDArray[np.int64] | None = None

    def tiles(self, tile: int) -> list[tuple[ListedRows, int]]:
        """Return tiles of every size that occurs in the lists, and how many there are."""
        return [(ListedRows(size, tile, 0, 1, self.numbers), times) for size, times in _tile_sizes(self.counts, tile)]

    def rows_of(self, stream: int, head: int, tile: int) -> Iterator[ListedRows]:
        """Yield the tiles of one list, those of full size together."""
        assert self.array.values is not None
        assert self.starts is not None
        first, count = int(self.starts[stream, head]), int(self.counts[stream, head])
        shared = len(self.counts) // len(self.array.values)
        listed = self.array.values[stream // shared, head, first : first + count, 0]
        for rows in all_rows(count, tile):
            yield ListedRows(rows.length, rows.tile, rows.first, rows.count, self.numbers, listed)


@dataclass(frozen=True)
class Operations:
    """Arithmetic operations of a program.

    Attributes
    ----------
    matmul_flops
        Additions and multiplications inside matrix products, on visited tiles.
    vector_flops
        Elementwise and reduction operations outside them.
    exponentials
        Exponential and logarithm evaluations.
    """

    matmul_flops: int = 0
    vector_flops: int = 0
    exponentials: int = 0


@dataclass
class _State:
    """Where in the loops the program stands."""

    streams: tuple[int, int]
    executions: int
    heads: Heads = "query"
    level: int = 0
    group: int | None = None
    stack: Rows | None = None
    stack_level: int = 0
    selection: slice | npt.NDArray[np.intp] | None = None
    selection_level: int = 0


@dataclass
class Machine:
    """Runs one tiled program.

    Parameters
    ----------
    problem
        The attention problem.
    sram_bytes, register_bytes
        Capacity of each place, per thread block; None is unlimited.
    arithmetic
        How to compute; None only counts.
    """

    problem: AttentionProblem
    sram_bytes: int | None = None
    register_bytes: int | None = None
    arithmetic: FloatArithmetic | None = None
    arrays: dict[str, Array] = field(default_factory=dict)
    peak_bytes: dict[Place, int] = field(default_factory=lambda: {"sram": 0, "registers": 0})

    def __post_init__(self) -> None:
        self._counters: dict[str, dict[str, int]] = {}
        self._operations = {"matmul_flops": 0, "vector_flops": 0, "exponentials": 0}
        self._live: list[Tile] = []
        self._state = _State(streams=(0, self.problem.batch * self.problem.kv_heads), executions=0)

    # What was counted

    @property
    def traffic(self) -> Traffic:
        """Bytes moved so far."""
        return Traffic({name: ArrayTraffic(**counts) for name, counts in self._counters.items()})

    @property
    def operations(self) -> Operations:
        """Operations done so far."""
        return Operations(**self._operations)

    @property
    def hbm_bytes_by_role(self) -> dict[str, int]:
        """Bytes of the declared memory arrays, by role."""
        total: dict[str, int] = {}
        for array in self.arrays.values():
            matrices = self._streams_of(array.heads) * self._group_of(array.heads)
            size = matrices * array.rows * array.columns * STORED_BYTES[array.dtype]
            total[array.role] = total.get(array.role, 0) + size
        return total

    def inside(self, problem: AttentionProblem, arrays: Mapping[str, Array]) -> Machine:
        """Return a machine for a part of the work that is a problem of its own, to be taken over when it has run.

        Parameters
        ----------
        problem
            Shapes and mask of the part.
        arrays
            What its program finds in memory, by the name that it looks for; charged under each array's own name.
        """
        inner = Machine(problem, self.sram_bytes, self.register_bytes, self.arithmetic)
        inner.arrays.update(arrays)
        return inner

    def take_over(self, other: Machine, times: int = 1) -> None:
        """Add what another machine counted, so many times, and whatever of its tiles was larger."""
        for name, counts in other._counters.items():
            mine = self._counters.setdefault(name, dict.fromkeys(COUNTERS, 0))
            for counter, count in counts.items():
                mine[counter] += times * count
        for name, count in vars(other.operations).items():
            self._operations[name] += times * count
        for place, used in other.peak_bytes.items():
            self.peak_bytes[place] = max(self.peak_bytes[place], used)

    # Memory arrays

    def array(
        self,
        name: str,
        rows: int,
        columns: int,
        *,
        dtype: str = "float32",
        heads: Heads = "query",
        role: Role = "workspace",
        values: Values | None = None,
    ) -> Array:
        """Declare an array in device memory.

        When simulating it starts as NaN, or as −1 if it holds indices, unless ``values`` are given.
        """
        if self.arithmetic is not None and values is None:
            streams, group = self._streams_of(heads), self._group_of(heads)
            is_stored = self.arithmetic.rounds_to_storage or dtype in INDEX_DTYPES
            stored = numpy_dtype(dtype) if is_stored else self.arithmetic.dtype
            values = np.full((streams, group, rows, columns), -1 if dtype in INDEX_DTYPES else np.nan, dtype=stored)
        made = Array(name, heads, rows, columns, dtype, role, values)
        self.arrays[name] = made
        return made

    def _streams_of(self, heads: Heads) -> int:
        return 1 if heads == "one" else self.problem.batch * self.problem.kv_heads

    def _group_of(self, heads: Heads) -> int:
        return self.problem.group_size if heads == "query" else 1

    # Loops

    def thread_blocks(
        self,
        length: int | None = None,
        tile: int = 1,
        *,
        per: Heads = "query",
        width: int = 1,
        together: bool = True,
    ) -> Iterator[Rows]:
        """Run a thread block for every head, and for every tile of an axis if ``length`` is given.

        Yields
        ------
        Rows
            Tiles of equal size whose blocks run at once.

        Parameters
        ----------
        length, tile
            The axis and its tile; None for one block per head.
        per
            A block for every query head, for every KV head, or one for all.
        width
            Columns of the widest tile of the block, which bounds how many blocks are simulated together.
        together
            Whether the blocks of a head are simulated together at all, and not the iterations of their inner loop.
        """
        whole = (Rows(1, 1, 0, 1),) if length is None else all_rows(length, tile)
        for rows in whole:
            for streams, part in self._stacks(rows, per, width, together):
                executions = (streams[1] - streams[0]) * self._group_of(per) * part.count
                if executions:
                    with self._loop(
                        streams=streams,
                        executions=executions,
                        heads=per,
                        group=None,
                        stack=part,
                        stack_level=self._state.level + 1,
                        selection=None,
                    ):
                        yield part

    def tiles(
        self,
        span: int | VisibleRows,
        tile: int,
        *,
        independent: bool = False,
        width: int = 1,
        descending: bool = False,
    ) -> Iterator[Rows]:
        """Walk the tiles of an axis inside a thread block, in ascending order unless told otherwise.

        Parameters
        ----------
        span
            The length of the axis, or the part of it that is visible to the rows of an enclosing loop.
        tile
            Rows of a tile.
        independent
            Whether the iterations touch no common data, except that matrix products add to tiles made before the loop:
            such iterations of one thread block are simulated together.
        width
            As for :meth:`thread_blocks`.
        descending
            Whether the last tile comes first; only if ``span`` is a length.
        """
        if isinstance(span, VisibleRows):
            if self.arithmetic is None:
                yield from self._count_visible(span, tile)
            elif self._state.stack is span.seen_by and not independent:
                yield from self._walk_selected(span, tile)
            else:
                yield from self._walk_visible(span, tile, independent, width)
        else:
            order = -1 if descending else 1
            for rows in all_rows(span, tile)[::order]:
                if self.arithmetic is None:
                    with self._loop(executions=self._state.executions * rows.count):
                        yield rows
                else:
                    for index in range(rows.first, rows.first + rows.count)[::order]:
                        with self._loop():
                            yield Rows(span, tile, index, 1)

    def group_heads(self) -> Iterator[int]:
        """Walk the query heads of the block's KV head; a block of one query head has just its own."""
        if self._state.heads == "query" or self._state.group is not None:
            yield 0
        elif self.arithmetic is None:
            with self._loop(executions=self._state.executions * self.problem.group_size):
                yield 0
        else:
            for head in range(self.problem.group_size):
                with self._loop(group=head):
                    yield head

    # Loops over lists of rows

    def list_blocks(self, lists: RowLists, tile: int, *, width: int = 1) -> Iterator[ListedRows]:
        """Run a thread block for every tile of every list; ``width`` is that of :meth:`thread_blocks`."""
        level = self._state.level + 1
        if self.arithmetic is None:
            for rows, times in lists.tiles(tile):
                with self._loop(executions=times, heads="kv", stack=rows, stack_level=level, selection=None):
                    yield rows
            return
        for stream, head in np.ndindex(lists.counts.shape):
            for rows in lists.rows_of(stream, head, tile):
                for part in _parts(rows, width):
                    with self._loop(
                        streams=(stream, stream + 1),
                        executions=part.count,
                        heads="kv",
                        group=head,
                        stack=part,
                        stack_level=level,
                        selection=None,
                    ):
                        yield part

    def list_tiles(self, lists: RowLists, tile: int) -> Iterator[ListedRows]:
        """Walk the tiles of the list of the present stream and query head, inside :meth:`single_blocks`."""
        if self.arithmetic is None:
            for rows, times in lists.tiles(tile):
                with self._loop(executions=self._state.executions // lists.counts.size * times):
                    yield rows
            return
        for rows in lists.rows_of(self._state.streams[0], self._state.group or 0, tile):
            for index in range(rows.first, rows.first + rows.count):
                with self._loop():
                    yield replace(rows, first=index, count=1)

    def single_blocks(self, length: int, tile: int, *, per: Heads, width: int = 1) -> Iterator[Rows]:
        """Run thread blocks as :meth:`thread_blocks` does, simulated by streams one by one, each with its own list."""
        if self.arithmetic is None:
            yield from self.thread_blocks(length, tile, per=per, width=width)
            return
        heads = range(self.problem.group_size) if per == "query" else (None,)
        for rows in all_rows(length, tile):
            for stream in range(self._streams_of(per)):
                for head in heads:
                    for part in _parts(rows, width):
                        with self._loop(
                            streams=(stream, stream + 1),
                            executions=part.count,
                            heads="kv",
                            group=head,
                            stack=part,
                            stack_level=self._state.level + 1,
                            selection=None,
                        ):
                            yield part

    def ragged_tiles(self, lengths: npt.NDArray[np.int64], tile: int) -> Iterator[Rows]:
        """Walk the tiles of an axis of several lengths, each of them in as many thread blocks; simulated one by one."""
        if self.arithmetic is None:
            for size, times in _tile_sizes(lengths, tile):
                with self._loop(executions=self._state.executions // lengths.size * times):
                    yield Rows(size, tile, 0, 1)
        else:
            (length,) = lengths.tolist()
            yield from self.tiles(length, tile)

    def repeats(self, times: npt.NDArray[np.int64]) -> Iterator[int]:
        """Walk a loop of so many turns in each stream.

        When simulating, streams that have fewer take part in the turns of the others uncharged; the program sees to it
        that these change nothing.
        """
        present = times[slice(*self._state.streams)]
        if self.arithmetic is None:
            turns = int(present.sum())
            if turns:
                with self._loop(executions=self._state.executions // len(present) * turns):
                    yield 0
            return
        for turn in range(int(present.max(initial=0))):
            running = int((present > turn).sum())
            with self._loop(executions=self._state.executions // len(present) * running):
                yield turn

    @contextmanager
    def _loop(self, **changes: Any) -> Iterator[None]:
        before, live = self._state, len(self._live)
        self._state = _State(**{**vars(before), "level": before.level + 1, **changes})
        try:
            yield
        finally:
            self._state = before
            del self._live[live:]

    def _stacks(self, rows: Rows, per: Heads, width: int, together: bool) -> Iterator[tuple[tuple[int, int], Rows]]:
        """Split streams and tiles into stacks of a bounded size; counting takes all at once."""
        streams = self._streams_of(per)
        if self.arithmetic is None:
            yield (0, streams), rows
            return
        elements = rows.tile * width * self._group_of(per)
        tiles = min(rows.count, max(1, STACKED_ELEMENTS // elements)) if together else 1
        at_once = max(1, STACKED_ELEMENTS // (elements * tiles)) if tiles == rows.count else 1
        for first_stream in range(0, streams, at_once):
            for first in range(rows.first, rows.first + rows.count, tiles):
                count = min(tiles, rows.first + rows.count - first)
                yield (
                    (first_stream, min(streams, first_stream + at_once)),
                    Rows(rows.length, rows.tile, first, count),
                )

    def _count_visible(self, span: VisibleRows, tile: int) -> Iterator[Rows]:
        visibility, base = span.visibility, self._state.executions // span.seen_by.count
        full, clipped = visibility.tile_visits(span.seen_by, tile)
        last = visibility.columns // tile
        for visits, first in ((full, 0), (clipped, last)):
            if visits:
                with self._loop(executions=base * visits):
                    yield Rows(visibility.columns, tile, first, 1)

    def _walk_selected(self, span: VisibleRows, tile: int) -> Iterator[Rows]:
        """Walk tiles for a stack of blocks, each tile with the blocks that see it."""
        rows, base = span.seen_by, self._state.executions // span.seen_by.count
        for index, blocks in span.visibility.visits(rows, tile):
            with self._loop(
                executions=base * len(blocks),
                selection=_selection(blocks, rows.count),
                selection_level=self._state.level + 1,
            ):
                yield Rows(span.visibility.columns, tile, index, 1)

    def _walk_visible(self, span: VisibleRows, tile: int, independent: bool, width: int) -> Iterator[Rows]:
        """Walk the tiles that one tile of an enclosing loop sees."""
        rows, visibility = span.seen_by, span.visibility
        seen = visibility.tiles_seen(rows, tile)
        if not independent:
            for index in seen.tolist():
                with self._loop():
                    yield Rows(visibility.columns, tile, index, 1)
            return
        assert rows.count == 1
        most, full = max(1, STACKED_ELEMENTS // (tile * width)), visibility.columns // tile
        for alike in (seen[seen < full], seen[seen >= full]):
            for start in range(0, len(alike), most):
                part = _rows_of_tiles(visibility.columns, tile, alike[start : start + most])
                with self._loop(
                    executions=self._state.executions * part.count,
                    stack=part,
                    stack_level=self._state.level + 1,
                    selection=None,
                ):
                    yield part

    # Tiles

    def allocate(
        self,
        name: str,
        rows: int,
        columns: int,
        *,
        place: Place,
        capacity: tuple[int, int] | None = None,
        item_bytes: int = 4,
        stages: int = 1,
    ) -> Tile:
        """Reserve room for a tile until the present loop iteration ends.

        Parameters
        ----------
        name
            Name of the tile.
        rows, columns
            Clipped shape.
        place
            "sram" or "registers".
        capacity
            Unclipped shape; default the clipped one.
        item_bytes
            Bytes of one element.
        stages
            Copies of the buffer in a pipeline.

        Raises
        ------
        CapacityError
            If the tiles of the place exceed its capacity; the message names them and their sizes.
        """
        whole = capacity or (rows, columns)
        tile = Tile(name, place, rows, columns, item_bytes, *whole, stages, self._state.level)
        self._live.append(tile)
        used = sum(other.capacity_bytes for other in self._live if other.place == place)
        limit = self.sram_bytes if place == "sram" else self.register_bytes
        if limit is not None and used > limit:
            held = ", ".join(
                f"{other.name} {byte_text(other.capacity_bytes)}" for other in self._live if other.place == place
            )
            raise CapacityError(
                f"the tiles in {place} take {used:,} bytes ({held}); expected at most {limit:,}: "
                "choose smaller tiles, plan='fit' or more memory"
            )
        self.peak_bytes[place] = max(self.peak_bytes[place], used)
        return tile

    def free(self, tile: Tile) -> None:
        """Give a tile's room back before its loop iteration ends."""
        self._live.remove(tile)

    def full(
        self,
        name: str,
        rows: Rows | Windows | int,
        columns: Rows | int,
        value: float,
        *,
        place: Place,
        parts: int = 1,
    ) -> Tile:
        """Make an fp32 tile filled with one value, one for every block of the stack.

        ``parts`` is how many values the arithmetic holds for each column, in whatever threads it models.
        """
        tile = self._tile_like(name, rows, columns, place)
        self._charge_write(tile)
        if self.arithmetic is not None:
            stack = self._state.stack
            blocks = np.arange(stack.count if stack is not None else 1)
            if self._state.selection is not None:
                blocks = blocks[self._state.selection]
            streams = self._state.streams[1] - self._state.streams[0]
            shape = (streams, len(blocks), self._group_of(self._state.heads), tile.rows, tile.columns * parts)
            tile.values = np.full(shape, value, dtype=self.arithmetic.dtype)
        return tile

    def empty_row_sum(self, rows: Rows, *, place: Place) -> Tile:
        """Make the running row sum of no score."""
        parts = 1 if self.arithmetic is None else self.arithmetic.row_sum_parts
        return self.full("row_sum", rows, 1, 0.0, place=place, parts=parts)

    def load(
        self,
        array: Array,
        rows: Rows | Windows | None = None,
        columns: Rows | None = None,
        *,
        place: Place = "sram",
        name: str | None = None,
        stages: int = 1,
    ) -> Tile:
        """Copy a tile of an array on chip; None takes the whole axis."""
        tile = self._tile_like(
            name or array.name,
            array.rows if rows is None else rows,
            array.columns if columns is None else columns,
            place,
            item_bytes=STORED_BYTES[array.dtype],
            stages=stages,
        )
        self._charge_hbm(array.name, "hbm_read_bytes", tile.nbytes)
        self._charge_write(tile)
        if self.arithmetic is not None:
            view = self._view(array, rows, columns)
            if self._is_stacked(rows, columns):
                tile.values = np.ascontiguousarray(view, dtype=self.arithmetic.dtype)
            else:
                tile.values = np.asarray(view, dtype=self.arithmetic.dtype)
            tile.borrowed = np.may_share_memory(tile.values, view)
        return tile

    def store(self, tile: Tile, array: Array, rows: Rows | None = None, columns: Rows | None = None) -> None:
        """Copy a tile to an array, rounding to its storage format."""
        self._charge_read(tile)
        self._charge_hbm(array.name, "hbm_write_bytes", self._stored_bytes(tile, array))
        if self.arithmetic is not None:
            self._assign(array, rows, columns, self._read(tile))

    def reduce(self, tile: Tile, array: Array, rows: Rows | Windows | None = None, columns: Rows | None = None) -> None:
        """Add a tile to an array in place, as a reduction sent to memory does; blocks and heads ascending."""
        self._charge_read(tile)
        self._charge_hbm(array.name, "hbm_reduce_bytes", self._stored_bytes(tile, array))
        if self.arithmetic is None:
            return
        if isinstance(rows, Windows) and self._is_stacked(rows, columns):
            view, added = self._stacked_view(array, rows, columns), self._read(tile)
            for block in range(added.shape[1]):  # one by one, since they overlap
                view[:, block] += added[:, block]
        else:
            total, parts = self._view(array, rows, columns), [self._read(tile)]
            if not self._is_stacked(rows, columns):
                parts = _slices(parts, axis=1)
            if array.heads != "query":
                parts = _slices(parts, axis=2)
            if array.heads == "one":
                parts = _slices(parts, axis=0)
            for part in parts:  # one by one, so that the order of the sum is known
                total = total + part
            self._assign(array, rows, columns, total)

    def load_indices(self, array: Array, rows: Rows | int) -> None:
        """Load so many indices into registers, with whose values the loops are run already."""
        tile = self._tile_like(array.name, rows, 1, "registers")
        self._charge_hbm(array.name, "hbm_read_bytes", tile.nbytes)

    def move_elements(self, array: Array, counter: Literal["read", "written", "reduced"], count: int = 1) -> None:
        """Charge so many elements whose places follow from data; the program reads and sets such values itself."""
        counters = {"read": "hbm_read_bytes", "written": "hbm_write_bytes", "reduced": "hbm_reduce_bytes"}
        self._charge_hbm(array.name, counters[counter], count * STORED_BYTES[array.dtype])

    def _stored_bytes(self, tile: Tile, array: Array) -> int:
        return tile.rows * tile.columns * STORED_BYTES[array.dtype]

    def _tile_like(
        self,
        name: str,
        rows: Rows | Windows | int,
        columns: Rows | int,
        place: Place,
        *,
        item_bytes: int = 4,
        stages: int = 1,
    ) -> Tile:
        clipped = [axis if isinstance(axis, int) else axis.size for axis in (rows, columns)]
        whole = [axis if isinstance(axis, int) else axis.tile for axis in (rows, columns)]
        return self.allocate(
            name,
            clipped[0],
            clipped[1],
            place=place,
            capacity=(whole[0], whole[1]),
            item_bytes=item_bytes,
            stages=stages,
        )

    def _row_vector(self, name: str, like: Tile) -> Tile:
        return self.allocate(name, like.rows, 1, place="registers", capacity=(like.capacity_rows, 1))

    def _is_stacked(self, rows: Rows | Windows | None, columns: Rows | None) -> bool:
        stack = self._state.stack
        return stack is not None and (_tiles_of(rows) is stack or columns is stack)

    def _stacked_view(self, array: Array, rows: Rows | Windows | None, columns: Rows | None) -> Values:
        """Return the array's elements of the present streams as (streams, stack, group, rows, columns)."""
        assert array.values is not None
        state = self._state
        if isinstance(rows, ListedRows):
            return self._listed_view(array, rows)
        values = array.values if array.heads == "one" else array.values[state.streams[0] : state.streams[1]]
        if array.heads == "query" and state.group is not None:
            values = values[:, state.group : state.group + 1]
        if isinstance(rows, GatheredRows):
            values = values[:, :, rows.elements]
        elif rows is not None:
            values = values[:, :, rows.start : rows.stop]
        if columns is not None:
            values = values[..., columns.start : columns.stop]
        streams, group, height, width = values.shape
        if rows is not None and rows is state.stack:
            return values.reshape(streams, group, rows.count, rows.size, width).transpose(0, 2, 1, 3, 4)
        if isinstance(rows, Windows) and rows.of is state.stack:
            windows = sliding_window_view(values, rows.size, axis=2, writeable=True)
            return windows[:, :, :: rows.of.tile * rows.stride].transpose(0, 2, 1, 4, 3)
        if columns is not None and columns is state.stack:
            split = values.reshape(streams, group, height, columns.count, columns.size)
            return split.transpose(0, 3, 1, 2, 4)
        return values[:, None]

    def _listed(self, array: Array, rows: ListedRows) -> tuple[int, int, Values]:
        """Return stream and head of an array's matrix, and its listed rows."""
        assert array.values is not None
        assert rows.listed is not None
        shared = self._streams_of(array.heads) // len(array.values)
        listed = rows.listed[rows.start : rows.stop] // (rows.numbers // array.rows)
        return self._state.streams[0] // shared, self._state.group or 0, listed

    def _listed_view(self, array: Array, rows: ListedRows) -> Values:
        assert array.values is not None
        stream, head, listed = self._listed(array, rows)
        values: Values = array.values[stream, head, listed]
        count = rows.count if rows is self._state.stack else 1
        return values.reshape(1, count, 1, -1, array.columns)

    def _view(self, array: Array, rows: Rows | Windows | None, columns: Rows | None) -> Values:
        view = self._stacked_view(array, rows, columns)
        if self._state.selection is not None and self._is_stacked(rows, columns):
            return view[:, self._state.selection]
        return view

    def _assign(self, array: Array, rows: Rows | Windows | None, columns: Rows | None, values: Values) -> None:
        if isinstance(rows, ListedRows):
            assert array.values is not None
            stream, head, listed = self._listed(array, rows)
            array.values[stream, head, listed] = values.reshape(len(listed), array.columns)
            return
        if isinstance(rows, GatheredRows):
            self._scatter(array, rows, columns, values)
            return
        view = self._stacked_view(array, rows, columns)
        if self._state.selection is not None and self._is_stacked(rows, columns):
            view[:, self._state.selection] = values
        else:
            view[...] = values

    def _scatter(self, array: Array, rows: GatheredRows, columns: Rows | None, values: Values) -> None:
        """Set rows that do not follow one another, of which no view can be taken."""
        assert array.values is not None
        view = self._stacked_view(array, None, columns)[:, 0]
        streams, group, _, width = view.shape
        view[:, :, rows.elements] = values.swapaxes(1, 2).reshape(streams, group, -1, width)

    def _is_selected(self, tile: Tile) -> bool:
        state = self._state
        return state.selection is not None and state.stack_level <= tile.level < state.selection_level

    def _read(self, tile: Tile) -> Values:
        assert tile.values is not None
        shared = tile.values.shape[1] == 1  # loaded whole, the same for every block of the stack
        return tile.values[:, self._state.selection] if self._is_selected(tile) and not shared else tile.values

    def _update(self, tile: Tile, change: Callable[[Values], Values | None]) -> None:
        """Change a tile's values of the present blocks, in place or by a returned replacement."""
        assert tile.values is not None
        if tile.borrowed:
            tile.values, tile.borrowed = tile.values.copy(), False
        if self._is_selected(tile):
            part = tile.values[:, self._state.selection]
            changed = change(part)
            if changed is not None or isinstance(self._state.selection, np.ndarray):
                tile.values[:, self._state.selection] = part if changed is None else changed
        else:
            changed = change(tile.values)
            if changed is not None:
                tile.values = changed

    # Charges

    def _charge(self, name: str, counter: str, nbytes: int) -> None:
        counts = self._counters.get(name)
        if counts is None:
            counts = self._counters[name] = dict.fromkeys(COUNTERS, 0)
        counts[counter] += nbytes * self._state.executions

    def _charge_hbm(self, name: str, counter: str, nbytes: int) -> None:
        self._charge(name, counter, nbytes)

    def _charge_read(self, *tiles: Tile) -> None:
        for tile in tiles:
            if tile.place == "sram":
                self._charge(tile.name, "sram_read_bytes", tile.nbytes)

    def _charge_write(self, tile: Tile) -> None:
        if tile.place == "sram":
            self._charge(tile.name, "sram_write_bytes", tile.nbytes)

    def _operate(self, *, reads: tuple[Tile, ...] = (), writes: tuple[Tile, ...] = (), **operations: int) -> None:
        self._charge_read(*reads)
        for tile in writes:
            self._charge_write(tile)
        for name, count in operations.items():
            self._operations[name] += count * self._state.executions

    # Masks

    def hidden_elements(self, query_rows: Rows, key_rows: Rows, visibility: Visibility | None = None) -> HiddenElements:
        """Return, for each block of the stack whose tile is partly masked, its hidden (query, key) elements.

        ``visibility`` says which keys the queries see where these are not the problem's. Listed rows see all keys of
        the tiles that they meet.
        """
        if self.arithmetic is None or isinstance(query_rows, ListedRows):
            return {}
        queries, keys = (self.present(rows) for rows in (query_rows, key_rows))
        queries, keys = np.broadcast_arrays(queries, keys)
        visibility = visibility or self.problem.keys_of_queries
        return visibility.hidden(query_rows, queries, key_rows, keys)

    def present(self, rows: Rows) -> npt.NDArray[np.intp]:
        """Return the tiles of a run that the present thread blocks of a simulation are at."""
        if rows is not self._state.stack:
            return np.array([rows.first])
        if isinstance(rows, GatheredRows):
            return rows.tiles
        members = np.arange(rows.count)
        if self._state.selection is not None:
            members = members[self._state.selection]
        return rows.first + members

    def hide(self, tile: Tile, hidden: HiddenElements, value: float) -> None:
        """Set the hidden elements of a (query, key) tile."""
        if hidden:

            def fill(values: Values) -> None:
                for position, elements in hidden.items():
                    np.copyto(values[:, position], value, where=elements)

            self._update(tile, fill)

    # Operations on tiles

    def scores(
        self,
        q: Tile,
        k: Tile,
        *,
        place: Place,
        name: str = "scores",
        descales: tuple[Tile, ...] = (),
        into: Tile | None = None,
    ) -> Tile:
        """Return scale · q kᵀ, times the descale factors; ``into`` adds it to partial scores."""
        tile = into or self.allocate(name, q.rows, k.rows, place=place, capacity=(q.capacity_rows, k.capacity_rows))
        self._operate(
            reads=(q, k, *descales) if into is None else (q, k, into, *descales),
            writes=(tile,),
            matmul_flops=2 * q.rows * k.rows * q.columns,
            vector_flops=q.rows * k.rows * (1 + len(descales)),
        )
        if self.arithmetic is not None:
            values = self.arithmetic.scores(self._read(q), self._read(k), self.problem.scale)
            for descale in descales:
                values = values * self._read(descale)
            self._set_product(tile, values, into)
        return tile

    def scale_scores(self, tile: Tile, *, descales: tuple[Tile, ...] = ()) -> None:
        """Multiply q kᵀ by the scale and the descale factors."""
        self._operate(
            reads=(tile, *descales),
            writes=(tile,),
            vector_flops=tile.rows * tile.columns * (1 + len(descales)),
        )
        if self.arithmetic is not None:
            factors = (self.arithmetic.score_factor(self.problem.scale), *map(self._read, descales))
            self._update(tile, lambda present: math.prod(factors, start=present))

    def matmul(
        self,
        a: Tile,
        b: Tile,
        *,
        place: Place,
        name: str = "",
        transpose_a: bool = False,
        transpose_b: bool = False,
        hidden: HiddenElements | None = None,
        into: Tile | None = None,
    ) -> Tile:
        """Return a b, or add it to ``into``.

        Parameters
        ----------
        a, b
            The operands, transposed if asked.
        place, name
            Of the result.
        hidden
            The (query, key) elements that ``a`` hides: they contribute nothing even where ``b`` is NaN or Inf.
        into
            The tile to add to. One that was made outside the loop whose iterations are simulated together has the
            products of all of them added, in their order.
        """
        rows, contracted = (a.columns, a.rows) if transpose_a else (a.rows, a.columns)
        columns = b.rows if transpose_b else b.columns
        capacity = (
            a.capacity_columns if transpose_a else a.capacity_rows,
            b.capacity_rows if transpose_b else b.capacity_columns,
        )
        tile = into or self.allocate(name, rows, columns, place=place, capacity=capacity)
        self._operate(
            reads=(a, b) if into is None else (a, b, into),
            writes=(tile,),
            matmul_flops=2 * rows * columns * contracted,
        )
        if self.arithmetic is not None:
            left, right = self._read(a), self._read(b)
            if transpose_a:
                left = left.swapaxes(-1, -2)
                hidden = {position: elements.T for position, elements in (hidden or {}).items()}
            if transpose_b:
                right = right.swapaxes(-1, -2)
            arithmetic, masked = self.arithmetic, hidden or {}
            if into is not None and into.level < self._state.stack_level:
                left, right, masked = _side_by_side(left, right, masked)
            if into is None:
                tile.values = arithmetic.product(left, right, masked)
            else:
                self._update(tile, lambda present: arithmetic.accumulate(present, left, right, masked))
        return tile

    def _set_product(self, tile: Tile, values: Values, into: Tile | None) -> None:
        if into is None:
            tile.values = values
        else:
            self._update(tile, lambda present: add_in_place(present, values))

    def update_row_max(self, row_max: Tile, scores: Tile) -> Tile:
        """Raise the running row maximum to the scores' and return exp(old − new), the correction factor."""
        correction = self._row_vector("correction", row_max)
        self._operate(
            reads=(row_max, scores),
            writes=(row_max,),
            vector_flops=scores.rows * (scores.columns + 1),
            exponentials=scores.rows,
        )
        if self.arithmetic is not None:
            old = self._read(row_max)
            new = self.arithmetic.row_maximum(old, self._read(scores))
            correction.values = self.arithmetic.correction(old, new)
            self._update(row_max, lambda _: new)
        return correction

    def exponential(self, scores: Tile, row_max: Tile) -> None:
        """Replace the scores by exp(scores − row_max)."""
        self._operate(
            reads=(scores, row_max),
            writes=(scores,),
            vector_flops=scores.rows * scores.columns,
            exponentials=scores.rows * scores.columns,
        )
        if self.arithmetic is not None:
            arithmetic, values = self.arithmetic, self._read(row_max)
            self._update(scores, lambda present: arithmetic.exponential(present, values))

    def probabilities(self, scores: Tile, log_sum_exp: Tile) -> None:
        """Replace the scores by exp(scores − log_sum_exp), their softmax."""
        self._operate(
            reads=(scores, log_sum_exp),
            writes=(scores,),
            vector_flops=scores.rows * scores.columns,
            exponentials=scores.rows * scores.columns,
        )
        if self.arithmetic is not None:
            arithmetic, values = self.arithmetic, self._read(log_sum_exp)
            self._update(scores, lambda present: arithmetic.probabilities(present, values))

    def update_row_sum(self, row_sum: Tile, values: Tile, *, correction: Tile | None = None) -> None:
        """Add the sum of each row, after multiplying the running sum by the correction, if any."""
        self._operate(
            reads=(row_sum, values),
            writes=(row_sum,),
            vector_flops=values.rows * (values.columns + (0 if correction is None else 1)),
        )
        if self.arithmetic is not None:
            arithmetic, added = self.arithmetic, self._read(values)
            factor = None if correction is None else self._read(correction)
            self._update(row_sum, lambda old: arithmetic.updated_row_sum(old, factor, added))

    def rescale(self, tile: Tile, correction: Tile) -> None:
        """Multiply each row by its factor."""
        self._operate(reads=(tile, correction), writes=(tile,), vector_flops=tile.rows * tile.columns)
        if self.arithmetic is not None:
            arithmetic, factor = self.arithmetic, self._read(correction)
            self._update(tile, lambda present: arithmetic.rescale(present, factor))

    def normalise(self, tile: Tile, row_sum: Tile) -> None:
        """Divide each row by its sum; rows that saw no score become 0."""
        self._operate(reads=(tile, row_sum), writes=(tile,), vector_flops=tile.rows * tile.columns)
        if self.arithmetic is not None:
            arithmetic, sums = self.arithmetic, self._read(row_sum)
            self._update(tile, lambda present: arithmetic.normalised(present, sums))

    def scale(self, tile: Tile, factor: Tile | float) -> None:
        """Multiply a tile by a number, or by a factor held on chip."""
        reads = (tile, factor) if isinstance(factor, Tile) else (tile,)
        self._operate(reads=reads, writes=(tile,), vector_flops=tile.rows * tile.columns)
        if self.arithmetic is not None:
            number = self._read(factor) if isinstance(factor, Tile) else self.arithmetic.dtype.type(factor)
            self._update(tile, lambda present: present * number)

    def tally(self, counters: Tile, indices: Tile) -> None:
        """Add 1 to the counter that each index names, which the program's own values follow from."""
        self._operate(reads=(counters, indices), writes=(counters,), vector_flops=indices.rows * indices.columns)

    def keep_best(
        self, best: Tile, blocks: Tile, scores: Tile, columns: Rows, hidden: HiddenElements | None = None
    ) -> None:
        """Take a tile of scores of blocks into the running choice of the best, each compared with all that are kept.

        Parameters
        ----------
        best, blocks
            Scores of the blocks chosen so far and their indices, ascending, −1 where there are fewer; one row for each
            query, a column for each choice.
        scores
            Those of further blocks, which come after all that were seen.
        columns
            Which blocks these are.
        hidden
            Which of them a row may not choose.
        """
        self._operate(
            reads=(best, blocks, scores),
            writes=(best, blocks),
            vector_flops=scores.rows * scores.columns * best.columns,
        )
        if self.arithmetic is not None:
            found, chosen, added = self._read(best), self._read(blocks), self._read(scores)
            numbers = np.broadcast_to(np.arange(columns.start, columns.stop, dtype=chosen.dtype), added.shape)
            visible = np.ones(added.shape, dtype=np.bool_)
            for position, elements in (hidden or {}).items():
                visible[:, position] = ~elements
            found, numbers, visible = (
                np.concatenate(pair, axis=-1) for pair in ((found, added), (chosen, numbers), (chosen >= 0, visible))
            )
            kept = top_blocks(found, visible, np.zeros((), dtype=np.bool_), best.columns)
            values = [
                np.where(kept < 0, -1, np.take_along_axis(array, np.maximum(kept, 0), axis=-1)).astype(array.dtype)
                for array in (found, numbers)
            ]
            self._update(best, lambda _: values[0])
            self._update(blocks, lambda _: values[1])

    def log_sum_exp(self, row_max: Tile, row_sum: Tile, *, name: str = "lse") -> Tile:
        """Return the log-sum-exp of each row, −inf where no score was seen."""
        tile = self._row_vector(name, row_max)
        self._operate(reads=(row_max, row_sum), vector_flops=row_max.rows, exponentials=row_max.rows)
        if self.arithmetic is not None:
            tile.values = self.arithmetic.log_sum_exp(self._read(row_max), self._read(row_sum))
        return tile

    def row_dot(self, a: Tile, b: Tile, *, name: str = "delta", into: Tile | None = None) -> Tile:
        """Return the dot product of each pair of rows, or add it to ``into``."""
        tile = into or self._row_vector(name, a)
        self._operate(
            reads=(a, b) if into is None else (a, b, into),
            writes=(tile,),
            vector_flops=2 * a.rows * a.columns,
        )
        if self.arithmetic is not None:
            self._set_product(tile, self.arithmetic.row_dot(self._read(a), self._read(b)), into)
        return tile

    def add_column_sums(self, tile: Tile, values: Tile) -> None:
        """Add the sum of each column to a tile of one row."""
        self._operate(reads=(tile, values), writes=(tile,), vector_flops=values.rows * values.columns)
        if self.arithmetic is not None:
            added = self._read(values).sum(axis=-2, keepdims=True)
            self._update(tile, lambda present: add_in_place(present, added))

    def softmax_gradient(self, probabilities: Tile, dprobabilities: Tile, delta: Tile) -> None:
        """Replace dP by P ∘ (dP − delta), the gradient of the scores."""
        self._operate(
            reads=(probabilities, dprobabilities, delta),
            writes=(dprobabilities,),
            vector_flops=2 * probabilities.rows * probabilities.columns,
        )
        if self.arithmetic is not None:
            arithmetic, p, d = self.arithmetic, self._read(probabilities), self._read(delta)
            self._update(dprobabilities, lambda present: arithmetic.softmax_gradient(p, present, d))

    def stage(self, tile: Tile, name: str, *, dtype: str) -> Tile:
        """Copy a tile to SRAM in a storage format, for the next operation to read it from there."""
        staged = self.allocate(
            name,
            tile.rows,
            tile.columns,
            place="sram",
            capacity=(tile.capacity_rows, tile.capacity_columns),
            item_bytes=STORED_BYTES[dtype],
        )
        self._operate(reads=(tile,), writes=(staged,))
        if self.arithmetic is not None:
            staged.values, staged.borrowed = self._read(tile), True
        return staged

    def transpose_in_place(self, tile: Tile) -> None:
        """Charge the rewriting of an SRAM tile in another layout; its values stay as they are."""
        self._operate(reads=(tile,), writes=(tile,))

    def apply(self, tile: Tile, function: Callable[[Values], Values], *, exponentials: int = 0) -> None:
        """Replace every element by a function of it, which takes so many exponentials."""
        elements = tile.rows * tile.columns
        self._operate(reads=(tile,), writes=(tile,), vector_flops=elements, exponentials=exponentials * elements)
        if self.arithmetic is not None:
            dtype = self.arithmetic.dtype
            self._update(tile, lambda present: function(present).astype(dtype, copy=False))

    def transform(
        self, reads: tuple[Tile, ...], into: Tile, function: Callable[..., Values], *, vector_flops: int
    ) -> Tile:
        """Set a tile to a function of the values of others, which takes so many operations, and return it."""
        self._operate(reads=reads, writes=(into,), vector_flops=vector_flops)
        if self.arithmetic is not None:
            values = function(*map(self._read, reads)).astype(self.arithmetic.dtype, copy=False)
            if into.values is None:
                into.values = values
            else:
                self._update(into, lambda _: values)
        return into

    def multiply(self, tile: Tile, factors: Tile | Callable[[], Values]) -> None:
        """Multiply element by element, by another tile or by numbers that follow from indices and cost no bytes."""
        reads = (tile, factors) if isinstance(factors, Tile) else (tile,)
        self._operate(reads=reads, writes=(tile,), vector_flops=tile.rows * tile.columns)
        if self.arithmetic is not None:
            values = self._read(factors) if isinstance(factors, Tile) else factors().astype(self.arithmetic.dtype)
            self._update(tile, lambda present: present * values)

    def of_query_heads(self, numbers: Values) -> Values:
        """Return one number of each query head as a tile's values of the present heads are laid out."""
        streams = np.arange(*self._state.streams) % self.problem.kv_heads
        grouped: Values = numbers.reshape(self.problem.kv_heads, self.problem.group_size)[streams]
        return grouped[:, None, :, None, None]

    def add(self, tile: Tile, other: Tile) -> None:
        """Add another tile of the same shape, or of one row or one column for all."""
        self._operate(reads=(tile, other), writes=(tile,), vector_flops=tile.rows * tile.columns)
        if self.arithmetic is not None:
            values = self._read(other)
            self._update(tile, lambda present: present + values)


def _tiles_of(rows: Rows | Windows | None) -> Rows | None:
    return rows.of if isinstance(rows, Windows) else rows


def _selection(blocks: npt.NDArray[np.intp], count: int) -> slice | npt.NDArray[np.intp] | None:
    """Return None for all blocks, a slice for consecutive ones, else their indices."""
    first, last = int(blocks[0]), int(blocks[-1])
    if last - first + 1 != len(blocks):
        return blocks
    return None if len(blocks) == count else slice(first, last + 1)


def _tile_sizes(lengths: npt.NDArray[np.int64], tile: int) -> list[tuple[int, int]]:
    """Return the sizes of the tiles of axes of these lengths, and how often each occurs."""
    sizes, times = np.unique(lengths % tile, return_counts=True)
    found = dict(zip(sizes.tolist(), times.tolist(), strict=True)) | {0: 0}
    found[tile] = int((lengths // tile).sum())
    return [(size, count) for size, count in found.items() if count]


def _parts(rows: RowsT, width: int) -> Iterator[RowsT]:
    """Split tiles of one stream into stacks of a bounded size."""
    most = max(1, STACKED_ELEMENTS // (rows.tile * width))
    for first in range(rows.first, rows.first + rows.count, most):
        yield replace(rows, first=first, count=min(most, rows.first + rows.count - first))


def _slices(parts: list[Values], axis: int) -> list[Values]:
    """Cut arrays into slices of length 1 along an axis, ascending."""
    return [piece for part in parts for piece in np.split(part, part.shape[axis], axis=axis)]


def _rows_of_tiles(length: int, tile: int, tiles: npt.NDArray[np.intp]) -> Rows:
    """Return some tiles of an axis, ascending and of equal size."""
    first, count = int(tiles[0]), len(tiles)
    if tiles[-1] - first + 1 == count:
        return Rows(length, tile, first, count)
    return GatheredRows(length, tile, first, count, tiles)


def _side_by_side(left: Values, right: Values, hidden: HiddenElements) -> tuple[Values, Values, HiddenElements]:
    """Return factors whose product is the sum of a stack's products: the contracted axes one after another."""
    stack = max(left.shape[1], right.shape[1])
    left, right = (np.broadcast_to(array, (len(array), stack, *array.shape[2:])) for array in (left, right))
    streams, _, group, rows, contracted = left.shape
    whole = np.zeros((rows, stack, contracted), dtype=np.bool_)
    for position, elements in hidden.items():
        whole[:, position] = elements
    return (
        left.transpose(0, 2, 3, 1, 4).reshape(streams, 1, group, rows, stack * contracted),
        right.swapaxes(1, 2).reshape(len(right), 1, right.shape[2], stack * contracted, right.shape[-1]),
        {0: whole.reshape(rows, -1)} if hidden else {},
    )
