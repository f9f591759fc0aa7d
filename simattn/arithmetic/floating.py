"""NumPy arithmetic for the simulated machine: the float64 oracle and fast float32.

Tile values have the shape (streams, stack, group, rows, columns): streams are the (batch entry, KV head) pairs,
stack the thread blocks evaluated together, group the query heads of one KV head. Axes of length 1 broadcast.
The order of sums is NumPy's and BLAS's, so bits are not promised; the tiles and the number of roundings are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.problem import AttentionProblem

Values = npt.NDArray[Any]
HiddenElements = Mapping[int, npt.NDArray[np.bool_]]
"""For each stack position whose tile is partly masked: which (row, column) elements are hidden."""


@dataclass(frozen=True)
class FloatArithmetic:
    """IEEE arithmetic in one precision.

    Attributes
    ----------
    name
        "float32" or "float64".
    rounds_to_storage
        Whether values written to memory are rounded to the array's storage format. The oracle keeps float64.
    """

    name: str
    rounds_to_storage: bool

    def for_problem(self, problem: AttentionProblem) -> FloatArithmetic:
        """Return the arithmetic with what it takes from the problem.

        Raises
        ------
        ValueError
            If it is not defined for the problem.
        """
        return self

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of on-chip values."""
        return np.dtype(self.name)

    @property
    def row_sum_parts(self) -> int:
        """Values that a running row sum is held in until it is used."""
        return 1

    def score_factor(self, scale: float) -> Any:
        """Return the number that turns q kᵀ into scores, in the units that the exponentials take."""
        return self.dtype.type(scale)

    def scores(self, q: Values, k: Values, scale: float) -> Values:
        """Return scale · q kᵀ; the scale goes to the smaller operand."""
        factor = self.score_factor(scale)
        if k.size > q.size:
            return self.matmul(q * factor, k.swapaxes(-1, -2))
        k = k * factor
        if k.shape[1] == k.shape[2] == 1:
            # Stored key by key, so that NumPy reduces the short rows of a tile across all query rows at once.
            streams, columns = q.shape[0], q.shape[-1]
            product: Values = np.matmul(k[:, 0, 0], q.reshape(streams, -1, columns).swapaxes(-1, -2))
            return product.reshape(streams, -1, *q.shape[1:-1]).transpose(0, 2, 3, 4, 1)
        return self.matmul(q, k.swapaxes(-1, -2))

    def matmul(self, a: Values, b: Values) -> Values:
        """Return a b, with equal operands of a stack merged into one product."""
        product: Values
        if b.shape[1] == b.shape[2] == 1:
            product = _merged_matmul(a, b)
        elif a.shape[1] == 1 and b.shape[2] == 1:
            swapped = _merged_matmul(b.swapaxes(-1, -2), _rows_of_group(a).swapaxes(-1, -2))
            streams, stack, _, columns, _ = swapped.shape
            product = swapped.reshape(streams, stack, columns, a.shape[2], a.shape[3]).transpose(0, 1, 3, 4, 2)
        elif b.shape[2] == 1:
            product = np.matmul(_rows_of_group(a), b[:, :, 0])
            product = product.reshape(*product.shape[:2], a.shape[2], a.shape[3], -1)
        else:
            product = np.matmul(a, b)
        return product

    def product(self, a: Values, b: Values, hidden: HiddenElements) -> Values:
        """Return a b, hidden elements of a left out."""
        return self.visible_matmul(a, b, hidden) if hidden else self.matmul(a, b)

    def accumulate(self, into: Values, a: Values, b: Values, hidden: HiddenElements) -> Values | None:
        """Add a b to ``into`` in place, or return the sum where it has a larger shape."""
        return add_in_place(into, self.product(a, b, hidden))

    def visible_matmul(self, a: Values, b: Values, hidden: HiddenElements) -> Values:
        """Return a b, where a hidden element of a contributes nothing even if b holds NaN or Inf there.

        ``hidden`` marks (row, contraction) elements, which hold zero in ``a``.
        """
        finite = np.isfinite(b)
        if finite.all():
            return self.matmul(a, b)
        product = self.matmul(a, np.where(finite, b, 0))
        special = np.where(finite, 0, b)
        for position in range(product.shape[1]):
            left = a[:, position if a.shape[1] > 1 else 0]
            right = special[:, position if b.shape[1] > 1 else 0]
            for index in np.flatnonzero((right != 0).any(axis=(0, 1, 3))):
                term = left[..., :, index, None] * right[..., None, index, :]
                seen = right[..., None, index, :] != 0
                if position in hidden:
                    seen = seen & ~hidden[position][:, index, None]
                product[:, position] += np.where(seen, term, 0)
        return product

    def row_maximum(self, row_max: Values, scores: Values) -> Values:
        """Return the running row maximum."""
        higher: Values = np.maximum(row_max, scores.max(axis=-1, keepdims=True))
        return higher

    def correction(self, old_max: Values, new_max: Values) -> Values:
        """Return exp(old_max − new_max), 0 where no score was seen before."""
        factor: Values = np.exp(old_max - finite_maximum(new_max))
        return factor

    def exponential(self, scores: Values, row_max: Values) -> None:
        """Replace scores by exp(scores − row_max); rows without a visible score become 0."""
        np.subtract(scores, finite_maximum(row_max), out=scores)
        np.exp(scores, out=scores)

    def probabilities(self, scores: Values, log_sum_exp: Values) -> None:
        """Replace scores by exp(scores − log_sum_exp); rows without a visible score become 0."""
        self.exponential(scores, log_sum_exp)

    def row_sum(self, values: Values) -> Values:
        """Return the sum of each row."""
        total: Values = values.sum(axis=-1, keepdims=True)
        return total

    def updated_row_sum(self, row_sum: Values, factor: Values | None, values: Values) -> Values:
        """Return row_sum · factor + the sum of each row of values."""
        return (row_sum if factor is None else row_sum * factor) + self.row_sum(values)

    def row_dot(self, a: Values, b: Values) -> Values:
        """Return the dot product of each pair of rows."""
        dots: Values = np.einsum("...ij,...ij->...i", a, b)
        return dots[..., None]

    def rescale(self, values: Values, factor: Values) -> None:
        """Multiply each row by its factor; most factors are 1, and their rows are left alone."""
        rows = np.nonzero(factor[..., 0] != 1)
        if 2 * len(rows[0]) > factor.size:
            np.multiply(values, factor, out=values)
        elif len(rows[0]):
            values[rows] *= factor[rows]

    def normalised(self, values: Values, row_sum: Values) -> Values:
        """Return values / row_sum, and 0 in rows whose sum is 0."""
        return values / np.where(row_sum == 0, self.dtype.type(1), row_sum)

    def log_sum_exp(self, row_max: Values, row_sum: Values) -> Values:
        """Return row_max + log(row_sum), −inf in rows without a visible score."""
        return finite_maximum(row_max) + np.log(row_sum)

    def softmax_gradient(self, probabilities: Values, dprobabilities: Values, delta: Values) -> None:
        """Replace dP by P ∘ (dP − delta)."""
        np.subtract(dprobabilities, delta, out=dprobabilities)
        np.multiply(dprobabilities, probabilities, out=dprobabilities)


def add_in_place(into: Values, values: Values) -> Values | None:
    """Add values to ``into`` in place, or return the sum where it has a larger shape."""
    if into.shape != np.broadcast_shapes(into.shape, values.shape):
        return into + values
    np.add(into, values, out=into)
    return None


def finite_maximum(row_max: Values) -> Values:
    """Replace −inf, the maximum of no score, by 0 so that exp(−inf − 0) is 0 and not NaN."""
    return np.where(row_max == -np.inf, row_max.dtype.type(0), row_max)


def _rows_of_group(values: Values) -> Values:
    """Merge the group into the rows: (streams, stack, group, rows, columns) → (streams, stack, ·, columns)."""
    return values.reshape(*values.shape[:2], -1, values.shape[-1])


def _merged_matmul(a: Values, b: Values) -> Values:
    """Multiply every row of a stack by one shared b of shape (streams, 1, 1, k, n), or (streams, 1, k, n)."""
    shared = b.reshape(b.shape[0], *b.shape[-2:])
    product: Values
    if not _rows_merge(a):
        product = np.matmul(a, shared[:, None, None])
        return product
    product = np.matmul(a.reshape(a.shape[0], -1, a.shape[-1]), shared)
    return product.reshape(*a.shape[:-1], -1)


def _rows_merge(a: Values) -> bool:
    """Say whether stack, group and rows merge into one axis without a copy."""
    step, expected = 0, 0
    for axis in (3, 2, 1):
        if a.shape[axis] > 1:
            if step and a.strides[axis] != expected:
                return False
            step = a.strides[axis]
            expected = step * a.shape[axis]
    return True


ARITHMETICS: dict[str, FloatArithmetic] = {
    "float64": FloatArithmetic("float64", rounds_to_storage=False),
    "float32": FloatArithmetic("float32", rounds_to_storage=True),
}
"""The arithmetics that :func:`simattn.run` accepts, by name."""


def get_arithmetic(name: str) -> FloatArithmetic:
    """Return an arithmetic by name.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name == "simt":
        from simattn.arithmetic.simt import SIMT  # loads Numba

        return SIMT
    if name == "hopper":
        from simattn.arithmetic.hopper import HOPPER

        return HOPPER
    if name == "mma":
        from simattn.arithmetic.hopper import MMA

        return MMA
    if name not in ARITHMETICS:
        known = [*sorted(ARITHMETICS), "simt", "hopper", "mma"]
        raise ValueError(f"arithmetic={name!r} is unknown; expected one of {known}")
    return ARITHMETICS[name]
