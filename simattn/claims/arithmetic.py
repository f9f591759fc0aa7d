"""Claims about operations and exactness."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simattn.api import run
from simattn.bounds import PowerLaw, fit_exponents
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, Claim, Evidence, claim
from simattn.claims.rules import counted, equality_evidence, forward_algorithms, fused_algorithms
from simattn.claims.sources import ADVANCED, FLASH1, FLASH2, IN_LLMS, MULTI_HEAD, OVERVIEW, VERSUS
from simattn.hardware import get_hardware
from simattn.layers import AttentionLayer, Phase

EXACT_EXPONENT = 1e-6
"""Rounding that a fit of an exact power law may leave."""


def _flops_law(points: Iterator[dict[str, int]] | list[dict[str, int]], variables: list[str]) -> PowerLaw:
    return fit_exponents(list(points), variables, "flops")


@claim(
    "matmul-flops",
    statement="Self-attention computes in O(n²·d): 4n²d FLOPs of matrix products forward.",
    source=f"{VERSUS}; {ADVANCED}; {IN_LLMS}; {FLASH1}, Theorem 1",
    expected=HOLDS,
)
def matmul_flops() -> Evidence:
    """Count every program that computes the scores once, for self- and cross-attention, to the FLOP."""
    once = [name for name in forward_algorithms() if name != "online_softmax"]
    pairs = []
    for name in once:
        for n, m in ((1000, 1000), (4096, 4096), (1 << 20, 1 << 20), (77, 4096), (4096, 77)):
            for d in (16, 64, 128):
                flops = counted(name, q_len=n, kv_len=m, head_dim=d).operations.matmul_flops
                pairs.append((flops, 4 * n * m * d))
    return equality_evidence(
        pairs,
        f"{', '.join(once)}; N from 77 to 2²⁰, cross-attention too; d = 16, 64, 128; bfloat16, plan gpu",
        "FLOPs of matrix products = 4 · q_len · kv_len · d",
    )


@claim(
    "scores-flops-n-d-squared",
    statement="QKᵀ over all heads costs O(h·n·k·n) = O(nd²).",
    source=IN_LLMS,
    expected=DOES_NOT_HOLD,
)
def scores_flops_n_d_squared() -> Evidence:
    """Fit the exponents: with h·k = d it is O(n²d), the article exchanged them."""
    rows = [
        {"n": n, "d": d, "flops": counted("standard", heads=d // 64, head_dim=64, q_len=n).operations.matmul_flops}
        for n in (1 << 10, 1 << 14, 1 << 18)
        for d in (512, 2048, 8192)
    ]
    law = _flops_law(rows, ["n", "d"])
    stated = {"n": 1, "d": 2}
    holds = all(abs(law.exponents[name] - value) <= EXACT_EXPONENT for name, value in stated.items())
    return Evidence(
        range_tested="n = 2¹⁰…2¹⁸; d = h·64 = 512…8192; standard",
        counted=f"FLOPs of QKᵀ and PV ∝ {law}: O(n²d)",
        verdict=HOLDS if holds else DOES_NOT_HOLD,
        numbers={"exponents": dict(law.exponents)},
    )


def _layer(d: int, heads: int | None = None) -> AttentionLayer:
    return AttentionLayer(model_width=d, heads=heads or d // 64)


def _layer_flops(n: int, d: int) -> int:
    """Return the FLOPs that the programs of an attention layer do forward: four projections, scores and values."""
    return _layer(d).profile("prefill", length=n, algorithm="standard").operations.matmul_flops


@claim(
    "layer-complexity",
    statement="The projections cost O(nd²), multi-head attention altogether O(n²d) + O(nd²).",
    source=IN_LLMS,
    expected=HOLDS,
)
def layer_complexity() -> Evidence:
    """Count 4n²d of scores and values and 8nd² of projections forward, and twice as many backward."""
    pairs = []
    for n in (1 << 8, 1 << 12, 1 << 16, 1 << 20):
        for d in (512, 4096):
            pairs.append((_layer_flops(n, d), 4 * n * n * d + 8 * n * d * d))
            phases: tuple[tuple[Phase, int], ...] = (("prefill", 1), ("train", 3))
            for phase, times in phases:
                flops = _layer(d).flops(phase, length=n)
                pairs += [(flops.projections, times * 8 * n * d * d), (flops.attention, times * 4 * n * n * d)]
    return equality_evidence(
        pairs,
        "n = 2⁸…2²⁰; d = 512, 4096, h = d/64; the programs with standard attention, and the shapes in both directions",
        "FLOPs = 4n²d + 8nd² forward, three times as many in training",
    )


@claim(
    "layer-proportional",
    statement="The cost of multi-head attention is proportional to the square of n and to the square of d.",
    source=IN_LLMS,
    expected=DOES_NOT_HOLD,
)
def layer_proportional() -> Evidence:
    """Fit both limits: n²d for n ≫ d and nd² for n ≪ d, never both squares at once."""
    laws = {}
    for name, lengths in (("n ≫ d", (1 << 18, 1 << 20, 1 << 22)), ("n ≪ d", (1, 4, 16))):
        rows = [{"n": n, "d": d, "flops": _layer_flops(n, d)} for n in lengths for d in (1024, 2048, 4096)]
        laws[name] = _flops_law(rows, ["n", "d"])
    both = any(all(round(value, 1) == 2 for value in law.exponents.values()) for law in laws.values())
    return Evidence(
        range_tested="d = 1024…4096; n = 2¹⁸…2²² and 1…16",
        counted="; ".join(f"{name}: ∝ {law}" for name, law in laws.items()),
        verdict=HOLDS if both else DOES_NOT_HOLD,
        numbers={name: dict(law.exponents) for name, law in laws.items()},
    )


@claim(
    "heads-same-flops",
    statement="Multi-head attention has as many FLOPs as one head of the same total width.",
    source=f"{OVERVIEW}; {MULTI_HEAD}",
    expected=HOLDS,
)
def heads_same_flops() -> Evidence:
    """Count products, which are equal, and exponentials, which are not: every head has its own softmax."""
    n, width = 4096, 256
    operations = {h: counted("flash2", heads=h, q_len=n, head_dim=width // h).operations for h in (1, 2, 4, 8, 16)}
    evidence = equality_evidence(
        [(done.matmul_flops, operations[1].matmul_flops) for done in operations.values()],
        f"flash2; N = {n}; h·d_k = {width}, h = 1…16",
        "FLOPs of matrix products over all heads",
    )
    ratio = operations[16].exponentials / operations[1].exponentials
    return Evidence(
        range_tested=evidence.range_tested,
        counted=f"{evidence.counted}; exponentials are {ratio:.3g} times as many with 16 heads",
        verdict=evidence.verdict,
        numbers={**evidence.numbers, "exponentials_ratio": ratio},
    )


@claim(
    "heads-projections",
    statement="The FLOPs of multi-head attention are slightly above those of one head, because projections are added.",
    source=f"{OVERVIEW}; {MULTI_HEAD}",
    expected=DOES_NOT_HOLD,
)
def heads_projections() -> Evidence:
    """Count layers of one width: one head has the same projections. Attention without any has 2d/n less, no little."""
    width, differences, shares = 1024, [], {}
    for n in (512, 4096, 1 << 16):
        flops = {h: _layer(width, h).profile("prefill", length=n).operations.matmul_flops for h in (1, 4, 16)}
        differences += [flops[h] - flops[1] for h in (4, 16)]
        counts = _layer(width, 16).flops("prefill", length=n)
        shares[n] = counts.projections / counts.attention
    slight = all(difference > 0 for difference in differences)
    return Evidence(
        range_tested=f"flash2; d_model = {width}; h = 1, 4, 16; n = 512, 4096, 2¹⁶",
        counted=f"matrix products of h heads above those of one head: {max(differences)} FLOPs at most. Projections "
        "over scores and values: " + ", ".join(f"{share:.3g} (n = {n})" for n, share in shares.items()),
        verdict=HOLDS if slight else DOES_NOT_HOLD,
        numbers={"differences_flops": differences, "projections_over_attention": shares},
    )


@claim(
    "backward-flops",
    statement="The backward pass has 5 matrix products to the forward pass's 2, so 2.5 times the FLOPs.",
    source=f"{FLASH2}, Section 4.1",
    expected=HOLDS,
)
def backward_flops() -> Evidence:
    """Count programs that compute S again; standard attention, which stored P, has 4 products."""
    pairs = []
    for name in fused_algorithms():
        for n in (1000, 1 << 20):
            forward, backward = (
                counted(name, direction=direction, q_len=n, head_dim=64).operations.matmul_flops
                for direction in ("forward", "backward")
            )
            pairs.append((2 * backward, 5 * forward))
    return equality_evidence(
        pairs, f"{', '.join(fused_algorithms())}; N = 1000, 2²⁰; d = 64; plan gpu", "2 · backward = 5 · forward"
    )


@claim(
    "causal-half",
    statement="A causal mask halves the work at long sequences.",
    source=f"{FLASH2}, Section 3.1",
    expected=HOLDS,
)
def causal_half() -> Evidence:
    """Count visited tiles: those above the diagonal are skipped, those on it are computed whole."""
    shares = {}
    for n in (1 << 10, 1 << 14, 1 << 20):
        causal, whole = (
            counted("flash2", q_len=n, head_dim=64, causal=mask).operations.matmul_flops for mask in (True, False)
        )
        shares[n] = causal / whole
    return Evidence(
        range_tested="flash2; N = 2¹⁰, 2¹⁴, 2²⁰; d = 64; plan gpu; rule: within 0.01 of a half at the longest",
        counted="share of the FLOPs: " + ", ".join(f"{share:.4f}" for share in shares.values()),
        verdict=HOLDS if abs(shares[1 << 20] - 0.5) <= 0.01 else DOES_NOT_HOLD,
        numbers={"share": shares},
    )


@claim(
    "window-linear",
    statement="Sliding-window attention takes the complexity from O(n²) to O(n).",
    source=IN_LLMS,
    expected=HOLDS,
)
def window_linear() -> Evidence:
    """Fit O(nW): linear in n at a fixed window of W keys, and linear in W."""
    rows = [
        {
            "n": n,
            "W": w,
            "flops": counted("flash2", q_len=n, head_dim=64, causal=True, window=(w - 1, 0)).operations.matmul_flops,
        }
        for n in (1 << 18, 1 << 20, 1 << 22)
        for w in (2048, 4096, 8192)
    ]
    law = _flops_law(rows, ["n", "W"])
    linear = abs(law.exponents["n"] - 1) <= 0.05
    return Evidence(
        range_tested="flash2; window (W−1, 0), W = 2048…8192 keys; n = 2¹⁸…2²²; d = 64; plan gpu",
        counted=f"FLOPs ∝ {law}: O(nW), linear in n while W is fixed",
        verdict=HOLDS if linear else DOES_NOT_HOLD,
        numbers={"exponents": dict(law.exponents)},
    )


@claim(
    "flash2-vector-flops",
    statement="FlashAttention-2 does fewer operations outside matrix products than FlashAttention.",
    source=f"{FLASH2}, Section 3.1; {ADVANCED}",
    expected=HOLDS,
)
def flash2_vector_flops() -> Evidence:
    """Compare at equal tiles: version 2 normalises the output once, not in every inner step."""
    ratios = {}
    for d in (64, 128):
        tiles = (64, 128)
        first, second = (
            counted(name, q_len=1 << 16, head_dim=d, tiles=tiles, plan="fit", hardware="A100-40GB").operations
            for name in ("flash1", "flash2")
        )
        ratios[d] = first.vector_flops / second.vector_flops
    return Evidence(
        range_tested="forward; N = 2¹⁶; d = 64, 128; the same tiles of 64 × 128",
        counted="flash1 / flash2: " + ", ".join(f"{ratio:.3g} (d = {d})" for d, ratio in ratios.items()),
        verdict=HOLDS if min(ratios.values()) > 1 else DOES_NOT_HOLD,
        numbers={"ratio_by_head_dim": ratios},
    )


@claim(
    "matmul-16-times",
    statement="On an A100 a FLOP outside matrix products is 16 times as expensive as one inside.",
    source=f"{FLASH2}, Section 3.1",
    expected=HOLDS,
)
def matmul_16_times() -> Evidence:
    """Divide the peaks: 312 TFLOP/s of the tensor cores, 19.5 of the CUDA cores."""
    row = get_hardware("A100-40GB")
    ratio = row.matmul_flops_per_second("float16") / row.vector_flops_per_second
    return Evidence(
        range_tested="A100-40GB, float16, peaks",
        counted=f"ratio of the peaks {ratio:.3g}",
        verdict=HOLDS if ratio == 16 else DOES_NOT_HOLD,
        numbers={"ratio": ratio},
    )


@claim(
    "figure-2-flops",
    statement="Forward and backward at N = 1024, d = 64, 16 heads, batch 64 take 66.6 (standard) and 75.2 GFLOP "
    "(FlashAttention).",
    source=f"{FLASH1}, Figure 2 left",
    expected=DOES_NOT_HOLD,
)
def figure_2_flops() -> Evidence:
    """Count the problem beside the figure; its 8.6 GFLOP of difference are one product for 64 heads, not for 1024."""
    gigaflops = {
        name: sum(
            counted(
                name,
                direction=direction,
                batch=64,
                heads=16,
                q_len=1024,
                head_dim=64,
                dtype="float16",
                hardware="A100-40GB",
            ).operations.matmul_flops
            for direction in ("forward", "backward")
        )
        / 1e9
        for name in ("standard", "flash1")
    }
    published = {"standard": 66.6, "flash1": 75.2}
    near = all(0.5 <= gigaflops[name] / value <= 2 for name, value in published.items())
    product = 2 * 1024**2 * 64 / 1e9
    return Evidence(
        range_tested="that problem; FLOPs of matrix products; rule: within a factor of 2",
        counted=(
            f"standard {gigaflops['standard']:.4g}, flash1 {gigaflops['flash1']:.4g} GFLOP for 1024 heads; the "
            f"published difference of 8.6 is one product for {8.6 / product:.3g} heads, so the row is of another "
            "problem than the bytes beside it"
        ),
        verdict=HOLDS if near else DOES_NOT_HOLD,
        numbers={"gigaflops": gigaflops, "gigaflops_per_product_and_head": product},
    )


@claim(
    "exact",
    statement="The result of Flash Attention is exactly that of standard attention.",
    source=f"{VERSUS}; {FLASH1}, Theorem 1",
    expected=HOLDS,
)
def exact() -> Evidence:
    """Run both in float64: equal within rounding, and not in every bit, because the sums have another order."""
    n, d = 192, 32
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, n, 2, d), dtype=np.float32) for _ in range(3))
    expected = run("standard", q, k, v, causal=True, arithmetic="float64").out
    # First-order bound of both evaluations: the scores' dot products enter the exponents, then two sums over n.
    largest_score = float(np.max(np.linalg.norm(q, axis=-1)) * np.max(np.linalg.norm(k, axis=-1))) / d**0.5
    unit = float(np.finfo(np.float64).eps) / 2
    bound = 2 * (2 * (d + 2) * largest_score + 2 * n + 8) * unit * float(np.max(np.abs(v)))
    errors, differing = {}, {}
    for name in fused_algorithms():
        got = run(name, q, k, v, causal=True, arithmetic="float64", tiles=(64, 32), plan="fit").out
        assert got is not None
        assert expected is not None
        errors[name] = float(np.max(np.abs(got - expected)))
        differing[name] = float(np.mean(got != expected))
    worst = max(errors.values())
    finite = bool(np.isfinite(worst))
    return Evidence(
        range_tested=f"{', '.join(errors)} against standard; float64; N = {n}, d = {d}, 2 heads, causal; seed 0",
        counted=f"largest difference {worst:.2g}, rounding bound {bound:.2g}; "
        f"{max(differing.values()):.0%} of the elements differ in their last bits",
        verdict=HOLDS if finite and worst <= bound else DOES_NOT_HOLD,
        numbers={"largest_difference": errors, "bound": bound, "differing_share": differing},
    )


CLAIMS: tuple[Claim, ...] = (
    matmul_flops,
    scores_flops_n_d_squared,
    layer_complexity,
    layer_proportional,
    heads_same_flops,
    heads_projections,
    backward_flops,
    causal_half,
    window_linear,
    flash2_vector_flops,
    matmul_16_times,
    figure_2_flops,
    exact,
)
"""Claims about operations and exactness."""
