"""The machine by itself: what it charges, where tiles live and for how long."""

from __future__ import annotations

import numpy as np
import pytest

from simattn import AttentionProblem, BlockMask, CapacityError, Traffic
from simattn.arithmetic.floating import get_arithmetic
from simattn.machine import Machine
from simattn.masks import Windows
from simattn.traffic import ArrayTraffic

PROBLEM = AttentionProblem(batch=2, heads=4, kv_heads=2, q_len=10, head_dim=3, dtype="float32")
MATRICES = PROBLEM.batch * PROBLEM.heads


def machine_with(values=None, **arguments):
    machine = Machine(PROBLEM, **arguments)
    array = machine.array("x", 10, 3, heads="query", role="input", values=values)
    return machine, array


@pytest.fixture(params=["count", "simulate"])
def arithmetic(request):
    return None if request.param == "count" else get_arithmetic("float32")


def values_of(heads):
    shape = (PROBLEM.batch * PROBLEM.kv_heads, 2 if heads == "query" else 1, 10, 3)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_a_load_reads_memory_and_writes_sram(arithmetic):
    machine, array = machine_with(values_of("query"), arithmetic=arithmetic)
    for rows in machine.thread_blocks(10, 4):
        machine.load(array, rows)
    nbytes = MATRICES * 10 * 3 * 4
    assert machine.traffic == Traffic({"x": ArrayTraffic(hbm_read_bytes=nbytes, sram_write_bytes=nbytes)})


def test_registers_are_not_charged(arithmetic):
    machine, array = machine_with(values_of("query"), arithmetic=arithmetic)
    for rows in machine.thread_blocks(10, 4):
        tile = machine.load(array, rows, place="registers")
        machine.scale(tile, 2.0)
        machine.store(tile, array, rows)
    nbytes = MATRICES * 10 * 3 * 4
    assert machine.traffic == Traffic({"x": ArrayTraffic(hbm_read_bytes=nbytes, hbm_write_bytes=nbytes)})
    assert machine.operations.vector_flops == MATRICES * 10 * 3


def test_an_operation_reads_and_writes_its_sram_operands_once(arithmetic):
    machine, array = machine_with(values_of("query"), arithmetic=arithmetic)
    for rows in machine.thread_blocks(10, 4):
        machine.scale(machine.load(array, rows), 2.0)
    nbytes = MATRICES * 10 * 3 * 4
    counters = ArrayTraffic(hbm_read_bytes=nbytes, sram_read_bytes=nbytes, sram_write_bytes=2 * nbytes)
    assert machine.traffic == Traffic({"x": counters})


def test_a_reduction_counts_once_and_adds(arithmetic):
    machine, array = machine_with(values_of("query"), arithmetic=arithmetic)
    total = machine.array("total", 10, 3, heads="kv", values=np.zeros((4, 1, 10, 3), np.float32))
    for rows in machine.thread_blocks(10, 4):
        machine.reduce(machine.load(array, rows, place="registers"), total, rows)
    assert machine.traffic.by_array["total"] == ArrayTraffic(hbm_reduce_bytes=MATRICES * 10 * 3 * 4)
    if arithmetic is not None:
        np.testing.assert_array_equal(total.values, values_of("query").sum(axis=1, keepdims=True))


def test_a_block_per_kv_head_walks_its_group(arithmetic):
    machine, array = machine_with(values_of("query"), arithmetic=arithmetic)
    total = machine.array("total", 10, 3, heads="kv")
    for rows in machine.thread_blocks(10, 4, per="kv"):
        tile = machine.full("tile", rows, 3, 0.0, place="sram")
        for _ in machine.group_heads():
            machine.add(tile, machine.load(array, rows, place="registers"))
        machine.store(tile, total, rows)
    assert machine.traffic.by_array["x"].hbm_read_bytes == MATRICES * 10 * 3 * 4
    assert machine.traffic.by_array["total"].hbm_write_bytes == PROBLEM.batch * PROBLEM.kv_heads * 10 * 3 * 4
    if arithmetic is not None:
        np.testing.assert_array_equal(total.values, values_of("query").sum(axis=1, keepdims=True))


def test_walking_an_axis_visits_clipped_tiles(arithmetic):
    machine, array = machine_with(values_of("query"), arithmetic=arithmetic)
    sizes = []
    for _ in machine.thread_blocks():
        for rows in machine.tiles(10, 4):
            machine.load(array, rows)
            sizes.append(rows.size)
    assert sizes == ([4, 2] if arithmetic is None else [4, 4, 2])
    assert machine.traffic.hbm_read_bytes == MATRICES * 10 * 3 * 4


def test_a_tile_lives_until_its_iteration_ends():
    machine, array = machine_with(sram_bytes=2 * 4 * 3 * 4)
    for rows in machine.thread_blocks(10, 4):
        machine.load(array, rows)
        for _ in machine.tiles(10, 4):
            machine.load(array, rows)
    assert machine.peak_bytes["sram"] == 2 * 4 * 3 * 4


def test_a_freed_tile_gives_its_room_back():
    machine, array = machine_with(sram_bytes=4 * 3 * 4)
    for rows in machine.thread_blocks(10, 4):
        machine.free(machine.load(array, rows))
        machine.load(array, rows)
    assert machine.peak_bytes["sram"] == 4 * 3 * 4


def test_a_tile_occupies_its_unclipped_size_in_every_stage():
    machine, array = machine_with()
    for rows in machine.thread_blocks(10, 16):
        machine.load(array, rows, stages=3)
    assert machine.peak_bytes["sram"] == 3 * 16 * 3 * 4
    assert machine.traffic.hbm_read_bytes == MATRICES * 10 * 3 * 4


def test_beyond_capacity_the_error_names_the_tiles():
    machine, array = machine_with(sram_bytes=100, register_bytes=50)
    rows = next(machine.thread_blocks(10, 8))
    machine.load(array, rows)
    with pytest.raises(CapacityError, match=r"tiles in sram take 192 bytes \(x 96 B, second 96 B\).*at most 100"):
        machine.load(array, rows, name="second")
    with pytest.raises(CapacityError, match=r"tiles in registers take 96 bytes \(total 96 B\).*at most 50"):
        machine.full("total", rows, 3, 0.0, place="registers")


def test_arrays_by_role():
    machine, _ = machine_with()
    machine.array("y", 10, 2, dtype="bfloat16", heads="kv")
    assert machine.hbm_bytes_by_role == {"input": MATRICES * 10 * 3 * 4, "workspace": 4 * 10 * 2 * 2}


def test_updating_a_loaded_tile_leaves_the_array_alone():
    values = values_of("query")
    machine, array = machine_with(values.copy(), arithmetic=get_arithmetic("float32"))
    for rows in machine.thread_blocks(10, 10):
        machine.scale(machine.load(array, rows), 2.0)
    np.testing.assert_array_equal(array.values, values)


def test_a_store_rounds_to_the_storage_format():
    machine, array = machine_with(
        np.full((4, 2, 10, 3), 1 + 2.0**-10, np.float32), arithmetic=get_arithmetic("float32")
    )
    rounded = machine.array("rounded", 10, 3, dtype="bfloat16")
    for rows in machine.thread_blocks(10, 4):
        machine.store(machine.load(array, rows), rounded, rows)
    assert rounded.values.dtype.name == "bfloat16"
    assert (rounded.values == 1).all()


def test_rows_that_tiles_share_are_loaded_and_reduced_for_each(arithmetic):
    values = values_of("kv")
    machine, _ = machine_with(arithmetic=arithmetic)
    array = machine.array("y", 10, 3, heads="kv", values=values)
    total = machine.array("total", 10, 3, heads="kv", values=np.zeros_like(values))
    # Four rows made of 0–3, 2–5, 4–7 and 6–9, three of them in the first tile.
    for rows in machine.thread_blocks(4, 3, per="kv"):
        made_of = Windows(rows, stride=2, width=4)
        assert (made_of.size, made_of.tile) == ((8, 8) if rows.first == 0 else (4, 8))
        machine.reduce(machine.load(array, made_of, place="registers"), total, made_of)
    assert machine.traffic.by_array["y"].hbm_read_bytes == 4 * (8 + 4) * 3 * 4
    assert machine.traffic.by_array["total"].hbm_reduce_bytes == 4 * (8 + 4) * 3 * 4
    if arithmetic is not None:
        times = np.array([1, 1, 1, 1, 1, 1, 2, 2, 1, 1])  # the last tile has rows 6–9
        np.testing.assert_array_equal(total.values, values * times[:, None])


@pytest.mark.parametrize("blocks", [[(0, 0), (1, 0), (2, 0), (3, 0)], [(0, 0), (2, 0), (3, 0)]])
@pytest.mark.parametrize("independent", [False, True])
def test_products_of_tiles_add_up_whether_simulated_together_or_not(arithmetic, blocks, independent):
    """Products of all tiles that a block sees are added, the clipped one too, whether or not there is a gap between."""
    mask = BlockMask.from_blocks(blocks, q_block=3, kv_block=10, shape=(4, 1))
    problem = AttentionProblem(batch=2, heads=2, q_len=10, head_dim=3, dtype="float32", block_mask=mask)
    machine = Machine(problem, arithmetic=arithmetic)
    values = values_of("kv")
    x = machine.array("x", 10, 3, values=values)
    total = machine.array("total", 10, 3, values=np.zeros((4, 1, 10, 3), np.float32))
    out = machine.array("out", 3, 3)
    for key_rows in machine.thread_blocks(10, 10, together=not independent):
        products = machine.full("products", 3, 3, 0.0, place="registers")
        for rows in machine.tiles(problem.visible_queries(key_rows), 3, independent=independent):
            tile = machine.load(x, rows, place="registers")
            machine.matmul(tile, tile, place="registers", transpose_a=True, into=products)
            machine.reduce(tile, total, rows)
        machine.store(products, out)
    seen = np.repeat([(row, 0) in blocks for row in range(4)], 3)[:10, None]
    assert machine.traffic == Traffic(
        {
            "x": ArrayTraffic(hbm_read_bytes=4 * int(seen.sum()) * 3 * 4),
            "total": ArrayTraffic(hbm_reduce_bytes=4 * int(seen.sum()) * 3 * 4),
            "out": ArrayTraffic(hbm_write_bytes=4 * 9 * 4),
        }
    )
    if arithmetic is not None:
        kept = np.where(seen, values, 0)
        np.testing.assert_array_equal(total.values, kept)
        np.testing.assert_array_equal(out.values, kept.swapaxes(-1, -2) @ kept)
