"""Arrays on the device: what is taken, what is refused, and the arrays that results are written to."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

_DLPACK_CUDA, _DLPACK_MANAGED = 2, 13


@functools.cache
def require_cupy() -> ModuleType:
    """Return CuPy, if there is a device for it.

    Raises
    ------
    RuntimeError
        If CuPy is not installed or finds no CUDA device; the message names the way to run on the CPU.
    """
    try:
        import cupy

        devices = cupy.cuda.runtime.getDeviceCount()
        reason = None if devices else "there is none"
    except ImportError as error:
        reason = f"CuPy is not installed ({error})"
    except Exception as error:  # the driver's error, whose class only CuPy's runtime knows
        reason = f"CuPy finds none ({error})"
    if reason is not None:
        raise RuntimeError(
            f"cupy_kernels runs on a CUDA device, and {reason}; on the CPU, simattn.run(algorithm, q, k, v) runs the "
            "same program"
        )
    return cupy  # type: ignore[no-any-return]


def device_array(name: str, array: Any) -> Any:
    """Return a CuPy array of the same memory, safe to use on CuPy's current stream.

    Parameters
    ----------
    name
        Name of the argument, for messages.
    array
        A CuPy array, or an array on a CUDA device with ``__dlpack__`` or ``__cuda_array_interface__``. Its producer
        is told the current stream of the array's device, or has left its own stream to be waited for.

    Raises
    ------
    TypeError
        If it is no array, or its memory is not on a CUDA device.
    """
    cupy = require_cupy()
    if isinstance(array, cupy.ndarray):
        return array
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    if hasattr(array, "__dlpack_device__") and hasattr(array, "__dlpack__"):
        if int(array.__dlpack_device__()[0]) not in (_DLPACK_CUDA, _DLPACK_MANAGED):
            raise TypeError(_not_on_a_device(name, kind))
        try:
            return cupy.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, NotImplementedError) as error:
            raise TypeError(f"{name} is a {kind} that cannot be shared: {error}") from error
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        pointer = interface["data"][0]
        device = cupy.cuda.runtime.pointerGetAttributes(pointer).device if pointer else cupy.cuda.runtime.getDevice()
        with cupy.cuda.Device(device):
            return cupy.asarray(array)
    if hasattr(array, "__array_interface__") or hasattr(array, "__array__"):
        raise TypeError(_not_on_a_device(name, kind))
    raise TypeError(
        f"{name} is a {kind}: expected an array on a CUDA device, of CuPy or of a library whose arrays have __dlpack__ "
        "or __cuda_array_interface__"
    )


def _not_on_a_device(name: str, kind: str) -> str:
    return (
        f"{name} is a {kind} in host memory: expected an array on a CUDA device, such as cupy.asarray({name}); on the "
        "CPU, simattn.run(algorithm, q, k, v) runs the same program"
    )


def output_array(name: str, array: Any) -> Any:
    """Return a CuPy array of the same memory to write to.

    Raises
    ------
    TypeError
        As :func:`device_array` does.
    ValueError
        If the array says that it is read-only.
    """
    result = device_array(name, array)
    if result is not array:
        try:
            interface = array.__cuda_array_interface__
        except Exception:  # absent, or refused for this dtype, as some libraries do
            return result
        if interface["data"][1]:
            raise ValueError(f"{name} is read-only: expected an array that can be written to")
        if interface["data"][0] != result.data.ptr:
            raise ValueError(f"{name} is a {type(array).__name__} that CuPy copies: expected memory it can share")
    return result


def check_device(name: str, device: int, expected: int) -> None:
    """Raise a ValueError unless an array is on the device of q."""
    if device != expected:
        raise ValueError(f"{name} is on device {device}: expected device {expected}, where q is")


def check_pointer(name: str, pointer: int, alignment: int) -> None:
    """Raise a ValueError unless an array's first element is aligned for the kernel's vector loads."""
    if pointer % alignment:
        raise ValueError(
            f"{name} starts {pointer % alignment} bytes after a multiple of {alignment}: expected memory aligned to "
            f"{alignment} bytes, such as a copy has"
        )


def check_strides(name: str, shape: tuple[int, ...], strides: tuple[int, ...], item_bytes: int, alignment: int) -> None:
    """Raise a ValueError unless rows are contiguous and start at aligned addresses.

    Parameters
    ----------
    name
        Name of the argument.
    shape, strides
        Of the array, strides in bytes.
    item_bytes
        Bytes of an element.
    alignment
        Bytes that the start of every row is a multiple of.
    """
    if shape[-1] > 1 and strides[-1] != item_bytes:
        raise ValueError(
            f"{name} has strides {strides} bytes: expected its last axis to be contiguous, a stride of {item_bytes}; "
            f"cupy.ascontiguousarray({name}) makes a copy that is"
        )
    for axis, (size, stride) in enumerate(zip(shape[:-1], strides, strict=False)):
        if size > 1 and stride % alignment:
            raise ValueError(
                f"{name} has a stride of {stride} bytes along axis {axis}: expected a multiple of {alignment}, so that "
                f"rows can be loaded by vectors; cupy.ascontiguousarray({name}) makes a copy that has"
            )


def extent(shape: tuple[int, ...], strides: tuple[int, ...], item_bytes: int) -> tuple[int, int]:
    """Return the bytes an array spans before and after its first element; (0, 0) if it is empty."""
    if 0 in shape:
        return 0, 0
    steps = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    return sum(step for step in steps if step < 0), sum(step for step in steps if step > 0) + item_bytes


def check_output(name: str, array: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise unless a result can be written to an array of this layout.

    Parameters
    ----------
    name
        Name of the argument.
    array
        A CuPy array.
    shape, dtype
        What it must have.

    Raises
    ------
    TypeError
        If its dtype is another.
    ValueError
        If its shape is another or it is not C-contiguous.
    """
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}: expected {shape}")
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}: expected {dtype}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides} bytes: expected a C-contiguous array")


def check_apart(name: str, start: int, stop: int, taken: Mapping[str, tuple[int, int]]) -> None:
    """Raise a ValueError if memory overlaps that of an array of a call; empty memory overlaps nothing."""
    for other, (first, last) in taken.items():
        if start < last and first < stop and start < stop and first < last:
            raise ValueError(f"{name} overlaps {other} in memory: expected memory of its own")
