"""The calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cupy_kernels.arrays import check_device, device_array, output_array, require_cupy
from cupy_kernels.counting import active_count
from cupy_kernels.flash2 import prepare

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simattn.algorithms.flash2 import Flash2Plan
    from simattn.problem import Window

ALGORITHMS = ("flash2",)
"""Algorithms that :func:`attention` has kernels for; the first is the default."""

_NOT_SUPPORTED = ("bias", "dropout", "softcap", "sinks")


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
    plan: Flash2Plan | None = None,
    **unsupported: Any,
) -> Any:
    """Compute softmax(scale · q kᵀ, masked) v on the GPU.

    The result has the same bits on every device: those of ``simattn.run(algorithm, q, k, v, arithmetic="simt")`` with
    the same plan.

    Parameters
    ----------
    q
        Queries, shape (batch, q_len, heads, head_dim), float32, float16 or bfloat16: a CuPy array, or an array on a
        CUDA device with ``__dlpack__`` or ``__cuda_array_interface__``. The dimensions of heads are multiples of 8
        from 16 to 256. Any strides are taken as long as rows of ``head_dim`` are contiguous and start at multiples of
        16 bytes (float32) or 8 bytes.
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
        "flash2", the default.
    return_lse
        Whether to return the log-sum-exp of the scores too.
    cu_seqlens_q, cu_seqlens_k
        Not taken by "flash2": sequences of one call have the same length.
    out
        Where to write the result: a C-contiguous array of shape (batch, q_len, heads, value_dim), stored like q, that
        overlaps no input. With ``return_lse``, that or a pair ``(out, lse)``.
    plan
        Tiles, on which the bits depend; default :func:`cupy_kernels.default_plan`.

    Returns
    -------
    out
        CuPy array of shape (batch, q_len, heads, value_dim), stored like q, or the array given as ``out``. A row that
        sees no key, or whose scores are all −inf, is 0.
    lse
        With ``return_lse``: natural log-sum-exp, float32, shape (batch, heads, q_len); −inf in such rows.

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
    The kernel runs on CuPy's current stream of the arrays' device and the call does not wait for it. To capture it in
    a CUDA graph, call it once before with the same shapes, which compiles and loads the kernel, and give the results'
    memory by ``out=``, with ``return_lse`` as a pair: then a call with CuPy arrays allocates nothing and waits for
    nothing. Memory of another library's arrays must stay theirs until the stream is done with it.
    """
    if unsupported:
        _refuse(unsupported)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        name = "cu_seqlens_k" if cu_seqlens_q is None else "cu_seqlens_q"
        raise ValueError(
            f"{name} is not taken by flash2: expected None, and one (batch, length, heads, dim) array each"
        )
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} has no kernel: expected one of {ALGORITHMS}")
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
    if cupy.cuda.runtime.getDevice() != device:
        with cupy.cuda.Device(device):
            return _attention(device, q, k, v, scale, causal, window, plan, return_lse, out)
    return _attention(device, q, k, v, scale, causal, window, plan, return_lse, out)


def _attention(
    device: int,
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    causal: bool,
    window: Any,
    plan: Flash2Plan | None,
    return_lse: bool,
    out: Any,
) -> Any:
    """Launch on the current device, which is the arrays'."""
    counted = active_count()
    if causal is not False and causal is not True and not isinstance(causal, np.bool_):
        raise TypeError(f"causal={causal!r}: expected a bool")  # 1 would find what True left in the cache
    if isinstance(window, list):
        window = tuple(window)
    try:
        launch = prepare(
            device,
            *(q.shape, q.strides, q.dtype, k.shape, k.strides, k.dtype, v.shape, v.strides, v.dtype),
            *(scale, causal, window, plan, counted is not None),
        )
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise TypeError(
            f"scale={scale!r}, causal={causal!r}, window={window!r}, plan={plan!r}: expected a number, a bool, a pair "
            "of integers and a simattn plan"
        ) from None
    if out is None:
        result, lse = launch.empty(), launch.empty_lse() if return_lse else None
        launch(q, k, v, result, lse, counted)
        return (result, lse) if return_lse else result
    given, given_lse = _outputs(out, return_lse)
    result, lse = output_array("out", given), None
    if given_lse is not None:
        lse = output_array("lse", given_lse)
    elif return_lse:
        given_lse = lse = launch.empty_lse()
    launch.check_outputs(q, k, v, result, lse)
    launch(q, k, v, result, lse, counted)
    return (given, given_lse) if return_lse else given


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


def _refuse(arguments: Iterable[str]) -> NoReturn:
    name = next(iter(arguments))
    if name in _NOT_SUPPORTED:
        raise TypeError(f"{name}= is not supported: none of {', '.join(_NOT_SUPPORTED)} is")
    raise TypeError(f"attention() got an unexpected keyword argument {name!r}")
