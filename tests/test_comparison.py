"""Which algorithm is cheapest on a model's shape: rows are the counts of the calls, times the layers."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from simattn import MODELS, ModelShape, compare, plots
from simattn.algorithms import ALGORITHMS
from simattn.bounds import compulsory_traffic
from simattn.cli import main
from simattn.comparison import PHASES
from simattn.roofline import time_bounds, work_of

NUMBERS = ("hbm_bytes", "times_compulsory", "matmul_flops", "exponentials", "seconds", "limited_by")


def has_program(algorithm, phase):
    spec = ALGORITHMS[algorithm]
    return "forward" in spec.programs if phase == "prefill" else spec.step_direction is not None


def arguments_of(row, shape, length, batch):
    spec, direction = ALGORITHMS[row.algorithm], "forward" if row.phase == "prefill" else "decode"
    usual = spec.problem_class.usual_arguments(direction, length, shape.window)
    usual |= {"causal": True} if row.phase == "prefill" else {"direction": spec.step_direction}
    variants = {
        "": {},
        "heads packed": {"packed_heads": shape.heads // shape.kv_heads},
        "one head per block": (
            {"packed_heads": 1} if row.algorithm.endswith("_window") else {"query_heads": "one_per_block"}
        ),
    }
    sizes = {name: getattr(shape, name) for name in ("heads", "kv_heads", "head_dim", "value_dim", "dtype")}
    return {**sizes, "batch": batch, **usual, **variants[row.variant]}


@settings(max_examples=25)
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    head_dim=st.sampled_from((16, 64, 128)),
    layers=st.integers(1, 100),
    length=st.integers(1, 1 << 20),
    batch=st.integers(1, 9),
    window=st.none() | st.tuples(st.integers(0, 5000), st.just(0)),
)
def test_rows_are_the_counts_of_the_calls(kv_heads, group, head_dim, layers, length, batch, window):
    shape = ModelShape(layers=layers, heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim, window=window)
    compared = compare(length, shape, batch=batch)
    expected = {(phase, name) for phase in PHASES for name in ALGORITHMS if has_program(name, phase)}
    assert {(row.phase, row.algorithm) for row in compared.rows} == expected
    for row in compared.rows:
        if row.refusal is not None:
            assert not ALGORITHMS[row.algorithm].takes_any_mask
            assert all(getattr(row, name) is None for name in NUMBERS)
            continue
        run = simattn.profile(row.algorithm, **arguments_of(row, shape, length, batch))
        bounds = time_bounds(work_of(run), "H100-SXM")
        assert row.hbm_bytes == layers * run.traffic.hbm_bytes
        assert row.matmul_flops == layers * run.operations.matmul_flops
        assert row.exponentials == layers * run.operations.exponentials
        assert row.seconds == layers * bounds.seconds
        assert row.limited_by == bounds.limited_by
        assert row.times_compulsory >= 1
        assert row.times_compulsory * compulsory_traffic(run.problem, run.direction).hbm_bytes == pytest.approx(
            run.traffic.hbm_bytes
        )


def test_packing_heads_reads_each_cached_byte_once():
    compared = compare(1 << 14, "Llama-3-8B", phases=["decode"], algorithms=["flash3"])
    plain, packed = compared.rows
    assert (plain.variant, packed.variant) == ("", "heads packed")
    cache = 32 * 8 * (1 << 14) * 2 * 128 * 2
    queries = 32 * 32 * 128 * 2
    assert packed.hbm_bytes == cache + 2 * queries + 32 * 32 * 4  # k and v; q and out; lse
    assert plain.hbm_bytes == 4 * cache + 2 * queries + 32 * 32 * 4
    assert compared.cheapest("decode") is packed


def test_what_the_table_says():
    compared = compare(1 << 17, "Llama-3-8B")
    text = repr(compared)
    assert text.startswith(
        "Llama-3-8B: 32 layers, 32 query heads on 8 KV heads of 128 columns in bfloat16; 1 × 131,072 tokens"
    )
    assert text.index("\nprefill\n") < text.index("\ndecode\n")
    times = [row.seconds for row in compared.of_phase("prefill") if row.refusal is None]
    assert times == sorted(times)
    assert compared.cheapest("prefill", by="seconds").seconds == times[0]
    assert text.count("split_kv") == 2  # with and without the query heads of a KV head in one block
    assert "split_kv, one head per block" in text
    assert next(compared.as_rows())["phase"] == "prefill"


def test_models_have_sources_and_can_be_counted():
    for name, shape in MODELS.items():
        assert shape.name == name
        assert "arXiv" in shape.source
        assert compare(1024, name, algorithms=["flash2"]).cheapest("decode").hbm_bytes > 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"length": 0}, ValueError, "length=0: expected an integer of at least 1"),
        ({"length": 1.5}, TypeError, "length=1.5 is a float"),
        ({"batch": 0}, ValueError, "batch=0: expected"),
        ({"model": "GPT-5"}, ValueError, "model='GPT-5': expected one of"),
        ({"model": 5}, TypeError, "model is a int: expected one of"),
        ({"phases": ["train"]}, ValueError, "phases='train': expected one of"),
        ({"algorithms": ["flash9"]}, ValueError, "algorithm='flash9' is unknown"),
        ({"hardware": "H1"}, ValueError, "H1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        compare(**{"length": 8, "model": "Llama-3-8B", **arguments})


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"heads": 3, "kv_heads": 2}, ValueError, "kv_heads=2 does not divide heads=3"),
        ({"heads": 0}, ValueError, "heads=0: expected"),
        ({"heads": 2, "layers": 0}, ValueError, "layers=0: expected"),
        ({"heads": 2, "head_dim": "x"}, TypeError, "head_dim='x'"),
        ({"heads": 2, "dtype": "int8"}, ValueError, "int8"),
        ({"heads": 2, "window": 5}, TypeError, "window=5: expected None or a pair"),
    ],
    ids=str,
)
def test_bad_shapes_are_named(sizes, error, words):
    with pytest.raises(error, match=words):
        ModelShape(**sizes)


def test_nothing_counted_is_said():
    compared = compare(64, ModelShape(heads=1, window=(3, 0)), algorithms=["linear"])
    with pytest.raises(ValueError, match="phase='prefill': expected an algorithm that was counted"):
        compared.cheapest("prefill")
    with pytest.raises(ValueError, match="phase='prefill': expected an algorithm that was counted"):
        plots.comparison(compared, "prefill")
    with pytest.raises(ValueError, match="by='bytes': expected one of"):
        compared.cheapest("prefill", by="bytes")


def test_the_picture_has_a_bar_for_every_row():
    compared = compare(1 << 15, "Llama-3-8B")
    for phase in PHASES:
        drawn = plots.comparison(compared, phase)
        rows = [row for row in compared.of_phase(phase) if row.refusal is None]
        for ax, name in zip(drawn, ("hbm_bytes", "matmul_flops", "seconds"), strict=True):
            assert [bar.get_width() for bar in ax.patches] == [getattr(row, name) for row in rows]
        assert [label.get_text() for label in drawn[0].get_yticklabels()] == [row.label for row in rows]
    with pytest.raises(ValueError, match="axes has 2 Axes: expected 3"):
        plots.comparison(compared, "prefill", axes=drawn[:2])


def test_the_text_ends_with_arguments_that_are_not_the_models():
    compared = compare(8192, "Mistral-7B", algorithms=["flash2", "sliding_window", "overlapped_window"])
    assert repr(compared).splitlines()[-1] == "Usual arguments: overlapped_window window_len=512, overlap=256"
    assert "Usual arguments" not in repr(compare(8192, "Llama-3-8B", algorithms=["flash2", "linear"]))


class TestCommand:
    def test_a_picture_has_room_for_every_row(self, tmp_path):
        path = tmp_path / "picture.svg"
        assert main(["compare", "--seq", "32k", "--model", "Llama-3-8B", "--plot", str(path)]) == 0
        counted = [row for row in compare(1 << 15, "Llama-3-8B").rows if row.refusal is None]
        height = float(re.search(r'height="([\d.]+)pt"', path.read_text(encoding="utf-8"))[1])
        assert height >= 2 * 72 + 20 * len(counted)

    def test_it_prints_the_table(self, capsys):
        assert main(["compare", "--seq", "8k", "--model", "Llama-3-8B"]) == 0
        assert capsys.readouterr().out == f"{compare(8192, 'Llama-3-8B')!r}\n"

    def test_sizes_replace_the_models(self, capsys):
        assert (
            main(["compare", "--seq", "8k", "--model", "Mistral-7B", "--heads", "16", "--phase", "decode", "--json"])
            == 0
        )
        shape = ModelShape(layers=32, heads=16, window=(4095, 0))
        expected = compare(8192, shape, phases=["decode"])
        assert json.loads(capsys.readouterr().out) == list(expected.as_rows())

    def test_a_shape_of_its_own_and_a_picture(self, capsys, tmp_path):
        path = tmp_path / "picture.svg"
        command = [
            "compare",
            "--seq",
            "4k",
            "--heads",
            "4",
            "--algorithm",
            "flash2,linear",
            "--csv",
            "--plot",
            str(path),
        ]
        assert main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 + 2 * 2
        assert "<svg" in path.read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--seq", "1k"], "--model or --heads is missing"),
            (["--seq", "1k", "--model", "GPT-5"], "model='GPT-5': expected one of"),
            (["--seq", "1k", "--heads", "2", "--phase", "train"], "phases='train': expected one of"),
            (["--seq", "1k", "--heads", "2", "--phase", "prefill", "--algorithm", "paged", "--plot", "x.png"],
             "expected an algorithm that was counted"),
            (["--seq", "1k", "--heads", "2", "--algorithm", "flash2", "--plot", "x.nothing"], "--plot x.nothing: "),
        ],
        ids=str,
    )  # fmt: skip
    def test_mistakes_are_named(self, capsys, arguments, words):
        assert main(["compare", *arguments]) == 2
        assert words in capsys.readouterr().err
