"""How the threads of a backward kernel share its tiles; mirrors ``kernels/backward.cuh``."""

from __future__ import annotations

from dataclasses import dataclass

from cupy_kernels.forward_tiles import fits, too_large
from cupy_kernels.parameters import column_bucket
from simattn.hardware import Hardware
from simattn.plan import Plan
from simattn.problem import AttentionProblem

THREADS = 256
GRID = 16
"""Threads across and down a tile of scores."""

NUMBERS_PER_THREAD = 160
"""Gradients and scores that a thread keeps in its 255 registers, beside operands and addresses."""


@dataclass(frozen=True, kw_only=True)
class BackwardTiles:
    """Tiles of a backward kernel.

    Attributes
    ----------
    columns
        Column bucket.
    query_rows, key_rows
        Tiles.
    blocks
        Thread blocks that a multiprocessor is to hold at once.
    """

    columns: int
    query_rows: int
    key_rows: int
    blocks: int = 1

    @classmethod
    def of(cls, problem: AttentionProblem, plan: Plan, hardware: Hardware) -> BackwardTiles:
        """Return how a kernel runs a plan's tiles.

        Raises
        ------
        ValueError
            If it cannot.
        """
        columns, tiles = column_bucket(problem), plan.tiles
        across = 4 if columns == 16 else 16 if columns % 64 == 0 else 8
        down = THREADS // across
        multiple = max(GRID, down)
        if tiles.q % multiple or tiles.kv % multiple or tiles.q > THREADS:
            raise ValueError(
                f"plan.tiles=({tiles.q}, {tiles.kv}): the backward kernels for {columns} columns take queries and keys "
                f"in multiples of {multiple}, queries up to {THREADS}"
            )
        made = cls(columns=columns, query_rows=tiles.q, key_rows=tiles.kv)
        width = columns // across
        numbers = (2 * tiles.kv + tiles.q) // down * width + tiles.q // GRID * (tiles.kv // GRID)
        if numbers > NUMBERS_PER_THREAD:
            raise ValueError(
                f"plan.tiles=({tiles.q}, {tiles.kv}): the backward kernels for {columns} columns take up to "
                f"{NUMBERS_PER_THREAD} numbers a thread, and these tiles have {numbers}"
            )
        if not fits(hardware, made.shared_bytes):
            raise too_large(tiles, columns, hardware)
        return made

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return THREADS

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: tiles of q, k, v and dout, the scores, three statistics, in float32."""
        rows = 2 * (self.query_rows + self.key_rows) * (self.columns + 4)
        return 4 * (rows + self.query_rows * (self.key_rows + 8) + 3 * self.query_rows)
