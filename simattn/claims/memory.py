"""Claims about memory: what an algorithm keeps in HBM besides its inputs and outputs, and in total."""

from __future__ import annotations

from functools import partial

from simattn.bounds import PowerLaw, fit_exponents
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, Claim, Evidence, claim
from simattn.claims.rules import DRIFT_LIMIT, FLOAT32_BYTES, counted, crossing, fused_algorithms
from simattn.claims.sources import ADVANCED, FLASH1, IN_LLMS, OVERVIEW, VERSUS
from simattn.problem import Direction
from simattn.tables import byte_text

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
LENGTHS = tuple(1 << power for power in (16, 18, 20, 22))
HEAD_DIMS = (32, 128)
GROWTH_RANGE = "forward and backward; N = 2¹⁶…2²²; d = 32, 128; float32 and bfloat16, plan gpu"


def extra_bytes(algorithm: str, **arguments: object) -> int:
    """Return the bytes besides inputs and outputs: what is saved for the backward pass, and workspace."""
    roles = counted(algorithm, **arguments).hbm_bytes_by_role
    return roles.get("saved", 0) + roles.get("workspace", 0)


def training_bytes(algorithm: str, **arguments: object) -> int:
    """Return the larger total of the forward and the backward pass."""
    return max(counted(algorithm, direction=direction, **arguments).peak_hbm_bytes for direction in DIRECTIONS)


def growth(algorithm: str) -> dict[str, PowerLaw]:
    """Fit the exponents of N in the extra memory, by direction and storage format."""
    laws = {}
    for direction in DIRECTIONS:
        for dtype in ("float32", "bfloat16"):
            rows = [
                {
                    "N": n,
                    "d": d,
                    "bytes": extra_bytes(algorithm, direction=direction, q_len=n, head_dim=d, dtype=dtype),
                }
                for n in LENGTHS
                for d in HEAD_DIMS
            ]
            laws[f"{direction}, {dtype}"] = fit_exponents(rows, ["N", "d"], "bytes")
    return laws


def _growth_evidence(algorithms: list[str], exponent: int) -> Evidence:
    laws = {name: growth(name) for name in algorithms}
    found = [law.exponents["N"] for by_case in laws.values() for law in by_case.values()]
    holds = bool(found) and all(abs(value - exponent) <= DRIFT_LIMIT for value in found)
    return Evidence(
        range_tested=f"{', '.join(algorithms)}; {GROWTH_RANGE}",
        counted=f"memory besides inputs and outputs ∝ N^{min(found):.3f}…N^{max(found):.3f} "
        f"(rule: within {DRIFT_LIMIT} of {exponent})",
        verdict=HOLDS if holds else DOES_NOT_HOLD,
        numbers={name: {case: dict(law.exponents) for case, law in by_case.items()} for name, by_case in laws.items()},
    )


@claim(
    "standard-memory",
    statement="Traditional attention takes O(n²) memory: its weights are an n × n matrix.",
    source=VERSUS,
    expected=HOLDS,
)
def standard_memory() -> Evidence:
    """Fit the exponent of N in what standard attention keeps."""
    return _growth_evidence(["standard"], 2)


@claim(
    "flash-memory",
    statement="Flash Attention takes O(n) memory.",
    source=f"{VERSUS}; {ADVANCED}; {FLASH1}, Theorem 1 (beyond inputs and output)",
    expected=HOLDS,
)
def flash_memory() -> Evidence:
    """Fit the exponent of N in what the FlashAttention programs keep."""
    return _growth_evidence(fused_algorithms(), 1)


@claim(
    "space-linear",
    statement="Attention takes time quadratic and space linear in the sequence length.",
    source=IN_LLMS,
    expected=DOES_NOT_HOLD,
)
def space_linear() -> Evidence:
    """Fit both: linear for the keys and values and for fused programs, not where scores are stored."""
    standard, fused = growth("standard"), [law for name in fused_algorithms() for law in growth(name).values()]
    exponents = [law.exponents["N"] for law in standard.values()]
    flash = [law.exponents["N"] for law in fused]
    linear = all(abs(value - 1) <= DRIFT_LIMIT for value in (*exponents, *flash))
    return Evidence(
        range_tested=f"standard, {', '.join(fused_algorithms())}; {GROWTH_RANGE}",
        counted=f"standard keeps N^{min(exponents):.2f}; only the fused programs (N^{max(flash):.2f}) and the KV cache "
        "are linear",
        verdict=HOLDS if linear else DOES_NOT_HOLD,
        numbers={"standard": exponents, "fused": flash},
    )


@claim(
    "memory-saving",
    statement="Recomputation cuts memory 4 to 20 times.",
    source=f"{OVERVIEW}; up to 20 times in {FLASH1}, Section 4.3",
    expected=HOLDS,
)
def memory_saving() -> Evidence:
    """Find the lengths with a ratio between 4 and 20: it grows with N, so they are one range."""
    ranges, numbers = [], {}
    for d in (64, 128):

        def excess(n: int, limit: float = 0, d: int = d) -> float:
            standard, flash = (
                training_bytes(name, q_len=n, head_dim=d, dtype="float16") for name in ("standard", "flash1")
            )
            return standard / flash - limit

        low, high = (crossing(partial(excess, limit=limit), 64, 1 << 20) for limit in (4, 20))
        ranges.append(f"d = {d}: N = {low}…{high}")
        numbers[f"d = {d}"] = {
            "least_length": low,
            "greatest_length": high,
            "ratio_at_512": excess(512),
            "ratio_at_65536": excess(65_536),
        }
    usual = all(case["least_length"] >= 512 and case["greatest_length"] <= 16_384 for case in numbers.values())
    beyond = ", ".join(f"{case['ratio_at_65536']:.3g}" for case in numbers.values())
    return Evidence(
        range_tested="all arrays in HBM, the larger of forward and backward; standard against flash1; float16, plan "
        "gpu; rule: the lengths lie between 512 and 16 384",
        counted=f"4…20 for {'; '.join(ranges)}; less below, more beyond ({beyond} at N = 65 536)",
        verdict=HOLDS if usual else DOES_NOT_HOLD,
        numbers=numbers,
    )


@claim(
    "scores-matrix",
    statement="Attention weights are an n × n matrix, for every sequence and head.",
    source=f"{VERSUS}; {IN_LLMS}",
    expected=HOLDS,
)
def scores_matrix() -> Evidence:
    """Count what standard attention saves: batch · heads · n² probabilities."""
    batch, heads, n = 2, 3, 4096
    saved = counted("standard", batch=batch, heads=heads, q_len=n, dtype="float32").hbm_bytes_by_role["saved"]
    log_sum_exp = batch * heads * n * FLOAT32_BYTES
    square = batch * heads * n * n * FLOAT32_BYTES
    return Evidence(
        range_tested=f"batch {batch}, {heads} heads, N = {n}; float32",
        counted=f"saved: {byte_text(saved)} = batch · heads · n² elements and the log-sum-exp",
        verdict=HOLDS if saved == square + log_sum_exp else DOES_NOT_HOLD,
        numbers={"saved_bytes": saved, "square_bytes": square},
    )


@claim(
    "memory-saving-by-length",
    statement="FlashAttention saves 10 times the memory at length 2K and 20 times at 4K.",
    source="README of the flash-attention repository, section Memory",
    expected=HOLDS,
)
def memory_saving_by_length() -> Evidence:
    """Compare all arrays in HBM, the larger of forward and backward."""
    stated = {2048: 10, 4096: 20}
    ratios = {
        n: training_bytes("standard", q_len=n, head_dim=64, dtype="float16")
        / training_bytes("flash2", q_len=n, head_dim=64, dtype="float16")
        for n in stated
    }
    near = all(abs(ratios[n] / value - 1) <= 0.1 for n, value in stated.items())
    return Evidence(
        range_tested="standard against flash2; N = 2048, 4096; d = 64; float16, plan gpu; rule: within 10 %",
        counted=", ".join(f"{ratio:.3g} times (N = {n})" for n, ratio in ratios.items()),
        verdict=HOLDS if near else DOES_NOT_HOLD,
        numbers={"ratio": ratios},
    )


@claim(
    "growth-at-8k",
    statement="As n grows to 4K and 8K, memory and computation of traditional attention grow rapidly.",
    source=VERSUS,
    expected=HOLDS,
)
def growth_at_8k() -> Evidence:
    """Double the length: both become four times as much."""
    short, long = (counted("standard", q_len=n, head_dim=64, dtype="float16") for n in (4096, 8192))
    ratios = {
        "memory": extra_bytes("standard", q_len=8192, head_dim=64, dtype="float16")
        / extra_bytes("standard", q_len=4096, head_dim=64, dtype="float16"),
        "flops": long.operations.matmul_flops / short.operations.matmul_flops,
    }
    fourfold = all(abs(ratio / 4 - 1) <= 0.01 for ratio in ratios.values())
    return Evidence(
        range_tested="standard forward; N = 4096, 8192; d = 64; float16, plan gpu; rule: fourfold within 1 %",
        counted=f"memory besides inputs and output {ratios['memory']:.3f} times, FLOPs {ratios['flops']:.3f} times",
        verdict=HOLDS if fourfold else DOES_NOT_HOLD,
        numbers=ratios,
    )


CLAIMS: tuple[Claim, ...] = (
    standard_memory,
    flash_memory,
    space_linear,
    memory_saving,
    memory_saving_by_length,
    scores_matrix,
    growth_at_8k,
)
"""Claims about memory."""
