"""Storage formats: the bytes an element takes in memory, and its NumPy type."""

from __future__ import annotations

from typing import Any

import numpy as np

ITEM_BYTES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of one element of every storage format of queries, keys and values."""

INDEX_DTYPES = ("int32",)

STORED_BYTES: dict[str, int] = {**ITEM_BYTES, "int32": 4}
"""The same, and of the indices that programs read."""

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def storage_name(dtype: object) -> str:
    """Return the storage format's name.

    Parameters
    ----------
    dtype
        A name in :data:`ITEM_BYTES`, or anything ``numpy.dtype`` takes for one of them.

    Raises
    ------
    ValueError
        If the format is not one that attention is stored in here.
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    if name is None:
        try:
            name = np.dtype(dtype).name  # type: ignore[call-overload]
        except TypeError:
            name = repr(dtype)
    if name not in ITEM_BYTES:
        raise ValueError(f"dtype={name!r} is not a storage format; expected one of {sorted(ITEM_BYTES)}")
    return str(name)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy type of a storage format (``ml_dtypes`` supplies those NumPy lacks)."""
    if name in ("float32", "float16", "int32"):
        return np.dtype(name)
    import ml_dtypes

    stored: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return stored
