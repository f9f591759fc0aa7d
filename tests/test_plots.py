"""Plots: the Axes given come back with the counted numbers in them, and nothing overlaps."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import simattn
from simattn import kv_cache, plots
from simattn.bounds import compulsory_traffic
from simattn.roofline import ridge_point

GROUPED = {"heads": 8, "kv_heads": 2, "head_dim": 64, "causal": True}
FLOAT32_BYTES = 4


def line(axes, label):
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return found


def algorithms_with(direction):
    return [name for name, spec in simattn.ALGORITHMS.items() if direction in spec.directions]


def usual(name, direction, length, window=None):
    return simattn.ALGORITHMS[name].problem_class.usual_arguments(direction, length, window)


@pytest.fixture
def axes():
    return Figure(layout="constrained").add_subplot()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_length_draws_every_algorithm_and_the_compulsory_bytes(axes, direction):
    lengths = [1 << 10, 1 << 14, 1 << 18]
    assert plots.traffic_against_length(lengths=lengths, direction=direction, ax=axes, **GROUPED) is axes
    names = algorithms_with(direction)
    assert len(axes.get_lines()) == len(names) + 1
    for name in names:
        drawn = line(axes, name)
        assert list(drawn.get_xdata()) == lengths
        assert list(drawn.get_ydata()) == [
            simattn.count(name, **usual(name, direction, length), direction=direction, **GROUPED).hbm_bytes
            for length in lengths
        ]
    least = [
        compulsory_traffic(simattn.AttentionProblem(q_len=length, **GROUPED), direction).hbm_bytes for length in lengths
    ]
    assert list(line(axes, "inputs and outputs once").get_ydata()) == least
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "tokens" in axes.get_xlabel()
    assert "bytes" in axes.get_ylabel()


def test_length_sorts_and_takes_one_name(axes):
    plots.traffic_against_length("flash2", lengths=[4096, 1024], ax=axes)
    assert list(line(axes, "flash2").get_xdata()) == [1024, 4096]


@pytest.mark.parametrize("length", [1000, 1024])
def test_length_of_one_value_has_a_tick(axes, length):
    plots.traffic_against_length("flash2", lengths=[length], ax=axes)
    assert list(axes.get_xticks()) == [length]


def test_lengths_are_labelled_in_powers_of_two(axes):
    plots.traffic_against_length("flash2", ax=axes)
    FigureCanvasAgg(axes.figure).draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1k", "4k", "16k", "64k", "256k", "1M"]


def test_sram_draws_counts_of_the_fit_plan_where_tiles_fit(axes):
    head_dim, q_len = 64, 1 << 12
    elements = [head_dim, head_dim**2, 16 * head_dim**2]
    sizes = [FLOAT32_BYTES * count for count in elements]
    assert plots.traffic_against_sram(sram_bytes=sizes, ax=axes, q_len=q_len, head_dim=head_dim) is axes
    for name in (name for name in algorithms_with("forward") if simattn.ALGORITHMS[name].takes_any_mask):
        expected = {}
        for size, count in zip(sizes, elements, strict=True):
            try:
                arguments = {**usual(name, "forward", q_len), "head_dim": head_dim, "dtype": "float32"}
                traffic = simattn.count(name, plan="fit", sram_bytes=size, **arguments)
            except simattn.CapacityError:
                continue
            expected[count] = traffic.hbm_bytes
        drawn = line(axes, name)
        assert dict(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)) == expected
    assert head_dim not in line(axes, "flash2").get_xdata()


def test_sram_references_meet_at_the_knee(axes):
    head_dim, q_len, heads = 64, 1 << 12, 3
    plots.traffic_against_sram("flash2", q_len=q_len, head_dim=head_dim, heads=heads, ax=axes)
    small, large, knee = (line(axes, label) for label in ("N²d/√M", "N²d²/M", "M = d²"))
    assert small.get_xdata()[1] == large.get_xdata()[0] == knee.get_xdata()[0] == head_dim**2
    # At M = d² both are N² elements.
    assert small.get_ydata()[1] == pytest.approx(heads * FLOAT32_BYTES * q_len**2)
    assert large.get_ydata()[0] == pytest.approx(heads * FLOAT32_BYTES * q_len**2)
    for drawn, exponent in ((small, -0.5), (large, -1)):
        (x0, x1), (y0, y1) = drawn.get_xdata(), drawn.get_ydata()
        assert math.log(y1 / y0) / math.log(x1 / x0) == pytest.approx(exponent)


def test_sram_shows_the_tiled_program_ahead_below_the_knee_only(axes):
    head_dim = 128
    plots.traffic_against_sram(["flash2", "small_cache"], head_dim=head_dim, ax=axes)
    flash, small = (
        dict(zip(line(axes, name).get_xdata(), line(axes, name).get_ydata(), strict=True))
        for name in ("flash2", "small_cache")
    )
    assert small[head_dim**2 // 8] < flash[head_dim**2 // 8]
    assert small[head_dim**2 * 8] > flash[head_dim**2 * 8]


def test_sram_without_any_fit_still_shows_the_references(axes):
    plots.traffic_against_sram("flash2", sram_bytes=[64, 128], ax=axes)
    assert [drawn.get_label() for drawn in axes.get_lines()] == ["N²d/√M"]


def test_roofline_places_roofs_and_points(axes):
    points = [("flash2 forward", 100.0, 2e14), plots.RooflinePoint("standard backward", 20.0, 1e13)]
    assert plots.roofline("H100-SXM", points, ax=axes) is axes
    hardware = simattn.HARDWARE["H100-SXM"]
    hbm, l2, first, second = axes.get_lines()
    peak, ridge = hardware.matmul_flops_per_second("bfloat16"), ridge_point("H100-SXM", "bfloat16")
    assert hbm.get_xdata()[1] == pytest.approx(ridge)
    assert list(hbm.get_ydata()[1:]) == [pytest.approx(peak), peak]
    assert hbm.get_ydata()[0] / hbm.get_xdata()[0] == pytest.approx(hardware.hbm_bytes_per_second)
    assert l2.get_ydata()[0] / l2.get_xdata()[0] == pytest.approx(2 * hardware.l2_bytes_per_second)
    assert (first.get_xdata()[0], first.get_ydata()[0]) == (100.0, 2e14)
    assert first.get_markeredgecolor() == plots.algorithm_style("flash2")["color"]
    assert second.get_markerfacecolor() == "none"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["flash2 forward", "standard backward"]


def test_roofline_leaves_out_an_unpublished_l2_and_takes_no_points(axes):
    plots.roofline("T4", [], dtype="float16", ax=axes)
    assert [drawn.get_label() for drawn in axes.get_lines()] == ["HBM 0.32 TB/s"]
    assert axes.get_legend() is None


@pytest.mark.parametrize("low", [0.4, 4.0, 40.0])
def test_ticks_of_a_roofline_do_not_touch(low):
    axes = plots.roofline("H100-SXM", [("nsa forward", low, 2e13), ("flash2 backward", 200.0, 9e14)])
    FigureCanvasAgg(axes.figure).draw()
    for axis, (least, greatest) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        boxes = [label.get_window_extent() for value, label in ticks if least <= value <= greatest]
        assert len(boxes) >= 3
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_bars_stack_to_the_traffic_of_each_run(axes):
    runs = {
        name: simattn.profile(name, **usual(name, "backward", 4096), direction="backward", **GROUPED)
        for name in algorithms_with("backward")
    }
    assert plots.traffic_by_array(runs, ax=axes) is axes
    ends = [0.0] * len(runs)
    for container in axes.containers:
        for index, bar in enumerate(container):
            assert bar.get_x() == pytest.approx(ends[index])
            ends[index] += bar.get_width()
    assert ends == pytest.approx([run.traffic.hbm_bytes for run in runs.values()])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(runs)
    by_label = {container.get_label(): container for container in axes.containers}
    position = list(runs).index("flash2")
    counters = runs["flash2"].traffic.by_array["dq_accumulator"]
    width = by_label["dq_accumulator"][position].get_width()
    assert width == counters.hbm_read_bytes + counters.hbm_write_bytes + counters.hbm_reduce_bytes
    assert "other" in by_label


def test_bars_take_runs_without_labels(axes):
    run = simattn.profile("flash2", q_len=1024)
    plots.traffic_by_array([run], ax=axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["flash2 forward"]


def test_slots_stack_to_the_pool(axes):
    workload = kv_cache.generate_workload(
        30, prompt=kv_cache.Constant(9), output=kv_cache.Geometric(20), max_tokens=128
    )
    run = kv_cache.simulate(workload, kv_cache.Buddy("pow2"), pool_tokens=256, max_tokens=128)
    assert plots.kv_cache_over_time(run, ax=axes) is axes
    assert [area.get_label() for area in axes.collections] == list(kv_cache.STATES)
    base = np.zeros(len(run.step))
    for state, area in zip(kv_cache.STATES, axes.collections, strict=True):
        base = base + 100 * getattr(run, state) / run.pool_tokens
        corners = {(x, round(y, 9)) for x, y in area.get_paths()[0].vertices}
        assert {(x, round(y, 9)) for x, y in zip(run.step.tolist(), base.tolist(), strict=True)} <= corners
    assert base == pytest.approx(np.full(len(run.step), 100.0))
    FigureCanvasAgg(axes.figure).draw()


def test_colours_belong_to_the_algorithm(axes):
    plots.traffic_against_length(["flash3", "standard"], lengths=[1024, 2048], ax=axes)
    for name in ("flash3", "standard"):
        assert line(axes, name).get_color() == plots.algorithm_style(name)["color"]
    colours = [plots.algorithm_style(name)["color"] for name in simattn.ALGORITHMS]
    assert len(set(colours)) == min(len(colours), len(plots.PALETTE))
    styles = [tuple(plots.algorithm_style(name).values()) for name in simattn.ALGORITHMS]
    assert len(set(styles)) == len(styles)


def test_arrays_keep_their_colours_between_pictures():
    forward = plots.traffic_by_array([simattn.profile("standard", q_len=4096)])
    backward = plots.traffic_by_array([simattn.profile("standard", q_len=4096, direction="backward")])
    colours = [
        {container.get_label(): container[0].get_facecolor() for container in axes.containers}
        for axes in (forward, backward)
    ]
    shared = colours[0].keys() & colours[1].keys()
    assert {"q", "probabilities"} <= shared
    assert all(colours[0][name] == colours[1][name] for name in shared)


@pytest.mark.parametrize(
    "draw",
    [
        plots.traffic_against_length,
        lambda: plots.traffic_against_length(direction="backward"),
        plots.traffic_against_sram,
    ],
    ids=["length", "length backward", "sram"],
)
def test_labels_of_a_new_figure_do_not_touch(draw):
    figure = draw().get_figure()
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    texts = [*axes.texts, axes.xaxis.label, axes.yaxis.label]
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        texts += [label for value, label in ticks if low <= value <= high]
    texts.append(next(text for text in axes.findobj(Text) if text.get_text() == axes.get_title(loc="left")))
    # Text's own method: an annotation's extent has its arrow in it.
    boxes = [Text.get_window_extent(text) for text in texts]
    assert len(boxes) > 10
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.01, 0.1))
def test_labels_are_spread_in_order(heights, gap):
    wanted = sorted(heights)
    spread = plots._spread(wanted, gap)
    assert len(spread) == len(wanted)
    assert all(later - earlier >= gap * (1 - 1e-9) for earlier, later in itertools.pairwise(spread))
    assert all(position <= 1 - gap / 2 + 1e-9 for position in spread)


def test_distant_labels_stay_where_they_are():
    assert plots._spread([0.1, 0.5, 0.8], 0.1) == [0.1, 0.5, 0.8]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.traffic_against_length(["flash9"]), "algorithm='flash9'"),
        (lambda: plots.traffic_against_length([]), "algorithms="),
        (lambda: plots.traffic_against_length(lengths=[]), "lengths="),
        (lambda: plots.traffic_against_length(lengths=[0, 4]), "lengths="),
        (lambda: plots.traffic_against_length(direction="sideways"), "direction='sideways'"),
        (lambda: plots.traffic_against_sram(sram_bytes=[]), "sram_bytes="),
        (lambda: plots.traffic_against_sram(q_len=0), "q_len="),
        (lambda: plots.traffic_against_sram(dtype="int8"), "dtype='int8'"),
        (lambda: plots.roofline("H900", []), "hardware='H900'"),
        (lambda: plots.roofline("T4", []), "dtype='bfloat16'"),
        (lambda: plots.roofline("T4", [("flash2", math.nan, 1.0)], dtype="float16"), "flash2"),
        (lambda: plots.traffic_by_array([]), "runs is empty"),
        (lambda: plots.traffic_by_array([simattn.profile("flash2", q_len=8)] * 2), "distinct labels"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_global_backend_is_chosen():
    script = (
        "import sys; from simattn import plots; plots.traffic_against_length('flash2').figure.canvas.draw(); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
