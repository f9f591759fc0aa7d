"""The bytes of Native Sparse Attention by formula, counting visits by keys where the programs count by queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simattn.algorithms import forms
from simattn.algorithms.nsa.plan import NsaPlan, Sizes
from simattn.algorithms.nsa.problem import BRANCHES, NsaProblem, unknown_blocks
from simattn.arithmetic.formats import STORED_BYTES
from simattn.plan import Tiles
from simattn.problem import AttentionProblem
from simattn.sums import ceil_div
from simattn.traffic import ArrayTraffic, Traffic

Part = Mapping[str, ArrayTraffic]


@dataclass(frozen=True)
class BranchVisits:
    """What the tiles of a branch visit, summed over the streams.

    Attributes
    ----------
    keys
        Key rows that the query tiles load.
    queries
        Packed query rows that the key tiles load.
    tiles
        Pairs of a query tile and a key tile.
    """

    keys: int
    queries: int
    tiles: int


def dense_visits(problem: AttentionProblem, queries: int, keys: int) -> BranchVisits:
    """Return the visits of a branch with a band of visible keys."""
    visits, streams = forms.tile_visits(problem, Tiles(q=queries, kv=keys)), problem.batch * problem.kv_heads
    return BranchVisits(streams * visits.keys, streams * visits.queries, tiles=0)


def selected_visits(problem: NsaProblem, plan: NsaPlan) -> BranchVisits:
    """Return the visits of the selected branch: for each block, the tiles of positions that have chosen it.

    Raises
    ------
    ValueError
        If the blocks are not known, and so not how many of them the positions of a thread block share.
    """
    streams, blocks = problem.batch * problem.kv_heads, problem.selection_blocks
    missing = blocks * problem.selection_block - problem.kv_len
    if problem.selection is None:
        if plan.positions > 1 and problem.q_len > 1 and streams and blocks:
            raise unknown_blocks(plan.positions)
        # The k-th block of a position is there from position (k − 1) l' on, and its own block is the clipped one.
        start, stop = max(0, problem.kv_len - problem.q_len), problem.kv_len
        begins = [number * problem.selection_block for number in range(min(problem.selected_blocks, blocks))]
        tiles = streams * sum(stop - max(start, begin) for begin in begins if begin < stop)
        clipped = streams * (stop - max(start, (blocks - 1) * problem.selection_block)) if missing else 0
        return BranchVisits(tiles * problem.selection_block - clipped * missing, tiles * problem.group_size, tiles)
    from simattn.selection_loops import choosing_tiles  # loads Numba

    pairs = clipped_keys = clipped_queries = 0
    absent = -problem.q_len % plan.positions
    for stream in problem.selection.streams:
        tiles_of_blocks = choosing_tiles(stream, plan.positions, blocks)
        pairs += int(tiles_of_blocks.sum())
        clipped_keys += int(tiles_of_blocks[-1:].sum()) if missing else 0
        last_tile = stream[problem.q_len - plan.positions + absent :]
        clipped_queries += int(np.count_nonzero(np.unique(last_tile) >= 0))
    rows = pairs * plan.positions - clipped_queries * absent
    keys = pairs * problem.selection_block - clipped_keys * missing
    return BranchVisits(keys, rows * problem.group_size, pairs)


def branch_visits(problem: NsaProblem, plan: NsaPlan) -> dict[str, BranchVisits]:
    """Return the visits of every branch."""
    sizes = Sizes.of(problem, plan)
    return {
        "compressed": dense_visits(problem.compressed_branch, sizes.queries, sizes.compressed),
        "selected": selected_visits(problem, plan),
        "window": dense_visits(problem.window_branch, sizes.queries, sizes.window),
    }


class Bytes:
    """Bytes of rows of a problem's arrays."""

    def __init__(self, problem: NsaProblem) -> None:
        self.problem = problem
        self.streams = problem.batch * problem.kv_heads
        self.queries = problem.batch * problem.heads * problem.q_len

    def stored(self, elements: int) -> int:
        """Return the bytes of elements in the problem's storage format."""
        return elements * self.problem.item_bytes

    def query_rows(self, columns: int) -> int:
        """Return the bytes of all query rows of so many columns."""
        return self.stored(self.queries * columns)

    @property
    def statistics(self) -> int:
        """Bytes of a number in fp32 for each query row."""
        return self.queries * STORED_BYTES["float32"]

    @property
    def indices(self) -> int:
        """Bytes of the selected blocks."""
        return self.streams * self.problem.q_len * self.problem.selected_blocks * STORED_BYTES["int32"]


def compression(problem: NsaProblem, plan: NsaPlan, blocks: int) -> list[Part]:
    """Return what compressing so many blocks moves: in each thread block its rows once, and all weights."""
    tiles = ceil_div(blocks, Sizes.of(problem, plan).compression)
    rows = blocks * problem.compression_stride + tiles * (problem.compression_block - problem.compression_stride)
    sizes, parts = Bytes(problem), list[Part]()
    for name, columns in problem.compressed_columns.items():
        parts.append(
            {
                name: forms.read(sizes.stored(sizes.streams * rows * columns)),
                f"{name}_compressed": forms.written(sizes.stored(sizes.streams * blocks * columns)),
            }
        )
        for learned, shape in problem.learned(columns).items():
            elements = sizes.streams * tiles * shape.rows * shape.columns
            parts.append({f"{name}_{learned}": forms.read(sizes.stored(elements))})
    return parts


def attending(problem: NsaProblem, plan: NsaPlan) -> list[Part]:
    """Return what the branches, the selection and the gated sum move."""
    sizes, visits = Bytes(problem), branch_visits(problem, plan)
    d, value_dim = problem.head_dim, problem.value_dim
    out, statistics = sizes.query_rows(value_dim), sizes.statistics
    parts: list[Part] = [
        {
            "q": forms.read(sizes.query_rows(d)),
            f"k_{branch}": forms.read(sizes.stored(visited.keys * d)),
            f"v_{branch}": forms.read(sizes.stored(visited.keys * value_dim)),
            f"out_{branch}": forms.written(out) + forms.read(out),
            f"lse_{branch}": forms.written(statistics),
        }
        for branch, visited in visits.items()
    ]
    parts.append({"indices": forms.read(sizes.indices)})
    if problem.selection is None:
        parts.append(
            {
                "q": forms.read(sizes.query_rows(d)),
                "k_compressed": forms.read(sizes.stored(visits["compressed"].keys * d)),
                "lse_compressed": forms.read(statistics),
                "indices": forms.written(sizes.indices),
            }
        )
    parts.append({"gates": forms.read(sizes.query_rows(len(BRANCHES))), "out": forms.written(out)})
    return parts


def closed_form_forward(problem: NsaProblem, plan: NsaPlan) -> Traffic:
    """Compression, the three branches, the selection, and the gated sum."""
    return forms.total([*compression(problem, plan, problem.compressed_len), *attending(problem, plan)])


def closed_form_decode(problem: NsaProblem, plan: NsaPlan) -> Traffic:
    """Return what the forward pass moves, compressing only the blocks that the new keys complete."""
    return forms.total([*compression(problem, plan, problem.new_blocks), *attending(problem, plan)])


def closed_form_backward(problem: NsaProblem, plan: NsaPlan) -> Traffic:
    """Gates; each branch's keys once and its queries for every key tile that they see; lists of them; compression."""
    sizes, visits = Bytes(problem), branch_visits(problem, plan)
    d, value_dim = problem.head_dim, problem.value_dim
    out, statistics, word = sizes.query_rows(value_dim), sizes.statistics, STORED_BYTES["float32"]
    accumulator = sizes.queries * d * word
    parts: list[Part] = [
        {
            "dout": forms.read(out),
            "gates": forms.read(sizes.query_rows(len(BRANCHES))),
            "dgates": forms.written(sizes.query_rows(len(BRANCHES))),
            "dq_accumulator": forms.written(accumulator) + forms.read(accumulator),
            "dq": forms.written(sizes.query_rows(d)),
        }
    ]
    for branch, visited in visits.items():
        keys = sizes.streams * (problem.compressed_len if branch == "compressed" else problem.kv_len)
        item = word if branch == "compressed" else problem.item_bytes
        parts.append(
            {
                f"out_{branch}": forms.read(out),
                f"delta_{branch}": forms.written(statistics) + forms.read(visited.queries * word),
                f"lse_{branch}": forms.read(visited.queries * word),
                "q": forms.read(sizes.stored(visited.queries * d)),
                "dout": forms.read(sizes.stored(visited.queries * value_dim)),
                "gates": forms.read(sizes.stored(visited.queries)),
                "dq_accumulator": forms.reduced(visited.queries * d * word),
                f"k_{branch}": forms.read(sizes.stored(keys * d)),
                f"v_{branch}": forms.read(sizes.stored(keys * value_dim)),
                f"dk_{branch}": forms.written(keys * d * item),
                f"dv_{branch}": forms.written(keys * value_dim * item),
            }
        )
    pairs, blocks = visits["selected"].tiles * word, sizes.streams * problem.selection_blocks * word
    parts.append(
        {
            "indices": forms.read(2 * sizes.indices),
            "block_ends": forms.written(2 * blocks) + forms.read(3 * blocks) + forms.reduced(2 * pairs),
            "choosing": forms.written(pairs) + forms.read(pairs),
        }
    )
    return forms.total([*parts, *compression_gradients(problem, plan)])


def compression_gradients(problem: NsaProblem, plan: NsaPlan) -> list[Part]:
    """Return what handing on the gradients of compressed rows moves."""
    sizes, blocks, word = Bytes(problem), problem.compressed_len, STORED_BYTES["float32"]
    tiles = ceil_div(blocks, Sizes.of(problem, plan).compression)
    rows = blocks * problem.compression_stride + tiles * (problem.compression_block - problem.compression_stride)
    parts: list[Part] = []
    for name, columns in problem.compressed_columns.items():
        made_of = sizes.streams * rows * columns
        whole = sizes.streams * problem.kv_len * columns
        parts.append({f"d{name}_compressed": forms.read(sizes.streams * blocks * columns * word)})
        parts += _accumulated(f"d{name}", whole, made_of, sizes)
        for learned, shape in problem.learned(columns).items():
            elements, loads = shape.rows * shape.columns, 1 if learned == "output_weights" else 2
            times = sizes.streams * tiles
            parts.append({f"{name}_{learned}": forms.read(sizes.stored(loads * times * elements))})
            parts += _accumulated(f"d{name}_{learned}", elements, times * elements, sizes)
        if problem.compression == "mlp":
            parts.append({name: forms.read(sizes.stored(made_of))})
    return parts


def _accumulated(name: str, elements: int, added: int, sizes: Bytes) -> list[Part]:
    """Return what a gradient moves that is zeroed, added up in fp32 and converted."""
    word = STORED_BYTES["float32"]
    sums = forms.written(elements * word) + forms.reduced(added * word) + forms.read(elements * word)
    return [{f"{name}_accumulator": sums, name: forms.written(sizes.stored(elements))}]
