"""FlashAttention-2 (Dao 2023, arXiv 2307.08691): outer loop over queries forward, over keys backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from simattn.algorithms import forms
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.kernels import (
    BackwardArrays,
    ForwardArrays,
    GroupedGradient,
    KeySource,
    convert,
    declare_backward,
    declare_forward,
    descales,
    fill,
    key_blocks,
    row_dots,
)
from simattn.algorithms.steps import (
    SoftmaxState,
    finish_softmax,
    load_statistics,
    masked_scores,
    score_gradients,
    update_softmax,
)
from simattn.hardware import Hardware
from simattn.machine import Array, Machine
from simattn.masks import VisibleRows
from simattn.plan import Plan, PlanKind, Tiles, candidates, check_choice, check_flag
from simattn.problem import AttentionProblem, Direction, checked_integer
from simattn.sums import ceil_div
from simattn.traffic import Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class Flash2Plan(Plan):
    """Plan of FlashAttention-2.

    Attributes
    ----------
    units
        What multiplies matrices in the forward pass on a GPU, "cuda_cores" in float32 or "tensor_cores", of compute
        capability 8.0 and later, in the inputs' 16-bit format. It changes no count; the bits of a kernel are those of
        the arithmetic "simt" or "mma".
    dq
        How the backward pass sums dQ over key tiles: "reduce" (fp32 reduction into memory, then a conversion),
        "load_add_store" (the paper's Algorithm 2: key tiles in order, dQ read, added to and written back) or
        "deterministic" (a second kernel over query tiles, which recomputes the scores). The order in which "reduce"
        adds is ascending when simulated and any order on a GPU.
    stages
        Buffers of the tiles that the inner loop streams in.
    stage_probabilities
        Whether P, and dS in the backward pass, go through SRAM to their next product instead of registers.
    stage_results
        Whether O, and dQ in the backward pass, go through SRAM to memory.
    transpose_float8_values
        Whether eight-bit values are transposed in SRAM, as tensor cores that take them only so require.
    """

    units: Literal["cuda_cores", "tensor_cores"] = "cuda_cores"
    dq: Literal["reduce", "load_add_store", "deterministic"] = "reduce"
    stages: int = 1
    stage_probabilities: bool = False
    stage_results: bool = False
    transpose_float8_values: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("units", self.units, ("cuda_cores", "tensor_cores"))
        check_choice("dq", self.dq, ("reduce", "load_add_store", "deterministic"))
        checked_integer("stages", self.stages, 1)
        check_flag("stage_probabilities", self.stage_probabilities)
        check_flag("stage_results", self.stage_results)
        check_flag("transpose_float8_values", self.transpose_float8_values)


# Tiled program


def forward(machine: Machine, problem: AttentionProblem, plan: Flash2Plan) -> None:
    """Each thread block keeps one query tile and its output on chip and streams the keys and values past it."""
    attend(machine, problem, plan, declare_forward(machine, problem, plan))


def attend(
    machine: Machine,
    problem: AttentionProblem,
    plan: Flash2Plan,
    arrays: ForwardArrays,
    further: Sequence[KeySource] = (),
) -> None:
    """Attend from and to the given arrays, as :func:`forward` does, and to ``further`` keys in the same softmax."""
    tiles, place = plan.tiles, plan.accumulators
    width = max(tiles.kv, problem.head_dim, problem.value_dim)
    staged_as = problem.dtype if plan.stage_probabilities else None
    sources = (KeySource(arrays.k, arrays.v, problem.keys_of_queries), *further)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q, width=width):
        # load
        q = machine.load(arrays.q, query_rows)
        score_descales = descales(machine, "q", "k")
        state = SoftmaxState.empty(machine, query_rows, problem.value_dim, place)
        for source in sources:
            for key_rows in machine.tiles(VisibleRows(source.seen, query_rows), tiles.kv):
                # load
                k = machine.load(source.k, key_rows, stages=plan.stages)
                v = machine.load(source.v, key_rows, stages=plan.stages)
                # compute
                scores, hidden = masked_scores(
                    machine, q, k, query_rows, key_rows, place=place, descales=score_descales, seen=source.seen
                )
                if plan.transpose_float8_values and problem.is_float8:
                    machine.transpose_in_place(v)
                update_softmax(machine, state, scores, v, hidden, staged_as=staged_as)
        # finish
        value_descale = descales(machine, "v")
        finish_softmax(machine, state, arrays, query_rows, descales=value_descale, staged=plan.stage_results)


def backward(machine: Machine, problem: AttentionProblem, plan: Flash2Plan) -> None:
    """Each thread block keeps one key tile and its gradients on chip and streams the queries past it."""
    arrays = declare_backward(machine, problem, plan)
    delta = machine.array("delta", problem.q_len, 1)
    row_dots(machine, machine.arrays["out"], arrays.dout, delta, plan)
    dq_sums = None
    if plan.dq != "deterministic":
        dq_sums = machine.array("dq_accumulator", problem.q_len, problem.head_dim)
        fill(machine, dq_sums, 0.0, plan)
    key_gradients(machine, problem, plan, arrays, delta, dq_sums)
    if dq_sums is None:
        query_gradients(machine, problem, plan, arrays, delta)
    else:
        convert(machine, dq_sums, arrays.dq, plan)


def key_gradients(
    machine: Machine,
    problem: AttentionProblem,
    plan: Flash2Plan,
    arrays: BackwardArrays,
    delta: Array,
    dq_sums: Array | None,
) -> None:
    """Compute dK and dV, and with ``dq_sums`` also add up dQ, by key tiles."""
    dk_total = GroupedGradient.declare(machine, arrays.dk, plan)
    dv_total = GroupedGradient.declare(machine, arrays.dv, plan)
    hand_in_gradients(machine, problem, plan, arrays, delta, dq_sums, dk_total, dv_total)
    dk_total.finish(machine, plan)
    dv_total.finish(machine, plan)


def hand_in_gradients(
    machine: Machine,
    problem: AttentionProblem,
    plan: Flash2Plan,
    arrays: BackwardArrays,
    delta: Array,
    dq_sums: Array | None,
    dk_total: GroupedGradient,
    dv_total: GroupedGradient,
) -> None:
    """Hand dK and dV of every key tile in to sums that the caller finishes, and with ``dq_sums`` add up dQ."""
    tiles, place = plan.tiles, plan.accumulators
    sequential = plan.dq == "load_add_store"
    for key_rows in key_blocks(machine, problem, plan, dk_total.per, sequential=sequential):
        # load
        k = machine.load(arrays.k, key_rows)
        v = machine.load(arrays.v, key_rows)
        dk = machine.full("dk", key_rows, problem.head_dim, 0.0, place=place)
        dv = machine.full("dv", key_rows, problem.value_dim, 0.0, place=place)
        for _ in machine.group_heads():
            for query_rows in machine.tiles(problem.visible_queries(key_rows), tiles.q):
                # load
                q = machine.load(arrays.q, query_rows, stages=plan.stages)
                dout = machine.load(arrays.dout, query_rows, stages=plan.stages)
                statistics = load_statistics(machine, delta, query_rows)
                # compute
                probabilities, dscores, hidden = score_gradients(
                    machine, q, k, v, dout, statistics, query_rows, key_rows, place=place
                )
                machine.matmul(probabilities, dout, place=place, transpose_a=True, hidden=hidden, into=dv)
                machine.free(probabilities)
                machine.matmul(dscores, q, place=place, transpose_a=True, hidden=hidden, into=dk)
                if dq_sums is not None:
                    if plan.stage_probabilities:
                        dscores = machine.stage(dscores, "dscores", dtype=problem.dtype)
                    dq = machine.matmul(dscores, k, place=place, name="dq", hidden=hidden)
                    machine.scale(dq, problem.scale)
                    if plan.stage_results:
                        dq = machine.stage(dq, "dq", dtype=dq_sums.dtype)
                    if sequential:
                        machine.add(dq, machine.load(dq_sums, query_rows, place="registers"))
                        machine.store(dq, dq_sums, query_rows)
                    else:
                        machine.reduce(dq, dq_sums, query_rows)
        # finish
        machine.scale(dk, problem.scale)
        dk_total.add(machine, dk, key_rows)
        dv_total.add(machine, dv, key_rows)


def query_gradients(
    machine: Machine, problem: AttentionProblem, plan: Flash2Plan, arrays: BackwardArrays, delta: Array
) -> None:
    """Compute dQ by query tiles, the scores computed again, so that no block adds to another's sum."""
    tiles, place = plan.tiles, plan.accumulators
    width = max(tiles.kv, problem.head_dim, problem.value_dim)
    for query_rows in machine.thread_blocks(problem.q_len, tiles.q, width=width):
        # load
        q = machine.load(arrays.q, query_rows)
        dout = machine.load(arrays.dout, query_rows)
        statistics = load_statistics(machine, delta, query_rows)
        dq = machine.full("dq", query_rows, problem.head_dim, 0.0, place=place)
        for key_rows in machine.tiles(problem.visible_keys(query_rows), tiles.kv):
            # load
            k = machine.load(arrays.k, key_rows, stages=plan.stages)
            v = machine.load(arrays.v, key_rows, stages=plan.stages)
            # compute
            _, dscores, hidden = score_gradients(machine, q, k, v, dout, statistics, query_rows, key_rows, place=place)
            machine.matmul(dscores, k, place=place, hidden=hidden, into=dq)
        # finish
        machine.scale(dq, problem.scale)
        machine.store(dq, arrays.dq, query_rows)


# Closed form


def closed_form_forward(problem: AttentionProblem, plan: Plan) -> Traffic:
    """Q once, O and LSE once, K and V once for every query tile that sees them."""
    visits = forms.tile_visits(problem, plan.tiles)
    k, v = forms.key_names(plan)
    main = {
        "q": forms.read(forms.matrix_bytes(problem, problem.q_len, problem.head_dim)),
        k: forms.read(forms.matrix_bytes(problem, visits.keys, problem.head_dim)),
        v: forms.read(forms.matrix_bytes(problem, visits.keys, problem.value_dim)),
        "out": forms.written(forms.matrix_bytes(problem, problem.q_len, problem.value_dim, dtype=problem.output_dtype)),
        "lse": forms.written(forms.statistic_bytes(problem, problem.q_len)),
    }
    factors = forms.descale_traffic(problem, dict.fromkeys(("q", "k", "v"), visits.query_tiles))
    return forms.total([main, factors, *forms.repeat_traffic(problem, plan)])


def closed_form_backward(problem: AttentionProblem, plan: Flash2Plan) -> Traffic:
    """K, V, dK, dV once, Q, dO and their statistics once for every key tile they see, and dQ as the plan sums it."""
    visits = forms.tile_visits(problem, plan.tiles)
    d, value_dim, heads = problem.head_dim, problem.value_dim, forms.key_value_heads(problem, plan)
    k, v = forms.key_names(plan)
    statistics = forms.statistic_bytes(problem, visits.queries)
    parts = [
        {  # delta = rowsum(dO ∘ O)
            "out": forms.read(forms.matrix_bytes(problem, problem.q_len, value_dim, dtype=problem.output_dtype)),
            "dout": forms.read(forms.matrix_bytes(problem, problem.q_len, value_dim)),
            "delta": forms.written(forms.statistic_bytes(problem, problem.q_len)),
        },
        {
            "q": forms.read(forms.matrix_bytes(problem, visits.queries, d)),
            "dout": forms.read(forms.matrix_bytes(problem, visits.queries, value_dim)),
            "lse": forms.read(statistics),
            "delta": forms.read(statistics),
            k: forms.read(forms.matrix_bytes(problem, problem.kv_len, d, heads=heads)),
            v: forms.read(forms.matrix_bytes(problem, problem.kv_len, value_dim, heads=heads)),
        },
        {"dq": forms.written(forms.matrix_bytes(problem, problem.q_len, d))},
        *forms.grouped_gradient_traffic(problem, plan),
    ]
    if plan.dq == "deterministic":
        once = forms.statistic_bytes(problem, problem.q_len)
        parts.append(
            {
                "q": forms.read(forms.matrix_bytes(problem, problem.q_len, d)),
                "dout": forms.read(forms.matrix_bytes(problem, problem.q_len, value_dim)),
                "lse": forms.read(once),
                "delta": forms.read(once),
                k: forms.read(forms.matrix_bytes(problem, visits.keys, d)),
                v: forms.read(forms.matrix_bytes(problem, visits.keys, value_dim)),
            }
        )
    else:
        whole = forms.matrix_bytes(problem, problem.q_len, d, dtype="float32")
        added = forms.matrix_bytes(problem, visits.queries, d, dtype="float32")
        sums = forms.reduced(added) if plan.dq == "reduce" else forms.read(added) + forms.written(added)
        parts.append({"dq_accumulator": forms.written(whole) + sums + forms.read(whole)})
    return forms.total(parts)


# Plans


def paper_tiles(problem: AttentionProblem, sram_elements: int, direction: Direction) -> Tiles:
    """FlashAttention's formula: B_c = ⌈M/4d⌉, B_r = min(B_c, d)."""
    columns = ceil_div(sram_elements, 4 * problem.head_dim)
    return Tiles(q=min(columns, problem.head_dim), kv=columns)


def fit_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """Tiles that grow along the outer loop's axis, on which the traffic depends, and along the other up to d.

    The tile of scores then takes no more room than those of the operands; square ones would lose the 1/M of the
    traffic for M ≫ d².
    """
    inner = min(size, max(problem.head_dim, problem.value_dim))
    return Tiles(q=size, kv=inner) if direction == "forward" else Tiles(q=inner, kv=size)


TENSOR_CORE_DTYPES = ("float16", "bfloat16")
FIRST_TENSOR_CORES = (8, 0)
"""Compute capability from which the kernel on tensor cores runs."""


def plan_defaults(
    problem: AttentionProblem, direction: Direction, kind: PlanKind, hardware: Hardware
) -> dict[str, Any]:
    """Return what a GPU's forward pass multiplies with: its tensor cores, if they take the format."""
    if kind == "gpu" and direction == "forward" and has_tensor_cores(problem, hardware):
        return {"units": "tensor_cores"}
    return {}


def has_tensor_cores(problem: AttentionProblem, hardware: Hardware) -> bool:
    """Say whether a GPU has tensor cores that the kernel's forward pass runs on."""
    return problem.dtype in TENSOR_CORE_DTYPES and hardware.compute_capability >= FIRST_TENSOR_CORES


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """Return the tiles that FlashAttention-2's kernels use by head dimension, then smaller ones.

    Those of the forward pass are the fastest on the tensor cores of an H100 too.
    """
    columns = max(problem.head_dim, problem.value_dim)
    if direction == "forward":
        return candidates("forward", (128, 128) if columns <= 64 else (128, 64))
    return candidates("backward", (128, 128) if columns <= 64 else (64, 128))


ALGORITHM = Algorithm(
    name="flash2",
    title="FlashAttention-2",
    source="Dao 2023, arXiv 2307.08691, Algorithms 1 and 2",
    summary="Each thread block keeps a query tile and its output on chip and streams the keys and values past it.",
    plan_class=Flash2Plan,
    programs={"forward": forward, "backward": backward},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward},
    paper_tiles=paper_tiles,
    fit_tiles=fit_tiles,
    gpu_tiles=gpu_tiles,
    plan_defaults=plan_defaults,
    exact_arithmetics={"forward": ("simt", "mma"), "backward": ("simt",)},
)
