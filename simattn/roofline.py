"""Time from bytes and operations: rooflines, lower bounds, and published measurements held against them.

Three statements about time are kept apart, because only two of them are bounds.

- *Bound of the program*, ``TimeBounds.seconds``: each resource at its peak, all overlapped perfectly, for the
  bytes and operations of one counted program with its tiles.
- *Bound of the algorithm*, ``TimeBounds.any_plan_seconds``: the same over the resources whose demand does
  not depend on tiles, so it holds for every implementation of the algorithm. Published times are held against
  this one, because the tiles that were measured are not the tiles that were counted.
- *The papers' model*, ``TimeBounds.model_seconds``: all traffic of the multiprocessors at HBM bandwidth. The
  L2 cache serves a part of that traffic, so a measured time may be below the model.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simattn.bounds import compulsory_traffic
from simattn.hardware import HARDWARE, MATMUL_DTYPES, Hardware, get_hardware

if TYPE_CHECKING:
    from simattn.api import Run

ALGORITHMS = ("standard", "flash1", "flash2", "flash3")
"""Algorithms that published times are given for."""

DIRECTIONS = ("forward", "backward", "forward+backward")
"""Passes that published times are given for; "backward" is without its forward."""

RESOURCES = ("dram", "l2", "sram", "matmul", "vector", "exponential")
"""Resources that bound the time of a program."""

ANY_PLAN_RESOURCES = ("dram", "matmul", "exponential")
"""Resources whose demand does not depend on tiles and splits."""


def _largest(seconds: dict[str, float]) -> str:
    return max(seconds, key=seconds.__getitem__)


def _checked_count(name: str, value: Any, smallest: int = 0) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected an integer")
    if count < smallest:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {smallest}")
    return count


def _check_number(name: str, value: Any, *, zero_allowed: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected a number")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        least = "of at least 0" if zero_allowed else "above 0"
        raise ValueError(f"{name}={value!r}: expected a finite number {least}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a program asks of the machine.

    Attributes
    ----------
    hbm_read_bytes, hbm_write_bytes
        Bytes between the multiprocessors and the level below, the papers' HBM accesses. Bytes that are
        reduced into memory travel with the writes.
    sram_bytes
        Bytes read from and written to shared memory.
    matmul_flops
        Operations of matrix products, a multiply-add counted as two.
    vector_flops
        Other float32 operations, a fused multiply-add counted as two.
    exponentials
        Exponentials of the special-function units.
    dtype
        Storage format of the matrix operands.
    compulsory_bytes
        Bytes that must cross the DRAM interface whatever the caches do. From cold caches, with outputs
        written back, that is inputs and outputs once; ``spilled_bytes`` gives a value that holds for warm
        caches too, and for intermediates that are stored. None when it is not known; then DRAM gives no
        bound.

    Raises
    ------
    ValueError, TypeError
        If a count is negative or no integer, or the format is unknown.
    """

    hbm_read_bytes: int
    hbm_write_bytes: int
    sram_bytes: int
    matmul_flops: int
    vector_flops: int
    exponentials: int
    dtype: str
    compulsory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "hbm_read_bytes",
            "hbm_write_bytes",
            "sram_bytes",
            "matmul_flops",
            "vector_flops",
            "exponentials",
        ):
            object.__setattr__(self, name, _checked_count(name, getattr(self, name)))
        if self.compulsory_bytes is not None:
            compulsory = _checked_count("compulsory_bytes", self.compulsory_bytes)
            object.__setattr__(self, "compulsory_bytes", compulsory)
        _check_choice("dtype", self.dtype, MATMUL_DTYPES)

    @property
    def hbm_bytes(self) -> int:
        """Bytes between the multiprocessors and the level below, both directions."""
        return self.hbm_read_bytes + self.hbm_write_bytes


@dataclass(frozen=True, kw_only=True)
class TimeBounds:
    """Seconds that each resource needs at its peak rate; every one is a lower bound by itself.

    Attributes
    ----------
    dram_seconds
        Compulsory bytes at HBM bandwidth; None when they are not known.
    l2_seconds
        The larger of the bytes read and the bytes written by the multiprocessors, at L2 read bandwidth: the
        directions have their own wires, and writing is no faster than reading. None where no L2 bandwidth is
        published.
    sram_seconds
        Shared-memory bytes at the bandwidth of all shared memories.
    matmul_seconds, vector_seconds, exponential_seconds
        Operations at the peak of their units.
    model_seconds
        All bytes of the multiprocessors at HBM bandwidth: the papers' model, not a bound.
    """

    dram_seconds: float | None
    l2_seconds: float | None
    sram_seconds: float
    matmul_seconds: float
    vector_seconds: float
    exponential_seconds: float
    model_seconds: float

    def by_resource(self, resources: Sequence[str] = RESOURCES) -> dict[str, float]:
        """Return the known seconds by resource, in the order given."""
        seconds = {name: getattr(self, f"{name}_seconds") for name in resources}
        return {name: value for name, value in seconds.items() if value is not None}

    @property
    def seconds(self) -> float:
        """Least time of the counted program: all resources overlapped perfectly."""
        return max(self.by_resource().values())

    @property
    def limited_by(self) -> str:
        """Resource that sets ``seconds``."""
        return _largest(self.by_resource())

    @property
    def any_plan_seconds(self) -> float:
        """Least time of the algorithm under any tiles: DRAM, matrix products and exponentials only."""
        return max(self.by_resource(ANY_PLAN_RESOURCES).values())

    @property
    def any_plan_limited_by(self) -> str:
        """Resource that sets ``any_plan_seconds``."""
        return _largest(self.by_resource(ANY_PLAN_RESOURCES))


def work_of(run: Run) -> Work:
    """Return what a counted program asks of a GPU; DRAM must move its inputs and outputs once."""
    traffic, operations = run.traffic, run.operations
    return Work(
        hbm_read_bytes=traffic.hbm_read_bytes,
        hbm_write_bytes=traffic.hbm_write_bytes + traffic.hbm_reduce_bytes,
        sram_bytes=traffic.sram_bytes,
        matmul_flops=operations.matmul_flops,
        vector_flops=operations.vector_flops,
        exponentials=operations.exponentials,
        dtype=run.problem.dtype,
        compulsory_bytes=compulsory_traffic(run.problem, run.direction).hbm_bytes,
    )


def time_bounds(work: Work, hardware: str | Hardware) -> TimeBounds:
    """Return the least time of each resource for ``work``.

    The bounds are hard with respect to the row's published peaks. Three ways exist to go below one: a clock
    above the published one, matrix products that accumulate below float32 on cards where that is faster, and
    exponentials computed by polynomials on the CUDA cores.

    Raises
    ------
    ValueError
        If the hardware is unknown, or has no matrix product of ``work.dtype``.

    Examples
    --------
    >>> work = Work(
    ...     hbm_read_bytes=3_000_000,
    ...     hbm_write_bytes=1_000_000,
    ...     sram_bytes=0,
    ...     matmul_flops=312_000_000,
    ...     vector_flops=0,
    ...     exponentials=0,
    ...     dtype="bfloat16",
    ... )
    >>> time_bounds(work, "A100-40GB").matmul_seconds
    1e-06
    """
    row = get_hardware(hardware)
    return TimeBounds(
        dram_seconds=(None if work.compulsory_bytes is None else work.compulsory_bytes / row.hbm_bytes_per_second),
        l2_seconds=(
            None
            if row.l2_bytes_per_second is None
            else max(work.hbm_read_bytes, work.hbm_write_bytes) / row.l2_bytes_per_second
        ),
        sram_seconds=work.sram_bytes / row.sram_bytes_per_second,
        matmul_seconds=work.matmul_flops / row.matmul_flops_per_second(work.dtype),
        vector_seconds=work.vector_flops / row.vector_flops_per_second,
        exponential_seconds=work.exponentials / row.exponentials_per_second,
        model_seconds=work.hbm_bytes / row.hbm_bytes_per_second,
    )


def spilled_bytes(passes: Iterable[int], hardware: str | Hardware) -> int:
    """Return bytes that must cross the DRAM interface, whatever the L2 cache keeps.

    A pass is one array that the program reads from outside (an input), leaves behind (an output), or hands
    from one kernel to a later one: then the writing is one pass and each kernel that reads it another. Only
    the L2 cache carries data into a program, out of it, and from kernel to kernel. So of the bytes that a
    pass reads, at most the cache's capacity can be present when it starts, and of those that it writes, at
    most the capacity can still be only in the cache when it ends. Each pass moves its distinct bytes less the
    capacity through DRAM, within its own time and direction, so passes add up. Nothing is assumed about cache
    policy, schedule or what ran before; the bound does not hold across kernels that are fused into one.

    Parameters
    ----------
    passes
        Distinct bytes of the array in each pass, over all batch entries and heads.
    hardware
        Row, or its name.

    Raises
    ------
    ValueError, TypeError
        If a pass is negative or no integer, or the hardware is unknown.

    Examples
    --------
    Scores of 1 GiB written by one kernel and read by the next, with 40 MiB of L2:

    >>> spilled_bytes([1 << 30, 1 << 30], "A100-40GB") == 2 * ((1 << 30) - (40 << 20))
    True
    """
    capacity = get_hardware(hardware).l2_bytes
    sizes = (_checked_count(f"passes[{index}]", size) for index, size in enumerate(passes))
    return sum(max(0, size - capacity) for size in sizes)


def arithmetic_intensity(flops: float, bytes_moved: float) -> float:
    """Return operations per byte.

    Raises
    ------
    ValueError, TypeError
        If ``flops`` is negative or ``bytes_moved`` is not above 0.
    """
    _check_number("flops", flops, zero_allowed=True)
    _check_number("bytes_moved", bytes_moved, zero_allowed=False)
    return flops / bytes_moved


def ridge_point(hardware: str | Hardware, dtype: str, level: str = "hbm") -> float:
    """Return the operations per byte above which matrix products, and no longer the memory, limit the speed.

    Parameters
    ----------
    hardware
        Row, or its name.
    dtype
        Storage format of the matrix operands.
    level
        Memory whose bandwidth counts: "hbm", "l2" or "sram".

    Raises
    ------
    ValueError
        If the hardware, its rate for the format or its bandwidth of the level does not exist.
    """
    row = get_hardware(hardware)
    return row.matmul_flops_per_second(dtype) / row.bytes_per_second(level)


def attainable_flops_per_second(intensity: float, hardware: str | Hardware, dtype: str, level: str = "hbm") -> float:
    """Return the roofline: the matrix-product rate that ``intensity`` operations per byte of ``level`` allow.

    Raises
    ------
    ValueError, TypeError
        As ``ridge_point``, or if ``intensity`` is negative or not finite.
    """
    _check_number("intensity", intensity, zero_allowed=True)
    row = get_hardware(hardware)
    return min(row.matmul_flops_per_second(dtype), intensity * row.bytes_per_second(level))


def attention_flops(
    *,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int | None = None,
    head_dim: int,
    value_dim: int | None = None,
    causal: bool = False,
    direction: str = "forward",
) -> int:
    """Return the operations that papers divide by the time to state TFLOP/s.

    Forward is 4 · batch · heads · q_len · kv_len · head_dim: two matrix products. Backward is 2.5 times that:
    five products, the recomputed scores included, also for an algorithm that stores them. Causal halves both.
    Where ``value_dim`` differs, each product is counted with its own size. It is a convention to convert
    rates by and not a count of what a kernel executes.

    Parameters
    ----------
    batch, heads
        Sequences, and query heads of each.
    q_len, kv_len
        Rows of queries and of keys; ``kv_len`` defaults to ``q_len``.
    head_dim, value_dim
        Columns of queries and keys, and of values; ``value_dim`` defaults to ``head_dim``.
    causal
        Whether later keys are masked.
    direction
        "forward", "backward" (without its forward) or "forward+backward".

    Raises
    ------
    ValueError, TypeError
        If a size is not a positive integer or the direction is unknown.

    References
    ----------
    FlashAttention-2 (arXiv 2307.08691), section 4.1; FlashAttention-3 (arXiv 2407.08608), section 4.1.
    """
    sizes = {
        "batch": batch,
        "heads": heads,
        "q_len": q_len,
        "kv_len": q_len if kv_len is None else kv_len,
        "head_dim": head_dim,
        "value_dim": head_dim if value_dim is None else value_dim,
    }
    sizes = {name: _checked_count(name, value, smallest=1) for name, value in sizes.items()}
    _check_choice("direction", direction, DIRECTIONS)
    key, value = sizes.pop("head_dim"), sizes.pop("value_dim")
    forward, backward = key + value, 3 * key + 2 * value
    columns = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]
    # Two operations per multiply-add, halved for causal.
    return math.prod(sizes.values()) * columns * (1 if causal else 2)


@dataclass(frozen=True, kw_only=True)
class PublishedTime:
    """A measurement that a paper states, as a time or as a rate by ``attention_flops``.

    Attributes
    ----------
    statement
        What the source says.
    source
        Paper and figure or table.
    hardware
        Name of the row of the card that was measured.
    algorithm
        One of ``ALGORITHMS``.
    direction
        One of ``DIRECTIONS``.
    dtype
        Storage format.
    batch, heads, q_len, head_dim
        The problem; keys and values have the same lengths, heads and columns.
    causal
        Whether later keys were masked.
    measured_seconds, measured_flops_per_second
        The published number; exactly one of the two.

    Raises
    ------
    ValueError, TypeError
        If a field is out of range, or not exactly one number is given.
    """

    statement: str
    source: str
    hardware: str
    algorithm: str
    direction: str
    dtype: str
    batch: int
    heads: int
    q_len: int
    head_dim: int
    causal: bool
    measured_seconds: float | None = None
    measured_flops_per_second: float | None = None

    def __post_init__(self) -> None:
        for name in ("statement", "source"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name}={text!r}: expected a non-empty string")
        _check_choice("hardware", self.hardware, tuple(HARDWARE))
        _check_choice("algorithm", self.algorithm, ALGORITHMS)
        _check_choice("direction", self.direction, DIRECTIONS)
        _check_choice("dtype", self.dtype, MATMUL_DTYPES)
        for name in ("batch", "heads", "q_len", "head_dim"):
            object.__setattr__(self, name, _checked_count(name, getattr(self, name), smallest=1))
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal={self.causal!r}: expected a bool")
        numbers = ("measured_seconds", "measured_flops_per_second")
        given = [name for name in numbers if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"measured_seconds={self.measured_seconds!r} and "
                f"measured_flops_per_second={self.measured_flops_per_second!r}: expected exactly one of them"
            )
        _check_number(given[0], getattr(self, given[0]), zero_allowed=False)

    @property
    def flops(self) -> int:
        """Operations of the problem by the papers' convention."""
        return attention_flops(
            batch=self.batch,
            heads=self.heads,
            q_len=self.q_len,
            head_dim=self.head_dim,
            causal=self.causal,
            direction=self.direction,
        )

    @property
    def seconds(self) -> float:
        """Published time, converted from the rate where a rate was published."""
        if self.measured_seconds is not None:
            return self.measured_seconds
        assert self.measured_flops_per_second is not None
        return self.flops / self.measured_flops_per_second

    @property
    def flops_per_second(self) -> float:
        """Published rate, converted from the time where a time was published."""
        return self.flops / self.seconds


@dataclass(frozen=True, kw_only=True)
class PublishedCheck:
    """A published time beside its bound.

    Attributes
    ----------
    published
        The measurement.
    bounds
        Seconds of every resource for the counted work.
    """

    published: PublishedTime
    bounds: TimeBounds

    @property
    def bound_seconds(self) -> float:
        """Least time of the algorithm under any tiles."""
        return self.bounds.any_plan_seconds

    @property
    def limited_by(self) -> str:
        """Resource that sets the bound."""
        return self.bounds.any_plan_limited_by

    @property
    def published_seconds(self) -> float:
        """Published time."""
        return self.published.seconds

    @property
    def fraction(self) -> float:
        """Bound divided by published time: how much of the bound's speed was achieved."""
        return self.bound_seconds / self.published_seconds

    @property
    def ok(self) -> bool:
        """Whether the measurement respects the bound; if not, a count, a rate or the bound is wrong."""
        return self.fraction <= 1.0

    def row(self) -> dict[str, str | float | bool]:
        """Return the check as one flat row, for tables, CSV and JSON."""
        return {
            "statement": self.published.statement,
            "hardware": self.published.hardware,
            "algorithm": self.published.algorithm,
            "direction": self.published.direction,
            "published_seconds": self.published_seconds,
            "bound_seconds": self.bound_seconds,
            "limited_by": self.limited_by,
            "fraction": self.fraction,
            "model_seconds": self.bounds.model_seconds,
            "ok": self.ok,
            "source": self.published.source,
        }


_FLASH1 = "FlashAttention (arXiv 2205.14135), Figure 2 left"
_FLASH1_PROCEEDINGS = "FlashAttention (NeurIPS 2022 version), Figure 2 left"
_FLASH2 = "FlashAttention-2 (arXiv 2307.08691)"
_FLASH3 = "FlashAttention-3 (arXiv 2407.08608)"


def _flash1_time(algorithm: str, milliseconds: float, causal: bool, setting: str, source: str) -> PublishedTime:
    """Return an entry of the table in FlashAttention's Figure 2."""
    return PublishedTime(
        statement=f"{algorithm}, forward and backward, {setting}: {milliseconds} ms",
        source=source,
        hardware="A100-40GB",
        algorithm=algorithm,
        direction="forward+backward",
        dtype="float16",
        batch=64,
        heads=16,
        q_len=1024,
        head_dim=64,
        causal=causal,
        measured_seconds=milliseconds / 1000,
    )


def _benchmark_rate(
    algorithm: str,
    teraflops: int,
    *,
    q_len: int,
    head_dim: int,
    direction: str,
    source: str,
    dtype: str = "float16",
    hardware: str = "H100-SXM",
    note: str = "",
) -> PublishedTime:
    """Return a rate from the benchmarks of FlashAttention-2 and 3: 16384 tokens, hidden size 2048."""
    problem = f"{algorithm} {direction}, length {q_len}, head_dim {head_dim}, {dtype}"
    return PublishedTime(
        statement=f"{problem}: {teraflops} TFLOP/s{note}",
        source=source,
        hardware=hardware,
        algorithm=algorithm,
        direction=direction,
        dtype=dtype,
        batch=16384 // q_len,
        heads=2048 // head_dim,
        q_len=q_len,
        head_dim=head_dim,
        causal=False,
        measured_flops_per_second=teraflops * 10**12,
    )


def _training_rate(algorithm: str, teraflops: int, q_len: int) -> PublishedTime:
    """Return a rate of FlashAttention-2's Figure 7a."""
    return _benchmark_rate(
        algorithm,
        teraflops,
        q_len=q_len,
        head_dim=64,
        direction="forward+backward",
        source=f"{_FLASH2}, Figure 7a",
    )


PUBLISHED: tuple[PublishedTime, ...] = (
    # The arXiv figure is of GPT-2 medium, a causal model, and does not say whether masked tiles were skipped.
    # Causal work is the lesser, so its bound holds either way.
    _flash1_time("standard", 41.7, True, "GPT-2 medium", _FLASH1),
    _flash1_time("flash1", 7.3, True, "GPT-2 medium", _FLASH1),
    _flash1_time("standard", 35.1, False, "key-padding mask, no dropout", _FLASH1_PROCEEDINGS),
    _flash1_time("flash1", 11.7, False, "key-padding mask, no dropout", _FLASH1_PROCEEDINGS),
    _training_rate("standard", 62, 512),
    _training_rate("flash1", 157, 512),
    _training_rate("flash2", 215, 512),
    _training_rate("flash1", 168, 16384),
    _training_rate("flash2", 296, 16384),
    _benchmark_rate(
        "flash2",
        230,
        q_len=16384,
        head_dim=128,
        direction="forward",
        hardware="A100-80GB",
        source=f"{_FLASH2}, section 4",
        note=", 73 % of the peak; the maximum over problems, represented by the largest",
    ),
    _benchmark_rate(
        "flash3",
        740,
        q_len=16384,
        head_dim=256,
        direction="forward",
        source=f"{_FLASH3}, abstract",
        note=", 75 % of the peak; the maximum over problems, represented by the fastest",
    ),
    _benchmark_rate("flash3", 756, q_len=16384, head_dim=256, direction="forward", source=f"{_FLASH3}, Figure 5e"),
    _benchmark_rate("flash3", 648, q_len=16384, head_dim=128, direction="forward", source=f"{_FLASH3}, Figure 5c"),
    PublishedTime(
        statement="flash3 forward, length 8448, head_dim 128, float16: 3.538 ms, 661 TFLOP/s",
        source=f"{_FLASH3}, Table 2",
        hardware="H100-SXM",
        algorithm="flash3",
        direction="forward",
        dtype="float16",
        batch=4,
        heads=16,
        q_len=8448,
        head_dim=128,
        causal=False,
        measured_seconds=3.538e-3,
    ),
    _benchmark_rate(
        "flash3",
        1171,
        q_len=16384,
        head_dim=256,
        direction="forward",
        dtype="float8_e4m3fn",
        source=f"{_FLASH3}, Figure 7a",
    ),
)
"""Measurements of the FlashAttention papers."""


def check_published(
    work_for: Callable[[PublishedTime], Work], published: Iterable[PublishedTime] = PUBLISHED
) -> list[PublishedCheck]:
    """Hold published times against the bound of their algorithm.

    The measured kernels used tiles of their own, so the verdict rests on three fields of the work, and they
    must not exceed what any implementation of the algorithm needs: ``compulsory_bytes`` by ``spilled_bytes``,
    because benchmark loops find inputs in the cache and leave outputs there; ``matmul_flops`` of the visible
    scores, where whole tiles on a causal diagonal would be too many; and ``exponentials``, one per visible
    score of each pass that computes them.

    Parameters
    ----------
    work_for
        Gives the counted work of a measurement's problem.
    published
        The measurements.

    Returns
    -------
    list of PublishedCheck
        In the order of ``published``; a fraction above 1 has ``ok`` False.

    Raises
    ------
    ValueError
        If ``work_for`` gives work in another format than was measured.
    """
    checks = []
    for measurement in published:
        work = work_for(measurement)
        if work.dtype != measurement.dtype:
            raise ValueError(
                f"work_for gave dtype={work.dtype!r} for {measurement.statement!r}: expected {measurement.dtype!r}"
            )
        bounds = time_bounds(work, measurement.hardware)
        checks.append(PublishedCheck(published=measurement, bounds=bounds))
    return checks
