"""Kernels that compress blocks of keys and values, and hand the gradients of compressed rows on to what made them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from simattn.algorithms.kernels import convert, fill
from simattn.algorithms.nsa.plan import NsaPlan, Sizes
from simattn.algorithms.nsa.problem import NsaProblem, Values
from simattn.machine import Array, Machine, Tile
from simattn.masks import Rows, Windows


def positive_part(values: Values) -> Values:
    """Return max(x, 0)."""
    return np.maximum(values, 0)


@dataclass
class Compression:
    """The compression of the keys or of the values of all KV heads.

    Attributes
    ----------
    problem, plan
        The problem and the plan.
    source, compressed
        What is compressed, and what it becomes.
    learned
        Positions, hidden weights and output weights in memory; none for means.
    """

    problem: NsaProblem
    plan: NsaPlan
    source: Array
    compressed: Array
    learned: tuple[Array, ...]

    @classmethod
    def of(cls, machine: Machine, problem: NsaProblem, plan: NsaPlan, name: str) -> Compression:
        """Return the compression of the machine's array "k" or "v"."""
        learned = tuple(machine.arrays[f"{name}_{item}"] for item in problem.learned(1))
        return cls(problem, plan, machine.arrays[name], machine.arrays[f"{name}_compressed"], learned)

    def of_new_blocks(self) -> Compression:
        """Return the compression of the last blocks only, those that a decoding step completes."""
        first = self.compressed.rows - self.problem.new_blocks
        return replace(
            self,
            source=_rows_from(self.source, first * self.problem.compression_stride),
            compressed=_rows_from(self.compressed, first),
        )

    @property
    def _columns(self) -> int:
        return self.source.columns

    def _thread_blocks(self, machine: Machine) -> Iterator[tuple[Rows, Windows]]:
        """Run a thread block for some compressed rows of each KV head, with the rows that they are made of."""
        problem = self.problem
        tile, width = Sizes.of(problem, self.plan).compression, problem.compression_block * self._columns
        for rows in machine.thread_blocks(self.compressed.rows, tile, per="kv", width=width):
            yield rows, Windows(rows, problem.compression_stride, problem.compression_block)

    def _of_place(self, rows: int, place: int) -> slice:
        """Return which of the rows of so many blocks stand at one place in their blocks."""
        stride = self.problem.compression_stride
        return slice(place, place + (rows - 1) * stride + 1, stride)

    # Forward

    def forward(self, machine: Machine) -> None:
        """Each thread block loads what some blocks are made of, overlapping rows once, and compresses it."""
        for rows, made_of in self._thread_blocks(machine):
            # load
            source = machine.load(self.source, made_of)
            # compute
            if self.learned:
                hidden = self._hidden(machine, rows, source)
                machine.apply(hidden, positive_part)
                weights = machine.load(self.learned[2])
                compressed = machine.matmul(hidden, weights, place=self.plan.accumulators, name=self.compressed.name)
            else:
                compressed = self._mean(machine, rows, source)
            # finish
            machine.store(compressed, self.compressed, rows)

    def _mean(self, machine: Machine, rows: Rows, source: Tile) -> Tile:
        tile = self._tile(machine, self.compressed.name, rows.size, rows.tile)
        block, count = self.problem.compression_block, rows.size

        def mean(values: Values) -> Values:
            parts = (values[..., self._of_place(count, place), :] for place in range(block))
            return np.asarray(reduce(np.add, parts) / values.dtype.type(block))

        return machine.transform((source,), tile, mean, vector_flops=count * (block + 1) * self._columns)

    def _hidden(self, machine: Machine, rows: Rows, source: Tile) -> Tile:
        """Return the hidden layer before its positive part is taken: the product, place by place in the block."""
        assert self.problem.compression_hidden is not None
        hidden = machine.full("hidden", rows, self.problem.compression_hidden, 0.0, place=self.plan.accumulators)
        for place in self._places(machine):
            # load
            weights = machine.load(self.learned[1], place)
            # compute
            at_place = self._at_place(machine, rows, source, place)
            machine.matmul(at_place, weights, place=self.plan.accumulators, into=hidden)
        return hidden

    def _places(self, machine: Machine) -> Iterator[Rows]:
        """Walk the places in a block, as the rows of the hidden weights that belong to them."""
        yield from machine.tiles(self.learned[1].rows, self._columns)

    def _at_place(self, machine: Machine, rows: Rows, source: Tile, place: Rows) -> Tile:
        """Return the row at one place of each block, its position added."""
        position = machine.load(self.learned[0], _position_rows(place), place="registers")
        tile, taken = self._tile(machine, "at_place", rows.size, rows.tile), self._of_place(rows.size, place.first)

        def take(values: Values, added: Values) -> Values:
            return np.asarray(values[..., taken, :] + added)

        return machine.transform((source, position), tile, take, vector_flops=rows.size * self._columns)

    def _tile(self, machine: Machine, name: str, rows: int, capacity: int) -> Tile:
        columns = self._columns
        return machine.allocate(name, rows, columns, place=self.plan.accumulators, capacity=(capacity, columns))

    # Backward

    def backward(self, machine: Machine, gradient: Array, results: tuple[Array, ...]) -> None:
        """Each thread block hands the gradient of some compressed rows on, by reductions in fp32.

        Parameters
        ----------
        machine
            The machine.
        gradient
            Of the compressed rows.
        results
            Gradients of the source and of what was learned, in this order.
        """
        sums = tuple(
            machine.array(f"{result.name}_accumulator", result.rows, result.columns, heads=result.heads)
            for result in results
        )
        for array in sums:
            fill(machine, array, 0.0, self.plan)
        for rows, made_of in self._thread_blocks(machine):
            # load
            drows = machine.load(gradient, rows)
            dsource = machine.full(results[0].name, made_of, self._columns, 0.0, place=self.plan.accumulators)
            # compute
            if self.learned:
                self._layers_backward(machine, rows, made_of, drows, dsource, sums[1:])
            else:
                self._mean_backward(machine, rows, drows, dsource)
            # finish
            machine.reduce(dsource, sums[0], made_of)
        for array, result in zip(sums, results, strict=True):
            convert(machine, array, result, self.plan)

    def _mean_backward(self, machine: Machine, rows: Rows, drows: Tile, dsource: Tile) -> None:
        block, count = self.problem.compression_block, rows.size

        def spread(before: Values, gradient: Values) -> Values:
            after, share = before.copy(), gradient / gradient.dtype.type(block)
            for place in range(block):
                after[..., self._of_place(count, place), :] += share
            return after

        machine.transform((dsource, drows), dsource, spread, vector_flops=count * (block + 1) * self._columns)

    def _layers_backward(
        self, machine: Machine, rows: Rows, made_of: Windows, drows: Tile, dsource: Tile, sums: tuple[Array, ...]
    ) -> None:
        accumulators = self.plan.accumulators
        positions, hidden_weights, output_weights = sums
        # load
        source = machine.load(self.source, made_of)
        hidden = self._hidden(machine, rows, source)
        weights = machine.load(self.learned[2])
        # compute
        machine.apply(hidden, positive_part)
        dhidden = machine.matmul(drows, weights, place=accumulators, name="dhidden", transpose_b=True)
        machine.free(weights)
        dweights = machine.matmul(hidden, drows, place=accumulators, name=output_weights.name, transpose_a=True)
        machine.reduce(dweights, output_weights)
        machine.free(dweights)
        elements = hidden.rows * hidden.columns
        machine.transform((dhidden, hidden), dhidden, _where_positive, vector_flops=elements)
        for place in self._places(machine):
            # load
            weights = machine.load(self.learned[1], place)
            # compute
            at_place = self._at_place(machine, rows, source, place)
            dweights = machine.matmul(at_place, dhidden, place=accumulators, name=hidden_weights.name, transpose_a=True)
            machine.reduce(dweights, hidden_weights, place)
            dat_place = machine.matmul(dhidden, weights, place=accumulators, name="dat_place", transpose_b=True)
            dposition = machine.full(positions.name, 1, self._columns, 0.0, place="registers")
            machine.add_column_sums(dposition, dat_place)
            machine.reduce(dposition, positions, _position_rows(place))
            add = self._adding(rows.size, place.first)
            machine.transform((dsource, dat_place), dsource, add, vector_flops=rows.size * self._columns)

    def _adding(self, count: int, place: int) -> Callable[[Values, Values], Values]:
        def add(before: Values, gradient: Values) -> Values:
            after = before.copy()
            after[..., self._of_place(count, place), :] += gradient
            return after

        return add


def _where_positive(gradient: Values, values: Values) -> Values:
    return np.where(values > 0, gradient, 0)


def _position_rows(place: Rows) -> Rows:
    """Return the row of the positions that belongs to a place in the block."""
    return Rows(place.length // place.tile, 1, place.first, place.count)


def _rows_from(array: Array, first: int) -> Array:
    """Return the rows of an array from one on."""
    return replace(array, rows=array.rows - first, values=None if array.values is None else array.values[:, :, first:])
