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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cupy_kernels.parameters import FLASH2_COUNTERS, Flash2Forward, flash2_parameters, traffic_of
from simattn.arithmetic.formats import numpy_dtype
from simattn.plan import Plan
from simattn.problem import AttentionProblem
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

FLAGS = ("-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas")


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


def build_flash2_forward(kernel: Flash2Forward, kernels: Path = KERNELS) -> Path:
    """Compile a build of the forward kernel, or find it compiled; return the shared library.

    Parameters
    ----------
    kernel
        The build.
    kernels
        Directory of the kernels' source.
    """
    macros = {
        **kernel.macros(count_traffic=True),
        "KERNEL_FILE": '"flash2.cu"',
        "KERNEL": "flash2_forward",
        "PARAMETERS": "Flash2Parameters",
    }
    return _build(kernels, macros)


def _build(kernels: Path, macros: Mapping[str, str]) -> Path:
    path = compiler()
    flags, version = _compiler_flags(path)
    sources = sorted([*kernels.glob("*.cu*"), *HERE.glob("*.h"), *HERE.glob("*.cpp")], key=lambda source: source.name)
    definitions = [f"-D{name}={value}" for name, value in {"CPU_BUILD": "1", **macros}.items()]
    digest = hashlib.sha256(repr((flags, version, definitions)).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    directory = cache_directory()
    library = directory / f"{macros['KERNEL']}-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / library.name
            command = [
                path,
                *flags,
                *definitions,
                f"-I{kernels}",
                f"-I{HERE}",
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


class ArrayRecord(ctypes.Structure):
    """``cpu::Array``."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("extents", ctypes.c_longlong * 3),
        ("strides", ctypes.c_longlong * 3),
        ("row_bytes", ctypes.c_longlong),
        ("written", ctypes.c_void_p),
    ]


@dataclass
class _GlobalArray:
    """An array in the kernel's global memory: rows with gaps of NaN between them.

    ``values`` has three axes of rows, as ordered in memory, and one of columns.
    """

    name: str
    values: Values
    written: npt.NDArray[np.uint8] | None

    @classmethod
    def of_shape(cls, name: str, shape: Sequence[int], dtype: np.dtype[Any], *, output: bool) -> _GlobalArray:
        strides, step = [dtype.itemsize], shape[-1] * dtype.itemsize
        for extent in reversed(shape[:-1]):
            # A single number per row is not padded: the statistics are adjacent.
            step += 0 if shape[-1] == 1 else GAP_BYTES
            strides.insert(0, step)
            step *= max(1, extent)
        memory = np.full(step + 256, 0xFF, np.uint8)
        start = -memory.ctypes.data % 256
        values = np.ndarray(tuple(shape), dtype, memory[start:].data, 0, tuple(strides))
        return cls(name, values, np.zeros(step, np.uint8) if output else None)

    @classmethod
    def holding(cls, name: str, values: Values) -> _GlobalArray:
        made = cls.of_shape(name, values.shape, values.dtype, output=False)
        made.values[...] = values
        return made

    @property
    def address(self) -> int:
        return int(self.values.ctypes.data)

    @property
    def element_strides(self) -> tuple[int, int, int]:
        batch, row, head = (stride // self.values.itemsize for stride in self.values.strides[:3])
        return batch, row, head

    def record(self) -> ArrayRecord:
        return ArrayRecord(
            self.name.encode(),
            self.address,
            (ctypes.c_longlong * 3)(*self.values.shape[:3]),
            (ctypes.c_longlong * 3)(*self.values.strides[:3]),
            self.values.shape[3] * self.values.itemsize,
            None if self.written is None else self.written.ctypes.data,
        )

    def check_written(self) -> None:
        assert self.written is not None
        flags = np.ndarray(
            (*self.values.shape[:3], self.values.shape[3] * self.values.itemsize),
            np.uint8,
            self.written.data,
            0,
            (*self.values.strides[:3], 1),
        )
        if not flags.all():
            missing = tuple(int(index) for index in np.argwhere(flags == 0)[0])
            raise KernelFaultError(
                f"{self.name} is not written everywhere, first at row {missing[:3]}, byte {missing[3]}"
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


def run_flash2_forward(
    problem: AttentionProblem,
    q: Values,
    k: Values,
    v: Values,
    *,
    plan: Plan,
    order: Order = "forward",
    copies: Copies = "early",
    seed: int = 0,
    kernels: Path = KERNELS,
) -> tuple[Values, Values, Traffic]:
    """Run the instrumented forward kernel of FlashAttention-2 on the CPU.

    Parameters
    ----------
    problem
        Shapes, storage, scale and mask.
    q, k, v
        Arrays of shape (batch, length, heads, columns) in the storage format.
    plan
        Its tiles fix the bits and the bytes.
    order
        In which the threads of a block, and the blocks, run between barriers.
    copies
        Whether asynchronous copies arrive when they are started or when they are waited for.
    seed
        Of the random order.
    kernels
        Directory of the kernels' source.

    Returns
    -------
    out
        Shape (batch, q_len, heads, value_dim), in the storage format.
    lse
        Natural log-sum-exp, float32, shape (batch, heads, q_len).
    traffic
        Bytes that the kernel counted.

    Raises
    ------
    ValueError
        If an argument is out of range or the kernel does not take the problem.
    KernelFaultError
        If the kernel did what it must not.
    CompilerNotFoundError
        If no C++ compiler is present.
    """
    if order not in ORDERS or copies not in COPIES:
        raise ValueError(f"order={order!r} and copies={copies!r}: expected one of {ORDERS} and one of {COPIES}")
    kernel = Flash2Forward.of(problem, plan)
    inputs = _checked_inputs(problem, q, k, v)
    out_shape = (problem.batch, problem.q_len, problem.heads, problem.value_dim)
    out = _GlobalArray.of_shape("out", out_shape, numpy_dtype(problem.dtype), output=True)
    lse_shape = (problem.batch, problem.heads, problem.q_len, 1)
    lse = _GlobalArray.of_shape("lse", lse_shape, np.dtype(np.float32), output=True)
    counters = np.zeros(len(FLASH2_COUNTERS), np.uint64)
    arrays = [*inputs, out, lse]
    parameters = flash2_parameters(
        problem,
        {array.name: array.address for array in arrays} | {"counters": counters.ctypes.data},
        {array.name: array.element_strides for array in arrays if array is not lse},
    )
    grid = kernel.grid(problem)
    if grid:
        launch = loaded(build_flash2_forward(kernel, kernels))
        message = ctypes.create_string_buffer(512)
        with _launch_lock:
            succeeded = launch(
                parameters.ctypes.data,
                grid,
                kernel.threads,
                kernel.shared_bytes,
                (ArrayRecord * len(arrays))(*(array.record() for array in arrays)),
                len(arrays),
                ORDERS.index(order),
                COPIES.index(copies),
                seed,
                message,
                len(message),
            )
        if not succeeded:
            raise KernelFaultError(message.value.decode())
        out.check_written()
        lse.check_written()
    return out.values.copy(), lse.values[..., 0].copy(), traffic_of(counters)


def _checked_inputs(problem: AttentionProblem, q: Values, k: Values, v: Values) -> list[_GlobalArray]:
    shapes = {
        "q": (problem.batch, problem.q_len, problem.heads, problem.head_dim),
        "k": (problem.batch, problem.kv_len, problem.kv_heads, problem.head_dim),
        "v": (problem.batch, problem.kv_len, problem.kv_heads, problem.value_dim),
    }
    stored = numpy_dtype(problem.dtype)
    for (name, shape), values in zip(shapes.items(), (q, k, v), strict=True):
        if values.shape != shape or values.dtype != stored:
            raise ValueError(f"{name} has shape {values.shape} and dtype {values.dtype}: expected {shape} and {stored}")
    return [_GlobalArray.holding(name, values) for name, values in zip(shapes, (q, k, v), strict=True)]
