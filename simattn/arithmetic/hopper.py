"""The arithmetic of the fast forward kernels, bit for bit: tensor-core products, the hardware's exponential.

"hopper" is that of the kernel on wgmma, "mma" that of the kernel on mma.sync; on Hopper both add products in the same
way. Other generations' mma.sync adds them in others, and no bits are promised there.

Scores and row maxima are kept as products, not scaled: scale · log₂e is multiplied in where exponentials are taken, in
base two. The log-sum-exp is natural.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simattn.arithmetic import special_functions, tensor_cores
from simattn.arithmetic.floating import FloatArithmetic, HiddenElements, Values
from simattn.arithmetic.formats import numpy_dtype
from simattn.arithmetic.simt import LN2, matrices_of
from simattn.arithmetic.simt_loops import fused_multiply_add
from simattn.problem import AttentionProblem

ROW_SUM_PARTS = 8
"""Partial sums of a row: part x adds the columns x, x + 8, …; a thread holds two, a row's four threads all of them."""

STORAGE_TYPES = ("bfloat16", "float16")
"""Storage formats that the arithmetic is defined for."""


@dataclass(frozen=True)
class HopperArithmetic(FloatArithmetic):
    """Fused dot-adds of tensor cores, and float32 between them in the order of the kernel.

    Attributes
    ----------
    factor
        scale · log₂e as a float32.
    storage
        Format of the inputs, of the probabilities that are multiplied by the values, and of the output.
    """

    name: str = "hopper"
    rounds_to_storage: bool = True
    factor: float = 1.0
    storage: str = STORAGE_TYPES[0]

    def for_problem(self, problem: AttentionProblem) -> HopperArithmetic:
        """Return the arithmetic with the problem's scale and storage format.

        Raises
        ------
        ValueError
            If it is not defined for them.
        """
        if problem.dtype not in STORAGE_TYPES:
            raise ValueError(f"arithmetic={self.name!r} with dtype={problem.dtype!r}: expected one of {STORAGE_TYPES}")
        with np.errstate(over="ignore", under="ignore"):
            factor = float(np.float32(problem.scale * math.log2(math.e)))
        if factor == 0 or not math.isfinite(factor):
            raise ValueError(
                f"arithmetic={self.name!r} with scale={problem.scale}: expected a number whose product with log2(e) "
                "float32 holds"
            )
        return replace(self, factor=factor, storage=problem.dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of on-chip values."""
        return np.dtype(np.float32)

    @property
    def row_sum_parts(self) -> int:
        """Values that a running row sum is held in."""
        return ROW_SUM_PARTS

    def scores(self, q: Values, k: Values, scale: float) -> Values:
        """Return q kᵀ, not scaled."""
        return self.matmul(q, k.swapaxes(-1, -2))

    def matmul(self, a: Values, b: Values) -> Values:
        """Return a b."""
        return self.product(a, b, {})

    def product(self, a: Values, b: Values, hidden: HiddenElements) -> Values:
        """Return a b, every element a chain of dot-adds that starts at +0."""
        total = np.zeros((*np.broadcast_shapes(a.shape[:3], b.shape[:3]), a.shape[3], b.shape[4]), np.float32)
        self._add_product(total, a, b, hidden)
        return total

    def accumulate(self, into: Values, a: Values, b: Values, hidden: HiddenElements) -> Values | None:
        """Continue the chains of ``into`` by those of a b, in place or in the sum that is returned."""
        shape = (*np.broadcast_shapes(into.shape[:3], a.shape[:3], b.shape[:3]), *into.shape[3:])
        if shape == into.shape and into.flags.c_contiguous:
            self._add_product(into, a, b, hidden)
            return None
        total = np.empty(shape, np.float32)
        total[...] = into
        self._add_product(total, a, b, hidden)
        return total

    def _add_product(self, total: Values, a: Values, b: Values, hidden: HiddenElements) -> None:
        """Add a b to a contiguous array, the operands rounded to the storage format."""
        shape, rows = total.shape[:3], total.shape[3]
        left, left_of = matrices_of(self._rounded(a), shape)
        right, right_of = matrices_of(self._rounded(b), shape)
        seen = seen_of = None
        if hidden:
            seen = np.ones((shape[1], rows, a.shape[4]), np.bool_)
            for position, elements in hidden.items():
                seen[position] = ~elements
            seen_of = np.broadcast_to(np.arange(shape[1])[None, :, None], shape).reshape(-1)
        unit = tensor_cores.WGMMA[self.storage]
        sums = total.reshape(-1, *total.shape[3:])
        tensor_cores.add_products(sums, left, left_of, right, right_of, unit, seen, seen_of)

    def _rounded(self, values: Values) -> Values:
        return values.astype(numpy_dtype(self.storage)).astype(np.float32)

    def row_maximum(self, row_max: Values, scores: Values) -> Values:
        """Return the running row maximum; NaN is ignored."""
        higher: Values = np.fmax(row_max, np.fmax.reduce(scores, axis=-1, keepdims=True))
        return higher

    def reference(self, row_max: Values) -> Values:
        """Return what the scores of a row are taken relative to: their maximum, or 0 where all are −inf · factor."""
        with np.errstate(over="ignore"):
            empty = row_max * np.float32(self.factor) == -np.inf
        return np.where(empty, np.float32(0), row_max)

    def correction(self, old_max: Values, new_max: Values) -> Values:
        """Return 2^((old_max − new_max) · factor), 0 where no score was seen before."""
        return special_functions.ex2((old_max - self.reference(new_max)) * np.float32(self.factor))

    def exponential(self, scores: Values, row_max: Values) -> None:
        """Replace scores by 2^(scores · factor − row_max · factor), the first product fused."""
        factor = np.float32(self.factor)
        fused_multiply_add(scores, factor, -(self.reference(row_max) * factor), out=scores)
        special_functions.ex2(scores, out=scores)

    def updated_row_sum(self, row_sum: Values, factor: Values | None, values: Values) -> Values:
        """Return the parts times the factor plus the first columns, fused, plus the other columns ascending."""
        shape = np.broadcast_shapes(row_sum.shape[:-1], values.shape[:-1])
        parts = np.empty((*shape, ROW_SUM_PARTS), np.float32)
        first = np.zeros_like(parts)
        columns = min(values.shape[-1], ROW_SUM_PARTS)
        first[..., :columns] = values[..., :columns]
        fused_multiply_add(row_sum, np.float32(1) if factor is None else factor, first, out=parts)
        for start in range(ROW_SUM_PARTS, values.shape[-1], ROW_SUM_PARTS):
            added = values[..., start : start + ROW_SUM_PARTS]
            parts[..., : added.shape[-1]] += added
        return parts

    def normalised(self, values: Values, row_sum: Values) -> Values:
        """Return values times the hardware's reciprocal of the row sum, 0 in rows whose sum is 0."""
        total = _total(row_sum)
        inverse = np.where(total == 0, np.float32(0), special_functions.rcp(total))
        product: Values = values * inverse
        return product

    def log_sum_exp(self, row_max: Values, row_sum: Values) -> Values:
        """Return (row_max · factor + log₂ row_sum) · ln 2, the first product fused; −inf in rows whose sum is 0."""
        total = _total(row_sum)
        exponent = fused_multiply_add(self.reference(row_max), np.float32(self.factor), special_functions.lg2(total))
        return np.where(total == 0, np.float32(-np.inf), exponent * LN2)


def _total(parts: Values) -> Values:
    """Add the parts of row sums, neighbours first: a thread's two, then those of two threads, then all."""
    while parts.shape[-1] > 1:
        parts = parts[..., 0::2] + parts[..., 1::2]
    return parts


HOPPER = HopperArithmetic()
MMA = HopperArithmetic(name="mma")
