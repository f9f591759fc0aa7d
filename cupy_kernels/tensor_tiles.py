"""How the warps of a forward kernel on tensor cores share its tiles; mirrors ``kernels/flash2_tensor_forward.cu``."""

from __future__ import annotations

from dataclasses import dataclass

from cupy_kernels.forward_tiles import fits, too_large
from cupy_kernels.parameters import column_bucket
from simattn.hardware import Hardware
from simattn.plan import Plan, Tiles
from simattn.problem import AttentionProblem

STEP = 16
"""Contracted elements of a product; rows, keys and columns come in multiples of it."""

THREAD_MULTIPLE, MOST_THREADS = 64, 256
"""Threads of a block: pairs of warps share a tile's copies, and a multiprocessor has 255 registers for each of 256."""

MOST_NUMBERS = 192
"""Scores and outputs that a thread keeps in its registers beside operands and addresses."""

MOST_STAGES = {128: 1}
"""Tiles of keys and values in shared memory, by column bucket, where two are slower than one or leave no registers."""

NUMBERS_BESIDE_QUERIES, MOST_RESIDENT_STEPS = 168, 8
"""The same with queries, which it keeps if there is room, and how many steps of them at most."""

NARROW_VALUES = {192: 128}
"""Column buckets of queries and keys for which there is a kernel with fewer columns of values, and how many."""

WIDEST_COLUMNS = 128
"""Columns of queries up to which a warp of 32 rows has registers for their addresses."""

WIDE_WARPS = ((8, 0), (9, 0))
"""Compute capabilities whose tensor cores outrun the shared memory, so that warps of 32 rows, which read each key and
value for two row tiles, are faster than warps of 16."""


@dataclass(frozen=True, kw_only=True)
class TensorTiles:
    """Tiles of a forward kernel and how its warps share them.

    Attributes
    ----------
    columns, value_columns
        Column buckets of the queries and keys, and of the values.
    query_rows, key_rows
        Tiles.
    warp_rows
        Query rows of a warp.
    stages
        Tiles of keys and values in shared memory.
    resident_steps
        Of the query tile's columns, so many times 16 stay in registers.
    blocks
        Thread blocks that a multiprocessor is to hold at once.
    """

    columns: int
    value_columns: int
    query_rows: int
    key_rows: int
    warp_rows: int
    stages: int
    resident_steps: int
    blocks: int

    @classmethod
    def of(cls, problem: AttentionProblem, plan: Plan, hardware: Hardware) -> TensorTiles:
        """Return how a kernel runs a plan's tiles.

        Raises
        ------
        ValueError
            If it cannot.
        """
        tiles = plan.tiles
        columns = value_columns = column_bucket(problem)
        if columns in NARROW_VALUES and problem.value_dim <= NARROW_VALUES[columns]:
            value_columns = NARROW_VALUES[columns]
        warp_rows = _warp_rows(tiles, columns, value_columns, hardware)
        numbers = warp_rows * (tiles.kv + value_columns) // 32
        if tiles.kv % STEP or numbers > MOST_NUMBERS:
            raise ValueError(
                f"plan.tiles.kv={tiles.kv}: the kernel for {value_columns} columns takes keys in multiples of {STEP} "
                f"up to {32 // STEP * MOST_NUMBERS - value_columns}"
            )
        threads = tiles.q // warp_rows * 32
        multiple = THREAD_MULTIPLE // 32 * warp_rows
        if tiles.q % multiple or threads > MOST_THREADS:
            raise ValueError(
                f"plan.tiles.q={tiles.q}: the kernel takes query rows in multiples of {multiple} up to "
                f"{MOST_THREADS // 32 * warp_rows}"
            )
        steps, room = columns // STEP, max(0, NUMBERS_BESIDE_QUERIES - numbers)
        resident_steps = min(steps, MOST_RESIDENT_STEPS, room * 4 // warp_rows)
        if warp_rows > STEP and resident_steps < steps:
            resident_steps = 0  # a few of a wide warp's take registers and save little
        for blocks in range(max(1, MOST_THREADS // threads), 0, -1):
            for stages in range(MOST_STAGES.get(columns, 2), 0, -1):
                made = cls(
                    columns=columns,
                    value_columns=value_columns,
                    query_rows=tiles.q,
                    key_rows=tiles.kv,
                    warp_rows=warp_rows,
                    stages=stages,
                    resident_steps=resident_steps,
                    blocks=blocks,
                )
                if fits(hardware, made.shared_bytes, blocks):
                    return made
        raise too_large(tiles, max(columns, value_columns), hardware)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.query_rows // self.warp_rows * 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: queries, whose place the output takes, stages of keys and values."""
        columns = self.columns + self.value_columns
        rows = self.query_rows * max(self.columns, self.value_columns) + self.stages * self.key_rows * columns
        return 2 * rows


def _warp_rows(tiles: Tiles, columns: int, value_columns: int, hardware: Hardware) -> int:
    """Return the rows of a warp: 32 where they pay and a thread has registers for them."""
    wide = 2 * STEP
    fits_registers = columns <= WIDEST_COLUMNS and wide * (tiles.kv + value_columns) // 32 <= MOST_NUMBERS
    pays = hardware.compute_capability in WIDE_WARPS
    return wide if pays and fits_registers and tiles.q % (THREAD_MULTIPLE // 32 * wide) == 0 else STEP
