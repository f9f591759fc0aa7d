"""``python -m cupy_kernels warmup``: compile the kernels ahead.

The table goes to standard output, progress to standard error when that is a terminal. The exit code is 0, 1 when a
kernel does not compile or has what a kernel should not have (spills, warnings of the compiler), 2 for a mistake in
the arguments or a missing compiler.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from cupy_kernels import compiler
from cupy_kernels.arrays import require_cupy
from cupy_kernels.compiler import Attempt, Variant
from cupy_kernels.launch import present_hardware
from cupy_kernels.parameters import COLUMN_BUCKETS, STORAGE_TYPES
from cupy_kernels.table import variants
from simattn.hardware import get_hardware
from simattn.planning import DEFAULT_HARDWARE
from simattn.tables import json_text, text_table

OK, FAILED, WRONG_ARGUMENTS = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        rows = _warmup(arguments)
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"cupy_kernels: error: {error}\n")
        return WRONG_ARGUMENTS
    if arguments.json:
        text = json_text(rows)
    else:
        heads = list(rows[0]) if rows else []
        text = text_table(heads, [[str(row[head]).partition("\n")[0] for head in heads] for row in rows])
    sys.stdout.write(text + "\n")
    return FAILED if any(row["complaints"] for row in rows) else OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cupy_kernels", description="The kernels' command line.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    warmup = commands.add_parser(
        "warmup",
        help="compile the kernels ahead",
        description=(
            "Compile the kernels into the cache, so that no call has to. Exit code 1 if one does not compile, spills "
            "registers or is warned about."
        ),
    )
    warmup.add_argument("--arch", help="architecture, such as sm_90a (default that of the present device)")
    warmup.add_argument(
        "--dtype", nargs="+", choices=STORAGE_TYPES, default=STORAGE_TYPES, help="storage formats (default all)"
    )
    warmup.add_argument("--columns", nargs="+", type=int, choices=COLUMN_BUCKETS, help="columns (default all)")
    warmup.add_argument("--counting", action="store_true", help="also the builds that count their traffic")
    warmup.add_argument("--list", action="store_true", help="only show what is in the cache and what is not")
    warmup.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default one a core)")
    warmup.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _present_architecture() -> str:
    try:
        capability = require_cupy().cuda.Device().compute_capability
    except RuntimeError as error:
        raise RuntimeError(f"--arch is needed where there is no device ({error})") from error
    return compiler.choose_architecture((int(capability[:-1]), int(capability[-1])))


def _warmup(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    architecture = compiler.check_architecture(arguments.arch) if arguments.arch else _present_architecture()
    if arguments.arch:
        hardware = replace(get_hardware(DEFAULT_HARDWARE), compute_capability=compiler.capability_of(architecture))
    else:
        hardware = present_hardware(require_cupy().cuda.Device().id)
    chosen = [variant for variant in variants(hardware) if _wanted(variant, arguments)]
    if arguments.list:
        return [_row(variant, Attempt(compiler.find(variant, architecture), "", 0.0)) for variant in chosen]
    rows = []
    for variant, attempt in zip(chosen, _attempts(chosen, architecture, arguments.jobs), strict=True):
        rows.append(_row(variant, attempt))
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{len(rows)} of {len(chosen)} kernels" + "\n" * (len(rows) == len(chosen)))
    return rows


def _attempts(chosen: list[Variant], architecture: str, jobs: int) -> Iterator[Attempt]:
    if jobs <= 1:
        yield from (compiler.attempt(variant, architecture) for variant in chosen)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take over what CUDA set up
    with ProcessPoolExecutor(jobs, context) as pool:  # NVRTC compiles one kernel at a time in each
        yield from pool.map(compiler.attempt, chosen, [architecture] * len(chosen))


def _wanted(variant: Variant, arguments: argparse.Namespace) -> bool:
    macros = dict(variant.macros)
    return (
        macros["STORAGE"] in arguments.dtype
        and (arguments.columns is None or int(macros.get("COLUMNS", 0)) in (0, *arguments.columns))
        and (arguments.counting or "COUNT_TRAFFIC" not in macros)
    )


def _row(variant: Variant, attempt: Attempt) -> dict[str, Any]:
    cubin, values = attempt.cubin, dict(variant.macros)
    counting = values.pop("COUNT_TRAFFIC", None) is not None
    return {
        "kernel": variant.function,
        "storage": values.pop("STORAGE", ""),
        "columns": values.pop("COLUMNS", ""),
        "macros": " ".join(f"{name.lower()}={value}" for name, value in values.items()),
        "counting": counting,
        "registers": None if cubin is None else cubin.registers,
        "spill_bytes": None if cubin is None else cubin.spill_bytes,
        "cached": cubin is not None and cubin.cached,
        "seconds": round(attempt.seconds, 2),
        "complaints": attempt.error or ("" if cubin is None else "; ".join(cubin.complaints)),
    }


if __name__ == "__main__":
    raise SystemExit(main())
