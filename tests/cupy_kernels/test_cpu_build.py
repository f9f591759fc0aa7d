"""The kernels' source, compiled for the CPU: right numbers, right counts, no dependence on chance, and faults found."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from budgets import rounding_floors
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from cupy_kernels import cpu_build
from cupy_kernels.cpu_build import COPIES, ORDERS, KernelFaultError, run_flash2_forward
from cupy_kernels.parameters import (
    COLUMN_BUCKETS,
    FLASH2_FORWARD_TILES,
    FLASH2_PARAMETERS,
    Flash2Forward,
    column_bucket,
)
from simattn.algorithms.flash2 import Flash2Plan
from simattn.arithmetic.formats import numpy_dtype
from simattn.testing import (
    assert_same_bits,
    assert_within_error_budget,
    attention_inputs,
    attention_problems,
    low_precision_attention,
    reference_attention,
)

try:
    COMPILER = cpu_build.compiler()
except cpu_build.CompilerNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)

BUILDS = (
    *((columns, "float32", FLASH2_FORWARD_TILES[columns]) for columns in COLUMN_BUCKETS),
    (64, "float16", FLASH2_FORWARD_TILES[64]),
    (128, "bfloat16", FLASH2_FORWARD_TILES[128]),
    (32, "bfloat16", simattn.plan.Tiles(q=64, kv=16)),
    (128, "float32", simattn.plan.Tiles(q=64, kv=64)),
)
"""Column buckets, storage formats and tiles of the property tests: few, since each is compiled."""


@st.composite
def cases(draw, **arguments):
    """Draw a problem that one of the builds takes, its plan and its inputs."""
    columns, dtype, tiles = draw(st.sampled_from(BUILDS))
    below = max((bucket for bucket in COLUMN_BUCKETS if bucket < columns), default=0)
    wide = draw(st.integers(below // 8 + 1, columns // 8)) * 8
    narrow = draw(st.integers(1, wide // 8)) * 8
    head_dim, value_dim = draw(st.permutations((wide, narrow)))
    drawn = draw(
        attention_problems(
            max_heads=3,
            max_len=150,
            head_dims=(head_dim,),
            dtypes=(dtype,),
            block_sparse=False,
            same_value_dim=True,
            **arguments,
        )
    )
    problem = replace(drawn, value_dim=value_dim)
    return problem, Flash2Plan(tiles=tiles), draw(attention_inputs(problem))


def plan_of(problem):
    return Flash2Plan(tiles=FLASH2_FORWARD_TILES[column_bucket(problem)])


def inputs_of(problem, seed=0):
    generator = np.random.default_rng(seed)
    shapes = (
        (problem.q_len, problem.heads, problem.head_dim),
        (problem.kv_len, problem.kv_heads, problem.head_dim),
        (problem.kv_len, problem.kv_heads, problem.value_dim),
    )
    stored = numpy_dtype(problem.dtype)
    return [generator.standard_normal((problem.batch, *shape)).astype(stored) for shape in shapes]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the builds side by side."""
    kernels = []
    for columns, dtype, tiles in BUILDS:
        problem = simattn.AttentionProblem(q_len=1, head_dim=columns, dtype=dtype)
        kernels.append(Flash2Forward.of(problem, Flash2Plan(tiles=tiles)))
    with ThreadPoolExecutor(2) as pool:
        assert all(library.exists() for library in pool.map(cpu_build.build_flash2_forward, kernels))


@settings(max_examples=60)
@given(cases(), st.sampled_from(ORDERS), st.sampled_from(COPIES), st.integers(0, 99))
def test_numbers_and_counts(case, order, copies, seed):
    problem, plan, inputs = case
    out, lse, traffic = run_flash2_forward(problem, **inputs, plan=plan, order=order, copies=copies, seed=seed)

    references = reference_attention(problem, **inputs)
    budgets = low_precision_attention(problem, **inputs)
    floors = rounding_floors(problem, inputs)
    for name, actual, reference, budget, floor in zip(
        ("out", "lse"), (out, lse), references, budgets, floors, strict=True
    ):
        assert_within_error_budget(actual, reference, budget, floor=floor, name=name)

    mask = {"scale": problem.scale, "causal": problem.causal, "window": problem.window}
    run = simattn.run("flash2", **inputs, **mask, plan=plan, arithmetic="simt")
    assert traffic == run.traffic.global_only()
    assert_same_bits(out, run.out, name="out")
    assert_same_bits(lse, run.lse, name="lse")


@settings(max_examples=20)
@given(cases(min_len=1), st.integers(0, 99))
def test_bits_do_not_depend_on_chance(case, seed):
    problem, plan, inputs = case
    out, lse, traffic = run_flash2_forward(problem, **inputs, plan=plan)
    for order, copies in (("reverse", "late"), ("random", "early")):
        again = run_flash2_forward(problem, **inputs, plan=plan, order=order, copies=copies, seed=seed)
        assert_same_bits(again[0], out, name=f"out, {order} order, {copies} copies")
        assert_same_bits(again[1], lse, name=f"lse, {order} order, {copies} copies")
        assert again[2] == traffic


@settings(max_examples=20)
@given(cases(min_len=1), st.sampled_from((np.nan, np.inf, -np.inf)), st.integers(0, 2**32 - 1))
def test_hidden_keys_never_matter(case, special, seed):
    problem, plan, inputs = case
    out, lse, _ = run_flash2_forward(problem, **inputs, plan=plan)
    chosen = np.random.default_rng(seed).random(problem.kv_len) < 0.2
    for name in ("k", "v"):
        inputs[name][:, chosen] = special
    changed_out, changed_lse, _ = run_flash2_forward(problem, **inputs, plan=plan, order="reverse", copies="late")
    sees = problem.visible_elements()[:, chosen].any(axis=1)
    assert_same_bits(changed_out[:, ~sees], out[:, ~sees], name="out")
    assert_same_bits(changed_lse[:, :, ~sees], lse[:, :, ~sees], name="lse")
    if np.isnan(special):
        assert np.isnan(changed_out[:, sees]).all()
        assert np.isnan(changed_lse[:, :, sees]).all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (1, 1), (0, 0)])
def test_empty_and_single(q_len, kv_len):
    problem = simattn.AttentionProblem(q_len=q_len, kv_len=kv_len, heads=2, head_dim=64, dtype="float32")
    q, k, v = inputs_of(problem)
    out, lse, traffic = run_flash2_forward(problem, q, k, v, plan=plan_of(problem))
    if kv_len == 0:
        assert_same_bits(out, np.zeros_like(out))
        assert_same_bits(lse, np.full_like(lse, -np.inf))
    elif q_len:
        assert_same_bits(out, v)
    counted = simattn.count(
        "flash2", q_len=q_len, kv_len=kv_len, heads=2, head_dim=64, dtype="float32", plan=plan_of(problem)
    )
    assert traffic == counted.global_only()


# What the kernel refuses


@pytest.mark.parametrize(
    ("problem", "plan", "named"),
    [
        ({"head_dim": 12}, {}, "head_dim=12"),
        ({"value_dim": 264}, {}, "value_dim=264"),
        ({"dtype": "float8_e4m3fn"}, {}, "float8"),
        ({}, {"tiles": (24, 64)}, "query rows in multiples of 32"),
        ({}, {"tiles": (64, 24)}, "keys in multiples of 16"),
        ({}, {"tiles": (64, 1024)}, r"takes up to 512"),
        ({"head_dim": 256}, {"tiles": (128, 128)}, "bytes of shared memory"),
        ({}, {"repeat_kv": True}, "repeat_kv"),
    ],
)
def test_refuses(problem, plan, named):
    problem = simattn.AttentionProblem(**({"q_len": 4, "dtype": "float32"} | problem))
    with pytest.raises(ValueError, match=named):
        Flash2Forward.of(problem, Flash2Plan(**({"tiles": (128, 64)} | plan)))


def test_refuses_other_inputs():
    problem = simattn.AttentionProblem(q_len=4, dtype="float32")
    q, k, v = inputs_of(problem)
    with pytest.raises(ValueError, match=r"k has shape \(1, 3, 1, 64\)"):
        run_flash2_forward(problem, q, k[:, :3], v, plan=plan_of(problem))
    with pytest.raises(ValueError, match=r"v has .* dtype float64"):
        run_flash2_forward(problem, q, k, v.astype(np.float64), plan=plan_of(problem))
    with pytest.raises(ValueError, match="order='sideways'"):
        run_flash2_forward(problem, q, k, v, plan=plan_of(problem), order="sideways")


# The build itself


def compile_program(directory, text, *flags):
    source, program = directory / "program.cpp", directory / "program"
    source.write_text(text)
    kernel = Flash2Forward.of(simattn.AttentionProblem(q_len=1, dtype="float32"), Flash2Plan(tiles=(128, 64)))
    macros = [f"-D{name}={value}" for name, value in kernel.macros(count_traffic=False).items()]
    includes = [f"-I{cpu_build.KERNELS}", f"-I{cpu_build.HERE}", "-DCPU_BUILD", "-Wno-unknown-pragmas"]
    subprocess.run([COMPILER, *cpu_build.FLAGS[:3], *includes, *macros, *flags, source, "-o", program], check=True)
    return program


def test_parameter_struct_matches_its_declaration(tmp_path):
    lines = [f'printf("{name} %zu\\n", offsetof(Flash2Parameters, {name}));' for name in FLASH2_PARAMETERS.names]
    size = 'printf("size %zu\\n", sizeof(Flash2Parameters));'
    text = '#include "flash2.cuh"\n#include <cstddef>\nint main() {' + "\n".join([*lines, size]) + "}"
    printed = subprocess.run([compile_program(tmp_path, text)], capture_output=True, text=True, check=True).stdout
    offsets = {name: int(offset) for name, offset in (line.split() for line in printed.splitlines())}
    assert FLASH2_PARAMETERS.fields is not None
    expected = {name: FLASH2_PARAMETERS.fields[name][1] for name in FLASH2_PARAMETERS.names}
    assert offsets == expected | {"size": FLASH2_PARAMETERS.itemsize}


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

FAULTS = {
    "no barrier for the keys": ("flash2.cu", BLOCK_BARRIER.format("K"), "    // {}"),
    "no barrier for the values": ("flash2.cu", BLOCK_BARRIER.format("V"), "    //"),
    "no wait for the keys": ("flash2.cu", COPY_WAIT.format("K"), BLOCK_BARRIER.format("K")),
    "no wait for the values": ("flash2.cu", COPY_WAIT.format("V"), BLOCK_BARRIER.format("V")),
    "probabilities read too early": ("flash2.cu", "    __syncwarp();\n    const int first", "    const int first"),
    "probabilities overwritten too early": ("flash2.cu", "    if (begin > 0) __syncwarp();\n", ""),
    "a barrier that one warp misses": (
        "flash2.cu",
        BLOCK_BARRIER.format("V"),
        "    if (threadIdx.x >= 32)" + BLOCK_BARRIER.format("V"),
    ),
    "a shuffle that one lane misses": (
        "flash2.cu",
        "      update_softmax(",
        "      if (threadIdx.x != 3) update_softmax(",
    ),
    "rows read past the end": ("tiles.cuh", "first_row + row < rows", "true"),
    "columns read past the end": ("tiles.cuh", "first_column + column < columns", "true"),
    "rows written past the end": ("flash2.cu", "if (row < parameters.q_len)", "if (true)"),
    "columns written past the end": ("flash2.cu", "if (first < parameters.value_dim)", "if (true)"),
    "rows never written": ("flash2.cu", "if (row < parameters.q_len)", "if (row < parameters.q_len - 1)"),
    "rows written twice": ("flash2.cu", "if (place.lane == 0)", "if (place.lane <= 1)"),
    "shared memory overrun": ("flash2.cu", "shared + STAGED_OFFSET", "shared + STAGED_OFFSET + 8"),
    "copies that nobody waits for": ("flash2.cu", "  finish_softmax(state, p",
                                     "  start_copy_of_16_bytes(q, 0, parameters.q);\n  finish_softmax(state, p"),
    "a load that is not counted": ("tiles.cuh", "  counter.add(16);\n", ""),
    "a store that is not counted": ("tiles.cuh", "  counter.add(4);\n", ""),
    "hidden keys that matter": ("flash2.cu", "if (!MASKED || band.sees(i, key))", "if (true)"),
    "keys past the end that matter": ("flash2.cu", " || key >= band.stop", ""),
}  # fmt: skip

FAULT_PROBLEM = simattn.AttentionProblem(
    q_len=70, kv_len=150, heads=2, kv_heads=1, head_dim=104, value_dim=112, dtype="float32", window=(60, 10)
)
FAULT_PLAN = Flash2Plan(tiles=(64, 64))


@pytest.fixture(scope="module")
def faulty_kernels(tmp_path_factory):
    """Plant each fault in a copy of the source, and compile it."""
    directories = {}
    for number, (name, (file, old, new)) in enumerate(FAULTS.items()):
        directory = tmp_path_factory.mktemp(f"fault{number}") / "kernels"
        shutil.copytree(cpu_build.KERNELS, directory)
        text = (directory / file).read_text()
        assert text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times"
        (directory / file).write_text(text.replace(old, new))
        directories[name] = directory
    kernel = Flash2Forward.of(FAULT_PROBLEM, FAULT_PLAN)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda directory: cpu_build.build_flash2_forward(kernel, directory), directories.values()))
    return directories


@pytest.fixture(scope="module")
def fault_case():
    """Inputs with NaN in keys that few rows see, and what the sound kernel makes of them."""
    inputs = inputs_of(FAULT_PROBLEM)
    for array in inputs[1:]:
        array[:, :24] = np.nan
    seen_by = FAULT_PROBLEM.visible_elements()[:, :24].any(axis=1)
    assert 0 < np.count_nonzero(seen_by) < 10
    return inputs, run_flash2_forward(FAULT_PROBLEM, *inputs, plan=FAULT_PLAN)


@pytest.mark.parametrize("name", FAULTS)
def test_finds_a_planted_fault(name, faulty_kernels, fault_case):
    inputs, sound = fault_case
    found = []
    for order, copies in (("forward", "late"), ("reverse", "early"), ("random", "late")):
        try:
            out, lse, traffic = run_flash2_forward(
                FAULT_PROBLEM, *inputs, plan=FAULT_PLAN, order=order, copies=copies, kernels=faulty_kernels[name]
            )
            assert_same_bits(out, sound[0])
            assert_same_bits(lse, sound[1])
            assert traffic == sound[2]
        except (KernelFaultError, AssertionError) as fault:
            found.append(str(fault))
    assert found, "the harness saw nothing wrong"
