"""The parameter struct that the host hands a kernel, and what problems the kernels take.

``kernels/problem.cuh`` says how every kernel's struct is laid out; this is its only mirror in Python.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.plan import Plan
from simattn.problem import AttentionProblem
from simattn.sums import ceil_div

STORAGE_TYPES = ("float32", "float16", "bfloat16")
"""Storage formats that the kernels take."""

COLUMN_BUCKETS = (16, 32, 64, 96, 128, 192, 256)
"""Head dimensions that kernels are compiled for; others run in the next larger one."""

LONGEST = 1 << 29
"""Most rows of a sequence: positions and window edges stay inside 32 bits."""

UNLIMITED = 1 << 30
"""Window side without a limit."""

MAP_BYTES, MAP_ALIGNMENT = 128, 64
"""Size of a tensor map, and what its place in a parameter struct is a multiple of."""

PROBLEM_FIELDS = (
    *((name, np.int32) for name in ("batch", "heads", "group_size", "q_len", "kv_len", "head_dim", "value_dim")),
    *((name, np.int32) for name in ("window_left", "window_right")),
    *((name, np.float32) for name in ("scale", "scale_log2")),
)
"""``Problem`` of problem.cuh."""

OPERAND_FIELDS = (*((name, np.int32) for name in ("rows", "columns", "matrices")), ("factor", np.float32))
"""``Operand`` of problem.cuh; its ``heads`` are called matrices here, so that all names of a struct differ."""


@dataclass(frozen=True)
class Operand:
    """What a kernel that serves several arrays is told about the one at hand.

    Attributes
    ----------
    rows, columns, heads
        Shape.
    factor
        What it is multiplied by, or filled with.
    """

    rows: int = 0
    columns: int = 0
    heads: int = 0
    factor: float = 1.0


@functools.cache
def struct_of(names: tuple[str, ...], maps: tuple[str, ...] = ()) -> np.dtype[Any]:
    """Return the parameter struct of a kernel with arrays of these names: addresses, counters, strides, sizes.

    Tensor maps of the arrays that ``maps`` names follow, aligned as the device wants them.
    """
    plain = np.dtype(
        [
            *((name, np.uint64) for name in (*names, "counters")),
            *((f"{name}_strides", np.int64, 3) for name in names),
            *PROBLEM_FIELDS,
            *OPERAND_FIELDS,
        ],
        align=True,
    )
    if not maps:
        return plain
    assert plain.fields is not None
    start = ceil_div(plain.itemsize, MAP_ALIGNMENT) * MAP_ALIGNMENT
    offsets = [plain.fields[name][1] for name in plain.names or ()]
    return np.dtype(
        {
            "names": [*(plain.names or ()), *(f"{name}_map" for name in maps)],
            "formats": [*(plain.fields[name][0] for name in plain.names or ()), *(f"V{MAP_BYTES}" for _ in maps)],
            "offsets": [*offsets, *(start + MAP_BYTES * index for index in range(len(maps)))],
            "itemsize": start + MAP_BYTES * len(maps),
        }
    )


def parameters(
    names: tuple[str, ...],
    problem: AttentionProblem,
    operand: Operand,
    strides: Mapping[str, tuple[int, int, int]],
    maps: tuple[str, ...] = (),
) -> npt.NDArray[Any]:
    """Return a parameter struct without addresses and tensor maps, as an array of one element.

    Parameters
    ----------
    names
        The kernel's arrays.
    problem
        Shapes, scale and mask.
    operand
        What the kernel is told besides.
    strides
        Of every array along (batch, row, head), in elements.
    maps
        Arrays of which the struct holds a tensor map.
    """
    made = np.zeros(1, struct_of(names, maps))
    for name in names:
        made[f"{name}_strides"] = strides[name]
    for name in ("batch", "heads", "group_size", "q_len", "kv_len", "head_dim", "value_dim", "scale"):
        made[name] = getattr(problem, name)
    left, right = problem.window or (None, None)
    if problem.causal:
        right = 0
    for name, side in (("window_left", left), ("window_right", right)):
        made[name] = UNLIMITED if side is None else min(side, UNLIMITED)
    made["scale_log2"] = scale_log2(problem)
    made["rows"], made["columns"], made["matrices"] = operand.rows, operand.columns, operand.heads
    made["factor"] = operand.factor
    return made


def scale_log2(problem: AttentionProblem) -> float:
    """Return the factor of the scores in units of log₂."""
    return float(np.float32(problem.scale * math.log2(math.e)))


def check_supported(problem: AttentionProblem) -> None:
    """Raise a ValueError unless the CUDA-core kernels take the problem."""
    if problem.dtype not in STORAGE_TYPES:
        raise ValueError(f"dtype={problem.dtype!r}: the kernel takes {STORAGE_TYPES}")
    if problem.block_mask is not None:
        raise ValueError("block_mask is given: the kernel takes causal masks and windows")
    for name in ("head_dim", "value_dim"):
        value = getattr(problem, name)
        if value % 8 or not 8 <= value <= COLUMN_BUCKETS[-1]:
            raise ValueError(f"{name}={value}: expected a multiple of 8 from 8 to {COLUMN_BUCKETS[-1]}")
    for name in ("q_len", "kv_len"):
        value = getattr(problem, name)
        if value > LONGEST:
            raise ValueError(f"{name}={value}: the kernel takes up to {LONGEST}")
    with np.errstate(over="ignore", under="ignore"):
        factors = np.array([problem.scale, problem.scale * math.log2(math.e)]).astype(np.float32)
    if not np.isfinite(factors).all() or not factors.all():
        raise ValueError(f"scale={problem.scale}: expected a number whose product with log2(e) float32 holds")


def check_plan(plan: Plan) -> None:
    """Raise a ValueError unless the CUDA-core kernels take what every plan has."""
    if plan.repeat_kv:
        raise ValueError("plan.repeat_kv=True: the kernel reads grouped keys where they are")
    if plan.accumulators != "registers":
        raise ValueError(f"plan.accumulators={plan.accumulators!r}: expected 'registers', where the kernel has them")


def column_bucket(problem: AttentionProblem) -> int:
    """Return the smallest bucket that holds the rows of q, k and v."""
    columns = max(problem.head_dim, problem.value_dim)
    return next(bucket for bucket in COLUMN_BUCKETS if bucket >= columns)
