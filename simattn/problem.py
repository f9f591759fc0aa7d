"""The attention problem: shapes, storage, scale and mask, validated once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from simattn.arithmetic.formats import FLOAT8, ITEM_BYTES, storage_name
from simattn.masks import BlockMask, Rows, Visibility, VisibleRows, is_integer
from simattn.sums import ceil_div

Window = tuple[int | None, int | None]
Direction = Literal["forward", "backward", "decode"]
Heads = Literal["query", "kv", "one"]


@dataclass(frozen=True)
class InputShape:
    """Shape and storage of an array that a program is given.

    Attributes
    ----------
    rows, columns
        Of each matrix.
    heads
        Whether there is a matrix for every query head ("query") or KV head ("kv") of every batch entry, or a single
        one for all, such as weights ("one").
    dtype
        Storage format; None is the problem's.
    gradient
        Whether the backward pass returns its gradient, ``d`` before the name.
    given_shape
        The shape that callers give in place of the usual one, its elements in the order of batch entries, heads, rows
        and columns, or of the rows and columns of the single matrix.
    needed_rows
        Rows that every implementation reads; None is all, of keys and values all that are seen.
    """

    rows: int
    columns: int
    heads: Heads = "query"
    dtype: str | None = None
    gradient: bool = True
    given_shape: tuple[int, ...] | None = None
    needed_rows: int | None = None

    def user_shape(self, problem: AttentionProblem) -> tuple[int, ...]:
        """Return the shape that callers give: (batch, rows, heads, columns), or (rows, columns) of a single matrix."""
        if self.given_shape is not None:
            return self.given_shape
        if self.heads == "one":
            return (self.rows, self.columns)
        return (problem.batch, self.rows, problem.heads if self.heads == "query" else problem.kv_heads, self.columns)


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """One attention: out = softmax(scale · q kᵀ, masked) v, for every batch entry and head.

    Attributes
    ----------
    batch, heads
        Sequences, and query heads of each.
    kv_heads
        Key/value heads; must divide ``heads``. Equal to ``heads`` is multi-head, 1 is multi-query, anything
        between is grouped-query attention. Default ``heads``.
    q_len, kv_len
        Rows of the queries and of the keys and values; ``kv_len`` defaults to ``q_len`` (self-attention).
    head_dim, value_dim
        Columns of the queries and keys, and of the values; ``value_dim`` defaults to ``head_dim``.
    dtype
        Storage format of q, k, v and their gradients.
    scale
        Factor of the scores; default 1/√head_dim. Finite and positive.
    causal
        Hide the keys after the query's own position, sequences aligned at their ends.
    window
        ``(left, right)`` keys seen on either side of the query's position, both ends included; None is no limit.
    block_mask
        The blocks of the score matrix that are computed, the same for every head.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range; the message names it, its value and what was expected.
    """

    batch: int = 1
    heads: int = 1
    kv_heads: int = None  # type: ignore[assignment]
    q_len: int
    kv_len: int = None  # type: ignore[assignment]
    head_dim: int = 64
    value_dim: int = None  # type: ignore[assignment]
    dtype: str = "bfloat16"
    scale: float = None  # type: ignore[assignment]
    causal: bool = False
    window: Window | None = None
    block_mask: BlockMask | None = None

    is_causal: ClassVar[bool] = False
    """Whether all problems of the class are causal."""

    own_inputs: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays that its programs may be given besides q, k, v and dout."""

    decode_cache: ClassVar[str | None] = None
    """What k and v are in a decoding step, for print; None where they are those of all tokens, in their order."""

    def __post_init__(self) -> None:
        for name, default in (("kv_heads", self.heads), ("kv_len", self.q_len), ("value_dim", self.head_dim)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        smallest = {"batch": 0, "q_len": 0, "kv_len": 0}
        for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim"):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), smallest.get(name, 1)))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        object.__setattr__(self, "dtype", storage_name(self.dtype))
        if self.scale is None:
            object.__setattr__(self, "scale", 1.0 / math.sqrt(self.head_dim))
        try:
            object.__setattr__(self, "scale", float(self.scale))
        except (TypeError, ValueError):
            raise TypeError(f"scale={self.scale!r}: expected a number") from None
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale={self.scale!r}: expected a finite number above 0")
        if not isinstance(self.causal, (bool, np.bool_)):
            raise TypeError(f"causal={self.causal!r}: expected a bool")
        object.__setattr__(self, "causal", bool(self.causal))
        object.__setattr__(self, "window", checked_window(self.window))
        self._check_block_mask()

    def _check_block_mask(self) -> None:
        mask = self.block_mask
        if mask is None:
            return
        if not isinstance(mask, BlockMask):
            raise TypeError(f"block_mask is a {type(mask).__name__}: expected a simattn.BlockMask")
        for axis, length, block, blocks in (
            ("q", self.q_len, mask.q_block, mask.q_blocks),
            ("kv", self.kv_len, mask.kv_block, mask.kv_blocks),
        ):
            if blocks != ceil_div(length, block):
                raise ValueError(
                    f"block_mask has {axis}_blocks={blocks} blocks of {block} rows: expected "
                    f"{ceil_div(length, block)} for {axis}_len={length}"
                )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def item_bytes(self) -> int:
        """Bytes of one stored element of q, k and v."""
        return ITEM_BYTES[self.dtype]

    @property
    def is_float8(self) -> bool:
        """Whether q, k and v are stored in eight bits, with one descale factor per batch entry and KV head."""
        return self.dtype in FLOAT8

    @property
    def output_dtype(self) -> str:
        """Storage format of the output: that of the inputs, bfloat16 for eight-bit inputs."""
        return "bfloat16" if self.is_float8 else self.dtype

    def inputs(self, direction: Direction) -> dict[str, InputShape]:
        """Return the arrays that a program is given, by name."""
        arrays = {
            "q": InputShape(self.q_len, self.head_dim),
            "k": InputShape(self.kv_len, self.head_dim, "kv"),
            "v": InputShape(self.kv_len, self.value_dim, "kv"),
        }
        if direction == "backward":
            arrays["dout"] = InputShape(self.q_len, self.value_dim, gradient=False)
        return arrays

    @classmethod
    def shape_arguments(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
        """Return the fields that follow from the arrays that a caller gives.

        Parameters
        ----------
        arrays
            ``q``, ``k``, ``v`` and, of a backward pass, ``dout``, of four dimensions.

        Raises
        ------
        ValueError
            If their shapes do not fit together.
        """
        q, k, v = (arrays[name] for name in "qkv")
        expected = {
            "k": (q.shape[0], k.shape[1], k.shape[2], q.shape[3]),
            "v": (*k.shape[:3], v.shape[3]),
            "dout": (*q.shape[:3], v.shape[3]),
        }
        for name, shape in expected.items():
            if name in arrays and arrays[name].shape != shape:
                raise ValueError(
                    f"{name} has shape {arrays[name].shape}: expected {shape} for q of shape {q.shape} and k of shape "
                    f"{k.shape}"
                )
        return {
            "batch": q.shape[0],
            "heads": q.shape[2],
            "kv_heads": k.shape[2],
            "q_len": q.shape[1],
            "kv_len": k.shape[1],
            "head_dim": q.shape[3],
            "value_dim": v.shape[3],
        }

    def check_direction(self, direction: Direction) -> None:
        """Raise a ValueError if the problem is none of this direction's."""

    @property
    def written_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a program leaves changed, such as a state."""
        return ()

    def of_equal_lengths(self, direction: Direction) -> Iterable[AttentionProblem]:
        """Return problems of sequences or heads that find equally many rows in memory, which together are this one."""
        return (self,)

    def key_tile(self, rows: int) -> int:
        """Return the most key rows of a tile, up to so many, that the storage of the keys allows."""
        return rows

    @classmethod
    def adapted(cls, given: dict[str, Any], direction: Direction) -> dict[str, Any]:
        """Return the fields of any problem, changed where the direction takes no such problem, to test with."""
        return given

    @classmethod
    def example_arguments(cls, problem: AttentionProblem, direction: Direction) -> list[dict[str, Any]]:
        """Return values of the fields that a subclass adds, for a problem of this shape, to test with."""
        return [{}]

    @classmethod
    def usual_arguments(cls, direction: Direction, length: int, window: Window | None = None) -> dict[str, Any]:
        """Return the arguments that make a usual problem of the class besides heads and columns.

        Parameters
        ----------
        direction
            Which program is to take it; "decode" is a step of one new query.
        length
            Tokens of a sequence, the new one included.
        window
            Keys that a query sees on either side, if they are limited.
        """
        lengths = {"q_len": 1, "kv_len": length} if direction == "decode" else {"q_len": length}
        return lengths if window is None else {**lengths, "window": window}

    def settled(self, inputs: Mapping[str, npt.NDArray[Any]]) -> AttentionProblem:
        """Return the problem with every choice that its definition makes by these inputs written down.

        Roundings then change no choice, so that results in any precision can be compared.
        """
        return self

    def draw_inputs(self, direction: Direction, generator: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
        """Return random values of the arrays besides q, k, v and dout, to test with."""
        return {
            name: generator.standard_normal(shape.user_shape(self))
            for name, shape in self.inputs(direction).items()
            if name in self.own_inputs
        }

    def of_one_row(self, **own: Any) -> AttentionProblem:
        """Return a problem of one row and one KV head with the same tiles on chip.

        ``own`` are values of fields in place of the usual ones, for classes that need or add them.
        """
        usual = {"batch": 1, "heads": self.group_size, "kv_heads": 1, "q_len": 1, "kv_len": 1}
        unmasked = {"causal": False, "window": None, "block_mask": None}
        return replace(self, **{**usual, **unmasked, **own})

    @cached_property
    def keys_of_queries(self) -> Visibility:
        """Which keys each query row sees."""
        left, right = self.window or (None, None)
        return Visibility(
            rows=self.q_len,
            columns=self.kv_len,
            shift=self.kv_len - self.q_len,
            before=left,
            after=0 if self.causal else right,
            blocks=self.block_mask,
        )

    @cached_property
    def queries_of_keys(self) -> Visibility:
        """Which query rows see each key."""
        return self.keys_of_queries.transposed

    def visible_keys(self, query_rows: Rows) -> VisibleRows:
        """Return the keys that a run of query tiles sees, for :meth:`simattn.machine.Machine.tiles`."""
        return VisibleRows(self.keys_of_queries, query_rows)

    def visible_queries(self, key_rows: Rows) -> VisibleRows:
        """Return the queries that see a run of key tiles, for :meth:`simattn.machine.Machine.tiles`."""
        return VisibleRows(self.queries_of_keys, key_rows)

    def visible_elements(self) -> npt.NDArray[np.bool_]:
        """Return the whole mask: an array of bool, shape (q_len, kv_len), True where the key is seen."""
        position = np.arange(self.q_len)[:, None] + self.kv_len - self.q_len
        column = np.arange(self.kv_len)[None, :]
        left, right = self.window or (None, None)
        seen = np.ones((self.q_len, self.kv_len), dtype=np.bool_)
        if left is not None:
            seen &= column >= position - left
        if right is not None:
            seen &= column <= position + right
        if self.causal:
            seen &= column <= position
        if self.block_mask is not None:
            mask = self.block_mask
            blocks = np.repeat(mask.to_array(), mask.q_block, axis=0).repeat(mask.kv_block, axis=1)
            seen &= blocks[: self.q_len, : self.kv_len]
        return seen


@dataclass(frozen=True, kw_only=True)
class PackedProblem(AttentionProblem):
    """A problem whose rows are those of several query heads of a KV head, position by position.

    ``heads`` are packed heads, and ``q_len`` is their rows.

    Attributes
    ----------
    packed_heads
        Query heads in each.
    """

    packed_heads: int = 1

    @classmethod
    def of(cls, problem: AttentionProblem, packed_heads: int) -> PackedProblem:
        """Pack the heads of a problem.

        Raises
        ------
        ValueError
            If their number does not divide the query heads of a KV head, or there is a block mask.
        """
        if problem.group_size % packed_heads:
            raise ValueError(
                f"packed_heads={packed_heads}: expected a divisor of the {problem.group_size} query heads of a KV head"
            )
        if problem.block_mask is not None:
            raise ValueError(f"packed_heads={packed_heads} with a block_mask: expected 1")
        given = {item.name: getattr(problem, item.name) for item in fields(problem)}
        given |= {"heads": problem.heads // packed_heads, "q_len": problem.q_len * packed_heads}
        return cls(**given, packed_heads=packed_heads)

    @cached_property
    def keys_of_queries(self) -> Visibility:
        """Which keys each packed row sees."""
        left, right = self.window or (None, None)
        return Visibility(
            rows=self.q_len,
            columns=self.kv_len,
            shift=self.kv_len - self.q_len // self.packed_heads,
            before=left,
            after=0 if self.causal else right,
            packed=self.packed_heads,
        )


def checked_integer(name: str, value: Any, smallest: int) -> int:
    """Return ``value`` as an int.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is below ``smallest``.
    """
    if not is_integer(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected an integer")
    if value < smallest:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {smallest}")
    return int(value)


def checked_window(window: Any) -> Window | None:
    """Return a window as a pair of integers of at least 0, or None where there is no limit.

    Raises
    ------
    TypeError, ValueError
        If it is none; the message says why.
    """
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window={window!r}: expected None or a pair (left, right)")
    for side in window:
        if is_integer(side) and side < 0:
            raise ValueError(f"window={window!r}: expected counts of at least 0, or None for no limit")
    left, right = (
        None if side is None else checked_integer(f"window[{index}]", side, 0) for index, side in enumerate(window)
    )
    return None if left is None and right is None else (left, right)
