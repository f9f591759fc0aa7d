"""Problems of Native Sparse Attention, and those of its three branches with a group's query heads as rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from simattn.masks import Rows, Visibility
from simattn.plan import check_choice
from simattn.problem import AttentionProblem, Direction, InputShape, PackedProblem, checked_integer
from simattn.selection import BlockSelection, Indices, top_blocks
from simattn.sums import ceil_div, clamped_floor_sum

Values = npt.NDArray[Any]

BRANCHES = ("compressed", "selected", "window")
"""The branches, in the order of their gates."""

LEARNED = ("positions", "hidden_weights", "output_weights")
"""What a compression of keys or of values learns: the positions in a block and the weights of two layers."""


@dataclass(frozen=True, kw_only=True)
class NsaProblem(AttentionProblem):
    """A problem of Native Sparse Attention, which is always causal: there is no other, so ``causal`` is not looked at.

    ``k`` and ``v`` are those of the compressed branch before their compression.

    Attributes
    ----------
    compression_block, compression_stride
        Keys of a compressed block, the paper's l, and from one block's first key to the next's, d, which divides l.
    selection_block
        Keys of a block that is selected, the paper's l'; a multiple of d, and at least l.
    selected_blocks
        Blocks that a query attends to, the paper's n, or all that begin before it where these are fewer.
    initial_blocks, local_blocks
        How many of them are always the first ones, and always the query's own and those before it.
    window_keys
        Keys that a query sees in the window branch, itself included, the paper's w.
    compression
        "mean" of a block's keys and values, or "mlp": the rows of a block, each with a learned position added, side by
        side, times ``hidden_weights``, the positive part of it times ``output_weights``.
    compression_hidden
        Columns of the hidden layer; default ``head_dim``. Only with "mlp".
    selection
        The selected blocks, if they are known before; heads are KV heads.
    """

    compression_block: int = 32
    compression_stride: int = 16
    selection_block: int = 64
    selected_blocks: int = 16
    initial_blocks: int = 1
    local_blocks: int = 2
    window_keys: int = 512
    compression: Literal["mean", "mlp"] = "mean"
    compression_hidden: int | None = None
    selection: BlockSelection | None = None

    is_causal: ClassVar[bool] = True
    own_inputs: ClassVar[tuple[str, ...]] = (
        *(f"{name}_{branch}" for branch in BRANCHES for name in "kv"),
        "gates",
        *(f"{name}_{learned}" for name in "kv" for learned in LEARNED),
    )

    def __post_init__(self) -> None:
        if not isinstance(self.causal, (bool, np.bool_)):
            raise TypeError(f"causal={self.causal!r}: expected a bool; nsa is causal whatever it is")
        object.__setattr__(self, "causal", True)
        super().__post_init__()
        for name, smallest in (
            ("compression_block", 1),
            ("compression_stride", 1),
            ("selection_block", 1),
            ("selected_blocks", 1),
            ("initial_blocks", 0),
            ("local_blocks", 1),
            ("window_keys", 1),
        ):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), smallest))
        self._check_blocks()
        if self.window is not None:
            raise ValueError(f"window={self.window!r}: expected None; the window branch has window_keys")
        if self.block_mask is not None:
            raise ValueError("block_mask is given: expected None; the blocks are those of the selection")
        if self.is_float8:
            raise ValueError(f"dtype={self.dtype!r}: expected float32, float16 or bfloat16")
        check_choice("compression", self.compression, ("mean", "mlp"))
        if self.compression == "mean" and self.compression_hidden is not None:
            raise ValueError(f"compression_hidden={self.compression_hidden!r} of a mean: expected None")
        if self.compression == "mlp":
            hidden = self.head_dim if self.compression_hidden is None else self.compression_hidden
            object.__setattr__(self, "compression_hidden", checked_integer("compression_hidden", hidden, 1))
        self._check_selection()

    def _check_blocks(self) -> None:
        for name in ("compression_block", "selection_block"):
            if getattr(self, name) % self.compression_stride:
                raise ValueError(
                    f"compression_stride={self.compression_stride} does not divide {name}={getattr(self, name)}"
                )
        if self.selection_block < self.compression_block:
            raise ValueError(
                f"selection_block={self.selection_block}: expected at least compression_block={self.compression_block}"
            )
        forced = self.initial_blocks + self.local_blocks
        if forced > self.selected_blocks:
            raise ValueError(
                f"selected_blocks={self.selected_blocks}: expected at least the {forced} of "
                f"initial_blocks={self.initial_blocks} and local_blocks={self.local_blocks}"
            )

    def _check_selection(self) -> None:
        selection = self.selection
        if selection is None:
            return
        if not isinstance(selection, BlockSelection):
            raise TypeError(f"selection is a {type(selection).__name__}: expected a simattn.selection.BlockSelection")
        if selection.block != self.selection_block:
            raise ValueError(f"selection has blocks of {selection.block} keys: expected {self.selection_block}")
        expected = (self.batch, self.kv_heads, self.q_len, self.selected_blocks)
        if selection.indices.shape != expected:
            raise ValueError(
                f"selection has indices of shape {selection.indices.shape}: expected {expected}, (batch, kv_heads, "
                "q_len, selected_blocks)"
            )
        last = np.maximum(self.positions // self.selection_block, -1)
        row = selection.first_misfit(np.zeros_like(last), last)
        if row is not None:
            raise ValueError(
                f"selection.indices{list(row)} names block {int(selection.indices[row].max())}, which begins after its "
                f"query at position {int(self.positions[row[-1]])}: expected blocks of {self.selection_block} keys "
                "that begin no later"
            )

    # Shapes

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Position of each query among the keys."""
        return np.arange(self.kv_len - self.q_len, self.kv_len, dtype=np.int64)

    @property
    def compressed_len(self) -> int:
        """Compressed blocks, all complete."""
        return self.complete_blocks(self.kv_len)

    def complete_blocks(self, keys: int) -> int:
        """Return how many compressed blocks so many keys complete."""
        return max(0, (keys - self.compression_block) // self.compression_stride + 1)

    @property
    def new_blocks(self) -> int:
        """Compressed blocks that the keys at the queries' positions complete: those that a decoding step makes."""
        return self.compressed_len - self.complete_blocks(max(0, self.kv_len - self.q_len))

    @property
    def stride_ratio(self) -> int:
        """Compressed blocks that begin in a block of the selection."""
        return self.selection_block // self.compression_stride

    @property
    def selection_blocks(self) -> int:
        """Blocks of the selection that the keys take."""
        return ceil_div(self.kv_len, self.selection_block)

    @cached_property
    def overlaps(self) -> dict[int, int]:
        """Strides that a compressed block shares with a block of the selection, by where it begins in strides."""
        stride, block = self.compression_stride, self.compression_block
        return {
            offset: min(offset + block // stride, self.stride_ratio) - max(offset, 0)
            for offset in range(1 - block // stride, self.stride_ratio)
        }

    def inputs(self, direction: Direction) -> dict[str, InputShape]:
        """Return the arrays that a program is given, by name."""
        arrays = super().inputs(direction)
        needed = self._needed_rows(direction)
        for name in "kv":
            whole = arrays[name]
            for branch in ("selected", "window"):
                arrays[f"{name}_{branch}"] = replace(whole, needed_rows=needed[branch])
            if direction == "decode":
                rows = self.compressed_len
                arrays[f"{name}_compressed"] = replace(
                    whole, rows=rows, needed_rows=(rows - self.new_blocks) if self.q_len else 0
                )
            arrays[name] = replace(whole, needed_rows=needed["compressed"])
        arrays["gates"] = InputShape(self.q_len, len(BRANCHES))
        for name, columns in self.compressed_columns.items():
            for learned, shape in self.learned(columns).items():
                is_used = self.batch and self._blocks_made(direction)
                arrays[f"{name}_{learned}"] = shape if is_used else replace(shape, needed_rows=0)
        return arrays

    def _blocks_made(self, direction: Direction) -> int:
        """Return how many compressed blocks a program makes, or takes the gradients of."""
        return self.new_blocks if direction == "decode" else self.compressed_len

    def _needed_rows(self, direction: Direction) -> dict[str, int]:
        """Return how many rows of keys every implementation reads for a branch, whatever blocks are selected."""
        queries, block = min(self.q_len, self.kv_len), self.selection_block
        if self.selection is None:
            own = self.kv_len - (self.kv_len - queries) // block * block if queries else 0
            count = min(self.selected_blocks, self.selection_blocks)
            selected = max(own, count * block - self.selection_blocks * block + self.kv_len) if queries else 0
        else:
            selected = 0
        blocks = self._blocks_made(direction)
        made_of = (blocks - 1) * self.compression_stride + self.compression_block if blocks else 0
        if direction == "backward" and self.compression == "mean":
            made_of = 0  # the compressed rows do instead
        window = min(self.kv_len, queries + self.window_keys - 1) if queries else 0
        return {"compressed": made_of, "selected": selected, "window": window}

    @property
    def compressed_columns(self) -> dict[str, int]:
        """Columns of the arrays that are compressed, by name."""
        return {"k": self.head_dim, "v": self.value_dim}

    def learned(self, columns: int) -> dict[str, InputShape]:
        """Return what the compression of rows of so many columns learns."""
        if self.compression_hidden is None:
            return {}
        return {
            "positions": InputShape(self.compression_block, columns, "one"),
            "hidden_weights": InputShape(self.compression_block * columns, self.compression_hidden, "one"),
            "output_weights": InputShape(self.compression_hidden, columns, "one"),
        }

    # For tests and plans

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields without a mask of their own."""
        return {**given, "window": None, "block_mask": None}

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return small blocks: overlapping and not, of means and of layers, few selected and all."""
        small = {"compression_block": 4, "compression_stride": 2, "selection_block": 4, "window_keys": 5}
        return [
            {**small, "selected_blocks": 3},
            {**small, "selected_blocks": 4, "compression": "mlp", "compression_hidden": 3},
            {**small, "compression_block": 2, "selection_block": 8, "selected_blocks": 2, "local_blocks": 1},
            {**small, "compression_block": 6, "selection_block": 6, "initial_blocks": 0, "compression": "mlp"},
            {"compression_block": 1, "compression_stride": 1, "selection_block": 3, "selected_blocks": 100},
            {},
        ]

    def settled(self, inputs: Mapping[str, Values]) -> NsaProblem:
        """Return the problem with the blocks that these inputs select."""
        from simattn.algorithms.nsa.reference import selected_indices

        return replace(self, selection=BlockSelection(selected_indices(self, inputs), self.selection_block))

    def draw_inputs(self, direction: Direction, generator: np.random.Generator) -> dict[str, Values]:
        """Return random values of the inputs besides q, k, v and dout: gates from 0 to 1, weights that keep sizes."""
        drawn = super().draw_inputs(direction, generator)
        drawn["gates"] = generator.random(drawn["gates"].shape)
        return {
            name: values / np.sqrt(values.shape[0]) if name.endswith("_weights") else values
            for name, values in drawn.items()
        }

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one row, one KV head and one compressed block with the same tiles on chip."""
        return super().of_one_row(kv_len=self.compression_block, selection=None, **own)

    # Branches

    @cached_property
    def packed(self) -> PackedProblem:
        """The dense causal problem whose rows are those of a group's query heads, position by position."""
        given = {item.name: getattr(self, item.name) for item in fields(AttentionProblem)}
        return PackedProblem.of(AttentionProblem(**given), self.group_size)

    @cached_property
    def window_branch(self) -> PackedProblem:
        """The problem of the window branch."""
        return replace(self.packed, window=(self.window_keys - 1, 0))

    @cached_property
    def compressed_branch(self) -> CompressedProblem:
        """The problem of the compressed branch."""
        given = {item.name: getattr(self.packed, item.name) for item in fields(PackedProblem)}
        return CompressedProblem(
            **{**given, "kv_len": self.compressed_len},
            offset=self.kv_len - self.q_len + 1 - self.compression_block,
            stride=self.compression_stride,
        )

    def selected_branch(self, indices: Indices | None) -> SelectedProblem:
        """Return the problem of the selected branch, of one stream.

        Parameters
        ----------
        indices
            Blocks that the stream's queries attend to, (q_len, selected_blocks), or None if these are not known.
        """
        given = {item.name: getattr(self.packed, item.name) for item in fields(PackedProblem)}
        chosen = ChosenBlocks(
            rows=self.packed.q_len,
            columns=self.kv_len,
            shift=self.kv_len - self.q_len,
            before=None,
            after=0,
            packed=self.group_size,
            block=self.selection_block,
            count=self.selected_blocks,
            indices=indices,
        )
        return SelectedProblem(**{**given, "batch": 1, "heads": 1, "kv_heads": 1}, chosen=chosen)

    def choose(self, scores: Values) -> Indices:
        """Return the blocks of the highest scores.

        Parameters
        ----------
        scores
            Of every query and block, shape (…, q_len, blocks).
        """
        own = (self.positions // self.selection_block)[:, None]
        blocks = np.arange(scores.shape[-1])
        return top_blocks(scores, blocks <= own, self.is_forced(blocks, own), self.selected_blocks)

    def is_forced(self, blocks: npt.NDArray[Any], own: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Say which blocks are always selected by queries in blocks of their own."""
        return np.asarray((blocks < self.initial_blocks) | (blocks > own - self.local_blocks))


def unknown_blocks(positions: int) -> ValueError:
    """Return the error of a count that depends on how many blocks so many positions of a thread block share."""
    return ValueError(
        f"positions={positions} without a selection: expected positions=1, or the selection whose blocks are to be "
        "counted"
    )


@dataclass(frozen=True, kw_only=True)
class CompressedProblem(PackedProblem):
    """Packed query rows that see compressed blocks as soon as these are complete.

    Attributes
    ----------
    offset
        Keys from the first block's last one to the first query's position, and one.
    stride
        Keys from one block's last one to the next's.
    """

    offset: int
    stride: int

    @cached_property
    def keys_of_queries(self) -> Visibility:
        """Which blocks each packed row sees: up to ⌊(position + 1 − l) / d⌋."""
        return Visibility(
            rows=self.q_len,
            columns=self.kv_len,
            shift=0,
            before=None,
            after=0,
            packed=self.packed_heads * self.stride,
            row_offset=self.packed_heads * self.offset,
        )


@dataclass(frozen=True, kw_only=True)
class SelectedProblem(PackedProblem):
    """Packed query rows of one stream that see the keys of chosen blocks up to their own position."""

    chosen: ChosenBlocks

    @cached_property
    def keys_of_queries(self) -> Visibility:
        """Which keys each packed row sees."""
        return self.chosen


@dataclass(frozen=True, eq=False)
class ChosenBlocks(Visibility):
    """The keys of blocks that each position has chosen, up to the position itself.

    Column tiles are whole blocks. Row tiles are whole positions, and see the blocks of all of them.

    Attributes
    ----------
    block
        Columns of a block.
    count
        Blocks that a position chooses, or all that begin before it where these are fewer.
    indices
        The blocks of each position, (positions, count), ascending, then −1; None if only their number is known.
    """

    block: int = 1
    count: int = 1
    indices: Indices | None = None

    @cached_property
    def transposed(self) -> ChoosingRows:
        """The same relation, seen from the columns."""
        return ChoosingRows(
            rows=self.columns,
            columns=self.rows,
            shift=-self.shift,
            before=0,
            after=None,
            spread=self.packed,
            chosen=self,
        )

    def lists(self, positions: int) -> Indices:
        """Return the blocks of each tile of so many positions, (tiles, …), ascending, −1 before, between or after."""
        assert self.indices is not None
        if positions == 1:
            return self.indices
        if positions not in self._lists:
            self._lists[positions] = _together(self.indices, positions)
        return self._lists[positions]

    @cached_property
    def _lists(self) -> dict[int, Indices]:
        return {}

    @cached_property
    def _counted(self) -> dict[tuple[int, range, range], int]:
        return {}

    def pairs(self, row_tile: int, rows: range, blocks: range) -> int:
        """Count the pairs of a row tile and a block that one of its positions has chosen.

        Parameters
        ----------
        row_tile
            Rows of a row tile.
        rows, blocks
            The row tiles and blocks to count.

        Raises
        ------
        ValueError
            If the blocks are not known, and so not how many of them the positions of a tile share.
        """
        if not rows or not blocks:
            return 0
        if self.indices is not None:
            key = (row_tile, rows, blocks)
            if key not in self._counted:
                self._counted[key] = self._count(row_tile // self.packed, rows, blocks)
            return self._counted[key]
        if row_tile > self.packed and self.rows > self.packed:
            raise unknown_blocks(row_tile // self.packed)
        first, stop = rows.start + self.shift, rows.stop + self.shift
        limit = self.count * self.block
        every = clamped_floor_sum(first, stop, 1, self.block, 0, limit, self.block)
        last = self.columns // self.block
        clipped = max(0, stop - max(first, last * self.block)) if self.columns % self.block else 0
        return (every - clipped if 0 in blocks else 0) + (clipped if last in blocks else 0)

    def _count(self, positions: int, rows: range, blocks: range) -> int:
        """Count known pairs in lists of as many tiles at a time as a core's cache holds."""
        assert self.indices is not None
        pairs, at_once = 0, max(1, CACHED_ELEMENTS // (positions * self.indices.shape[1]))
        for first in range(rows.start, rows.stop, at_once):
            stop = min(first + at_once, rows.stop)
            found = _together(self.indices[first * positions : stop * positions], positions)
            pairs += int(np.count_nonzero((found >= blocks.start) & (found < blocks.stop)))
        return pairs

    @property
    def full_blocks(self) -> range:
        """Blocks of full size."""
        return range(self.columns // self.block)

    @property
    def clipped_blocks(self) -> range:
        """The block that the end of the axis clips, if any."""
        return range(self.columns // self.block, ceil_div(self.columns, self.block))

    def tile_visits(self, rows: Rows, column_tile: int) -> tuple[int, int]:
        """Count the blocks that a run of equal row tiles visits."""
        tiles = range(rows.first, rows.first + rows.count)
        full, clipped = (self.pairs(rows.tile, tiles, blocks) for blocks in (self.full_blocks, self.clipped_blocks))
        return full, clipped

    def visits(self, rows: Rows, column_tile: int) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
        """Walk the blocks that a run of equal row tiles visits, ascending."""
        lists = self.lists(rows.tile // self.packed)[rows.first : rows.first + rows.count]
        members, places = np.nonzero(lists >= 0)
        blocks = lists[members, places]
        order = np.argsort(blocks, kind="stable")
        members, blocks = members[order], blocks[order]
        ends = [*np.flatnonzero(np.diff(blocks, prepend=-1)).tolist(), len(blocks)]
        for start, stop in itertools.pairwise(ends):
            yield int(blocks[start]), members[start:stop]

    def hidden(
        self, rows: Rows, row_tiles: npt.NDArray[np.intp], columns: Rows, column_tiles: npt.NDArray[np.intp]
    ) -> dict[int, npt.NDArray[np.bool_]]:
        """Return, for each of some pairs of row tile and block that is partly hidden, its hidden elements."""
        if rows.tile == self.packed:
            # All rows of one position have chosen the block, so only the keys after it are hidden.
            partly = row_tiles + self.shift < np.minimum((column_tiles + 1) * columns.tile, self.columns) - 1
            places = np.flatnonzero(partly)
            found = super().hidden(rows, row_tiles[places], columns, column_tiles[places])
            return {int(places[place]): elements for place, elements in found.items()}
        return super().hidden(rows, row_tiles, columns, column_tiles)

    def elements(self, rows: Rows, index: int, columns: Rows) -> npt.NDArray[np.bool_] | None:
        """Return which elements of a tile are seen, or None when all are."""
        assert self.indices is not None
        start, stop = index * rows.tile, min((index + 1) * rows.tile, self.rows)
        band = self._band_elements(start, stop, columns)
        positions = self.indices[start // self.packed : ceil_div(stop, self.packed)]
        chosen = (positions == columns.first).any(axis=1)
        if chosen.all():
            return band
        seen = np.repeat(chosen, self.packed)[:, None] & np.ones(columns.size, dtype=np.bool_)
        return seen if band is None else seen & band


CACHED_ELEMENTS = 1 << 17
"""Elements of lists of blocks that are made and counted at a time."""


def _together(indices: Indices, positions: int) -> Indices:
    """Return the blocks of each tile of so many positions, (tiles, …), ascending, −1 in place of repeated ones."""
    if positions == 1:
        return indices
    missing = -len(indices) % positions
    whole = np.pad(indices, ((0, missing), (0, 0)), constant_values=-1) if missing else indices
    together = np.sort(whole.reshape(-1, positions * whole.shape[1]), axis=1)
    together[:, 1:][together[:, 1:] == together[:, :-1]] = -1
    return together


@dataclass(frozen=True, eq=False, kw_only=True)
class ChoosingRows(Visibility):
    """For every block of keys, the rows of the positions that have chosen it."""

    chosen: ChosenBlocks

    def tile_visits(self, rows: Rows, column_tile: int) -> tuple[int, int]:
        """Count the tiles of query rows that a run of equal blocks visits."""
        blocks, full = range(rows.first, rows.first + rows.count), self.columns // column_tile
        whole, clipped = (
            self.chosen.pairs(column_tile, tiles, blocks)
            for tiles in (range(full), range(full, ceil_div(self.columns, column_tile)))
        )
        return whole, clipped

    def tiles_seen(self, rows: Rows, column_tile: int) -> npt.NDArray[np.intp]:
        """Return the tiles of query rows that the first of a run of blocks visits, ascending."""
        lists = self.chosen.lists(column_tile // self.chosen.packed)
        return np.flatnonzero((lists == rows.first).any(axis=1))
