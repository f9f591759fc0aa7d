"""The models of Hopper's instructions in the CPU build find what is wrong with their use."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cupy_kernels import cpu_build
from cupy_kernels.compiler import Variant
from cupy_kernels.cpu_build import COPIES, ORDERS, KernelFaultError
from cupy_kernels.program import Array, Boxes
from cupy_kernels.tensor_map import TensorMap
from simattn.arithmetic import tensor_cores
from simattn.testing import assert_same_bits

try:
    cpu_build.compiler()
except cpu_build.CompilerNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)

SIZE = 64
SHARED_BYTES = 3 * 64 * 128 + 64

FAULTS = {
    "INITIALISED_TWICE": "the barrier of byte 24576 is initialised twice",
    "NOT_PUBLISHED": "before it was published and a barrier of the block passed",
    "USED_BEFORE_BARRIER": "arrives at the barrier of byte 24584 before it was published",
    "OVERWRITTEN": "the barrier of byte 24584 was overwritten",
    "NOT_AWAITED": "the block ends with 2 copies under way",
    "OTHER_PARITY": "the block ends with 2 copies under way",
    "NO_BARRIER": "waits at byte 24592, where no barrier was initialised",
    "NEVER_FULL": "parity 0 of the barrier at byte 24576, whose phase lacks 1 arrivals and 0 bytes",
    "TOO_MANY_ARRIVALS": "arrives at the barrier of byte 24576, whose 1 arrivals of this phase are complete",
    "TOO_MANY_BYTES": "the barrier at byte 24576, whose phase lacks 0 arrivals and 16 bytes",
    "TOO_FEW_BYTES": "8192 bytes come to the barrier of byte 24576, which expects 8176",
    "NOT_ALIGNED": "load of a box at byte 8704 of shared memory, no multiple of 1024",
    "PAST_THE_END": "load of a box past shared memory, at byte 24576",
    "OTHER_AXES": "load of a box at 5 coordinates, of an array of 4 axes",
    "NO_MAP": "is no tensor map",
    "STILL_LOADING": "the block ends with 1 copies under way",
    "TOO_FEW_REGISTERS": "waits for 240 registers instead of 168",
    "ONE_WARP_KEEPS_REGISTERS": "registers",
    "PART_OF_A_WARP": "48 threads at named barrier 1: expected whole warps",
    "OTHER_COUNT": "threads at named barrier 1, others",
    "NO_SWIZZLE": "descriptor 4000000000 of a matrix",
    "INSIDE_A_PATTERN": "a matrix starts at byte 128, inside a swizzled pattern",
    "ANOTHER_MATRIX": "starts another product than other threads of its warpgroup",
    "NO_FENCE": "starts a product with no fence since the last wait for products",
    "NO_SECOND_FENCE": "starts a product with no fence since the last wait for products",
    "ONE_WARP_MISSES": "product",
    "SUMS_TOUCHED": "sums of a product under way were touched",
    "CHANGED_AFTER_FENCE": "registers of a product changed after the last fence",
    "NOT_FINISHED": "ends with products under way",
    "READS_STORED": "a product reads byte .* of shared memory, which thread .* stored and did not publish",
    "RESULT_NOT_PUBLISHED": "a copy reads byte .* of shared memory, which thread .* stored and did not publish",
    "STORED_TWICE": "out is written twice",
    "STORE_NOT_COMMITTED": "ends with stores that may still read",
    "STORE_NOT_AWAITED": "ends with stores that may still read",
}
"""What is reported of each misuse."""

SEEN_IN_RESULTS = ("OTHER_STRIDE", "READ_TOO_EARLY", "CHANGED_UNDER_WAY", "OVERWRITTEN_UNDER_WAY", "OTHER_COLUMNS")
NAMES = (*FAULTS, *SEEN_IN_RESULTS)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Compile the kernel; its fault is a parameter."""
    directory = tmp_path_factory.mktemp("faults") / "kernels"
    shutil.copytree(cpu_build.KERNELS, directory)
    numbers = "".join(f"constexpr int {name} = {number + 1};\n" for number, name in enumerate(NAMES))
    source = Path(__file__).with_name("hopper_faults.cu").read_text()
    (directory / "faults.cu").write_text(numbers + source)
    return cpu_build.loaded(cpu_build.build_variant(Variant("faults.cu", "faults"), directory))


@pytest.fixture(scope="module")
def case():
    """Return two matrices, and the sum of products that the kernel stores."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((SIZE, SIZE)).astype(ml_dtypes.bfloat16) for _ in "ab")

    def add(total, left, right):
        which, unit = np.zeros(1, np.int64), tensor_cores.WGMMA["bfloat16"]
        left, right = (np.ascontiguousarray(matrix, dtype=np.float32)[None] for matrix in (left, right))
        tensor_cores.add_products(total[None], left, which, right, which, unit)

    scores, out = np.zeros((SIZE, SIZE), np.float32), np.zeros((SIZE, SIZE), np.float32)
    add(scores, a, b.T)
    for _ in range(2):
        add(out, scores.astype(ml_dtypes.bfloat16), b)
    return a, b, out.astype(ml_dtypes.bfloat16)


def run(library, case, fault, order, copies, seed=0):
    """Run the kernel with a fault, "" for none, and return what it stored."""
    a, b, _ = case
    out = np.full((SIZE, SIZE), np.nan, ml_dtypes.bfloat16)
    given = {"a": (a, "r"), "b": (b, "r"), "out": (out, "w")}
    parameters = np.zeros(1, np.dtype({
        "names": [*given, "fault", *(f"{name}_map" for name in given)],
        "formats": [*["u8"] * 3, "i4", *["V128"] * 3],
        "offsets": [0, 8, 16, 24, 64, 192, 320],
        "itemsize": 448,
    }))  # fmt: skip
    parameters["fault"] = NAMES.index(fault) + 1 if fault else 0
    records, flags = [], []
    for name, (array, access) in given.items():
        described = Array(name, "matrix", "bfloat16", 1, 1, SIZE, SIZE, "input")
        boxes = TensorMap.of(described, Boxes(name, SIZE), described.strides)
        parameters[name] = array.ctypes.data
        parameters[f"{name}_map"] = np.void(boxes.cpu_record(array.ctypes.data))
        flags.append(np.zeros(array.nbytes, np.uint8))
        extents, strides = (ctypes.c_longlong * 3)(1, 1, SIZE), (ctypes.c_longlong * 3)(8192, 8192, 128)
        written = flags[-1].ctypes.data if access == "w" else None
        bits = sum(cpu_build.ACCESS_BITS[letter] for letter in access)
        records.append(cpu_build.ArrayRecord(name.encode(), array.ctypes.data, extents, strides, 128, written, bits))
    message = ctypes.create_string_buffer(512)
    succeeded = library(
        parameters.ctypes.data, 1, 384, SHARED_BYTES, (cpu_build.ArrayRecord * 3)(*records), 3,
        ORDERS.index(order), COPIES.index(copies), seed, message, len(message),
    )  # fmt: skip
    if not succeeded:
        raise KernelFaultError(message.value.decode())
    return out


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_sound_kernel_is_exact(library, case, order, copies):
    for seed in range(4):
        assert_same_bits(run(library, case, "", order, copies, seed), case[2])


CHANCES = (("forward", "late"), ("reverse", "early"), ("random", "late"))


def complaint(library, case, fault):
    """Return what is reported first of a fault, "" if nothing is."""
    for order, copies in CHANCES:
        try:
            run(library, case, fault, order, copies)
        except KernelFaultError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("fault", FAULTS)
def test_reports_misuse(library, case, fault):
    assert re.search(FAULTS[fault], complaint(library, case, fault))


@pytest.mark.parametrize("fault", SEEN_IN_RESULTS)
def test_misuse_shows_in_results(library, case, fault):
    results = [run(library, case, fault, order, copies) for order, copies in CHANCES]
    assert any((found.view(np.uint16) != case[2].view(np.uint16)).any() for found in results)
