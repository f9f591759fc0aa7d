"""What the algorithms with windows share: their problems, their definition, and the layers' reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.algorithms import flash2
from simattn.algorithms.flash3 import packed_rows, unpacked_rows
from simattn.algorithms.kernels import ForwardArrays
from simattn.machine import Array, Machine
from simattn.masks import is_integer
from simattn.problem import AttentionProblem, Direction, PackedProblem, checked_integer

Values = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class WindowProblem(AttentionProblem):
    """A problem of sparse attention in windows, stored in 16 or 32 bits, without a block mask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_mask is not None:
            raise ValueError("block_mask is given: expected None, the windows say what is seen")
        if self.is_float8:
            raise ValueError(f"dtype={self.dtype!r}: expected float32, float16 or bfloat16")

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields with a window whose sides are both limited, and no block mask."""
        left, right = given["window"] or (3, 0)
        window = (7 if left is None else left, 2 if right is None else right)
        return {**given, "window": window, "block_mask": None}


def checked_sides(window: Any) -> tuple[int, int]:
    """Return the sides of a window that limits both.

    Raises
    ------
    ValueError
        If there is none, or a side is unlimited.
    """
    if window is None or not all(is_integer(side) for side in window):
        raise ValueError(
            f"window={window!r}: expected a pair (left, right) of integers; (W - 1, 0) is W keys, the own one included"
        )
    left, right = window
    return left, right


def receptive_field(
    layers: int, window: tuple[int, int], *, dilation: int = 1, causal: bool = False
) -> tuple[int, int]:
    """Return how many tokens before and after its own a layer stack lets a token know of.

    Each layer reaches ``left · dilation`` tokens back and ``right · dilation`` ahead, so layers of W keys, the own one
    included, reach layers · (W − 1) tokens back.

    Parameters
    ----------
    layers
        Layers of attention on one another.
    window
        ``(left, right)`` keys on either side, both ends included.
    dilation
        Distance of neighbouring keys.
    causal
        Whether later keys are hidden.

    Raises
    ------
    ValueError, TypeError
        If a number is out of range; the message names it.

    Examples
    --------
    >>> receptive_field(4, (4095, 0))
    (16380, 0)
    """
    layers, dilation = checked_integer("layers", layers, 1), checked_integer("dilation", dilation, 1)
    left, right = (checked_integer(f"window[{index}]", side, 0) for index, side in enumerate(checked_sides(window)))
    return layers * left * dilation, 0 if causal else layers * right * dilation


# Parts of arrays


def part_of(array: Array, rows: slice) -> Array:
    """Return some rows of an array, as an array on the same memory."""
    count = len(range(*rows.indices(array.rows)))
    return replace(array, rows=count, values=None if array.values is None else array.values[:, :, rows])


def rows_at(array: Array, positions: npt.NDArray[np.int64]) -> Array:
    """Return rows gathered from an array: a copy, which :func:`put_back` writes back."""
    return replace(array, rows=len(positions), values=None if array.values is None else array.values[:, :, positions])


def put_back(array: Array, part: Array, positions: npt.NDArray[np.int64]) -> None:
    """Write gathered rows back to where they were gathered from."""
    if array.values is not None:
        array.values[:, :, positions] = part.values


def attend_packed(
    machine: Machine, problem: AttentionProblem, plan: flash2.Flash2Plan, arrays: ForwardArrays, packed: int
) -> None:
    """Attend with so many query heads of a KV head as rows of one tile, which share every load of keys and values."""
    rows = PackedProblem.of(problem, packed)

    def pack(array: Array) -> Array:
        values = None if array.values is None else packed_rows(array.values, packed)
        return replace(array, rows=array.rows * packed, values=values)

    inner_arrays = ForwardArrays(pack(arrays.q), arrays.k, arrays.v, pack(arrays.out), pack(arrays.lse))
    inner = machine.inside(rows, {})
    flash2.attend(inner, rows, plan, inner_arrays)
    machine.take_over(inner)
    for array, made in ((arrays.out, inner_arrays.out), (arrays.lse, inner_arrays.lse)):
        if array.values is not None and made.values is not None:
            array.values[...] = unpacked_rows(made.values, packed)


# Reference


@dataclass(frozen=True)
class Attended:
    """What whole matrices give: arrays (batch, query heads, rows, columns), the log-sum-exp without columns."""

    out: Values
    lse: Values
    dq: Values | None = None
    dk: Values | None = None
    dv: Values | None = None


def attended(
    q: Values,
    k: Values,
    v: Values,
    counts: npt.NDArray[np.int64],
    scale: float,
    *,
    dout: Values | None = None,
    rounded: Callable[[Values], Values] = lambda values: values,
) -> Attended:
    """Compute softmax(scale · q kᵀ + log counts) v and its gradients from whole matrices.

    Parameters
    ----------
    q, k, v
        Arrays (batch, query heads, rows, columns), in the precision to compute in.
    counts
        How often each row counts each key, 0 where it is hidden; shape (1 or query heads, q_len, kv_len).
    scale
        Factor of the scores.
    dout
        Gradient of the output, for those of the inputs.
    rounded
        What scores, probabilities, outputs and their gradients go through, such as a rounding to a storage format.
    """
    precision, seen = q.dtype, counts > 0
    with np.errstate(all="ignore"):  # NaN and Inf are propagated as IEEE says, not reported
        scores = rounded(precision.type(scale) * (q @ k.swapaxes(-1, -2)))
        scores = np.where(seen, scores, precision.type(-np.inf))
        maximum = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        shift = np.where(maximum == -np.inf, precision.type(0), maximum)
        weights = np.where(seen, np.exp(scores - shift) * counts.astype(precision), precision.type(0))
        total = weights.sum(axis=-1, keepdims=True)
        probabilities = rounded(weights / np.where(total == 0, precision.type(1), total))
        lse = (shift + np.log(total))[..., 0]
        out = rounded(_seen_product(probabilities, v, seen))
        if dout is None:
            return Attended(out, lse)
        dprobabilities = rounded(dout @ v.swapaxes(-1, -2))
        delta = (dout * out).sum(axis=-1, keepdims=True)
        dscores = rounded(np.where(seen, probabilities * (dprobabilities - delta), precision.type(0)))
        transposed = seen.swapaxes(-1, -2)
        return Attended(
            out,
            lse,
            dq=precision.type(scale) * _seen_product(dscores, k, seen),
            dk=precision.type(scale) * _seen_product(dscores.swapaxes(-1, -2), q, transposed),
            dv=_seen_product(probabilities.swapaxes(-1, -2), dout, transposed),
        )


def _seen_product(weights: Values, values: Values, seen: Mask) -> Values:
    """Return weights @ values, where what a row does not see adds nothing, whatever it holds."""
    if np.isfinite(values).all():
        return weights @ values
    product = np.zeros((*weights.shape[:-1], values.shape[-1]), dtype=values.dtype)
    for head in range(weights.shape[1]):
        for row, columns in enumerate(seen[min(head, len(seen) - 1)]):
            visible = weights[:, head, row][:, None, columns] @ values[:, head, columns]
            product[:, head, row] = visible[:, 0]
    return product


def by_head(problem: AttentionProblem, array: Values) -> Values:
    """Return (batch, query heads, rows, columns) of (batch, rows, heads, columns), repeated for grouped heads."""
    values = np.moveaxis(array, 2, 1)
    return np.repeat(values, problem.heads // values.shape[1], axis=1)


def of_kv_heads(problem: AttentionProblem, gradient: Values) -> Values:
    """Return (batch, rows, kv_heads, columns), summed over the query heads of each KV head."""
    shape = (problem.batch, problem.kv_heads, problem.group_size, *gradient.shape[2:])
    return np.moveaxis(gradient.reshape(shape).sum(axis=2), 1, 2)


def window_reference(
    problem: AttentionProblem,
    inputs: Mapping[str, Values],
    counts: npt.NDArray[np.int64],
    rounded: Callable[[Values], Values],
) -> dict[str, Values]:
    """Return the results of a definition that says how often each row counts each key.

    Parameters
    ----------
    problem
        The problem.
    inputs
        ``q``, ``k``, ``v`` and, for the gradients, ``dout``, (batch, length, heads, columns).
    counts, rounded
        As for :func:`attended`.
    """
    q, k, v = (by_head(problem, inputs[name]) for name in "qkv")
    dout = by_head(problem, inputs["dout"]) if "dout" in inputs else None
    found = attended(q, k, v, counts, problem.scale, dout=dout, rounded=rounded)
    results = {"out": np.moveaxis(found.out, 1, 2), "lse": found.lse}
    if found.dq is not None and found.dk is not None and found.dv is not None:
        results["dq"] = np.moveaxis(found.dq, 1, 2)
        results |= {"dk": of_kv_heads(problem, found.dk), "dv": of_kv_heads(problem, found.dv)}
    return results
