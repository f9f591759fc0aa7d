"""What attention must move: compulsory traffic, the published upper and lower bounds, and fitted exponents.

The published bounds are for one head, in elements, and leave constants out: they are the expressions inside Θ, Ω
and O, with M, ``sram_elements``, the on-chip memory of one thread block. Only :func:`compulsory_traffic` and
:func:`matmul_elements` carry their constants, and may be held against a count as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simattn.arithmetic.formats import INDEX_DTYPES, ITEM_BYTES, STORED_BYTES
from simattn.masks import Visibility
from simattn.plan import check_choice
from simattn.problem import AttentionProblem, Direction
from simattn.traffic import ArrayTraffic, Traffic

# Compulsory traffic


def seen_columns(visibility: Visibility) -> int:
    """Return how many columns are seen by any row.

    The cost does not depend on the lengths; with a block mask it is that of sorting the stored blocks.
    """
    mask = visibility.blocks
    if mask is None:
        low, high = visibility.interval(0, visibility.rows)
        return high - low
    intervals = []
    for block_row, runs in mask.row_runs:
        first = block_row * mask.q_block
        low, high = visibility.interval(first, min(first + mask.q_block, visibility.rows))
        for start, stop in runs:
            intervals.append((max(low, start * mask.kv_block), min(high, stop * mask.kv_block)))
    seen = end = 0
    for start, stop in sorted(intervals):
        if stop > max(start, end):
            seen += stop - max(start, end)
            end = stop
    return seen


def compulsory_traffic(problem: AttentionProblem, direction: Direction) -> Traffic:
    """Return what every implementation moves from cold caches: each input read once, each output written once.

    Forward and in a decoding step, q, k and v are read and out is written; backward, dout is read too and dq, dk and dv
    are written. Rows that the mask hides from every row of the other side need not be read; outputs are written whole.
    What a forward pass saves for its backward pass can be computed again, so it does not count. Grouped keys and values
    count once per KV head. Inputs that a problem has besides are read whole, and a state is written too; indices, such
    as those of pages, need not be in memory.

    Parameters
    ----------
    problem
        The attention problem.
    direction
        "forward", "backward" without its forward pass, or "decode".

    Returns
    -------
    Traffic
        Bytes by array, of memory only.

    Raises
    ------
    ValueError
        If the direction is unknown.

    Examples
    --------
    >>> problem = AttentionProblem(q_len=4096, head_dim=64, dtype="float32")
    >>> compulsory_traffic(problem, "forward").hbm_bytes == 4 * (4 * 4096 * 64)
    True
    """
    check_choice("direction", direction, ("forward", "backward", "decode"))
    parts = tuple(problem.of_equal_lengths(direction))
    queries = sum(part.batch * part.heads * seen_columns(part.queries_of_keys) for part in parts)
    keys = sum(part.batch * part.kv_heads * seen_columns(part.keys_of_queries) for part in parts)
    every_query = problem.batch * problem.heads * problem.q_len
    every_key = problem.batch * problem.kv_heads * problem.kv_len
    stored = problem.item_bytes

    def bytes_of(rows: int, columns: int, item: int = stored) -> int:
        return rows * columns * item

    def read(count: int) -> ArrayTraffic:
        return ArrayTraffic(hbm_read_bytes=count)

    def written(count: int) -> ArrayTraffic:
        return ArrayTraffic(hbm_write_bytes=count)

    d, value_dim = problem.head_dim, problem.value_dim
    moved = {
        "q": read(bytes_of(queries, d)),
        "k": read(bytes_of(keys, d)),
        "v": read(bytes_of(keys, value_dim)),
    }
    if problem.is_float8:
        factor = bytes_of(problem.batch * problem.kv_heads if keys else 0, 1, ITEM_BYTES["float32"])
        moved |= {f"{name}_descale": read(factor) for name in "qkv"}
    if direction != "backward":
        item = ITEM_BYTES[problem.output_dtype]
        moved["out"] = written(bytes_of(every_query, value_dim, item))
    else:
        moved["dout"] = read(bytes_of(queries, value_dim))
        moved["dq"] = written(bytes_of(every_query, d))
        moved["dk"] = written(bytes_of(every_key, d))
        moved["dv"] = written(bytes_of(every_key, value_dim))
    matrices = {"query": problem.batch * problem.heads, "kv": problem.batch * problem.kv_heads, "one": 1}
    for name, shape in problem.inputs(direction).items():
        is_own = name in problem.own_inputs and shape.dtype not in INDEX_DTYPES
        row = bytes_of(matrices[shape.heads], shape.columns, STORED_BYTES[shape.dtype or problem.dtype])
        if is_own or shape.needed_rows is not None:
            needed = shape.rows if shape.needed_rows is None else shape.needed_rows
            moved[name] = read(row * needed) + written(row * shape.rows if name in problem.written_inputs else 0)
        if is_own and direction == "backward" and shape.gradient:
            moved[f"d{name}"] = written(row * shape.rows)
    return Traffic(moved)


# Published bounds, in elements


def standard_elements(length: int, head_dim: int) -> float:
    """Return Nd + N²: attention that stores its scores, forward and backward.

    Source: Dao et al. 2022, arXiv 2205.14135, Theorems 2 and 5, for d ≤ M ≤ Nd. The products inside it meet the
    expression for M ≥ d² only; see :func:`saha_ye_elements`.
    """
    return float(length * head_dim + length**2)


def flash_elements(length: int, head_dim: int, sram_elements: int) -> float:
    """Return N²d²/M: FlashAttention forward and backward, and the lower bound of exact attention.

    Source: Dao et al. 2022, arXiv 2205.14135, Theorems 2 and 5, for d ≤ M ≤ Nd. Proposition 3 is that no exact
    algorithm moves asymptotically less for *all* M in that range; its proof uses M = Θ(Nd) only.
    """
    return length**2 * head_dim**2 / sram_elements


def block_sparse_elements(length: int, head_dim: int, sram_elements: int, density: float) -> float:
    """Return Nd + N²d²s/M, with s the fraction of blocks that are computed.

    Source: Dao et al. 2022, arXiv 2205.14135, Proposition 4.
    """
    return length * head_dim + flash_elements(length, head_dim, sram_elements) * density


def saha_ye_elements(length: int, head_dim: int, sram_elements: int) -> float:
    """Return min(N²d/√M, N²d²/M): upper and lower bound of exact attention with ordinary matrix products.

    Source: Saha & Ye 2024, arXiv 2402.07443, Theorem 3.1. The terms are equal at M = d².
    """
    tiled = length**2 * head_dim / math.sqrt(sram_elements)
    return min(tiled, flash_elements(length, head_dim, sram_elements))


def any_matmul_elements(length: int, head_dim: int, sram_elements: int) -> float:
    """Return min(N²d²/M, N²): lower bound of exact attention with any algorithm for matrix products.

    Source: Saha & Ye 2024, arXiv 2402.07443, Theorem 4.8.
    """
    return min(flash_elements(length, head_dim, sram_elements), float(length**2))


def backward_elements(length: int, head_dim: int, sram_elements: int) -> float:
    """Return min((N²d² + Nd³)/M, (N²d + Nd²)/√M): upper and lower bound of the backward pass.

    Source: Li et al. 2024, arXiv 2410.09397, abstract.
    """
    large = (length**2 * head_dim**2 + length * head_dim**3) / sram_elements
    small = (length**2 * head_dim + length * head_dim**2) / math.sqrt(sram_elements)
    return min(large, small)


def matmul_elements(rows: int, columns: int, contracted: int, sram_elements: int) -> float:
    """Return max(2·rows·columns·contracted/√M − 2M, 0): least traffic of one stored matrix product.

    The order is Hong & Kung's (STOC 1981); the constant is that of Smith et al. 2017, arXiv 1702.02017.
    """
    products = rows * columns * contracted
    return max(0.0, 2 * products / math.sqrt(sram_elements) - 2 * sram_elements)


# Exponents


@dataclass(frozen=True)
class PowerLaw:
    """value ≈ constant · Π variable^exponent, fitted to counted rows.

    Attributes
    ----------
    constant
        Factor of the law.
    exponents, standard_errors
        By variable; the error is that of the least-squares fit, which measures how far the rows are from any power
        law.
    points
        Rows fitted.
    """

    constant: float
    exponents: Mapping[str, float]
    standard_errors: Mapping[str, float]
    points: int

    def __str__(self) -> str:
        # Adding 0 turns a rounded −0 into 0.
        return " · ".join(f"{name}^{round(exponent, 2) + 0.0:.2f}" for name, exponent in self.exponents.items())


def fit_exponents(rows: Sequence[Mapping[str, float]], variables: Sequence[str], value: str = "elements") -> PowerLaw:
    """Fit a power law by least squares of the logarithms.

    Parameters
    ----------
    rows
        Rows with a positive number for every variable and for the value.
    variables
        Names whose exponents are wanted.
    value
        Name of the fitted quantity.

    Raises
    ------
    ValueError
        If a number is not positive and finite, there are too few rows, or the rows do not tell the variables apart.

    Examples
    --------
    >>> rows = [{"N": n, "elements": 3 * n**2} for n in (1, 2, 4, 8)]
    >>> str(fit_exponents(rows, ["N"]))
    'N^2.00'
    """
    for index, row in enumerate(rows):
        for name in (*variables, value):
            if not (math.isfinite(row[name]) and row[name] > 0):
                raise ValueError(f"rows[{index}][{name!r}]={row[name]!r}: expected a finite number above 0")
    if len(rows) <= len(variables) + 1:
        raise ValueError(
            f"rows has {len(rows)} rows: expected at least {len(variables) + 2} for {len(variables)} exponents"
        )
    # Python's logarithm takes integers of any size.
    design = np.array([[1.0, *(math.log(row[name]) for name in variables)] for row in rows])
    target = np.array([math.log(row[value]) for row in rows])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(f"variables={list(variables)}: expected rows in which they vary independently")
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    residuals = target - design @ solution
    variance = float(residuals @ residuals) / (len(rows) - design.shape[1])
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return PowerLaw(
        constant=math.exp(solution[0]),
        exponents=dict(zip(variables, map(float, solution[1:]), strict=True)),
        standard_errors=dict(zip(variables, map(float, errors[1:]), strict=True)),
        points=len(rows),
    )
