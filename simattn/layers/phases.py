"""The phases of a layer, and the lengths that each has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from simattn.plan import check_choice
from simattn.problem import Direction, checked_integer

if TYPE_CHECKING:
    from simattn.layers.layer import AttentionLayer

Phase = Literal["prefill", "decode", "backward", "train"]
PHASES: tuple[Phase, ...] = get_args(Phase)

PASSES: dict[Phase, tuple[Direction, ...]] = {
    "prefill": ("forward",),
    "decode": ("forward",),
    "backward": ("backward",),
    "train": ("forward", "backward"),
}
"""The passes through the layer of each phase."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The rows that a layer works on.

    Attributes
    ----------
    batch
        Sequences.
    queries, keys
        Rows of the queries, and of the keys and values that they attend to, in each sequence.
    projected
        Rows of the keys and values that are projected, not found in a cache.
    """

    batch: int
    queries: int
    keys: int
    projected: int

    @classmethod
    def checked(
        cls,
        layer: AttentionLayer,
        phase: Phase,
        length: int | None,
        batch: int,
        cache_length: int | None,
        context_length: int | None,
    ) -> Lengths:
        """Return the rows that the arguments of :meth:`simattn.AttentionLayer.profile` mean."""
        check_choice("phase", phase, PHASES)
        batch = checked_integer("batch", batch, 0)
        if length is None and phase != "decode":
            raise ValueError(f"length=None with phase={phase!r}: expected the rows of x")
        length = checked_integer("length", 1 if length is None else length, 0)
        caches = phase == "decode" and not layer.is_cross_attention
        if caches and cache_length is None:
            raise ValueError("cache_length=None with phase='decode': expected the rows of the cache before the step")
        if cache_length is not None and not caches:
            raise ValueError(
                f"cache_length={cache_length!r} with phase={phase!r} of "
                f"{'cross' if layer.is_cross_attention else 'self'}-attention: expected None"
            )
        if layer.is_cross_attention != (context_length is not None):
            expected = "the rows of the context" if layer.is_cross_attention else "None"
            raise ValueError(
                f"context_length={context_length!r} with context_width={layer.context_width!r}: expected {expected}"
            )
        if phase == "decode" and layer.is_cross_attention and (layer.causal or layer.window):
            raise ValueError(
                f"phase='decode' of cross-attention with causal={layer.causal}, window={layer.window}: expected no "
                "mask, as a step does not know where in the context it stands"
            )
        if context_length is not None:
            keys = checked_integer("context_length", context_length, 0)
            projected = 0 if phase == "decode" else keys
        else:
            keys, projected = length + checked_integer("cache_length", cache_length or 0, 0), length
        return cls(batch=batch, queries=length, keys=keys, projected=projected)
