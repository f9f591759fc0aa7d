"""Tiled matrix products, as the projections of an attention layer need them.

A tile of the output stays on chip while tiles of the two operands stream past it along the contracted axis; it is
written once. So, of an output of M × N and a contraction of K, in tiles of t_M rows and t_N columns::

    read     K · (M · ⌈N / t_N⌉ + N · ⌈M / t_M⌉)
    written  M · N

elements, however deep the operands' tiles are. The rule of what is charged is that of every program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from simattn.arithmetic.formats import ITEM_BYTES
from simattn.machine import CapacityError, Machine, Place
from simattn.planning import Capacity
from simattn.problem import checked_integer
from simattn.sums import ceil_div
from simattn.tables import byte_text
from simattn.traffic import ArrayTraffic, Traffic

Shapes = Mapping[str, tuple[int, int]]
"""Rows and columns of arrays, by name."""

ACCUMULATOR_BYTES = ITEM_BYTES["float32"]

# Config and validation


@dataclass(frozen=True, kw_only=True)
class ProductTiles:
    """Tile sizes of a matrix product.

    Attributes
    ----------
    rows, columns
        Rows and columns of the output tile that stays on chip.
    depth
        Elements of the contracted axis in a tile of each operand.

    Raises
    ------
    TypeError, ValueError
        If a size is no positive integer.
    """

    rows: int
    columns: int
    depth: int

    def __post_init__(self) -> None:
        for item in fields(self):
            size = checked_integer(f"projection_tiles.{item.name}", getattr(self, item.name), 1)
            object.__setattr__(self, item.name, size)


TILE_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)
"""Rows and columns of the output tiles to choose from; the operands' tiles are half as deep."""


def checked_tiles(tiles: Any) -> ProductTiles:
    """Return tiles given as such or as (rows, columns, depth).

    Raises
    ------
    TypeError, ValueError
        If they are neither, or no positive integers.
    """
    if isinstance(tiles, ProductTiles):
        return tiles
    if isinstance(tiles, (tuple, list)) and len(tiles) == 3:
        return ProductTiles(rows=tiles[0], columns=tiles[1], depth=tiles[2])
    raise TypeError(f"projection_tiles={tiles!r}: expected (rows, columns, depth)")


def fitting_tiles(item_bytes: int, capacity: Capacity, place: Place) -> ProductTiles:
    """Return the largest tiles of :data:`TILE_SIZES` that fit on chip.

    Parameters
    ----------
    item_bytes
        Bytes of an operand's element.
    capacity
        On-chip memory of a thread block.
    place
        Where the float32 output tile lives; the operands' tiles are in SRAM.

    Raises
    ------
    CapacityError
        If no tile fits.
    """
    for size in TILE_SIZES:
        tiles = ProductTiles(rows=size, columns=size, depth=max(1, size // 2))
        if _fit(tiles, item_bytes, capacity, place):
            return tiles
    raise CapacityError(
        f"sram_bytes={capacity.sram_bytes} ({byte_text(capacity.sram_bytes)}) holds no tile of a projection; "
        "expected more SRAM"
    )


def check_tiles_fit(tiles: ProductTiles, item_bytes: int, capacity: Capacity, place: Place) -> None:
    """Raise a CapacityError if given tiles do not fit on chip; the arguments are those of :func:`fitting_tiles`."""
    if not _fit(tiles, item_bytes, capacity, place):
        sram, registers = _on_chip_bytes(tiles, item_bytes, place)
        raise CapacityError(
            f"projection_tiles={(tiles.rows, tiles.columns, tiles.depth)} take {byte_text(sram)} of SRAM and "
            f"{byte_text(registers)} of registers: expected at most {byte_text(capacity.sram_bytes)}"
            + ("" if capacity.register_bytes is None else f" and {byte_text(capacity.register_bytes)}")
        )


def _fit(tiles: ProductTiles, item_bytes: int, capacity: Capacity, place: Place) -> bool:
    sram, registers = _on_chip_bytes(tiles, item_bytes, place)
    return sram <= capacity.sram_bytes and (capacity.register_bytes is None or registers <= capacity.register_bytes)


def _on_chip_bytes(tiles: ProductTiles, item_bytes: int, place: Place) -> tuple[int, int]:
    """Return the bytes in SRAM and in registers."""
    operands = tiles.depth * (tiles.rows + tiles.columns) * item_bytes
    output = tiles.rows * tiles.columns * ACCUMULATOR_BYTES
    return (operands, output) if place == "registers" else (operands + output, 0)


# Tiled programs


@dataclass(frozen=True)
class Term:
    """One product of two arrays, each transposed if asked."""

    a: str
    b: str
    transpose_a: bool = False
    transpose_b: bool = False

    @property
    def text(self) -> str:
        """The product as a formula."""
        return f"{self.a}{'ᵀ' * self.transpose_a} {self.b}{'ᵀ' * self.transpose_b}"

    def contracted(self, shapes: Shapes) -> int:
        """Elements of the axis that is summed over."""
        return shapes[self.a][0 if self.transpose_a else 1]


@dataclass(frozen=True)
class MatrixProduct:
    """A sum of products and a row vector, accumulated in one output tile: output = a b + … + bias.

    Attributes
    ----------
    output
        Name of the array that is written.
    terms
        The products, in the order in which they are added.
    bias
        Name of the array of one row that is added to every row, if any.
    """

    output: str
    terms: tuple[Term, ...]
    bias: str | None = None

    @property
    def text(self) -> str:
        """The product as a formula."""
        return f"{self.output} = " + " + ".join([*(term.text for term in self.terms), *filter(None, [self.bias])])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arrays that are read."""
        names = [name for term in self.terms for name in (term.a, term.b)]
        return tuple(dict.fromkeys([*names, *filter(None, [self.bias])]))

    def run(self, machine: Machine, tiles: ProductTiles, place: Place) -> None:
        """Keep an output tile on chip and stream the operands' tiles past it."""
        arrays = machine.arrays
        output = arrays[self.output]
        shapes = {name: (array.rows, array.columns) for name, array in arrays.items()}
        for rows in machine.thread_blocks(output.rows, tiles.rows, width=max(tiles.columns, tiles.depth)):
            for columns in machine.tiles(output.columns, tiles.columns):
                total = machine.full(self.output, rows, columns, 0.0, place=place)
                for term in self.terms:
                    for depth in machine.tiles(term.contracted(shapes), tiles.depth):
                        a = machine.load(arrays[term.a], *((depth, rows) if term.transpose_a else (rows, depth)))
                        b = machine.load(arrays[term.b], *((columns, depth) if term.transpose_b else (depth, columns)))
                        machine.matmul(
                            a, b, place=place, transpose_a=term.transpose_a, transpose_b=term.transpose_b, into=total
                        )
                if self.bias is not None:
                    machine.add(total, machine.load(arrays[self.bias], None, columns))
                machine.store(total, output, rows, columns)

    def matmul_flops(self, shapes: Shapes) -> int:
        """Return the additions and multiplications of the products."""
        rows, columns = shapes[self.output]
        return sum(2 * rows * columns * term.contracted(shapes) for term in self.terms)

    def closed_form(self, shapes: Shapes, tiles: ProductTiles, item_bytes: int) -> Traffic:
        """Return what the formula at the head of this module says."""
        rows, columns = shapes[self.output]
        row_tiles, column_tiles = ceil_div(rows, tiles.rows), ceil_div(columns, tiles.columns)
        moved = Traffic({self.output: ArrayTraffic(hbm_write_bytes=rows * columns * item_bytes)})
        for term in self.terms:
            contracted = term.contracted(shapes)
            moved += _reads(term.a, rows * contracted * column_tiles * item_bytes)
            moved += _reads(term.b, columns * contracted * row_tiles * item_bytes)
        if self.bias is not None:
            moved += _reads(self.bias, columns * row_tiles * item_bytes)
        return moved


@dataclass(frozen=True)
class ColumnSum:
    """The sums of an array's columns: the gradient of a bias.

    Attributes
    ----------
    output
        Name of the array of one row that is written.
    values
        Name of the array that is summed.
    """

    output: str
    values: str

    @property
    def text(self) -> str:
        """The sum as a formula."""
        return f"{self.output} = Σ rows of {self.values}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arrays that are read."""
        return (self.values,)

    def run(self, machine: Machine, tiles: ProductTiles, place: Place) -> None:
        """Keep the sums of a tile's columns on chip and stream its rows past them."""
        values, output = machine.arrays[self.values], machine.arrays[self.output]
        for columns in machine.thread_blocks(values.columns, tiles.columns, width=tiles.rows):
            total = machine.full(self.output, 1, columns, 0.0, place=place)
            for rows in machine.tiles(values.rows, tiles.rows):
                machine.add_column_sums(total, machine.load(values, rows, columns))
            machine.store(total, output, None, columns)

    def matmul_flops(self, shapes: Shapes) -> int:
        """Return 0: the additions are outside matrix products."""
        return 0

    def closed_form(self, shapes: Shapes, tiles: ProductTiles, item_bytes: int) -> Traffic:
        """Return every element read once and the sums written once."""
        rows, columns = shapes[self.values]
        written = Traffic({self.output: ArrayTraffic(hbm_write_bytes=columns * item_bytes)})
        return written + _reads(self.values, rows * columns * item_bytes)


def _reads(name: str, nbytes: int) -> Traffic:
    return Traffic({name: ArrayTraffic(hbm_read_bytes=nbytes)})
