"""Standard attention: scores and probabilities go through memory (arXiv 2205.14135, Algorithms 0 and 3).

Three kernels forward (S = scale · Q Kᵀ; P = softmax(S); O = P V) and five backward. The products are tiled as any
matrix product is: a thread block for every tile of the result, which streams both operands past it. The matrices are
dense: masked tiles are computed, written and read too, the mask is applied by the softmax kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from simattn.algorithms import forms
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.kernels import (
    GroupedGradient,
    declare_backward,
    declare_forward,
    descales,
)
from simattn.algorithms.online_softmax import PASSES_BEFORE_THE_LAST, update_statistics
from simattn.arithmetic.formats import ITEM_BYTES
from simattn.hardware import Hardware
from simattn.machine import Array, Machine, Tile
from simattn.masks import Rows
from simattn.plan import Plan, Tiles, candidates, check_choice, cubic_tiles, depth_of
from simattn.problem import AttentionProblem, Direction
from simattn.sums import ceil_div
from simattn.traffic import Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class StandardPlan(Plan):
    """Plan of standard attention.

    Attributes
    ----------
    softmax_passes
        How often the softmax kernels read a row: 1 keeps whole rows on chip, as Algorithm 0 has it; 2 finds maximum and
        sum together in a pass of its own; 3 finds one after the other. Default: 1 where whole rows fit, else 2.
    """

    softmax_passes: Literal[1, 2, 3] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("softmax_passes", self.softmax_passes, (None, 1, 2, 3))


def complete_plan(problem: AttentionProblem, plan: StandardPlan, sram_bytes: int) -> StandardPlan:
    """Choose the softmax kernels' passes where the plan leaves them open."""
    if plan.softmax_passes is not None:
        return plan
    row_bytes = plan.tiles.q * problem.kv_len * ITEM_BYTES[problem.output_dtype]
    statistics_bytes = 2 * plan.tiles.q * ITEM_BYTES["float32"]
    rows_fit = not plan.enforce_capacity or SOFTMAX_TILES * row_bytes + statistics_bytes <= sram_bytes
    return replace(plan, softmax_passes=1 if rows_fit else 2)


SOFTMAX_TILES = 2
"""Score tiles that the backward softmax kernel holds, the more of the two."""


# Tiled program


def forward(machine: Machine, problem: AttentionProblem, plan: StandardPlan) -> None:
    """S = scale · Q Kᵀ, P = softmax(S), O = P V, each through memory."""
    arrays = declare_forward(machine, problem, plan)
    scores = machine.array("scores", problem.q_len, problem.kv_len, dtype=problem.output_dtype)
    probabilities = declare_probabilities(machine, problem)
    square_kernel(machine, problem, plan, arrays.q, arrays.k, scores, are_scores=True)
    softmax_kernel(machine, problem, plan, scores, probabilities, arrays.lse)
    rows_kernel(
        machine,
        problem,
        plan,
        probabilities,
        arrays.v,
        arrays.out,
        name="out",
        factor_names=("v",),
        factor=1.0,
    )


def declare_probabilities(machine: Machine, problem: AttentionProblem) -> Array:
    """Declare P, which the forward pass saves."""
    return machine.array("probabilities", problem.q_len, problem.kv_len, dtype=problem.output_dtype, role="saved")


def declare_saved(machine: Machine, problem: AttentionProblem, plan: Plan) -> None:
    """Declare what the forward pass saves: P."""
    declare_probabilities(machine, problem)


def square_kernel(
    machine: Machine,
    problem: AttentionProblem,
    plan: StandardPlan,
    left: Array,
    right: Array,
    result: Array,
    *,
    are_scores: bool,
) -> None:
    """Multiply rows of queries by rows of keys, S = scale · Q Kᵀ or dP = dO Vᵀ, a thread block for every tile."""
    tiles, place = plan.tiles, plan.accumulators
    depth = depth_of(plan, left.columns)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q, width=max(tiles.kv, depth)):
        for key_rows in machine.tiles(problem.kv_len, tiles.kv):
            factors = descales(machine, "q", "k")
            tile = machine.full(result.name, query_rows, key_rows, 0.0, place=place)
            for columns in machine.tiles(left.columns, depth):
                # load
                rows = machine.load(left, query_rows, columns)
                keys = machine.load(right, key_rows, columns)
                # compute
                machine.matmul(rows, keys, place=place, transpose_b=True, into=tile)
            # finish
            if are_scores:
                machine.scale_scores(tile, descales=factors)
            machine.store(tile, result, query_rows, key_rows)


def softmax_kernel(
    machine: Machine,
    problem: AttentionProblem,
    plan: StandardPlan,
    scores: Array,
    probabilities: Array,
    lse: Array,
) -> None:
    """P = softmax(S), a thread block for every tile of rows."""
    place = plan.accumulators

    def load(key_rows: Rows) -> Tile:
        tile = machine.load(scores, query_rows, key_rows)
        machine.hide(tile, machine.hidden_elements(query_rows, key_rows), -math.inf)
        return tile

    def finish(tile: Tile, key_rows: Rows) -> None:
        machine.normalise(tile, row_sum)
        machine.hide(tile, machine.hidden_elements(query_rows, key_rows), 0.0)  # in a row of NaN they are NaN
        machine.store(tile, probabilities, query_rows, key_rows)

    key_tile = softmax_key_tile(problem, plan)
    for query_rows in machine.thread_blocks(problem.q_len, plan.tiles.q, width=key_tile):
        row_max = machine.full("row_max", query_rows, 1, -math.inf, place=place)
        row_sum = machine.full("row_sum", query_rows, 1, 0.0, place=place)
        if plan.softmax_passes == 1:
            for key_rows in machine.tiles(problem.kv_len, key_tile):
                # load
                tile = load(key_rows)
                # compute
                machine.update_row_max(row_max, tile)
                machine.exponential(tile, row_max)
                machine.update_row_sum(row_sum, tile)
                # finish
                finish(tile, key_rows)
        else:
            for statistic in PASSES_BEFORE_THE_LAST[plan.softmax_passes or 2]:
                for key_rows in machine.tiles(problem.kv_len, key_tile):
                    update_statistics(machine, statistic, load(key_rows), row_max, row_sum)
            for key_rows in machine.tiles(problem.kv_len, key_tile):
                # load
                tile = load(key_rows)
                # compute
                machine.exponential(tile, row_max)
                # finish
                finish(tile, key_rows)
        # finish
        machine.store(machine.log_sum_exp(row_max, row_sum), lse, query_rows)


def softmax_key_tile(problem: AttentionProblem, plan: StandardPlan) -> int:
    """Return the columns of a softmax kernel's tile: whole rows in one pass, else the plan's tile."""
    return max(1, problem.kv_len) if plan.softmax_passes == 1 else plan.tiles.kv


def rows_kernel(
    machine: Machine,
    problem: AttentionProblem,
    plan: StandardPlan,
    weights: Array,
    operand: Array,
    result: Array,
    *,
    name: str,
    factor: float,
    factor_names: tuple[str, ...] = (),
) -> None:
    """Multiply a (query, key) matrix by rows of keys, O = P V or dQ = dS K, a thread block for every tile."""
    tiles, place = plan.tiles, plan.accumulators
    depth = depth_of(plan, operand.columns)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q, width=max(tiles.kv, depth)):
        for columns in machine.tiles(operand.columns, depth):
            factors = descales(machine, *factor_names)
            total = machine.full(name, query_rows, columns, 0.0, place=place)
            for key_rows in machine.tiles(problem.kv_len, tiles.kv):
                # load
                left = machine.load(weights, query_rows, key_rows)
                right = machine.load(operand, key_rows, columns)
                # compute
                hidden = machine.hidden_elements(query_rows, key_rows)
                machine.matmul(left, right, place=place, hidden=hidden, into=total)
            # finish
            for descale in (*factors, *(() if factor == 1.0 else (factor,))):
                machine.scale(total, descale)
            machine.store(total, result, query_rows, columns)


def backward(machine: Machine, problem: AttentionProblem, plan: StandardPlan) -> None:
    """DV = Pᵀ dO, dP = dO Vᵀ, dS = softmax gradient, dQ = dS K, dK = dSᵀ Q, each through memory."""
    arrays = declare_backward(machine, problem, plan)
    shape = (problem.q_len, problem.kv_len)
    dprobabilities = machine.array("dprobabilities", *shape, dtype=problem.dtype)
    dscores = machine.array("dscores", *shape, dtype=problem.dtype)
    probabilities = machine.arrays["probabilities"]
    keys_kernel(machine, problem, plan, probabilities, arrays.dout, arrays.dv, factor=1.0)
    square_kernel(machine, problem, plan, arrays.dout, arrays.v, dprobabilities, are_scores=False)
    softmax_gradient_kernel(machine, problem, plan, probabilities, dprobabilities, dscores)
    rows_kernel(machine, problem, plan, dscores, arrays.k, arrays.dq, name="dq", factor=problem.scale)
    keys_kernel(machine, problem, plan, dscores, arrays.q, arrays.dk, factor=problem.scale)


def keys_kernel(
    machine: Machine,
    problem: AttentionProblem,
    plan: StandardPlan,
    weights: Array,
    operand: Array,
    result: Array,
    *,
    factor: float,
) -> None:
    """Multiply a transposed (query, key) matrix by rows of queries, dV = Pᵀ dO or dK = dSᵀ Q."""
    tiles, place = plan.tiles, plan.accumulators
    depth = depth_of(plan, operand.columns)
    total = GroupedGradient.declare(machine, result, plan)
    for key_rows in machine.thread_blocks(problem.kv_len, tiles.kv, per=total.per, width=max(tiles.q, depth)):
        for columns in machine.tiles(operand.columns, depth):
            tile = machine.full(result.name, key_rows, columns, 0.0, place=place)
            for _ in machine.group_heads():
                for query_rows in machine.tiles(problem.q_len, tiles.q):
                    # load
                    left = machine.load(weights, query_rows, key_rows)
                    right = machine.load(operand, query_rows, columns)
                    # compute
                    hidden = machine.hidden_elements(query_rows, key_rows)
                    machine.matmul(left, right, place=place, transpose_a=True, hidden=hidden, into=tile)
            # finish
            if factor != 1.0:
                machine.scale(tile, factor)
            total.add(machine, tile, key_rows, columns)
    total.finish(machine, plan)


def softmax_gradient_kernel(
    machine: Machine,
    problem: AttentionProblem,
    plan: StandardPlan,
    probabilities: Array,
    dprobabilities: Array,
    dscores: Array,
) -> None:
    """DS = P ∘ (dP − rowsum(P ∘ dP)), a thread block for every tile of rows."""

    def tiles_of_row() -> Iterator[tuple[Rows, Tile, Tile]]:
        for key_rows in machine.tiles(problem.kv_len, key_tile):
            # load
            p = machine.load(probabilities, query_rows, key_rows)
            dp = machine.load(dprobabilities, query_rows, key_rows)
            machine.hide(dp, machine.hidden_elements(query_rows, key_rows), 0.0)
            yield key_rows, p, dp

    def finish(key_rows: Rows, p: Tile, dp: Tile) -> None:
        machine.softmax_gradient(p, dp, delta)
        machine.hide(dp, machine.hidden_elements(query_rows, key_rows), 0.0)
        machine.store(dp, dscores, query_rows, key_rows)

    key_tile = softmax_key_tile(problem, plan)
    for query_rows in machine.thread_blocks(problem.q_len, plan.tiles.q, width=key_tile):
        delta = machine.full("delta", query_rows, 1, 0.0, place=plan.accumulators)
        for key_rows, p, dp in tiles_of_row():
            # compute
            machine.row_dot(p, dp, into=delta)
            # finish
            if plan.softmax_passes == 1:
                finish(key_rows, p, dp)
        if plan.softmax_passes != 1:
            for key_rows, p, dp in tiles_of_row():
                # finish
                finish(key_rows, p, dp)


# Closed form


def _product(
    problem: AttentionProblem, plan: StandardPlan, depth_columns: int, left: str, right: str
) -> dict[str, int]:
    """Return the elements per head that a product over the depth reads: each operand once per tile of the other."""
    return {
        left: ceil_div(problem.kv_len, plan.tiles.kv) * problem.q_len * depth_columns,
        right: ceil_div(problem.q_len, plan.tiles.q) * problem.kv_len * depth_columns,
    }


def closed_form_forward(problem: AttentionProblem, plan: StandardPlan) -> Traffic:
    """Q and K by a tiled product, S and P through memory, V by another tiled product."""
    k, v = forms.key_names(plan)
    query_tiles, key_tiles = ceil_div(problem.q_len, plan.tiles.q), ceil_div(problem.kv_len, plan.tiles.kv)
    value_tiles = ceil_div(problem.value_dim, depth_of(plan, problem.value_dim))
    square = forms.matrix_bytes(problem, problem.q_len, problem.kv_len, dtype=problem.output_dtype)
    elements = _product(problem, plan, problem.head_dim, "q", k)
    elements[v] = query_tiles * problem.kv_len * problem.value_dim
    out = forms.matrix_bytes(problem, problem.q_len, problem.value_dim, dtype=problem.output_dtype)
    main = {
        **{name: forms.read(forms.matrix_bytes(problem, count, 1)) for name, count in elements.items()},
        "scores": forms.written(square) + forms.read((plan.softmax_passes or 2) * square),
        "probabilities": forms.written(square) + forms.read(value_tiles * square),
        "out": forms.written(out),
        "lse": forms.written(forms.statistic_bytes(problem, problem.q_len)),
    }
    blocks = query_tiles * key_tiles
    factors = forms.descale_traffic(problem, {"q": blocks, "k": blocks, "v": query_tiles * value_tiles})
    return forms.total([main, factors, *forms.repeat_traffic(problem, plan)])


def closed_form_backward(problem: AttentionProblem, plan: StandardPlan) -> Traffic:
    """Four tiled products and the softmax gradient, P, dP and dS through memory."""
    k, v = forms.key_names(plan)
    d, value_dim = problem.head_dim, problem.value_dim
    query_tiles, key_tiles = ceil_div(problem.q_len, plan.tiles.q), ceil_div(problem.kv_len, plan.tiles.kv)
    depth_tiles = ceil_div(d, depth_of(plan, d))
    value_tiles = ceil_div(value_dim, depth_of(plan, value_dim))
    passes = 1 if plan.softmax_passes == 1 else 2
    square = forms.matrix_bytes(problem, problem.q_len, problem.kv_len)
    elements = {
        "dout": 2 * key_tiles * problem.q_len * value_dim,
        v: query_tiles * problem.kv_len * value_dim,
        k: query_tiles * problem.kv_len * d,
        "q": key_tiles * problem.q_len * d,
    }
    main = {
        **{name: forms.read(forms.matrix_bytes(problem, count, 1)) for name, count in elements.items()},
        "probabilities": forms.read((value_tiles + passes) * square),
        "dprobabilities": forms.written(square) + forms.read(passes * square),
        "dscores": forms.written(square) + forms.read(2 * depth_tiles * square),
        "dq": forms.written(forms.matrix_bytes(problem, problem.q_len, d)),
    }
    return forms.total([main, *forms.grouped_gradient_traffic(problem, plan)])


# Plans


def paper_tiles(problem: AttentionProblem, sram_elements: int, direction: Direction) -> Tiles:
    """B = √(M/3): the three tiles of a blocked matrix product (Hong & Kung 1981), as Theorem 2's proof has it."""
    return cubic_tiles(problem, max(1, math.isqrt(sram_elements // 3)), direction)


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return tiles of a matrix product, at most 128 columns of the head dimension wide."""
    depth = min(128, max(problem.head_dim, problem.value_dim))
    return [Tiles(q=tiles.q, kv=tiles.kv, depth=depth) for tiles in candidates(direction)]


ALGORITHM = Algorithm(
    name="standard",
    title="Standard attention",
    source="Vaswani et al. 2017, arXiv 1706.03762; kernels as in arXiv 2205.14135, Algorithms 0 and 3",
    summary="Scores and probabilities are written to memory and read back by kernels of their own.",
    plan_class=StandardPlan,
    programs={"forward": forward, "backward": backward},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward},
    paper_tiles=paper_tiles,
    fit_tiles=cubic_tiles,
    gpu_tiles=gpu_tiles,
    chunks_columns=True,
    exact_arithmetics={"forward": ("simt",), "backward": ("simt",)},
    declare_saved=declare_saved,
    complete_plan=complete_plan,
)
