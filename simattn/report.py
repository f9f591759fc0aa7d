"""The report: every algorithm counted on stated problems, every claim checked, as text and as one page.

>>> report = build_report()                                                              # doctest: +SKIP
>>> print(report)                                                                        # doctest: +SKIP
>>> report.write("simattn-report")                                                       # doctest: +SKIP
PosixPath('simattn-report/index.html')
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simattn.algorithms import ALGORITHMS
from simattn.algorithms.algorithm import Algorithm
from simattn.api import Run, closed_form, profile
from simattn.arithmetic.formats import FLOAT8
from simattn.bounds import compulsory_traffic
from simattn.comparison import compare, usual_text
from simattn.hardware import HARDWARE, Hardware, get_hardware, table
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import Direction
from simattn.roofline import time_bounds, work_of
from simattn.tables import byte_text, csv_text, json_text, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "SHAPES",
    "Picture",
    "Report",
    "Shape",
    "build_report",
    "claim_rows",
    "claims_text",
    "hardware_text",
]

Row = dict[str, Any]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "decode")
"""Directions that have tables: in "decode" a program without a decoding step of its own runs its forward pass."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A problem that every algorithm is counted on.

    Attributes
    ----------
    name
        Short name, in tables.
    description
        What it stands for.
    arguments
        Arguments of :func:`simattn.count`.
    is_step
        Whether it is a decoding step.
    """

    name: str
    description: str
    arguments: Mapping[str, Any]
    is_step: bool = False

    def arguments_of(self, spec: Algorithm) -> dict[str, Any]:
        """Return the arguments of an algorithm's problem of this shape, with the usual ones of its own."""
        given = dict(self.arguments)
        length, window = given.get("kv_len", given["q_len"]), given.get("window")
        usual = spec.problem_class.usual_arguments("decode" if self.is_step else "forward", length, window)
        # The keys of a step may be fewer than there are tokens.
        return {**given, **usual} if self.is_step else {**usual, **given}

    def programs(self, spec: Algorithm) -> Iterator[tuple[Direction, Direction]]:
        """Yield what is counted of an algorithm: the direction, and the direction of the program that is run for it.

        Eight-bit storage has no backward pass.
        """
        if self.is_step:
            if spec.step_direction is not None:
                yield "decode", spec.step_direction
            return
        for direction in spec.directions:
            if direction == "forward" or (direction == "backward" and self.arguments["dtype"] not in FLOAT8):
                yield direction, direction


def _shape(name: str, description: str, *, is_step: bool = False, **arguments: Any) -> Shape:
    return Shape(name=name, description=description, arguments=MappingProxyType(arguments), is_step=is_step)


_GROUPED: Mapping[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "causal": True}

SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            _shape(
                "gpt2-1k",
                "FlashAttention's Figure 2: GPT-2 medium, 64 sequences of 1024 tokens, 16 heads of 64, causal",
                batch=64, heads=16, q_len=1024, head_dim=64, dtype="float16", causal=True,
            ),
            _shape(
                "mha-4k",
                "self-attention of the papers' benchmarks: 4 sequences of 4096 tokens, 16 heads of 128",
                batch=4, heads=16, q_len=4096, head_dim=128, dtype="float16",
            ),
            _shape(
                "gqa-4k",
                "prefill of 4096 tokens, 32 query heads on 8 KV heads of 128, causal",
                q_len=4096, **_GROUPED,
            ),
            _shape("gqa-128k", "the same with 131 072 tokens", q_len=1 << 17, **_GROUPED),
            _shape("gqa-1m", "the same with 1 048 576 tokens", q_len=1 << 20, **_GROUPED),
            _shape(
                "window-32k",
                "the same with 32 768 tokens, each seeing itself and 4095 before it",
                q_len=1 << 15, window=(4095, 0), **_GROUPED,
            ),
            _shape(
                "chunk-2k/128k",
                "the last 2048 of 131 072 tokens, prefilled as one chunk, causal",
                q_len=1 << 11, kv_len=1 << 17, **_GROUPED,
            ),
            _shape(
                "mla-8k",
                "prefill of 8192 tokens, 128 heads with keys of 192 columns and values of 128, causal",
                heads=128, q_len=1 << 13, head_dim=192, value_dim=128, dtype="bfloat16", causal=True,
            ),
            _shape(
                "cross-448/1500",
                "cross-attention of a speech decoder: 448 queries on 1500 keys, 8 sequences, 20 heads of 64",
                batch=8, heads=20, q_len=448, kv_len=1500, head_dim=64, dtype="float16",
            ),
            _shape(
                "fp8-4k",
                "gqa-4k stored in eight bits, forward",
                q_len=4096, **{**_GROUPED, "dtype": "float8_e4m3fn"},
            ),
            _shape(
                "step-8k",
                "a decoding step of 64 sequences of 8192 tokens, 32 query heads on 8 KV heads of 128",
                batch=64, q_len=1, kv_len=1 << 13, is_step=True, **_GROUPED,
            ),
            _shape(
                "step-128k",
                "a decoding step of one sequence of 131 072 tokens, the same heads",
                q_len=1, kv_len=1 << 17, is_step=True, **_GROUPED,
            ),
        )
    }
)  # fmt: skip
"""The problems of the report, by name."""

USUAL = f"Where a problem gives no others, algorithms have their usual arguments: {usual_text(ALGORITHMS, 1 << 20)}."
"""What the problems do not say."""

TIMED_SHAPES: Mapping[Direction, str] = MappingProxyType(
    {"forward": "mha-4k", "backward": "mha-4k", "decode": "step-8k"}
)
"""The shapes whose times are printed."""

ROOFLINE_SHAPE = "mha-4k"
"""The shape that stands under the roof; its format exists on every GPU of the table."""

COMPARED_MODEL, COMPARED_LENGTH = "Llama-3-8B", 1 << 17
"""Whose attention every algorithm is compared on."""

DRAWN_SHAPE = "gqa-4k"
"""The shape whose traffic is drawn by array."""


# Counting


def count_rows(hardware: Hardware, advance: Callable[[str], None]) -> list[Row]:
    """Count every algorithm and direction on every shape, each held against its closed form.

    A program that refuses a shape has the reason in ``error`` and nothing else.
    """
    rows = []
    for shape in SHAPES.values():
        for name, spec in ALGORITHMS.items():
            for direction, program in shape.programs(spec):
                rows.append(_count_row(shape, name, direction, program, hardware))
        advance(f"counted {shape.name}")
    return rows


def _count_row(shape: Shape, algorithm: str, direction: Direction, program: Direction, hardware: Hardware) -> Row:
    row: Row = {
        "shape": shape.name,
        "algorithm": algorithm,
        "direction": direction,
        "program": program,
        "error": None,
    }
    arguments = {**shape.arguments_of(ALGORITHMS[algorithm]), "direction": program, "hardware": hardware}
    try:
        run = profile(algorithm, **arguments)
    except ValueError as error:
        return {**row, "error": str(error)}
    traffic, compulsory = run.traffic, compulsory_traffic(run.problem, program).hbm_bytes
    return {
        **row,
        "tiles_q": run.plan.tiles.q,
        "tiles_kv": run.plan.tiles.kv,
        "tiles_depth": run.plan.tiles.depth,
        "hbm_read_bytes": traffic.hbm_read_bytes,
        "hbm_write_bytes": traffic.hbm_write_bytes,
        "hbm_reduce_bytes": traffic.hbm_reduce_bytes,
        "hbm_bytes": traffic.hbm_bytes,
        "compulsory_bytes": compulsory,
        "times_compulsory": traffic.hbm_bytes / compulsory,
        "sram_read_bytes": traffic.sram_read_bytes,
        "sram_write_bytes": traffic.sram_write_bytes,
        "matmul_flops": run.operations.matmul_flops,
        "vector_flops": run.operations.vector_flops,
        "exponentials": run.operations.exponentials,
        "matmul_flops_per_hbm_byte": run.operations.matmul_flops / traffic.hbm_bytes,
        "peak_sram_bytes": run.peak_sram_bytes,
        "peak_register_bytes": run.peak_register_bytes,
        **{f"{role}_bytes": run.hbm_bytes_by_role.get(role, 0) for role in ("input", "output", "saved", "workspace")},
        "equals_closed_form": closed_form(algorithm, **arguments) == traffic.global_only(),
    }


def time_rows(counts: Sequence[Row], advance: Callable[[str], None]) -> list[Row]:
    """Bound the time of every counted program on every GPU, with that GPU's tiles.

    A GPU without the storage format or without room for a tile has the reason in ``error``.
    """
    rows = []
    for gpu in HARDWARE.values():
        for counted in counts:
            if counted["error"] is None:
                rows.append(_time_row(counted, gpu))
        advance(f"bounded times on {gpu.name}")
    return rows


def _time_row(counted: Row, gpu: Hardware) -> Row:
    row = {name: counted[name] for name in ("shape", "algorithm", "direction", "program")}
    row |= {"hardware": gpu.name, "error": None}
    try:
        arguments = SHAPES[row["shape"]].arguments_of(ALGORITHMS[row["algorithm"]])
        run = profile(row["algorithm"], **arguments, direction=row["program"], hardware=gpu)
        bounds = time_bounds(work_of(run), gpu)
    except ValueError as error:
        return {**row, "error": str(error)}
    resources = {f"{name}_seconds": seconds for name, seconds in bounds.by_resource().items()}
    return {
        **row,
        "bound_seconds": bounds.seconds,
        "limited_by": bounds.limited_by,
        **resources,
        "model_seconds": bounds.model_seconds,
    }


def claim_rows() -> list[Row]:
    """Return every claim with its verdict and its numbers; see :func:`simattn.claims`."""
    from simattn.claims import claims

    return [claim.as_dict() for claim in claims()]


def flat_rows(rows: Sequence[Row]) -> list[Row]:
    """Return rows for CSV: without the nested numbers of claims, which are in words beside them."""
    return [{name: value for name, value in row.items() if name != "numbers"} for row in rows]


# The report


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes
    ----------
    name
        File name without its ending.
    title, caption
        What it shows, and how to read it.
    draw
        Draws it and returns the Axes.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Axes]


@dataclass(frozen=True)
class Report:
    """What the report found. Printed, it is a set of tables that ends with the claims.

    Attributes
    ----------
    hardware
        GPU whose tiles are counted.
    tables
        Rows by table: "counts", "times", "claims", "shapes" and "hardware".
    """

    hardware: Hardware
    tables: Mapping[str, list[Row]] = field(repr=False)

    @property
    def contradictions(self) -> list[str]:
        """Programs whose count differs from their closed form."""
        return [
            f"{row['algorithm']} {row['direction']} on {row['shape']}"
            for row in self.tables["counts"]
            if row["error"] is None and not row["equals_closed_form"]
        ]

    @property
    def ok(self) -> bool:
        """Whether every claim that should hold does, and every count equals its closed form."""
        return not self.contradictions and all(row["ok"] for row in self.tables["claims"])

    def __str__(self) -> str:
        return report_text(self)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the page, the plots and the tables.

        Parameters
        ----------
        folder
            Where to; made if missing. Files of an earlier report are replaced.

        Returns
        -------
        pathlib.Path
            The page, ``index.html``. Beside it are ``plots/*.png``, ``plots/*.svg``, ``tables/*.csv`` and
            ``tables/*.json``.
        """
        from simattn.page import page_html

        base = Path(folder)
        for name in ("plots", "tables"):
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, rows in self.tables.items():
            (base / "tables" / f"{name}.csv").write_text(csv_text(flat_rows(rows)), encoding="utf-8", newline="")
            (base / "tables" / f"{name}.json").write_text(json_text(rows) + "\n", encoding="utf-8")
        drawn = []
        planned = pictures(self.hardware)
        with _progress(len(planned), "drawing") as advance:
            for picture in planned:
                drawn.append((picture, _save(picture, base / "plots")))
                advance(picture.title)
        page = base / "index.html"
        page.write_text(page_html(self, drawn), encoding="utf-8")
        return page


def build_report(*, hardware: str | Hardware = DEFAULT_HARDWARE) -> Report:
    """Count every algorithm on every shape, bound the times, and check every claim.

    Progress goes to standard error when that is a terminal.

    Parameters
    ----------
    hardware
        GPU whose tiles are counted.

    Raises
    ------
    ValueError, TypeError
        If the hardware is unknown.
    """
    row = get_hardware(hardware)
    with _progress(len(SHAPES) + len(HARDWARE) + 1, "counting") as advance:
        counts = count_rows(row, advance)
        times = time_rows(counts, advance)
        claims = claim_rows()
        advance("checked the claims")
    shapes = [{"shape": shape.name, "description": shape.description, **shape.arguments} for shape in SHAPES.values()]
    tables = {"claims": claims, "counts": counts, "times": times, "shapes": shapes, "hardware": table()}
    return Report(row, MappingProxyType(tables))


@contextlib.contextmanager
def _progress(total: int, description: str) -> Iterator[Callable[[str], None]]:
    """Show a bar on standard error if that is a terminal; yield what advances it."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=description, file=sys.stderr, leave=False) as bar:

        def advance(done: str) -> None:
            bar.set_postfix_str(done)
            bar.update()

        yield advance


# Pictures


def pictures(hardware: Hardware) -> list[Picture]:
    """Return the pictures of the report, not yet drawn."""
    from simattn import plots

    def by_array(direction: Direction) -> Axes:
        return plots.traffic_by_array({run.algorithm: run for run in _runs(DRAWN_SHAPE, hardware, direction)})

    return [
        Picture(
            "length_forward",
            "Traffic against length, forward",
            "Attention to all keys, FlashAttention included, grows with the square of the length. Its algorithms "
            "differ by a constant: how often tiles are loaded again. Windows of a fixed size and linear attention grow "
            "with the length itself. MoBA and NSA lie between: each query attends to a fixed number of blocks, but its "
            "choice looks at a mean or a compressed key of every block.",
            lambda: plots.traffic_against_length(hardware=hardware, **_GROUPED),
        ),
        Picture(
            "length_backward",
            "Traffic against length, backward",
            "The backward pass without its forward pass.",
            lambda: plots.traffic_against_length(direction="backward", hardware=hardware, **_GROUPED),
        ),
        Picture(
            "sram_forward",
            "Traffic against SRAM size, forward",
            "Attention to all keys. Each point uses the largest tiles that fit into M. Above the knee at M = d² "
            "FlashAttention falls as 1/M; below it a program that tiles the head dimension too falls as 1/√M and moves "
            "less.",
            plots.traffic_against_sram,
        ),
        Picture(
            "sram_backward",
            "Traffic against SRAM size, backward",
            "The backward pass of attention to all keys. Programs that tile the head dimension fall as 1/√M below the "
            "knee, the others as 1/M.",
            lambda: plots.traffic_against_sram(direction="backward"),
        ),
        Picture(
            "arrays_forward",
            f"Traffic by array, forward ({DRAWN_SHAPE})",
            "Which arrays the bytes belong to: " + SHAPES[DRAWN_SHAPE].description + ".",
            lambda: by_array("forward"),
        ),
        Picture(
            "arrays_backward",
            f"Traffic by array, backward ({DRAWN_SHAPE})",
            "Which arrays the bytes belong to: " + SHAPES[DRAWN_SHAPE].description + ".",
            lambda: by_array("backward"),
        ),
        Picture(
            "roofline",
            f"Roofline ({ROOFLINE_SHAPE})",
            "Filled markers are forward, hollow ones backward, each at the rate that its own bytes and operations "
            "allow at most. A marker above the HBM roof relies on the L2 cache.",
            lambda: plots.roofline(
                hardware, _roofline_points(hardware), dtype=SHAPES[ROOFLINE_SHAPE].arguments["dtype"]
            ),
        ),
        *(
            Picture(
                f"cheapest_{phase}",
                f"Which is cheapest? {text} ({COMPARED_MODEL}, {COMPARED_LENGTH:,} tokens)",
                "Every algorithm that takes the shape, in all layers, the least time first. Those without a softmax "
                "and those that leave keys out compute something else than the others.",
                lambda phase=phase: plots.comparison(  # type: ignore[misc]
                    compare(COMPARED_LENGTH, COMPARED_MODEL, hardware=hardware), phase
                )[0],
            )
            for phase, text in (("prefill", "Prefill"), ("decode", "A decoding step"))
        ),
    ]


def _runs(shape: str, hardware: Hardware, direction: Direction) -> list[Run]:
    return [
        profile(name, **SHAPES[shape].arguments_of(spec), direction=direction, hardware=hardware)
        for name, spec in ALGORITHMS.items()
        if direction in spec.directions
    ]


def _roofline_points(hardware: Hardware) -> list[tuple[str, float, float]]:
    points = []
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions:
        for run in _runs(ROOFLINE_SHAPE, hardware, direction):
            flops = run.operations.matmul_flops
            rate = flops / time_bounds(work_of(run), hardware).seconds
            points.append((f"{run.algorithm} {direction}", flops / run.traffic.hbm_bytes, rate))
    return points


def _save(picture: Picture, folder: Path) -> str:
    """Draw a picture, save it as PNG and SVG, and return the SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "simattn"}):  # the same picture is the same file
        drawn = picture.draw().figure
        assert isinstance(drawn, Figure)
        drawn.savefig(folder / f"{picture.name}.png", dpi=150)
        drawn.savefig(folder / f"{picture.name}.svg", metadata={"Date": None}, transparent=True)
    return (folder / f"{picture.name}.svg").read_text(encoding="utf-8")


# Text


def report_text(report: Report) -> str:
    """Return the tables that the command prints, the claims last."""
    counts = report.tables["counts"]
    counted = [row for row in counts if row["error"] is None]
    equal = len(counted) - len(report.contradictions)
    parts = [
        f"Every algorithm on {len(SHAPES)} problems, with the tiles of {report.hardware.name}",
        text_table(
            ("problem", "what it is"),
            [(shape.name, shape.description) for shape in SHAPES.values()],
            numeric=False,
        ),
        textwrap.fill(USUAL, 110),
    ]
    for direction in DIRECTIONS:
        parts += [
            f"Bytes between memory and multiprocessors, {direction} (× inputs and outputs once)",
            _matrix(counts, direction, traffic_cell),
        ]
    for direction in DIRECTIONS:
        parts += [
            f"Memory beyond inputs and outputs, {direction}: workspace, and what is saved for the backward pass",
            _matrix(counts, direction, memory_cell),
        ]
    for direction, shape in TIMED_SHAPES.items():
        timed = [row for row in report.tables["times"] if row["shape"] == shape]
        parts += [
            f"Least time of {shape} {direction} on each GPU, and the resource that sets it",
            _matrix(timed, direction, time_cell, by="hardware"),
        ]
    parts.append(f"Closed forms: {equal} of {len(counted)} counts equal their formula, byte for byte.")
    parts += [f"Contradiction: {name}" for name in report.contradictions]
    parts += ["Claims", claims_text(report.tables["claims"])]
    return "\n\n".join(parts)


def cells(
    rows: Sequence[Row], direction: str, cell: Callable[[Row], str], *, by: str = "shape"
) -> tuple[list[str], list[list[str]]]:
    """Return rows as a matrix of text, algorithms across.

    Returns
    -------
    heads, body
        The first column is ``by``; what was not counted is "–".
    """
    chosen = [row for row in rows if row["direction"] == direction]
    names = list(dict.fromkeys(row["algorithm"] for row in chosen))
    found = {(row[by], row["algorithm"]): cell(row) if row["error"] is None else "–" for row in chosen}
    body = [
        [label, *(found.get((label, name), "–") for name in names)]
        for label in dict.fromkeys(row[by] for row in chosen)
    ]
    return [{"shape": "problem"}.get(by, by), *names], body


def _matrix(rows: Sequence[Row], direction: str, cell: Callable[[Row], str], *, by: str = "shape") -> str:
    return text_table(*cells(rows, direction, cell, by=by))


def traffic_cell(row: Row) -> str:
    """Return the bytes moved, and how many times the compulsory ones that is."""
    return f"{byte_text(row['hbm_bytes'])} ×{ratio_text(row['times_compulsory'])}"


def ratio_text(ratio: float) -> str:
    """Return a ratio with three digits, and no exponent."""
    return f"{ratio:.3g}" if ratio < 999.5 else f"{float(f'{ratio:.3g}'):,.0f}"


def memory_cell(row: Row) -> str:
    """Return the memory beyond inputs and outputs."""
    return byte_text(row["saved_bytes"] + row["workspace_bytes"])


def time_cell(row: Row) -> str:
    """Return the least time and its resource."""
    return f"{seconds_text(row['bound_seconds'])} {row['limited_by']}"


def claims_text(rows: Sequence[Row]) -> str:
    """Return the claims with their verdicts, and how many there are of each."""
    lines = []
    for row in rows:
        verdict = row["verdict"] if row["ok"] else f"FAILS: {row['verdict']}, expected: {row['expected']}"
        lines += _wrapped(f"[{verdict}] {row['statement']} ({row['source']})", "", "    ")
        lines += _wrapped(f"{row['counted']} ({row['range_tested']})", "    ", "    ")
    counts = Counter(row["verdict"] for row in rows)
    failed = sum(not row["ok"] for row in rows)
    lines.append("")
    lines.append(f"{len(rows)} claims: " + "; ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    lines.append(f"Claims that should hold and do not: {failed}" if failed else "Every claim that should hold does.")
    return "\n".join(lines)


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=first, subsequent_indent=others)


def hardware_text(rows: Sequence[Row]) -> str:
    """Return rows of :func:`simattn.hardware.table` as one table per GPU."""
    parts = []
    for name in dict.fromkeys(row["hardware"] for row in rows):
        body = [
            (row["figure"], figure_text(row["figure"], row["value"]), row["source"])
            for row in rows
            if row["hardware"] == name
        ]
        parts.append(f"{name}\n{text_table(('figure', 'value', 'source'), body, numeric=False)}")
    return "\n\n".join(parts)


_RATES = (
    ("flops_per_second", "FLOP/s"),
    ("bytes_per_second", "B/s"),
    ("exponentials_per_second", "/s"),
    ("hz", "Hz"),
)


def figure_text(name: str, value: str | float | None) -> str:
    """Return a hardware figure with its unit, which is in its name."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    stem = name.partition("[")[0]
    for ending, unit in _RATES:
        if stem.endswith(ending):
            return _scaled(value, unit)
    if "bytes" in stem:
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= size:
                return f"{value / size:g} {unit}"
    return f"{value:,}"


def _scaled(value: float, unit: str) -> str:
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def seconds_text(seconds: float) -> str:
    """Return a time with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
