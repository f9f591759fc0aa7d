"""``attention`` from its arguments to its results, without a GPU: the host's side on a stand-in for CuPy, the kernel in
its CPU build. Tests skip where there is no C++ compiler.
"""

from __future__ import annotations

import json
from dataclasses import replace

import cpu_device
import fake_cupy
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from repairs import repaired_bytes

from cupy_kernels import attention, attention_backward, count_traffic, cpu_build, default_plan, verify, workspace_bytes
from cupy_kernels.flash3 import REPAIRED_ROWS
from cupy_kernels.parameters import struct_of
from cupy_kernels.ragged import RaggedProblem
from cupy_kernels.table import ALGORITHMS
from simattn import AttentionProblem, run, run_backward


def why_no_compiler():
    try:
        cpu_build.compiler()
    except cpu_build.CompilerNotFoundError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler() or "there is a compiler")

NOTHING = {"differing_elements": 0, "differing_counts": 0, "written_outside": 0}


@pytest.fixture
def device(monkeypatch):
    with fake_cupy.installed(monkeypatch) as kernels:
        kernels.run = cpu_device.CpuDevice(monkeypatch).run
        yield kernels


def differences(found):
    return {name: value for name, value in found.items() if name != "elements"}


def work(case):
    problem = case.problem
    lengths = case.lengths or [(problem.q_len, problem.kv_len)] * problem.batch
    columns = problem.head_dim + problem.value_dim
    return problem.heads * sum(queries * keys for queries, keys in lengths) * columns


@pytest.mark.parametrize(
    ("algorithm", "direction"), [(name, direction) for name, item in ALGORITHMS.items() for direction in item.programs]
)
@settings(max_examples=15, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_bits_and_bytes_are_the_simulated_machines(device, algorithm, direction, data):
    """Layouts, masks, groups, special values: what the host hands the kernels makes them compute the right thing."""
    chosen = {"algorithms": (algorithm,), "directions": (direction,)}
    case = data.draw(verify.cases(**chosen, max_len=100, max_heads=3, head_dims=(24, 32)))
    assume(work(case) < 2e6)
    assert differences(verify.compare(case, verify.simulate(case))) == NOTHING


def test_arrays_may_be_broadcast(device):
    problem = AttentionProblem(batch=2, heads=2, q_len=20, kv_len=30, head_dim=16, dtype="float32")
    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, 20, 2, 16)).astype(np.float32)
    k = generator.standard_normal((1, 30, 1, 16)).astype(np.float32)
    wide = [np.broadcast_to(values, (2, *values.shape[1:2], 2, 16)) for values in (k, k)]
    on_device = [q.view(fake_cupy.Array)]
    for values in wide:
        view = np.lib.stride_tricks.as_strided(
            k.view(fake_cupy.Array), values.shape, (0, k.strides[1], 0, k.strides[3]), subok=True
        )
        on_device.append(view)
    expected = run("flash2", q, *wide, arithmetic="simt", plan=default_plan(problem))
    assert verify.differing_elements(verify.from_device(attention(*on_device)), expected.out) == 0


@pytest.mark.parametrize("lengths", [None, ((1, 0), (70, 0))])
@pytest.mark.parametrize("causal", [False, True])
def test_there_may_be_no_key_at_all(device, lengths, causal):
    """The kernel is handed no tensor map of keys and values then."""
    problem = AttentionProblem(q_len=71, kv_len=0, heads=2, dtype="bfloat16", causal=causal)
    case = verify.random_case("flash3", "forward", problem)
    if lengths is not None:
        case = replace(case, problem=RaggedProblem.of(problem, lengths), lengths=lengths)
    assert differences(verify.compare(case, verify.simulate(case))) == NOTHING


def test_what_is_read_again_is_no_part_of_the_traffic(device):
    """An infinite value of the last key is hidden from all rows but the last, which are computed anew."""
    problem = AttentionProblem(q_len=32, kv_len=32, heads=2, dtype="bfloat16", causal=True)
    case = verify.random_case("flash3", "forward", problem)
    read = []
    for value in (1.0, np.inf):
        case.inputs["v"][:, -1] = value
        expected = verify.simulate(case)
        with count_traffic() as counted:
            out = attention(*(verify.on_device(case.inputs[name]) for name in "qkv"), causal=True, algorithm="flash3")
        assert verify.differing_elements(verify.from_device(out), expected.results["out"]) == 0
        assert counted.traffic == expected.traffic
        read.append(counted.metadata)
    schedule = {"schedule": 4 * problem.heads}
    assert read == [schedule, {**schedule, REPAIRED_ROWS: repaired_bytes(case, expected)[0]}]
    assert read[1][REPAIRED_ROWS] > 0


FORWARD = {"algorithms": ("flash2",), "directions": ("forward",)}


def first_case_with(condition):
    drawn = (verify.draw_case(3, index, 20, **FORWARD) for index in range(100))
    return next(case for case in drawn if condition(case))


def test_a_difference_would_be_seen(device):
    case = first_case_with(lambda case: case.problem.batch * case.problem.q_len * case.problem.kv_len > 20)
    expected = verify.simulate(case)
    assert differences(verify.compare(case, expected)) == NOTHING
    out = expected.results["out"]
    bits = out.copy().view(f"u{out.itemsize}")
    numbers = np.argwhere(~np.isnan(out.astype(np.float32)))
    bits[tuple(numbers[0])] ^= 1
    results = {**expected.results, "out": bits.view(out.dtype)}
    changed = replace(expected, results=results, traffic=2 * expected.traffic)
    found = verify.compare(case, changed)
    assert found["differing_elements"] == 2  # in the fast and in the counting build
    assert found["differing_counts"] == 5


def test_a_write_beside_the_result_would_be_seen(device):
    case = first_case_with(lambda case: case.problem.batch * case.problem.q_len * case.problem.kv_len > 20)
    expected = verify.simulate(case)

    run_launch = device.run

    def run_and_write_on(launched):
        run_launch(launched)
        address = int(launched.parameters.view(struct_of(("q", "k", "v", "out", "lse")))[0]["out"])
        np.ctypeslib.ctypes.c_ubyte.from_address(address + expected.results["out"].nbytes).value = 0

    device.run = run_and_write_on
    assert verify.compare(case, expected)["written_outside"] == 2


def test_not_a_number_is_one_value():
    actual = np.array([0x7FC00000, 0xFFC00001, 0, 0x80000000], np.uint32).view(np.float32)
    expected = np.array([0xFFC00000, 0x7FC00000, 0x80000000, 0x80000000], np.uint32).view(np.float32)
    assert verify.differing_elements(actual, expected) == 1


def test_a_sum_in_another_order_is_told_from_a_wrong_one():
    exact = np.array([1.0, -3.0, np.nan, np.inf, 0.0], np.float32)
    assert verify.differing_sums(exact * np.float32(1 + 1e-6), exact) == 0
    assert verify.differing_sums(exact + np.float32([0, 1e-4, 0, 0, 1e-4]), exact) == 2
    assert verify.differing_sums(np.float32([1, -3, 1, 1, np.nan]), exact) == 3


def test_sums_stored_in_sixteen_bits_may_differ_by_one_of_their_units():
    exact = np.float16([1.0, 1.0, 0.25, -0.5])
    assert verify.differing_sums(np.nextafter(exact, np.float16(9)), exact) == 0
    assert verify.differing_sums(exact * np.float16([1, 1.01, 0, -1]), exact) == 3


def test_every_plan_and_program_is_drawn():
    drawn = [verify.draw_case(5, index, 20) for index in range(150)]
    programs = {(name, direction) for name, item in ALGORITHMS.items() for direction in item.programs}
    assert {(case.algorithm, case.direction) for case in drawn} == programs
    assert {case.algorithm for case in drawn if case.lengths} == {"flash3"}
    for name, choices in verify.PLAN_FIELDS.items():
        assert {getattr(case.plan, name) for case in drawn if hasattr(case.plan, name)} >= set(choices), name


def test_cases_depend_on_seed_and_index_alone():
    first, again, other = verify.draw_case(1, 7), verify.draw_case(1, 7), verify.draw_case(2, 7)
    assert verify.describe(first) == verify.describe(again) != verify.describe(other)
    for name, values in first.inputs.items():
        assert verify.differing_elements(values, again.inputs[name]) == 0


@pytest.mark.parametrize(
    ("algorithms", "programs"),
    [
        (list(ALGORITHMS), list(verify.PROGRAMS)),
        (["flash3"], [("flash3", "forward")]),
        (["flash3", "flash1"], [("flash1", "forward"), ("flash1", "backward"), ("flash3", "forward")]),
        ([], []),
    ],
    ids=str,
)
def test_programs_of_some_algorithms(algorithms, programs):
    assert sorted(verify.programs_of(algorithms)) == sorted(programs)


def test_programs_are_drawn_in_turn():
    programs = verify.programs_of(["flash1", "flash3"])
    drawn = [verify.draw_case(5, index, 20, programs) for index in range(2 * len(programs))]
    assert [(case.algorithm, case.direction) for case in drawn] == 2 * list(programs)
    kernels = verify.variants_of_chunk(5, 0, 4, 20, verify.programs_of(["flash3"]))
    assert {kernel.function for kernel in kernels} == {"flash3_forward"}


def test_the_verifier_draws_problems_of_some_algorithms(device, tmp_path, capsys):
    output = tmp_path / "summary.json"
    arguments = ["--problems", "3", "--seed", "4", "--output", str(output), "--longest", "20", "--processes", "1"]
    assert verify.main([*arguments, "--algorithm", "flash3", "--algorithm", "standard"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 3
    report = json.loads(output.read_text())
    chosen = ("standard", "flash3")
    assert report["request"]["programs"] == [" ".join(one) for one in verify.PROGRAMS if one[0] in chosen]
    assert {kind.split()[0] for kind in report["problems_by_kind"]} == set(chosen)
    assert not any(launch.variant.function.startswith(("flash1", "flash2")) for launch in device.launches)
    for others in (["--algorithm", "flash3"], []):  # what was not asked for before
        with pytest.raises(ValueError, match=r"holds results of request .*'standard forward'.*: expected"):
            verify.main([*arguments, *others])
    with pytest.raises(SystemExit):
        verify.main([*arguments, "--algorithm", "flash9"])
    assert "invalid choice: 'flash9'" in capsys.readouterr().err


def test_the_verifier_goes_on_where_it_was(device, tmp_path):
    output = tmp_path / "summary.json"
    first = verify.verify(2, 5, output, longest=20, processes=1)
    assert (first.problems, first.clean) == (2, True)
    launches = len(device.launches)
    again = verify.verify(2, 5, output, longest=20, processes=1)
    assert (again.problems, len(device.launches)) == (2, launches)
    third = verify.verify(3, 5, output, longest=20, processes=1)
    assert (third.problems, third.clean) == (3, True)
    report = json.loads(output.read_text())
    assert report["tally"]["elements"] == third.elements >= first.elements > 0
    assert report["failures"] == []
    assert report["device"] == "stand-in"
    assert sum(report["problems_by_kind"].values()) == 3
    with pytest.raises(ValueError, match=r"expected .*'seed': 6"):
        verify.verify(1, 6, output, longest=20)
    output.write_text(json.dumps({**report, "kernel_sources": "others"}))
    with pytest.raises(ValueError, match=r"holds results of kernel_sources others: expected"):
        verify.verify(4, 5, output, longest=20)


def test_the_verifier_names_what_failed(device, tmp_path):
    device.run = None  # nothing is computed
    drawn = [verify.draw_case(3, index, 20).problem for index in range(100)]
    index = next(i for i, problem in enumerate(drawn) if problem.batch * problem.q_len * problem.kv_len > 0)
    output = tmp_path / "summary.json"
    tally = verify.verify(index + 1, 3, output, longest=20, processes=1)
    assert not tally.clean
    failures = json.loads(output.read_text())["failures"]
    assert failures[-1]["index"] == index
    assert f"q_len={drawn[index].q_len}" in failures[-1]["case"]


# Gradients

BACKWARD = [name for name, item in ALGORITHMS.items() if "backward" in item.programs]


@pytest.mark.parametrize("algorithm", BACKWARD)
def test_gradients_from_what_the_forward_call_returned(device, algorithm):
    """The way of a user: forward, saved arrays, backward; a workspace of one's own changes nothing."""
    problem = AttentionProblem(
        batch=2, heads=4, kv_heads=2, q_len=20, kv_len=37, head_dim=24, causal=True, dtype="float16"
    )
    case = verify.random_case(algorithm, "backward", problem)
    arrays = [case.inputs[name].view(fake_cupy.Array) for name in "qkv"]
    options = {"causal": True, "algorithm": algorithm}
    out, lse, saved = attention(*arrays, **options, return_lse=True, return_saved=True)
    assert set(saved) == set(ALGORITHMS[algorithm].saved)
    plan = default_plan(problem, algorithm=algorithm)
    arithmetic = ALGORITHMS[algorithm].arithmetic(problem, plan)
    forward = run(algorithm, *arrays, causal=True, arithmetic=arithmetic, plan=plan)
    assert verify.differing_elements(verify.from_device(out), forward.out) == 0
    assert verify.differing_elements(verify.from_device(lse), forward.lse) == 0
    for name, array in saved.items():
        assert verify.differing_elements(verify.from_device(array), forward.saved[name]) == 0, name
    plan = default_plan(problem, algorithm=algorithm, direction="backward", deterministic=True)
    expected = run_backward(
        algorithm, *arrays, case.inputs["dout"], causal=True, arithmetic="simt", plan=plan, saved=forward.saved
    )
    dout = case.inputs["dout"].view(fake_cupy.Array)
    size = workspace_bytes(*arrays, **options, direction="backward", deterministic=True)
    memory = np.full(size + 256, 0xFF, np.uint8)
    workspace = memory[-memory.ctypes.data % 256 :][:size].view(fake_cupy.Array)
    for chosen in ({}, {"workspace": workspace}):
        found = attention_backward(dout, *arrays, **options, saved=saved, deterministic=True, **chosen)
        for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
            assert verify.differing_elements(verify.from_device(gradient), getattr(expected, name)) == 0, name
    if algorithm == "flash2":
        again = attention_backward(dout, *arrays, out, lse, causal=True, deterministic=True)
        assert verify.differing_elements(verify.from_device(again[0]), expected.dq) == 0
