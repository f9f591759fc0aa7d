"""Sliding-window attention, with a rolling cache (Mistral 7B: Jiang et al. 2023, arXiv 2310.06825).

Every query sees a band of keys around its own position, and only tiles that the band touches are loaded: bytes and
FLOPs are O(N · W). A model that decodes keeps the last W keys and values, position p in slot p mod W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from simattn.algorithms import flash2, forms
from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.kernels import ForwardArrays
from simattn.algorithms.windows import (
    Mask,
    Values,
    WindowProblem,
    attend_packed,
    checked_sides,
    part_of,
)
from simattn.definition import Rounding, exact, one_softmax
from simattn.hardware import Hardware
from simattn.machine import Machine
from simattn.masks import Visibility
from simattn.plan import PlanKind, Tiles, candidates, check_choice
from simattn.problem import AttentionProblem, Direction, Window, checked_integer
from simattn.sums import ceil_div
from simattn.traffic import Traffic

# Config and validation


@dataclass(frozen=True, kw_only=True)
class SlidingWindowProblem(WindowProblem):
    """A problem of sliding-window attention, or a decoding step of it against a rolling cache.

    ``window`` is required, and limited on both sides: (W - 1, 0) is W keys, the own one included.

    Attributes
    ----------
    total_tokens
        In a decoding step, how many tokens the sequence has, the new one included; else None. The cache has W = left +
        1 slots, position p in slot p mod W, so ``kv_len`` is W; slots that no token has reached are not read.
    """

    total_tokens: int | None = None

    decode_cache: ClassVar[str | None] = "a rolling cache, position p in slot p mod W"

    def __post_init__(self) -> None:
        left, _ = checked_sides(self.window)
        if self.total_tokens is not None:
            object.__setattr__(self, "total_tokens", checked_integer("total_tokens", self.total_tokens, 1))
            if self.kv_len is None:
                object.__setattr__(self, "kv_len", left + 1)
        super().__post_init__()
        if self.total_tokens is not None:
            if self.q_len != 1:
                raise ValueError(
                    f"q_len={self.q_len} with total_tokens={self.total_tokens}: expected 1, the key of a later "
                    "token may lie in the slot of one that an earlier token of the step sees"
                )
            if self.kv_len != left + 1:
                raise ValueError(
                    f"kv_len={self.kv_len} with total_tokens={self.total_tokens}: expected the {left + 1} slots of a "
                    f"rolling cache for window={self.window}"
                )

    def check_direction(self, direction: Direction) -> None:
        """Raise a ValueError unless a decoding step, and nothing else, says how many tokens there are."""
        if (direction == "decode") != (self.total_tokens is not None):
            wanted = "the number of tokens so far, the new one included" if direction == "decode" else "None"
            raise ValueError(f"total_tokens={self.total_tokens} with direction={direction!r}: expected {wanted}")

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields with a limited window; of a decoding step with one query and the slots of a cache."""
        changed = super().adapted(given, direction)
        if direction == "decode":
            changed |= {"q_len": 1, "kv_len": changed["window"][0] + 1}
        return changed

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return of a decoding step numbers of tokens that fill the cache partly, just, and many times over."""
        if direction != "decode":
            return [{}]
        slots = problem.kv_len
        return [{"total_tokens": tokens} for tokens in (1, max(1, slots - 1), slots, slots + 2, 1 << 60)]

    @classmethod
    def usual_arguments(cls, direction: Direction, length: int, window: Window | None = None) -> dict[str, Any]:
        """Return those of any problem with a window, by default Mistral's; a decoding step has its slots as keys."""
        window = window or (4095, 0)
        usual = super().usual_arguments(direction, length, window)
        if direction == "decode" and window[0] is not None:
            usual |= {"kv_len": window[0] + 1, "total_tokens": length}
        return usual

    @property
    def filled_slots(self) -> int:
        """Keys of the cache that a token has reached."""
        return self.kv_len if self.total_tokens is None else min(self.kv_len, self.total_tokens)

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one row and one KV head with the same tiles on chip."""
        return super().of_one_row(window=(0, 0), total_tokens=None if self.total_tokens is None else 1, **own)

    @cached_property
    def keys_of_queries(self) -> Visibility:
        """Which keys each query row sees: of a rolling cache the slots that are filled."""
        if self.total_tokens is None:
            return super().keys_of_queries
        return Visibility(rows=1, columns=self.kv_len, shift=self.filled_slots - 1, before=None, after=0)

    def visible_elements(self) -> Mask:
        """Return the whole mask: an array of bool, shape (q_len, kv_len), True where the key is seen."""
        if self.total_tokens is None:
            return super().visible_elements()
        return np.arange(self.kv_len)[None, :] < self.filled_slots


@dataclass(frozen=True, kw_only=True)
class SlidingWindowPlan(flash2.Flash2Plan):
    """Plan of sliding-window attention: FlashAttention-2's.

    Attributes
    ----------
    packed_heads
        In a decoding step, query heads of a KV head that share a tile and every load of the cache; None is all of them,
        1 a thread block for each query head.
    """

    repeat_kv: Literal[False] = False
    packed_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("repeat_kv", self.repeat_kv, (False,))
        if self.packed_heads is not None:
            checked_integer("packed_heads", self.packed_heads, 1)


# Tiled program

forward = flash2.forward
backward = flash2.backward


def decode(machine: Machine, problem: SlidingWindowProblem, plan: SlidingWindowPlan) -> None:
    """FlashAttention-2's loop for one query against the filled slots, in the order of the slots."""
    arrays = ForwardArrays(
        q=machine.arrays["q"],
        k=part_of(machine.arrays["k"], slice(problem.filled_slots)),
        v=part_of(machine.arrays["v"], slice(problem.filled_slots)),
        out=machine.array("out", 1, problem.value_dim, dtype=problem.dtype, role="output"),
        lse=machine.array("lse", 1, 1, role="output"),
    )
    attend_packed(machine, filled_cache(problem), plan, arrays, plan.packed_heads or problem.group_size)


def filled_cache(problem: SlidingWindowProblem) -> AttentionProblem:
    """Return a decoding step as attention of one query to all filled slots."""
    return AttentionProblem(
        batch=problem.batch,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        q_len=1,
        kv_len=problem.filled_slots,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        dtype=problem.dtype,
        scale=problem.scale,
    )


# Reference


def reference(
    problem: SlidingWindowProblem, inputs: Mapping[str, Values], rounded: Rounding = exact
) -> dict[str, Values]:
    """Compute whole matrices of scores, of which a band is seen; arguments as for every algorithm's reference."""
    return one_softmax(problem, inputs, problem.visible_elements(), rounded)


# Closed form

closed_form_forward = flash2.closed_form_forward
closed_form_backward = flash2.closed_form_backward


def closed_form_decode(problem: SlidingWindowProblem, plan: SlidingWindowPlan) -> Traffic:
    """Q, O and LSE once, and the filled slots once for every tile of packed query heads."""
    packed = plan.packed_heads or problem.group_size
    tiles = problem.heads // packed * ceil_div(packed, plan.tiles.q)
    return Traffic(
        {
            "q": forms.read(forms.matrix_bytes(problem, 1, problem.head_dim)),
            "k": forms.read(forms.matrix_bytes(problem, problem.filled_slots, problem.head_dim, heads=tiles)),
            "v": forms.read(forms.matrix_bytes(problem, problem.filled_slots, problem.value_dim, heads=tiles)),
            "out": forms.written(forms.matrix_bytes(problem, 1, problem.value_dim)),
            "lse": forms.written(forms.statistic_bytes(problem, 1)),
        }
    )


# Plans

TENSOR_CORE_ROWS = 16
"""Rows of the smallest tile that tensor cores multiply."""


def paper_tiles(problem: AttentionProblem, sram_elements: int, direction: Direction) -> Tiles:
    """FlashAttention's formula; a decoding step has a row for each query head of a KV head."""
    tiles = flash2.paper_tiles(problem, sram_elements, direction)
    return replace(tiles, q=problem.group_size) if direction == "decode" else tiles


def fit_tiles(problem: AttentionProblem, size: int, direction: Direction) -> Tiles:
    """FlashAttention-2's tiles; a decoding step has a row for each query head, and grows in keys."""
    if direction == "decode":
        return Tiles(q=problem.group_size, kv=size)
    return flash2.fit_tiles(problem, size, direction)


def gpu_tiles(problem: AttentionProblem, hardware: Hardware, direction: Direction) -> list[Tiles]:
    """FlashAttention-2's tiles; of a decoding step as few rows as tensor cores take that hold a group's heads."""
    if direction == "decode":
        rows = TENSOR_CORE_ROWS * ceil_div(problem.group_size, TENSOR_CORE_ROWS)
        return candidates("forward", (rows, 128))
    return flash2.gpu_tiles(problem, hardware, direction)


def plan_defaults(
    problem: AttentionProblem, direction: Direction, kind: PlanKind, hardware: Hardware
) -> dict[str, Any]:
    """Return what FlashAttention-2 multiplies with; a decoding step is a forward pass."""
    return flash2.plan_defaults(problem, "forward" if direction == "decode" else direction, kind, hardware)


ALGORITHM = Algorithm(
    name="sliding_window",
    title="Sliding-window attention",
    source="Jiang et al. 2023, arXiv 2310.06825, Section 2; Beltagy et al. 2020, arXiv 2004.05150, Section 3.1",
    summary="FlashAttention-2's loops over the tiles of a band around the diagonal; decoding from a rolling cache.",
    family="windows",
    plan_class=SlidingWindowPlan,
    problem_class=SlidingWindowProblem,
    reference=reference,
    programs={"forward": forward, "backward": backward, "decode": decode},
    closed_forms={"forward": closed_form_forward, "backward": closed_form_backward, "decode": closed_form_decode},
    paper_tiles=paper_tiles,
    fit_tiles=fit_tiles,
    gpu_tiles=gpu_tiles,
    plan_defaults=plan_defaults,
)
