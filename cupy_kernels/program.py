"""Programs: which kernels run one after the other, and on which arrays.

The same program runs on a GPU and in the CPU build.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cupy_kernels.compiler import Variant
from cupy_kernels.parameters import Operand, struct_of
from simattn.arithmetic.formats import numpy_dtype
from simattn.problem import AttentionProblem
from simattn.sums import ceil_div

Access = Literal["r", "w", "rw", "a"]
"""What a kernel does to an array: it reads it, writes it, both, or adds to it."""

Units = Literal["CUDA cores", "mma.sync", "wgmma"]
"""What a kernel multiplies matrices by: the CUDA cores, or one of two instructions of the tensor cores."""

Role = Literal["input", "output", "saved", "workspace", "table"]
Kind = Literal["matrix", "statistic", "square", "offsets"]

COUNTERS = {"r": "hbm_read_bytes", "w": "hbm_write_bytes", "a": "hbm_reduce_bytes"}
"""Counter of :class:`simattn.ArrayTraffic` by access."""

METADATA = "metadata"
"""Counter of what kernels read to know what to do, which is no traffic of the algorithm."""

SEQUENCE_OFFSETS = "sequence_offsets"
"""Array under which the reads of all arrays of offsets are counted."""

SQUARE_ROW_MULTIPLE = 8
"""Elements that the rows of a (query, key) matrix are a multiple of apart, so that they start at whole vectors."""

MOST_BLOCKS = (1 << 31) - 1


@dataclass(frozen=True)
class Array:
    """An array of a program in the device's memory.

    Attributes
    ----------
    name
        As the simulated machine's program calls it.
    kind
        "matrix", shape (batch, rows, heads, columns); "statistic", one number a row, (batch, heads, rows); "square",
        (batch, heads, rows, columns) with rows padded to whole vectors; "offsets", shape (rows,).
    dtype
        Storage format, or "int32" of a table and of offsets.
    batch, heads, rows, columns
        Shape.
    role
        Who brings or takes it; a "table" is filled once, when a launch is prepared.
    ragged
        Whether sequences follow one another along its rows: ``batch`` is 1, and callers see no batch axis.
    """

    name: str
    kind: Kind
    dtype: str
    batch: int
    heads: int
    rows: int
    columns: int
    role: Role
    ragged: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as callers see it."""
        if self.kind == "offsets":
            return (self.rows,)
        return self.batched_shape[1:] if self.ragged else self.batched_shape

    @property
    def batched_shape(self) -> tuple[int, ...]:
        """Shape with a batch axis; that of offsets as a statistic has it."""
        if self.kind == "matrix":
            return self.batch, self.rows, self.heads, self.columns
        whole = (self.batch, self.heads, self.rows, self.columns)
        return whole if self.kind == "square" else whole[:3]

    @property
    def row_elements(self) -> int:
        """Elements of a row with its padding."""
        multiple = SQUARE_ROW_MULTIPLE if self.kind == "square" else 1
        return ceil_div(self.columns, multiple) * multiple

    @property
    def nbytes(self) -> int:
        """Bytes of the array, padding included."""
        return self.batch * self.heads * self.rows * self.row_elements * self.numpy_dtype.itemsize

    @property
    def strides(self) -> tuple[int, int, int]:
        """Elements between batch entries, rows and heads, as the array is made."""
        columns = self.row_elements
        if self.kind == "matrix":
            return self.rows * self.heads * columns, self.heads * columns, columns
        return self.heads * self.rows * columns, columns, self.rows * columns

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Storage format as NumPy has it."""
        return np.dtype(np.int32) if self.dtype == "int32" else numpy_dtype(self.dtype)


@dataclass(frozen=True)
class Boxes:
    """How a kernel copies an array by boxes, which a tensor map describes.

    Attributes
    ----------
    name
        The kernel's array.
    rows
        Rows of a box.
    packed_heads
        Heads whose rows a box interleaves, position by position; None where a box has one head and no axis for more.
    ragged
        Whether a box ends with its sequence, for an array without a batch axis.
    """

    name: str
    rows: int
    packed_heads: int | None = None
    ragged: bool = False


@dataclass(frozen=True)
class Kernel:
    """One build of a kernel and its launch shape.

    Attributes
    ----------
    source, function
        File in ``cupy_kernels/kernels`` and the kernel's name in it.
    macros
        What it is compiled with.
    threads
        Threads of a block.
    shared_bytes
        Dynamic shared memory of a block.
    accesses
        Names of its arrays in the order of its parameter struct, and what it does to each.
    boxes
        How it copies those of which its parameter struct holds a tensor map, in that order.
    takes_chunks
        Whether it copies the rows of all matrices in chunks of 16 bytes.
    units
        What it multiplies matrices by.
    also_counted
        What it counts the bytes of besides its accesses, as metadata.
    """

    source: str
    function: str
    macros: tuple[tuple[str, str], ...]
    threads: int
    shared_bytes: int
    accesses: tuple[tuple[str, Access | Literal[""]], ...]
    boxes: tuple[Boxes, ...] = ()
    takes_chunks: bool = False
    units: Units = "CUDA cores"
    also_counted: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its arrays."""
        return tuple(name for name, _ in self.accesses)

    @property
    def mapped(self) -> tuple[str, ...]:
        """Names of its arrays that have a tensor map."""
        return tuple(boxes.name for boxes in self.boxes)

    @property
    def struct(self) -> np.dtype[Any]:
        """Its parameter struct."""
        return struct_of(self.names, self.mapped)

    def variant(self, *, count_traffic: bool) -> Variant:
        """Return what to compile."""
        counting = (("COUNT_TRAFFIC", "1"),) if count_traffic else ()
        return Variant(self.source, self.function, (*self.macros, *counting))


def macros(**values: object) -> tuple[tuple[str, str], ...]:
    """Return macros by name."""
    return tuple((name.upper(), str(value)) for name, value in values.items())


@dataclass(frozen=True)
class Step:
    """One launch of a program.

    Attributes
    ----------
    kernel
        What is launched.
    blocks
        Thread blocks.
    arrays
        The program's arrays for the kernel's, in the kernel's order.
    operand
        What the kernel is told besides the problem.
    """

    kernel: Kernel
    blocks: int
    arrays: tuple[str, ...]
    operand: Operand = field(default_factory=Operand)

    def __post_init__(self) -> None:
        if len(self.arrays) != len(self.kernel.accesses):
            raise ValueError(f"arrays={self.arrays}: {self.kernel.function} has {self.kernel.names}")
        if self.blocks > MOST_BLOCKS:
            raise ValueError(
                f"{self.kernel.function} needs {self.blocks} thread blocks for this problem: expected at most "
                f"{MOST_BLOCKS}, a smaller batch or larger tiles"
            )


@dataclass(frozen=True)
class Program:
    """What computes one direction of an algorithm for one problem.

    Attributes
    ----------
    problem
        The problem.
    arrays
        Every array, in the order in which callers name them.
    steps
        The launches; those without thread blocks are left out.
    tables
        What the arrays of that role are filled with, by name.
    """

    problem: AttentionProblem
    arrays: tuple[Array, ...]
    steps: tuple[Step, ...]
    tables: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    @functools.cached_property
    def array(self) -> Mapping[str, Array]:
        """The arrays by name."""
        return {array.name: array for array in self.arrays}

    def counters(self, step: Step) -> tuple[tuple[str, str], ...]:
        """Return array and counter of each number that a step's instrumented kernel adds to."""

        def counter(array: Array, access: str) -> tuple[str, str]:
            if array.kind == "offsets":
                return SEQUENCE_OFFSETS, METADATA
            return array.name, METADATA if array.role == "table" else COUNTERS[access]

        return (
            *(
                counter(self.array[array], access)
                for array, (_, accesses) in zip(step.arrays, step.kernel.accesses, strict=True)
                for access in accesses
            ),
            *((name, METADATA) for name in step.kernel.also_counted),
        )

    def with_role(self, *roles: Role) -> tuple[Array, ...]:
        """Return the arrays that have one of these roles."""
        return tuple(array for array in self.arrays if array.role in roles)

    @functools.cached_property
    def in_chunks(self) -> frozenset[str]:
        """Names of the matrices whose rows a kernel copies in chunks of 16 bytes, by boxes or by itself."""
        return frozenset(
            array
            for step in self.steps
            for array, name in zip(step.arrays, step.kernel.names, strict=True)
            if name in step.kernel.mapped or (step.kernel.takes_chunks and self.array[array].kind == "matrix")
        )

    def boxes_of(self, name: str) -> Iterator[Boxes]:
        """Yield how the kernels copy an array by boxes."""
        for step in self.steps:
            arrays = dict(zip(step.kernel.names, step.arrays, strict=True))
            yield from (boxes for boxes in step.kernel.boxes if arrays[boxes.name] == name)

    def is_read(self, name: str) -> bool:
        """Say whether a step reads an array."""
        return any(
            array == name and "r" in access
            for step in self.steps
            for array, (_, access) in zip(step.arrays, step.kernel.accesses, strict=True)
        )


def program_of(
    problem: AttentionProblem,
    arrays: Iterable[Array],
    steps: Iterable[Step],
    tables: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Program:
    """Return a program of the steps that have something to do."""
    return Program(problem, tuple(arrays), tuple(step for step in steps if step.blocks), tables or {})


# The arrays of attention


def query_matrix(problem: AttentionProblem, name: str, columns: int, role: Role, dtype: str = "") -> Array:
    """Return a matrix with a row for every query of every head."""
    shape = (problem.batch, problem.heads, problem.q_len, columns)
    return Array(name, "matrix", dtype or problem.dtype, *shape, role)


def key_matrix(problem: AttentionProblem, name: str, columns: int, role: Role, dtype: str = "") -> Array:
    """Return a matrix with a row for every key of every KV head."""
    shape = (problem.batch, problem.kv_heads, problem.kv_len, columns)
    return Array(name, "matrix", dtype or problem.dtype, *shape, role)


def statistic(problem: AttentionProblem, name: str, role: Role) -> Array:
    """Return an array of one float32 number for every query of every head."""
    return Array(name, "statistic", "float32", problem.batch, problem.heads, problem.q_len, 1, role)


def table(name: str, length: int) -> Array:
    """Return an array of integers that tells kernels what to do."""
    return Array(name, "statistic", "int32", 1, 1, length, 1, "table")


def offsets(name: str, sequences: int) -> Array:
    """Return an array of where each sequence starts, and after them where the last one ends."""
    return Array(name, "offsets", "int32", 1, 1, sequences + 1, 1, "input")


def square(problem: AttentionProblem, name: str, role: Role) -> Array:
    """Return an array with a number for every query and key of every head, in the storage format."""
    shape = (problem.batch, problem.heads, problem.q_len, problem.kv_len)
    return Array(name, "square", problem.dtype, *shape, role)


def inputs(problem: AttentionProblem) -> tuple[Array, Array, Array]:
    """Return q, k and v."""
    return (
        query_matrix(problem, "q", problem.head_dim, "input"),
        key_matrix(problem, "k", problem.head_dim, "input"),
        key_matrix(problem, "v", problem.value_dim, "input"),
    )


def forward_results(problem: AttentionProblem, role: Role = "output") -> tuple[Array, Array]:
    """Return out and lse; lse is made only where it is asked for."""
    return (
        query_matrix(problem, "out", problem.value_dim, role),
        statistic(problem, "lse", "saved" if role == "output" else role),
    )


def gradients(problem: AttentionProblem) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv."""
    return (
        query_matrix(problem, "dq", problem.head_dim, "output"),
        key_matrix(problem, "dk", problem.head_dim, "output"),
        key_matrix(problem, "dv", problem.value_dim, "output"),
    )


def workspace_layout(arrays: Iterable[Array], alignment: int = 256) -> tuple[dict[str, int], int]:
    """Return where each array starts in one block of memory, and how large that is in bytes."""
    offsets, size = {}, 0
    for array in arrays:
        offsets[array.name] = size
        size += ceil_div(array.nbytes, alignment) * alignment
    return offsets, size
