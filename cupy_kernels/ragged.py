"""Problems whose sequences have lengths of their own, which only the device knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from simattn.problem import AttentionProblem

OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
"""Arrays of where every sequence starts, and after them where the last one ends, in rows of the queries and keys."""


@dataclass(frozen=True, kw_only=True)
class RaggedProblem(AttentionProblem):
    """Sequences that follow one another along the rows.

    ``batch`` is their number, ``q_len`` and ``kv_len`` are the rows of all of them together. Masks are each sequence's.
    """

    @classmethod
    def of(cls, problem: AttentionProblem, lengths: Sequence[tuple[int, int]]) -> RaggedProblem:
        """Return the problem of sequences of so many queries and keys, like a given one otherwise."""
        given = {item.name: getattr(problem, item.name) for item in fields(AttentionProblem)}
        given |= {"batch": len(lengths), "block_mask": None}
        given |= {"q_len": sum(queries for queries, _ in lengths), "kv_len": sum(keys for _, keys in lengths)}
        return cls(**given)

    @property
    def average(self) -> AttentionProblem:
        """The problem of a sequence of average length, by which a plan is chosen: no single length is known."""
        sequences = max(1, self.batch)
        return self.sequence(self.q_len // sequences, self.kv_len // sequences)

    def sequence(self, queries: int, keys: int) -> AttentionProblem:
        """Return the problem of one sequence of so many queries and keys."""
        return AttentionProblem(
            heads=self.heads,
            kv_heads=self.kv_heads,
            q_len=queries,
            kv_len=keys,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            scale=self.scale,
            causal=self.causal,
            window=self.window,
        )


def offsets_of(lengths: Sequence[int]) -> list[int]:
    """Return where sequences of these lengths start, and where the last one ends."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return offsets
