"""Programs on the GPU: from arrays to launches.

What follows from shapes, strides and options alone is worked out once and kept, so that a further call with the same
ones only fills in addresses and launches.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy.typing as npt

from cupy_kernels import compiler
from cupy_kernels.arrays import (
    check_apart,
    check_device,
    check_output,
    check_pointer,
    check_strides,
    extent,
    output_array,
    require_cupy,
)
from cupy_kernels.compiler import Variant
from cupy_kernels.counting import CountedTraffic
from cupy_kernels.parameters import MAP_BYTES, STORAGE_TYPES, check_supported, parameters
from cupy_kernels.program import Array, Program, Step, workspace_layout
from cupy_kernels.ragged import OFFSETS, RaggedProblem
from cupy_kernels.table import choose
from cupy_kernels.tensor_map import ADDRESS_MULTIPLE, TensorMap
from simattn.hardware import Hardware, get_hardware
from simattn.plan import Plan
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem, Direction, Window

SMALLEST_SPARE_BYTES = 1 << 20
WORKSPACE_ALIGNMENT = 256

KEPT_MAPS = 256
"""Sets of addresses for which a launch keeps its encoded tensor maps."""


@cache
def present_hardware(device: int) -> Hardware:
    """Return a row with what kernels are chosen by on a device; what else it says is of another GPU."""
    chosen = require_cupy().cuda.Device(device)
    attributes = chosen.attributes
    per_multiprocessor = attributes["MaxSharedMemoryPerMultiprocessor"]
    return replace(
        get_hardware(DEFAULT_HARDWARE),
        name=f"device {device}",
        compute_capability=divmod(int(chosen.compute_capability), 10),
        streaming_multiprocessors=attributes["MultiProcessorCount"],
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


@dataclass(frozen=True)
class Description:
    """Shape, strides in bytes and dtype of an array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any


class _Launched:
    """A step with everything but the addresses."""

    def __init__(self, step: Step, program: Program, strides: Mapping[str, tuple[int, int, int]]) -> None:
        kernel, slots = step.kernel, {array.name: slot for slot, array in enumerate(program.arrays)}
        by_name = {name: strides[array] for name, array in zip(kernel.names, step.arrays, strict=True)}
        filled = parameters(kernel.names, program.problem, step.operand, by_name, kernel.mapped)
        # CuPy passes an array of one element by value, and one without named fields fastest.
        self.parameters = filled.view(f"V{filled.itemsize}")
        self.slots = tuple(slots[name] for name in step.arrays)
        self.write_addresses = struct.Struct(f"{len(self.slots) + 1}Q").pack_into
        arrays = {name: program.array[array] for name, array in zip(kernel.names, step.arrays, strict=True)}
        self.maps = [
            TensorMap.of(arrays[boxes.name], boxes, by_name[boxes.name]) if arrays[boxes.name].nbytes else None
            for boxes in kernel.boxes
        ]
        self.mapped_slots = tuple(self.slots[kernel.names.index(name)] for name in kernel.mapped)
        self.write_maps = struct.Struct(f"{MAP_BYTES * len(self.maps)}s").pack_into
        self.maps_offset = filled.itemsize - MAP_BYTES * len(self.maps)
        self.encoded_maps = lru_cache(maxsize=KEPT_MAPS)(self._encoded_maps)
        self.grid, self.block, self.shared_bytes = (step.blocks,), (kernel.threads,), kernel.shared_bytes
        self.counters = program.counters(step)
        self.step, self.function = step, None

    def _encoded_maps(self, *addresses: int) -> bytes:
        """Return the tensor maps of arrays at these addresses; that of an empty array is another's, as none is read."""
        encoded = [
            None if described is None else described.encode(address)
            for described, address in zip(self.maps, addresses, strict=True)
        ]
        another = next(one for one in encoded if one is not None)  # kernels prefetch every map
        return b"".join(another if one is None else one for one in encoded)

    def load(self, device: int, *, count_traffic: bool) -> None:
        """Compile and load the kernel, if that has not been done."""
        self.function = _loaded(self.step.kernel.variant(count_traffic=count_traffic), self.shared_bytes, device)


class _Arrangement:
    """Where the arrays of a launch lie that nobody wants."""

    def __init__(self, program: Program, wanted: frozenset[str]) -> None:
        slots = {array.name: slot for slot, array in enumerate(program.arrays)}
        offsets, self.workspace_bytes = workspace_layout(kept_in_workspace(program, wanted), WORKSPACE_ALIGNMENT)
        self.offsets = [(slots[name], offset) for name, offset in offsets.items()]
        self.unread = [
            (slots[array.name], array.nbytes)
            for array in program.with_role("saved")
            if array.name not in wanted and array.name not in offsets
        ]


class Launch:
    """A program with everything but the addresses.

    Parameters
    ----------
    device
        Number of the device, which must be the current one.
    algorithm, direction, plan
        What it computes, as the call has them.
    problem
        The problem.
    given
        The input arrays.
    deterministic
        Whether the results must have the same bits every time.
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
        algorithm: str | None,
        direction: Direction,
        problem: AttentionProblem,
        plan: Plan | None,
        given: Mapping[str, Description],
        *,
        deterministic: bool,
        count_traffic: bool,
    ) -> None:
        hardware = present_hardware(device)
        chosen = choose(algorithm, direction, problem, plan, hardware, deterministic=deterministic)
        program = chosen.program
        self.device, self.algorithm, self.program = device, chosen.algorithm.name, program
        check_inputs(program, given)
        self.alignment = {array.name: row_alignment(program, array) for array in program.with_role("input")}
        self.extents = {
            array.name: extent(given[array.name].shape, given[array.name].strides, array.numpy_dtype.itemsize)
            for array in program.with_role("input")
        }
        self.inputs = tuple(self.alignment)
        self.no_addresses = (0,) * (len(program.arrays) - len(self.inputs))
        self.strictest = max(self.alignment.values())
        strides = {
            array.name: _given_strides(array, given[array.name]) if array.role == "input" else array.strides
            for array in program.arrays
        }
        self.steps = [_Launched(step, program, strides) for step in program.steps]
        for step in self.steps:
            step.load(device, count_traffic=count_traffic)
        self._arrangements: dict[frozenset[str], _Arrangement] = {}
        self._fitting: dict[tuple[Any, ...], tuple[int, int]] = {}  # bytes and alignment of results, by layout
        self._made = {
            array.name: (array.shape, array.numpy_dtype, array.row_elements if array.kind == "square" else 0)
            for array in program.arrays
        }
        self.slot = {array.name: slot for slot, array in enumerate(program.arrays)}
        self._tables = [
            (self.slot[array.name], _table_on_device(program.tables[array.name]))
            for array in program.with_role("table")
        ]

    def empty(self, name: str) -> Any:
        """Return a new array for a result, in the shape in which callers see it."""
        shape, dtype, padded = self._made[name]
        if not padded:
            return require_cupy().ndarray(shape, dtype)
        return require_cupy().ndarray((*shape[:-1], padded), dtype)[..., : shape[-1]]

    def check_output(self, name: str, result: Any, taken: dict[str, tuple[int, int]]) -> None:
        """Raise unless a result can be written to the caller's array, and add it to what is taken."""
        described = (name, result.shape, result.strides, result.dtype)
        if described not in self._fitting:
            array = self.program.array[name]
            check_output(name, result, array.shape, array.numpy_dtype)
            self._fitting[described] = (result.nbytes, row_alignment(self.program, array))
        size, alignment = self._fitting[described]
        memory = result.data
        check_device(name, memory.device_id, self.device)
        start = memory.ptr
        check_apart(name, start, start + size, taken)
        check_pointer(name, start, alignment)
        taken[name] = (start, start + size)

    def taken(self, addresses: Sequence[int]) -> dict[str, tuple[int, int]]:
        """Return first byte and one past the last of the inputs at these addresses, which come first in a program."""
        return {
            name: (address + before, address + after)
            for (name, (before, after)), address in zip(self.extents.items(), addresses, strict=False)
        }

    def __call__(
        self, addresses: list[int], wanted: frozenset[str], workspace: Any, counted: CountedTraffic | None
    ) -> None:
        """Launch on CuPy's current stream.

        Parameters
        ----------
        addresses
            Of the program's arrays, in their order; those of arrays that nobody wants may be anything.
        wanted
            Names of the results of a forward call that have an address.
        workspace
            The caller's memory for the other arrays, or None to take some.
        counted
            What to count the traffic into, if the kernels count.
        """
        arrangement = self._arrangements.get(wanted)
        if arrangement is None:
            arrangement = self._arrangements[wanted] = _Arrangement(self.program, wanted)
        workspace_address = 0
        if workspace is not None:
            taken = self.taken(addresses)
            for array in self.program.arrays:
                if array.role == "output" or array.name in wanted:
                    address = addresses[self.slot[array.name]]
                    taken[array.name] = (address, address + array.nbytes)
            workspace_address = _checked_workspace(workspace, arrangement.workspace_bytes, self.device, taken)
        if arrangement.workspace_bytes:
            size = arrangement.workspace_bytes
            if workspace is None:
                # Held until the launches are queued; the pool gives it to this stream's later launches only.
                memory = require_cupy().cuda.alloc(size)
                base = memory.ptr
            else:
                base = workspace_address
            for slot, offset in arrangement.offsets:
                addresses[slot] = base + offset
        for slot, size in arrangement.unread:
            addresses[slot] = _spare_address(self.device, size)
        for slot, memory in self._tables:
            addresses[slot] = memory.ptr
        for step in self.steps:
            filled: Any = step.parameters.copy()  # one for each call: other threads launch at the same time
            counters = 0 if counted is None else counted.buffer(self.device, step.counters).data.ptr
            step.write_addresses(filled, 0, *[addresses[slot] for slot in step.slots], counters)
            if step.maps:
                maps = step.encoded_maps(*[addresses[slot] for slot in step.mapped_slots])
                step.write_maps(filled, step.maps_offset, maps)
            step.function(step.grid, step.block, (filled,), step.shared_bytes)  # type: ignore[misc]

    def check_addresses(self, addresses: list[int]) -> None:
        """Raise a ValueError unless every input starts at an aligned address; inputs come first in a program."""
        together = 0
        for address in addresses[: len(self.inputs)]:
            together |= address
        if together % self.strictest:
            for name, address in zip(self.inputs, addresses, strict=False):
                check_pointer(name, address, self.alignment[name])


def kept_in_workspace(program: Program, wanted: frozenset[str]) -> list[Array]:
    """Return the arrays that a program reads again and nobody wants."""
    return [
        array
        for array in program.with_role("saved", "workspace")
        if array.name not in wanted and (array.role == "workspace" or program.is_read(array.name))
    ]


def row_alignment(program: Program, array: Array) -> int:
    """Return the bytes that rows of an array start at multiples of: four elements, one number, or what a copy needs."""
    if array.name in program.in_chunks:
        return ADDRESS_MULTIPLE
    return (1 if array.kind in ("statistic", "offsets") else 4) * array.numpy_dtype.itemsize


def _given_strides(array: Array, given: Any) -> tuple[int, int, int]:
    """Return the strides of batch, row and head in elements, 0 along an axis of length 1."""
    steps = [
        stride // array.numpy_dtype.itemsize if size > 1 else 0
        for size, stride in zip(given.shape, given.strides, strict=True)
    ]
    if array.kind == "offsets":
        return 0, steps[0], 0
    if array.ragged:
        steps = [0, *steps]
    if array.kind == "matrix":
        return steps[0], steps[1], steps[2]
    return steps[0], steps[2], steps[1]


def _checked_workspace(workspace: Any, size: int, device: int, taken: Mapping[str, tuple[int, int]]) -> int:
    """Return the address of the caller's workspace, which overlaps nothing that is taken."""
    workspace = output_array("workspace", workspace)
    if workspace.nbytes < size:
        raise ValueError(f"workspace has {workspace.nbytes} bytes: expected at least {size}")
    if workspace.data.device_id != device:
        raise ValueError(f"workspace is on device {workspace.data.device_id}: expected device {device}, where q is")
    if not workspace.flags.c_contiguous:
        raise ValueError(f"workspace has strides {workspace.strides} bytes: expected a C-contiguous array")
    address = int(workspace.data.ptr)
    check_pointer("workspace", address, WORKSPACE_ALIGNMENT)
    check_apart("workspace", address, address + size, taken)
    return address


def _table_on_device(values: npt.NDArray[Any]) -> Any:
    """Return memory outside the pool with these values, which any stream may read."""
    cupy = require_cupy()
    memory = cupy.cuda.Memory(max(1, values.nbytes))
    if values.nbytes:
        cupy.cuda.runtime.memcpy(memory.ptr, values.ctypes.data, values.nbytes, cupy.cuda.runtime.memcpyHostToDevice)
    return memory


_spare: dict[int, list[Any]] = {}
_spare_lock = threading.Lock()


def _spare_address(device: int, size: int) -> int:
    """Return an address to store what nobody asked for, as the program does nevertheless.

    The memory is never read and never given back, so that any stream and any captured graph may write to it.
    """
    held = _spare.get(device)
    if not held or held[-1].size < size:
        held = _spare.setdefault(device, [])
        with _spare_lock:
            if not held or held[-1].size < size:
                larger = max(size, SMALLEST_SPARE_BYTES, 2 * held[-1].size if held else 0)
                held.append(require_cupy().cuda.Memory(larger))
    address: int = held[-1].ptr
    return address


# Preparation


@lru_cache(maxsize=4096)
def prepare(
    device: int,
    algorithm: str | None,
    direction: Direction,
    names: tuple[str, ...],
    scale: float | None,
    causal: bool,
    window: Window | None,
    plan: Plan | None,
    deterministic: bool,
    count_traffic: bool,
    described: tuple[Any, ...],
) -> Launch:
    """Return the launch for arrays of these shapes and strides (in bytes), checked, on the current device.

    Parameters
    ----------
    device
        Number of the device.
    algorithm, direction, scale, causal, window, plan, deterministic, count_traffic
        As the calls have them.
    names
        Names of the arrays, q, k and v first, then the offsets of sequences if they have lengths of their own.
    described
        Shape, strides and dtype of each.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`cupy_kernels.attention` does.
    """
    given = {name: Description(*described[3 * index : 3 * index + 3]) for index, name in enumerate(names)}
    problem = checked_problem(given, scale=scale, causal=causal, window=window)
    return Launch(
        device, algorithm, direction, problem, plan, given, deterministic=deterministic, count_traffic=count_traffic
    )


def checked_problem(
    given: Mapping[str, Any], *, scale: float | None, causal: bool, window: Window | None
) -> AttentionProblem:
    """Return the problem that q, k and v pose, with the offsets of their sequences where they are given.

    Raises
    ------
    TypeError, ValueError
        If the kernels do not take it; the message names the argument.
    """
    ragged = OFFSETS[0] in given
    axes = (
        "3 dimensions (rows, heads, columns) beside cu_seqlens"
        if ragged
        else ("4 dimensions (batch, length, heads, columns)")
    )
    for name in "qkv":
        array = given[name]
        if len(array.shape) != (3 if ragged else 4):
            raise ValueError(f"{name} has shape {array.shape}: expected {axes}")
        if array.dtype.name not in STORAGE_TYPES:
            raise TypeError(f"{name} has dtype {array.dtype}: expected one of {', '.join(STORAGE_TYPES)}")
        if array.dtype != given["q"].dtype:
            raise TypeError(f"{name} has dtype {array.dtype}: expected {given['q'].dtype}, as q has")
    q, k, v = (given[name].shape for name in "qkv")
    batch = () if ragged else (q[0],)
    for name, shape, expected in (("k", k, (*batch, *k[-3:-1], q[-1])), ("v", v, (*k[:-1], v[-1]))):
        if shape != expected:
            raise ValueError(f"{name} has shape {shape}: expected {expected} for q of shape {q} and k of shape {k}")
    problem_class = RaggedProblem if ragged else AttentionProblem
    problem = problem_class(
        batch=_sequences(given) if ragged else q[0],
        heads=q[-2],
        kv_heads=k[-2],
        q_len=q[-3],
        kv_len=k[-3],
        head_dim=q[-1],
        value_dim=v[-1],
        dtype=given["q"].dtype.name,
        scale=scale,  # type: ignore[arg-type]
        causal=causal,
        window=window,
    )
    check_supported(problem)
    return problem


def _sequences(given: Mapping[str, Any]) -> int:
    """Return how many sequences the arrays of offsets have.

    Raises
    ------
    TypeError, ValueError
        If they are none or differ; the message names the array.
    """
    for name in OFFSETS:
        array = given[name]
        if len(array.shape) != 1 or array.shape[0] < 2:
            raise ValueError(
                f"{name} has shape {array.shape}: expected 1 dimension, of at least 2 offsets: 0, and where every "
                "sequence ends"
            )
        if array.dtype.name != "int32":
            raise TypeError(f"{name} has dtype {array.dtype}: expected int32")
    queries, keys = (given[name].shape[0] for name in OFFSETS)
    if queries != keys:
        raise ValueError(f"{OFFSETS[1]} has {keys} offsets: expected {queries}, as {OFFSETS[0]} has")
    return int(queries) - 1


def check_inputs(program: Program, given: Mapping[str, Description]) -> None:
    """Raise unless the arrays given are a program's inputs, in a layout that its kernels take."""
    expected = [array.name for array in program.with_role("input")]
    missing = [name for name in expected if name not in given]
    if missing:
        raise ValueError(f"{', '.join(missing)} of the forward pass is missing: expected {', '.join(expected)}")
    for name in expected:
        array, found = program.array[name], given[name]
        if found.shape != array.shape:
            raise ValueError(f"{name} has shape {found.shape}: expected {array.shape}")
        if found.dtype != array.numpy_dtype:
            raise TypeError(f"{name} has dtype {found.dtype}: expected {array.dtype}")
        check_layout(program, array, found)


def check_layout(program: Program, array: Array, given: Any) -> None:
    """Raise a ValueError unless a program's kernels take the strides of an input."""
    if 0 in given.shape:
        return
    check_strides(array.name, given.shape, given.strides, array.numpy_dtype.itemsize, row_alignment(program, array))
    for boxes in program.boxes_of(array.name):
        TensorMap.of(array, boxes, _given_strides(array, given))
