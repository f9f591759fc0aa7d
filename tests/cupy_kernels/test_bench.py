"""The benchmark's reports: tables and pictures of measurements, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import fake_cupy
import numpy as np
import pytest

from cupy_kernels import bench
from cupy_kernels.table import ALGORITHMS

MEASUREMENTS = Path(__file__).parents[2] / "docs" / "measurements"


def measurement(name):
    return json.loads((MEASUREMENTS / f"{name}.json").read_text())


def test_flops_are_the_papers():
    forward = bench.Shape("forward", "float32", 64, 2048, causal=False)
    assert forward.flops == 4 * 4 * 16 * 2048**2 * 64  # batch · heads · N² · d
    backward = bench.Shape("backward", "float32", 64, 2048, causal=False)
    assert 4 * backward.flops == 10 * forward.flops
    causal = bench.Shape("forward", "float32", 64, 2048, causal=True)
    assert 2 * causal.flops == forward.flops
    assert [bench.Shape("forward", "float32", 64, length, causal=False).batch for length in (2048, 8192, 16384)] == [
        4,
        1,
        1,
    ]


@pytest.mark.parametrize("name", ["simt-speed", "tensor-core-speed"])
def test_the_report_is_consistent(name):
    report = measurement(name)
    peak = report["fp32_peak_flops_per_second"]
    for row in report["rows"]:
        shape = bench.Shape(**{name: row[name] for name in bench.Shape.__dataclass_fields__})
        seconds = row["milliseconds"] / 1e3
        assert row["teraflops_per_second"] == pytest.approx(shape.flops / seconds / 1e12)
        assert row["fraction_of_fp32_peak"] == pytest.approx(shape.flops / seconds / peak)
        if row["counted_hbm_bytes"] is not None:
            assert row["gigabytes_per_second"] == pytest.approx(row["counted_hbm_bytes"] / seconds / 1e9)


def test_every_configuration_on_tensor_cores_has_what_it_is_compared_with():
    """The documentation takes ratios of these."""
    found = {}
    for row in measurement("tensor-core-speed")["rows"]:
        shape = bench.Shape(**{name: row[name] for name in bench.Shape.__dataclass_fields__})
        found.setdefault(shape, set()).add(row["contender"])
    assert set(found) <= set(bench.SHAPES)
    compared = {"flash3", "flash2", "FlashAttention-3", "torch cudnn_attention", "torch flash_attention"}
    assert all(compared <= contenders for contenders in found.values())


@pytest.mark.parametrize(
    ("name", "dtype", "directions"),
    [("simt-speed", "float32", 2), ("simt-speed", "float16", 2), ("tensor-core-speed", "bfloat16", 1)],
)
def test_the_picture_has_a_line_for_every_contender(name, dtype, directions):
    report = measurement(name)
    figure = bench.plot(report, dtype)
    assert len(figure.axes) == directions * 2 * 3  # directions, masks, head dimensions
    rows = [row for row in report["rows"] if row["dtype"] == dtype]
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {row["contender"] for row in rows}
    drawn = sum(len(line.get_xdata()) for axes in figure.axes for line in axes.get_lines())
    if dtype != "bfloat16":
        drawn -= 2 * len(figure.axes)  # the peak's line has two points in every panel
    assert drawn == len(rows)
    for axes in figure.axes:
        bottom, top = axes.get_ylim()
        assert all(bottom <= value <= top for line in axes.get_lines() for value in line.get_ydata())


def test_an_earlier_run_is_read_and_drawn(tmp_path, capsys):
    picture = tmp_path / "speed.svg"
    assert bench.main(["--read", str(MEASUREMENTS / "simt-speed.json"), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "flash2 deterministic" in printed
    assert "fp32 peak measured on" in printed
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize("length", [256, 2 * bench.LONGEST_THROUGH_MEMORY])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_algorithms_that_take_a_problem_are_timed(monkeypatch, direction, dtype, length):
    shape = bench.Shape(direction, dtype, 64, length, causal=True, heads=1, tokens=length)
    with fake_cupy.installed(monkeypatch):
        cupy = bench.require_cupy()
        inputs = [tuple(cupy.zeros((1, length, 1, 64), np.dtype(dtype)) for _ in range(4))]
        contenders, counted = bench.our_contenders(shape, inputs)
    expected = {name for name, item in ALGORITHMS.items() if direction in item.programs}
    if dtype == "float32":
        expected -= {"flash3"}
    if length > bench.LONGEST_THROUGH_MEMORY:
        expected -= set(bench.THROUGH_MEMORY)
    if direction == "backward":
        expected |= {"flash2 deterministic"}
    assert set(contenders) == set(counted) == expected


def test_calls_of_the_host_are_timed_in_turn(monkeypatch):
    called = []
    with fake_cupy.installed(monkeypatch):
        seconds = bench.host_seconds({"first": lambda _turn: called.append(1), "second": called.append}, repeats=2)
    assert called == [1, 1, 0, 1] * 9
    assert set(seconds) == {"first", "second"}
    assert min(seconds.values()) > 0
