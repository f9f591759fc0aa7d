"""The rules by which counts decide a claim, and the counting that the claims share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from simattn.algorithms import ALGORITHMS
from simattn.api import Run, profile
from simattn.bounds import PowerLaw, fit_exponents
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, HOLDS_WITH_CONSTANT, Evidence, Verdict
from simattn.machine import CapacityError

SPREAD_LIMIT = 3.0
"""Largest allowed c_high / c_low of a Θ claim.

Every variable spans at least a factor of 16, so a law that is wrong by half a power of any of them has a spread of at
least 4.
"""

DRIFT_LIMIT = 0.05
"""Largest residual exponent of counted / bound in the half of the range that lies further into the limit."""

FLOAT32_BYTES = 4


@lru_cache(maxsize=8192)
def counted(algorithm: str, **arguments: Any) -> Run:
    """Return :func:`simattn.profile` of these arguments, counted once."""
    return profile(algorithm, **arguments)


def elements(algorithm: str, *, sram_elements: int | None = None, **arguments: Any) -> int:
    """Return the elements that a program in float32 moves, all arrays and directions together."""
    if sram_elements is not None:
        arguments["sram_bytes"] = FLOAT32_BYTES * sram_elements
    return counted(algorithm, dtype="float32", **arguments).traffic.hbm_bytes // FLOAT32_BYTES


def fused_algorithms() -> list[str]:
    """Return the registered FlashAttention programs."""
    return [name for name in ALGORITHMS if name.startswith("flash")]


def forward_algorithms() -> list[str]:
    """Return every registered program with a forward pass."""
    return [
        name for name, algorithm in ALGORITHMS.items() if algorithm.takes_any_mask and "forward" in algorithm.programs
    ]


@dataclass(frozen=True)
class Point:
    """A problem and a memory size: N rows, d columns, M on-chip elements, and whether it lies far into the limit."""

    length: int
    head_dim: int
    sram_elements: int
    deep: bool

    @property
    def problem(self) -> dict[str, int]:
        """The arguments of :func:`elements`."""
        return {"q_len": self.length, "head_dim": self.head_dim, "sram_elements": self.sram_elements}


HEAD_DIMS = (32, 128, 512)
MEMORY_RATIOS = (1, 8, 64, 512, 4096)
LENGTH_RATIOS = (1, 16, 256)

LARGE_MEMORY = tuple(
    Point(length * memory * d, d, memory * d * d, deep=memory >= 64 and length >= 16)
    for d in HEAD_DIMS
    for memory in MEMORY_RATIOS
    for length in LENGTH_RATIOS
)
"""d² ≤ M ≤ Nd: M/d² and Nd/M on grids, far into the limit from the middles of both."""

LARGE_MEMORY_RANGE = "d = 32, 128, 512; M = 1…4096 d² elements; N = 1…256 M/d; float32, plan fit"

SMALL_MEMORY = tuple(
    Point(length, d, d * d // ratio, deep=ratio >= 64)
    for d in (128, 512, 2048)
    for ratio in (4, 16, 64, 256, 1024)
    for length in (1 << 14, 1 << 18)
    if d * d // ratio >= d
)
"""d ≤ M < d²: d²/M on a grid, far into the limit from its middle."""

SMALL_MEMORY_RANGE = "d = 128, 512, 2048; M = d²/4…d²/1024 elements, at least d; N = 2¹⁴, 2¹⁸; float32, plan fit"


@dataclass(frozen=True)
class Ratio:
    """Counted elements over a bound: the least and largest, the fitted law, and the drift far into the limit."""

    low: float
    high: float
    law: PowerLaw
    drift: PowerLaw

    @property
    def verdict(self) -> Verdict:
        """Whether the bound is met up to a constant: small spread over all points, no drift far into the limit."""
        steady = all(abs(exponent) <= DRIFT_LIMIT for exponent in self.drift.exponents.values())
        return HOLDS_WITH_CONSTANT if steady and self.high <= SPREAD_LIMIT * self.low else DOES_NOT_HOLD

    @property
    def text(self) -> str:
        """The ratio in words."""
        worst = max(self.drift.exponents.values(), key=abs)
        return (
            f"c = {self.low:.3g}…{self.high:.3g}; far into the limit counted ∝ {self.law}, "
            f"largest residual exponent {worst:+.3f}"
        )

    @property
    def numbers(self) -> dict[str, Any]:
        """The ratio as JSON values."""
        return {
            "c_low": self.low,
            "c_high": self.high,
            "exponents": dict(self.law.exponents),
            "standard_errors": dict(self.law.standard_errors),
            "residual_exponents": dict(self.drift.exponents),
            "points": self.law.points,
        }


def compare(
    points: Sequence[Point],
    count: Callable[[Point], float],
    bound: Callable[[int, int, int], float],
    variables: Sequence[str] = ("N", "d", "M"),
) -> Ratio:
    """Hold counts against a bound of (N, d, M) at every point."""
    rows = []
    for point in points:
        value = count(point)
        n, d, m = point.length, point.head_dim, point.sram_elements
        rows.append({"N": n, "d": d, "M": m, "elements": value, "ratio": value / bound(n, d, m)})
    deep = [row for row, point in zip(rows, points, strict=True) if point.deep]
    ratios = [row["ratio"] for row in rows]
    return Ratio(
        min(ratios),
        max(ratios),
        fit_exponents(deep, variables, "elements"),
        fit_exponents(deep, variables, "ratio"),
    )


def theta_evidence(ratio: Ratio, range_tested: str) -> Evidence:
    """Judge a Θ claim."""
    return Evidence(range_tested=range_tested, counted=ratio.text, verdict=ratio.verdict, numbers=ratio.numbers)


def equality_evidence(pairs: Iterable[tuple[Any, Any]], range_tested: str, formula: str, **numbers: Any) -> Evidence:
    """Judge a claim that every count equals a formula: (counted, stated) pairs, compared exactly."""
    pairs = list(pairs)
    different = [pair for pair in pairs if pair[0] != pair[1]]
    holds = bool(pairs) and not different
    counted_text = (
        f"{formula}: equal in all {len(pairs)} cases"
        if holds
        else f"{formula}: differs in {len(different)} of {len(pairs)} cases"
    )
    if different:
        counted_text += f", first {different[0][0]:,} counted against {different[0][1]:,}"
    return Evidence(
        range_tested=range_tested,
        counted=counted_text,
        verdict=HOLDS if holds else DOES_NOT_HOLD,
        numbers={"cases": len(pairs), "different": len(different), **numbers},
    )


def best_elements(point: Point, direction: str = "forward") -> tuple[int, str]:
    """Return the least elements that any registered program moves at a point, and which program it is."""
    found = []
    for name, algorithm in ALGORITHMS.items():
        if not algorithm.takes_any_mask:
            continue
        if direction in algorithm.programs:
            try:
                found.append((elements(name, direction=direction, **point.problem), name))
            except CapacityError:
                continue  # its smallest tile is larger than M
    return min(found)


def crossing(function: Callable[[int], float], low: int, high: int) -> int:
    """Return the smallest integer in low … high at which a function that grows from below 0 is at least 0.

    Raises
    ------
    ValueError
        If it does not change its sign in the range.
    """
    if not function(low) < 0 <= function(high):
        raise ValueError(f"low={low}, high={high}: expected a change of sign between them")
    while high - low > 1:
        middle = math.isqrt(low * high) if high > 4 * low else (low + high) // 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high
