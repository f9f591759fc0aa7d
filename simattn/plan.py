"""Plans: the tiles and variants that fix a program's byte counts and the order of its sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from simattn.machine import Place
from simattn.problem import AttentionProblem, Direction, checked_integer

PlanKind = Literal["paper", "fit", "gpu"]
PLAN_KINDS: tuple[PlanKind, ...] = ("paper", "fit", "gpu")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes in rows.

    Attributes
    ----------
    q, kv
        Query rows and key/value rows of a tile.
    depth
        Columns of the head and value dimensions handled at a time; None is all of them.
    """

    q: int
    kv: int
    depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("q", "kv", "depth"):
            value = getattr(self, name)
            if not (name == "depth" and value is None):
                object.__setattr__(self, name, checked_integer(f"tiles.{name}", value, 1))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every algorithm's plan holds.

    Attributes
    ----------
    tiles
        Tile sizes. A pair (q, kv), a triple (q, kv, depth) or a mapping is taken too.
    accumulators
        Where scores, running sums and output accumulators live.
    enforce_capacity
        Whether tiles beyond the on-chip memory are an error. The papers' formulas exceed it.
    repeat_kv
        Whether grouped keys and values are first copied out to every query head, as ``repeat_kv`` does.
    grouped_gradients
        How the query heads of a KV head sum dK and dV: "loop" (one thread block walks the group's heads),
        "expand" (one dK and dV per query head, summed by a kernel of its own) or "reduce" (fp32 reduction into
        memory, then a conversion).
    """

    tiles: Tiles
    accumulators: Place = "registers"
    enforce_capacity: bool = True
    repeat_kv: bool = False
    grouped_gradients: Literal["loop", "expand", "reduce"] = "loop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", _checked_tiles(self.tiles))
        check_choice("accumulators", self.accumulators, ("registers", "sram"))
        check_flag("enforce_capacity", self.enforce_capacity)
        check_flag("repeat_kv", self.repeat_kv)
        check_choice("grouped_gradients", self.grouped_gradients, ("loop", "expand", "reduce"))
        if self.repeat_kv and self.grouped_gradients == "loop":
            # Keys copied out to every head have one gradient per head, to be summed afterwards.
            object.__setattr__(self, "grouped_gradients", "expand")


PlanT = TypeVar("PlanT", bound=Plan)


def depth_of(plan: Plan, columns: int) -> int:
    """Return the columns of a chunk of the head dimension: the plan's, and no more than there are."""
    return columns if plan.tiles.depth is None else min(plan.tiles.depth, columns)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {choices}")


def check_flag(name: str, value: object) -> None:
    """Raise a TypeError unless the value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected a bool")


def _checked_tiles(tiles: Any) -> Tiles:
    if isinstance(tiles, Tiles):
        return tiles
    if isinstance(tiles, dict):
        unknown = set(tiles) - {"q", "kv", "depth"}
        if unknown or not {"q", "kv"} <= set(tiles):
            raise ValueError(f"tiles={tiles!r}: expected the keys 'q' and 'kv', and 'depth' if wanted")
        return Tiles(**tiles)
    if isinstance(tiles, (tuple, list)) and len(tiles) in (2, 3):
        return Tiles(q=tiles[0], kv=tiles[1], depth=tiles[2] if len(tiles) == 3 else None)
    raise TypeError(f"tiles={tiles!r}: expected simattn.Tiles, (q, kv), (q, kv, depth) or a mapping")


def check_tiles_divide_blocks(problem: AttentionProblem, tiles: Tiles) -> None:
    """Raise a ValueError unless the tiles divide the blocks of the block mask, if there is one."""
    if problem.block_mask is None:
        return
    for name, tile, block in (
        ("q", tiles.q, problem.block_mask.q_block),
        ("kv", tiles.kv, problem.block_mask.kv_block),
    ):
        if block % tile:
            raise ValueError(f"tiles.{name}={tile} does not divide block_mask.{name}_block={block}")


def dividing_tiles(problem: AttentionProblem, tiles: Tiles) -> Tiles:
    """Return the largest tiles no larger than these that the keys' storage allows, or that divide a mask's blocks."""
    mask = problem.block_mask
    if mask is None:
        return replace(tiles, kv=problem.key_tile(tiles.kv))
    return replace(tiles, q=largest_divisor(mask.q_block, tiles.q), kv=largest_divisor(mask.kv_block, tiles.kv))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number up to a limit of at least 1."""
    if number <= limit:
        return number
    best, divisor = 1, 1
    while divisor * divisor <= number:
        if number % divisor == 0:
            for candidate in (divisor, number // divisor):
                if best < candidate <= limit:
                    best = candidate
        divisor += 1
    return best


def largest_fitting(fits: Callable[[int], bool]) -> int | None:
    """Return the largest positive integer that fits, by doubling and bisection; None if 1 does not."""
    if not fits(1):
        return None
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def first_fitting(candidates: Iterable[Tiles], fits: Callable[[Tiles], bool]) -> Tiles | None:
    """Return the first candidate that fits, or None."""
    return next((tiles for tiles in candidates if fits(tiles)), None)


def cubic_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """Return square tiles with chunks of as many columns, up to the head dimension."""
    return Tiles(q=size, kv=size, depth=min(size, max(problem.head_dim, problem.value_dim)))


FORWARD_CANDIDATES = (
    (128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 16), (16, 16), (16, 8), (8, 8), (4, 4), (2, 2), (1, 1),
)  # fmt: skip
BACKWARD_CANDIDATES = (
    (128, 128), (64, 128), (64, 64), (32, 64), (32, 32), (16, 32), (16, 16), (8, 16), (8, 8), (4, 4), (2, 2), (1, 1),
)  # fmt: skip


def candidates(direction: Direction, first: tuple[int, int] | None = None) -> list[Tiles]:
    """Return GPU tile sizes from large to small, starting at ``first`` if given."""
    sizes = list(FORWARD_CANDIDATES if direction == "forward" else BACKWARD_CANDIDATES)
    if first is not None:
        sizes = [first] + [size for size in sizes if size[0] * size[1] < first[0] * first[1]]
    return [Tiles(q=q, kv=kv) for q, kv in sizes]
