"""Standard attention on CUDA cores, its scores and probabilities through memory: from a problem and a plan to kernels.

The twin of :mod:`simattn.algorithms.standard`.
"""

from __future__ import annotations

from cupy_kernels.algorithm import KernelAlgorithm
from cupy_kernels.forward_tiles import fits
from cupy_kernels.gradients import GRID_HEADS, GroupedGradient, grouping
from cupy_kernels.parameters import COLUMN_BUCKETS, Operand, check_plan, scale_log2
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
    square,
)
from simattn.algorithms.standard import StandardPlan, complete_plan
from simattn.hardware import Hardware, get_hardware
from simattn.plan import Tiles, depth_of
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem
from simattn.sums import ceil_div

CHUNK = 32
"""Contracted numbers that the kernels of products have on chip at once."""

MULTIPLES = (64, 128)
"""Rows and columns of large tiles of products."""

# Plans


def default_plan(problem: AttentionProblem, hardware: Hardware, deterministic: bool) -> StandardPlan:
    """Return tiles of 128 × 128."""
    return completed(problem, StandardPlan(tiles=Tiles(q=128, kv=128, depth=128)))


def completed(problem: AttentionProblem, plan: StandardPlan) -> StandardPlan:
    """Return a plan with its softmax passes settled, on every device as the simulated machine does by default."""
    settled: StandardPlan = complete_plan(problem, plan, get_hardware(DEFAULT_HARDWARE).sram_bytes_per_block)
    return settled


# Programs


def forward(problem: AttentionProblem, plan: StandardPlan, hardware: Hardware) -> Program:
    """Return the forward program: S = scale · Q Kᵀ, P = softmax(S), O = P V."""
    check_plan(plan)
    plan = completed(problem, plan)
    q, k, v = inputs(problem)
    out, lse = forward_results(problem)
    scores, probabilities = square(problem, "scores", "workspace"), square(problem, "probabilities", "saved")
    steps = [
        square_step(problem, plan, q, k, scores, factor=scale_log2(problem)),
        softmax_step(problem, plan, hardware, "standard_softmax", scores, probabilities, lse),
        rows_step(problem, plan, probabilities, v, out),
    ]
    return program_of(problem, (q, k, v, scores, probabilities, out, lse), steps)


def backward(problem: AttentionProblem, plan: StandardPlan, hardware: Hardware) -> Program:
    """Return the backward program: dV = Pᵀ dO, dP = dO Vᵀ, dS = softmax gradient, dQ = dS K, dK = dSᵀ Q."""
    check_plan(plan)
    plan = completed(problem, plan)
    q, k, v = inputs(problem)
    dout = query_matrix(problem, "dout", problem.value_dim, "input")
    probabilities = square(problem, "probabilities", "input")
    dprobabilities, dscores = (square(problem, name, "workspace") for name in ("dprobabilities", "dscores"))
    dq, dk, dv = gradients(problem)
    dk_total, dv_total = (GroupedGradient.of(problem, plan, target) for target in (dk, dv))
    steps = [
        *keys_steps(problem, plan, probabilities, dout, dv_total),
        square_step(problem, plan, dout, v, dprobabilities),
        softmax_step(problem, plan, hardware, "standard_softmax_gradient", probabilities, dprobabilities, dscores),
        rows_step(problem, plan, dscores, k, dq, factor=problem.scale),
        *keys_steps(problem, plan, dscores, q, dk_total, factor=problem.scale),
    ]
    arrays = (q, k, v, dout, probabilities, dprobabilities, dscores, dq, *dk_total.arrays, *dv_total.arrays)
    return program_of(problem, arrays, steps)


def product(
    function: str,
    tile: tuple[int, int],
    plan: StandardPlan,
    problem: AttentionProblem,
    arrays: tuple[tuple[str, Array, Access], ...],
    blocks: int,
    columns: int,
    factor: float | None,
    **values: object,
) -> Step:
    """Return the launch of a kernel of products.

    Parameters
    ----------
    function
        Its name.
    tile
        Rows and columns of a tile of the result.
    plan, problem
        What it runs.
    arrays
        The kernel's name for each array, the array, and what the kernel does to it.
    blocks
        Thread blocks.
    columns
        Columns that the kernel is told: the product's depth, or the result's columns.
    factor
        What the result is multiplied by, or None.
    **values
        Further macros.
    """
    rows, across = tile
    narrow = (32,) if function == "standard_square" else (16, 32, 96)
    if not (rows == 32 or rows in MULTIPLES) or not (across in narrow or across in MULTIPLES):
        tiles = plan.tiles
        raise ValueError(
            f"plan.tiles=({tiles.q}, {tiles.kv}, {tiles.depth}): {function} has no tile of {rows} by {across}; "
            f"expected q and kv of 32 or one of {MULTIPLES}, and a depth of None, 16, 32, 96 or one of those"
        )
    scaled = {} if factor is None else {"scaled": 1}
    thread_rows, thread_columns = (4 if size < 64 else 8 for size in tile)
    kernel = Kernel(
        source=f"{function}.cu",
        function=function,
        macros=macros(storage=problem.dtype, result_rows=rows, result_columns=across, **scaled, **values),
        threads=rows // thread_rows * (across // thread_columns),
        shared_bytes=4 * 2 * CHUNK * (rows + across),
        accesses=tuple((name, access) for name, _, access in arrays),
    )
    operand = Operand(columns=columns, factor=1.0 if factor is None else factor)
    return Step(kernel, blocks, tuple(array.name for _, array, _ in arrays), operand)


def square_step(
    problem: AttentionProblem, plan: StandardPlan, left: Array, right: Array, result: Array, factor: float | None = None
) -> Step:
    """Multiply rows of queries by rows of keys, S = scale · Q Kᵀ or dP = dO Vᵀ."""
    tiles = plan.tiles
    blocks = ceil_div(problem.q_len, tiles.q) * ceil_div(problem.kv_len, tiles.kv) * problem.batch * problem.heads
    arrays: tuple[tuple[str, Array, Access], ...] = (
        ("left", left, "r"),
        ("right", right, "r"),
        ("result", result, "w"),
    )
    return product("standard_square", (tiles.q, tiles.kv), plan, problem, arrays, blocks, left.columns, factor)


def result_columns(plan: StandardPlan, columns: int) -> int:
    """Return the columns of a kernel's tile: the plan's, or those of the smallest bucket that holds all of them."""
    depth = depth_of(plan, columns)
    return depth if depth < columns else next(bucket for bucket in COLUMN_BUCKETS if bucket >= columns)


def rows_step(
    problem: AttentionProblem,
    plan: StandardPlan,
    weights: Array,
    operand_rows: Array,
    result: Array,
    factor: float | None = None,
) -> Step:
    """Multiply a (query, key) matrix by rows of keys, O = P V or dQ = dS K."""
    columns = operand_rows.columns
    across = result_columns(plan, columns)
    blocks = ceil_div(problem.q_len, plan.tiles.q) * ceil_div(columns, across) * problem.batch * problem.heads
    arrays: tuple[tuple[str, Array, Access], ...] = (
        ("weights", weights, "r"),
        ("operand_rows", operand_rows, "r"),
        ("result", result, "w"),
    )
    return product("standard_rows", (plan.tiles.q, across), plan, problem, arrays, blocks, columns, factor)


def keys_steps(
    problem: AttentionProblem,
    plan: StandardPlan,
    weights: Array,
    operand_rows: Array,
    total: GroupedGradient,
    factor: float | None = None,
) -> tuple[Step, ...]:
    """Multiply a transposed (query, key) matrix by rows of queries, dV = Pᵀ dO or dK = dSᵀ Q."""
    columns = operand_rows.columns
    across = result_columns(plan, columns)
    heads = problem.kv_heads if total.grouped == "loop" else problem.heads
    blocks = ceil_div(problem.kv_len, plan.tiles.kv) * ceil_div(columns, across) * problem.batch * heads
    arrays: tuple[tuple[str, Array, Access], ...] = (
        ("weights", weights, "r"),
        ("operand_rows", operand_rows, "r"),
        ("result", total.partial, total.access),
    )
    step = product(
        "standard_keys", (plan.tiles.kv, across), plan, problem, arrays, blocks, columns, factor,
        grid_heads=GRID_HEADS.index(total.grouped),
    )  # fmt: skip
    return (*total.before, step, *total.after)


SOFTMAX_THREADS = 128
"""Threads of a block of the softmax kernels."""


def softmax_step(
    problem: AttentionProblem,
    plan: StandardPlan,
    hardware: Hardware,
    function: str,
    *arrays: Array,
) -> Step:
    """Return the launch of a softmax kernel.

    Parameters
    ----------
    problem, plan, hardware
        What it runs.
    function
        "standard_softmax", with the arrays scores, probabilities and lse; or "standard_softmax_gradient", with
        probabilities, dprobabilities and dscores.
    *arrays
        The arrays, the inputs first.
    """
    is_gradient = function == "standard_softmax_gradient"
    names = ("probabilities", "dprobabilities", "dscores") if is_gradient else ("scores", "probabilities", "lse")
    accesses: tuple[Access, ...] = ("r", "r", "w") if is_gradient else ("r", "w", "w")
    passes = 2 if is_gradient and plan.softmax_passes != 1 else plan.softmax_passes
    row_threads, block_rows, shared_bytes = 4, SOFTMAX_THREADS // 4, 0
    values: dict[str, int] = {"key_rows": plan.tiles.kv}
    if passes == 1:
        row_columns = max(ONE_PASS_COLUMNS, 1 << (problem.kv_len - 1).bit_length()) if problem.kv_len else 32
        row_threads, block_rows, shared_bytes = _whole_rows(row_columns, 2 if is_gradient else 1, hardware)
        values = {"row_columns": row_columns}
    kernel = Kernel(
        source=f"{function}.cu",
        function=function,
        macros=macros(storage=problem.dtype, passes=passes, block_rows=block_rows, row_threads=row_threads, **values),
        threads=block_rows * row_threads,
        shared_bytes=shared_bytes,
        accesses=tuple(zip(names, accesses, strict=True)),
    )
    blocks = problem.batch * problem.heads * ceil_div(problem.q_len, block_rows)
    return Step(kernel, blocks, tuple(array.name for array in arrays))


ONE_PASS_COLUMNS = 256
"""Fewest columns of a row that the kernels of one pass are compiled for; else powers of two."""


def _whole_rows(row_columns: int, matrices: int, hardware: Hardware) -> tuple[int, int, int]:
    """Return threads of a row, rows of a block and shared memory of a block, for whole rows on chip.

    Raises
    ------
    ValueError
        If not even one row fits.
    """
    shapes = [(threads, SOFTMAX_THREADS // threads) for threads in (4, 8, 16, 32)] + [(32, 2), (32, 1)]
    sizes = [(threads, rows, 4 * matrices * rows * (row_columns + 16)) for threads, rows in shapes]
    for blocks in (2, 1):
        for threads, rows, shared_bytes in sizes:
            if fits(hardware, shared_bytes, blocks):
                return threads, rows, shared_bytes
    raise ValueError(
        f"plan.softmax_passes=1: a row of {row_columns} keys takes {sizes[-1][2]} bytes of shared memory: expected at "
        f"most the {hardware.sram_bytes_per_block} that a thread block of {hardware.name} may use, or 2 passes"
    )


ALGORITHM = KernelAlgorithm(
    name="standard",
    plan_class=StandardPlan,
    default_plans={"forward": default_plan, "backward": default_plan},
    programs={"forward": forward, "backward": backward},
    saved=("probabilities",),
    is_deterministic=lambda problem, plan: grouping(problem, plan) != "reduce",
)
