"""The calls."""

from __future__ import annotations

import functools
import numbers
from typing import TYPE_CHECKING, Any, NoReturn, overload

import numpy as np

from cupy_kernels.arrays import (
    check_device,
    check_pointer,
    device_array,
    output_array,
    require_cupy,
)
from cupy_kernels.counting import active_count
from cupy_kernels.explanation import explanation_of
from cupy_kernels.launch import (
    WORKSPACE_ALIGNMENT,
    Launch,
    check_layout,
    checked_problem,
    kept_in_workspace,
    prepare,
    present_hardware,
    row_alignment,
)
from cupy_kernels.program import workspace_layout
from cupy_kernels.ragged import OFFSETS
from cupy_kernels.table import candidates, choose, get_algorithm
from simattn.hardware import get_hardware
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem, checked_window

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cupy_kernels.explanation import Explanation
    from simattn.hardware import Hardware
    from simattn.plan import Plan
    from simattn.problem import Direction, Window

_NOT_SUPPORTED = ("bias", "dropout", "softcap", "sinks")
_INPUTS: tuple[str, ...] = ("q", "k", "v")
_RAGGED_INPUTS = (*_INPUTS, *OFFSETS)
_NOTHING: frozenset[str] = frozenset()


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    algorithm: str | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    out: Any = None,
    plan: Plan | None = None,
    return_saved: bool = False,
    workspace: Any = None,
    **unsupported: Any,
) -> Any:
    """Compute softmax(scale · q kᵀ, masked) v on the GPU.

    With one plan, the result has the same bits on every device: those of
    ``simattn.run(algorithm, q, k, v, arithmetic="simt", plan=plan)``. Where products are computed by tensor cores, as
    they are by default for 16-bit inputs on compute capability 8.0 and later, the arithmetic is "mma" ("hopper" for
    "flash3"), which models Hopper: other tensor cores add products in other ways. :func:`explain` says what is run.

    Parameters
    ----------
    q
        Queries, shape (batch, q_len, heads, head_dim), float32, float16 or bfloat16: a CuPy array, or an array on a
        CUDA device with ``__dlpack__`` or ``__cuda_array_interface__``. The dimensions of heads are multiples of 8
        from 8 to 256. Any strides are taken as long as rows of ``head_dim`` are contiguous and start at multiples of
        16 bytes, or of 8 bytes of 16-bit numbers on CUDA cores; "flash3" takes no negative ones.
    k
        Keys, shape (batch, kv_len, kv_heads, head_dim), where ``kv_heads`` divides ``heads``; stored like q.
    v
        Values, shape (batch, kv_len, kv_heads, value_dim); stored like q.
    scale
        Factor of the scores; default 1/√head_dim.
    causal
        Hide the keys after the query's own position, sequences aligned at their ends. Visible elements with two
        queries on five keys and five queries on two keys::

            1 1 1 1 0        0 0
            1 1 1 1 1        0 0
                             0 0
                             1 0
                             1 1
    window
        ``(left, right)`` keys seen on either side of the query's position, both ends included; None is no limit.
    algorithm
        "flash3", for 16-bit inputs on compute capability 9.0 (Hopper); "flash2"; "flash1", whose output goes through
        memory once for every tile of keys; or "standard", whose scores and probabilities do. Default: the one that
        ``plan`` is of; without a plan "flash3" if it takes the inputs on their device, otherwise "flash2".
    return_lse
        Whether to return the log-sum-exp of the scores too.
    cu_seqlens_q, cu_seqlens_k
        For sequences with lengths of their own, which "flash3" takes: both or neither, contiguous int32 arrays on the
        device of one number more than there are sequences, ascending from 0. Sequence i has the rows
        ``cu_seqlens_q[i]:cu_seqlens_q[i + 1]`` of q and of the results, and the rows
        ``cu_seqlens_k[i]:cu_seqlens_k[i + 1]`` of k and v; either may be none. Shapes have no batch axis then: q
        (rows, heads, head_dim), k and v (rows, kv_heads, ...), out (rows, heads, value_dim), lse (heads, rows). The
        masks are each sequence's, and what other sequences hold, NaN or Inf, never matters. The host does not look at
        the numbers: rows that belong to no sequence are not written, and numbers that are no such offsets lead to
        results of other rows, never outside the arrays.
    out
        Where to write the result: a C-contiguous array of shape (batch, q_len, heads, value_dim), stored like q, that
        overlaps no input. With ``return_lse``, that or a pair ``(out, lse)``.
    plan
        Tiles, on which the bits depend; default :func:`cupy_kernels.default_plan`.
    return_saved
        Whether to return what :func:`attention_backward` needs too.
    workspace
        Memory for what "flash1" and "standard" keep in between: a C-contiguous array of at least
        :func:`workspace_bytes` bytes that overlaps nothing else. Default: taken from CuPy's pool for the time of the
        call.

    Returns
    -------
    out
        CuPy array of shape (batch, q_len, heads, value_dim), stored like q, or the array given as ``out``. A row that
        sees no key, or whose scores are all −inf, is 0.
    lse
        With ``return_lse``: natural log-sum-exp, float32, shape (batch, heads, q_len); −inf in such rows.
    saved
        With ``return_saved``: a mapping of CuPy arrays, "out" and "lse" of "flash2" and "flash3"; "out", "row_max" and
        "row_sum" of "flash1", the maximum in units of log₂; "probabilities" of "standard", shape (batch, heads, q_len,
        kv_len).

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; the message names it, what it was and what was expected. Nothing is
        launched or written then.
    RuntimeError
        If CuPy is not installed, there is no CUDA device, the device is not supported or has too little shared memory,
        or a kernel does not compile.
    cupy.cuda.memory.OutOfMemoryError
        If the results do not fit in the device's memory.

    Notes
    -----
    The kernels run on CuPy's current stream of the arrays' device and the call does not wait for them. To capture it in
    a CUDA graph, call it once before with the same shapes, which compiles and loads the kernels, and give the results'
    memory by ``out=``, with ``return_lse`` as a pair, and ``workspace=`` where there is one: then a call with CuPy
    arrays allocates nothing and waits for nothing. Memory of another library's arrays must stay theirs until the stream
    is done with it.
    """
    if unsupported:
        _refuse("attention", unsupported)
    cupy = require_cupy()
    ndarray = cupy.ndarray
    if q.__class__ is not ndarray:
        q = device_array("q", q)
    if k.__class__ is not ndarray:
        k = device_array("k", k)
    if v.__class__ is not ndarray:
        v = device_array("v", v)
    device = q.data.device_id
    if k.data.device_id != device:
        check_device("k", k.data.device_id, device)
    if v.data.device_id != device:
        check_device("v", v.data.device_id, device)
    offsets: tuple[Any, ...] = ()
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        offsets = _offsets(device, cu_seqlens_q, cu_seqlens_k)
    arguments = (q, k, v, offsets, scale, causal, window, algorithm, plan, return_lse, return_saved, out, workspace)
    if cupy.cuda.runtime.getDevice() != device:
        with cupy.cuda.Device(device):
            return _attention(device, *arguments)
    return _attention(device, *arguments)


def _attention(
    device: int,
    q: Any,
    k: Any,
    v: Any,
    offsets: tuple[Any, ...],
    scale: float | None,
    causal: bool,
    window: Any,
    algorithm: str | None,
    plan: Plan | None,
    return_lse: bool,
    return_saved: bool,
    out: Any,
    workspace: Any,
) -> Any:
    """Launch on the current device, which is the arrays'."""
    counted = active_count()
    described = (q.shape, q.strides, q.dtype, k.shape, k.strides, k.dtype, v.shape, v.strides, v.dtype)
    names, starts = _INPUTS, (q.data.ptr, k.data.ptr, v.data.ptr)
    if offsets:
        names = _RAGGED_INPUTS
        described += tuple(part for array in offsets for part in (array.shape, array.strides, array.dtype))
        starts += tuple(array.data.ptr for array in offsets)
    launch = _prepared(
        device, algorithm, "forward", names, scale, causal, window, plan, False, counted is not None, described
    )
    addresses = [*starts, *launch.no_addresses]
    launch.check_addresses(addresses)
    _check_flag("return_lse", return_lse)
    _check_flag("return_saved", return_saved)
    wanted = _wanted(launch.algorithm, bool(return_lse), bool(return_saved))
    results: dict[str, Any] = {}
    given = given_lse = None
    if out is not None:
        given, given_lse = _outputs(out, return_lse)
        taken = launch.taken(addresses)
        for name, array in (("out", given), ("lse", given_lse)):
            if array is not None:
                results[name] = output_array(name, array)
                launch.check_output(name, results[name], taken)
    for name in wanted:
        if name not in results:
            results[name] = launch.empty(name)
        addresses[launch.slot[name]] = results[name].data.ptr
    launch(addresses, wanted, workspace, counted)
    first = results["out"] if given is None else given
    if not return_lse and not return_saved:
        return first
    returned = [first]
    if return_lse:
        returned.append(results["lse"] if given_lse is None else given_lse)
    if return_saved:
        returned.append({name: results[name] for name in get_algorithm(launch.algorithm).saved})
    return tuple(returned)


def _offsets(device: int, *given: Any) -> tuple[Any, ...]:
    """Return the arrays of offsets of sequences, which are on the device of q."""
    arrays = []
    for name, array in zip(OFFSETS, given, strict=True):
        if array is None:
            (other,) = set(OFFSETS) - {name}
            raise ValueError(f"{name} is missing beside {other}: expected both, or neither")
        arrays.append(device_array(name, array))
        check_device(name, arrays[-1].data.device_id, device)
    return tuple(arrays)


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any = None,
    lse: Any = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    deterministic: bool = False,
    algorithm: str | None = None,
    saved: Mapping[str, Any] | None = None,
    gradients: tuple[Any, Any, Any] | None = None,
    plan: Plan | None = None,
    workspace: Any = None,
    **unsupported: Any,
) -> tuple[Any, Any, Any]:
    """Compute the gradients of :func:`attention` on the GPU.

    With one plan, the results have the same bits on every device, those of
    ``simattn.run_backward(algorithm, q, k, v, dout, arithmetic="simt", saved=saved, plan=plan)``; all but what the plan
    has added up in no fixed order: dq of "flash2" unless ``deterministic``, and dk and dv of grouped heads where
    ``plan.grouped_gradients`` is "reduce".

    Parameters
    ----------
    dout
        Gradient of the output, shape (batch, q_len, heads, value_dim), stored like q.
    q, k, v
        As :func:`attention` had them.
    out, lse
        What :func:`attention` returned with ``return_lse``: shape (batch, q_len, heads, value_dim) stored like q, and
        (batch, heads, q_len) float32. "flash2" needs both, here or in ``saved``; what an algorithm does not need is
        not looked at.
    scale, causal, window
        As :func:`attention` had them.
    deterministic
        Whether dq must have the same bits every time. By default "flash2" adds up the parts of dq in float32 in
        whatever order they are ready, which is faster; with ``deterministic`` a second kernel computes the scores
        again. A plan that adds in no fixed order is refused.
    algorithm
        "flash2", which also takes what "flash3" saved, "flash1" or "standard". Default: the one that ``plan`` is of,
        without a plan "flash2".
    saved
        What :func:`attention` returned with ``return_saved``; with ``out`` and ``lse`` it need not be given to
        "flash2".
    gradients
        Where to write the results: C-contiguous arrays (dq, dk, dv), shaped and stored like q, k and v, that overlap no
        input.
    plan
        Default: :func:`cupy_kernels.default_plan` for the backward direction.
    workspace
        Memory for what the program keeps in between: a C-contiguous array of at least :func:`workspace_bytes` bytes
        that overlaps nothing else. Default: taken from CuPy's pool for the time of the call.

    Returns
    -------
    dq, dk, dv
        CuPy arrays shaped and stored like q, k and v, or the arrays given as ``gradients``. What no query sees has
        gradient 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; the message names it, what it was and what was expected. Nothing is
        launched or written then.
    RuntimeError
        If CuPy is not installed, there is no CUDA device, the device is not supported or has too little shared memory,
        or a kernel does not compile.
    cupy.cuda.memory.OutOfMemoryError
        If results and workspace do not fit in the device's memory.

    Notes
    -----
    Streams and graphs are as for :func:`attention`; to capture a call, give ``gradients`` and ``workspace``.
    """
    if unsupported:
        _refuse("attention_backward", unsupported)
    needed = candidates(algorithm, plan)[0].saved  # all that may run without a name take the same
    cupy = require_cupy()
    given = {"q": q, "k": k, "v": v, "dout": dout, **_saved(needed, saved, out=out, lse=lse)}
    for name, array in given.items():
        if array.__class__ is not cupy.ndarray:
            given[name] = device_array(name, array)
    device = given["q"].data.device_id
    for name, array in given.items():
        if array.data.device_id != device:
            check_device(name, array.data.device_id, device)
    if gradients is not None and (not isinstance(gradients, (tuple, list)) or len(gradients) != 3):
        raise TypeError(f"gradients is a {type(gradients).__name__}: expected three arrays (dq, dk, dv)")
    arguments = (given, scale, causal, window, algorithm, plan, deterministic, gradients, workspace)
    if cupy.cuda.runtime.getDevice() != device:
        with cupy.cuda.Device(device):
            return _attention_backward(device, *arguments)
    return _attention_backward(device, *arguments)


def _attention_backward(
    device: int,
    given: dict[str, Any],
    scale: float | None,
    causal: bool,
    window: Any,
    algorithm: str | None,
    plan: Plan | None,
    deterministic: bool,
    gradients: Any,
    workspace: Any,
) -> tuple[Any, Any, Any]:
    """Launch on the current device, which is the arrays'."""
    counted = active_count()
    _check_flag("deterministic", deterministic)
    described = tuple(part for array in given.values() for part in (array.shape, array.strides, array.dtype))
    launch = _prepared(
        device, algorithm, "backward", tuple(given), scale, causal, window, plan, bool(deterministic),
        counted is not None, described,
    )  # fmt: skip
    addresses = [*(given[name].data.ptr for name in launch.inputs), *launch.no_addresses]
    launch.check_addresses(addresses)
    names = ("dq", "dk", "dv")
    if gradients is None:
        results = tuple(launch.empty(name) for name in names)
    else:
        results = tuple(output_array(name, array) for name, array in zip(names, gradients, strict=True))
        taken = launch.taken(addresses)
        for name, result in zip(names, results, strict=True):
            launch.check_output(name, result, taken)
    for name, result in zip(names, results, strict=True):
        addresses[launch.slot[name]] = result.data.ptr
    launch(addresses, _NOTHING, workspace, counted)
    return results if gradients is None else tuple(gradients)


def _saved(needed: tuple[str, ...], saved: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    """Return what the forward pass saved, from the mapping and from arguments of their own, as far as it is needed."""
    if saved is not None and not hasattr(saved, "keys"):
        raise TypeError(f"saved is a {type(saved).__name__}: expected the mapping that attention returned")
    found = dict(saved or {}) | {name: array for name, array in named.items() if array is not None}
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} of the forward pass is missing: expected {', '.join(needed)}, which attention "
            "returns with return_saved=True"
        )
    return {name: found[name] for name in needed}


def workspace_bytes(
    q: Any,
    k: Any,
    v: Any,
    *,
    direction: Direction = "forward",
    causal: bool = False,
    window: Window | None = None,
    algorithm: str | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_saved: bool = False,
    plan: Plan | None = None,
) -> int:
    """Return the bytes that the ``workspace`` of a call must have.

    Parameters
    ----------
    q, k, v
        Arrays as the call has them; only shape and dtype matter.
    direction
        "forward" for :func:`attention`, "backward" for :func:`attention_backward`.
    causal, window, algorithm, deterministic, return_lse, return_saved, plan
        As the call has them.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As the call does.
    """
    arrays = {name: device_array(name, array) for name, array in (("q", q), ("k", k), ("v", v))}
    _check_flag("causal", causal)
    problem = checked_problem(arrays, scale=None, causal=causal, window=window)
    hardware = present_hardware(arrays["q"].data.device_id)
    chosen = choose(algorithm, direction, problem, plan, hardware, deterministic=deterministic)
    wanted = _wanted(chosen.algorithm.name, return_lse, return_saved) if direction == "forward" else _NOTHING
    return workspace_layout(kept_in_workspace(chosen.program, wanted), WORKSPACE_ALIGNMENT)[1]


@overload
def explain(
    q: AttentionProblem,
    /,
    *,
    hardware: str | Hardware = ...,
    algorithm: str | None = ...,
    direction: Direction = ...,
    deterministic: bool = ...,
    plan: Plan | None = ...,
) -> Explanation: ...


@overload
def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    algorithm: str | None = ...,
    direction: Direction = ...,
    cu_seqlens_q: Any = ...,
    cu_seqlens_k: Any = ...,
    deterministic: bool = ...,
    plan: Plan | None = ...,
) -> Explanation: ...


def explain(
    q: Any,
    k: Any = None,
    v: Any = None,
    *,
    hardware: str | Hardware | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    algorithm: str | None = None,
    direction: Direction = "forward",
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    deterministic: bool = False,
    plan: Plan | None = None,
) -> Explanation:
    """Say what a call would run on the arrays' device, and why; or, of a problem, on any GPU.

    Nothing is compiled or launched. A problem needs neither CuPy nor a GPU.

    Parameters
    ----------
    q
        Queries as the call has them, or a :class:`simattn.AttentionProblem` in place of the arrays, scale and mask.
    k, v
        Keys and values as the call has them.
    hardware
        For a problem: name or row of a GPU; default "H100-SXM".
    scale, causal, window, algorithm, plan
        As the call has them.
    direction
        "forward" for :func:`attention`, "backward" for :func:`attention_backward`.
    cu_seqlens_q, cu_seqlens_k
        As :func:`attention` has them.
    deterministic
        As :func:`attention_backward` has it.

    Returns
    -------
    Explanation
        Algorithm, plan, kernels and the arithmetic that repeats their bits; the reasons, and for every other algorithm
        why it does not run. Its ``repr`` is a table.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As the call does; and if arrays and a problem's arguments are mixed.

    Examples
    --------
    >>> import simattn
    >>> problem = simattn.AttentionProblem(heads=16, q_len=4096, head_dim=128, dtype="bfloat16", causal=True)
    >>> explained = explain(problem, hardware="A100-40GB")
    >>> explained.algorithm, explained.kernels[0].units
    ('flash2', 'mma.sync')
    >>> explained.others["flash3"]
    "refused: algorithm='flash3' runs on compute capability 9.0 (Hopper), and A100-40GB has 8.0: ..."
    """
    _check_flag("causal", causal)
    _check_flag("deterministic", deterministic)
    arrays: dict[str, Any] = {}
    if isinstance(q, AttentionProblem):
        beside = {"k": k, "v": v, "scale": scale, "causal": causal or None, "window": window}
        beside |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        for name, value in beside.items():
            if value is not None:
                raise TypeError(f"{name} is given beside a problem, which describes it: expected arrays or a problem")
        problem, gpu = q, get_hardware(DEFAULT_HARDWARE if hardware is None else hardware)
        device_name = gpu.name
    else:
        if hardware is not None:
            raise TypeError("hardware is given beside arrays, which are on a device: expected an AttentionProblem")
        arrays = {name: device_array(name, array) for name, array in (("q", q), ("k", k), ("v", v))}
        device = arrays["q"].data.device_id
        for name, array in arrays.items():
            check_device(name, array.data.device_id, device)
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            arrays |= zip(OFFSETS, _offsets(device, cu_seqlens_q, cu_seqlens_k), strict=True)
        if scale is not None:
            scale = _number("scale", scale)
        if window is not None:
            window = checked_window(window)
        problem = checked_problem(arrays, scale=scale, causal=bool(causal), window=window)
        gpu = present_hardware(device)
        properties = require_cupy().cuda.runtime.getDeviceProperties(device)
        device_name = f"{gpu.name} ({properties['name'].decode()})"
    chosen = choose(algorithm, direction, problem, plan, gpu, deterministic=deterministic)
    for name, array in arrays.items():
        described = chosen.program.array[name]
        check_layout(chosen.program, described, array)
        check_pointer(name, array.data.ptr, row_alignment(chosen.program, described))
    return explanation_of(
        chosen,
        direction,
        gpu,
        algorithm_given=algorithm is not None,
        plan_given=plan is not None,
        device_name=device_name,
    )


def _prepared(
    device: int,
    algorithm: str | None,
    direction: Direction,
    names: tuple[str, ...],
    scale: float | None,
    causal: bool,
    window: Any,
    plan: Plan | None,
    deterministic: bool,
    count_traffic: bool,
    described: tuple[Any, ...],
) -> Launch:
    """Return the launch for the arguments of a call, its options brought to what they are cached by."""
    _check_flag("causal", causal)
    if scale is not None and scale.__class__ is not float:
        scale = _number("scale", scale)
    if window is not None:
        window = checked_window(window)
    try:
        return prepare(
            device, algorithm, direction, names, scale, causal, window, plan, deterministic, count_traffic, described
        )
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        candidates(algorithm, plan)
        raise TypeError(f"plan is a {type(plan).__name__}: expected a simattn plan") from None


def _check_flag(name: str, value: object) -> None:
    """Raise a TypeError unless an option is a bool; 1 would find what True left in a cache."""
    if value is not False and value is not True and not isinstance(value, np.bool_):
        raise TypeError(f"{name}={value!r}: expected a bool")


def _number(name: str, value: Any) -> float:
    """Return a real number as a float.

    Raises
    ------
    TypeError
        If it is none.
    ValueError
        If a float cannot hold it.
    """
    if not isinstance(value, (numbers.Real, np.number)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is an integer of {len(str(value))} digits: expected one that a float holds") from None


@functools.cache
def _wanted(algorithm: str, return_lse: bool, return_saved: bool) -> frozenset[str]:
    """Return the names of the results that a forward call makes arrays for."""
    saved = get_algorithm(algorithm).saved if return_saved else ()
    return frozenset({"out", *(("lse",) if return_lse else ()), *saved})


def _outputs(out: Any, return_lse: bool) -> tuple[Any, Any]:
    """Return the caller's arrays for the output and, if given, for the log-sum-exp."""
    if not isinstance(out, (tuple, list)):
        return out, None
    if not return_lse:
        raise TypeError(f"out={type(out).__name__} of {len(out)} is for return_lse=True: expected one array")
    if len(out) != 2:
        raise TypeError(f"out={type(out).__name__} of {len(out)}: expected an array or a pair (out, lse)")
    if out[1] is None:
        raise TypeError("out has lse=None: expected an array, or out=array alone")
    return out[0], out[1]


def _refuse(function: str, arguments: Iterable[str]) -> NoReturn:
    name = next(iter(arguments))
    if name in _NOT_SUPPORTED:
        raise TypeError(f"{name}= is not supported: none of {', '.join(_NOT_SUPPORTED)} is")
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
