"""PagedAttention (Kwon et al. 2023, arXiv 2309.06180): decoding with keys and values in pages that lie anywhere.

A block table names the pages of each sequence. The thread blocks read its entries as they come to the pages, and
sequences have lengths of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from simattn.algorithms import parts
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.parts import CacheProblem, Cut, DecodePlan, DecodeProblem, PageTable
from simattn.definition import Rounding, exact
from simattn.hardware import Hardware
from simattn.machine import Array, Machine, Values
from simattn.masks import is_integer
from simattn.plan import PlanKind, Tiles, largest_divisor
from simattn.problem import AttentionProblem, Direction, InputShape, checked_integer
from simattn.sums import ceil_div
from simattn.traffic import Traffic

# Config and validation

PARTITION = 512
"""Keys of a partition of the second version of the kernel."""


@dataclass(frozen=True, kw_only=True)
class PagedProblem(DecodeProblem):
    """A decoding step on caches in pages, which is causal among its new rows: ``causal`` is not looked at.

    Attributes
    ----------
    cache_lengths
        Keys of each sequence, the new ones included: a number for all, or one for each. Default ``kv_len``, which is
        else the largest of them; one of both is required.
    page_size
        Keys of a page.
    pages
        Pages of the pools; default as many as the sequences take when they share none.
    table_columns
        Entries of a row of the block table; default as many as the longest sequence has pages.
    """

    cache_lengths: int | Sequence[int] = None  # type: ignore[assignment]
    page_size: int = 16
    pages: int = None  # type: ignore[assignment]
    table_columns: int = None  # type: ignore[assignment]

    is_causal: ClassVar[bool] = True
    own_inputs: ClassVar[tuple[str, ...]] = ("block_table",)
    decode_cache: ClassVar[str | None] = "pools of pages"

    def __post_init__(self) -> None:
        batch = checked_integer("batch", self.batch, 0)
        if self.kv_len is not None:
            checked_integer("kv_len", self.kv_len, 0)
        lengths = self._checked_lengths(batch)
        longest = max(lengths, default=self.q_len if self.kv_len is None else self.kv_len)
        if self.kv_len is None:
            object.__setattr__(self, "kv_len", longest)
        if self.kv_len != longest:
            raise ValueError(f"kv_len={self.kv_len!r}: expected {longest}, the largest of cache_lengths, or nothing")
        if not isinstance(self.causal, (bool, np.bool_)):
            raise TypeError(f"causal={self.causal!r}: expected a bool; paged is causal whatever it is")
        object.__setattr__(self, "causal", True)
        object.__setattr__(self, "cache_lengths", lengths)
        super().__post_init__()
        object.__setattr__(self, "page_size", checked_integer("page_size", self.page_size, 1))
        taken = [ceil_div(length, self.page_size) for length in lengths]
        any_page = min(1, sum(taken))
        for name, smallest, default in (("pages", any_page, sum(taken)), ("table_columns", 0, max(taken, default=0))):
            value = getattr(self, name)
            object.__setattr__(self, name, default if value is None else checked_integer(name, value, smallest))
        if self.table_columns < max(taken, default=0):
            raise ValueError(
                f"table_columns={self.table_columns}: expected at least {max(taken)}, the pages of a sequence of "
                f"{longest} keys"
            )

    def _checked_lengths(self, batch: int) -> tuple[int, ...]:
        given: Any = self.cache_lengths
        if given is None:
            given = self.kv_len
        if given is None:
            raise ValueError("cache_lengths=None: expected the number of keys of each sequence, or kv_len for all")
        if is_integer(given):
            return (checked_integer("cache_lengths", given, 0),) * batch
        if not isinstance(given, (tuple, list)) and not (isinstance(given, np.ndarray) and given.ndim == 1):
            raise TypeError(f"cache_lengths={given!r}: expected an integer, or one for each sequence")
        if len(given) != batch:
            raise ValueError(f"cache_lengths has {len(given)} numbers: expected {batch}, one for each sequence")
        return tuple(checked_integer(f"cache_lengths[{index}]", length, 0) for index, length in enumerate(given))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        assert isinstance(self.cache_lengths, tuple)
        return self.cache_lengths

    def members(self) -> dict[int, list[int]]:
        """Return the sequences of each length."""
        found: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            found.setdefault(length, []).append(index)
        return found

    def of_equal_lengths(self, direction: Direction) -> Iterator[AttentionProblem]:
        """Yield a problem of the sequences of each length."""
        given = {item.name: getattr(self, item.name) for item in fields(AttentionProblem)}
        for length, members in self.members().items():
            yield AttentionProblem(**{**given, "batch": len(members), "kv_len": length})

    def inputs(self, direction: Direction) -> dict[str, InputShape]:
        """Return the arrays that a program is given: pools of pages, and the block table."""
        arrays = super().inputs(direction)
        for name, columns in (("k", self.head_dim), ("v", self.value_dim)):
            arrays[name] = InputShape(
                self.pages * self.page_size,
                self.kv_heads * columns,
                "one",
                given_shape=(self.pages, self.page_size, self.kv_heads, columns),
            )
        arrays["block_table"] = InputShape(self.batch, self.table_columns, "one", "int32", gradient=False)
        return arrays

    @classmethod
    def shape_arguments(cls, arrays: Mapping[str, Values]) -> dict[str, Any]:
        """Return the fields that follow from the arrays that a caller gives.

        Parameters
        ----------
        arrays
            ``q``, ``k``, ``v`` and ``block_table``.

        Raises
        ------
        ValueError
            If their shapes do not fit together.
        """
        q, k, v = (arrays[name] for name in "qkv")
        for name, shape in (("k", (*k.shape[:3], q.shape[3])), ("v", (*k.shape[:3], v.shape[3]))):
            if arrays[name].shape != shape:
                raise ValueError(
                    f"{name} has shape {arrays[name].shape}: expected {shape}, (pages, page_size, kv_heads, columns), "
                    f"for q of shape {q.shape} and k of shape {k.shape}"
                )
        table = arrays.get("block_table")
        return {
            "batch": q.shape[0],
            "heads": q.shape[2],
            "kv_heads": k.shape[2],
            "q_len": q.shape[1],
            "head_dim": q.shape[3],
            "value_dim": v.shape[3],
            "page_size": k.shape[1],
            "pages": k.shape[0],
            **({} if table is None or table.ndim != 2 else {"table_columns": table.shape[1]}),
        }

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return sizes of pages with lengths that are equal, ragged and empty."""
        longest, batch = problem.kv_len, problem.batch
        ragged = tuple((longest, longest // 3, 0, longest // 2)[index % 4] for index in range(batch))
        return [{"page_size": page, "cache_lengths": lengths} for page in (1, 4, 16, 32) for lengths in (None, ragged)]

    def draw_inputs(self, direction: Direction, generator: np.random.Generator) -> dict[str, Values]:
        """Return a block table of pages in any order, which no sequences share."""
        table = np.full((self.batch, self.table_columns), -1)
        order = generator.permutation(self.pages)
        for row, length in enumerate(self.lengths):
            taken = ceil_div(length, self.page_size)
            table[row, :taken], order = order[:taken], order[taken:]
        return {"block_table": table}

    def key_tile(self, rows: int) -> int:
        """Return the most key rows of a tile, up to so many: whole pages, or an equal part of one."""
        if rows >= self.page_size:
            return rows // self.page_size * self.page_size
        return largest_divisor(self.page_size, rows)

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one row and one KV head with the same tiles on chip."""
        return super().of_one_row(cache_lengths=1, pages=1, table_columns=1, **own)


@dataclass(frozen=True, kw_only=True)
class PagedPlan(DecodePlan):
    """Plan of PagedAttention. A tile of keys has whole pages, or an equal part of one.

    Attributes
    ----------
    splits
        Parts of whole key tiles that the keys of every sequence are cut into, each in a thread block of its own: 1 as
        in the first version of the kernel; "v2" cuts partitions of 512 keys, rounded up to whole tiles, as many as a
        sequence has.
    """

    splits: int | Literal["v2"] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.splits != "v2":
            if isinstance(self.splits, str):
                raise ValueError(f"splits={self.splits!r}: expected an integer of at least 1 or 'v2'")
            object.__setattr__(self, "splits", checked_integer("splits", self.splits, 1))


# Tiled program


def decode(machine: Machine, problem: PagedProblem, plan: PagedPlan) -> None:
    """Attend in the sequences of each length, gathering their keys and values page by page."""
    pools = {name: machine.arrays[name] for name in ("k", "v", "block_table")}
    table = None if machine.arithmetic is None else checked_table(problem, pools["block_table"])
    cuts = {length: cut_of(length, plan) for length in problem.members()}
    arrays = parts.declare(
        machine, problem, pools["k"], pools["v"], max((cut.count for cut in cuts.values()), default=1)
    )
    for length, members in problem.members().items():
        caches = CacheProblem.of(problem, plan, batch=len(members), length=length)
        entries = None if table is None else table[members, : ceil_div(length, problem.page_size)]
        own = replace(arrays, **{name: gathered(problem, pools[name], length, entries) for name in ("k", "v")})
        pages = PageTable(table_of(problem, length, entries), problem.page_size)
        parts.decode_sequences(machine, caches, plan, own, cuts[length], members=members, table=pages)


def cut_of(length: int, plan: PagedPlan) -> Cut:
    """Return the parts of the keys of a sequence."""
    tile = plan.tiles.kv
    if plan.splits != "v2":
        return Cut.into(length, tile, plan.splits)
    rows = tile * ceil_div(PARTITION, tile)
    return Cut(length, rows, max(1, ceil_div(length, rows)))


def checked_table(problem: PagedProblem, table: Array) -> npt.NDArray[np.intp]:
    """Return the block table, whose entries for keys are pages; those beyond are not looked at.

    Raises
    ------
    ValueError
        If an entry is no page.
    """
    assert table.values is not None
    entries = table.values.reshape(problem.batch, problem.table_columns).astype(np.intp)
    taken = np.array([ceil_div(length, problem.page_size) for length in problem.lengths], dtype=np.intp)
    used = np.arange(problem.table_columns) < taken[:, None]
    wrong = np.argwhere(used & ((entries < 0) | (entries >= problem.pages)))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise ValueError(
            f"block_table[{row}, {column}] is {entries[row, column]}: expected a page from 0 to {problem.pages - 1}; "
            f"the {problem.lengths[row]} keys of sequence {row} take {taken[row]} pages of {problem.page_size}"
        )
    return entries


def gathered(problem: PagedProblem, pool: Array, length: int, entries: npt.NDArray[np.intp] | None) -> Array:
    """Return the keys or values of the sequences that have these pages, as an array that stands for the pool's."""
    columns, values = pool.columns // problem.kv_heads, None
    if entries is not None and pool.values is not None:
        pages = pool.values.reshape(problem.pages, problem.page_size, problem.kv_heads, columns)
        sequences, taken = entries.shape
        rows = pages[entries].reshape(sequences, taken * problem.page_size, problem.kv_heads, columns)[:, :length]
        streams = sequences * problem.kv_heads
        values = np.ascontiguousarray(np.moveaxis(rows, 2, 1)).reshape(streams, 1, length, columns)
    return Array(pool.name, "kv", length, columns, pool.dtype, pool.role, values)


def table_of(problem: PagedProblem, length: int, entries: npt.NDArray[np.intp] | None) -> Array:
    """Return the rows of the block table of the sequences that have these pages."""
    count = ceil_div(length, problem.page_size)
    values = None if entries is None else np.repeat(entries, problem.kv_heads, axis=0)[:, None, :, None]
    return Array("block_table", "kv", count, 1, "int32", "input", values)


# Reference


def reference(problem: PagedProblem, inputs: Mapping[str, Values], rounded: Rounding = exact) -> dict[str, Values]:
    """Compute the attention of each sequence to its keys, laid out in their order.

    Parameters
    ----------
    problem
        The problem.
    inputs
        ``q``, the pools ``k`` and ``v``, and ``block_table``, as callers give them, in the precision to compute in.
    rounded
        What scores, probabilities and outputs go through, such as a rounding to a storage format.

    Returns
    -------
    dict
        ``out``, shape (batch, q_len, heads, value_dim), and the natural log-sum-exp ``lse``, (batch, heads, q_len).
    """
    given = {item.name: getattr(problem, item.name) for item in fields(AttentionProblem)}
    out = np.zeros((problem.batch, problem.q_len, problem.heads, problem.value_dim), inputs["q"].dtype)
    lse = np.zeros((problem.batch, problem.heads, problem.q_len), inputs["q"].dtype)
    for row, length in enumerate(problem.lengths):
        sequence: dict[str, Values] = {"q": inputs["q"][row : row + 1]}
        for name in ("k", "v"):
            keys = [
                inputs[name][int(inputs["block_table"][row, key // problem.page_size]), key % problem.page_size]
                for key in range(length)
            ]
            empty = np.zeros((0, *inputs[name].shape[2:]), inputs[name].dtype)
            sequence[name] = np.stack(keys)[None] if keys else empty[None]
        alone = AttentionProblem(**{**given, "batch": 1, "kv_len": length})
        found = parts.reference(alone, sequence, rounded)
        out[row], lse[row] = found["out"][0], found["lse"][0]
    return {"out": out, "lse": lse}


# Closed form


def closed_form_decode(problem: PagedProblem, plan: PagedPlan) -> Traffic:
    """Add up the sequences of each length, with 4 bytes of the block table for each page of every tile of keys."""
    total = Traffic()
    for length, members in problem.members().items():
        caches = CacheProblem.of(problem, plan, batch=len(members), length=length)
        total = total + parts.closed_form(caches, plan, cut_of(length, plan).count, problem.page_size)
    return total


# Plans


def paper_tiles(problem: AttentionProblem, sram_elements: int, direction: Direction) -> Tiles:
    """One query and one page at a time."""
    assert isinstance(problem, PagedProblem)
    return Tiles(q=1, kv=problem.page_size)


def plan_defaults(
    problem: AttentionProblem, direction: Direction, kind: PlanKind, hardware: Hardware
) -> dict[str, Any]:
    """Return the paper's thread blocks, one for every query head, and the pipeline of a GPU's."""
    return {"query_heads": "one_per_block"} if kind == "paper" else {"stages": 2 if kind == "gpu" else 1}


def complete_plan(problem: AttentionProblem, plan: PagedPlan, sram_bytes: int) -> PagedPlan:
    """Refuse tiles that end inside a page.

    Raises
    ------
    ValueError
        If they have neither whole pages nor an equal part of one.
    """
    assert isinstance(problem, PagedProblem)
    if problem.key_tile(plan.tiles.kv) != plan.tiles.kv:
        raise ValueError(
            f"tiles.kv={plan.tiles.kv}: expected whole pages or an equal part of one, a multiple or a divisor of "
            f"page_size={problem.page_size}"
        )
    return plan


ALGORITHM = Algorithm(
    name="paged",
    title="PagedAttention",
    source="Kwon et al. 2023, arXiv 2309.06180, Section 4.1",
    summary="Decoding with keys and values in pages that a block table names, and lengths of their own.",
    family="decoding",
    plan_class=PagedPlan,
    problem_class=PagedProblem,
    reference=reference,
    programs={"decode": decode},
    closed_forms={"decode": closed_form_decode},
    paper_tiles=paper_tiles,
    fit_tiles=parts.fit_tiles,
    gpu_tiles=parts.gpu_tiles,
    plan_defaults=plan_defaults,
    complete_plan=complete_plan,
)
