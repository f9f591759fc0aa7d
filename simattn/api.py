"""The calls: run, run_backward, run_decode, count, profile, closed_form, default_plan."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from simattn.algorithms import get_algorithm
from simattn.algorithms.algorithm import Algorithm
from simattn.arithmetic.floating import ARITHMETICS, FloatArithmetic, get_arithmetic
from simattn.arithmetic.formats import FLOAT8, INDEX_DTYPES, numpy_dtype, storage_name
from simattn.hardware import Hardware
from simattn.machine import Array, Machine, Operations
from simattn.masks import BlockMask
from simattn.plan import Plan, PlanKind
from simattn.planning import Capacity, declare_inputs, make_plan
from simattn.problem import AttentionProblem, Direction, InputShape, Window
from simattn.tables import byte_text
from simattn.traffic import Traffic

Values = npt.NDArray[Any]
R = TypeVar("R")


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What a program moved, used and, when it was simulated, computed. Its repr is a table.

    Attributes
    ----------
    algorithm, direction
        What ran.
    problem, plan
        On which problem and by which plan.
    traffic
        Bytes moved.
    operations
        Arithmetic operations done.
    peak_sram_bytes, peak_register_bytes
        Most on-chip memory that the tiles of one thread block took.
    hbm_bytes_by_role
        Bytes of the arrays in device memory: "input", "output", "saved" for the backward pass and "workspace".
    out, lse
        Output (batch, q_len, heads, value_dim) and natural log-sum-exp (batch, heads, q_len) of a simulated forward
        pass, else None.
    dq, dk, dv
        Gradients, shaped like their inputs, of a simulated backward pass, else None.
    results
        All that a simulated program returns, by name, those above among it, else None: gradients of further inputs as
        ``d`` before their names, and the states after a decoding step.
    saved
        What a simulated forward pass leaves for the backward pass, by name, else None. It is shaped as the argument of
        that name of :func:`run_backward` expects it.
    """

    algorithm: str
    direction: Direction
    problem: AttentionProblem
    plan: Plan
    traffic: Traffic
    operations: Operations
    peak_sram_bytes: int
    peak_register_bytes: int
    hbm_bytes_by_role: dict[str, int]
    out: Values | None = None
    lse: Values | None = None
    dq: Values | None = None
    dk: Values | None = None
    dv: Values | None = None
    results: Mapping[str, Values] | None = None
    saved: Mapping[str, Values] | None = None

    @property
    def peak_hbm_bytes(self) -> int:
        """Bytes of all arrays in device memory."""
        return sum(self.hbm_bytes_by_role.values())

    def __repr__(self) -> str:
        tiles = self.plan.tiles
        depth = "" if tiles.depth is None else f" × {tiles.depth} columns"
        return "\n".join(
            [
                f"{self.algorithm} {self.direction}: tiles of {tiles.q} query × {tiles.kv} key rows{depth}",
                f"peak SRAM {byte_text(self.peak_sram_bytes)}, registers {byte_text(self.peak_register_bytes)} "
                f"per thread block; arrays in HBM {byte_text(self.peak_hbm_bytes)}",
                f"matmul FLOPs {self.operations.matmul_flops:,}; other FLOPs {self.operations.vector_flops:,}; "
                f"exponentials {self.operations.exponentials:,}",
                repr(self.traffic),
            ]
        )


@dataclass(frozen=True)
class _Request:
    """A program to count: the checked arguments of the calls below."""

    spec: Algorithm
    direction: Direction
    problem: AttentionProblem
    plan: Plan
    capacity: Capacity


def _request(
    algorithm: str,
    *,
    q_len: int,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    kv_len: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: str = "bfloat16",
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    block_mask: BlockMask | None = None,
    direction: Direction = "forward",
    plan: Plan | PlanKind | None = None,
    hardware: str | Hardware | None = None,
    sram_bytes: int | None = None,
    **options: Any,
) -> _Request:
    optional = {"kv_heads": kv_heads, "kv_len": kv_len, "value_dim": value_dim, "scale": scale}
    problem_class = _with_direction(algorithm, direction).problem_class
    own = {item.name for item in fields(problem_class)} - {item.name for item in fields(AttentionProblem)}
    given = {name: options.pop(name) for name in own & set(options)}
    problem = problem_class(
        batch=batch,
        heads=heads,
        q_len=q_len,
        head_dim=head_dim,
        dtype=dtype,
        causal=causal,
        window=window,
        block_mask=block_mask,
        **{name: value for name, value in optional.items() if value is not None},  # type: ignore[arg-type]
        **given,
    )
    spec = checked_algorithm(algorithm, direction, problem)
    made, capacity = make_plan(
        spec, problem, direction, plan=plan, hardware=hardware, sram_bytes=sram_bytes, options=options
    )
    return _Request(spec, direction, problem, made, capacity)


def _takes_the_arguments_of_a_request(function: Callable[..., R]) -> Callable[..., R]:
    """Show and check the arguments of :func:`_request`, which the function passes on."""
    arguments = inspect.signature(_request)

    @functools.wraps(function)
    def checked(*given: Any, **named: Any) -> R:
        arguments.bind(*given, **named)
        return function(*given, **named)

    result = inspect.signature(function).return_annotation
    checked.__signature__ = arguments.replace(return_annotation=result)  # type: ignore[attr-defined]
    return checked


def _with_direction(algorithm: str, direction: Direction) -> Algorithm:
    spec = get_algorithm(algorithm)
    if direction not in spec.programs:
        steps_forward = direction == "decode" and spec.step_direction == "forward"
        hint = "; its decoding step is the forward pass of few queries" if steps_forward else ""
        raise ValueError(f"direction={direction!r} of {algorithm}: expected one of {spec.directions}{hint}")
    return spec


def checked_algorithm(algorithm: str, direction: Direction, problem: AttentionProblem) -> Algorithm:
    """Return the algorithm, if it has the direction for this problem.

    Raises
    ------
    ValueError
        If the algorithm is unknown, lacks the direction, or the storage format has no backward pass.
    """
    spec = _with_direction(algorithm, direction)
    problem.check_direction(direction)
    if direction == "backward" and problem.is_float8:
        raise ValueError(
            f"direction='backward' with dtype={problem.dtype!r}: eight-bit storage is forward only; "
            "expected float32, float16 or bfloat16"
        )
    return spec


def _finished(request: _Request, machine: Machine, **numbers: Any) -> Run:
    return Run(
        algorithm=request.spec.name,
        direction=request.direction,
        problem=request.problem,
        plan=request.plan,
        traffic=machine.traffic,
        operations=machine.operations,
        peak_sram_bytes=machine.peak_bytes["sram"],
        peak_register_bytes=machine.peak_bytes["registers"],
        hbm_bytes_by_role=machine.hbm_bytes_by_role,
        **numbers,
    )


def _machine(request: _Request, arithmetic: FloatArithmetic | None = None) -> Machine:
    if not request.plan.enforce_capacity:
        return Machine(request.problem, arithmetic=arithmetic)
    capacity = request.capacity
    return Machine(request.problem, capacity.sram_bytes, capacity.register_bytes, arithmetic)


@_takes_the_arguments_of_a_request
def profile(algorithm: str, **arguments: Any) -> Run:
    """Count a program without computing: its traffic, operations, residency and memory.

    Parameters
    ----------
    algorithm
        A name in :data:`simattn.ALGORITHMS`.
    q_len, batch, heads, kv_heads, kv_len, head_dim, value_dim, dtype, scale, causal, window, block_mask
        The problem; see :class:`simattn.AttentionProblem`.
    direction
        "forward", "backward" without its forward pass, or "decode", a step of so many new queries against a cache.
    plan
        A plan of the algorithm; "gpu" (the kernels' tiles, accumulators in registers), "fit" (the largest tiles that
        fit, all in SRAM) or "paper" (the paper's formula, all in SRAM, its excess reported and not refused). Default
        "fit" if ``sram_bytes`` is given, else "gpu".
    hardware
        Name or row of a GPU; default H100-SXM.
    sram_bytes
        SRAM of one thread block in place of the GPU's; the papers' M, in bytes.
    **options
        Fields of the algorithm's plan, such as ``tiles=(64, 128)`` or ``dq="deterministic"``, and of its problems, such
        as ``page_size=16``.

    Returns
    -------
    Run
        Without numbers.

    Raises
    ------
    ValueError, TypeError
        If an argument is unknown or out of range; the message names it, its value and what was expected.
    """
    request = _request(algorithm, **arguments)
    machine = _machine(request)
    declare_inputs(machine, request.spec, request.problem, request.direction, request.plan)
    request.spec.programs[request.direction](machine, request.problem, request.plan)
    return _finished(request, machine)


@_takes_the_arguments_of_a_request
def count(algorithm: str, **arguments: Any) -> Traffic:
    """Count the bytes a program moves; the arguments are those of :func:`profile`.

    The cost does not depend on the sequence lengths; with a block mask or a selection it is linear in what these store.

    Examples
    --------
    >>> traffic = count("flash2", heads=32, kv_heads=8, q_len=1 << 20, head_dim=128, causal=True)
    >>> traffic.by_array["q"].hbm_read_bytes == 32 * 2**20 * 128 * 2
    True
    """
    return profile(algorithm, **arguments).traffic


@_takes_the_arguments_of_a_request
def closed_form(algorithm: str, **arguments: Any) -> Traffic:
    """Return what the algorithm's formula says about its memory traffic; the arguments are those of :func:`profile`.

    It equals ``count(...).global_only()``: SRAM traffic has no formula.
    """
    request = _request(algorithm, **arguments)
    return request.spec.closed_forms[request.direction](request.problem, request.plan)


@_takes_the_arguments_of_a_request
def default_plan(algorithm: str, **arguments: Any) -> Plan:
    """Return the plan that the other calls use for the same arguments."""
    return _request(algorithm, **arguments).plan


def run(
    algorithm: str,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    block_mask: BlockMask | None = None,
    q_descale: npt.ArrayLike | None = None,
    k_descale: npt.ArrayLike | None = None,
    v_descale: npt.ArrayLike | None = None,
    arithmetic: str = "float32",
    plan: Plan | PlanKind | None = None,
    hardware: str | Hardware | None = None,
    sram_bytes: int | None = None,
    **options: Any,
) -> Run:
    """Run an attention program on the simulated machine.

    Parameters
    ----------
    algorithm
        A name in :data:`simattn.ALGORITHMS`.
    q
        Queries, shape (batch, q_len, heads, head_dim).
    k
        Keys, shape (batch, kv_len, kv_heads, head_dim).
    v
        Values, shape (batch, kv_len, kv_heads, value_dim).
    scale, causal, window, block_mask
        See :class:`simattn.AttentionProblem`. Causal masks align the ends of the sequences; with two queries on five
        keys and five queries on two keys the visible elements are::

            1 1 1 1 0        0 0
            1 1 1 1 1        0 0
                             0 0
                             1 0
                             1 1
    q_descale, k_descale, v_descale
        For eight-bit storage: factors of shape (batch, kv_heads), default 1.
    arithmetic
        "float32" (NumPy, outputs rounded to their storage format), "float64" (the oracle, nothing rounded) or, where
        the algorithm fixes the order of every operation, "simt" (the bits of its CUDA-core kernels) or, of 16-bit
        inputs, "hopper" (those of its kernel on wgmma) or "mma" (those of its kernel on mma.sync, on Hopper).
    plan, hardware, sram_bytes, **options
        As for :func:`profile`.

    Returns
    -------
    Run
        With ``out``, ``lse`` and ``saved``. A row that sees no key, or whose scores are all −inf, is 0 with LSE −inf.

    Raises
    ------
    ValueError, TypeError
        If an argument is unknown or out of range; the message names it, its value and what was expected.
    """
    descales = {"q": q_descale, "k": k_descale, "v": v_descale}
    inputs, options = Inputs.checked(algorithm, {"q": q, "k": k, "v": v}, options, descales)
    return run_inputs(
        algorithm,
        inputs,
        scale=scale,
        causal=causal,
        window=window,
        block_mask=block_mask,
        arithmetic=arithmetic,
        plan=plan,
        hardware=hardware,
        sram_bytes=sram_bytes,
        **options,
    )


def run_decode(
    algorithm: str,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    block_mask: BlockMask | None = None,
    arithmetic: str = "float32",
    plan: Plan | PlanKind | None = None,
    hardware: str | Hardware | None = None,
    sram_bytes: int | None = None,
    **options: Any,
) -> Run:
    """Run a decoding step on the simulated machine: few new queries, usually one, against a cache of keys and values.

    Parameters
    ----------
    algorithm, scale, causal, window, block_mask, arithmetic, plan, hardware, sram_bytes, **options
        As for :func:`run`; further inputs, such as a state, by name.
    q
        New queries, shape (batch, q_len, heads, head_dim).
    k, v
        The cache, which holds the new keys and values already, shaped as for :func:`run`; or what the algorithm's page
        says that it takes in its place.

    Returns
    -------
    Run
        With ``out``, ``lse`` where there is a softmax, and in ``results`` whatever states the step changed.

    Raises
    ------
    ValueError, TypeError
        If an argument is unknown or out of range; the message names it, its value and what was expected. Algorithms
        without a decoding step of their own are among them: :func:`run` takes few queries too.

    Examples
    --------
    >>> generator = np.random.default_rng(0)
    >>> q = generator.standard_normal((2, 1, 8, 64), dtype=np.float32)
    >>> k, v = generator.standard_normal((2, 2, 300, 2, 64), dtype=np.float32)
    >>> step = run_decode("split_kv", q, k, v, splits=4)
    >>> step.out.shape, step.lse.shape
    ((2, 1, 8, 64), (2, 8, 1))
    """
    inputs, options = Inputs.checked(algorithm, {"q": q, "k": k, "v": v}, options)
    return run_inputs(
        algorithm,
        inputs,
        direction="decode",
        scale=scale,
        causal=causal,
        window=window,
        block_mask=block_mask,
        arithmetic=arithmetic,
        plan=plan,
        hardware=hardware,
        sram_bytes=sram_bytes,
        **options,
    )


def run_inputs(
    algorithm: str, inputs: Inputs, *, arithmetic: str, direction: Direction = "forward", **arguments: Any
) -> Run:
    """Run a forward or decoding program on checked inputs; the other arguments are those of :func:`run`."""
    request = _request(algorithm, **inputs.shape_arguments, direction=direction, **arguments)
    chosen = _checked_arithmetic(arithmetic, request)
    machine = _simulated(request, chosen, inputs.head_major(request.problem, direction, chosen))
    numbers, saved = _numbers(request, machine), None
    if direction == "forward":
        found = numbers["results"]
        saved = {
            name: found[name] if name in found else _user_layout(machine.arrays[name], request.problem)
            for name in _saved_arrays(request)
        }
    return _finished(request, machine, **numbers, saved=saved)


def run_backward(
    algorithm: str,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    dout: npt.ArrayLike,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    block_mask: BlockMask | None = None,
    saved: Mapping[str, npt.ArrayLike] | None = None,
    arithmetic: str = "float32",
    plan: Plan | PlanKind | None = None,
    hardware: str | Hardware | None = None,
    sram_bytes: int | None = None,
    **options: Any,
) -> Run:
    """Run a backward program on the simulated machine; the forward pass it needs is run first, and not counted.

    Parameters
    ----------
    algorithm, q, k, v, scale, causal, window, block_mask, plan, hardware, sram_bytes, **options
        As for :func:`run`; a plan is the backward program's, its options apply to both where both have them.
    dout
        Gradient of the output, shape (batch, q_len, heads, value_dim), stored like q.
    saved
        What the forward pass left, :attr:`Run.saved` of one in the same arithmetic; None runs it. The arrays are

        - of flash2, flash3 and online_softmax in one pass: ``out``, shape (batch, q_len, heads, value_dim), and the
          natural log-sum-exp ``lse``, shape (batch, heads, q_len);
        - of linear, where outputs are divided: ``out`` and what it was divided by, ``totals``, shape (batch, heads,
          q_len); nothing of lightning2;
        - of flash1: ``out``, and ``row_max`` and ``row_sum``, shape (batch, heads, q_len). In "simt" the row maximum
          is in units of log₂: that of log₂e times the scores;
        - of standard: ``probabilities``, shape (batch, heads, q_len, kv_len).

        ``out`` and ``probabilities`` are stored like q, the rest is float32; in "float64" all of it is float64.
    arithmetic
        As for :func:`run`. Where a plan says "reduce", "simt" adds to memory in ascending order of key tiles and query
        heads: to ``dq`` under ``dq="reduce"``, to ``dk`` and ``dv`` under ``grouped_gradients="reduce"``. A GPU's
        atomic additions come in any order, so these bits are no kernel's promise.

    Returns
    -------
    Run
        With ``dq``, ``dk`` and ``dv``; traffic, operations and residency of the backward program alone.

    Raises
    ------
    ValueError, TypeError
        If an argument is unknown or out of range; the message names it, its value and what was expected.
    """
    inputs, options = Inputs.checked(algorithm, {"q": q, "k": k, "v": v, "dout": dout}, options)
    return run_inputs_backward(
        algorithm,
        inputs,
        {
            "scale": scale,
            "causal": causal,
            "window": window,
            "block_mask": block_mask,
            "hardware": hardware,
            "sram_bytes": sram_bytes,
        },
        saved=saved,
        arithmetic=arithmetic,
        plan=plan,
        **options,
    )


def run_inputs_backward(
    algorithm: str,
    inputs: Inputs,
    arguments: Mapping[str, Any],
    *,
    saved: Mapping[str, npt.ArrayLike] | None,
    arithmetic: str,
    plan: Plan | PlanKind | None,
    **options: Any,
) -> Run:
    """Run a backward program on checked inputs; ``arguments`` are those of :func:`run_backward` that are no options."""
    shared = {**inputs.shape_arguments, **arguments}
    request = _request(algorithm, **shared, direction="backward", plan=plan, **options)
    chosen = _checked_arithmetic(arithmetic, request)
    values = inputs.head_major(request.problem, "backward", chosen)
    if saved is None:
        kept = {name: value for name, value in options.items() if name != "tiles"}
        kept |= {name: getattr(request.plan, name) for name in ("repeat_kv", "enforce_capacity", "accumulators")}
        kind = plan if isinstance(plan, str) else None
        before = _request(algorithm, **shared, direction="forward", plan=kind, **kept)
        left = _saved_values(request, _simulated(before, chosen, values))
    else:
        left = _checked_saved(request, chosen, saved)
    machine = _simulated(request, chosen, {**values, **left})
    return _finished(request, machine, **_numbers(request, machine))


def _checked_arithmetic(name: str, request: _Request) -> FloatArithmetic:
    arithmetic, exact = get_arithmetic(name), request.spec.exact_arithmetics.get(request.direction, ())
    if name not in ARITHMETICS and name not in exact:
        raise ValueError(
            f"arithmetic={name!r}: {request.spec.name} {request.direction} fixes no order of operations for it; "
            f"expected one of {[*ARITHMETICS, *exact]}"
        )
    if name not in ARITHMETICS and request.problem.is_float8:
        raise ValueError(f"arithmetic={name!r} with dtype={request.problem.dtype!r}: expected 32- or 16-bit storage")
    return arithmetic.for_problem(request.problem)


def _simulated(request: _Request, arithmetic: FloatArithmetic, values: Mapping[str, Values]) -> Machine:
    machine = _machine(request, arithmetic)
    declare_inputs(machine, request.spec, request.problem, request.direction, request.plan, values)
    for array in machine.arrays.values():
        if array.role == "saved":
            array.values = values[array.name]
    with np.errstate(all="ignore"):  # NaN and Inf are propagated as IEEE says, not reported
        request.spec.programs[request.direction](machine, request.problem, request.plan)
    return machine


@dataclass(frozen=True)
class Inputs:
    """Checked input arrays.

    Attributes
    ----------
    arrays
        Arrays (batch, length, heads, columns), by name; matrices that serve all heads are (rows, columns).
    shape_arguments
        The arguments of a problem that follow from them. The oracle may be given arrays in float64, numbers that it has
        computed and not rounded.
    descales
        Factors (batch, kv_heads) of eight-bit arrays, by the array's name.
    """

    arrays: dict[str, Values]
    shape_arguments: dict[str, Any]
    descales: dict[str, npt.ArrayLike] = field(default_factory=dict)

    @classmethod
    def checked(
        cls,
        algorithm: str,
        given: Mapping[str, npt.ArrayLike],
        options: Mapping[str, Any],
        descales: Mapping[str, npt.ArrayLike | None] | None = None,
    ) -> tuple[Inputs, dict[str, Any]]:
        """Return the inputs, those of the algorithm's problems that are among the options too, and the other options.

        The shapes and types of q, k, v and dout are held against each other, the others' later against the problem.
        """
        problem_class = get_algorithm(algorithm).problem_class
        arrays = {name: np.asarray(array) for name, array in given.items()}
        for name, array in arrays.items():
            if array.ndim != 4:
                raise ValueError(
                    f"{name} has shape {array.shape}: expected 4 dimensions (batch, length, heads, columns)"
                )
            try:
                storage_name(array.dtype)
            except ValueError as error:
                raise TypeError(f"{name}: {error}") from None
            if array.dtype != arrays["q"].dtype:
                raise TypeError(f"{name} has dtype {array.dtype}: expected {arrays['q'].dtype}, as q has")
        dtype = storage_name(arrays["q"].dtype)
        factors = {name: value for name, value in (descales or {}).items() if value is not None}
        if factors and dtype not in FLOAT8:
            raise ValueError(
                f"{next(iter(factors))}_descale is given for dtype {arrays['q'].dtype}: expected eight-bit inputs"
            )
        own = {name: np.asarray(options[name]) for name in problem_class.own_inputs if name in options}
        shape_arguments = {**problem_class.shape_arguments({**arrays, **own}), "dtype": dtype}
        others = {name: value for name, value in options.items() if name not in own}
        for name in set(others) & set(shape_arguments):
            if others.pop(name) != shape_arguments[name]:
                raise ValueError(f"{name}={options[name]!r}: expected {shape_arguments[name]!r}, as the arrays have it")
        return cls({**arrays, **own}, shape_arguments, factors), others

    def head_major(
        self, problem: AttentionProblem, direction: Direction, arithmetic: FloatArithmetic
    ) -> dict[str, Values]:
        """Return the arrays as (batch · kv_heads, group or 1, length, columns), one for all as (1, 1, rows, columns).

        They may be views of what callers gave: programs only read their inputs.

        Raises
        ------
        ValueError, TypeError
            If there are others than the problem's, or one has another shape or type.
        """
        shapes = problem.inputs(direction)
        if set(shapes) != set(self.arrays):
            missing, unknown = (sorted(one - two) for one, two in _both_ways(set(shapes), set(self.arrays)))
            raise TypeError(
                f"the {direction} pass is given {sorted(self.arrays)}"
                + (f", without {missing}" if missing else "")
                + (f", with {unknown} that it does not take" if unknown else "")
                + f": expected {sorted(shapes)}"
            )
        values = {}
        for name, array in self.arrays.items():
            shape = shapes[name]
            self._check(name, shape, problem, arithmetic)
            is_head_minor = shape.given_shape is None and shape.heads != "one"
            ordered = np.moveaxis(array, 2, 1) if is_head_minor else array
            if direction != "decode":  # a decoding step reads its cache once, so copying would cost more than it saves
                ordered = np.ascontiguousarray(ordered)
            streams = 1 if shape.heads == "one" else problem.batch * problem.kv_heads
            group = problem.group_size if shape.heads == "query" else 1
            values[name] = ordered.reshape(streams, group, shape.rows, shape.columns)
        if problem.is_float8:
            for name in "qkv":
                values[f"{name}_descale"] = self._descale(name, problem)
        return values

    def _check(self, name: str, shape: InputShape, problem: AttentionProblem, arithmetic: FloatArithmetic) -> None:
        array, expected = self.arrays[name], shape.user_shape(problem)
        if array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}: expected {expected}")
        if name in problem.own_inputs:
            stored = numpy_dtype(shape.dtype or problem.dtype)
            is_exact = array.dtype == np.float64 == arithmetic.dtype and shape.dtype not in INDEX_DTYPES
            if array.dtype != stored and not is_exact:
                raise TypeError(f"{name} has dtype {array.dtype}: expected {stored}")

    def _descale(self, name: str, problem: AttentionProblem) -> Values:
        shape = (problem.batch, problem.kv_heads)
        factors = np.asarray(self.descales.get(name, np.ones(shape, np.float32)))
        if factors.shape != shape or factors.dtype != np.float32:
            raise ValueError(
                f"{name}_descale has shape {factors.shape} and dtype {factors.dtype}: "
                f"expected float32 of shape {shape}, (batch, kv_heads)"
            )
        return factors.reshape(-1, 1, 1, 1)


def _saved_arrays(request: _Request, arithmetic: FloatArithmetic | None = None) -> dict[str, Array]:
    """Return what the forward pass leaves for the backward pass, in simulations each an array of NaN."""
    machine = Machine(request.problem, arithmetic=arithmetic)
    if "backward" in request.spec.programs:
        request.spec.declare_saved(machine, request.problem, request.plan)
    return machine.arrays


def _saved_values(request: _Request, forward: Machine) -> dict[str, Values]:
    """Return the values that a forward pass left for a backward pass."""
    values = {name: forward.arrays[name].values for name in _saved_arrays(request)}
    return {name: array for name, array in values.items() if array is not None}


def _checked_saved(
    request: _Request, arithmetic: FloatArithmetic, saved: Mapping[str, npt.ArrayLike]
) -> dict[str, Values]:
    """Return the given arrays of a forward pass as (batch · kv_heads, group, rows, columns)."""
    if not isinstance(saved, Mapping):
        raise TypeError(f"saved is a {type(saved).__name__}: expected a mapping of arrays by name")
    expected = _saved_arrays(request, arithmetic)
    if set(saved) != set(expected):
        raise ValueError(
            f"saved has the arrays {sorted(saved)}: expected {sorted(expected)}, as {request.spec.name} forward leaves"
        )
    values = {}
    for name, array in expected.items():
        assert array.values is not None
        given, wanted = np.asarray(saved[name]), _user_layout(array, request.problem)
        if given.shape != wanted.shape:
            raise ValueError(f"saved[{name!r}] has shape {given.shape}: expected {wanted.shape}")
        if given.dtype != wanted.dtype:
            raise TypeError(
                f"saved[{name!r}] has dtype {given.dtype}: expected {wanted.dtype} for {request.problem.dtype} inputs "
                f"and arithmetic={arithmetic.name!r}"
            )
        if given.ndim == 4 and name != "probabilities":
            given = np.moveaxis(given, 2, 1)
        values[name] = np.ascontiguousarray(given).reshape(array.values.shape)
    return values


def _both_ways(one: set[str], two: set[str]) -> tuple[tuple[set[str], set[str]], ...]:
    return (one, two), (two, one)


def _user_layout(array: Array, problem: AttentionProblem) -> Values:
    """Return an array's values as callers see them.

    Rows of columns are (batch, length, heads, columns), scores (batch, heads, q_len, kv_len), statistics (batch,
    heads, q_len), and a matrix for all heads is (rows, columns).
    """
    assert array.values is not None
    if array.heads == "one":
        return array.values.reshape(array.rows, array.columns)
    heads = problem.kv_heads * array.values.shape[1]
    if array.name in STATISTICS:
        return array.values.reshape(problem.batch, heads, array.rows)
    values = array.values.reshape(problem.batch, heads, array.rows, array.columns)
    return values if array.name == "probabilities" else np.ascontiguousarray(np.moveaxis(values, 1, 2))


STATISTICS = ("lse", "row_max", "row_sum", "totals")
"""Arrays with a number for each query row."""


def _numbers(request: _Request, machine: Machine) -> dict[str, Any]:
    """Return what a program computed: its outputs, and the log-sum-exp of a forward pass."""
    given = request.problem.inputs(request.direction)

    def in_user_layout(array: Array) -> Values:
        shape = given[array.name].given_shape if array.name in given else None
        if shape is not None and array.values is not None:  # a state, changed in place
            return array.values.reshape(shape)
        return _user_layout(array, request.problem)

    results = {
        name: in_user_layout(array)
        for name, array in machine.arrays.items()
        if array.values is not None and (array.role == "output" or (name == "lse" and request.direction != "backward"))
    }
    return {**{name: results[name] for name in _NAMED_RESULTS if name in results}, "results": results}


_NAMED_RESULTS = ("out", "lse", "dq", "dk", "dv")
