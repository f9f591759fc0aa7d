"""Plans of Native Sparse Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simattn.algorithms.flash2 import Flash2Plan
from simattn.algorithms.nsa.problem import NsaProblem
from simattn.hardware import Hardware
from simattn.plan import Plan, Tiles, candidates, check_choice
from simattn.problem import AttentionProblem, Direction, checked_integer
from simattn.sums import ceil_div


@dataclass(frozen=True, kw_only=True)
class NsaPlan(Plan):
    """Plan of Native Sparse Attention, whose tiles hold the rows of all query heads of a KV head.

    ``tiles.q`` are query positions, and ``tiles.kv`` keys of the window branch and, rounded to whole blocks of the
    selection, of the compressed one.

    Attributes
    ----------
    positions
        Query positions of a thread block of the selected branch, which loads the blocks that any of them has chosen:
        1 is the paper's.
    compressed_rows
        Compressed rows that a thread block of the compression makes; None is as many as begin within ``tiles.kv`` keys.
    """

    positions: int = 1
    compressed_rows: int | None = None
    repeat_kv: Literal[False] = False
    grouped_gradients: Literal["loop"] = "loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "positions", checked_integer("positions", self.positions, 1))
        if self.compressed_rows is not None:
            object.__setattr__(self, "compressed_rows", checked_integer("compressed_rows", self.compressed_rows, 1))
        check_choice("repeat_kv", self.repeat_kv, (False,))
        check_choice("grouped_gradients", self.grouped_gradients, ("loop",))


@dataclass(frozen=True)
class Sizes:
    """Tile sizes that follow from a problem and a plan, in rows.

    Attributes
    ----------
    positions
        Query positions of a tile of the compressed and window branches.
    queries
        Their packed rows.
    selecting
        Packed rows of a thread block of the selected branch.
    compressed, window
        Rows of a tile of compressed and of window keys.
    compression
        Compressed rows that a thread block of the compression makes.
    """

    positions: int
    queries: int
    selecting: int
    compressed: int
    window: int
    compression: int

    @classmethod
    def of(cls, problem: NsaProblem, plan: NsaPlan) -> Sizes:
        """Return the sizes."""
        ratio, tiles = problem.stride_ratio, plan.tiles
        return cls(
            positions=tiles.q,
            queries=tiles.q * problem.group_size,
            selecting=plan.positions * problem.group_size,
            compressed=max(ratio, tiles.kv // ratio * ratio),
            window=tiles.kv,
            compression=plan.compressed_rows or max(1, tiles.kv // problem.compression_stride),
        )


def inner_plan(plan: NsaPlan, queries: int, keys: int) -> Flash2Plan:
    """Return the plan of FlashAttention-2's loop in a branch."""
    return Flash2Plan(tiles=Tiles(q=queries, kv=keys), accumulators=plan.accumulators)


def paper_tiles(problem: AttentionProblem, sram_elements: int, direction: Direction) -> Tiles:
    """FlashAttention's formula, which the paper's dense branches take, in whole positions: B_c = ⌈M/4d⌉, B_r ≤ d."""
    columns = ceil_div(sram_elements, 4 * problem.head_dim)
    return Tiles(q=max(1, min(columns, problem.head_dim) // problem.group_size), kv=columns)


def fit_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """Tiles of as many positions as the integer says, and of up to d keys."""
    return Tiles(q=size, kv=min(size * problem.group_size, max(problem.head_dim, problem.value_dim)))


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return the tiles of FlashAttention-2 in whole positions, from large to small."""
    first = (64, 128) if direction == "backward" else (128, 64)
    return [
        Tiles(q=max(1, tiles.q // problem.group_size), kv=tiles.kv)
        for tiles in candidates("backward" if direction == "backward" else "forward", first)
    ]
