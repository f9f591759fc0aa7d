"""What the host hands a kernel: the macros it is compiled with, its launch shape and its parameter struct.

The struct is declared in ``kernels/flash2.cuh``; this is its only mirror in Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.hardware import Hardware, get_hardware
from simattn.plan import Plan, Tiles
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem
from simattn.sums import ceil_div
from simattn.traffic import ArrayTraffic, Traffic

STORAGE_TYPES = ("float32", "float16", "bfloat16")
"""Storage formats that the kernels take."""

COLUMN_BUCKETS = (16, 32, 64, 96, 128, 192, 256)
"""Head dimensions that kernels are compiled for; others run in the next larger one."""

LONGEST = 1 << 29
"""Most rows of a sequence: positions and window edges stay inside 32 bits."""

UNLIMITED = 1 << 30
"""Window side without a limit."""

NUMBERS_PER_THREAD = 144
"""Scores and outputs that a thread keeps in its 255 registers, beside operands and addresses."""

TARGET_THREADS = 256
"""Threads that a multiprocessor holds at 255 registers each."""

FLASH2_FORWARD_TILES: dict[int, Tiles] = {
    16: Tiles(q=128, kv=64),
    32: Tiles(q=128, kv=64),
    64: Tiles(q=128, kv=64),
    96: Tiles(q=128, kv=128),
    128: Tiles(q=128, kv=128),
    192: Tiles(q=128, kv=64),
    256: Tiles(q=64, kv=64),
}
"""Tiles of the forward kernel, by column bucket, that are fastest on an H100."""

FLASH2_PARAMETERS = np.dtype(
    [
        *((name, np.uint64) for name in ("q", "k", "v", "out", "lse", "counters")),
        *((f"{name}_strides", np.int64, 3) for name in ("q", "k", "v", "out")),
        *((name, np.int32) for name in ("batch", "heads", "group_size", "q_len", "kv_len", "head_dim", "value_dim")),
        *((name, np.int32) for name in ("window_left", "window_right")),
        ("scale_log2", np.float32),
    ],
    align=True,
)
"""``Flash2Parameters``: addresses, strides (batch, row, head) in elements, sizes."""

FLASH2_COUNTERS = (
    ("q", "hbm_read_bytes"),
    ("k", "hbm_read_bytes"),
    ("v", "hbm_read_bytes"),
    ("out", "hbm_write_bytes"),
    ("lse", "hbm_write_bytes"),
)
"""Array and counter of each 64-bit number that an instrumented kernel adds to."""


@dataclass(frozen=True, kw_only=True)
class Flash2Forward:
    """One build of the forward kernel of FlashAttention-2 and its launch shape; see ``kernels/flash2.cuh``.

    Attributes
    ----------
    storage
        Storage format of q, k, v and out.
    columns
        Column bucket.
    query_rows, key_rows
        Tiles.
    lanes
        Threads that share a query row.
    rows_per_thread
        Query rows of a thread.
    staged_keys
        Keys whose probabilities pass through shared memory at a time.
    blocks
        Thread blocks that a multiprocessor is to hold at once.
    """

    storage: str
    columns: int
    query_rows: int
    key_rows: int
    lanes: int
    rows_per_thread: int
    staged_keys: int
    blocks: int

    @classmethod
    def of(cls, problem: AttentionProblem, plan: Plan, hardware: str | Hardware = DEFAULT_HARDWARE) -> Flash2Forward:
        """Return the build for a problem and a plan.

        Raises
        ------
        ValueError
            If the kernel lacks what the problem or the plan asks for.
        """
        check_supported(problem, plan)
        gpu = get_hardware(hardware)
        columns, tiles = column_bucket(problem), plan.tiles
        lanes, rows_per_thread = _thread_tile(tiles, columns)
        warp_rows = 32 // lanes * rows_per_thread
        if tiles.q % warp_rows or tiles.kv % 16:
            raise ValueError(
                f"plan.tiles=({tiles.q}, {tiles.kv}): the kernel for {columns} columns takes query rows in multiples "
                f"of {warp_rows} and keys in multiples of 16"
            )
        threads = tiles.q // rows_per_thread * lanes
        staged = [tiles.kv // parts for parts in (1, 2, 4, 8) if tiles.kv % (parts * lanes) == 0]
        for blocks in range(max(1, TARGET_THREADS // threads), 0, -1):
            for staged_keys in staged:
                made = cls(
                    storage=problem.dtype,
                    columns=columns,
                    query_rows=tiles.q,
                    key_rows=tiles.kv,
                    lanes=lanes,
                    rows_per_thread=rows_per_thread,
                    staged_keys=staged_keys,
                    blocks=blocks,
                )
                if made._fits(gpu):
                    return made
        raise ValueError(
            f"plan.tiles=({tiles.q}, {tiles.kv}) for {columns} columns take more than the "
            f"{gpu.sram_bytes_per_block} bytes of shared memory that a thread block of {gpu.name} may use"
        )

    def _fits(self, gpu: Hardware) -> bool:
        reserved = 1024  # by the driver, for every block
        return (
            self.shared_bytes <= gpu.sram_bytes_per_block
            and self.blocks * (self.shared_bytes + reserved) <= gpu.shared_bytes_per_multiprocessor
        )

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.query_rows // self.rows_per_thread * self.lanes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: the tiles of q, k and v and the staged probabilities, in float32."""
        padded = self.columns + 4
        rows = (self.query_rows + self.key_rows) * padded + self.key_rows * self.columns
        return 4 * (rows + self.staged_keys * (self.query_rows + 4))

    def macros(self, *, count_traffic: bool) -> dict[str, str]:
        """Return the macros that the kernel is compiled with, by name."""
        values = {
            "STORAGE": self.storage,
            "COLUMNS": self.columns,
            "QUERY_ROWS": self.query_rows,
            "KEY_ROWS": self.key_rows,
            "LANES": self.lanes,
            "ROWS_PER_THREAD": self.rows_per_thread,
            "STAGED_KEYS": self.staged_keys,
            "BLOCKS": self.blocks,
        }
        counting = {"COUNT_TRAFFIC": "1"} if count_traffic else {}
        return {name: str(value) for name, value in values.items()} | counting

    def grid(self, problem: AttentionProblem) -> int:
        """Return how many thread blocks run; 0 where there is nothing to compute.

        Raises
        ------
        ValueError
            If they are more than a grid may have.
        """
        blocks = ceil_div(problem.q_len, self.query_rows) * problem.batch * problem.heads
        if blocks >= 1 << 31:
            raise ValueError(
                f"q_len={problem.q_len}, batch={problem.batch} and heads={problem.heads} need {blocks} thread blocks: "
                f"expected fewer than {1 << 31}"
            )
        return blocks


def _thread_tile(tiles: Tiles, columns: int) -> tuple[int, int]:
    """Return the lanes that share a row and the rows of a thread, such that its numbers fit its registers."""
    for lanes, rows_per_thread in ((8, 8), (16, 8), (16, 4)):
        if rows_per_thread * (tiles.kv + columns) // lanes <= NUMBERS_PER_THREAD:
            return lanes, rows_per_thread
    most = 16 * NUMBERS_PER_THREAD // 4 - columns
    raise ValueError(f"plan.tiles.kv={tiles.kv}: the kernel for {columns} columns takes up to {most}")


def check_supported(problem: AttentionProblem, plan: Plan) -> None:
    """Raise a ValueError unless the CUDA-core kernels take the problem and the plan."""
    if problem.dtype not in STORAGE_TYPES:
        raise ValueError(f"dtype={problem.dtype!r}: the kernel takes {STORAGE_TYPES}")
    if problem.block_mask is not None:
        raise ValueError("block_mask is given: the kernel takes causal masks and windows")
    for name in ("head_dim", "value_dim"):
        value = getattr(problem, name)
        if value % 8 or value > COLUMN_BUCKETS[-1]:
            raise ValueError(f"{name}={value}: the kernel takes multiples of 8 up to {COLUMN_BUCKETS[-1]}")
    for name in ("q_len", "kv_len"):
        value = getattr(problem, name)
        if value > LONGEST:
            raise ValueError(f"{name}={value}: the kernel takes up to {LONGEST}")
    if plan.repeat_kv:
        raise ValueError("plan.repeat_kv=True: the kernel reads grouped keys where they are")


def column_bucket(problem: AttentionProblem) -> int:
    """Return the smallest bucket that holds the rows of q, k and v."""
    columns = max(problem.head_dim, problem.value_dim)
    return next(bucket for bucket in COLUMN_BUCKETS if bucket >= columns)


def flash2_parameters(
    problem: AttentionProblem, addresses: Mapping[str, int], strides: Mapping[str, tuple[int, int, int]]
) -> npt.NDArray[Any]:
    """Return the parameter struct, as an array of one element.

    Parameters
    ----------
    problem
        Shapes, scale and mask.
    addresses
        Of "q", "k", "v", "out" and "lse", and of "counters" for an instrumented build.
    strides
        Of "q", "k", "v" and "out" along (batch, row, head), in elements.
    """
    made = np.zeros(1, FLASH2_PARAMETERS)
    for name, address in addresses.items():
        made[name] = address
    for name, steps in strides.items():
        made[f"{name}_strides"] = steps
    for name in ("batch", "heads", "group_size", "q_len", "kv_len", "head_dim", "value_dim"):
        made[name] = getattr(problem, name)
    left, right = problem.window or (None, None)
    if problem.causal:
        right = 0
    for name, side in (("window_left", left), ("window_right", right)):
        made[name] = UNLIMITED if side is None else min(side, UNLIMITED)
    made["scale_log2"] = np.float32(problem.scale * math.log2(math.e))
    return made


def traffic_of(counters: npt.NDArray[np.uint64]) -> Traffic:
    """Return the traffic that an instrumented kernel counted, in the order of :data:`FLASH2_COUNTERS`."""
    return Traffic(
        {
            name: ArrayTraffic(**{counter: int(count)})
            for (name, counter), count in zip(FLASH2_COUNTERS, counters, strict=True)
        }
    )
