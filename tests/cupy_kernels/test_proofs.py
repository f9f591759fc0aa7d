"""The proofs of the models of tensor cores and special functions: whole on a GPU, their parts without one."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace

import numpy as np
import pytest

from cupy_kernels import arrays, compiler, cpu_build, derive_special_functions, prove_tensor_cores
from cupy_kernels.derive_special_functions import FIRST_OF_BINADE, differing_inputs, fit_table, variant_of
from cupy_kernels.prove_tensor_cores import (
    KINDS,
    MMA_INSTRUCTIONS,
    SUMS,
    WGMMA_INSTRUCTIONS,
    Instruction,
    differing_sums,
    draw_case,
    mma_candidates,
    prove,
)
from simattn.arithmetic.formats import numpy_dtype
from simattn.arithmetic.special_functions import FUNCTIONS, REDUCTIONS, STRUCTURES, Table, tables
from simattn.arithmetic.tensor_cores import WGMMA
from simattn.testing import assert_same_bits


def reason(check):
    try:
        check()
    except RuntimeError as error:
        return str(error)
    return ""


def needs(check):
    why = reason(check)
    return pytest.mark.skipif(bool(why), reason=why or "it is there")


needs_nvrtc, needs_compiler = needs(compiler.compiler_version), needs(cpu_build.compiler)
every_function = pytest.mark.parametrize("name", STRUCTURES)


def source_of(name, table):
    """A function that has this table."""

    def results(first, count):
        inputs = np.arange(first, first + count, dtype=np.uint32).view(np.float32)
        return FUNCTIONS[name](inputs, table=table).view(np.uint32)

    return results


def other_table(name, number):
    """A table of other coefficients; the first and last row stay, so that results stay in their binade."""
    table, generator = tables()[name], np.random.default_rng(number)
    changes = generator.integers(-3, 4, table.rows.shape)
    changes[[0, -1]] = 0
    unit = 1 << STRUCTURES[name].shifts[0]
    bias = STRUCTURES[name].whole_bias * unit + int(generator.integers(1, 16)) * (unit >> 4)
    return Table(table.rows + changes, bias, REDUCTIONS[number % len(REDUCTIONS)] if name == "ex2" else REDUCTIONS[0])


# The fit


@every_function
def test_a_table_is_found_from_results_alone(name):
    table = other_table(name, 1)
    found = fit_table(name, source_of(name, table))
    assert found.record(name) == table.record(name)


def test_results_that_no_table_gives_are_refused():
    results = source_of("rcp", tables()["rcp"])

    def wrong(first, count):
        found = results(first, count)
        found[1000] += 1
        return found

    with pytest.raises(ValueError, match="rcp, row 0: expected one pair of coefficients"):
        fit_table("rcp", wrong)


@every_function
def test_every_differing_input_is_counted(name):
    table = tables()[name]
    assert not len(differing_inputs(name, table, source_of(name, table), FIRST_OF_BINADE, 1 << 20))
    changed = replace(table, rows=table.rows.copy())
    changed.rows[3, 0] += 8
    found = differing_inputs(name, changed, source_of(name, table), FIRST_OF_BINADE, 1 << 23)
    rest_bits = STRUCTURES[name].rest_bits
    assert len(found)
    assert set((found & 0x7FFFFF) >> rest_bits) == {3}


def test_the_file_has_the_tables_form():
    for name, table in tables().items():
        assert Table.of_record(json.loads(json.dumps(table.record(name)))).record(name) == table.record(name)


# Kernels in the CPU build, whose models are others' than simattn's


def run_on_cpu(variant, parameters, blocks, threads, shared_bytes, given):
    """Run a kernel on arrays by (array, access)."""
    written = [np.zeros(array.nbytes, np.uint8) for array, _ in given]
    records = [
        cpu_build.ArrayRecord(
            b"array",
            array.ctypes.data,
            (ctypes.c_longlong * 3)(1, 1, 1),
            (ctypes.c_longlong * 3)(array.nbytes, array.nbytes, array.nbytes),
            array.nbytes,
            None if access == "r" else flags.ctypes.data,
            sum(cpu_build.ACCESS_BITS[letter] for letter in access),
        )
        for (array, access), flags in zip(given, written, strict=True)
    ]
    message = ctypes.create_string_buffer(512)
    succeeded = cpu_build.loaded(cpu_build.build_variant(variant))(
        parameters.ctypes.data,
        blocks,
        threads,
        shared_bytes,
        (cpu_build.ArrayRecord * len(records))(*records),
        len(records),
        0,
        1,
        0,
        message,
        len(message),
    )
    assert succeeded, message.value.decode()


def special_function_on_cpu(name):
    def results(first, count):
        computed = np.zeros(count, np.uint32)
        parameters = np.array([(computed.ctypes.data, first, count)], derive_special_functions.RANGE)
        threads = derive_special_functions.THREADS
        run_on_cpu(variant_of(name), parameters, 4, threads, 0, [(computed, "w")])
        return computed

    return results


def products_on_cpu(instruction, operands, *, adds):
    stored = numpy_dtype(instruction.storage)
    right = operands.right if instruction.right_transposed else operands.right.swapaxes(-1, -2)
    left, right = (np.ascontiguousarray(array.astype(stored)).view(np.uint16) for array in (operands.left, right))
    matrices, before = len(left), operands.before
    after = np.zeros((matrices * matrices, *before.shape[1:]), np.float32)
    addresses = [array.ctypes.data for array in (left, right, before, after)]
    parameters = np.array([(*addresses, matrices, adds)], prove_tensor_cores.PARAMETERS)
    given = [(left, "r"), (right, "r"), (before, "r"), (after, "w")]
    run_on_cpu(
        instruction.variant, parameters, matrices**2, prove_tensor_cores.THREADS, instruction.shared_bytes, given
    )
    return after


SOME_INSTRUCTIONS = [
    Instruction("bfloat16", 64),
    Instruction("float16", 80, right_transposed=True),
    Instruction("float16", 112, left_in_registers=True),
    Instruction("bfloat16", 144, left_in_registers=True, right_transposed=True),
    *MMA_INSTRUCTIONS,
]


@needs_compiler
@pytest.mark.parametrize("instruction", SOME_INSTRUCTIONS, ids=str)
def test_the_kernel_of_the_proof_multiplies_its_matrices(instruction):
    for number, kind in enumerate(KINDS):
        sums = SUMS[number % len(SUMS)]
        operands = draw_case(instruction, kind, sums, 0, 1)
        found = products_on_cpu(instruction, operands, adds=sums != "none")
        assert_same_bits(found, operands.products(WGMMA[instruction.storage]))


@needs_compiler
@every_function
def test_the_special_functions_are_modelled_twice(name):
    for first in (0x3F000000, 0x3F800000, 0x42F00000, 0xBF000000, 0xC2F80000, 0x00000000, 0x7F7FF000, 0xFF7FF000):
        assert not len(differing_inputs(name, tables()[name], special_function_on_cpu(name), first, 1 << 14))


# The proof's tally, with the model in the device's place


def test_a_proof_tells_models_apart(monkeypatch):
    units = mma_candidates("bfloat16")
    right = "8 products, 24 bits"
    monkeypatch.setattr(
        prove_tensor_cores, "on_device", lambda instruction, operands, *, adds: operands.products(units[right])
    )
    result = prove(MMA_INSTRUCTIONS[0], units, ("normal", "special"), 0, 1)
    assert result["sums"] == 2 * len(SUMS) * 64 * 64
    assert [name for name, kinds in result["differing"].items() if not kinds] == [right]


def test_nan_of_other_bits_differs():
    bits = np.array([0x7FFFFFFF, 0x7FC00000, 0x3F800000], np.uint32).view(np.float32)
    assert differing_sums(bits, np.full(3, bits[0])) == 2


# On the compiler and the GPU


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_kernels_of_the_proofs_compile(architecture, request, monkeypatch):
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(request.config.cache.mkdir("cubins")))
    variants = [variant_of(name) for name in STRUCTURES] + [one.variant for one in MMA_INSTRUCTIONS]
    if architecture == "sm_90a":
        variants += [one.variant for one in WGMMA_INSTRUCTIONS if one.columns in (64, 176, 256)]
    for variant in variants:
        assert not compiler.compile_variant(variant, architecture).complaints


@pytest.mark.gpu
@needs(arrays.require_cupy)
@every_function
def test_the_tables_are_the_device_s(name):
    source = derive_special_functions.device_source(name)
    table = fit_table(name, source)
    assert table.record(name) == tables()[name].record(name)
    for first in range(0, 1 << 32, 1 << 28):
        assert not len(differing_inputs(name, table, source, first + 12345 * 997, 1 << 22))


@pytest.mark.gpu
@needs(arrays.require_cupy)
@pytest.mark.parametrize("instruction", WGMMA_INSTRUCTIONS, ids=str)
def test_wgmma_is_the_model(instruction):
    if arrays.require_cupy().cuda.Device().compute_capability != "90":
        pytest.skip("wgmma is Hopper's")
    result = prove(instruction, {"model": WGMMA[instruction.storage]}, KINDS, 1, 2)
    assert result["differing"] == {"model": {}}


@pytest.mark.gpu
@needs(arrays.require_cupy)
@pytest.mark.parametrize("instruction", MMA_INSTRUCTIONS, ids=str)
def test_mma_is_one_of_the_models(instruction):
    result = prove(instruction, mma_candidates(instruction.storage), KINDS, 1, 2)
    assert sum(not kinds for kinds in result["differing"].values()) == 1
