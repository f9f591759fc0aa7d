"""Split-KV decoding (Flash-Decoding, Dao et al. 2023): parts of the keys in thread blocks of their own, then a merge.

A decoding step has few query rows and so few thread blocks; cutting the keys gives every multiprocessor some of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from simattn.algorithms import parts
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.parts import CacheProblem, Cut, DecodePlan, DecodeProblem
from simattn.hardware import Hardware
from simattn.machine import Machine
from simattn.plan import PlanKind
from simattn.problem import AttentionProblem, Direction, checked_integer
from simattn.sums import ceil_div
from simattn.traffic import Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class SplitKVProblem(DecodeProblem):
    """A decoding step on contiguous caches of one length."""


@dataclass(frozen=True, kw_only=True)
class SplitKVPlan(DecodePlan):
    """Plan of split-KV decoding.

    Attributes
    ----------
    splits
        Parts of whole key tiles that the keys are cut into, all of ⌈T_c / splits⌉ tiles but the last ones, which may be
        empty. None takes as many as run at once, a thread block on each multiprocessor, and no empty ones.
    multiprocessors
        What ``splits=None`` goes by; default those of the GPU.
    """

    splits: int | None = None
    multiprocessors: int = 132

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "multiprocessors", checked_integer("multiprocessors", self.multiprocessors, 1))
        if self.splits is not None:
            object.__setattr__(self, "splits", checked_integer("splits", self.splits, 1))


def splits_that_fill(problem: AttentionProblem, plan: SplitKVPlan) -> int:
    """Return how many parts make a thread block for each multiprocessor, none of them empty."""
    packed = plan.packed_heads(problem)
    query_tiles = ceil_div(problem.q_len * packed, plan.tiles.q)
    blocks = problem.batch * (problem.heads // packed) * query_tiles
    key_tiles = max(1, ceil_div(problem.kv_len, plan.tiles.kv))
    wanted = max(1, min(key_tiles, plan.multiprocessors // max(1, blocks)))
    return ceil_div(key_tiles, ceil_div(key_tiles, wanted))


# Tiled program


def decode(machine: Machine, problem: SplitKVProblem, plan: SplitKVPlan) -> None:
    """Attend to each part of the keys in thread blocks of its own; a second kernel merges what they found."""
    cut = cut_of(problem, plan)
    arrays = parts.declare(machine, problem, machine.arrays["k"], machine.arrays["v"], cut.count)
    caches = CacheProblem.of(problem, plan, batch=problem.batch, length=problem.kv_len)
    parts.decode_sequences(machine, caches, plan, arrays, cut)


def cut_of(problem: AttentionProblem, plan: SplitKVPlan) -> Cut:
    """Return the parts of the keys."""
    splits = splits_that_fill(problem, plan) if plan.splits is None else plan.splits
    return Cut.into(problem.kv_len, plan.tiles.kv, splits)


# Closed form


def closed_form_decode(problem: SplitKVProblem, plan: SplitKVPlan) -> Traffic:
    """Q once for every part, K and V once for every query tile that sees them, what parts find there and back."""
    caches = CacheProblem.of(problem, plan, batch=problem.batch, length=problem.kv_len)
    return parts.closed_form(caches, plan, cut_of(problem, plan).count)


# Plans


def plan_defaults(
    problem: AttentionProblem, direction: Direction, kind: PlanKind, hardware: Hardware
) -> dict[str, Any]:
    """Return the GPU's multiprocessors, and the pipeline of its kernels."""
    return {"multiprocessors": hardware.streaming_multiprocessors, "stages": 2 if kind == "gpu" else 1}


def complete_plan(problem: AttentionProblem, plan: SplitKVPlan, sram_bytes: int) -> SplitKVPlan:
    """Settle the number of parts."""
    return replace(plan, splits=splits_that_fill(problem, plan)) if plan.splits is None else plan


ALGORITHM = Algorithm(
    name="split_kv",
    title="Split-KV decoding",
    source="Dao et al. 2023, Flash-Decoding for long-context inference, pytorch.org/blog/flash-decoding",
    summary="Parts of a cache in thread blocks of their own, whose results a second kernel merges.",
    family="decoding",
    plan_class=SplitKVPlan,
    problem_class=SplitKVProblem,
    reference=parts.reference,
    programs={"decode": decode},
    closed_forms={"decode": closed_form_decode},
    paper_tiles=parts.paper_tiles,
    fit_tiles=parts.fit_tiles,
    gpu_tiles=parts.gpu_tiles,
    plan_defaults=plan_defaults,
    complete_plan=complete_plan,
)
