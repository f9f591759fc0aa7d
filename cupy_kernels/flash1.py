"""FlashAttention on CUDA cores: from a problem and a plan to the kernels that run it.

The twin of :mod:`simattn.algorithms.flash1`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cupy_kernels import elementwise, flash2
from cupy_kernels.algorithm import KernelAlgorithm
from cupy_kernels.backward_tiles import FLASH1_NUMBERS_PER_THREAD, BackwardTiles
from cupy_kernels.forward_tiles import ForwardTiles, first_that_fits, too_large
from cupy_kernels.gradients import GRID_HEADS, GroupedGradient, grouping
from cupy_kernels.parameters import column_bucket
from cupy_kernels.program import (
    Access,
    Array,
    Kernel,
    Program,
    Step,
    forward_results,
    gradients,
    inputs,
    macros,
    program_of,
    query_matrix,
    statistic,
)
from simattn.algorithms.flash1 import Flash1Plan, accumulates_apart
from simattn.hardware import Hardware
from simattn.plan import Tiles
from simattn.problem import AttentionProblem

BEST_TILES = Tiles(q=64, kv=64)
"""Tiles of both kernels, where they fit."""

THREAD_TILES = ((16, 8, 120), (16, 4, 144), (8, 8, 120), (8, 4, 144))
"""As :data:`cupy_kernels.forward_tiles.THREAD_TILES`; state that comes and goes takes registers too."""

# Plans


def default_forward_plan(problem: AttentionProblem, hardware: Hardware, deterministic: bool) -> Flash1Plan:
    """Return the largest tiles that fit the device's shared memory."""
    tiles = first_that_fits(
        BEST_TILES, flash2.SMALLER_TILES, lambda tiles: forward_kernel(problem, Flash1Plan(tiles=tiles), hardware)
    )
    return Flash1Plan(tiles=tiles)


def default_backward_plan(problem: AttentionProblem, hardware: Hardware, deterministic: bool) -> Flash1Plan:
    """Return the largest tiles that fit the device's shared memory, as the program has them: with one of the output."""

    def check(tiles: Tiles) -> None:
        BackwardTiles.of(problem, Flash1Plan(tiles=tiles), hardware, FLASH1_NUMBERS_PER_THREAD)
        tile_bytes = 4 * (2 * tiles.kv + 3 * tiles.q) * max(problem.head_dim, problem.value_dim)
        if tile_bytes > hardware.sram_bytes_per_block:
            raise too_large(tiles, column_bucket(problem), hardware)

    return Flash1Plan(tiles=first_that_fits(BEST_TILES, flash2.SMALLER_BACKWARD_TILES, check))


# Programs


def sums_of(result: Array, plan: Flash1Plan) -> Array:
    """Return the array that accumulates a result in memory: itself, or one of float32."""
    if accumulates_apart(plan, result.dtype):
        return replace(result, name=f"{result.name}_accumulator", dtype="float32", role="workspace")
    return result


def forward_kernel(problem: AttentionProblem, plan: Flash1Plan, hardware: Hardware) -> Kernel:
    """Return the build of the forward kernel for a plan."""
    tiles = ForwardTiles.of(problem, plan, hardware, THREAD_TILES)
    sums = sums_of(query_matrix(problem, "out", problem.value_dim, "output"), plan).dtype
    return Kernel(
        source="flash1_forward.cu",
        function="flash1_forward",
        macros=macros(storage=problem.dtype, sums=sums, **vars(tiles)),
        threads=tiles.threads,
        shared_bytes=tiles.shared_bytes,
        accesses=(("q", "r"), ("k", "r"), ("v", "r"), ("out_sums", "rw"), ("row_max", "rw"), ("row_sum", "rw")),
    )


def forward(problem: AttentionProblem, plan: Flash1Plan, hardware: Hardware) -> Program:
    """Return the forward program: start the sums, walk the keys, take the logarithm."""
    flash2.check_plan(problem, plan)
    kernel = forward_kernel(problem, plan, hardware)
    q, k, v = inputs(problem)
    out, lse = forward_results(problem)
    sums = sums_of(out, plan)
    row_max, row_sum = (statistic(problem, name, "saved") for name in ("row_max", "row_sum"))
    steps = [
        elementwise.fill(sums, 0.0),
        elementwise.fill(row_max, -math.inf),
        elementwise.fill(row_sum, 0.0),
        Step(kernel, problem.batch * problem.heads, ("q", "k", "v", sums.name, "row_max", "row_sum")),
        elementwise.log_sum_exp(row_max, row_sum, lse),
        *(() if sums is out else (elementwise.convert(sums, out),)),
    ]
    arrays = (q, k, v, out, *(() if sums is out else (sums,)), row_max, row_sum, lse)
    return program_of(problem, arrays, steps)


def backward(problem: AttentionProblem, plan: Flash1Plan, hardware: Hardware) -> Program:
    """Return the backward program: start the sums of dQ, walk the keys."""
    flash2.check_plan(problem, plan)
    q, k, v = inputs(problem)
    out, _ = forward_results(problem, "input")
    dout = query_matrix(problem, "dout", problem.value_dim, "input")
    row_max, row_sum = (statistic(problem, name, "input") for name in ("row_max", "row_sum"))
    dq, dk, dv = gradients(problem)
    sums = sums_of(dq, plan)
    dk_total, dv_total = (GroupedGradient.of(problem, plan, target) for target in (dk, dv))
    tiles = BackwardTiles.of(problem, plan, hardware, FLASH1_NUMBERS_PER_THREAD)
    read: tuple[tuple[str, Access], ...] = tuple(
        (name, "r") for name in ("q", "k", "v", "out", "dout", "row_max", "row_sum")
    )
    kernel = Kernel(
        source="flash1_backward.cu",
        function="flash1_backward",
        macros=macros(
            storage=problem.dtype, sums=sums.dtype, **vars(tiles), grid_heads=GRID_HEADS.index(dk_total.grouped)
        ),
        threads=tiles.threads,
        shared_bytes=tiles.shared_bytes,
        accesses=(*read, ("dq_sums", "rw"), ("dk", dk_total.access), ("dv", dv_total.access)),
    )
    heads = problem.kv_heads if dk_total.grouped == "loop" else problem.heads
    bound = (*(name for name, _ in read), sums.name, dk_total.partial.name, dv_total.partial.name)
    steps = [
        elementwise.fill(sums, 0.0),
        *dk_total.before,
        *dv_total.before,
        Step(kernel, problem.batch * heads, bound),
        *dk_total.after,
        *dv_total.after,
        *(() if sums is dq else (elementwise.convert(sums, dq),)),
    ]
    arrays = (q, k, v, out, dout, row_max, row_sum, dq, *(() if sums is dq else (sums,)), *dk_total.arrays,
              *dv_total.arrays)  # fmt: skip
    return program_of(problem, arrays, steps)


ALGORITHM = KernelAlgorithm(
    name="flash1",
    plan_class=Flash1Plan,
    default_plans={"forward": default_forward_plan, "backward": default_backward_plan},
    programs={"forward": forward, "backward": backward},
    saved=("out", "row_max", "row_sum"),
    is_deterministic=lambda problem, plan: grouping(problem, plan) != "reduce",
)
