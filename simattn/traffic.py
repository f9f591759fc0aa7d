"""Traffic: how many bytes moved, by level of the memory hierarchy, direction and array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType


@dataclass(frozen=True)
class ArrayTraffic:
    """Bytes moved for one array or on-chip tile.

    Attributes
    ----------
    hbm_read_bytes, hbm_write_bytes
        Bytes copied from the memory below the multiprocessor into it, and back.
    hbm_reduce_bytes
        Bytes sent to be added to memory in place; counted once, not as a read and a write.
    sram_read_bytes, sram_write_bytes
        Bytes that operations and copies read from and wrote to on-chip SRAM.
    """

    hbm_read_bytes: int = 0
    hbm_write_bytes: int = 0
    hbm_reduce_bytes: int = 0
    sram_read_bytes: int = 0
    sram_write_bytes: int = 0

    def __add__(self, other: ArrayTraffic) -> ArrayTraffic:
        if not isinstance(other, ArrayTraffic):
            return NotImplemented
        return ArrayTraffic(*(getattr(self, name) + getattr(other, name) for name in COUNTERS))

    def __mul__(self, times: int) -> ArrayTraffic:
        if not isinstance(times, int):
            return NotImplemented
        return ArrayTraffic(*(getattr(self, name) * times for name in COUNTERS))

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in COUNTERS)


COUNTERS = tuple(field.name for field in fields(ArrayTraffic))
"""Names of the byte counters."""


@dataclass(frozen=True, eq=False, repr=False)
class Traffic:
    """Byte counters of a program: immutable, additive, exact at any size.

    ``hbm_*`` is what the papers call HBM accesses: bytes between a multiprocessor and the memory level below
    it. Arrays that moved nothing do not appear, so two equal programs have equal traffic.

    Attributes
    ----------
    by_array
        The counters of each array.

    Examples
    --------
    >>> one = Traffic({"q": ArrayTraffic(hbm_read_bytes=8)})
    >>> (one + one).hbm_read_bytes
    16
    >>> one + one == 2 * one
    True
    """

    by_array: Mapping[str, ArrayTraffic]

    def __init__(self, by_array: Mapping[str, ArrayTraffic] | None = None) -> None:
        kept = {name: counters for name, counters in sorted((by_array or {}).items()) if counters}
        object.__setattr__(self, "by_array", MappingProxyType(kept))

    def __add__(self, other: Traffic) -> Traffic:
        if not isinstance(other, Traffic):
            return NotImplemented
        total = dict(self.by_array)
        for name, counters in other.by_array.items():
            total[name] = total.get(name, ArrayTraffic()) + counters
        return Traffic(total)

    def __mul__(self, times: int) -> Traffic:
        if not isinstance(times, int):
            return NotImplemented
        return Traffic({name: counters * times for name, counters in self.by_array.items()})

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Traffic):
            return NotImplemented
        return dict(self.by_array) == dict(other.by_array)

    def __hash__(self) -> int:
        return hash(tuple(self.by_array.items()))

    def __reduce__(self) -> tuple[type[Traffic], tuple[dict[str, ArrayTraffic]]]:
        return (Traffic, (dict(self.by_array),))

    @property
    def hbm_read_bytes(self) -> int:
        """Bytes read from the level below the multiprocessors."""
        return self._total("hbm_read_bytes")

    @property
    def hbm_write_bytes(self) -> int:
        """Bytes written to the level below the multiprocessors."""
        return self._total("hbm_write_bytes")

    @property
    def hbm_reduce_bytes(self) -> int:
        """Bytes added in place to the level below the multiprocessors."""
        return self._total("hbm_reduce_bytes")

    @property
    def hbm_bytes(self) -> int:
        """Bytes read, written and reduced."""
        return self.hbm_read_bytes + self.hbm_write_bytes + self.hbm_reduce_bytes

    @property
    def sram_read_bytes(self) -> int:
        """Bytes that operations read from on-chip SRAM."""
        return self._total("sram_read_bytes")

    @property
    def sram_write_bytes(self) -> int:
        """Bytes written to on-chip SRAM."""
        return self._total("sram_write_bytes")

    @property
    def sram_bytes(self) -> int:
        """Bytes read from and written to on-chip SRAM."""
        return self.sram_read_bytes + self.sram_write_bytes

    def _total(self, counter: str) -> int:
        return sum(getattr(counters, counter) for counters in self.by_array.values())

    def global_only(self) -> Traffic:
        """Return the traffic with the SRAM counters left out."""
        return Traffic(
            {
                name: ArrayTraffic(counters.hbm_read_bytes, counters.hbm_write_bytes, counters.hbm_reduce_bytes)
                for name, counters in self.by_array.items()
            }
        )

    def rows(self) -> Iterator[dict[str, str | int]]:
        """Yield one flat row per array, then the total."""
        for name, counters in self.by_array.items():
            yield {"array": name, **asdict(counters)}
        yield {"array": "total", **{counter: self._total(counter) for counter in COUNTERS}}

    def __repr__(self) -> str:
        from simattn.tables import text_table

        heads = ["array", *(name.removesuffix("_bytes").replace("_", " ") for name in COUNTERS)]
        body = [[str(row["array"]), *(f"{row[name]:,}" for name in COUNTERS)] for row in self.rows()]
        return "Traffic, bytes\n" + text_table(heads, body)
