"""Claims about the memory of the KV cache: how much of it allocators use for tokens, and how much they waste."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from simattn.claims.model import DOES_NOT_HOLD, HOLDS, Claim, Evidence, claim
from simattn.claims.rules import equality_evidence
from simattn.claims.sources import IN_LLMS, PAGED_ATTENTION
from simattn.kv_cache import (
    Allocator,
    Buddy,
    CacheRun,
    Constant,
    Geometric,
    Lengths,
    Lognormal,
    Paged,
    Reservation,
    Uniform,
    generate_workload,
    simulate,
)
from simattn.models import MODELS

POOL_TOKENS = MODELS["OPT-13B"].cache.tokens_in(12 << 30)
"""12 GB of an A100-40GB: the 15.7K slots of Kwon et al., Table 1."""

PROMPT, OUTPUT = 161, 338
"""Mean lengths of ShareGPT, Kwon et al., Figure 11."""

LENGTHS: dict[str, tuple[Lengths, Lengths]] = {
    "constant": (Constant(PROMPT), Constant(OUTPUT)),
    "uniform": (Uniform(1, 2 * PROMPT - 1), Uniform(1, 2 * OUTPUT - 1)),
    "geometric": (Geometric(PROMPT), Geometric(OUTPUT)),
    "lognormal": (Lognormal(PROMPT), Lognormal(OUTPUT)),
}
"""Distributions of those means; the paper shows that ShareGPT's have long tails, as the last two."""

ORCA: tuple[Reservation, ...] = ("max", "pow2", "oracle")
LONG_TAILS = ("geometric", "lognormal")
SEEDS = range(4)
WATERMARK = Paged(watermark_pages=POOL_TOKENS // 16 // 100)
RANGE = (
    "OPT-13B, pool of 15 728 tokens, maximum 2048, pages of 16; lengths constant, uniform, geometric, lognormal with "
    "means 161 + 338; 1000 requests at once, 4 seeds; steps in which one waits"
)

PUBLISHED = {"max": 20.4, "pow2": 26.8, "oracle": 38.2, "paged": 96.3}
"""Percent of the KV cache memory that holds token states, Kwon et al., Figure 2."""


@lru_cache(maxsize=128)
def served(lengths: str, seed: int, allocator: Allocator) -> CacheRun:
    """Return the run of 1000 requests that arrive at once, made once."""
    prompt, output = LENGTHS[lengths]
    workload = generate_workload(1000, prompt=prompt, output=output, seed=seed)
    return simulate(workload, allocator, pool_tokens=POOL_TOKENS)


def used_percent(allocators: Sequence[Allocator], lengths: Sequence[str] = tuple(LENGTHS)) -> tuple[float, float]:
    """Return the least and largest share of the pool that holds tokens while requests wait, in percent."""
    shares = [
        100 * served(name, seed, allocator).saturated_shares["used"]
        for name in lengths
        for seed in SEEDS
        for allocator in allocators
    ]
    return min(shares), max(shares)


@claim(
    "kv-cache-sequence",
    statement="The KV cache of a single sequence takes up to 1.7 GB in LLaMA-13B, and in OPT-13B 800 KB a token.",
    source=f"{IN_LLMS}; {PAGED_ATTENTION}, section 3",
    expected=HOLDS,
)
def kv_cache_sequence() -> Evidence:
    """Evaluate layers · length · KV heads · (d_k + d_v) · bytes: the number of layers is a factor."""
    llama, opt = MODELS["LLaMA-13B"].cache, MODELS["OPT-13B"].cache
    total = llama.bytes(length=2048)
    pairs = [(round(total / 1e8), 17), (opt.bytes_per_token, 800 << 10), (total, 2 * 40 * 2048 * 40 * 128 * 2)]
    return equality_evidence(
        pairs,
        "40 layers, 40 KV heads of 128, 2048 tokens; float16",
        f"{total:,} bytes, {llama.bytes_per_token:,} a token; to the digits given",
        bytes=total,
        bytes_per_token=llama.bytes_per_token,
    )


@claim(
    "reserved-used",
    statement="Earlier systems use only 20.4–38.2 % of the KV cache memory for token states: Orca (Max) 20.4, (Pow2) "
    "26.8, (Oracle) 38.2.",
    source=f"{PAGED_ATTENTION}, Figure 2",
    expected=HOLDS,
)
def reserved_used() -> Evidence:
    """Hold each published share against the range that the assumed lengths span: it must lie within."""
    found = {name: used_percent([Buddy(name)]) for name in ORCA}
    tailed = {name: used_percent([Buddy(name)], LONG_TAILS) for name in ORCA}
    uncapped = used_percent([Buddy("pow2-uncapped")], LONG_TAILS)
    inside = all(low <= PUBLISHED[name] <= high for name, (low, high) in found.items())
    return Evidence(
        range_tested=RANGE,
        counted="used, % of the pool: "
        + "; ".join(
            f"{name} {low:.1f}…{high:.1f}, of it with long tails {tailed[name][0]:.1f}…{tailed[name][1]:.1f}"
            for name, (low, high) in found.items()
        )
        + ". The distribution of lengths decides, and for pow2 whether a reservation is cut to the maximum length: if "
        f"not, {uncapped[0]:.1f}…{uncapped[1]:.1f} with long tails",
        verdict=HOLDS if inside else DOES_NOT_HOLD,
        numbers={
            "used_percent": found,
            "used_percent_long_tails": tailed,
            "pow2_uncapped_used_percent_long_tails": uncapped,
            "published_percent": PUBLISHED,
        },
    )


@claim(
    "paged-used",
    statement="With PagedAttention 96.3 % of the KV cache memory holds token states: near-zero waste.",
    source=f"{PAGED_ATTENTION}, Figure 2 and section 1",
    expected=HOLDS,
)
def paged_used() -> Evidence:
    """Ask for at least the published share, whatever the lengths, with and without vLLM's watermark of 1 %."""
    low, high = used_percent([Paged(), WATERMARK])
    short = generate_workload(3000, prompt=Geometric(19), output=Geometric(58))
    short_used = 100 * simulate(short, pool_tokens=POOL_TOKENS).saturated_shares["used"]
    whole = [100 * served(name, seed, Paged()).shares["used"] for name in LENGTHS for seed in SEEDS]
    return Evidence(
        range_tested=RANGE + "; watermark 0 and 1 %",
        counted=f"used, % of the pool: {low:.1f}…{high:.1f} while requests wait. The load and the lengths decide: "
        f"{min(whole):.1f}…{max(whole):.1f} with the start and the end of the runs, {short_used:.1f} with geometric "
        "lengths of means 19 + 58, as Alpaca's",
        verdict=HOLDS if low >= PUBLISHED["paged"] else DOES_NOT_HOLD,
        numbers={
            "used_percent": [low, high],
            "used_percent_whole_runs": [min(whole), max(whole)],
            "used_percent_short_lengths": short_used,
            "published_percent": PUBLISHED["paged"],
        },
    )


@claim(
    "paged-waste-bound",
    statement="PagedAttention wastes less than one page per sequence.",
    source=f"{PAGED_ATTENTION}, section 4.3",
    expected=HOLDS,
)
def paged_waste_bound() -> Evidence:
    """Count the slots of pages that hold no token at every change of the batch, and divide by sequences and page."""
    worst = {}
    for page in (1, 8, 16, 32, 128):
        for samples in (1, 4):
            workload = generate_workload(200, prompt=Lognormal(PROMPT), output=Lognormal(OUTPUT), samples=samples)
            run = simulate(workload, Paged(page), pool_tokens=POOL_TOKENS)
            busy = run.sequences > 0
            empty = (run.reserved + run.internal)[busy] / (run.sequences[busy] * page)
            worst[f"{page} tokens, {samples} samples"] = float(empty.max())
    return Evidence(
        range_tested="pages of 1, 8, 16, 32, 128 tokens; 200 requests of 1 and 4 samples, lognormal lengths; pool of "
        "15 728 tokens",
        counted=f"empty slots per sequence, at most {max(worst.values()):.3f} of a page at any change of the batch",
        verdict=HOLDS if max(worst.values()) < 1 else DOES_NOT_HOLD,
        numbers={"pages_per_sequence": worst},
    )


@claim(
    "waste-complement",
    statement="Because of fragmentation and over-reservation, existing systems waste 60–80 % of the KV cache memory.",
    source=IN_LLMS,
    expected=HOLDS,
)
def waste_complement() -> Evidence:
    """Round what is not used to tens: in the paper's figure, and counted with long-tailed lengths."""
    stated = [100 - PUBLISHED["oracle"], 100 - PUBLISHED["max"]]
    shares = [
        served(name, seed, Buddy(system)).saturated_shares for system in ORCA for name in LONG_TAILS for seed in SEEDS
    ]
    unused = [100 * (1 - entry["used"]) for entry in shares]
    reserved = [100 * entry["reserved"] for entry in shares]
    rounded = [[round(value, -1) for value in ends] for ends in (stated, [min(unused), max(unused)])]
    return Evidence(
        range_tested=f"{RANGE}; the two distributions with long tails",
        counted=f"not used: {stated[0]:.1f}–{stated[1]:.1f} %, the complement of the published 20.4–38.2 %, and "
        f"counted {min(unused):.1f}…{max(unused):.1f} %. Of it {min(reserved):.1f}…{max(reserved):.1f} points are "
        "reserved and used later",
        verdict=HOLDS if all(ends == [60, 80] for ends in rounded) else DOES_NOT_HOLD,
        numbers={
            "stated_percent": stated,
            "unused_percent": [min(unused), max(unused)],
            "reserved_percent": [min(reserved), max(reserved)],
        },
    )


CLAIMS: tuple[Claim, ...] = (kv_cache_sequence, reserved_used, paged_used, paged_waste_bound, waste_complement)
"""Claims about the memory of the KV cache."""
