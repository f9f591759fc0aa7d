"""What ``explain`` says of a call is what the call launches, on a stand-in for CuPy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import fake_cupy
import numpy as np
import pytest
from test_attention import device_arrays

import cupy_kernels
from cupy_kernels import attention, attention_backward, default_plan, explain
from cupy_kernels.ragged import RaggedProblem
from cupy_kernels.table import ALGORITHMS, DEFAULT_ALGORITHM, UNNAMED
from simattn import AttentionProblem
from simattn.algorithms.flash1 import Flash1Plan
from simattn.algorithms.flash2 import Flash2Plan
from simattn.algorithms.flash3 import Flash3Plan
from simattn.algorithms.online_softmax import OnlineSoftmaxPlan
from simattn.algorithms.standard import StandardPlan

LONG = {"heads": 16, "q_len": 4096, "head_dim": 128}


@pytest.fixture
def kernels(monkeypatch):
    with fake_cupy.installed(monkeypatch) as kernels:
        yield kernels


def launched(kernels):
    return [
        (one.variant.function, one.grid, one.block, one.shared_bytes, {n.lower(): v for n, v in one.variant.macros})
        for one in kernels.launches
    ]


def explained(explanation):
    return [
        (one.function, (one.blocks,), (one.threads,), one.shared_bytes, dict(one.build)) for one in explanation.kernels
    ]


@pytest.mark.parametrize("algorithm", [None, *ALGORITHMS])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_forward_call_launches_what_is_explained(kernels, algorithm, dtype):
    given = device_arrays(dtype=dtype, head_dim=64, value_dim=64)
    options = {"causal": True, "window": (50, None), "scale": 0.3, "algorithm": algorithm}
    if algorithm == "flash3" and dtype == "float32":
        for call in (attention, explain):
            with pytest.raises(ValueError, match=r"dtype='float32': flash3 takes"):
                call(**given, **options)
        return
    found = explain(**given, **options)
    assert kernels.loaded == []
    attention(**given, **options, plan=found.plan)
    assert launched(kernels) == explained(found)
    attention(**given, **options)
    assert launched(kernels) == 2 * explained(found)
    assert found.problem == AttentionProblem(
        batch=2, heads=4, kv_heads=2, q_len=70, kv_len=90, head_dim=64, dtype=dtype, causal=True, window=(50, None),
        scale=0.3,
    )  # fmt: skip
    assert set(found.others) == set(ALGORITHMS) - {found.algorithm}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("algorithm", [None, "flash1", "standard"])
def test_a_backward_call_launches_what_is_explained(kernels, algorithm, deterministic):
    given = device_arrays(dtype="float16")
    options = {"causal": True, "algorithm": algorithm}
    out, saved = attention(**given, **options, return_saved=True)
    kernels.launches.clear()
    attention_backward(np.zeros_like(out), **given, **options, saved=saved, deterministic=deterministic)
    found = explain(**given, **options, direction="backward", deterministic=deterministic)
    assert launched(kernels) == explained(found)
    assert found.deterministic is (deterministic or algorithm is not None)
    assert found.arithmetic == "simt"
    assert ("no fixed order" in repr(found)) is not found.deterministic
    assert found.others["flash3"].startswith("refused: algorithm='flash3' has no kernel for the backward pass")


# What is chosen


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("hardware", ["H100-SXM", "H200", "A100-40GB", "RTX-4090", "T4", "V100-SXM2-32GB", "B200"])
def test_the_fastest_that_takes_the_problem_is_chosen(hardware, dtype, direction):
    problem = AttentionProblem(**LONG, dtype=dtype)
    found = explain(problem, hardware=hardware, direction=direction)
    is_fastest = hardware in ("H100-SXM", "H200") and dtype != "float32" and direction == "forward"
    assert found.algorithm == ("flash3" if is_fastest else "flash2")
    assert found.plan == default_plan(problem, hardware, direction=direction)
    assert found.plan == default_plan(problem, hardware, algorithm=found.algorithm, direction=direction)
    assert type(found.plan) is ALGORITHMS[found.algorithm].plan_class
    expected = "flash3 is the fastest that takes the problem on compute capability 9.0"
    assert found.reasons[0] == (expected if is_fastest else "flash2 is the default")
    assert not any("the default" in why for why in found.others.values())


PLANS = {"flash1": Flash1Plan, "flash2": Flash2Plan, "flash3": Flash3Plan, "standard": StandardPlan}


@pytest.mark.parametrize("algorithm", list(PLANS))
def test_a_plan_decides(kernels, algorithm):
    plan = PLANS[algorithm](tiles=(64, 64))
    problem = AttentionProblem(**LONG, dtype="bfloat16")
    found = explain(problem, plan=plan)
    assert (found.algorithm, found.plan) == (algorithm, plan)
    assert found.reasons[0] == f"the plan is a {PLANS[algorithm].__name__}"
    assert explain(problem, plan=plan, algorithm=algorithm).reasons[0] == f"algorithm={algorithm!r}"
    given = device_arrays(dtype="bfloat16", head_dim=64, value_dim=64)
    attention(**given, plan=plan)
    by_plan = launched(kernels)
    kernels.launches.clear()
    attention(**given, plan=plan, algorithm=algorithm)
    assert launched(kernels) == by_plan != []


def test_what_a_plan_decides_is_refused_where_it_does_not_run(kernels):
    plan, problem = Flash3Plan(tiles=(64, 64)), AttentionProblem(**LONG, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"algorithm='flash3' runs on compute capability 9\.0 .*, and T4 has 7\.5"):
        explain(problem, hardware="T4", plan=plan)
    with pytest.raises(ValueError, match="dtype='float32': flash3 takes"):
        explain(dataclasses.replace(problem, dtype="float32"), plan=plan)
    with pytest.raises(ValueError, match="algorithm='flash3' has no kernel for the backward pass: expected one of"):
        explain(problem, direction="backward", plan=plan)
    with pytest.raises(TypeError, match=r"plan is a OnlineSoftmaxPlan: expected one of \('Flash2Plan', 'Flash1Plan', "):
        explain(problem, plan=OnlineSoftmaxPlan(tiles=(64, 64)))
    for algorithm, other in (("flash2", plan), ("flash3", Flash2Plan(tiles=(64, 64)))):
        with pytest.raises(TypeError, match=rf"plan is a {type(other).__name__}: expected a simattn\S*{algorithm}\.F"):
            explain(problem, algorithm=algorithm, plan=other)


def test_sequences_with_lengths_of_their_own():
    problem = RaggedProblem.of(AttentionProblem(**LONG, dtype="bfloat16"), [(3, 4), (5, 6)])
    found = explain(problem)
    assert (found.algorithm, found.problem) == ("flash3", problem)
    assert found.plan == default_plan(problem, algorithm="flash3")
    assert {why.partition(" takes ")[0] for why in found.others.values()} == {
        f"refused: algorithm={name!r}" for name in ("flash2", "flash1", "standard")
    }
    for call in (explain, default_plan):
        with pytest.raises(ValueError, match=r"algorithm='flash3' runs on .* A100-40GB has 8\.0: expected another GPU"):
            call(problem, hardware="A100-40GB")
        with pytest.raises(ValueError, match="dtype='float32': flash3 takes"):
            call(dataclasses.replace(problem, dtype="float32"))
        with pytest.raises(ValueError, match="for the backward pass: expected sequences of one length each"):
            call(problem, direction="backward")
    with pytest.raises(ValueError, match=r"algorithm='flash2' takes no cu_seqlens_q .*: expected one of \('flash3',\)"):
        explain(problem, plan=Flash2Plan(tiles=(64, 64)))


def test_what_runs_without_a_name_saves_the_same():
    """So that a backward pass takes what any of them saved."""
    assert len({item.saved for item in UNNAMED}) == 1
    assert [item.name for item in UNNAMED if "backward" in item.programs] == [DEFAULT_ALGORITHM]


@pytest.mark.parametrize(
    ("hardware", "dtype", "algorithm", "units", "arithmetic"),
    [
        ("H100-SXM", "bfloat16", None, "wgmma", "hopper"),
        ("H100-SXM", "bfloat16", "flash2", "mma.sync", "mma"),
        ("H100-SXM", "float32", None, "CUDA cores", "simt"),
        ("H100-SXM", "float16", "flash3", "wgmma", "hopper"),
        ("H100-SXM", "float16", "flash1", "CUDA cores", "simt"),
        ("A100-40GB", "float16", None, "mma.sync", None),
        ("A100-40GB", "float32", None, "CUDA cores", "simt"),
        ("T4", "float16", None, "CUDA cores", "simt"),
    ],
)
def test_units_and_the_arithmetic_that_repeats_them(hardware, dtype, algorithm, units, arithmetic):
    problem = AttentionProblem(**LONG, dtype=dtype)
    found = explain(problem, hardware=hardware, algorithm=algorithm)
    assert {launch.units for launch in found.kernels} == {units}
    assert found.arithmetic == arithmetic
    assert found.deterministic
    assert found.plan == default_plan(problem, hardware, algorithm=algorithm)
    assert found.hardware == hardware


def test_why_an_algorithm_multiplies_by_what_it_does():
    def reason(hardware="A100-40GB", dtype="bfloat16", **options):
        return explain(AttentionProblem(**LONG, dtype=dtype), hardware=hardware, **options).reasons[1]

    assert reason() == "bfloat16 is multiplied on tensor cores from compute capability 8.0 on"
    assert reason(dtype="float32") == "float32 is multiplied on CUDA cores"
    assert reason("T4") == "tensor cores are used from compute capability 8.0 on"
    assert reason(plan=Flash2Plan(tiles=(64, 64))) == "the plan has units='cuda_cores'"
    assert reason(direction="backward") == "its backward kernels are for CUDA cores"
    assert reason("H100-SXM") == "its kernel is for Hopper's tensor cores"
    assert reason(algorithm="standard") == "its kernels are for CUDA cores"


def test_a_backward_plan_for_tensor_cores_runs_on_cuda_cores():
    plan = Flash2Plan(tiles=(64, 64), units="tensor_cores", dq="deterministic")
    found = explain(AttentionProblem(**LONG, dtype="bfloat16"), direction="backward", plan=plan)
    assert found.arithmetic == "simt"
    assert {launch.units for launch in found.kernels} == {"CUDA cores"}


def test_why_the_others_do_not_run():
    problem = AttentionProblem(**LONG, dtype="bfloat16")
    assert dict(explain(problem).others) == {
        name: f"not asked for; it takes the problem (algorithm={name!r})" for name in ("flash1", "standard", "flash2")
    }
    default = "not asked for; it takes the problem (the default, without algorithm= and plan=)"
    assert explain(problem, algorithm="flash2").others["flash3"] == default
    assert explain(problem, plan=Flash2Plan(tiles=(64, 64))).others["flash3"] == default
    assert explain(problem, hardware="T4", algorithm="flash1").others["flash2"] == default
    assert (
        explain(problem, hardware="T4")
        .others["flash3"]
        .startswith("refused: algorithm='flash3' runs on compute capability 9.0 (Hopper), and T4 has 7.5")
    )
    of_float32 = explain(dataclasses.replace(problem, dtype="float32"))
    assert of_float32.others["flash3"] == "refused: dtype='float32': flash3 takes ('float16', 'bfloat16')"


def test_the_report(kernels):
    given = device_arrays(dtype="bfloat16", head_dim=64, value_dim=64)
    report = repr(explain(**given, plan=Flash2Plan(tiles=(64, 32), units="tensor_cores")))
    first, plan, bits, why, *_ = report.split("\n")
    assert first == "flash2 forward, bfloat16, on device 0 (stand-in), compute capability 9.0"
    assert plan == "plan: Flash2Plan(tiles=(64, 32), units='tensor_cores')"
    assert bits == 'bits: those of arithmetic="mma" with this plan'
    assert why.endswith("; the plan was given")
    assert "flash2_tensor_forward" in report
    assert "query_rows=64 key_rows=32" in report
    assert "; it takes the problem (the default, without algorithm= and plan=)" in report
    assert max(map(len, report.split("\n"))) < 170
    assert "no arithmetic models" in repr(explain(AttentionProblem(q_len=5, dtype="float16"), hardware="A100-40GB"))
    assert "nothing to compute" in repr(explain(AttentionProblem(q_len=0, head_dim=64, dtype="float32")))


def test_an_explanation_does_not_change():
    found = explain(AttentionProblem(**LONG, dtype="float32"))
    assert found == explain(AttentionProblem(**LONG, dtype="float32"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.algorithm = "flash3"
    with pytest.raises(TypeError):
        found.others["flash3"] = ""
    with pytest.raises(TypeError):
        found.kernels[0].build["columns"] = ""


def test_the_device_is_the_arrays(kernels):
    given = device_arrays(device=1)
    assert explain(**given).hardware == "device 1 (stand-in)"
    with pytest.raises(ValueError, match="k is on device 0: expected device 1"):
        explain(given["q"], device_arrays()["k"], given["v"])


def test_what_the_call_refuses_is_refused(kernels):
    given = device_arrays(dtype="bfloat16", head_dim=64, value_dim=64)
    unaligned = np.zeros((2, 90, 2, 68), given["k"].dtype).view(fake_cupy.Array)[..., :64]
    for call in (attention, explain):
        with pytest.raises(ValueError, match=r"k .*16"):
            call(given["q"], unaligned, given["v"])
        with pytest.raises(ValueError, match=r"k has a stride of -\d+ bytes: the kernel takes"):
            call(given["q"], given["k"][:, ::-1], given["v"])
        with pytest.raises(ValueError, match="algorithm='flash9' has no kernel"):
            call(**given, algorithm="flash9")
        with pytest.raises(TypeError, match="plan is a"):
            call(**given, algorithm="flash3", plan=Flash2Plan(tiles=(64, 64)))
        with pytest.raises(TypeError, match="causal=1: expected a bool"):
            call(**given, causal=1)


def test_arrays_and_a_problem_are_not_mixed(kernels):
    given = device_arrays()
    problem = AttentionProblem(**LONG)
    with pytest.raises(TypeError, match="hardware is given beside arrays"):
        explain(**given, hardware="T4")
    for name, value in (("k", given["k"]), ("v", given["v"]), ("scale", 1.0), ("causal", True), ("window", (1, 1))):
        with pytest.raises(TypeError, match=f"{name} is given beside a problem"):
            explain(problem, **{name: value})
    with pytest.raises(ValueError, match="direction='sideways'"):
        explain(problem, direction="sideways")


def test_a_problem_needs_no_cupy():
    script = (
        "import simattn, cupy_kernels, sys\n"
        "print(cupy_kernels.explain(simattn.AttentionProblem(q_len=9, dtype='float16')))\n"
        "assert 'cupy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("flash3 forward")


def test_it_is_public():
    assert {"explain", "Explanation", "KernelLaunch"} <= set(cupy_kernels.__all__)
