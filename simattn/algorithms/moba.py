"""Mixture of Block Attention (MoBA; Moonshot AI 2025, arXiv 2502.13189): a query attends to the blocks it scores best.

A query scores a block of keys by its product with their mean, in float32, unscaled, for each query head by itself. It
attends to its own block, causally, and to the best of the blocks before, top_k of them with its own, under one softmax.
The choice is a hard one, so no gradient goes through it.

The program takes the steps of the published implementation: a choice, an inverted index of it, attention inside the
blocks, attention of the gathered queries of each block to its keys, and a merging of the parts by their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from simattn.algorithms import flash2, forms
from simattn.algorithms.algorithm import Algorithm, declare_output_and_lse
from simattn.algorithms.kernels import (
    ForwardArrays,
    GroupedGradient,
    convert,
    copied_out,
    declare_backward,
    fill,
    row_dots,
)
from simattn.algorithms.steps import (
    SavedStatistics,
    SoftmaxState,
    finish_softmax,
    masked_scores,
    score_gradients,
    take_partial,
    update_softmax,
)
from simattn.definition import Rounding, exact, one_softmax
from simattn.hardware import Hardware
from simattn.machine import Array, Machine, RowLists, Tile
from simattn.masks import Rows, Visibility
from simattn.plan import Plan, Tiles, check_choice, check_flag
from simattn.problem import AttentionProblem, Direction, InputShape, checked_integer
from simattn.selection import BlockSelection, top_blocks
from simattn.sums import ceil_div
from simattn.traffic import ArrayTraffic, Traffic

Values = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]

# Config and validation


@dataclass(frozen=True, eq=False)
class BlockHistogram:
    """How many queries chose each block, besides their own: all that counting needs to know of a choice.

    Attributes
    ----------
    counts
        Integers, shape (batch, query heads, blocks).
    block
        Keys of a block.

    Raises
    ------
    ValueError, TypeError
        If the counts are no such array, or one is negative.
    """

    counts: Counts
    block: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", checked_integer("block", self.block, 1))
        given = np.asarray(self.counts)
        if given.dtype.kind not in "iu" or given.ndim != 3:
            raise TypeError(
                f"counts has shape {given.shape} and dtype {given.dtype}: expected integers of shape (batch, heads, "
                "blocks)"
            )
        if given.min(initial=0) < 0:
            raise ValueError(f"counts has {int(given.min())}: expected integers of at least 0")
        object.__setattr__(self, "counts", given.astype(np.int64, copy=False))

    def __repr__(self) -> str:
        return f"BlockHistogram(counts of shape {self.counts.shape}, block={self.block})"

    @classmethod
    def of(cls, selection: BlockSelection, blocks: int) -> BlockHistogram:
        """Count a selection, of so many blocks."""
        return cls(selection.histograms(blocks), selection.block)

    @classmethod
    def random(cls, *, batch: int = 1, heads: int, q_len: int, block: int, top_k: int, seed: int) -> BlockHistogram:
        """Draw how often blocks are chosen by queries that choose uniformly among those before their own.

        A block's count is that of independent queries, rounded from the normal distribution of its mean and variance;
        the last differences to the number of all choices are spread over the blocks that can take them.

        Parameters
        ----------
        batch, heads, q_len
            The problem's.
        block, top_k
            Keys of a block, and blocks that a query attends to with its own.
        seed
            Of the random numbers.
        """
        block, seed = checked_integer("block", block, 1), checked_integer("seed", seed, 0)
        shape = MobaProblem(batch=batch, heads=heads, q_len=q_len, block_size=block, top_k=top_k)
        sizes, chosen = shape.block_rows, shape.chosen_of_blocks
        before = np.arange(len(sizes))
        share = np.divide(chosen, before, out=np.zeros(len(sizes)), where=before > 0)
        mean, variance = _of_later(sizes * share), _of_later(sizes * share * (1 - share))
        least, most = _of_later(np.where(share == 1, sizes, 0)), _of_later(sizes)
        generator = np.random.default_rng(seed)
        drawn = generator.normal(mean, np.sqrt(variance), (batch, heads, len(sizes)))
        counts = np.clip(np.rint(drawn).astype(np.int64), least, most)
        for row in counts.reshape(batch * heads, len(sizes)):
            _spread(row, int((sizes * chosen).sum() - row.sum()), least, most)
        return cls(counts, block)

    @classmethod
    def even(cls, problem: MobaProblem) -> BlockHistogram:
        """Return that of queries whose choices spread evenly over the blocks before their own, the first ones first."""
        sizes, chosen = problem.block_rows, problem.chosen_of_blocks
        steps = np.zeros(len(sizes) + 1, dtype=np.int64)
        later = np.arange(1, len(sizes))
        each, more = np.divmod((sizes * chosen)[1:], later)
        steps[0] += (each + 1).sum()
        np.subtract.at(steps, more, 1)
        np.subtract.at(steps, later, each)
        counts = np.cumsum(steps[:-1])
        return cls(np.broadcast_to(counts, (problem.batch, problem.heads, len(sizes))).copy(), problem.block_size)


def _of_later(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the sum of the later elements for each element."""
    sums: npt.NDArray[Any] = values[::-1].cumsum()[::-1] - values
    return sums


def _spread(row: Counts, missing: int, least: Counts, most: Counts) -> None:
    """Add up to what is missing to a row, in place, by equal steps that stay between the bounds."""
    sign = 1 if missing > 0 else -1
    room = (most - row) if missing > 0 else (row - least)
    missing = abs(missing)
    while missing:
        open_ = np.flatnonzero(room > 0)
        step = max(1, missing // len(open_))
        taken = np.minimum(room[open_], step)[: missing if step == 1 else None]
        open_ = open_[: len(taken)]
        row[open_] += sign * taken
        room[open_] -= taken
        missing -= int(taken.sum())


@dataclass(frozen=True, kw_only=True)
class MobaProblem(AttentionProblem):
    """A problem of Mixture of Block Attention, which is always causal, so ``causal`` is not looked at.

    Attributes
    ----------
    block_size
        Keys of a block; the default is that of the report's model for a million tokens.
    top_k
        Blocks that a query attends to, its own included; 1 is its own block only.
    full_attention
        Whether this is full causal attention instead, as in some layers and at the end of the training; there is then
        no ``selection``.
    selection
        The blocks before its own that each query chooses, in place of its best, for every query head: a
        :class:`~simattn.selection.BlockSelection` of min(top_k, blocks) − 1 columns, where each query chooses as many
        as it has blocks to choose from. For counting a :class:`~simattn.algorithms.moba.BlockHistogram` suffices, and
        None counts choices that spread evenly. What the choice costs is counted all the same.
    """

    block_size: int = 4096
    top_k: int = 12
    full_attention: bool = False
    selection: Any = None

    is_causal: ClassVar[bool] = True
    own_inputs: ClassVar[tuple[str, ...]] = ("block_means",)

    def __post_init__(self) -> None:
        if not isinstance(self.causal, (bool, np.bool_)):
            raise TypeError(f"causal={self.causal!r}: expected a bool; moba is causal whatever it is")
        object.__setattr__(self, "causal", True)
        super().__post_init__()
        for name in ("block_size", "top_k"):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), 1))
        check_flag("full_attention", self.full_attention)
        if self.window is not None:
            raise ValueError(f"window={self.window!r}: expected None, queries choose blocks")
        if self.block_mask is not None:
            raise ValueError("block_mask is given: expected None, queries choose blocks; give a selection")
        if self.is_float8:
            raise ValueError(f"dtype={self.dtype!r}: expected float32, float16 or bfloat16")
        if self.kv_len < self.q_len:
            raise ValueError(f"kv_len={self.kv_len}: expected at least q_len={self.q_len}")
        if self.selection is not None and self.full_attention:
            raise ValueError(f"selection={self.selection!r} with full_attention=True: expected None")
        if isinstance(self.selection, BlockSelection):
            self._check_selection(self.selection)
        elif isinstance(self.selection, BlockHistogram):
            self._check_histogram(self.selection)
        elif self.selection is not None:
            raise TypeError(
                f"selection is a {type(self.selection).__name__}: expected None, a BlockSelection or a BlockHistogram"
            )

    def _check_block(self, block: int) -> None:
        if block != self.block_size:
            raise ValueError(f"selection has blocks of {block} keys: expected block_size={self.block_size}")

    def _check_selection(self, selection: BlockSelection) -> None:
        self._check_block(selection.block)
        shape = (self.batch, self.heads, self.q_len, self.history)
        if selection.indices.shape != shape:
            raise ValueError(
                f"selection has indices of shape {selection.indices.shape}: expected {shape}, (batch, heads, q_len, "
                "min(top_k, blocks) - 1), the block of the query itself left out"
            )
        own = self.positions // self.block_size
        misfit = selection.first_misfit(np.minimum(self.history, own), own - 1)
        if misfit is not None:
            entry, head, row = misfit
            raise ValueError(
                f"selection chooses {selection.indices[entry, head, row].tolist()} for query {row} of head {head} of "
                f"entry {entry}: expected {min(self.history, int(own[row]))} blocks below its own, {int(own[row])}"
            )

    def _check_histogram(self, histogram: BlockHistogram) -> None:
        self._check_block(histogram.block)
        if self.q_len != self.kv_len:
            raise ValueError(f"selection is a BlockHistogram with kv_len={self.kv_len}: expected q_len={self.q_len}")
        shape = (self.batch, self.heads, self.blocks)
        if histogram.counts.shape != shape:
            raise ValueError(
                f"selection has counts of shape {histogram.counts.shape}: expected {shape}, (batch, heads, blocks)"
            )
        choices = int((self.block_rows * self.chosen_of_blocks).sum())
        if (histogram.counts.sum(axis=-1) != choices).any() or (histogram.counts > _of_later(self.block_rows)).any():
            raise ValueError(
                f"selection counts {histogram.counts.sum(axis=-1).ravel().tolist()[:4]} choices of a head's queries: "
                f"expected {choices}, and of a block at most one of each query in later blocks"
            )

    @property
    def blocks(self) -> int:
        """Blocks of keys, the last one clipped."""
        return ceil_div(self.kv_len, self.block_size)

    @property
    def history(self) -> int:
        """Blocks before its own that a query chooses, if there are as many."""
        return max(0, min(self.top_k, self.blocks) - 1)

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        """Positions of the queries among the keys."""
        return np.arange(self.kv_len - self.q_len, self.kv_len)

    @cached_property
    def block_rows(self) -> Counts:
        """Keys of each block."""
        sizes = np.full(self.blocks, self.block_size, dtype=np.int64)
        if self.blocks:
            sizes[-1] = self.kv_len - (self.blocks - 1) * self.block_size
        return sizes

    @cached_property
    def chosen_of_blocks(self) -> Counts:
        """Blocks that a query of each block chooses."""
        return np.minimum(np.arange(self.blocks), self.history)

    @cached_property
    def choices(self) -> int:
        """Choices of all queries of a head."""
        return int((self.block_rows * self.chosen_of_blocks).sum())

    @cached_property
    def histogram(self) -> BlockHistogram:
        """How many queries chose each block, as far as is known without numbers."""
        if isinstance(self.selection, BlockHistogram):
            return self.selection
        if isinstance(self.selection, BlockSelection):
            return BlockHistogram.of(self.selection, self.blocks)
        return BlockHistogram.even(self)

    def inputs(self, direction: Direction) -> dict[str, InputShape]:
        """Return the arrays that a program is given: in a decoding step with the means of the earlier blocks."""
        arrays = super().inputs(direction)
        if direction == "decode" and not self.full_attention:
            for name in "kv":
                arrays[name] = replace(arrays[name], needed_rows=self._needed_rows)
            if self.history:
                rows = self.blocks - 1
                arrays["block_means"] = InputShape(
                    rows, self.head_dim, "kv", "float32", gradient=False, needed_rows=rows if self.q_len else 0
                )
        return arrays

    @property
    def _needed_rows(self) -> int:
        """Keys from the first query's block on, and the blocks that it chooses: least of all where heads agree."""
        if not self.q_len:
            return 0
        own = (self.kv_len - self.q_len) // self.block_size
        return self.kv_len - (own - min(self.history, own)) * self.block_size

    def check_direction(self, direction: Direction) -> None:
        """Raise a ValueError if a pass over whole sequences has more keys than queries."""
        if direction != "decode" and self.kv_len != self.q_len:
            raise ValueError(f"kv_len={self.kv_len} in a {direction} pass: expected q_len={self.q_len}")

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields without a mask, and with as many keys as queries unless the direction is "decode"."""
        keys = max(given["q_len"], given["kv_len"]) if direction == "decode" else given["q_len"]
        return {**given, "kv_len": keys, "window": None, "block_mask": None, "causal": True}

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return blocks of all sizes, choices that are made and choices that are given, and full attention."""
        examples: list[dict[str, Any]] = [{"full_attention": True}]
        shape: dict[str, Any] = {name: getattr(problem, name) for name in ("batch", "heads", "q_len", "kv_len")}
        for block_size in (1, 4, 7, 16, 64):
            for top_k in (1, 2, 3, 5, 99):
                own: dict[str, Any] = {"block_size": block_size, "top_k": top_k}
                examples.append(own)
                if top_k in (2, 5):
                    drawn = cls(**shape, **own).draw_selection(np.random.default_rng(block_size))
                    examples.append({**own, "selection": drawn})
        return examples

    def settled(self, inputs: Mapping[str, npt.NDArray[Any]]) -> MobaProblem:
        """Return the problem with the blocks that queries choose by these inputs as the given selection."""
        if self.full_attention or self.selection is not None:
            return self
        return replace(self, selection=BlockSelection(choose_blocks(self, inputs), self.block_size))

    def draw_selection(self, generator: np.random.Generator) -> BlockSelection:
        """Draw a selection in which all blocks before a query's own are equally likely."""
        scores = generator.random((self.batch, self.heads, self.q_len, self.blocks))
        visible = np.arange(self.blocks) < (self.positions // self.block_size)[:, None]
        return BlockSelection(top_blocks(scores, visible, np.zeros((), np.bool_), self.history), self.block_size)

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one KV head and as many rows as there are blocks, with the same tiles on chip."""
        rows = 1 if self.full_attention else max(1, self.blocks)
        return super().of_one_row(q_len=min(max(1, self.q_len), rows), kv_len=rows, block_size=1, selection=None, **own)


@dataclass(frozen=True, kw_only=True)
class MobaPlan(flash2.Flash2Plan):
    """Plan of Mixture of Block Attention: FlashAttention-2's, as its kernels run the attention.

    A tile of ``tiles.q`` queries of a block's list meets ``tiles.kv`` keys of the block; in the choice, ``tiles.kv``
    means of blocks. The inverted index is made for ``tiles.q`` queries at a time. A decoding step has a thread block
    for each query, whatever ``tiles.q`` is.
    """

    dq: Literal["reduce"] = "reduce"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dq", self.dq, ("reduce",))


# The parts of the work


@dataclass(frozen=True, kw_only=True)
class GateProblem(AttentionProblem):
    """The scores of earlier blocks, whose means are the keys: a query sees those before its own block.

    Attributes
    ----------
    block_size
        Queries of a block.
    """

    block_size: int = 1

    @cached_property
    def keys_of_queries(self) -> Visibility:
        """Which blocks each query may choose."""
        return Visibility(rows=self.q_len, columns=self.kv_len, shift=-1, before=None, after=0, packed=self.block_size)


@dataclass(frozen=True)
class Part:
    """Blocks of equal length, each a sequence of its own.

    Attributes
    ----------
    first
        First row of the first one.
    count, rows
        How many there are of each sequence, and their rows.
    """

    first: int
    count: int
    rows: int

    def problem(self, problem: AttentionProblem, *, causal: bool = True) -> AttentionProblem:
        """Return attention inside the blocks, the query heads of a KV head of a sequence's block as a sequence."""
        return AttentionProblem(
            batch=problem.batch * problem.kv_heads * self.count,
            heads=problem.group_size,
            kv_heads=1,
            q_len=self.rows,
            head_dim=problem.head_dim,
            value_dim=problem.value_dim,
            dtype=problem.dtype,
            scale=problem.scale,
            causal=causal,
        )

    @property
    def span(self) -> slice:
        """All rows."""
        return slice(self.first, self.first + self.count * self.rows)

    def take(self, array: Array) -> Array:
        """Return the blocks' rows of an array as an array of their own."""
        values = array.values
        if values is not None:
            streams, group, _, columns = values.shape
            split = values[:, :, self.span].reshape(streams, group, self.count, self.rows, columns)
            values = split.swapaxes(1, 2).reshape(streams * self.count, group, self.rows, columns)
        return replace(array, rows=self.rows, values=values)

    def put(self, taken: Array, array: Array, *, added: bool = False) -> None:
        """Write the rows back when simulating, or add them."""
        if array.values is None or taken.values is None:
            return
        streams, group, _, columns = array.values.shape
        split = taken.values.reshape(streams, self.count, group, self.rows, columns).swapaxes(1, 2)
        rows = split.reshape(streams, group, self.count * self.rows, columns)
        if added:
            array.values[:, :, self.span] += rows
        else:
            array.values[:, :, self.span] = rows


def earlier_blocks(problem: MobaProblem) -> Part:
    """Return the blocks that queries of later ones may choose: all but the last."""
    return Part(0, problem.blocks - 1, problem.block_size)


def parts(problem: MobaProblem) -> list[Part]:
    """Return all blocks: those that may be chosen, then the last, which may be shorter."""
    if problem.blocks == 0:
        return []
    start = (problem.blocks - 1) * problem.block_size
    last = Part(start, 1, problem.kv_len - start)
    return [earlier_blocks(problem), last] if problem.blocks > 1 else [last]


@dataclass
class Lists:
    """For every block, the queries that chose it; where each list starts and the last one ends is in ``offsets``."""

    offsets: Array
    rows: RowLists

    @staticmethod
    def declare(machine: Machine, problem: MobaProblem) -> None:
        """Declare the arrays that hold them."""
        machine.array("query_lists", problem.choices, 1, dtype="int32", role="saved")
        machine.array("list_offsets", problem.blocks, 1, dtype="int32", role="saved")

    @classmethod
    def found(cls, machine: Machine, problem: MobaProblem) -> Lists:
        """Return the lists that are in memory, or when counting those of the problem's histogram."""
        lists, offsets = machine.arrays["query_lists"], machine.arrays["list_offsets"]
        starts = None
        if offsets.values is None:
            counts = problem.histogram.counts.reshape(-1, problem.group_size, problem.blocks)[..., :-1]
        else:
            ends = offsets.values[..., 0].astype(np.int64)
            starts, counts = _by_block(ends[..., :-1]), np.diff(ends)
        return cls(offsets, RowLists(lists, _by_block(counts), problem.q_len * problem.history, starts))

    @staticmethod
    def write(machine: Machine, indices: Array) -> None:
        """Fill them from the blocks that the queries chose, by block and then by query, when simulating."""
        lists, offsets = (machine.arrays[name].values for name in ("query_lists", "list_offsets"))
        if indices.values is None or lists is None or offsets is None:
            return
        for stream, head in np.ndindex(indices.values.shape[:2]):
            blocks = indices.values[stream, head].ravel()
            places = np.flatnonzero(blocks >= 0)
            lists[stream, head, :, 0] = places[np.argsort(blocks[places], kind="stable")]
            lengths = np.bincount(blocks[places], minlength=offsets.shape[2] - 1)
            offsets[stream, head, :, 0] = np.concatenate([[0], np.cumsum(lengths)])


def _by_block(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return (streams, group, blocks) as (streams · blocks, group)."""
    return numbers.swapaxes(1, 2).reshape(-1, numbers.shape[1])


# Tiled program: forward


def forward(machine: Machine, problem: MobaProblem, plan: MobaPlan) -> None:
    """Choose, attend inside the blocks and to the chosen ones, and merge."""
    if problem.full_attention:
        flash2.forward(machine, problem, plan)
        return
    k, v = copied_out(machine, plan)
    out = machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="output")
    arrays = ForwardArrays(
        q=machine.arrays["q"], k=k, v=v, out=out, lse=machine.array("lse", problem.q_len, 1, role="saved")
    )
    if problem.history == 0:
        attend_inside(machine, problem, plan, arrays)
        return
    means = average_blocks(machine, problem, plan, k)
    indices = choose(machine, problem, plan, means)
    lists = list_queries(machine, problem, plan, indices)
    inside = replace(
        arrays,
        out=machine.array("local_out", problem.q_len, problem.value_dim),
        lse=machine.array("local_lse", problem.q_len, 1),
    )
    attend_inside(machine, problem, plan, inside)
    chosen = replace(
        arrays,
        out=_partial(machine, problem, "history_out", problem.value_dim),
        lse=_partial(machine, problem, "history_lse", 1),
    )
    attend_chosen(machine, problem, plan, chosen, lists)
    merge(machine, problem, plan, inside, chosen, arrays)


def _partial(machine: Machine, problem: MobaProblem, name: str, columns: int) -> Array:
    """Declare an array of a row for every query and choice; rows of choices that there are not merge into nothing."""
    values, rows = None, problem.q_len * problem.history
    if machine.arithmetic is not None:
        shape = (problem.batch * problem.kv_heads, problem.group_size, rows, columns)
        dtype = np.float32 if machine.arithmetic.rounds_to_storage else machine.arithmetic.dtype
        values = np.full(shape, -math.inf if name == "history_lse" else 0.0, dtype=dtype)
    return machine.array(name, rows, columns, values=values)


def average_blocks(machine: Machine, problem: MobaProblem, plan: MobaPlan, k: Array) -> Array:
    """Write the mean of the keys of every block but the last, for every head that there are keys of."""
    part = earlier_blocks(problem)
    means = machine.array("block_means", part.count, problem.head_dim, heads=k.heads)
    of_blocks = Part(0, part.count, 1)
    keys, made = part.take(k), of_blocks.take(means)
    inner = machine.inside(part.problem(problem), {})
    for _ in inner.thread_blocks(per=k.heads, width=plan.tiles.kv * problem.head_dim):
        mean = inner.full("block_mean", 1, problem.head_dim, 0.0, place=plan.accumulators)
        for rows in inner.tiles(part.rows, plan.tiles.kv):
            # load
            tile = inner.load(keys, rows)
            # compute
            inner.add_column_sums(mean, tile)
        inner.scale(mean, 1 / part.rows)
        # finish
        inner.store(mean, made)
    machine.take_over(inner)
    of_blocks.put(made, means)
    return means


def choose(machine: Machine, problem: MobaProblem, plan: MobaPlan, means: Array) -> Array:
    """Write the blocks of each query's highest scores; a given selection then takes their place."""
    tiles, place, history = plan.tiles, plan.accumulators, problem.history
    indices = machine.array("chosen_blocks", problem.q_len, history, dtype="int32")
    gate = GateProblem(
        batch=problem.batch,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        q_len=problem.q_len,
        kv_len=means.rows,
        head_dim=problem.head_dim,
        dtype=problem.dtype,
        scale=1.0,
        block_size=problem.block_size,
    )
    inner = machine.inside(gate, {})
    for query_rows in inner.thread_blocks(problem.q_len, tiles.q, width=max(tiles.kv, problem.head_dim, history)):
        # load
        q = inner.load(machine.arrays["q"], query_rows)
        best = inner.full("best_scores", query_rows, history, -math.inf, place=place)
        blocks = inner.full("best_blocks", query_rows, history, -1.0, place=place)
        for block_rows in inner.tiles(gate.visible_keys(query_rows), tiles.kv):
            # load
            mean = inner.load(means, block_rows)
            # compute
            scores, hidden = masked_scores(inner, q, mean, query_rows, block_rows, place=place)
            inner.keep_best(best, blocks, scores, block_rows, hidden)
        # finish
        inner.store(blocks, indices, query_rows)
    machine.take_over(inner)
    take_given(indices, problem)
    return indices


def take_given(indices: Array, problem: MobaProblem, rows: slice = slice(None)) -> None:
    """Write the problem's selection in place of what some queries chose, if there is one, when simulating."""
    if indices.values is None or problem.selection is None:
        return
    if isinstance(problem.selection, BlockHistogram):
        raise ValueError("selection is a BlockHistogram, which suffices to count: expected None or a BlockSelection")
    indices.values[...] = problem.selection.indices[:, :, rows].reshape(indices.values.shape)


def list_queries(machine: Machine, problem: MobaProblem, plan: MobaPlan, indices: Array) -> Lists:
    """Sort the choices by block: a thread block for each query head counts them, then puts each in its place."""
    Lists.declare(machine, problem)
    lists, offsets = machine.arrays["query_lists"], machine.arrays["list_offsets"]
    for _ in machine.thread_blocks(width=plan.tiles.q * problem.history):
        counters = machine.full("list_lengths", 1, offsets.rows, 0.0, place="sram")
        for rows in machine.tiles(problem.q_len, plan.tiles.q):
            # load
            blocks = machine.load(indices, rows)
            # compute
            machine.tally(counters, blocks)
        # finish
        machine.move_elements(offsets, "written", offsets.rows)
        for rows in machine.tiles(problem.q_len, plan.tiles.q):
            # load
            blocks = machine.load(indices, rows)
            # compute
            machine.tally(counters, blocks)
        # finish
        machine.move_elements(lists, "written", lists.rows)
    Lists.write(machine, indices)
    return Lists.found(machine, problem)


def attend_inside(machine: Machine, problem: MobaProblem, plan: MobaPlan, arrays: ForwardArrays) -> None:
    """Attend causally inside every block."""
    for part in parts(problem):
        inside = part.problem(problem)
        taken = ForwardArrays(**{name: part.take(array) for name, array in vars(arrays).items()})
        inner = machine.inside(inside, {})
        flash2.attend(inner, inside, plan, taken)
        machine.take_over(inner)
        for name in ("out", "lse"):
            part.put(getattr(taken, name), getattr(arrays, name))


def attend_chosen(machine: Machine, problem: MobaProblem, plan: MobaPlan, arrays: ForwardArrays, lists: Lists) -> None:
    """Attend from the gathered queries of each block's list to all of its keys; results go to each query's choice."""
    part, tiles, place = earlier_blocks(problem), plan.tiles, plan.accumulators
    keys, values = part.take(arrays.k), part.take(arrays.v)
    staged_as = problem.dtype if plan.stage_probabilities else None
    inner = machine.inside(part.problem(problem, causal=False), {})
    width = max(tiles.kv, problem.head_dim, problem.value_dim)
    for rows in inner.list_blocks(lists.rows, tiles.q, width=width):
        # load
        inner.load_indices(lists.offsets, 2)
        inner.load_indices(lists.rows.array, rows)
        q = inner.load(arrays.q, rows)
        state = SoftmaxState.empty(inner, rows, problem.value_dim, place)
        for key_rows in inner.tiles(part.rows, tiles.kv):
            # load
            k = inner.load(keys, key_rows, stages=plan.stages)
            v = inner.load(values, key_rows, stages=plan.stages)
            # compute
            scores = inner.scores(q, k, place=place)
            update_softmax(inner, state, scores, v, {}, staged_as=staged_as)
        # finish
        finish_softmax(inner, state, arrays, rows, staged=plan.stage_results)
    machine.take_over(inner)


def merge(
    machine: Machine,
    problem: MobaProblem,
    plan: MobaPlan,
    inside: ForwardArrays,
    chosen: ForwardArrays,
    arrays: ForwardArrays,
) -> None:
    """Merge what each query found in its own block and in its choices, in this order."""
    history, columns = problem.history, problem.value_dim
    wide = [_by_query(problem, array) for array in (chosen.out, chosen.lse)]
    for part in parts(problem):
        rows_inside = part.problem(problem)
        inner = machine.inside(rows_inside, {})
        local = [part.take(array) for array in (inside.out, inside.lse)]
        others = [part.take(array) for array in wide]
        merged = replace(arrays, out=part.take(arrays.out), lse=part.take(arrays.lse))
        first = part.first // problem.block_size
        turns = np.tile(problem.chosen_of_blocks[first : first + part.count], problem.batch * problem.kv_heads)
        for rows in inner.thread_blocks(part.rows, plan.tiles.q, width=columns):
            state = SoftmaxState.empty(inner, rows, columns, plan.accumulators)
            # load
            out, lse = (inner.load(array, rows) for array in local)
            # compute
            take_partial(inner, state, out, lse)
            for turn in inner.repeats(turns):
                # load
                out = inner.load(others[0], rows, Rows(history * columns, columns, turn, 1))
                lse = inner.load(others[1], rows, Rows(history, 1, turn, 1))
                # compute
                take_partial(inner, state, out, lse)
            # finish
            finish_softmax(inner, state, merged, rows, staged=plan.stage_results)
        machine.take_over(inner)
        part.put(merged.out, arrays.out)
        part.put(merged.lse, arrays.lse)


def _by_query(problem: MobaProblem, array: Array) -> Array:
    """Return an array of a row for every query and choice as one of the choices of a query beside each other."""
    columns = problem.history * array.columns
    values = array.values
    if values is not None:
        values = values.reshape(*values.shape[:2], problem.q_len, columns)
    return replace(array, rows=problem.q_len, columns=columns, values=values)


# Tiled program: backward


@dataclass
class QueryArrays:
    """What a backward pass takes of its queries, and where it adds their gradients."""

    q: Array
    dout: Array
    lse: Array
    delta: Array
    dq: Array


def backward(machine: Machine, problem: MobaProblem, plan: MobaPlan) -> None:
    """Each thread block keeps a key tile and its gradients; its block's queries pass, then those that chose it.

    Both streams take the merged output and log-sum-exp of the queries, so that their softmax is the one over all.
    """
    if problem.full_attention:
        flash2.backward(machine, problem, plan)
        return
    arrays = declare_backward(machine, problem, plan)
    delta = machine.array("delta", problem.q_len, 1)
    row_dots(machine, machine.arrays["out"], arrays.dout, delta, plan)
    dq_sums = machine.array("dq_accumulator", problem.q_len, problem.head_dim)
    fill(machine, dq_sums, 0.0, plan)
    queries = QueryArrays(q=arrays.q, dout=arrays.dout, lse=machine.arrays["lse"], delta=delta, dq=dq_sums)
    totals = [GroupedGradient.declare(machine, array, plan) for array in (arrays.dk, arrays.dv)]
    for part in parts(problem):
        lists = Lists.found(machine, problem) if problem.history and part == earlier_blocks(problem) else None
        key_gradients(machine, problem, plan, part, queries, [arrays.k, arrays.v], totals, lists)
    for total in totals:
        total.finish(machine, plan)
    convert(machine, dq_sums, arrays.dq, plan)


def key_gradients(
    machine: Machine,
    problem: MobaProblem,
    plan: MobaPlan,
    part: Part,
    queries: QueryArrays,
    keys_and_values: list[Array],
    totals: list[GroupedGradient],
    lists: Lists | None,
) -> None:
    """Compute dK and dV of a part's blocks and add up dQ, of queries inside the blocks and of listed ones."""
    tiles, place, inside = plan.tiles, plan.accumulators, part.problem(problem)
    inner = machine.inside(inside, {})
    keys, values = (part.take(array) for array in keys_and_values)
    own = QueryArrays(**{name: part.take(array) for name, array in vars(queries).items()})
    if own.dq.values is not None:
        own.dq.values = np.zeros_like(own.dq.values)
    dk_total, dv_total = (
        replace(total, target=part.take(total.target), partial=part.take(total.partial)) for total in totals
    )
    width = max(tiles.q, problem.head_dim, problem.value_dim)
    for key_rows in inner.single_blocks(part.rows, tiles.kv, per=dk_total.per, width=width):
        # load
        k = inner.load(keys, key_rows)
        v = inner.load(values, key_rows)
        gradients = KeyGradients(
            dk=inner.full("dk", key_rows, problem.head_dim, 0.0, place=place),
            dv=inner.full("dv", key_rows, problem.value_dim, 0.0, place=place),
        )
        for _ in inner.group_heads():
            for query_rows in inner.tiles(inside.visible_queries(key_rows), tiles.q):
                gradients.take_queries(inner, plan, k, v, own, query_rows, key_rows)
            if lists is not None:
                inner.load_indices(lists.offsets, 2)
                for listed_rows in inner.list_tiles(lists.rows, tiles.q):
                    inner.load_indices(lists.rows.array, listed_rows)
                    gradients.take_queries(inner, plan, k, v, queries, listed_rows, key_rows)
        # finish
        inner.scale(gradients.dk, problem.scale)
        dk_total.add(inner, gradients.dk, key_rows)
        dv_total.add(inner, gradients.dv, key_rows)
    machine.take_over(inner)
    part.put(own.dq, queries.dq, added=True)
    for total, taken in zip(totals, (dk_total, dv_total), strict=True):
        part.put(taken.partial, total.partial)


@dataclass
class KeyGradients:
    """Gradients of a key tile, that of the keys without the scale."""

    dk: Tile
    dv: Tile

    def take_queries(
        self, machine: Machine, plan: MobaPlan, k: Tile, v: Tile, queries: QueryArrays, rows: Rows, key_rows: Rows
    ) -> None:
        """Take in a tile of queries, and add to their gradients."""
        problem, place = machine.problem, plan.accumulators
        # load
        q = machine.load(queries.q, rows, stages=plan.stages)
        dout = machine.load(queries.dout, rows, stages=plan.stages)
        statistics = SavedStatistics(
            delta=machine.load(queries.delta, rows, place="registers"),
            lse=machine.load(queries.lse, rows, place="registers"),
        )
        # compute
        probabilities, dscores, hidden = score_gradients(
            machine, q, k, v, dout, statistics, rows, key_rows, place=place
        )
        machine.matmul(probabilities, dout, place=place, transpose_a=True, hidden=hidden, into=self.dv)
        machine.free(probabilities)
        machine.matmul(dscores, q, place=place, transpose_a=True, hidden=hidden, into=self.dk)
        if plan.stage_probabilities:
            dscores = machine.stage(dscores, "dscores", dtype=problem.dtype)
        dq = machine.matmul(dscores, k, place=place, name="dq", hidden=hidden)
        machine.scale(dq, problem.scale)
        if plan.stage_results:
            dq = machine.stage(dq, "dq", dtype=queries.dq.dtype)
        # finish
        machine.reduce(dq, queries.dq, rows)


def declare_saved(machine: Machine, problem: MobaProblem, plan: Plan) -> None:
    """Declare what the forward pass leaves: the output, its log-sum-exp, and the lists of queries."""
    declare_output_and_lse(machine, problem, plan)
    if problem.history and not problem.full_attention:
        Lists.declare(machine, problem)


# Tiled program: a decoding step


def decode(machine: Machine, problem: MobaProblem, plan: MobaPlan) -> None:
    """Each new query of each head chooses by the means that are kept, and attends to those blocks and its own.

    The means are those of the complete blocks; that of a block which becomes complete is not made here.
    """
    if problem.full_attention:
        flash2.forward(machine, problem, replace(plan, repeat_kv=False))
        return
    arrays = ForwardArrays(
        q=machine.arrays["q"],
        k=machine.arrays["k"],
        v=machine.arrays["v"],
        out=machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="output"),
        lse=machine.array("lse", problem.q_len, 1, role="saved"),
    )
    indices = machine.array("chosen_blocks", problem.q_len, problem.history, dtype="int32")
    for part in new_queries(machine, problem):
        chooses = problem.history > 0 and problem.positions[part.first] >= problem.block_size
        if chooses:
            choose_one_by_one(machine, problem, plan, indices, part)
        attend_one_by_one(machine, problem, plan, arrays, indices, part, chooses=chooses)


def new_queries(machine: Machine, problem: MobaProblem) -> list[Part]:
    """Return the queries of the first block and the later ones, when simulating one by one."""
    if machine.arithmetic is not None:
        return [Part(row, 1, 1) for row in range(problem.q_len)]
    first = int((problem.positions < problem.block_size).sum())
    return [part for part in (Part(0, first, 1), Part(first, problem.q_len - first, 1)) if part.count]


def choose_one_by_one(machine: Machine, problem: MobaProblem, plan: MobaPlan, indices: Array, part: Part) -> None:
    """Write the blocks that each query of a part chooses of those before its own."""
    tiles, place, history = plan.tiles, plan.accumulators, problem.history
    queries, chosen = part.take(machine.arrays["q"]), part.take(indices)
    earlier = problem.positions[part.span] // problem.block_size
    inner = machine.inside(replace(part.problem(problem, causal=False), scale=1.0), {})
    for rows in inner.thread_blocks(1, 1, width=max(tiles.kv * problem.head_dim, history)):
        # load
        q = inner.load(queries, rows)
        best = inner.full("best_scores", rows, history, -math.inf, place=place)
        blocks = inner.full("best_blocks", rows, history, -1.0, place=place)
        for block_rows in inner.ragged_tiles(earlier, tiles.kv):
            # load
            mean = inner.load(machine.arrays["block_means"], block_rows)
            # compute
            inner.keep_best(best, blocks, inner.scores(q, mean, place=place), block_rows)
        # finish
        inner.store(blocks, chosen, rows)
    machine.take_over(inner)
    take_given(chosen, problem, part.span)
    part.put(chosen, indices)


def attend_one_by_one(
    machine: Machine,
    problem: MobaProblem,
    plan: MobaPlan,
    arrays: ForwardArrays,
    indices: Array,
    part: Part,
    *,
    chooses: bool,
) -> None:
    """Attend from each query of a part to the blocks it chose, one after another, and to its own up to itself."""
    tiles, place, value_dim = plan.tiles, plan.accumulators, problem.value_dim
    own, inside = np.divmod(problem.positions[part.span], problem.block_size)
    lengths = np.minimum(own, problem.history) * problem.block_size + inside + 1
    taken = ForwardArrays(
        q=part.take(arrays.q),
        k=_gathered(problem, arrays.k, indices, part),
        v=_gathered(problem, arrays.v, indices, part),
        out=part.take(arrays.out),
        lse=part.take(arrays.lse),
    )
    staged_as = problem.dtype if plan.stage_probabilities else None
    inner = machine.inside(part.problem(problem, causal=False), {})
    for rows in inner.thread_blocks(1, 1, width=tiles.kv * max(problem.head_dim, value_dim)):
        # load
        if chooses:
            inner.load_indices(indices, problem.history)
        q = inner.load(taken.q, rows)
        state = SoftmaxState.empty(inner, rows, value_dim, place)
        for key_rows in inner.ragged_tiles(lengths, tiles.kv):
            # load
            k = inner.load(taken.k, key_rows, stages=plan.stages)
            v = inner.load(taken.v, key_rows, stages=plan.stages)
            # compute
            scores = inner.scores(q, k, place=place)
            update_softmax(inner, state, scores, v, {}, staged_as=staged_as)
        # finish
        finish_softmax(inner, state, taken, rows, staged=plan.stage_results)
    machine.take_over(inner)
    for name in ("out", "lse"):
        part.put(getattr(taken, name), getattr(arrays, name))


def _gathered(problem: MobaProblem, array: Array, indices: Array, part: Part) -> Array:
    """Return the rows that each query head of a single query reads, when simulating."""
    if array.values is None or indices.values is None:
        return replace(array, heads="query")
    own, inside = divmod(int(problem.positions[part.first]), problem.block_size)
    chosen = indices.values[:, :, part.first, : min(own, problem.history), None].astype(np.int64)
    streams, group = chosen.shape[:2]
    listed = (problem.block_size * chosen + np.arange(problem.block_size)).reshape(
        streams, group, chosen.shape[2] * problem.block_size
    )
    last = own * problem.block_size + np.arange(inside + 1)
    listed = np.concatenate([listed, np.broadcast_to(last, (streams, group, len(last)))], axis=-1)
    values = array.values[np.arange(streams)[:, None, None], 0, listed]
    return replace(array, heads="query", rows=listed.shape[-1], values=values)


# Reference


def choose_blocks(problem: MobaProblem, inputs: Mapping[str, Values]) -> npt.NDArray[np.int32]:
    """Return the blocks before its own that each query chooses: the problem's selection, or the best by these inputs.

    Parameters
    ----------
    problem
        The problem.
    inputs
        ``q`` and ``k``, (batch, length, heads, columns), or ``block_means`` in place of the keys.

    Returns
    -------
    array of int32, shape (batch, query heads, q_len, min(top_k, blocks) − 1)
        Ascending, then −1 where there are fewer blocks before a query's own.
    """
    if isinstance(problem.selection, BlockSelection):
        return problem.selection.indices
    earlier = max(0, problem.blocks - 1)
    if "block_means" in inputs:
        means = np.moveaxis(inputs["block_means"], 2, 1)
    else:
        keys = np.moveaxis(inputs["k"], 2, 1)[:, :, : earlier * problem.block_size]
        means = keys.reshape(*keys.shape[:2], earlier, problem.block_size, problem.head_dim).mean(axis=3)
    means = np.repeat(means, problem.group_size, axis=1)
    visible = np.arange(earlier) < (problem.positions // problem.block_size)[:, None]
    with np.errstate(all="ignore"):  # NaN and Inf rank as the rule says, and are not reported
        scores = np.moveaxis(inputs["q"], 2, 1) @ means.swapaxes(-1, -2)
    return top_blocks(scores, visible, np.zeros((), dtype=np.bool_), problem.history)


def seen_elements(problem: MobaProblem, inputs: Mapping[str, Values]) -> npt.NDArray[np.bool_]:
    """Return which keys each query sees: an array of bool, shape (batch, query heads, q_len, kv_len)."""
    shape = (problem.batch, problem.heads, problem.q_len, problem.kv_len)
    causal = np.broadcast_to(problem.visible_elements(), shape)
    if problem.full_attention:
        return causal
    key_blocks = np.arange(problem.kv_len) // problem.block_size
    seen = np.broadcast_to(key_blocks == (problem.positions // problem.block_size)[:, None], shape)
    indices = choose_blocks(problem, inputs)
    for choice in range(indices.shape[-1]):
        seen = seen | (key_blocks == indices[..., choice, None])
    return seen & causal


def reference(problem: MobaProblem, inputs: Mapping[str, Values], rounded: Rounding = exact) -> dict[str, Values]:
    """Compute one softmax over all keys that a query sees, as the definition has it.

    Arguments are those of every algorithm's reference, in a decoding step ``block_means`` among the inputs.
    """
    return one_softmax(problem, inputs, seen_elements(problem, inputs), rounded)


# Closed form


def closed_form_forward(problem: MobaProblem, plan: MobaPlan) -> Traffic:
    """Every stream by itself: what a block is to its queries, what its list is to it, and the parts once more."""
    if problem.full_attention:
        return flash2.closed_form_forward(problem, plan)
    n, d, value_dim = problem.q_len, problem.head_dim, problem.value_dim
    k, v = forms.key_names(plan)
    visited = keys_inside(problem, plan)
    result = forms.matrix_bytes(problem, n, value_dim)
    pieces: list[Mapping[str, ArrayTraffic]] = [
        {
            "q": forms.read(forms.matrix_bytes(problem, n, d)),
            k: forms.read(forms.matrix_bytes(problem, visited, d)),
            v: forms.read(forms.matrix_bytes(problem, visited, value_dim)),
            "out": forms.written(result),
            "lse": forms.written(forms.statistic_bytes(problem, n)),
        },
        *forms.repeat_traffic(problem, plan),
    ]
    if problem.history:
        choices = problem.batch * problem.heads * problem.choices
        keys = list_tiles(problem, plan) * problem.block_size
        partial = forms.matrix_bytes(problem, n, value_dim, dtype="float32")
        statistic = forms.statistic_bytes(problem, n)
        pieces += [
            *choice_traffic(problem, plan),
            {
                "local_out": forms.written(partial) + forms.read(partial),
                "local_lse": forms.written(statistic) + forms.read(statistic),
                "query_lists": forms.read(4 * choices),
                "list_offsets": forms.read(8 * list_tiles(problem, plan)),
                "q": forms.read(choices * d * problem.item_bytes),
                k: forms.read(keys * d * problem.item_bytes),
                v: forms.read(keys * value_dim * problem.item_bytes),
                "history_out": forms.written(4 * choices * value_dim) + forms.read(4 * choices * value_dim),
                "history_lse": forms.written(4 * choices) + forms.read(4 * choices),
            },
        ]
    return forms.total(pieces)


def keys_inside(problem: MobaProblem, plan: MobaPlan) -> int:
    """Return the key rows that the query tiles of a head's blocks load of their own block."""
    return sum(part.count * forms.tile_visits(part.problem(problem), plan.tiles).keys for part in parts(problem))


def list_tiles(problem: MobaProblem, plan: MobaPlan) -> int:
    """Return the query tiles of all lists, the last of each clipped."""
    return int((-(-problem.histogram.counts // plan.tiles.q)).sum())


def choice_traffic(problem: MobaProblem, plan: MobaPlan) -> list[Mapping[str, ArrayTraffic]]:
    """Return what the means of the blocks, the choice and its inverted index move.

    A tile of means is loaded by all query tiles from the one with the first query after its first block on.
    """
    n, d, earlier = problem.q_len, problem.head_dim, problem.blocks - 1
    heads, (k, _) = problem.heads if plan.repeat_kv else problem.kv_heads, forms.key_names(plan)
    starts = np.arange(0, earlier, plan.tiles.kv, dtype=np.int64)
    seeing = ceil_div(n, plan.tiles.q) - (starts + 1) * problem.block_size // plan.tiles.q
    loaded = int((np.minimum(plan.tiles.kv, earlier - starts) * seeing).sum())
    means = forms.written(forms.matrix_bytes(problem, earlier, d, heads=heads, dtype="float32"))
    indices = forms.statistic_bytes(problem, n * problem.history)
    return [
        {
            k: forms.read(forms.matrix_bytes(problem, earlier * problem.block_size, d, heads=heads)),
            "block_means": means + forms.read(forms.matrix_bytes(problem, loaded, d, dtype="float32")),
            "q": forms.read(forms.matrix_bytes(problem, n, d)),
            "chosen_blocks": forms.written(indices) + forms.read(2 * indices),
            "query_lists": forms.written(forms.statistic_bytes(problem, problem.choices)),
            "list_offsets": forms.written(forms.statistic_bytes(problem, problem.blocks)),
        }
    ]


def closed_form_backward(problem: MobaProblem, plan: MobaPlan) -> Traffic:
    """K, V, dK, dV once; Q, dO and their statistics once for every key tile of their own and of each chosen block."""
    if problem.full_attention:
        return flash2.closed_form_backward(problem, plan)
    n, d, value_dim = problem.q_len, problem.head_dim, problem.value_dim
    heads = forms.key_value_heads(problem, plan)
    k, v = forms.key_names(plan)
    visits = sum(part.count * forms.tile_visits(part.problem(problem), plan.tiles).queries for part in parts(problem))
    pieces: list[Mapping[str, ArrayTraffic]] = []
    if problem.history:
        key_tiles = ceil_div(problem.block_size, plan.tiles.kv)
        visits += problem.choices * key_tiles
        walks = problem.batch * problem.heads * (problem.blocks - 1) * key_tiles
        pieces.append(
            {
                "query_lists": forms.read(forms.statistic_bytes(problem, problem.choices * key_tiles)),
                "list_offsets": forms.read(8 * walks),
            }
        )
    whole = forms.matrix_bytes(problem, n, d, dtype="float32")
    added = forms.matrix_bytes(problem, visits, d, dtype="float32")
    statistics = forms.statistic_bytes(problem, visits)
    pieces += [
        {  # delta = rowsum(dO ∘ O)
            "out": forms.read(forms.matrix_bytes(problem, n, value_dim)),
            "dout": forms.read(forms.matrix_bytes(problem, n, value_dim)),
            "delta": forms.written(forms.statistic_bytes(problem, n)),
        },
        {
            "q": forms.read(forms.matrix_bytes(problem, visits, d)),
            "dout": forms.read(forms.matrix_bytes(problem, visits, value_dim)),
            "lse": forms.read(statistics),
            "delta": forms.read(statistics),
            k: forms.read(forms.matrix_bytes(problem, n, d, heads=heads)),
            v: forms.read(forms.matrix_bytes(problem, n, value_dim, heads=heads)),
            "dq_accumulator": forms.written(whole) + forms.reduced(added) + forms.read(whole),
            "dq": forms.written(forms.matrix_bytes(problem, n, d)),
        },
        *forms.grouped_gradient_traffic(problem, plan),
    ]
    return forms.total(pieces)


def closed_form_decode(problem: MobaProblem, plan: MobaPlan) -> Traffic:
    """Of every new query and head: the means of the earlier blocks, the blocks it chooses, and its own up to itself."""
    if problem.full_attention:
        return flash2.closed_form_forward(problem, replace(plan, repeat_kv=False))
    n, d, value_dim = problem.q_len, problem.head_dim, problem.value_dim
    own, inside = np.divmod(problem.positions, problem.block_size)
    keys = int((np.minimum(own, problem.history) * problem.block_size + inside + 1).sum())
    choosing = int((own > 0).sum()) if problem.history else 0
    choices = forms.statistic_bytes(problem, choosing * problem.history)
    return forms.total(
        [
            {
                "q": forms.read(forms.matrix_bytes(problem, n + choosing, d)),
                "block_means": forms.read(
                    forms.matrix_bytes(problem, int(own.sum()) if choosing else 0, d, dtype="float32")
                ),
                "chosen_blocks": forms.written(choices) + forms.read(choices),
                "k": forms.read(forms.matrix_bytes(problem, keys, d)),
                "v": forms.read(forms.matrix_bytes(problem, keys, value_dim)),
                "out": forms.written(forms.matrix_bytes(problem, n, value_dim)),
                "lse": forms.written(forms.statistic_bytes(problem, n)),
            },
        ]
    )


# Plans


def fit_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """Return FlashAttention-2's family, and in a decoding step, whose queries go one by one, longer key tiles."""
    return Tiles(q=1, kv=size) if direction == "decode" else flash2.fit_tiles(problem, size, direction)


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return the tiles that FlashAttention-2's kernels use, in a decoding step longer ones, then smaller ones."""
    if direction == "decode":
        return [Tiles(q=1, kv=rows) for rows in (256, 128, 64, 32, 16, 8, 4, 2, 1)]
    return flash2.gpu_tiles(problem, hardware, direction)


ALGORITHM = Algorithm(
    name="moba",
    title="Mixture of Block Attention",
    source="Moonshot AI 2025, MoBA technical report, arXiv 2502.13189, Algorithm 1",
    summary="Each query attends to its own block and to the blocks before whose mean keys it scores highest.",
    family="sparse",
    plan_class=MobaPlan,
    problem_class=MobaProblem,
    reference=reference,
    programs={"forward": forward, "backward": backward, "decode": decode},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward, "decode": closed_form_decode},
    paper_tiles=flash2.paper_tiles,
    fit_tiles=fit_tiles,
    gpu_tiles=gpu_tiles,
    plan_defaults=flash2.plan_defaults,
    declare_saved=declare_saved,
)
