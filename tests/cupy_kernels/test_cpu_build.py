"""The kernels' source, compiled for the CPU: right numbers, right counts, no dependence on chance, and faults found."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from cupy_kernels import cpu_build, verify
from cupy_kernels.cpu_build import COPIES, ORDERS, KernelFaultError, run_program
from cupy_kernels.parameters import COLUMN_BUCKETS
from cupy_kernels.table import ALGORITHMS, default_plan, make_program
from simattn.hardware import get_hardware
from simattn.plan import Tiles
from simattn.planning import DEFAULT_HARDWARE
from simattn.testing import assert_same_bits, attention_inputs, attention_problems

try:
    COMPILER = cpu_build.compiler()
except cpu_build.CompilerNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)


class Build(NamedTuple):
    """What the property tests run: few, since each is compiled."""

    algorithm: str
    direction: str
    columns: int
    dtype: str = "float32"
    changes: tuple = ()


SMALL = Tiles(q=32, kv=32)

BUILDS = (
    *(Build("flash2", "forward", columns) for columns in COLUMN_BUCKETS),
    Build("flash2", "forward", 64, "float16"),
    Build("flash2", "forward", 128, "bfloat16"),
    Build("flash2", "forward", 32, "bfloat16", (("tiles", Tiles(q=64, kv=16)),)),
    Build("flash2", "forward", 128, "float32", (("tiles", Tiles(q=64, kv=64)),)),
    Build("flash2", "forward", 64, "float32", (("tiles", Tiles(q=40, kv=48)),)),
    Build("flash2", "forward", 64, "float16", (("units", "cuda_cores"), ("tiles", Tiles(q=128, kv=64)))),
    Build("flash2", "forward", 96, "float16", (("tiles", Tiles(q=96, kv=48)),)),
    Build("flash2", "forward", 192, "bfloat16"),
    Build("flash2", "forward", 256, "float16", (("tiles", Tiles(q=64, kv=128)),)),  # in one stage
    *(Build("flash2", "backward", columns) for columns in COLUMN_BUCKETS),
    Build("flash2", "backward", 64, "float16", (("dq", "deterministic"),)),
    Build("flash2", "backward", 32, "bfloat16", (("dq", "deterministic"), ("grouped_gradients", "expand"))),
    Build("flash2", "backward", 128, "float32", (("grouped_gradients", "reduce"), ("tiles", Tiles(q=64, kv=64)))),
    Build("flash2", "backward", 96, "float32", (("dq", "deterministic"), ("tiles", SMALL))),
    Build("flash2", "backward", 32, "float16", (("dq", "load_add_store"), ("tiles", Tiles(q=64, kv=64)))),
    Build("flash1", "forward", 32),
    Build("flash1", "forward", 128, "float16"),
    Build("flash1", "forward", 64, "bfloat16", (("hbm_accumulator", "storage"), ("tiles", SMALL))),
    Build("flash1", "backward", 32),
    Build("flash1", "backward", 128, "float16", (("grouped_gradients", "expand"),)),
    Build("flash1", "backward", 64, "bfloat16", (("hbm_accumulator", "storage"), ("grouped_gradients", "reduce"))),
    Build("standard", "forward", 32, "float32", (("softmax_passes", 1),)),
    Build("standard", "forward", 192, "float16", (("softmax_passes", 2),)),
    Build("standard", "forward", 64, "bfloat16", (("softmax_passes", 3), ("tiles", Tiles(q=32, kv=64, depth=32)))),
    Build("standard", "backward", 32, "float32", (("softmax_passes", 1),)),
    Build("standard", "backward", 192, "float16", (("softmax_passes", 2), ("grouped_gradients", "expand"))),
    Build("standard", "backward", 64, "bfloat16", (("grouped_gradients", "reduce"),)),
    Build("flash3", "forward", 64, "bfloat16"),
    Build("flash3", "forward", 64, "float16", (("tiles", Tiles(q=64, kv=64)), ("packed_heads", 2))),
    Build("flash3", "forward", 96, "float16", (("tiles", Tiles(q=128, kv=80)),)),
    Build("flash3", "forward", 128, "bfloat16"),
    Build("flash3", "forward", 192, "float16", (("tiles", Tiles(q=64, kv=64)),)),
    Build("flash3", "forward", 256, "bfloat16", (("tiles", Tiles(q=64, kv=64)),)),
)  # fmt: skip


def plan_of(build, problem):
    changes = dict(build.changes)
    if problem.group_size % changes.get("packed_heads", 1):
        del changes["packed_heads"]
    plan = default_plan(problem, algorithm=build.algorithm, direction=build.direction)
    return replace(plan, **changes)


def problem_of(build, **options):
    """Return a problem with something to do for every step of a build's program."""
    shape = {"q_len": 64, "heads": 2, "kv_heads": 1, "head_dim": build.columns, "dtype": build.dtype}
    return simattn.AttentionProblem(**shape, **options)


@st.composite
def cases(draw, builds=BUILDS, **arguments):
    """Draw a problem that one of the builds takes, its plan and its inputs."""
    build = draw(st.sampled_from(builds))
    below = max((bucket for bucket in COLUMN_BUCKETS if bucket < build.columns), default=0)
    wide = draw(st.integers(below // 8 + 1, build.columns // 8)) * 8
    narrow = draw(st.integers(1, wide // 8)) * 8
    head_dim, value_dim = draw(st.permutations((wide, narrow)))
    drawn = draw(
        attention_problems(
            max_heads=4,
            max_len=200 if build.algorithm == "flash3" else 110,
            head_dims=(head_dim,),
            dtypes=(build.dtype,),
            block_sparse=False,
            same_value_dim=True,
            **arguments,
        )
    )
    problem = replace(drawn, value_dim=value_dim)
    inputs = draw(attention_inputs(problem, backward=build.direction == "backward", hidden_is_finite=False))
    return verify.Case(build.algorithm, build.direction, problem, plan_of(build, problem), inputs, {})


def program_of(case, multiprocessors=2):
    """Return a case's program for a GPU of few multiprocessors, whose thread blocks have several turns."""
    hardware = replace(get_hardware(DEFAULT_HARDWARE), streaming_multiprocessors=multiprocessors)
    return make_program(case.algorithm, case.direction, case.problem, case.plan, hardware)


def run_case(case, saved, *, multiprocessors=2, **options):
    """Return the results of the CPU build, and what it counted."""
    return run_program(program_of(case, multiprocessors), {**case.inputs, **saved}, **options)


def assert_results(case, found, expected):
    """Results are those expected to the bit, or to rounding where their sums have no fixed order."""
    for name, wanted in expected.items():
        if name in case.repeats:
            assert_same_bits(found[name], wanted, name=name)
        else:
            assert verify.differing_sums(found[name], wanted) == 0, name


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the builds side by side."""
    kernels = set()
    for build in BUILDS:
        for causal in (False, True):
            problem = problem_of(build, causal=causal)
            program = make_program(build.algorithm, build.direction, problem, plan_of(build, problem), DEFAULT_HARDWARE)
            kernels |= {step.kernel for step in program.steps}
    with ThreadPoolExecutor(2) as pool:
        assert all(library.exists() for library in pool.map(cpu_build.build, kernels))


PROGRAMS = [(name, direction) for name, item in ALGORITHMS.items() for direction in item.programs]


def test_every_program_is_built():
    assert {(build.algorithm, build.direction) for build in BUILDS} == set(PROGRAMS)


@pytest.mark.parametrize(("algorithm", "direction"), PROGRAMS)
@settings(max_examples=40)
@given(
    data=st.data(),
    order=st.sampled_from(ORDERS),
    copies=st.sampled_from(COPIES),
    seed=st.integers(0, 99),
    multiprocessors=st.sampled_from((1, 3, 132)),
)
def test_bits_and_counts_are_the_simulated_machines(algorithm, direction, data, order, copies, seed, multiprocessors):
    builds = [build for build in BUILDS if (build.algorithm, build.direction) == (algorithm, direction)]
    case = data.draw(cases(builds))
    expected = verify.simulate(case)
    options = {"order": order, "copies": copies, "seed": seed, "multiprocessors": multiprocessors}
    found, traffic = run_case(case, expected.saved, **options)
    assert traffic == expected.traffic
    assert_results(case, found, expected.results)


@pytest.mark.parametrize(("hardware", "columns"), [("A100-40GB", 256), ("RTX-4090", 128), ("RTX-4090", 256)])
def test_tensor_cores_of_other_devices(hardware, columns):
    """Fewer stages, narrower warps and smaller tiles, where the device has little shared memory."""
    problem = simattn.AttentionProblem(
        q_len=90, kv_len=200, heads=2, kv_heads=1, head_dim=columns, dtype="float16", window=(70, 10)
    )
    case = verify.random_case("flash2", "forward", problem, plan=default_plan(problem, hardware))
    case.inputs["v"][:, 60] = np.inf
    program = make_program("flash2", "forward", problem, case.plan, hardware)
    expected = verify.simulate(case)
    found, traffic = run_program(program, case.inputs, order="reverse", copies="late")
    assert traffic == expected.traffic
    assert_results(case, found, expected.results)


@settings(max_examples=20)
@given(cases(min_len=1), st.integers(0, 99))
def test_bits_do_not_depend_on_chance(case, seed):
    saved = verify.simulate(case).saved
    first, traffic = run_case(case, saved)
    results = {name: first[name] for name in verify.RESULTS[case.direction]}
    for order, copies, multiprocessors in (("reverse", "late", 1), ("random", "early", 5)):
        again, counted = run_case(case, saved, order=order, copies=copies, seed=seed, multiprocessors=multiprocessors)
        assert_results(case, again, results)
        assert counted == traffic


@settings(max_examples=20)
@given(cases(min_len=1), st.sampled_from((np.nan, np.inf, -np.inf)), st.integers(0, 2**32 - 1))
def test_hidden_keys_never_matter(case, special, seed):
    """Queries that do not see a key have the results they have without it."""
    problem, saved = case.problem, verify.simulate(case).saved
    first, _ = run_case(case, saved)
    chosen = np.random.default_rng(seed).random(problem.kv_len) < 0.2
    sees = problem.visible_elements()[:, chosen].any(axis=1)
    changed = {name: array.copy() for name, array in case.inputs.items()}
    for name in ("k", "v"):
        changed[name][:, chosen] = special
    altered = replace(case, inputs=changed)
    saved = verify.simulate(altered).saved
    again, _ = run_case(altered, saved, order="reverse", copies="late")
    name = "out" if case.direction == "forward" else "dq"
    if name in case.repeats:
        assert_same_bits(again[name][:, ~sees], first[name][:, ~sees], name=name)
    if np.isnan(special) and case.direction == "forward":
        assert np.isnan(again["out"][:, sees]).all()


@pytest.mark.parametrize(("algorithm", "direction"), PROGRAMS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (1, 1), (0, 0)])
def test_empty_and_single(algorithm, direction, q_len, kv_len):
    dtype = ALGORITHMS[algorithm].dtypes(get_hardware(DEFAULT_HARDWARE))[0]
    problem = simattn.AttentionProblem(q_len=q_len, kv_len=kv_len, heads=2, head_dim=32, dtype=dtype)
    case = verify.random_case(algorithm, direction, problem)
    expected = verify.simulate(case)
    found, traffic = run_case(case, expected.saved)
    assert_results(case, found, expected.results)
    assert traffic == expected.traffic


# What the kernels refuse


@pytest.mark.parametrize(
    ("problem", "plan", "named"),
    [
        ({"head_dim": 12}, {}, "head_dim=12"),
        ({"value_dim": 264}, {}, "value_dim=264"),
        ({"dtype": "float8_e4m3fn"}, {}, "float8"),
        ({}, {"tiles": (20, 64)}, "query rows in multiples of 8"),
        ({}, {"tiles": (64, 24)}, "keys in multiples of 16"),
        ({}, {"tiles": (64, 1024)}, r"takes up to 512 keys"),
        ({"head_dim": 256}, {"tiles": (64, 128)}, "bytes of shared memory"),
        ({}, {"repeat_kv": True}, "repeat_kv"),
    ],
)
def test_refuses(problem, plan, named):
    problem = simattn.AttentionProblem(**({"q_len": 4, "dtype": "float32"} | problem))
    plan = ALGORITHMS["flash2"].plan_class(**({"tiles": (128, 64)} | plan))
    with pytest.raises(ValueError, match=named):
        make_program("flash2", "forward", problem, plan, DEFAULT_HARDWARE)


def test_refuses_other_inputs():
    problem = simattn.AttentionProblem(q_len=4, dtype="float32")
    case = verify.random_case("flash2", "forward", problem)
    with pytest.raises(ValueError, match=r"k has shape \(1, 3, 1, 64\)"):
        run_program(program_of(case), {**case.inputs, "k": case.inputs["k"][:, :3]})
    with pytest.raises(ValueError, match=r"v has .* dtype float64"):
        run_program(program_of(case), {**case.inputs, "v": case.inputs["v"].astype(np.float64)})
    with pytest.raises(ValueError, match="order='sideways'"):
        run_case(case, {}, order="sideways")


# The build itself


def compile_program(directory, text, *flags):
    source, program = directory / "program.cpp", directory / "program"
    source.write_text(text)
    (directory / "special_functions.h").write_text(cpu_build.special_functions_header())
    includes = [
        f"-I{cpu_build.KERNELS}",
        f"-I{cpu_build.HERE}",
        f"-I{directory}",
        "-DCPU_BUILD",
        "-Wno-unknown-pragmas",
    ]
    subprocess.run([COMPILER, *cpu_build.FLAGS[:3], *includes, *flags, source, "-o", program], check=True)
    return program


def every_kernel():
    """Return one build of every kernel."""
    found = {}
    for build in BUILDS:
        problem = problem_of(build)
        program = make_program(build.algorithm, build.direction, problem, plan_of(build, problem), DEFAULT_HARDWARE)
        for step in program.steps:
            found.setdefault(step.kernel.function, step.kernel)
    return found


KERNELS = every_kernel()


@pytest.mark.parametrize("function", KERNELS)
def test_parameter_struct_matches_its_declaration(function, tmp_path):
    kernel = KERNELS[function]
    source = (cpu_build.KERNELS / kernel.source).read_text()
    (struct,) = re.findall(rf"\b{function}\(const (?:__grid_constant__ )?(\w+) parameters\)", source)
    within = {"matrices": "operand.heads", **{name: f"operand.{name}" for name in ("rows", "columns", "factor")}}
    problem_fields = ("batch", "heads", "group_size", "q_len", "kv_len", "head_dim", "value_dim",
                      "window_left", "window_right", "scale", "scale_log2")  # fmt: skip
    within |= {name: f"problem.{name}" for name in problem_fields}
    lines = [f'printf("{name} %zu\\n", offsetof({struct}, {within.get(name, name)}));' for name in kernel.struct.names]
    size = f'printf("size %zu\\n", sizeof({struct}));'
    text = f'#include "{kernel.source}"\n#include <cstddef>\nint main() {{' + "\n".join([*lines, size]) + "}"
    macros = [f"-D{name}={value}" for name, value in kernel.macros]
    program = compile_program(tmp_path, text, "-Wno-invalid-offsetof", *macros)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    offsets = {name: int(offset) for name, offset in (line.split() for line in printed.splitlines())}
    expected = {name: kernel.struct.fields[name][1] for name in kernel.struct.names}
    assert offsets == expected | {"size": kernel.struct.itemsize}


CONVERSIONS = """
#include "arithmetic.cuh"
int main() {
  for (float x; fread(&x, 4, 1, stdin) == 1;) {
    const unsigned short half = rounded<float16>(x).bits, brain = rounded<bfloat16>(x).bits;
    const float values[4] = {
        exp2_polynomial(x), log2_polynomial(x), to_float(float16{half}), to_float(bfloat16{brain})};
    fwrite(&half, 2, 1, stdout);
    fwrite(&brain, 2, 1, stdout);
    fwrite(values, 4, 4, stdout);
  }
}
"""


def test_conversions_and_polynomials(tmp_path):
    import ml_dtypes

    from simattn.arithmetic import simt_loops

    generator = np.random.default_rng(1)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        between = np.concatenate([np.nextafter(halves, np.float32(side)) for side in (-np.inf, np.inf)])
        middles = halves[:-1] + (halves[1:] - halves[:-1]) / 2
    bits = generator.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    near = generator.uniform(-130, 130, 100_000).astype(np.float32)
    numbers = np.concatenate([halves, between, middles, bits, near])
    program = compile_program(tmp_path, CONVERSIONS)
    printed = subprocess.run([program], input=numbers.tobytes(), capture_output=True, check=True).stdout
    fields = [("half", np.float16), ("brain", ml_dtypes.bfloat16)]
    fields += [(name, np.float32) for name in ("exp2", "log2", "from_half", "from_brain")]
    result = np.frombuffer(printed, np.dtype(fields))
    with np.errstate(over="ignore", invalid="ignore"):
        half, brain = numbers.astype(np.float16), numbers.astype(ml_dtypes.bfloat16)
        assert_same_bits(result["half"], half)
        assert_same_bits(result["brain"], brain)
        assert_same_bits(result["from_half"], half.astype(np.float32))
        assert_same_bits(result["from_brain"], brain.astype(np.float32))
        assert_same_bits(result["exp2"], simt_loops.exp2(numbers))
        normal = numbers >= np.finfo(np.float32).tiny
        assert_same_bits(result["log2"][normal], simt_loops.log2(numbers[normal]))


# Faults planted in the source

BLOCK_BARRIER = "    __syncthreads();  // {} is there"
COPY_WAIT = "    wait_for_copies<0>();\n" + BLOCK_BARRIER

FORWARD_FAULTS = {
    "no barrier for the keys": ("flash2_forward.cu", BLOCK_BARRIER.format("K"), "    // {}"),
    "no barrier for the values": ("flash2_forward.cu", BLOCK_BARRIER.format("V"), "    //"),
    "no wait for the keys": ("flash2_forward.cu", COPY_WAIT.format("K"), BLOCK_BARRIER.format("K")),
    "no wait for the values": ("flash2_forward.cu", COPY_WAIT.format("V"), BLOCK_BARRIER.format("V")),
    "probabilities read too early": ("forward.cuh", "    __syncwarp();\n    const int first", "    const int first"),
    "probabilities overwritten too early": ("forward.cuh", "    if (begin > 0) __syncwarp();\n", ""),
    "a barrier that one warp misses": (
        "flash2_forward.cu",
        BLOCK_BARRIER.format("V"),
        "    if (threadIdx.x >= 32)" + BLOCK_BARRIER.format("V"),
    ),
    "a shuffle that one lane misses": (
        "flash2_forward.cu",
        "      update_softmax(",
        "      if (threadIdx.x != 3) update_softmax(",
    ),
    "rows read past the end": ("tiles.cuh", "first_row + row < rows", "true"),
    "columns read past the end": ("tiles.cuh", "first_column + column < columns", "true"),
    "rows written past the end": ("flash2_forward.cu", "row < parameters.problem.q_len)", "true)"),
    "columns written past the end": ("forward.cuh", "if (first < value_dim)", "if (true)"),
    "rows never written": (
        "flash2_forward.cu", "row < parameters.problem.q_len)", "row + 1 < parameters.problem.q_len)"),
    "rows written twice": ("flash2_forward.cu", "if (place.lane == 0)", "if (place.lane <= 1)"),
    "shared memory overrun": ("flash2_forward.cu", "shared + STAGED_OFFSET", "shared + STAGED_OFFSET + 8"),
    "a load that is not counted": ("tiles.cuh", "  counter.add(16);\n  start_copy", "  start_copy"),
    "hidden keys that matter": ("forward.cuh", "if (!MASKED || band.sees(i, key))", "if (true)"),
    "keys past the end that matter": ("forward.cuh", " || key >= band.stop", ""),
}  # fmt: skip
TENSOR_FAULTS = {
    "no wait for the tile": ("flash2_tensor_forward.cu", "    wait_for_copies<0>();\n    if (STAGES", "    if (STAGES"),
    "no barrier for the tile": (
        "flash2_tensor_forward.cu", "__syncthreads();  // this tile is there, and the one before has been read", ""),
    "no barrier for a masked tile": (
        "flash2_tensor_forward.cu",
        "      if (MASKED) {\n        special = synchronise_any(holds_special(v_tile(tile)));\n      } else {\n"
        "        __syncthreads();  // this",
        "      if (MASKED) {\n        special = true;\n      } else {\n        __syncthreads();  // this"),
    "the next tile in place of this one": ("flash2_tensor_forward.cu", "K_OFFSET + tile % STAGES *", "K_OFFSET + 0 *"),
    "output read too early": ("flash2_tensor_forward.cu", "  __syncwarp();\n  Stored* out", "  Stored* out"),
    "hidden scores that matter": ("flash2_tensor_forward.cu", "      if (MASKED) hide(scores, band, key);\n", ""),
    "hidden values that matter": ("flash2_tensor_forward.cu", "if (MASKED && special)", "if (false)"),
    "hidden values that matter to some rows": (
        "flash2_tensor_forward.cu", "if (at < band.first || at > band.last)", "if (at > band.last)"),
    "tiles that are seen left out": ("flash2_tensor_forward.cu", "begin >= key + KEY_ROWS", "begin >= key"),
    "a maximum of half the row": (
        "flash2_tensor_forward.cu", "      row_max = maximum_number(row_max, shuffle_xor(row_max, 2));\n", ""),
    "an output that is not corrected": (
        "flash2_tensor_forward.cu", "corrections[m][half] = correction;", "corrections[m][half] = 1.0f;"),
    "rows read past the end": ("matrix_tiles.cuh", "row + down < rows && ", ""),
    "columns read past the end": ("matrix_tiles.cuh", " && column + right < columns", ""),
    "rest of a tile left as it was": (
        "matrix_tiles.cuh", "start_copy_or_zeros(tile", "if (exists) start_copy_or_zeros(tile"),
    "a load that is not counted": ("matrix_tiles.cuh", "if (exists) counter.add(16);", ""),
    "rows written past the end": (
        "flash2_tensor_forward.cu", "work.row + row < problem.q_len && 8 * chunk", "8 * chunk"),
    "columns written past the end": ("flash2_tensor_forward.cu", " && 8 * chunk < problem.value_dim", ""),
    "statistics written twice": ("flash2_tensor_forward.cu", "place.quad == 0 &&", "place.quad <= 1 &&"),
    "shared memory overrun": ("flash2_tensor_forward.cu", "V_OFFSET + tile", "V_OFFSET + 2048 + tile"),
}  # fmt: skip
BARRIER = "    __syncthreads();  // {}\n"

BACKWARD_FAULTS = {
    "no wait for queries and gradients": (
        "flash2_backward.cu", "    wait_for_copies<0>();\n    __syncthreads();  // Q", "    __syncthreads();  // Q"),
    "no barrier for queries and gradients": (
        "flash2_backward.cu", BARRIER.format("Q, dO and statistics are there"), ""),
    "no barrier for the probabilities": ("flash2_backward.cu", BARRIER.format("P is there"), ""),
    "probabilities overwritten too early": (
        "flash2_backward.cu", BARRIER.format("P and dO have been read"), ""),
    "queries overwritten too early": ("flash2_backward.cu", BARRIER.format("Q has been read"), ""),
    "hidden elements that matter to keys": ("backward.cuh", "if (band.sees(row, first_key + i))", "if (true)"),
    "hidden elements that matter to queries": (
        "backward.cuh", "if (band.sees(first_row + LANES_DOWN * i, key))", "if (true)"),
    "queries past the end that matter": ("backward.cuh", "min(rows, end - first + 1)", "end - first + 1"),
    "gradients written past the end": ("backward.cuh", "if (i * row_step < rows)", "if (true)"),
    "gradient columns written past the end": ("backward.cuh", "if (c * ACROSS < columns)", "if (true)"),
    "an addition that is not counted": ("tiles.cuh", "  counter.add(16);\n  add_4_floats", "  add_4_floats"),
}  # fmt: skip

FLASH1_FAULTS = {
    "state read while others write it": (
        "flash1_forward.cu", BARRIER.format("K and V are there, and the state of all rows has been stored"), ""),
    "keys overwritten while others read them": (
        "flash1_forward.cu", "    __syncthreads();  // K and V have been read\n", ""),
    "state that is not reloaded": ("tiles.cuh", "float_of_bits(reload_4_bytes", "float_of_bits(load_4_bytes"),
    "queries read before they are there": (
        "flash1_forward.cu", "      wait_for_copies<0>();\n      __syncwarp();", "      __syncwarp();"),
}  # fmt: skip

STANDARD_FAULTS = {
    "no wait for a chunk": ("products.cuh", "    wait_for_copies<0>();\n    __syncthreads();", "    __syncthreads();"),
    "no barrier for a chunk": (
        "products.cuh", "    __syncthreads();  // this chunk is there, and the one before has been read\n", ""),
    "a number at the end of a row that is not counted": (
        "tiles.cuh", "  counter.add(4);\n  return float_of_bits(load_4", "  return float_of_bits(load_4"),
}  # fmt: skip

FAULT_SHAPE = {"q_len": 70, "kv_len": 150, "heads": 2, "kv_heads": 1, "head_dim": 104, "value_dim": 112,
               "dtype": "float32", "window": (60, 10)}  # fmt: skip

FAULTY_PROGRAMS = {
    "flash2 forward": (FORWARD_FAULTS, FAULT_SHAPE, {"tiles": Tiles(q=64, kv=64)}),
    "flash2 forward on tensor cores": (
        TENSOR_FAULTS,
        {**FAULT_SHAPE, "head_dim": 40, "value_dim": 40, "dtype": "bfloat16"},
        {"tiles": Tiles(q=64, kv=16)},
    ),
    "flash2 backward": (BACKWARD_FAULTS, FAULT_SHAPE, {"tiles": Tiles(q=64, kv=64)}),
    "flash1 forward": (FLASH1_FAULTS, {**FAULT_SHAPE, "head_dim": 24, "value_dim": 32}, {"tiles": Tiles(q=64, kv=32)}),
    "standard forward": (STANDARD_FAULTS, {**FAULT_SHAPE, "kv_len": 149}, {"tiles": Tiles(q=64, kv=64)}),
}
FAULTS = [(program, name) for program, (faults, _, _) in FAULTY_PROGRAMS.items() for name in faults]


def faulty_case(program):
    """Return a case with NaN in keys that few rows see."""
    _, shape, changes = FAULTY_PROGRAMS[program]
    algorithm, direction, *_ = program.split()
    problem = simattn.AttentionProblem(**shape)
    plan = replace(default_plan(problem, algorithm=algorithm, direction=direction), **changes)
    case = verify.random_case(algorithm, direction, problem, plan=plan)
    for name in "kv":
        case.inputs[name][:, :24] = np.nan
    seen_by = problem.visible_elements()[:, :24].any(axis=1)
    assert 0 < np.count_nonzero(seen_by) < 10
    return case


@pytest.fixture(scope="module")
def sound():
    """Return each program's case, what its forward pass saved and what the sound kernels make of it."""
    found = {}
    for program in FAULTY_PROGRAMS:
        case = faulty_case(program)
        saved = verify.simulate(case).saved
        found[program] = case, saved, *run_case(case, saved)
    return found


@pytest.fixture(scope="module")
def faulty_kernels(tmp_path_factory):
    """Plant each fault in a copy of the source, and compile what it is in."""
    directories, builds = {}, []
    for program, name in FAULTS:
        file, old, new = FAULTY_PROGRAMS[program][0][name]
        directory = tmp_path_factory.mktemp("fault") / "kernels"
        shutil.copytree(cpu_build.KERNELS, directory)
        text = (directory / file).read_text()
        assert text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times"
        (directory / file).write_text(text.replace(old, new))
        directories[program, name] = directory
        builds += [(step.kernel, directory) for step in program_of(faulty_case(program)).steps]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda build: cpu_build.build(*build), builds))
    return directories


@pytest.mark.parametrize(("program", "name"), FAULTS)
def test_finds_a_planted_fault(program, name, faulty_kernels, sound):
    case, saved, results, traffic = sound[program]
    wanted = {key: results[key] for key in verify.RESULTS[case.direction]}
    found = []
    for order, copies in (("forward", "late"), ("reverse", "early"), ("random", "late")):
        try:
            again, counted = run_case(case, saved, order=order, copies=copies, kernels=faulty_kernels[program, name])
            assert_results(case, again, wanted)
            assert counted == traffic
        except (KernelFaultError, AssertionError) as fault:
            found.append(str(fault))
        if found:
            break
    assert found, "the harness saw nothing wrong"
