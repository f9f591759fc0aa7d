"""FlashAttention-2: from a problem and a plan to the kernels that run it, forward on CUDA cores or on tensor cores.

The twin of :mod:`simattn.algorithms.flash2`.
"""

from __future__ import annotations

from typing import Literal

from cupy_kernels import elementwise
from cupy_kernels.algorithm import KernelAlgorithm
from cupy_kernels.backward_tiles import NUMBERS_PER_THREAD, SEQUENTIAL_NUMBERS_PER_THREAD, BackwardTiles
from cupy_kernels.forward_tiles import ForwardTiles, first_that_fits
from cupy_kernels.gradients import GRID_HEADS, GroupedGradient, grouping
from cupy_kernels.parameters import Operand, column_bucket
from cupy_kernels.parameters import check_plan as check_every_plan
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
from cupy_kernels.tensor_tiles import TensorTiles
from simattn.algorithms.flash2 import FIRST_TENSOR_CORES, TENSOR_CORE_DTYPES, Flash2Plan, gpu_tiles, has_tensor_cores
from simattn.hardware import Hardware
from simattn.plan import Plan, Tiles
from simattn.problem import AttentionProblem, Direction
from simattn.sums import ceil_div

FORWARD_TILES: dict[int, Tiles] = {
    16: Tiles(q=128, kv=64),
    32: Tiles(q=128, kv=64),
    64: Tiles(q=128, kv=64),
    96: Tiles(q=128, kv=128),
    128: Tiles(q=128, kv=128),
    192: Tiles(q=128, kv=64),
    256: Tiles(q=64, kv=64),
}
"""Tiles of the forward kernel on CUDA cores, by column bucket, that are fastest on an H100."""

SMALLER_TILES = (Tiles(q=64, kv=64), Tiles(q=64, kv=32), Tiles(q=32, kv=32), Tiles(q=32, kv=16), Tiles(q=16, kv=16))
"""Tiles for devices with too little shared memory for the best ones, from large to small."""

BACKWARD_TILES: dict[int, Tiles] = {
    16: Tiles(q=128, kv=128),
    32: Tiles(q=128, kv=128),
    64: Tiles(q=128, kv=128),
    96: Tiles(q=64, kv=128),
    128: Tiles(q=64, kv=128),
    192: Tiles(q=64, kv=64),
    256: Tiles(q=32, kv=64),
}
"""Tiles of the backward kernels, by column bucket, that are fastest on an H100."""

SMALLER_BACKWARD_TILES = (
    Tiles(q=64, kv=64),
    Tiles(q=32, kv=64),
    Tiles(q=32, kv=32),
    Tiles(q=16, kv=16),
    Tiles(q=8, kv=16),
)
"""Tiles for devices with too little shared memory for the best ones, from large to small."""

DQ_ACCESS: dict[str, Access | Literal[""]] = {"deterministic": "", "reduce": "a", "load_add_store": "rw"}
"""What the kernel of dK and dV does to the sums of dQ, in the order that its macro DQ_MODE counts."""

SECTION_BYTES = 16 << 20
"""Keys and values that thread blocks on tensor cores work on at a time, so that an L2 cache keeps them."""

# Plans


def default_forward_plan(problem: AttentionProblem, hardware: Hardware, deterministic: bool) -> Flash2Plan:
    """Return the best tiles that fit the device's shared memory; on its tensor cores, if they take the format."""
    if has_tensor_cores(problem, hardware):
        best, *smaller = gpu_tiles(problem, hardware, "forward")
        tiles = first_that_fits(best, smaller, lambda tiles: TensorTiles.of(problem, Flash2Plan(tiles=tiles), hardware))
        return Flash2Plan(tiles=tiles, units="tensor_cores")
    tiles = first_that_fits(
        FORWARD_TILES[column_bucket(problem)],
        SMALLER_TILES,
        lambda tiles: forward_kernel(problem, Flash2Plan(tiles=tiles), hardware),
    )
    return Flash2Plan(tiles=tiles)


def default_backward_plan(problem: AttentionProblem, hardware: Hardware, deterministic: bool) -> Flash2Plan:
    """Return the best tiles that fit the device's shared memory."""
    tiles = first_that_fits(
        BACKWARD_TILES[column_bucket(problem)],
        SMALLER_BACKWARD_TILES,
        lambda tiles: BackwardTiles.of(problem, Flash2Plan(tiles=tiles), hardware),
    )
    return Flash2Plan(tiles=tiles, dq="deterministic" if deterministic else "reduce")


# Programs


def forward_kernel(problem: AttentionProblem, plan: Flash2Plan, hardware: Hardware) -> Kernel:
    """Return the build of the forward kernel for a plan."""
    on_tensor_cores = plan.units == "tensor_cores"
    tiles = (TensorTiles if on_tensor_cores else ForwardTiles).of(problem, plan, hardware)
    name = "flash2_tensor_forward" if on_tensor_cores else "flash2_forward"
    return Kernel(
        source=f"{name}.cu",
        function=name,
        macros=macros(storage=problem.dtype, **vars(tiles)),
        threads=tiles.threads,
        shared_bytes=tiles.shared_bytes,
        accesses=(("q", "r"), ("k", "r"), ("v", "r"), ("out", "w"), ("lse", "w")),
        takes_chunks=on_tensor_cores,
        units="mma.sync" if on_tensor_cores else "CUDA cores",
    )


def forward(problem: AttentionProblem, plan: Flash2Plan, hardware: Hardware) -> Program:
    """Return the forward program: one kernel."""
    check_plan(problem, plan)
    if plan.units == "tensor_cores":
        check_tensor_cores(problem, hardware)
    kernel = forward_kernel(problem, plan, hardware)
    blocks = ceil_div(problem.q_len, plan.tiles.q) * problem.batch * problem.heads
    arrays, operand = (*inputs(problem), *forward_results(problem)), Operand(heads=section_of(problem))
    return program_of(problem, arrays, [Step(kernel, blocks, ("q", "k", "v", "out", "lse"), operand)])


def check_tensor_cores(problem: AttentionProblem, hardware: Hardware) -> None:
    """Raise a ValueError unless a device has tensor cores that take the problem."""
    if problem.dtype not in TENSOR_CORE_DTYPES:
        raise ValueError(
            f"plan.units='tensor_cores' with dtype={problem.dtype!r}: expected one of {TENSOR_CORE_DTYPES}, or "
            "units='cuda_cores'"
        )
    if not has_tensor_cores(problem, hardware):
        (major, minor), (first, _) = hardware.compute_capability, FIRST_TENSOR_CORES
        raise ValueError(
            f"plan.units='tensor_cores': {hardware.name} has compute capability {major}.{minor}, the kernel needs "
            f"{first}.0 or later: expected units='cuda_cores'"
        )


def why_these_units(direction: Direction, problem: AttentionProblem, plan: Flash2Plan, hardware: Hardware) -> str:
    """Return why a plan's kernels multiply by what they do."""
    if direction == "backward":
        return "its backward kernels are for CUDA cores"
    if plan.units == "tensor_cores":
        return f"{problem.dtype} is multiplied on tensor cores from compute capability {FIRST_TENSOR_CORES[0]}.0 on"
    if has_tensor_cores(problem, hardware):
        return "the plan has units='cuda_cores'"
    if problem.dtype not in TENSOR_CORE_DTYPES:
        return f"{problem.dtype} is multiplied on CUDA cores"
    return f"tensor cores are used from compute capability {FIRST_TENSOR_CORES[0]}.0 on"


def section_of(problem: AttentionProblem) -> int:
    """Return how many query matrices to work on at a time, so that the L2 cache keeps their keys and values."""
    key_bytes = problem.kv_len * (problem.head_dim + problem.value_dim) * problem.item_bytes
    key_matrices = max(1, SECTION_BYTES // max(1, key_bytes))
    return min(problem.batch * problem.heads, key_matrices * problem.group_size)


def check_plan(problem: AttentionProblem, plan: Plan) -> None:
    """Raise a ValueError unless there are kernels for a plan; fields that decide nothing but on-chip traffic pass."""
    check_every_plan(plan)
    depth = plan.tiles.depth
    if depth is not None and depth < max(problem.head_dim, problem.value_dim):
        raise ValueError(f"plan.tiles.depth={depth}: expected None, the kernel takes all columns at a time")


def key_gradients_kernel(
    problem: AttentionProblem, plan: Flash2Plan, hardware: Hardware, total: GroupedGradient
) -> Kernel:
    """Return the build of the kernel of dK and dV, which adds up dQ too unless the plan is deterministic."""
    sequential = plan.dq == "load_add_store"
    most_numbers = SEQUENTIAL_NUMBERS_PER_THREAD if sequential else NUMBERS_PER_THREAD
    tiles = BackwardTiles.of(problem, plan, hardware, most_numbers)
    inputs: tuple[tuple[str, Access], ...] = tuple((name, "r") for name in ("q", "k", "v", "dout", "lse", "delta"))
    return Kernel(
        source="flash2_backward.cu",
        function="flash2_key_gradients",
        macros=macros(
            storage=problem.dtype,
            **vars(tiles),
            grid_heads=GRID_HEADS.index(total.grouped),
            dq_mode=list(DQ_ACCESS).index(plan.dq),
        ),
        threads=tiles.threads,
        shared_bytes=tiles.shared_bytes,
        accesses=(*inputs, ("dq_accumulator", DQ_ACCESS[plan.dq]), ("dk", total.access), ("dv", total.access)),
    )


def query_gradients_kernel(problem: AttentionProblem, plan: Flash2Plan, hardware: Hardware) -> Kernel:
    """Return the build of the kernel of dQ alone."""
    tiles = BackwardTiles.of(problem, plan, hardware)
    inputs: tuple[tuple[str, Access], ...] = tuple((name, "r") for name in ("q", "k", "v", "dout", "lse", "delta"))
    return Kernel(
        source="flash2_backward.cu",
        function="flash2_query_gradients",
        macros=macros(storage=problem.dtype, **vars(tiles), grid_heads=0, dq_mode=0),
        threads=tiles.threads,
        shared_bytes=tiles.shared_bytes,
        accesses=(*inputs, ("dq", "w")),
    )


def backward(problem: AttentionProblem, plan: Flash2Plan, hardware: Hardware) -> Program:
    """Return the backward program: delta, dK and dV by key tiles, and dQ as the plan sums it."""
    check_plan(problem, plan)
    q, k, v = inputs(problem)
    dout = query_matrix(problem, "dout", problem.value_dim, "input")
    out, lse = forward_results(problem, "input")
    delta = statistic(problem, "delta", "workspace")
    dq, dk, dv = gradients(problem)
    dk_total, dv_total = (GroupedGradient.of(problem, plan, target) for target in (dk, dv))
    sums = query_matrix(problem, "dq_accumulator", problem.head_dim, "workspace", "float32")
    key_tiles = ceil_div(problem.kv_len, plan.tiles.kv)
    if plan.dq == "load_add_store":
        key_tiles = min(key_tiles, 1)  # a thread block walks them all
    key_blocks = key_tiles * problem.batch * (problem.kv_heads if dk_total.grouped == "loop" else problem.heads)
    query_blocks = ceil_div(problem.q_len, plan.tiles.q) * problem.batch * problem.heads
    # The kernel does not touch the sums of dQ where a second one computes it: any array stands for them.
    adds_to = "dq" if plan.dq == "deterministic" else "dq_accumulator"
    key_arrays = ("q", "k", "v", "dout", "lse", "delta", adds_to, dk_total.partial.name, dv_total.partial.name)
    kept: tuple[Array, ...]
    first: tuple[Step, ...]
    key_step = Step(key_gradients_kernel(problem, plan, hardware, dk_total), key_blocks, key_arrays)
    if plan.dq == "deterministic":
        kernel = query_gradients_kernel(problem, plan, hardware)
        kept, first = (delta,), ()
        last = Step(kernel, query_blocks, ("q", "k", "v", "dout", "lse", "delta", "dq"))
    else:
        kept, first = (delta, sums), (elementwise.fill(sums, 0.0),)
        last = elementwise.convert(sums, dq)
    steps = [
        elementwise.row_dots(out, dout, delta),
        *first,
        *dk_total.before,
        *dv_total.before,
        key_step,
        *dk_total.after,
        *dv_total.after,
        last,
    ]
    arrays = (q, k, v, dout, out, lse, *kept, dq, *dk_total.arrays, *dv_total.arrays)
    return program_of(problem, arrays, steps)


ALGORITHM = KernelAlgorithm(
    name="flash2",
    plan_class=Flash2Plan,
    default_plans={"forward": default_forward_plan, "backward": default_backward_plan},
    programs={"forward": forward, "backward": backward},
    saved=("out", "lse"),
    is_deterministic=lambda problem, plan: plan.dq != "reduce" and grouping(problem, plan) != "reduce",
    arithmetic=lambda problem, plan: "mma" if plan.units == "tensor_cores" else "simt",
    why_these_units=why_these_units,
)
