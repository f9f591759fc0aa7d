"""What ``attention`` takes, refuses and launches, on a stand-in for CuPy."""

from __future__ import annotations

import contextlib
import inspect
import math
import subprocess
import sys
import threading
from dataclasses import replace

import cpu_device
import fake_cupy
import ml_dtypes
import numpy as np
import pytest

import cupy_kernels
from cupy_kernels import (
    arrays,
    attention,
    attention_backward,
    count_traffic,
    cpu_build,
    default_plan,
    explain,
    launch,
    workspace_bytes,
)
from cupy_kernels.parameters import struct_of
from cupy_kernels.table import ALGORITHMS as KERNEL_ALGORITHMS
from cupy_kernels.table import make_program
from simattn import AttentionProblem, Traffic, count, run, run_backward
from simattn import default_plan as simulated_default_plan
from simattn.algorithms import ALGORITHMS
from simattn.algorithms.flash1 import Flash1Plan
from simattn.algorithms.flash2 import Flash2Plan
from simattn.algorithms.flash3 import Flash3Plan
from simattn.arithmetic.formats import numpy_dtype
from simattn.hardware import get_hardware
from simattn.testing import assert_same_bits


@pytest.fixture
def kernels(monkeypatch):
    with fake_cupy.installed(monkeypatch) as kernels:
        yield kernels


@pytest.fixture
def cupy(kernels):
    return arrays.require_cupy()


def device_arrays(
    q_len=70, kv_len=90, heads=4, kv_heads=2, head_dim=32, value_dim=48, batch=2, dtype="float32", device=0
):
    shapes = {
        "q": (batch, q_len, heads, head_dim),
        "k": (batch, kv_len, kv_heads, head_dim),
        "v": (batch, kv_len, kv_heads, value_dim),
    }
    with fake_cupy.Device(device):
        return {name: np.zeros(shape, numpy_dtype(dtype)).view(fake_cupy.Array) for name, shape in shapes.items()}


def parameters_of(launched):
    return launched.parameters.view(struct_of(("q", "k", "v", "out", "lse")))[0]


# The package


def test_every_public_name_exists():
    assert cupy_kernels.__all__ == sorted(cupy_kernels.__all__, key=lambda name: (name.islower(), name))
    for name in cupy_kernels.__all__:
        value = getattr(cupy_kernels, name)
        assert name in dir(cupy_kernels)
        assert inspect.getdoc(value), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'cupy_kernels' has no attribute 'atention'"):
        cupy_kernels.atention  # noqa: B018


@pytest.mark.parametrize(
    "code",
    ["import cupy_kernels", "import cupy_kernels\nfor name in cupy_kernels.__all__: getattr(cupy_kernels, name)"],
)
def test_importing_imports_no_cupy(code):
    script = f"{code}\nimport sys\nprint([n for n in ('cupy', 'cuda', 'numba', 'hypothesis') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_arguments_after_v_are_keywords():
    parameters = inspect.signature(attention).parameters
    assert [name for name, item in parameters.items() if item.kind is item.POSITIONAL_OR_KEYWORD] == ["q", "k", "v"]
    assert {"scale", "causal", "window", "algorithm", "return_lse", "cu_seqlens_q", "out", "plan"} <= set(parameters)


def test_every_algorithm_is_one_of_the_simulator():
    assert set(KERNEL_ALGORITHMS) <= set(ALGORITHMS)
    for name, algorithm in KERNEL_ALGORITHMS.items():
        assert algorithm.name == name
        assert algorithm.plan_class is ALGORITHMS[name].plan_class
        assert set(algorithm.programs) == set(algorithm.default_plans) <= set(ALGORITHMS[name].programs)
        for dtype in algorithm.dtypes(get_hardware("H100-SXM")):
            problem = AttentionProblem(q_len=5, dtype=dtype)
            for direction in algorithm.programs:
                plan = default_plan(problem, algorithm=name, direction=direction)
                assert algorithm.arithmetic(problem, plan) in ALGORITHMS[name].exact_arithmetics[direction]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("columns", range(16, 257, 40))
def test_the_simulated_machine_takes_the_default_plans(columns, dtype):
    """Both sides count by one plan, within the capacity that it enforces."""
    problem = AttentionProblem(heads=4, kv_heads=2, q_len=5000, kv_len=3000, head_dim=columns, dtype=dtype)
    shape = {name: getattr(problem, name) for name in ("heads", "kv_heads", "q_len", "kv_len", "head_dim", "dtype")}
    for algorithm, found in KERNEL_ALGORITHMS.items():
        if dtype not in found.dtypes(get_hardware("H100-SXM")):
            continue
        for direction in found.programs:
            plans = {default_plan(problem, algorithm=algorithm, direction=direction, deterministic=repeats)
                     for repeats in (False, True)}  # fmt: skip
            for plan in plans:
                assert count(algorithm, **shape, direction=direction, plan=plan).hbm_bytes > 0


def test_default_plans_fit_small_devices():
    small = get_hardware("T4")
    for columns in (16, 64, 128, 256):
        problem = AttentionProblem(q_len=100, head_dim=columns, dtype="float32")
        for algorithm, found in KERNEL_ALGORITHMS.items():
            if not found.dtypes(small):
                continue
            for direction in found.programs:
                plan = default_plan(problem, small, algorithm=algorithm, direction=direction)
                for step in make_program(algorithm, direction, problem, plan, small).steps:
                    assert step.kernel.shared_bytes <= small.sram_bytes_per_block


# Without a GPU


def test_without_cupy_the_cpu_way_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    arrays.require_cupy.cache_clear()
    one = np.zeros((1, 1, 1, 16), np.float32)
    with pytest.raises(RuntimeError, match=r"CuPy is not installed.*simattn\.run"):
        attention(one, one, one)
    with pytest.raises(RuntimeError, match=r"simattn\.run"), count_traffic():
        pass


@pytest.mark.parametrize("failure", [RuntimeError("cudaErrorInsufficientDriver: too old"), None])
def test_without_a_device_the_cpu_way_is_named(monkeypatch, failure):
    with fake_cupy.installed(monkeypatch):
        module = sys.modules["cupy"]

        def count():
            if failure:
                raise failure
            return 0

        module.cuda.runtime.getDeviceCount = count
        one = np.zeros((1, 1, 1, 16), np.float32)
        expected = "insufficientdriver" if failure else "there is none"
        with pytest.raises(RuntimeError, match=r"simattn\.run") as raised:
            attention(one, one, one)
        assert expected in str(raised.value).lower()


# What is launched


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_launch(kernels, dtype):
    given = device_arrays(dtype=dtype)
    out, lse = attention(**given, causal=True, window=(5, None), scale=0.5, algorithm="flash2", return_lse=True)
    assert (out.shape, out.dtype) == ((2, 70, 4, 48), given["q"].dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 70), np.float32)
    (launched,) = kernels.launches
    macros = dict(launched.variant.macros)
    assert (macros["STORAGE"], macros["COLUMNS"]) == (dtype, "64")
    assert "COUNT_TRAFFIC" not in macros
    problem = AttentionProblem(q_len=70, head_dim=32, value_dim=48, dtype=dtype)
    tiles = default_plan(problem, algorithm="flash2").tiles
    assert (macros["QUERY_ROWS"], macros["KEY_ROWS"]) == (str(tiles.q), str(tiles.kv))
    assert launched.grid == (2 * 4 * math.ceil(70 / tiles.q),)
    assert launched.block[0] % 32 == 0
    assert kernels.loaded == [(launched.variant, 0, launched.shared_bytes)]
    found = parameters_of(launched)
    assert [found[name] for name in ("q", "k", "v")] == [given[name].data.ptr for name in "qkv"]
    assert (found["out"], found["lse"], found["counters"]) == (out.data.ptr, lse.data.ptr, 0)
    assert [found[name] for name in ("batch", "heads", "group_size", "q_len", "kv_len")] == [2, 4, 2, 70, 90]
    assert (found["head_dim"], found["value_dim"]) == (32, 48)
    assert (found["window_left"], found["window_right"]) == (5, 0)
    assert found["scale_log2"] == np.float32(0.5 * math.log2(math.e))
    assert tuple(found["q_strides"]) == (70 * 4 * 32, 4 * 32, 32)
    assert tuple(found["out_strides"]) == (70 * 4 * 48, 4 * 48, 48)


@pytest.mark.parametrize(
    ("causal", "window", "expected"),
    [
        (False, None, (1 << 30, 1 << 30)),
        (True, None, (1 << 30, 0)),
        (False, (3, 4), (3, 4)),
        (False, [3, None], (3, 1 << 30)),
        (True, (3, 4), (3, 0)),
        (False, (1 << 40, 7), (1 << 30, 7)),
    ],
)
def test_masks(kernels, causal, window, expected):
    attention(**device_arrays(), causal=causal, window=window)
    found = parameters_of(kernels.launches[0])
    assert (found["window_left"], found["window_right"]) == expected


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_every_dimension_has_the_next_larger_kernel(kernels, dim):
    attention(**device_arrays(head_dim=dim, value_dim=16))
    attention(**device_arrays(head_dim=16, value_dim=dim))
    wanted = min(columns for columns in (16, 32, 64, 96, 128, 192, 256) if columns >= dim)
    assert [dict(launched.variant.macros)["COLUMNS"] for launched in kernels.launches] == [str(wanted)] * 2


def test_strided_arrays_are_taken_by_their_strides(kernels):
    given = device_arrays(q_len=5, kv_len=6)
    head_major = {
        name: fake_cupy.Array(np.array(array.shape)[[0, 2, 1, 3]], np.float32) for name, array in given.items()
    }
    views = {name: array.transpose(0, 2, 1, 3) for name, array in head_major.items()}
    attention(**views)
    views["k"] = views["k"][:, ::-1]
    attention(**views)
    first, second = map(parameters_of, kernels.launches)
    assert tuple(first["q_strides"]) == (5 * 4 * 32, 32, 5 * 32)
    assert tuple(first["k_strides"]) == (6 * 2 * 32, 32, 6 * 32)
    assert tuple(second["k_strides"]) == (6 * 2 * 32, -32, 6 * 32)
    assert second["k"] == views["k"].data.ptr != first["k"]
    assert tuple(first["out_strides"]) == (5 * 4 * 48, 4 * 48, 48)


def test_strides_of_axes_of_length_one_do_not_matter(kernels):
    given = device_arrays(batch=1)
    odd = np.lib.stride_tricks.as_strided(given["q"], strides=(12, *given["q"].strides[1:]), subok=True)
    attention(odd, given["k"], given["v"])
    assert tuple(parameters_of(kernels.launches[0])["q_strides"]) == (0, 4 * 32, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_further_call_prepares_and_chooses_nothing(kernels, monkeypatch, dtype):
    out, lse = attention(**device_arrays(dtype=dtype), return_lse=True)
    attention_backward(out, **device_arrays(dtype=dtype), out=out, lse=lse)
    loaded, launches = len(kernels.loaded), len(kernels.launches)
    for name in ("checked_problem", "choose"):
        monkeypatch.setattr(launch, name, None)
    out, lse = attention(**device_arrays(dtype=dtype), return_lse=True)
    attention_backward(out, **device_arrays(dtype=dtype), out=out, lse=lse)
    assert (len(kernels.loaded), len(kernels.launches)) == (loaded, 2 * launches)


# What runs without a name


@pytest.fixture
def device_of(monkeypatch, kernels):
    """Make the stand-in's devices those of a compute capability."""

    def change(capability):
        monkeypatch.setattr(fake_cupy.Device, "compute_capability", capability)
        launch.present_hardware.cache_clear()
        launch.prepare.cache_clear()

    return change


@pytest.mark.parametrize(
    ("capability", "dtype", "function"),
    [
        ("90", "bfloat16", "flash3_forward"),
        ("90", "float16", "flash3_forward"),
        ("90", "float32", "flash2_forward"),
        ("100", "bfloat16", "flash2_tensor_forward"),
        ("89", "float16", "flash2_tensor_forward"),
        ("80", "bfloat16", "flash2_tensor_forward"),
        ("80", "float32", "flash2_forward"),
        ("75", "float16", "flash2_forward"),
    ],
)
def test_a_call_without_a_name_runs_the_fastest(kernels, device_of, capability, dtype, function):
    device_of(capability)
    given = device_arrays(dtype=dtype)
    out, saved = attention(**given, return_saved=True)
    assert functions_of(kernels) == [function]
    assert workspace_bytes(**given) == 0
    kernels.launches.clear()
    attention_backward(out, **given, saved=saved)
    assert functions_of(kernels) == ["row_dots", "fill", "flash2_key_gradients", "convert"]


def ragged_arrays(dtype="bfloat16"):
    given = {name: array[0] for name, array in device_arrays(dtype=dtype).items()}
    offsets = {"cu_seqlens_q": [0, 30, 70], "cu_seqlens_k": [0, 0, 90]}
    return given | {name: np.array(starts, np.int32).view(fake_cupy.Array) for name, starts in offsets.items()}


def test_lengths_of_their_own_need_no_name(kernels, device_of):
    out, lse = attention(**ragged_arrays(), causal=True, return_lse=True)
    assert (out.shape, lse.shape) == ((70, 4, 48), (4, 70))
    assert functions_of(kernels) == ["flash3_forward"]
    kernels.launches.clear()
    with pytest.raises(ValueError, match="dtype='float32': flash3 takes"):
        attention(**ragged_arrays("float32"))
    with pytest.raises(ValueError, match=r"algorithm='flash2' takes no cu_seqlens_q .*: expected one of \('flash3',\)"):
        attention(**ragged_arrays(), plan=Flash2Plan(tiles=(64, 64)))
    device_of("80")
    with pytest.raises(
        ValueError, match=r"algorithm='flash3' runs on compute capability 9\.0 .* has 8\.0: expected an"
    ):
        attention(**ragged_arrays())
    assert not kernels.launches


def test_a_plan_is_run_by_its_algorithm_or_refused(kernels, device_of):
    given = device_arrays(dtype="bfloat16")
    attention(**given, plan=Flash2Plan(tiles=(64, 64)))
    attention(**given, plan=Flash1Plan(tiles=(32, 32)))
    attention(**given, plan=Flash3Plan(tiles=(64, 64)))
    functions = ["flash2_forward", "flash1_forward", "flash3_forward"]
    assert [name for name in functions_of(kernels) if name in functions] == functions
    kernels.launches.clear()
    out, saved = attention(**given, algorithm="flash1", return_saved=True)
    attention_backward(out, **given, saved=saved, plan=Flash1Plan(tiles=(32, 32)))
    assert "flash1_backward" in functions_of(kernels)
    kernels.launches.clear()
    plan = Flash3Plan(tiles=(64, 64))
    for options in ({"plan": plan}, {"algorithm": "flash3"}):
        with pytest.raises(ValueError, match="algorithm='flash3' has no kernel for the backward pass: expected one of"):
            attention_backward(out, **given, out=out, lse=saved["row_max"], **options)
    with pytest.raises(TypeError, match=r"plan is a Flash3Plan: expected a simattn\.algorithms\.flash2\.Flash2Plan"):
        attention(**given, algorithm="flash2", plan=plan)
    device_of("80")
    with pytest.raises(ValueError, match="algorithm='flash3' runs on compute capability 9"):
        attention(**given, plan=plan)
    assert not kernels.launches


@pytest.fixture
def cpu_kernels(kernels, monkeypatch):
    """Run the kernels, in their build for the CPU."""
    try:
        cpu_build.compiler()
    except cpu_build.CompilerNotFoundError as missing:
        pytest.skip(str(missing))
    kernels.run = cpu_device.CpuDevice(monkeypatch).run
    return kernels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_call_without_keys(cpu_kernels, dtype):
    given = device_arrays(kv_len=0, head_dim=16, value_dim=24, dtype=dtype)
    out, lse = attention(**given, return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()
    assert len(cpu_kernels.launches) == 1


def test_gradients_from_what_the_default_saved(cpu_kernels):
    """Forward flash3, backward flash2, whichever way the saved arrays take."""
    generator = np.random.default_rng(0)
    host = {
        name: generator.standard_normal(array.shape).astype(array.dtype)
        for name, array in device_arrays(q_len=9, kv_len=70, head_dim=16, value_dim=24, dtype="bfloat16").items()
    }
    given = {name: values.view(fake_cupy.Array) for name, values in host.items()}
    problem = explain(**given, causal=True).problem
    out, lse, saved = attention(**given, causal=True, return_lse=True, return_saved=True)
    assert functions_of(cpu_kernels) == ["flash3_forward"]
    assert saved["out"] is out
    assert saved["lse"] is lse
    forward = run("flash3", **host, causal=True, arithmetic="hopper", plan=default_plan(problem))
    assert_same_bits(out.get(), forward.out)
    assert_same_bits(lse.get(), forward.lse)
    dout = generator.standard_normal(out.shape).astype(out.dtype)
    plan = default_plan(problem, direction="backward", deterministic=True)
    wanted = run_backward("flash2", **host, dout=dout, causal=True, arithmetic="simt", plan=plan, saved=forward.saved)
    routes = (
        {"saved": saved},
        {"saved": {"lse": lse}, "out": out},
        {"out": out, "lse": lse},
        {"out": out, "lse": lse, "algorithm": "flash2"},
        {"saved": saved, "plan": plan},
    )
    for route in routes:
        options = {"causal": True, "deterministic": True, **route}
        found = attention_backward(dout.view(fake_cupy.Array), **given, **options)
        for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
            assert_same_bits(gradient.get(), getattr(wanted, name), name=name)


def test_the_log_sum_exp_is_stored_where_nobody_reads_it_unless_asked_for(kernels):
    given = device_arrays()
    attention(**given)
    attention(**given)
    large = device_arrays(batch=1, heads=2, q_len=1 << 19, kv_len=1)
    attention(**large)
    attention(**given)
    spare = [parameters_of(launched)["lse"] for launched in kernels.launches]
    assert spare[0] == spare[1] != spare[2]
    memory = launch._spare[0]
    assert [held.size for held in memory] == [1 << 20, 1 << 22]
    assert [held.ptr for held in memory] == [spare[0], spare[2]]


def test_the_arrays_device_is_used(kernels):
    out = attention(**device_arrays(device=1))
    assert out.device_id == 1
    assert [launched.device for launched in kernels.launches] == [1]
    attention(**device_arrays(device=0))
    assert [device for _, device, _ in kernels.loaded] == [1, 0]
    assert fake_cupy.Device.current == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("empty", ["batch", "q_len"])
def test_no_row_no_launch(kernels, empty, dtype, causal):
    given = device_arrays(**{empty: 0}, dtype=dtype)
    out, lse = attention(**given, causal=causal, return_lse=True)
    assert (out.size, lse.size) == (0, 0)
    assert not kernels.launches
    assert not kernels.loaded


def test_no_key_is_still_a_launch(kernels):
    attention(**device_arrays(kv_len=0))
    (launched,) = kernels.launches
    assert parameters_of(launched)["kv_len"] == 0


def test_threads_do_not_share_parameters(kernels):
    given = [device_arrays(q_len=8, kv_len=8) for _ in range(8)]
    attention(**given[0])
    workers = [threading.Thread(target=lambda one=one: [attention(**one) for _ in range(50)]) for one in given]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    addresses = [tuple(parameters_of(launched)[name] for name in "qkv") for launched in kernels.launches]
    assert set(addresses) == {tuple(one[name].data.ptr for name in "qkv") for one in given}


# out=


def results(given, **changes):
    shapes = {"out": (2, 70, 4, 48), "lse": (2, 4, 70)}
    return {
        name: np.zeros(shape, changes.get(name, given["q"].dtype if name == "out" else np.float32)).view(
            fake_cupy.Array
        )
        for name, shape in shapes.items()
    }


def test_results_go_where_they_are_asked_to(kernels):
    given = device_arrays()
    made = results(given)
    assert attention(**given, out=made["out"]) is made["out"]
    out, lse = attention(**given, out=made["out"], return_lse=True)
    assert out is made["out"]
    assert lse.shape == made["lse"].shape
    out, lse = attention(**given, out=(made["out"], made["lse"]), return_lse=True)
    assert (out is made["out"], lse is made["lse"]) == (True, True)
    for launched in kernels.launches:
        assert parameters_of(launched)["out"] == made["out"].data.ptr
    assert parameters_of(kernels.launches[2])["lse"] == made["lse"].data.ptr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda made: made["out"][:, :-1], ValueError, r"out has shape \(2, 69, 4, 48\): expected \(2, 70, 4, 48\)"),
        (lambda made: made["out"].view(np.int32), TypeError, "out has dtype int32: expected float32"),
        (lambda made: made["out"].transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2), ValueError, "C-contiguous"),
        (lambda made: (made["out"],), TypeError, "out=tuple of 1: expected an array or a pair"),
        (lambda made: (made["out"], None), TypeError, "lse=None"),
        (lambda made: (made["out"], made["lse"][:1]), ValueError, r"lse has shape \(1, 4, 70\)"),
        (lambda made: (made["out"], made["lse"].astype(np.float64)), TypeError, "lse has dtype float64"),
        (lambda made: np.zeros((2, 70, 4, 48), np.float32), TypeError, "out is a numpy.ndarray in host memory"),
    ],
)
def test_results_that_cannot_be_written(kernels, change, error, message):
    given = device_arrays()
    with pytest.raises(error, match=message):
        attention(**given, out=change(results(given)), return_lse=True)
    assert not kernels.launches


def test_a_pair_is_for_the_log_sum_exp(kernels):
    given = device_arrays()
    made = results(given)
    with pytest.raises(TypeError, match="return_lse"):
        attention(**given, out=(made["out"], made["lse"]))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_results_may_not_overlap_inputs(kernels, name):
    given = device_arrays(q_len=70, kv_len=70, heads=4, kv_heads=4, head_dim=48, value_dim=48)
    with pytest.raises(ValueError, match=f"out overlaps {name} in memory"):
        attention(**given, out=given[name])
    reversed_rows = {**given, name: given[name][:, ::-1]}
    with pytest.raises(ValueError, match=f"out overlaps {name} in memory"):
        attention(**reversed_rows, out=given[name])
    assert not kernels.launches


def test_results_may_not_overlap_each_other(kernels):
    given = device_arrays()
    out = results(given)["out"]
    lse = out.reshape(-1)[: 2 * 4 * 70].reshape(2, 4, 70)
    with pytest.raises(ValueError, match="lse overlaps out in memory"):
        attention(**given, out=(out, lse), return_lse=True)


def test_results_may_lie_beside_inputs(kernels):
    memory = fake_cupy.Array(2 * 70 * 4 * 48 * 2, np.float32)
    given = device_arrays(q_len=70, kv_len=70, head_dim=48, value_dim=48)
    half = memory.size // 2
    given["q"] = memory[:half].reshape(2, 70, 4, 48)
    attention(**given, out=memory[half:].reshape(2, 70, 4, 48))
    assert len(kernels.launches) == 1


def test_results_on_another_device_are_refused(kernels):
    given = device_arrays()
    out = results(given)["out"]
    out.device_id = 1
    with pytest.raises(ValueError, match="out is on device 1: expected device 0"):
        attention(**given, out=out)


# Refusals


def reshaped(name, *shape):
    def change(given):
        return {**given, name: fake_cupy.Array(shape, given[name].dtype)}

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (reshaped("q", 70, 4, 32), ValueError, r"q has shape \(70, 4, 32\): expected 4 dimensions"),
        (reshaped("k", 3, 90, 2, 32), ValueError, r"k has shape \(3, 90, 2, 32\): expected \(2, 90, 2, 32\)"),
        (reshaped("k", 2, 90, 2, 40), ValueError, r"k has shape .*: expected \(2, 90, 2, 32\)"),
        (reshaped("v", 2, 91, 2, 48), ValueError, r"v has shape \(2, 91, 2, 48\): expected \(2, 90, 2, 48\)"),
        (reshaped("q", 2, 70, 3, 32), ValueError, "kv_heads=2 does not divide heads=3"),
        (reshaped("q", 2, 70, 0, 32), ValueError, "heads=0"),
        (lambda given: device_arrays(head_dim=20), ValueError, "head_dim=20: expected a multiple of 8 from 8 to 256"),
        (lambda given: device_arrays(head_dim=264), ValueError, "head_dim=264"),
        (lambda given: device_arrays(value_dim=264), ValueError, "value_dim=264"),
        (
            lambda given: {name: array.astype(np.float64) for name, array in given.items()},
            TypeError,
            "q has dtype float64: expected one of",
        ),
        (
            lambda given: {**given, "v": given["v"].astype(np.float16)},
            TypeError,
            "v has dtype float16: expected float32, as q has",
        ),
        (
            lambda given: {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in given.items()},
            TypeError,
            "float8_e4m3fn",
        ),
        (lambda given: {**given, "k": np.asarray(given["k"])}, TypeError, "k is a numpy.ndarray in host memory"),
        (lambda given: {**given, "k": [[1.0]]}, TypeError, "k is a builtins.list: expected an array on a CUDA device"),
        (lambda given: {**given, "q": None}, TypeError, "q is a builtins.NoneType"),
        (
            lambda given: {**given, "k": given["k"].transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2)},
            ValueError,
            "k has strides .*last axis to be contiguous",
        ),
        (
            lambda given: {**given, "k": fake_cupy.Array((2, 90, 2, 33), np.float32)[..., :32]},
            ValueError,
            "k has a stride of 23760 bytes along axis 0|k has a stride of 264 bytes along axis 1|multiple of 16",
        ),
        (
            lambda given: {**given, "q": fake_cupy.Array(2 * 70 * 4 * 32 + 4, np.float32)[1:-3].reshape(2, 70, 4, 32)},
            ValueError,
            "q starts 4 bytes after a multiple of 16",
        ),
        (
            lambda given: {**given, "v": device_arrays(device=1)["v"]},
            ValueError,
            "v is on device 1: expected device 0, where q is",
        ),
    ],
)
def test_arrays_that_are_refused(kernels, change, error, message):
    given = change(device_arrays())
    with pytest.raises(error, match=message):
        attention(**given)
    assert not kernels.launches


@pytest.mark.parametrize(("units", "multiple"), [("cuda_cores", 8), ("tensor_cores", 16)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_byte_rows_start_at_whole_vectors(kernels, dtype, units, multiple):
    plan, others = Flash2Plan(tiles=(64, 64), units=units), list(device_arrays(dtype=dtype).values())[1:]
    apart = fake_cupy.Array((2, 70, 4, 32 + multiple // 2), numpy_dtype(dtype))[..., :32]
    attention(apart, *others, plan=plan)
    off = fake_cupy.Array((2, 70, 4, 32 + multiple // 4), numpy_dtype(dtype))[..., :32]
    with pytest.raises(ValueError, match=rf"q has a stride of .*: expected a multiple of {multiple}"):
        attention(off, *others, plan=plan)
    assert kernels.launches[0].variant.function == ("flash2_forward" if multiple == 8 else "flash2_tensor_forward")


def test_tensor_cores_are_for_two_byte_inputs_and_recent_devices():
    plan = Flash2Plan(tiles=(128, 64), units="tensor_cores")
    with pytest.raises(ValueError, match=r"units='tensor_cores' with dtype='float32'"):
        make_program("flash2", "forward", AttentionProblem(q_len=5, dtype="float32"), plan, "H100-SXM")
    problem = AttentionProblem(q_len=5, dtype="float16")
    with pytest.raises(ValueError, match=r"T4 has compute capability 7\.5, the kernel needs 8\.0"):
        make_program("flash2", "forward", problem, plan, "T4")
    assert default_plan(problem, "T4").units == "cuda_cores"
    assert default_plan(problem, "A100-40GB").units == "tensor_cores"


@pytest.mark.parametrize("hardware", ["A100-40GB", "RTX-4090", "H100-SXM", "B200"])
@pytest.mark.parametrize("columns", [8, 64, 96, 128, 192, 256])
def test_both_sides_have_one_default_plan_for_tensor_cores(hardware, columns):
    shape = {"heads": 2, "q_len": 50, "head_dim": columns, "dtype": "bfloat16"}
    plan = default_plan(AttentionProblem(**shape), hardware, algorithm="flash2")
    assert plan == simulated_default_plan("flash2", hardware=hardware, **shape)
    assert plan.units == "tensor_cores"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale=0.0"),
        ({"scale": float("nan")}, ValueError, "scale=nan"),
        ({"scale": 1e-46}, ValueError, "scale=1e-46: expected a number whose product with log2.e. float32 holds"),
        ({"scale": 1e39}, ValueError, "scale=1e.39"),
        ({"scale": 10**400}, ValueError, "scale is an integer of 401 digits"),
        ({"scale": "0.5"}, TypeError, "scale='0.5': expected a number"),
        ({"scale": True}, TypeError, "scale=True"),
        ({"window": (1.0, 2)}, TypeError, "window"),
        ({"window": (True, 2)}, TypeError, "window"),
        ({"return_lse": "no"}, TypeError, "return_lse='no': expected a bool"),
        ({"return_saved": 1}, TypeError, "return_saved=1: expected a bool"),
        ({"algorithm": ["flash2"]}, ValueError, "algorithm=.'flash2'. has no kernel"),
        ({"workspace": "abc"}, TypeError, "workspace is a"),
        ({"scale": "large"}, TypeError, "scale='large'"),
        ({"scale": np.ones(2)}, TypeError, "scale="),
        ({"causal": 1}, TypeError, "causal=1: expected a bool"),
        ({"causal": None}, TypeError, "causal=None"),
        ({"window": 3}, TypeError, "window=3"),
        ({"window": (1, -1)}, ValueError, r"window.*-1"),
        ({"window": (1, 2, 3)}, TypeError, "window="),
        ({"algorithm": "flash9"}, ValueError, "algorithm='flash9' has no kernel: expected one of"),
        ({"cu_seqlens_q": [0, 3]}, TypeError, "cu_seqlens_q is a builtins.list"),
        ({"cu_seqlens_k": [0, 3]}, ValueError, "cu_seqlens_q is missing beside cu_seqlens_k"),
        ({"bias": 1}, TypeError, "bias"),
        ({"dropout": 0.1}, TypeError, "dropout"),
        ({"softcap": 30}, TypeError, "softcap"),
        ({"sinks": None}, TypeError, "sinks"),
        ({"dropout_p": 0.1}, TypeError, "unexpected keyword argument 'dropout_p'"),
        ({"plan": "gpu"}, TypeError, "plan is a str"),
        ({"plan": {"tiles": (64, 64)}}, TypeError, "plan"),
        ({"plan": Flash2Plan(tiles=(36, 64))}, ValueError, "plan.tiles=.36, 64."),
        ({"plan": Flash2Plan(tiles=(64, 64, 16))}, ValueError, "tiles.depth=16"),
        ({"plan": Flash2Plan(tiles=(64, 64), repeat_kv=True)}, ValueError, "repeat_kv"),
        ({"plan": Flash2Plan(tiles=(64, 64), accumulators="sram")}, ValueError, "accumulators='sram'"),
    ],
)
def test_options_that_are_refused(kernels, options, error, message):
    given = device_arrays()
    attention(**given, causal=True)
    attention(**given, window=(1, 2))  # what these leave behind makes nothing else valid
    kernels.launches.clear()
    with pytest.raises(error, match=message):
        attention(**given, **options)
    assert not kernels.launches


def test_lengths_beyond_the_kernel_are_refused(kernels):
    given = device_arrays()
    long = {**given}
    for name in "kv":
        one = given[name][:, :1]
        long[name] = np.lib.stride_tricks.as_strided(
            one, (2, (1 << 29) + 1, *one.shape[2:]), (one.strides[0], 0, *one.strides[2:]), subok=True
        )
    with pytest.raises(ValueError, match=r"kv_len=536870913: .* 536870912"):
        attention(**long)


def test_a_smaller_device_takes_smaller_tiles(kernels, monkeypatch):
    given = device_arrays(head_dim=128, value_dim=128)
    attention(**given)
    monkeypatch.setattr(fake_cupy.Device, "shared_bytes", 101376)
    launch.present_hardware.cache_clear()
    launch.prepare.cache_clear()
    attention(**given)
    sizes = [dict(launched.variant.macros) for launched in kernels.launches]
    areas = [int(macros["QUERY_ROWS"]) * int(macros["KEY_ROWS"]) for macros in sizes]
    assert areas[0] > areas[1]
    assert kernels.launches[1].shared_bytes <= 101376


def test_a_plan_that_a_small_device_cannot_hold_is_refused(kernels, monkeypatch):
    monkeypatch.setattr(fake_cupy.Device, "shared_bytes", 65536)
    given = device_arrays(head_dim=256, value_dim=256)
    with pytest.raises(ValueError, match="65536 bytes of shared memory that a thread block of device 0 may use"):
        attention(**given, plan=Flash2Plan(tiles=(64, 64)))
    monkeypatch.setattr(fake_cupy.Device, "shared_bytes", 8192)
    launch.present_hardware.cache_clear()
    with pytest.raises(ValueError, match="8192 bytes of shared memory"):
        attention(**given)
    assert not kernels.loaded


# Arrays of other libraries


class Exporter:
    """An array of another library."""

    def __init__(self, host, device_type=2, device=0):
        self.host, self.device_type, self.device, self.streams = host, device_type, device, []

    def __dlpack_device__(self):
        return (self.device_type, self.device)

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return object()


class Interfaced:
    """An array that only has ``__cuda_array_interface__``."""

    def __init__(self, host, read_only=False):
        self.host, self.read_only = host, read_only

    @property
    def __cuda_array_interface__(self):
        interface = dict(self.host.__array_interface__)
        return {**interface, "data": (interface["data"][0], self.read_only), "version": 3}


def test_dlpack_arrays_are_taken_with_the_current_stream(kernels):
    given = {name: Exporter(array, device=1) for name, array in device_arrays().items()}
    out = attention(**given)
    assert isinstance(out, fake_cupy.Array)
    (launched,) = kernels.launches
    assert launched.device == 1
    assert [parameters_of(launched)[name] for name in "qkv"] == [item.host.data.ptr for item in given.values()]
    assert all(item.streams == [7] for item in given.values())


@pytest.mark.parametrize("device_type", [1, 3, 4, 10])
def test_dlpack_arrays_elsewhere_are_refused(kernels, device_type):
    given = device_arrays()
    with pytest.raises(TypeError, match=r"q is a .*Exporter in host memory"):
        attention(Exporter(given["q"], device_type), given["k"], given["v"])


def test_an_exporter_that_refuses_is_quoted(kernels):
    class Refusing(Exporter):
        def __dlpack__(self, **options):
            raise BufferError("Can't export tensors that require gradient")

    given = device_arrays()
    with pytest.raises(TypeError, match=r"q is a .*Refusing that cannot be shared: Can't export .* gradient"):
        attention(Refusing(given["q"]), given["k"], given["v"])


def test_cuda_array_interface_is_taken_on_its_own_device(kernels):
    given = {name: Interfaced(array) for name, array in device_arrays().items()}
    attention(**given)
    (launched,) = kernels.launches
    assert launched.device == 1  # where the stand-in says that every pointer is


def test_results_may_be_arrays_of_other_libraries(kernels):
    given = device_arrays(device=1)
    out = Interfaced(fake_cupy.Array((2, 70, 4, 48), np.float32))
    assert attention(**given, out=out) is out
    assert parameters_of(kernels.launches[0])["out"] == out.host.data.ptr
    with pytest.raises(ValueError, match="out is read-only"):
        attention(**given, out=Interfaced(out.host, read_only=True))


# Counting


def test_counting_builds_are_used_inside_the_block_alone(kernels):
    given = device_arrays()

    def add(launched):
        counters = parameters_of(launched)["counters"]
        if "COUNT_TRAFFIC" in dict(launched.variant.macros):
            address = int(counters)
            held = (np.ctypeslib.ctypes.c_uint64 * 5).from_address(address)
            for index in range(5):
                held[index] += 10**12 + index
        else:
            assert counters == 0

    kernels.run = add
    attention(**given)
    with count_traffic() as outer:
        attention(**given)
        with count_traffic() as inner:
            attention(**given)
            attention(**given)
        assert inner.traffic.by_array["lse"].hbm_write_bytes == 2 * (10**12 + 4)
    attention(**given)
    assert [parameters_of(launched)["counters"] != 0 for launched in kernels.launches] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert outer.traffic.by_array["q"].hbm_read_bytes == 3 * 10**12
    assert outer.traffic.by_array["k"].hbm_read_bytes == 3 * (10**12 + 1)
    assert outer.traffic.by_array["out"].hbm_write_bytes == 3 * (10**12 + 3)
    assert set(outer.traffic.by_array) == {"q", "k", "v", "out", "lse"}
    assert "lse" in repr(outer)


def test_nothing_launched_is_no_traffic(kernels):
    with count_traffic() as counted:
        attention(**device_arrays(q_len=0))
    assert counted.traffic == Traffic()


def test_counting_ends_with_an_error(kernels):
    with pytest.raises(ValueError, match="scale"), count_traffic():
        attention(**device_arrays(), scale=-1.0)
    attention(**device_arrays())
    assert parameters_of(kernels.launches[0])["counters"] == 0


def test_counting_is_of_one_thread(kernels):
    given = device_arrays()
    with count_traffic():
        other = threading.Thread(target=lambda: attention(**given))
        other.start()
        other.join()
    assert parameters_of(kernels.launches[0])["counters"] == 0


def test_counting_counts_on_every_device(kernels):
    with count_traffic() as counted:
        attention(**device_arrays(device=0))
        attention(**device_arrays(device=1))
    addresses = {int(parameters_of(launched)["counters"]) for launched in kernels.launches}
    assert len(addresses) == 2
    assert counted.traffic == Traffic()


# Gradients


def backward_arrays(algorithm="flash2", **shape):
    """Return the arguments of a backward call."""
    given = device_arrays(**shape)
    result = attention(**given, algorithm=algorithm, return_saved=True)
    return {"dout": np.zeros_like(result[0]), **given}, result[1]


def backward_struct(launched):
    names = ("q", "k", "v", "dout", "lse", "delta", "dq_accumulator", "dk", "dv")
    assert launched.variant.function == "flash2_key_gradients"
    return launched.parameters.view(struct_of(names))[0]


def functions_of(kernels):
    return [launched.variant.function for launched in kernels.launches]


def test_arguments_of_the_backward_call():
    parameters = inspect.signature(attention_backward).parameters
    positional = [name for name, item in parameters.items() if item.kind is item.POSITIONAL_OR_KEYWORD]
    assert positional == ["dout", "q", "k", "v", "out", "lse"]
    assert {"scale", "causal", "window", "deterministic", "algorithm", "plan", "workspace"} <= set(parameters)


def test_a_backward_launch(kernels):
    given, saved = backward_arrays()
    kernels.launches.clear()
    dq, dk, dv = attention_backward(**given, **saved, causal=True, scale=0.5)
    assert [array.shape for array in (dq, dk, dv)] == [given[name].shape for name in "qkv"]
    assert [array.dtype for array in (dq, dk, dv)] == [given["q"].dtype] * 3
    assert functions_of(kernels) == ["row_dots", "fill", "flash2_key_gradients", "convert"]
    found = backward_struct(kernels.launches[2])
    assert [found[name] for name in ("q", "k", "v", "dout")] == [
        given[name].data.ptr for name in ("q", "k", "v", "dout")
    ]
    assert (found["lse"], found["dk"], found["dv"]) == (saved["lse"].data.ptr, dk.data.ptr, dv.data.ptr)
    assert (found["window_left"], found["window_right"], found["scale"]) == (1 << 30, 0, 0.5)
    assert tuple(found["lse_strides"]) == (4 * 70, 1, 70)
    assert found["delta"] % 256 == found["dq_accumulator"] % 256 == 0
    assert found["delta"] != found["dq_accumulator"]
    kernels.launches.clear()
    attention_backward(
        given["dout"], given["q"], given["k"], given["v"], saved["out"], saved["lse"], deterministic=True
    )
    assert functions_of(kernels) == ["row_dots", "flash2_key_gradients", "flash2_query_gradients"]


def test_groups_are_summed_as_the_plan_says(kernels):
    given, saved = backward_arrays()
    plan = default_plan(AttentionProblem(q_len=70, head_dim=48), direction="backward")
    for grouped, last in (("expand", ["sum_heads", "sum_heads", "convert"]), ("reduce", ["convert"] * 3)):
        kernels.launches.clear()
        attention_backward(**given, saved=saved, plan=replace(plan, grouped_gradients=grouped))
        assert functions_of(kernels)[-3:] == last


def test_gradients_go_where_they_are_asked_to(kernels):
    given, saved = backward_arrays()
    made = tuple(np.zeros_like(given[name]) for name in "qkv")
    found = attention_backward(**given, saved=saved, gradients=made)
    assert all(one is other for one, other in zip(found, made, strict=True))
    kernels.launches.clear()
    wrong = (
        (made[:2], TypeError, r"gradients is a tuple: expected three arrays"),
        ((made[0], made[1], made[2][:, :-1]), ValueError, r"dv has shape"),
        ((made[0], made[0], made[2]), ValueError, "dk has shape|dk overlaps dq"),
        ((given["q"], made[1], made[2]), ValueError, "dq overlaps q in memory"),
        ((made[0].astype(np.float64), made[1], made[2]), TypeError, "dq has dtype float64"),
    )
    for gradients, error, message in wrong:
        with pytest.raises(error, match=message):
            attention_backward(**given, saved=saved, gradients=gradients)
    assert not kernels.launches


@pytest.mark.parametrize("algorithm", [name for name, item in KERNEL_ALGORITHMS.items() if "backward" in item.programs])
def test_what_the_forward_pass_saved_is_needed(kernels, algorithm):
    given, saved = backward_arrays(algorithm)
    kernels.launches.clear()
    for name in saved:
        others = {key: array for key, array in saved.items() if key != name}
        with pytest.raises(ValueError, match=f"{name} of the forward pass is missing: expected .*return_saved=True"):
            attention_backward(**given, algorithm=algorithm, saved=others)
    with pytest.raises(TypeError, match="saved is a list: expected the mapping"):
        attention_backward(**given, algorithm=algorithm, saved=list(saved.values()))
    assert not kernels.launches
    attention_backward(**given, algorithm=algorithm, saved=saved)
    assert kernels.launches


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda given: {"dout": given["dout"][:, :-1]}, ValueError, r"dout has shape \(2, 69, 4, 48\): expected"),
        (lambda given: {"dout": given["dout"].astype(np.float16)}, TypeError, "dout has dtype float16: expected"),
        (lambda given: {"lse": np.zeros_like(given["lse"], np.float64)}, TypeError, "lse has dtype float64: expected"),
        (lambda given: {"lse": given["lse"].transpose(0, 2, 1)}, ValueError, r"lse has shape \(2, 70, 4\)"),
        (lambda given: {"lse": given["lse"][..., ::2].repeat(2, axis=2)[..., ::-1]}, ValueError, "lse has strides"),
        (lambda given: {"out": np.zeros((2, 70, 4, 48), np.float32)}, TypeError, "out is a numpy.ndarray in host"),
        (lambda given: {"deterministic": 1}, TypeError, "deterministic=1: expected a bool"),
        (lambda given: {"causal": 1}, TypeError, "causal=1: expected a bool"),
        (lambda given: {"dropout": 0.1}, TypeError, "dropout= is not supported"),
        (lambda given: {"return_lse": True}, TypeError, "attention_backward.. got an unexpected keyword argument"),
        (lambda given: {"algorithm": "flash9"}, ValueError, "algorithm='flash9' has no kernel"),
        (lambda given: {"algorithm": "flash3"}, ValueError, "algorithm='flash3' has no kernel for the backward pass"),
        (lambda given: {"plan": Flash2Plan(tiles=(100, 100))}, ValueError, "plan.tiles=.100, 100."),
        (lambda given: {"plan": Flash2Plan(tiles=(32, 32)), "deterministic": True}, ValueError, "in no fixed order"),
        (lambda given: {"workspace": np.zeros(100, np.uint8).view(fake_cupy.Array)}, ValueError,
         "workspace has 100 bytes: expected at least"),
    ],
)  # fmt: skip
def test_backward_arguments_that_are_refused(kernels, change, error, message):
    given, saved = backward_arrays()
    kernels.launches.clear()
    arguments = {**given, **saved}
    with pytest.raises(error, match=message):
        attention_backward(**{**arguments, **change(arguments)})
    assert not kernels.launches


def test_a_workspace_is_used_and_its_size_told(kernels):
    given, saved = backward_arrays()
    arrays = [given[name] for name in "qkv"]
    size = workspace_bytes(*arrays, direction="backward")
    assert size >= 2 * 4 * 70 * (32 + 1) * 4
    assert workspace_bytes(*arrays) == 0
    square = 2 * 4 * 70 * 96 * 4  # rows of 90 are padded to 96 elements
    assert workspace_bytes(*arrays, algorithm="standard") == 2 * square
    assert workspace_bytes(*arrays, algorithm="standard", return_saved=True) == square
    memory = np.empty(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    workspace = memory[start : start + size].view(fake_cupy.Array)
    kernels.launches.clear()
    attention_backward(**given, saved=saved, workspace=workspace)
    first = workspace.data.ptr
    found = backward_struct(kernels.launches[2])
    assert all(first <= found[name] < first + size for name in ("delta", "dq_accumulator"))
    with pytest.raises(ValueError, match=r"workspace starts .* expected memory aligned to 256 bytes"):
        attention_backward(**given, saved=saved, workspace=memory[start + 4 :][:size].view(fake_cupy.Array))


def test_nothing_to_differentiate(kernels):
    for empty in ("batch", "q_len", "kv_len"):
        given, saved = backward_arrays(**{empty: 0})
        kernels.launches.clear()
        gradients = attention_backward(**given, saved=saved)
        assert [gradient.shape for gradient in gradients] == [given[name].shape for name in "qkv"]
        if empty == "batch":
            assert not kernels.launches


def test_a_scale_is_taken_by_its_value(kernels):
    given = device_arrays()
    for scale in (0.5, np.float32(0.5), np.float64(0.5), 1):
        attention(**given, scale=scale)
    assert [parameters_of(launched)["scale"] for launched in kernels.launches] == [0.5, 0.5, 0.5, 1]
    assert len({id(launched.variant) for launched in kernels.launches}) == 1

    class Changing:
        def __float__(self):
            return 0.5

    with pytest.raises(TypeError, match="scale="):  # the same object may mean another number later
        attention(**given, scale=Changing())


def test_spare_memory_is_never_given_back_whoever_asks_first(kernels, cupy, monkeypatch):
    made, barrier = [], threading.Barrier(2)
    memory = cupy.cuda.Memory

    def slow(size):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(timeout=0.3)
        made.append(memory(size))
        return made[-1]

    monkeypatch.setattr(cupy.cuda, "Memory", slow)
    addresses = []
    asking = [threading.Thread(target=lambda: addresses.append(launch._spare_address(0, 100))) for _ in range(2)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(made) == len(launch._spare[0]) == 1
    assert set(addresses) == {made[0].ptr}


def test_a_workspace_overlaps_nothing(kernels):
    given, saved = backward_arrays()
    size = workspace_bytes(*(given[name] for name in "qkv"), direction="backward")
    memory = np.zeros(size + 4 * given["q"].size + 512, np.uint8)
    start = -memory.ctypes.data % 256
    inside = memory[start : start + 4 * given["q"].size].view(np.float32).reshape(given["q"].shape)
    whole = memory[start : start + size].view(fake_cupy.Array)
    kernels.launches.clear()
    with pytest.raises(ValueError, match="workspace overlaps q in memory"):
        attention_backward(**{**given, "q": inside.view(fake_cupy.Array)}, saved=saved, workspace=whole)
    gradients = (inside.view(fake_cupy.Array), *(np.zeros_like(given[name]) for name in "kv"))
    with pytest.raises(ValueError, match="workspace overlaps dq in memory"):
        attention_backward(**given, saved=saved, workspace=whole, gradients=gradients)
    assert not kernels.launches


def test_softmax_passes_do_not_depend_on_the_device():
    problem = AttentionProblem(q_len=100, kv_len=200, head_dim=32, dtype="float32")
    plans = [default_plan(problem, name, algorithm="standard") for name in ("H100-SXM", "A100-40GB")]
    assert plans[0] == plans[1]


def test_one_query_head_leaves_nothing_to_add_in_another_order(kernels):
    given, saved = backward_arrays(heads=2, kv_heads=2)
    plan = default_plan(AttentionProblem(q_len=70, head_dim=48), direction="backward", deterministic=True)
    attention_backward(**given, saved=saved, plan=replace(plan, grouped_gradients="reduce"), deterministic=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "sideways"}, ValueError, "direction='sideways': expected one of"),
        ({"deterministic": 1}, TypeError, "deterministic=1"),
        ({"direction": "backward", "deterministic": True, "plan": Flash2Plan(tiles=(32, 32))}, ValueError, "no fixed"),
        ({"algorithm": "flash9"}, ValueError, "algorithm='flash9'"),
        ({"causal": 1}, TypeError, "causal=1"),
    ],
)
def test_a_workspace_is_refused_as_the_call_is(kernels, options, error, message):
    given = device_arrays()
    with pytest.raises(error, match=message):
        workspace_bytes(given["q"], given["k"], given["v"], **options)
    with pytest.raises(TypeError, match=r"q is a numpy.ndarray in host memory"):
        workspace_bytes(np.zeros((1, 2, 1, 16), np.float32), given["k"], given["v"])


@pytest.mark.parametrize("algorithm", list(KERNEL_ALGORITHMS))
@pytest.mark.parametrize("head_dim", [12, 264])
def test_plans_of_problems_without_kernels(algorithm, head_dim):
    with pytest.raises(ValueError, match=rf"head_dim={head_dim}: expected a multiple of 8 from 8 to 256"):
        default_plan(AttentionProblem(q_len=5, head_dim=head_dim, dtype="float32"), algorithm=algorithm)
