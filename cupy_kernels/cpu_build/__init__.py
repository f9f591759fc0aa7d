"""The kernels on the CPU, for tests: the same ``.cu`` source compiled by g++, every CUDA thread a fiber, and watched.

What a GPU leaves to chance is here the caller's choice: the order in which threads run, and whether asynchronous
copies arrive at once or as late as they may. A kernel without races returns the same bits for all of them. Shared
memory starts as NaN; accesses outside an array, barriers that some threads miss and the like end the launch with a
:class:`KernelFaultError`. ``cpu_device.h`` lists what is watched.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cupy_kernels.compiler import Variant
from cupy_kernels.counting import Counter, metadata_of, traffic_of
from cupy_kernels.parameters import parameters
from cupy_kernels.program import Array, Kernel, Program, Step
from cupy_kernels.tensor_map import TensorMap
from simattn.traffic import Traffic

Order = Literal["forward", "reverse", "random"]
Copies = Literal["early", "late"]
Values = npt.NDArray[Any]

ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
COPIES: tuple[Copies, ...] = ("early", "late")

KERNELS = Path(__file__).parent.parent / "kernels"
HERE = Path(__file__).parent

GAP_BYTES = 32
"""Between the rows, heads and batch entries of the arrays handed to a kernel; what touches it is caught."""

FLAGS = (
    "-O1",  # runs as fast as -O2 and compiles in two thirds of the time
    "-std=c++17",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",  # else libraries share the variables of their headers
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)


class KernelFaultError(RuntimeError):
    """A kernel did what it must not; the message says which thread, of which block, did what."""


class CompilerNotFoundError(RuntimeError):
    """No C++ compiler is present."""


def compiler() -> str:
    """Return the path of the C++ compiler: ``$CXX``, or g++.

    Raises
    ------
    CompilerNotFoundError
        If there is none.
    """
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise CompilerNotFoundError(f"the C++ compiler {name!r} is not on the path: expected g++, or another in $CXX")
    return path


def cache_directory() -> Path:
    """Return the directory of compiled kernels, made if it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for candidate in (Path(base), Path(tempfile.gettempdir())):
        directory = candidate / "simattn" / "cpu_build"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(directory, os.W_OK):
            return directory
    raise RuntimeError(f"neither {base} nor {tempfile.gettempdir()} can be written to: expected a cache directory")


@functools.cache
def _compiler_flags(path: str) -> tuple[tuple[str, ...], str]:
    """Return the flags for this machine and the compiler's version."""
    flags = list(FLAGS)
    try:
        has_fma = " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_fma = False
    if platform.machine() == "x86_64" and has_fma:
        flags.append("-mfma")  # else each one is a call
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(flags), version


def build(kernel: Kernel, kernels: Path = KERNELS) -> Path:
    """Compile a kernel, instrumented, or find it compiled; return the shared library.

    Parameters
    ----------
    kernel
        The build.
    kernels
        Directory of the kernels' source.
    """
    return build_variant(kernel.variant(count_traffic=True), kernels)


def build_variant(variant: Variant, kernels: Path = KERNELS) -> Path:
    """Do as :func:`build` for what a launch names."""
    macros = {**dict(variant.macros), "KERNEL_FILE": f'"{variant.source}"', "KERNEL": variant.function}
    return _build(kernels, macros)


@functools.cache
def special_functions_header() -> str:
    """Return the tables of :mod:`simattn.arithmetic.special_functions` for cpu_tensor_cores.h."""
    from simattn.arithmetic.special_functions import tables

    lines = ["// Generated from the tables of simattn/arithmetic."]
    for name, table in tables().items():
        rows = ", ".join(f"{{{c0}, {c1}, {c2}}}" for c0, c1, c2 in table.rows.tolist())
        lines.append(f"constexpr unsigned {name.upper()}_ROWS[{len(table.rows)}][3] = {{{rows}}};")
        lines.append(f"constexpr long long {name.upper()}_BIAS = {table.bias};")
        if name == "ex2":
            lines.append(f"constexpr Reduction EX2_REDUCTION = Reduction::{table.reduction};")
    return "\n".join(lines) + "\n"


def _build(kernels: Path, macros: Mapping[str, str]) -> Path:
    path, tables = compiler(), special_functions_header()
    flags, version = _compiler_flags(path)
    sources = sorted([*kernels.glob("*.cu*"), *HERE.glob("*.h"), *HERE.glob("*.cpp")], key=lambda source: source.name)
    definitions = [f"-D{name}={value}" for name, value in {"CPU_BUILD": "1", **macros}.items()]
    digest = hashlib.sha256(repr((flags, version, definitions, tables)).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    directory = cache_directory()
    library = directory / f"{macros['KERNEL']}-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / library.name
            (Path(scratch) / "special_functions.h").write_text(tables)
            command = [
                path,
                *flags,
                *definitions,
                f"-I{kernels}",
                f"-I{HERE}",
                f"-I{scratch}",
                str(HERE / "launch.cpp"),
                "-o",
                str(made),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = "\n".join(done.stderr.splitlines()[:20])
                raise RuntimeError(f"{macros['KERNEL']} does not compile for the CPU:\n{lines}")
            os.replace(made, library)
    return library


ACCESS_BITS = {"r": 1, "w": 2, "a": 4}
"""``cpu::Access``."""


class ArrayRecord(ctypes.Structure):
    """``cpu::Array``."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("extents", ctypes.c_longlong * 3),
        ("strides", ctypes.c_longlong * 3),
        ("row_bytes", ctypes.c_longlong),
        ("written", ctypes.c_void_p),
        ("access", ctypes.c_int),
    ]


@dataclass
class _GlobalArray:
    """An array in the kernels' global memory: rows with gaps of NaN between them.

    ``stored`` has the axes (batch, heads, rows, columns), or (batch, rows, heads, columns) for a matrix.
    """

    array: Array
    stored: Values
    nbytes: int

    @classmethod
    def made_for(cls, array: Array) -> _GlobalArray:
        """Make the memory, all of it NaN."""
        shape = array.batched_shape if len(array.batched_shape) == 4 else (*array.batched_shape, 1)
        item = array.numpy_dtype.itemsize
        strides, step = [item], array.row_elements * item
        for extent in reversed(shape[:-1]):
            # A single number per row is not padded: statistics are adjacent.
            step += 0 if array.kind in ("statistic", "offsets") else GAP_BYTES
            strides.insert(0, step)
            step *= max(1, extent)
        memory = np.full(step + 256, 0xFF, np.uint8)
        start = -memory.ctypes.data % 256
        return cls(array, np.ndarray(shape, array.numpy_dtype, memory[start:].data, 0, tuple(strides)), step)

    @property
    def values(self) -> Values:
        """The values in the shape in which callers see them."""
        values = self.stored if len(self.array.batched_shape) == 4 else self.stored[..., 0]
        return values.reshape(self.array.shape)  # a view: only axes of length 1 go

    @property
    def address(self) -> int:
        return int(self.stored.ctypes.data)

    @property
    def element_strides(self) -> tuple[int, int, int]:
        """Elements between batch entries, rows and heads."""
        first, second, third = (stride // self.stored.itemsize for stride in self.stored.strides[:3])
        return (first, second, third) if self.array.kind == "matrix" else (first, third, second)

    def record(self, name: str, access: str, written: npt.NDArray[np.uint8] | None) -> ArrayRecord:
        """Return how the kernel's watcher knows it."""
        return ArrayRecord(
            name.encode(),
            self.address,
            (ctypes.c_longlong * 3)(*self.stored.shape[:3]),
            (ctypes.c_longlong * 3)(*self.stored.strides[:3]),
            self.stored.shape[3] * self.stored.itemsize,
            None if written is None else written.ctypes.data,
            sum(ACCESS_BITS[letter] for letter in access),
        )

    def check_written(self, written: npt.NDArray[np.uint8]) -> None:
        """Raise unless every byte of every row was written."""
        flags = np.ndarray(
            (*self.stored.shape[:3], self.stored.shape[3] * self.stored.itemsize),
            np.uint8,
            written.data,
            0,
            (*self.stored.strides[:3], 1),
        )
        if not flags.all():
            missing = tuple(int(index) for index in np.argwhere(flags == 0)[0])
            raise KernelFaultError(
                f"{self.array.name} is not written everywhere, first at row {missing[:3]}, byte {missing[3]}"
            )


_launch_lock = threading.Lock()


@functools.cache
def loaded(library: Path) -> Any:
    """Return a library's function that runs a grid of thread blocks; its arguments are those of launch.cpp."""
    launch = ctypes.CDLL(str(library)).launch
    launch.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_size_t,
        ctypes.POINTER(ArrayRecord),
        *([ctypes.c_int] * 3),
        ctypes.c_uint64,
        ctypes.c_char_p,
        ctypes.c_size_t,
    )
    return launch


def run_program(
    program: Program,
    given: Mapping[str, Values],
    *,
    order: Order = "forward",
    copies: Copies = "early",
    seed: int = 0,
    kernels: Path = KERNELS,
    metadata: dict[str, int] | None = None,
) -> tuple[dict[str, Values], Traffic]:
    """Run a program on the CPU, every kernel in its instrumented build.

    Parameters
    ----------
    program
        The launches.
    given
        The program's input arrays by name, as callers see them: matrices of shape (batch, length, heads, columns),
        statistics (batch, heads, q_len), squares (batch, heads, q_len, kv_len).
    order
        In which the threads of a block, and the blocks, run between barriers: "forward", warps side by side; "reverse",
        each warp as far as it gets; "random".
    copies
        Whether asynchronous copies arrive when they are started or when they are waited for.
    seed
        Of the random order.
    kernels
        Directory of the kernels' source.
    metadata
        Where to add the bytes that are no part of the traffic, by what for.

    Returns
    -------
    arrays
        Every other array of the program by name.
    traffic
        Bytes that the kernels counted.

    Raises
    ------
    ValueError
        If an argument is out of range.
    KernelFaultError
        If a kernel did what it must not.
    CompilerNotFoundError
        If no C++ compiler is present.
    """
    if order not in ORDERS or copies not in COPIES:
        raise ValueError(f"order={order!r} and copies={copies!r}: expected one of {ORDERS} and one of {COPIES}")
    memory = {array.name: _GlobalArray.made_for(array) for array in program.arrays}
    for array in program.with_role("input"):
        values = given[array.name]
        if values.shape != array.shape or values.dtype != array.numpy_dtype:
            raise ValueError(
                f"{array.name} has shape {values.shape} and dtype {values.dtype}: expected {array.shape} and "
                f"{array.numpy_dtype}"
            )
        memory[array.name].values[...] = values
    for name, values in program.tables.items():
        memory[name].values[...] = values
    traffic = Traffic()
    for step in program.steps:
        counted, numbers = _run_step(program, step, memory, order, copies, seed, kernels)
        traffic = traffic + traffic_of(counted, numbers)
        if metadata is not None:
            for name, read in metadata_of(counted, numbers).items():
                metadata[name] = metadata.get(name, 0) + read
    results = {name: made.values.copy() for name, made in memory.items() if made.array.role not in ("input", "table")}
    return results, traffic


def _run_step(
    program: Program,
    step: Step,
    memory: Mapping[str, _GlobalArray],
    order: Order,
    copies: Copies,
    seed: int,
    kernels: Path,
) -> tuple[tuple[Counter, ...], list[int]]:
    """Run one launch and return what it counted, and the numbers."""
    kernel, held = step.kernel, [memory[name] for name in step.arrays]
    strides = {name: array.element_strides for name, array in zip(kernel.names, held, strict=True)}
    filled = parameters(kernel.names, program.problem, step.operand, strides, kernel.mapped)
    counted = program.counters(step)
    counters = np.zeros(len(counted), np.uint64)
    filled["counters"] = counters.ctypes.data
    records, flags = [], []
    for (name, access), array in zip(kernel.accesses, held, strict=True):
        filled[name] = array.address
        flags.append(np.zeros(array.nbytes, np.uint8) if "w" in access else None)
        records.append(array.record(array.array.name, access, flags[-1]))
    for boxes in kernel.boxes:
        array = held[kernel.names.index(boxes.name)]
        described = TensorMap.of(array.array, boxes, strides[boxes.name])
        filled[f"{boxes.name}_map"] = np.void(described.cpu_record(array.address))
    launch, message = loaded(build(kernel, kernels)), ctypes.create_string_buffer(512)
    with _launch_lock:
        succeeded = launch(
            filled.ctypes.data,
            step.blocks,
            kernel.threads,
            kernel.shared_bytes,
            (ArrayRecord * len(records))(*records),
            len(records),
            ORDERS.index(order),
            COPIES.index(copies),
            seed,
            message,
            len(message),
        )
    if not succeeded:
        raise KernelFaultError(f"{kernel.function}: {message.value.decode()}")
    for (_, access), array, written in zip(kernel.accesses, held, flags, strict=True):
        if access == "w" and written is not None:
            array.check_written(written)
    return counted, counters.tolist()
