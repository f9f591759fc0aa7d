"""A layer's programs run on values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from simattn.arithmetic.floating import ARITHMETICS, FloatArithmetic
from simattn.layers.attention import Attention, attention_part
from simattn.layers.phases import Lengths, Phase
from simattn.layers.results import LayerPart
from simattn.layers.work import Product, Projections, Work
from simattn.problem import Direction

if TYPE_CHECKING:
    from simattn.layers.layer import AttentionLayer

Values = npt.NDArray[Any]
Cache = tuple[Values, Values]


# Inputs


@dataclass(frozen=True)
class _Check:
    """Checks arrays: storage format, or float64 for the oracle, and shape."""

    dtype: str
    arithmetic: str

    def array(self, name: str, given: npt.ArrayLike, shape: tuple[int | None, ...]) -> Values:
        """Return an array of this shape, None being any length."""
        array = np.asarray(given)
        lengths = ("batch", "length", "length")
        if array.ndim != len(shape) or any(
            size not in (None, found) for size, found in zip(shape, array.shape, strict=True)
        ):
            wanted = ", ".join(lengths[axis] if size is None else str(size) for axis, size in enumerate(shape))
            raise ValueError(f"{name} has shape {array.shape}: expected ({wanted})")
        allowed = [self.dtype, *(["float64"] if self.arithmetic == "float64" else [])]
        if array.dtype.name not in allowed:
            raise TypeError(
                f"{name} has dtype {array.dtype}: expected {' or '.join(allowed)} in a {self.dtype} layer with "
                f"arithmetic={self.arithmetic!r}"
            )
        return array.astype(np.float64) if self.arithmetic == "float64" else array

    def cache(self, given: Any, batch: int, layer: AttentionLayer) -> Cache:
        """Return keys and values of earlier tokens."""
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise TypeError(f"cache is a {type(given).__name__}: expected a pair of arrays (k, v)")
        k = self.array("cache[0]", given[0], (batch, None, layer.kv_heads, layer.head_dim))
        v = self.array("cache[1]", given[1], (batch, k.shape[1], layer.kv_heads, layer.value_dim))
        return k, v

    def weights(self, given: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Values]:
        """Return the weights and biases by name."""
        if not isinstance(given, Mapping):
            raise TypeError(f"weights is a {type(given).__name__}: expected a mapping of arrays by name")
        if set(given) != set(shapes):
            raise ValueError(f"weights has the arrays {sorted(given)}: expected {sorted(shapes)}")
        return {name: self.array(f"weights[{name!r}]", given[name], shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class GivenArrays:
    """The checked arguments of a run.

    Attributes
    ----------
    phase, lengths
        What they are the arguments of.
    arithmetic
        In which numbers it is run.
    values
        Input, weights, context and the output's gradient, by name.
    past
        The cache before a decoding step.
    """

    phase: Phase
    lengths: Lengths
    arithmetic: FloatArithmetic
    values: dict[str, Values]
    past: Cache | None

    @classmethod
    def checked(
        cls,
        layer: AttentionLayer,
        x: npt.ArrayLike,
        weights: Any,
        context: npt.ArrayLike | None,
        cache: Any,
        arithmetic: str,
        dy: npt.ArrayLike | None = None,
    ) -> GivenArrays:
        """Return what the arguments of :meth:`simattn.AttentionLayer.run` mean, or those of its backward pass."""
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic={arithmetic!r}: expected one of {sorted(ARITHMETICS)}")
        check = _Check(layer.dtype, arithmetic)
        values = {"x": check.array("x", x, (None, None, layer.model_width))}
        batch, length = values["x"].shape[:2]
        if dy is not None:
            values["dy"] = check.array("dy", dy, (batch, length, layer.model_width))
        has_context = layer.is_cross_attention and cache is None
        if has_context != (context is not None):
            expected = f"an array (batch, context_length, {layer.context_width})" if has_context else "None"
            raise ValueError(
                f"context is {'None' if context is None else 'given'} with context_width={layer.context_width!r} and "
                f"{'no' if cache is None else 'a'} cache: expected {expected}"
            )
        if context is not None:
            values["context"] = check.array("context", context, (batch, None, layer.context_width))
        past = None if cache is None else check.cache(cache, batch, layer)
        cached = None if past is None else past[0].shape[1]
        lengths: dict[str, int | None] = {"cache_length": cached, "context_length": None}
        if layer.is_cross_attention:
            lengths = {"cache_length": None, "context_length": cached if past else values["context"].shape[1]}
        phase: Phase = "decode" if past is not None else "prefill" if dy is None else "backward"
        checked = Lengths.checked(layer, phase, length, batch, **lengths)
        values |= check.weights(weights, layer.weight_shapes)
        return cls(phase, checked, ARITHMETICS[arithmetic], values, past)


# Running


@dataclass
class Simulation:
    """The values of a layer's matrices, computed program by program.

    Attributes
    ----------
    given
        The inputs.
    work, attention, projections
        What is run, and how.
    values
        The matrices that are known, by name.
    parts
        Counts of the programs that have run.
    saved
        What the forward pass of the attention left for the backward pass.
    """

    given: GivenArrays
    work: Work
    attention: Attention
    projections: Projections
    values: dict[str, Values]
    parts: list[LayerPart] = field(default_factory=list)
    saved: Mapping[str, Values] | None = None

    @classmethod
    def of(
        cls, layer: AttentionLayer, given: GivenArrays, attention: Attention, projections: Projections
    ) -> Simulation:
        """Return the state before the first program."""
        work = Work.of(layer, given.phase, given.lengths)
        values = {name: array.reshape(work.shapes[name]) for name, array in given.values.items()}
        return cls(given, work, attention, projections, values)

    def run_forward(self, attention: Attention) -> None:
        """Run the forward programs, with this attention."""
        for step in self.work.forward:
            if step is None:
                run = attention.run_forward(self._inputs(), self.given.arithmetic.name)
                assert run.out is not None
                self.values["attention_out"] = run.out.reshape(self.work.shapes["attention_out"])
                self.saved = run.saved
                self.parts.append(attention_part(run))
            else:
                self._multiply(step, "forward")

    def run_backward(self) -> None:
        """Run the backward programs, after the forward ones."""
        assert self.saved is not None
        problem = self.attention.problem
        for step in self.work.backward:
            if step is None:
                dout = self.values["dattention_out"].reshape(
                    problem.batch, problem.q_len, problem.heads, problem.value_dim
                )
                run = self.attention.run_backward(self._inputs(dout=dout), self.saved, self.given.arithmetic.name)
                for name, gradient in (("dq", run.dq), ("dk", run.dk), ("dv", run.dv)):
                    assert gradient is not None
                    self.values[name] = gradient.reshape(self.work.shapes[name])
                self.parts.append(attention_part(run))
            else:
                self._multiply(step, "backward")

    @property
    def keys_and_values(self) -> Cache:
        """The cache after this run: (batch, keys, kv_heads, columns) of each."""
        past = self.given.past
        if past is not None and "k" not in self.values:
            return past
        problem = self.attention.problem
        columns = {"k": problem.head_dim, "v": problem.value_dim}
        new = [
            self.values[name].reshape(problem.batch, self.given.lengths.projected, problem.kv_heads, columns[name])
            for name in ("k", "v")
        ]
        if past is None:
            return new[0], new[1]
        # A cache has room for the new rows; a NumPy array has not.
        k, v = (np.concatenate(pair, axis=1) for pair in zip(past, new, strict=True))
        return k, v

    def _inputs(self, **more: Values) -> dict[str, Values]:
        problem = self.attention.problem
        q = self.values["q"].reshape(problem.batch, problem.q_len, problem.heads, problem.head_dim)
        k, v = self.keys_and_values
        return {"q": q, "k": k, "v": v, **more}

    def _multiply(self, step: Product, one_pass: Direction) -> None:
        part, values = self.projections.run(step, one_pass, self.work.shapes, self.given.arithmetic, self.values)
        assert values is not None
        self.values[step.output] = values
        self.parts.append(part)
