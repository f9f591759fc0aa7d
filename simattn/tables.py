"""Plain-text tables and the writing of rows as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any


def text_table(heads: Sequence[str], body: Sequence[Sequence[str]], *, numeric: bool = True) -> str:
    """Return aligned columns under a rule: the first to the left, the others right when ``numeric``."""
    widths = [max(len(row[index]) for row in (heads, *body)) for index in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if numeric and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(heads), line(["-" * width for width in widths]), *map(line, body)])


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, with the columns in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def json_text(data: Any) -> str:
    """Return data as indented JSON; byte counts of any size stay integers."""
    return json.dumps(data, indent=2, ensure_ascii=False)


def second_text(seconds: float) -> str:
    """Return a time with three digits and a decimal unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def byte_text(count: int) -> str:
    """Return a byte count with three digits and a decimal unit."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB", "EB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} ZB"
