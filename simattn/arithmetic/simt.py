"""The arithmetic of the CUDA-core kernels, bit for bit: fp32, one rounding per operation, in the kernels' order.

Products are chains of fused multiply-adds in ascending order of the contracted index. Hidden elements take no part in
a chain. Scores and row maxima are kept in units of log₂: scale · log₂e is multiplied in once, and exponentials are base
two. The log-sum-exp is natural.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.arithmetic import simt_loops
from simattn.arithmetic.floating import FloatArithmetic, HiddenElements, Values, finite_maximum

ROW_SUM_LANES = 16
"""Lanes that share a row: lane x adds the columns x, x + 16, … and the lanes are added pairwise, 8 apart first."""

LN2 = np.float32(math.log(2.0))
LOG2_E = np.float32(math.log2(math.e))


@dataclass(frozen=True)
class SimtArithmetic(FloatArithmetic):
    """fp32 in the order of the CUDA-core kernels."""

    name: str = "simt"
    rounds_to_storage: bool = True

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of on-chip values."""
        return np.dtype(np.float32)

    def score_factor(self, scale: float) -> Any:
        """Return scale · log₂e."""
        return np.float32(scale * math.log2(math.e))

    def scores(self, q: Values, k: Values, scale: float) -> Values:
        """Return (scale · log₂e) · q kᵀ."""
        scores = self.matmul(q, k.swapaxes(-1, -2))
        np.multiply(scores, self.score_factor(scale), out=scores)
        return scores

    def matmul(self, a: Values, b: Values) -> Values:
        """Return a b."""
        return self.product(a, b, {})

    def product(self, a: Values, b: Values, hidden: HiddenElements) -> Values:
        """Return a b, every element one chain of fused multiply-adds that starts at +0."""
        total = np.zeros((*np.broadcast_shapes(a.shape[:3], b.shape[:3]), a.shape[3], b.shape[4]), np.float32)
        _add_product(total, a, b, hidden)
        return total

    def accumulate(self, into: Values, a: Values, b: Values, hidden: HiddenElements) -> Values | None:
        """Continue the chains of ``into`` by those of a b, in place or in the sum that is returned."""
        shape = (*np.broadcast_shapes(into.shape[:3], a.shape[:3], b.shape[:3]), *into.shape[3:])
        if shape == into.shape and into.flags.c_contiguous:
            _add_product(into, a, b, hidden)
            return None
        total = np.empty(shape, np.float32)
        total[...] = into
        _add_product(total, a, b, hidden)
        return total

    def row_maximum(self, row_max: Values, scores: Values) -> Values:
        """Return the running row maximum; of zeros, +0 is the higher."""
        higher = super().row_maximum(row_max, scores)
        zero = higher == 0
        if zero.any():
            positive = _is_positive_zero(row_max) | _is_positive_zero(scores).any(axis=-1, keepdims=True)
            higher[zero] = np.where(positive, np.float32(0.0), np.float32(-0.0))[zero]
        return higher

    def correction(self, old_max: Values, new_max: Values) -> Values:
        """Return 2^(old_max − new_max), 0 where no score was seen before."""
        factor: Values = simt_loops.exp2(old_max - finite_maximum(new_max))
        return factor

    def exponential(self, scores: Values, row_max: Values) -> None:
        """Replace scores by 2^(scores − row_max)."""
        np.subtract(scores, finite_maximum(row_max), out=scores)
        simt_loops.exp2(scores, out=scores)

    def probabilities(self, scores: Values, log_sum_exp: Values) -> None:
        """Replace scores by 2^(scores − log_sum_exp · log₂e), the factor multiplied in first."""
        self.exponential(scores, log_sum_exp * LOG2_E)

    def row_sum(self, values: Values) -> Values:
        """Return the sum of each row over lanes."""
        lanes = np.zeros((*values.shape[:-1], ROW_SUM_LANES), np.float32)
        for start in range(0, values.shape[-1], ROW_SUM_LANES):
            part = values[..., start : start + ROW_SUM_LANES]
            lanes[..., : part.shape[-1]] += part
        return _sum_of_lanes(lanes)

    def updated_row_sum(self, row_sum: Values, factor: Values | None, values: Values) -> Values:
        """Return row_sum · factor + Σ values, fused."""
        added = self.row_sum(values)
        if factor is None:
            return row_sum + added
        total: Values = simt_loops.fused_multiply_add(row_sum, factor, added)
        return total

    def row_dot(self, a: Values, b: Values) -> Values:
        """Return the dot product of each pair of rows over lanes, each a chain of fused multiply-adds from +0."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        lanes = np.zeros((*shape[:-1], ROW_SUM_LANES), np.float32)
        for start in range(0, shape[-1], ROW_SUM_LANES):
            columns = slice(start, min(start + ROW_SUM_LANES, shape[-1]))
            sums = lanes[..., : columns.stop - start]
            simt_loops.fused_multiply_add(a[..., columns], b[..., columns], sums, out=sums)
        return _sum_of_lanes(lanes)

    def rescale(self, values: Values, factor: Values) -> None:
        """Multiply each row by its factor."""
        np.multiply(values, factor, out=values)

    def log_sum_exp(self, row_max: Values, row_sum: Values) -> Values:
        """Return (row_max + log₂ row_sum) · ln 2, −inf in rows without a visible score."""
        lse: Values = (row_max + simt_loops.log2(row_sum)) * LN2
        lse[row_sum == 0] = -np.inf
        return lse


def _is_positive_zero(values: Values) -> npt.NDArray[np.bool_]:
    positive: npt.NDArray[np.bool_] = (values == 0) & ~np.signbit(values)
    return positive


def _sum_of_lanes(lanes: Values) -> Values:
    """Add the lanes of a row pairwise, 8 apart first."""
    width = ROW_SUM_LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes


def _add_product(total: Values, a: Values, b: Values, hidden: HiddenElements) -> None:
    """Add a b to a contiguous array in place, hidden elements of a left out."""
    shape, rows, columns = total.shape[:3], *total.shape[3:]
    left, left_of = matrices_of(a, shape)
    right, right_of = matrices_of(b, shape)
    matrices = total.reshape(-1, rows, columns)
    if hidden:
        seen = np.ones((shape[1], rows, a.shape[4]), np.bool_)
        for position, elements in hidden.items():
            seen[position] = ~elements
        seen_of = np.broadcast_to(np.arange(shape[1])[None, :, None], shape).reshape(-1)
        simt_loops.visible_products(matrices, left, left_of, right, right_of, seen, seen_of)
    else:
        simt_loops.products(matrices, left, left_of, right, right_of)


def matrices_of(values: Values, shape: tuple[int, ...]) -> tuple[Values, Values]:
    """Return the matrices of a stack one after the other, and which of them each of the broadcast shape is."""
    matrices = np.ascontiguousarray(values).reshape(-1, *values.shape[3:])
    return matrices, np.broadcast_to(np.arange(len(matrices)).reshape(values.shape[:3]), shape).reshape(-1)


SIMT = SimtArithmetic()
