"""The programs of a layer's phases: products with the weights, and where the attention is among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from simattn.arithmetic.floating import FloatArithmetic
from simattn.arithmetic.formats import ITEM_BYTES
from simattn.hardware import Hardware, get_hardware
from simattn.layers.phases import PASSES, Lengths, Phase
from simattn.layers.results import LayerPart
from simattn.machine import Machine, Place
from simattn.matrix_products import (
    ColumnSum,
    MatrixProduct,
    ProductTiles,
    Term,
    check_tiles_fit,
    checked_tiles,
    fitting_tiles,
)
from simattn.planning import DEFAULT_HARDWARE, Capacity, get_capacity
from simattn.problem import AttentionProblem, Direction
from simattn.traffic import Traffic

if TYPE_CHECKING:
    from simattn.layers.layer import AttentionLayer

Values = npt.NDArray[Any]
Product = MatrixProduct | ColumnSum
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Work:
    """The programs of a phase, None standing for the attention, and the shapes of their matrices."""

    passes: tuple[Direction, ...]
    shapes: dict[str, tuple[int, int]]
    forward: tuple[Product | None, ...]
    backward: tuple[Product | None, ...]

    @classmethod
    def of(cls, layer: AttentionLayer, phase: Phase, lengths: Lengths) -> Work:
        """Return the work of a phase."""
        source = "context" if layer.is_cross_attention else "x"
        rows, source_rows = lengths.batch * lengths.queries, lengths.batch * lengths.projected
        weights = {
            name: (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
            for name, shape in layer.weight_shapes.items()
        }
        shapes = {
            "x": (rows, layer.model_width),
            "context": (source_rows, weights["w_k"][0]),
            "q": (rows, weights["w_q"][1]),
            "k": (source_rows, weights["w_k"][1]),
            "v": (source_rows, weights["w_v"][1]),
            "attention_out": (rows, weights["w_o"][0]),
            "y": (rows, layer.model_width),
            **weights,
        }
        shapes |= {f"d{name}": shape for name, shape in shapes.items()}
        inputs = {"q": "x", "k": source, "v": source}
        cached = ("k", "v") if phase == "decode" and layer.is_cross_attention else ()
        return cls(
            PASSES[phase],
            shapes,
            _forward({name: array for name, array in inputs.items() if name not in cached}, layer.biases),
            _backward(inputs, layer.biases),
        )

    @property
    def steps(self) -> Iterator[tuple[Direction, Product | None]]:
        """The programs in the order in which they run, and the passes that they are of."""
        for one_pass in self.passes:
            for step in self.forward if one_pass == "forward" else self.backward:
                yield one_pass, step


def _forward(inputs: Mapping[str, str], biases: bool) -> tuple[Product | None, ...]:
    """Return the forward programs; ``inputs`` names what each of q, k and v is projected from."""

    def projected(output: str, array: str, name: str) -> MatrixProduct:
        return MatrixProduct(output, (Term(array, f"w_{name}"),), f"b_{name}" if biases else None)

    return (
        *(projected(name, array, name) for name, array in inputs.items()),
        None,
        projected("y", "attention_out", "o"),
    )


def _backward(inputs: Mapping[str, str], biases: bool) -> tuple[Product | None, ...]:
    """Return the backward programs: two products for each projection, those of one input added in one tile."""

    def weights(name: str, array: str, gradient: str) -> list[Product]:
        products: list[Product] = [MatrixProduct(f"dw_{name}", (Term(array, gradient, transpose_a=True),))]
        return products + ([ColumnSum(f"db_{name}", gradient)] if biases else [])

    return (
        *weights("o", "attention_out", "dy"),
        MatrixProduct("dattention_out", (Term("dy", "w_o", transpose_b=True),)),
        None,
        *(step for name, array in inputs.items() for step in weights(name, array, f"d{name}")),
        *(
            MatrixProduct(
                f"d{array}",
                tuple(Term(f"d{name}", f"w_{name}", transpose_b=True) for name in inputs if inputs[name] == array),
            )
            for array in dict.fromkeys(inputs.values())
        ),
    )


@dataclass(frozen=True)
class Projections:
    """How the products of a layer are run.

    Attributes
    ----------
    tiles, place
        Their tiles, and where those of the outputs are.
    capacity
        On-chip memory of a thread block.
    dtype
        Storage format of every matrix.
    """

    tiles: ProductTiles
    place: Place
    capacity: Capacity
    dtype: str

    @classmethod
    def checked(
        cls,
        dtype: str,
        hardware: str | Hardware | None,
        sram_bytes: int | None,
        projection_tiles: tuple[int, int, int] | ProductTiles | None,
    ) -> Projections:
        """Return what the arguments of :meth:`simattn.AttentionLayer.profile` mean."""
        capacity = get_capacity(get_hardware(DEFAULT_HARDWARE if hardware is None else hardware), sram_bytes)
        place: Place = "registers" if sram_bytes is None else "sram"
        if projection_tiles is None:
            tiles = fitting_tiles(ITEM_BYTES[dtype], capacity, place)
        else:
            tiles = checked_tiles(projection_tiles)
            check_tiles_fit(tiles, ITEM_BYTES[dtype], capacity, place)
        return cls(tiles, place, capacity, dtype)

    def closed_form(self, step: Product, shapes: Shapes) -> Traffic:
        """Return what the formula of a product says."""
        return step.closed_form(shapes, self.tiles, ITEM_BYTES[self.dtype])

    def profile(self, step: Product, one_pass: Direction, shapes: Shapes) -> LayerPart:
        """Count a product."""
        return self.run(step, one_pass, shapes)[0]

    def run(
        self,
        step: Product,
        one_pass: Direction,
        shapes: Shapes,
        arithmetic: FloatArithmetic | None = None,
        values: Mapping[str, Values] | None = None,
    ) -> tuple[LayerPart, Values | None]:
        """Run a product, and return its counts and what it computed, if it was to compute."""
        # The machine asks its problem for the number of matrices in an array, and here that is one.
        one = AttentionProblem(q_len=1, head_dim=1)
        machine = Machine(one, self.capacity.sram_bytes, self.capacity.register_bytes, arithmetic)
        for name in step.inputs:
            found = None if values is None else values[name][None, None]
            machine.array(name, *shapes[name], dtype=self.dtype, role="input", values=found)
        output = machine.array(step.output, *shapes[step.output], dtype=self.dtype, role="output")
        with np.errstate(all="ignore"):  # NaN and Inf are propagated as IEEE says, not reported
            step.run(machine, self.tiles, self.place)
        part = LayerPart(
            name=step.text,
            direction=one_pass,
            traffic=machine.traffic,
            operations=machine.operations,
            peak_sram_bytes=machine.peak_bytes["sram"],
            peak_register_bytes=machine.peak_bytes["registers"],
        )
        return part, None if output.values is None else output.values[0, 0]
