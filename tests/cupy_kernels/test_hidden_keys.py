"""flash3 on the CPU where keys are hidden: tiles that only some warpgroups see, NaN and infinities in hidden values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repairs import repaired_bytes

from cupy_kernels import cpu_build, verify
from cupy_kernels.cpu_build import COPIES, ORDERS, run_program
from cupy_kernels.flash3 import REPAIRED_ROWS
from cupy_kernels.ragged import RaggedProblem
from cupy_kernels.table import make_program
from simattn.algorithms.flash3 import Flash3Plan
from simattn.hardware import get_hardware
from simattn.plan import Tiles
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import AttentionProblem
from simattn.testing import assert_same_bits, attention_inputs

try:
    cpu_build.compiler()
except cpu_build.CompilerNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)


class Build(NamedTuple):
    """What the tests run: few, since each is compiled."""

    columns: int
    dtype: str
    tiles: Tiles
    packed_heads: int = 1


NARROW, PACKED = Build(64, "float16", Tiles(q=192, kv=64)), Build(64, "bfloat16", Tiles(q=128, kv=64), 4)
IN_KEYS = (
    Build(192, "float16", Tiles(q=128, kv=96)),
    Build(256, "bfloat16", Tiles(q=128, kv=80)),
    Build(256, "float16", Tiles(q=192, kv=64)),
)
"""With room for one query tile alone, whose results are staged where keys lay: all slabs, some or one at a time."""

LONG = Build(96, "bfloat16", Tiles(q=64, kv=208))
"""A thread has more keys of a tile than an integer has bits."""

BUILDS = (NARROW, PACKED, LONG, Build(128, "bfloat16", Tiles(q=128, kv=64)), *IN_KEYS)
RAGGED_BUILDS = (NARROW, IN_KEYS[1])

SPECIAL = (np.nan, np.inf, -np.inf)
CAUSAL = {"causal": True}


def plan_of(build):
    return Flash3Plan(tiles=build.tiles, packed_heads=build.packed_heads)


def case_of(build, lengths, *, heads=1, kv_heads=1, seed=0, **mask):
    """Return a problem with inputs from N(0, 1), of sequences if `lengths` are several pairs of lengths."""
    shape = {"heads": heads * build.packed_heads, "kv_heads": kv_heads, "head_dim": build.columns, "dtype": build.dtype}
    if isinstance(lengths, tuple):
        problem = AttentionProblem(q_len=lengths[0], kv_len=lengths[1], **shape, **mask)
        return verify.random_case("flash3", "forward", problem, plan=plan_of(build), number=seed)
    problem = RaggedProblem.of(AttentionProblem(q_len=0, **shape, **mask), lengths)
    rows = verify.random_case("flash3", "forward", replace(problem, batch=1), plan=plan_of(build), number=seed)
    return verify.Case("flash3", "forward", problem, plan_of(build), rows.inputs, {}, tuple(lengths))


def program_of(case, multiprocessors=1):
    hardware = replace(get_hardware(DEFAULT_HARDWARE), streaming_multiprocessors=multiprocessors)
    return make_program("flash3", "forward", case.problem, case.plan, hardware)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the builds side by side."""
    cases = [case_of(build, (1, 1), **CAUSAL) for build in BUILDS]
    cases += [case_of(build, [(1, 1)], **CAUSAL) for build in RAGGED_BUILDS]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cpu_build.build, [program_of(case).steps[0].kernel for case in cases]))


def assert_right(case, *, multiprocessors=1, **chance):
    """Results and counts are the simulated machine's, and what is repaired is what has to be; return its bytes."""
    expected, metadata = verify.simulate(case), {}
    inputs = case.inputs
    if case.lengths is not None:
        inputs = {name: array[0] for name, array in inputs.items()} | case.offsets
    results, traffic = run_program(program_of(case, multiprocessors), inputs, **chance, metadata=metadata)
    for name, wanted in expected.results.items():
        assert_same_bits(results[name], wanted, name=name)
    assert traffic == expected.traffic
    least, most = repaired_bytes(case, expected)
    assert least <= metadata.get(REPAIRED_ROWS, 0) <= most
    assert metadata.get(REPAIRED_ROWS) != 0
    return metadata.get(REPAIRED_ROWS, 0)


CHANCES = {
    "order": st.sampled_from(ORDERS),
    "copies": st.sampled_from(COPIES),
    "seed": st.integers(0, 99),
    "multiprocessors": st.sampled_from((1, 2, 132)),
}


@st.composite
def cases(draw, max_len=230):
    """Draw a problem whose mask hides most tiles from most warpgroups, with special values in some keys."""
    build = draw(st.sampled_from(BUILDS))
    below = {64: 0, 96: 64, 128: 96, 192: 128, 256: 192}[build.columns]
    wide, narrow = draw(st.integers(below // 8 + 1, build.columns // 8)) * 8, draw(st.integers(1, 8)) * 8
    head_dim, value_dim = draw(st.permutations((wide, narrow)))
    near, far = st.integers(0, 20), st.one_of(st.none(), st.integers(0, 150))
    window = st.one_of(st.tuples(near, near), st.tuples(near, far), st.tuples(far, near))
    problem = AttentionProblem(
        q_len=draw(st.integers(60, max_len)) // build.packed_heads, kv_len=draw(st.integers(1, max_len)),
        heads=2 * build.packed_heads, kv_heads=draw(st.integers(1, 2)), head_dim=head_dim, value_dim=value_dim,
        dtype=build.dtype, **draw(st.one_of(st.just(CAUSAL), st.builds(dict, window=window))),
    )  # fmt: skip
    inputs = draw(attention_inputs(problem, hidden_is_finite=False))
    places = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for name in draw(st.sampled_from(("", "v", "v", "kv", "qv", "qkv"))):
        rows = places.random(inputs[name].shape[:3]) < draw(st.sampled_from((0.003, 0.03)))
        inputs[name][rows, places.integers(inputs[name].shape[3])] = draw(st.sampled_from(SPECIAL))
    return verify.Case("flash3", "forward", problem, plan_of(build), inputs, {})


@settings(max_examples=40)
@given(cases(), st.fixed_dictionaries(CHANCES))
def test_bits_counts_and_repairs(case, chance):
    assert_right(case, **chance)


# Tiles that some warpgroups of a query tile skip


@pytest.mark.parametrize(
    "mask",
    [
        {"window": (0, 0)},  # the three see one tile each
        {"window": (5, 3)},
        {"window": (64, 0)},
        {"window": (None, 3)},  # tiles at the end are skipped
        {"window": (3, None)},  # tiles at the beginning
        CAUSAL,
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(192, 192), (400, 200), (70, 400)], ids=str)
@pytest.mark.parametrize("build", [NARROW, IN_KEYS[2]])
def test_warpgroups_skip_tiles(build, lengths, mask):
    """The hidden values are NaN, which would show where a tile that is to be skipped is not."""
    case = case_of(build, lengths, **mask)
    seen = case.problem.visible_elements()
    case.inputs["v"][:, ~seen.any(axis=0)] = np.nan
    assert_right(case, order="reverse", copies="late")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("copies", COPIES)
def test_query_tiles_that_see_nothing_between_others(order, copies):
    """A thread block's query tiles see keys, then none, then keys: each gives the room of the one before free."""
    case = case_of(NARROW, [(200, 70), (10, 0), (300, 20), (5, 64), (0, 9), (200, 0), (64, 64)], **CAUSAL)
    assert_right(case, order=order, copies=copies)


# Special values in hidden keys


@pytest.mark.parametrize("mask", [CAUSAL, {"window": (30, 4)}], ids=str)
@pytest.mark.parametrize(
    ("build", "lengths", "special"),
    [
        (NARROW, (192, 192), np.nan),
        (NARROW, (192, 192), np.inf),
        (PACKED, (32, 40), np.nan),
        (PACKED, (32, 40), -np.inf),
        (IN_KEYS[1], (128, 128), np.nan),
        (IN_KEYS[1], (128, 128), -np.inf),
    ],
)
def test_hidden_values_are_repaired(build, lengths, special, mask):
    """One value of a key that some rows of a warpgroup see and others do not."""
    case = case_of(build, lengths, **mask)
    key = lengths[1] * 3 // 4
    seen = case.problem.visible_elements()[:, key]
    assert seen.any()
    assert not seen.all()
    assert assert_right(case) == 0
    case.inputs["v"][0, key, 0, 5] = special
    assert assert_right(case, order="reverse", copies="late") > 0


@pytest.mark.parametrize("build", RAGGED_BUILDS)
@pytest.mark.parametrize("mask", [CAUSAL, {"window": (30, 4)}], ids=str)
def test_hidden_values_of_sequences(build, mask):
    """A sequence's values are repaired from its own keys; neighbours hold NaN right beside them."""
    lengths = [(70, 90), (5, 0), (3, 40), (130, 140)]
    case = case_of(build, lengths, heads=2, kv_heads=2, **mask)
    assert assert_right(case) == 0
    _, starts = case.offsets.values()
    for start in starts[1:-1].tolist():
        case.inputs["v"][0, start - 1, 0] = np.nan
        case.inputs["v"][0, start + 3, 1] = np.inf
    assert assert_right(case, order="random", copies="late") > 0


def test_what_is_read_again_by_hand():
    """Key 20 is hidden from rows 0 to 19, of two warps, all of whose rows are computed anew."""
    case = case_of(NARROW, (64, 64), **CAUSAL)
    case.inputs["v"][:, 20, :, 7] = np.inf
    keys = sum(range(1, 33))  # row i sees i + 1 of them
    queries = 32 * 64 // 16 * 8  # each once for 16 keys of its tile, by 8 lanes
    assert assert_right(case) == 2 * (keys * (64 + 64) + queries * 64)


@pytest.mark.parametrize("build", [NARROW, IN_KEYS[1]])
@pytest.mark.parametrize("name", ["q", "k"])
def test_rows_that_are_nan_anyway_are_not_repaired(build, name):
    """A sum that is NaN makes the whole row NaN, whatever values got into it."""
    case = case_of(build, (128, 128), **CAUSAL)
    case.inputs["v"][:, 40] = np.inf
    assert repaired_bytes(case, verify.simulate(case))[0] > 0
    case.inputs[name][:, : 40 if name == "q" else 1] = np.nan
    assert np.isnan(verify.simulate(case).results["lse"][:, :, :40]).all()
    assert assert_right(case) == 0


def test_without_a_mask_nothing_is_repaired():
    case = case_of(NARROW, (70, 90))
    case.inputs["v"][:, 40] = np.nan
    assert assert_right(case) == 0


def test_rows_that_see_nothing_stay_zero():
    """They take a tile with the others of their query tile, whose NaN must not reach them."""
    case = case_of(NARROW, (192, 10), **CAUSAL)
    case.inputs["v"][:] = np.nan
    assert not verify.simulate(case).results["out"][:, :182].any()
    assert assert_right(case) > 0
