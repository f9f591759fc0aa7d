"""How the threads of a backward kernel share its tiles; mirrors ``kernels/backward.cuh``."""

from __future__ import annotations

from dataclasses import dataclass

from cupy_kernels.forward_tiles import fits, too_large
from cupy_kernels.parameters import column_bucket
from simattn.hardware import Hardware
from simattn.plan import Plan
from simattn.problem import AttentionProblem

SCORES_ACROSS = 16
"""Threads that share a row of scores."""

ACROSS = {16: 4, 32: 8, 64: 16, 96: 8, 128: 16, 192: 16, 256: 32}
"""Threads that share a row of a gradient, by column bucket."""

FEWEST_THREADS = 128
"""Threads of the smallest block."""

NUMBERS_PER_THREAD = 160
"""Gradients and scores that a thread keeps in its 255 registers, beside operands and addresses."""

FLASH1_NUMBERS_PER_THREAD = 112
"""The same where it also divides, and loads dQ."""

SEQUENTIAL_NUMBERS_PER_THREAD = 80
"""The same where a block of flash2 walks the key tiles in order, and loads and stores dQ."""

QUERY_ROWS = (8, 16, 32, 64, 128, 256)
KEY_ROWS = (16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class BackwardTiles:
    """Tiles of a backward kernel.

    Attributes
    ----------
    columns
        Column bucket.
    query_rows, key_rows
        Tiles.
    warps
        Of a thread block.
    blocks
        Thread blocks that a multiprocessor is to hold at once.
    """

    columns: int
    query_rows: int
    key_rows: int
    warps: int = 8
    blocks: int = 1

    @classmethod
    def of(
        cls, problem: AttentionProblem, plan: Plan, hardware: Hardware, most_numbers: int = NUMBERS_PER_THREAD
    ) -> BackwardTiles:
        """Return how a kernel runs a plan's tiles, with the most threads that share them evenly.

        Raises
        ------
        ValueError
            If it cannot.
        """
        columns, tiles = column_bucket(problem), plan.tiles
        for warps in (8, 4):
            made = cls(columns=columns, query_rows=tiles.q, key_rows=tiles.kv, warps=warps)
            if made._is_shared_evenly and made._numbers_per_thread <= most_numbers:
                if not fits(hardware, made.shared_bytes):
                    raise too_large(tiles, columns, hardware)
                return made
        raise ValueError(
            f"plan.tiles=({tiles.q}, {tiles.kv}): the backward kernels for {columns} columns take {QUERY_ROWS} queries "
            f"and {KEY_ROWS} keys, at least {FEWEST_THREADS // ACROSS[columns]} of both, and up to {most_numbers} "
            "numbers of a thread"
        )

    @property
    def _is_shared_evenly(self) -> bool:
        down = self.threads // ACROSS[self.columns]
        return (
            self.query_rows in QUERY_ROWS
            and self.key_rows in KEY_ROWS
            and min(self.query_rows, self.key_rows) >= down
            and self.threads // SCORES_ACROSS <= self.query_rows <= self.threads
        )

    @property
    def _numbers_per_thread(self) -> int:
        width, down = self.columns // ACROSS[self.columns], self.threads // ACROSS[self.columns]
        scores = self.query_rows * self.key_rows // self.threads
        return 2 * self.key_rows // down * width + max(scores, self.query_rows // down * width)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: tiles of q, k, v and dout, the scores, three statistics, in float32."""
        rows = 2 * (self.query_rows + self.key_rows) * self.columns
        return 4 * (rows + self.query_rows * (self.key_rows + 4) + 3 * self.query_rows)
