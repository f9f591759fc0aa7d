"""FlashAttention (Dao et al. 2022, arXiv 2205.14135): outer loop over keys, running softmax kept in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from simattn.algorithms import flash2, forms
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.kernels import (
    GroupedGradient,
    convert,
    declare_backward,
    declare_forward,
    descales,
    fill,
    key_blocks,
)
from simattn.algorithms.steps import (
    SavedStatistics,
    SoftmaxState,
    masked_scores,
    score_gradients,
    update_softmax,
)
from simattn.hardware import Hardware
from simattn.machine import Array, Machine
from simattn.plan import Plan, Tiles, check_choice
from simattn.problem import AttentionProblem, Direction
from simattn.traffic import ArrayTraffic, Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class Flash1Plan(Plan):
    """Plan of FlashAttention.

    Attributes
    ----------
    hbm_accumulator
        Type of O and dQ while they go through memory in every inner step: "float32", converted once at the end, or
        "storage", the output's own type, as the paper's Algorithm 1 reads.
    """

    hbm_accumulator: Literal["float32", "storage"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("hbm_accumulator", self.hbm_accumulator, ("float32", "storage"))


def accumulates_apart(plan: Flash1Plan, dtype: str) -> bool:
    """Say whether sums of a result stored in ``dtype`` need an fp32 array of their own."""
    return plan.hbm_accumulator == "float32" and dtype != "float32"


def _sums_of(machine: Machine, result: Array, plan: Flash1Plan) -> Array:
    """Return the array that accumulates a result in memory, zeroed."""
    sums = result
    if accumulates_apart(plan, result.dtype):
        sums = machine.array(f"{result.name}_accumulator", result.rows, result.columns)
    fill(machine, sums, 0.0, plan)
    return sums


# Tiled program


def forward(machine: Machine, problem: AttentionProblem, plan: Flash1Plan) -> None:
    """One thread block per head walks the key tiles and, for each, updates every query tile's O, ℓ and m in memory."""
    arrays = declare_forward(machine, problem, plan)
    row_max = machine.array("row_max", problem.q_len, 1, role="saved")
    row_sum = machine.array("row_sum", problem.q_len, 1, role="saved")
    sums = _sums_of(machine, arrays.out, plan)
    fill(machine, row_max, -math.inf, plan)
    fill(machine, row_sum, 0.0, plan)
    tiles, place = plan.tiles, plan.accumulators
    width = max(tiles.kv, problem.head_dim, problem.value_dim)
    for _ in machine.thread_blocks():
        factors = descales(machine, "q", "k")
        value_factors = descales(machine, "v")
        for key_rows in machine.tiles(problem.kv_len, tiles.kv):
            # load
            k = machine.load(arrays.k, key_rows)
            v = machine.load(arrays.v, key_rows)
            for query_rows in machine.tiles(problem.visible_queries(key_rows), tiles.q, independent=True, width=width):
                # load
                q = machine.load(arrays.q, query_rows)
                state = SoftmaxState(
                    out=machine.load(sums, query_rows, place=place, name="out"),
                    row_max=machine.load(row_max, query_rows, place=place),
                    row_sum=machine.load(row_sum, query_rows, place=place),
                )
                # compute
                scores, hidden = masked_scores(machine, q, k, query_rows, key_rows, place=place, descales=factors)
                machine.rescale(state.out, state.row_sum)  # O in memory is normalised
                update_softmax(machine, state, scores, v, hidden, value_descales=value_factors)
                # finish
                machine.normalise(state.out, state.row_sum)
                machine.store(state.out, sums, query_rows)
                machine.store(state.row_max, row_max, query_rows)
                machine.store(state.row_sum, row_sum, query_rows)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q):
        # finish
        highest = machine.load(row_max, query_rows, place="registers")
        total = machine.load(row_sum, query_rows, place="registers")
        machine.store(machine.log_sum_exp(highest, total), arrays.lse, query_rows)
    if sums is not arrays.out:
        convert(machine, sums, arrays.out, plan)


def declare_saved(machine: Machine, problem: AttentionProblem, plan: Plan) -> None:
    """Declare what the forward pass saves: the output, the row maxima (in units of log₂ if "simt") and the row sums."""
    machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="saved")
    machine.array("row_max", problem.q_len, 1, role="saved")
    machine.array("row_sum", problem.q_len, 1, role="saved")


def backward(machine: Machine, problem: AttentionProblem, plan: Flash1Plan) -> None:
    """Each thread block walks the key tiles in order and adds to every query tile's dQ in memory."""
    arrays = declare_backward(machine, problem, plan)
    saved = machine.arrays
    sums = _sums_of(machine, arrays.dq, plan)
    dk_total = GroupedGradient.declare(machine, arrays.dk, plan)
    dv_total = GroupedGradient.declare(machine, arrays.dv, plan)
    tiles, place = plan.tiles, plan.accumulators
    for key_rows in key_blocks(machine, problem, plan, dk_total.per, sequential=True):
        # load
        k = machine.load(arrays.k, key_rows)
        v = machine.load(arrays.v, key_rows)
        dk = machine.full("dk", key_rows, problem.head_dim, 0.0, place=place)
        dv = machine.full("dv", key_rows, problem.value_dim, 0.0, place=place)
        for _ in machine.group_heads():
            for query_rows in machine.tiles(problem.visible_queries(key_rows), tiles.q):
                # load
                q = machine.load(arrays.q, query_rows)
                out = machine.load(saved["out"], query_rows)
                dout = machine.load(arrays.dout, query_rows)
                dq = machine.load(sums, query_rows, place=place, name="dq")
                statistics = SavedStatistics(
                    delta=machine.row_dot(out, dout),
                    row_max=machine.load(saved["row_max"], query_rows, place="registers"),
                    row_sum=machine.load(saved["row_sum"], query_rows, place="registers"),
                )
                # compute
                probabilities, dscores, hidden = score_gradients(
                    machine, q, k, v, dout, statistics, query_rows, key_rows, place=place
                )
                machine.matmul(probabilities, dout, place=place, transpose_a=True, hidden=hidden, into=dv)
                machine.scale(dscores, problem.scale)
                machine.matmul(dscores, q, place=place, transpose_a=True, hidden=hidden, into=dk)
                machine.matmul(dscores, k, place=place, hidden=hidden, into=dq)
                # finish
                machine.store(dq, sums, query_rows)
        # finish
        dk_total.add(machine, dk, key_rows)
        dv_total.add(machine, dv, key_rows)
    dk_total.finish(machine, plan)
    dv_total.finish(machine, plan)
    if sums is not arrays.dq:
        convert(machine, sums, arrays.dq, plan)


# Closed form


def _sums_traffic(
    problem: AttentionProblem, plan: Flash1Plan, name: str, columns: int, dtype: str, visited_rows: int
) -> dict[str, ArrayTraffic]:
    """Zero the sums, read and write them at every visit, and convert them if they are an array of their own."""
    apart = accumulates_apart(plan, dtype)
    stored = "float32" if apart else dtype
    whole = forms.matrix_bytes(problem, problem.q_len, columns, dtype=stored)
    visited = forms.matrix_bytes(problem, visited_rows, columns, dtype=stored)
    steps = forms.written(whole) + forms.read(visited) + forms.written(visited)
    if not apart:
        return {name: steps}
    result = forms.written(forms.matrix_bytes(problem, problem.q_len, columns, dtype=dtype))
    return {f"{name}_accumulator": steps + forms.read(whole), name: result}


def closed_form_forward(problem: AttentionProblem, plan: Flash1Plan) -> Traffic:
    """K and V once; Q, and O, ℓ, m both ways, once for every key tile they see."""
    visits = forms.tile_visits(problem, plan.tiles)
    k, v = forms.key_names(plan)
    once = forms.statistic_bytes(problem, problem.q_len)
    visited = forms.statistic_bytes(problem, visits.queries)
    statistic = forms.written(once) + forms.read(visited) + forms.written(visited) + forms.read(once)
    main = {
        k: forms.read(forms.matrix_bytes(problem, problem.kv_len, problem.head_dim)),
        v: forms.read(forms.matrix_bytes(problem, problem.kv_len, problem.value_dim)),
        "q": forms.read(forms.matrix_bytes(problem, visits.queries, problem.head_dim)),
        "row_max": statistic,
        "row_sum": statistic,
        "lse": forms.written(once),
    }
    sums = _sums_traffic(problem, plan, "out", problem.value_dim, problem.output_dtype, visits.queries)
    factors = forms.descale_traffic(problem, dict.fromkeys(("q", "k", "v"), 1))
    return forms.total([main, sums, factors, *forms.repeat_traffic(problem, plan)])


def closed_form_backward(problem: AttentionProblem, plan: Flash1Plan) -> Traffic:
    """K, V, dK, dV once; Q, O, dO, ℓ, m, and dQ both ways, once for every key tile they see."""
    visits = forms.tile_visits(problem, plan.tiles)
    heads = forms.key_value_heads(problem, plan)
    k, v = forms.key_names(plan)
    visited = forms.statistic_bytes(problem, visits.queries)
    values = forms.matrix_bytes(problem, visits.queries, problem.value_dim)
    main = {
        k: forms.read(forms.matrix_bytes(problem, problem.kv_len, problem.head_dim, heads=heads)),
        v: forms.read(forms.matrix_bytes(problem, problem.kv_len, problem.value_dim, heads=heads)),
        "q": forms.read(forms.matrix_bytes(problem, visits.queries, problem.head_dim)),
        "out": forms.read(values),
        "dout": forms.read(values),
        "row_max": forms.read(visited),
        "row_sum": forms.read(visited),
    }
    sums = _sums_traffic(problem, plan, "dq", problem.head_dim, problem.dtype, visits.queries)
    return forms.total([main, sums, *forms.grouped_gradient_traffic(problem, plan)])


# Plans


def fit_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """Tiles that grow along the keys, the outer loop's axis in both directions, and along the queries up to d."""
    return flash2.fit_tiles(problem, size, "backward")


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return the tiles of FlashAttention's first kernels, few query rows on many keys, then smaller ones."""
    most = 256 if direction == "forward" and max(problem.head_dim, problem.value_dim) <= 64 else 128
    return [Tiles(q=min(16, keys), kv=keys) for keys in (256, 128, 64, 32, 16, 8, 4, 2, 1) if keys <= most]


ALGORITHM = Algorithm(
    name="flash1",
    title="FlashAttention",
    source="Dao et al. 2022, arXiv 2205.14135, Algorithms 1 and 4",
    summary="Each thread block walks the key tiles and updates every query tile's running softmax in memory.",
    plan_class=Flash1Plan,
    programs={"forward": forward, "backward": backward},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward},
    paper_tiles=flash2.paper_tiles,
    fit_tiles=fit_tiles,
    gpu_tiles=gpu_tiles,
    exact_arithmetics={"forward": ("simt",), "backward": ("simt",)},
    declare_saved=declare_saved,
)
