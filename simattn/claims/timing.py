"""Claims about time and hardware: published times beside their bounds, speed-ups that only a clock decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from simattn.bounds import compulsory_traffic
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, TIMING_ONLY, Claim, Evidence, claim
from simattn.claims.rules import counted
from simattn.claims.sources import ADVANCED, FLASH1, FLASH2, FLASH3, OVERVIEW, VERSUS
from simattn.hardware import get_hardware
from simattn.problem import AttentionProblem, Direction
from simattn.roofline import PUBLISHED, PublishedCheck, PublishedTime, Work, check_published, spilled_bytes

SCORE_ARRAYS = ("scores", "probabilities", "dprobabilities", "dscores")
"""Arrays of standard attention that one kernel hands to the next."""


def _directions(published: PublishedTime) -> tuple[Direction, ...]:
    both: tuple[Direction, ...] = ("forward", "backward")
    return tuple(direction for direction in both if direction in published.direction.split("+"))


def visible_scores(problem: AttentionProblem) -> int:
    """Return the scores that the mask leaves, over all batch entries and heads, counted with tiles of one element."""
    run = counted(
        "flash2",
        batch=problem.batch,
        heads=problem.heads,
        q_len=problem.q_len,
        head_dim=problem.head_dim,
        dtype=problem.dtype,
        causal=problem.causal,
        plan="fit",
        tiles=(1, 1),
    )
    return run.operations.matmul_flops // (4 * problem.head_dim)


def work_of(published: PublishedTime) -> Work:
    """Return the work of a published measurement.

    ``matmul_flops``, ``exponentials`` and ``compulsory_bytes``, on which the verdict rests, are what no implementation
    of the algorithm goes below; the other fields are those of the registered program with its GPU tiles.
    """
    arguments: dict[str, Any] = {
        "batch": published.batch,
        "heads": published.heads,
        "q_len": published.q_len,
        "head_dim": published.head_dim,
        "dtype": published.dtype,
        "causal": published.causal,
    }
    problem = AttentionProblem(**arguments)
    visible, stores_scores = visible_scores(problem), published.algorithm == "standard"
    read = written = sram = vector = products = exponentials = 0
    passes: list[int] = []
    for direction in _directions(published):
        run = counted(published.algorithm, direction=direction, hardware=published.hardware, **arguments)
        read += run.traffic.hbm_read_bytes
        written += run.traffic.hbm_write_bytes + run.traffic.hbm_reduce_bytes
        sram += run.traffic.sram_bytes
        vector += run.operations.vector_flops
        # S and O forward; dV, dP, dQ, dK backward, and S once more unless P was stored.
        recomputes = direction == "backward" and not stores_scores
        products += 2 if direction == "forward" else 4 + recomputes
        exponentials += visible if direction == "forward" or recomputes else 0
        passes += [
            moved.hbm_read_bytes + moved.hbm_write_bytes
            for moved in compulsory_traffic(problem, direction).by_array.values()
        ]
        for name in SCORE_ARRAYS:
            if name in run.traffic.by_array:
                moved = run.traffic.by_array[name]
                kernels = (moved.hbm_write_bytes > 0) + (moved.hbm_read_bytes > 0)
                passes += [visible * problem.item_bytes] * kernels
    return Work(
        hbm_read_bytes=read,
        hbm_write_bytes=written,
        sram_bytes=sram,
        matmul_flops=products * 2 * visible * published.head_dim,
        vector_flops=vector,
        exponentials=exponentials,
        dtype=published.dtype,
        compulsory_bytes=spilled_bytes(passes, published.hardware),
    )


@cache
def check_of(published: PublishedTime) -> PublishedCheck:
    """Return a published measurement beside its bound."""
    (check,) = check_published(work_of, [published])
    return check


def time_evidence(check: PublishedCheck) -> Evidence:
    """Print the bound and the fraction of it achieved; a fraction above 1 fails."""
    published = check.published
    model = check.bounds.model_seconds
    return Evidence(
        range_tested=f"{published.hardware}; batch {published.batch}, {published.heads} heads, N = {published.q_len}, "
        f"d = {published.head_dim}, {'causal' if published.causal else 'not causal'}, {published.dtype}, "
        f"{published.direction}; any tiles",
        counted=f"bound {check.bound_seconds * 1e3:.3g} ms ({check.limited_by}), published "
        f"{check.published_seconds * 1e3:.3g} ms: fraction {check.fraction:.2f}; all counted traffic at HBM bandwidth "
        f"would take {model * 1e3:.3g} ms",
        verdict=TIMING_ONLY,
        numbers={
            "bound_seconds": check.bound_seconds,
            "published_seconds": check.published_seconds,
            "fraction": check.fraction,
            "limited_by": check.limited_by,
            "model_seconds": model,
        },
        respects_bound=check.ok,
    )


def published_claim(index: int, published: PublishedTime) -> Claim:
    """Return the claim that a published measurement respects its bound."""

    @claim(
        f"published-time-{index:02d}",
        statement=published.statement + ".",
        source=published.source,
        expected=TIMING_ONLY,
    )
    def made() -> Evidence:
        return time_evidence(check_of(published))

    return made


def _find(algorithm: str, **fields: object) -> PublishedCheck:
    """Return the check of the first published measurement with these fields."""
    return next(
        check_of(published)
        for published in PUBLISHED
        if published.algorithm == algorithm and all(getattr(published, name) == value for name, value in fields.items())
    )


def _traffic_ratios(over: str, under: str, lengths: Sequence[int], hardware: str) -> dict[int, float]:
    """Return how many times as many bytes one algorithm moves as another, forward and backward, by length."""
    ratios = {}
    for n in lengths:
        totals = [
            sum(
                counted(name, direction=direction, q_len=n, dtype="float16", hardware=hardware).traffic.hbm_bytes
                for direction in ("forward", "backward")
            )
            for name in (over, under)
        ]
        ratios[n] = totals[0] / totals[1]
    return ratios


def _ratio_text(ratios: Mapping[int, float]) -> str:
    return ", ".join(f"{ratio:.3g} (N = {n})" for n, ratio in ratios.items())


def _speed_up(
    identifier: str,
    statement: str,
    source: str,
    *,
    over: str,
    under: str,
    remark: str,
    hardware: str = "A100-40GB",
    lengths: Sequence[int] = (512, 1024, 4096, 16384),
) -> Claim:
    @claim(identifier, statement=statement, source=source, expected=TIMING_ONLY)
    def made() -> Evidence:
        ratios = _traffic_ratios(over, under, lengths, hardware)
        return Evidence(
            range_tested=f"{over} against {under}, forward and backward; d = 64; float16, plan gpu, {hardware}",
            counted=f"a time ratio; the bytes' ratio is {_ratio_text(ratios)}. {remark}",
            verdict=TIMING_ONLY,
            numbers={"traffic_ratio": ratios},
        )

    return made


@claim(
    "h100-at-512",
    statement="On an H100 at length 512 PyTorch reaches 62, Flash Attention 157 and Flash Attention 2 215 TFLOP/s.",
    source=f"{OVERVIEW}; from {FLASH2}, Figure 7a",
    expected=TIMING_ONLY,
)
def h100_at_512() -> Evidence:
    """Take forward plus backward, head dimension 64, not causal, which the article leaves out."""
    checks = {name: _find(name, hardware="H100-SXM", q_len=512) for name in ("standard", "flash1", "flash2")}
    return Evidence(
        range_tested="H100-SXM; forward and backward; batch 32, 32 heads, N = 512, d = 64, not causal, float16",
        counted="; ".join(
            f"{name}: bound {check.bound_seconds * 1e3:.3g} ms ({check.limited_by}), published "
            f"{check.published_seconds * 1e3:.3g} ms, fraction {check.fraction:.2f}"
            for name, check in checks.items()
        ),
        verdict=TIMING_ONLY,
        numbers={name: check.fraction for name, check in checks.items()},
        respects_bound=all(check.ok for check in checks.values()),
    )


@claim(
    "flash2-utilisation",
    statement="Flash Attention 2 reaches 50–73 % of the A100's theoretical peak.",
    source=f"{ADVANCED}; {FLASH2}, abstract",
    expected=TIMING_ONLY,
)
def flash2_utilisation() -> Evidence:
    """Put its fastest measurement beside the bound."""
    check = _find("flash2", hardware="A100-80GB")
    peak = get_hardware("A100-80GB").matmul_flops_per_second("float16")
    share = check.published.flops_per_second / peak
    return Evidence(
        range_tested="A100-80GB; the fastest published forward pass; any tiles",
        counted=f"{check.published.flops_per_second / 1e12:.3g} TFLOP/s is {share:.0%} of the peak; fraction of the "
        f"bound {check.fraction:.2f}, set by {check.limited_by}",
        verdict=TIMING_ONLY,
        numbers={"share_of_peak": share, "fraction": check.fraction},
        respects_bound=check.ok and share <= 1,
    )


@claim(
    "flash3-on-a100",
    statement="Flash Attention 3 (2023-07) reaches 75 % of the A100's theoretical peak.",
    source=ADVANCED,
    expected=DOES_NOT_HOLD,
)
def flash3_on_a100() -> Evidence:
    """Divide the source's rate by the peaks: above an A100's, 75 % of an H100's, and of July 2024."""
    rate = _find("flash3", measured_flops_per_second=740 * 10**12).published.flops_per_second
    shares = {name: rate / get_hardware(name).matmul_flops_per_second("float16") for name in ("A100-80GB", "H100-SXM")}
    return Evidence(
        range_tested=f"the rate that {FLASH3} states, against the float16 peaks; rule: 75 % within 1 %",
        counted=f"{rate / 1e12:.3g} TFLOP/s is {shares['A100-80GB']:.0%} of the A100's peak and "
        f"{shares['H100-SXM']:.0%} of the H100's; the paper is of July 2024",
        verdict=HOLDS if abs(shares["A100-80GB"] - 0.75) <= 0.01 else DOES_NOT_HOLD,
        numbers={"share_of_peak": shares},
    )


@claim(
    "memory-hierarchy",
    statement="SRAM has about 20 MB at about 19 TB/s, HBM about 40 GB at about 1.5 TB/s.",
    source=f"{VERSUS}; {FLASH1}, Figure 1",
    expected=HOLDS,
)
def memory_hierarchy() -> Evidence:
    """Compare with an A100-40GB; other cards have other figures, and a thread block reaches 163 KiB of SRAM."""
    row = get_hardware("A100-40GB")
    figures = {
        "sram_megabytes": (row.sram_bytes_total / 2**20, 20),
        "sram_terabytes_per_second": (row.sram_bytes_per_second / 1e12, 19),
        "hbm_gigabytes": (row.hbm_bytes / 2**30, 40),
        "hbm_terabytes_per_second": (row.hbm_bytes_per_second / 1e12, 1.5),
    }
    near = all(abs(value / stated - 1) <= 0.05 for value, stated in figures.values())
    return Evidence(
        range_tested="A100-40GB; rule: within 5 %",
        counted=f"{figures['sram_megabytes'][0]:.4g} MiB (shared memory and L1) at "
        f"{figures['sram_terabytes_per_second'][0]:.3g} TB/s; {figures['hbm_gigabytes'][0]:.3g} GiB at "
        f"{figures['hbm_terabytes_per_second'][0]:.4g} TB/s; a thread block reaches "
        f"{row.sram_bytes_per_block // 2**10} KiB of the SRAM",
        verdict=HOLDS if near else DOES_NOT_HOLD,
        numbers={name: value for name, (value, _) in figures.items()},
    )


CLAIMS: tuple[Claim, ...] = (
    memory_hierarchy,
    *(published_claim(index, published) for index, published in enumerate(PUBLISHED, start=1)),
    h100_at_512,
    flash2_utilisation,
    flash3_on_a100,
    _speed_up(
        "training-2-to-4-times",
        "Flash Attention trains 2–4 times as fast from end to end.",
        OVERVIEW,
        over="standard",
        under="flash1",
        remark=f"End to end also has projections and feed-forward layers; {FLASH1} states 2–4 for attention",
    ),
    _speed_up(
        "standard-3-to-4-times",
        "In half precision the speed-up over the standard implementation is 3–4.",
        OVERVIEW,
        over="standard",
        under="flash2",
        hardware="H100-SXM",
        remark="The rates that the article cites give 215 / 62 = 3.47 for version 2 and 157 / 62 = 2.53 for version 1",
    ),
    _speed_up(
        "gpt2-7.6-times",
        "Flash Attention makes GPT-2 7.6 times as fast.",
        f"{ADVANCED}; {FLASH1}, Figure 1",
        over="standard",
        under="flash1",
        remark="The figure times the attention computation of GPT-2, not the model",
        lengths=(1024,),
    ),
    _speed_up(
        "flash2-2-times",
        "Flash Attention 2 is about twice as fast as the first version.",
        f"{ADVANCED}; {FLASH2}, abstract",
        over="flash1",
        under="flash2",
        remark="FLOPs of matrix products are equal; version 2 also spreads one head over many thread blocks",
    ),
    _speed_up(
        "advantage-from-4k",
        "Flash Attention has a clear advantage at long sequences, 4K and more.",
        VERSUS,
        over="standard",
        under="flash2",
        remark="In bytes there is no threshold at 4K: the advantage is there at 512 already",
    ),
)
"""Claims about time and hardware."""
