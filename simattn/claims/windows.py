"""Claims about attention in windows: sliding ones and their rolling cache, dilated ones, overlapping ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from simattn.algorithms.dilated_window import DilatedWindowProblem
from simattn.algorithms.overlapped_window import OverlappedWindowProblem
from simattn.algorithms.sliding_window import SlidingWindowProblem
from simattn.algorithms.windows import receptive_field
from simattn.api import Run, run
from simattn.bounds import fit_exponents
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, HOLDS_WITH_CONSTANT, Claim, Evidence, claim
from simattn.claims.rules import Ratio, counted, equality_evidence, theta_evidence
from simattn.claims.sources import IN_LLMS, LONGFORMER, MISTRAL, ONLINE_SOFTMAX, VERSUS
from simattn.masks import BlockMask
from simattn.models import MODELS

HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
MISTRAL_WINDOW = (4095, 0)
SIZES = tuple(
    (length << 8, window) for window in (1 << 10, 1 << 12, 1 << 14, 1 << 16) for length in (window, 16 * window)
)
SIZES_RANGE = "W = 2¹⁰…2¹⁶ keys, N = 256 W and 4096 W; 32 query heads on 8 KV heads of 128; bfloat16, plan gpu"


def _theta(measure: Callable[[int, int], float], bound: Callable[[int, int], float], range_tested: str) -> Evidence:
    """Hold counts against a bound of (N, W); the windows from 2¹⁴ keys on are far into the limit."""
    rows = []
    for length, window in SIZES:
        value = measure(length, window)
        rows.append({"N": length, "W": window, "counted": value, "ratio": value / bound(length, window)})
    deep = [row for row in rows if row["W"] >= 1 << 14]
    ratios = [row["ratio"] for row in rows]
    variables = ("N", "W")
    law, drift = fit_exponents(deep, variables, "counted"), fit_exponents(deep, variables, "ratio")
    return theta_evidence(Ratio(min(ratios), max(ratios), law, drift), range_tested)


def _sliding(length: int, window: int) -> Run:
    return counted("sliding_window", q_len=length, window=(window - 1, 0), **HEADS)


@claim(
    "sliding-window-flops",
    statement="Sliding-window attention takes the operations of attention from O(N²) to O(N · W).",
    source=f"{IN_LLMS}; {MISTRAL}, Section 2",
    expected=HOLDS_WITH_CONSTANT,
)
def sliding_window_flops() -> Evidence:
    """Count the FLOPs of matrix products on visited tiles."""
    return _theta(
        lambda length, window: _sliding(length, window).operations.matmul_flops,
        lambda length, window: 4.0 * HEADS["heads"] * HEADS["head_dim"] * length * window,
        f"{SIZES_RANGE}; forward; bound 4 · heads · d · N · W",
    )


@claim(
    "sliding-window-bytes",
    statement="The bytes that sliding-window attention moves are O(N · W) at fixed tiles.",
    source=f"{MISTRAL}, Section 2",
    expected=HOLDS_WITH_CONSTANT,
)
def sliding_window_bytes() -> Evidence:
    """Count the bytes between memory and multiprocessors, against each query tile reading W keys and values."""
    return _theta(
        lambda length, window: _sliding(length, window).traffic.hbm_bytes,
        lambda length, window: 4.0 * HEADS["heads"] * HEADS["head_dim"] * length * window / 128,
        f"{SIZES_RANGE}; forward; bound 2 · heads · N / 128 tiles · W · d · 2 bytes",
    )


@claim(
    "sliding-window-reach",
    statement="Layers of windows of W keys, the own one included, let information pass layers · (W − 1) tokens.",
    source=f"{MISTRAL}, Section 2, which does not count the own key and has k · W",
    expected=HOLDS,
)
def sliding_window_reach() -> Evidence:
    """Multiply the masks of the layers, and look how far the last token's row of the product reaches."""
    pairs = []
    for window in (1, 2, 5, 16):
        for layers in (1, 2, 3, 7):
            mask = SlidingWindowProblem(q_len=128, window=(window - 1, 0)).visible_elements()
            seen = np.linalg.matrix_power(mask.astype(np.float64), layers)[-1]
            reach, _ = receptive_field(layers, (window - 1, 0))
            pairs += [(127 - int(np.flatnonzero(seen)[0]), layers * (window - 1)), (reach, layers * (window - 1))]
    return equality_evidence(
        pairs, "W = 1, 2, 5, 16; 1, 2, 3, 7 layers of 128 tokens", "tokens before the last that it depends on"
    )


@claim(
    "sliding-window-16k",
    statement="Four layers of windows of 4096 tokens let information pass through a whole sequence of 16 384.",
    source=IN_LLMS,
    expected=DOES_NOT_HOLD,
)
def sliding_window_16k() -> Evidence:
    """Compare the reach of four layers with the 16 383 tokens from the last to the first: three short.

    A window has as many keys as its cache has slots, the own one included.
    """
    reach, _ = receptive_field(4, MISTRAL_WINDOW)
    return equality_evidence(
        [(reach, 16_383)],
        "4 layers, 4096 keys with the own one (with 4096 besides it, 16 384 tokens would be passed), 16 384 tokens",
        "tokens passed",
        reach_tokens=reach,
    )


@claim(
    "mistral-reach",
    statement="At the last layer, a window of 4096 keys has a theoretical attention span of approximately 131K tokens.",
    source=f"{MISTRAL}, Section 2",
    expected=HOLDS,
)
def mistral_reach() -> Evidence:
    """Compute the reach of the model's layers, in thousands of tokens."""
    layers = MODELS["Mistral-7B"].layers
    reach, _ = receptive_field(layers, MISTRAL_WINDOW)
    return equality_evidence(
        [(round(reach / 1000), 131)], f"{layers} layers, 4096 keys", "thousands of tokens", reach_tokens=reach
    )


@claim(
    "rolling-cache-constant",
    statement="A rolling buffer has a fixed size: a step reads the same cache however many tokens there have been.",
    source=f"{MISTRAL}, Section 2",
    expected=HOLDS,
)
def rolling_cache_constant() -> Evidence:
    """Count the bytes of a step, all arrays, against those of 4096 tokens; and those of shorter sequences."""

    def step(tokens: int) -> Run:
        shape = {**HEADS, "q_len": 1, "window": MISTRAL_WINDOW, "direction": "decode"}
        return counted("sliding_window", **shape, total_tokens=tokens)

    full, per_slot = step(4096).traffic.hbm_bytes, 2 * 8 * 128 * 2
    pairs = [(step(tokens).traffic.hbm_bytes, full) for tokens in (4097, 1 << 14, 1 << 20, 1 << 40, 1 << 60)]
    pairs += [(step(tokens).traffic.hbm_bytes, full - (4096 - tokens) * per_slot) for tokens in (1, 100, 4095)]
    return equality_evidence(
        pairs, "W = 4096; 1…2⁶⁰ tokens; 32 query heads on 8 KV heads of 128", "bytes of a step", full_bytes=full
    )


@claim(
    "rolling-cache-eighth",
    statement="On a sequence of 32k tokens, the rolling buffer reduces the cache memory 8 times.",
    source=f"{MISTRAL}, Section 2",
    expected=HOLDS,
)
def rolling_cache_eighth() -> Evidence:
    """Compare the bytes of both caches of the model."""
    cache = MODELS["Mistral-7B"].cache
    rolling, whole = cache.rolling_bytes(window=4096), cache.bytes(length=1 << 15)
    return equality_evidence(
        [(whole, 8 * rolling)], "Mistral-7B, W = 4096, 32 768 tokens", "bytes of the whole cache = 8 × rolling one's",
        rolling_bytes=rolling, whole_bytes=whole,
    )  # fmt: skip


GLOBALS = 64


def _longformer(length: int, window: int, dilation: int = 1) -> Run:
    return counted(
        "dilated_window",
        q_len=length,
        window=(window // 2, window // 2),
        dilation=dilation,
        global_tokens=GLOBALS,
        **HEADS,
    )


@claim(
    "longformer-flops",
    statement="A window, dilated or not, with a fixed number of global tokens scales linearly in length: O(N · w).",
    source=f"{LONGFORMER}, Section 3.1",
    expected=HOLDS_WITH_CONSTANT,
)
def longformer_flops() -> Evidence:
    """Count the FLOPs of matrix products: each token sees w keys and the global ones, which see all."""
    return _theta(
        lambda length, window: sum(_longformer(length, window, step).operations.matmul_flops for step in (1, 4)) / 2,
        lambda length, window: 4.0 * HEADS["heads"] * HEADS["head_dim"] * length * (window + 1 + 2 * GLOBALS),
        f"{SIZES_RANGE}; w = W, dilation 1 and 4, {GLOBALS} global tokens; forward",
    )


@claim(
    "longformer-bytes",
    statement="So do the bytes that it moves, at fixed tiles.",
    source=f"{LONGFORMER}, Section 3.1",
    expected=HOLDS_WITH_CONSTANT,
)
def longformer_bytes() -> Evidence:
    """Count the bytes between memory and multiprocessors, forward."""
    return _theta(
        lambda length, window: sum(_longformer(length, window, step).traffic.hbm_bytes for step in (1, 4)) / 2,
        lambda length, window: 4.0 * HEADS["heads"] * HEADS["head_dim"] * length * (window + 1 + 2 * GLOBALS) / 128,
        f"{SIZES_RANGE}; w = W, dilation 1 and 4, {GLOBALS} global tokens; forward",
    )


@claim(
    "longformer-reach",
    statement="With l layers of a fixed dilation d and window size w the receptive field is l · d · w.",
    source=f"{LONGFORMER}, Section 3.1",
    expected=HOLDS,
)
def longformer_reach() -> Evidence:
    """Multiply the masks of the layers, and look how far the middle token's row of the product reaches on both sides.

    A layer has w / 2 keys on each side, and the own token is not counted.
    """
    pairs = []
    for dilation in (1, 2, 8):
        for window in (2, 4, 8):
            sides = (window // 2, window // 2)
            mask = DilatedWindowProblem(q_len=257, window=sides, dilation=dilation).visible_elements()
            for layers in (1, 2, 4):
                seen = np.flatnonzero(np.linalg.matrix_power(mask.astype(np.float64), layers)[128])
                reached = sum(receptive_field(layers, sides, dilation=dilation))
                pairs += [(int(seen[-1] - seen[0]), layers * dilation * window), (reached, layers * dilation * window)]
    return equality_evidence(
        pairs,
        "l = 1, 2, 4; d = 1, 2, 8; w = 2, 4, 8; 257 tokens",
        "tokens between the ends reached = l · d · w",
    )


@claim(
    "overlapping-is-longformer",
    statement="Longformer keeps local context by cutting the sequence into windows that overlap.",
    source=VERSUS,
    expected=DOES_NOT_HOLD,
)
def overlapping_is_longformer() -> Evidence:
    """Compare what tokens see: Longformer's window is around each of them, that of a block depends on its place."""
    length, cases, numbers = 2048, [], []
    for window, overlap in ((256, 64), (256, 128), (512, 256), (512, 511)):
        blocks = OverlappedWindowProblem(q_len=length, window_len=window, overlap=overlap).visible_elements()
        around = SlidingWindowProblem(q_len=length, window=(window // 2, window // 2)).visible_elements()
        inner = slice(window, length - window)  # away from the ends, where Longformer's window is cut too
        cases.append((int((blocks != around).sum()), 0))
        numbers.append(tuple(int(end) for end in (blocks[inner].sum(axis=1).min(), blocks[inner].sum(axis=1).max())))
    return equality_evidence(
        cases, "2048 tokens; windows of 256 and 512 that share 64…511", "pairs in which they differ",
        keys_seen_at_least=[low for low, _ in numbers], keys_seen_at_most=[high for _, high in numbers],
    )  # fmt: skip


@claim(
    "overlapping-concatenated",
    statement="Outputs of overlapping windows are aggregated by putting them one after another.",
    source=VERSUS,
    expected=DOES_NOT_HOLD,
)
def overlapping_concatenated() -> Evidence:
    """Count the rows of the windows' outputs, of which a token has one from each window that it lies in, against N."""
    pairs = []
    for length in (1 << 12, 1 << 14):
        for window, overlap in ((128, 32), (512, 256), (512, 384)):
            found = counted(
                "overlapped_window", q_len=length, window_len=window, overlap=overlap, head_dim=64, pairs="per_window"
            )
            pairs.append((found.traffic.by_array["lse_partial"].hbm_write_bytes // 4, length))
    return equality_evidence(
        pairs, "N = 2¹², 2¹⁴; windows of 128 and 512 that share 32…384 tokens", "rows of outputs = tokens"
    )


@claim(
    "overlapping-merged",
    statement="Merged by their log-sum-exp, the outputs of windows are attention over what the windows show together.",
    source=f"{ONLINE_SOFTMAX}, Section 3.1",
    expected=HOLDS,
)
def overlapping_merged() -> Evidence:
    """Run the program in float64 beside flash2 under the union's mask, and take the largest difference."""
    length, generator = 96, np.random.default_rng(0)
    q, k, v = generator.standard_normal((3, 1, length, 2, 16)).astype(np.float32)
    worst = 0.0
    for window, overlap in ((32, 8), (32, 16), (24, 20)):
        shape = OverlappedWindowProblem(q_len=length, window_len=window, overlap=overlap)
        merged = run("overlapped_window", q, k, v, window_len=window, overlap=overlap, arithmetic="float64")
        union = run("flash2", q, k, v, block_mask=_blocks(shape), tiles=(1, 1), arithmetic="float64")
        assert merged.out is not None
        assert union.out is not None
        worst = max(worst, float(np.abs(merged.out - union.out).max()))
    return Evidence(
        range_tested="96 tokens, 2 heads of 16; windows of 24 and 32 that share 8…20; float64",
        counted=f"largest difference of an output {worst:.1e}",
        verdict=HOLDS if worst < 1e-13 else DOES_NOT_HOLD,
        numbers={"largest_difference": worst},
    )


def _blocks(shape: OverlappedWindowProblem) -> BlockMask:
    return BlockMask.from_array(shape.visible_elements(), q_block=1, kv_block=1)


@claim(
    "overlapping-merge-bytes",
    statement="The merge costs, for each token of each window, its output and LSE in fp32, written and read once.",
    source=f"{ONLINE_SOFTMAX}, Section 3.1, of partial outputs in memory",
    expected=HOLDS,
)
def overlapping_merge_bytes() -> Evidence:
    """Count the bytes of the partial outputs, and their share of all."""
    pairs, shares = [], []
    for length in (1 << 12, 1 << 20):
        for window, overlap in ((512, 128), (512, 256), (1024, 512), (1024, 896)):
            traffic = counted(
                "overlapped_window", q_len=length, window_len=window, overlap=overlap, tiles=(128, 64), **HEADS
            ).traffic
            tokens = length + (-(-(length - window) // (window - overlap))) * overlap
            partial = [traffic.by_array[name] for name in ("out_partial", "lse_partial")]
            moved = sum(array.hbm_read_bytes + array.hbm_write_bytes for array in partial)
            pairs.append((moved, 2 * 4 * HEADS["heads"] * (HEADS["head_dim"] + 1) * tokens))
            shares.append(moved / traffic.hbm_bytes)
    return equality_evidence(
        pairs, "N = 2¹², 2²⁰; windows of 512 and 1024, tiles that divide them; bfloat16",
        "bytes of partial outputs = 8 · heads · (d + 1) · tokens of all windows",
        least_share_of_all_bytes=min(shares), largest_share_of_all_bytes=max(shares),
    )  # fmt: skip


CLAIMS: tuple[Claim, ...] = (
    sliding_window_flops,
    sliding_window_bytes,
    sliding_window_reach,
    sliding_window_16k,
    mistral_reach,
    rolling_cache_constant,
    rolling_cache_eighth,
    longformer_flops,
    longformer_bytes,
    longformer_reach,
    overlapping_is_longformer,
    overlapping_concatenated,
    overlapping_merged,
    overlapping_merge_bytes,
)
"""Claims about attention in windows."""
