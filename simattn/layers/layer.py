"""The attention layer: its shape, its weights, and the calls that count and run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from simattn.arithmetic.formats import ITEM_BYTES, numpy_dtype, storage_name
from simattn.hardware import Hardware
from simattn.layers.attention import Attention, problem_of
from simattn.layers.phases import Lengths, Phase
from simattn.layers.results import LayerFlops, LayerPart, LayerRun
from simattn.layers.simulation import GivenArrays, Simulation
from simattn.layers.work import Projections, Work
from simattn.masks import all_rows
from simattn.matrix_products import ProductTiles
from simattn.plan import PlanKind
from simattn.problem import Window, checked_integer
from simattn.traffic import Traffic

Values = npt.NDArray[Any]
DTYPES = ("float32", "float16", "bfloat16")


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
        # The problem checks the rest, and fills in the defaults.
        problem = problem_of(self, Lengths(batch=1, queries=1, keys=1, projected=1))
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
            A name in :data:`simattn.ALGORITHMS` of a program that is given q, k and v alone, and backward the output's
            gradient. In decoding it is the algorithm's program for that where there is one, which has to take keys and
            values of all tokens in their order, and else its forward program. lightning2 and moba are causal in any
            layer.
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
            Fields of the attention's plans, such as ``tiles=(64, 128)`` or ``dq="deterministic"``, and those that the
            algorithm's problems add, such as ``feature_map="relu"`` of linear or ``block_size=512`` of moba. Their
            ``causal`` and ``window`` are the layer's.

        Returns
        -------
        LayerRun
            Without numbers.

        Raises
        ------
        ValueError, TypeError
            If an argument is unknown or out of range; the message names it, its value and what was expected.
        """
        lengths = Lengths.checked(self, phase, length, batch, cache_length, context_length)
        attention = Attention.checked(self, phase, lengths, algorithm, plan, hardware, sram_bytes, options)
        projections = Projections.checked(self.dtype, hardware, sram_bytes, projection_tiles)
        work = Work.of(self, phase, lengths)
        parts = [
            attention.profile(one_pass) if step is None else projections.profile(step, one_pass, work.shapes)
            for one_pass, step in work.steps
        ]
        return self._result(phase, attention, projections, parts)

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
        lengths = Lengths.checked(self, phase, length, batch, cache_length, context_length)
        attention = Attention.checked(self, phase, lengths, algorithm, plan, hardware, sram_bytes, options)
        projections = Projections.checked(self.dtype, hardware, sram_bytes, projection_tiles)
        work = Work.of(self, phase, lengths)
        moved = (
            attention.closed_form(one_pass) if step is None else projections.closed_form(step, work.shapes)
            for one_pass, step in work.steps
        )
        return sum(moved, Traffic())

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

        The attention is that with a softmax under the layer's ``causal`` and ``window``. Algorithms that compute
        another one have products of their own, which :meth:`profile` counts: linear and lightning2 those with a state
        in place of scores, moba and windows of fields of their own those of fewer scores.
        """
        lengths = Lengths.checked(self, phase, length, batch, cache_length, context_length)
        work, problem = Work.of(self, phase, lengths), problem_of(self, lengths)
        seen = sum(sum(problem.keys_of_queries.tile_visits(rows, 1)) for rows in all_rows(problem.q_len, 1))
        pair = 2 * problem.batch * problem.heads * seen * (problem.head_dim + problem.value_dim)
        return LayerFlops(
            projections=sum(step.matmul_flops(work.shapes) for _, step in work.steps if step is not None),
            attention=sum({"forward": 1, "backward": 2}[one_pass] * pair for one_pass in work.passes),
        )

    def _result(self, phase: Phase, attention: Attention, projections: Projections, parts: list[LayerPart]) -> LayerRun:
        return LayerRun(
            layer=self,
            phase=phase,
            problem=attention.problem,
            algorithm=attention.algorithm,
            projection_tiles=projections.tiles,
            parts=tuple(parts),
        )

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
        given = GivenArrays.checked(self, x, weights, context, cache, arithmetic)
        attention = Attention.checked(self, given.phase, given.lengths, algorithm, plan, hardware, sram_bytes, options)
        projections = Projections.checked(self.dtype, hardware, sram_bytes, projection_tiles)
        simulation = Simulation.of(self, given, attention, projections)
        simulation.run_forward(attention)
        y = simulation.values["y"].reshape(np.shape(x))
        result = self._result(given.phase, attention, projections, simulation.parts)
        return replace(result, y=y, cache=simulation.keys_and_values)

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
        given = GivenArrays.checked(self, x, weights, context, None, arithmetic, dy)
        attention = Attention.checked(self, given.phase, given.lengths, algorithm, plan, hardware, sram_bytes, options)
        projections = Projections.checked(self.dtype, hardware, sram_bytes, projection_tiles)
        simulation = Simulation.of(self, given, attention, projections)
        simulation.run_forward(attention.without_tiles())
        simulation.parts.clear()
        simulation.run_backward()
        return replace(
            self._result(given.phase, attention, projections, simulation.parts),
            dx=simulation.values["dx"].reshape(np.shape(x)),
            dcontext=None if context is None else simulation.values["dcontext"].reshape(np.shape(context)),
            dweights={name: simulation.values[f"d{name}"].reshape(shape) for name, shape in self.weight_shapes.items()},
        )
