"""Hold the model of the tensor cores against the device: random products, every bit of every sum.

``python -m cupy_kernels.prove_tensor_cores --output FILE`` multiplies 64 × 128 by 128 × columns, sums included, for
every shape, place of the left matrix and order of the right one that a kernel uses with ``wgmma``, and by
``mma.sync``; it computes the same on all CPU cores by :mod:`simattn.arithmetic.tensor_cores`, counts differing sums and
writes a summary. For ``mma.sync`` it tries several dot-adds and says which of them are the device's. The exit code is 1
if a sum of ``wgmma`` differs, or if no dot-add is that of ``mma.sync``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cupy_kernels import compiler
from cupy_kernels.compiler import Variant
from cupy_kernels.verify import environment, precompile
from simattn.arithmetic.formats import numpy_dtype
from simattn.arithmetic.tensor_cores import WGMMA, DotAdd, add_products

Values = npt.NDArray[Any]

ROWS, DEPTH, THREADS = 64, 128, 128
"""Of ``tensor_core_proof.cu``."""

PARAMETERS = np.dtype(
    [
        *((name, np.uint64) for name in ("left", "right", "before", "after")),
        *((name, np.int32) for name in ("matrices", "adds")),
    ]
)
"""``ProofParameters`` of it."""

STORAGE_TYPES = ("bfloat16", "float16")
WGMMA_COLUMNS = (64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)
MMA_COLUMNS = 64

MMA_CANDIDATES = tuple(itertools.product((16, 8, 4), (23, 24, 25, 26)))
"""Products in a dot-add and bits that a term keeps, as tried for ``mma.sync``."""

KINDS = ("normal", "bits", "cancelling", "subnormal", "tiny", "huge", "zeros", "wide", "special")
"""Kinds of operands; see :func:`draw_operands`."""

SUMS = ("none", "zero", "normal", "wide")
"""What products are added to; "none" starts a chain without a sum."""

MATRICES = 8
"""Left and right matrices of a case; every pair is multiplied."""


# Cases


@dataclass(frozen=True)
class Instruction:
    """A form of an instruction that kernels use.

    Attributes
    ----------
    storage
        Format of the operands.
    columns
        Columns of a product.
    by_warp
        ``mma.sync`` if true, else ``wgmma``.
    left_in_registers
        Else the left matrix is in shared memory.
    right_transposed
        Whether the right matrix lies with its rows along the contracted axis.
    """

    storage: str
    columns: int
    by_warp: bool = False
    left_in_registers: bool = False
    right_transposed: bool = False

    @property
    def variant(self) -> Variant:
        """The kernel."""
        macros = {
            "STORAGE": self.storage,
            "COLUMNS": str(self.columns),
            "BY_WARP": str(int(self.by_warp)),
            "LEFT_IN_REGISTERS": str(int(self.left_in_registers)),
            "RIGHT_TRANSPOSED": str(int(self.right_transposed)),
        }
        return Variant("tensor_core_proof.cu", "prove_products", tuple(macros.items()))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of the kernel: both matrices, columns in slabs of 64."""
        if self.by_warp:
            return 0
        rows, columns = (DEPTH, self.columns) if self.right_transposed else (self.columns, DEPTH)
        return 2 * ROWS * DEPTH + 128 * rows * -(-columns // 64)

    def __str__(self) -> str:
        left = "registers" if self.left_in_registers else "shared"
        right = "transposed" if self.right_transposed else "as it is"
        name = "mma.sync" if self.by_warp else "wgmma"
        return f"{name} {self.storage} {self.columns} columns, left {left}, right {right}"


WGMMA_INSTRUCTIONS = tuple(
    Instruction(storage, columns, left_in_registers=registers, right_transposed=transposed)
    for storage, columns, registers, transposed in itertools.product(
        STORAGE_TYPES, WGMMA_COLUMNS, (False, True), (False, True)
    )
)
MMA_INSTRUCTIONS = tuple(
    Instruction(storage, MMA_COLUMNS, by_warp=True, left_in_registers=True) for storage in STORAGE_TYPES
)


@dataclass(frozen=True)
class Operands:
    """Matrices of a case, float32 that holds numbers of the input format.

    Attributes
    ----------
    left, right
        Shapes (matrices, rows, depth) and (matrices, depth, columns).
    before
        What products are added to, shape (matrices, rows, columns).
    """

    left: Values
    right: Values
    before: Values

    @property
    def pairs(self) -> tuple[Values, Values]:
        """The left and the right matrix of every product."""
        first, second = np.divmod(np.arange(len(self.left) ** 2), len(self.left))
        return first, second

    def products(self, unit: DotAdd) -> Values:
        """Return the sums of every pair by the model."""
        first, second = self.pairs
        total: Values = self.before[(first + second) % len(self.left)]
        add_products(total, self.left, first, self.right, second, unit)
        return total


def draw_operands(
    kind: str,
    sums: str,
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    generator: np.random.Generator,
    unit: DotAdd,
    rounded: Callable[[Values], Values],
) -> Operands:
    """Draw operands that dot-adds of other parameters would treat otherwise.

    Parameters
    ----------
    kind
        "normal"; "bits", finite numbers with uniform bits; "cancelling", pairs of terms that almost cancel;
        "subnormal" in the input format; "tiny", products near float32's smallest number; "huge", sums near its largest;
        "zeros" of both signs among few other numbers; "wide", exponents far apart; "special", Inf and NaN among others.
    sums
        One of :data:`SUMS`.
    shapes
        Of left and right operands and of the sums; the left one is contracted along its last axis.
    generator
        Source of randomness.
    unit
        The dot-add of the input format.
    rounded
        Rounds to the input format, widened to float32.
    """
    left, right, before = (generator.standard_normal(shape) for shape in shapes)
    before *= {"none": 0.0, "zero": 0.0, "normal": 1.0, "wide": 1.0}[sums]
    if sums == "wide":
        before *= 2.0 ** generator.integers(-60, 60, before.shape)
    least = unit.least_exponent
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if kind == "bits":
            left, right = (_with_uniform_bits(array, generator, least, rounded) for array in (left, right))
        elif kind == "cancelling":
            pairs = left.shape[-1] // 2 * 2
            left[..., 1:pairs:2] = -left[..., :pairs:2] * (
                1 + 2.0**-7 * generator.integers(-1, 2, left[..., 1:pairs:2].shape)
            )
            right[..., 1:pairs:2, :] = right[..., :pairs:2, :]
        elif kind == "subnormal":
            left *= 2.0 ** (least + generator.integers(-9, 3, left.shape))
            right *= 2.0 ** generator.integers(-3, 12, right.shape)
        elif kind == "tiny":
            left, right = (
                array * 2.0 ** (max(least, -74) + generator.integers(-3, 3, array.shape)) for array in (left, right)
            )
            before *= 2.0 ** generator.integers(-149, -140, before.shape)
        elif kind == "huge":
            left *= 2.0 ** (-least - 2)
            right *= 2.0 ** generator.integers(-3, 4, right.shape)
            before *= 2.0**126
        elif kind == "zeros":
            left *= generator.choice([0.0, -0.0, 1.0, -1.0], left.shape, p=[0.4, 0.4, 0.1, 0.1])
            right *= generator.choice([0.0, -0.0, 1.0], right.shape, p=[0.4, 0.4, 0.2])
            before *= generator.choice([0.0, -0.0, 1.0], before.shape)
        elif kind == "wide":
            left, right = (array * 2.0 ** generator.integers(-20, 20, array.shape) for array in (left, right))
        elif kind == "special":
            for array in (left, right, before):
                places = generator.random(array.shape) < 1 / array.shape[-1]
                array[places] = generator.choice([np.nan, np.inf, -np.inf], np.count_nonzero(places))
        if sums == "none":
            before[:] = 0
        return Operands(rounded(left), rounded(right), before.astype(np.float32))


def _with_uniform_bits(
    array: Values, generator: np.random.Generator, least: int, rounded: Callable[[Values], Values]
) -> Values:
    """Return random numbers whose exponents are uniform over those of the format."""
    exponents = generator.integers(least - 8, -least + 2, array.shape)
    significands = generator.uniform(1, 2, array.shape) * np.sign(array)
    values = rounded(significands * 2.0**exponents)
    return np.where(np.isfinite(values), values, 1)


def rounding_to(storage: str) -> Callable[[Values], Values]:
    """Return what rounds to a storage format, widened to float32."""
    stored = numpy_dtype(storage)

    def rounded(values: Values) -> Values:
        wide: Values = values.astype(stored).astype(np.float32)
        return wide

    return rounded


def draw_case(instruction: Instruction, kind: str, sums: str, seed: int, matrices: int) -> Operands:
    """Draw the matrices of a case, which depends on the arguments alone."""
    shapes = ((matrices, ROWS, DEPTH), (matrices, DEPTH, instruction.columns), (matrices, ROWS, instruction.columns))
    key = [seed, *str(instruction).encode(), KINDS.index(kind), SUMS.index(sums)]
    storage = instruction.storage
    return draw_operands(kind, sums, shapes, np.random.default_rng(key), WGMMA[storage], rounding_to(storage))


# Both sides


def on_device(instruction: Instruction, operands: Operands, *, adds: bool) -> Values:
    """Return the sums of every pair as CuPy's current device computes them."""
    import cupy

    stored = numpy_dtype(instruction.storage)
    right = operands.right if instruction.right_transposed else operands.right.swapaxes(-1, -2)
    matrices = len(operands.left)
    left_bits, right_bits = (
        cupy.asarray(np.ascontiguousarray(array.astype(stored)).view(np.uint16)) for array in (operands.left, right)
    )
    after = cupy.empty((matrices * matrices, *operands.before.shape[1:]), cupy.float32)
    kernel = compiler.load(instruction.variant, dynamic_shared_bytes=instruction.shared_bytes)
    before = cupy.asarray(operands.before)
    addresses = [array.data.ptr for array in (left_bits, right_bits, before, after)]
    parameters = np.array([(*addresses, matrices, adds)], PARAMETERS)
    kernel((matrices * matrices,), (THREADS,), (parameters,), instruction.shared_bytes)
    found: Values = after.get()
    return found


def differing_sums(actual: Values, expected: Values) -> int:
    """Return how many sums differ in any bit, those of NaN too."""
    return int(np.count_nonzero(actual.view(np.uint32) != expected.view(np.uint32)))


def prove(
    instruction: Instruction, units: dict[str, DotAdd], kinds: Iterable[str], seed: int, matrices: int = MATRICES
) -> dict[str, Any]:
    """Compare one instruction with models of it.

    Parameters
    ----------
    instruction
        What the device runs.
    units
        The models, by name.
    kinds
        Kinds of operands.
    seed
        Seed of the operands.
    matrices
        Left and right matrices of each kind of operands and sums; every pair is multiplied.

    Returns
    -------
    dict
        ``sums`` compared; ``differing`` of them by model and kind of operands, where any did.
    """
    compared, differing = 0, {name: dict[str, int]() for name in units}
    for kind, sums in itertools.product(kinds, SUMS):
        operands = draw_case(instruction, kind, sums, seed, matrices)
        found = on_device(instruction, operands, adds=sums != "none")
        compared += found.size
        for name, unit in units.items():
            count = differing_sums(found, operands.products(unit))
            if count:
                differing[name][kind] = differing[name].get(kind, 0) + count
    return {"sums": compared, "differing": differing}


def mma_candidates(storage: str) -> dict[str, DotAdd]:
    """Return the dot-adds that may be that of ``mma.sync``."""
    return {
        f"{depth} products, {bits} bits": replace(WGMMA[storage], depth=depth, fraction_bits=bits)
        for depth, bits in MMA_CANDIDATES
    }


# The run


def run(seed: int, matrices: int, instructions: Sequence[Instruction]) -> dict[str, Any]:
    """Compare instructions with their models and return the summary."""
    report: dict[str, Any] = {"wgmma": [], "mma.sync": []}
    for number, instruction in enumerate(instructions):
        start, form = time.monotonic(), vars(instruction)
        if instruction.by_warp:
            result = prove(instruction, mma_candidates(instruction.storage), KINDS, seed, matrices)
            holds = [name for name, kinds in result["differing"].items() if not kinds]
            report["mma.sync"].append({**form, **result, "holds": holds})
        else:
            result = prove(instruction, {"model": WGMMA[instruction.storage]}, KINDS, seed, matrices)
            differing = sum(result["differing"]["model"].values())
            by_kind = result["differing"]["model"]
            report["wgmma"].append(
                {**form, "sums": result["sums"], "differing_sums": differing, "differing_by_kind": by_kind}
            )
        sys.stderr.write(
            f"{number + 1}/{len(instructions)} {instruction}: {result['sums']:,} sums, {result['differing']}, "
            f"{time.monotonic() - start:.1f} s\n"
        )
    for name, results in report.items():
        report[name] = {"sums": sum(one["sums"] for one in results), "instructions": results}
    report["wgmma"]["differing_sums"] = sum(one["differing_sums"] for one in report["wgmma"]["instructions"])
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    lines = str(__doc__).splitlines()
    parser = argparse.ArgumentParser(prog="python -m cupy_kernels.prove_tensor_cores", description=lines[0])
    parser.add_argument("--output", type=Path, required=True, help="file of the summary, JSON")
    parser.add_argument("--seed", type=int, default=0, help="seed of the operands (default 0)")
    parser.add_argument(
        "--matrices",
        type=int,
        default=MATRICES,
        help=f"left and right matrices of each kind; every pair is multiplied (default {MATRICES})",
    )
    arguments = parser.parse_args(argv)
    found, start = environment(), time.monotonic()
    capability = divmod(int(found["compute_capability"]), 10)
    instructions = (*(WGMMA_INSTRUCTIONS if capability[0] == 9 else ()), *MMA_INSTRUCTIONS)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        precompile(pool, {one.variant for one in instructions}, compiler.choose_architecture(capability))
    report = run(arguments.seed, arguments.matrices, instructions)
    request = {"seed": arguments.seed, "matrices": arguments.matrices, "depth": DEPTH, "kinds": KINDS, "sums": SUMS}
    summary = {**found, "request": request, "seconds": round(time.monotonic() - start, 1), **report}
    arguments.output.write_text(json.dumps(summary, indent=1) + "\n")
    clean = not report["wgmma"]["differing_sums"] and all(one["holds"] for one in report["mma.sync"]["instructions"])
    return 0 if clean else 1


if __name__ == "__main__":
    # By the module's own name, by which the pool's processes know the functions.
    raise SystemExit(import_module("cupy_kernels.prove_tensor_cores").main())
