"""Claims about attention without a softmax, whose keys and values a state of fixed size stands for."""

from __future__ import annotations

from dataclasses import replace

from simattn.api import Run
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, TIMING_ONLY, Claim, Evidence, claim
from simattn.claims.rules import counted, equality_evidence
from simattn.claims.sources import ADVANCED, LIGHTNING2, LINEAR
from simattn.problem import Direction

LENGTHS = tuple(1 << exponent for exponent in (10, 14, 20, 24))
LENGTHS_RANGE = "N = 2¹⁰…2²⁴; d = 64, 128; 16 heads; bfloat16, plan gpu"
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def _runs(algorithm: str, length: int, *, causal: bool) -> list[Run]:
    return [
        counted(algorithm, heads=16, q_len=length, head_dim=head_dim, causal=causal, direction=direction)
        for head_dim in (64, 128)
        for direction in DIRECTIONS
    ]


@claim(
    "linear-order",
    statement="Multiplying from the right instead of from the left takes linear attention from O(N²) to O(N).",
    source=f"{ADVANCED}; {LINEAR}, Section 3.2",
    expected=HOLDS,
)
def linear_order() -> Evidence:
    """Count the FLOPs of matrix products: in proportion to those of 1024 tokens, causal or not."""
    pairs = []
    for causal in (False, True):
        units = _runs("linear", LENGTHS[0], causal=causal)
        for length in LENGTHS[1:]:
            for unit, run in zip(units, _runs("linear", length, causal=causal), strict=True):
                pairs.append((run.operations.matmul_flops, length // LENGTHS[0] * unit.operations.matmul_flops))
    return equality_evidence(
        pairs, f"{LENGTHS_RANGE}; forward and backward, causal and not", "FLOPs of matrix products ∝ N"
    )


@claim(
    "linear-constant-bytes",
    statement="Linear attention takes constant memory per token: a state of d × d_v in place of the keys and values.",
    source=f"{LINEAR}, Section 3.4",
    expected=HOLDS,
)
def linear_constant_bytes() -> Evidence:
    """Count the bytes moved, in proportion to those of 1024 tokens, and what is on chip, which does not grow."""
    return _constant("linear")


@claim(
    "lightning2-constant-speed",
    statement="Lightning Attention-2 keeps its training speed at every sequence length under fixed memory consumption.",
    source=f"{ADVANCED}; {LIGHTNING2}, abstract",
    expected=TIMING_ONLY,
)
def lightning2_constant_speed() -> Evidence:
    """Count the work of a token beside the speed, which is a clock's."""
    evidence = _constant("lightning2")
    counted_text = f"the work of a token: {evidence.counted}; its time is not counted"
    return replace(evidence, counted=counted_text, verdict=TIMING_ONLY if evidence.verdict == HOLDS else DOES_NOT_HOLD)


@claim(
    "lightning2-constant-bytes",
    statement="Lightning Attention-2 moves as many bytes for a token at every length, with fixed memory on chip.",
    source=f"{LIGHTNING2}, abstract (fixed memory consumption)",
    expected=HOLDS,
)
def lightning2_constant_bytes() -> Evidence:
    """Count as for linear attention."""
    return _constant("lightning2")


def _constant(algorithm: str) -> Evidence:
    pairs: list[tuple[int, int]] = []
    units = _runs(algorithm, LENGTHS[0], causal=True)
    for length in LENGTHS[1:]:
        times = length // LENGTHS[0]
        for unit, run in zip(units, _runs(algorithm, length, causal=True), strict=True):
            pairs += [
                (run.traffic.hbm_bytes, times * unit.traffic.hbm_bytes),
                (run.operations.matmul_flops, times * unit.operations.matmul_flops),
                (run.peak_sram_bytes + run.peak_register_bytes, unit.peak_sram_bytes + unit.peak_register_bytes),
            ]
    return equality_evidence(
        pairs, f"{LENGTHS_RANGE}; forward and backward, causal", "bytes and FLOPs ∝ N, on-chip bytes the same"
    )


@claim(
    "lightning2-state-on-chip",
    statement="The state KV is kept and added up in SRAM; only the outputs O_i are written back to HBM.",
    source=f"{ADVANCED}; {LIGHTNING2}, Algorithm 1",
    expected=HOLDS,
)
def lightning2_state_on_chip() -> Evidence:
    """Count the bytes written: the output's, and none else."""
    pairs = []
    for length in LENGTHS:
        for head_dim in (64, 128):
            run = counted("lightning2", heads=16, q_len=length, head_dim=head_dim)
            pairs.append((run.traffic.hbm_write_bytes, 16 * length * head_dim * 2))
            pairs.append((run.traffic.hbm_read_bytes, 3 * 16 * length * head_dim * 2))
    return equality_evidence(
        pairs, f"{LENGTHS_RANGE}; forward", "bytes written = the output's, bytes read = those of q, k and v once"
    )


CLAIMS: tuple[Claim, ...] = (
    linear_order,
    linear_constant_bytes,
    lightning2_constant_bytes,
    lightning2_constant_speed,
    lightning2_state_on_chip,
)
"""Claims about attention without a softmax."""
