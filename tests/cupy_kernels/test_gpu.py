"""The kernels on a GPU: bits and bytes equal to the simulated machine's, streams, graphs, other libraries' arrays.

``python -m cupy_kernels.verify`` runs the same comparison on as many problems as are asked for.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from budgets import rounding_floors
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_kernels import (
    arrays,
    attention,
    attention_backward,
    compiler,
    count_traffic,
    default_plan,
    launch,
    table,
    verify,
    workspace_bytes,
)
from cupy_kernels.bench import stored
from cupy_kernels.ragged import RaggedProblem
from simattn import AttentionProblem, count, run, run_backward
from simattn.arithmetic.formats import numpy_dtype
from simattn.testing import (
    assert_same_bits,
    assert_within_error_budget,
    attention_cases,
    gradient_floors,
    low_precision_attention,
    low_precision_attention_backward,
    reference_attention,
    reference_attention_backward,
)


def why_no_device():
    try:
        arrays.require_cupy()
    except RuntimeError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_no_device()), reason=why_no_device() or "a device is there")]

PROGRAMS = [(name, direction) for name, item in table.ALGORITHMS.items() for direction in item.programs]
BACKWARD = [name for name, item in table.ALGORITHMS.items() if "backward" in item.programs]
GRADIENTS = ("dq", "dk", "dv")
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def cupy():
    return arrays.require_cupy()


def drawn(seed=0, *, gradient=False, **shape):
    """Return a problem, its inputs as NumPy arrays and as CuPy arrays."""
    problem = AttentionProblem(
        **{
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "q_len": 150,
            "kv_len": 170,
            "head_dim": 64,
            "dtype": "float32",
            **shape,
        }
    )
    generator = np.random.default_rng(seed)
    shapes = {
        "q": (problem.batch, problem.q_len, problem.heads, problem.head_dim),
        "k": (problem.batch, problem.kv_len, problem.kv_heads, problem.head_dim),
        "v": (problem.batch, problem.kv_len, problem.kv_heads, problem.value_dim),
    }
    if gradient:
        shapes["dout"] = (problem.batch, problem.q_len, problem.heads, problem.value_dim)
    host = {name: generator.standard_normal(size).astype(numpy_dtype(problem.dtype)) for name, size in shapes.items()}
    return problem, host, {name: verify.on_device(values) for name, values in host.items()}


def simulated(problem, host, algorithm=None):
    """Return what a call returns that names this algorithm, or none."""
    chosen = table.choose(algorithm, "forward", problem, None, launch.present_hardware(0), deterministic=False)
    algorithm, plan = chosen.algorithm.name, chosen.plan
    arithmetic = promised_arithmetic(problem, algorithm, plan)
    return run(algorithm, *(host[name] for name in "qkv"), **mask_of(problem), arithmetic=arithmetic, plan=plan)


def promised_arithmetic(problem, algorithm, plan):
    """Return the arithmetic of a plan's kernels; how mma.sync adds is proven on Hopper alone."""
    arithmetic = table.ALGORITHMS[algorithm].arithmetic(problem, plan)
    if arithmetic == "mma" and arrays.require_cupy().cuda.Device().compute_capability != "90":
        pytest.skip("bits of mma.sync are promised on Hopper")
    return arithmetic


def skip_unless_taken(algorithm, *dtypes):
    """Skip a test of an algorithm that has no kernels for these storage formats on the present device."""
    taken = table.ALGORITHMS[algorithm].dtypes(launch.present_hardware(0))
    if not set(dtypes) & set(taken):
        pytest.skip(f"{algorithm} takes {taken or 'nothing'} here")


def mask_of(problem):
    return {"scale": problem.scale, "causal": problem.causal, "window": problem.window}


def simulated_gradients(problem, host, saved, algorithm="flash2"):
    plan = default_plan(problem, algorithm=algorithm, direction="backward", deterministic=True)
    arguments = (host[name] for name in ("q", "k", "v", "dout"))
    done = run_backward(algorithm, *arguments, **mask_of(problem), arithmetic="simt", plan=plan, saved=saved)
    return done.dq, done.dk, done.dv


# Bits and bytes


@pytest.mark.parametrize(("algorithm", "direction"), PROGRAMS)
@settings(max_examples=60)
@given(data=st.data())
def test_bits_and_bytes_are_the_simulated_machines(algorithm, direction, data):
    skip_unless_taken(algorithm, *DTYPES)
    # Plans other than the default ones, each a kernel to compile, are left to the verifier.
    drawn = verify.cases(algorithms=(algorithm,), directions=(direction,), head_dims=(16, 40, 64, 88, 136, 256))
    case = data.draw(drawn)
    promised_arithmetic(case.problem, algorithm, case.plan)
    found = verify.compare(case, verify.simulate(case))
    assert {name: value for name, value in found.items() if name != "elements"} == {
        "differing_elements": 0,
        "differing_counts": 0,
        "written_outside": 0,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("algorithm", list(table.ALGORITHMS))
def test_every_kernel(algorithm, columns, dtype):
    skip_unless_taken(algorithm, dtype)
    problem, host, device = drawn(head_dim=columns, value_dim=columns, dtype=dtype, causal=True, gradient=True)
    dout = device.pop("dout")
    expected = simulated(problem, host, algorithm)
    out, lse, saved = attention(**device, causal=True, algorithm=algorithm, return_lse=True, return_saved=True)
    assert_same_bits(verify.from_device(out), expected.out, name="out")
    assert_same_bits(verify.from_device(lse), expected.lse, name="lse")
    if algorithm not in BACKWARD:
        return
    left = {name: verify.from_device(array) for name, array in saved.items()}
    wanted = simulated_gradients(problem, host, left, algorithm)
    options = {"causal": True, "algorithm": algorithm, "saved": saved}
    found = attention_backward(dout, **device, **options, deterministic=True)
    fast = attention_backward(dout, **device, **options)
    for name, gradient, quick, exact in zip(GRADIENTS, found, fast, wanted, strict=True):
        assert_same_bits(verify.from_device(gradient), exact, name=name)
        assert verify.differing_sums(verify.from_device(quick), exact) == 0


@pytest.mark.parametrize("algorithm", [None, "flash2"])
@settings(max_examples=60)
@given(
    case=attention_cases(
        dtypes=DTYPES, max_len=200, head_dims=verify.HEAD_DIMS, block_sparse=False, hidden_is_finite=False, max_heads=4
    )
)
def test_the_error_is_within_the_budget(algorithm, case):
    problem, inputs = case
    device = [verify.on_device(inputs[name]) for name in "qkv"]
    out, lse = attention(*device, **mask_of(problem), algorithm=algorithm, return_lse=True)
    reference_out, reference_lse = reference_attention(problem, **inputs)
    low_out, low_lse = low_precision_attention(problem, **inputs)
    out_floor, lse_floor = rounding_floors(problem, inputs)
    assert_within_error_budget(verify.from_device(out), reference_out, low_out, floor=out_floor, name="out")
    assert_within_error_budget(verify.from_device(lse), reference_lse, low_lse, floor=lse_floor, name="lse")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("algorithm", [None, *BACKWARD])
@settings(max_examples=30)
@given(
    case=attention_cases(
        dtypes=DTYPES, max_len=200, head_dims=verify.HEAD_DIMS, block_sparse=False, max_heads=4, backward=True
    )
)
def test_the_error_of_gradients_is_within_the_budget(algorithm, deterministic, case):
    """Without a name, forward and backward pass may be two algorithms'."""
    problem, inputs = case
    device = {name: verify.on_device(values) for name, values in inputs.items()}
    dout = device.pop("dout")
    options = {**mask_of(problem), "algorithm": algorithm}
    _, saved = attention(**device, **options, return_saved=True)
    found = attention_backward(dout, **device, **options, saved=saved, deterministic=deterministic)
    references = reference_attention_backward(problem, **inputs)
    rough = low_precision_attention_backward(problem, **inputs)
    floors = gradient_floors(problem, **inputs)
    for name, gradient, reference, low, floor in zip(GRADIENTS, found, references, rough, floors, strict=True):
        assert_within_error_budget(verify.from_device(gradient), reference, low, floor=floor, name=name)


def test_repeated_runs_give_the_same_bits():
    _, _, device = drawn(q_len=1000, kv_len=1000, heads=8)
    first = verify.from_device(attention(**device))
    for _ in range(20):
        assert_same_bits(verify.from_device(attention(**device)), first)


@pytest.mark.parametrize("algorithm", BACKWARD)
def test_repeated_gradients_are_the_same_bits(algorithm):
    _, _, device = drawn(q_len=1000, kv_len=1000, heads=8, gradient=True)
    dout = device.pop("dout")
    _, saved = attention(**device, algorithm=algorithm, return_saved=True)
    options = {"algorithm": algorithm, "saved": saved, "deterministic": True}
    first = [verify.from_device(gradient) for gradient in attention_backward(dout, **device, **options)]
    for _ in range(10):
        for found, wanted in zip(attention_backward(dout, **device, **options), first, strict=True):
            assert_same_bits(verify.from_device(found), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_counts_of_a_long_problem(causal):
    problem, _, device = drawn(q_len=5000, kv_len=4097, batch=1, causal=causal, window=(3000, 100))
    with count_traffic() as counted:
        attention(**device, causal=causal, window=(3000, 100), algorithm="flash2")
    expected = count(
        "flash2",
        **{name: getattr(problem, name) for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim")},
        dtype=problem.dtype,
        causal=causal,
        window=(3000, 100),
        plan=default_plan(problem, algorithm="flash2"),
    )
    assert counted.traffic == expected.global_only()


def test_counts_beyond_32_bits(cupy):
    """One thread of a block copies, and so counts, all the keys that its query tiles visit."""
    skip_unless_taken("flash3", "bfloat16")
    problem = AttentionProblem(q_len=1 << 20, head_dim=64, dtype="bfloat16")
    plan = default_plan(problem, algorithm="flash3")
    numbers = (cupy.random.standard_normal((1, problem.q_len, 1, 64), dtype="f4") for _ in "qkv")
    with count_traffic() as counted:
        attention(*(stored(one, "bfloat16") for one in numbers), algorithm="flash3", plan=plan, return_lse=True)
    expected = count("flash3", q_len=problem.q_len, head_dim=64, dtype="bfloat16", plan=plan).global_only()
    assert counted.traffic == expected
    blocks = cupy.cuda.Device().attributes["MultiProcessorCount"]
    assert expected.by_array["k"].hbm_read_bytes > blocks << 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (1, 1), (5, 0), (1, 300)])
def test_lengths_of_nothing_and_one(q_len, kv_len, dtype):
    problem, host, device = drawn(q_len=q_len, kv_len=kv_len, dtype=dtype)
    expected = simulated(problem, host)
    out, lse = attention(**device, return_lse=True)
    assert_same_bits(verify.from_device(out), expected.out)
    assert_same_bits(verify.from_device(lse), expected.lse)


def test_a_problem_with_offsets_beyond_32_bits(cupy):
    if cupy.cuda.Device().mem_info[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free device memory")
    rows = (1 << 32) // (64 * 16) + 1000  # elements of q beyond 2³²
    memory = cupy.zeros((1, rows, 64, 16), np.float32)
    tail = memory[:, -200:]
    generator = np.random.default_rng(0)
    values = generator.standard_normal((1, 200, 64, 16)).astype(np.float32)
    tail[...] = cupy.asarray(values)
    window = (0, 0)
    out = attention(memory, memory, memory, window=window, algorithm="flash2")
    wanted = run(
        "flash2", values, values, values, window=window, arithmetic="simt",
        plan=default_plan(AttentionProblem(q_len=200, head_dim=16, dtype="float32"), algorithm="flash2"),
    )  # fmt: skip
    assert_same_bits(verify.from_device(out[:, -200:]), wanted.out)


# CUDA


def test_the_current_stream_is_used(cupy):
    problem, host, device = drawn()
    expected = simulated(problem, host)
    out = cupy.full(expected.out.shape, np.nan, np.float32)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for array in device.values():  # arrives late on this stream
            held = array.copy()
            array.fill(0)
            cupy.matmul(cupy.ones((2000, 2000)), cupy.ones((2000, 2000)))
            array[...] = held
        attention(**device, out=out)
    stream.synchronize()
    assert_same_bits(verify.from_device(out), expected.out)


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_call_can_be_captured_in_a_graph(cupy, return_lse):
    problem, host, device = drawn()
    expected = simulated(problem, host)
    out = cupy.empty(expected.out.shape, np.float32)
    lse = cupy.empty(expected.lse.shape, np.float32)
    results = (out, lse) if return_lse else out
    attention(**device, out=results, return_lse=return_lse)
    held = {name: array.copy() for name, array in device.items()}
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        attention(**device, out=results, return_lse=return_lse)
        graph = stream.end_capture()
    for array in device.values():
        array.fill(0)
    for name, array in device.items():
        array[...] = held[name]
    out.fill(np.nan)
    lse.fill(np.nan)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert_same_bits(verify.from_device(out), expected.out)
    if return_lse:
        assert_same_bits(verify.from_device(lse), expected.lse)


def ragged_case(lengths, *, number=0, **shape):
    """Return sequences of these lengths with inputs from N(0, 1), or skip where flash3 does not run."""
    skip_unless_taken("flash3", "bfloat16")
    problem = RaggedProblem.of(AttentionProblem(q_len=0, heads=4, kv_heads=2, **shape), lengths)
    plan = default_plan(problem, algorithm="flash3")
    rows = verify.random_case("flash3", "forward", replace(problem, batch=1), plan=plan, number=number)
    return replace(rows, problem=problem, lengths=tuple(lengths))


def ragged_arguments(case):
    cupy = arrays.require_cupy()
    given = {name: verify.on_device(values)[0] for name, values in case.inputs.items()}
    return given | {name: cupy.asarray(offsets) for name, offsets in case.offsets.items()}


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (70, 10)}])
def test_sequences_of_different_lengths(head_dim, mask):
    case = ragged_case([(300, 500), (0, 7), (1, 1), (9, 0), (513, 200), (64, 64)], head_dim=head_dim, **mask)
    found = verify.compare(case, verify.simulate(case))
    assert {name: value for name, value in found.items() if name != "elements"} == {
        "differing_elements": 0,
        "differing_counts": 0,
        "written_outside": 0,
    }


def test_a_captured_graph_takes_other_lengths(cupy):
    first = ragged_case([(300, 500), (0, 7), (64, 64)], causal=True)
    other = ragged_case([(1, 70), (299, 1), (64, 500)], causal=True, number=1)
    given, expected = ragged_arguments(first), verify.simulate(other).results
    results = cupy.empty(expected["out"].shape, given["q"].dtype), cupy.empty(expected["lse"].shape, np.float32)
    options = {"causal": True, "return_lse": True, "out": results}
    attention(**given, **options)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        attention(**given, **options)
        graph = stream.end_capture()
    for name, array in ragged_arguments(other).items():
        given[name].view(f"u{array.itemsize}")[...] = array.view(f"u{array.itemsize}")
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    for name, found in zip(("out", "lse"), results, strict=True):
        assert_same_bits(verify.from_device(found), expected[name], name=name)


@pytest.mark.parametrize("algorithm", BACKWARD)
def test_gradients_can_be_captured_in_a_graph(cupy, algorithm):
    problem, host, device = drawn(gradient=True)
    dout = device.pop("dout")
    _, saved = attention(**device, algorithm=algorithm, return_saved=True)
    left = {name: verify.from_device(array) for name, array in saved.items()}
    expected = simulated_gradients(problem, host, left, algorithm)
    gradients = tuple(cupy.full(wanted.shape, np.nan, np.float32) for wanted in expected)
    size = workspace_bytes(**device, direction="backward", algorithm=algorithm, deterministic=True)
    options = {"algorithm": algorithm, "saved": saved, "gradients": gradients, "deterministic": True}
    options["workspace"] = cupy.empty(size, np.uint8)
    attention_backward(dout, **device, **options)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        attention_backward(dout, **device, **options)
        graph = stream.end_capture()
    for array in gradients:
        array.fill(np.nan)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    for name, found, wanted in zip(GRADIENTS, gradients, expected, strict=True):
        assert_same_bits(verify.from_device(found), wanted, name=name)


def test_the_arrays_device_is_used(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    problem, host, _ = drawn()
    expected = simulated(problem, host)
    with cupy.cuda.Device(1):
        device = {name: verify.on_device(values) for name, values in host.items()}
        cupy.cuda.Device(1).synchronize()
    with cupy.cuda.Device(0):
        out = attention(**device)
    assert out.device.id == 1
    with cupy.cuda.Device(1):
        assert_same_bits(verify.from_device(out), expected.out)
    with pytest.raises(ValueError, match="k is on device 0: expected device 1"):
        attention(device["q"], verify.on_device(host["k"]), device["v"])


def test_more_memory_than_there_is(cupy):
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(size=4 << 20)
    _, _, device = drawn(q_len=20000, heads=16, kv_heads=16, batch=1)
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(pool.malloc)
    try:
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            attention(**device)
    finally:
        cupy.cuda.set_allocator(before)


# Arrays of other libraries


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no device")
    problem, host, _ = drawn(dtype=dtype)
    expected = simulated(problem, host)
    kind = getattr(torch, dtype)
    tensors = [torch.from_numpy(host[name].view(f"i{host[name].itemsize}")).cuda().view(kind) for name in "qkv"]
    assert_same_bits(verify.from_device(attention(*tensors)), expected.out)
    out = torch.empty(expected.out.shape, dtype=kind, device="cuda")
    assert attention(*tensors, out=out) is out
    bits = out.view(torch.int32 if out.element_size() == 4 else torch.int16).cpu().numpy()
    assert_same_bits(bits.view(expected.out.dtype), expected.out)
    dout = torch.ones_like(out)
    _, saved = attention(*tensors, return_saved=True)
    held = {name: torch.from_dlpack(array) for name, array in saved.items()} if dtype != "bfloat16" else saved
    options = {"saved": held, "deterministic": True}
    wanted = simulated_gradients(
        problem,
        {**host, "dout": np.ones(expected.out.shape, expected.out.dtype)},
        {name: verify.from_device(array) for name, array in saved.items()},
    )
    for found, exact in zip(attention_backward(dout, *tensors, **options), wanted, strict=True):
        assert_same_bits(verify.from_device(found), exact)
    with pytest.raises(TypeError, match=r"q is a torch.Tensor that cannot be shared"):
        attention(tensors[0].clone().requires_grad_(), *tensors[1:])


def test_cuda_array_interface(cupy):
    class Interfaced:
        def __init__(self, array):
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    problem, host, device = drawn()
    out = attention(*(Interfaced(array) for array in device.values()))
    assert_same_bits(verify.from_device(out), simulated(problem, host).out)


# Kernels


def test_no_kernel_of_this_device_spills(cupy):
    capability = cupy.cuda.Device().compute_capability
    architecture = compiler.choose_architecture((int(capability[:-1]), int(capability[-1])))
    for variant in table.variants(launch.present_hardware(0)):
        if "COUNT_TRAFFIC" not in dict(variant.macros):
            assert compiler.compile_variant(variant, architecture).complaints == (), str(variant)
