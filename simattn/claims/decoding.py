"""Claims about decoding steps: parts of a cache, pages, grouped heads, and states of fixed size."""

from __future__ import annotations

from typing import Any

import numpy as np

from simattn.algorithms.split_kv import SplitKVPlan
from simattn.api import Run, run_decode
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, TIMING_ONLY, Claim, Evidence, claim
from simattn.claims.rules import counted, crossing, equality_evidence
from simattn.claims.sources import FLASH_DECODING, IN_LLMS, LINEAR, PAGED_ATTENTION
from simattn.hardware import get_hardware
from simattn.planning import DEFAULT_HARDWARE
from simattn.roofline import arithmetic_intensity, ridge_point
from simattn.traffic import Traffic

HEADS, HEAD_DIM, ITEM_BYTES = 32, 128, 2
GROUPS = (1, 8, 32)
"""KV heads of 32 query heads."""

LENGTHS = tuple(1 << exponent for exponent in (11, 13, 17, 20))
LENGTHS_RANGE = "N = 2¹¹, 2¹³, 2¹⁷, 2²⁰"
SHAPE_RANGE = f"one new query of 32 heads of 128 on 1, 8, 32 KV heads; {LENGTHS_RANGE} keys; bfloat16, plan gpu"

LONG, LITTLE = 1 << 14, 0.05
"""From how many keys on a context is long, and which share of the cache's bytes is little."""


def _step(algorithm: str, kv_heads: int, length: int, **options: Any) -> Run:
    shape = {"heads": HEADS, "kv_heads": kv_heads, "q_len": 1, "kv_len": length, "head_dim": HEAD_DIM}
    return counted(algorithm, **shape, direction="decode", **options)


def _splits(run: Run) -> int:
    assert isinstance(run.plan, SplitKVPlan)
    assert run.plan.splits is not None
    return run.plan.splits


def _cache_bytes(traffic: Traffic) -> int:
    return sum(traffic.by_array[name].hbm_read_bytes for name in ("k", "v"))


@claim(
    "split-extra-data",
    statement="Splitting the keys stores very little extra data in memory, as long as the context is long: besides "
    "partial outputs, one log-sum-exp per row and split.",
    source=FLASH_DECODING,
    expected=HOLDS,
)
def split_extra_data() -> Evidence:
    """Count what parts move beside one part, by its formula: with up to 8 query heads on a KV head at most 5 %.

    The source measures a model of 64 query heads on 8 KV heads, at lengths up to 64k.
    """
    pairs, shares = [], {}
    for groups in (32, 8, 4, 1):
        for length in (1 << 11, 1 << 13, 1 << 14, 1 << 16, 1 << 20):
            split, whole = _step("split_kv", groups, length), _step("split_kv", groups, length, splits=1)
            splits = _splits(split)
            partial = HEADS * (2 * 4 * splits * (HEAD_DIM + 1) if splits > 1 else 0)
            queries = HEADS * (splits - 1) * HEAD_DIM * ITEM_BYTES
            extra = split.traffic.hbm_bytes - whole.traffic.hbm_bytes
            pairs.append((extra, partial + queries))
            shares[groups, length] = extra / _cache_bytes(whole.traffic)
    evidence = equality_evidence(
        pairs,
        "split_kv; one new query of 32 heads of 128 on 32, 8, 4, 1 KV heads; 2¹¹…2²⁰ keys; bfloat16, plan gpu",
        "bytes more than of one part = h·(8·S·(d_v + 1) + 2·(S − 1)·d) for S parts",
    )
    long = [share for (groups, length), share in shares.items() if length >= LONG and HEADS // groups <= 8]
    return Evidence(
        range_tested=evidence.range_tested,
        counted=f"{evidence.counted}. Of the cache's bytes that is at most {max(long):.1%} from 2¹⁴ keys on and "
        f"{shares[4, 1 << 13]:.1%} at 2¹³, with up to 8 query heads on a KV head. With 32 on one it is "
        f"{shares[1, 1 << 14]:.0%} at 2¹⁴, {shares[1, 1 << 16]:.0%} at 2¹⁶ and {shares[1, 1 << 20]:.1%} at 2²⁰",
        verdict=HOLDS if evidence.verdict == HOLDS and max(long) <= LITTLE else DOES_NOT_HOLD,
        numbers={
            **evidence.numbers,
            "share_of_cache_bytes": {
                f"g = {groups}, N = {length}": share for (groups, length), share in shares.items()
            },
        },
    )


@claim(
    "split-fills",
    statement="Split-KV decoding uses the whole GPU even when the batch is small, as long as the context is long.",
    source=FLASH_DECODING,
    expected=HOLDS,
)
def split_fills() -> Evidence:
    """Count thread blocks against multiprocessors: at least 90 % with parts, and how few without."""
    multiprocessors = get_hardware(DEFAULT_HARDWARE).streaming_multiprocessors
    with_parts, without = {}, {}
    for batch in (1, 2, 4):
        for groups in (1, 4, 8):
            run = _step("split_kv", groups, 1 << 17, batch=batch)
            name = f"b = {batch}, g = {groups}"
            with_parts[name] = batch * groups * _splits(run) / multiprocessors
            without[name] = batch * groups / multiprocessors
    return Evidence(
        range_tested=f"batch 1, 2, 4; 32 heads on 1, 4, 8 KV heads; 2¹⁷ keys; {DEFAULT_HARDWARE}, plan gpu",
        counted=f"thread blocks per multiprocessor: {min(with_parts.values()):.2f}…{max(with_parts.values()):.2f} with "
        f"parts, {min(without.values()):.2f}…{max(without.values()):.2f} without",
        verdict=HOLDS if min(with_parts.values()) >= 0.9 and max(with_parts.values()) <= 1 else DOES_NOT_HOLD,
        numbers={"blocks_per_multiprocessor": with_parts, "blocks_per_multiprocessor_of_one_part": without},
    )


@claim(
    "paged-not-contiguous",
    statement="PagedAttention lets the keys and values of a sequence lie in memory that is not contiguous.",
    source=f"{IN_LLMS}; {PAGED_ATTENTION}, section 4.1",
    expected=HOLDS,
)
def paged_not_contiguous() -> Evidence:
    """Run a step on pages in several orders and on a contiguous cache: the same bits, and the same bytes of K and V."""
    generator = np.random.default_rng(0)
    length, page, sequences, kv_heads = 200, 16, 3, 2
    taken = -(-length // page)
    q = generator.standard_normal((sequences, 1, 8, 64), dtype=np.float32)
    k, v = generator.standard_normal((2, sequences, taken * page, kv_heads, 64), dtype=np.float32)
    whole = run_decode("split_kv", q, k[:, :length], v[:, :length], splits=1)
    orders, alike = 8, []
    for _ in range(orders):
        order = generator.permutation(sequences * taken)
        pools = [np.empty((sequences * taken, page, kv_heads, 64), np.float32) for _ in "kv"]
        for pool, cache in zip(pools, (k, v), strict=True):
            pool[order] = cache.reshape(pool.shape)
        table = order.reshape(sequences, taken).astype(np.int32)
        found = run_decode("paged", q, *pools, block_table=table, cache_lengths=length)
        assert found.out is not None
        assert whole.out is not None
        same_bits = found.out.tobytes() == whole.out.tobytes()
        alike.append(same_bits and _cache_bytes(found.traffic) == _cache_bytes(whole.traffic))
    return Evidence(
        range_tested="3 sequences of 200 keys, pages of 16 in 8 random orders; 8 heads on 2 KV heads of 64; float32, "
        "plan gpu",
        counted=f"output bits and bytes of K and V as on a contiguous cache: {sum(alike)} of {orders} orders",
        verdict=HOLDS if all(alike) else DOES_NOT_HOLD,
        numbers={"orders": orders, "alike": sum(alike)},
    )


@claim(
    "paged-kernel-overhead",
    statement="PagedAttention's kernel takes 20–26 % longer than a contiguous one: it accesses the block table, "
    "executes extra branches and handles lengths of their own.",
    source=f"{PAGED_ATTENTION}, section 7.1",
    expected=TIMING_ONLY,
)
def paged_kernel_overhead() -> Evidence:
    """Count the bytes of the block table per byte of K and V: the time is not in what it adds to the traffic."""
    pages = (1, 8, 16, 32, 128, 256)
    shares = {}
    for name in ("packed", "one_per_block"):
        for page in pages:
            traffic = _step("paged", 8, 1 << 13, page_size=page, query_heads=name).traffic
            table = traffic.by_array["block_table"].hbm_read_bytes
            shares[f"{name}, pages of {page}"] = table / _cache_bytes(traffic)
    exact = all(
        shares[f"packed, pages of {page}"] == 4 / (min(page, 128) * 2 * HEAD_DIM * ITEM_BYTES) for page in pages
    )
    text = ", ".join(f"{shares[f'packed, pages of {page}']:.4%} with pages of {page}" for page in pages)
    return Evidence(
        range_tested="paged; one new query of 32 heads of 128 on 8 KV heads, 8192 keys; pages of 1…256 keys, tiles of "
        "128; bfloat16",
        counted=f"bytes of the block table per byte of K and V: {text}"
        + (": 4 bytes for each page of each tile" if exact else ""),
        verdict=TIMING_ONLY,
        numbers={"table_bytes_per_cache_byte": shares, "published_percent": [20, 26]},
    )


@claim(
    "packed-heads-traffic",
    statement="As the KV cache shrinks to 1/group, so do the bytes of it that a decoding step reads, if the query "
    "heads of a KV head share a thread block.",
    source=f"{IN_LLMS}, by implication",
    expected=HOLDS,
)
def packed_heads_traffic() -> Evidence:
    """Count reads of K and V: once for each KV head, or for each query head where it has a thread block of its own."""
    pairs = []
    for algorithm in ("split_kv", "paged"):
        for groups in GROUPS:
            for length in LENGTHS:
                packed, apart = (
                    _cache_bytes(_step(algorithm, groups, length, query_heads=name).traffic)
                    for name in ("packed", "one_per_block")
                )
                once = groups * length * 2 * HEAD_DIM * ITEM_BYTES
                pairs += [(packed, once), (apart, once * HEADS // groups)]
    return equality_evidence(
        pairs,
        f"split_kv, paged; {SHAPE_RANGE}",
        "bytes of K and V read = those of the cache; one head per block: times h/g",
    )


@claim(
    "decode-intensity",
    statement="In decoding, attention is bound by memory accesses, which grouped heads have fewer of.",
    source=IN_LLMS,
    expected=HOLDS,
)
def decode_intensity() -> Evidence:
    """Divide FLOPs by bytes: h/g for 16-bit caches, far below what the GPU's peaks have."""
    intensities, ridge = {}, ridge_point(DEFAULT_HARDWARE, "bfloat16")
    for groups in GROUPS:
        for length in LENGTHS:
            run = _step("split_kv", groups, length)
            found = arithmetic_intensity(run.operations.matmul_flops, run.traffic.hbm_bytes)
            intensities[f"g = {groups}, N = {length}"] = found
    below = all(found <= HEADS // int(name.split(",")[0].removeprefix("g = ")) for name, found in intensities.items())
    highest = max(intensities.values())
    return Evidence(
        range_tested=f"split_kv; {SHAPE_RANGE}; {DEFAULT_HARDWARE}",
        counted=f"{min(intensities.values()):.3g}…{highest:.3g} FLOP per byte, at most h/g, where the GPU's peaks have "
        f"{ridge:.3g}",
        verdict=HOLDS if below and highest < ridge else DOES_NOT_HOLD,
        numbers={"flops_per_byte": intensities, "ridge_flops_per_byte": ridge},
    )


@claim(
    "linear-constant-step",
    statement="With linear attention every step of a generation takes the same time and memory, however long it is.",
    source=f"{LINEAR}, abstract and Section 3.4",
    expected=HOLDS,
)
def linear_constant_step() -> Evidence:
    """Count bytes, FLOPs and memory of steps after any number of keys, and from how many on a cache costs more."""
    pairs = []
    for algorithm in ("linear", "lightning2"):
        first = _step(algorithm, 8, LENGTHS[0])
        for length in LENGTHS:
            run = _step(algorithm, 8, length)
            pairs += [
                (run.traffic.hbm_bytes, first.traffic.hbm_bytes),
                (run.operations.matmul_flops, first.operations.matmul_flops),
                (run.peak_hbm_bytes, first.peak_hbm_bytes),
            ]
    evidence = equality_evidence(
        pairs,
        f"linear, lightning2; one new token of 32 heads of 128 on 8 KV heads after {LENGTHS_RANGE}; bfloat16, plan gpu",
        "bytes moved, FLOPs and bytes in memory do not depend on N",
    )

    def cached_from(algorithm: str) -> int:
        step = _step(algorithm, 8, 1).traffic.hbm_bytes
        return crossing(lambda length: _step("paged", 8, length).traffic.hbm_bytes - step, 1, 1 << 20)

    equal = {name: cached_from(name) for name in ("linear", "lightning2")}
    return Evidence(
        range_tested=evidence.range_tested,
        counted=f"{evidence.counted}; a cache in pages moves as much from "
        + " and ".join(f"{length:,} tokens on ({name})" for name, length in equal.items()),
        verdict=evidence.verdict,
        numbers={**evidence.numbers, "cache_moves_more_from_tokens": equal},
    )


CLAIMS: tuple[Claim, ...] = (
    split_extra_data,
    split_fills,
    paged_not_contiguous,
    paged_kernel_overhead,
    packed_heads_traffic,
    decode_intensity,
    linear_constant_step,
)
"""Claims about decoding steps."""
