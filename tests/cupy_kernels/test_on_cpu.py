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

from cupy_kernels import attention, cpu_build, verify
from simattn import AttentionProblem, run


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


def work(problem):
    columns = problem.head_dim + problem.value_dim
    return problem.batch * problem.heads * problem.q_len * problem.kv_len * columns


@settings(max_examples=40, suppress_health_check=[*HealthCheck])
@given(case=verify.cases(max_len=150, max_heads=3, head_dims=(24, 32)))
def test_bits_and_bytes_are_the_simulated_machines(device, case):
    """Layouts, masks, groups, special values: what the host hands the kernel makes it compute the right thing."""
    assume(work(case.problem) < 4e6)
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
    expected = run("flash2", q, *wide, arithmetic="simt", plan=verify.default_plan(problem))
    assert verify.differing_elements(verify.from_device(attention(*on_device)), expected.out) == 0


def first_case_with(condition):
    return next(case for case in (verify.draw_case(3, index, 20) for index in range(100)) if condition(case))


def test_a_difference_would_be_seen(device):
    case = first_case_with(lambda case: case.problem.batch * case.problem.q_len * case.problem.kv_len > 20)
    expected = verify.simulate(case)
    assert differences(verify.compare(case, expected)) == NOTHING
    bits = expected.out.copy().view(f"u{expected.out.itemsize}")
    numbers = np.argwhere(~np.isnan(expected.out.astype(np.float32)))
    bits[tuple(numbers[0])] ^= 1
    changed = replace(expected, out=bits.view(expected.out.dtype), traffic=2 * expected.traffic)
    found = verify.compare(case, changed)
    assert found["differing_elements"] == 2  # in the fast and in the counting build
    assert found["differing_counts"] == 5


def test_a_write_beside_the_result_would_be_seen(device):
    case = first_case_with(lambda case: case.problem.batch * case.problem.q_len * case.problem.kv_len > 20)
    expected = verify.simulate(case)

    def run_and_write_on(launched):
        cpu_device.run_launch(launched)
        address = int(launched.parameters.view(cpu_device.FLASH2_PARAMETERS)[0]["out"])
        np.ctypeslib.ctypes.c_ubyte.from_address(address + expected.out.nbytes).value = 0

    device.run = run_and_write_on
    assert verify.compare(case, expected)["written_outside"] == 2


def test_not_a_number_is_one_value():
    actual = np.array([0x7FC00000, 0xFFC00001, 0, 0x80000000], np.uint32).view(np.float32)
    expected = np.array([0xFFC00000, 0x7FC00000, 0x80000000, 0x80000000], np.uint32).view(np.float32)
    assert verify.differing_elements(actual, expected) == 1


def test_cases_depend_on_seed_and_index_alone():
    first, again, other = verify.draw_case(1, 7), verify.draw_case(1, 7), verify.draw_case(2, 7)
    assert verify.describe(first) == verify.describe(again) != verify.describe(other)
    for name, values in first.inputs.items():
        assert verify.differing_elements(values, again.inputs[name]) == 0


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
    assert sum(report["problems_by_dtype"].values()) == 3
    with pytest.raises(ValueError, match=r"expected .*'seed': 6"):
        verify.verify(1, 6, output, longest=20)


def test_the_verifier_names_what_failed(device, tmp_path):
    device.run = None  # nothing is computed
    index = next(index for index in range(100) if verify.draw_case(3, index, 20).problem.q_len > 0)
    output = tmp_path / "summary.json"
    tally = verify.verify(index + 1, 3, output, longest=20, processes=1)
    assert not tally.clean
    failures = json.loads(output.read_text())["failures"]
    assert failures[-1]["index"] == index
    assert f"q_len={verify.draw_case(3, index, 20).problem.q_len}" in failures[-1]["case"]
