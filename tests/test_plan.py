"""Plans and tiles: how they may be given, what is refused, and that chosen ones fit."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import simattn
from simattn import AttentionProblem, BlockMask, CapacityError, Plan, Tiles
from simattn.algorithms import ALGORITHMS
from simattn.plan import dividing_tiles, largest_fitting
from simattn.testing import plan_options, problems_of

EXAMPLES = settings.default.max_examples

PROGRAMS = [(name, direction) for name, algorithm in ALGORITHMS.items() for direction in algorithm.directions]
every_program = pytest.mark.parametrize(("name", "direction"), PROGRAMS)
every_algorithm = pytest.mark.parametrize(
    ("name", "direction"), [(name, algorithm.directions[0]) for name, algorithm in ALGORITHMS.items()]
)
every_masked = pytest.mark.parametrize(
    ("name", "direction"), [(name, item.directions[0]) for name, item in ALGORITHMS.items() if item.takes_any_mask]
)


def usual(name, direction, length):
    return {"direction": direction, **ALGORITHMS[name].problem_class.usual_arguments(direction, length)}


def arguments_of(problem):
    return {item.name: getattr(problem, item.name) for item in fields(problem)}


@pytest.mark.parametrize(
    "tiles", [Tiles(q=4, kv=8), (4, 8), [4, 8], {"q": 4, "kv": 8}, (np.int64(4), np.int32(8)), (4, 8, None)], ids=str
)
def test_tiles_may_be_given_as(tiles):
    plan = Plan(tiles=tiles)
    assert plan.tiles == Tiles(q=4, kv=8)
    assert type(plan.tiles.q) is int


def test_depth_may_be_given():
    assert Plan(tiles=(4, 8, 2)).tiles == Plan(tiles={"q": 4, "kv": 8, "depth": 2}).tiles == Tiles(q=4, kv=8, depth=2)


@pytest.mark.parametrize(
    ("tiles", "error", "words"),
    [
        ((0, 4), ValueError, r"tiles\.q=0: expected an integer of at least 1"),
        ((4, -1), ValueError, r"tiles\.kv=-1"),
        ((math.nan, 4), TypeError, r"tiles\.q=nan is a float: expected an integer"),
        ((4, 4.0), TypeError, r"tiles\.kv=4\.0 is a float"),
        ((4, 4, 0), ValueError, r"tiles\.depth=0"),
        ((4, 4, math.nan), TypeError, r"tiles\.depth=nan"),
        ((4, None), TypeError, r"tiles\.kv=None"),
        ((4,), TypeError, r"tiles=\(4,\): expected simattn\.Tiles"),
        (64, TypeError, r"tiles=64: expected simattn\.Tiles"),
        ("64x64", TypeError, "tiles='64x64'"),
        ({"q": 4}, ValueError, r"tiles=\{'q': 4\}: expected the keys 'q' and 'kv'"),
        ({"q": 4, "kv": 4, "head": 1}, ValueError, "tiles=.*expected the keys"),
    ],
    ids=str,
)
def test_tiles_refused(tiles, error, words):
    with pytest.raises(error, match=words):
        simattn.count("flash2", q_len=8, tiles=tiles)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"accumulators": "hbm"}, ValueError, r"accumulators='hbm': expected one of \('registers', 'sram'\)"),
        ({"enforce_capacity": 1}, TypeError, "enforce_capacity=1: expected a bool"),
        ({"repeat_kv": None}, TypeError, "repeat_kv=None: expected a bool"),
        ({"grouped_gradients": "sum"}, ValueError, "grouped_gradients='sum': expected one of"),
    ],
    ids=str,
)
@every_algorithm
def test_common_options_refused(name, direction, options, error, words):
    with pytest.raises(error, match=words):
        simattn.count(name, **{**usual(name, direction, 8), **options})


@every_algorithm
def test_every_option_refuses_nonsense(name, direction):
    for item in fields(ALGORITHMS[name].plan_class):
        with pytest.raises((ValueError, TypeError), match=item.name):
            simattn.count(name, **{**usual(name, direction, 8), item.name: "nonsense"})


@every_algorithm
def test_unknown_options_are_named(name, direction):
    with pytest.raises(TypeError, match=f"'tile_size' is no argument and no plan option of {name}; options: .*'tiles'"):
        simattn.count(name, **{**usual(name, direction, 8), "tile_size": 3})


def test_another_algorithms_plan_is_refused():
    with pytest.raises(TypeError, match="plan is a Flash2Plan: expected a Flash1Plan"):
        simattn.count("flash1", q_len=8, plan=simattn.default_plan("flash2", q_len=8))


@pytest.mark.parametrize("plan", ["best", 3, ("gpu",)], ids=str)
def test_unknown_plans_are_refused(plan):
    with pytest.raises(ValueError, match=r"plan=.*expected one of .*'paper', 'fit', 'gpu'"):
        simattn.count("flash2", q_len=8, plan=plan)


@every_program
def test_a_plan_serves_in_place_of_its_arguments(name, direction):
    shape = {"head_dim": 16, **usual(name, direction, 100)}
    plan = simattn.default_plan(name, **shape, sram_bytes=20_000, accumulators="registers")
    given = simattn.profile(name, **shape, plan=plan, sram_bytes=20_000)
    assert given.plan == plan
    assert given.traffic == simattn.count(name, **shape, sram_bytes=20_000, accumulators="registers")
    smaller = simattn.default_plan(name, **shape, plan=plan, tiles=(2, 2))
    assert smaller == replace(plan, tiles=Tiles(q=2, kv=2))


MASK = BlockMask.from_array(np.ones((2, 2), bool), q_block=24, kv_block=20)
MASKED = AttentionProblem(q_len=48, kv_len=40, head_dim=8, block_mask=MASK)


@every_masked
@pytest.mark.parametrize(
    ("tiles", "words"),
    [((16, 20), r"tiles\.q=16 does not divide block_mask\.q_block=24"), ((8, 3), r"tiles\.kv=3 does not divide")],
)
def test_tiles_that_do_not_divide_blocks_are_refused(name, direction, tiles, words):
    with pytest.raises(ValueError, match=words):
        simattn.count(name, **arguments_of(MASKED), direction=direction, tiles=tiles)


@given(st.integers(1, 300), st.integers(1, 300))
def test_dividing_tiles_are_the_largest_that_divide(block, tile):
    mask = BlockMask.from_array(np.ones((1, 1), bool), q_block=block, kv_block=block)
    problem = AttentionProblem(q_len=block, block_mask=mask)
    expected = max(size for size in range(1, tile + 1) if block % size == 0)
    assert dividing_tiles(problem, Tiles(q=tile, kv=1)).q == expected


@given(st.integers(0, 10**9))
def test_largest_fitting_finds_the_boundary(limit):
    assert largest_fitting(lambda size: size <= limit) == (limit or None)


@every_program
@settings(max_examples=EXAMPLES // 2)
@given(data=st.data(), sram_bytes=st.integers(100, 300_000))
def test_chosen_tiles_fit(name, direction, data, sram_bytes):
    problem = data.draw(problems_of(ALGORITHMS[name], direction, max_len=300, head_dims=(1, 16, 64, 128)))
    options = data.draw(plan_options(ALGORITHMS[name]))
    options["accumulators"] = "sram"
    options.pop("softmax_passes", None)  # 1 demands whole rows on chip, whether they fit or not
    arguments = {**arguments_of(problem), **options, "direction": direction, "sram_bytes": sram_bytes}
    try:
        plan = simattn.default_plan(name, **arguments)
    except CapacityError:
        assume(False)
    assert simattn.profile(name, **arguments, plan=plan).peak_sram_bytes <= sram_bytes


def test_whole_score_rows_count_the_statistics_beside_them():
    arguments = {"q_len": 64, "head_dim": 1, "dtype": "float32", "plan": "fit", "tiles": (2, 2)}
    two_score_tiles = 2 * 2 * 64 * 4
    for direction in ("forward", "backward"):
        run = simattn.profile("standard", **arguments, direction=direction, sram_bytes=two_score_tiles)
        assert run.peak_sram_bytes <= two_score_tiles


@every_program
def test_too_little_sram_is_refused(name, direction):
    with pytest.raises(CapacityError, match=rf"sram_bytes=3 \(3 B\) holds no tile of {name} {direction}.*head_dim=64"):
        simattn.count(name, **usual(name, direction, 8), sram_bytes=3)


@every_program
def test_tiles_that_exceed_the_sram_are_named(name, direction):
    arguments = {"head_dim": 64, "tiles": (4096, 4096), **usual(name, direction, 4096)}
    with pytest.raises(CapacityError, match=r"tiles in sram take [\d,]+ bytes \(\w+ [\d.]+ .?B.*at most 20,000"):
        simattn.count(name, **arguments, sram_bytes=20_000)
    assert simattn.profile(name, **arguments, sram_bytes=20_000, enforce_capacity=False).peak_sram_bytes > 20_000


@every_program
def test_paper_plans_report_their_excess(name, direction):
    shape = {"head_dim": 64, **usual(name, direction, 1024)}
    run = simattn.profile(name, **shape, plan="paper", sram_bytes=50_000)
    assert not run.plan.enforce_capacity
    assert run.peak_sram_bytes > 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sram_bytes": 0}, ValueError, "sram_bytes=0: expected an integer of at least 1"),
        ({"sram_bytes": -5}, ValueError, "sram_bytes=-5"),
        ({"sram_bytes": 1e5}, TypeError, r"sram_bytes=100000\.0 is a float"),
        ({"sram_bytes": math.nan}, TypeError, "sram_bytes=nan"),
        ({"hardware": "H9000"}, ValueError, "H9000.*expected"),
    ],
    ids=str,
)
def test_machine_arguments_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        simattn.count("flash2", q_len=8, **arguments)


@every_algorithm
def test_refuses_chunks_of_columns_that_the_algorithm_does_not_take(name, direction):
    if not ALGORITHMS[name].chunks_columns:
        with pytest.raises(ValueError, match=f"tiles.depth=8: {name} takes all columns"):
            simattn.count(name, **usual(name, direction, 16), tiles=(16, 16, 8))
