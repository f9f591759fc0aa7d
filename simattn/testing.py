"""Test your own attention kernel: hypothesis strategies, a float64 reference, two honest comparisons.

A kernel is tested in three steps: draw a problem with its inputs, compute the reference, compare. The error
that is allowed is not a number pulled from the air: a plain dense attention, computed in the storage
precision, is compared with float64 first, and the kernel may be twice as far off.

>>> import numpy as np
>>> from hypothesis import given, settings
>>> from simattn.testing import (
...     assert_within_error_budget, attention_cases, low_precision_attention, reference_attention,
... )
>>> def my_attention(q, k, v, *, scale, causal):
...     q, k, v = (np.moveaxis(array, 2, 1) for array in (q, k, v))
...     scores = scale * (q @ k.swapaxes(-1, -2))
...     if causal:
...         q_len, kv_len = scores.shape[-2:]
...         scores[..., ~np.tri(q_len, kv_len, kv_len - q_len, dtype=bool)] = -np.inf
...     weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
...     return np.moveaxis(weights @ v / weights.sum(axis=-1, keepdims=True), 1, 2)
>>> @settings(max_examples=50, derandomize=True)
... @given(attention_cases(dtypes=["float32"], min_len=1, self_attention=True, windowed=False,
...                        block_sparse=False, grouped=False))
... def test_my_attention(case):
...     problem, inputs = case
...     out = my_attention(**inputs, scale=problem.scale, causal=problem.causal)
...     reference, _ = reference_attention(problem, **inputs)
...     low_precision, _ = low_precision_attention(problem, **inputs)
...     assert_within_error_budget(out, reference, low_precision)
>>> test_my_attention()

Every argument of :func:`attention_problems` that is left out widens the test: without ``self_attention`` the
kernel meets rows that see no key, without ``min_len`` empty sequences, without ``grouped`` shared keys.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from simattn import definition
from simattn.algorithms.algorithm import Algorithm
from simattn.arithmetic.formats import numpy_dtype
from simattn.masks import BlockMask
from simattn.plan import Tiles
from simattn.problem import AttentionProblem, Direction, Window
from simattn.sums import ceil_div

__all__ = [
    "INPUT_KINDS",
    "InputKind",
    "assert_same_bits",
    "assert_within_error_budget",
    "attention_cases",
    "attention_inputs",
    "attention_problems",
    "block_masks",
    "gradient_floors",
    "low_precision_attention",
    "low_precision_attention_backward",
    "plan_options",
    "problems_of",
    "reference_attention",
    "reference_attention_backward",
    "tiles_for",
    "windows",
]

Values = npt.NDArray[Any]
Inputs = dict[str, Values]

InputKind = Literal["normal", "peaked", "wide_exponents", "repeated_maxima"]
INPUT_KINDS: tuple[InputKind, ...] = typing.get_args(InputKind)
"""What :func:`attention_inputs` draws: "normal" numbers; "peaked", scores so large that few keys take all the
weight; "wide_exponents", columns and rows of very different size whose scores are nevertheless ordinary;
"repeated_maxima", small integers and repeated keys, so that several keys tie for the row maximum."""

BLOCK_SIZES = (2, 3, 4, 6, 8, 12, 16)
DTYPES = ("float32", "float16", "bfloat16")
WIDEST_EXPONENT = {"float32": 30, "bfloat16": 30, "float16": 3, "float8_e4m3fn": 2, "float8_e5m2": 2}
"""Powers of two that leave outputs and gradients of small problems finite in their storage format."""


# Strategies


def windows(max_size: int = 40) -> st.SearchStrategy[Window | None]:
    """Return a strategy of windows: None, or (left, right) with sides of None or 0 … ``max_size``."""
    side = st.none() | st.integers(0, max_size)
    return st.none() | st.tuples(side, side)


@st.composite
def block_masks(draw: st.DrawFn, q_len: int, kv_len: int, *, block_sizes: Sequence[int] = BLOCK_SIZES) -> BlockMask:
    """Draw a block-sparse mask for a score matrix, from empty to full.

    Parameters
    ----------
    draw
        Supplied by hypothesis.
    q_len, kv_len
        Rows and columns of the score matrix.
    block_sizes
        Rows and columns that a block may have.
    """
    q_block, kv_block = draw(st.sampled_from(block_sizes)), draw(st.sampled_from(block_sizes))
    shape = (ceil_div(q_len, q_block), ceil_div(kv_len, kv_block))
    stored = draw(st.sampled_from((0.5, 1.0, 0.8, 0.2, 0.0)))
    blocks = _generator(draw).random(shape) < stored
    return BlockMask.from_array(blocks, q_block=q_block, kv_block=kv_block)


@st.composite
def attention_problems(
    draw: st.DrawFn,
    *,
    max_batch: int = 2,
    max_heads: int = 4,
    min_len: int = 0,
    max_len: int = 40,
    head_dims: Sequence[int] = (1, 3, 8, 16),
    dtypes: Sequence[str] = DTYPES,
    causal: bool | None = None,
    windowed: bool | None = None,
    block_sparse: bool | None = None,
    self_attention: bool | None = None,
    grouped: bool | None = None,
    same_value_dim: bool | None = None,
) -> AttentionProblem:
    """Draw an attention problem; each yes-or-no argument left at None is drawn too.

    Parameters
    ----------
    draw
        Supplied by hypothesis.
    max_batch, max_heads, max_len
        Largest batch, number of query heads and length.
    min_len
        Smallest length; 0 draws empty sequences, and batches without any, too.
    head_dims
        Head and value dimensions to draw from.
    dtypes
        Storage formats to draw from.
    causal, windowed, block_sparse
        Whether the problem has each kind of mask. With lengths that differ, they leave some rows no key.
    self_attention
        Whether the queries are as many as the keys.
    grouped
        Whether several query heads may share a KV head (from grouped-query to multi-query attention).
    same_value_dim
        Whether values are as wide as keys.
    """

    def decided(choice: bool | None) -> bool:
        return draw(st.booleans()) if choice is None else choice

    lengths = st.integers(min_len, max_len)
    q_len = draw(lengths)
    kv_len = q_len if decided(self_attention) else draw(lengths)
    kv_heads = draw(st.integers(1, max_heads))
    group = draw(st.integers(1, max_heads // kv_heads)) if decided(grouped) else 1
    head_dim = draw(st.sampled_from(head_dims))
    return AttentionProblem(
        batch=draw(st.integers(min(min_len, 1), max_batch)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        value_dim=head_dim if decided(same_value_dim) else draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.sampled_from((None, 0.25, 1.0))),  # type: ignore[arg-type]
        causal=decided(causal),
        window=draw(windows(max_len)) if decided(windowed) else None,
        block_mask=draw(block_masks(q_len, kv_len)) if decided(block_sparse) else None,
    )


@st.composite
def problems_of(
    draw: st.DrawFn, /, algorithm: Algorithm, direction: Direction = "forward", **arguments: Any
) -> AttentionProblem:
    """Draw a problem that an algorithm takes, with the fields that its problems have besides.

    Parameters
    ----------
    draw
        Supplied by hypothesis.
    algorithm
        An entry of :data:`simattn.ALGORITHMS`.
    direction
        Which of its programs is to take the problem.
    **arguments
        As for :func:`attention_problems`; what the algorithm does not take of such a problem is changed.
    """
    if algorithm.takes_any_mask:
        return draw(attention_problems(**arguments))
    problem = draw(attention_problems(**arguments))
    given = {item.name: getattr(problem, item.name) for item in fields(AttentionProblem)}
    given = algorithm.problem_class.adapted(given, direction)
    examples = algorithm.problem_class.example_arguments(AttentionProblem(**given), direction)
    return algorithm.problem_class(**given, **draw(st.sampled_from(examples)))


@st.composite
def tiles_for(draw: st.DrawFn, problem: AttentionProblem, *, max_tiles: int = 12, with_depth: bool = False) -> Tiles:
    """Draw tiles for a problem: single rows, sizes that do not divide the lengths, and sizes beyond them.

    Under a block mask the tiles divide its blocks.

    Parameters
    ----------
    draw
        Supplied by hypothesis.
    problem
        The problem to be tiled.
    max_tiles
        Most tiles along an axis, which bounds the work of walking them; blocks are not split beyond it.
    with_depth
        Whether to draw chunks of the head dimension too; for algorithms with ``chunks_columns``.
    """
    sizes = []
    mask = problem.block_mask
    blocks = (None, None) if mask is None else (mask.q_block, mask.kv_block)
    for length, block in zip((problem.q_len, problem.kv_len), blocks, strict=True):
        smallest = max(1, ceil_div(length, max_tiles))
        if block is None:
            sizes.append(draw(st.integers(smallest, max(smallest, length) + 3)))
        else:
            divisors = [size for size in range(1, block + 1) if block % size == 0 and size >= smallest]
            sizes.append(draw(st.sampled_from(divisors or [block])))
    sizes[1] = problem.key_tile(sizes[1])
    columns = max(problem.head_dim, problem.value_dim)
    depth = draw(st.none() | st.integers(ceil_div(columns, 4), columns + 1)) if with_depth else None
    return Tiles(q=sizes[0], kv=sizes[1], depth=depth)


@st.composite
def plan_options(draw: st.DrawFn, algorithm: Algorithm) -> dict[str, Any]:
    """Draw the options of an algorithm's plan, found from the types of its fields.

    Tiles, packed heads and packed positions, which depend on the problem, are left out.

    Parameters
    ----------
    draw
        Supplied by hypothesis.
    algorithm
        An entry of :data:`simattn.ALGORITHMS`.
    """
    hints = typing.get_type_hints(algorithm.plan_class)
    options: dict[str, Any] = {}
    for item in fields(algorithm.plan_class):
        if item.name not in ("tiles", "packed_heads", "positions", "enforce_capacity") and draw(st.booleans()):
            options[item.name] = draw(st.sampled_from(_values_of(hints[item.name])))
    return options


def _values_of(kind: Any) -> tuple[Any, ...]:
    """Return the values, or a few of them, that a plan's field may take."""
    if kind is bool:
        return (False, True)
    if kind is int:
        return (1, 2, 3)
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(value for part in typing.get_args(kind) for value in _values_of(part))
    if kind is type(None):
        return (None,)
    raise TypeError(f"a plan's field is annotated {kind!r}: expected bool, int, Literal or a union of these")


@st.composite
def attention_inputs(
    draw: st.DrawFn,
    problem: AttentionProblem,
    *,
    backward: bool = False,
    direction: Direction | None = None,
    kinds: Sequence[InputKind] = INPUT_KINDS,
    hidden_is_finite: bool = True,
) -> Inputs:
    """Draw the inputs of a problem, made from a drawn seed so that they cost nothing to draw and shrink.

    Parameters
    ----------
    draw
        Supplied by hypothesis.
    problem
        The problem.
    backward
        Whether to add the gradient of the output.
    direction
        "forward", "backward" or "decode", in place of ``backward``.
    kinds
        Kinds of numbers to draw from; see :data:`INPUT_KINDS`.
    hidden_is_finite
        If not, the keys and values that no query sees, and the queries that see no key, hold NaN and
        infinities, which must not change anything.

    Returns
    -------
    dict of arrays in the storage format
        ``q`` (batch, q_len, heads, head_dim), ``k`` (batch, kv_len, kv_heads, head_dim), ``v`` (batch,
        kv_len, kv_heads, value_dim), if asked for ``dout`` (batch, q_len, heads, value_dim), and what else the
        problem's programs are given.
    """
    kind = draw(st.sampled_from(kinds))
    generator = _generator(draw)
    direction = direction or ("backward" if backward else "forward")
    shapes = problem.inputs(direction)
    inputs = _INPUT_MAKERS[kind](problem, generator, {name: shapes[name].user_shape(problem) for name in "qkv"})
    if "dout" in shapes:
        inputs["dout"] = generator.standard_normal(shapes["dout"].user_shape(problem))
    inputs |= problem.draw_inputs(direction, generator)
    if not hidden_is_finite:
        seen = problem.visible_elements()
        hidden = {"q": ~seen.any(axis=1), "k": ~seen.any(axis=0)}
        special = np.array([np.nan, np.inf, -np.inf])
        for name in {"q", "k", "v", "dout"} & set(inputs):
            array = inputs[name]
            rows = np.flatnonzero(hidden["q" if name in ("q", "dout") else "k"])
            array[:, rows] = generator.choice(special, array[:, rows].shape)
    return {name: array.astype(numpy_dtype(shapes[name].dtype or problem.dtype)) for name, array in inputs.items()}


@st.composite
def attention_cases(
    draw: st.DrawFn, /, *, backward: bool = False, hidden_is_finite: bool = True, **arguments: Any
) -> tuple[AttentionProblem, Inputs]:
    """Draw a problem and its inputs.

    Parameters
    ----------
    draw
        Supplied by hypothesis.
    backward, hidden_is_finite
        As for :func:`attention_inputs`.
    **arguments
        As for :func:`attention_problems`.
    """
    problem = draw(attention_problems(**arguments))
    return problem, draw(attention_inputs(problem, backward=backward, hidden_is_finite=hidden_is_finite))


def _generator(draw: st.DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


Shapes = dict[str, tuple[int, ...]]


def _normal(problem: AttentionProblem, generator: np.random.Generator, shapes: Shapes) -> Inputs:
    return {name: generator.standard_normal(shape) for name, shape in shapes.items()}


def _peaked(problem: AttentionProblem, generator: np.random.Generator, shapes: Shapes) -> Inputs:
    inputs = _normal(problem, generator, shapes)
    inputs["q"] *= 8
    return inputs


def _wide_exponents(problem: AttentionProblem, generator: np.random.Generator, shapes: Shapes) -> Inputs:
    inputs = _normal(problem, generator, shapes)
    widest = WIDEST_EXPONENT[problem.dtype]
    columns = generator.integers(-widest, widest + 1, problem.head_dim)
    inputs["q"] = np.ldexp(inputs["q"], columns)
    inputs["k"] = np.ldexp(inputs["k"], -columns)
    rows = generator.integers(-widest, widest + 1, inputs["v"].shape[:3])
    inputs["v"] = np.ldexp(inputs["v"], rows[..., None])
    return inputs


def _repeated_maxima(problem: AttentionProblem, generator: np.random.Generator, shapes: Shapes) -> Inputs:
    inputs = {name: generator.integers(-2, 3, shape).astype(np.float64) for name, shape in shapes.items()}
    rows = inputs["k"].shape[1]
    if rows:
        inputs["k"] = inputs["k"][:, generator.integers(0, max(1, rows // 4), rows)]
    return inputs


_INPUT_MAKERS: dict[InputKind, Callable[[AttentionProblem, np.random.Generator, Shapes], Inputs]] = {
    "normal": _normal,
    "peaked": _peaked,
    "wide_exponents": _wide_exponents,
    "repeated_maxima": _repeated_maxima,
}


# References


def reference_attention(
    problem: AttentionProblem,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    q_descale: npt.ArrayLike | None = None,
    k_descale: npt.ArrayLike | None = None,
    v_descale: npt.ArrayLike | None = None,
) -> tuple[Values, Values]:
    """Return the attention of the definition, dense and in float64.

    A row that sees no key, or whose scores are all −inf, is 0 with a log-sum-exp of −inf. What a row does not
    see never affects it, even when that holds NaN or Inf.

    Parameters
    ----------
    problem
        Shapes, scale and mask.
    q, k, v
        Arrays as :func:`attention_inputs` draws them.
    q_descale, k_descale, v_descale
        For eight-bit storage: factors of shape (batch, kv_heads), default 1.

    Returns
    -------
    out
        Float64, shape (batch, q_len, heads, value_dim).
    lse
        Float64, natural log-sum-exp, shape (batch, heads, q_len).
    """
    dense = _dense(problem, {"q": q, "k": k, "v": v}, {"q": q_descale, "k": k_descale, "v": v_descale})
    return dense["out"], dense["lse"]


def reference_attention_backward(
    problem: AttentionProblem, q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike, dout: npt.ArrayLike
) -> tuple[Values, Values, Values]:
    """Return the gradients dq, dk, dv of the definition, dense and in float64, shaped like their inputs.

    Parameters
    ----------
    problem
        Shapes, scale and mask.
    q, k, v, dout
        Arrays as :func:`attention_inputs` draws them.
    """
    dense = _dense(problem, {"q": q, "k": k, "v": v, "dout": dout}, {})
    return dense["dq"], dense["dk"], dense["dv"]


def low_precision_attention(
    problem: AttentionProblem,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    q_descale: npt.ArrayLike | None = None,
    k_descale: npt.ArrayLike | None = None,
    v_descale: npt.ArrayLike | None = None,
) -> tuple[Values, Values]:
    """Return plain dense attention as the storage precision allows it; its error is the budget of a kernel's.

    Products are summed in float32; scores, probabilities and the output are each rounded to the output's
    storage format, as they are where every step writes its result to memory.

    Parameters
    ----------
    problem, q, k, v, q_descale, k_descale, v_descale
        As for :func:`reference_attention`.

    Returns
    -------
    out
        In the output's storage format, shape (batch, q_len, heads, value_dim).
    lse
        Float32, shape (batch, heads, q_len).
    """
    stored = numpy_dtype(problem.output_dtype)
    descales = {"q": q_descale, "k": k_descale, "v": v_descale}
    dense = _dense(problem, {"q": q, "k": k, "v": v}, descales, stored)
    return dense["out"].astype(stored), dense["lse"]


def low_precision_attention_backward(
    problem: AttentionProblem, q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike, dout: npt.ArrayLike
) -> tuple[Values, Values, Values]:
    """Return the gradients dq, dk, dv as the storage precision allows them, in the storage format.

    Parameters
    ----------
    problem, q, k, v, dout
        As for :func:`reference_attention_backward`.
    """
    stored = numpy_dtype(problem.dtype)
    dense = _dense(problem, {"q": q, "k": k, "v": v, "dout": dout}, {}, stored)
    return dense["dq"].astype(stored), dense["dk"].astype(stored), dense["dv"].astype(stored)


def _dense(
    problem: AttentionProblem,
    inputs: Mapping[str, npt.ArrayLike],
    descales: Mapping[str, npt.ArrayLike | None],
    stored: np.dtype[Any] | None = None,
) -> dict[str, Values]:
    """Return what the definition gives in float64, or in float32 with every matrix rounded to a storage format."""
    precision = np.dtype(np.float64 if stored is None else np.float32)
    wide = {name: np.asarray(array).astype(precision) for name, array in inputs.items()}
    for name, descale in descales.items():
        if descale is not None:
            factors = np.repeat(np.asarray(descale), wide[name].shape[2] // problem.kv_heads, axis=1)
            wide[name] = wide[name] * factors.astype(precision)[:, None, :, None]

    def rounded(values: Values) -> Values:
        return values if stored is None else values.astype(stored).astype(precision)

    return definition.one_softmax(problem, wide, problem.visible_elements(), rounded)


# Comparisons


def assert_same_bits(actual: npt.ArrayLike, expected: npt.ArrayLike, *, name: str = "result") -> None:
    """Assert that two arrays hold the same bit patterns; all NaNs of a type are equal, and nothing else is.

    Parameters
    ----------
    actual, expected
        Arrays, which must have the same dtype and shape.
    name
        What the message calls them.

    Raises
    ------
    AssertionError
        If they differ; the message gives the first differing index, both patterns and how many differ.

    Examples
    --------
    >>> assert_same_bits(np.float16([0.0]), np.float16([-0.0]))
    Traceback (most recent call last):
    AssertionError: result differs in 1 of 1 elements, first at (0,): 0x0000 (0.0), expected 0x8000 (-0.0)
    """
    left, right = np.asarray(actual), np.asarray(expected)
    assert left.dtype == right.dtype, f"{name} has dtype {left.dtype}, expected {right.dtype}"
    assert left.shape == right.shape, f"{name} has shape {left.shape}, expected {right.shape}"
    left_bits, right_bits = _bits(left), _bits(right)
    different = (left_bits != right_bits) & ~(np.isnan(left) & np.isnan(right))
    if different.any():
        first = _first(different)
        digits = 2 * left.dtype.itemsize
        raise AssertionError(
            f"{name} differs in {np.count_nonzero(different)} of {different.size} elements, "
            f"first at {first}: 0x{left_bits[first]:0{digits}x} ({left[first]}), "
            f"expected 0x{right_bits[first]:0{digits}x} ({right[first]})"
        )


def _bits(array: Values) -> Values:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def gradient_floors(
    problem: AttentionProblem,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    dout: npt.ArrayLike,
    *,
    roundings: int = 1,
) -> tuple[Values, Values, Values]:
    """Return what roundings may cost dq, dk and dv, for the floor of :func:`assert_within_error_budget`.

    Errors are relative to the terms of a sum, not to what cancellation leaves of them, and an error in a score becomes
    a relative error of its probability.

    Parameters
    ----------
    problem, q, k, v, dout
        As for :func:`reference_attention_backward`, all finite.
    roundings
        How often a gradient is rounded to the storage format: once when it is stored, and more often where parts of it
        go through memory.
    """
    wide = {
        name: np.moveaxis(np.asarray(array).astype(np.float64), 2, 1)
        for name, array in (("q", q), ("k", k), ("v", v), ("dout", dout))
    }
    wide |= {name: np.repeat(wide[name], problem.group_size, axis=1) for name in "kv"}
    scores = np.where(problem.visible_elements(), problem.scale * (wide["q"] @ wide["k"].swapaxes(-1, -2)), -np.inf)
    highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(highest == -np.inf, 0, highest))
    total = weights.sum(axis=-1, keepdims=True)
    weights /= np.where(total == 0, 1, total)
    queries, keys, values, gradient = (np.abs(wide[name]) for name in ("q", "k", "v", "dout"))
    dweights = gradient @ values.swapaxes(-1, -2) + (gradient * (weights @ values)).sum(axis=-1, keepdims=True)
    dscores = problem.scale * weights * dweights
    grouped = (problem.batch, problem.kv_heads, problem.group_size, problem.kv_len)
    terms = (
        dscores @ keys,
        (dscores.swapaxes(-1, -2) @ queries).reshape(*grouped, problem.head_dim).sum(axis=2),
        (weights.swapaxes(-1, -2) @ gradient).reshape(*grouped, problem.value_dim).sum(axis=2),
    )
    unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    growth = 1 + problem.scale * (queries @ keys.swapaxes(-1, -2)).max(initial=0.0)
    relative = growth * (4 * unit["float32"] + roundings * unit[problem.dtype])
    dq, dk, dv = (relative * np.moveaxis(term, 1, 2) for term in terms)
    return dq, dk, dv


def assert_within_error_budget(
    actual: npt.ArrayLike,
    reference: npt.ArrayLike,
    low_precision: npt.ArrayLike,
    *,
    factor: float = 2.0,
    floor: npt.ArrayLike | None = None,
    name: str = "result",
) -> None:
    """Assert that a result is about as accurate as its precision allows.

    It must be finite where the reference is, and hold the same infinity or NaN where that does. Then its
    largest error may be ``factor`` times that of the low-precision reference, plus ``floor``.

    Parameters
    ----------
    actual
        The result to judge.
    reference
        The float64 reference.
    low_precision
        A plain computation in the result's precision, such as :func:`low_precision_attention`.
    factor
        Errors of the low-precision reference that are allowed.
    floor
        Error allowed besides, a number or an array; default one unit in the last place of the largest
        reference element, in the result's dtype. It matters where the low-precision one is exact by luck.
    name
        What the message calls the result.

    Raises
    ------
    AssertionError
        If the result is outside the budget; the message gives the worst index and the numbers.
    ValueError
        If the low-precision reference is not finite where the reference is, so that it gives no budget.
    """
    stored = np.asarray(actual)
    result, exact, rough = (np.asarray(array).astype(np.float64) for array in (actual, reference, low_precision))
    assert result.shape == exact.shape, f"{name} has shape {result.shape}, expected {exact.shape}"
    if rough.shape != exact.shape:
        raise ValueError(f"low_precision has shape {rough.shape}: expected {exact.shape}, the reference's")
    finite = np.isfinite(exact)
    if not np.isfinite(rough[finite]).all():
        raise ValueError("low_precision is not finite where the reference is: it gives no error budget")
    same_special = (result == exact) | (np.isnan(result) & np.isnan(exact))
    wrong = np.where(finite, ~np.isfinite(result), ~same_special)
    if wrong.any():
        first = _first(wrong)
        raise AssertionError(
            f"{name} is {stored[first]} at {first}, expected {exact[first]}; {np.count_nonzero(wrong)} of "
            f"{wrong.size} elements are infinite or NaN where they should not be, or the reverse"
        )
    if not finite.any():
        return
    if floor is None:
        floor = _epsilon(stored.dtype) * np.abs(exact[finite]).max()
    rough_error = np.abs(rough[finite] - exact[finite]).max()
    budget = np.broadcast_to(factor * rough_error + np.asarray(floor, dtype=np.float64), exact.shape)
    error = np.zeros(exact.shape)
    error[finite] = np.abs(result[finite] - exact[finite])
    beyond = error > budget
    if beyond.any():
        worst = _first(beyond & (error == error[beyond].max()))
        raise AssertionError(
            f"{name} is {stored[worst]} at {worst}, expected {exact[worst]:.17g}: the error "
            f"{error[worst]:.3g} exceeds the budget {budget[worst]:.3g}, {factor} times the low-precision "
            f"reference's largest error {rough_error:.3g} and the floor; {np.count_nonzero(beyond)} of "
            f"{beyond.size} elements exceed it"
        )


def _first(chosen: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(index) for index in np.argwhere(chosen)[0])


def _epsilon(dtype: np.dtype[Any]) -> float:
    """Return the distance from 1 to the next number of a type."""
    import ml_dtypes

    information: Any = ml_dtypes.finfo
    return float(information(dtype).eps)
