"""The public calls: names, imports, refusals, results."""

from __future__ import annotations

import inspect
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import simattn
from simattn.algorithms import ALGORITHMS

PROGRAMS = [(name, direction) for name, algorithm in ALGORITHMS.items() for direction in algorithm.directions]
every_program = pytest.mark.parametrize(("name", "direction"), PROGRAMS)
# Problems of their own may take other arrays: tests/algorithms/test_own_problems.py runs them.
every_masked_program = pytest.mark.parametrize(
    ("name", "direction"), [(name, direction) for name, direction in PROGRAMS if ALGORITHMS[name].takes_any_mask]
)


def usual(name, direction, length):
    return {"direction": direction, **ALGORITHMS[name].problem_class.usual_arguments(direction, length)}


CALLS = {"forward": simattn.run, "backward": simattn.run_backward, "decode": simattn.run_decode}


def arrays(q_len=4, kv_len=6, heads=4, kv_heads=2, head_dim=8, value_dim=5, batch=2, dtype=np.float32):
    generator = np.random.default_rng(0)
    shapes = {
        "q": (batch, q_len, heads, head_dim),
        "k": (batch, kv_len, kv_heads, head_dim),
        "v": (batch, kv_len, kv_heads, value_dim),
    }
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


# Guards


def test_every_public_name_exists():
    assert {"run", "run_backward", "count", "closed_form", "default_plan"} <= set(simattn.__all__)
    assert {"sweep", "claims", "ALGORITHMS", "testing", "AttentionProblem"} <= set(simattn.__all__)
    assert len(simattn.__all__) == len(set(simattn.__all__))
    for name in simattn.__all__:
        assert getattr(simattn, name) is not None
        assert name in dir(simattn)


def test_public_calls_and_classes_are_documented():
    for name in simattn.__all__:
        value = getattr(simattn, name)
        if inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'simattn' has no attribute 'atention'"):
        simattn.atention  # noqa: B018


HEAVY = ("numba", "matplotlib", "cupy", "ml_dtypes", "tqdm", "hypothesis", "distributed")


@pytest.mark.parametrize(
    "code",
    ["import simattn", "import simattn; simattn.count('flash2', q_len=1 << 20, dtype='float32', causal=True)"],
    ids=["import", "count"],
)
def test_nothing_heavy_is_imported(code):
    script = f"{code}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_does_not_import_the_kernels():
    script = (
        "import simattn, sys\nfor name in simattn.__all__: getattr(simattn, name)\nprint('cupy_kernels' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("call", [simattn.count, simattn.profile, simattn.closed_form, simattn.default_plan])
def test_signatures_show_the_arguments(call):
    parameters = inspect.signature(call).parameters
    assert {"algorithm", "q_len", "kv_heads", "block_mask", "direction", "sram_bytes", "options"} <= set(parameters)


# Refusals of the calls that count


COUNT_REFUSED = [
    ({"algorithm": "flash4"}, ValueError, "algorithm='flash4' is unknown; expected one of .*'flash2'"),
    ({"direction": "sideways"}, ValueError, r"direction='sideways' of flash2: expected one of \('forward', 'back"),
    (
        {"direction": "decode"},
        ValueError,
        r"direction='decode' of flash2: expected one of \('forward', 'backward'\); its decoding step is",
    ),
    (
        {"algorithm": "small_cache", "direction": "backward"},
        ValueError,
        "direction='backward' of small_cache: expected",
    ),
    (
        {"direction": "backward", "dtype": "float8_e4m3fn"},
        ValueError,
        "direction='backward' with dtype='float8_e4m3fn'",
    ),
    ({"head_dims": 3}, TypeError, "'head_dims' is no argument and no plan option of flash2"),
    ({"heads": 6, "kv_heads": 4}, ValueError, "kv_heads=4 does not divide heads=6"),
    ({"q_len": -3}, ValueError, "q_len=-3"),
    ({"dtype": "int8"}, ValueError, "dtype='int8'"),
]


@pytest.mark.parametrize("call", [simattn.count, simattn.profile, simattn.closed_form, simattn.default_plan])
@pytest.mark.parametrize(("arguments", "error", "words"), COUNT_REFUSED, ids=[case[2][:40] for case in COUNT_REFUSED])
def test_counting_calls_refuse(call, arguments, error, words):
    with pytest.raises(error, match=words):
        call(**{"algorithm": "flash2", "q_len": 8, **arguments})


def test_a_length_is_required():
    with pytest.raises(TypeError, match="q_len"):
        simattn.count("flash2")


# Refusals of the calls that run


def changed(**changes):
    return {**arrays(), **changes}


RUN_REFUSED = [
    (changed(q=np.ones((4, 8), np.float32)), ValueError, r"q has shape \(4, 8\): expected 4 dimensions"),
    (changed(v=np.ones((1, 2, 6, 2, 5), np.float32)), ValueError, r"v has shape \(1, 2, 6, 2, 5\): expected 4 dim"),
    (changed(k=np.ones((3, 6, 2, 8), np.float32)), ValueError, r"k has shape \(3, 6, 2, 8\): expected \(2, 6, 2, 8\)"),
    (changed(k=np.ones((2, 6, 2, 7), np.float32)), ValueError, r"k has shape \(2, 6, 2, 7\): expected \(2, 6, 2, 8\)"),
    (changed(v=np.ones((2, 7, 2, 5), np.float32)), ValueError, r"v has shape \(2, 7, 2, 5\): expected \(2, 6, 2, 5\)"),
    (changed(v=np.ones((2, 6, 1, 5), np.float32)), ValueError, r"v has shape \(2, 6, 1, 5\): expected \(2, 6, 2, 5\)"),
    (arrays(heads=4, kv_heads=3), ValueError, "kv_heads=3 does not divide heads=4"),
    (arrays(heads=0, kv_heads=1), ValueError, "heads=0: expected an integer of at least 1"),
    (arrays(head_dim=0), ValueError, "head_dim=0"),
    (arrays(dtype=np.float64), TypeError, "q: dtype='float64' is not a storage format; expected one of"),
    (changed(q=np.ones((2, 4, 4, 8), np.int32)), TypeError, "q: dtype='int32'"),
    (changed(k=arrays()["k"].astype(np.float16)), TypeError, "k has dtype float16: expected float32, as q has"),
    (changed(v=arrays()["v"].astype(ml_dtypes.bfloat16)), TypeError, "v has dtype bfloat16: expected float32"),
    (changed(arithmetic="float16"), ValueError, "arithmetic='float16' is unknown; expected one of .*'float64'"),
    (changed(causal=1), TypeError, "causal=1: expected a bool"),
    (changed(window=(-1, 0)), ValueError, r"window=\(-1, 0\): expected counts of at least 0"),
    (changed(scale=0.0), ValueError, r"scale=0\.0"),
    (changed(tiles=(0, 4)), ValueError, r"tiles\.q=0"),
    (changed(tile=(4, 4)), TypeError, "'tile' is no argument and no plan option"),
    (
        changed(q_descale=np.ones((2, 2), np.float32)),
        ValueError,
        "q_descale is given for dtype float32: expected eight-bit",
    ),
    (
        {**arrays(dtype=ml_dtypes.float8_e4m3fn), "k_descale": np.ones((2, 4), np.float32)},
        ValueError,
        r"k_descale has shape \(2, 4\) and dtype float32: expected float32 of shape \(2, 2\)",
    ),
    (
        {**arrays(dtype=ml_dtypes.float8_e4m3fn), "v_descale": np.ones((2, 2))},
        ValueError,
        r"v_descale has shape \(2, 2\) and dtype float64: expected float32",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "words"), RUN_REFUSED, ids=[case[2][:40] for case in RUN_REFUSED])
def test_run_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        simattn.run("flash2", **arguments)


@pytest.mark.parametrize(
    ("dout", "error", "words"),
    [
        (np.ones((2, 4, 4, 8), np.float32), ValueError, r"dout has shape \(2, 4, 4, 8\): expected \(2, 4, 4, 5\)"),
        (np.ones((2, 4, 2, 5), np.float32), ValueError, r"dout has shape \(2, 4, 2, 5\)"),
        (np.ones((4, 5), np.float32), ValueError, r"dout has shape \(4, 5\): expected 4 dimensions"),
        (np.ones((2, 4, 4, 5), np.float16), TypeError, "dout has dtype float16: expected float32"),
    ],
)
def test_run_backward_refuses(dout, error, words):
    with pytest.raises(error, match=words):
        simattn.run_backward("flash2", **arrays(), dout=dout)


@pytest.mark.parametrize("call", [simattn.run, simattn.run_backward])
def test_running_calls_refuse_unknown_algorithms(call):
    gradient = {} if call is simattn.run else {"dout": np.ones((2, 4, 4, 5), np.float32)}
    with pytest.raises(ValueError, match="algorithm='flash4' is unknown"):
        call("flash4", **arrays(), **gradient)


def test_run_backward_refuses_what_has_no_backward():
    float8 = arrays(value_dim=8, kv_len=4, dtype=ml_dtypes.float8_e4m3fn)
    with pytest.raises(ValueError, match="direction='backward' with dtype='float8_e4m3fn'"):
        simattn.run_backward("flash2", **float8, dout=float8["q"])
    with pytest.raises(ValueError, match="direction='backward' of small_cache: expected"):
        simattn.run_backward("small_cache", **arrays(), dout=np.ones((2, 4, 4, 5), np.float32))


# Results


@every_masked_program
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_results_have_the_shapes_and_types_of_their_inputs(name, direction, dtype):
    inputs = arrays(dtype=dtype)
    before = {key: array.copy() for key, array in inputs.items()}
    if direction != "backward":
        run = CALLS[direction](name, **inputs, causal=True)
        assert run.out.shape == (2, 4, 4, 5)
        assert run.out.dtype == dtype
        assert run.lse.shape == (2, 4, 4)
        assert run.lse.dtype == np.float32
        assert run.dq is run.dk is run.dv is None
        assert set(run.results) == {"out", "lse"}
    else:
        run = simattn.run_backward(name, **inputs, dout=np.ones((2, 4, 4, 5), dtype), causal=True)
        assert set(run.results) == {"dq", "dk", "dv"}
        for gradient, key in ((run.dq, "q"), (run.dk, "k"), (run.dv, "v")):
            assert gradient.shape == inputs[key].shape
            assert gradient.dtype == dtype
        assert run.out is run.lse is None
    for key, array in inputs.items():
        assert (array == before[key]).all()


@every_masked_program
def test_runs_repeat_to_the_bit(name, direction):
    gradient = {"dout": np.ones((2, 4, 4, 5), np.float32)} if direction == "backward" else {}
    one, two = (CALLS[direction](name, **arrays(), **gradient) for _ in range(2))
    for key in ("out", "lse", "dq", "dk", "dv"):
        if getattr(one, key) is not None:
            np.testing.assert_array_equal(getattr(one, key), getattr(two, key))
    assert one.traffic == two.traffic


def test_strided_inputs_are_read_as_they_are():
    inputs = arrays()
    strided = {
        key: np.asfortranarray(np.concatenate([array, array], axis=1))[:, : array.shape[1]]
        for key, array in inputs.items()
    }
    assert not strided["q"].flags.c_contiguous
    np.testing.assert_array_equal(simattn.run("flash2", **inputs).out, simattn.run("flash2", **strided).out)


@every_program
def test_the_repr_of_a_run_is_its_report(name, direction):
    run = simattn.profile(name, head_dim=64, **usual(name, direction, 1 << 20))
    text = repr(run)
    assert text.startswith(f"{name} {direction}: tiles of {run.plan.tiles.q} query")
    assert f"{run.operations.matmul_flops:,}" in text
    assert repr(run.traffic) in text
    assert run.peak_hbm_bytes == sum(run.hbm_bytes_by_role.values())


@every_program
def test_a_profile_has_no_numbers(name, direction):
    run = simattn.profile(name, **usual(name, direction, 16))
    assert run.out is run.lse is run.dq is run.dk is run.dv is None
    assert run.direction == direction
    assert run.algorithm == name


@every_program
def test_the_default_plan_is_the_plan_used(name, direction):
    shape = {"head_dim": 64, "causal": True, **usual(name, direction, 300)}
    plan = simattn.default_plan(name, **shape)
    assert simattn.profile(name, **shape).plan == plan
    assert simattn.count(name, **shape, plan=plan) == simattn.count(name, **shape)
