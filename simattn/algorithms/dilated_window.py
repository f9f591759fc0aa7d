"""Dilated sliding windows with global tokens: Longformer (Beltagy et al. 2020, arXiv 2004.05150).

A query sees the keys at distances of whole multiples of a dilation, and the global tokens; a global token sees and is
seen by all. The rows whose positions leave the same rest by the dilation are sliding windows of one another, so they
run as FlashAttention-2 on strided rows, with the global keys in the same softmax.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from simattn.algorithms import flash2, forms, sliding_window
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.kernels import ForwardArrays, KeySource, declare_forward, row_dots
from simattn.algorithms.windows import (
    AddedUpPlan,
    GradientSums,
    Mask,
    Values,
    Where,
    WindowProblem,
    attend_packed,
    checked_sides,
    declare_sums,
    delta_traffic,
    finish_sums,
    handed_in_traffic,
    heads_of,
    part_of,
    put_back,
    put_heads_back,
    sums_traffic,
)
from simattn.definition import Rounding, attended, by_kv_head, by_query_head, exact, one_softmax
from simattn.machine import Array, Machine
from simattn.masks import Rows, Visibility, is_integer
from simattn.plan import check_choice
from simattn.problem import AttentionProblem, Direction, InputShape, Window, checked_integer
from simattn.sums import ceil_div
from simattn.traffic import ArrayTraffic, Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class DilatedWindowProblem(WindowProblem):
    """A problem of dilated sliding-window attention with global tokens.

    ``window`` is required, and counts the keys seen on either side, at distances of whole multiples of the dilation.
    There are no more queries than keys.

    Attributes
    ----------
    dilation
        Distance of neighbouring keys of a window: an integer, or one for each KV head.
    global_tokens
        Positions of the tokens that see and are seen by all, subject to ``causal``: so many first ones, or a tuple of
        ascending positions. A pair that a window holds too counts once.
    global_projections
        Whether the rows of global tokens attend with the same projections as all others ("shared"), or with their own
        ("own", Longformer's): ``q_global``, a row for each global token among the queries, ascending, and ``k_global``
        and ``v_global`` of all keys. Other rows see a global token's key in ``k`` and ``v``.
    """

    dilation: Any = 1
    global_tokens: Any = 0
    global_projections: Literal["shared", "own"] = "shared"

    own_inputs: ClassVar[tuple[str, ...]] = ("q_global", "k_global", "v_global")

    def __post_init__(self) -> None:
        checked_sides(self.window)
        super().__post_init__()
        if self.q_len > self.kv_len:
            raise ValueError(f"q_len={self.q_len}: expected at most kv_len={self.kv_len}, every query is at some key")
        object.__setattr__(self, "dilation", self._checked_dilation())
        object.__setattr__(self, "global_tokens", self._checked_global_tokens())
        check_choice("global_projections", self.global_projections, ("shared", "own"))

    def _checked_dilation(self) -> int | tuple[int, ...]:
        given = self.dilation
        if not isinstance(given, (tuple, list, np.ndarray)):
            return checked_integer("dilation", given, 1)
        if len(given) != self.kv_heads:
            raise ValueError(f"dilation has {len(given)} numbers: expected one for each of kv_heads={self.kv_heads}")
        return tuple(checked_integer(f"dilation[{head}]", number, 1) for head, number in enumerate(given))

    def _checked_global_tokens(self) -> int | tuple[int, ...]:
        given = self.global_tokens
        if not isinstance(given, (tuple, list, np.ndarray)):
            if not is_integer(given):
                raise TypeError(f"global_tokens={given!r}: expected a number of first tokens, or ascending positions")
            if not 0 <= given <= self.kv_len:
                raise ValueError(f"global_tokens={given}: expected at least 0 and at most kv_len={self.kv_len}")
            return int(given)
        try:
            positions = np.asarray(given)
        except ValueError:  # rows of different lengths
            raise TypeError(f"global_tokens={given!r}: expected a row of integers") from None
        if positions.ndim != 1 or (len(positions) and positions.dtype.kind not in "iu"):
            raise TypeError(
                f"global_tokens has shape {positions.shape} and dtype {positions.dtype}: expected a row of integers"
            )
        wrong = np.flatnonzero((positions < 0) | (positions >= self.kv_len))
        if len(wrong):
            raise ValueError(
                f"global_tokens[{wrong[0]}]={positions[wrong[0]]}: expected positions from 0 to below "
                f"kv_len={self.kv_len}"
            )
        wrong = np.flatnonzero(np.diff(positions) <= 0)
        if len(wrong):
            one, two = positions[wrong[0] : wrong[0] + 2]
            raise ValueError(f"global_tokens[{wrong[0] + 1}]={two} after {one}: expected ascending positions")
        return tuple(positions.tolist())

    def check_direction(self, direction: Direction) -> None:
        """Raise a ValueError if there are several queries in a decoding step."""
        if direction == "decode" and self.q_len != 1:
            raise ValueError(f"q_len={self.q_len} with direction='decode': expected 1; run several as a forward pass")

    def inputs(self, direction: Direction) -> dict[str, InputShape]:
        """Return the arrays that a program is given, by name."""
        arrays = super().inputs(direction)
        if self.has_own_projections:
            last = self.later_globals[-1] if len(self.later_global_rows) else self.first_globals - 1
            seen = int(last) + 1 if self.causal else self.kv_len
            arrays |= {
                "q_global": InputShape(self.global_rows, self.head_dim),
                "k_global": InputShape(self.kv_len, self.head_dim, "kv", needed_rows=seen),
                "v_global": InputShape(self.kv_len, self.value_dim, "kv", needed_rows=seen),
            }
            if direction == "backward":
                arrays["dout"] = replace(arrays["dout"], needed_rows=self.q_len)
        return arrays

    def of_equal_lengths(self, direction: Direction) -> Iterator[AttentionProblem]:
        """Yield, for the heads of each dilation, a problem without a mask of the rows of q, k and v that are read."""
        for dilation in self.heads_by_dilation:
            some = self.of_dilation(dilation)
            rows = some.q_len - some.global_rows * some.has_own_projections
            yield AttentionProblem(**some.plain(q_len=rows, kv_len=some.keys_read))

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields with a limited window and no more queries than keys."""
        changed = super().adapted(given, direction)
        q_len = 1 if direction == "decode" else changed["q_len"]
        return {**changed, "q_len": q_len, "kv_len": max(q_len, changed["kv_len"])}

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return dilations with first tokens, scattered ones, all and none that are global."""
        length = problem.kv_len
        scattered = tuple(sorted({0, length // 3, length // 2, length - 1})) if length else ()
        later = tuple(range(length // 2, length, 3))
        by_head = tuple(1 + head % 3 for head in range(problem.kv_heads))
        choices = [
            (1, 0), (3, 0), (2, min(2, length)), (4, scattered), (1, later), (length + 1, min(1, length)),
            (by_head, scattered), (2, length), (by_head, (length + 1) // 2),
        ]  # fmt: skip
        return [
            {"dilation": dilation, "global_tokens": tokens, "global_projections": projections}
            for dilation, tokens in choices
            for projections in ("shared", "own")
        ]

    @classmethod
    def usual_arguments(cls, direction: Direction, length: int, window: Window | None = None) -> dict[str, Any]:
        """Return those of any problem with a window, by default Longformer's: 512 keys beside the own one."""
        return super().usual_arguments(direction, length, window or (256, 256))

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one row and one KV head with the same tiles on chip."""
        return super().of_one_row(window=(0, 0), dilation=1, global_tokens=0, global_projections="shared", **own)

    @property
    def sides(self) -> tuple[int, int]:
        """Keys of a window before and after the query's own, no more than there are."""
        left, right = checked_sides(self.window)
        return min(left, self.kv_len), 0 if self.causal else min(right, self.kv_len)

    @property
    def first_position(self) -> int:
        """Position of the first query among the keys."""
        return self.kv_len - self.q_len

    @cached_property
    def first_globals(self) -> int:
        """How many tokens at the beginning of the keys are all global."""
        if isinstance(self.global_tokens, int):
            return self.global_tokens
        elsewhere = np.flatnonzero(np.array(self.global_tokens) != np.arange(len(self.global_tokens)))
        return int(elsewhere[0]) if len(elsewhere) else len(self.global_tokens)

    @cached_property
    def later_globals(self) -> npt.NDArray[np.int64]:
        """Positions of the global tokens after those."""
        given = () if isinstance(self.global_tokens, int) else self.global_tokens[self.first_globals :]
        return np.array(given, dtype=np.int64)

    @property
    def later_global_rows(self) -> npt.NDArray[np.int64]:
        """Those of them that are among the queries, as row numbers."""
        rows = self.later_globals - self.first_position
        return rows[rows >= 0]

    @property
    def first_global_rows(self) -> int:
        """How many of the first queries are among the global tokens at the beginning."""
        return max(0, self.first_globals - self.first_position)

    @property
    def global_rows(self) -> int:
        """How many queries are global tokens."""
        return self.first_global_rows + len(self.later_global_rows)

    @property
    def local_rows(self) -> int:
        """Queries after the global tokens at the beginning."""
        return self.q_len - self.first_global_rows

    @property
    def has_own_projections(self) -> bool:
        """Whether there are rows with projections of their own."""
        return self.global_projections == "own" and self.global_rows > 0

    @cached_property
    def dilations(self) -> tuple[int, ...]:
        """The dilation of all heads, or one for each KV head; what reaches beyond all keys is cut to their number."""
        given = (self.dilation,) if isinstance(self.dilation, int) else self.dilation
        return tuple(min(number, max(1, self.kv_len)) for number in given)

    @cached_property
    def heads_by_dilation(self) -> dict[int, npt.NDArray[np.int64]]:
        """The KV heads of each dilation."""
        of_heads = np.resize(np.array(self.dilations), self.kv_heads)
        return {number: np.flatnonzero(of_heads == number) for number in sorted(set(self.dilations))}

    @property
    def keys_read(self) -> int:
        """How many rows of k and v any query reads, all heads having the same dilation.

        These are the keys of the local queries themselves, the global ones, and before the queries what is in a window:
        of each residue class what the first local query sees.
        """
        assert isinstance(self.dilation, int)
        if self.global_rows and not self.has_own_projections:
            return self.kv_len
        first, dilation, (left, _) = self.first_position, self.dilation, self.sides
        apart, count = self.later_global_rows, self.local_rows - len(self.later_global_rows)
        if not count:
            return 0
        if len(apart):
            local = np.delete(np.arange(self.first_global_rows, self.q_len), apart - self.first_global_rows)
        else:  # the first row of each class, and the last of all
            local = np.append(np.arange(min(dilation, self.q_len)), self.q_len - 1)
        last = first + int(local[-1]) if self.causal else self.kv_len
        count += min(self.first_globals, last + 1) + bisect_right(self.later_globals, last)
        if first <= self.first_globals:
            return count
        residues, indices = np.unique(local % dilation, return_index=True)
        nearest = first + local[indices]
        near = np.minimum(left, (nearest - self.first_globals) // dilation) - (nearest - first) // dilation
        earlier = self.later_globals[self.later_globals < first]
        first_of_class = np.full(dilation, self.kv_len + left * dilation, dtype=np.int64)
        first_of_class[residues] = nearest
        also_global = first_of_class[(earlier - first) % dilation] - earlier <= left * dilation
        return count + int(np.maximum(near, 0).sum()) - int(also_global.sum())

    def of_dilation(self, dilation: int) -> DilatedWindowProblem:
        """Return the problem of the KV heads with a dilation."""
        kv_heads = len(self.heads_by_dilation[dilation])
        return replace(self, dilation=dilation, kv_heads=kv_heads, heads=kv_heads * self.group_size)

    def plain(self, **changed: Any) -> dict[str, Any]:
        """Return the fields of attention with other lengths or another mask."""
        names = ("batch", "heads", "kv_heads", "head_dim", "value_dim", "dtype", "scale")
        return {name: getattr(self, name) for name in names} | changed

    def seen(self) -> Mask:
        """Return the whole masks: bool of shape (1 or query heads, q_len, kv_len), True where a key is seen."""
        keys = np.arange(self.kv_len)[None, :]
        queries = np.arange(self.first_position, self.kv_len)[:, None]
        everywhere = np.isin(keys, self._global_positions()) | np.isin(queries, self._global_positions())
        allowed = keys <= queries if self.causal else np.ones((1, 1), dtype=np.bool_)
        left, right = self.sides
        masks: list[Mask] = []
        for dilation in self.dilations:
            distance = keys - queries
            near = (distance % dilation == 0) & (distance >= -left * dilation) & (distance <= right * dilation)
            masks.append((near | everywhere) & allowed)
        return np.repeat(np.array(masks), 1 if len(masks) == 1 else self.group_size, axis=0)

    def visible_elements(self) -> Mask:
        """Return the mask of all heads together: bool of shape (q_len, kv_len), True where any of them sees the key."""
        return np.asarray(self.seen().any(axis=0))

    def _global_positions(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.arange(self.first_globals), self.later_globals])


@dataclass(frozen=True, kw_only=True)
class DilatedWindowPlan(AddedUpPlan, sliding_window.SlidingWindowPlan):
    """Plan of dilated windows: that of sliding windows, whose gradients are sums in memory that all parts add to."""


# Masks


@dataclass(frozen=True)
class Places:
    """Ascending positions: every ``step``-th one from ``first`` on, or given ones."""

    count: int
    first: int = 0
    step: int = 1
    given: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, given: npt.NDArray[np.int64]) -> Places:
        """Return given positions."""
        return cls(len(given), given=given)

    def at(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the positions of some indices."""
        return self.first + self.step * np.arange(start, stop) if self.given is None else self.given[start:stop]

    def position(self, index: int) -> int:
        """Return the position of an index."""
        return self.first + self.step * index if self.given is None else int(self.given[index])

    def up_to(self, position: int) -> int:
        """Return how many are no later than a position."""
        if self.given is not None:
            return bisect_right(self.given, position)
        return min(self.count, max(0, (position - self.first) // self.step + 1))


@dataclass(frozen=True)
class PlacedVisibility(Visibility):
    """Which keys queries at some positions see, all of them but what is named.

    Attributes
    ----------
    row_places, column_places
        Where the rows and columns stand.
    rows_are_keys
        Whether the rows are keys and the columns queries.
    causal
        Whether later keys are hidden.
    window
        ``(left, right, dilation)`` of a window whose pairs are hidden, as they are counted elsewhere.
    hidden_queries
        Positions of queries that see nothing.
    """

    row_places: Places = Places(0)
    column_places: Places = Places(0)
    rows_are_keys: bool = False
    causal: bool = False
    window: tuple[int, int, int] | None = None
    hidden_queries: npt.NDArray[np.int64] | None = None

    @classmethod
    def between(cls, queries: Places, keys: Places, **hidden: Any) -> PlacedVisibility:
        """Return which keys the queries see."""
        return cls(queries.count, keys.count, 0, None, None, row_places=queries, column_places=keys, **hidden)

    @cached_property
    def transposed(self) -> Visibility:
        """The same relation, seen from the columns."""
        return replace(
            self,
            rows=self.columns,
            columns=self.rows,
            row_places=self.column_places,
            column_places=self.row_places,
            rows_are_keys=not self.rows_are_keys,
        )

    def column_tiles(self, rows: Rows, index: int, column_tile: int) -> tuple[int, int]:
        """Return the half-open range of column tiles with any that is not later than a query."""
        first, last = index * rows.tile, min((index + 1) * rows.tile, self.rows) - 1
        low, high = 0, self.columns
        if self.causal and self.rows_are_keys:
            low = self.column_places.up_to(self.row_places.position(first) - 1)
        elif self.causal:
            high = self.column_places.up_to(self.row_places.position(last))
        return (low // column_tile, ceil_div(high, column_tile)) if low < high else (0, 0)

    def tile_visits(self, rows: Rows, column_tile: int) -> tuple[int, int]:
        """Count the column tiles that a run of equal row tiles visits: full ones, and the clipped one."""
        full_tiles, tiles = self.columns // column_tile, ceil_div(self.columns, column_tile)
        if not self.causal:
            return rows.count * full_tiles, rows.count * (tiles - full_tiles)
        full = clipped = 0
        if self.row_places.given is not None:
            for index in range(rows.first, rows.first + rows.count):
                low, high = self.column_tiles(rows, index, column_tile)
                full += min(high, full_tiles) - min(low, full_tiles)
                clipped += max(high, full_tiles) - max(low, full_tiles)
            return full, clipped
        for tile in range(tiles):
            visits = self._visits_of_column_tile(rows, tile, column_tile)
            full += visits if tile < full_tiles else 0
            clipped += visits if tile >= full_tiles else 0
        return full, clipped

    def _visits_of_column_tile(self, rows: Rows, tile: int, column_tile: int) -> int:
        low, high = 0, self.rows
        if self.rows_are_keys:
            last = min((tile + 1) * column_tile, self.columns) - 1
            high = self.row_places.up_to(self.column_places.position(last))
        else:
            low = self.row_places.up_to(self.column_places.position(tile * column_tile) - 1)
        if low >= high:
            return 0
        first, stop = low // rows.tile, ceil_div(high, rows.tile)
        return max(0, min(stop, rows.first + rows.count) - max(first, rows.first))

    def elements(self, rows: Rows, index: int, columns: Rows) -> Mask | None:
        """Return which elements of a tile are seen, or None when all are."""
        start = index * rows.tile
        of_rows = self.row_places.at(start, min(start + rows.tile, self.rows))[:, None]
        of_columns = self.column_places.at(columns.start, columns.stop)[None, :]
        queries, keys = (of_columns, of_rows) if self.rows_are_keys else (of_rows, of_columns)
        distance = keys - queries
        seen = np.ones(distance.shape, dtype=np.bool_)
        if self.causal:
            seen &= distance <= 0
        if self.window is not None:
            left, right, dilation = self.window
            seen &= (distance % dilation != 0) | (distance < -left * dilation) | (distance > right * dilation)
        if self.hidden_queries is not None:
            seen &= ~np.isin(queries, self.hidden_queries)
        return None if seen.all() else seen


@dataclass(frozen=True)
class StridedVisibility(Visibility):
    """A sliding window of the rows of a residue class, of which some see nothing here."""

    hidden_rows: npt.NDArray[np.int64] | None = None

    def elements(self, rows: Rows, index: int, columns: Rows) -> Mask | None:
        """Return which elements of a tile are seen, or None when all are."""
        seen = super().elements(rows, index, columns)
        start = index * rows.tile
        numbers = np.arange(start, min(start + rows.tile, self.rows))
        hidden = np.isin(numbers, () if self.hidden_rows is None else self.hidden_rows)
        if not hidden.any():
            return seen
        shape = (len(numbers), columns.stop - columns.start)
        return (np.ones(shape, dtype=np.bool_) if seen is None else seen) & ~hidden[:, None]


@dataclass(frozen=True, kw_only=True)
class PlacedProblem(AttentionProblem):
    """A problem under a mask of its own."""

    placed: Visibility

    @cached_property
    def keys_of_queries(self) -> Visibility:
        """Which keys each query row sees."""
        return self.placed


# Parts


@dataclass(frozen=True)
class Residue:
    """The local queries and the keys whose positions leave the same rest by the dilation.

    The last of both stands ``offset`` positions before the end, so that they are aligned at their ends.
    """

    problem: DilatedWindowProblem
    offset: int

    @property
    def dilation(self) -> int:
        """Distance of neighbours."""
        assert isinstance(self.problem.dilation, int)
        return self.problem.dilation

    @property
    def q_len(self) -> int:
        """Queries of the class."""
        return ceil_div(max(0, self.problem.local_rows - self.offset), self.dilation)

    @property
    def kv_len(self) -> int:
        """Keys of the class."""
        return ceil_div(max(0, self.problem.kv_len - self.offset), self.dilation)

    @property
    def rows(self) -> slice:
        """The queries' rows."""
        start = self.problem.q_len - 1 - self.offset - (self.q_len - 1) * self.dilation
        return slice(start, None, self.dilation)

    @property
    def keys(self) -> slice:
        """The keys' rows."""
        start = self.problem.kv_len - 1 - self.offset - (self.kv_len - 1) * self.dilation
        return slice(start, None, self.dilation)

    @property
    def places(self) -> Places:
        """The queries' positions."""
        return Places(self.q_len, self.problem.first_position + self.rows.start, self.dilation)

    @property
    def attention(self) -> AttentionProblem:
        """The class as attention in a sliding window; rows of global tokens see nothing."""
        problem, (left, right) = self.problem, self.problem.sides
        rows = problem.later_global_rows
        own = (rows - self.rows.start) // self.dilation
        seen = StridedVisibility(
            self.q_len,
            self.kv_len,
            self.kv_len - self.q_len,
            left,
            right,
            hidden_rows=own[(rows - self.rows.start) % self.dilation == 0],
        )
        return PlacedProblem(**problem.plain(q_len=self.q_len, kv_len=self.kv_len), placed=seen)


def residues(problem: DilatedWindowProblem, key_tile: int, *, all_of_them: bool) -> Iterator[tuple[Residue, int]]:
    """Yield residue classes and how many are alike: as long, and as far from the later global keys' tiles."""
    assert isinstance(problem.dilation, int)
    dilation, classes = problem.dilation, min(problem.dilation, problem.local_rows)
    if all_of_them:
        changes = list(range(classes + 1))
    else:
        tiles = problem.later_globals[::key_tile].tolist() if problem.causal else []
        lengths = (problem.local_rows, problem.kv_len, *(problem.kv_len - position for position in tiles))
        changes = sorted({0, classes} | {length % dilation for length in lengths if length % dilation < classes})
    for offset, after in pairwise(changes):
        yield Residue(problem, offset), after - offset


# Tiled program


def forward(machine: Machine, problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> None:
    """Attend class by class, with the global keys in the same softmax, and then from global tokens to all keys."""
    arrays = declare_forward(machine, problem, plan)
    for dilation, heads in problem.heads_by_dilation.items():
        names = ("q", "k", "v", "out", "lse")
        chosen = {name: heads_of(getattr(arrays, name), problem.kv_heads, heads) for name in names}
        local_rows(machine, problem.of_dilation(dilation), plan, ForwardArrays(**chosen))
        for name in ("out", "lse"):
            put_heads_back(getattr(arrays, name), chosen[name], problem.kv_heads, heads)
    global_rows(machine, problem, plan, arrays)


def local_rows(machine: Machine, problem: DilatedWindowProblem, plan: DilatedWindowPlan, arrays: ForwardArrays) -> None:
    """Attend from the rows of every residue class to its window and to the global keys."""
    for residue, times in residues(problem, plan.tiles.kv, all_of_them=machine.arithmetic is not None):
        attention, rows, keys = residue.attention, residue.rows, residue.keys
        inner = machine.inside(attention, {})
        parts = ForwardArrays(
            part_of(arrays.q, rows),
            part_of(arrays.k, keys),
            part_of(arrays.v, keys),
            part_of(arrays.out, rows),
            part_of(arrays.lse, rows),
        )
        further = [
            KeySource(part_of(arrays.k, where), part_of(arrays.v, where), seen)
            for where, seen in global_keys(problem, residue.places)
        ]
        flash2.attend(inner, attention, plan, parts, further)
        machine.take_over(inner, times)


def global_keys(problem: DilatedWindowProblem, queries: Places) -> Iterator[tuple[Where, PlacedVisibility]]:
    """Yield the global keys at the beginning and the later ones, and what local queries see of them by no window."""
    assert isinstance(problem.dilation, int)
    hidden = {"window": (*problem.sides, problem.dilation), "hidden_queries": problem.later_globals}
    if problem.first_globals:
        keys = Places(problem.first_globals)
        yield slice(problem.first_globals), PlacedVisibility.between(queries, keys, **hidden)
    if len(problem.later_globals):
        keys = Places.of(problem.later_globals)
        yield problem.later_globals, PlacedVisibility.between(queries, keys, causal=problem.causal, **hidden)


@dataclass(frozen=True)
class GlobalPart:
    """Rows of global tokens: which of all rows, which of those of global tokens, the keys, and the attention."""

    rows: Where
    own_rows: Where
    keys: slice
    attention: AttentionProblem


def global_parts(problem: DilatedWindowProblem) -> Iterator[GlobalPart]:
    """Yield the rows of the global tokens at the beginning and of the later ones."""
    first, rows = problem.first_global_rows, problem.later_global_rows
    if first:
        keys = problem.first_globals if problem.causal else problem.kv_len
        attention = AttentionProblem(**problem.plain(q_len=first, kv_len=keys, causal=problem.causal))
        yield GlobalPart(slice(first), slice(first), slice(keys), attention)
    if len(rows):
        queries, keys = Places.of(rows + problem.first_position), problem.kv_len
        seen = PlacedVisibility.between(queries, Places(keys), causal=problem.causal)
        attention = PlacedProblem(**problem.plain(q_len=len(rows), kv_len=keys), placed=seen)
        yield GlobalPart(rows, slice(first, None), slice(keys), attention)


def global_rows(
    machine: Machine, problem: DilatedWindowProblem, plan: DilatedWindowPlan, arrays: ForwardArrays
) -> None:
    """Attend from the global tokens among the queries to all keys, with projections of their own if they have any."""
    q, k, v = projections(machine, problem)
    for part in global_parts(problem):
        inner = machine.inside(part.attention, {})
        parts = ForwardArrays(
            part_of(q, part.own_rows if problem.has_own_projections else part.rows),
            part_of(k, part.keys),
            part_of(v, part.keys),
            part_of(arrays.out, part.rows),
            part_of(arrays.lse, part.rows),
        )
        flash2.attend(inner, part.attention, plan, parts)
        machine.take_over(inner)
        put_back(arrays.out, parts.out, part.rows)
        put_back(arrays.lse, parts.lse, part.rows)


def projections(machine: Machine, problem: DilatedWindowProblem) -> tuple[Array, Array, Array]:
    """Return the queries, keys and values of the global tokens' rows."""
    ending = "_global" if problem.has_own_projections else ""
    q, k, v = (machine.arrays[f"{name}{ending}"] for name in "qkv")
    return q, k, v


def backward(machine: Machine, problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> None:
    """Add up the gradients of all parts in memory: each recomputes its probabilities from the rows' LSE."""
    names = ("q", "k", "v", "dout", "lse")
    arrays = {name: machine.arrays[name] for name in names}
    delta = machine.array("delta", problem.q_len, 1)
    row_dots(machine, machine.arrays["out"], arrays["dout"], delta, plan)
    endings = ["", "_global"] if problem.has_own_projections else [""]
    totals = {ending: declare_sums(machine, problem, plan, of=ending) for ending in endings}
    dq, dk, dv = totals[""]
    sums = GradientSums(**arrays, delta=delta, dq=dq, dk=dk, dv=dv)
    for dilation, heads in problem.heads_by_dilation.items():

        def choose(array: Array, heads: npt.NDArray[np.int64] = heads) -> Array:
            return heads_of(array, problem.kv_heads, heads)

        chosen = sums.changed(choose, choose)
        local_gradients(machine, problem.of_dilation(dilation), plan, chosen)
        for whole, part in zip(sums.summed, chosen.summed, strict=True):
            put_heads_back(whole, part, problem.kv_heads, heads)
    q, k, v = projections(machine, problem)
    dq, dk, dv = totals[endings[-1]]
    for rows in global_parts(problem):
        own_rows = rows.own_rows if problem.has_own_projections else rows.rows
        own = GradientSums(
            q=part_of(q, own_rows),
            k=part_of(k, rows.keys),
            v=part_of(v, rows.keys),
            dout=part_of(sums.dout, rows.rows),
            lse=part_of(sums.lse, rows.rows),
            delta=part_of(delta, rows.rows),
            dq=part_of(dq, own_rows),
            dk=replace(dk, partial=part_of(dk.partial, rows.keys)),
            dv=replace(dv, partial=part_of(dv.partial, rows.keys)),
        )
        own.hand_in(machine, rows.attention, plan)
        put_back(dq, own.dq, own_rows)
    for ending, total in totals.items():
        finish_sums(machine, plan, total, of=ending)


def local_gradients(
    machine: Machine, problem: DilatedWindowProblem, plan: DilatedWindowPlan, sums: GradientSums
) -> None:
    """Hand in the gradients of every class's windows, then those of the global keys from all local rows."""
    for residue, times in residues(problem, plan.tiles.kv, all_of_them=machine.arithmetic is not None):
        sums.part(residue.rows, residue.keys).hand_in(machine, residue.attention, plan, times)
    for keys, attention in global_key_parts(problem):
        rows = slice(problem.first_global_rows, None)
        part = sums.part(rows, keys)
        part.hand_in(machine, attention, plan)
        sums.put_back(part, rows, keys)


def global_key_parts(problem: DilatedWindowProblem) -> Iterator[tuple[Where, AttentionProblem]]:
    """Yield the global keys at the beginning and the later ones, with the attention that all local rows pay to them."""
    rows = problem.local_rows
    if rows:
        for keys, seen in global_keys(problem, Places(rows, problem.kv_len - rows)):
            yield keys, PlacedProblem(**problem.plain(q_len=rows, kv_len=seen.columns), placed=seen)


def decode(machine: Machine, problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> None:
    """FlashAttention-2's loop for one query against the keys that it sees, gathered in ascending order."""
    q, k, v = projections(machine, problem)
    arrays = ForwardArrays(
        q=q,
        k=k,
        v=v,
        out=machine.array("out", 1, problem.value_dim, dtype=problem.dtype, role="output"),
        lse=machine.array("lse", 1, 1, role="output"),
    )
    packed = plan.packed_heads or problem.group_size
    for dilation, heads in problem.heads_by_dilation.items():
        some, names = problem.of_dilation(dilation), ("q", "k", "v", "out", "lse")
        chosen = {name: heads_of(getattr(arrays, name), problem.kv_heads, heads) for name in names}
        if machine.arithmetic is not None:
            seen = np.flatnonzero(some.seen()[0, 0])
            chosen |= {name: part_of(chosen[name], seen) for name in "kv"}
        attention = AttentionProblem(**some.plain(q_len=1, kv_len=seen_by_the_last(some)))
        attend_packed(machine, attention, plan, ForwardArrays(**chosen), packed)
        for name in ("out", "lse"):
            put_heads_back(getattr(arrays, name), chosen[name], problem.kv_heads, heads)


def seen_by_the_last(problem: DilatedWindowProblem) -> int:
    """Return how many keys the last query sees, with one dilation."""
    assert isinstance(problem.dilation, int)
    last, (left, _), dilation = problem.kv_len - 1, problem.sides, problem.dilation
    if problem.global_rows:
        return problem.kv_len
    near = min(left, last // dilation)
    window = Places(near + 1, last - near * dilation, dilation)
    shared = window.up_to(problem.first_globals - 1)
    later = problem.later_globals
    outside = (last - later) % dilation != 0
    outside |= later < window.first
    return window.count + problem.first_globals - shared + int(outside.sum())


# Reference


def reference(
    problem: DilatedWindowProblem, inputs: Mapping[str, Values], rounded: Rounding = exact
) -> dict[str, Values]:
    """Compute whole matrices of scores: one softmax for each row, each pair of a query and a key once.

    Arguments are those of every algorithm's reference.
    """
    counts = problem.seen().astype(np.int64)
    if not problem.has_own_projections:
        return one_softmax(problem, inputs, counts, rounded)
    rows = np.concatenate([np.arange(problem.first_global_rows), problem.later_global_rows])
    local = counts.copy()
    local[:, rows] = 0
    results = one_softmax(problem, inputs, local, rounded)
    q, k, v = (by_query_head(problem, inputs[f"{name}_global"]) for name in "qkv")
    dout = by_query_head(problem, inputs["dout"])[:, :, rows] if "dout" in inputs else None
    found = attended(q, k, v, counts[:, rows], problem.scale, dout=dout, rounded=rounded)
    results["out"][:, rows] = np.moveaxis(found.out, 1, 2)
    results["lse"][:, :, rows] = found.lse
    if found.dq is not None and found.dk is not None and found.dv is not None:
        results["dq_global"] = np.moveaxis(found.dq, 1, 2)
        results |= {"dk_global": by_kv_head(problem, found.dk), "dv_global": by_kv_head(problem, found.dv)}
    return results


# Closed form


def class_lengths(problem: DilatedWindowProblem, *lengths: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield how many of the last so many tokens each residue class with queries has, and how many classes have as many.

    A class whose last token stands ``offset`` positions before the end has ⌈(length − offset) / dilation⌉ of them.
    """
    assert isinstance(problem.dilation, int)
    dilation, classes = problem.dilation, min(problem.dilation, problem.local_rows)
    changes = sorted({0, classes} | {length % dilation for length in lengths if length % dilation < classes})
    for offset, after in pairwise(changes):
        yield tuple(ceil_div(max(0, length - offset), dilation) for length in lengths), after - offset


def closed_form_forward(problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> Traffic:
    """Q, O and LSE once, and of global tokens after the first ones O and LSE again; K and V for every tile of queries.

    A tile of a residue class loads the keys of its class that its window touches, and all global keys but later ones.
    """
    parts = [
        row_traffic(problem, problem.local_rows),
        *(local_key_traffic(problem.of_dilation(dilation), plan) for dilation in problem.heads_by_dilation),
    ]
    ending = "_global" if problem.has_own_projections else ""
    for rows, keys in global_row_loads(problem, plan):
        parts += [row_traffic(problem, rows, of=ending), key_traffic(problem, keys, of=ending)]
    return forms.total(parts)


def row_traffic(problem: AttentionProblem, rows: int, *, of: str = "") -> Mapping[str, ArrayTraffic]:
    """Return what a forward pass moves of so many queries."""
    return {
        f"q{of}": forms.read(forms.matrix_bytes(problem, rows, problem.head_dim)),
        "out": forms.written(forms.matrix_bytes(problem, rows, problem.value_dim)),
        "lse": forms.written(forms.statistic_bytes(problem, rows)),
    }


def key_traffic(problem: AttentionProblem, rows: int, *, of: str = "") -> Mapping[str, ArrayTraffic]:
    """Return what loading so many keys and values for every query head moves."""
    return {
        f"k{of}": forms.read(forms.matrix_bytes(problem, rows, problem.head_dim)),
        f"v{of}": forms.read(forms.matrix_bytes(problem, rows, problem.value_dim)),
    }


def window_of_class(problem: DilatedWindowProblem, q_len: int, kv_len: int) -> AttentionProblem:
    """Return a residue class of such lengths as attention in a sliding window."""
    return AttentionProblem(**problem.plain(q_len=q_len, kv_len=kv_len, window=problem.sides))


def local_key_traffic(problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> Mapping[str, ArrayTraffic]:
    """Return what the tiles of all classes load of the windows' and the global keys."""
    tiles, rows = plan.tiles, 0
    for (q_len, kv_len), times in class_lengths(problem, problem.local_rows, problem.kv_len):
        windows = forms.tile_visits(window_of_class(problem, q_len, kv_len), tiles)
        rows += times * (windows.keys + windows.query_tiles * problem.first_globals)
    later = problem.later_globals
    for first in range(0, len(later), tiles.kv):
        size, after = min(tiles.kv, len(later) - first), problem.kv_len - int(later[first])
        for (q_len, not_before), times in class_lengths(problem, problem.local_rows, after):
            skipped = (q_len - not_before) // tiles.q if problem.causal and not_before < q_len else 0
            seeing = ceil_div(q_len, tiles.q) - skipped if not_before or not problem.causal else 0
            rows += times * seeing * size
    return key_traffic(problem, rows)


def global_row_loads(problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> Iterator[tuple[int, int]]:
    """Yield the rows of global tokens, at the beginning and later, and the keys that their tiles load together."""
    first, later = problem.first_global_rows, problem.later_global_rows + problem.first_position
    if first:
        yield first, forms.tile_visits(first_global_attention(problem), plan.tiles).keys
    if len(later):
        loaded = np.full(ceil_div(len(later), plan.tiles.q), problem.kv_len)
        if problem.causal:
            loaded = np.minimum(loaded, -(-(last_of_tiles(later, plan.tiles.q) + 1) // plan.tiles.kv) * plan.tiles.kv)
        yield len(later), int(loaded.sum())


def first_global_attention(problem: DilatedWindowProblem) -> AttentionProblem:
    """Return what the global tokens at the beginning attend to."""
    keys = problem.first_globals if problem.causal else problem.kv_len
    return AttentionProblem(**problem.plain(q_len=problem.first_global_rows, kv_len=keys, causal=problem.causal))


def last_of_tiles(positions: npt.NDArray[np.int64], tile: int) -> npt.NDArray[np.int64]:
    """Return the last position of every tile."""
    return np.append(positions[tile - 1 :: tile], positions[-1:] if len(positions) % tile else positions[:0])


def closed_form_backward(problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> Traffic:
    """All gradients' sums in fp32, and for every part its keys once and its queries for every key tile."""
    parts = [delta_traffic(problem), sums_traffic(problem, plan, rows=problem.q_len, keys=problem.kv_len)]
    for dilation in problem.heads_by_dilation:
        some = problem.of_dilation(dilation)
        parts += [
            handed_in_traffic(some, plan, queries=queries, keys=keys) for queries, keys in local_loads(some, plan)
        ]
    ending = "_global" if problem.has_own_projections else ""
    if ending:
        parts.append(sums_traffic(problem, plan, rows=problem.global_rows, keys=problem.kv_len, of=ending))
    for queries, keys in global_row_gradient_loads(problem, plan):
        parts.append(handed_in_traffic(problem, plan, queries=queries, keys=keys, of=ending))
    return forms.total(parts)


def local_loads(problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> Iterator[tuple[int, int]]:
    """Yield the queries that key tiles load together, and the keys: of windows, first and later global keys."""
    tiles, rows, later = plan.tiles, problem.local_rows, problem.later_globals
    if not rows:
        return
    for (q_len, kv_len), times in class_lengths(problem, rows, problem.kv_len):
        queries = forms.tile_visits(window_of_class(problem, q_len, kv_len), tiles).queries
        yield times * queries, times * kv_len
    yield ceil_div(problem.first_globals, tiles.kv) * rows, problem.first_globals
    before = np.maximum(0, later[:: tiles.kv] - (problem.kv_len - rows)) if problem.causal else 0 * later[:: tiles.kv]
    yield int((rows - before // tiles.q * tiles.q).sum()), len(later)


def global_row_gradient_loads(problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> Iterator[tuple[int, int]]:
    """Yield the queries that key tiles load together of the global tokens at the beginning and later, and the keys."""
    tiles, later = plan.tiles, problem.later_global_rows + problem.first_position
    if problem.first_global_rows:
        attention = first_global_attention(problem)
        yield forms.tile_visits(attention, tiles).queries, attention.kv_len
    if len(later):
        sizes = np.diff(np.append(np.arange(0, len(later), tiles.q), len(later)))
        seen = last_of_tiles(later, tiles.q) + 1 if problem.causal else problem.kv_len
        yield int((sizes * -(-seen // tiles.kv)).sum()), problem.kv_len


def closed_form_decode(problem: DilatedWindowProblem, plan: DilatedWindowPlan) -> Traffic:
    """Q, O and LSE once, and the keys that are seen once for every tile of packed query heads."""
    packed, ending = plan.packed_heads or problem.group_size, "_global" if problem.has_own_projections else ""
    parts = [row_traffic(problem, 1, of=ending)]
    for dilation in problem.heads_by_dilation:
        some = problem.of_dilation(dilation)
        heads = some.heads // packed * ceil_div(packed, plan.tiles.q)
        seen = keys_outside_windows(some)
        if not some.global_rows:
            left, _ = some.sides
            seen += min(left, (some.kv_len - 1) // dilation) + 1
        parts.append(
            {
                f"k{ending}": forms.read(forms.matrix_bytes(some, seen, some.head_dim, heads=heads)),
                f"v{ending}": forms.read(forms.matrix_bytes(some, seen, some.value_dim, heads=heads)),
            }
        )
    return forms.total(parts)


def keys_outside_windows(problem: DilatedWindowProblem) -> int:
    """Return how many keys the last query sees that no window holds: global ones, or all if it is one itself."""
    if problem.global_rows:
        return problem.kv_len
    assert isinstance(problem.dilation, int)
    left, last, dilation = problem.sides[0], problem.kv_len - 1, problem.dilation

    def in_window(position: int) -> bool:
        return (last - position) % dilation == 0 and last - position <= left * dilation

    # Of the first globals those in the window are every ``dilation``-th one from the window's end on.
    near = max(0, last - min(left, last // dilation) * dilation)
    shared = max(0, ceil_div(problem.first_globals - near, dilation))
    return problem.first_globals - shared + sum(not in_window(position) for position in problem.later_globals.tolist())


# Plans

ALGORITHM = Algorithm(
    name="dilated_window",
    title="Dilated windows with global tokens",
    source="Beltagy et al. 2020, arXiv 2004.05150, Section 3",
    summary="Sliding windows of strided rows and full attention of global tokens, in one softmax for each row.",
    family="windows",
    plan_class=DilatedWindowPlan,
    problem_class=DilatedWindowProblem,
    reference=reference,
    programs={"forward": forward, "backward": backward, "decode": decode},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward, "decode": closed_form_decode},
    paper_tiles=sliding_window.paper_tiles,
    fit_tiles=sliding_window.fit_tiles,
    gpu_tiles=sliding_window.gpu_tiles,
    plan_defaults=sliding_window.plan_defaults,
)
