"""Attention for a small cache, M < d² (the regime of Saha & Ye 2024, arXiv 2402.07443, Theorem 3.1).

A tile of the scores is b × b with b² of the order of M, so a row of Q no longer fits beside it: the head dimension
comes in chunks, and the running output goes through memory. 5N²d/b elements, 10N²d/√M at b = √(M/4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from simattn.algorithms import forms
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.kernels import declare_forward, descales, fill
from simattn.hardware import Hardware
from simattn.machine import Machine
from simattn.plan import Plan, Tiles, candidates, cubic_tiles, depth_of
from simattn.problem import AttentionProblem, Direction
from simattn.traffic import Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class SmallCachePlan(Plan):
    """Plan of the small-cache program: ``tiles.depth`` columns of the head and value dimensions at a time."""


# Tiled program


def forward(machine: Machine, problem: AttentionProblem, plan: SmallCachePlan) -> None:
    """Each thread block walks the tiles of one row of score tiles; Q, K, V and O stream past in chunks of columns."""
    arrays = declare_forward(machine, problem, plan)
    apart = problem.output_dtype != "float32"
    sums = arrays.out
    if apart:
        sums = machine.array("out_accumulator", problem.q_len, problem.value_dim)
    fill(machine, sums, 0.0, plan)
    tiles, place = plan.tiles, plan.accumulators
    depth, value_depth = depth_of(plan, problem.head_dim), depth_of(plan, problem.value_dim)
    width = max(tiles.kv, depth, value_depth)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q, width=width):
        factors = descales(machine, "q", "k")
        row_max = machine.full("row_max", query_rows, 1, -math.inf, place=place)
        row_sum = machine.full("row_sum", query_rows, 1, 0.0, place=place)
        for key_rows in machine.tiles(problem.visible_keys(query_rows), tiles.kv):
            scores = machine.full("scores", query_rows, key_rows, 0.0, place=place)
            for columns in machine.tiles(problem.head_dim, depth):
                # load
                q = machine.load(arrays.q, query_rows, columns)
                k = machine.load(arrays.k, key_rows, columns)
                # compute
                machine.scores(q, k, place=place, descales=factors, into=scores)
            hidden = machine.hidden_elements(query_rows, key_rows)
            machine.hide(scores, hidden, -math.inf)
            correction = machine.update_row_max(row_max, scores)
            machine.exponential(scores, row_max)
            machine.update_row_sum(row_sum, scores, correction=correction)
            for columns in machine.tiles(problem.value_dim, value_depth):
                # load
                v = machine.load(arrays.v, key_rows, columns)
                out = machine.load(sums, query_rows, columns, place=place, name="out")
                # compute
                machine.rescale(out, correction)
                machine.matmul(scores, v, place=place, hidden=hidden, into=out)
                # finish
                machine.store(out, sums, query_rows, columns)
        # finish
        value_factors = descales(machine, "v")
        for columns in machine.tiles(problem.value_dim, value_depth):
            out = machine.load(sums, query_rows, columns, place=place, name="out")
            machine.normalise(out, row_sum)
            for factor in value_factors:
                machine.scale(out, factor)
            machine.store(out, arrays.out, query_rows, columns)
        machine.store(machine.log_sum_exp(row_max, row_sum), arrays.lse, query_rows)


# Closed form


def closed_form_forward(problem: AttentionProblem, plan: SmallCachePlan) -> Traffic:
    """For every pair of tiles: Q, K, V once and O both ways; O zeroed first and normalised last."""
    visits = forms.tile_visits(problem, plan.tiles)
    d, value_dim = problem.head_dim, problem.value_dim
    k, v = forms.key_names(plan)
    apart = problem.output_dtype != "float32"
    whole = forms.matrix_bytes(problem, problem.q_len, value_dim, dtype="float32")
    visited = forms.matrix_bytes(problem, visits.queries, value_dim, dtype="float32")
    out = forms.matrix_bytes(problem, problem.q_len, value_dim, dtype=problem.output_dtype)
    main = {
        "q": forms.read(forms.matrix_bytes(problem, visits.queries, d)),
        k: forms.read(forms.matrix_bytes(problem, visits.keys, d)),
        v: forms.read(forms.matrix_bytes(problem, visits.keys, value_dim)),
        "lse": forms.written(forms.statistic_bytes(problem, problem.q_len)),
    }
    sums = forms.written(whole) + forms.read(visited) + forms.written(visited) + forms.read(whole)
    factors = forms.descale_traffic(problem, dict.fromkeys(("q", "k", "v"), visits.query_tiles))
    return forms.total(
        [
            main,
            {"out_accumulator" if apart else "out": sums},
            {"out": forms.written(out)},
            factors,
            *forms.repeat_traffic(problem, plan),
        ]
    )


# Plans


def paper_tiles(problem: AttentionProblem, sram_elements: int, direction: Direction) -> Tiles:
    """B = √(M/4): a tile of scores beside two or three tiles as large."""
    return cubic_tiles(problem, max(1, math.isqrt(sram_elements // 4)), direction)


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return square tiles with chunks of 32 columns."""
    return [Tiles(q=tiles.q, kv=tiles.kv, depth=32) for tiles in candidates(direction)]


ALGORITHM = Algorithm(
    name="small_cache",
    title="Small-cache attention",
    source="Saha & Ye 2024, arXiv 2402.07443, Theorem 3.1 (the bound; the program is this project's)",
    summary="Score tiles of about M elements; the head dimension in chunks and the running output through memory.",
    plan_class=SmallCachePlan,
    programs={"forward": forward},
    closed_forms={"forward": closed_form_forward},
    paper_tiles=paper_tiles,
    fit_tiles=cubic_tiles,
    gpu_tiles=gpu_tiles,
    chunks_columns=True,
)
