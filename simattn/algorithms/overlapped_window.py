"""Overlapping windows: attention inside windows of the sequence, merged by their log-sum-exp.

The sequence is cut into windows of W tokens of which neighbours share some. Each is attention of its own; a token that
lies in several windows has an output from each, and these are merged as the parts of one softmax are, weighted by
their log-sum-exp. To put them one after another, or to take their mean, is no attention over what the windows show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from simattn.algorithms import flash2, forms
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.kernels import ForwardArrays, declare_forward, row_dots
from simattn.algorithms.steps import SoftmaxState, finish_softmax, take_partial
from simattn.algorithms.windows import (
    AddedUpPlan,
    GradientSums,
    Mask,
    Values,
    WindowProblem,
    declare_sums,
    delta_traffic,
    finish_sums,
    handed_in_traffic,
    part_of,
    sums_traffic,
)
from simattn.definition import Rounding, exact, one_softmax
from simattn.machine import Array, Machine
from simattn.masks import Rows, Visibility, VisibleRows
from simattn.plan import check_choice
from simattn.problem import AttentionProblem, Direction, Window, checked_integer
from simattn.sums import ceil_div, floor_sum
from simattn.traffic import ArrayTraffic, Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class OverlappedWindowProblem(WindowProblem):
    """A problem of attention inside overlapping windows, of as many queries as keys.

    Window i has the tokens i · (window_len − overlap) and the following up to window_len; the last one is the first
    that reaches the end.

    Attributes
    ----------
    window_len
        Tokens of a window; required.
    overlap
        Tokens that neighbouring windows share, fewer than a window has. With more than half a window, three or more
        windows share tokens.
    pairs
        How often a query counts a key that it meets in several windows: "once", each window leaves out the pairs of
        earlier ones, and the result is attention over the union of the windows; or "per_window", as often as windows
        hold both, which is a softmax of the scores plus the logarithm of that number.
    """

    window_len: int = None  # type: ignore[assignment]
    overlap: int = 0
    pairs: Literal["once", "per_window"] = "once"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            raise ValueError(f"window={self.window!r}: expected None, windows are given by window_len and overlap")
        if self.kv_len != self.q_len:
            raise ValueError(f"kv_len={self.kv_len}: expected q_len={self.q_len}, windows are cut from one sequence")
        if self.window_len is None:
            raise ValueError("window_len=None: expected the number of tokens of a window")
        object.__setattr__(self, "window_len", checked_integer("window_len", self.window_len, 1))
        object.__setattr__(self, "overlap", checked_integer("overlap", self.overlap, 0))
        if self.overlap >= self.window_len:
            raise ValueError(f"overlap={self.overlap}: expected fewer tokens than window_len={self.window_len}")
        check_choice("pairs", self.pairs, ("once", "per_window"))

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields without a band or a block mask, and with as many keys as queries."""
        return {**given, "window": None, "block_mask": None, "kv_len": given["q_len"]}

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return windows without overlap, with less and more than half of them shared, and longer than the sequence."""
        choices = [(4, 0), (1, 0), (5, 2), (6, 3), (7, 6), (8, 5), (problem.q_len + 3, 2), (max(2, problem.q_len), 1)]
        return [
            {"window_len": length, "overlap": overlap, "pairs": pairs}
            for length, overlap in choices
            for pairs in ("once", "per_window")
        ]

    @classmethod
    def usual_arguments(cls, direction: Direction, length: int, window: Window | None = None) -> dict[str, Any]:
        """Return those of any problem, and windows that share half of their tokens with each neighbour."""
        return {**super().usual_arguments(direction, length, window), "window_len": 512, "overlap": 256}

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one row and one KV head with the same tiles on chip, or of few if there is a merge."""
        rows, window_len = (3, 2) if self.merges else (1, 1)
        windows = {"window_len": window_len, "overlap": window_len - 1, "causal": self.causal}
        return super().of_one_row(q_len=rows, kv_len=rows, **windows, **own)

    @property
    def step(self) -> int:
        """Tokens from the beginning of a window to that of the next."""
        return self.window_len - self.overlap

    @property
    def windows(self) -> int:
        """How many windows there are."""
        if self.q_len <= self.window_len:
            return min(1, self.q_len)
        return ceil_div(self.q_len - self.window_len, self.step) + 1

    @property
    def layers(self) -> int:
        """Most windows that share a token; windows that are so many apart share none."""
        return min(self.windows, ceil_div(self.window_len, self.step))

    @property
    def merges(self) -> bool:
        """Whether tokens have outputs from several windows: not where later windows show a token no other key."""
        return self.layers > 1 and not (self.causal and self.pairs == "once")

    def length_of(self, window: int) -> int:
        """Return how many tokens a window has."""
        return min(self.window_len, self.q_len - window * self.step)

    def pieces(self, window: int) -> list[Piece]:
        """Return the parts of a window that are attention of their own.

        Where pairs count once, a window leaves out those of its first tokens with one another, which the window before
        has. Its other tokens see all of it; the first ones, unless they see no later keys, its other tokens.
        """
        length = self.length_of(window)
        shared = self.overlap if self.pairs == "once" and window > 0 else 0
        own = Piece(shared, length - shared, 0, length, self.causal)
        if shared == 0 or self.causal:
            return [own]
        return [own, Piece(0, shared, shared, length - shared, False)]

    def groups(self) -> Iterator[tuple[int, int]]:
        """Yield a window and how many are like it: the first, those in the middle, and the last."""
        kinds = ((0, min(1, self.windows)), (1, max(0, self.windows - 2)), (self.windows - 1, int(self.windows > 1)))
        for window, count in kinds:
            if count:
                yield window, count

    def attention(self, piece: Piece, windows: int = 1) -> AttentionProblem:
        """Return the piece of so many windows as attention of a larger batch."""
        return AttentionProblem(
            batch=self.batch * windows,
            heads=self.heads,
            kv_heads=self.kv_heads,
            q_len=piece.rows,
            kv_len=piece.keys,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            scale=self.scale,
            causal=piece.causal,
        )

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how often each query counts each key, shape (q_len, kv_len)."""
        counts = np.zeros((self.q_len, self.q_len), dtype=np.int64)
        for window in range(self.windows):
            tokens = slice(window * self.step, window * self.step + self.window_len)
            counts[tokens, tokens] += 1
        if self.causal:
            counts = np.tril(counts)
        return np.minimum(counts, 1) if self.pairs == "once" else counts

    def visible_elements(self) -> Mask:
        """Return the whole mask: an array of bool, shape (q_len, kv_len), True where the key is seen."""
        return self.counts() > 0


@dataclass(frozen=True)
class Piece:
    """Some rows of a window with some of its keys, both counted from the window's first token."""

    first_row: int
    rows: int
    first_key: int
    keys: int
    causal: bool


@dataclass(frozen=True, kw_only=True)
class OverlappedWindowPlan(AddedUpPlan):
    """Plan of overlapping windows: FlashAttention-2's, whose gradients are sums in memory that all windows add to."""


# Tiled program


def forward(machine: Machine, problem: OverlappedWindowProblem, plan: OverlappedWindowPlan) -> None:
    """Attend inside every window, and merge what tokens have from several: outputs in fp32 pass through memory."""
    arrays = declare_forward(machine, problem, plan)
    if not problem.merges:
        attend_in_windows(machine, problem, plan, arrays, lambda layer: (arrays.out, arrays.lse))
        return
    rows = problem.layers * problem.q_len
    outs, lses = machine.array("out_partial", rows, problem.value_dim), machine.array("lse_partial", rows, 1)

    def partials(layer: int) -> tuple[Array, Array]:
        of_layer = slice(layer * problem.q_len, (layer + 1) * problem.q_len)
        return part_of(outs, of_layer), part_of(lses, of_layer)

    attend_in_windows(machine, problem, plan, arrays, partials)
    merge(machine, problem, plan, arrays, partials)


Partials = Callable[[int], tuple[Array, Array]]
"""Outputs and log-sum-exp of one layer of windows, which share no token."""


def attend_in_windows(
    machine: Machine,
    problem: OverlappedWindowProblem,
    plan: OverlappedWindowPlan,
    arrays: ForwardArrays,
    partials: Partials,
) -> None:
    """Attend inside the windows, those of a layer together."""
    for windows in together(machine, problem):
        outs, lses = partials(windows.layer)
        for piece in problem.pieces(windows.first):
            rows, keys = windows.tokens(piece.first_row, piece.rows), windows.tokens(piece.first_key, piece.keys)
            attention = problem.attention(piece, windows.simulated)
            parts = ForwardArrays(rows.of(arrays.q), keys.of(arrays.k), keys.of(arrays.v), rows.of(outs), rows.of(lses))
            inner = machine.inside(attention, {})
            flash2.attend(inner, attention, plan, parts)
            machine.take_over(inner, windows.counted)
            rows.put_back(outs, parts.out)
            rows.put_back(lses, parts.lse)


@dataclass(frozen=True)
class Windows:
    """Windows that are alike and share no token: every ``layers``-th one from the first on.

    Attributes
    ----------
    problem
        The problem.
    first
        Number of the first window.
    simulated, counted
        How many are simulated as one batch, and for how many one is counted; one of them is 1.
    """

    problem: OverlappedWindowProblem
    first: int
    simulated: int = 1
    counted: int = 1

    @property
    def layer(self) -> int:
        """The layer of the windows."""
        return self.first % self.problem.layers

    def tokens(self, first: int, count: int) -> WindowTokens:
        """Return some tokens of every window."""
        problem = self.problem
        starts = (self.first + problem.layers * np.arange(self.simulated)) * problem.step + first
        return WindowTokens(problem.batch, problem.kv_heads, starts, count)


@dataclass(frozen=True, eq=False)
class WindowTokens:
    """So many tokens from each of some starts on, the starts as further entries of the batch."""

    batch: int
    kv_heads: int
    starts: npt.NDArray[np.int64]
    count: int

    def of(self, array: Array) -> Array:
        """Return a copy of an array's rows."""
        if array.values is None:
            return replace(array, rows=self.count)
        _, group, _, columns = array.values.shape
        rows = array.values[:, :, self._indices].reshape(self.batch, self.kv_heads, group, *self._shape, columns)
        return replace(array, rows=self.count, values=np.moveaxis(rows, 3, 1).reshape(-1, group, self.count, columns))

    def put_back(self, array: Array, part: Array) -> None:
        """Write the rows back to where they are from."""
        if array.values is not None and part.values is not None:
            _, group, _, columns = array.values.shape
            rows = part.values.reshape(self.batch, len(self.starts), self.kv_heads, group, self.count, columns)
            rows = np.moveaxis(rows, 1, 3).reshape(-1, group, len(self.starts) * self.count, columns)
            array.values[:, :, self._indices] = rows

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.starts), self.count

    @property
    def _indices(self) -> npt.NDArray[np.int64]:
        indices: npt.NDArray[np.int64] = (self.starts[:, None] + np.arange(self.count)).ravel()
        return indices


def together(machine: Machine, problem: OverlappedWindowProblem) -> Iterator[Windows]:
    """Yield windows that are alike: one for all when counting, else those of a layer, so that none shares a token."""
    for first, count in problem.groups():
        if machine.arithmetic is None:
            yield Windows(problem, first, counted=count)
            continue
        for start in range(first, first + min(count, problem.layers)):
            yield Windows(problem, start, simulated=ceil_div(first + count - start, problem.layers))


@dataclass(frozen=True)
class Cover(Visibility):
    """Which windows the rows of a tile lie in: window i is the i-th tile of as many columns as windows are apart."""

    window_len: int = 1

    def elements(self, rows: Rows, index: int, columns: Rows) -> Mask | None:
        """Return which rows of a tile lie in a window, shape (rows, 1), or None when all do."""
        start = index * rows.tile
        tokens = np.arange(start, min(start + rows.tile, self.rows))[:, None] - columns.start
        inside = (tokens >= 0) & (tokens < self.window_len)
        return None if inside.all() else inside


def cover(problem: OverlappedWindowProblem) -> Cover:
    """Return which windows rows lie in: window i is the i-th tile of ``problem.step`` columns."""
    columns = problem.windows * problem.step
    return Cover(problem.q_len, columns, 0, problem.overlap, 0, window_len=problem.window_len)


def merge(
    machine: Machine,
    problem: OverlappedWindowProblem,
    plan: OverlappedWindowPlan,
    arrays: ForwardArrays,
    partials: Partials,
) -> None:
    """Merge the outputs of the windows that a tile of rows lies in, in ascending order."""
    windows, place = cover(problem), plan.accumulators
    for rows in machine.thread_blocks(problem.q_len, plan.tiles.q, width=problem.value_dim):
        state = SoftmaxState.empty(machine, rows, problem.value_dim, place)
        for window in machine.tiles(VisibleRows(windows, rows), problem.step):
            # load
            outs, lses = partials(window.first % problem.layers)
            out = machine.load(outs, rows, place="registers")
            lse = machine.load(lses, rows, place="registers")
            # compute
            outside = machine.hidden_elements(rows, window, windows)
            machine.hide(out, outside, 0.0)
            machine.hide(lse, outside, -np.inf)
            take_partial(machine, state, out, lse)
        # finish
        finish_softmax(machine, state, arrays, rows, staged=plan.stage_results)


def backward(machine: Machine, problem: OverlappedWindowProblem, plan: OverlappedWindowPlan) -> None:
    """Recompute each window's probabilities from the merged LSE, and add up the gradients of all windows in memory."""
    delta = machine.array("delta", problem.q_len, 1)
    names = ("q", "k", "v", "dout", "lse")
    row_dots(machine, machine.arrays["out"], machine.arrays["dout"], delta, plan)
    totals = declare_sums(machine, problem, plan)
    dq, dk, dv = totals
    sums = GradientSums(**{name: machine.arrays[name] for name in names}, delta=delta, dq=dq, dk=dk, dv=dv)
    for windows in together(machine, problem):
        for piece in problem.pieces(windows.first):
            rows, keys = windows.tokens(piece.first_row, piece.rows), windows.tokens(piece.first_key, piece.keys)
            part = sums.changed(rows.of, keys.of)
            part.hand_in(machine, problem.attention(piece, windows.simulated), plan, windows.counted)
            for tokens, whole, copied in zip((rows, keys, keys), sums.summed, part.summed, strict=True):
                tokens.put_back(whole, copied)
    finish_sums(machine, plan, totals)


# Reference


def reference(
    problem: OverlappedWindowProblem, inputs: Mapping[str, Values], rounded: Rounding = exact
) -> dict[str, Values]:
    """Compute whole matrices of scores, each counted as often as windows hold it, or once.

    Arguments are those of every algorithm's reference.
    """
    return one_softmax(problem, inputs, problem.counts()[None], rounded)


# Closed form


def closed_form_forward(problem: OverlappedWindowProblem, plan: OverlappedWindowPlan) -> Traffic:
    """Every piece of every window as FlashAttention-2 moves it, and the partial outputs written and read."""
    rows = keys = 0
    for window, count in problem.groups():
        for piece in problem.pieces(window):
            rows += count * piece.rows
            keys += count * forms.tile_visits(problem.attention(piece), plan.tiles).keys
    ending = "_partial" if problem.merges else ""
    dtype = "float32" if problem.merges else problem.dtype
    parts: list[Mapping[str, ArrayTraffic]] = [
        {
            "q": forms.read(forms.matrix_bytes(problem, rows, problem.head_dim)),
            "k": forms.read(forms.matrix_bytes(problem, keys, problem.head_dim)),
            "v": forms.read(forms.matrix_bytes(problem, keys, problem.value_dim)),
            f"out{ending}": forms.written(forms.matrix_bytes(problem, rows, problem.value_dim, dtype=dtype)),
            f"lse{ending}": forms.written(forms.statistic_bytes(problem, rows)),
        }
    ]
    if problem.merges:
        loaded = merged_rows(problem, plan.tiles.q)
        parts.append(
            {
                "out_partial": forms.read(forms.matrix_bytes(problem, loaded, problem.value_dim, dtype="float32")),
                "lse_partial": forms.read(forms.statistic_bytes(problem, loaded)),
                "out": forms.written(forms.matrix_bytes(problem, problem.q_len, problem.value_dim)),
                "lse": forms.written(forms.statistic_bytes(problem, problem.q_len)),
            }
        )
    return forms.total(parts)


def merged_rows(problem: OverlappedWindowProblem, tile: int) -> int:
    """Return the rows of the tiles that every window touches, window by window: from ⌊s/B⌋·B to ⌈e/B⌉·B."""
    length, step, windows = problem.q_len, problem.step, problem.windows
    ends = floor_sum(windows - 1, step, problem.window_len + tile - 1, tile) + ceil_div(length, tile)
    starts = floor_sum(windows, step, 0, tile)
    # Windows that reach into the clipped tile load no more of it than there is.
    whole = length // tile * tile
    before = min(windows - 1, max(0, (whole - problem.window_len) // step + 1))
    return (ends - starts) * tile - (windows - before) * (-length % tile)


def closed_form_backward(problem: OverlappedWindowProblem, plan: OverlappedWindowPlan) -> Traffic:
    """All gradients' sums in fp32; of every window its keys once and its queries for every key tile."""
    parts = [delta_traffic(problem), sums_traffic(problem, plan, rows=problem.q_len, keys=problem.kv_len)]
    queries = keys = 0
    for window, count in problem.groups():
        for piece in problem.pieces(window):
            queries += count * forms.tile_visits(problem.attention(piece), plan.tiles).queries
            keys += count * piece.keys
    parts.append(handed_in_traffic(problem, plan, queries=queries, keys=keys))
    return forms.total(parts)


# Plans

ALGORITHM = Algorithm(
    name="overlapped_window",
    title="Overlapping windows",
    source="merged by log-sum-exp as in Dao 2023, arXiv 2307.08691, Section 2.3.1",
    summary="Attention inside windows that share tokens; what a token has from several is merged by log-sum-exp.",
    family="windows",
    plan_class=OverlappedWindowPlan,
    problem_class=OverlappedWindowProblem,
    reference=reference,
    programs={"forward": forward, "backward": backward},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward},
    paper_tiles=flash2.paper_tiles,
    fit_tiles=flash2.fit_tiles,
    gpu_tiles=flash2.gpu_tiles,
    plan_defaults=flash2.plan_defaults,
)
