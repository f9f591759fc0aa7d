"""FlashAttention-2 forward on the GPU, the host's side: from arrays and a plan to a kernel, its grid and arguments.

What follows from shapes, strides and options alone is worked out once and kept, so that a further call with the same
ones only fills in addresses and launches.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from cupy_kernels import compiler
from cupy_kernels.arrays import check_output, check_pointer, check_strides, extent, require_cupy
from cupy_kernels.compiler import Variant
from cupy_kernels.counting import CountedTraffic
from cupy_kernels.parameters import (
    COLUMN_BUCKETS,
    FLASH2_COUNTERS,
    FLASH2_FORWARD_TILES,
    FLASH2_PARAMETERS,
    STORAGE_TYPES,
    Flash2Forward,
    check_supported,
    column_bucket,
    flash2_parameters,
)
from simattn.algorithms.flash2 import Flash2Plan
from simattn.arithmetic.formats import ITEM_BYTES
from simattn.hardware import Hardware, get_hardware
from simattn.plan import Tiles
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem, Window

SMALLER_TILES = (Tiles(q=64, kv=64), Tiles(q=64, kv=32), Tiles(q=32, kv=32), Tiles(q=32, kv=16), Tiles(q=16, kv=16))
"""Tiles for devices with too little shared memory for the best ones, from large to small."""

ADDRESSES = ("q", "k", "v", "out", "lse", "counters")
SMALLEST_SPARE_BYTES = 1 << 20


# Plans and kernels


def default_plan(problem: AttentionProblem, hardware: str | Hardware = DEFAULT_HARDWARE) -> Flash2Plan:
    """Return the plan that :func:`cupy_kernels.attention` uses when none is given.

    It depends on the device only if the device has too little shared memory for the best tiles.

    Parameters
    ----------
    problem
        The problem.
    hardware
        Name or row of a GPU.

    Raises
    ------
    ValueError
        If the kernels do not take the problem, or no tiles fit.
    """
    best = FLASH2_FORWARD_TILES[column_bucket(problem)]
    smaller = [tiles for tiles in SMALLER_TILES if tiles.q * tiles.kv < best.q * best.kv]
    plans = [Flash2Plan(tiles=tiles) for tiles in (best, *smaller)]
    for plan in plans[:-1]:
        check_supported(problem, plan)
        try:
            Flash2Forward.of(problem, plan, hardware)
        except ValueError:
            continue
        return plan
    Flash2Forward.of(problem, plans[-1], hardware)
    return plans[-1]


def check_plan(problem: AttentionProblem, plan: Flash2Plan, hardware: str | Hardware) -> Flash2Forward:
    """Return the build of the kernel that runs a plan.

    Fields of the plan that decide nothing but on-chip traffic are taken as they are.

    Raises
    ------
    TypeError
        If it is no plan of flash2.
    ValueError
        If there is no kernel for it.
    """
    if not isinstance(plan, Flash2Plan):
        raise TypeError(f"plan is a {type(plan).__name__}: expected a simattn.algorithms.flash2.Flash2Plan")
    depth = plan.tiles.depth
    if depth is not None and depth < max(problem.head_dim, problem.value_dim):
        raise ValueError(f"plan.tiles.depth={depth}: expected None, the kernel takes all columns at a time")
    if plan.accumulators != "registers":
        raise ValueError(f"plan.accumulators={plan.accumulators!r}: expected 'registers', where the kernel has them")
    return Flash2Forward.of(problem, plan, hardware)


def variant_of(kernel: Flash2Forward, *, count_traffic: bool) -> Variant:
    """Return what to compile for a build."""
    return Variant("flash2.cu", "flash2_forward", tuple(kernel.macros(count_traffic=count_traffic).items()))


def variants(hardware: str | Hardware = DEFAULT_HARDWARE) -> Iterator[Variant]:
    """Yield the kernels of the default plans of a GPU, for compiling ahead."""
    for dtype in STORAGE_TYPES:
        for columns in COLUMN_BUCKETS:
            problem = AttentionProblem(q_len=1, head_dim=columns, dtype=dtype)
            kernel = Flash2Forward.of(problem, default_plan(problem, hardware), hardware)
            for count_traffic in (False, True):
                yield variant_of(kernel, count_traffic=count_traffic)


@cache
def present_hardware(device: int) -> Hardware:
    """Return a row with the shared memory of a device; what else it says is of another GPU."""
    chosen = require_cupy().cuda.Device(device)
    attributes = chosen.attributes
    per_multiprocessor = attributes["MaxSharedMemoryPerMultiprocessor"]
    return replace(
        get_hardware(DEFAULT_HARDWARE),
        name=f"device {device}",
        sram_bytes_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
        shared_bytes_per_multiprocessor=per_multiprocessor,
        sram_bytes_per_multiprocessor=max(
            per_multiprocessor, get_hardware(DEFAULT_HARDWARE).sram_bytes_per_multiprocessor
        ),
    )


@cache
def _loaded(variant: Variant, shared_bytes: int, device: int) -> Any:
    """Return a kernel on the current device, whose number this is."""
    return compiler.load(variant, dynamic_shared_bytes=shared_bytes)


# Launches


def _address_writer() -> Any:
    """Return the function that writes the addresses into the parameters, at the start of which they stand."""
    assert FLASH2_PARAMETERS.fields is not None
    assert [FLASH2_PARAMETERS.fields[name][1] for name in ADDRESSES] == [8 * index for index in range(len(ADDRESSES))]
    return struct.Struct(f"{len(ADDRESSES)}Q").pack_into


_write_addresses = _address_writer()


@dataclass(frozen=True)
class Description:
    """Shape, strides in bytes and dtype of an array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any


class Launch:
    """A kernel with everything but the addresses.

    Parameters
    ----------
    device
        Number of the device, which must be the current one.
    problem, plan
        What it computes.
    inputs
        q, k and v.
    count_traffic
        Whether it counts its traffic.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If there is no kernel for it, or it does not compile.
    """

    def __init__(
        self,
        device: int,
        problem: AttentionProblem,
        plan: Flash2Plan | None,
        inputs: Mapping[str, Description],
        *,
        count_traffic: bool,
    ) -> None:
        hardware = present_hardware(device)
        self.device, self.dtype = device, inputs["q"].dtype
        kernel = check_plan(problem, default_plan(problem, hardware) if plan is None else plan, hardware)
        self.out_shape = (problem.batch, problem.q_len, problem.heads, problem.value_dim)
        self.lse_shape = (problem.batch, problem.heads, problem.q_len)
        self.lse_bytes = 4 * math.prod(self.lse_shape)
        self.alignment = row_alignment(problem.dtype)
        self.extents = {name: extent(given.shape, given.strides, problem.item_bytes) for name, given in inputs.items()}
        self.grid, self.block, self.shared_bytes = (kernel.grid(problem),), (kernel.threads,), kernel.shared_bytes
        # CuPy passes an array of one element by value, and one without named fields fastest.
        self.parameters = _parameters(problem, inputs).view(f"V{FLASH2_PARAMETERS.itemsize}")
        self.function = None
        if self.grid[0]:
            self.function = _loaded(variant_of(kernel, count_traffic=count_traffic), self.shared_bytes, device)

    def empty(self) -> Any:
        """Return a new array for the output."""
        return require_cupy().ndarray(self.out_shape, self.dtype)

    def empty_lse(self) -> Any:
        """Return a new array for the log-sum-exp."""
        return require_cupy().ndarray(self.lse_shape, np.float32)

    def check_outputs(self, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
        """Raise unless the results can be written to the caller's arrays; see :func:`check_output`."""
        taken = {
            name: (array.data.ptr + self.extents[name][0], array.data.ptr + self.extents[name][1])
            for name, array in (("q", q), ("k", k), ("v", v))
        }
        check_output("out", out, self.out_shape, self.dtype, self.device, taken)
        check_pointer("out", out.data.ptr, self.alignment)
        if lse is not None:
            taken["out"] = (out.data.ptr, out.data.ptr + out.nbytes)
            check_output("lse", lse, self.lse_shape, np.dtype(np.float32), self.device, taken)

    def __call__(self, q: Any, k: Any, v: Any, out: Any, lse: Any, counted: CountedTraffic | None) -> None:
        """Launch on CuPy's current stream.

        Parameters
        ----------
        q, k, v
            Arrays as they were described.
        out, lse
            Arrays for the results; None for a log-sum-exp that nobody wants.
        counted
            What to count the traffic into, if the kernel counts.
        """
        q_address, k_address, v_address = q.data.ptr, k.data.ptr, v.data.ptr
        if (q_address | k_address | v_address) % self.alignment:
            for name, address in (("q", q_address), ("k", k_address), ("v", v_address)):
                check_pointer(name, address, self.alignment)
        if self.function is None:
            return
        parameters = self.parameters.copy()  # one for each call: other threads launch at the same time
        _write_addresses(
            parameters,
            0,
            q_address,
            k_address,
            v_address,
            out.data.ptr,
            _spare_address(self.device, self.lse_bytes) if lse is None else lse.data.ptr,
            0 if counted is None else counted.buffer(self.device, FLASH2_COUNTERS).data.ptr,
        )
        self.function(self.grid, self.block, (parameters,), self.shared_bytes)


def row_alignment(dtype: str) -> int:
    """Return the bytes that rows start at multiples of: four elements."""
    return 4 * ITEM_BYTES[dtype]


def _parameters(problem: AttentionProblem, inputs: Mapping[str, Description]) -> Any:
    strides = {name: _element_strides(given, problem.item_bytes) for name, given in inputs.items()}
    row = problem.heads * problem.value_dim
    strides["out"] = (problem.q_len * row, row, problem.value_dim)
    return flash2_parameters(problem, {}, strides)


def _element_strides(given: Description, item_bytes: int) -> tuple[int, int, int]:
    """Return the strides of batch, row and head in elements, 0 along an axis of length 1."""
    steps = [stride // item_bytes if size > 1 else 0 for size, stride in zip(given.shape, given.strides, strict=True)]
    return steps[0], steps[1], steps[2]


_spare: dict[int, list[Any]] = {}


def _spare_address(device: int, size: int) -> int:
    """Return an address to store what nobody asked for, as the program does nevertheless.

    The memory is never read and never given back, so that any stream and any captured graph may write to it.
    """
    held = _spare.get(device)
    if held is None or held[-1].size < size:
        larger = max(size, SMALLEST_SPARE_BYTES, 2 * held[-1].size if held else 0)
        _spare[device] = held = [*(held or []), require_cupy().cuda.Memory(larger)]
    address: int = held[-1].ptr
    return address


# Preparation


@lru_cache(maxsize=4096)
def prepare(
    device: int,
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    q_dtype: Any,
    k_shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    k_dtype: Any,
    v_shape: tuple[int, ...],
    v_strides: tuple[int, ...],
    v_dtype: Any,
    scale: float | None,
    causal: bool,
    window: Window | None,
    plan: Flash2Plan | None,
    count_traffic: bool,
) -> Launch:
    """Return the launch for arrays of these shapes and strides (in bytes), checked, on the current device.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`cupy_kernels.attention` does.
    """
    inputs = {
        "q": Description(q_shape, q_strides, q_dtype),
        "k": Description(k_shape, k_strides, k_dtype),
        "v": Description(v_shape, v_strides, v_dtype),
    }
    problem = checked_problem(inputs, scale=scale, causal=causal, window=window)
    return Launch(device, problem, plan, inputs, count_traffic=count_traffic)


def checked_problem(
    inputs: Mapping[str, Description], *, scale: float | None, causal: bool, window: Window | None
) -> AttentionProblem:
    """Return the problem that q, k and v pose.

    Raises
    ------
    TypeError, ValueError
        If the kernels do not take it; the message names the argument.
    """
    for name, given in inputs.items():
        if len(given.shape) != 4:
            raise ValueError(f"{name} has shape {given.shape}: expected 4 dimensions (batch, length, heads, columns)")
        if given.dtype.name not in STORAGE_TYPES:
            raise TypeError(f"{name} has dtype {given.dtype}: expected one of {', '.join(STORAGE_TYPES)}")
        if given.dtype != inputs["q"].dtype:
            raise TypeError(f"{name} has dtype {given.dtype}: expected {inputs['q'].dtype}, as q has")
    q, k, v = (inputs[name].shape for name in "qkv")
    for name, shape, expected in (("k", k, (q[0], *k[1:3], q[3])), ("v", v, (*k[:3], v[3]))):
        if shape != expected:
            raise ValueError(f"{name} has shape {shape}: expected {expected} for q of shape {q} and k of shape {k}")
    smallest, largest = COLUMN_BUCKETS[0], COLUMN_BUCKETS[-1]
    for name, columns in (("head_dim", q[3]), ("value_dim", v[3])):
        if columns % 8 or not smallest <= columns <= largest:
            raise ValueError(f"{name}={columns}: expected a multiple of 8 from {smallest} to {largest}")
    problem = AttentionProblem(
        batch=q[0],
        heads=q[2],
        kv_heads=k[2],
        q_len=q[1],
        kv_len=k[1],
        head_dim=q[3],
        value_dim=v[3],
        dtype=inputs["q"].dtype.name,
        scale=scale,  # type: ignore[arg-type]
        causal=causal,
        window=window,
    )
    for name, given in inputs.items():
        if 0 not in given.shape:
            check_strides(name, given.shape, given.strides, problem.item_bytes, row_alignment(problem.dtype))
    return problem
