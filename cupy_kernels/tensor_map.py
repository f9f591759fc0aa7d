"""Tensor maps: what the tensor memory accelerator (TMA) of a Hopper GPU is told about an array.

A kernel copies boxes of an array of up to five axes between global and shared memory; what a box has outside the array
arrives as zeros and is never written. The map holds the array's address, its axes and the box. The driver encodes it;
the CPU build reads a plain record instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from cupy_kernels.parameters import MAP_BYTES
from cupy_kernels.program import Array, Boxes
from simattn.arithmetic.formats import ITEM_BYTES

ADDRESS_MULTIPLE = 16
"""Bytes that the first element and every stride are multiples of."""

SLAB_COLUMNS = 64
"""Columns of a box: 128 bytes, the unit in which shared memory is swizzled."""

LARGEST_STRIDE = 1 << 40
RAGGED_ROWS = 1 << 30
"""Rows along the axis at whose end every sequence of a ragged array ends."""

RAGGED_STRIDE = 1 << 34
"""So many bytes times ``RAGGED_ROWS`` are none, modulo 2^64."""

MOST_BOX_ROWS = 256

MAP_ALIGNMENT = 64
"""Where the driver writes a map: at a multiple of so many bytes."""

DATA_TYPES = {"float16": 6, "bfloat16": 9}
INTERLEAVE_NONE, SWIZZLE_128_BYTES, L2_PROMOTION_256_BYTES, FILL_ZEROS = 0, 3, 3, 0
"""Numbers of cuda.h: ``CUtensorMapDataType`` and what is asked for beyond extents. What lies outside the array arrives
as zeros."""

CPU_RECORD = struct.Struct("<4sIQII5I5I4Q")
"""``cpu::TensorMapRecord``: mark, padding, address, bytes of an element, axes, their extents, those of the box, bytes
between the elements of each axis but the first."""

CPU_MARK = b"BOX\0"


@functools.cache
def _encode_tiled() -> Callable[..., int]:
    """Return the driver's function, by its name alone: bindings look up all those of their CUDA version."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    encode: Callable[..., int] = driver.cuTensorMapEncodeTiled
    return encode


@dataclass(frozen=True)
class TensorMap:
    """A map without its address.

    Attributes
    ----------
    array
        Name of the array, for messages.
    dtype
        Its storage format.
    extents
        Elements along each axis, the adjacent ones first; at least 1.
    strides
        Bytes between the elements of each axis but the first.
    box
        Elements of a box along each axis.
    """

    array: str
    dtype: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def __post_init__(self) -> None:
        for stride in self.strides:
            if not 0 <= stride < LARGEST_STRIDE or stride % ADDRESS_MULTIPLE:
                raise ValueError(
                    f"{self.array} has a stride of {stride} bytes: the kernel takes multiples of {ADDRESS_MULTIPLE} "
                    f"from 0 to 2^40; a contiguous copy has such"
                )
        if max(self.box) > MOST_BOX_ROWS:
            raise ValueError(f"{self.array} is copied by boxes of {self.box}: expected at most {MOST_BOX_ROWS} rows")

    @classmethod
    def of(cls, array: Array, boxes: Boxes, strides: tuple[int, int, int]) -> TensorMap:
        """Return the map of a matrix that is copied by boxes of rows.

        Parameters
        ----------
        array
            The matrix.
        boxes
            How it is copied.
        strides
            Elements between batch entries, rows and heads.
        """
        item = array.numpy_dtype.itemsize
        batch, row, head = (stride * item for stride in strides)
        if boxes.ragged:
            return cls._ragged(array, boxes, row, head)
        packed = boxes.packed_heads
        extents: tuple[int, ...]
        steps: tuple[int, ...]
        box: tuple[int, ...]
        if packed is None:
            extents = (array.columns, array.rows, array.heads, array.batch)
            steps, box = (row, head, batch), (boxes.rows, 1, 1)
        else:
            # A position's packed heads follow one another, then the next position.
            together = min(packed, boxes.rows)
            extents = (array.columns, packed, array.rows, array.heads // packed, array.batch)
            steps, box = (head, row, head * packed, batch), (together, boxes.rows // together, 1, 1)
        # The stride of an axis of one element is never used; the driver wants a plausible one.
        used = tuple(
            step if extent > 1 else max(steps[0], ADDRESS_MULTIPLE)
            for step, extent in zip(steps, extents[1:], strict=True)
        )
        return cls(array.name, array.dtype, tuple(max(1, extent) for extent in extents), used, (SLAB_COLUMNS, *box))

    @classmethod
    def _ragged(cls, array: Array, boxes: Boxes, row: int, head: int) -> TensorMap:
        """Return the map of an array whose sequences follow one another along its rows, a stride of bytes apart.

        Axes: columns, row, end, one more, heads. The row of a sequence is asked for by its number less the sequence's
        length plus ``RAGGED_ROWS``, so that the sequence ends where the second axis does and what follows is outside
        the array; by the row of the array at which the sequence ends; and by ``RAGGED_ROWS`` along the fourth axis,
        which takes ``RAGGED_ROWS`` rows off again: addresses are sums modulo 2^64.
        """
        if row >= RAGGED_STRIDE:
            raise ValueError(f"{array.name} has a stride of {row} bytes from row to row: expected less than 2^34")
        row = row if array.rows > 1 else ADDRESS_MULTIPLE
        head = head if array.heads > 1 else ADDRESS_MULTIPLE
        extents = (array.columns, RAGGED_ROWS, array.rows + 1, RAGGED_ROWS + 1, array.heads)
        return cls(
            array.name,
            array.dtype,
            extents,
            (row, row, RAGGED_STRIDE - row, head),
            (SLAB_COLUMNS, boxes.rows, 1, 1, 1),
        )

    def encode(self, address: int) -> bytes:
        """Return the map as the device takes it.

        Raises
        ------
        RuntimeError
            If the driver does not take it.
        """
        rank = len(self.extents)
        room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        place = -(-ctypes.addressof(room) // MAP_ALIGNMENT) * MAP_ALIGNMENT
        status = _encode_tiled()(
            ctypes.c_void_p(place),
            DATA_TYPES[self.dtype],
            ctypes.c_uint32(rank),
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*self.extents),
            (ctypes.c_uint64 * (rank - 1))(*self.strides),
            (ctypes.c_uint32 * rank)(*self.box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            INTERLEAVE_NONE,
            SWIZZLE_128_BYTES,
            L2_PROMOTION_256_BYTES,
            FILL_ZEROS,
        )
        if status:
            raise RuntimeError(f"the driver encodes no tensor map of {self} at {address:#x}: CUresult {status}")
        return ctypes.string_at(place, MAP_BYTES)

    def cpu_record(self, address: int) -> bytes:
        """Return the map as the CPU build takes it."""

        def padded(numbers: tuple[int, ...], length: int) -> tuple[int, ...]:
            return (*numbers, *(1,) * (length - len(numbers)))

        record = CPU_RECORD.pack(
            CPU_MARK,
            0,
            address,
            ITEM_BYTES[self.dtype],
            len(self.extents),
            *padded(self.extents, 5),
            *padded(self.box, 5),
            *padded(self.strides, 4),
        )
        return record.ljust(MAP_BYTES, b"\0")
