"""What the algorithms with windows share: their problems, parts of arrays, gradient sums, and the layers' reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from simattn.algorithms import flash2, forms
from simattn.algorithms.flash3 import packed_rows, unpacked_rows
from simattn.algorithms.kernels import BackwardArrays, ForwardArrays, GroupedGradient, convert, fill
from simattn.machine import Array, Machine
from simattn.plan import Plan, check_choice
from simattn.problem import AttentionProblem, Direction, PackedProblem, checked_integer, checked_window
from simattn.traffic import ArrayTraffic

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
        """Return the fields with a window whose sides are both limited, and without a block mask."""
        left, right = given["window"] or (3, 0)
        window = (7 if left is None else left, 2 if right is None else right)
        return {**given, "window": window, "block_mask": None}


def checked_sides(window: Any) -> tuple[int, int]:
    """Return the sides of a window that limits both.

    Raises
    ------
    TypeError, ValueError
        If it is none, or a side is unlimited.
    """
    sides = checked_window(window)
    if sides is None or sides[0] is None or sides[1] is None:
        raise ValueError(
            f"window={window!r}: expected a pair (left, right) of integers; (W - 1, 0) is W keys, the own one included"
        )
    return sides[0], sides[1]


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
    left, right = checked_sides(window)
    return layers * left * dilation, 0 if causal else layers * right * dilation


@dataclass(frozen=True, kw_only=True)
class AddedUpPlan(flash2.Flash2Plan):
    """Plan of programs whose parts add to the same gradients, so that all are sums in memory, in fp32."""

    dq: Literal["reduce"] = "reduce"
    repeat_kv: Literal[False] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dq", self.dq, ("reduce",))
        check_choice("repeat_kv", self.repeat_kv, (False,))


# Parts of arrays

Where = slice | npt.NDArray[np.int64]
"""Rows of an array: a slice, which is a view, or indices, whose rows are copied."""


def part_of(array: Array, where: Where) -> Array:
    """Return some rows of an array as an array; :func:`put_back` writes those that were copied."""
    count = len(range(*where.indices(array.rows))) if isinstance(where, slice) else len(where)
    return replace(array, rows=count, values=None if array.values is None else array.values[:, :, where])


def put_back(array: Array, part: Array, where: Where) -> None:
    """Write copied rows back to where they are from."""
    if array.values is not None and not isinstance(where, slice):
        array.values[:, :, where] = part.values


def heads_of(array: Array, kv_heads: int, chosen: npt.NDArray[np.int64]) -> Array:
    """Return the rows of some KV heads and their query heads: the array itself if these are all, else a copy."""
    if array.values is None or len(chosen) == kv_heads:
        return array
    streams, *shape = array.values.shape
    values = array.values.reshape(streams // kv_heads, kv_heads, *shape)[:, chosen]
    return replace(array, values=values.reshape(streams // kv_heads * len(chosen), *shape))


def put_heads_back(array: Array, part: Array, kv_heads: int, chosen: npt.NDArray[np.int64]) -> None:
    """Write the rows of some KV heads and their query heads back, if they were copied."""
    if array.values is not None and part.values is not None and part is not array:
        streams, *shape = array.values.shape
        whole = array.values.reshape(streams // kv_heads, kv_heads, *shape)
        whole[:, chosen] = part.values.reshape(streams // kv_heads, len(chosen), *shape)


@dataclass
class GradientSums:
    """What a backward pass reads of some rows and keys, and the sums that it adds their gradients to."""

    q: Array
    k: Array
    v: Array
    dout: Array
    lse: Array
    delta: Array
    dq: Array
    dk: GroupedGradient
    dv: GroupedGradient

    def changed(self, of_rows: Callable[[Array], Array], of_keys: Callable[[Array], Array]) -> GradientSums:
        """Return the arrays of other rows and keys."""
        return GradientSums(
            q=of_rows(self.q),
            k=of_keys(self.k),
            v=of_keys(self.v),
            dout=of_rows(self.dout),
            lse=of_rows(self.lse),
            delta=of_rows(self.delta),
            dq=of_rows(self.dq),
            dk=replace(self.dk, partial=of_keys(self.dk.partial)),
            dv=replace(self.dv, partial=of_keys(self.dv.partial)),
        )

    @property
    def summed(self) -> tuple[Array, Array, Array]:
        """The arrays that gradients are added to."""
        return self.dq, self.dk.partial, self.dv.partial

    def part(self, rows: Where, keys: Where) -> GradientSums:
        """Return the arrays of some rows and keys."""
        return self.changed(lambda array: part_of(array, rows), lambda array: part_of(array, keys))

    def put_back(self, part: GradientSums, rows: Where, keys: Where) -> None:
        """Write sums that were copied back to where they are from."""
        for whole, copied, where in zip(self.summed, part.summed, (rows, keys, keys), strict=True):
            put_back(whole, copied, where)

    def hand_in(self, machine: Machine, problem: AttentionProblem, plan: flash2.Flash2Plan, times: int = 1) -> None:
        """Run FlashAttention-2's backward loops on the arrays, so many times."""
        inner = machine.inside(problem, {"lse": self.lse})
        arrays = BackwardArrays(self.q, self.k, self.v, self.dout, self.dq, self.dk.target, self.dv.target)
        flash2.hand_in_gradients(inner, problem, plan, arrays, self.delta, self.dq, self.dk, self.dv)
        machine.take_over(inner, times)


def declare_sums(
    machine: Machine, problem: AttentionProblem, plan: flash2.Flash2Plan, *, of: str = ""
) -> tuple[Array, GroupedGradient, GroupedGradient]:
    """Declare the gradients of q, k and v, and their sums in fp32, zeroed: of those with an ending to their names."""
    shapes = problem.inputs("backward")
    gradients = {
        name: machine.array(
            f"d{name}{of}",
            shapes[f"{name}{of}"].rows,
            shapes[f"{name}{of}"].columns,
            dtype=problem.dtype,
            heads=shapes[f"{name}{of}"].heads,
            role="output",
        )
        for name in "qkv"
    }
    dq = machine.array(f"dq{of}_accumulator", gradients["q"].rows, problem.head_dim)
    fill(machine, dq, 0.0, plan)
    dk, dv = (GroupedGradient.declare(machine, gradients[name], plan, added_up=True) for name in "kv")
    return dq, dk, dv


def finish_sums(
    machine: Machine, plan: flash2.Flash2Plan, sums: tuple[Array, GroupedGradient, GroupedGradient], *, of: str = ""
) -> None:
    """Convert the sums to the gradients' storage format."""
    dq, dk, dv = sums
    convert(machine, dq, machine.arrays[f"dq{of}"], plan)
    dk.finish(machine, plan)
    dv.finish(machine, plan)


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


# Pieces of the closed forms


def delta_traffic(problem: AttentionProblem) -> Mapping[str, ArrayTraffic]:
    """Return what delta = rowsum(dO ∘ O) moves."""
    rows = forms.matrix_bytes(problem, problem.q_len, problem.value_dim)
    return {
        "out": forms.read(rows),
        "dout": forms.read(rows),
        "delta": forms.written(forms.statistic_bytes(problem, problem.q_len)),
    }


def handed_in_traffic(
    problem: AttentionProblem, plan: Plan, *, queries: int, keys: int, of: str = ""
) -> Mapping[str, ArrayTraffic]:
    """Return what a part of a backward pass moves that loads so many query rows and hands in so many key rows."""
    d, value_dim, heads = problem.head_dim, problem.value_dim, forms.key_value_heads(problem, plan)
    statistics = forms.read(forms.statistic_bytes(problem, queries))
    return {
        f"q{of}": forms.read(forms.matrix_bytes(problem, queries, d)),
        "dout": forms.read(forms.matrix_bytes(problem, queries, value_dim)),
        "lse": statistics,
        "delta": statistics,
        f"k{of}": forms.read(forms.matrix_bytes(problem, keys, d, heads=heads)),
        f"v{of}": forms.read(forms.matrix_bytes(problem, keys, value_dim, heads=heads)),
        f"dq{of}_accumulator": forms.reduced(forms.matrix_bytes(problem, queries, d, dtype="float32")),
        f"dk{of}_accumulator": forms.reduced(forms.matrix_bytes(problem, keys, d, heads=heads, dtype="float32")),
        f"dv{of}_accumulator": forms.reduced(
            forms.matrix_bytes(problem, keys, value_dim, heads=heads, dtype="float32")
        ),
    }


def sums_traffic(
    problem: AttentionProblem, plan: Plan, *, rows: int, keys: int, of: str = ""
) -> Mapping[str, ArrayTraffic]:
    """Return what zeroing the sums of the gradients and converting them moves."""
    summed = problem.heads if plan.grouped_gradients == "expand" else problem.kv_heads
    parts: dict[str, ArrayTraffic] = {}
    for name, length, columns, sums, heads in (
        ("dq", rows, problem.head_dim, problem.heads, problem.heads),
        ("dk", keys, problem.head_dim, summed, problem.kv_heads),
        ("dv", keys, problem.value_dim, summed, problem.kv_heads),
    ):
        whole = forms.matrix_bytes(problem, length, columns, heads=sums, dtype="float32")
        parts[f"{name}{of}_accumulator"] = forms.written(whole) + forms.read(whole)
        parts[f"{name}{of}"] = forms.written(forms.matrix_bytes(problem, length, columns, heads=heads))
    return parts
