"""The models of Hopper's instructions in the CPU build find what is wrong with their use, in a kernel and in flash3."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from repairs import repaired_bytes

from cupy_kernels import cpu_build, verify
from cupy_kernels.compiler import Variant
from cupy_kernels.cpu_build import COPIES, ORDERS, KernelFaultError
from cupy_kernels.flash3 import REPAIRED_ROWS
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
    "NOT_UNIFORM": "thread 229 of block 0: has a number that other lanes do not have",
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


def chances(seeds=4):
    """Return orders of threads, of copies and seeds to look for faults by."""
    return [("forward", "late", 0), ("reverse", "early", 0), *(("random", "late", seed) for seed in range(seeds))]


def complaint(library, case, fault):
    """Return what is reported first of a fault, "" if nothing is."""
    for chance in chances():
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
    results = [run(library, case, fault, *chance) for chance in chances()]
    assert any((found.view(np.uint16) != case[2].view(np.uint16)).any() for found in results)


# Faults planted in flash3

KERNEL = "flash3_forward.cu"


def case_of(tiles, **shape):
    problem = AttentionProblem(dtype="bfloat16", **shape)
    return verify.random_case("flash3", "forward", problem, plan=Flash3Plan(tiles=tiles))


def two_warpgroups():
    """Return several tiles along both axes, with NaN in keys and values that few rows see."""
    case = case_of((128, 64), q_len=200, kv_len=300, heads=2, kv_heads=1, head_dim=72, value_dim=120, window=(100, 20))
    for name in "kv":
        case.inputs[name][:, -8:] = np.nan
    assert 0 < np.count_nonzero(case.problem.visible_elements()[:, -8:].any(axis=1)) < 40
    return case


def three_warpgroups():
    """Return query tiles whose warpgroups see other tiles of keys each, and after them some that see none."""
    case = case_of((192, 64), q_len=576, kv_len=200, heads=2, head_dim=64, window=(20, 0))
    seen = case.problem.visible_elements().reshape(3, 3, 64, 200).any(axis=2)
    visited = [sorted(set((np.flatnonzero(keys) // 64).tolist())) for keys in seen[2]]
    assert visited == [[0, 1], [0, 1, 2], [1, 2, 3]]
    assert not seen[0].any()
    case.inputs["v"][:, 0, 1] = np.inf
    return case


def one_query_tile():
    """Return rows so long that queries, and then results, take turns in shared memory; one value is hidden from few."""
    case = case_of((128, 64), q_len=144, kv_len=208, heads=2, kv_heads=1, head_dim=200, value_dim=256, causal=True)
    case.inputs["v"][:, 68, :, 3] = -np.inf
    return case


def one_tile_of_keys():
    """Return rows as long, whose keys are there at once, so that one warpgroup may end before another has begun."""
    return case_of((128, 64), q_len=128, kv_len=60, head_dim=200, value_dim=72, window=(None, 128))


class Search(NamedTuple):
    """Where faults are looked for: a case, how many multiprocessors share it and how many random orders are tried."""

    make: Callable[[], verify.Case]
    multiprocessors: int = 1
    seeds: int = 4


SEARCHES = {
    "two warpgroups": Search(two_warpgroups, multiprocessors=2),
    "three warpgroups": Search(three_warpgroups),
    "one query tile": Search(one_query_tile),
    "one tile of keys": Search(one_tile_of_keys, seeds=40),
}

FLASH3_FAULTS = {
    "two warpgroups": {
        "no fence before the scores": (KERNEL, r"fence_products\(\);(\s+start_scores)", r"\1"),
        "no wait for the scores": (KERNEL, r"wait_for_products<1>\(\);", ""),
        "no wait for the output": (KERNEL, r"wait_for_products<0>\(\);(\s+release_values)", r"\1"),
        "probabilities overwritten while they are read": (
            KERNEL, r"(if \(WAITS_AMONG_EXPONENTIALS\) \{)", r"round_probabilities(probabilities, scores); \1"),
        "keys not awaited": (KERNEL, r"if \(tile \+ 1 < stop_tile\) await_keys\(\);", ""),
        "keys awaited that do not come": (KERNEL, r"if \(tile \+ 1 < stop_tile\) (await_keys\(\);)", r"\1"),
        "queries not awaited": (KERNEL, r"wait\(&barriers->q_full.*\);", ""),
        "values not awaited": (KERNEL, r"wait\(&barriers->v_full.*\);(\s+fence)", r"\1"),
        "room not awaited": (KERNEL, r"wait\(empty, parity \^ 1\);", ""),
        "phases of keys mixed up": (KERNEL, r"(keys\.parity\(\)), k_bytes", r"\1 ^ 1, k_bytes"),
        "phases of queries mixed up": (KERNEL, r"(ring\.parity\(\)) \^ 1\)", r"\1)"),
        "bytes that are not expected": (KERNEL, r"(arrive_expecting\(full, KEY_BYTES)\)", r"\1 - 16)"),
        "barriers not published": (KERNEL, r"publish_barriers\(\);", ""),
        "results not published": (KERNEL, r"publish_to_copies\(\);", ""),
        "results stored too early": (KERNEL, r"publish_to_copies\(\);\s+__syncwarp\(\);", "publish_to_copies();"),
        "results overwritten while they are stored": (KERNEL, r"wait_for_store_reads<0>\(\);", ";"),
        "results not swizzled": (KERNEL, r" \^ matrix_row % 8\) \* 16", ") * 16"),
        "rows of a descriptor": ("hopper.cuh", "eight_rows = 8 ", "eight_rows = 16 "),
        "slabs of a descriptor": (KERNEL, r"(describe_matrix\(.*), KEY_SLAB_BYTES\)", r"\1, 2 * KEY_SLAB_BYTES)"),
        "steps through the values": (KERNEL, r"step \* STEP \* SLAB_ROW_BYTES", "step * SLAB_ROW_BYTES"),
        "turns that do not end": (KERNEL, r"if \(TAKE_TURNS\) arrive_named", "if (false) arrive_named"),
        "turns of others": (
            KERNEL, r"sync_named\(2 \+ group, 2 \* WARPGROUP\)", "sync_named(2 + group, 3 * WARPGROUP)"),
        "registers that there are not": (KERNEL, "(shrink_registers<PRODUCER_REGISTERS)>", r"\1 + 40>"),
        "hidden keys that matter": (KERNEL, r"= seen.* \? (scores?.*) : -infinity\(\);", r"= \1;"),
        "hidden values that matter": (KERNEL, r"if \(MASKED && any_lane\(needs_repair\)\)", "if (false)"),
        "rows repaired that are NaN by rights": (KERNEL, r"&& sum == sum && ", "&& "),
        "repairs that take hidden keys": (KERNEL, r"return key >= first && key < stop;", "return key < stop;"),
        "repairs that take hidden values": (KERNEL, r"if \(!sees\(key\)\) return nullptr;", ""),
        "repairs that take hidden scores": (KERNEL, r"sees\(first_of_tile \+ key\) \?", "true ?"),
        "repairs in another order": (
            KERNEL, r"first_of_tile = first / KEY_ROWS \* KEY_ROWS;", "first_of_tile = first;"),
        "repairs without corrections": (KERNEL, r"(of_tile == 0 \? )correction( : 1\.0f)", r"\g<1>1.0f\2"),
        "repairs that are not counted": (KERNEL, r"repair_bytes\.flush\(\)", "(void)0"),
        "a tile of keys taken for whole at its start": (
            KERNEL, r"first_key\(GROUP_ROWS - 1\)\) \+ KEY_ROWS", "first_key(0)) + KEY_ROWS"),
        "a tile of keys taken for whole at its end": (
            KERNEL, r"max\(0, stop_key\(0\)\)", "max(0, stop_key(GROUP_ROWS - 1))"),
        "statistics past the end": (KERNEL, r" && position < query_count\(problem, work\)", ""),
        "queries not counted": (KERNEL, r"counter\.add\(inside\(GROUP_ROWS.*", ""),
        "query tiles of other blocks": (KERNEL, r"turn_ \+= .*;", "turn_ += 1;"),
    },
    "three warpgroups": {
        "keys not awaited": (KERNEL, r"if \(!WAITS_AMONG_EXPONENTIALS\) await_keys\(\);", ""),
        "probabilities overwritten while they are read": (
            KERNEL, r"(if \(!WAITS_AMONG_EXPONENTIALS\) end_values\(\);)(\s+round_probabilities\(.*\);)", r"\2 \1"),
        "a tile too few at the start": (KERNEL, r"first_key\(0\) / KEY_ROWS\)\)", "first_key(0) / KEY_ROWS + 1))"),
        "a tile too few at the end": (KERNEL, r"(stop_key\(GROUP_ROWS - 1\)) \+ KEY_ROWS - 1", r"\1"),
        "skipped keys not released": (
            KERNEL, r"(const auto skip_keys = (?:.*\n)*?.*)release_keys\(is_last\);", r"\1keys.advance();"),
        "skipped values not released": (
            KERNEL, r"(const auto skip_values = (?:.*\n)*?.*)release_values\(\);", r"\1values.advance();"),
        "the turn at skipped keys kept": (KERNEL, r"(const auto skip_keys = (?:.*\n)*?.*)end_turn\(group\);", r"\1"),
        "the turn at skipped keys left out": (
            KERNEL, r"(const auto skip_keys = .*\n)\s+await_turn\(group\);\n\s+end_turn\(group\);", r"\1"),
        "one skipped tile at the end": (KERNEL, r"if \(tile > stop_tile\) skip_keys", "if (false) skip_keys"),
        "none skipped at the start": (KERNEL, r"(int tile = work\.first_tile; )tile < first_tile;", r"\1false;"),
        "room of results never given back": (KERNEL, r"(start_next_scores\(scores\);)\s+release_staged\(\);", r"\1"),
        "room of results never given back where nothing is seen": (
            KERNEL, r"release_staged\(\);(\s+float out\[OUTPUTS\] = \{\};)", r"\1"),
        "room given back before results are stored": (
            KERNEL, r"finish_stores\(\);(\s+release\(&barriers->q_empty\[queries\.stage_before)", r"\1"),
    },
    "one query tile": {
        "a release too many": (KERNEL, r"(init_barrier\(&barriers->k_empty\[stage\], .*)\);", r"\1 - 1);"),
        "rows repaired by one lane's word": (
            KERNEL, r"any_lane\(needs_repair\)", "any_lane(place.lane == 0 && needs_repair)"),
        "phases of the last keys mixed up": (KERNEL, r"last_keys\.advance\(\);", ""),
        "the last keys released like others": (
            KERNEL, r"release\(STAGES_IN_KEYS && is_last \? &barriers->k_read : ", "release("),
        "a warpgroup's last keys taken for those of all": (
            KERNEL, r"release_keys\(tile \+ 1 == work\.stop_tile\)", "release_keys(tile + 1 == stop_tile)"),
        "keys over results that are stored": (
            KERNEL, r"finish_stores\(\);(\s+release\(&barriers->k_empty\[stage\]\);)", r"\1"),
        "keys over results before they are stored": (
            KERNEL, r"(const int stage = keys\.stage_before\(\);)",
            r"\1 if (has_keys) release(&barriers->k_empty[stage]);"),
        "queries released before the last scores": (
            KERNEL, r"if \(STAGES_IN_KEYS && tile \+ 1 == stop_tile\)", "if (STAGES_IN_KEYS && tile + 2 == stop_tile)"),
        "places of query tiles overwritten": (KERNEL, r"Ring<WORK_STAGES> places;", "Ring<1> places;"),
        "results of warps over one another": (
            KERNEL, r"\(4 \* group \+ place\.warp\) \* SLABS_IN_KEYS", "place.warp * SLABS_IN_KEYS"),
        "results overwritten while they are stored": (KERNEL, r"if \(stop < SLABS\) finish_stores\(\);", ""),
    },
    "one tile of keys": {
        "keys still read where results are staged": (KERNEL, r"wait\(k_read, parity\);", ""),
    },
}  # fmt: skip
"""By where they are looked for: file, pattern and what it is replaced by wherever it is."""

PLANTED = [(name, fault) for name, faults in FLASH3_FAULTS.items() for fault in faults]


@pytest.fixture(scope="module")
def sound():
    """Return each case, its program and what the simulated machine makes of it."""
    found = {}
    for name, search in SEARCHES.items():
        case = search.make()
        hardware = replace(get_hardware("H100-SXM"), streaming_multiprocessors=search.multiprocessors)
        program = make_program("flash3", "forward", case.problem, case.plan, hardware)
        found[name] = case, program, verify.simulate(case)
    return found


@pytest.fixture(scope="module")
def faulty_kernels(sound, tmp_path_factory):
    """Plant each fault in a copy of the source, and compile it while others are tested; return directories to come."""

    def build(kernel, directory):
        cpu_build.build(kernel, directory)
        return directory

    found = {}
    with ThreadPoolExecutor(2) as pool:
        for name, fault in PLANTED:
            file, pattern, replacement = FLASH3_FAULTS[name][fault]
            directory = tmp_path_factory.mktemp("fault") / "kernels"
            shutil.copytree(cpu_build.KERNELS, directory)
            text, count = re.subn(pattern, replacement, (directory / file).read_text())
            (directory / file).write_text(text)
            if count:
                _, program, _ = sound[name]
                found[name, fault] = pool.submit(build, program.steps[0].kernel, directory)
        yield found
        pool.shutdown(cancel_futures=True)


def found_wrong(name, sound, kernels):
    """Return whether the results or the counts differ, or a fault is reported, by some chance."""
    case, program, expected = sound[name]
    least, most = repaired_bytes(case, expected)
    for order, copies, seed in chances(SEARCHES[name].seeds):
        chance, metadata = {"order": order, "copies": copies, "seed": seed}, {}
        try:
            results, traffic = cpu_build.run_program(program, case.inputs, **chance, kernels=kernels, metadata=metadata)
        except KernelFaultError:
            return True
        differing = sum(verify.differing_elements(results[name], expected.results[name]) for name in ("out", "lse"))
        if differing or traffic != expected.traffic or not least <= metadata.get(REPAIRED_ROWS, 0) <= most:
            return True
    return False


@pytest.mark.parametrize("name", SEARCHES)
def test_flash3_is_sound(sound, name):
    assert not found_wrong(name, sound, cpu_build.KERNELS)


@pytest.mark.parametrize(("name", "fault"), PLANTED)
def test_finds_a_fault_planted_in_flash3(sound, faulty_kernels, name, fault):
    file, pattern, _ = FLASH3_FAULTS[name][fault]
    assert (name, fault) in faulty_kernels, f"{pattern!r} is nowhere in {file}"
    assert found_wrong(name, sound, faulty_kernels[name, fault].result()), "the harness saw nothing wrong"
