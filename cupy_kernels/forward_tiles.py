"""How the threads of a forward kernel share its tiles; mirrors ``kernels/forward.cuh``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cupy_kernels.parameters import column_bucket
from simattn.hardware import Hardware, get_hardware
from simattn.plan import Plan, Tiles
from simattn.problem import AttentionProblem

THREAD_TILES = ((8, 8, 144), (16, 8, 144), (8, 4, 144), (16, 4, 144))
"""Lanes that share a row, rows of a thread, and the most scores and outputs that it keeps in its 255 registers beside
operands and addresses; the first that takes a plan's tiles is used."""

TARGET_THREADS = 256
"""Threads that a multiprocessor holds at 255 registers each."""

MOST_THREADS = 256
"""Threads of a block: more would have too few registers each."""

RESERVED_SHARED_BYTES = 1024
"""Shared memory that the driver keeps of every thread block."""


@dataclass(frozen=True, kw_only=True)
class ForwardTiles:
    """Tiles of a forward kernel and how its threads share them.

    Attributes
    ----------
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

    columns: int
    query_rows: int
    key_rows: int
    lanes: int
    rows_per_thread: int
    staged_keys: int
    blocks: int

    @classmethod
    def of(
        cls,
        problem: AttentionProblem,
        plan: Plan,
        hardware: str | Hardware,
        thread_tiles: Sequence[tuple[int, int, int]] = THREAD_TILES,
    ) -> ForwardTiles:
        """Return how a kernel runs a plan's tiles.

        Raises
        ------
        ValueError
            If it cannot.
        """
        gpu, columns, tiles = get_hardware(hardware), column_bucket(problem), plan.tiles
        lanes, rows_per_thread = _thread_tile(tiles, columns, thread_tiles)
        if tiles.kv % 16:
            raise ValueError(f"plan.tiles.kv={tiles.kv}: the kernel takes keys in multiples of 16")
        threads = tiles.q // rows_per_thread * lanes
        if threads > MOST_THREADS:
            raise ValueError(
                f"plan.tiles=({tiles.q}, {tiles.kv}): the kernel for {columns} columns takes up to "
                f"{MOST_THREADS // lanes * rows_per_thread} query rows"
            )
        staged = [tiles.kv // parts for parts in (1, 2, 4, 8) if tiles.kv % (parts * lanes) == 0]
        for blocks in range(max(1, TARGET_THREADS // threads), 0, -1):
            for staged_keys in staged:
                made = cls(
                    columns=columns,
                    query_rows=tiles.q,
                    key_rows=tiles.kv,
                    lanes=lanes,
                    rows_per_thread=rows_per_thread,
                    staged_keys=staged_keys,
                    blocks=blocks,
                )
                if fits(gpu, made.shared_bytes, blocks):
                    return made
        raise too_large(tiles, columns, gpu)

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


def _thread_tile(tiles: Tiles, columns: int, shapes: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Return the lanes that share a row and the rows of a thread, such that its numbers fit its registers."""
    for lanes, rows_per_thread, most in shapes:
        fits_registers = 2 * lanes <= columns and rows_per_thread * (tiles.kv + columns) // lanes <= most
        if fits_registers and tiles.q % (32 // lanes * rows_per_thread) == 0:
            return lanes, rows_per_thread
    usable = [shape for shape in shapes if 2 * shape[0] <= columns]
    multiple = min(32 // lanes * rows_per_thread for lanes, rows_per_thread, _ in usable)
    longest = max(lanes * most // rows_per_thread - columns for lanes, rows_per_thread, most in usable)
    raise ValueError(
        f"plan.tiles=({tiles.q}, {tiles.kv}): the kernel for {columns} columns takes query rows in multiples of "
        f"{multiple}, more for long tiles of keys, and takes up to {longest} keys"
    )


def fits(gpu: Hardware, shared_bytes: int, blocks: int = 1) -> bool:
    """Say whether a multiprocessor holds so many thread blocks with so much shared memory each."""
    return (
        shared_bytes <= gpu.sram_bytes_per_block
        and blocks * (shared_bytes + RESERVED_SHARED_BYTES) <= gpu.shared_bytes_per_multiprocessor
    )


def too_large(tiles: Tiles, columns: int, gpu: Hardware) -> ValueError:
    """Return the error for tiles that do not fit."""
    return ValueError(
        f"plan.tiles=({tiles.q}, {tiles.kv}) for {columns} columns take more than the {gpu.sram_bytes_per_block} bytes "
        f"of shared memory that a thread block of {gpu.name} may use"
    )


def first_that_fits(best: Tiles, smaller: Sequence[Tiles], run: Callable[[Tiles], object]) -> Tiles:
    """Return the best tiles, or the first of those smaller than they that ``run`` takes.

    Raises
    ------
    ValueError
        If it takes none of them.
    """
    candidates = [best, *(tiles for tiles in smaller if tiles.q * tiles.kv < best.q * best.kv)]
    for tiles in candidates[:-1]:
        try:
            run(tiles)
        except ValueError:
            continue
        return tiles
    run(candidates[-1])
    return candidates[-1]
