"""What a layer's programs moved, used and computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from simattn.layers.phases import Phase
from simattn.machine import Operations
from simattn.matrix_products import ProductTiles
from simattn.problem import AttentionProblem, Direction
from simattn.tables import byte_text, text_table
from simattn.traffic import COUNTERS, Traffic

if TYPE_CHECKING:
    from simattn.layers.layer import AttentionLayer

Values = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """One program of a layer: a projection, a gradient of one, or the attention.

    Attributes
    ----------
    name
        The projection as a formula, "attention" or "attention backward".
    direction
        "forward" or "backward"; "decode" of an attention that has a program for decoding steps.
    traffic
        Bytes moved.
    operations
        Arithmetic operations done.
    peak_sram_bytes, peak_register_bytes
        Most on-chip memory that the tiles of one thread block took.
    """

    name: str
    direction: Direction
    traffic: Traffic
    operations: Operations
    peak_sram_bytes: int
    peak_register_bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Additions and multiplications of a layer's matrix products, from its shapes alone.

    Attributes
    ----------
    projections
        Of the products with weights: O(n d²).
    attention
        Of the scores that the mask leaves and their products with values: O(n² d). A program does more where a tile
        is partly masked, and where its backward pass computes the scores again.
    """

    projections: int
    attention: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.projections + self.attention


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LayerRun:
    """What the programs of a layer moved, used and, when they were simulated, computed. Its repr is a table.

    Attributes
    ----------
    layer, phase
        What ran; see :meth:`simattn.AttentionLayer.profile`.
    problem
        The attention in it.
    algorithm
        The program of the attention.
    projection_tiles
        Tiles of the projections.
    parts
        The programs, in the order in which they run.
    y
        Output (batch, length, model_width) of a simulated forward pass, else None.
    cache
        Its k, (batch, kv_len, kv_heads, head_dim), and v, (batch, kv_len, kv_heads, value_dim), else None. They are
        the cache of the next decoding step.
    dx, dcontext
        Gradients, shaped like x and context, of a simulated backward pass, else None.
    dweights
        Gradients of the weights and biases of a simulated backward pass, by the name of the weight, else None.
    """

    layer: AttentionLayer
    phase: Phase
    problem: AttentionProblem
    algorithm: str
    projection_tiles: ProductTiles
    parts: tuple[LayerPart, ...]
    y: Values | None = None
    cache: tuple[Values, Values] | None = None
    dx: Values | None = None
    dcontext: Values | None = None
    dweights: Mapping[str, Values] | None = None

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes moved by all parts."""
        return sum((part.traffic for part in self.parts), Traffic())

    @property
    def operations(self) -> Operations:
        """Operations of all parts."""
        return _total_operations(self.parts)

    @property
    def peak_sram_bytes(self) -> int:
        """Most SRAM that the tiles of one thread block took in any part."""
        return max(part.peak_sram_bytes for part in self.parts)

    @property
    def peak_register_bytes(self) -> int:
        """Most registers that the tiles of one thread block took in any part, in bytes."""
        return max(part.peak_register_bytes for part in self.parts)

    def rows(self) -> Iterator[dict[str, str | int]]:
        """Yield one flat row per part, then the total."""
        total = ("total", "", self.operations, self.traffic)
        for name, direction, operations, traffic in (
            *((part.name, part.direction, part.operations, part.traffic) for part in self.parts),
            total,
        ):
            yield {
                "part": name,
                "direction": direction,
                **asdict(operations),
                **{counter: getattr(traffic, counter) for counter in COUNTERS},
            }

    def __repr__(self) -> str:
        problem, tiles = self.problem, self.projection_tiles
        columns = ("matmul_flops", "hbm_read_bytes", "hbm_write_bytes", "hbm_reduce_bytes")
        heads = ["part", *(name.replace("_", " ") for name in columns)]
        body = [[str(row["part"]), *(f"{row[name]:,}" for name in columns)] for row in self.rows()]
        return "\n".join(
            [
                f"{self.phase} of {self.layer}",
                f"{problem.batch} × {problem.q_len:,} query rows on {problem.kv_len:,} key rows, {self.algorithm}; "
                f"projections in tiles of {tiles.rows} × {tiles.columns}, {tiles.depth} deep",
                f"peak SRAM {byte_text(self.peak_sram_bytes)}, registers {byte_text(self.peak_register_bytes)} "
                "per thread block",
                text_table(heads, body),
            ]
        )


def _total_operations(parts: Sequence[LayerPart]) -> Operations:
    totals = {
        name: sum(getattr(part.operations, name) for part in parts)
        for name in ("matmul_flops", "vector_flops", "exponentials")
    }
    return Operations(**totals)
