"""Sequences with lengths of their own: each has the bits it has alone, whatever its neighbours hold."""

from __future__ import annotations

import contextlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cpu_device
import fake_cupy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repairs import repaired_bytes

from cupy_kernels import attention, count_traffic, cpu_build, explain, verify
from cupy_kernels.cpu_build import COPIES, ORDERS, KernelFaultError, run_program
from cupy_kernels.flash3 import REPAIRED_ROWS
from cupy_kernels.program import Array, Boxes
from cupy_kernels.ragged import OFFSETS, RaggedProblem, offsets_of
from cupy_kernels.table import default_plan, make_program
from cupy_kernels.tensor_map import TensorMap
from simattn.algorithms.flash3 import Flash3Plan, ragged_metadata_bytes, ragged_slots
from simattn.hardware import get_hardware
from simattn.plan import Tiles
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem
from simattn.testing import assert_same_bits, attention_inputs

try:
    COMPILER = cpu_build.compiler()
except cpu_build.CompilerNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)

SMALL = Tiles(q=64, kv=64)
BUILDS = (
    (64, "bfloat16", SMALL),
    (64, "float16", Tiles(q=192, kv=64)),
    (96, "float16", Tiles(q=128, kv=80)),
    (128, "bfloat16", SMALL),
    (256, "bfloat16", SMALL),
)
"""Column buckets, storage formats and tiles: few, since each is compiled."""

LENGTHS = ((70, 90), (0, 5), (1, 1), (5, 0), (0, 0), (130, 64), (65, 200))
"""Queries and keys of sequences: none, one, some tiles of either."""

MASKS = ({}, {"causal": True}, {"window": (30, 4)})


def case_of(lengths, *, tiles=SMALL, seed=0, **shape):
    """Return sequences of these lengths with inputs from N(0, 1)."""
    problem = RaggedProblem.of(AttentionProblem(**{"q_len": 0, "heads": 2, "kv_heads": 1, **shape}), lengths)
    rows = replace(problem, batch=1)
    inputs = verify.random_case("flash3", "forward", rows, plan=Flash3Plan(tiles=tiles), number=seed).inputs
    return verify.Case("flash3", "forward", problem, Flash3Plan(tiles=tiles), inputs, {}, tuple(lengths))


@st.composite
def cases(draw, max_len=200):
    """Draw sequences of any lengths, with NaN and Inf in hidden keys and in some rows."""
    columns, dtype, tiles = draw(st.sampled_from(BUILDS))
    below = {64: 0, 96: 64, 128: 96, 256: 192}[columns]
    wide, narrow = draw(st.integers(below // 8 + 1, columns // 8)) * 8, draw(st.integers(1, columns // 8)) * 8
    head_dim, value_dim = draw(st.permutations((wide, narrow)))
    length = st.one_of(st.sampled_from((0, 1)), st.integers(0, max_len))
    lengths = tuple(draw(st.lists(st.tuples(length, length), min_size=1, max_size=7)))
    kv_heads = draw(st.integers(1, 2))
    side = st.one_of(st.none(), st.integers(0, max_len))
    mask = draw(st.one_of(st.sampled_from(MASKS), st.builds(dict, window=st.tuples(side, side))))
    problem = RaggedProblem.of(
        AttentionProblem(
            q_len=0, heads=kv_heads * draw(st.integers(1, 3)), kv_heads=kv_heads, head_dim=head_dim,
            value_dim=value_dim, dtype=dtype, **mask,
        ),
        lengths,
    )  # fmt: skip
    parts = [draw(attention_inputs(problem.sequence(*pair), hidden_is_finite=False)) for pair in lengths]
    inputs = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    places = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for name in draw(st.sets(st.sampled_from("qkv"))):
        inputs[name][:, places.random(inputs[name].shape[1]) < 0.05] = draw(st.sampled_from((np.nan, np.inf, -np.inf)))
    return verify.Case("flash3", "forward", problem, Flash3Plan(tiles=tiles), inputs, {}, lengths)


def program_of(case, multiprocessors=2):
    hardware = replace(get_hardware(DEFAULT_HARDWARE), streaming_multiprocessors=multiprocessors)
    return make_program("flash3", "forward", case.problem, case.plan, hardware)


def run_case(case, *, multiprocessors=2, **options):
    """Return the results of the CPU build, and what it counted."""
    inputs = {name: array[0] for name, array in case.inputs.items()}
    return run_program(program_of(case, multiprocessors), {**inputs, **case.offsets}, **options)


def assert_right(case, **options):
    """The CPU build's results and counts are those of the single sequences on the simulated machine."""
    expected, metadata = verify.simulate(case), {}
    found, traffic = run_case(case, **options, metadata=metadata)
    for name, wanted in expected.results.items():
        assert_same_bits(found[name], wanted, name=name)
    assert traffic == expected.traffic
    assert metadata.get("sequence_offsets", 0) == expected.offset_bytes
    least, most = repaired_bytes(case, expected)
    assert least <= metadata.get(REPAIRED_ROWS, 0) <= most


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the builds side by side."""
    kernels = set()
    for columns, dtype, tiles in BUILDS:
        for causal in (False, True):
            case = case_of([(1, 1)], head_dim=columns, dtype=dtype, tiles=tiles, causal=causal)
            kernels |= {step.kernel for step in program_of(case).steps}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cpu_build.build, kernels))


CHANCES = {
    "order": st.sampled_from(ORDERS),
    "copies": st.sampled_from(COPIES),
    "seed": st.integers(0, 99),
    "multiprocessors": st.sampled_from((1, 3, 132)),
}


@settings(max_examples=60)
@given(cases(), st.fixed_dictionaries(CHANCES))
def test_bits_and_counts_are_those_of_the_single_sequences(case, chance):
    assert_right(case, **chance)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("copies", COPIES)
def test_every_length(mask, copies):
    assert_right(case_of(LENGTHS, **mask), copies=copies, order="reverse")


@pytest.mark.parametrize("lengths", [[(0, 0)], [(0, 9), (0, 0)], [(9, 0), (70, 0)], [(1, 1)], [(3, 3)] * 9])
def test_nothing_and_one(lengths):
    assert_right(case_of(lengths))


@pytest.mark.parametrize(("special", "mask"), list(zip((np.nan, np.inf, -np.inf), MASKS, strict=True)))
def test_neighbours_never_matter(special, mask):
    case = case_of(LENGTHS, **mask)
    first, traffic = run_case(case)
    q_starts, k_starts = case.offsets.values()
    for chosen in (0, 5, 6):
        inputs = {name: np.full_like(array, special) for name, array in case.inputs.items()}
        for name, starts in (("q", q_starts), ("k", k_starts), ("v", k_starts)):
            rows = slice(starts[chosen], starts[chosen + 1])
            inputs[name][:, rows] = case.inputs[name][:, rows]
        again, counted = run_case(replace(case, inputs=inputs), order="random", copies="late")
        rows = slice(q_starts[chosen], q_starts[chosen + 1])
        assert_same_bits(again["out"][rows], first["out"][rows])
        assert_same_bits(again["lse"][:, rows], first["lse"][:, rows])
        assert counted == traffic


def test_one_sequence_is_the_problem_without_offsets():
    case = case_of([(150, 170)], causal=True)
    plain = AttentionProblem(q_len=150, kv_len=170, heads=2, kv_heads=1, causal=True)
    program = make_program("flash3", "forward", plain, case.plan, DEFAULT_HARDWARE)
    expected, traffic = run_program(program, case.inputs)
    found, counted = run_case(case)
    assert_same_bits(found["out"], expected["out"][0])
    assert_same_bits(found["lse"], expected["lse"][0])
    assert counted == traffic


class RowsNotWrittenError(Exception):
    """Some rows of a result were not written, which is no fault where they belong to no sequence."""


@contextlib.contextmanager
def rows_not_written():
    """Tell rows that are not written from other faults."""
    try:
        yield
    except KernelFaultError as fault:
        raise (RowsNotWrittenError if "is not written everywhere" in str(fault) else KernelFaultError)(fault) from fault


@settings(max_examples=15)
@given(st.lists(st.tuples(*[st.integers(-300, 300)] * 2), min_size=len(LENGTHS) + 1, max_size=len(LENGTHS) + 1))
def test_numbers_that_are_no_offsets_lead_nowhere_else(numbers):
    """The kernel touches nothing outside the arrays, and rows that belong to no sequence are not written."""
    case = case_of(LENGTHS)
    offsets = dict(zip(OFFSETS, np.sort(np.array(numbers, np.int32), axis=0).T, strict=True))
    inputs = {name: array[0] for name, array in case.inputs.items()}
    with contextlib.suppress(RowsNotWrittenError), rows_not_written():
        run_program(program_of(case), {**inputs, **offsets})


# Closed forms


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.sampled_from((64, 128, 192)))
def test_every_tile_has_a_slot_of_its_sequence(lengths, tile_rows):
    first = [start // tile_rows + index for index, start in enumerate(offsets_of(lengths))]
    for index, length in enumerate(lengths):
        assert first[index + 1] - first[index] >= -(-length // tile_rows)
    assert first[-1] == ragged_slots(sum(lengths), len(lengths), tile_rows)


def test_metadata_by_hand():
    # 5 sequences take 3 steps to find: 3 + 4 offsets of 4 bytes for each of 1000 // 64 + 5 slots of 3 heads.
    assert ragged_metadata_bytes(1000, 5, 3, 64) == (3 + 4) * 4 * 20 * 3
    assert ragged_metadata_bytes(63, 1, 1, 64) == 4 * 4
    assert ragged_metadata_bytes(0, 5, 3, 64) == 0


@given(
    st.integers(1, 1 << 20), st.integers(0, (1 << 20) - 1), st.integers(0, 1 << 20), st.integers(-64, 1 << 20),
    st.integers(1, 1 << 16), st.integers(0, 1 << 47),
)  # fmt: skip
def test_addresses_come_out_right(rows, start, length, row, stride, base):
    """A row of a sequence is at its place in the array, and inside the map if and only if it is one of the sequence."""
    start = min(start, rows - 1)
    length = min(length, rows - start)
    array = Array("q", "matrix", "bfloat16", 1, 2, rows, 64, "input", ragged=True)
    made = TensorMap.of(array, Boxes("q", 64, None, ragged=True), (0, 8 * stride, 64))
    at = (0, (1 << 30) - length + row, start + length, 1 << 30, 1)
    offset = sum(index * step for index, step in zip(at[1:], made.strides, strict=True))
    if rows > 1:
        assert (base + offset) % (1 << 64) == (base + (start + row) * 16 * stride + 128) % (1 << 64)
    inside = all(0 <= index < extent for index, extent in zip(at, made.extents, strict=True))
    assert inside == (row < length)  # rows before the sequence are never asked for
    assert max(map(abs, at)) < 1 << 31
    assert max(made.extents) < 1 << 32


# From arguments to results


@pytest.fixture
def device(monkeypatch):
    with fake_cupy.installed(monkeypatch) as kernels:
        kernels.run = cpu_device.CpuDevice(monkeypatch).run
        yield kernels


@pytest.fixture
def kernels(monkeypatch):
    with fake_cupy.installed(monkeypatch) as kernels:
        yield kernels


def arguments_of(case):
    given = {name: array[0] for name, array in case.inputs.items()} | case.offsets
    return {name: array.view(fake_cupy.Array) for name, array in given.items()}


@pytest.mark.parametrize("mask", MASKS)
def test_a_call(device, mask):
    case = case_of(LENGTHS, **mask)
    expected = verify.simulate(case)
    with count_traffic() as counted:
        out, lse, saved = attention(
            **arguments_of(case), **mask, algorithm="flash3", plan=case.plan, return_lse=True, return_saved=True
        )
    assert out.shape == (271, 2, 64)
    assert lse.shape == (2, 271)
    assert_same_bits(out.get(), expected.results["out"])
    assert_same_bits(lse.get(), expected.results["lse"])
    assert saved["out"] is out
    assert counted.traffic == expected.traffic
    assert counted.metadata == {"sequence_offsets": expected.offset_bytes}


def test_a_further_call_with_other_lengths_prepares_nothing(device):
    first, other = case_of(LENGTHS), case_of([*LENGTHS[1:], LENGTHS[0]], seed=1)
    for case in (first, other):
        out = attention(**arguments_of(case), algorithm="flash3", plan=case.plan)
        assert_same_bits(out.get(), verify.simulate(case).results["out"])
    assert len(device.loaded) == 1


@pytest.mark.parametrize("mask", MASKS)
def test_what_a_call_runs_is_explained(kernels, mask):
    case = case_of(LENGTHS, **mask)
    given = arguments_of(case)
    found = explain(**given, **mask)
    assert (found.algorithm, found.problem) == ("flash3", case.problem)
    attention(**given, **mask)
    (launched,), (explained,) = kernels.launches, found.kernels
    assert (launched.grid, launched.block) == ((explained.blocks,), (explained.threads,))
    assert {name.lower(): value for name, value in launched.variant.macros} == dict(explained.build)
    with pytest.raises(ValueError, match="cu_seqlens_k is missing beside cu_seqlens_q"):
        explain(**{**given, "cu_seqlens_k": None})
    with pytest.raises(TypeError, match="cu_seqlens_q is given beside a problem"):
        explain(case.problem, cu_seqlens_q=given["cu_seqlens_q"])


def test_results_go_where_they_are_asked_to(device):
    case = case_of(LENGTHS)
    expected = verify.simulate(case).results
    given = {name: np.zeros_like(array).view(fake_cupy.Array) for name, array in expected.items()}
    out = (given["out"], given["lse"])
    assert attention(**arguments_of(case), algorithm="flash3", plan=case.plan, return_lse=True, out=out) == out
    for name, wanted in expected.items():
        assert_same_bits(given[name].get(), wanted, name=name)


def elsewhere(array):
    with fake_cupy.Device(1):
        return np.array(array).view(fake_cupy.Array)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: {"cu_seqlens_q": None}, ValueError, "cu_seqlens_q is missing beside cu_seqlens_k"),
        (lambda g: {"cu_seqlens_k": None}, ValueError, "cu_seqlens_k is missing beside cu_seqlens_q"),
        (lambda g: {"cu_seqlens_q": [0, 3]}, TypeError, "cu_seqlens_q is a builtins.list"),
        (lambda g: {"cu_seqlens_q": g["cu_seqlens_q"].astype(np.int64)}, TypeError, "cu_seqlens_q has dtype int64"),
        (lambda g: {"cu_seqlens_k": g["cu_seqlens_k"].view(np.float32)}, TypeError, "cu_seqlens_k has dtype float32"),
        (lambda g: {"cu_seqlens_k": g["cu_seqlens_k"][:-1]}, ValueError, "cu_seqlens_k has 7 offsets: expected 8"),
        (lambda g: {"cu_seqlens_q": g["cu_seqlens_q"][None]}, ValueError, r"cu_seqlens_q has shape \(1, 8\)"),
        (lambda g: {name: g[name][:1] for name in OFFSETS}, ValueError, "expected 1 dimension, of at least 2 offsets"),
        (lambda g: {"cu_seqlens_q": g["cu_seqlens_q"].repeat(2)[::2]}, ValueError, "cu_seqlens_q has strides"),
        (lambda g: {"cu_seqlens_q": elsewhere(g["cu_seqlens_q"])}, ValueError, "cu_seqlens_q is on device 1"),
        (lambda g: {"q": g["q"][None]}, ValueError, r"q has shape \(1, 271, 2, 64\): expected 3 dimensions .rows, he"),
        (lambda g: {"v": g["v"][:-1]}, ValueError, r"v has shape \(359, 1, 64\): expected \(360, 1, 64\)"),
        (lambda g: {"algorithm": "flash2"}, ValueError, "algorithm='flash2' takes no cu_seqlens_q .* of .'flash3',."),
        (lambda g: {"algorithm": "standard"}, ValueError, "algorithm='standard' takes no cu_seqlens_q .*flash3"),
        (lambda g: {"plan": Flash3Plan(tiles=(64, 64), packed_heads=2)}, ValueError, "packed_heads=2 with cu_seqlens"),
        (lambda g: {"out": np.zeros_like(g["q"][None])}, ValueError,
         r"out has shape \(1, 271, 2, 64\): expected \(271, 2, 64\)"),
        (lambda g: dict.fromkeys(OFFSETS), ValueError, "q has shape .271, 2, 64.: expected 4 dimensions"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(kernels, change, error, message):
    given = {"algorithm": "flash3", **arguments_of(case_of(LENGTHS))}
    changed = {**given, **change(given)}
    for call in (attention,) if "out" in changed else (attention, explain):
        with pytest.raises(error, match=message):
            call(**changed)
    assert not kernels.launches


def test_other_gpus_are_refused():
    problem = RaggedProblem(batch=2, q_len=9, head_dim=64)
    with pytest.raises(ValueError, match=r"Hopper.* has 8\.0: expected another GPU"):
        default_plan(problem, "A100-40GB", algorithm="flash3")


# Faults planted in the source

WHOLE = "RAGGED_ROWS - {0} + {1}.start + {2}, {0}"

FAULTS = {
    "keys of a neighbour": (
        "ragged_row(work.keys, tile * KEY_ROWS), ragged_end(work.keys)",
        WHOLE.format("problem.kv_len", "work.keys", "tile * KEY_ROWS")),
    "results over a neighbour's": (
        "ragged_row(work.queries, warp_row), ragged_end(work.queries)",
        WHOLE.format("parameters.problem.q_len", "work.queries", "warp_row")),
    "statistics of the array's first rows": ("0, head, work.queries.start + position", "0, head, position"),
    "keys that end elsewhere": ("  return work.keys.length;", "  return work.keys.length + 1;"),
    "queries that end elsewhere": ("  return work.queries.length;", "  return work.queries.length + 1;"),
    "a sequence too far": ("offset / QUERY_ROWS + later <= slot", "offset / QUERY_ROWS + later <= slot + 1"),
    "a step of the search too few": ("while (bit < batch) bit *= 2;", "while (2 * bit < batch) bit *= 2;"),
    "tiles of another sequence": ("slot - sequence - first / QUERY_ROWS", "slot - first / QUERY_ROWS"),
    "offsets that are not counted": ("    counter.add(4);\n    return static_cast<int>", "    return static_cast<int>"),
    "rows outside the array": ("start = max(0, min(start, rows));", ""),
}  # fmt: skip
"""Text and what it is replaced by."""


@pytest.fixture(scope="module")
def faulty_kernels(tmp_path_factory):
    """Plant each fault in a copy of the source, and compile it."""
    directories, (step,) = {}, program_of(case_of(LENGTHS)).steps
    for name, (old, new) in FAULTS.items():
        directory = tmp_path_factory.mktemp("fault") / "kernels"
        shutil.copytree(cpu_build.KERNELS, directory)
        path = directory / "flash3_forward.cu"
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times"
        path.write_text(text.replace(old, new))
        directories[name] = directory
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda directory: cpu_build.build(step.kernel, directory), directories.values()))
    return directories


@pytest.mark.parametrize("fault", FAULTS)
def test_finds_a_planted_fault(fault, faulty_kernels):
    case = case_of(LENGTHS)
    for name in "kv":  # of the sequences that have no queries
        case.inputs[name][:, 90:95] = np.nan
    numbers = {"given": case.offsets, "outside": {name: array - 60 for name, array in case.offsets.items()}}
    inputs = {name: array[0] for name, array in case.inputs.items()}
    expected = verify.simulate(case)
    found = []
    for which, offsets in numbers.items():
        metadata = {}
        try:
            with rows_not_written():
                results, traffic = run_program(
                    program_of(case), {**inputs, **offsets}, kernels=faulty_kernels[fault], metadata=metadata
                )
        except RowsNotWrittenError:
            found += [which] if which == "given" else []
        except KernelFaultError:
            found.append(which)
        else:
            differing = sum(verify.differing_elements(results[name], expected.results[name]) for name in ("out", "lse"))
            counted = traffic == expected.traffic and metadata == {"sequence_offsets": expected.offset_bytes}
            found += [which] if which == "given" and (differing or not counted) else []
    assert found, "the harness saw nothing wrong"
