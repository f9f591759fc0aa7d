"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): a state of head_dim × value_dim in place of scores.

The products are taken from the right, φ(Q) (φ(K)ᵀ V). Under a causal mask each tile of rows adds what it sees of
itself, by a masked product, to what the state holds of the tiles before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from simattn.algorithms import forms
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.kernels import GroupedGradient, copied_out, declare_gradients, left_copied_out
from simattn.definition import Rounding, by_kv_head, by_query_head, exact, seen_product
from simattn.hardware import Hardware
from simattn.machine import Array, Machine, Place, Tile
from simattn.masks import Rows
from simattn.plan import Plan, Tiles, candidates, check_choice, check_flag
from simattn.problem import AttentionProblem, Direction, InputShape, checked_integer
from simattn.traffic import Traffic

Values = npt.NDArray[Any]

# Config and validation


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """What queries and keys are mapped by, element by element, so that products of them are similarities.

    Attributes
    ----------
    name
        For print.
    function, derivative
        Of an array of any shape, to one of the same shape.
    exponentials
        Exponentials that an element takes, for counting.

    Raises
    ------
    TypeError, ValueError
        If a function cannot be called, or the exponentials are no integer of at least 0.
    """

    name: str
    function: Callable[[Values], Values]
    derivative: Callable[[Values], Values]
    exponentials: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name={self.name!r}: expected a text")
        for name in ("function", "derivative"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected a function of an array")
        object.__setattr__(self, "exponentials", checked_integer("exponentials", self.exponentials, 0))

    def fingerprint(self) -> str:
        """Return all of it that a count depends on, for sweeps."""
        return f"{self.name} {self.exponentials}"

    def of(self, x: Values) -> Values:
        """Return what an array is mapped to.

        Raises
        ------
        ValueError
            If that has another shape.
        """
        return self._checked("function", self.function(x), x)

    def slope(self, x: Values) -> Values:
        """Return the derivative at an array's elements.

        Raises
        ------
        ValueError
            If it has another shape.
        """
        return self._checked("derivative", self.derivative(x), x)

    def _checked(self, name: str, result: Any, x: Values) -> Values:
        if np.shape(result) != x.shape:
            raise ValueError(
                f"the {name} of feature map {self.name!r} makes shape {np.shape(result)} of {x.shape}: expected the "
                "same shape"
            )
        return np.asarray(result)


def _elu1(x: Values) -> Values:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def _elu1_derivative(x: Values) -> Values:
    return np.where(x > 0, np.ones_like(x), np.exp(np.minimum(x, 0)))


FEATURE_MAPS: dict[str, FeatureMap] = {
    item.name: item
    for item in (
        FeatureMap("elu1", _elu1, _elu1_derivative, exponentials=1),
        FeatureMap("relu", lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
        FeatureMap("exp", np.exp, np.exp, exponentials=1),
        FeatureMap("identity", lambda x: x, np.ones_like),
    )
}
IDENTITY = FEATURE_MAPS["identity"]
"""Feature maps by name: elu(x) + 1 (the paper's), max(x, 0), exp(x) and x."""


@dataclass(frozen=True, kw_only=True)
class RecurrentProblem(AttentionProblem):
    """A problem without a softmax, whose keys and values a state of fixed size stands for.

    Products of queries and keys are not scaled: ``scale`` is 1. A causal mask needs as many keys as queries; a window
    or a block mask has no such state. In a decoding step a state stands for the keys before the new ones, and
    ``kv_len``, which counts them too, is of no consequence.
    """

    def __post_init__(self) -> None:
        if self.scale is None:
            object.__setattr__(self, "scale", 1.0)
        super().__post_init__()
        if self.scale != 1:
            raise ValueError(f"scale={self.scale!r}: expected 1, there is none without a softmax; scale q instead")
        if self.window is not None:
            raise ValueError(f"window={self.window!r}: expected None, a state forgets no key")
        if self.block_mask is not None:
            raise ValueError("block_mask is given: expected None, a state leaves out no key")
        if self.is_float8:
            raise ValueError(f"dtype={self.dtype!r}: expected float32, float16 or bfloat16")

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields without what a state cannot have."""
        changed = {**given, "window": None, "block_mask": None, "scale": None}
        if direction == "decode":
            changed["kv_len"] = max(given["q_len"], given["kv_len"])
        elif given["causal"] or cls.is_causal:
            changed["kv_len"] = given["q_len"]
        return changed

    own_inputs: ClassVar[tuple[str, ...]] = ("state", "state_sum")
    decode_cache: ClassVar[str | None] = "a state and the new keys and values"

    def check_direction(self, direction: Direction) -> None:
        """Raise a ValueError if there are other keys than the direction takes."""
        if direction != "decode" and self.causal and self.kv_len != self.q_len:
            raise ValueError(
                f"kv_len={self.kv_len} under a causal mask: expected q_len={self.q_len}, tiles of queries are aligned "
                "with their keys"
            )
        if direction == "decode" and self.kv_len < self.q_len:
            raise ValueError(
                f"kv_len={self.kv_len} in a decoding step: expected at least q_len={self.q_len}, the new keys"
            )

    def of_equal_lengths(self, direction: Direction) -> tuple[RecurrentProblem]:
        """Return the problem that a program finds in memory: in a decoding step that of the new rows."""
        return (self.of_new_rows() if direction == "decode" else self,)

    def of_new_rows(self) -> RecurrentProblem:
        """Return the problem of the new rows of a decoding step alone, whose keys are as many as their queries."""
        return replace(self, kv_len=self.q_len)

    @property
    def state_heads(self) -> Literal["query", "kv"]:
        """What has a state in a decoding step: a KV head, or each of its query heads where these decay differently."""
        return "kv" if self.decays is None else "query"

    def inputs(self, direction: Direction) -> dict[str, InputShape]:
        """Return the arrays that a program is given: in a decoding step the states in place of earlier keys."""
        if direction != "decode":
            return super().inputs(direction)
        arrays = super(RecurrentProblem, self.of_new_rows()).inputs(direction)
        d, states = self.head_dim, (self.batch, self.kv_heads if self.state_heads == "kv" else self.heads)
        arrays["state"] = InputShape(
            d, self.value_dim, self.state_heads, "float32", given_shape=(*states, d, self.value_dim)
        )
        if self.divides:
            arrays["state_sum"] = InputShape(1, d, self.state_heads, "float32", given_shape=(*states, d))
        return arrays

    @property
    def written_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a decoding step leaves changed."""
        return self.own_inputs

    def draw_inputs(self, direction: Direction, generator: np.random.Generator) -> dict[str, Values]:
        """Return random states, whose sums of mapped keys are positive, as those of most feature maps are."""
        drawn = super().draw_inputs(direction, generator)
        return {name: 1 + np.abs(array) if name == "state_sum" else array for name, array in drawn.items()}

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one row and one KV head with the same tiles on chip, under the same mask."""
        return super().of_one_row(causal=self.causal, **own)

    @property
    def map(self) -> FeatureMap:
        """What queries and keys are mapped by."""
        return IDENTITY

    @property
    def divides(self) -> bool:
        """Whether outputs are divided by the sum of their weights."""
        return False

    @property
    def decays(self) -> npt.NDArray[np.float64] | None:
        """What a step back costs, a factor for each query head; None for 1."""
        return None


@dataclass(frozen=True, kw_only=True)
class LinearProblem(RecurrentProblem):
    """A problem of linear attention.

    Attributes
    ----------
    feature_map
        A name of ``FEATURE_MAPS``, or a :class:`~simattn.algorithms.linear.FeatureMap` of your own.
    normalised
        Whether outputs are divided by the sum of their weights, φ(q)ᵀ Σ φ(k).
    """

    feature_map: Any = "elu1"
    normalised: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.feature_map, (FeatureMap, str)):
            raise TypeError(
                f"feature_map={self.feature_map!r}: expected one of {tuple(FEATURE_MAPS)}, or a FeatureMap of your own"
            )
        if isinstance(self.feature_map, str):
            check_choice("feature_map", self.feature_map, tuple(FEATURE_MAPS))
        check_flag("normalised", self.normalised)

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return feature maps, divided where no sum of weights can vanish by cancellation, and not."""
        divided = [{"feature_map": name} for name in FEATURE_MAPS if name != "identity"]
        return [*divided, *({"feature_map": name, "normalised": False} for name in FEATURE_MAPS)]

    @property
    def map(self) -> FeatureMap:
        """What queries and keys are mapped by."""
        return self.feature_map if isinstance(self.feature_map, FeatureMap) else FEATURE_MAPS[self.feature_map]

    @property
    def divides(self) -> bool:
        """Whether outputs are divided by the sum of their weights."""
        return self.normalised


@dataclass(frozen=True, kw_only=True)
class LinearPlan(Plan):
    """Plan of linear attention: a thread block for each query head, whose state stays on chip.

    Under a causal mask a tile has ``tiles.q`` queries and their keys, and ``tiles.kv`` is not used. A decoding step has
    a thread block for each state, which reads the keys that its heads share once; ``repeat_kv`` is not for it.
    """

    grouped_gradients: Literal["expand", "reduce"] = "expand"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("grouped_gradients", self.grouped_gradients, ("expand", "reduce"))


# Tiled program


@dataclass
class State:
    """What stands for rows that were taken in: φ(K)ᵀ V of keys, or φ(Q)ᵀ dO of queries.

    Where outputs are divided, ``row_sum`` is the sum of φ(K), or of φ(Q) times the gradients of the totals.
    """

    products: Tile
    row_sum: Tile | None

    @classmethod
    def empty(cls, machine: Machine, problem: RecurrentProblem, place: Place, *, of: str) -> State:
        """Return the state before any of the rows."""
        return cls(
            products=machine.full(f"{of}_products", problem.head_dim, problem.value_dim, 0.0, place=place),
            row_sum=machine.full(f"{of}_sum", 1, problem.head_dim, 0.0, place=place) if problem.divides else None,
        )

    @classmethod
    def load(cls, machine: Machine, arrays: Mapping[str, Array], place: Place) -> State:
        """Load the state of the keys before a decoding step, by name ``state`` and, if outputs are divided, its sum."""
        products = machine.load(arrays["state"], place=place, name="key_products")
        if "state_sum" not in arrays:
            return cls(products, None)
        return cls(products, machine.load(arrays["state_sum"], place=place, name="key_sum"))

    def _pass(self, machine: Machine, problem: RecurrentProblem, rows: int) -> None:
        """Let so many rows go by."""
        for tile in (self.products, self.row_sum):
            if tile is not None:
                decay(machine, problem, tile, lambda _: rows)

    def take_keys(self, machine: Machine, problem: RecurrentProblem, k: Tile, v: Tile) -> None:
        """Take in a tile of mapped keys and their values, after its rows have gone by."""
        self._pass(machine, problem, k.rows)
        decay(machine, problem, k, rows_after)
        machine.matmul(k, v, place=self.products.place, transpose_a=True, into=self.products)
        if self.row_sum is not None:
            machine.add_column_sums(self.row_sum, k)

    def take_queries(self, machine: Machine, problem: RecurrentProblem, q: Tile, gradient: OutputGradients) -> None:
        """Take in a tile of mapped queries and their outputs' gradients, before whose first row it stands then."""
        self._pass(machine, problem, q.rows)
        decay(machine, problem, q, rows_up_to)
        place = self.products.place
        machine.matmul(q, gradient.outputs, place=place, transpose_a=True, into=self.products)
        if self.row_sum is not None and gradient.totals is not None:
            machine.matmul(gradient.totals, q, place=place, transpose_a=True, into=self.row_sum)


Exponents = int | npt.NDArray[np.int64]


def rows_up_to(tile: Tile) -> Exponents:
    """Return how many rows of its tile there are up to each row: 1 for the first."""
    return np.arange(1, tile.rows + 1)[:, None]


def rows_after(tile: Tile) -> Exponents:
    """Return how many rows of its tile come after each row: 0 for the last."""
    return np.arange(tile.rows - 1, -1, -1)[:, None]


def rows_between(tile: Tile) -> Exponents:
    """Return how many rows each row of a square tile is behind each column."""
    between: Exponents = np.maximum(np.arange(tile.rows)[:, None] - np.arange(tile.columns), 0)
    return between


def decay(machine: Machine, problem: RecurrentProblem, tile: Tile, exponents: Callable[[Tile], Exponents]) -> None:
    """Multiply a tile by powers of what a step back costs, which follow from row numbers; without decay by nothing."""
    rates = problem.decays
    if rates is not None:
        machine.multiply(tile, lambda: machine.of_query_heads(rates) ** exponents(tile))


def mapped(machine: Machine, problem: RecurrentProblem, tile: Tile) -> Tile:
    """Replace queries or keys by what they are mapped to."""
    if problem.map is not IDENTITY:
        machine.apply(tile, problem.map.of, exponentials=problem.map.exponentials)
    return tile


def own_weights(machine: Machine, problem: RecurrentProblem, q: Tile, k: Tile, rows: Rows, place: Place) -> Tile:
    """Return the products of a tile's mapped queries with its own keys, those that a query sees, decayed."""
    weights = machine.matmul(q, k, place=place, name="scores", transpose_b=True)
    hide_later(machine, problem, weights, rows)
    return weights


def hide_later(machine: Machine, problem: RecurrentProblem, weights: Tile, rows: Rows) -> None:
    """Set what later keys of the tile have to 0, and let earlier ones decay."""
    decay(machine, problem, weights, rows_between)
    machine.hide(weights, machine.hidden_elements(rows, rows), 0.0)


def forward(machine: Machine, problem: RecurrentProblem, plan: LinearPlan) -> None:
    """Each thread block keeps the state of a query head on chip and streams its rows past it."""
    k, v = copied_out(machine, plan)
    declare_saved(machine, problem, plan)
    out = machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="output")
    for _ in machine.thread_blocks(width=problem.head_dim * problem.value_dim):
        state = State.empty(machine, problem, plan.accumulators, of="key")
        stream(machine, problem, plan, state, k, v, out, machine.arrays.get("totals"))


def decode(machine: Machine, problem: RecurrentProblem, plan: LinearPlan) -> None:
    """Each thread block loads a state, streams the new rows past it and stores what it has become, in its place."""
    out = machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="output")
    before = {name: machine.arrays[name] for name in problem.own_inputs if name in machine.arrays}
    after = {
        name: machine.array(name, array.rows, array.columns, heads=array.heads, role="output")
        for name, array in before.items()
    }
    rows = problem.of_new_rows()
    inner = machine.inside(rows, machine.arrays)
    for _ in inner.thread_blocks(per=problem.state_heads, width=problem.head_dim * problem.value_dim):
        # load
        state = State.load(inner, before, plan.accumulators)
        # compute
        stream(inner, rows, plan, state, machine.arrays["k"], machine.arrays["v"], out)
        # finish
        inner.store(state.products, after["state"])
        if state.row_sum is not None:
            inner.store(state.row_sum, after["state_sum"])
    machine.take_over(inner)


def stream(
    machine: Machine,
    problem: RecurrentProblem,
    plan: LinearPlan,
    state: State,
    k: Array,
    v: Array,
    results: Array,
    totals: Array | None = None,
) -> None:
    """Attend from all rows to the state and, under a causal mask, to those before in the tile, which it then takes."""
    tiles, place = plan.tiles, plan.accumulators
    if not problem.causal:
        take_all(machine, problem, state, k, v, tiles.kv)
    for rows in machine.tiles(problem.q_len, tiles.q):
        # load
        keys = values = None
        if problem.causal:
            keys = mapped(machine, problem, machine.load(k, rows))
            values = machine.load(v, rows)
        for _ in machine.group_heads():
            queries = mapped(machine, problem, machine.load(machine.arrays["q"], rows))
            # compute
            weights = None if keys is None else own_weights(machine, problem, queries, keys, rows, place)
            decay(machine, problem, queries, rows_up_to)
            out = machine.matmul(queries, state.products, place=place, name="out")
            if weights is not None and values is not None:
                hidden = machine.hidden_elements(rows, rows)
                machine.matmul(weights, values, place=place, hidden=hidden, into=out)
            # finish
            if state.row_sum is not None:
                sums = machine.matmul(queries, state.row_sum, place=place, name="totals", transpose_b=True)
                if weights is not None:
                    machine.update_row_sum(sums, weights)
                machine.normalise(out, sums)
                if totals is not None:
                    machine.store(sums, totals, rows)
            machine.store(out, results, rows)
        if keys is not None and values is not None:
            state.take_keys(machine, problem, keys, values)


def take_all(machine: Machine, problem: RecurrentProblem, state: State, k: Array, v: Array, tile: int) -> None:
    """Take in all keys and values."""
    for rows in machine.tiles(problem.kv_len, tile):
        keys = mapped(machine, problem, machine.load(k, rows))
        state.take_keys(machine, problem, keys, machine.load(v, rows))


@dataclass
class OutputGradients:
    """Gradients of a tile's undivided outputs, and of the totals that they are divided by."""

    outputs: Tile
    totals: Tile | None

    @classmethod
    def load(cls, machine: Machine, problem: RecurrentProblem, rows: Rows) -> OutputGradients:
        """Load the gradient of the output: dO / t, and −(dO · O) / t of the totals t."""
        dout = machine.load(machine.arrays["dout"], rows)
        if not problem.divides:
            return cls(dout, None)
        totals = machine.load(machine.arrays["totals"], rows, place="registers")
        dtotals = machine.row_dot(dout, machine.load(machine.arrays["out"], rows), name="dtotals")
        machine.normalise(dtotals, totals)
        machine.scale(dtotals, -1.0)
        machine.normalise(dout, totals)
        return cls(dout, dtotals)

    def of_weights(self, machine: Machine, values: Tile, place: Place) -> Tile:
        """Return the gradients of the weights of a tile's own keys."""
        dweights = machine.matmul(self.outputs, values, place=place, name="dscores", transpose_b=True)
        if self.totals is not None:
            machine.add(dweights, self.totals)
        return dweights


def backward(machine: Machine, problem: RecurrentProblem, plan: LinearPlan) -> None:
    """Two sweeps: ascending for dQ, with the state of the keys; descending for dK and dV, with that of the queries."""
    k, v = left_copied_out(machine, plan)
    gradients = declare_gradients(machine, problem)
    query_gradients(machine, problem, plan, k, v, gradients["dq"])
    key_gradients(machine, problem, plan, k, v, gradients["dk"], gradients["dv"])


def query_gradients(
    machine: Machine, problem: RecurrentProblem, plan: LinearPlan, k: Array, v: Array, dq: Array
) -> None:
    """Compute dQ: dO Sᵀ of the state S, and of a tile's own keys by a masked product."""
    tiles, place = plan.tiles, plan.accumulators
    for _ in machine.thread_blocks(width=problem.head_dim * problem.value_dim):
        state = State.empty(machine, problem, place, of="key")
        if not problem.causal:
            take_all(machine, problem, state, k, v, tiles.kv)
        for rows in machine.tiles(problem.q_len, tiles.q):
            # load
            gradient = OutputGradients.load(machine, problem, rows)
            keys = values = dweights = None
            if problem.causal:
                keys = mapped(machine, problem, machine.load(k, rows))
                values = machine.load(v, rows)
                dweights = gradient.of_weights(machine, values, place)
                hide_later(machine, problem, dweights, rows)
            # compute
            dqueries = machine.matmul(gradient.outputs, state.products, place=place, name="dq", transpose_b=True)
            if state.row_sum is not None and gradient.totals is not None:
                machine.matmul(gradient.totals, state.row_sum, place=place, into=dqueries)
            decay(machine, problem, dqueries, rows_up_to)
            if keys is not None and dweights is not None:
                hidden = machine.hidden_elements(rows, rows)
                machine.matmul(dweights, keys, place=place, hidden=hidden, into=dqueries)
            # finish
            multiply_derivative(machine, problem, dqueries, machine.arrays["q"], rows)
            machine.store(dqueries, dq, rows)
            if keys is not None and values is not None:
                state.take_keys(machine, problem, keys, values)


def multiply_derivative(machine: Machine, problem: RecurrentProblem, tile: Tile, array: Array, rows: Rows) -> None:
    """Multiply a gradient by the feature map's derivative where it was taken."""
    if problem.map is not IDENTITY:
        at = machine.load(array, rows)
        machine.apply(at, problem.map.slope, exponentials=problem.map.exponentials)
        machine.multiply(tile, at)


def key_gradients(
    machine: Machine, problem: RecurrentProblem, plan: LinearPlan, k: Array, v: Array, dk: Array, dv: Array
) -> None:
    """Compute dK and dV: V Dᵀ and φ(K) D of the state D = φ(Q)ᵀ dO of later queries, and by masked products."""
    tiles, place = plan.tiles, plan.accumulators
    dk_total, dv_total = (GroupedGradient.declare(machine, array, plan) for array in (dk, dv))
    for _ in machine.thread_blocks(width=problem.head_dim * problem.value_dim):
        state = State.empty(machine, problem, place, of="query")
        if not problem.causal:
            for rows in machine.tiles(problem.q_len, tiles.q):
                queries = mapped(machine, problem, machine.load(machine.arrays["q"], rows))
                state.take_queries(machine, problem, queries, OutputGradients.load(machine, problem, rows))
        tile, length = (tiles.q, problem.q_len) if problem.causal else (tiles.kv, problem.kv_len)
        for rows in machine.tiles(length, tile, descending=True):
            # load
            keys = mapped(machine, problem, machine.load(k, rows))
            values = machine.load(v, rows)
            own = None
            if problem.causal:
                queries = mapped(machine, problem, machine.load(machine.arrays["q"], rows))
                gradient = OutputGradients.load(machine, problem, rows)
                weights = own_weights(machine, problem, queries, keys, rows, place)
                dweights = gradient.of_weights(machine, values, place)
                hide_later(machine, problem, dweights, rows)
                own = queries, gradient, weights, dweights
            # compute
            dvalues = machine.matmul(keys, state.products, place=place, name="dv")
            dkeys = machine.matmul(values, state.products, place=place, name="dk", transpose_b=True)
            if state.row_sum is not None:
                machine.add(dkeys, state.row_sum)
            for result in (dvalues, dkeys):
                decay(machine, problem, result, rows_after)
            if own is not None:
                queries, gradient, weights, dweights = own
                hidden = machine.hidden_elements(rows, rows)
                machine.matmul(weights, gradient.outputs, place=place, transpose_a=True, hidden=hidden, into=dvalues)
                machine.matmul(dweights, queries, place=place, transpose_a=True, hidden=hidden, into=dkeys)
            # finish
            multiply_derivative(machine, problem, dkeys, k, rows)
            dk_total.add(machine, dkeys, rows)
            dv_total.add(machine, dvalues, rows)
            if own is not None:
                state.take_queries(machine, problem, own[0], own[1])
    for total in (dk_total, dv_total):
        total.finish(machine, plan)


def declare_saved(machine: Machine, problem: RecurrentProblem, plan: Plan) -> None:
    """Declare what the backward pass takes of the forward pass: where outputs are divided, these and by what."""
    if problem.divides:
        machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="saved")
        machine.array("totals", problem.q_len, 1, role="saved")


# Reference


def reference(problem: RecurrentProblem, inputs: Mapping[str, Values], rounded: Rounding = exact) -> dict[str, Values]:
    """Compute whole matrices of weights, as the definition has them.

    Parameters
    ----------
    problem
        The problem.
    inputs
        ``q``, ``k``, ``v`` and, for the gradients, ``dout``, (batch, length, heads, columns), in the precision to
        compute in: float64 for the oracle. In a decoding step the state before it, ``state`` and ``state_sum``.
    rounded
        What weights, outputs and their gradients go through, such as a rounding to a storage format.

    Returns
    -------
    dict
        ``out``, with ``dout`` also ``dq``, ``dk`` and ``dv``, with ``state`` the new states, shaped like the inputs.
    """
    if "state" in inputs:
        problem = problem.of_new_rows()
    q, k, v = (by_query_head(problem, inputs[name]) for name in "qkv")
    left = _decayed_mask(problem).astype(q.dtype)
    seen = np.broadcast_to(problem.visible_elements(), left.shape)
    queries, keys = problem.map.of(q), problem.map.of(k)
    with np.errstate(all="ignore"):  # NaN and Inf are propagated as IEEE says, not reported
        weights = np.where(seen, rounded(queries @ keys.swapaxes(-1, -2)) * left, 0).astype(q.dtype)
        totals = weights.sum(axis=-1, keepdims=True) if problem.divides else np.ones((*weights.shape[:-1], 1), q.dtype)
        products = seen_product(weights, v, seen[0])
        results = {}
        if "state" in inputs:
            earlier = queries * _decayed_rows(problem).astype(q.dtype)
            products = products + earlier @ _of_every_head(problem, inputs["state"])
            results = _new_states(problem, inputs)
            if problem.divides:
                totals = totals + earlier @ _of_every_head(problem, inputs["state_sum"])[..., None]
        inverse = np.where(totals == 0, 0, 1 / np.where(totals == 0, 1, totals)).astype(q.dtype)
        out = rounded(inverse * products)
        results["out"] = np.moveaxis(out, 1, 2)
        if "dout" in inputs:
            dout = inverse * by_query_head(problem, inputs["dout"])
            dtotals = -(dout * out).sum(axis=-1, keepdims=True) if problem.divides else 0
            dweights = np.where(seen, rounded(dout @ v.swapaxes(-1, -2) + dtotals) * left, 0).astype(q.dtype)
            dq = seen_product(dweights, keys, seen[0]) * problem.map.slope(q)
            results["dq"] = np.moveaxis(dq, 1, 2)
            dk = seen_product(dweights.swapaxes(-1, -2), queries, seen[0].T) * problem.map.slope(k)
            dv = seen_product(weights.swapaxes(-1, -2), dout, seen[0].T)
            results |= {"dk": by_kv_head(problem, dk), "dv": by_kv_head(problem, dv)}
    return results


def _of_every_head(problem: RecurrentProblem, state: Values) -> Values:
    return np.repeat(state, problem.heads // state.shape[1], axis=1)


def _decayed_rows(problem: RecurrentProblem) -> npt.NDArray[np.float64]:
    """Return what is left of the state before the first row at each row: (heads or 1, q_len, 1)."""
    if problem.decays is None:
        return np.ones((1, 1, 1))
    left: npt.NDArray[np.float64] = problem.decays[:, None, None] ** np.arange(1, problem.q_len + 1)[:, None]
    return left


def _new_states(problem: RecurrentProblem, inputs: Mapping[str, Values]) -> dict[str, Values]:
    """Return the states after all keys, of KV heads or of query heads as the problem has them."""
    k, v = (np.moveaxis(inputs[name], 2, 1) for name in "kv")
    keys, decays = problem.map.of(k), problem.decays
    states = {name: inputs[name] for name in problem.own_inputs if name in inputs}
    if decays is not None:
        keys, v = (np.repeat(array, problem.group_size, axis=1) for array in (keys, v))
        rates = decays[:, None, None].astype(keys.dtype)
        keys = keys * rates ** np.arange(problem.kv_len - 1, -1, -1)[:, None]
        states = {name: state * rates**problem.kv_len for name, state in states.items()}
    taken = {"state": keys.swapaxes(-1, -2) @ v, "state_sum": keys.sum(axis=-2)}
    return {name: state + taken[name] for name, state in states.items()}


def _decayed_mask(problem: RecurrentProblem) -> npt.NDArray[np.float64]:
    """Return what is left of each weight: (heads or 1, q_len, kv_len), 0 where a key is not seen."""
    seen = problem.visible_elements().astype(np.float64)[None]
    if problem.decays is None:
        return seen
    distance = np.maximum(np.arange(problem.q_len)[:, None] - np.arange(problem.kv_len), 0)
    powers: npt.NDArray[np.float64] = problem.decays[:, None, None] ** distance * seen
    return powers


# Closed form


def closed_form_forward(problem: RecurrentProblem, plan: LinearPlan) -> Traffic:
    """Every row once for each query head, whatever the tiles."""
    k, v = forms.key_names(plan)
    main = {
        "q": forms.read(forms.matrix_bytes(problem, problem.q_len, problem.head_dim)),
        k: forms.read(forms.matrix_bytes(problem, problem.kv_len, problem.head_dim)),
        v: forms.read(forms.matrix_bytes(problem, problem.kv_len, problem.value_dim)),
        "out": forms.written(forms.matrix_bytes(problem, problem.q_len, problem.value_dim)),
    }
    if problem.divides:
        main["totals"] = forms.written(forms.statistic_bytes(problem, problem.q_len))
    return forms.total([main, *forms.repeat_traffic(problem, plan)])


def closed_form_decode(problem: RecurrentProblem, plan: LinearPlan) -> Traffic:
    """Every state there and back, queries and outputs once, and the keys and values once for each state."""
    states = problem.kv_heads if problem.state_heads == "kv" else problem.heads
    state, state_sum = (
        problem.batch * states * problem.head_dim * columns * forms.STATISTIC_BYTES
        for columns in (problem.value_dim, 1)
    )
    main = {
        "q": forms.read(forms.matrix_bytes(problem, problem.q_len, problem.head_dim)),
        "k": forms.read(forms.matrix_bytes(problem, problem.q_len, problem.head_dim, heads=states)),
        "v": forms.read(forms.matrix_bytes(problem, problem.q_len, problem.value_dim, heads=states)),
        "out": forms.written(forms.matrix_bytes(problem, problem.q_len, problem.value_dim)),
        "state": forms.read(state) + forms.written(state),
    }
    if problem.divides:
        main["state_sum"] = forms.read(state_sum) + forms.written(state_sum)
    return forms.total([main])


def closed_form_backward(problem: RecurrentProblem, plan: LinearPlan) -> Traffic:
    """Two sweeps over all rows; the derivative of a feature map takes what it is taken of once more."""
    k, v = forms.key_names(plan)
    maps = problem.map is not IDENTITY
    queries = forms.matrix_bytes(problem, problem.q_len, problem.head_dim)
    keys = forms.matrix_bytes(problem, problem.kv_len, problem.head_dim)
    main = {
        "q": forms.read((1 + maps) * queries),
        k: forms.read((2 + maps) * keys),
        v: forms.read(2 * forms.matrix_bytes(problem, problem.kv_len, problem.value_dim)),
        "dout": forms.read(2 * forms.matrix_bytes(problem, problem.q_len, problem.value_dim)),
        "dq": forms.written(queries),
    }
    if problem.divides:
        main["out"] = forms.read(2 * forms.matrix_bytes(problem, problem.q_len, problem.value_dim))
        main["totals"] = forms.read(2 * forms.statistic_bytes(problem, problem.q_len))
    return forms.total([main, *forms.grouped_gradient_traffic(problem, plan)])


# Plans


def paper_tiles(problem: AttentionProblem, sram_elements: int, direction: Direction) -> Tiles:
    """As many rows as the state has, so that a masked product costs no more than one with the state."""
    return Tiles(q=problem.head_dim, kv=problem.head_dim)


def fit_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """Return tiles of equal rows."""
    return Tiles(q=size, kv=size)


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return square tiles, the largest first; more rows than 64 would cost more in masked products."""
    return [tiles for tiles in candidates(direction, (64, 64)) if tiles.q == tiles.kv]


ALGORITHM = Algorithm(
    name="linear",
    title="Linear attention",
    source="Katharopoulos et al. 2020, arXiv 2006.16236, Sections 3.2 to 3.4",
    summary="A state of head_dim × value_dim stands for all keys and values before; no softmax.",
    family="state",
    plan_class=LinearPlan,
    problem_class=LinearProblem,
    reference=reference,
    programs={"forward": forward, "backward": backward, "decode": decode},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward, "decode": closed_form_decode},
    paper_tiles=paper_tiles,
    fit_tiles=fit_tiles,
    gpu_tiles=gpu_tiles,
    declare_saved=declare_saved,
)
