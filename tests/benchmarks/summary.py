"""Turn a file of pytest-benchmark into the committed measurement and the table of the documentation.

``python tests/benchmarks/summary.py FILE`` writes docs/measurements/simulator.json and docs/benchmarks.md.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
BARS = {
    "flash2_over_numpy": "≤ 1.5",
    "flash2_over_numpy_causal": "",
    "slowest_count_milliseconds": "≤ 20",
    "median_count_milliseconds": "",
    "slowest_own_count_milliseconds": "≤ 100",
    "slowest_over_its_definition": "≤ 3",
    "count_microseconds_per_stored_block": "",
    "extra_megabytes_at_8192": "",
    "extra_megabytes_at_16384": "linear",
    "import_milliseconds_over_numpy": "≤ 50",
    "first_count_milliseconds_over_numpy": "",
    "report_seconds_from_a_cold_start": "≤ 120",
    "hopper_giga_multiply_adds_per_second": "≥ 1.1",
    "kv_cache_seconds_for_100000_requests": "≤ 5",
}
MEANINGS = {
    "flash2_over_numpy": '`run("flash2")`, N = 4096, d = 128, one head, float32, over in-place NumPy softmax(QKᵀ)V',
    "flash2_over_numpy_causal": "the same with a causal mask (NumPy computes the whole square)",
    "slowest_count_milliseconds": "slowest of the counts: every algorithm that takes any mask, full, causal and "
    "windowed, 32 heads on 8, d = 128, N = 2²⁰ and 10¹²; ms",
    "median_count_milliseconds": "their median; ms",
    "slowest_own_count_milliseconds": "slowest count of the others, with their default problems, N = 2²⁰ and 2²⁴; ms",
    "slowest_over_its_definition": "their simulation over their definition in NumPy, N = 2048, 2 heads on 1, d = 64, "
    "float32, causal: the highest ratio",
    "count_microseconds_per_stored_block": "count with a causal block mask of 8000 blocks, for each block; µs",
    "extra_megabytes_at_8192": 'memory that `run("flash2")` takes besides its inputs, N = 8192, d = 64; MB',
    "extra_megabytes_at_16384": "the same at N = 16384; the output grew by 2.2 MB",
    "import_milliseconds_over_numpy": "`import simattn` after `import numpy`; ms",
    "first_count_milliseconds_over_numpy": "the same with a first count, which loads what it needs; ms",
    "report_seconds_from_a_cold_start": "`simattn report`; s",
    "hopper_giga_multiply_adds_per_second": '`run("flash3", arithmetic="hopper")`, N = 4096, d = 128, one head, bf16; '
    "G multiply-adds of its products a second",
    "kv_cache_seconds_for_100000_requests": "slowest of the [KV cache](kv_cache.md)'s allocators, 100 000 requests; s",
}


def measured(benchmarks: dict[str, Any]) -> dict[str, float]:
    """Return the figures by name."""

    def median(name: str) -> float:
        return float(benchmarks[name]["stats"]["median"])

    counts = sorted(median(name) for name in benchmarks if name.startswith("test_count["))
    own_counts = [median(name) for name in benchmarks if name.startswith("test_count_of_own_problems[")]
    over_definition = [
        row["extra_info"]["median_ratio"]
        for name, row in benchmarks.items()
        if name.startswith("test_simulates_nearly_as_fast_as_its_definition[")
    ]
    memory = benchmarks["test_flash2_simulates_in_linear_memory"]["extra_info"]
    imports = benchmarks["test_import_costs_little_more_than_numpy"]["extra_info"]
    ratio = "test_flash2_simulates_nearly_as_fast_as_numpy[{}]"
    return {
        "flash2_over_numpy": benchmarks[ratio.format(False)]["extra_info"]["median_ratio"],
        "flash2_over_numpy_causal": benchmarks[ratio.format(True)]["extra_info"]["median_ratio"],
        "slowest_count_milliseconds": 1e3 * counts[-1],
        "median_count_milliseconds": 1e3 * counts[len(counts) // 2],
        "slowest_own_count_milliseconds": 1e3 * max(own_counts),
        "slowest_over_its_definition": max(over_definition),
        "count_microseconds_per_stored_block": 1e6
        * median("test_count_with_a_block_mask_is_linear_in_its_blocks[8000]")
        / 8000,
        "extra_megabytes_at_8192": memory["extra_bytes_at_8192"] / 1e6,
        "extra_megabytes_at_16384": memory["extra_bytes_at_16384"] / 1e6,
        "import_milliseconds_over_numpy": 1e3 * imports["seconds_over_numpy"],
        "first_count_milliseconds_over_numpy": 1e3 * imports["seconds_over_numpy_with_a_first_count"],
        "report_seconds_from_a_cold_start": median("test_report_from_a_cold_start"),
        "hopper_giga_multiply_adds_per_second": 1e-9
        * benchmarks["test_hopper_arithmetic_simulates_fast[bfloat16]"]["extra_info"]["multiply_adds_per_second"],
        "kv_cache_seconds_for_100000_requests": max(
            median(name) for name in benchmarks if name.startswith("test_the_kv_cache_serves_many_requests[")
        ),
    }


def main(path: str) -> None:
    """Write both files."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    figures = measured({row["name"]: row for row in data["benchmarks"]})
    machine = data["machine_info"]
    measurement = {
        "cpu": machine["cpu"]["brand_raw"],
        "cores": machine["cpu"]["count"],
        "python": machine["python_version"],
        "numpy": version("numpy"),
        "date": data["datetime"][:10],
        "figures": figures,
    }
    (DOCS / "measurements").mkdir(exist_ok=True)
    text = json.dumps(measurement, indent=2, ensure_ascii=False) + "\n"
    (DOCS / "measurements" / "simulator.json").write_text(text, encoding="utf-8")
    rows = [f"| {MEANINGS[name]} | {value:.3g} | {BARS[name]} |" for name, value in figures.items()]
    page = [
        "# Benchmarks",
        "",
        f"Measured on {measurement['cores']} cores of a {measurement['cpu']}, Python {measurement['python']}, NumPy "
        f"{measurement['numpy']}, on {measurement['date']}.",
        "Ratios are medians of pairs taken in turn in one process, with the same BLAS threads.",
        "",
        "| figure | measured | to reach |",
        "| :-- | --: | --: |",
        *rows,
        "",
        "Repeat them, and rewrite this page and `docs/measurements/simulator.json`, by",
        "",
        "```",
        "python -m pytest -n0 tests/benchmarks --benchmark-json=benchmarks.json",
        "python tests/benchmarks/summary.py benchmarks.json",
        "```",
        "",
    ]
    (DOCS / "benchmarks.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
