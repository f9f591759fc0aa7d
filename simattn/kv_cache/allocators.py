"""Allocators of token slots: what they are told about a request, and the pools that hand out chunks or pages.

A pool is a range of token slots, each of which holds the keys and values of one token in all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, get_args

import numpy as np

from simattn.kv_cache.checks import Integers, checked_count
from simattn.plan import check_choice, check_flag

Reservation = Literal["max", "pow2", "pow2-uncapped", "oracle"]


def power_of_two(tokens: Integers) -> Integers:
    """Return the least powers of two that are no smaller than the given counts of at least 1."""
    _, exponents = np.frexp(tokens - 1)  # exact for the counts there are
    return np.left_shift(np.int64(1), exponents.astype(np.int64))


@dataclass(frozen=True)
class Reserve:
    """A contiguous chunk of the model's maximum length for every sequence.

    It knows nothing of a request's output length. The pool is cut into chunks of ``max_tokens``.
    """

    @property
    def name(self) -> str:
        """Key in :data:`ALLOCATORS`."""
        return "reserve"

    def reservations(self, prompt_tokens: Integers, output_tokens: Integers, max_tokens: int) -> Integers:
        """Return the token slots reserved for each sequence: ``max_tokens``."""
        return np.full_like(prompt_tokens, max_tokens)

    def chunks(self, reservations: Integers) -> Integers:
        """Return the size of the chunk of each reservation: the same."""
        return reservations


@dataclass(frozen=True)
class Buddy:
    """A chunk from a buddy allocator for every sequence, as Kwon et al. assume of Orca.

    Attributes
    ----------
    reservation
        How many slots are reserved, which is what the system knows of the output length beforehand:

        - "max", nothing: the model's maximum length;
        - "pow2", within a factor of two: the prompt and the output length rounded up to a power of two, no more than
          the maximum length;
        - "pow2-uncapped", the same without that limit;
        - "oracle", exactly: the prompt and the output.

        The allocator rounds the reservation up to a power of two, the size of the chunk.

    Raises
    ------
    ValueError
        If the reservation is another.
    """

    reservation: Reservation = "oracle"

    def __post_init__(self) -> None:
        check_choice("reservation", self.reservation, get_args(Reservation))

    @property
    def name(self) -> str:
        """Key in :data:`ALLOCATORS`."""
        return f"buddy-{self.reservation}"

    def reservations(self, prompt_tokens: Integers, output_tokens: Integers, max_tokens: int) -> Integers:
        """Return the token slots reserved for each sequence, from its lengths; the last include the prompt."""
        if self.reservation == "max":
            return np.full_like(prompt_tokens, max_tokens)
        if self.reservation == "pow2":
            capped: Integers = np.minimum(prompt_tokens + power_of_two(output_tokens), max_tokens)
            return capped
        if self.reservation == "pow2-uncapped":
            return prompt_tokens + power_of_two(output_tokens)
        return prompt_tokens + output_tokens

    def chunks(self, reservations: Integers) -> Integers:
        """Return the size of the chunk of each reservation, a power of two."""
        return power_of_two(reservations)


@dataclass(frozen=True)
class Paged:
    """Pages of a few tokens, taken when they are needed, anywhere in the pool: PagedAttention.

    Attributes
    ----------
    page_tokens
        Token slots of a page.
    sharing
        Whether the samples of a request share the pages of their prompt until one writes to them.
    watermark_pages
        Pages that must stay free when a request is admitted beside others, so that it is not preempted at once.
        vLLM keeps 1 % of the pool.

    Raises
    ------
    ValueError, TypeError
        If a field is out of range.
    """

    page_tokens: int = 16
    sharing: bool = True
    watermark_pages: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "page_tokens", checked_count("page_tokens", self.page_tokens))
        check_flag("sharing", self.sharing)
        object.__setattr__(self, "watermark_pages", checked_count("watermark_pages", self.watermark_pages, least=0))

    @property
    def name(self) -> str:
        """Key in :data:`ALLOCATORS` of the one with pages of 16 tokens."""
        return "paged" if self.sharing else "paged-unshared"

    def shared_pages(self, prompt_tokens: int, samples: int) -> int:
        """Return the pages that all samples of a running request refer to: the full ones of the prompt."""
        return prompt_tokens // self.page_tokens if self.sharing and samples > 1 else 0

    def request_pages(self, prompt_tokens: int, generated_tokens: int, samples: int) -> int:
        """Return the pages of a request whose samples have each generated at least one token."""
        shared = self.shared_pages(prompt_tokens, samples)
        return shared + samples * (-(-(prompt_tokens + generated_tokens) // self.page_tokens) - shared)


Allocator = Reserve | Buddy | Paged

_EVERY: tuple[Allocator, ...] = (
    Reserve(),
    *(Buddy(reservation) for reservation in get_args(Reservation)),
    Paged(),
    Paged(sharing=False),
)

ALLOCATORS: Mapping[str, Allocator] = MappingProxyType({allocator.name: allocator for allocator in _EVERY})
"""The allocators by name; pages have 16 tokens."""

DEFAULT_ALLOCATORS = ("reserve", "buddy-max", "buddy-pow2", "buddy-oracle", "paged")
"""Names of those that a comparison takes unless told otherwise."""


def get_allocator(allocator: str | Allocator) -> Allocator:
    """Return the allocator of that name; an allocator is returned as it is.

    Raises
    ------
    ValueError
        If no allocator has that name; the message lists those that exist.
    TypeError
        If it is neither a name nor an allocator.
    """
    if isinstance(allocator, (Reserve, Buddy, Paged)):
        return allocator
    if not isinstance(allocator, str):
        raise TypeError(f"allocator={allocator!r} is a {type(allocator).__name__}: expected a name or an allocator")
    if allocator not in ALLOCATORS:
        raise ValueError(f"allocator={allocator!r}: expected one of {', '.join(ALLOCATORS)}")
    return ALLOCATORS[allocator]


class ChunkPool(Protocol):
    """A pool of token slots that hands out contiguous chunks."""

    def allocate(self, tokens: int) -> int | None:
        """Return the first slot of a chunk of ``tokens`` slots, or None if there is none."""

    def release(self, start: int) -> None:
        """Take back the chunk that starts at a slot."""

    def check(self) -> None:
        """Raise a RuntimeError unless the chunks are consistent."""


class ReservePool:
    """A pool cut into chunks of one size.

    Parameters
    ----------
    pool_tokens
        Token slots of the pool.
    chunk_tokens
        Token slots of a chunk; the slots beyond the last whole chunk are never used.
    """

    def __init__(self, pool_tokens: int, chunk_tokens: int) -> None:
        self.pool_tokens = checked_count("pool_tokens", pool_tokens)
        self.chunk_tokens = checked_count("chunk_tokens", chunk_tokens)
        self._free: list[int] = []
        self._taken: set[int] = set()
        self._unused = 0  # first slot of the chunks that were never taken

    def allocate(self, tokens: int) -> int | None:
        """Return the first slot of a free chunk, or None if there is none.

        Raises
        ------
        ValueError
            If ``tokens`` is not the size of the chunks.
        """
        if tokens != self.chunk_tokens:
            raise ValueError(f"tokens={tokens}: expected {self.chunk_tokens}, the size of every chunk")
        if self._free:
            start = self._free.pop()
        elif self._unused + self.chunk_tokens <= self.pool_tokens:
            start, self._unused = self._unused, self._unused + self.chunk_tokens
        else:
            return None
        self._taken.add(start)
        return start

    def release(self, start: int) -> None:
        """Take back the chunk that starts at a slot.

        Raises
        ------
        ValueError
            If no chunk that starts there is taken.
        """
        if start not in self._taken:
            raise ValueError(f"start={start}: expected the first slot of a chunk that is taken")
        self._taken.remove(start)
        self._free.append(start)

    def check(self) -> None:
        """Raise a RuntimeError unless every chunk is free or taken, and none is both."""
        if sorted([*self._free, *self._taken]) != list(range(0, self._unused, self.chunk_tokens)):
            raise RuntimeError("chunks of the pool are lost, or both free and taken")


class BuddyPool:
    """The classical buddy system: chunks are halved until they fit, and freed halves are joined again.

    A pool whose size is no power of two starts as one chunk for each power of two in its size, the largest first, so
    that every chunk is aligned to its own size.

    Parameters
    ----------
    pool_tokens
        Token slots of the pool.
    """

    def __init__(self, pool_tokens: int) -> None:
        self.pool_tokens = checked_count("pool_tokens", pool_tokens)
        # Dictionaries serve as sets in order of insertion, so that the order of chunks is determined.
        self._free: list[dict[int, None]] = [{} for _ in range(pool_tokens.bit_length())]
        self._taken: dict[int, int] = {}
        for start, size in self._whole():
            self._free[size.bit_length() - 1][start] = None

    def _whole(self) -> Iterator[tuple[int, int]]:
        start = 0
        for order in reversed(range(self.pool_tokens.bit_length())):
            if self.pool_tokens >> order & 1:
                yield start, 1 << order
                start += 1 << order

    def allocate(self, tokens: int) -> int | None:
        """Return the first slot of a chunk, or None if no chunk is large enough.

        Raises
        ------
        ValueError
            If ``tokens`` is not a power of two.
        """
        if tokens < 1 or tokens & (tokens - 1):
            raise ValueError(f"tokens={tokens}: expected a power of two")
        order = wanted = tokens.bit_length() - 1
        while order < len(self._free) and not self._free[order]:
            order += 1
        if order >= len(self._free):
            return None
        start, _ = self._free[order].popitem()
        while order > wanted:
            order -= 1
            self._free[order][start + (1 << order)] = None
        self._taken[start] = wanted
        return start

    def release(self, start: int) -> None:
        """Take back the chunk that starts at a slot, and join it with its buddy as long as that is free.

        Raises
        ------
        ValueError
            If no chunk that starts there is taken.
        """
        if start not in self._taken:
            raise ValueError(f"start={start}: expected the first slot of a chunk that is taken")
        order = self._taken.pop(start)
        while (buddy := start ^ (1 << order)) in self._free[order]:
            del self._free[order][buddy]
            start = min(start, buddy)
            order += 1
        self._free[order][start] = None

    @property
    def free_chunks(self) -> list[tuple[int, int]]:
        """First slot and size of every free chunk, in order."""
        return sorted((start, 1 << order) for order, starts in enumerate(self._free) for start in starts)

    @property
    def taken_chunks(self) -> list[tuple[int, int]]:
        """First slot and size of every chunk that is taken, in order."""
        return sorted((start, 1 << order) for start, order in self._taken.items())

    def check(self) -> None:
        """Raise a RuntimeError unless the chunks tile the pool, aligned, and no two free buddies are apart."""
        end = 0
        for start, size in sorted([*self.free_chunks, *self.taken_chunks]):
            if start != end:
                raise RuntimeError(f"a chunk starts at slot {start}: expected slot {end}, the end of the one before")
            if start % size:
                raise RuntimeError(f"the chunk of {size} slots at slot {start} is not aligned to its size")
            end = start + size
        if end != self.pool_tokens:
            raise RuntimeError(f"the chunks end at slot {end}: expected {self.pool_tokens}, the size of the pool")
        for start, size in self.free_chunks:
            if start ^ size in self._free[size.bit_length() - 1]:
                raise RuntimeError(f"the free chunk of {size} slots at slot {start} is apart from its free buddy")
        if not self._taken and self.free_chunks != list(self._whole()):
            raise RuntimeError("nothing is taken, and the free chunks are not the whole pool")


def chunk_pool(allocator: Reserve | Buddy, pool_tokens: int, max_tokens: int) -> tuple[ChunkPool, int]:
    """Return an empty pool, and how many of its slots are never in a chunk."""
    if isinstance(allocator, Buddy):
        return BuddyPool(pool_tokens), 0
    return ReservePool(pool_tokens, max_tokens), pool_tokens % max_tokens


def allocate_chunks(pool: ChunkPool, tokens: int, count: int) -> list[int] | None:
    """Return the first slots of ``count`` chunks; None, and the pool as it was, if there are not as many."""
    starts: list[int] = []
    while len(starts) < count:
        start = pool.allocate(tokens)
        if start is None:
            for taken in starts:
                pool.release(taken)
            return None
        starts.append(start)
    return starts


class OutOfPagesError(RuntimeError):
    """The pool has fewer free pages than a sequence needs; nothing was changed."""


class PagedPool:
    """Pages with reference counts, and a block table for every sequence.

    A forked sequence shares all pages of its parent. A write to a page that others refer to copies it first.

    Parameters
    ----------
    pages
        Pages of the pool.
    page_tokens
        Token slots of a page.

    Examples
    --------
    A step of beam search: the better beam is continued twice, the other dropped.

    >>> pool = PagedPool(pages=8, page_tokens=4)
    >>> pool.allocate("a", tokens=6)
    >>> pool.fork("a", "b")
    >>> pool.append("a"), pool.append("b")  # the second page is copied for one of them, once
    (1, 0)
    >>> pool.release("b")
    >>> pool.fork("a", "b")
    >>> pool.tables
    {'a': [0, 2], 'b': [0, 2]}
    >>> pool.check()
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = checked_count("pages", pages, least=0)
        self.page_tokens = checked_count("page_tokens", page_tokens)
        self.tables: dict[object, list[int]] = {}
        """Pages of every sequence, in the order of its tokens."""
        self.tokens: dict[object, int] = {}
        """Tokens of every sequence."""
        self.references = [0] * pages
        """How many tables refer to each page."""
        self._free = list(reversed(range(pages)))

    @property
    def free_pages(self) -> int:
        """Pages that no table refers to."""
        return len(self._free)

    def allocate(self, sequence: object, *, tokens: int) -> None:
        """Give a new sequence the pages of its first tokens.

        Raises
        ------
        ValueError
            If there is a sequence of that name.
        OutOfPagesError
            If the pages do not suffice.
        """
        if sequence in self.tables:
            raise ValueError(f"sequence={sequence!r}: expected a new one")
        checked_count("tokens", tokens, least=0)
        self.tables[sequence] = self._take(-(-tokens // self.page_tokens))
        self.tokens[sequence] = tokens

    def fork(self, parent: object, child: object) -> None:
        """Make a new sequence of the same tokens, in the same pages.

        Raises
        ------
        ValueError
            If there is no parent, or there is a child of that name.
        """
        self._check_known("parent", parent)
        if child in self.tables:
            raise ValueError(f"child={child!r}: expected a new one")
        self.tables[child] = list(self.tables[parent])
        self.tokens[child] = self.tokens[parent]
        for page in self.tables[parent]:
            self.references[page] += 1

    def pages_to_append(self, sequence: object) -> int:
        """Return the free pages, 0 or 1, that the next token of a sequence takes, a copy included.

        Raises
        ------
        ValueError
            If there is no such sequence.
        """
        self._check_known("sequence", sequence)
        full = self.tokens[sequence] % self.page_tokens == 0
        return int(full or self.references[self.tables[sequence][-1]] > 1)

    def append(self, sequence: object) -> int:
        """Write one more token to a sequence, and return how many pages were copied for it, 0 or 1.

        Raises
        ------
        ValueError
            If there is no such sequence.
        OutOfPagesError
            If a page is needed and none is free.
        """
        fresh = self._take(self.pages_to_append(sequence))
        copied = bool(fresh) and self.tokens[sequence] % self.page_tokens != 0
        if copied:
            self.references[self.tables[sequence].pop()] -= 1
        self.tables[sequence] += fresh
        self.tokens[sequence] += 1
        return int(copied)

    def release(self, sequence: object) -> None:
        """Drop a sequence; its pages are free when no other refers to them.

        Raises
        ------
        ValueError
            If there is no such sequence.
        """
        self._check_known("sequence", sequence)
        for page in self.tables.pop(sequence):
            self.references[page] -= 1
            if not self.references[page]:
                self._free.append(page)
        del self.tokens[sequence]

    @property
    def used_tokens(self) -> int:
        """Slots that hold a token, those of shared pages once."""
        held: dict[int, int] = {}
        for sequence, table in self.tables.items():
            for index, page in enumerate(table):
                filled = min(self.page_tokens, self.tokens[sequence] - index * self.page_tokens)
                held[page] = max(held.get(page, 0), filled)
        return sum(held.values())

    def check(self) -> None:
        """Raise a RuntimeError unless the tables, the reference counts and the free list agree.

        Every page is free or referred to; its count is the number of tables that have it, which is 1 unless they
        share it at the same place; no table has a page twice; and a table has just the pages of its tokens.
        """
        found = [0] * self.pages
        places: dict[int, int] = {}
        for sequence, table in self.tables.items():
            expected = -(-self.tokens[sequence] // self.page_tokens)
            if len(table) != expected:
                raise RuntimeError(f"sequence {sequence!r} has {len(table)} pages: expected {expected}")
            for place, page in enumerate(table):
                found[page] += 1
                if places.setdefault(page, place) != place:
                    raise RuntimeError(f"page {page} is at the places {places[page]} and {place} of tables")
        if found != self.references:
            page = next(page for page in range(self.pages) if found[page] != self.references[page])
            raise RuntimeError(f"page {page} has the count {self.references[page]}: expected {found[page]}")
        if sorted(self._free) != [page for page in range(self.pages) if not found[page]]:
            raise RuntimeError("the free list differs from the pages that no table refers to")

    def _check_known(self, name: str, sequence: object) -> None:
        if sequence not in self.tables:
            raise ValueError(f"{name}={sequence!r}: expected a sequence of the pool")

    def _take(self, pages: int) -> list[int]:
        if pages > len(self._free):
            raise OutOfPagesError(f"{pages} pages are needed and {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(pages)]
        for page in taken:
            self.references[page] = 1
        return taken
