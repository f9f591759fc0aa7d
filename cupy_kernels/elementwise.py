"""The small kernels before and after the main ones, one launch each; mirrors ``kernels/elementwise.cu``."""

from __future__ import annotations

from cupy_kernels.parameters import Operand
from cupy_kernels.program import Access, Array, Kernel, Step, macros
from simattn.sums import ceil_div

THREADS = 256
BLOCK_ROWS = 64
BLOCK_STATISTICS = 1024


def _step(function: str, dtype: str, over: Array, factor: float = 1.0, **arrays: tuple[Array, Access]) -> Step:
    """Return the launch of a kernel on the rows of an array; arrays by the kernel's names for them."""
    kernel = Kernel(
        source="elementwise.cu",
        function=function,
        macros=macros(storage=dtype),
        threads=THREADS,
        shared_bytes=0,
        accesses=tuple((name, access) for name, (_, access) in arrays.items()),
    )
    block_rows = BLOCK_STATISTICS if over.kind == "statistic" and function != "row_dots" else BLOCK_ROWS
    return Step(
        kernel,
        over.batch * over.heads * ceil_div(over.rows, block_rows),
        tuple(array.name for array, _ in arrays.values()),
        Operand(over.rows, next(iter(arrays.values()))[0].columns, over.heads, factor),
    )


def fill(target: Array, value: float) -> Step:
    """Write one value to a whole array."""
    return _step("fill", target.dtype, target, value, target=(target, "w"))


def convert(source: Array, target: Array) -> Step:
    """Copy a float32 array to one of another storage format."""
    return _step("convert", target.dtype, target, source=(source, "r"), target=(target, "w"))


def row_dots(a: Array, b: Array, target: Array) -> Step:
    """Write the dot product of each pair of rows."""
    return _step("row_dots", a.dtype, target, a=(a, "r"), b=(b, "r"), target=(target, "w"))


def sum_heads(expanded: Array, target: Array) -> Step:
    """Sum the query heads of each KV head."""
    return _step("sum_heads", target.dtype, target, expanded=(expanded, "r"), target=(target, "w"))


def log_sum_exp(row_max: Array, row_sum: Array, lse: Array) -> Step:
    """Write the log-sum-exp of maxima and sums of rows."""
    return _step(
        "log_sum_exp", "float32", lse, row_max=(row_max, "r"), row_sum=(row_sum, "r"), lse=(lse, "w")
    )  # fmt: skip
