"""Native Sparse Attention: what it is equal to, what it selects, what it reads, and what it refuses."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from simattn.algorithms import ALGORITHMS
from simattn.algorithms.nsa import NsaProblem, reference
from simattn.algorithms.nsa.reference import selected_indices
from simattn.bounds import compulsory_traffic
from simattn.selection import BlockSelection
from simattn.testing import assert_same_bits, attention_inputs, problems_of, reference_attention, tiles_for

SMALL = {
    "compression_block": 4,
    "compression_stride": 2,
    "selection_block": 4,
    "selected_blocks": 4,
    "window_keys": 6,
}
GATES = {"compressed": (1, 0, 0), "selected": (0, 1, 0), "window": (0, 0, 1)}
CALLS = {"forward": simattn.run, "backward": simattn.run_backward, "decode": simattn.run_decode}


def drawn(problem, direction="forward", seed=0):
    """Inputs of a problem in float64."""
    generator = np.random.default_rng(seed)
    shapes = {name: shape for name, shape in problem.inputs(direction).items() if name not in problem.own_inputs}
    inputs = {name: generator.standard_normal(shape.user_shape(problem)) for name, shape in shapes.items()}
    return {**inputs, **problem.draw_inputs(direction, generator)}


def stored(inputs, dtype=np.float32):
    return {name: array.astype(dtype) for name, array in inputs.items()}


def own_arguments(problem):
    shared = {item.name for item in fields(simattn.AttentionProblem)}
    return {item.name: getattr(problem, item.name) for item in fields(problem) if item.name not in shared}


def simulate(problem, inputs, direction="forward", arithmetic="float64", **plan):
    return CALLS[direction]("nsa", **stored(inputs), **own_arguments(problem), arithmetic=arithmetic, **plan)


def count(problem, direction="forward", **plan):
    shape = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "dtype")
    arguments = {name: getattr(problem, name) for name in shape} | own_arguments(problem)
    return simattn.count("nsa", **arguments, direction=direction, **plan)


def with_gates(problem, inputs, branch):
    shape = (problem.batch, problem.q_len, problem.heads, 3)
    return {**inputs, "gates": np.broadcast_to(np.array(GATES[branch], dtype=np.float64), shape)}


# 1. Equivalences


@pytest.mark.parametrize(
    ("branch", "arguments"),
    [
        ("selected", {"selected_blocks": 10}),
        ("compressed", {"compression_block": 1, "compression_stride": 1}),
        ("window", {"window_keys": 37}),
        ("window", {"window_keys": 1000}),
    ],
)
@pytest.mark.parametrize("lengths", [(37, 37), (5, 37), (37, 20)])
def test_a_branch_that_sees_everything_is_dense_causal_attention(branch, arguments, lengths):
    problem = NsaProblem(
        batch=2,
        heads=4,
        kv_heads=2,
        q_len=lengths[0],
        kv_len=lengths[1],
        head_dim=8,
        value_dim=5,
        dtype="float32",
        **{**SMALL, **arguments},
    )
    inputs = with_gates(problem, drawn(problem), branch)
    run = simulate(problem, inputs, tiles=(3, 8))
    dense = {"q": inputs["q"]} | {name: inputs[name if branch == "compressed" else f"{name}_{branch}"] for name in "kv"}
    expected, _ = reference_attention(
        simattn.AttentionProblem(
            **{item.name: getattr(problem, item.name) for item in fields(simattn.AttentionProblem)}
        ),
        **stored(dense),
    )
    np.testing.assert_allclose(run.out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("branch", GATES)
def test_gates_isolate_their_branch(branch):
    problem = NsaProblem(heads=2, kv_heads=1, q_len=25, head_dim=4, dtype="float32", **SMALL)
    inputs = drawn(problem, "backward")
    run = simulate(problem, with_gates(problem, inputs, branch), "backward")
    name = "" if branch == "compressed" else f"_{branch}"
    for key, gradient in run.results.items():
        if key not in ("dq", "dgates"):
            assert gradient.any() == key.endswith(name or ("dk", "dv"))
    forward = {key: array for key, array in inputs.items() if key != "dout"}
    alone = simulate(problem, with_gates(problem, forward, branch))
    np.testing.assert_array_equal(alone.out, alone.saved[f"out_{branch}"])


PROBLEMS = st.sampled_from(("forward", "backward")).flatmap(
    lambda direction: st.tuples(st.just(direction), problems_of(ALGORITHMS["nsa"], direction))
)


@settings(max_examples=50)
@given(data=st.data())
def test_a_given_selection_changes_nothing_but_the_selecting(data):
    direction, problem = data.draw(PROBLEMS)
    inputs = data.draw(attention_inputs(problem, direction=direction, kinds=["normal"]))
    settled = problem.settled(stored(inputs, np.float64))
    found, known = (simulate(some, inputs, direction, tiles=(2, 8)) for some in (problem, settled))
    for key, values in found.results.items():
        assert_same_bits(known.results[key], values, name=key)
    if direction == "forward":
        np.testing.assert_array_equal(found.saved["indices"], np.moveaxis(settled.selection.indices, 1, 2))
    else:
        assert found.traffic == known.traffic


@settings(max_examples=50)
@given(data=st.data(), positions=st.integers(2, 5))
def test_positions_of_a_thread_block_change_no_result_and_load_what_they_share_once(data, positions):
    direction, problem = data.draw(PROBLEMS)
    inputs = data.draw(attention_inputs(problem, direction=direction, kinds=["normal"]))
    settled = problem.settled(stored(inputs, np.float64))
    one, several, selecting = (
        simulate(some, inputs, direction, positions=number, tiles=(2, 8), enforce_capacity=False)
        for some, number in ((settled, 1), (settled, positions), (problem, positions))
    )
    for key, values in one.results.items():
        np.testing.assert_allclose(several.results[key], values, rtol=1e-9, atol=1e-9, err_msg=key)
        assert_same_bits(selecting.results[key], several.results[key], name=key)
    counted = count(
        replace(settled, dtype="float32"), direction, positions=positions, tiles=(2, 8), enforce_capacity=False
    )
    assert several.traffic == counted
    if direction == "forward":
        loaded = [run.traffic.by_array.get("k_selected") for run in (one, several)]
        assert (loaded[1].hbm_read_bytes if loaded[1] else 0) <= (loaded[0].hbm_read_bytes if loaded[0] else 0)


@pytest.mark.parametrize("compression", ["mean", "mlp"])
@pytest.mark.parametrize(
    ("new", "kv_len"), [(new, kv_len) for new in (1, 2, 5) for kv_len in (3, 4, 21, 24) if new <= kv_len]
)
def test_a_decoding_step_is_the_end_of_the_forward_pass(compression, new, kv_len):
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "value_dim": 3, "dtype": "float32"}
    whole = NsaProblem(**shape, q_len=kv_len, compression=compression, **SMALL)
    step = replace(whole, q_len=new, kv_len=kv_len)
    inputs = drawn(whole)
    run = simulate(whole, inputs, tiles=(3, 8))
    last = {name: array[:, -new:] if name in ("q", "gates") else array for name, array in inputs.items()}
    caches = {name: np.array(run.saved[name]) for name in ("k_compressed", "v_compressed")}
    for cache in caches.values():
        cache[:, cache.shape[1] - step.new_blocks :] = np.nan  # what this step completes
    decoded = simattn.run_decode(
        "nsa", **stored(last), **caches, **own_arguments(step), arithmetic="float64", tiles=(3, 8)
    )
    np.testing.assert_allclose(decoded.out, run.out[:, -new:], rtol=1e-12, atol=1e-12)
    for name in caches:
        np.testing.assert_allclose(decoded.results[name], run.saved[name], rtol=1e-12, atol=1e-12)


# 2. The selection


def test_equal_scores_pick_lower_blocks():
    problem = NsaProblem(q_len=200, head_dim=4, dtype="float32", **{**SMALL, "selected_blocks": 7})
    inputs = {**drawn(problem), "k": np.ones((1, 200, 1, 4))}
    for arithmetic in ("float32", "float64"):
        for tiles in ((1, 2), (7, 16), (200, 200)):
            indices = simulate(problem, inputs, arithmetic=arithmetic, tiles=tiles, enforce_capacity=False).saved[
                "indices"
            ]
            # The scores of inner blocks are equal; the last and the last but one are always selected.
            assert indices[0, 199, 0].tolist() == [0, 1, 2, 3, 4, 48, 49]
            assert indices[0, 9, 0].tolist() == [0, 1, 2, -1, -1, -1, -1]


def test_nan_scores_rank_below_all_others():
    problem = NsaProblem(q_len=64, head_dim=2, dtype="float32", **{**SMALL, "selected_blocks": 5})
    inputs = drawn(problem)
    inputs["k"][0, 20] = np.nan  # every probability is NaN once it is in a complete block
    for tiles in ((1, 2), (7, 16), (64, 64)):
        indices = simulate(problem, inputs, tiles=tiles, enforce_capacity=False).saved["indices"]
        assert_same_bits(np.moveaxis(indices, 2, 1), selected_indices(problem, inputs))


def test_scores_are_overlaps_in_tokens():
    problem = NsaProblem(q_len=256)
    assert [problem.overlaps[offset] for offset in range(-1, 4)] == [1, 2, 2, 2, 1]
    for arguments in ({}, SMALL, {"compression_block": 6, "compression_stride": 2, "selection_block": 8}):
        problem = NsaProblem(q_len=256, **arguments)
        stride, block = problem.compression_stride, problem.selection_block
        for offset in range(-10, 10):
            tokens = set(range(offset * stride, offset * stride + problem.compression_block)) & set(range(block))
            assert len(tokens) == stride * problem.overlaps.get(offset, 0)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("lengths", [(70, 70), (9, 70), (70, 41)])
@pytest.mark.parametrize("tiles", [(1, 1), (4, 12), (70, 70)])
def test_the_kernel_selects_what_the_definition_does(group, lengths, tiles):
    for number, arguments in enumerate(NsaProblem.example_arguments(simattn.AttentionProblem(q_len=1), "forward")):
        problem = NsaProblem(
            heads=2 * group,
            kv_heads=2,
            q_len=lengths[0],
            kv_len=lengths[1],
            head_dim=4,
            dtype="float32",
            **arguments,
        )
        inputs = stored(drawn(problem, seed=number))
        run = simulate(problem, inputs, tiles=tiles, enforce_capacity=False)
        expected = selected_indices(problem, stored(inputs, np.float64))
        np.testing.assert_array_equal(np.moveaxis(run.saved["indices"], 2, 1), expected)


def test_selected_blocks_are_the_forced_ones_and_the_best():
    problem = NsaProblem(q_len=80, head_dim=4, dtype="float32", **{**SMALL, "selected_blocks": 3})
    indices = selected_indices(problem, drawn(problem))[0, 0]
    for row, chosen in enumerate(indices):
        own = row // 4
        assert {0, own, max(0, own - 1)} == set(chosen) - {-1}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"selected_blocks": 3, "initial_blocks": 0, "local_blocks": 1},
        {"compression_block": 6, "selection_block": 8, "initial_blocks": 2, "local_blocks": 1},
        {"compression_stride": 4, "selection_block": 8, "selected_blocks": 3, "local_blocks": 1},
    ],
)
def test_the_blocks_are_those_of_the_tokens_that_compressed_blocks_share_with_them(arguments):
    """Select query by query and token by token, with nothing of the package but the shapes."""
    problem = NsaProblem(heads=4, kv_heads=2, q_len=45, kv_len=50, head_dim=3, **{**SMALL, **arguments})
    inputs = drawn(problem)
    length, stride, block = problem.compression_block, problem.compression_stride, problem.selection_block
    found = selected_indices(problem, inputs)
    for head, row in np.ndindex(2, 45):
        position, scores = row + 5, dict.fromkeys(range((row + 5) // block + 1), 0.0)
        complete = range(0, position + 2 - length, stride)
        keys = [inputs["k"][0, first : first + length, head].mean(axis=0) for first in complete]
        for query in inputs["q"][0, row, 2 * head : 2 * head + 2]:
            weights = np.exp([query @ key / np.sqrt(3) for key in keys])
            for first, weight in zip(complete, weights / weights.sum(), strict=True):
                for token in range(first, first + length):
                    scores[token // block] += weight / stride
        own = position // block
        forced = {number for number in scores if number < problem.initial_blocks or own - number < problem.local_blocks}
        others = sorted(set(scores) - forced, key=lambda number: -scores[number])
        expected = sorted(forced | set(others[: problem.selected_blocks - len(forced)]))
        assert [index for index in found[0, head, row].tolist() if index >= 0] == expected


# 3. Bytes


def test_bytes_of_a_small_problem_by_hand():
    problem = NsaProblem(heads=4, kv_heads=2, q_len=10, head_dim=3, value_dim=5, dtype="float32", **SMALL)
    traffic = count(problem, tiles=(10, 10))
    # Two KV heads; blocks 0–3, 2–5, 4–7 and 6–9 are complete. One tile of compressed rows overlaps by 2 of 5 · 2 + 2.
    assert traffic.by_array["k"].hbm_read_bytes == 4 * 2 * 10 * 3
    assert traffic.by_array["k_compressed"].hbm_write_bytes == 4 * 2 * 4 * 3
    # Compressed attention and the selection each load the 4 blocks once.
    assert traffic.by_array["k_compressed"].hbm_read_bytes == 2 * (4 * 2 * 4 * 3)
    assert traffic.by_array["v_compressed"].hbm_read_bytes == 4 * 2 * 4 * 5
    # Positions 0–3 see 4 keys' block, 4–7 two blocks, 8 and 9 the clipped third block too.
    assert traffic.by_array["k_selected"].hbm_read_bytes == 4 * 2 * 3 * (4 * 4 + 4 * (4 + 4) + 2 * (4 + 4 + 2))
    assert traffic.by_array["k_window"].hbm_read_bytes == 4 * 2 * 10 * 3
    # q for each of the three branches and the selection; four indices for each position of both KV heads.
    assert traffic.by_array["q"].hbm_read_bytes == 4 * (4 * 4 * 10 * 3)
    assert traffic.by_array["indices"].hbm_write_bytes == traffic.by_array["indices"].hbm_read_bytes == 4 * 2 * 10 * 4
    assert traffic.by_array["gates"].hbm_read_bytes == 4 * (4 * 10 * 3)


def test_all_arrays_of_a_backward_pass_are_in_memory():
    shape = {"heads": 4, "kv_heads": 2, "q_len": 10, "head_dim": 3, "value_dim": 5, "dtype": "float32"}
    roles = simattn.profile("nsa", **shape, **SMALL, direction="backward", tiles=(5, 8)).hbm_bytes_by_role
    rows = 4 * 10 * (3 + 3)  # the sums of dq, and three deltas
    keys = 2 * (10 + 4) * (3 + 5)  # the sums of dk and dv, and the gradients of 4 compressed rows
    lists = 2 * (3 + 10 * 4)  # ends of the lists of 3 blocks, and room for 4 choices of each position
    assert roles["workspace"] == 4 * (rows + keys + lists)
    more = simattn.profile("nsa", **shape, **SMALL, compression="mlp", direction="backward", tiles=(5, 8))
    layers = (4 + 4 * 3 + 3) * (3 + 5)  # the sums of the gradients of positions and of both layers
    assert more.hbm_bytes_by_role["workspace"] == 4 * (rows + keys + lists + layers)


@pytest.mark.parametrize("length", [8192, 16384, 32768, 65536])
def test_tokens_read_in_a_decoding_step_are_those_of_the_papers_table_4(length):
    shape = {"heads": 64, "kv_heads": 4, "q_len": 1, "kv_len": length, "head_dim": 192, "value_dim": 128}
    traffic = simattn.count("nsa", **shape, direction="decode")
    token = 4 * 128 * 2
    tokens = sum(
        traffic.by_array[f"v_{branch}"].hbm_read_bytes // token for branch in ("compressed", "selected", "window")
    )
    assert tokens == length // 16 + 1536 - 1


@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
@pytest.mark.parametrize("kv_len", [64, 61])
def test_bytes_do_not_depend_on_which_blocks_are_selected(direction, kv_len):
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "dtype": "float32"}
    problem = NsaProblem(**shape, q_len=1 if direction == "decode" else kv_len, kv_len=kv_len, **SMALL)
    unknown = count(problem, direction)
    known = [count(problem.settled(drawn(problem, direction, seed)), direction) for seed in range(3)]
    assert known[0] == known[1] == known[2]
    for name in ("k_selected", "v_selected", "out_selected", "choosing", "dq_accumulator"):
        assert unknown.by_array.get(name) == known[0].by_array.get(name)


def test_given_indices_decide_the_traffic():
    problem = NsaProblem(q_len=16, head_dim=8, dtype="float32", **SMALL)
    own = np.full((1, 1, 16, 4), -1)
    own[0, 0, :, 0] = np.arange(16) // 4
    both = own.copy()
    both[0, 0, 4:, 1] = own[0, 0, 4:, 0]
    both[0, 0, 4:, 0] = 0
    for indices, pairs in ((own, 16), (both, 16 + 12), (np.full_like(own, -1), 0)):
        traffic = count(replace(problem, selection=BlockSelection(indices, 4)))
        assert traffic.by_array.get("k_selected", simattn.traffic.ArrayTraffic()).hbm_read_bytes == pairs * 4 * 8 * 4
        together = count(replace(problem, selection=BlockSelection(indices, 4)), positions=16)
        blocks = len(set(indices[indices >= 0].tolist()))
        assert together.by_array.get("k_selected", simattn.traffic.ArrayTraffic()).hbm_read_bytes == blocks * 4 * 8 * 4


def test_a_query_that_selects_nothing_gets_nothing_of_that_branch():
    problem = NsaProblem(q_len=16, head_dim=8, dtype="float32", **SMALL)
    problem = replace(problem, selection=BlockSelection(np.full((1, 1, 16, 4), -1), 4))
    run = simulate(problem, with_gates(problem, drawn(problem), "selected"))
    assert not run.out.any()


# 4. What is not seen does not matter


@pytest.mark.parametrize("special", [np.nan, np.inf])
@pytest.mark.parametrize("compression", ["mean", "mlp"])
def test_keys_that_are_not_seen_reach_no_row(special, compression):
    problem = NsaProblem(heads=2, kv_heads=1, q_len=31, head_dim=4, dtype="float32", compression=compression, **SMALL)
    inputs = drawn(problem, "backward")
    problem = problem.settled(inputs)
    changed = {name: array.copy() for name, array in inputs.items()}
    changed["k"][:, 30] = changed["v"][:, 30] = special  # in no complete block: these end at key 29
    for name in ("k_window", "v_window", "k_selected", "v_selected", "q", "dout"):
        changed[name][:, 30] = special
    for one, two in (
        [simulate(problem, {k: a for k, a in some.items() if k != "dout"}) for some in (inputs, changed)],
        [simulate(problem, some, "backward") for some in (inputs, changed)],
    ):
        for key in {"out", "dq", "dgates"} & set(one.results):
            assert_same_bits(two.results[key][:, :30], one.results[key][:, :30], name=key)
        for key in {"dk", "dv"} & set(one.results):
            assert not two.results[key][:, 30].any()
    expected = reference(problem, {k: a for k, a in stored(changed, np.float64).items() if k != "dout"})["out"][:, :30]
    assert np.isfinite(expected).all()


# 5. Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compression_stride": 3}, "compression_stride=3 does not divide compression_block=32"),
        ({"selection_block": 40}, "compression_stride=16 does not divide selection_block=40"),
        ({"selection_block": 16}, "selection_block=16: expected at least compression_block=32"),
        ({"selected_blocks": 2}, "selected_blocks=2: expected at least the 3 of initial_blocks=1 and local_blocks=2"),
        ({"selected_blocks": 0}, "selected_blocks=0: expected an integer of at least 1"),
        ({"local_blocks": 0}, "local_blocks=0: expected an integer of at least 1"),
        ({"window_keys": 0}, "window_keys=0: expected an integer of at least 1"),
        ({"window": (3, 0)}, r"window=\(3, 0\): expected None; the window branch has window_keys"),
        ({"compression": "max"}, r"compression='max': expected one of \('mean', 'mlp'\)"),
        ({"compression_hidden": 8}, "compression_hidden=8 of a mean: expected None"),
        ({"compression": "mlp", "compression_hidden": 0}, "compression_hidden=0: expected an integer of at least 1"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn': expected float32, float16 or bfloat16"),
        ({"positions": 2}, "positions=2 without a selection: expected positions=1"),
        ({"positions": 0}, "positions=0: expected an integer of at least 1"),
        ({"compressed_rows": 0}, "compressed_rows=0: expected an integer of at least 1"),
        ({"repeat_kv": True}, r"repeat_kv=True: expected one of \(False,\)"),
        (
            {"selection": BlockSelection(np.full((1, 1, 100, 3), -1), 64)},
            r"selection has indices of shape \(1, 1, 100, 3\): expected \(1, 1, 100, 16\)",
        ),
        (
            {"selection": BlockSelection(np.full((1, 1, 100, 16), -1), 32)},
            "selection has blocks of 32 keys: expected 64",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused(arguments, words):
    for call in (simattn.count, simattn.closed_form):
        with pytest.raises(ValueError, match=words):
            call("nsa", **{"q_len": 100, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"causal": 1}, "causal=1: expected a bool"),
        ({"window_keys": 2.5}, r"window_keys=2\.5 is a float: expected an integer"),
        (
            {"selection": np.zeros((1, 1, 100, 16))},
            "selection is a ndarray: expected a simattn.selection.BlockSelection",
        ),
    ],
)
def test_bad_types_are_refused(arguments, words):
    with pytest.raises(TypeError, match=words):
        simattn.count("nsa", **{"q_len": 100, **arguments})


def test_blocks_after_their_query_are_refused():
    indices = np.full((1, 1, 100, 16), -1)
    indices[0, 0, 63, 0] = 1
    words = r"selection.indices\[0, 0, 63\] names block 1, which begins after its query at position 63"
    with pytest.raises(ValueError, match=words):
        simattn.count("nsa", q_len=100, selection=BlockSelection(indices, 64))


def test_block_masks_are_refused():
    mask = simattn.BlockMask.from_array(np.ones((1, 1), bool), q_block=100, kv_block=100)
    with pytest.raises(ValueError, match="block_mask is given: expected None"):
        simattn.count("nsa", q_len=100, block_mask=mask)


@settings(max_examples=100)
@given(data=st.data())
@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
def test_no_program_moves_less_than_every_implementation_must(direction, data):
    problem = data.draw(problems_of(ALGORITHMS["nsa"], direction))
    tiles = data.draw(tiles_for(problem))
    counted = count(problem, direction, tiles=tiles, enforce_capacity=False).by_array
    for name, least in compulsory_traffic(problem, direction).by_array.items():
        for counter, nbytes in vars(least).items():
            assert nbytes <= getattr(counted[name], counter), (name, counter)


def test_what_every_implementation_reads():
    step = NsaProblem(q_len=1, kv_len=65536)
    needed = {name: shape.needed_rows for name, shape in step.inputs("decode").items()}
    assert (needed["k_selected"], needed["k_window"], needed["k_compressed"], needed["k"]) == (16 * 64, 512, 4094, 32)
    whole = NsaProblem(q_len=1000)
    needed = {name: shape.needed_rows for name, shape in whole.inputs("forward").items()}
    assert (needed["k_selected"], needed["k_window"], needed["k"]) == (1000, 1000, 992)


@pytest.mark.parametrize("positions", [1, 4])
def test_a_gradient_that_is_no_number_reaches_only_the_keys_that_its_query_sees(positions):
    place, blocks = 5, {"selection_block": 8, "selected_blocks": 3, "window_keys": 5}
    blocks |= {"compression_block": 4, "compression_stride": 2}
    problem = NsaProblem(q_len=24, head_dim=4, dtype="float32", **blocks)
    generator = np.random.default_rng(0)
    inputs = {
        name: generator.standard_normal(shape.user_shape(problem), dtype=np.float32)
        for name, shape in problem.inputs("backward").items()
    }
    found = []
    for value in (0, np.nan):
        inputs["dout"][0, place] = value
        found.append(simattn.run_backward("nsa", **inputs, **blocks, positions=positions).results)
    for name in ("dk_selected", "dv_selected", "dk_window", "dv_window"):
        np.testing.assert_allclose(found[1][name][0, place + 1 :], found[0][name][0, place + 1 :], rtol=1e-5, atol=1e-6)
        assert np.isnan(found[1][name][0, place]).all()
