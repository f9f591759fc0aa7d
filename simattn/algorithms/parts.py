"""Attention to a cache whose keys are cut into parts: a thread block for each part, and the merging of their results.

A part s has the normalised output O_s of its keys and their log-sum-exp L_s, in fp32. Together they are
O = Σ e^(L_s − L) O_s with L = log Σ e^(L_s). A part without a key that a row sees has O_s = 0 and L_s = −∞.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from simattn.algorithms import forms
from simattn.algorithms.flash3 import packed_rows, unpacked_rows
from simattn.algorithms.kernels import ForwardArrays
from simattn.algorithms.steps import SoftmaxState, finish_softmax, masked_scores, take_partial, update_softmax
from simattn.definition import Rounding, exact, one_softmax
from simattn.hardware import Hardware
from simattn.machine import Array, Machine, Values
from simattn.masks import Rows, Visibility, all_rows
from simattn.plan import Plan, Tiles, candidates, check_choice
from simattn.problem import AttentionProblem, Direction, checked_integer
from simattn.sums import ceil_div
from simattn.traffic import Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class DecodeProblem(AttentionProblem):
    """Attention of a few new rows to a cache, under a causal mask or a window: no block mask, no eight-bit storage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_mask is not None:
            raise ValueError("block_mask is given: expected None, a decoding step has no blocks of queries")
        if self.is_float8:
            raise ValueError(f"dtype={self.dtype!r}: expected float32, float16 or bfloat16")

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields without a block mask."""
        return {**given, "block_mask": None}


@dataclass(frozen=True, kw_only=True)
class DecodePlan(Plan):
    """Plan of a decoding step.

    Attributes
    ----------
    query_heads
        Whether the query heads of a KV head are rows of one thread block, position by position ("packed"), so that it
        reads their keys and values once, or have a thread block each, which reads them again ("one_per_block").
    stages
        Buffers of the tiles of keys and values.
    """

    query_heads: Literal["packed", "one_per_block"] = "packed"
    stages: int = 1
    repeat_kv: Literal[False] = False
    grouped_gradients: Literal["loop"] = "loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("query_heads", self.query_heads, ("packed", "one_per_block"))
        object.__setattr__(self, "stages", checked_integer("stages", self.stages, 1))
        check_choice("repeat_kv", self.repeat_kv, (False,))
        check_choice("grouped_gradients", self.grouped_gradients, ("loop",))

    def packed_heads(self, problem: AttentionProblem) -> int:
        """Return how many query heads share a thread block."""
        return problem.group_size if self.query_heads == "packed" else 1


@dataclass(frozen=True, kw_only=True)
class CacheProblem(AttentionProblem):
    """Some of the keys of a cache, seen by query rows that may be those of several heads, position by position.

    ``heads`` are packed heads, ``q_len`` is their rows, and ``kv_len`` is the number of these keys.

    Attributes
    ----------
    packed_heads
        Query heads in each.
    first_key
        Where these keys start in the cache.
    cache_length
        Keys of the whole cache, whose end the last query position is aligned with.
    """

    packed_heads: int = 1
    first_key: int = 0
    cache_length: int = 0

    @classmethod
    def of(cls, problem: AttentionProblem, plan: DecodePlan, *, batch: int, length: int) -> CacheProblem:
        """Return so many sequences of a problem, all keys of caches of this length."""
        packed = plan.packed_heads(problem)
        given = {item.name: getattr(problem, item.name) for item in fields(AttentionProblem)}
        given |= {"batch": batch, "heads": problem.heads // packed, "q_len": problem.q_len * packed, "kv_len": length}
        return cls(**given, packed_heads=packed, cache_length=length)

    def part(self, cut: Cut, index: int, times: int = 1) -> CacheProblem:
        """Return the problem of one part of the keys, or of so many alike, for each of which there is a head more."""
        start, stop = cut.bounds(index)
        return replace(self, kv_len=stop - start, first_key=start, heads=self.heads * times)

    @cached_property
    def keys_of_queries(self) -> Visibility:
        """Which of these keys each packed row sees."""
        left, right = self.window or (None, None)
        return Visibility(
            rows=self.q_len,
            columns=self.kv_len,
            shift=self.cache_length - self.q_len // self.packed_heads - self.first_key,
            before=left,
            after=0 if self.causal else right,
            packed=self.packed_heads,
        )


@dataclass(frozen=True)
class Cut:
    """A cache cut into parts of equal length, of which the last ones may be shorter or empty.

    Attributes
    ----------
    length
        Keys of the cache.
    rows
        Keys of a part that the end does not clip.
    count
        Parts.
    """

    length: int
    rows: int
    count: int

    @classmethod
    def into(cls, length: int, tile: int, count: int) -> Cut:
        """Return so many parts of whole tiles."""
        return cls(length, tile * max(1, ceil_div(ceil_div(length, tile), count)), count)

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the first key of a part, and one past its last."""
        return min(self.length, index * self.rows), min(self.length, (index + 1) * self.rows)

    def alike(self, problem: CacheProblem) -> Iterator[tuple[int, int]]:
        """Yield runs of parts that cost the same: the first part of each run, and how many it has.

        All rows see the whole of the parts in the middle, and none those beyond what a window or a causal mask shows;
        the parts between are runs of their own. The cost does not depend on how many parts there are.
        """
        seen, rows = problem.keys_of_queries, problem.q_len
        low, high = seen.interval(0, rows)
        (_, first_high), (last_low, _) = seen.interval(0, 1), seen.interval(rows - 1, rows)
        whole = (ceil_div(last_low, self.rows), first_high // self.rows)
        unseen_before, unseen_after = low // self.rows, ceil_div(high, self.rows)
        ends = {0, self.count, *whole, unseen_before, unseen_after}
        ends |= {self.length // self.rows, ceil_div(self.length, self.rows)}  # the clipped part, and the empty ones
        bounds = sorted(end for end in ends if 0 <= end <= self.count)
        for first, stop in itertools.pairwise(bounds):
            if stop <= unseen_before or first >= unseen_after or (whole[0] <= first and stop <= whole[1]):
                yield first, stop - first
            else:
                yield from ((index, 1) for index in range(first, stop))


# Tiled program


@dataclass(frozen=True)
class PageTable:
    """Where the pages of sequences of one length are.

    Attributes
    ----------
    array
        The entries, one row for each page.
    page
        Keys of a page.
    """

    array: Array
    page: int

    def load(self, machine: Machine, problem: CacheProblem, key_rows: Rows) -> None:
        """Load the entries of the pages that a tile of keys lies in."""
        start, tile = problem.first_key + key_rows.start, key_rows.tile
        pages = ceil_div(tile, self.page)
        first = start // tile if pages > 1 else start // self.page
        machine.load(self.array, Rows(self.array.rows, pages, first, 1), place="registers")


def decode_sequences(
    machine: Machine,
    problem: CacheProblem,
    plan: DecodePlan,
    arrays: ForwardArrays,
    cut: Cut,
    *,
    members: Sequence[int] | None = None,
    table: PageTable | None = None,
) -> None:
    """Attend in some sequences of equal length; ``arrays.k`` and ``arrays.v`` are theirs, the others' are all.

    ``members`` are their indices in the batch when simulating, by default all.
    """
    packed, streams = problem.packed_heads, problem.batch * problem.kv_heads
    chosen = slice(None) if members is None else list(members)

    def by_sequence(values: Values) -> Values:
        return values.reshape(machine.problem.batch, problem.kv_heads, *values.shape[1:])

    def rows_of(array: Array) -> Array:
        values = array.values
        if values is not None:
            values = packed_rows(by_sequence(values)[chosen].reshape(streams, *values.shape[1:]), packed)
        return replace(array, rows=problem.q_len, values=values)

    own = {name: rows_of(getattr(arrays, name)) for name in ("q", "out", "lse")}
    inner = machine.inside(problem, {**own, "k": arrays.k, "v": arrays.v})
    attend_in_parts(inner, problem, plan, ForwardArrays(k=arrays.k, v=arrays.v, **own), cut, table)
    machine.take_over(inner)
    for name in ("out", "lse"):
        values, made = getattr(arrays, name).values, own[name].values
        if values is not None and made is not None:
            found = unpacked_rows(made, packed)
            by_sequence(values)[chosen] = found.reshape(problem.batch, problem.kv_heads, *found.shape[1:])


def attend_in_parts(
    machine: Machine,
    problem: CacheProblem,
    plan: DecodePlan,
    arrays: ForwardArrays,
    cut: Cut,
    table: PageTable | None = None,
) -> None:
    """Attend to each part of the keys in thread blocks of its own, and merge their results if there are several."""
    if cut.count == 1:
        attend(machine, problem, plan, arrays, table)
        return
    partials = Partials.declare(machine, problem, cut.count)
    # Query heads of a group would see the keys of several parts, of which there is no view.
    at_once = machine.arithmetic is None or problem.group_size == 1
    for first, times in cut.alike(problem) if at_once else ((index, 1) for index in range(cut.count)):
        part = problem.part(cut, first, times)
        given = partials.of_parts(arrays, cut, first, times)
        inner = machine.inside(part, vars(given))
        attend(inner, part, plan, given, table)
        machine.take_over(inner)
    merge(machine, problem, partials, arrays)


def attend(
    machine: Machine,
    problem: CacheProblem,
    plan: DecodePlan,
    arrays: ForwardArrays,
    table: PageTable | None = None,
) -> None:
    """Each thread block keeps a tile of query rows on chip and streams keys and values past it."""
    tiles, place = plan.tiles, plan.accumulators
    width = max(tiles.kv, problem.head_dim, problem.value_dim)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q, width=width):
        # load
        q = machine.load(arrays.q, query_rows)
        state = SoftmaxState.empty(machine, query_rows, problem.value_dim, place)
        for key_rows in machine.tiles(problem.visible_keys(query_rows), tiles.kv):
            # load
            if table is not None:
                table.load(machine, problem, key_rows)
            k = machine.load(arrays.k, key_rows, stages=plan.stages)
            v = machine.load(arrays.v, key_rows, stages=plan.stages)
            # compute
            scores, hidden = masked_scores(machine, q, k, query_rows, key_rows, place=place)
            update_softmax(machine, state, scores, v, hidden)
        # finish
        finish_softmax(machine, state, arrays, query_rows)


@dataclass(frozen=True)
class Partials:
    """Results of the parts, side by side in the rows that they belong to.

    Attributes
    ----------
    out, lse
        Normalised outputs, value_dim columns for each part, and their log-sum-exps, one.
    count
        Parts.
    """

    out: Array
    lse: Array
    count: int

    @classmethod
    def declare(cls, machine: Machine, problem: AttentionProblem, count: int) -> Partials:
        """Declare them as a workspace."""
        return cls(
            machine.array("partial_out", problem.q_len, count * problem.value_dim),
            machine.array("partial_lse", problem.q_len, count),
            count,
        )

    def of_parts(self, arrays: ForwardArrays, cut: Cut, first: int, times: int) -> ForwardArrays:
        """Return the arrays of parts that follow one another, as heads of a group: views of their keys and results."""
        (start, stop), (_, end) = cut.bounds(first), cut.bounds(first + times - 1)

        def queries(array: Array) -> Array:
            return replace(array, values=None if array.values is None else np.repeat(array.values, times, axis=1))

        def keys(array: Array) -> Array:
            values, rows = array.values, stop - start
            if values is not None:
                streams, group, _, columns = values.shape
                values = values[:, :, start:end].reshape(streams, group * times, rows, columns)
            return replace(array, heads="query" if times > 1 else array.heads, rows=rows, values=values)

        def results(array: Array) -> Array:
            values, width = array.values, array.columns // self.count
            if values is not None:
                streams, group, rows, _ = values.shape
                values = values[..., first * width : (first + times) * width]
                split = values.reshape(streams, group, rows, times, width)
                values = split.swapaxes(2, 3).reshape(streams, group * times, rows, width)
            return replace(array, columns=width, values=values)

        return ForwardArrays(queries(arrays.q), keys(arrays.k), keys(arrays.v), results(self.out), results(self.lse))


def declare(machine: Machine, problem: AttentionProblem, k: Array, v: Array, count: int) -> ForwardArrays:
    """Declare the results of a decoding step and, for several parts, the workspace of theirs.

    The machines of the single parts have the workspace's values.
    """
    shape = (problem.batch * problem.kv_heads, problem.group_size, problem.q_len)
    for name, columns in (("partial_out", count * problem.value_dim), ("partial_lse", count)):
        if count > 1:
            elsewhere = None if machine.arithmetic is None else np.broadcast_to(np.float32(np.nan), (*shape, columns))
            machine.array(name, problem.q_len, columns, values=elsewhere)
    return ForwardArrays(
        q=machine.arrays["q"],
        k=k,
        v=v,
        out=machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="output"),
        lse=machine.array("lse", problem.q_len, 1, role="output"),
    )


def merge(machine: Machine, problem: AttentionProblem, partials: Partials, arrays: ForwardArrays) -> None:
    """Add up the parts of each row, in ascending order: O = Σ e^(L_s − L) O_s."""
    columns, count = problem.value_dim, partials.count
    for query_rows in machine.thread_blocks(problem.q_len, 1, width=columns):
        state = SoftmaxState.empty(machine, query_rows, columns, "registers")
        for part in machine.tiles(count, 1):
            # load
            own = Rows(count * columns, columns, part.first, 1)
            lse = machine.load(partials.lse, query_rows, part, place="registers")
            out = machine.load(partials.out, query_rows, own, place="registers")
            # compute
            take_partial(machine, state, out, lse)
        # finish
        finish_softmax(machine, state, arrays, query_rows)


# Reference


def reference(problem: AttentionProblem, inputs: Mapping[str, Values], rounded: Rounding = exact) -> dict[str, Values]:
    """Compute attention of whole matrices, whatever the parts; arguments as for every algorithm's reference."""
    return one_softmax(problem, inputs, problem.visible_elements(), rounded)


# Closed form


def closed_form(problem: CacheProblem, plan: DecodePlan, parts: int, page: int | None = None) -> Traffic:
    """Q once for every part, K and V once for every query tile that sees them, and each part's results there and back.

    With ``page`` keys of a page, the entries of the block table once for every tile of keys that is loaded.
    """
    visits = forms.tile_visits(problem, plan.tiles)
    out, lse = (
        forms.matrix_bytes(problem, problem.q_len, problem.value_dim),
        forms.statistic_bytes(problem, problem.q_len),
    )
    main = {
        "q": forms.read(parts * forms.matrix_bytes(problem, problem.q_len, problem.head_dim)),
        "k": forms.read(forms.matrix_bytes(problem, visits.keys, problem.head_dim, heads=problem.heads)),
        "v": forms.read(forms.matrix_bytes(problem, visits.keys, problem.value_dim, heads=problem.heads)),
        "out": forms.written(out),
        "lse": forms.written(lse),
    }
    if parts > 1:
        partial = parts * forms.matrix_bytes(problem, problem.q_len, problem.value_dim, dtype="float32")
        main["partial_out"] = forms.written(partial) + forms.read(partial)
        main["partial_lse"] = forms.written(parts * lse) + forms.read(parts * lse)
    if page is not None:
        entries = sum(
            ceil_div(rows.size, page) * sum(problem.queries_of_keys.tile_visits(rows, plan.tiles.q))
            for rows in all_rows(problem.kv_len, plan.tiles.kv)
        )
        main["block_table"] = forms.read(forms.matrix_bytes(problem, entries, 1, dtype="int32"))
    return forms.total([main])


# Plans


def query_rows(problem: AttentionProblem) -> int:
    """Return the rows of the query heads of a KV head."""
    return problem.q_len * problem.group_size


def paper_tiles(problem: AttentionProblem, sram_elements: int, direction: Direction) -> Tiles:
    """Return FlashAttention's tiles of keys, B_c = ⌈M/4d⌉, for all query rows up to as many."""
    columns = ceil_div(sram_elements, 4 * problem.head_dim)
    return Tiles(q=max(1, min(columns, query_rows(problem))), kv=columns)


def fit_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """Return tiles of keys that grow, for all query rows up to as many."""
    return Tiles(q=max(1, min(size, query_rows(problem))), kv=problem.key_tile(size))


SMALLEST_QUERY_TILE = 16
"""Rows that a tile of tensor cores has at least, some of them unused where there are fewer queries."""


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return tiles for the query rows there are, 16 to 64 of them, and 128 keys, or 64 of more than 128 columns."""
    rows = SMALLEST_QUERY_TILE
    while rows < min(64, query_rows(problem)):
        rows *= 2
    keys = 128 if max(problem.head_dim, problem.value_dim) <= 128 else 64
    return candidates("forward", (rows, keys))
