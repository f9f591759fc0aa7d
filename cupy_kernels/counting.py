"""Count the bytes that the kernels themselves move.

Inside :func:`count_traffic` every kernel is launched from a build that adds up the bytes of each of its global loads
and stores, by array. The build used otherwise has no trace of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from cupy_kernels.arrays import require_cupy
from cupy_kernels.program import METADATA
from simattn import ArrayTraffic, Traffic

Counter = tuple[str, str]
"""An array's name, and the counter of :class:`simattn.ArrayTraffic` that a number belongs to, or "metadata"."""


def traffic_of(counters: Sequence[Counter], numbers: Sequence[int]) -> Traffic:
    """Return what numbers count, by array, without metadata."""
    total = Traffic()
    for (array, counter), number in zip(counters, numbers, strict=True):
        if counter == METADATA:
            continue
        total = total + Traffic({array: ArrayTraffic(**{counter: number})})
    return total


def metadata_of(counters: Sequence[Counter], numbers: Sequence[int]) -> dict[str, int]:
    """Return the bytes that numbers count of what is no part of the traffic, by name, without names that have none."""
    total: dict[str, int] = {}
    for (array, counter), number in zip(counters, numbers, strict=True):
        if counter == METADATA and number:
            total[array] = total.get(array, 0) + number
    return total


_active: ContextVar[CountedTraffic | None] = ContextVar("count_traffic", default=None)


class CountedTraffic:
    """What the kernels launched inside a :func:`cupy_kernels.count_traffic` moved."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, tuple[Counter, ...]], Any] = {}
        self._inner: list[CountedTraffic] = []

    def buffer(self, device: int, counters: Sequence[Counter]) -> Any:
        """Return the array of 64-bit counters that kernels on a device add to, one for each counter named.

        Parameters
        ----------
        device
            Number of the device, which must be the current one.
        counters
            What the numbers are, in the kernel's order.
        """
        key = (device, tuple(counters))
        if key not in self._buffers:
            cupy = require_cupy()
            self._buffers[key] = cupy.zeros(len(counters), dtype=cupy.uint64)
            cupy.cuda.get_current_stream().synchronize()  # other streams may launch kernels that count
        return self._buffers[key]

    @property
    def traffic(self) -> Traffic:
        """Bytes moved so far, as a :class:`simattn.Traffic`; waits for the devices to finish."""
        total = Traffic()
        for counters, numbers in self._numbers():
            total = total + traffic_of(counters, numbers)
        for inner in self._inner:
            total = total + inner.traffic
        return total

    @property
    def metadata(self) -> dict[str, int]:
        """Bytes read so far that are no part of ``traffic``, by what for. Waits as that does.

        "schedule" are the words that tell thread blocks their tiles, "sequence_offsets" those of ``cu_seqlens_q`` and
        ``cu_seqlens_k``, "repaired_rows" what was read again of q, k and v for rows that infinite or NaN values of
        hidden keys got into.
        """
        total: dict[str, int] = {}
        found = [metadata_of(counters, numbers) for counters, numbers in self._numbers()]
        for one in (*found, *(inner.metadata for inner in self._inner)):
            for array, number in one.items():
                total[array] = total.get(array, 0) + number
        return total

    def _numbers(self) -> Iterator[tuple[tuple[Counter, ...], list[int]]]:
        """Yield what was counted on every device, once it has finished."""
        for (device, counters), buffer in self._buffers.items():
            with require_cupy().cuda.Device(device) as chosen:
                chosen.synchronize()
                numbers = buffer.get()
            yield counters, numbers.tolist()

    def synchronize(self) -> None:
        """Wait until no kernel adds to the counters, whose memory goes with this object."""
        for device, _ in self._buffers:
            require_cupy().cuda.Device(device).synchronize()

    def __repr__(self) -> str:
        return repr(self.traffic)


@contextlib.contextmanager
def count_traffic() -> Iterator[CountedTraffic]:
    """Count the bytes that kernels read from and write to global memory, by array.

    Kernels launched by this thread inside the ``with`` block are counted, slower than otherwise. Blocks nest: the
    outer one counts what the inner one does too. Leaving a block waits for its kernels; they cannot be captured in a
    graph.

    Yields
    ------
    CountedTraffic
        Its ``traffic`` is a :class:`simattn.Traffic`, equal to ``simattn.count(...).global_only()`` for the same
        problem and plan.

    Raises
    ------
    RuntimeError
        If CuPy is not installed or finds no CUDA device.

    Examples
    --------
    ::

        with cupy_kernels.count_traffic() as counted:
            out, lse = cupy_kernels.attention(q, k, v, return_lse=True)
        print(counted.traffic)
    """
    require_cupy()
    counted, outer = CountedTraffic(), _active.get()
    if outer is not None:
        outer._inner.append(counted)
    token = _active.set(counted)
    try:
        yield counted
    finally:
        _active.reset(token)
        counted.synchronize()


def active_count() -> CountedTraffic | None:
    """Return what the innermost :func:`count_traffic` of this thread counts into, if there is one."""
    return _active.get()
