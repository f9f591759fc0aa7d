"""Lightning Attention-2 (Qin et al. 2024, arXiv 2401.04658): linear attention whose weights decay with distance.

o_t = Σ_{s ≤ t} λ^(t − s) (q_t · k_s) v_s, without softmax, scale or denominator. The program is that of causal linear
attention: within a tile the left product (Q Kᵀ ∘ M) V, between tiles the right product Q (Kᵀ V), and two sweeps
backward (Algorithm 2, which loads O without need). Each query head has its decay λ = e^(−slope).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from simattn.algorithms import linear
from simattn.algorithms.algorithm import Algorithm
from simattn.problem import AttentionProblem, Direction, checked_integer

# Config and validation


def alibi_slopes(heads: int) -> list[float]:
    """Return ALiBi's slopes 2^(−8 h / H), h = 1 … H (Press et al. 2022, arXiv 2108.12409).

    Where H is no power of two: those of the next smaller one, then every other one of the next larger.
    """
    smaller = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * head / smaller) for head in range(1, smaller + 1)]
    if smaller < heads:
        larger = [2.0 ** (-8 * head / (2 * smaller)) for head in range(1, 2 * smaller + 1)]
        slopes += larger[::2][: heads - smaller]
    return slopes


def lightning_slopes(heads: int, layer: int, layers: int) -> list[float]:
    """Return ALiBi's slopes, less in later layers: times 1 − l / (L − 1) + 1e−5, as the paper's models have them."""
    share = 1 - layer / max(1, layers - 1) + 1e-5
    return [slope * share for slope in alibi_slopes(heads)]


def fla_slopes(heads: int, layer: int, layers: int) -> list[float]:
    """Return 8 h / H · (1 − l / L), h = 0 … H − 1, as the fla library has them: the first head never decays."""
    return [8 * head / heads * (1 - layer / layers) for head in range(heads)]


CONVENTIONS: dict[str, Callable[[int, int, int], list[float]]] = {
    "alibi": lambda heads, layer, layers: alibi_slopes(heads),
    "lightning": lightning_slopes,
    "fla": fla_slopes,
}
"""Slopes by name: of H heads in layer l of L."""


@dataclass(frozen=True, kw_only=True)
class Lightning2Problem(linear.RecurrentProblem):
    """A problem of Lightning Attention-2, which is always causal: there is no other, so ``causal`` is not looked at.

    Attributes
    ----------
    slopes
        "alibi", "lightning" (ALiBi's, less in later layers), "fla", or a slope of at least 0 for each query head.
    layer, layers
        Which layer of how many, counted from 0, for slopes that depend on it.
    """

    slopes: str | Sequence[float] = "alibi"
    layer: int = 0
    layers: int = 1

    is_causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.causal, (bool, np.bool_)):
            raise TypeError(f"causal={self.causal!r}: expected a bool; lightning2 is causal whatever it is")
        object.__setattr__(self, "causal", True)
        super().__post_init__()
        object.__setattr__(self, "layers", checked_integer("layers", self.layers, 1))
        object.__setattr__(self, "layer", checked_integer("layer", self.layer, 0))
        if self.layer >= self.layers:
            raise ValueError(f"layer={self.layer}: expected less than layers={self.layers}")
        if isinstance(self.slopes, str):
            if self.slopes not in CONVENTIONS:
                raise ValueError(
                    f"slopes={self.slopes!r}: expected one of {tuple(CONVENTIONS)} or a slope for each head"
                )
            return
        given = np.asarray(self.slopes) if isinstance(self.slopes, (list, tuple, np.ndarray)) else None
        if given is None or given.dtype.kind not in "fiu" or given.ndim != 1:
            raise TypeError(f"slopes={self.slopes!r}: expected one of {tuple(CONVENTIONS)} or a number for each head")
        slopes = tuple(map(float, given))
        if len(slopes) != self.heads:
            raise ValueError(f"slopes has {len(slopes)} numbers: expected {self.heads}, one for each query head")
        if not all(math.isfinite(slope) and slope >= 0 for slope in slopes):
            raise ValueError(f"slopes={slopes!r}: expected finite numbers of at least 0")
        object.__setattr__(self, "slopes", slopes)

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return every convention, and slopes of heads that never decay and that forget at once."""
        heads = problem.heads
        named = [{"slopes": name, "layer": layer, "layers": 3} for name in CONVENTIONS for layer in (0, 2)]
        return [*named, {"slopes": [0.0] * heads}, {"slopes": [0.3 * (1 + head % 9) for head in range(heads)]}]

    @cached_property
    def decays(self) -> npt.NDArray[np.float64]:
        """What a step back costs: e^(−slope), of each query head."""
        slopes = self.slopes
        if isinstance(slopes, str):
            slopes = CONVENTIONS[slopes](self.heads, self.layer, self.layers)
        return np.exp(-np.asarray(slopes, dtype=np.float64))

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one row and one KV head with the same tiles on chip."""
        return super().of_one_row(slopes="alibi", **own)


@dataclass(frozen=True, kw_only=True)
class Lightning2Plan(linear.LinearPlan):
    """Plan of Lightning Attention-2: a tile has ``tiles.q`` queries and their keys, the paper's B."""


# Tiled program, closed form and plans are those of linear attention under a causal mask.

ALGORITHM = Algorithm(
    name="lightning2",
    title="Lightning Attention-2",
    source="Qin et al. 2024, arXiv 2401.04658, Algorithms 1 and 2",
    summary="Linear attention with weights that decay with distance; masked products within tiles, a state between.",
    family="state",
    plan_class=Lightning2Plan,
    problem_class=Lightning2Problem,
    reference=linear.reference,
    programs={"forward": linear.forward, "backward": linear.backward, "decode": linear.decode},
    closed_forms={
        "forward": linear.closed_form_forward,
        "backward": linear.closed_form_backward,
        "decode": linear.closed_form_decode,
    },
    paper_tiles=linear.paper_tiles,
    fit_tiles=linear.fit_tiles,
    gpu_tiles=linear.gpu_tiles,
    declare_saved=linear.declare_saved,
)
