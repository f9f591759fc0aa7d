"""FlashAttention-3 on Hopper's tensor cores: from a problem and a plan to the kernel that runs it.

The twin of :mod:`simattn.algorithms.flash3`, forward. Bits are those of ``simattn.run("flash3", arithmetic="hopper")``
and depend on the plan's tile of keys alone; neither they nor the bytes counted depend on how many thread blocks there
are.

Sequences with lengths of their own (:class:`RaggedProblem`) follow one another along the rows; where they start, only
the device knows. A launch then has room for as many query tiles as there can be, and every thread block finds out which
sequence a tile is of. Each sequence has the bits that it has alone with the same tile of keys.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cupy_kernels.algorithm import KernelAlgorithm
from cupy_kernels.forward_tiles import too_large
from cupy_kernels.parameters import check_plan as check_every_plan
from cupy_kernels.program import (
    Array,
    Boxes,
    Kernel,
    Program,
    Step,
    forward_results,
    inputs,
    macros,
    offsets,
    program_of,
    table,
)
from cupy_kernels.ragged import OFFSETS, RaggedProblem
from simattn.algorithms.flash3 import Flash3Plan, gpu_tiles, is_masked, ragged_slots
from simattn.hardware import Hardware
from simattn.plan import Tiles
from simattn.problem import AttentionProblem
from simattn.sums import ceil_div

DTYPES = ("float16", "bfloat16")
"""Storage formats that the kernel takes."""

COLUMN_BUCKETS = (64, 96, 128, 192, 256)
"""Head dimensions that the kernel is compiled for; others run in the next larger one."""

WARPGROUP = 128
GROUP_ROWS = 64
"""Query rows of a warpgroup."""

MOST_GROUPS = 3
SMALLEST_KEY_TILE, LARGEST_KEY_TILE, KEY_MULTIPLE = 64, 256, 16
"""Keys of a tile: the columns of a product."""

SLAB_COLUMNS, SLAB_ROW_BYTES = 64, 128
RINGS = ((2, 4, 4), (2, 2, 2), (1, 2, 2))
"""Tiles of queries, keys and values in shared memory; the first that fits is taken. On an H100 three are no better
than two."""

BARRIER_BYTES, WORK_STAGES, WORK_BYTES = 256, 2, 32
"""Shared memory for the barriers; the places of query tiles in shared memory, and the bytes of each."""

REPAIRED_ROWS = "repaired_rows"
"""What bytes are counted as that were read again, for rows that infinite or NaN values of hidden keys got into."""

WARP_ROWS = 16
TURNS_COLUMNS = 192
"""Columns up to which the warpgroups issue their products in turns."""

SECTION_BYTES = (8 << 20, 10 << 20, 12 << 20, 14 << 20, 16 << 20)
"""Keys and values to work on at a time under a mask, to choose from: what the L2 cache keeps beside the rest."""

MOST_TILES_COMPARED = 20_000
"""Query tiles above which the first choice is taken; then they are many for each thread block."""

TILE_OVERHEAD = 1.5
"""What a query tile costs besides the tiles of keys that it visits, in tiles of keys."""

LAST_SHARE = 0.03
"""How much of the work under a mask is left for the end, in the shortest tiles."""

LARGEST_TILE_NUMBER = (1 << 31) - 1
LAST_OF_BLOCK = 1 << 31

# Plans


def column_bucket(problem: AttentionProblem) -> int:
    """Return the smallest bucket that holds the rows of q, k and v."""
    columns = max(problem.head_dim, problem.value_dim)
    return next(bucket for bucket in COLUMN_BUCKETS if bucket >= columns)


def default_forward_plan(problem: AttentionProblem, hardware: Hardware, deterministic: bool) -> Flash3Plan:
    """Return the tiles that are fastest; every device that runs the kernel has the shared memory for them."""
    chosen_for = problem.average if isinstance(problem, RaggedProblem) else problem
    return Flash3Plan(tiles=gpu_tiles(chosen_for, hardware, "forward")[0])


def refusal(problem: AttentionProblem, hardware: Hardware) -> str | None:
    """Return why there is no kernel for a problem on a GPU, or None."""
    if problem.dtype not in DTYPES:
        return f"dtype={problem.dtype!r}: flash3 takes {DTYPES}"
    if hardware.compute_capability != (9, 0):
        major, minor = hardware.compute_capability
        # No other algorithm takes sequences with lengths of their own.
        expected = "another GPU" if isinstance(problem, RaggedProblem) else "another algorithm, such as 'flash2'"
        return (
            f"algorithm='flash3' runs on compute capability 9.0 (Hopper), and {hardware.name} has {major}.{minor}: "
            f"expected {expected}"
        )
    return None


def check_plan(problem: AttentionProblem, plan: Flash3Plan) -> None:
    """Raise a ValueError unless there is a kernel for a plan; fields that decide nothing but on-chip traffic pass."""
    check_every_plan(plan)
    tiles, packed = plan.tiles, plan.packed_heads
    if tiles.q % GROUP_ROWS or tiles.q > MOST_GROUPS * GROUP_ROWS:
        raise ValueError(
            f"plan.tiles.q={tiles.q}: the kernel takes query rows in multiples of {GROUP_ROWS} up to "
            f"{MOST_GROUPS * GROUP_ROWS}"
        )
    if tiles.kv % KEY_MULTIPLE or not SMALLEST_KEY_TILE <= tiles.kv <= LARGEST_KEY_TILE:
        raise ValueError(
            f"plan.tiles.kv={tiles.kv}: the kernel takes keys in multiples of {KEY_MULTIPLE} from {SMALLEST_KEY_TILE} "
            f"to {LARGEST_KEY_TILE}"
        )
    if tiles.depth is not None and tiles.depth < max(problem.head_dim, problem.value_dim):
        raise ValueError(f"plan.tiles.depth={tiles.depth}: expected None, the kernel takes all columns at a time")
    if packed > 1 and isinstance(problem, RaggedProblem):
        raise ValueError(f"plan.packed_heads={packed} with cu_seqlens_q: expected 1, the kernel packs no heads then")
    if GROUP_ROWS % packed or problem.group_size % packed:
        raise ValueError(
            f"plan.packed_heads={packed}: expected a divisor of {GROUP_ROWS} and of the {problem.group_size} query "
            "heads of a KV head"
        )


# Programs


def forward_kernel(problem: AttentionProblem, plan: Flash3Plan, hardware: Hardware) -> Kernel:
    """Return the build of the forward kernel for a plan.

    Raises
    ------
    ValueError
        If its tiles do not fit the device's shared memory.
    """
    columns, tiles, packed = column_bucket(problem), plan.tiles, plan.packed_heads
    groups = tiles.q // GROUP_ROWS
    for rings in RINGS:
        shared_bytes = shared_bytes_of(columns, tiles, rings)
        if shared_bytes <= hardware.sram_bytes_per_block:
            break
    else:
        raise too_large(tiles, columns, hardware)
    query_stages, key_stages, value_stages = rings
    ragged = isinstance(problem, RaggedProblem)
    order = OFFSETS if ragged else ("schedule",)
    return Kernel(
        source="flash3_forward.cu",
        function="flash3_forward",
        macros=macros(
            storage=problem.dtype,
            columns=columns,
            query_rows=tiles.q,
            key_rows=tiles.kv,
            query_stages=query_stages,
            key_stages=key_stages,
            value_stages=value_stages,
            packed_heads=packed,
            masked=int(is_masked(problem)),
            ragged=int(ragged),
            take_turns=int(columns <= TURNS_COLUMNS and groups > 1),
        ),
        threads=WARPGROUP * (groups + 1),
        shared_bytes=shared_bytes,
        accesses=(
            ("q", "r"),
            ("k", "r"),
            ("v", "r"),
            ("out", "w"),
            ("lse", "w"),
            *((name, "r") for name in order),
        ),
        boxes=(
            Boxes("q", GROUP_ROWS, packed, ragged),
            Boxes("k", tiles.kv, None, ragged),
            Boxes("v", tiles.kv, None, ragged),
            Boxes("out", WARP_ROWS, packed, ragged),
        ),
        units="wgmma",
        also_counted=(REPAIRED_ROWS,),
    )


def shared_bytes_of(columns: int, tiles: Tiles, rings: tuple[int, int, int]) -> int:
    """Return the shared memory of a thread block: slabs of queries, keys and values, barriers and places."""
    row_bytes = ceil_div(columns, SLAB_COLUMNS) * SLAB_ROW_BYTES
    query_stages, key_stages, value_stages = rings
    slabs = (query_stages * tiles.q + (key_stages + value_stages) * tiles.kv) * row_bytes
    return slabs + BARRIER_BYTES + WORK_STAGES * WORK_BYTES


def forward(problem: AttentionProblem, plan: Flash3Plan, hardware: Hardware) -> Program:
    """Return the forward program: one kernel, whose thread blocks walk the query tiles."""
    check_plan(problem, plan)
    kernel = forward_kernel(problem, plan, hardware)
    ragged = isinstance(problem, RaggedProblem)
    if ragged:
        tiles = ragged_slots(problem.q_len, problem.batch, plan.tiles.q) * problem.heads if problem.q_len else 0
    else:
        tiles = matrices_of(problem, plan) * tiles_of_matrix(problem, plan)
    # A thread block steps past the last tile by at most one turn.
    if tiles + hardware.streaming_multiprocessors > LARGEST_TILE_NUMBER:
        raise ValueError(f"{kernel.function} has {tiles} query tiles for this problem: expected fewer, a smaller batch")
    blocks = min(hardware.streaming_multiprocessors, tiles)
    if ragged:
        arrays = ragged_arrays(problem)
        return program_of(problem, arrays, [Step(kernel, blocks, kernel.names)])
    words = schedule(problem, plan, blocks) if is_masked(problem) else np.zeros(0, np.int32)
    arrays = (*inputs(problem), *forward_results(problem), table("schedule", len(words)))
    step = Step(kernel, blocks, tuple(array.name for array in arrays))
    return program_of(problem, arrays, [step], {"schedule": words})


def ragged_arrays(problem: AttentionProblem) -> tuple[Array, ...]:
    """Return the arrays of sequences with lengths of their own, inputs first."""

    def without_batch(array: Array) -> Array:
        return replace(array, batch=1, ragged=True)

    return (
        *map(without_batch, inputs(problem)),
        *(offsets(name, problem.batch) for name in OFFSETS),
        *map(without_batch, forward_results(problem)),
    )


# The order of query tiles


def matrices_of(problem: AttentionProblem, plan: Flash3Plan) -> int:
    """Return how many matrices of packed query rows there are."""
    return problem.batch * (problem.heads // plan.packed_heads)


def tiles_of_matrix(problem: AttentionProblem, plan: Flash3Plan) -> int:
    """Return the query tiles of each."""
    return ceil_div(problem.q_len * plan.packed_heads, plan.tiles.q)


def key_tiles(problem: AttentionProblem, plan: Flash3Plan) -> npt.NDArray[np.int64]:
    """Return how many tiles of keys each query tile of a matrix visits."""
    packed, tiles = plan.packed_heads, plan.tiles
    rows = np.arange(tiles_of_matrix(problem, plan), dtype=np.int64) * tiles.q
    first = rows // packed
    last = (np.minimum(rows + tiles.q, problem.q_len * packed) - 1) // packed
    shift = problem.kv_len - problem.q_len
    left, right = problem.window or (None, None)
    right = 0 if problem.causal else right
    first_key = np.zeros_like(rows) if left is None else np.maximum(0, first + shift - left)
    stop_key = np.full_like(rows, problem.kv_len)
    if right is not None:
        stop_key = np.minimum(stop_key, last + shift + right + 1)
    visited = -(-stop_key // tiles.kv) - first_key // tiles.kv
    return np.where(first_key < stop_key, visited, 0)


def assignment(problem: AttentionProblem, plan: Flash3Plan, blocks: int) -> list[list[int]]:
    """Return the query tiles of every thread block, each at least one, in order.

    The L2 cache holds the keys and values of the matrices that are worked on at a time. Of these, the tiles that visit
    most keys come first, each for the block that has the least to do so far; the shortest of all matrices come last.
    How many matrices they are is what lets the blocks end at about the same time.
    """
    matrices, costs = matrices_of(problem, plan), key_tiles(problem, plan)
    order = np.argsort(-costs, kind="stable")
    times = costs[order] + TILE_OVERHEAD
    first_of_last = int(np.count_nonzero(np.cumsum(times[::-1]) > LAST_SHARE * times.sum()))
    tiles = list(zip(order.tolist(), times.tolist(), strict=True))

    def assign(section: int) -> tuple[float, list[list[int]]]:
        taken: list[list[int]] = [[] for _ in range(blocks)]
        loads = [(0.0, block) for block in range(blocks)]
        work = [(tiles[:first_of_last], range(first, first + section)) for first in range(0, matrices, section)]
        for some_tiles, some_matrices in (*work, (tiles[first_of_last:], range(matrices))):
            for tile, time in some_tiles:
                for matrix in range(some_matrices.start, min(some_matrices.stop, matrices)):
                    load, block = loads[0]
                    taken[block].append(matrix * len(tiles) + tile)
                    heapq.heapreplace(loads, (load + time, block))
        return max(loads, default=(0.0, 0))[0], taken

    choices = sections(problem, plan)
    if matrices * len(tiles) > MOST_TILES_COMPARED:
        choices = choices[:1]
    return min(map(assign, choices), key=lambda assigned: assigned[0])[1]


def schedule(problem: AttentionProblem, plan: Flash3Plan, blocks: int) -> npt.NDArray[np.int32]:
    """Return the first tile of every thread block, then their second ones and so on; a block's last one is marked."""
    taken = assignment(problem, plan, blocks)
    words = np.zeros((max(map(len, taken), default=0), blocks), np.uint32)
    for block, tiles in enumerate(taken):
        words[: len(tiles), block] = tiles
        words[len(tiles) - 1, block] |= LAST_OF_BLOCK
    return words.reshape(-1).view(np.int32)


def sections(problem: AttentionProblem, plan: Flash3Plan) -> list[int]:
    """Return how many query matrices may be worked on at a time, so that the L2 cache holds their keys and values."""
    key_bytes = max(1, problem.kv_len * (problem.head_dim + problem.value_dim) * problem.item_bytes)
    sharing = problem.group_size // plan.packed_heads
    chosen = {min(matrices_of(problem, plan), max(1, size // key_bytes) * sharing) for size in SECTION_BYTES}
    return sorted(max(1, section) for section in chosen)


ALGORITHM = KernelAlgorithm(
    name="flash3",
    plan_class=Flash3Plan,
    default_plans={"forward": default_forward_plan},
    programs={"forward": forward},
    saved=("out", "lse"),
    is_deterministic=lambda problem, plan: True,
    refusal=refusal,
    arithmetic=lambda problem, plan: "hopper",
    why_these_units=lambda direction, problem, plan, hardware: "its kernel is for Hopper's tensor cores",
    ragged=("forward",),
)
