"""FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): FlashAttention-2's loops on Hopper.

The keys and values stream through a pipeline of SRAM buffers, the tiles are those of Hopper's tensor cores, eight-bit
inputs are taken forward. Bytes between memory and multiprocessor are those of FlashAttention-2 with these tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from simattn.algorithms import flash2
from simattn.algorithms.algorithm import Algorithm
from simattn.hardware import Hardware
from simattn.machine import Machine, Values
from simattn.plan import PlanKind, Tiles, candidates
from simattn.problem import AttentionProblem, Direction, PackedProblem, checked_integer
from simattn.traffic import Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class Flash3Plan(flash2.Flash2Plan):
    """Plan of FlashAttention-3: FlashAttention-2's, pipelined, with results staged through SRAM.

    Attributes
    ----------
    packed_heads
        Query heads of a KV head whose rows share a query tile of the forward pass, position by position: the keys and
        values are loaded once for all of them.
    """

    units: Literal["cuda_cores", "tensor_cores"] = "tensor_cores"
    stages: int = 2
    stage_results: bool = True
    transpose_float8_values: bool = True
    packed_heads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_integer("packed_heads", self.packed_heads, 1)
        if self.packed_heads > 1 and self.repeat_kv:
            raise ValueError(f"packed_heads={self.packed_heads} with repeat_kv=True: expected heads that share keys")


# Tiled program


def forward(machine: Machine, problem: AttentionProblem, plan: Flash3Plan) -> None:
    """FlashAttention-2's program, of query heads whose rows share tiles if the plan packs them."""
    packed = plan.packed_heads
    if packed == 1:
        flash2.forward(machine, problem, plan)
        return
    rows = PackedProblem.of(problem, packed)
    inner = machine.inside(rows, {})
    for array in machine.arrays.values():
        values = array.values
        if values is not None and array.heads == "query":
            values = packed_rows(values, packed)
        rows_of_one = rows.q_len if array.heads == "query" else array.rows
        inner.array(
            array.name,
            rows_of_one,
            array.columns,
            dtype=array.dtype,
            heads=array.heads,
            role=array.role,
            values=values,
        )
    flash2.forward(inner, rows, plan)
    for name in ("out", "lse"):
        made = inner.arrays[name]
        values = None if made.values is None else unpacked_rows(made.values, packed)
        machine.array(name, problem.q_len, made.columns, dtype=made.dtype, role=made.role, values=values)
    machine.take_over(inner)


def packed_rows(values: Values, packed: int) -> Values:
    """Return the rows of heads (streams, heads, rows, columns) that follow one another, position by position."""
    streams, heads, rows, columns = values.shape
    split = values.reshape(streams, heads // packed, packed, rows, columns).swapaxes(2, 3)
    return split.reshape(streams, heads // packed, rows * packed, columns)


def unpacked_rows(values: Values, packed: int) -> Values:
    """Return the rows head by head again."""
    streams, heads, rows, columns = values.shape
    split = values.reshape(streams, heads, rows // packed, packed, columns).swapaxes(2, 3)
    return split.reshape(streams, heads * packed, rows // packed, columns)


backward = flash2.backward

# Closed form


def closed_form_forward(problem: AttentionProblem, plan: Flash3Plan) -> Traffic:
    """FlashAttention-2's, of longer matrices for fewer heads if the plan packs heads."""
    if plan.packed_heads > 1:
        problem = PackedProblem.of(problem, plan.packed_heads)
    return flash2.closed_form_forward(problem, plan)


closed_form_backward = flash2.closed_form_backward


def ragged_slots(rows: int, sequences: int, tile_rows: int) -> int:
    """Return the places for query tiles of a head, of sequences with lengths of their own.

    Sequence i, whose first row is s_i, owns the places from ⌊s_i / tile_rows⌋ + i on up to those of the next one. These
    are at least as many as it has tiles, and how many there are in all is known without the lengths.

    Parameters
    ----------
    rows
        Queries of all sequences together.
    sequences
        How many there are.
    tile_rows
        Query rows of a tile.
    """
    return rows // tile_rows + sequences


def ragged_metadata_bytes(rows: int, sequences: int, heads: int, tile_rows: int) -> int:
    """Return the bytes of sequence offsets that a launch over such sequences reads, which count as metadata.

    For each place of each head: one offset of four bytes for every step of a binary search among the sequences, then
    first and last row of the queries and of the keys. All other traffic is the sum of that of the single sequences.

    Parameters
    ----------
    rows, sequences, tile_rows
        As for :func:`ragged_slots`.
    heads
        Query heads.
    """
    if rows == 0:
        return 0
    search = (sequences - 1).bit_length()
    return ragged_slots(rows, sequences, tile_rows) * heads * (search + 4) * 4


# Plans

FORWARD_TILES = {64: (192, 128), 96: (192, 112), 128: (128, 176), 192: (128, 112), 256: (128, 80)}
"""Tiles (query rows, key rows) of this project's kernel by head dimension, rounded up: the fastest on an H100."""

SHORT_FORWARD_TILES = {96: (1536, (128, 128)), 128: (6144, (128, 128)), 192: (1536, (128, 96)), 256: (768, (128, 64))}
SHORT_MASKED_FORWARD_TILES = {64: (1536, (128, 128)), **SHORT_FORWARD_TILES}
"""The fastest for rows that see fewer keys than a number, and that number; without and with a mask."""

FLOAT8_FORWARD_TILES = {64: (192, 160), 96: (192, 128), 128: (128, 224), 192: (128, 160), 256: (128, 128)}
BACKWARD_TILES = {64: (128, 128), 96: (64, 128), 128: (80, 128), 192: (64, 96), 256: (64, 80)}
MASKED_BACKWARD_TILES = {**BACKWARD_TILES, 128: (64, 128)}
"""Tiles (query rows, key rows) of the published kernels by head dimension, rounded up."""


def is_masked(problem: AttentionProblem) -> bool:
    """Say whether the kernels for causal and windowed attention run."""
    return problem.causal or problem.window is not None


def keys_of_a_row(problem: AttentionProblem) -> int:
    """Return how many keys a query sees at most."""
    left, right = problem.window or (None, None)
    right = 0 if problem.causal else right
    if left is None or right is None:
        return problem.kv_len
    return min(problem.kv_len, left + right + 1)


def plan_defaults(
    problem: AttentionProblem, direction: Direction, kind: PlanKind, hardware: Hardware
) -> dict[str, Any]:
    """Return how the kernels stage their tiles; everything is in SRAM already unless on a GPU's plan."""
    if kind != "gpu":
        return {"stage_results": False}
    if direction == "backward":
        return {"stages": 2 if max(problem.head_dim, problem.value_dim) <= 128 else 1, "stage_probabilities": True}
    return {}


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return the kernels' tiles by head dimension, forward this project's and else the published ones, then smaller."""
    columns = max(problem.head_dim, problem.value_dim)
    if direction == "backward":
        table = MASKED_BACKWARD_TILES if is_masked(problem) else BACKWARD_TILES
    else:
        table = FLOAT8_FORWARD_TILES if problem.is_float8 else FORWARD_TILES
    bucket = next((limit for limit in table if columns <= limit), None)
    if bucket is None:
        return candidates(direction)
    first = table[bucket]
    if direction == "forward" and not problem.is_float8:
        short = SHORT_MASKED_FORWARD_TILES if is_masked(problem) else SHORT_FORWARD_TILES
        length, tiles = short.get(bucket, (0, first))
        first = tiles if keys_of_a_row(problem) < length else first
    return candidates(direction, first)


ALGORITHM = Algorithm(
    name="flash3",
    title="FlashAttention-3",
    source="Shah et al. 2024, arXiv 2407.08608, Algorithms 1 to 3",
    summary="FlashAttention-2's loops with Hopper's tiles, a pipeline of key and value buffers, and eight-bit inputs.",
    plan_class=Flash3Plan,
    programs={"forward": forward, "backward": backward},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward},
    paper_tiles=flash2.paper_tiles,
    fit_tiles=flash2.fit_tiles,
    gpu_tiles=gpu_tiles,
    plan_defaults=plan_defaults,
    exact_arithmetics={"forward": ("hopper",)},
)
