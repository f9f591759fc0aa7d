"""Attention in windows: what its three algorithms have in common with each other and with dense attention."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simattn
from simattn.algorithms import ALGORITHMS, dilated_window, overlapped_window, sliding_window
from simattn.algorithms.dilated_window import DilatedWindowProblem, PlacedVisibility, Places
from simattn.algorithms.overlapped_window import OverlappedWindowProblem
from simattn.algorithms.sliding_window import SlidingWindowProblem
from simattn.algorithms.windows import receptive_field
from simattn.bounds import compulsory_traffic
from simattn.cli import main
from simattn.kv_cache import CacheShape
from simattn.masks import all_rows
from simattn.testing import (
    assert_same_bits,
    attention_inputs,
    problems_of,
    reference_attention,
    reference_attention_backward,
)
from simattn.traffic import ArrayTraffic

FAMILY = ("sliding_window", "dilated_window", "overlapped_window")
CALLS = {"forward": simattn.run, "backward": simattn.run_backward, "decode": simattn.run_decode}
SHAPE = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "dtype")


def semantics(problem):
    return {item.name: getattr(problem, item.name) for item in fields(problem) if item.name not in SHAPE}


def arrays(*lengths, heads=4, kv_heads=2, head_dim=8, value_dim=6, batch=2, seed=0):
    """q, k and v, and dout, of one length or two."""
    generator = np.random.default_rng(seed)
    q_len, kv_len = lengths[0], lengths[-1]
    shapes = {
        "q": (batch, q_len, heads, head_dim),
        "k": (batch, kv_len, kv_heads, head_dim),
        "v": (batch, kv_len, kv_heads, value_dim),
        "dout": (batch, q_len, heads, value_dim),
    }
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def forward(inputs):
    return {name: inputs[name] for name in "qkv"}


def assert_close(actual, expected):
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-11)


def assert_equal_runs(one, two, names=("out", "lse"), *, bits=True):
    assert one.traffic.global_only() == two.traffic.global_only()
    for name in names:
        if bits:
            assert_same_bits(getattr(one, name), getattr(two, name), name=name)
        else:
            assert_close(getattr(one, name), getattr(two, name))


# 1. What is the same as something else


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(20,), (7, 20), (20, 7)])
def test_sliding_window_is_flash2_of_its_mask(lengths, causal):
    inputs, plan = arrays(*lengths), {"tiles": (4, 3), "causal": causal}
    for window in ((5, 0), (3, 4), (0, 0), (40, 40)):
        one, two = (
            simattn.run(name, **forward(inputs), window=window, **plan) for name in ("sliding_window", "flash2")
        )
        assert_equal_runs(one, two)
        one, two = (
            simattn.run_backward(name, **inputs, window=window, **plan) for name in ("sliding_window", "flash2")
        )
        assert_equal_runs(one, two, ("dq", "dk", "dv"))


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_of_the_whole_sequence_is_dense(causal):
    inputs, plan = arrays(19), {"tiles": (4, 3), "causal": causal}
    dense = simattn.run("flash2", **forward(inputs), **plan)
    gradients = simattn.run_backward("flash2", **inputs, **plan)
    for name, own in (
        ("sliding_window", {"window": (18, 18)}),
        ("dilated_window", {"window": (18, 18)}),
        ("dilated_window", {"window": (1, 1), "dilation": 3, "global_tokens": 19}),
        ("dilated_window", {"window": (1, 1), "global_tokens": tuple(range(19))}),
        ("overlapped_window", {"window_len": 19, "overlap": 3}),
    ):
        assert_equal_runs(simattn.run(name, **forward(inputs), **own, **plan), dense)
        run = simattn.run_backward(name, **inputs, **own, **plan, arithmetic="float64")
        for key in ("dq", "dk", "dv"):
            np.testing.assert_allclose(run.results[key], getattr(gradients, key), rtol=1e-4, atol=1e-5)


@given(data=st.data())
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_dilation_1_without_global_tokens_is_a_sliding_window(direction, data):
    problem = data.draw(problems_of(ALGORITHMS["dilated_window"], direction))
    inputs = data.draw(attention_inputs(problem, direction=direction, kinds=["normal"]))
    given_inputs = {key: array for key, array in inputs.items() if not key.endswith("_global")}
    arguments = {"causal": problem.causal, "window": problem.window, "scale": problem.scale, "arithmetic": "float64"}
    one, two = (CALLS[direction](name, **given_inputs, **arguments) for name in ("dilated_window", "sliding_window"))
    if direction == "forward":
        assert one.traffic.global_only() == two.traffic.global_only()
    for key in ("out", "lse") if direction == "forward" else ("dq", "dk", "dv"):
        np.testing.assert_allclose(one.results[key], two.results[key], rtol=1e-12, atol=1e-12)


def test_windows_without_overlap_are_blocks_on_the_diagonal():
    blocks = simattn.BlockMask.from_array(np.eye(5, dtype=bool), q_block=8, kv_block=8)
    inputs = arrays(37)
    for causal in (False, True):
        plan = {"tiles": (4, 2), "causal": causal}
        one = simattn.run("overlapped_window", **forward(inputs), window_len=8, **plan)
        assert_equal_runs(one, simattn.run("flash2", **forward(inputs), block_mask=blocks, **plan))
        assert "out_partial" not in one.traffic.by_array


@given(data=st.data())
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_merged_windows_are_attention_over_their_union(direction, data):
    """Held against dense attention under the union's mask, which no program of these computes."""
    problem = replace(data.draw(problems_of(ALGORITHMS["overlapped_window"], direction)), pairs="once")
    inputs = data.draw(attention_inputs(problem, direction=direction, kinds=["normal"]))
    run = CALLS[direction]("overlapped_window", **inputs, **semantics(problem), arithmetic="float64", tiles=(3, 4))
    tokens = np.arange(problem.q_len)
    union = np.zeros((problem.q_len, problem.q_len), dtype=bool)
    for start in range(0, problem.q_len, problem.step):
        inside = (tokens >= start) & (tokens < start + problem.window_len)
        union |= inside[:, None] & inside
    if problem.causal:
        union &= np.tri(problem.q_len, dtype=bool)
    np.testing.assert_array_equal(problem.visible_elements(), union)
    wide = {key: array.astype(np.float64) for key, array in inputs.items()}
    if direction == "forward":
        out, lse = reference_attention(problem, **wide)
        np.testing.assert_allclose(run.out, out, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(run.lse, lse, rtol=1e-10, atol=1e-12)
    else:
        for key, expected in zip(("dq", "dk", "dv"), reference_attention_backward(problem, **wide), strict=True):
            np.testing.assert_allclose(run.results[key], expected, rtol=1e-8, atol=1e-10)


def test_pairs_per_window_are_a_softmax_of_scores_plus_the_logarithm_of_their_number():
    length, window_len, overlap = 23, 9, 6
    inputs = arrays(length, heads=1, kv_heads=1, batch=1)
    arguments = {"window_len": window_len, "overlap": overlap, "arithmetic": "float64", "tiles": (4, 5)}
    run = simattn.run("overlapped_window", **forward(inputs), **arguments, pairs="per_window")
    starts = range(0, length - window_len + 3, 3)
    number = np.array(
        [
            [sum(s <= min(i, j) and max(i, j) < s + window_len for s in starts) for j in range(length)]
            for i in range(length)
        ]
    )
    assert number.max() == 3
    q, k, v = (inputs[name][0, :, 0].astype(np.float64) for name in "qkv")
    with np.errstate(divide="ignore"):
        scores = q @ k.T / math.sqrt(8) + np.log(number)
    weights = np.exp(scores)
    assert_close(run.out[0, :, 0], weights @ v / weights.sum(axis=1, keepdims=True))
    assert_close(run.lse[0, 0], np.log(weights.sum(axis=1)))
    once = simattn.run("overlapped_window", **forward(inputs), **arguments)
    assert np.abs(once.out - run.out).max() > 1e-3


def test_the_mean_of_windows_and_the_last_window_are_no_attention_over_the_union():
    inputs = arrays(12, heads=1, kv_heads=1, batch=1)
    q, k, v = (inputs[name][0, :, 0].astype(np.float64) for name in "qkv")
    sums, counts, last = np.zeros((12, 6)), np.zeros((12, 1)), np.zeros((12, 6))
    for start in (0, 4):
        tokens = slice(start, start + 8)
        weights = np.exp(q[tokens] @ k[tokens].T / math.sqrt(8))
        out = weights @ v[tokens] / weights.sum(axis=1, keepdims=True)
        sums[tokens] += out
        counts[tokens] += 1
        last[tokens] = out
    run = simattn.run("overlapped_window", **forward(inputs), window_len=8, overlap=4, arithmetic="float64")
    for other in (sums / counts, last):
        assert np.abs(other - run.out[0, :, 0])[4:8].max() > 1e-2
        assert_close(run.out[0, 8:, 0], other[8:])


# 2. Longformer


def test_a_pair_of_a_window_and_a_global_token_counts_once():
    inputs = arrays(6, heads=1, kv_heads=1, batch=1)
    run = simattn.run("dilated_window", **forward(inputs), window=(1, 1), global_tokens=(2,), arithmetic="float64")
    q, k, v = (inputs[name][0, :, 0].astype(np.float64) for name in "qkv")
    for row, keys in enumerate([[0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4, 5], [2, 3, 4], [2, 3, 4, 5], [2, 4, 5]]):
        weights = np.exp(q[row] @ k[keys].T / math.sqrt(8))
        assert_close(run.out[0, row, 0], weights @ v[keys] / weights.sum())


def test_each_head_has_its_dilation():
    inputs = arrays(15, heads=6, kv_heads=3)
    together = simattn.run("dilated_window", **forward(inputs), window=(2, 1), dilation=(1, 3, 1), global_tokens=(0, 7))
    for head, dilation in enumerate((1, 3, 1)):
        own = {"q": inputs["q"][:, :, 2 * head : 2 * head + 2], "k": inputs["k"][:, :, [head]]}
        own |= {"v": inputs["v"][:, :, [head]]}
        alone = simattn.run("dilated_window", **own, window=(2, 1), dilation=dilation, global_tokens=(0, 7))
        assert_same_bits(together.out[:, :, 2 * head : 2 * head + 2], alone.out)
        assert_same_bits(together.lse[:, 2 * head : 2 * head + 2], alone.lse)


def test_dilations_beyond_the_keys_are_alike():
    inputs = arrays(9)
    one, two = (simattn.run("dilated_window", **forward(inputs), window=(2, 1), dilation=d) for d in (9, 1 << 70))
    assert_equal_runs(one, two)
    assert_same_bits(one.out, np.repeat(inputs["v"], 2, axis=2))


def test_own_projections_that_are_the_shared_ones_change_nothing():
    inputs, rows = arrays(15), [0, 1, 9]
    shared = {"window": (2, 1), "dilation": 2, "global_tokens": (0, 1, 9), "arithmetic": "float64"}
    own = {"q_global": inputs["q"][:, rows], "k_global": inputs["k"], "v_global": inputs["v"]}
    one = simattn.run("dilated_window", **forward(inputs), **shared)
    two = simattn.run("dilated_window", **forward(inputs), **own, **shared, global_projections="own")
    assert_close(one.out, two.out)
    one = simattn.run_backward("dilated_window", **inputs, **shared)
    two = simattn.run_backward("dilated_window", **inputs, **own, **shared, global_projections="own")
    dq = two.dq.copy()
    assert (dq[:, rows] == 0).all()
    dq[:, rows] = two.results["dq_global"]
    assert_close(one.dq, dq)
    assert_close(one.dk, two.dk + two.results["dk_global"])
    assert_close(one.dv, two.dv + two.results["dv_global"])


@given(data=st.data())
def test_no_more_tiles_than_a_mask_needs_and_none_less(data):
    """Of placed queries and keys: a tile is visited just if its first key is no later than its last query."""
    length = data.draw(st.integers(1, 60))
    chosen = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    step, causal = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    first = data.draw(st.integers(0, length - 1))
    spread = Places(len(range(first, length, step)), first, step)
    for queries, keys in ((spread, Places.of(chosen)), (Places.of(chosen), Places(length))):
        relation = PlacedVisibility.between(queries, keys, causal=causal)
        for seen in (relation, relation.transposed):
            tile, other = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
            visited = set()
            full = clipped = 0
            for rows in all_rows(seen.rows, tile):
                counts = seen.tile_visits(rows, other)
                full, clipped = full + counts[0], clipped + counts[1]
                for index in range(rows.first, rows.first + rows.count):
                    visited |= {(index, column) for column in range(*seen.column_tiles(rows, index, other))}
            assert full + clipped == len(visited)
            assert clipped == sum(column >= seen.columns // other for _, column in visited)
            for row in range(seen.rows):
                for column in range(seen.columns):
                    query, key = seen.row_places.position(row), seen.column_places.position(column)
                    query, key = (key, query) if seen.rows_are_keys else (query, key)
                    assert not (not causal or key <= query) or (row // tile, column // other) in visited


@pytest.mark.parametrize("dilation", [1, 2, 3, 7])
def test_a_dilated_window_touches_the_tiles_of_its_classes(dilation):
    """Counted by hand: classes of ⌈(N − i) / dilation⌉ rows, each a sliding window of whole tiles."""
    length, left, tile, d = 96, 4, 4, 8
    counted = simattn.count(
        "dilated_window",
        q_len=length,
        head_dim=d,
        dtype="float32",
        window=(left, 0),
        dilation=dilation,
        tiles=(tile, tile),
    )
    keys = 0
    for offset in range(dilation):
        rows = math.ceil((length - offset) / dilation)
        for start in range(0, rows, tile):
            end = min(start + tile, rows)
            first = max(0, start - left) // tile * tile
            keys += min(rows, math.ceil(end / tile) * tile) - first
    assert counted.by_array["k"].hbm_read_bytes == 4 * d * keys
    assert counted.by_array["q"].hbm_read_bytes == counted.by_array["out"].hbm_write_bytes == 4 * d * length


def test_global_tokens_by_hand():
    """One tile of everything: local rows and global ones each once, windows' keys and global keys once."""
    length, first, d = 32, 3, 8
    counted = simattn.count(
        "dilated_window",
        q_len=length,
        head_dim=d,
        dtype="float32",
        window=(32, 32),
        global_tokens=first,
        tiles=(64, 64),
    )
    assert counted.by_array["q"].hbm_read_bytes == 4 * d * length
    assert counted.by_array["k"].hbm_read_bytes == 4 * d * (length + first + length)
    scattered = simattn.count(
        "dilated_window",
        q_len=length,
        head_dim=d,
        dtype="float32",
        window=(32, 32),
        global_tokens=(5, 9),
        tiles=(64, 64),
    )
    assert scattered.by_array["q"].hbm_read_bytes == scattered.by_array["out"].hbm_write_bytes == 4 * d * (length + 2)


@given(data=st.data())
@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
def test_compulsory_rows_are_those_of_the_masks(direction, data):
    problem = data.draw(problems_of(ALGORITHMS["dilated_window"], direction))
    given_tokens = problem.global_tokens
    tokens = range(given_tokens) if isinstance(given_tokens, int) else given_tokens
    apart = np.isin(np.arange(problem.first_position, problem.kv_len), tokens) & (problem.global_projections == "own")
    masks = np.array([problem.seen()[head % len(problem.seen())] for head in range(problem.heads)])
    moved = compulsory_traffic(problem, direction).by_array
    for ending, rows in (("", ~apart), ("_global", apart)):
        for name, seen in (("k", masks[:: problem.group_size, rows].any(axis=1)), ("q", masks[:, rows].any(axis=2))):
            least = moved.get(f"{name}{ending}", ArrayTraffic()).hbm_read_bytes
            assert least == problem.batch * problem.head_dim * problem.item_bytes * seen.sum(), name
    if direction == "backward" and problem.batch * problem.q_len:
        size = problem.batch * problem.q_len * problem.heads * problem.value_dim * problem.item_bytes
        assert moved["dout"].hbm_read_bytes == size


def test_a_dilated_step_must_read_every_other_key():
    problem = DilatedWindowProblem(q_len=1, kv_len=100, head_dim=8, dtype="float32", window=(60, 0), dilation=2)
    assert compulsory_traffic(problem, "decode").by_array["k"].hbm_read_bytes == 4 * 8 * 50
    wide = replace(problem, global_tokens=(1, 2, 3))  # the window holds token 1 and 3
    assert compulsory_traffic(wide, "decode").by_array["k"].hbm_read_bytes == 4 * 8 * 51


# 3. Rolling caches


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_a_rolling_cache_is_the_last_row_of_a_sliding_window(arithmetic):
    slots, tokens = 5, 17
    inputs = arrays(tokens)
    cache = {name: np.full((2, slots, 2, inputs[name].shape[3]), np.nan, np.float32) for name in "kv"}
    for position in range(tokens):
        for name in "kv":
            cache[name][:, position % slots] = inputs[name][:, position]
        so_far = {name: inputs[name][:, : position + 1] for name in "kv"}
        new = inputs["q"][:, position : position + 1]
        arguments = {"window": (slots - 1, 0), "arithmetic": arithmetic}
        for packed in (None, 1):
            step = simattn.run_decode(
                "sliding_window", new, **cache, **arguments, total_tokens=position + 1, packed_heads=packed
            )
            whole = simattn.run("sliding_window", new, **so_far, **arguments)
            tolerance = 1e-12 if arithmetic == "float64" else 1e-5
            np.testing.assert_allclose(step.out, whole.out, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(step.lse, whole.lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("total", "filled"), [(1, 1), (100, 100), (4095, 4095), (4096, 4096), (1 << 60, 4096)])
def test_a_decoding_step_reads_the_filled_slots_once_for_a_group(total, filled):
    shape = {"batch": 3, "heads": 32, "kv_heads": 8, "head_dim": 128, "q_len": 1, "window": (4095, 0)}
    counted = simattn.count("sliding_window", **shape, total_tokens=total, direction="decode")
    assert counted.by_array["k"].hbm_read_bytes == counted.by_array["v"].hbm_read_bytes == 3 * 8 * filled * 128 * 2
    assert counted.by_array["q"].hbm_read_bytes == counted.by_array["out"].hbm_write_bytes == 3 * 32 * 128 * 2
    assert counted.by_array["lse"].hbm_write_bytes == 3 * 32 * 4
    apart = simattn.count("sliding_window", **shape, total_tokens=total, direction="decode", packed_heads=1)
    assert apart.by_array["k"].hbm_read_bytes == 4 * counted.by_array["k"].hbm_read_bytes


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("own", [{}, {"dilation": 3}, {"dilation": (1, 3), "global_tokens": (0, 4, 5, 9)}], ids=str)
def test_a_dilated_step_is_the_last_row(own, causal):
    inputs = arrays(20)
    arguments = {"window": (3, 2), "causal": causal, "arithmetic": "float64", **own}
    whole = simattn.run("dilated_window", **forward(inputs), **arguments)
    step = simattn.run_decode("dilated_window", inputs["q"][:, -1:], inputs["k"], inputs["v"], **arguments)
    assert_close(step.out, whole.out[:, -1:])
    assert_close(step.lse, whole.lse[..., -1:])


def test_bytes_of_a_rolling_cache():
    mistral = CacheShape(layers=32, kv_heads=8, key_dim=128, dtype="float16")
    assert mistral.rolling_bytes(window=4096) == 32 * 8 * 2 * 128 * 2 * 4096
    assert mistral.rolling_bytes(window=4096, length=10, batch=3) == 3 * 10 * mistral.bytes_per_token
    assert mistral.rolling_bytes(window=4096, length=1 << 50) == mistral.rolling_bytes(window=4096)
    for arguments, words in (({"window": 0}, "window=0"), ({"window": 4, "length": -1}, "length=-1")):
        with pytest.raises(ValueError, match=words):
            mistral.rolling_bytes(**arguments)


# 4. Reach


def test_receptive_field():
    assert receptive_field(4, (4095, 0)) == (4 * 4095, 0) == (16_380, 0)
    assert receptive_field(3, (2, 5), dilation=4) == (24, 60)
    assert receptive_field(3, (2, 5), dilation=4, causal=True) == (24, 0)
    for arguments, words in (
        ((0, (1, 0)), "layers=0"),
        ((1, None), "window=None"),
        ((1, (-1, 0)), r"window=\(-1, 0\)"),
    ):
        with pytest.raises(ValueError, match=words):
            receptive_field(*arguments)


@pytest.mark.parametrize(("layers", "window", "dilation"), [(1, 4, 1), (3, 4, 1), (4, 2, 1), (2, 3, 3)])
def test_layers_reach_as_far_as_is_said_and_no_further(layers, window, dilation):
    length = 40
    reach, _ = receptive_field(layers, (window - 1, 0), dilation=dilation)
    x = np.random.default_rng(0).standard_normal((1, length, 1, 4))

    def stack(tokens):
        for _ in range(layers):
            run = simattn.run(
                "dilated_window",
                *(3 * [tokens.astype(np.float32)]),
                window=(window - 1, 0),
                dilation=dilation,
                arithmetic="float64",
            )
            tokens = run.out
        return tokens[0, -1, 0]

    def changes(distance):
        moved = x.copy()
        moved[0, length - 1 - distance] += 1
        return bool((stack(moved) != stack(x)).any())

    assert changes(reach)
    assert not any(changes(distance) for distance in range(reach + 1, length))


# 5. Overlap by hand


def test_partial_outputs_by_hand():
    """12 tokens in windows of 8 that share 4: a window's queries once, partial outputs written and read."""
    shape = {"q_len": 12, "head_dim": 8, "dtype": "bfloat16", "window_len": 8, "overlap": 4, "tiles": (4, 4)}
    counted = simattn.count("overlapped_window", **shape).by_array
    assert counted["q"].hbm_read_bytes == 2 * 8 * (8 + 8)
    # Window 0: two tiles see 8 keys each. Window 1: its last 4 tokens see 8 keys, its first 4 the last 4.
    assert counted["k"].hbm_read_bytes == 2 * 8 * (2 * 8 + 8 + 4)
    assert counted["out_partial"].hbm_write_bytes == counted["out_partial"].hbm_read_bytes == 4 * 8 * (8 + 8)
    assert counted["lse_partial"].hbm_write_bytes == counted["lse_partial"].hbm_read_bytes == 4 * (8 + 8)
    assert counted["out"].hbm_write_bytes == 2 * 8 * 12
    causal = simattn.count("overlapped_window", **shape, causal=True).by_array
    assert set(causal) & {"out_partial", "lse_partial"} == set()
    # Window 0: tiles see 4 and 8 keys. Window 1: its last 4 tokens see 8 keys.
    assert causal["k"].hbm_read_bytes == 2 * 8 * (4 + 8 + 8)


@given(length=st.integers(0, 70), window_len=st.integers(1, 20), overlap=st.integers(0, 19), tile=st.integers(1, 20))
def test_tiles_of_the_merge_walked_one_by_one(length, window_len, overlap, tile):
    overlap = min(overlap, window_len - 1)
    problem = OverlappedWindowProblem(q_len=length, window_len=window_len, overlap=overlap)
    starts = [0] if length else []
    while starts and starts[-1] + window_len < length:
        starts.append(starts[-1] + window_len - overlap)
    assert problem.windows == len(starts)
    loaded = 0
    for first in range(0, length, tile):
        end = min(first + tile, length)
        loaded += (end - first) * sum(start < end and start + window_len > first for start in starts)
    if starts:
        assert overlapped_window.merged_rows(problem, tile) == loaded


# 6. What is not seen does not matter


@given(data=st.data(), special=st.sampled_from((np.nan, np.inf, -np.inf)))
@pytest.mark.parametrize("name", FAMILY)
def test_keys_that_a_row_does_not_see_change_nothing(name, data, special):
    problem = data.draw(problems_of(ALGORITHMS[name], "forward", min_len=1))
    inputs = data.draw(attention_inputs(problem, direction="forward", kinds=["normal"]))
    key = data.draw(st.integers(0, problem.kv_len - 1))
    changed = {other: array.copy() for other, array in inputs.items()}
    for other in {"k", "v", "k_global", "v_global"} & set(changed):
        changed[other][:, key] = special
    before, after = (simattn.run(name, **some, **semantics(problem), tiles=(4, 3)) for some in (inputs, changed))
    rows = ~problem.visible_elements()[:, key]
    assert_same_bits(after.out[:, rows], before.out[:, rows])
    expected = ALGORITHMS[name].reference(
        problem, {other: array.astype(np.float64) for other, array in changed.items()}
    )
    assert np.isfinite(expected["out"][:, rows]).all()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shape", [{"batch": 0, "q_len": 3}, {"q_len": 0}, {"q_len": 1}], ids=str)
def test_empty_and_single(name, shape):
    own = {"overlapped_window": {"window_len": 2, "overlap": 1}}.get(name, {"window": (2, 1)})
    inputs = arrays(shape["q_len"], batch=shape.get("batch", 1))
    run = simattn.run(name, **forward(inputs), **own)
    assert_same_bits(run.out, np.repeat(inputs["v"], 2, axis=2) if shape["q_len"] == 1 else inputs["dout"])
    gradients = simattn.run_backward(name, **inputs, **own)
    assert [gradients.results[f"d{key}"].shape for key in "qkv"] == [inputs[key].shape for key in "qkv"]


# 7. Plans and bad input


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("plan", ["gpu", "fit", "paper"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_plan_runs_within_the_capacity(name, plan, head_dim):
    own = {"overlapped_window": {"window_len": 300, "overlap": 200}}.get(name, {"window": (255, 0)})
    for direction in ALGORITHMS[name].directions:
        lengths = {"q_len": 1, "kv_len": 256} if direction == "decode" else {"q_len": 1000}
        more = {"total_tokens": 1000} if (name, direction) == ("sliding_window", "decode") else {}
        run = simattn.profile(
            name, heads=4, kv_heads=1, head_dim=head_dim, **lengths, **own, **more, plan=plan, direction=direction
        )
        assert run.peak_sram_bytes + run.peak_register_bytes > 0


SLIDING, DILATED, OVERLAPPED = FAMILY
WHOLE = simattn.BlockMask.from_array(np.ones((1, 1), bool), q_block=8, kv_block=8)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"),
    [
        (SLIDING, {"window": None}, ValueError, r"window=None: expected a pair \(left, right\) of integers"),
        (SLIDING, {"window": (3, None)}, ValueError, r"window=\(3, None\): expected a pair"),
        (SLIDING, {"window": (-1, 0)}, ValueError, r"window=\(-1, 0\): expected counts of at least 0"),
        (SLIDING, {"window": 3}, TypeError, "window=3: expected"),
        (SLIDING, {"block_mask": WHOLE}, ValueError, "block_mask is given: expected None"),
        (SLIDING, {"dtype": "float8_e4m3fn"}, ValueError, "dtype='float8_e4m3fn': expected float32, float16"),
        (SLIDING, {"total_tokens": 8}, ValueError, "q_len=8 with total_tokens=8: expected 1"),
        (SLIDING, {"q_len": 1, "total_tokens": 0}, ValueError, "total_tokens=0: expected an integer of at least 1"),
        (SLIDING, {"q_len": 1, "total_tokens": 5, "kv_len": 8}, ValueError, "kv_len=8 .*expected the 4 slots"),
        (SLIDING, {"q_len": 1, "total_tokens": 5}, ValueError, "total_tokens=5 with direction='forward': expected N"),
        (SLIDING, {"direction": "decode"}, ValueError, "total_tokens=None with direction='decode': expected the num"),
        (SLIDING, {"packed_heads": 0}, ValueError, "packed_heads=0: expected an integer of at least 1"),
        (SLIDING, {"q_len": 1, "total_tokens": 5, "direction": "decode", "packed_heads": 3, "heads": 4, "kv_heads": 1},
         ValueError, "packed_heads=3: expected a divisor of the 4"),
        (DILATED, {"window": None}, ValueError, r"window=None: expected a pair"),
        (DILATED, {"kv_len": 7}, ValueError, "q_len=8: expected at most kv_len=7"),
        (DILATED, {"dilation": 0}, ValueError, "dilation=0: expected an integer of at least 1"),
        (DILATED, {"dilation": 1.5}, TypeError, "dilation=1.5 is a float: expected an integer"),
        (DILATED, {"dilation": (1, 2)}, ValueError, "dilation has 2 numbers: expected one for each of kv_heads=1"),
        (DILATED, {"dilation": (0,)}, ValueError, r"dilation\[0\]=0: expected an integer of at least 1"),
        (DILATED, {"global_tokens": 9}, ValueError, "global_tokens=9: expected at least 0 and at most kv_len=8"),
        (DILATED, {"global_tokens": -1}, ValueError, "global_tokens=-1: expected at least 0"),
        (DILATED, {"global_tokens": "all"}, TypeError, "global_tokens='all': expected a number of first tokens"),
        (DILATED, {"global_tokens": (3, 3)}, ValueError, r"global_tokens\[1\]=3 after 3: expected ascending"),
        (DILATED, {"global_tokens": (3, 8)}, ValueError, r"global_tokens\[1\]=8: expected positions .* below kv_len=8"),
        (DILATED, {"global_tokens": (-1, 3)}, ValueError, r"global_tokens\[0\]=-1: expected positions from 0"),
        (DILATED, {"global_tokens": (0.5,)}, TypeError, "global_tokens has shape .* float64: expected a row of"),
        (DILATED, {"global_tokens": ((1,), (2, 3))}, TypeError, r"global_tokens=\(\(1,\), \(2, 3\)\): expected a row"),
        (DILATED, {"global_tokens": ((1, 2),)}, TypeError, r"global_tokens has shape \(1, 2\) .*: expected a row"),
        (DILATED, {"global_projections": "none"}, ValueError, "global_projections='none': expected one of"),
        (DILATED, {"direction": "decode"}, ValueError, "q_len=8 with direction='decode': expected 1"),
        (DILATED, {"dq": "deterministic"}, ValueError, "dq='deterministic': expected one of"),
        (DILATED, {"repeat_kv": True}, ValueError, "repeat_kv=True: expected one of"),
        (OVERLAPPED, {"window": (3, 0)}, ValueError, r"window=\(3, 0\): expected None"),
        (OVERLAPPED, {"window_len": None}, ValueError, "window_len=None: expected the number of tokens"),
        (OVERLAPPED, {"window_len": 4.0}, TypeError, "window_len=4.0 is a float: expected an integer"),
        (OVERLAPPED, {"window_len": 0}, ValueError, "window_len=0: expected an integer of at least 1"),
        (OVERLAPPED, {"overlap": 4}, ValueError, "overlap=4: expected fewer tokens than window_len=4"),
        (OVERLAPPED, {"overlap": -1}, ValueError, "overlap=-1: expected an integer of at least 0"),
        (OVERLAPPED, {"pairs": "twice"}, ValueError, "pairs='twice': expected one of"),
        (OVERLAPPED, {"kv_len": 9}, ValueError, "kv_len=9: expected q_len=8"),
        (OVERLAPPED, {"direction": "decode"}, ValueError, "direction='decode' of overlapped_window: expected one of"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(name, arguments, error, words):
    own = {"overlapped_window": {"window_len": 4, "overlap": 1}}.get(name, {"window": (3, 0)})
    with pytest.raises(error, match=words):
        simattn.count(name, **{"q_len": 8, **own, **arguments})


def test_numpy_integers_and_arrays_are_taken():
    shape = {"q_len": 8, "window": (np.int64(3), np.int32(0))}
    one = DilatedWindowProblem(**shape, dilation=np.array([2]), global_tokens=np.array([0, 5]))
    assert (one.dilation, one.global_tokens) == ((2,), (0, 5))
    assert DilatedWindowProblem(**shape, global_tokens=np.int64(2)).global_tokens == 2
    assert SlidingWindowProblem(**shape).window == (3, 0)
    assert (sliding_window.ALGORITHM.name, dilated_window.ALGORITHM.name) == FAMILY[:2]


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        (
            DILATED,
            ["dilation=4,2", "global_tokens=3,7"],
            {"window": (9, 0), "dilation": (4, 2), "global_tokens": (3, 7)},
        ),
        (OVERLAPPED, ["window_len=64", "overlap=32"], {"window_len": 64, "overlap": 32}),
    ],
)
def test_the_command_line_takes_their_arguments(name, options, arguments, capsys):
    command = ["count", name, "--q-len", "1000", "--heads", "2", "--json"]
    command += ["--window", "9,0"] if "window" in arguments else []
    assert main([*command, *(word for option in options for word in ("--option", option))]) == 0
    counted = simattn.count(name, q_len=1000, heads=2, **arguments)
    assert json.loads(capsys.readouterr().out)["traffic"] == list(counted.rows())
