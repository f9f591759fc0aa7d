"""Attention by online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867) in three, two or one passes over the keys.

Three passes: row maximum; row sum; output (the safe softmax). Two passes: maximum and sum together, corrected as the
maximum grows; output. One pass: the output too is corrected as it grows (Rabe & Staats 2021, arXiv 2112.05682). Scores
are computed again in every pass, so none of the forms holds them in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from simattn.algorithms import flash2, forms
from simattn.algorithms.algorithm import Algorithm, declare_output_and_lse
from simattn.algorithms.kernels import (
    BackwardArrays,
    GroupedGradient,
    declare_backward,
    declare_forward,
    descales,
    row_dots,
)
from simattn.algorithms.steps import (
    SavedStatistics,
    SoftmaxState,
    finish_softmax,
    load_statistics,
    masked_scores,
    score_gradients,
    update_softmax,
)
from simattn.machine import Array, Machine, Tile
from simattn.masks import Rows
from simattn.plan import Plan, Tiles, check_choice
from simattn.problem import AttentionProblem, Direction
from simattn.traffic import Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class OnlineSoftmaxPlan(Plan):
    """Plan of the online softmax.

    Attributes
    ----------
    passes
        Passes over the keys. Backward, three and two passes compute the statistics again; one pass takes the saved
        log-sum-exp.
    grouped_gradients
        "reduce" (every thread block adds to its KV head's sum) or "expand" (to its query head's sum, the group summed
        afterwards).
    """

    passes: Literal[1, 2, 3] = 2
    grouped_gradients: Literal["expand", "reduce"] = "reduce"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("passes", self.passes, (1, 2, 3))
        check_choice("grouped_gradients", self.grouped_gradients, ("expand", "reduce"))


# Tiled program


def forward(machine: Machine, problem: AttentionProblem, plan: OnlineSoftmaxPlan) -> None:
    """Each thread block keeps one query tile and passes over the keys, the last time with the values."""
    arrays = declare_forward(machine, problem, plan)
    tiles, place = plan.tiles, plan.accumulators
    width = max(tiles.kv, problem.head_dim, problem.value_dim)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q, width=width):
        # load
        q = machine.load(arrays.q, query_rows)
        factors = descales(machine, "q", "k")
        state = SoftmaxState.empty(machine, query_rows, problem.value_dim, place)
        for statistic in PASSES_BEFORE_THE_LAST[plan.passes]:
            for key_rows in machine.tiles(problem.visible_keys(query_rows), tiles.kv):
                # load
                k = machine.load(arrays.k, key_rows)
                # compute
                scores, _ = masked_scores(machine, q, k, query_rows, key_rows, place=place, descales=factors)
                update_statistics(machine, statistic, scores, state.row_max, state.row_sum)
        for key_rows in machine.tiles(problem.visible_keys(query_rows), tiles.kv):
            # load
            k = machine.load(arrays.k, key_rows)
            v = machine.load(arrays.v, key_rows)
            # compute
            scores, hidden = masked_scores(machine, q, k, query_rows, key_rows, place=place, descales=factors)
            if plan.passes == 1:
                update_softmax(machine, state, scores, v, hidden)
            else:
                machine.exponential(scores, state.row_max)
                machine.matmul(scores, v, place=place, hidden=hidden, into=state.out)
        # finish
        finish_softmax(machine, state, arrays, query_rows, descales=descales(machine, "v"))


Statistic = Literal["maximum", "sum", "both"]
PASSES_BEFORE_THE_LAST: dict[int, tuple[Statistic, ...]] = {1: (), 2: ("both",), 3: ("maximum", "sum")}
"""What each pass before the last finds, by number of passes."""


def update_statistics(
    machine: Machine, statistic: Statistic, scores: Tile, row_max: Tile, row_sum: Tile
) -> Tile | None:
    """Take one tile of scores into the row maximum, the row sum or both; return the correction of both."""
    correction = None if statistic == "sum" else machine.update_row_max(row_max, scores)
    if statistic != "maximum":
        machine.exponential(scores, row_max)
        machine.update_row_sum(row_sum, scores, correction=correction)
    return correction


def declare_saved(machine: Machine, problem: AttentionProblem, plan: OnlineSoftmaxPlan) -> None:
    """Declare what the forward pass saves: output and log-sum-exp, which only one pass needs."""
    if plan.passes == 1:
        declare_output_and_lse(machine, problem, plan)


def backward(machine: Machine, problem: AttentionProblem, plan: OnlineSoftmaxPlan) -> None:
    """Each thread block keeps one query tile and its dQ, and adds its share of dK and dV to memory."""
    arrays = declare_backward(machine, problem, plan)
    delta = None
    if plan.passes == 1:
        delta = machine.array("delta", problem.q_len, 1)
        row_dots(machine, machine.arrays["out"], arrays.dout, delta, plan)
    dk_total = GroupedGradient.declare(machine, arrays.dk, plan, added_up=True)
    dv_total = GroupedGradient.declare(machine, arrays.dv, plan, added_up=True)
    tiles, place = plan.tiles, plan.accumulators
    width = max(tiles.kv, problem.head_dim, problem.value_dim)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q, width=width):
        # load
        q = machine.load(arrays.q, query_rows)
        dout = machine.load(arrays.dout, query_rows)
        dq = machine.full("dq", query_rows, problem.head_dim, 0.0, place=place)
        statistics = find_statistics(machine, problem, plan, arrays, q, dout, query_rows, delta)
        for key_rows in machine.tiles(problem.visible_keys(query_rows), tiles.kv):
            # load
            k = machine.load(arrays.k, key_rows)
            v = machine.load(arrays.v, key_rows)
            # compute
            probabilities, dscores, hidden = score_gradients(
                machine, q, k, v, dout, statistics, query_rows, key_rows, place=place
            )
            machine.scale(dscores, problem.scale)
            machine.matmul(dscores, k, place=place, hidden=hidden, into=dq)
            dv = machine.matmul(probabilities, dout, place=place, name="dv", transpose_a=True, hidden=hidden)
            dk = machine.matmul(dscores, q, place=place, name="dk", transpose_a=True, hidden=hidden)
            # finish
            dv_total.add(machine, dv, key_rows)
            dk_total.add(machine, dk, key_rows)
        # finish
        machine.store(dq, arrays.dq, query_rows)
    dk_total.finish(machine, plan)
    dv_total.finish(machine, plan)


def find_statistics(
    machine: Machine,
    problem: AttentionProblem,
    plan: OnlineSoftmaxPlan,
    arrays: BackwardArrays,
    q: Tile,
    dout: Tile,
    query_rows: Rows,
    saved_delta: Array | None,
) -> SavedStatistics:
    """Load the saved statistics, or find row maximum, row sum and delta = Σ P ∘ dP by passes over the keys."""
    if saved_delta is not None:
        return load_statistics(machine, saved_delta, query_rows)
    place = plan.accumulators
    row_max = machine.full("row_max", query_rows, 1, -math.inf, place=place)
    row_sum = machine.full("row_sum", query_rows, 1, 0.0, place=place)
    delta = machine.full("delta", query_rows, 1, 0.0, place=place)
    for statistic in PASSES_BEFORE_THE_LAST[plan.passes]:
        for key_rows in machine.tiles(problem.visible_keys(query_rows), plan.tiles.kv):
            # load
            k = machine.load(arrays.k, key_rows)
            # compute
            scores, hidden = masked_scores(machine, q, k, query_rows, key_rows, place=place)
            correction = update_statistics(machine, statistic, scores, row_max, row_sum)
            if statistic != "maximum":
                # load
                v = machine.load(arrays.v, key_rows)
                # compute
                dscores = machine.matmul(dout, v, place=place, name="dscores", transpose_b=True)
                machine.hide(dscores, hidden, 0.0)
                if correction is not None:
                    machine.rescale(delta, correction)
                machine.row_dot(scores, dscores, into=delta)
    machine.normalise(delta, row_sum)
    return SavedStatistics(delta=delta, row_max=row_max, row_sum=row_sum)


# Closed form


def closed_form_forward(problem: AttentionProblem, plan: OnlineSoftmaxPlan) -> Traffic:
    """Return FlashAttention-2's traffic with K read once more for every pass before the last."""
    visits = forms.tile_visits(problem, plan.tiles)
    once = flash2.closed_form_forward(problem, plan)
    again = forms.matrix_bytes(problem, (plan.passes - 1) * visits.keys, problem.head_dim)
    return once + Traffic({forms.key_names(plan)[0]: forms.read(again)})


def closed_form_backward(problem: AttentionProblem, plan: OnlineSoftmaxPlan) -> Traffic:
    """Q, dO, dQ once, K and V once for every pass that needs them, dK and dV added up in memory."""
    visits = forms.tile_visits(problem, plan.tiles)
    d, value_dim = problem.head_dim, problem.value_dim
    k, v = forms.key_names(plan)
    key_passes, value_passes = {1: (1, 1), 2: (2, 2), 3: (3, 2)}[plan.passes]
    dout = forms.read(forms.matrix_bytes(problem, problem.q_len, value_dim))
    statistic = forms.statistic_bytes(problem, problem.q_len)
    parts = [
        {
            "q": forms.read(forms.matrix_bytes(problem, problem.q_len, d)),
            "dout": dout,
            "dq": forms.written(forms.matrix_bytes(problem, problem.q_len, d)),
            k: forms.read(key_passes * forms.matrix_bytes(problem, visits.keys, d)),
            v: forms.read(value_passes * forms.matrix_bytes(problem, visits.keys, value_dim)),
        }
    ]
    if plan.passes == 1:
        out = forms.matrix_bytes(problem, problem.q_len, value_dim, dtype=problem.output_dtype)
        parts.append(
            {
                "out": forms.read(out),
                "dout": dout,
                "delta": forms.written(statistic) + forms.read(statistic),
                "lse": forms.read(statistic),
            }
        )
    heads = problem.kv_heads if plan.grouped_gradients == "reduce" else problem.heads
    for name, columns in (("dk", d), ("dv", value_dim)):
        sums = forms.matrix_bytes(problem, problem.kv_len, columns, heads=heads, dtype="float32")
        added = forms.matrix_bytes(problem, visits.keys, columns, dtype="float32")
        result = forms.matrix_bytes(problem, problem.kv_len, columns, heads=problem.kv_heads)
        parts.append(
            {
                f"{name}_accumulator": forms.written(sums) + forms.reduced(added) + forms.read(sums),
                name: forms.written(result),
            }
        )
    return forms.total(parts)


# Plans


def fit_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """Tiles that grow along the queries, the outer loop's axis in both directions, and along the keys up to d."""
    return flash2.fit_tiles(problem, size, "forward")


ALGORITHM = Algorithm(
    name="online_softmax",
    title="Online softmax",
    source="Milakov & Gimelshein 2018, arXiv 1805.02867, Algorithms 1 to 3; Rabe & Staats 2021, arXiv 2112.05682",
    summary="Each thread block keeps a query tile and passes over the keys three times, twice or once.",
    plan_class=OnlineSoftmaxPlan,
    programs={"forward": forward, "backward": backward},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward},
    paper_tiles=flash2.paper_tiles,
    fit_tiles=fit_tiles,
    gpu_tiles=flash2.gpu_tiles,
    declare_saved=declare_saved,
)
