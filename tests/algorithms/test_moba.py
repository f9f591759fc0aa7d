"""Mixture of Block Attention: what it equals, how its choice is made, and what its parts move."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simattn
from simattn.algorithms import ALGORITHMS, moba
from simattn.algorithms.moba import BlockHistogram, MobaProblem, choose_blocks
from simattn.arithmetic.formats import numpy_dtype
from simattn.bounds import compulsory_traffic
from simattn.selection import BlockSelection
from simattn.testing import assert_same_bits, attention_problems, problems_of, reference_attention

BACKWARD = ("dq", "dk", "dv")


def drawn(seed=0, *, batch=1, length=23, heads=2, kv_heads=1, head_dim=8, value_dim=8, dtype="float32", integers=False):
    """q, k, v and dout."""
    generator = np.random.default_rng(seed)
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim), (heads, value_dim)]
    make = (lambda shape: generator.integers(-2, 3, shape)) if integers else generator.standard_normal
    return [np.asarray(make((batch, length, *shape))).astype(numpy_dtype(dtype)) for shape in shapes]


@st.composite
def shapes(draw):
    """Arguments of :func:`drawn`."""
    kv_heads = draw(st.integers(1, 2))
    return {
        "seed": draw(st.integers(0, 1000)),
        "batch": draw(st.integers(1, 2)),
        "length": draw(st.integers(1, 40)),
        "heads": kv_heads * draw(st.integers(1, 2)),
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from((3, 8))),
        "value_dim": draw(st.sampled_from((5, 8))),
        "dtype": draw(st.sampled_from(("float32", "bfloat16"))),
    }


# What it equals


@given(shape=shapes(), block_size=st.integers(1, 12), arithmetic=st.sampled_from(("float32", "float64")))
def test_full_attention_is_flash2_bit_for_bit(shape, block_size, arithmetic):
    q, k, v, dout = drawn(**shape)
    own = {"full_attention": True, "block_size": block_size}
    for call, inputs, names in (
        (simattn.run, (q, k, v), ("out", "lse")),
        (simattn.run_backward, (q, k, v, dout), BACKWARD),
    ):
        ours, theirs = (
            call(name, *inputs, arithmetic=arithmetic, causal=True, **options)
            for name, options in (("moba", own), ("flash2", {}))
        )
        assert ours.traffic == theirs.traffic
        assert ours.operations == theirs.operations
        assert ours.hbm_bytes_by_role == theirs.hbm_bytes_by_role
        assert ours.plan.tiles == theirs.plan.tiles
        for name in names:
            assert_same_bits(getattr(ours, name), getattr(theirs, name), name=name)


@given(shape=shapes(), block_size=st.integers(1, 12), more=st.integers(0, 2))
def test_as_many_choices_as_blocks_are_dense_causal_attention(shape, block_size, more):
    q, k, v, dout = drawn(**shape)
    own = {"block_size": block_size, "top_k": math.ceil(q.shape[1] / block_size) + more, "arithmetic": "float64"}
    ours = simattn.run("moba", q, k, v, **own)
    dense = simattn.run("flash2", q, k, v, causal=True, arithmetic="float64")
    np.testing.assert_allclose(ours.out, dense.out, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(ours.lse, dense.lse, rtol=1e-11, atol=1e-11)
    ours = simattn.run_backward("moba", q, k, v, dout, **own)
    dense = simattn.run_backward("flash2", q, k, v, dout, causal=True, arithmetic="float64")
    for name in BACKWARD:
        np.testing.assert_allclose(getattr(ours, name), getattr(dense, name), rtol=1e-9, atol=1e-10)


@given(shape=shapes(), block_size=st.integers(1, 12))
def test_one_block_is_attention_inside_the_blocks_and_nothing_else(shape, block_size):
    q, k, v, dout = drawn(**shape)
    own = {"block_size": block_size, "top_k": 1}
    ours, gradients = simattn.run("moba", q, k, v, **own), simattn.run_backward("moba", q, k, v, dout, **own)
    tiles = {"tiles": ours.plan.tiles}
    traffic = simattn.Traffic()
    for start in range(0, q.shape[1], block_size):
        rows = slice(start, start + block_size)
        inside = simattn.run("flash2", q[:, rows], k[:, rows], v[:, rows], causal=True, **tiles)
        assert_same_bits(ours.out[:, rows], inside.out)
        assert_same_bits(ours.lse[..., rows], inside.lse)
        traffic += inside.traffic
        back = simattn.run_backward("flash2", *(array[:, rows] for array in (q, k, v, dout)), causal=True)
        for name in BACKWARD:
            np.testing.assert_allclose(
                getattr(gradients, name)[:, rows].astype(float), getattr(back, name).astype(float), rtol=0.02, atol=1e-3
            )
    assert ours.traffic.global_only() == traffic.global_only()


@given(shape=shapes(), block_size=st.integers(1, 12), top_k=st.integers(1, 6))
def test_merged_parts_are_one_softmax_over_all_that_is_chosen(shape, block_size, top_k):
    q, k, v, _ = drawn(**shape)
    run = simattn.run("moba", q, k, v, block_size=block_size, top_k=top_k, arithmetic="float64")
    indices = choose_blocks(run.problem, {"q": q.astype(float), "k": k.astype(float)})
    group = run.problem.group_size
    for entry, row, head in np.ndindex(q.shape[:3]):
        own = row // block_size
        blocks = [*indices[entry, head, row][indices[entry, head, row] >= 0], own]
        assert len(blocks) == min(top_k, own + 1)
        keys = [key for block in blocks for key in range(block * block_size, min(row + 1, (block + 1) * block_size))]
        wide = [array.astype(float) for array in (q[entry, row, head], k[entry, keys, head // group])]
        scores = run.problem.scale * (wide[1] @ wide[0])
        weights = np.exp(scores - scores.max())
        expected = weights @ v[entry, keys, head // group].astype(float) / weights.sum()
        np.testing.assert_allclose(run.out[entry, row, head], expected, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(
            run.lse[entry, head, row], scores.max() + np.log(weights.sum()), rtol=1e-9, atol=1e-9
        )


@given(shape=shapes(), block_size=st.integers(1, 12), top_k=st.integers(1, 6))
def test_a_given_choice_is_the_choice_that_is_made(shape, block_size, top_k):
    q, k, v, dout = drawn(**{**shape, "dtype": "float32"}, integers=True)
    block_size = 1 << block_size.bit_length()  # their means are exact
    own = {"block_size": block_size, "top_k": top_k}
    for call, inputs, names in (
        (simattn.run, (q, k, v), ("out", "lse")),
        (simattn.run_backward, (q, k, v, dout), BACKWARD),
    ):
        made = call("moba", *inputs, **own)
        settled = made.problem.settled({"q": q.astype(float), "k": k.astype(float)})
        taken = call("moba", *inputs, **own, selection=settled.selection)
        assert made.traffic == taken.traffic
        for name in names:
            assert_same_bits(getattr(made, name), getattr(taken, name), name=name)


@given(shape=shapes(), block_size=st.integers(1, 12), top_k=st.integers(1, 6))
def test_the_last_decoding_step_is_the_last_row_of_the_forward_pass(shape, block_size, top_k):
    q, k, v, _ = drawn(**shape)
    own = {"block_size": block_size, "top_k": top_k, "arithmetic": "float64"}
    whole = simattn.run("moba", q, k, v, **own)
    means = given_means(k, block_size) if whole.problem.history else {}
    new = min(3, q.shape[1])
    step = simattn.run_decode("moba", q[:, -new:], k, v, **means, **own)
    np.testing.assert_allclose(step.out, whole.out[:, -new:], rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(step.lse, whole.lse[..., -new:], rtol=1e-10, atol=1e-11)


def given_means(k, block_size):
    """The means of all blocks but the last, in float64."""
    blocks = math.ceil(k.shape[1] / block_size) - 1
    split = k[:, : blocks * block_size].astype(float)
    return {"block_means": split.reshape(k.shape[0], blocks, block_size, *k.shape[2:]).mean(axis=2)}


# The choice


def test_equal_scores_choose_lower_blocks():
    """All keys are equal, so are all scores: query 4 of blocks of one key takes block 0 and 1 beside its own."""
    ones = np.ones((1, 5, 1, 4), np.float32)
    values = np.arange(5, dtype=np.float32).reshape(1, 5, 1, 1)
    run = simattn.run("moba", ones, ones, values, block_size=1, top_k=3)
    expected = [0, 1 / 2, (0 + 1 + 2) / 3, (0 + 1 + 3) / 3, (0 + 1 + 4) / 3]
    np.testing.assert_allclose(run.out[0, :, 0, 0], expected, rtol=1e-6)


@given(shape=shapes(), tiles=st.tuples(st.integers(1, 9), st.integers(1, 5)))
def test_ties_are_broken_alike_whatever_the_tiles(shape, tiles):
    q, k, v, _ = drawn(**{**shape, "dtype": "float32"}, integers=True)
    runs = [simattn.run("moba", q, k, v, block_size=2, top_k=3, tiles=sizes) for sizes in (tiles, (64, 64))]
    np.testing.assert_allclose(runs[0].out, runs[1].out, rtol=1e-5, atol=1e-5)
    for run in runs:
        expected = moba.reference(run.problem, {"q": q, "k": k, "v": v})["out"]
        np.testing.assert_allclose(run.out, expected, rtol=1e-5, atol=1e-5)


def test_the_choice_is_that_of_the_unscaled_product_with_the_mean():
    """Blocks of two keys with means 1, 3, 2 in one dimension: a query of 1 prefers 3, one of −1 prefers 1."""
    k = np.float32([0, 2, 3, 3, 1, 3, 0, 0]).reshape(1, 8, 1, 1)
    q = np.ones((1, 8, 2, 1), np.float32)
    q[:, :, 1] = -1
    indices = choose_blocks(
        MobaProblem(heads=2, kv_heads=1, q_len=8, head_dim=1, block_size=2, top_k=2), {"q": q, "k": k}
    )
    np.testing.assert_array_equal(indices[0, 0, ::2, 0], [-1, 0, 1, 1])
    np.testing.assert_array_equal(indices[0, 1, ::2, 0], [-1, 0, 0, 0])


@given(shape=shapes(), block_size=st.integers(1, 9), top_k=st.integers(1, 6))
def test_the_choice_is_that_of_a_sorted_list(shape, block_size, top_k):
    q, k, _, _ = drawn(**{**shape, "dtype": "float32"}, integers=True)
    q, k, group = q.astype(float), k.astype(float), shape["heads"] // shape["kv_heads"]
    arguments = {name: shape[name] for name in ("batch", "heads", "kv_heads", "head_dim")}
    problem = MobaProblem(**arguments, q_len=shape["length"], block_size=block_size, top_k=top_k)
    found = choose_blocks(problem, {"q": q, "k": k})
    for entry, row, head in np.ndindex(q.shape[:3]):
        blocks = range(row // block_size)
        keys = [k[entry, block_size * block : block_size * (block + 1), head // group] for block in blocks]
        scores = [float(q[entry, row, head] @ rows.mean(axis=0)) for rows in keys]
        best = sorted(sorted(blocks, key=lambda block: -scores[block])[: top_k - 1])
        assert [index for index in found[entry, head, row].tolist() if index >= 0] == best


def test_blocks_of_nan_come_last_and_are_not_seen_when_not_chosen():
    q, k, v, _ = drawn(length=32, heads=1)
    own = {"block_size": 8, "top_k": 2}
    clean = simattn.run("moba", q, k, v, **own)
    spoilt = k.copy()
    spoilt[:, 8:16] = np.nan
    run = simattn.run("moba", q, spoilt, v, **own)
    # Block 1 is the only choice of nobody: rows of block 2 and 3 take another, and only its own rows see it.
    assert np.isnan(run.out[:, 8:16]).all()
    assert np.isfinite(np.delete(run.out, range(8, 16), axis=1)).all()
    assert_same_bits(run.out[:, :8], clean.out[:, :8])
    expected = moba.reference(run.problem, {"q": q, "k": spoilt, "v": v})["out"]
    np.testing.assert_allclose(run.out, expected, rtol=1e-5, atol=1e-5)


def test_a_block_is_chosen_only_once_it_has_ended():
    selection = MobaProblem(q_len=20, block_size=4, top_k=99).draw_selection(np.random.default_rng(0))
    for row in range(20):
        found = selection.indices[0, 0, row]
        assert found[found >= 0].tolist() == list(range(row // 4))


# What is counted


def test_hand_counted_forward():
    """Three blocks of 4, 4 and 2 rows, top 2, tiles of 4 queries and 2 keys; one head, d = 8, d_v = 4, float32.

    Blocks 1 and 2 choose one block each: block 0 by rows 4 … 7 and rows 8, 9, block 1 by none.
    """
    d, dv, item = 8, 4, 4
    indices = np.full((1, 1, 10, 1), -1, np.int32)
    indices[0, 0, 4:] = 0
    traffic = simattn.count(
        "moba",
        q_len=10,
        head_dim=d,
        value_dim=dv,
        dtype="float32",
        block_size=4,
        top_k=2,
        selection=BlockSelection(indices, 4),
        tiles=(4, 2),
    ).by_array
    choices = 6
    lists = 2  # 6 queries in tiles of 4 and 2
    # Means of two blocks; query tiles 1 and 2 load both means in one tile of two, tile 0 none.
    inside = 4 + 4 + 2  # keys that the one query tile of each block sees of it
    assert traffic["k"].hbm_read_bytes == (8 + inside + lists * 4) * d * item
    assert traffic["v"].hbm_read_bytes == (inside + lists * 4) * dv * item
    assert traffic["block_means"].hbm_write_bytes == 2 * d * 4
    assert traffic["block_means"].hbm_read_bytes == 2 * 2 * d * 4
    assert traffic["q"].hbm_read_bytes == (10 + 10 + choices) * d * item
    assert traffic["chosen_blocks"].hbm_write_bytes == 10 * 4
    assert traffic["chosen_blocks"].hbm_read_bytes == 2 * 10 * 4
    assert traffic["query_lists"].hbm_write_bytes == traffic["query_lists"].hbm_read_bytes == choices * 4
    assert traffic["list_offsets"].hbm_write_bytes == 3 * 4
    assert traffic["list_offsets"].hbm_read_bytes == lists * 2 * 4
    assert traffic["local_out"].hbm_write_bytes == traffic["local_out"].hbm_read_bytes == 10 * dv * 4
    assert traffic["history_out"].hbm_write_bytes == traffic["history_out"].hbm_read_bytes == choices * dv * 4
    assert traffic["history_lse"].hbm_write_bytes == traffic["history_lse"].hbm_read_bytes == choices * 4
    assert traffic["out"].hbm_write_bytes == 10 * dv * item
    assert traffic["lse"].hbm_write_bytes == 10 * 4


def test_hand_counted_decode():
    """Position 21 in blocks of 8: its own block up to its sixth row, and one of the two before, for each query head."""
    traffic = simattn.count(
        "moba", heads=4, kv_heads=2, q_len=1, kv_len=22, head_dim=16, block_size=8, top_k=2, direction="decode"
    ).by_array
    assert traffic["k"].hbm_read_bytes == 4 * (8 + 6) * 16 * 2
    assert traffic["v"].hbm_read_bytes == 4 * (8 + 6) * 16 * 2
    assert traffic["block_means"].hbm_read_bytes == 4 * 2 * 16 * 4
    assert traffic["q"].hbm_read_bytes == 4 * 2 * 16 * 2
    assert traffic["chosen_blocks"].hbm_write_bytes == traffic["chosen_blocks"].hbm_read_bytes == 4 * 4
    assert traffic["out"].hbm_write_bytes == 4 * 16 * 2


@given(data=st.data())
@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
def test_no_program_moves_less_than_every_implementation_must(direction, data):
    problem = data.draw(problems_of(ALGORITHMS["moba"], direction))
    arguments = {item.name: getattr(problem, item.name) for item in fields(problem)}
    counted = simattn.count("moba", **arguments, direction=direction).by_array
    for name, least in compulsory_traffic(problem, direction).by_array.items():
        for counter, nbytes in vars(least).items():
            assert nbytes <= getattr(counted[name], counter), (name, counter)


def test_what_every_decoding_step_reads():
    """Positions 20 and 21 in blocks of 8: at least their own block's 6 keys and one whole block that the last chose."""
    step = MobaProblem(heads=4, kv_heads=2, q_len=2, kv_len=22, head_dim=16, block_size=8, top_k=2)
    moved = compulsory_traffic(step, "decode").by_array
    assert moved["k"].hbm_read_bytes == moved["v"].hbm_read_bytes == 2 * (8 + 6) * 16 * 2
    assert moved["block_means"].hbm_read_bytes == 2 * 2 * 16 * 4
    # Positions 5 to 21 have keys of all three blocks as their own.
    assert compulsory_traffic(replace(step, q_len=17), "decode").by_array["k"].hbm_read_bytes == 2 * 22 * 16 * 2
    assert not compulsory_traffic(replace(step, q_len=0), "decode").hbm_bytes


@given(data=st.data(), block_size=st.integers(1, 12), top_k=st.integers(1, 6))
def test_a_histogram_counts_as_its_choice_does(data, block_size, top_k):
    shape = data.draw(attention_problems(self_attention=True, windowed=False, block_sparse=False, min_len=1))
    arguments = {name: getattr(shape, name) for name in ("batch", "heads", "kv_heads", "q_len", "head_dim")}
    problem = MobaProblem(**arguments, block_size=block_size, top_k=top_k)
    selection = problem.draw_selection(np.random.default_rng(0))
    tiles = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    own = {"block_size": block_size, "top_k": top_k, "tiles": tiles}
    for direction in ("forward", "backward"):
        one, two = (
            simattn.profile("moba", **arguments, **own, selection=choice, direction=direction)
            for choice in (selection, BlockHistogram.of(selection, problem.blocks))
        )
        assert one.traffic == two.traffic
        assert one.operations == two.operations


@given(
    q_len=st.integers(0, 300),
    heads=st.integers(1, 3),
    block=st.integers(1, 30),
    top_k=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_random_and_even_histograms_are_possible(q_len, heads, block, top_k, seed):
    problem = MobaProblem(heads=heads, q_len=q_len, block_size=block, top_k=top_k)
    made = BlockHistogram.random(heads=heads, q_len=q_len, block=block, top_k=top_k, seed=seed)
    again = BlockHistogram.random(heads=heads, q_len=q_len, block=block, top_k=top_k, seed=seed)
    np.testing.assert_array_equal(made.counts, again.counts)
    for histogram in (made, BlockHistogram.even(problem)):
        replace(problem, selection=histogram)  # raises if it is none of the problem's
        assert (histogram.counts.sum(axis=-1) == problem.choices).all()


def test_a_random_histogram_is_like_those_of_random_choices():
    problem = MobaProblem(heads=64, q_len=512, block_size=32, top_k=4)
    drawn_ones = BlockHistogram.of(problem.draw_selection(np.random.default_rng(0)), problem.blocks).counts[0]
    made = BlockHistogram.random(heads=64, q_len=512, block=32, top_k=4, seed=0).counts[0]
    np.testing.assert_allclose(made.mean(axis=0), drawn_ones.mean(axis=0), atol=6)
    np.testing.assert_allclose(made.std(axis=0), drawn_ones.std(axis=0), rtol=0.5, atol=1)


def test_all_choices_of_all_blocks_need_no_histogram():
    problem = MobaProblem(q_len=22, block_size=5, top_k=99)
    selection = problem.draw_selection(np.random.default_rng(0))
    np.testing.assert_array_equal(
        BlockHistogram.even(problem).counts, BlockHistogram.of(selection, problem.blocks).counts
    )
    np.testing.assert_array_equal(BlockHistogram.even(problem).counts, [[[17, 12, 7, 2, 0]]])


# Bad input


def given_selection(*rows):
    return BlockSelection(np.array(rows, np.int32).reshape(1, 1, len(rows), -1), 2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"block_size": 0}, ValueError, "block_size=0: expected an integer of at least 1"),
        ({"top_k": 0}, ValueError, "top_k=0: expected an integer of at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k=1.5 is a float: expected an integer"),
        (
            {"full_attention": True, "selection": given_selection(-1, -1, 0, 0, 1, 1)},
            ValueError,
            r"selection=BlockSelection\(.*\) with full_attention=True: expected None",
        ),
        ({"full_attention": 1}, TypeError, "full_attention=1: expected a bool"),
        ({"causal": "x"}, TypeError, "causal='x': expected a bool; moba is causal"),
        ({"kv_len": 9}, ValueError, "kv_len=9 in a forward pass: expected q_len=6"),
        ({"kv_len": 3}, ValueError, "kv_len=3: expected at least q_len=6"),
        ({"window": (3, 0)}, ValueError, r"window=\(3, 0\): expected None"),
        ({"dtype": "float8_e4m3fn"}, ValueError, "dtype='float8_e4m3fn': expected float32"),
        ({"dq": "deterministic"}, ValueError, "dq='deterministic': expected one of"),
        ({"selection": [1]}, TypeError, "selection is a list: expected None, a BlockSelection or a BlockHistogram"),
        (
            {"selection": BlockSelection(np.zeros((1, 1, 6, 1), np.int32), 3)},
            ValueError,
            "selection has blocks of 3 keys: expected block_size=2",
        ),
        (
            {"selection": given_selection(-1, -1, 0)},
            ValueError,
            r"indices of shape \(1, 1, 3, 1\): expected \(1, 1, 6, 1\)",
        ),
        (
            {"selection": given_selection(-1, -1, 0, 0, 1, 2)},
            ValueError,
            r"selection chooses \[2\] for query 5 of head 0 of entry 0: expected 1 blocks below its own, 2",
        ),
        (
            {"selection": given_selection(-1, -1, 0, -1, 1, 1)},
            ValueError,
            r"selection chooses \[-1\] for query 3 of head 0 of entry 0: expected 1 blocks below its own, 1",
        ),
        (
            {"selection": BlockHistogram(np.ones((1, 1, 2), int), 2)},
            ValueError,
            r"counts of shape \(1, 1, 2\): expected \(1, 1, 3\)",
        ),
        (
            {"selection": BlockHistogram(np.array([[[1, 1, 1]]]), 2)},
            ValueError,
            r"selection counts \[3\] choices of a head's queries: expected 4",
        ),
        (
            {"selection": BlockHistogram(np.array([[[1, 3, 0]]]), 2)},
            ValueError,
            "of a block at most one of each query in later blocks",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        simattn.count("moba", **{"q_len": 6, "block_size": 2, "top_k": 2, **arguments})


@pytest.mark.parametrize(
    ("counts", "block", "error", "words"),
    [
        (np.zeros((1, 2, 3)), 4, TypeError, "and dtype float64: expected integers"),
        (np.zeros((1, 2), int), 4, TypeError, r"shape \(1, 2\)"),
        (np.full((1, 1, 2), -1), 4, ValueError, "counts has -1"),
        (np.zeros((1, 1, 1), int), 0, ValueError, "block=0: expected an integer of at least 1"),
    ],
)
def test_bad_histograms_are_named(counts, block, error, words):
    with pytest.raises(error, match=words):
        BlockHistogram(counts, block)


@pytest.mark.parametrize("call", [simattn.run, simattn.run_decode], ids=["run", "run_decode"])
def test_a_histogram_does_not_suffice_to_compute(call):
    q, k, v, _ = drawn(length=6)
    counts = BlockHistogram(np.array([[[2, 2, 0]]] * 2).reshape(1, 2, 3), 2)
    means = {} if call is simattn.run else {"block_means": np.zeros((1, 2, 1, 8), np.float32)}
    with pytest.raises(ValueError, match="selection is a BlockHistogram, which suffices to count: expected None"):
        call("moba", q, k, v, block_size=2, top_k=2, selection=counts, **means)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"block": 0}, "block=0: expected an integer of at least 1"),
        ({"top_k": 0}, "top_k=0: expected an integer of at least 1"),
        ({"seed": -1}, "seed=-1: expected an integer of at least 0"),
    ],
)
def test_bad_arguments_of_a_random_histogram_are_named(arguments, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        BlockHistogram.random(**{"heads": 1, "q_len": 8, "block": 2, "top_k": 2, "seed": 0, **arguments})


@pytest.mark.parametrize(
    ("q_len", "kv_len", "needed"),
    [
        (1, 100, 4 + 2 * 16),  # of the own block 4 keys, and 2 blocks chosen
        (6, 100, 20 + 2 * 16),
        (1, 20, 4 + 16),
        (1, 16, 16),
        (0, 100, 0),
    ],
)
def test_a_step_must_read_the_blocks_that_it_chooses_and_no_others(q_len, kv_len, needed):
    problem = MobaProblem(q_len=q_len, kv_len=kv_len, head_dim=8, dtype="float32", block_size=16, top_k=3)
    least = compulsory_traffic(problem, "decode").by_array
    assert sum(least[name].hbm_read_bytes for name in ("k", "v") if name in least) == 2 * 4 * 8 * needed
    whole = compulsory_traffic(replace(problem, full_attention=True), "decode").by_array
    assert sum(whole[name].hbm_read_bytes for name in ("k", "v") if name in whole) == 2 * 4 * 8 * kv_len * (q_len > 0)


def test_block_mask_is_refused():
    mask = simattn.BlockMask.from_array(np.ones((1, 1), bool), q_block=8, kv_block=8)
    with pytest.raises(ValueError, match="block_mask is given: expected None"):
        simattn.count("moba", q_len=8, block_mask=mask)


def test_the_reference_of_full_attention_is_that_of_dense_attention():
    q, k, v, _ = drawn(length=17, heads=4, kv_heads=2)
    shape = {"heads": 4, "kv_heads": 2, "q_len": 17, "head_dim": 8, "dtype": "float32"}
    ours = moba.reference(
        MobaProblem(**shape, full_attention=True), {n: a.astype(float) for n, a in zip("qkv", (q, k, v), strict=True)}
    )
    out, lse = reference_attention(simattn.AttentionProblem(**shape, causal=True), q, k, v)
    np.testing.assert_allclose(ours["out"], out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours["lse"], lse, rtol=1e-12, atol=1e-12)
