"""The kernels of Native Sparse Attention: forward pass, backward pass and decoding step.

All run on packed rows: those of the query heads of a KV head follow one another position by position, so that each
key and value is loaded once for the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from simattn.algorithms import flash2
from simattn.algorithms.flash3 import packed_rows, unpacked_rows
from simattn.algorithms.kernels import ForwardArrays, convert, fill
from simattn.algorithms.nsa.compression import Compression
from simattn.algorithms.nsa.plan import NsaPlan, Sizes, inner_plan
from simattn.algorithms.nsa.problem import BRANCHES, NsaProblem, SelectedProblem
from simattn.algorithms.nsa.selecting import select
from simattn.algorithms.steps import (
    SoftmaxState,
    finish_softmax,
    load_statistics,
    masked_scores,
    score_gradients,
    update_softmax,
)
from simattn.machine import Array, Machine, Role
from simattn.masks import Rows
from simattn.problem import AttentionProblem

# Arrays


def declare_saved(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Declare what the forward pass leaves: compressed rows, selected blocks, and the branches before their gates."""
    for name, columns in problem.compressed_columns.items():
        machine.array(
            f"{name}_compressed", problem.compressed_len, columns, dtype=problem.dtype, heads="kv", role="saved"
        )
    _declare_attended(machine, problem, "saved")


def _declare_attended(machine: Machine, problem: NsaProblem, role: Role) -> None:
    """Declare the selected blocks, and the branches before their gates."""
    values = None
    if machine.arithmetic is not None and problem.selection is not None:
        given = problem.selection.indices
        values = given.reshape(problem.batch * problem.kv_heads, 1, problem.q_len, problem.selected_blocks)
    machine.array(
        "indices", problem.q_len, problem.selected_blocks, dtype="int32", heads="kv", role=role, values=values
    )
    for branch in BRANCHES:
        machine.array(f"out_{branch}", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role=role)
        machine.array(f"lse_{branch}", problem.q_len, 1, role=role)


def pack(machine: Machine, problem: NsaProblem) -> Machine:
    """Return a machine whose query rows are the packed ones of all arrays declared so far."""
    inner = machine.inside(problem.packed, machine.arrays)
    for name, array in machine.arrays.items():
        if array.heads == "query":
            values = None if array.values is None else packed_rows(array.values, problem.group_size)
            inner.arrays[name] = replace(array, rows=array.rows * problem.group_size, values=values)
    return inner


def unpack(machine: Machine, inner: Machine, problem: NsaProblem) -> None:
    """Take over what the packed machine counted, computed and declared, of which nothing has packed rows."""
    machine.take_over(inner)
    for name, array in inner.arrays.items():
        machine.arrays.setdefault(name, array)
    for name, array in machine.arrays.items():
        values = inner.arrays[name].values
        if array.heads == "query" and array.role in ("output", "saved") and values is not None:
            array.values = unpacked_rows(values, problem.group_size)


def arrays_of(machine: Machine, branch: str, *names: str) -> dict[str, Array]:
    """Return a branch's arrays by their names without the branch."""
    return {name: machine.arrays[f"{name}_{branch}"] for name in names}


def gate_column(branch: str) -> Rows:
    """Return the column of a branch's gates."""
    return Rows(len(BRANCHES), 1, BRANCHES.index(branch), 1)


# Forward


def forward(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Compress, attend to compressed rows, select blocks by these scores, attend to them and to a window, add up."""
    declare_saved(machine, problem, plan)
    machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="output")
    inner = pack(machine, problem)
    for name in problem.compressed_columns:
        Compression.of(inner, problem, plan, name).forward(inner)
    attend(inner, problem, plan)
    unpack(machine, inner, problem)


def decode(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Compress the blocks that the new keys complete, and attend as in the forward pass."""
    for name in problem.compressed_columns:
        cache = machine.arrays[f"{name}_compressed"]
        updated = machine.array(cache.name, cache.rows, cache.columns, dtype=cache.dtype, heads="kv", role="output")
        if updated.values is not None:
            updated.values[...] = cache.values
    _declare_attended(machine, problem, "workspace")
    machine.array("out", problem.q_len, problem.value_dim, dtype=problem.output_dtype, role="output")
    inner = pack(machine, problem)
    if problem.new_blocks:
        for name in problem.compressed_columns:
            Compression.of(inner, problem, plan, name).of_new_blocks().forward(inner)
    attend(inner, problem, plan)
    unpack(machine, inner, problem)


def attend(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Run the three branches on packed rows, and add up their outputs."""
    sizes = Sizes.of(problem, plan)
    dense_branch(machine, problem.compressed_branch, plan, "compressed", sizes.queries, sizes.compressed)
    if problem.selection is None:
        select(machine, problem, plan)
    selected_branch(machine, problem, plan)
    dense_branch(machine, problem.window_branch, plan, "window", sizes.queries, sizes.window)
    add_branches(machine, problem, plan)


def dense_branch(
    machine: Machine, problem: AttentionProblem, plan: NsaPlan, branch: str, queries: int, keys: int
) -> None:
    """Run FlashAttention-2's loop in a branch."""
    arrays = ForwardArrays(q=machine.arrays["q"], **arrays_of(machine, branch, "k", "v", "out", "lse"))
    inner = machine.inside(problem, {})
    flash2.attend(inner, problem, inner_plan(plan, queries, keys), arrays)
    machine.take_over(inner)


def streams(
    machine: Machine, problem: NsaProblem, arrays: Mapping[str, Array]
) -> Iterator[tuple[Machine, SelectedProblem]]:
    """Yield a machine and a problem of the selected branch for each stream; one for all where all count the same."""
    count = problem.batch * problem.kv_heads
    known = machine.arrays["indices"].values
    if known is None and problem.selection is not None:
        known = problem.selection.indices.reshape(count, 1, problem.q_len, problem.selected_blocks)
    for stream in range(min(count, 1) if known is None else count):
        part = problem.selected_branch(None if known is None else known[stream, 0])
        values = {
            name: array if array.values is None else replace(array, values=array.values[stream : stream + 1])
            for name, array in arrays.items()
        }
        inner = machine.inside(part, values)
        yield inner, part
        machine.take_over(inner, count if known is None else 1)


def position_rows(problem: NsaProblem, rows: Rows) -> Rows:
    """Return the positions of tiles of packed rows."""
    return Rows(problem.q_len, rows.tile // problem.group_size, rows.first, rows.count)


def selected_branch(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Each thread block holds the group's query heads of a position, or few, and gathers the blocks that they chose."""
    queries, place = Sizes.of(problem, plan).selecting, plan.accumulators
    width = max(problem.selection_block, problem.head_dim, problem.value_dim)
    given = {
        "q": machine.arrays["q"],
        "indices": machine.arrays["indices"],
        **arrays_of(machine, "selected", "k", "v", "out", "lse"),
    }
    for inner, part in streams(machine, problem, given):
        arrays = ForwardArrays(**{name: inner.arrays[name] for name in ("q", "k", "v", "out", "lse")})
        for query_rows in inner.thread_blocks(part.q_len, queries, width=width):
            # load
            inner.load(inner.arrays["indices"], position_rows(problem, query_rows), place="registers")
            q = inner.load(arrays.q, query_rows)
            state = SoftmaxState.empty(inner, query_rows, problem.value_dim, place)
            for key_rows in inner.tiles(part.visible_keys(query_rows), problem.selection_block):
                # load
                k = inner.load(arrays.k, key_rows)
                v = inner.load(arrays.v, key_rows)
                # compute
                scores, hidden = masked_scores(inner, q, k, query_rows, key_rows, place=place)
                update_softmax(inner, state, scores, v, hidden)
            # finish
            finish_softmax(inner, state, arrays, query_rows)


def add_branches(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Add up the branches' outputs, each times its gate."""
    out = machine.arrays["out"]
    for rows in machine.thread_blocks(out.rows, Sizes.of(problem, plan).queries, width=out.columns):
        total = machine.full("out", rows, out.columns, 0.0, place="registers")
        for branch in BRANCHES:
            # load
            gate = machine.load(machine.arrays["gates"], rows, gate_column(branch), place="registers")
            part = machine.load(machine.arrays[f"out_{branch}"], rows, place="registers")
            # compute
            machine.rescale(part, gate)
            machine.add(total, part)
            for tile in (gate, part):
                machine.free(tile)
        # finish
        machine.store(total, out, rows)


# Backward


def backward(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Gates first; then each branch by tiles of its keys, dQ by reductions; then what compressed keys are made of."""
    for name, shape in problem.inputs("backward").items():
        if shape.gradient:
            machine.array(f"d{name}", shape.rows, shape.columns, dtype=problem.dtype, heads=shape.heads, role="output")
    machine.array("dq_accumulator", problem.q_len, problem.head_dim)
    for branch in BRANCHES:
        machine.array(f"delta_{branch}", problem.q_len, 1)
    for name, columns in problem.compressed_columns.items():
        machine.array(f"d{name}_compressed", problem.compressed_len, columns, heads="kv")
    inner = pack(machine, problem)
    gate_gradients(inner, problem, plan)
    fill(inner, inner.arrays["dq_accumulator"], 0.0, plan)
    branch_gradients(inner, problem, plan)
    convert(inner, inner.arrays["dq_accumulator"], inner.arrays["dq"], plan)
    for name in problem.compressed_columns:
        results = (f"d{name}", *(f"d{name}_{item}" for item in problem.learned(1)))
        Compression.of(inner, problem, plan, name).backward(
            inner, inner.arrays[f"d{name}_compressed"], tuple(inner.arrays[result] for result in results)
        )
    unpack(machine, inner, problem)


def gate_gradients(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Write the gates' gradients, dO · O_c of a branch, and its delta, this times its gate."""
    dout = machine.arrays["dout"]
    for rows in machine.thread_blocks(dout.rows, Sizes.of(problem, plan).queries, width=dout.columns):
        # load
        gradient = machine.load(dout, rows, place="registers")
        for branch in BRANCHES:
            # load
            gate = machine.load(machine.arrays["gates"], rows, gate_column(branch), place="registers")
            out = machine.load(machine.arrays[f"out_{branch}"], rows, place="registers")
            # compute
            dots = machine.row_dot(gradient, out)
            # finish
            machine.store(dots, machine.arrays["dgates"], rows, gate_column(branch))
            machine.rescale(dots, gate)
            machine.store(dots, machine.arrays[f"delta_{branch}"], rows)
            for tile in (gate, out, dots):
                machine.free(tile)


def branch_gradients(machine: Machine, problem: NsaProblem, plan: NsaPlan) -> None:
    """Run the three branches backward."""
    sizes, shared = Sizes.of(problem, plan), ("q", "dout", "gates", "dq_accumulator")
    given = {
        branch: {name: machine.arrays[name] for name in shared}
        | arrays_of(machine, branch, "k", "v", "lse", "delta", "dk", "dv")
        for branch in BRANCHES
    }
    for branch, part, keys in (
        ("compressed", problem.compressed_branch, sizes.compressed),
        ("window", problem.window_branch, sizes.window),
    ):
        inner = machine.inside(part, given[branch])
        key_gradients(inner, part, plan, branch, sizes.queries, keys)
        machine.take_over(inner)
    machine.array("block_ends", problem.selection_blocks, 1, dtype="int32", heads="kv")
    machine.array("choosing", problem.q_len * problem.selected_blocks, 1, dtype="int32", heads="kv")
    selected = given["selected"] | {name: machine.arrays[name] for name in ("indices", "block_ends", "choosing")}
    for inner, part in streams(machine, problem, selected):
        invert(inner, problem, part, plan)
        key_gradients(inner, part, plan, "selected", sizes.selecting, problem.selection_block)


def invert(machine: Machine, problem: NsaProblem, part: SelectedProblem, plan: NsaPlan) -> None:
    """List for each block the tiles of positions that chose it: count them, add the counts up, write the lists."""
    indices, ends, choosing = (machine.arrays[name] for name in ("indices", "block_ends", "choosing"))
    queries = Sizes.of(problem, plan).selecting
    fill(machine, ends, 0.0, plan)
    for writes in (False, True):
        for query_rows in machine.thread_blocks(part.q_len, queries, per="kv"):
            machine.load(indices, position_rows(problem, query_rows), place="registers")
            for _ in machine.tiles(part.visible_keys(query_rows), problem.selection_block):
                machine.move_elements(ends, "reduced")
                if writes:
                    machine.move_elements(choosing, "written")
        if not writes:
            for _ in machine.thread_blocks(per="kv", width=plan.tiles.kv):  # one for all, since it carries the sum on
                for rows in machine.tiles(ends.rows, plan.tiles.kv):
                    machine.store(machine.load(ends, rows, place="registers"), ends, rows)
    if ends.values is not None and choosing.values is not None:
        lists = part.chosen.lists(plan.positions)
        tiles, places = np.nonzero(lists >= 0)
        blocks = lists[tiles, places]
        ends.values[0, 0, :, 0] = np.cumsum(np.bincount(blocks, minlength=ends.rows))
        choosing.values[0, 0, : len(tiles), 0] = tiles[np.argsort(blocks, kind="stable")]


def key_gradients(
    machine: Machine, problem: AttentionProblem, plan: NsaPlan, branch: str, queries: int, keys: int
) -> None:
    """Each thread block keeps one key tile and its gradients on chip and streams the queries that see it past it."""
    arrays, place = machine.arrays, plan.accumulators
    width = max(queries, problem.head_dim, problem.value_dim)
    for key_rows in machine.thread_blocks(problem.kv_len, keys, per="kv", width=width, together=False):
        # load
        k, v = (machine.load(arrays[name], key_rows) for name in "kv")
        dk = machine.full("dk", key_rows, problem.head_dim, 0.0, place=place)
        dv = machine.full("dv", key_rows, problem.value_dim, 0.0, place=place)
        if branch == "selected":
            for _ in ("first", "end"):
                machine.move_elements(arrays["block_ends"], "read")
        seen = problem.visible_queries(key_rows)
        for query_rows in machine.tiles(seen, queries, independent=True, width=max(keys, width)):
            # load
            if branch == "selected":
                machine.move_elements(arrays["choosing"], "read")
            q, dout = (machine.load(arrays[name], query_rows) for name in ("q", "dout"))
            gate = machine.load(arrays["gates"], query_rows, gate_column(branch), place="registers")
            statistics = load_statistics(machine, arrays["delta"], query_rows)
            # compute
            machine.rescale(dout, gate)
            probabilities, dscores, hidden = score_gradients(
                machine, q, k, v, dout, statistics, query_rows, key_rows, place=place
            )
            machine.matmul(probabilities, dout, place=place, transpose_a=True, hidden=hidden, into=dv)
            machine.free(probabilities)
            machine.matmul(dscores, q, place=place, transpose_a=True, hidden=hidden, into=dk)
            dq = machine.matmul(dscores, k, place=place, name="dq", hidden=hidden)
            machine.scale(dq, problem.scale)
            # finish
            machine.reduce(dq, arrays["dq_accumulator"], query_rows)
        # finish
        machine.scale(dk, problem.scale)
        machine.store(dk, arrays["dk"], key_rows)
        machine.store(dv, arrays["dv"], key_rows)
