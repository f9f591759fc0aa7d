"""The arithmetic of the CUDA-core kernels, bit for bit: fp32, one rounding per operation, in the kernels' order.

Products are chains of fused multiply-adds in ascending order of the contracted index. Hidden elements take no part in
a chain. Scores are kept in units of log₂: scale · log₂e is multiplied in once, and exponentials are base two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from simattn.arithmetic import simt_loops
from simattn.arithmetic.floating import FloatArithmetic, HiddenElements, Values, finite_maximum

ROW_SUM_LANES = 16
"""Lanes that share a row: lane x adds the columns x, x + 16, … and the lanes are added pairwise, 8 apart first."""

LN2 = np.float32(math.log(2.0))


@dataclass(frozen=True)
class SimtArithmetic(FloatArithmetic):
    """fp32 in the order of the CUDA-core kernels."""

    name: str = "simt"
    rounds_to_storage: bool = True

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of on-chip values."""
        return np.dtype(np.float32)

    def scores(self, q: Values, k: Values, scale: float) -> Values:
        """Return (scale · log₂e) · q kᵀ."""
        return self.matmul(q, k.swapaxes(-1, -2)) * np.float32(scale * math.log2(math.e))

    def matmul(self, a: Values, b: Values) -> Values:
        """Return a b."""
        return self.product(a, b, {})

    def product(self, a: Values, b: Values, hidden: HiddenElements) -> Values:
        """Return a b, every element one chain of fused multiply-adds that starts at +0."""
        return self.accumulate(np.zeros(1, np.float32), a, b, hidden)

    def accumulate(self, into: Values, a: Values, b: Values, hidden: HiddenElements) -> Values:
        """Return into + a b, every element one chain of fused multiply-adds that starts at ``into``."""
        shape = np.broadcast_shapes(a.shape[:3], b.shape[:3])
        rows, columns = a.shape[3], b.shape[4]
        total = np.empty((*shape, rows, columns), np.float32)
        total[...] = into
        left = np.ascontiguousarray(np.broadcast_to(a, (*shape, *a.shape[3:]))).reshape(-1, *a.shape[3:])
        right = np.ascontiguousarray(b).reshape(-1, *b.shape[3:])
        right_of = np.broadcast_to(np.arange(len(right)).reshape(b.shape[:3]), shape).reshape(-1)
        if hidden:
            seen = np.ones((shape[1], rows, a.shape[4]), np.bool_)
            for position, elements in hidden.items():
                seen[position] = ~elements
            seen_of = np.broadcast_to(np.arange(shape[1])[None, :, None], shape).reshape(-1)
            simt_loops.visible_products(total.reshape(-1, rows, columns), left, right, right_of, seen, seen_of)
        else:
            simt_loops.products(total.reshape(-1, rows, columns), left, right, right_of)
        return total

    def correction(self, old_max: Values, new_max: Values) -> Values:
        """Return 2^(old_max − new_max), 0 where no score was seen before."""
        factor: Values = simt_loops.exp2(old_max - finite_maximum(new_max))
        return factor

    def exponential(self, scores: Values, row_max: Values) -> None:
        """Replace scores by 2^(scores − row_max)."""
        scores[...] = simt_loops.exp2(scores - finite_maximum(row_max))

    def row_sum(self, values: Values) -> Values:
        """Return the sum of each row over lanes."""
        columns = values.shape[-1]
        lanes = np.zeros((*values.shape[:-1], ROW_SUM_LANES), np.float32)
        for start in range(0, columns, ROW_SUM_LANES):
            part = values[..., start : start + ROW_SUM_LANES]
            lanes[..., : part.shape[-1]] += part
        width = ROW_SUM_LANES
        while width > 1:
            width //= 2
            lanes = lanes[..., :width] + lanes[..., width:]
        return lanes

    def updated_row_sum(self, row_sum: Values, factor: Values | None, values: Values) -> Values:
        """Return row_sum · factor + Σ values, fused."""
        added = self.row_sum(values)
        if factor is None:
            return row_sum + added
        total: Values = simt_loops.fused_multiply_add(row_sum, factor, added)
        return total

    def rescale(self, values: Values, factor: Values) -> None:
        """Multiply each row by its factor."""
        np.multiply(values, factor, out=values)

    def log_sum_exp(self, row_max: Values, row_sum: Values) -> Values:
        """Return (row_max + log₂ row_sum) · ln 2, −inf in rows without a visible score."""
        lse: Values = (row_max + simt_loops.log2(row_sum)) * LN2
        lse[row_sum == 0] = -np.inf
        return lse


SIMT = SimtArithmetic()
