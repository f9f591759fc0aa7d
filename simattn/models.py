"""The attention of models: a shape of your own, and those of published ones."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from simattn.arithmetic.formats import storage_name
from simattn.kv_cache.shape import CacheShape
from simattn.problem import Window, checked_integer, checked_window


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The attention of a model.

    Attributes
    ----------
    name
        For print.
    layers
        Layers with attention.
    heads, kv_heads
        Query heads of a layer, and key/value heads; default as many.
    head_dim, value_dim
        Columns of queries and keys, and of values; default as many.
    dtype
        Storage format.
    window
        Keys seen left and right of a query's position, both ends included, in all layers; None for no limit.
    source
        Where the numbers are from.

    Raises
    ------
    ValueError, TypeError
        If a number is not an integer of at least 1, the heads do not divide, or the format is unknown.
    """

    name: str = "custom"
    layers: int = 1
    heads: int
    kv_heads: int | None = None
    head_dim: int = 128
    value_dim: int | None = None
    dtype: str = "bfloat16"
    window: Window | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name, default in (("kv_heads", self.heads), ("value_dim", self.head_dim)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("layers", "heads", "kv_heads", "head_dim", "value_dim"):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), 1))
        if self.heads % self._kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        object.__setattr__(self, "dtype", storage_name(self.dtype))
        object.__setattr__(self, "window", checked_window(self.window))

    @property
    def _kv_heads(self) -> int:
        assert self.kv_heads is not None
        return self.kv_heads

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self._kv_heads

    @property
    def cache(self) -> CacheShape:
        """What it caches of every token."""
        return CacheShape(
            layers=self.layers,
            kv_heads=self._kv_heads,
            key_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
        )

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments of a count that are sizes, and the format."""
        names = ("heads", "kv_heads", "head_dim", "value_dim", "dtype")
        return {name: getattr(self, name) for name in names}


MODELS = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            ModelShape(
                name="GPT-3-175B", layers=96, heads=96, dtype="float16",
                source="Brown et al. 2020, arXiv 2005.14165, Table 2.1",
            ),
            ModelShape(
                name="OPT-13B", layers=40, heads=40, dtype="float16",
                source="Zhang et al. 2022, arXiv 2205.01068, Table 1",
            ),
            ModelShape(
                name="LLaMA-13B", layers=40, heads=40, dtype="float16",
                source="Touvron et al. 2023, arXiv 2302.13971, Table 2",
            ),
            ModelShape(
                name="Llama-2-7B", layers=32, heads=32, source="Touvron et al. 2023, arXiv 2307.09288",
            ),
            ModelShape(
                name="Llama-2-70B", layers=80, heads=64, kv_heads=8, dtype="float16",
                source="Touvron et al. 2023, arXiv 2307.09288",
            ),
            ModelShape(
                name="Llama-3-8B", layers=32, heads=32, kv_heads=8,
                source="Dubey et al. 2024, arXiv 2407.21783, Table 3",
            ),
            ModelShape(
                name="Llama-3-70B", layers=80, heads=64, kv_heads=8,
                source="Dubey et al. 2024, arXiv 2407.21783, Table 3",
            ),
            ModelShape(
                name="Mistral-7B", layers=32, heads=32, kv_heads=8, window=(4095, 0),
                source="Jiang et al. 2023, arXiv 2310.06825, Table 1",
            ),
            ModelShape(
                name="DeepSeek-V3", layers=61, heads=128, head_dim=192, value_dim=128,
                source="DeepSeek-AI 2024, arXiv 2412.19437, Section 4.2; keys and values decompressed",
            ),
        )
    }
)  # fmt: skip
"""Shapes of published models, by name."""
