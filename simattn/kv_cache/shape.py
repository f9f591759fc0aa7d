"""How many bytes the keys and values of a model take."""

from __future__ import annotations

from dataclasses import dataclass

from simattn.arithmetic.formats import ITEM_BYTES, storage_name
from simattn.kv_cache.checks import checked_count


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a model caches of every token: a key and a value for each KV head of each layer.

    Attributes
    ----------
    layers
        Layers with attention.
    kv_heads
        Key/value heads of a layer: the query heads with multi-head attention, fewer with grouped queries, 1 with
        multi-query attention.
    key_dim
        Columns of a key.
    value_dim
        Columns of a value; default ``key_dim``.
    dtype
        Storage format: float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, or a NumPy type of that name.

    Raises
    ------
    ValueError, TypeError
        If a size is not an integer of at least 1, or the format is unknown; the message names the argument.

    Examples
    --------
    >>> llama_13b = CacheShape(layers=40, kv_heads=40, key_dim=128, dtype="float16")
    >>> llama_13b.bytes_per_token, llama_13b.bytes(length=2048)
    (819200, 1677721600)
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.key_dim)
        for name in ("layers", "kv_heads", "key_dim", "value_dim"):
            object.__setattr__(self, name, checked_count(name, getattr(self, name)))
        object.__setattr__(self, "dtype", storage_name(self.dtype))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values: layers · kv_heads · (key_dim + value_dim) · bytes of an element."""
        assert self.value_dim is not None
        return self.layers * self.kv_heads * (self.key_dim + self.value_dim) * ITEM_BYTES[self.dtype]

    def bytes(self, *, length: int, batch: int = 1) -> int:
        """Return the bytes of ``batch`` sequences of ``length`` tokens.

        Raises
        ------
        ValueError, TypeError
            If a number is not an integer of at least 0.
        """
        return checked_count("batch", batch, least=0) * checked_count("length", length, least=0) * self.bytes_per_token

    def rolling_bytes(self, *, window: int, length: int | None = None, batch: int = 1) -> int:
        """Return the bytes of caches that keep the last ``window`` tokens, position p in slot p mod window.

        Parameters
        ----------
        window
            Slots: tokens that a query sees, the own one included.
        length
            Tokens so far, of which the cache holds those that fit; None counts all slots, used or not.
        batch
            Sequences.

        Raises
        ------
        ValueError, TypeError
            If a number is not an integer of at least 0, or the window has no slot.

        Examples
        --------
        >>> mistral = CacheShape(layers=32, kv_heads=8, key_dim=128)
        >>> mistral.rolling_bytes(window=4096), mistral.bytes(length=32_768) // mistral.rolling_bytes(window=4096)
        (536870912, 8)
        """
        slots = checked_count("window", window)
        if length is not None:
            slots = min(slots, checked_count("length", length, least=0))
        return self.bytes(length=slots, batch=batch)

    def tokens_in(self, pool_bytes: int) -> int:
        """Return how many whole tokens a pool of ``pool_bytes`` bytes holds.

        Raises
        ------
        ValueError, TypeError
            If the pool is not an integer number of bytes, or smaller than one token.
        """
        tokens = checked_count("pool_bytes", pool_bytes) // self.bytes_per_token
        if not tokens:
            raise ValueError(
                f"pool_bytes={pool_bytes}: expected at least the {self.bytes_per_token} bytes of one token"
            )
        return tokens
