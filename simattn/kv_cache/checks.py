"""Checks of arguments that the modules of this package share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

LIMIT = 1 << 52
"""Counts stay below this, so that float64 holds them exactly and that the sum of many is an int64."""

Integers = npt.NDArray[np.int64]


def checked_count(name: str, value: Any, *, least: int = 1) -> int:
    """Return an integer of at least ``least`` and below :data:`LIMIT`, or raise an error that names the argument."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected an integer")
    if value < least:
        raise ValueError(f"{name}={value}: expected an integer of at least {least}")
    if value >= LIMIT:
        raise ValueError(f"{name}={value}: expected an integer below 2^52")
    return int(value)


def checked_number(name: str, value: Any, *, least: float = 0.0) -> float:
    """Return a finite number above ``least``, or raise an error that names the argument."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected a number")
    if not (math.isfinite(value) and value > least):
        raise ValueError(f"{name}={value!r}: expected a finite number above {least:g}")
    return float(value)


def checked_integers(name: str, values: Any, *, least: int) -> Integers:
    """Return a read-only vector of integers of at least ``least``, or raise an error that names the argument."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}: expected one dimension")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}: expected integers")
    if array.size and not least <= array.min() <= array.max() < LIMIT:
        place = array.argmin() if array.min() < least else array.argmax()
        raise ValueError(f"{name}[{place}]={array[place]}: expected integers of at least {least}, below 2^52")
    array = array.astype(np.int64)
    array.setflags(write=False)
    return array
