"""Find the tables of the hardware's special functions from its results, and compare the model at every input.

``python -m cupy_kernels.derive_special_functions --output FILE`` has the device compute ``ex2.approx.ftz``,
``rcp.approx.ftz`` and ``lg2.approx.ftz`` of all fractions of one binade, fits the coefficients of
:mod:`simattn.arithmetic.special_functions` to them, and then compares the model with the device at all 2³² inputs of
each function, every bit, NaN included. ``--table FILE`` also writes the tables, in the form that
``simattn/arithmetic/special_functions.json`` has. The exit code is 1 if an input differs, or if the tables are not
those that are installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cupy_kernels import compiler
from cupy_kernels.compiler import Variant
from cupy_kernels.verify import environment
from simattn.arithmetic.special_functions import (
    FUNCTIONS,
    LG2_DROPPED_BITS,
    REDUCTIONS,
    STRUCTURES,
    Structure,
    Table,
    square,
    tables,
)

Values = npt.NDArray[Any]
Source = Callable[[int, int], Values]
"""The results (uint32) of a function for the inputs with the bits ``first … first + count - 1``."""

DEVICE_NAMES = {"ex2": "exp2_approximate", "rcp": "reciprocal_approximate", "lg2": "log2_approximate"}
INPUTS = 1 << 32
CHUNK = 1 << 26
BINADE, FIRST_OF_BINADE = 1 << 23, 0x3F800000
"""The fractions of a binade, and the bits of 1."""

NEGATIVE_BINADES = range(0x7C, 0x81)
"""Biased exponents of the negative inputs that tell ex2's reductions apart."""

SEARCHED = range(-2, 3)
"""Integers beside a real estimate that are tried for a coefficient."""

EXAMPLES = 10
"""Differing inputs that are listed."""

BLOCKS, THREADS = 1024, 256
RANGE = np.dtype([("results", np.uint64), ("first", np.uint32), ("count", np.uint32)])
"""``RangeParameters`` of ``special_functions.cu``."""


# The fit


@dataclass(frozen=True)
class RowFit:
    """Coefficients of a row, and the first and last constant that give the results with them."""

    c1: int
    c2: int
    lowest: int
    highest: int


def fit_table(name: str, source: Source) -> Table:
    """Return the table that gives the results of a function.

    Parameters
    ----------
    name
        "ex2", "rcp" or "lg2".
    source
        The function.

    Raises
    ------
    ValueError
        If no coefficients give the results, or more than one pair (c1, c2) of a row does.
    """
    structure = STRUCTURES[name]
    rest = np.arange(1 << structure.rest_bits, dtype=np.int64)
    lost = structure.square_shift
    squares = np.array([square(number << lost) >> 2 * lost for number in rest.tolist()], np.int64)
    terms = structure.signs[1] * (rest << structure.shifts[1]), structure.signs[2] * (squares << structure.shifts[2])
    least, greatest = _sums(name, structure, source(FIRST_OF_BINADE, BINADE))
    if name == "lg2":  # the binade below has the same sums, less 1, rounded the other way
        below, above = _sums(name, structure, source(FIRST_OF_BINADE - BINADE, BINADE))
        one = 1 << structure.weight
        least, greatest = np.maximum(least, one - above), np.minimum(greatest, one - below)
    bounds = (array.reshape(1 << structure.row_bits, -1) for array in (least, greatest))
    rows = [_fit_row(f"{name}, row {row}", *terms, *one) for row, one in enumerate(zip(*bounds, strict=True))]
    table = _with_common_bias(name, structure, rows)
    if name != "ex2":
        return table
    return min((replace(table, reduction=kind) for kind in REDUCTIONS), key=lambda one: _misfits(one, source))


def _sums(name: str, structure: Structure, results: Values) -> tuple[Values, Values]:
    """Return the least and the greatest sum in fixed point, without its sign, that each result can come from."""
    exponent = (results >> 23 & 0xFF).astype(np.int64) - 127
    if name == "ex2":
        exponent[:] = 0  # the integer is not in the sum
    significand = (results & 0x7FFFFF | 0x800000).astype(np.int64)
    places = structure.weight - 23 + exponent
    least = np.where(places >= 0, significand << np.maximum(places, 0), significand >> np.maximum(-places, 0))
    greatest = least + (np.int64(1) << np.maximum(places, LG2_DROPPED_BITS if name == "lg2" else 0)) - 1
    unknown = results == 0  # lg2 of 1, whatever the table
    least[unknown], greatest[unknown] = 0, 1 << 62
    return least, greatest


def _fit_row(where: str, slopes: Values, curves: Values, least: Values, greatest: Values) -> RowFit:
    """Return the coefficients of a row with which some constant gives every result.

    Least squares through the middle of what each sum may be come within one of the integers.
    """
    weights = 1.0 / (greatest - least + 1)
    columns = np.stack([np.ones(len(slopes)), slopes, curves], axis=1)
    sizes = np.abs(columns).max(axis=0)
    middle = least / 2 + greatest / 2
    target = (middle - middle[-1]) * weights
    _, slope, curve = np.linalg.lstsq(columns / sizes * weights[:, None], target, rcond=None)[0] / sizes
    found = []
    for step, bend in itertools.product(SEARCHED, SEARCHED):
        c1, c2 = round(slope) + step, round(curve) + bend
        varying = c1 * slopes + c2 * curves
        lowest, highest = int((least - varying).max()), int((greatest - varying).min())
        if lowest <= highest:
            found.append(RowFit(c1, c2, lowest, highest))
    if len(found) != 1:
        raise ValueError(f"{where}: expected one pair of coefficients that gives the results, found {found}")
    return found[0]


def _with_common_bias(name: str, structure: Structure, rows: Sequence[RowFit]) -> Table:
    """Return the table, every row's constant taken apart into a multiple of c0's unit and the bias they share."""
    unit = 1 << structure.shifts[0]
    narrowest = min(rows, key=lambda row: row.highest - row.lowest)
    origin, lowest, highest = narrowest.lowest, 0, narrowest.highest - narrowest.lowest
    for row in rows:
        first = (row.lowest - origin + unit // 2) % unit - unit // 2
        lowest, highest = max(lowest, first), min(highest, first + row.highest - row.lowest)
    if lowest > highest:
        raise ValueError(f"{name}: the rows share no bias")
    bias = structure.whole_bias * unit + _roundest(origin + lowest, origin + highest) % unit
    table = []
    for row in rows:
        c0 = (row.highest - bias) // unit
        assert row.lowest <= c0 * unit + bias
        table.append((c0, row.c1, row.c2))
    return Table(np.array(table, np.int64), bias)


def _roundest(lowest: int, highest: int) -> int:
    """Return the integer of a range that ends in the most zero bits."""
    for places in reversed(range(63)):
        number = -(-lowest >> places) << places
        if number <= highest:
            return number
    raise AssertionError(f"an empty range from {lowest} to {highest}")


def _misfits(table: Table, source: Source) -> int:
    """Return for how many negative inputs ex2 by this table is not what the function returns."""
    firsts = [(1 << 31) + (exponent << 23) for exponent in NEGATIVE_BINADES]
    return sum(len(differing_inputs("ex2", table, source, first, BINADE)) for first in firsts)


# The comparison


def differing_inputs(name: str, table: Table, source: Source, first: int, count: int) -> Values:
    """Return the bits of the inputs ``first … first + count - 1`` at which model and function differ in any bit."""
    inputs = np.arange(first, first + count, dtype=np.uint32)
    modelled = FUNCTIONS[name](inputs.view(np.float32), table=table).view(np.uint32)
    different: Values = inputs[modelled != source(first, count)]
    return different


def compare_all(name: str, table: Table, source: Source) -> dict[str, Any]:
    """Compare model and function at all inputs."""
    start, differing, examples = time.monotonic(), 0, list[str]()
    for first in range(0, INPUTS, CHUNK):
        found = differing_inputs(name, table, source, first, CHUNK)
        differing += len(found)
        examples += [f"{bits:08x}" for bits in found[: EXAMPLES - len(examples)]]
    seconds = round(time.monotonic() - start, 1)
    return {"inputs": INPUTS, "differing_inputs": differing, "examples": examples, "seconds": seconds}


def variant_of(name: str) -> Variant:
    """Return the kernel that computes a function."""
    return Variant("special_functions.cu", "special_function", (("FUNCTION", DEVICE_NAMES[name]),))


def device_source(name: str) -> Source:
    """Return the function as CuPy's current device computes it."""
    import cupy

    kernel = compiler.load(variant_of(name))

    def results(first: int, count: int) -> Values:
        computed = cupy.empty(count, cupy.uint32)
        kernel((BLOCKS,), (THREADS,), (np.array([(computed.data.ptr, first, count)], RANGE),), 0)
        held: Values = computed.get()
        return held

    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    lines = str(__doc__).splitlines()
    parser = argparse.ArgumentParser(prog="python -m cupy_kernels.derive_special_functions", description=lines[0])
    parser.add_argument("--output", type=Path, required=True, help="file of the comparison, JSON")
    parser.add_argument("--table", type=Path, help="file of the tables, JSON (default: they are not written)")
    arguments = parser.parse_args(argv)
    found, report = environment(), dict[str, Any]()
    derived: dict[str, Any] = {}
    for name in STRUCTURES:
        source = device_source(name)
        table = fit_table(name, source)
        derived[name] = table.record(name)
        report[name] = compare_all(name, table, source) | {
            "as_installed": table.record(name) == tables()[name].record(name)
        }
        sys.stderr.write(f"{name}: {report[name]}\n")
    if arguments.table is not None:
        device = {key: found[key] for key in ("device", "compute_capability", "driver")}
        arguments.table.write_text(json.dumps({"fitted_to": device, **derived}, indent=1) + "\n")
    arguments.output.write_text(json.dumps({**found, "functions": report}, indent=1) + "\n")
    clean = all(one["as_installed"] and not one["differing_inputs"] for one in report.values())
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
