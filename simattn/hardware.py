"""One row per GPU: capacities, bandwidths and peak rates, every number with its source.

Rates are peaks at the highest clock the vendor names, so that a time computed from them is a lower bound.
Capacities are binary, as the vendors count memory chips and caches: 40 GB of HBM is 40 · 2³⁰ bytes.
Bandwidths and arithmetic rates are decimal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MATMUL_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""Storage formats of matrix operands that a row may give a rate for."""

MEMORY_LEVELS = ("hbm", "l2", "sram")
"""Levels of the memory hierarchy that have a bandwidth, from the largest to the nearest."""

SRAM_BYTES_PER_CLOCK = 128
"""Bytes per clock of one multiprocessor's shared memory: 32 banks of 4 bytes."""

EXPONENTIALS_PER_CLOCK = 16
"""Base-2 exponentials per clock of one multiprocessor's special-function units."""

_MATMUL = "matmul_flops_per_second"
_COUNTS = (
    "streaming_multiprocessors",
    "sram_bytes_per_block",
    "shared_bytes_per_multiprocessor",
    "sram_bytes_per_multiprocessor",
    "register_bytes_per_block",
    "l2_bytes",
    "hbm_bytes",
)
_RATES = (
    "boost_clock_hz",
    "hbm_bytes_per_second",
    "l2_bytes_per_second",
    "sram_bytes_per_second",
    "vector_flops_per_second",
    "exponentials_per_second",
)


@dataclass(frozen=True)
class Figure:
    """One number and where it was published.

    Attributes
    ----------
    value
        The number; None where nothing citable exists, and then ``source`` says so.
    source
        Document and table, or the derivation from other figures of the row.
    """

    value: int | float | tuple[int, int] | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU as the simulator sees it.

    Attributes
    ----------
    name
        Key of the row in ``HARDWARE``.
    compute_capability
        CUDA compute capability (major, minor).
    streaming_multiprocessors
        Multiprocessors that are enabled.
    sram_bytes_per_block
        Most shared memory one thread block may use, by opt-in.
    shared_bytes_per_multiprocessor
        Most of the multiprocessor's SRAM that can be configured as shared memory.
    sram_bytes_per_multiprocessor
        SRAM of one multiprocessor, shared memory and L1 cache together.
    register_bytes_per_block
        Most bytes of registers one thread block may use.
    l2_bytes
        Capacity of the L2 cache.
    hbm_bytes
        Capacity of the device memory, which is HBM on the data-centre cards and GDDR on the others.
    boost_clock_hz
        Highest published clock of the multiprocessors.
    hbm_bytes_per_second
        Bandwidth of the device memory, reads and writes together.
    l2_bytes_per_second
        Read bandwidth between the L2 cache and the multiprocessors; None where nothing citable exists.
    sram_bytes_per_second
        Bandwidth of all shared memories together.
    vector_flops_per_second
        Float32 operations of the CUDA cores, a fused multiply-add counted as two.
    exponentials_per_second
        Base-2 exponentials of the special-function units.
    matmul_flops_per_second_by_dtype
        Dense matrix-product rate by storage format of the operands, accumulated in float32; "float32" is the
        rate of the CUDA cores, without TF32. A format that the card lacks is absent.
    sources
        Source of every figure, by figure name (see ``figures``).

    Raises
    ------
    ValueError, TypeError
        If a figure is missing, not positive, or has no source; the message names it.

    Examples
    --------
    >>> get_hardware("A100-40GB").hbm_bytes_per_second
    1555000000000
    >>> get_hardware("A100-40GB").source("hbm_bytes_per_second")
    'NVIDIA A100 Tensor Core GPU Architecture whitepaper (2020), Table 4'
    """

    name: str
    compute_capability: tuple[int, int]
    streaming_multiprocessors: int
    sram_bytes_per_block: int
    shared_bytes_per_multiprocessor: int
    sram_bytes_per_multiprocessor: int
    register_bytes_per_block: int
    l2_bytes: int
    hbm_bytes: int
    boost_clock_hz: float
    hbm_bytes_per_second: float
    l2_bytes_per_second: float | None
    sram_bytes_per_second: float
    vector_flops_per_second: float
    exponentials_per_second: float
    matmul_flops_per_second_by_dtype: Mapping[str, float]
    sources: Mapping[str, str] = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r}: expected a non-empty string")
        self._check_capability()
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected an integer")
            if value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
        for name in _RATES:
            if name != "l2_bytes_per_second" or self.l2_bytes_per_second is not None:
                _check_rate(name, getattr(self, name))
        self._check_capacities()
        self._check_matmul()
        self._check_sources()

    def _check_capability(self) -> None:
        capability = self.compute_capability
        if not (
            isinstance(capability, tuple)
            and len(capability) == 2
            and all(isinstance(part, int) and not isinstance(part, bool) and part >= 0 for part in capability)
        ):
            raise ValueError(
                f"compute_capability={capability!r}: expected a pair (major, minor) of integers of at least 0"
            )

    def _check_capacities(self) -> None:
        nested = ("sram_bytes_per_block", "shared_bytes_per_multiprocessor", "sram_bytes_per_multiprocessor")
        for inner, outer in pairwise(nested):
            if getattr(self, inner) > getattr(self, outer):
                raise ValueError(f"{inner}={getattr(self, inner)}: expected at most {outer}={getattr(self, outer)}")

    def _check_matmul(self) -> None:
        rates = self.matmul_flops_per_second_by_dtype
        if not isinstance(rates, Mapping):
            raise TypeError(f"matmul_flops_per_second_by_dtype is a {type(rates).__name__}: expected a mapping")
        for dtype, rate in rates.items():
            if dtype not in MATMUL_DTYPES:
                raise ValueError(
                    f"matmul_flops_per_second_by_dtype has dtype={dtype!r}: expected one of {', '.join(MATMUL_DTYPES)}"
                )
            _check_rate(f"{_MATMUL}[{dtype}]", rate)
        if "float32" not in rates:
            raise ValueError(
                f"matmul_flops_per_second_by_dtype has the formats {sorted(rates)}: expected 'float32' among them"
            )
        object.__setattr__(self, "matmul_flops_per_second_by_dtype", MappingProxyType(dict(rates)))

    def _check_sources(self) -> None:
        if not isinstance(self.sources, Mapping):
            raise TypeError(f"sources is a {type(self.sources).__name__}: expected a mapping")
        expected = {name for name, _ in self._values()}
        if missing := sorted(expected - set(self.sources)):
            raise ValueError(f"sources lacks {', '.join(missing)}: expected a source for every figure")
        if unknown := sorted(set(self.sources) - expected):
            raise ValueError(f"sources names {', '.join(unknown)}: expected only figures of this row")
        for name, source in self.sources.items():
            if not isinstance(source, str) or not source.strip():
                raise ValueError(f"sources[{name!r}]={source!r}: expected a non-empty string")
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))

    def __hash__(self) -> int:
        return hash((self.name, self.compute_capability))

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies cannot be pickled, and rows travel to worker processes.
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        return (_from_fields, (plain,))

    def _values(self) -> Iterator[tuple[str, int | float | tuple[int, int] | None]]:
        yield "compute_capability", self.compute_capability
        for name in (*_COUNTS, *_RATES):
            yield name, getattr(self, name)
        for dtype, rate in self.matmul_flops_per_second_by_dtype.items():
            yield f"{_MATMUL}[{dtype}]", rate

    def figures(self) -> dict[str, Figure]:
        """Return every figure of the row with its source.

        Figures are named as the attributes are, with one ``matmul_flops_per_second[dtype]`` per format.
        """
        return {name: Figure(value, self.sources[name]) for name, value in self._values()}

    def source(self, figure: str) -> str:
        """Return where a figure comes from.

        Raises
        ------
        ValueError
            If the row has no figure of that name.
        """
        if figure not in self.sources:
            raise ValueError(
                f"figure={figure!r}: {self.name} has no such figure, expected one of {', '.join(self.sources)}"
            )
        return self.sources[figure]

    def matmul_flops_per_second(self, dtype: str) -> float:
        """Return the dense matrix-product rate for operands stored as ``dtype``.

        Raises
        ------
        ValueError
            If the card has no matrix product of that format.
        """
        if dtype not in self.matmul_flops_per_second_by_dtype:
            raise ValueError(
                f"dtype={dtype!r}: {self.name} has no matrix product of this format, "
                f"expected one of {', '.join(self.matmul_flops_per_second_by_dtype)}"
            )
        return self.matmul_flops_per_second_by_dtype[dtype]

    def bytes_per_second(self, level: str) -> float:
        """Return the bandwidth of a level of the memory hierarchy, one of "hbm", "l2" and "sram".

        Raises
        ------
        ValueError
            If the level is unknown, or no bandwidth is published for it.
        """
        if level not in MEMORY_LEVELS:
            raise ValueError(f"level={level!r}: expected one of {', '.join(MEMORY_LEVELS)}")
        rate: float | None = getattr(self, f"{level}_bytes_per_second")
        if rate is None:
            raise ValueError(
                f"level={level!r}: no bandwidth is known for {self.name} ({self.source(f'{level}_bytes_per_second')})"
            )
        return rate

    @property
    def sram_bytes_total(self) -> int:
        """SRAM of all multiprocessors together, shared memory and L1 cache."""
        return self.streaming_multiprocessors * self.sram_bytes_per_multiprocessor


def get_hardware(hardware: str | Hardware) -> Hardware:
    """Return the row of that name; a row is returned as it is.

    Raises
    ------
    ValueError
        If no row has that name; the message lists those that exist.
    TypeError
        If it is neither a name nor a row.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if not isinstance(hardware, str):
        raise TypeError(f"hardware={hardware!r} is a {type(hardware).__name__}: expected a name or a Hardware")
    if hardware not in HARDWARE:
        raise ValueError(f"hardware={hardware!r}: expected one of {', '.join(HARDWARE)}")
    return HARDWARE[hardware]


def table() -> list[dict[str, str | int | float | None]]:
    """Return one flat row per figure of every GPU: hardware, figure, value, source.

    The unit is in the figure's name; a value that is not published is None.
    """
    return [
        {
            "hardware": hardware.name,
            "figure": name,
            "value": ".".join(map(str, figure.value)) if isinstance(figure.value, tuple) else figure.value,
            "source": figure.source,
        }
        for hardware in HARDWARE.values()
        for name, figure in hardware.figures().items()
    ]


def _check_rate(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}: expected a finite number above 0")


def _from_fields(values: dict[str, Any]) -> Hardware:
    return Hardware(**values)


_GUIDE = "CUDA Programming Guide, Compute Capabilities"
_GUIDE_SHARED = f"{_GUIDE}, shared memory per thread block and per multiprocessor"
_GUIDE_REGISTERS = f"{_GUIDE}, 64 Ki 32-bit registers per thread block"
_GUIDE_BANKS = "CUDA Programming Guide, shared memory: 32 banks of 32 bits per clock"
_GUIDE_EXP = "CUDA Programming Guide, Arithmetic Instructions: 16 results of exp2f per clock"


def _row(
    name: str,
    compute_capability: tuple[int, int],
    *,
    shared_kib: tuple[int, int],
    matmul: Mapping[str, Figure],
    **published: Figure,
) -> Hardware:
    """Build a row from its published figures; those that follow from the compute capability are added.

    Parameters
    ----------
    shared_kib
        Most shared memory per thread block and per multiprocessor, in KiB.
    matmul
        Matrix-product rates by storage format, "float32" excepted: that is the vector rate.
    published
        The remaining figures, by attribute name.
    """
    multiprocessors = published["streaming_multiprocessors"].value
    clock = published["boost_clock_hz"].value
    assert isinstance(multiprocessors, int)
    assert isinstance(clock, int)
    per_card = f"{multiprocessors} multiprocessors × {clock // 10**6} MHz"
    figures = {
        "compute_capability": Figure(compute_capability, "NVIDIA, CUDA GPU Compute Capability table"),
        "sram_bytes_per_block": Figure(shared_kib[0] * KIB, _GUIDE_SHARED),
        "shared_bytes_per_multiprocessor": Figure(shared_kib[1] * KIB, _GUIDE_SHARED),
        "register_bytes_per_block": Figure(64 * KIB * 4, _GUIDE_REGISTERS),
        "sram_bytes_per_second": Figure(
            multiprocessors * SRAM_BYTES_PER_CLOCK * clock,
            f"derived: {SRAM_BYTES_PER_CLOCK} bytes per clock × {per_card}; {_GUIDE_BANKS}",
        ),
        "exponentials_per_second": Figure(
            multiprocessors * EXPONENTIALS_PER_CLOCK * clock,
            f"derived: {EXPONENTIALS_PER_CLOCK} per clock × {per_card}; {_GUIDE_EXP}",
        ),
        **published,
    }
    rates = {"float32": figures["vector_flops_per_second"], **matmul}
    values: dict[str, Any] = {key: figure.value for key, figure in figures.items()}
    return Hardware(
        name=name,
        matmul_flops_per_second_by_dtype={dtype: _rate(figure) for dtype, figure in rates.items()},
        sources={key: figure.source for key, figure in figures.items()}
        | {f"{_MATMUL}[{dtype}]": figure.source for dtype, figure in rates.items()},
        **values,
    )


def _rate(figure: Figure) -> float:
    assert isinstance(figure.value, (int, float))
    return figure.value


_V100 = "NVIDIA Tesla V100 GPU Architecture whitepaper (2017)"
_V100_TABLE = f"{_V100}, Table 1"
_T4 = "NVIDIA T4 datasheet (2019)"
_T4_BRIEF = "NVIDIA T4 Tensor Core GPU product brief PB-09256-001"
_TURING = "Jia et al., Dissecting the NVidia Turing T4 GPU via Microbenchmarking (arXiv 1903.07486)"
_A100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper (2020)"
_A100_TABLE = f"{_A100}, Table 4"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, Appendix A, GeForce RTX 4090"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper (2022)"
_H100_SHEET = "NVIDIA H100 datasheet, SXM column, without sparsity"
_H200_SHEET = "NVIDIA H200 datasheet, SXM column"
_FLASH3 = "FlashAttention-3 (arXiv 2407.08608), Table 1"
_B200_SHEET = "NVIDIA Blackwell datasheet, individual GPU of HGX B200, without sparsity"
_B200_DEVICE = "device properties of a B200 that CUDA reports, in github.com/pytorch/ao pull request 4002"
_UNPUBLISHED_L2 = "not published by NVIDIA"

_A100_FIGURES: dict[str, Any] = {
    "shared_kib": (163, 164),
    "streaming_multiprocessors": Figure(108, _A100_TABLE),
    "sram_bytes_per_multiprocessor": Figure(192 * KIB, f"{_A100}, combined L1 data cache and shared memory"),
    "l2_bytes": Figure(40 * MIB, f"{_A100_TABLE}: 40960 KB"),
    "boost_clock_hz": Figure(1_410_000_000, _A100_TABLE),
    "l2_bytes_per_second": Figure(
        5120 * 1_410_000_000, f"derived: 5120 bytes read per clock × 1410 MHz; {_A100}, A100 L2 cache"
    ),
    "vector_flops_per_second": Figure(19_500_000_000_000, _A100_TABLE),
    "matmul": {
        "float16": Figure(312_000_000_000_000, _A100_TABLE),
        "bfloat16": Figure(312_000_000_000_000, _A100_TABLE),
    },
}

# Tensor-core peaks of Hopper are published at 1830 MHz and CUDA-core peaks at 1980 MHz. The derived rates
# take the higher clock, so that they stay upper bounds.
_HOPPER_FIGURES: dict[str, Any] = {
    "shared_kib": (227, 228),
    "streaming_multiprocessors": Figure(132, f"{_H100}, Table 3"),
    "sram_bytes_per_multiprocessor": Figure(256 * KIB, f"{_H100}, combined L1 data cache and shared memory"),
    "l2_bytes": Figure(50 * MIB, f"{_H100}, Table 3"),
    "boost_clock_hz": Figure(
        1_980_000_000,
        f"derived: float32 peak 66.9 TFLOP/s / (132 × 128 × 2); {_H100}; tensor-core peaks are at 1830 MHz",
    ),
    "l2_bytes_per_second": Figure(12_000_000_000_000, f"{_FLASH3}, for the H100 SXM5"),
    "vector_flops_per_second": Figure(66_900_000_000_000, f"{_H100}, peak rates of H100 SXM5"),
    "matmul": {
        "float16": Figure(989_400_000_000_000, f"{_H100}, peak rates of H100 SXM5"),
        "bfloat16": Figure(989_400_000_000_000, f"{_H100}, peak rates of H100 SXM5"),
        "float8_e4m3fn": Figure(1_978_900_000_000_000, f"{_H100}, peak rates of H100 SXM5"),
        "float8_e5m2": Figure(1_978_900_000_000_000, f"{_H100}, peak rates of H100 SXM5"),
    },
}

_ROWS = (
    _row(
        "V100-SXM2-32GB",
        (7, 0),
        shared_kib=(96, 96),
        streaming_multiprocessors=Figure(80, _V100_TABLE),
        sram_bytes_per_multiprocessor=Figure(128 * KIB, f"{_V100}, combined L1 data cache and shared memory"),
        l2_bytes=Figure(6 * MIB, f"{_V100_TABLE}: 6144 KB"),
        hbm_bytes=Figure(32 * GIB, "NVIDIA V100 datasheet, SXM2"),
        boost_clock_hz=Figure(1_530_000_000, _V100_TABLE),
        hbm_bytes_per_second=Figure(900_000_000_000, "NVIDIA V100 datasheet, SXM2"),
        l2_bytes_per_second=Figure(
            2048 * 1_530_000_000,
            f"derived: 2048 bytes read per clock × 1530 MHz; {_A100}, A100 L2 cache, comparison with V100",
        ),
        vector_flops_per_second=Figure(15_700_000_000_000, _V100_TABLE),
        matmul={"float16": Figure(125_000_000_000_000, _V100_TABLE)},
    ),
    _row(
        "T4",
        (7, 5),
        shared_kib=(64, 64),
        streaming_multiprocessors=Figure(40, _TURING),
        sram_bytes_per_multiprocessor=Figure(
            96 * KIB, "NVIDIA Turing GPU Architecture whitepaper (2018), combined L1 and shared memory"
        ),
        l2_bytes=Figure(4 * MIB, f"{_TURING}: 4096 KiB"),
        hbm_bytes=Figure(16 * GIB, f"{_T4}; GDDR6"),
        boost_clock_hz=Figure(1_590_000_000, _T4_BRIEF),
        hbm_bytes_per_second=Figure(320_000_000_000, f"{_T4_BRIEF}: up to 320 GB/s"),
        l2_bytes_per_second=Figure(None, _UNPUBLISHED_L2),
        vector_flops_per_second=Figure(8_100_000_000_000, _T4),
        matmul={"float16": Figure(65_000_000_000_000, f"{_T4}, mixed precision")},
    ),
    _row(
        "A100-40GB",
        (8, 0),
        hbm_bytes=Figure(40 * GIB, _A100_TABLE),
        hbm_bytes_per_second=Figure(1_555_000_000_000, _A100_TABLE),
        **_A100_FIGURES,
    ),
    _row(
        "A100-80GB",
        (8, 0),
        hbm_bytes=Figure(80 * GIB, "NVIDIA A100 80GB datasheet, SXM"),
        hbm_bytes_per_second=Figure(2_039_000_000_000, "NVIDIA A100 80GB datasheet, SXM"),
        **_A100_FIGURES,
    ),
    _row(
        "RTX-4090",
        (8, 9),
        shared_kib=(99, 100),
        streaming_multiprocessors=Figure(128, _ADA),
        sram_bytes_per_multiprocessor=Figure(128 * KIB, f"{_ADA}: L1 data cache and shared memory"),
        l2_bytes=Figure(72 * MIB, f"{_ADA}: 73728 KB"),
        hbm_bytes=Figure(24 * GIB, f"{_ADA}; GDDR6X"),
        boost_clock_hz=Figure(2_520_000_000, _ADA),
        hbm_bytes_per_second=Figure(1_008_000_000_000, _ADA),
        l2_bytes_per_second=Figure(None, _UNPUBLISHED_L2),
        vector_flops_per_second=Figure(82_600_000_000_000, _ADA),
        matmul={
            "float16": Figure(165_200_000_000_000, f"{_ADA}, float32 accumulation"),
            "bfloat16": Figure(165_200_000_000_000, f"{_ADA}, float32 accumulation"),
            "float8_e4m3fn": Figure(330_300_000_000_000, f"{_ADA}, float32 accumulation"),
            "float8_e5m2": Figure(330_300_000_000_000, f"{_ADA}, float32 accumulation"),
        },
    ),
    _row(
        "H100-SXM",
        (9, 0),
        hbm_bytes=Figure(80 * GIB, _H100_SHEET),
        hbm_bytes_per_second=Figure(3_350_000_000_000, _H100_SHEET),
        **_HOPPER_FIGURES,
    ),
    _row(
        "H200",
        (9, 0),
        hbm_bytes=Figure(141 * GIB, _H200_SHEET),
        hbm_bytes_per_second=Figure(4_800_000_000_000, _H200_SHEET),
        **_HOPPER_FIGURES,
    ),
    _row(
        "B200",
        (10, 0),
        shared_kib=(227, 228),
        streaming_multiprocessors=Figure(148, _B200_DEVICE),
        sram_bytes_per_multiprocessor=Figure(
            256 * KIB, "NVIDIA Blackwell Tuning Guide, unified shared memory, L1 and texture cache"
        ),
        l2_bytes=Figure(253 * MIB // 2, f"{_B200_DEVICE}: 126.5 MB"),
        hbm_bytes=Figure(180 * GIB, _B200_SHEET),
        boost_clock_hz=Figure(
            1_965_000_000, "maximum SM clock that nvidia-smi reports on DGX B200; not published by NVIDIA"
        ),
        hbm_bytes_per_second=Figure(7_700_000_000_000, _B200_SHEET),
        l2_bytes_per_second=Figure(None, _UNPUBLISHED_L2),
        vector_flops_per_second=Figure(75_000_000_000_000, _B200_SHEET),
        matmul={
            "float16": Figure(2_250_000_000_000_000, _B200_SHEET),
            "bfloat16": Figure(2_250_000_000_000_000, _B200_SHEET),
            "float8_e4m3fn": Figure(4_500_000_000_000_000, _B200_SHEET),
            "float8_e5m2": Figure(4_500_000_000_000_000, _B200_SHEET),
        },
    ),
)

HARDWARE: Mapping[str, Hardware] = MappingProxyType({row.name: row for row in _ROWS})
"""The GPUs by name."""
