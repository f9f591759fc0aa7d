"""The models of Hopper's instructions in the CPU build find what is wrong with their use, in a kernel and in flash3."""

from __future__ import annotations

import ctypes
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cupy_kernels import cpu_build, verify
from cupy_kernels.compiler import Variant
from cupy_kernels.cpu_build import COPIES, ORDERS, KernelFaultError
from cupy_kernels.program import Array, Boxes
from cupy_kernels.table import make_program
from cupy_kernels.tensor_map import TensorMap
from simattn import AttentionProblem
from simattn.algorithms.flash3 import Flash3Plan
from simattn.arithmetic import tensor_cores
from simattn.hardware import get_hardware
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


CHANCES = (
    ("forward", "late", 0),
    ("reverse", "early", 0),
    *(("random", "late", seed) for seed in range(4)),
)


def complaint(library, case, fault):
    """Return what is reported first of a fault, "" if nothing is."""
    for chance in CHANCES:
        try:
            run(library, case, fault, *chance)
        except KernelFaultError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("fault", FAULTS)
def test_reports_misuse(library, case, fault):
    assert re.search(FAULTS[fault], complaint(library, case, fault))


@pytest.mark.parametrize("fault", SEEN_IN_RESULTS)
def test_misuse_shows_in_results(library, case, fault):
    results = [run(library, case, fault, *chance) for chance in CHANCES]
    assert any((found.view(np.uint16) != case[2].view(np.uint16)).any() for found in results)


# Faults planted in flash3

KERNEL = "flash3_forward.cu"

FLASH3_FAULTS = {
    "no fence before the scores": (KERNEL, r"fence_products\(\);(\s+start_scores)", r"\1"),
    "no wait for the scores": (KERNEL, r"wait_for_products<1>\(\);", ""),
    "no wait for the output": (KERNEL, r"wait_for_products<0>\(\);(\s+release_values)", r"\1"),
    "probabilities overwritten while they are read": (
        KERNEL,
        r"wait_for_products<0>\(\);(\s+release_values\(\);\s+\}[^}]*?)(round_probabilities\(probabilities, scores\);)",
        r"\2 wait_for_products<0>();\1",
    ),
    "queries not awaited": (KERNEL, r"wait\(&barriers->q_full.*\);", ""),
    "values not awaited": (KERNEL, r"wait\(&barriers->v_full.*\);(\s+fence)", r"\1"),
    "room not awaited": (KERNEL, r"wait\(empty, parity \^ 1\);", ""),
    "phases of keys mixed up": (KERNEL, r"(keys\.parity\(\)), k_bytes", r"\1 ^ 1, k_bytes"),
    "phases of queries mixed up": (KERNEL, r"(ring\.parity\(\)) \^ 1\)", r"\1)"),
    "bytes that are not expected": (KERNEL, r"(arrive_expecting\(full, KEY_BYTES)\)", r"\1 - 16)"),
    "a release too many": (KERNEL, r"(init_barrier\(&barriers->k_empty\[stage\], .*)\);", r"\1 - 1);"),
    "barriers not published": (KERNEL, r"publish_barriers\(\);", ""),
    "results not published": (KERNEL, r"publish_to_copies\(\);", ""),
    "results stored too early": (KERNEL, r"publish_to_copies\(\);\s+__syncwarp\(\);", "publish_to_copies();"),
    "results overwritten while they are stored": (KERNEL, r"wait_for_store_reads<0>\(\);", ""),
    "results not swizzled": (KERNEL, r" \^ matrix_row % 8\) \* 16", ") * 16"),
    "rows of a descriptor": ("hopper.cuh", "eight_rows = 8 ", "eight_rows = 16 "),
    "slabs of a descriptor": (KERNEL, r"(describe_matrix\(.*), KEY_SLAB_BYTES\)", r"\1, 2 * KEY_SLAB_BYTES)"),
    "steps through the values": (KERNEL, r"step \* STEP \* SLAB_ROW_BYTES", "step * SLAB_ROW_BYTES"),
    "turns that do not end": (KERNEL, r"if \(TAKE_TURNS\) arrive_named", "if (false) arrive_named"),
    "turns of others": (KERNEL, r"sync_named\(2 \+ group, 2 \* WARPGROUP\)", "sync_named(2 + group, 3 * WARPGROUP)"),
    "registers that there are not": (KERNEL, "(shrink_registers<PRODUCER_REGISTERS)>", r"\1 + 40>"),
    "hidden keys that matter": (KERNEL, r"scores\[i\] = seen \?", "scores[i] = true ?"),
    "hidden values that matter": (KERNEL, r"if \(!MASKED \|\| !sight\.hides\(tile\)\) return false;", "return false;"),
    "statistics past the end": (KERNEL, r" && position < query_count\(problem, work\)", ""),
    "queries not counted": (KERNEL, r"counter\.add\(inside\(GROUP_ROWS.*", ""),
    "query tiles of other blocks": (KERNEL, r"turn_ \+= .*;", "turn_ += 1;"),
}  # fmt: skip
"""File, pattern and what it is replaced by wherever it is."""


@pytest.fixture(scope="module")
def attention():
    """Return a problem of several tiles along both axes, with NaN in keys that few rows see, and its program."""
    problem = AttentionProblem(
        q_len=200, kv_len=400, heads=2, kv_heads=1, head_dim=72, value_dim=120, window=(250, 30), dtype="bfloat16"
    )
    plan = Flash3Plan(tiles=(128, 64))
    case = verify.random_case("flash3", "forward", problem, plan=plan)
    for name in "kv":
        case.inputs[name][:, :8] = np.nan
    assert 0 < np.count_nonzero(problem.visible_elements()[:, :8].any(axis=1)) < 100
    hardware = replace(get_hardware("H100-SXM"), streaming_multiprocessors=2)
    program = make_program("flash3", "forward", problem, plan, hardware)
    return case, program, verify.simulate(case)


@pytest.fixture(scope="module")
def faulty_kernels(attention, tmp_path_factory):
    """Plant each fault in a copy of the source, and compile it."""
    directories = {}
    for name, (file, pattern, replacement) in FLASH3_FAULTS.items():
        directory = tmp_path_factory.mktemp("fault") / "kernels"
        shutil.copytree(cpu_build.KERNELS, directory)
        text, count = re.subn(pattern, replacement, (directory / file).read_text())
        if count:
            (directory / file).write_text(text)
            directories[name] = directory
    (kernel,) = (step.kernel for step in attention[1].steps)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda directory: cpu_build.build(kernel, directory), directories.values()))
    return directories


def found_wrong(attention, kernels):
    """Return whether the results or the counts differ, or a fault is reported, by some chance."""
    case, program, expected = attention
    for order, copies, seed in CHANCES:
        chance = {"order": order, "copies": copies, "seed": seed}
        try:
            results, traffic = cpu_build.run_program(program, case.inputs, **chance, kernels=kernels)
        except KernelFaultError:
            return True
        differing = sum(verify.differing_elements(results[name], expected.results[name]) for name in ("out", "lse"))
        if differing or traffic != expected.traffic:
            return True
    return False


def test_flash3_is_sound(attention):
    assert not found_wrong(attention, cpu_build.KERNELS)


@pytest.mark.parametrize("fault", FLASH3_FAULTS)
def test_finds_a_fault_planted_in_flash3(attention, faulty_kernels, fault):
    assert fault in faulty_kernels, f"{FLASH3_FAULTS[fault][1]!r} is nowhere in {FLASH3_FAULTS[fault][0]}"
    assert found_wrong(attention, faulty_kernels[fault]), "the harness saw nothing wrong"
