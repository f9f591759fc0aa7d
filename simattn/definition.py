"""Attention as a textbook writes it, in whole matrices: what programs and kernels are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.problem import AttentionProblem

Values = npt.NDArray[Any]
Rounding = Callable[[Values], Values]


def exact(values: Values) -> Values:
    """Return the values as they are: a rounding that rounds nothing."""
    return values


def by_query_head(problem: AttentionProblem, array: Values) -> Values:
    """Return (batch, query heads, rows, columns) of (batch, rows, heads, columns), repeated for grouped heads."""
    values = np.moveaxis(array, 2, 1)
    return np.repeat(values, problem.heads // values.shape[1], axis=1)


def by_kv_head(problem: AttentionProblem, gradient: Values) -> Values:
    """Return (batch, rows, kv_heads, columns) of (batch, query heads, rows, columns), summed over each group."""
    shape = (problem.batch, problem.kv_heads, problem.group_size, *gradient.shape[2:])
    return np.moveaxis(gradient.reshape(shape).sum(axis=2), 1, 2)


def seen_product(weights: Values, values: Values, seen: npt.NDArray[np.bool_]) -> Values:
    """Return weights @ values, where what a row does not see adds nothing, whatever it holds.

    Parameters
    ----------
    weights, values
        Shapes (…, rows, columns) and (…, columns, dim).
    seen
        Which columns each row sees; its shape broadcasts to that of the weights.
    """
    if np.isfinite(values).all():
        return np.asarray(weights @ values)
    leading = np.broadcast_shapes(weights.shape[:-2], values.shape[:-2])
    seen = np.broadcast_to(seen, (*leading, *weights.shape[-2:]))
    values = np.broadcast_to(values, (*leading, *values.shape[-2:]))
    product = np.zeros((*leading, weights.shape[-2], values.shape[-1]), dtype=values.dtype)
    for row in np.ndindex(product.shape[:-1]):
        product[row] = weights[row][seen[row]] @ values[row[:-1]][seen[row]]
    return product


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
    counts: npt.NDArray[Any],
    scale: float,
    *,
    dout: Values | None = None,
    rounded: Rounding = exact,
) -> Attended:
    """Compute softmax(scale · q kᵀ + log counts) v and its gradients.

    A row that sees no key, or whose scores are all −inf, is 0 with a log-sum-exp of −inf.

    Parameters
    ----------
    q, k, v
        Arrays (batch, query heads, rows, columns), in the precision to compute in.
    counts
        How often each row counts each key, 0 or False where it is hidden; its shape broadcasts to (batch, query heads,
        q_len, kv_len).
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
        highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        shift = np.where(highest == -np.inf, precision.type(0), highest)
        weights = np.where(seen, np.exp(scores - shift) * counts.astype(precision), precision.type(0))
        total = weights.sum(axis=-1, keepdims=True)
        probabilities = rounded(weights / np.where(total == 0, precision.type(1), total))
        lse = (shift + np.log(total))[..., 0]
        out = rounded(seen_product(probabilities, v, seen))
        if dout is None:
            return Attended(out, lse)
        dprobabilities = rounded(dout @ v.swapaxes(-1, -2))
        delta = (dout * out).sum(axis=-1, keepdims=True)
        dscores = rounded(np.where(seen, probabilities * (dprobabilities - delta), precision.type(0)))
        transposed = seen.swapaxes(-1, -2)
        return Attended(
            out,
            lse,
            dq=precision.type(scale) * seen_product(dscores, k, seen),
            dk=precision.type(scale) * seen_product(dscores.swapaxes(-1, -2), q, transposed),
            dv=seen_product(probabilities.swapaxes(-1, -2), dout, transposed),
        )


def one_softmax(
    problem: AttentionProblem, inputs: Mapping[str, Values], counts: npt.NDArray[Any], rounded: Rounding = exact
) -> dict[str, Values]:
    """Compute one softmax over what each query counts, and its gradients.

    Parameters
    ----------
    problem
        Shapes and scale.
    inputs
        ``q``, ``k``, ``v`` and, for the gradients, ``dout``, (batch, length, heads, columns), in the precision to
        compute in: float64 for the oracle.
    counts, rounded
        As for :func:`attended`.

    Returns
    -------
    dict
        ``out``, shaped like q with the values' columns, the natural log-sum-exp ``lse``, (batch, query heads, q_len),
        and with ``dout`` also ``dq``, ``dk`` and ``dv``, shaped like the inputs.
    """
    q, k, v = (by_query_head(problem, inputs[name]) for name in "qkv")
    dout = by_query_head(problem, inputs["dout"]) if "dout" in inputs else None
    found = attended(q, k, v, counts, problem.scale, dout=dout, rounded=rounded)
    results = {"out": np.moveaxis(found.out, 1, 2), "lse": found.lse}
    if found.dq is not None and found.dk is not None and found.dv is not None:
        results["dq"] = np.moveaxis(found.dq, 1, 2)
        results |= {"dk": by_kv_head(problem, found.dk), "dv": by_kv_head(problem, found.dv)}
    return results
