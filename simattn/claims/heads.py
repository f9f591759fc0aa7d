"""Claims about grouped heads: parameters, and bytes of keys and values."""

from __future__ import annotations

from simattn.bounds import compulsory_traffic
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, Claim, Evidence, claim
from simattn.claims.rules import counted, equality_evidence
from simattn.claims.sources import IN_LLMS, MULTI_HEAD, OVERVIEW
from simattn.layers import AttentionLayer
from simattn.problem import AttentionProblem
from simattn.roofline import arithmetic_intensity, ridge_point

BOTH = f"{OVERVIEW}; {MULTI_HEAD}"
SHAPES = [(heads, dim, width) for heads in (8, 32, 64) for dim in (64, 128) for width in (1024, 4096)]
SHAPES_RANGE = "h = 8, 32, 64; d_k = 64, 128; d_model = 1024, 4096"


def _layer(heads: int, kv_heads: int, head_dim: int, width: int) -> AttentionLayer:
    return AttentionLayer(model_width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def key_value_elements(problem: AttentionProblem) -> int:
    """Return the elements of the keys and values, each once: what a cache of one layer holds."""
    arrays = compulsory_traffic(problem, "forward").by_array
    return (arrays["k"].hbm_read_bytes + arrays["v"].hbm_read_bytes) // problem.item_bytes


def _decoding(kv_heads: int, heads: int = 32, batch: int = 4, length: int = 2048) -> AttentionProblem:
    return AttentionProblem(
        batch=batch, heads=heads, kv_heads=kv_heads, q_len=1, kv_len=length, head_dim=128, dtype="float16"
    )


@claim(
    "mha-parameters",
    statement="Multi-head attention has 3·h·d_k·d_model parameters in W^Q, W^K and W^V and h·d_k·d_model in W^O, "
    "together 4·h·d_k·d_model: 4·d_model², whatever h, if d_k = d_model/h.",
    source=BOTH,
    expected=HOLDS,
)
def mha_parameters() -> Evidence:
    """Add up the shapes of the four projections: linear in h only at a fixed d_k."""
    pairs = []
    for h, dim, width in SHAPES:
        layer, square = _layer(h, h, dim, width), AttentionLayer(model_width=width, heads=h)
        pairs += [
            (layer.parameters_without_output, 3 * h * dim * width),
            (layer.parameters - layer.parameters_without_output, h * dim * width),
            (layer.parameters, 4 * h * dim * width),
            (square.parameters, 4 * width**2),
        ]
    return equality_evidence(pairs, SHAPES_RANGE, "parameters of the projections")


def _grouped_parameters(name: str, title: str, stated: str, right: str, multi_query: bool) -> Claim:
    @claim(
        f"{name}-parameters",
        statement=f"{title} attention has {stated} parameters, where multi-head attention has 4·h·d_k·d_model.",
        source=BOTH,
        expected=DOES_NOT_HOLD,
    )
    def made() -> Evidence:
        pairs, shifts, without_output = [], set(), []
        for h, dim, width in SHAPES:
            groups = 1 if multi_query else h // 4
            layer = _layer(h, groups, dim, width)
            formula = (h + 2 * groups) * dim * width
            pairs.append((layer.parameters, formula))
            without_output.append(layer.parameters_without_output == formula)
            shifts.add((layer.parameters - formula) / (h * dim * width))
        evidence = equality_evidence(pairs, SHAPES_RANGE, "parameters of the four projections = the stated ones")
        return Evidence(
            range_tested=evidence.range_tested,
            counted=f"{evidence.counted}; {', '.join(f'{shift:g}' for shift in shifts)} h·d_k·d_model, the output "
            f"projection, is missing: {right}. Without it the stated ones are right in {sum(without_output)} cases",
            verdict=evidence.verdict,
            numbers={**evidence.numbers, "equal_without_output": sum(without_output)},
        )

    return made


@claim(
    "kv-cache-width",
    statement="The KV cache takes 2·b·d_model·L elements.",
    source=BOTH,
    expected=HOLDS,
)
def kv_cache_width() -> Evidence:
    """Count one layer; a model has n_layers of them."""
    pairs = [
        (
            key_value_elements(
                AttentionProblem(batch=b, heads=h, q_len=1, kv_len=length, head_dim=dim, dtype="float16")
            ),
            2 * b * (h * dim) * length,
        )
        for b in (1, 8)
        for length in (512, 4096)
        for h, dim, _ in SHAPES
    ]
    return equality_evidence(
        pairs,
        f"b = 1, 8; L = 512, 4096; {SHAPES_RANGE}",
        "elements of K and V in one layer (times n_layers in a model)",
    )


@claim(
    "kv-cache-bytes",
    statement="The KV cache takes batch · length · n_kv_heads · head_dim · sizeof(half) · 2 bytes: with grouped "
    "queries 1/group of multi-head's.",
    source=IN_LLMS,
    expected=HOLDS,
)
def kv_cache_bytes() -> Evidence:
    """Count one layer, and its ratio to multi-head."""
    pairs: list[tuple[int, int]] = []
    whole = key_value_elements(_decoding(32))
    for groups in (1, 2, 8, 32):
        problem = _decoding(groups)
        found = key_value_elements(problem) * problem.item_bytes
        pairs += [(found, 4 * 2048 * groups * 128 * 2 * 2), (found * problem.group_size, whole * problem.item_bytes)]
    return equality_evidence(
        pairs,
        "batch 4, length 2048, 32 heads, 1…32 KV heads, head_dim 128; float16",
        "bytes of K and V in one layer (times n_layers in a model), and times the group size",
    )


@claim(
    "decode-memory",
    statement="In decoding, multi-query attention takes 1/h and grouped-query g/h of the memory of multi-head.",
    source=BOTH,
    expected=HOLDS,
)
def decode_memory() -> Evidence:
    """Count keys and values only: queries, outputs and weights are not shared."""
    whole = key_value_elements(_decoding(32))
    pairs = [(key_value_elements(_decoding(groups)) * 32, whole * groups) for groups in (1, 2, 4, 8, 16, 32)]
    return equality_evidence(
        pairs, "h = 32, g = 1…32 KV heads; batch 4, length 2048, head_dim 128", "K and V · h = multi-head's · g"
    )


@claim(
    "mqa-matrices",
    statement="Multi-query attention stores 2 instead of 2h key and value vectors per token.",
    source=IN_LLMS,
    expected=HOLDS,
)
def mqa_matrices() -> Evidence:
    """Divide the elements of K and V by tokens and head_dim."""
    pairs = []
    for heads in (1, 8, 32):
        for kv_heads in (1, heads):
            problem = _decoding(kv_heads, heads)
            per_token = key_value_elements(problem) // (problem.batch * problem.kv_len * problem.head_dim)
            pairs.append((per_token, 2 * kv_heads))
    return equality_evidence(pairs, "h = 1, 8, 32; 1 and h KV heads", "vectors per token = 2 · KV heads")


@claim(
    "mqa-flops",
    statement="Multi-query attention also lowers the computational complexity.",
    source=IN_LLMS,
    expected=DOES_NOT_HOLD,
)
def mqa_flops() -> Evidence:
    """Count: every query head still meets every key, only the projections of K and V shrink."""
    ratios = {
        name: [
            counted(name, heads=32, kv_heads=groups, q_len=n, head_dim=128).operations.matmul_flops
            / counted(name, heads=32, kv_heads=32, q_len=n, head_dim=128).operations.matmul_flops
            for n in (1024, 1 << 16)
            for groups in (1, 8)
        ]
        for name in ("standard", "flash2")
    }
    projections = [_layer(32, groups, 128, 4096).flops("prefill", length=1024).projections for groups in (1, 32)]
    saved = 1 - projections[0] / projections[1]
    lower = any(ratio < 1 for found in ratios.values() for ratio in found)
    return Evidence(
        range_tested="standard, flash2; 32 heads, 1 and 8 KV heads; N = 1024, 65 536; d = 128; plan gpu",
        counted="FLOPs of scores and values: "
        f"{max(ratio for found in ratios.values() for ratio in found):g} of multi-head's; only projections shrink, by "
        f"{saved:.0%} of the layer's at 32 heads",
        verdict=HOLDS if lower else DOES_NOT_HOLD,
        numbers={"flops_ratio": ratios, "projection_share_saved": saved},
    )


@claim(
    "gqa-traffic",
    statement="As the KV cache shrinks to 1/group, so do the bytes of it that attention reads.",
    source=f"{IN_LLMS}, by implication",
    expected=DOES_NOT_HOLD,
)
def gqa_traffic() -> Evidence:
    """Count reads: compulsory ones shrink, but a thread block per query head reads the shared keys again for each."""
    key_bytes = {}
    for groups in (32, 8, 1):
        arrays = counted("flash2", heads=32, kv_heads=groups, q_len=1, kv_len=8192, head_dim=128).traffic.by_array
        key_bytes[groups] = arrays["k"].hbm_read_bytes + arrays["v"].hbm_read_bytes
    compulsory = {groups: 2 * 2 * groups * 8192 * 128 for groups in key_bytes}
    cut = all(key_bytes[groups] * 32 == key_bytes[32] * groups for groups in key_bytes)
    return Evidence(
        range_tested="flash2, a thread block per query head; 32 heads, 32, 8, 1 KV heads; 1 query, 8192 keys, d = 128; "
        "bfloat16, plan gpu",
        counted="bytes of K and V between memory and multiprocessors: "
        + ", ".join(f"{value / key_bytes[32]:g}" for value in key_bytes.values())
        + " of multi-head's; compulsory: "
        + ", ".join(f"{value / compulsory[32]:g}" for value in compulsory.values())
        + ". The saving is what a cache below serves, unless a block packs the group's heads",
        verdict=HOLDS if cut else DOES_NOT_HOLD,
        numbers={"read_bytes": key_bytes, "compulsory_bytes": compulsory},
    )


@claim(
    "decode-memory-bound",
    statement="Attention in inference is limited by memory accesses, so that a smaller KV cache pays.",
    source=IN_LLMS,
    expected=HOLDS,
)
def decode_memory_bound() -> Evidence:
    """Count a layer's decoding step, and hold its FLOPs per byte against the GPU's: weights and cache are the bytes."""
    pairs, shares, intensities = [], [], {}
    dtype, gpu = "bfloat16", "H100-SXM"
    for groups in (32, 8, 1):
        layer = _layer(32, groups, 128, 4096)
        for batch in (1, 16, 128):
            for length in (2048, 32_768):
                run = layer.profile(
                    "decode", batch=batch, cache_length=length - 1, algorithm="flash3", packed_heads=32 // groups
                )
                read = {name: counters.hbm_read_bytes for name, counters in run.traffic.by_array.items()}
                counted_bytes = sum(read[name] for name in (*layer.weight_shapes, "k", "v"))
                formula = 2 * ((2 * 32 + 2 * groups) * 128 * 4096 + batch * length * groups * 2 * 128)
                pairs.append((counted_bytes, formula))
                shares.append(formula / run.traffic.hbm_bytes)
                intensities[f"g = {groups}, b = {batch}, L = {length}"] = arithmetic_intensity(
                    run.operations.matmul_flops, run.traffic.hbm_bytes
                )
    evidence = equality_evidence(
        pairs,
        "a layer of d_model = 4096, 32 heads of 128 on g = 32, 8, 1 KV heads; one token for each of b = 1, 16, 128 "
        f"sequences of L = 2048, 32 768; {dtype}; flash3, the heads of a group packed; {gpu}",
        "bytes of weights and cache per step = 2·((2h + 2g)·d_k·d_model + b·L·2g·d_k)",
    )
    highest, ridge = max(intensities.values()), ridge_point(gpu, dtype)
    return Evidence(
        range_tested=evidence.range_tested,
        counted=f"{evidence.counted}, at least {min(shares):.1%} of all bytes; at most {highest:.3g} FLOP per byte, "
        f"where the GPU's peaks have {ridge:.3g}",
        verdict=HOLDS if evidence.verdict == HOLDS and highest < ridge else DOES_NOT_HOLD,
        numbers={
            **evidence.numbers,
            "least_share_of_bytes": min(shares),
            "flops_per_byte": intensities,
            "ridge_flops_per_byte": ridge,
        },
    )


@claim(
    "repeat-kv",
    statement="repeat_kv copies the keys and values num_key_value_groups times.",
    source=IN_LLMS,
    expected=HOLDS,
)
def repeat_kv() -> Evidence:
    """Count the copies, written group times and read once before: traffic that grouped kernels do not have."""
    pairs, extra = [], 0.0
    for groups in (1, 4, 8):
        for n in (1024, 1 << 20):
            runs = [
                counted("flash2", heads=32, kv_heads=groups, q_len=n, head_dim=128, repeat_kv=repeated)
                for repeated in (True, False)
            ]
            arrays = runs[0].traffic.by_array
            for name in ("k", "v"):
                written, read = arrays[f"{name}_repeated"].hbm_write_bytes, arrays[name].hbm_read_bytes
                pairs.append((written, read * (32 // groups)))
            extra = max(extra, runs[0].traffic.hbm_bytes / runs[1].traffic.hbm_bytes - 1)
    evidence = equality_evidence(
        pairs,
        "flash2; 32 heads, 1, 4, 8 KV heads; N = 1024, 2²⁰; d = 128; plan gpu",
        "bytes written = group · bytes of K and V",
    )
    return Evidence(
        range_tested=evidence.range_tested,
        counted=f"{evidence.counted}; up to {extra:.0%} more traffic than without",
        verdict=evidence.verdict,
        numbers={**evidence.numbers, "extra_traffic_share": extra},
    )


CLAIMS: tuple[Claim, ...] = (
    mha_parameters,
    _grouped_parameters("mqa", "Multi-query", "(h + 2)·d_k·d_model", "(2h + 2)·d_k·d_model", True),
    _grouped_parameters("gqa", "Grouped-query", "(h + 2g)·d_k·d_model", "(2h + 2g)·d_k·d_model", False),
    kv_cache_width,
    kv_cache_bytes,
    decode_memory,
    mqa_matrices,
    mqa_flops,
    gqa_traffic,
    decode_memory_bound,
    repeat_kv,
)
"""Claims about grouped heads."""
