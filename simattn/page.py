"""The report as one HTML page that loads nothing: styles inline, pictures as data, light and dark."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

from simattn import plots
from simattn.report import (
    DIRECTIONS,
    SHAPES,
    TIMED_SHAPES,
    USUAL,
    cells,
    figure_text,
    memory_cell,
    ratio_text,
    seconds_text,
    time_cell,
    traffic_cell,
)
from simattn.tables import byte_text

if TYPE_CHECKING:
    from simattn.report import Picture, Report, Row

DARK_COLOURS = {
    plots.INK: "#e6edf3",
    plots.MUTED: "#9aa4af",
    "#000000": "#e6edf3",
    "#ffffff": "#0d1117",
    "#0072b2": "#5b8def",
    "#56b4e9": "#7fd4f5",
    "#9bd3f2": "#c9eefb",
    "#d55e00": "#ff7a45",
    "#8e4585": "#b768ae",
    "#7f6000": "#b08d2e",
    "#7b2fbe": "#b07ae6",
    "#c51b3a": "#ef4a68",
    "#5a4500": "#a08540",
    "#98107f": "#d04fb8",
    "#3355ff": "#8095ff",
    "#14245c": "#56699f",
}
"""Colours that do not read on a dark page, and what replaces them."""

_BADGES = {"holds": "holds", "holds with constant c": "holds", "does not hold": "not"}
_COUNT_COLUMNS: Sequence[tuple[str, str, Callable[[Any], str]]] = (
    ("hbm_read_bytes", "read", byte_text),
    ("hbm_write_bytes", "written", byte_text),
    ("hbm_reduce_bytes", "reduced", byte_text),
    ("times_compulsory", "× once", ratio_text),
    ("sram_read_bytes", "SRAM read", byte_text),
    ("sram_write_bytes", "SRAM written", byte_text),
    ("matmul_flops", "matmul FLOP", lambda value: f"{value:.3g}"),
    ("matmul_flops_per_hbm_byte", "FLOP/byte", lambda value: f"{value:.3g}"),
    ("peak_sram_bytes", "SRAM/block", byte_text),
    ("peak_register_bytes", "registers/block", byte_text),
    ("equals_closed_form", "= formula", lambda value: "yes" if value else "NO"),
)


def page_html(report: Report, drawn: Iterable[tuple[Picture, str]]) -> str:
    """Return the page.

    Parameters
    ----------
    report
        What was counted.
    drawn
        The pictures, each with its SVG.
    """
    sections = [
        ("claims", "Claims", _claims(report)),
        ("pictures", "Pictures", "".join(_picture(picture, svg) for picture, svg in drawn)),
        ("traffic", "Traffic", _traffic(report)),
        ("memory", "Memory", _memory(report)),
        ("times", "Least times", _times(report)),
        ("programs", "Every counted program", _programs(report)),
        ("hardware", "Hardware", _hardware(report)),
    ]
    template = Template(resources.files("simattn").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title="Attention through the memory hierarchy",
        summary=(
            f"Every registered algorithm, counted byte for byte on {len(SHAPES)} problems with the tiles of "
            f"{escape(report.hardware.name)}, and every claim of the papers held against the counts. “Bytes between "
            "memory and multiprocessors” are what the papers call HBM accesses; a large L2 cache serves a part of them."
        ),
        contents="".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections),
        tiles=_tiles(report),
        body="".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in sections),
    )


# Sections


def _tiles(report: Report) -> str:
    claims = report.tables["claims"]
    counted = [row for row in report.tables["counts"] if row["error"] is None]
    verdicts = Counter(row["verdict"] for row in claims)
    tiles = [
        (f"{len(counted) - len(report.contradictions)} of {len(counted)}", "counts equal their closed form"),
        (f"{sum(row['ok'] for row in claims)} of {len(claims)}", "claims come out as they should"),
        *((str(count), verdict) for verdict, count in verdicts.most_common()),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in tiles)
        + "</div>"
    )


def _claims(report: Report) -> str:
    body = []
    for row in report.tables["claims"]:
        verdict = row["verdict"] if row["ok"] else f"FAILS: {row['verdict']}, expected: {row['expected']}"
        style = _BADGES.get(row["verdict"], "timing") if row["ok"] else "fails"
        body.append(
            f'<tr><td><span class="badge {style}">{escape(verdict)}</span></td>'
            f"<td>{escape(row['statement'])}<small>{_linked(row['source'])}</small></td>"
            f"<td>{escape(row['counted'])}<small>{escape(row['range_tested'])}</small></td></tr>"
        )
    return (
        '<table class="claims"><thead><tr><th>Verdict</th><th>Claim and source</th>'
        f"<th>Counted, and the range tested</th></tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _picture(picture: Picture, svg: str) -> str:
    alternative = escape(f"{picture.title}. {picture.caption}", quote=True)
    return (
        f"<figure><h3>{escape(picture.title)}</h3><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_address(dark(svg))}">'
        f'<img src="{_data_address(svg)}" alt="{alternative}"></picture>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def dark(svg: str) -> str:
    """Return the picture for a dark page: ink, reference lines and the darkest colours lightened."""
    for light, replacement in DARK_COLOURS.items():
        svg = svg.replace(light, replacement)
    # Matplotlib writes no colour where it is black.
    return svg.replace("<svg ", f'<svg fill="{DARK_COLOURS[plots.INK]}" ', 1)


def _data_address(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _traffic(report: Report) -> str:
    shapes = [(shape.name, shape.description) for shape in SHAPES.values()]
    parts = [
        _table(("problem", "what it is"), shapes, kind=""),
        f"<p>{escape(USUAL)}</p>",
        "<p>Bytes between memory and multiprocessors, and how many times that is what must be moved at least: every "
        "input and output once.</p>",
    ]
    for direction in DIRECTIONS:
        parts += [
            f"<h3>{direction.capitalize()}</h3>",
            _table(*cells(report.tables["counts"], direction, traffic_cell)),
        ]
    return "".join(parts)


def _memory(report: Report) -> str:
    parts = [
        "<p>Bytes of arrays in device memory beyond inputs and outputs: workspace, and what the forward pass saves for "
        "the backward pass.</p>"
    ]
    for direction in DIRECTIONS:
        parts += [f"<h3>{direction.capitalize()}</h3>", _table(*cells(report.tables["counts"], direction, memory_cell))]
    return "".join(parts)


def _times(report: Report) -> str:
    described = "; ".join(
        f"{escape(name)}: {escape(SHAPES[name].description)}" for name in dict.fromkeys(TIMED_SHAPES.values())
    )
    parts = [
        f"<p>{described}. Each resource at its published peak, "
        "all overlapped perfectly, for the bytes and operations of the program with that GPU's tiles: no run of it can "
        "be faster, another program can. The resource named sets the bound. The papers' model, all traffic at HBM "
        "bandwidth, is no bound, because the L2 cache serves a part.</p>"
    ]
    for direction, shape in TIMED_SHAPES.items():
        timed = [row for row in report.tables["times"] if row["shape"] == shape]
        parts += [
            f"<h3>{direction.capitalize()}: bound</h3>",
            _table(*cells(timed, direction, time_cell, by="hardware")),
            f"<h3>{direction.capitalize()}: the papers' model</h3>",
            _table(*cells(timed, direction, lambda row: seconds_text(row["model_seconds"]), by="hardware")),
        ]
    return "".join(parts)


def _programs(report: Report) -> str:
    parts = []
    for shape in SHAPES.values():
        body = [_program(row) for row in report.tables["counts"] if row["shape"] == shape.name]
        heads = ("program", "tiles", *(head for _, head, _ in _COUNT_COLUMNS))
        parts.append(f"<details><summary>{escape(shape.name)}</summary>{_table(heads, body)}</details>")
    return "".join(parts)


def _program(row: Row) -> list[str]:
    name = f"{row['algorithm']} {row['direction']}"
    if row["error"] is not None:
        return [name, row["error"]]
    depth = "" if row["tiles_depth"] is None else f"×{row['tiles_depth']}"
    tiles = f"{row['tiles_q']}×{row['tiles_kv']}{depth}"
    return [name, tiles, *(show(row[column]) for column, _, show in _COUNT_COLUMNS)]


def _hardware(report: Report) -> str:
    parts = []
    rows = report.tables["hardware"]
    for name in dict.fromkeys(row["hardware"] for row in rows):
        body = [
            (row["figure"], figure_text(row["figure"], row["value"]), row["source"])
            for row in rows
            if row["hardware"] == name
        ]
        table = _table(("figure", "value", "source"), body, kind="")
        parts.append(f"<details><summary>{escape(name)}</summary>{table}</details>")
    return "".join(parts)


# Pieces


def _table(heads: Sequence[str], body: Sequence[Sequence[str]], *, kind: str = "numbers") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    lines = []
    for row in body:
        first, *rest = row
        # A single cell beside the first one is a remark, and takes the whole line.
        span = f' colspan="{len(heads) - 1}"' if len(rest) == 1 < len(heads) - 1 else ""
        others = "".join(f"<td{span}>{_linked(cell)}</td>" for cell in rest)
        lines.append(f"<tr><th>{escape(first)}</th>{others}</tr>")
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _linked(text: str) -> str:
    """Return escaped text whose arXiv numbers are links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', escape(text))
