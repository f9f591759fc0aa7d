"""Claims about Mixture of Block Attention: what it costs beside full attention, and what it is called."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from simattn.algorithms import ALGORITHMS
from simattn.algorithms.moba import BlockHistogram, MobaProblem
from simattn.api import Run
from simattn.bounds import fit_exponents
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, TIMING_ONLY, Claim, Evidence, claim
from simattn.claims.rules import counted, equality_evidence
from simattn.claims.sources import ADVANCED, MOBA
from simattn.plan import PlanKind
from simattn.problem import AttentionProblem, Direction

MILLION = 1 << 20
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def _sparse(length: int, block_size: int, top_k: int, **arguments: Any) -> Run:
    """Count one head whose queries choose evenly among the blocks before their own."""
    return counted("moba", q_len=length, head_dim=128, block_size=block_size, top_k=top_k, **arguments)


def _full(length: int, **arguments: Any) -> Run:
    return counted("flash2", q_len=length, head_dim=128, causal=True, **arguments)


def visited_blocks(blocks: int, top_k: int) -> float:
    """Return the scores that queries of so many equal blocks see, in blocks of scores: half of their own each."""
    return blocks / 2 + sum(min(block, top_k - 1) for block in range(blocks))


def _ratios(blocks: int, block_size: int, top_k: int) -> dict[str, float]:
    """Return by how much full attention exceeds the sparse one, at a random choice drawn from a seed."""
    length = blocks * block_size
    histogram = BlockHistogram.random(heads=1, q_len=length, block=block_size, top_k=top_k, seed=0)
    sparse, full = _sparse(length, block_size, top_k, selection=histogram), _full(length)
    return {
        "score_area": visited_blocks(blocks, blocks) / visited_blocks(blocks, top_k),
        "matmul_flops": full.operations.matmul_flops / sparse.operations.matmul_flops,
        "hbm_bytes": full.traffic.hbm_bytes / sparse.traffic.hbm_bytes,
    }


def _speed_up(identifier: str, statement: str, blocks: int, block_size: int, top_k: int) -> Claim:
    @claim(identifier, statement=statement, source=f"{MOBA}, Figure 2", expected=TIMING_ONLY)
    def made() -> Evidence:
        ratios = _ratios(blocks, block_size, top_k)
        return Evidence(
            range_tested=f"moba against flash2, causal, forward; N = {blocks * block_size:,}, blocks of "
            f"{block_size:,}, top {top_k}, uniform random choices; one head, d = 128, bfloat16, plan gpu",
            counted=f"a time ratio on hardware that is not stated; the scores that are seen differ by "
            f"{ratios['score_area']:.1f}, FLOPs of matrix products by {ratios['matmul_flops']:.1f}, bytes by "
            f"{ratios['hbm_bytes']:.1f}",
            verdict=TIMING_ONLY,
            numbers=ratios,
        )

    return made


@claim(
    "moba-name",
    statement="MoBA stands for Mixture of Sparse Attention.",
    source=ADVANCED,
    expected=DOES_NOT_HOLD,
)
def moba_name() -> Evidence:
    """Compare with the report's title."""
    title = ALGORITHMS["moba"].title
    return Evidence(
        range_tested="the name alone",
        counted=f"the report is titled MoBA: {title} for Long-Context LLMs",
        verdict=HOLDS if title == "Mixture of Sparse Attention" else DOES_NOT_HOLD,
        numbers={"title": title},
    )


@claim(
    "moba-parameterless-gate",
    statement="The gate that chooses the blocks has no parameters.",
    source=f"{ADVANCED}; {MOBA}, Section 2.2",
    expected=HOLDS,
)
def moba_parameterless_gate() -> Evidence:
    """Compare what the programs are given with what dense attention is given."""
    pairs = [
        (sorted(MobaProblem(q_len=8).inputs(direction)), sorted(AttentionProblem(q_len=8).inputs(direction)))
        for direction in DIRECTIONS
    ]
    return equality_evidence(pairs, "inputs of both passes", "the inputs are those of dense attention")


@claim(
    "moba-switches-to-full-attention",
    statement="MoBA switches seamlessly between sparse and full attention.",
    source=f"{ADVANCED}; {MOBA}, Section 2.2",
    expected=HOLDS,
)
def moba_switches() -> Evidence:
    """Count full attention in its place: every array's bytes and all operations are FlashAttention-2's."""
    pairs: list[tuple[Any, Any]] = []
    plans: tuple[PlanKind, ...] = ("gpu", "fit", "paper")
    for length in (4096, 100_000, MILLION):
        for direction in DIRECTIONS:
            for plan in plans:
                sparse, full = (
                    counted(name, q_len=length, heads=8, kv_heads=2, direction=direction, plan=plan, **own)
                    for name, own in (("moba", {"full_attention": True}), ("flash2", {"causal": True}))
                )
                pairs += [(sparse.traffic, full.traffic), (sparse.operations, full.operations)]
    return equality_evidence(
        pairs,
        "N = 4096, 100,000, 2²⁰; d = 64; 8 heads on 2; forward and backward; plans gpu, fit and paper",
        "traffic and operations of full_attention=True = those of flash2, causal",
    )


def _text(ratios: Mapping[int, float]) -> str:
    return ", ".join(f"{ratio:.3g} (N = {length:,})" for length, ratio in ratios.items())


@claim(
    "moba-cheaper-at-length",
    statement="With growing sequence length the computation of MoBA costs far less than Flash Attention's.",
    source=ADVANCED,
    expected=HOLDS,
)
def moba_cheaper_at_length() -> Evidence:
    """Count FLOPs of matrix products: a ratio that grows with every doubling, and is at least 2 in the end."""
    ratios = {
        length: _full(length).operations.matmul_flops / _sparse(length, 4096, 12).operations.matmul_flops
        for length in (MILLION >> shift for shift in (5, 4, 3, 2, 1, 0))
    }
    found = list(ratios.values())
    grows = all(later > earlier for earlier, later in pairwise(found))
    return Evidence(
        range_tested="moba against flash2, causal, forward; blocks of 4096, top 12; one head, d = 128, plan gpu",
        counted=f"FLOPs of matrix products differ by {_text(ratios)}; below 12 blocks MoBA is full attention in parts, "
        "and its choice comes on top",
        verdict=HOLDS if grows and found[-1] >= 2 else DOES_NOT_HOLD,
        numbers={"matmul_flops_ratio": ratios},
    )


@claim(
    "moba-sub-quadratic",
    statement="The computation of MoBA grows sub-quadratically with the sequence length.",
    source=f"{MOBA}, Section 3.4",
    expected=HOLDS,
)
def moba_sub_quadratic() -> Evidence:
    """Fit the exponent of FLOPs at blocks of one size, and print that of the report's 64 blocks at every length."""
    lengths = [1 << shift for shift in range(20, 25)]
    runs = {
        "blocks_of_4096": [_sparse(length, 4096, 12) for length in lengths],
        "64_blocks": [_sparse(length, length // 64, 3) for length in lengths],
    }
    exponents = {}
    for name, found in runs.items():
        rows = [{"N": run.problem.q_len, "flops": run.operations.matmul_flops} for run in found]
        exponents[name] = fit_exponents(rows, ("N",), "flops").exponents["N"]
    return Evidence(
        range_tested="forward; N = 2²⁰…2²⁴; blocks of 4096, top 12, and 64 blocks, top 3; one head, d = 128, plan gpu",
        counted=f"FLOPs of matrix products ∝ N^{exponents['blocks_of_4096']:.3f} at blocks of one size, though the "
        f"scores of the blocks are N²/(2 B); ∝ N^{exponents['64_blocks']:.3f} at 64 blocks of any size, as in the "
        "report's measurement up to ten million tokens: that setting is quadratic, with a smaller constant",
        verdict=HOLDS if exponents["blocks_of_4096"] <= 1.5 else DOES_NOT_HOLD,
        numbers={"exponents": exponents},
    )


CLAIMS: tuple[Claim, ...] = (
    moba_name,
    moba_parameterless_gate,
    moba_switches,
    moba_cheaper_at_length,
    moba_sub_quadratic,
    _speed_up("moba-6.5-times", "MoBA is 6.5 times as fast as full attention at 1M tokens.", 256, 4096, 12),
    _speed_up("moba-16-times", "MoBA is 16 times as fast as full attention at 10M tokens.", 64, 163_840, 3),
)
"""Claims about Mixture of Block Attention."""
