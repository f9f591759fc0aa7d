"""The report: its folder, its page, its text, and that it fails when it should."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from types import MappingProxyType

import pytest
from matplotlib.image import imread

import simattn
from simattn import page, report
from simattn.cli import main
from simattn.hardware import table

TABLES = {"claims", "counts", "times", "shapes", "hardware"}
PLOTS = {
    "length_forward",
    "length_backward",
    "sram_forward",
    "sram_backward",
    "arrays_forward",
    "arrays_backward",
    "roofline",
    "cheapest_prefill",
    "cheapest_decode",
}
# Elements that end themselves.
VOID = {"meta", "img", "source", "br", "link"}


def claim(**changes):
    return {
        "identifier": "one",
        "statement": "Standard attention moves Θ(Nd + N²) elements.",
        "source": "Dao et al. 2022, arXiv 2205.14135, Theorem 2",
        "range_tested": "N = 1…2 <tokens>",
        "counted": "c = 1 & 2",
        "numbers": {"c": [1, 2]},
        "verdict": "holds",
        "expected": "holds",
        "ok": True,
    } | changes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder, the text and the exit code of one run of the command."""
    folder = tmp_path_factory.mktemp("report") / "made" / "on the way"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main(["report", "--output", str(folder)])
    return folder, text.getvalue(), code


@pytest.fixture(scope="module")
def built():
    """A report whose only claim is made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "claim_rows", lambda: [claim()])
        return report.build_report(hardware="A100-40GB")


def changed(built, **tables):
    return report.Report(built.hardware, MappingProxyType({**built.tables, **tables}))


def test_the_command_succeeds(written):
    assert written[2] == 0


def test_every_file_is_there(written):
    folder, _, _ = written
    assert {path.name for path in folder.iterdir()} == {"index.html", "plots", "tables"}
    assert {path.name for path in (folder / "plots").iterdir()} == {
        f"{name}.{ending}" for name in PLOTS for ending in ("png", "svg")
    }
    assert {path.name for path in (folder / "tables").iterdir()} == {
        f"{name}.{ending}" for name in TABLES for ending in ("csv", "json")
    }


@pytest.mark.parametrize("name", sorted(PLOTS))
def test_plots_are_pictures(written, name):
    pixels = imread(written[0] / "plots" / f"{name}.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert pixels.std() > 0.01


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_say_the_same_in_both_formats(written, name):
    folder = written[0] / "tables"
    rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(rows) == len(read) > 0
    for row, cells in zip(rows, read, strict=True):
        for column, cell in cells.items():
            value = row.get(column)
            if isinstance(value, list):
                value = tuple(value)
            assert cell == ("" if value is None else str(value))
        assert set(row) - set(cells) <= {"numbers"}


def test_counts_are_those_of_the_calls(written):
    rows = json.loads((written[0] / "tables" / "counts.json").read_text(encoding="utf-8"))
    expected = {
        (shape.name, name, direction)
        for shape in report.SHAPES.values()
        for name, spec in simattn.ALGORITHMS.items()
        for direction, _ in shape.programs(spec)
    }
    assert {(row["shape"], row["algorithm"], row["direction"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        spec = simattn.ALGORITHMS[row["algorithm"]]
        arguments = {**report.SHAPES[row["shape"]].arguments_of(spec), "direction": row["program"]}
        if row["error"] is not None:
            assert not simattn.ALGORITHMS[row["algorithm"]].takes_any_mask
            with pytest.raises(ValueError, match=re.escape(row["error"])):
                simattn.count(row["algorithm"], **arguments)
            continue
        traffic = simattn.count(row["algorithm"], **arguments)
        assert row["hbm_bytes"] == traffic.hbm_bytes
        assert row["sram_read_bytes"] == traffic.sram_read_bytes
        assert row["equals_closed_form"] is (
            simattn.closed_form(row["algorithm"], **arguments) == traffic.global_only()
        )
        assert row["times_compulsory"] >= 1


def test_shapes_cover_what_is_promised():
    arguments = [shape.arguments for shape in report.SHAPES.values()]
    assert {given.get("causal", False) for given in arguments} == {False, True}
    assert any(given.get("kv_heads", given["heads"]) < given["heads"] for given in arguments)
    assert any(given.get("kv_len", given["q_len"]) != given["q_len"] for given in arguments)
    assert any(given.get("value_dim", given["head_dim"]) != given["head_dim"] for given in arguments)
    assert any("window" in given for given in arguments)
    assert any(given["dtype"].startswith("float8") for given in arguments)
    assert max(given["q_len"] for given in arguments) == 1 << 20


def test_times_are_bounded_by_their_resources(written):
    rows = json.loads((written[0] / "tables" / "times.json").read_text(encoding="utf-8"))
    assert {row["hardware"] for row in rows} == set(simattn.HARDWARE)
    timed = [row for row in rows if row["error"] is None]
    for row in timed:
        resources = ("dram", "l2", "sram", "matmul", "vector", "exponential")
        known = {name: row[f"{name}_seconds"] for name in resources if f"{name}_seconds" in row}
        assert row["bound_seconds"] == max(known.values()) == known[row["limited_by"]] > 0
    for row in rows:
        if row["error"] is not None:
            assert report.SHAPES[row["shape"]].arguments["dtype"] in row["error"]
    named = {row["hardware"] for row in timed if row["shape"] == report.ROOFLINE_SHAPE}
    assert named == set(simattn.HARDWARE)


class Page(HTMLParser):
    """Collects tags and the addresses they load, and checks that they nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loaded, self.targets, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [attributes[name] for name in ("src", "srcset", "data", "poster") if name in attributes]
        if tag in ("link", "script", "iframe"):
            self.loaded.append(attributes.get("href", tag))
        if tag == "a":
            self.targets.append(attributes["href"])
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(written):
    text = (written[0] / "index.html").read_text(encoding="utf-8")
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.tags.count("img") == parsed.tags.count("source") == len(PLOTS)
    assert len(parsed.loaded) == 2 * len(PLOTS)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parsed.loaded)
    assert "@import" not in text
    assert "url(" not in text
    assert "$" not in re.sub(r"base64,[^\"]*", "", text)
    assert {target[1:] for target in parsed.targets if target.startswith("#")} == set(parsed.ids)
    assert all(re.match(r"#|https://arxiv\.org/abs/\d{4}\.\d{5}$", target) for target in parsed.targets)


def test_the_page_is_for_phones_and_dark_rooms(written):
    text = (written[0] / "index.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "max-width: 44rem" in text


def test_the_page_has_every_claim_and_every_program(written):
    folder, _, _ = written
    text = (folder / "index.html").read_text(encoding="utf-8")
    claims = json.loads((folder / "tables" / "claims.json").read_text(encoding="utf-8"))
    assert text.count('class="badge') == len(claims)
    for name in simattn.ALGORITHMS:
        assert any(f"{name} {direction}" in text for direction in simattn.ALGORITHMS[name].directions)
    for row in table():
        assert page.escape(row["source"])[:40] in text or "arXiv" in row["source"]


def test_the_text_ends_with_the_claims_and_the_page(written):
    folder, text, _ = written
    lines = text.splitlines()
    assert lines[-1] == f"Page: {folder / 'index.html'}"
    claims = json.loads((folder / "tables" / "claims.json").read_text(encoding="utf-8"))
    after = text[text.index("\nClaims\n") :]
    assert after.count("\n[") == len(claims)
    assert f"{len(claims)} claims: " in lines[-3]
    assert "Every claim that should hold does." in lines[-2]
    assert "counts equal their formula" in text


def test_the_same_report_is_the_same_files(built, tmp_path, monkeypatch):
    first, *_, last = report.pictures(built.hardware)
    monkeypatch.setattr(report, "pictures", lambda hardware: [first, last])
    built.write(tmp_path / "one")
    built.write(tmp_path / "two")
    built.write(tmp_path / "two")  # over an earlier report
    for path in (tmp_path / "one").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_hardware_sets_the_tiles(built):
    assert built.hardware.name == "A100-40GB"
    row = next(row for row in built.tables["counts"] if row["shape"] == "gqa-4k" and row["algorithm"] == "flash2")
    plan = simattn.default_plan("flash2", hardware="A100-40GB", **report.SHAPES["gqa-4k"].arguments)
    assert (row["tiles_q"], row["tiles_kv"]) == (plan.tiles.q, plan.tiles.kv)


@pytest.mark.parametrize("name", sorted(simattn.HARDWARE))
def test_every_gpu_has_its_pictures(name):
    for picture in report.pictures(simattn.HARDWARE[name]):
        if picture.name.startswith(("arrays", "roofline")):
            assert picture.draw().has_data()


def test_a_claim_that_fails_fails_the_report(built):
    assert built.ok
    failing = changed(built, claims=[claim(), claim(verdict="does not hold", ok=False)])
    assert not failing.ok
    text = str(failing)
    assert "FAILS: does not hold, expected: holds" in text
    assert "Claims that should hold and do not: 1" in text
    html = page.page_html(failing, [])
    assert '<span class="badge fails">FAILS: does not hold, expected: holds</span>' in html


def test_a_contradicted_closed_form_fails_the_report(built):
    first, *others = built.tables["counts"]
    failing = changed(built, counts=[{**first, "equals_closed_form": False}, *others])
    assert not failing.ok
    name = f"{first['algorithm']} {first['direction']} on {first['shape']}"
    assert failing.contradictions == [name]
    assert f"Contradiction: {name}" in str(failing)


def test_a_refused_problem_is_a_dash_and_a_reason(built):
    first, *others = built.tables["counts"]
    refused = {name: first[name] for name in ("shape", "algorithm", "direction")} | {"error": "no tile <fits>"}
    changed_report = changed(built, counts=[refused, *others])
    assert changed_report.ok
    assert "–" in str(changed_report)
    assert "no tile &lt;fits&gt;" in page.page_html(changed_report, [])


def test_text_of_claims_is_escaped_and_cited(built):
    html = page.page_html(built, [])
    assert "N = 1…2 &lt;tokens&gt;" in html
    assert "c = 1 &amp; 2" in html
    assert '<a href="https://arxiv.org/abs/2205.14135">arXiv 2205.14135</a>, Theorem 2' in html


def test_dark_pictures_have_no_dark_ink():
    svg = '<svg width="1"><path style="fill: #24292f; stroke: #6e7781"/><path d="M 0 0"/></svg>'
    assert page.dark(svg) == (
        '<svg fill="#e6edf3" width="1"><path style="fill: #e6edf3; stroke: #9aa4af"/><path d="M 0 0"/></svg>'
    )


@pytest.mark.parametrize(
    ("ratio", "text"), [(1, "1"), (2.516, "2.52"), (999.4, "999"), (999.6, "1,000"), (26249.9, "26,200")]
)
def test_ratios_have_three_digits(ratio, text):
    assert report.ratio_text(ratio) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (1.234e-3, "1.23 ms"), (5.56e-4, "556 µs"), (3e-8, "30 ns"), (0, "0 ns")]
)
def test_times_have_three_digits(seconds, text):
    assert report.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("hbm_bytes", 40 << 30, "40 GiB"),
        ("sram_bytes_per_block", 163 << 10, "163 KiB"),
        ("l2_bytes", 253 << 19, "126.5 MiB"),
        ("hbm_bytes_per_second", 1_555_000_000_000, "1.555 TB/s"),
        ("matmul_flops_per_second[bfloat16]", 2_250_000_000_000_000, "2.25 PFLOP/s"),
        ("exponentials_per_second", 4.18176e12, "4.182 T/s"),
        ("boost_clock_hz", 1_410_000_000, "1.41 GHz"),
        ("streaming_multiprocessors", 108, "108"),
        ("compute_capability", "8.0", "8.0"),
        ("l2_bytes_per_second", None, "–"),
    ],
)
def test_hardware_figures_have_units(name, value, text):
    assert report.figure_text(name, value) == text


def test_progress_goes_to_a_terminal_only(monkeypatch, capsys):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with report._progress(2, "counting") as advance:
            advance("counted gqa-4k")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("counting" in captured.err) is terminal
