"""Pieces of the closed forms: bytes of arrays and tile visits, without any program.

Visits are summed over key tiles where the programs sum over query tiles and the other way round, so that a closed
form and a program share no loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simattn.arithmetic.formats import STORED_BYTES
from simattn.masks import all_rows
from simattn.plan import Plan, Tiles
from simattn.problem import AttentionProblem
from simattn.sums import ceil_div
from simattn.traffic import ArrayTraffic, Traffic

STATISTIC_BYTES = STORED_BYTES["float32"]


@dataclass(frozen=True)
class Visits:
    """How the tiles of a score matrix are visited, for one head.

    Attributes
    ----------
    query_tiles, key_tiles
        Tiles along each axis: T_r and T_c.
    keys
        Key rows loaded when every query tile loads the key tiles it sees: T_r · kv_len without a mask.
    queries
        Query rows loaded when every key tile loads the query tiles that see it: T_c · q_len without a mask.
    """

    query_tiles: int
    key_tiles: int
    keys: int
    queries: int


def tile_visits(problem: AttentionProblem, tiles: Tiles) -> Visits:
    """Count the visits of a problem's visible tiles."""
    keys = sum(
        rows.size * sum(problem.queries_of_keys.tile_visits(rows, tiles.q))
        for rows in all_rows(problem.kv_len, tiles.kv)
    )
    queries = sum(
        rows.size * sum(problem.keys_of_queries.tile_visits(rows, tiles.kv))
        for rows in all_rows(problem.q_len, tiles.q)
    )
    return Visits(ceil_div(problem.q_len, tiles.q), ceil_div(problem.kv_len, tiles.kv), keys, queries)


def matrix_bytes(
    problem: AttentionProblem, rows: int, columns: int, *, heads: int | None = None, dtype: str | None = None
) -> int:
    """Return the bytes of ``rows × columns`` elements for every batch entry and head."""
    item = STORED_BYTES[dtype] if dtype else problem.item_bytes
    return problem.batch * (problem.heads if heads is None else heads) * rows * columns * item


def statistic_bytes(problem: AttentionProblem, rows: int, *, heads: int | None = None) -> int:
    """Return the bytes of one fp32 number per row."""
    return matrix_bytes(problem, rows, 1, heads=heads, dtype="float32")


def read(count: int) -> ArrayTraffic:
    """Return traffic of bytes read."""
    return ArrayTraffic(hbm_read_bytes=count)


def written(count: int) -> ArrayTraffic:
    """Return traffic of bytes written."""
    return ArrayTraffic(hbm_write_bytes=count)


def reduced(count: int) -> ArrayTraffic:
    """Return traffic of bytes reduced into memory."""
    return ArrayTraffic(hbm_reduce_bytes=count)


def total(parts: Sequence[Mapping[str, ArrayTraffic]]) -> Traffic:
    """Add up traffic by array."""
    result = Traffic()
    for part in parts:
        result = result + Traffic(part)
    return result


def key_names(plan: Plan) -> tuple[str, str]:
    """Return the names of the arrays that the main loop reads keys and values from."""
    return ("k_repeated", "v_repeated") if plan.repeat_kv else ("k", "v")


def repeat_traffic(problem: AttentionProblem, plan: Plan) -> list[Mapping[str, ArrayTraffic]]:
    """Return what ``repeat_kv`` moves before the main loop."""
    if not plan.repeat_kv:
        return []
    return [
        {
            name: read(matrix_bytes(problem, problem.kv_len, columns, heads=problem.kv_heads)),
            f"{name}_repeated": written(matrix_bytes(problem, problem.kv_len, columns)),
        }
        for name, columns in (("k", problem.head_dim), ("v", problem.value_dim))
    ]


def descale_traffic(problem: AttentionProblem, blocks: Mapping[str, int]) -> dict[str, ArrayTraffic]:
    """Return the descale factors' bytes, given how many thread blocks of one head load each array's factor."""
    if not problem.is_float8:
        return {}
    return {f"{name}_descale": read(statistic_bytes(problem, count)) for name, count in blocks.items()}


def grouped_gradient_traffic(problem: AttentionProblem, plan: Plan) -> list[Mapping[str, ArrayTraffic]]:
    """Return what dK and dV move once the thread blocks have summed them."""
    parts: list[Mapping[str, ArrayTraffic]] = []
    grouped = plan.grouped_gradients if problem.group_size > 1 or plan.repeat_kv else "loop"
    for name, columns in (("dk", problem.head_dim), ("dv", problem.value_dim)):
        result = written(matrix_bytes(problem, problem.kv_len, columns, heads=problem.kv_heads))
        parts.append({name: result})
        if grouped == "expand":
            expanded = matrix_bytes(problem, problem.kv_len, columns)
            parts.append({f"{name}_expanded": written(expanded) + read(expanded)})
        elif grouped == "reduce":
            sums = matrix_bytes(problem, problem.kv_len, columns, heads=problem.kv_heads, dtype="float32")
            added = matrix_bytes(problem, problem.kv_len, columns, dtype="float32")
            parts.append({f"{name}_accumulator": written(sums) + reduced(added) + read(sums)})
    return parts


def key_value_heads(problem: AttentionProblem, plan: Plan) -> int:
    """Return how many heads have thread blocks of their own in a loop over key tiles."""
    looped = plan.grouped_gradients == "loop" and not plan.repeat_kv
    return problem.kv_heads if looped else problem.heads
