"""Whole attention layers: the projections W^Q, W^K, W^V and W^O around an attention, for self- and cross-attention.

A layer takes x, (batch, length, model_width), and in cross-attention a context, (batch, context_length,
context_width)::

    q = x w_q      k = context w_k      v = context w_v      y = attention(q, k, v) w_o

with x for the context in self-attention, and a bias added to each if asked. Grouped- and multi-query attention have
fewer heads in k and v than in q.

What is counted
---------------
- The projections are programs of :mod:`simattn.matrix_products`, the attention is any program of
  :data:`simattn.ALGORITHMS` with a softmax, with its plan. Each is a kernel of its own: the projections write q, k and
  v to memory, and attention reads them there. Nothing is fused.
- Nothing is laid out anew in between. A projection of (batch · length) rows and (heads · head_dim) columns writes
  the (batch, length, heads, head_dim) that attention takes.
- k and v are the KV cache. A projection that writes them appends to it, and attention reads all of it.
- A decoding step runs the forward program of the attention with its few new rows as queries on all cached keys.
  Algorithms that have programs for decoding steps alone are no attention of a layer.
- Every array is in the layer's storage format, gradients of weights too; what an optimiser does is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import sqrt
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from simattn.algorithms import ALGORITHMS, get_algorithm
from simattn.api import Inputs, Run, checked_algorithm, closed_form, profile, run_inputs, run_inputs_backward
from simattn.arithmetic.floating import ARITHMETICS, FloatArithmetic
from simattn.arithmetic.formats import ITEM_BYTES, numpy_dtype, storage_name
from simattn.hardware import Hardware, get_hardware
from simattn.machine import Machine, Operations, Place
from simattn.masks import all_rows
from simattn.matrix_products import (
    ColumnSum,
    MatrixProduct,
    ProductTiles,
    Term,
    check_tiles_fit,
    checked_tiles,
    fitting_tiles,
)
from simattn.plan import PLAN_KINDS, PlanKind, check_choice
from simattn.planning import DEFAULT_HARDWARE, Capacity, get_capacity
from simattn.problem import AttentionProblem, Direction, Window, checked_integer
from simattn.tables import byte_text, text_table
from simattn.traffic import COUNTERS, Traffic

Values = npt.NDArray[Any]
Phase = Literal["prefill", "decode", "backward", "train"]
PHASES: tuple[Phase, ...] = get_args(Phase)
DTYPES = ("float32", "float16", "bfloat16")

ATTENTION_ARRAYS = {"out": "attention_out", "dout": "dattention_out"}
"""What a layer calls the arrays that are the result of attention alone."""

# Results


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """One program of a layer: a projection, a gradient of one, or the attention.

    Attributes
    ----------
    name
        The projection as a formula, "attention" or "attention backward".
    direction
        "forward" or "backward".
    traffic
        Bytes moved.
    operations
        Arithmetic operations done.
    peak_sram_bytes, peak_register_bytes
        Most on-chip memory that the tiles of one thread block took.
    """

    name: str
    direction: Direction
    traffic: Traffic
    operations: Operations
    peak_sram_bytes: int
    peak_register_bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Additions and multiplications of a layer's matrix products, from its shapes alone.

    Attributes
    ----------
    projections
        Of the products with weights: O(n d²).
    attention
        Of the scores that the mask leaves and their products with values: O(n² d). A program does more where a tile
        is partly masked, and where its backward pass computes the scores again.
    """

    projections: int
    attention: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.projections + self.attention


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LayerRun:
    """What the programs of a layer moved, used and, when they were simulated, computed. Its repr is a table.

    Attributes
    ----------
    layer, phase
        What ran; see :meth:`simattn.AttentionLayer.profile`.
    problem
        The attention in it.
    algorithm
        The program of the attention.
    projection_tiles
        Tiles of the projections.
    parts
        The programs, in the order in which they run.
    y
        Output (batch, length, model_width) of a simulated forward pass, else None.
    cache
        Its k, (batch, kv_len, kv_heads, head_dim), and v, (batch, kv_len, kv_heads, value_dim), else None. They are
        the cache of the next decoding step.
    dx, dcontext
        Gradients, shaped like x and context, of a simulated backward pass, else None.
    dweights
        Gradients of the weights and biases of a simulated backward pass, by the name of the weight, else None.
    """

    layer: AttentionLayer
    phase: Phase
    problem: AttentionProblem
    algorithm: str
    projection_tiles: ProductTiles
    parts: tuple[LayerPart, ...]
    y: Values | None = None
    cache: tuple[Values, Values] | None = None
    dx: Values | None = None
    dcontext: Values | None = None
    dweights: Mapping[str, Values] | None = None

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes moved by all parts."""
        return sum((part.traffic for part in self.parts), Traffic())

    @property
    def operations(self) -> Operations:
        """Operations of all parts."""
        return _total_operations(self.parts)

    @property
    def peak_sram_bytes(self) -> int:
        """Most SRAM that the tiles of one thread block took in any part."""
        return max(part.peak_sram_bytes for part in self.parts)

    @property
    def peak_register_bytes(self) -> int:
        """Most registers that the tiles of one thread block took in any part, in bytes."""
        return max(part.peak_register_bytes for part in self.parts)

    def rows(self) -> Iterator[dict[str, str | int]]:
        """Yield one flat row per part, then the total."""
        total = ("total", "", self.operations, self.traffic)
        for name, direction, operations, traffic in (
            *((part.name, part.direction, part.operations, part.traffic) for part in self.parts),
            total,
        ):
            yield {
                "part": name,
                "direction": direction,
                **asdict(operations),
                **{counter: getattr(traffic, counter) for counter in COUNTERS},
            }

    def __repr__(self) -> str:
        problem, tiles = self.problem, self.projection_tiles
        columns = ("matmul_flops", "hbm_read_bytes", "hbm_write_bytes", "hbm_reduce_bytes")
        heads = ["part", *(name.replace("_", " ") for name in columns)]
        body = [[str(row["part"]), *(f"{row[name]:,}" for name in columns)] for row in self.rows()]
        return "\n".join(
            [
                f"{self.phase} of {self.layer}",
                f"{problem.batch} × {problem.q_len:,} query rows on {problem.kv_len:,} key rows, {self.algorithm}; "
                f"projections in tiles of {tiles.rows} × {tiles.columns}, {tiles.depth} deep",
                f"peak SRAM {byte_text(self.peak_sram_bytes)}, registers {byte_text(self.peak_register_bytes)} "
                "per thread block",
                text_table(heads, body),
            ]
        )


def _total_operations(parts: Sequence[LayerPart]) -> Operations:
    totals = {
        name: sum(getattr(part.operations, name) for part in parts)
        for name in ("matmul_flops", "vector_flops", "exponentials")
    }
    return Operations(**totals)


# The layer


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """An attention layer with its projections.

    Attributes
    ----------
    model_width
        Columns of x and of the output: d_model.
    heads
        Query heads.
    kv_heads
        Key/value heads; must divide ``heads``. Equal to ``heads`` is multi-head, 1 multi-query, anything between
        grouped-query attention. Default ``heads``.
    head_dim, value_dim
        Columns of each head's queries and keys, and of its values. Default model_width / heads, and ``head_dim``.
    dtype
        Storage format of every array: "float32", "float16" or "bfloat16".
    biases
        Whether a row is added to the result of every projection.
    context_width
        Columns of what keys and values are projected from, in cross-attention; None is self-attention.
    causal, window
        Of the attention; see :class:`simattn.AttentionProblem`.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range; the message names it, its value and what was expected.

    Examples
    --------
    >>> AttentionLayer(model_width=4096, heads=32).parameters == 4 * 4096**2
    True
    >>> layer = AttentionLayer(model_width=4096, heads=32, kv_heads=8, causal=True)
    >>> layer.parameters == (2 * 32 + 2 * 8) * 128 * 4096
    True
    >>> layer.kv_cache_bytes(length=8192) == 8192 * 8 * (128 + 128) * 2
    True
    """

    model_width: int
    heads: int
    kv_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    value_dim: int = None  # type: ignore[assignment]
    dtype: str = "bfloat16"
    biases: bool = False
    context_width: int | None = None
    causal: bool = False
    window: Window | None = None

    def __post_init__(self) -> None:
        for name in ("model_width", "heads"):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), 1))
        if self.head_dim is None:
            if self.model_width % self.heads:
                raise ValueError(
                    f"head_dim=None: expected an integer, as heads={self.heads} does not divide "
                    f"model_width={self.model_width}"
                )
            object.__setattr__(self, "head_dim", self.model_width // self.heads)
        object.__setattr__(self, "dtype", storage_name(self.dtype))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {DTYPES}, as weights have no descale factors here")
        if not isinstance(self.biases, (bool, np.bool_)):
            raise TypeError(f"biases={self.biases!r}: expected a bool")
        if self.context_width is not None:
            object.__setattr__(self, "context_width", checked_integer("context_width", self.context_width, 1))
        problem = self._problem(batch=1, q_len=1, kv_len=1)  # checks the rest and fills in the defaults
        for name in ("kv_heads", "head_dim", "value_dim", "causal", "window"):
            object.__setattr__(self, name, getattr(problem, name))

    def __str__(self) -> str:
        kind = {1: "multi-query", self.heads: "multi-head"}.get(self.kv_heads, "grouped-query")
        values = f", values of {self.value_dim}" if self.value_dim != self.head_dim else ""
        return ", ".join(
            [
                f"{kind} attention: heads {self.heads} on {self.kv_heads}, columns {self.head_dim}{values}",
                f"width {self.model_width}"
                + (f", context width {self.context_width}" if self.context_width is not None else ""),
                self.dtype,
                *(["causal"] if self.causal else []),
                *([f"window {self.window}"] if self.window is not None else []),
                f"{self.parameters:,} parameters",
            ]
        )

    def _problem(self, *, batch: int, q_len: int, kv_len: int) -> AttentionProblem:
        return AttentionProblem(
            batch=batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            causal=self.causal,
            window=self.window,
        )

    # Weights

    @property
    def is_cross_attention(self) -> bool:
        """Whether keys and values are projected from a context."""
        return self.context_width is not None

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights, (inputs, outputs), and of the biases, (outputs,), by name."""
        source = self.model_width if self.context_width is None else self.context_width
        matrices = {
            "q": (self.model_width, self.heads * self.head_dim),
            "k": (source, self.kv_heads * self.head_dim),
            "v": (source, self.kv_heads * self.value_dim),
            "o": (self.heads * self.value_dim, self.model_width),
        }
        shapes: dict[str, tuple[int, ...]] = {f"w_{name}": shape for name, shape in matrices.items()}
        if self.biases:
            shapes |= {f"b_{name}": shape[1:] for name, shape in matrices.items()}
        return shapes

    @property
    def parameters_by_array(self) -> dict[str, int]:
        """Elements of every weight and bias, by name."""
        return {name: int(np.prod(shape, dtype=object)) for name, shape in self.weight_shapes.items()}

    @property
    def parameters(self) -> int:
        """Elements of all weights and biases.

        Without biases and with value_dim = head_dim: 4·h·d_k·d_model of multi-head, (2h + 2g)·d_k·d_model of
        grouped-query and (2h + 2)·d_k·d_model of multi-query self-attention.
        """
        return sum(self.parameters_by_array.values())

    @property
    def parameters_without_output(self) -> int:
        """Elements of the weights and biases of q, k and v: all but those of W^O."""
        return sum(count for name, count in self.parameters_by_array.items() if not name.endswith("_o"))

    def kv_cache_bytes(self, *, length: int, batch: int = 1) -> int:
        """Return the bytes of the cached keys and values of this layer.

        Parameters
        ----------
        length, batch
            Tokens of each sequence, or of its context in cross-attention, and sequences.
        """
        tokens = checked_integer("length", length, 0) * checked_integer("batch", batch, 0)
        return tokens * self.kv_heads * (self.head_dim + self.value_dim) * ITEM_BYTES[self.dtype]

    def random_weights(self, seed: int) -> dict[str, Values]:
        """Return weights whose products keep the variance of their inputs, and biases.

        Parameters
        ----------
        seed
            Of the generator, an integer of at least 0.

        Returns
        -------
        dict of arrays in the storage format
            By name, of the shapes :attr:`weight_shapes`: normal numbers, of matrices divided by √inputs.
        """
        generator = np.random.default_rng(checked_integer("seed", seed, 0))
        stored = numpy_dtype(self.dtype)
        return {
            name: (generator.standard_normal(shape) / (sqrt(shape[0]) if name.startswith("w_") else 1)).astype(stored)
            for name, shape in self.weight_shapes.items()
        }

    # Counting

    def profile(
        self,
        phase: Phase,
        *,
        length: int | None = None,
        batch: int = 1,
        cache_length: int | None = None,
        context_length: int | None = None,
        algorithm: str = "flash2",
        plan: PlanKind | None = None,
        hardware: str | Hardware | None = None,
        sram_bytes: int | None = None,
        projection_tiles: tuple[int, int, int] | ProductTiles | None = None,
        **options: Any,
    ) -> LayerRun:
        """Count the layer's programs without computing; the cost does not depend on the lengths.

        Parameters
        ----------
        phase
            "prefill", the forward pass; "decode", the forward pass of new rows on a cache; "backward", without its
            forward pass; or "train", forward and backward.
        length
            Rows of x in each sequence; in decoding the new ones, default 1.
        batch
            Sequences.
        cache_length
            Rows of the cache before a decoding step of self-attention, which needs it. Other phases have none.
        context_length
            Rows of the context in cross-attention. A decoding step finds its keys and values in the cache, and
            neither projects nor writes them.
        algorithm
            A name in :data:`simattn.ALGORITHMS` of attention with a softmax.
        plan
            Kind of the attention's plans: "gpu", "fit" or "paper"; see :func:`simattn.profile`.
        hardware
            Name or row of a GPU; default H100-SXM.
        sram_bytes
            SRAM of one thread block in place of the GPU's. The projections' output tiles are then in SRAM too, else
            in registers.
        projection_tiles
            Rows and columns of the projections' output tiles, and depth of their operands' tiles; default 128, 128
            and 64, halved until they fit.
        **options
            Fields of the attention's plans, such as ``tiles=(64, 128)`` or ``dq="deterministic"``.

        Returns
        -------
        LayerRun
            Without numbers.

        Raises
        ------
        ValueError, TypeError
            If an argument is unknown or out of range; the message names it, its value and what was expected.
        """
        work = self._work(phase, length, batch, cache_length, context_length)
        plans = _Plans.checked(self, algorithm, plan, hardware, sram_bytes, projection_tiles, options)
        parts = []
        for direction, step in work.steps:
            if step is None:
                run = profile(algorithm, direction=direction, **work.problem_arguments, **plans.arguments)
                parts.append(_attention_part(run))
            else:
                parts.append(_product_part(step, direction, work.shapes, self.dtype, plans)[0])
        return LayerRun(
            layer=self,
            phase=phase,
            problem=work.problem,
            algorithm=algorithm,
            projection_tiles=plans.projection_tiles,
            parts=tuple(parts),
        )

    def traffic(self, phase: Phase, **arguments: Any) -> Traffic:
        """Count the bytes that the layer moves; the arguments are those of :meth:`profile`.

        Arrays are named x, context, w_q, b_q and so on, q, k, v, attention_out and y, their gradients dx, dw_q and so
        on; besides them there are those of the attention's program, such as lse.
        """
        return self.profile(phase, **arguments).traffic

    def closed_form(
        self,
        phase: Phase,
        *,
        length: int | None = None,
        batch: int = 1,
        cache_length: int | None = None,
        context_length: int | None = None,
        algorithm: str = "flash2",
        plan: PlanKind | None = None,
        hardware: str | Hardware | None = None,
        sram_bytes: int | None = None,
        projection_tiles: tuple[int, int, int] | ProductTiles | None = None,
        **options: Any,
    ) -> Traffic:
        """Return what the formulas say about the memory traffic; the arguments are those of :meth:`profile`.

        It equals ``traffic(...).global_only()``: SRAM traffic has no formula.
        """
        work = self._work(phase, length, batch, cache_length, context_length)
        plans = _Plans.checked(self, algorithm, plan, hardware, sram_bytes, projection_tiles, options)
        total = Traffic()
        for direction, step in work.steps:
            if step is None:
                moved = closed_form(algorithm, direction=direction, **work.problem_arguments, **plans.arguments)
                total += _renamed(moved)
            else:
                total += step.closed_form(work.shapes, plans.projection_tiles, work.problem.item_bytes)
        return total

    def flops(
        self,
        phase: Phase,
        *,
        length: int | None = None,
        batch: int = 1,
        cache_length: int | None = None,
        context_length: int | None = None,
    ) -> LayerFlops:
        """Return the FLOPs of the matrix products that the shapes and the mask ask for, whatever the programs.

        Forward, attention has two products, and backward four: dV, dP, dQ and dK. Every projection has one forward
        and two backward. The arguments are those of :meth:`profile`.
        """
        work = self._work(phase, length, batch, cache_length, context_length)
        problem = work.problem
        seen = sum(sum(problem.keys_of_queries.tile_visits(rows, 1)) for rows in all_rows(problem.q_len, 1))
        pair = 2 * problem.batch * problem.heads * seen * (problem.head_dim + problem.value_dim)
        return LayerFlops(
            projections=sum(step.matmul_flops(work.shapes) for _, step in work.steps if step is not None),
            attention=sum({"forward": 1, "backward": 2}[direction] * pair for direction in work.directions),
        )

    def _work(
        self,
        phase: str,
        length: int | None,
        batch: int,
        cache_length: int | None,
        context_length: int | None,
    ) -> _Work:
        check_choice("phase", phase, PHASES)
        batch = checked_integer("batch", batch, 0)
        if length is None and phase != "decode":
            raise ValueError(f"length=None with phase={phase!r}: expected the rows of x")
        length = checked_integer("length", 1 if length is None else length, 0)
        caches = phase == "decode" and not self.is_cross_attention
        if caches and cache_length is None:
            raise ValueError("cache_length=None with phase='decode': expected the rows of the cache before the step")
        if cache_length is not None and not caches:
            raise ValueError(
                f"cache_length={cache_length!r} with phase={phase!r} of "
                f"{'cross' if self.is_cross_attention else 'self'}-attention: expected None"
            )
        if self.is_cross_attention != (context_length is not None):
            expected = "the rows of the context" if self.is_cross_attention else "None"
            raise ValueError(
                f"context_length={context_length!r} with context_width={self.context_width!r}: expected {expected}"
            )
        if phase == "decode" and self.is_cross_attention and (self.causal or self.window):
            raise ValueError(
                f"phase='decode' of cross-attention with causal={self.causal}, window={self.window}: expected no mask, "
                "as a step does not know where in the context it stands"
            )
        if context_length is not None:
            kv_len = projected = checked_integer("context_length", context_length, 0)
        else:
            kv_len, projected = length + checked_integer("cache_length", cache_length or 0, 0), length
        return _Work.of(self, phase, self._problem(batch=batch, q_len=length, kv_len=kv_len), projected)

    # Running

    def run(
        self,
        x: npt.ArrayLike,
        weights: Mapping[str, npt.ArrayLike],
        *,
        context: npt.ArrayLike | None = None,
        cache: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
        algorithm: str = "flash2",
        arithmetic: str = "float32",
        plan: PlanKind | None = None,
        hardware: str | Hardware | None = None,
        sram_bytes: int | None = None,
        projection_tiles: tuple[int, int, int] | ProductTiles | None = None,
        **options: Any,
    ) -> LayerRun:
        """Run the layer forward on the simulated machine.

        Parameters
        ----------
        x
            Input, shape (batch, length, model_width).
        weights
            By name, of the shapes :attr:`weight_shapes`.
        context
            What keys and values are projected from in cross-attention, shape (batch, context_length, context_width);
            None in self-attention, and where the cache has them.
        cache
            Keys and values of earlier steps, as :class:`~simattn.layers.LayerRun` has them: the run is then a decoding
            step, and x holds the new rows. Of cross-attention they are those of the whole context.
        arithmetic
            "float32", every array rounded to the storage format as it is written, or "float64", the oracle, nothing
            rounded. The oracle takes arrays in float64 as well as in the storage format.
        algorithm, plan, hardware, sram_bytes, projection_tiles, **options
            As for :meth:`profile`.

        Returns
        -------
        LayerRun
            With ``y`` and ``cache``.

        Raises
        ------
        ValueError, TypeError
            If an argument is unknown or out of range; the message names it, its value and what was expected.
        """
        simulation = self._simulation(x, weights, context, cache, arithmetic)
        plans = _Plans.checked(self, algorithm, plan, hardware, sram_bytes, projection_tiles, options)
        simulation.run_forward(plans)
        y = simulation.values["y"].reshape(np.shape(x))
        return replace(simulation.result(plans), y=y, cache=simulation.keys_and_values)

    def run_backward(
        self,
        x: npt.ArrayLike,
        weights: Mapping[str, npt.ArrayLike],
        dy: npt.ArrayLike,
        *,
        context: npt.ArrayLike | None = None,
        algorithm: str = "flash2",
        arithmetic: str = "float32",
        plan: PlanKind | None = None,
        hardware: str | Hardware | None = None,
        sram_bytes: int | None = None,
        projection_tiles: tuple[int, int, int] | ProductTiles | None = None,
        **options: Any,
    ) -> LayerRun:
        """Run the layer backward on the simulated machine; its forward pass is run first, and not counted.

        Parameters
        ----------
        x, weights, context, arithmetic
            As for :meth:`run`.
        dy
            Gradient of the output, shape (batch, length, model_width).
        algorithm, plan, hardware, sram_bytes, projection_tiles, **options
            As for :meth:`profile`; tiles are those of the attention's backward program.

        Returns
        -------
        LayerRun
            With ``dx``, ``dcontext`` in cross-attention, and ``dweights``; the counts are of the backward programs.

        Raises
        ------
        ValueError, TypeError
            If an argument is unknown or out of range; the message names it, its value and what was expected.
        """
        simulation = self._simulation(x, weights, context, None, arithmetic, dy)
        checked_algorithm(algorithm, "backward", simulation.work.problem)
        plans = _Plans.checked(self, algorithm, plan, hardware, sram_bytes, projection_tiles, options)
        simulation.run_forward(plans.without_tiles())
        simulation.parts.clear()
        simulation.run_backward(plans)
        return replace(
            simulation.result(plans),
            dx=simulation.values["dx"].reshape(np.shape(x)),
            dcontext=None if context is None else simulation.values["dcontext"].reshape(np.shape(context)),
            dweights={name: simulation.values[f"d{name}"].reshape(shape) for name, shape in self.weight_shapes.items()},
        )

    def _simulation(
        self,
        x: npt.ArrayLike,
        weights: Mapping[str, npt.ArrayLike],
        context: npt.ArrayLike | None,
        cache: tuple[npt.ArrayLike, npt.ArrayLike] | None,
        arithmetic: str,
        dy: npt.ArrayLike | None = None,
    ) -> _Simulation:
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic={arithmetic!r}: expected one of {sorted(ARITHMETICS)}")
        checked = _Checked(self.dtype, arithmetic)
        given = {"x": checked.array("x", x, (None, None, self.model_width))}
        batch, length = given["x"].shape[:2]
        if dy is not None:
            given["dy"] = checked.array("dy", dy, (batch, length, self.model_width))
        has_context = self.is_cross_attention and cache is None
        if has_context != (context is not None):
            expected = f"an array (batch, context_length, {self.context_width})" if has_context else "None"
            raise ValueError(
                f"context is {'None' if context is None else 'given'} with context_width={self.context_width!r} and "
                f"{'no' if cache is None else 'a'} cache: expected {expected}"
            )
        if context is not None:
            given["context"] = checked.array("context", context, (batch, None, self.context_width))
        past = None if cache is None else self._checked_cache(checked, cache, batch)
        cached = None if past is None else past[0].shape[1]
        lengths: dict[str, int | None] = {"cache_length": cached, "context_length": None}
        if self.is_cross_attention:
            lengths = {"cache_length": None, "context_length": cached if past else given["context"].shape[1]}
        phase: Phase = "decode" if past is not None else "prefill" if dy is None else "backward"
        work = self._work(phase, length, batch, **lengths)
        values = {name: array.reshape(work.shapes[name]) for name, array in given.items()}
        values |= {
            name: array.reshape(work.shapes[name]) for name, array in self._checked_weights(checked, weights).items()
        }
        return _Simulation(self, work, phase, ARITHMETICS[arithmetic], values, past)

    def _checked_cache(self, checked: _Checked, cache: Any, batch: int) -> tuple[Values, Values]:
        if not isinstance(cache, (tuple, list)) or len(cache) != 2:
            raise TypeError(f"cache is a {type(cache).__name__}: expected a pair of arrays (k, v)")
        k = checked.array("cache[0]", cache[0], (batch, None, self.kv_heads, self.head_dim))
        v = checked.array("cache[1]", cache[1], (batch, k.shape[1], self.kv_heads, self.value_dim))
        return k, v

    def _checked_weights(self, checked: _Checked, weights: Any) -> dict[str, Values]:
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights is a {type(weights).__name__}: expected a mapping of arrays by name")
        shapes = self.weight_shapes
        if set(weights) != set(shapes):
            raise ValueError(f"weights has the arrays {sorted(weights)}: expected {sorted(shapes)}")
        return {name: checked.array(f"weights[{name!r}]", weights[name], shape) for name, shape in shapes.items()}


# What the phases do

Product = MatrixProduct | ColumnSum


@dataclass(frozen=True)
class _Work:
    """The programs of a phase, None standing for the attention, and the shapes of their matrices."""

    problem: AttentionProblem
    directions: tuple[Direction, ...]
    shapes: dict[str, tuple[int, int]]
    forward: tuple[Product | None, ...]
    backward: tuple[Product | None, ...]

    @classmethod
    def of(cls, layer: AttentionLayer, phase: str, problem: AttentionProblem, projected: int) -> _Work:
        """Return the work of a phase that projects so many rows of keys and values in each sequence."""
        source = "context" if layer.is_cross_attention else "x"
        rows, source_rows = problem.batch * problem.q_len, problem.batch * projected
        weights = {
            name: (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
            for name, shape in layer.weight_shapes.items()
        }
        shapes = {
            "x": (rows, layer.model_width),
            "context": (source_rows, weights["w_k"][0]),
            "q": (rows, weights["w_q"][1]),
            "k": (source_rows, weights["w_k"][1]),
            "v": (source_rows, weights["w_v"][1]),
            "attention_out": (rows, weights["w_o"][0]),
            "y": (rows, layer.model_width),
            **weights,
        }
        shapes |= {f"d{name}": shape for name, shape in shapes.items()}
        inputs = {"q": "x", "k": source, "v": source}
        cached = ("k", "v") if phase == "decode" and layer.is_cross_attention else ()
        return cls(
            problem,
            _DIRECTIONS[phase],
            shapes,
            _forward({name: array for name, array in inputs.items() if name not in cached}, layer.biases),
            _backward(inputs, layer.biases),
        )

    @property
    def steps(self) -> Iterator[tuple[Direction, Product | None]]:
        """The programs in the order in which they run, and their directions."""
        for direction in self.directions:
            for step in self.forward if direction == "forward" else self.backward:
                yield direction, step

    @property
    def problem_arguments(self) -> dict[str, Any]:
        """The attention problem, as the calls of :mod:`simattn.api` take it."""
        names = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "dtype", "causal", "window")
        return {name: getattr(self.problem, name) for name in names}


_DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "prefill": ("forward",),
    "decode": ("forward",),
    "backward": ("backward",),
    "train": ("forward", "backward"),
}


def _forward(inputs: Mapping[str, str], biases: bool) -> tuple[Product | None, ...]:
    """Return the forward programs; ``inputs`` names what each of q, k and v is projected from."""

    def projected(output: str, array: str, name: str) -> MatrixProduct:
        return MatrixProduct(output, (Term(array, f"w_{name}"),), f"b_{name}" if biases else None)

    return (
        *(projected(name, array, name) for name, array in inputs.items()),
        None,
        projected("y", "attention_out", "o"),
    )


def _backward(inputs: Mapping[str, str], biases: bool) -> tuple[Product | None, ...]:
    """Return the backward programs: two products for each projection, those of one input added in one tile."""

    def weights(name: str, array: str, gradient: str) -> list[Product]:
        products: list[Product] = [MatrixProduct(f"dw_{name}", (Term(array, gradient, transpose_a=True),))]
        return products + ([ColumnSum(f"db_{name}", gradient)] if biases else [])

    return (
        *weights("o", "attention_out", "dy"),
        MatrixProduct("dattention_out", (Term("dy", "w_o", transpose_b=True),)),
        None,
        *(step for name, array in inputs.items() for step in weights(name, array, f"d{name}")),
        *(
            MatrixProduct(
                f"d{array}",
                tuple(Term(f"d{name}", f"w_{name}", transpose_b=True) for name in inputs if inputs[name] == array),
            )
            for array in dict.fromkeys(inputs.values())
        ),
    )


@dataclass(frozen=True)
class _Plans:
    """The checked plans of a layer's programs."""

    algorithm: str
    arguments: dict[str, Any]
    capacity: Capacity
    place: Place
    projection_tiles: ProductTiles

    @classmethod
    def checked(
        cls,
        layer: AttentionLayer,
        algorithm: str,
        plan: PlanKind | None,
        hardware: str | Hardware | None,
        sram_bytes: int | None,
        projection_tiles: tuple[int, int, int] | ProductTiles | None,
        options: Mapping[str, Any],
    ) -> _Plans:
        if plan is not None:
            # One object would be the plan of two programs in training.
            check_choice("plan", plan, PLAN_KINDS)
        spec = get_algorithm(algorithm)
        if not spec.takes_any_mask:
            known = [name for name, item in ALGORITHMS.items() if item.takes_any_mask]
            raise ValueError(f"algorithm={algorithm!r}: expected attention under any mask in a layer, one of {known}")
        for name, value in options.items():
            if name not in spec.own_arguments:
                raise TypeError(
                    f"{name}={value!r}: no argument of a layer and no plan option of {algorithm}; options: "
                    f"{spec.own_arguments}"
                )
        gpu = get_hardware(DEFAULT_HARDWARE if hardware is None else hardware)
        capacity = get_capacity(gpu, sram_bytes)
        place: Place = "registers" if sram_bytes is None else "sram"
        if projection_tiles is None:
            tiles = fitting_tiles(ITEM_BYTES[layer.dtype], capacity, place)
        else:
            tiles = checked_tiles(projection_tiles)
            check_tiles_fit(tiles, ITEM_BYTES[layer.dtype], capacity, place)
        arguments = {"plan": plan, "hardware": gpu, "sram_bytes": sram_bytes, **options}
        return cls(algorithm, arguments, capacity, place, tiles)

    def without_tiles(self) -> _Plans:
        """Return the plans of the forward pass that a backward pass with tiles of its own needs."""
        return replace(self, arguments={name: value for name, value in self.arguments.items() if name != "tiles"})


def _renamed(traffic: Traffic) -> Traffic:
    return Traffic({ATTENTION_ARRAYS.get(name, name): counters for name, counters in traffic.by_array.items()})


def _attention_part(run: Run) -> LayerPart:
    return LayerPart(
        name="attention" if run.direction == "forward" else "attention backward",
        direction=run.direction,
        traffic=_renamed(run.traffic),
        operations=run.operations,
        peak_sram_bytes=run.peak_sram_bytes,
        peak_register_bytes=run.peak_register_bytes,
    )


def _product_part(
    step: Product,
    direction: Direction,
    shapes: Mapping[str, tuple[int, int]],
    dtype: str,
    plans: _Plans,
    arithmetic: FloatArithmetic | None = None,
    values: Mapping[str, Values] | None = None,
) -> tuple[LayerPart, Values | None]:
    """Run one product, and return its counts and what it computed, if it was to compute."""
    # The machine asks its problem for the number of matrices in an array, and here that is one.
    machine = Machine(
        AttentionProblem(q_len=1, head_dim=1), plans.capacity.sram_bytes, plans.capacity.register_bytes, arithmetic
    )
    for name in step.inputs:
        found = None if values is None else values[name][None, None]
        machine.array(name, *shapes[name], dtype=dtype, role="input", values=found)
    output = machine.array(step.output, *shapes[step.output], dtype=dtype, role="output")
    with np.errstate(all="ignore"):  # NaN and Inf are propagated as IEEE says, not reported
        step.run(machine, plans.projection_tiles, plans.place)
    part = LayerPart(
        name=step.text,
        direction=direction,
        traffic=machine.traffic,
        operations=machine.operations,
        peak_sram_bytes=machine.peak_bytes["sram"],
        peak_register_bytes=machine.peak_bytes["registers"],
    )
    return part, None if output.values is None else output.values[0, 0]


@dataclass(frozen=True)
class _Checked:
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


@dataclass
class _Simulation:
    """The values of a layer's matrices, computed program by program."""

    layer: AttentionLayer
    work: _Work
    phase: Phase
    arithmetic: FloatArithmetic
    values: dict[str, Values]
    past: tuple[Values, Values] | None
    parts: list[LayerPart] = field(default_factory=list)
    saved: Mapping[str, Values] | None = None

    def run_forward(self, plans: _Plans) -> None:
        """Run the forward programs."""
        for step in self.work.forward:
            if step is None:
                run = run_inputs(plans.algorithm, self._inputs(), **self._arguments, **plans.arguments)
                assert run.out is not None
                self.values["attention_out"] = run.out.reshape(self.work.shapes["attention_out"])
                self.saved = run.saved
                self.parts.append(_attention_part(run))
            else:
                self._multiply(step, "forward", plans)

    def run_backward(self, plans: _Plans) -> None:
        """Run the backward programs."""
        for step in self.work.backward:
            if step is None:
                problem, options = self.work.problem, dict(plans.arguments)
                dout = self.values["dattention_out"]
                arguments = {name: self._arguments[name] for name in ("causal", "window")}
                arguments |= {name: options.pop(name) for name in ("hardware", "sram_bytes")}
                run = run_inputs_backward(
                    plans.algorithm,
                    self._inputs(dout=dout.reshape(problem.batch, problem.q_len, problem.heads, problem.value_dim)),
                    arguments,
                    saved=self.saved,
                    arithmetic=self.arithmetic.name,
                    **options,
                )
                for name, gradient in (("dq", run.dq), ("dk", run.dk), ("dv", run.dv)):
                    assert gradient is not None
                    self.values[name] = gradient.reshape(self.work.shapes[name])
                self.parts.append(_attention_part(run))
            else:
                self._multiply(step, "backward", plans)

    def result(self, plans: _Plans) -> LayerRun:
        """Return the counts."""
        return LayerRun(
            layer=self.layer,
            phase=self.phase,
            problem=self.work.problem,
            algorithm=plans.algorithm,
            projection_tiles=plans.projection_tiles,
            parts=tuple(self.parts),
        )

    @property
    def keys_and_values(self) -> tuple[Values, Values]:
        """The cache after this run: (batch, kv_len, kv_heads, columns) of each."""
        problem = self.work.problem
        if self.past is not None and self.layer.is_cross_attention:
            return self.past
        columns = {"k": problem.head_dim, "v": problem.value_dim}
        old_rows = 0 if self.past is None else self.past[0].shape[1]
        new = [
            self.values[name].reshape(problem.batch, problem.kv_len - old_rows, problem.kv_heads, columns[name])
            for name in ("k", "v")
        ]
        if self.past is None:
            return new[0], new[1]
        # A cache has room for the new rows; a NumPy array has not.
        k, v = (np.concatenate(pair, axis=1) for pair in zip(self.past, new, strict=True))
        return k, v

    @property
    def _arguments(self) -> dict[str, Any]:
        problem = self.work.problem
        return {"causal": problem.causal, "window": problem.window, "arithmetic": self.arithmetic.name}

    def _inputs(self, **more: Values) -> Inputs:
        problem = self.work.problem
        q = self.values["q"].reshape(problem.batch, problem.q_len, problem.heads, problem.head_dim)
        k, v = self.keys_and_values
        arrays = {"q": q, "k": k, "v": v, **more}
        return Inputs(arrays, {**AttentionProblem.shape_arguments(arrays), "dtype": problem.dtype})

    def _multiply(self, step: Product, direction: Direction, plans: _Plans) -> None:
        part, values = _product_part(
            step, direction, self.work.shapes, self.layer.dtype, plans, self.arithmetic, self.values
        )
        assert values is not None
        self.values[step.output] = values
        self.parts.append(part)
