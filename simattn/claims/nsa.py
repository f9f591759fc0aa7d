"""Claims about Native Sparse Attention: what a decoding step reads, and how that compares with reading all keys."""

from __future__ import annotations

from typing import Any

from simattn.api import Run
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, TIMING_ONLY, Claim, Evidence, claim
from simattn.claims.rules import counted, equality_evidence
from simattn.claims.sources import ADVANCED, NSA
from simattn.problem import Direction

SHAPE: dict[str, Any] = {"heads": 64, "kv_heads": 4, "head_dim": 192, "value_dim": 128}
SHAPE_TEXT = "64 query heads, 4 KV heads, d = 192, d_v = 128, bfloat16; l = 32, d = 16, l' = 64, n = 16, w = 512"
BRANCHES = ("compressed", "selected", "window")

TOKENS_READ = {8192: 2048, 16384: 2560, 32768: 3584, 65536: 5632}
"""The paper's Table 4: tokens that a decoding step reads, by context length."""

EXPECTED_RATIOS = {8192: 4.0, 16384: 6.4, 32768: 9.1, 65536: 11.6}
"""The paper's Table 4: expected speed-ups of decoding, by context length."""

LONG = 65536
GPU = "A100-80GB"


def _step(length: int) -> Run:
    return counted("nsa", **SHAPE, q_len=1, kv_len=length, direction="decode")


def _tokens(run: Run) -> int:
    """Return the values that a step loads, each once, in tokens."""
    token = run.problem.kv_heads * run.problem.value_dim * run.problem.item_bytes
    return sum(run.traffic.by_array[f"v_{branch}"].hbm_read_bytes for branch in BRANCHES) // token


def _dense_step(length: int) -> Run:
    """Count a step of attention to all keys, with the heads of a group as rows, so that each key is loaded once."""
    packed = SHAPE["heads"] // SHAPE["kv_heads"]
    return counted("flash3", **SHAPE, q_len=1, kv_len=length, causal=True, packed_heads=packed)


@claim(
    "nsa-tokens-read",
    statement="A decoding step reads 2048, 2560, 3584 and 5632 tokens at contexts of 8k, 16k, 32k and 64k.",
    source=f"{NSA}, Table 4",
    expected=HOLDS,
)
def nsa_tokens_read() -> Evidence:
    """Count the values that a step loads, in tokens: the statement takes one compressed block more than there are."""
    found = {length: _tokens(_step(length)) for length in TOKENS_READ}
    pairs = [(found[length], stated - 1) for length, stated in TOKENS_READ.items()]
    return equality_evidence(
        pairs,
        f"decoding step of one token; {SHAPE_TEXT}; plan gpu",
        "tokens read = those stated less one, for ⌊(N − 32)/16⌋ + 1 blocks are complete",
        tokens=[found[length] for length in TOKENS_READ],
    )


@claim(
    "nsa-decode-volume",
    statement="Decoding is expected to be 4, 6.4, 9.1 and 11.6 times faster at 8k, 16k, 32k and 64k by the keys and "
    "values read.",
    source=f"{NSA}, Table 4",
    expected=HOLDS,
)
def nsa_decode_volume() -> Evidence:
    """Compare tokens read with the context's: equal to the statement when rounded as it is."""
    found = {length: length / _tokens(_step(length)) for length in EXPECTED_RATIOS}
    holds = all(round(found[length], 1) == stated for length, stated in EXPECTED_RATIOS.items())
    return Evidence(
        range_tested=f"decoding step of one token; {SHAPE_TEXT}; plan gpu",
        counted="context over tokens read: " + _list(found),
        verdict=HOLDS if holds else DOES_NOT_HOLD,
        numbers={"ratios": list(found.values())},
    )


@claim(
    "nsa-decode-bytes",
    statement="All bytes of a decoding step are 4, 6.4, 9.1 and 11.6 times fewer than those of reading all keys.",
    source=f"{NSA}, Table 4, taken as bytes of the whole step",
    expected=DOES_NOT_HOLD,
)
def nsa_decode_bytes() -> Evidence:
    """Count every array of the step: the selection reads compressed keys again, and new blocks are compressed."""
    found = {
        length: _dense_step(length).traffic.hbm_bytes / _step(length).traffic.hbm_bytes for length in EXPECTED_RATIOS
    }
    holds = all(round(found[length], 1) >= stated for length, stated in EXPECTED_RATIOS.items())
    return Evidence(
        range_tested=f"decoding step of one token; {SHAPE_TEXT}; plan gpu, against flash3 with packed heads",
        counted="bytes of reading all keys over bytes of the step: "
        + _list(found)
        + "; the selection reads the compressed keys a second time",
        verdict=HOLDS if holds else DOES_NOT_HOLD,
        numbers={"ratios": list(found.values())},
    )


@claim(
    "nsa-group-loads-once",
    statement="The query heads of a group share the selected blocks, so that these are loaded once for all of them.",
    source=f"{ADVANCED}; {NSA}, Section 3.4",
    expected=HOLDS,
)
def nsa_group_loads_once() -> Evidence:
    """Count the bytes of selected keys and values for groups of 1 to 16 heads: the same."""
    pairs = []
    for length in (8192, LONG):
        for group in (1, 2, 4, 8, 16):
            arrays = counted("nsa", **{**SHAPE, "heads": 4 * group}, q_len=length).traffic.by_array
            own = length // 64  # blocks of 64 positions, each with so many blocks before it and itself
            blocks = 64 * sum(min(16, block + 1) for block in range(own))
            for name, columns in (("k_selected", 192), ("v_selected", 128)):
                pairs.append((arrays[name].hbm_read_bytes, 4 * blocks * 64 * columns * 2))
    return equality_evidence(
        pairs,
        "N = 8192, 65536; 4 KV heads, groups of 1…16; d = 192, d_v = 128, bfloat16; plan gpu; forward",
        "bytes of selected keys and values = those of the blocks, whatever the group",
    )


def _speed_up(direction: Direction) -> Evidence:
    """Print FLOPs and bytes beside each other: how much faster a GPU is for it, only a clock decides."""
    shape: dict[str, Any] = {**SHAPE, "q_len": LONG, "causal": True, "direction": direction, "hardware": GPU}
    sparse, dense = (counted(name, **shape) for name in ("nsa", "flash2"))
    flops = dense.operations.matmul_flops / sparse.operations.matmul_flops
    moved = dense.traffic.hbm_bytes / sparse.traffic.hbm_bytes
    return Evidence(
        range_tested=f"N = 65536; {SHAPE_TEXT}; plans gpu of {GPU}, against flash2",
        counted=f"{flops:.1f} times fewer FLOPs of matrix products; bytes {moved:.2f} times as few",
        verdict=TIMING_ONLY,
        numbers={"flops_ratio": flops, "bytes_ratio": moved},
    )


@claim(
    "nsa-forward-speed",
    statement="The forward pass of training is 9.0 times faster than FlashAttention-2 at 64k on A100s.",
    source=f"{ADVANCED}; {NSA}, Section 5.1",
    expected=TIMING_ONLY,
)
def nsa_forward_speed() -> Evidence:
    """Count the forward passes."""
    return _speed_up("forward")


@claim(
    "nsa-backward-speed",
    statement="The backward pass of training is 6.0 times faster than FlashAttention-2 at 64k on A100s.",
    source=f"{ADVANCED}; {NSA}, Section 5.1",
    expected=TIMING_ONLY,
)
def nsa_backward_speed() -> Evidence:
    """Count the backward passes."""
    return _speed_up("backward")


@claim(
    "nsa-decode-speed",
    statement="Inference is 11.6 times faster at 64k, as a result of experiments.",
    source=ADVANCED,
    expected=TIMING_ONLY,
)
def nsa_decode_speed() -> Evidence:
    """Count tokens: the paper gives no measured time, but the ratio of what is read."""
    ratio = LONG / _tokens(_step(LONG))
    return Evidence(
        range_tested=f"decoding step of one token at N = 65536; {SHAPE_TEXT}",
        counted=f"the paper measures no decoding time; its number is the ratio of tokens read, {ratio:.1f}",
        verdict=TIMING_ONLY,
        numbers={"tokens_ratio": ratio},
    )


def _list(ratios: dict[int, float]) -> str:
    return ", ".join(f"{ratio:.1f}" for ratio in ratios.values())


CLAIMS: tuple[Claim, ...] = (
    nsa_tokens_read,
    nsa_decode_volume,
    nsa_decode_bytes,
    nsa_group_loads_once,
    nsa_forward_speed,
    nsa_backward_speed,
    nsa_decode_speed,
)
"""Claims about Native Sparse Attention."""
