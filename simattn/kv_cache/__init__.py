"""The KV cache: its size, and how much of its memory allocators use and waste while requests are served.

:class:`CacheShape` gives the bytes of a token. :func:`generate_workload` draws a stream of requests, and
:func:`read_trace` reads one. :func:`simulate` serves it from a pool of token slots with one of three allocators:
``reserve`` sets the model's maximum length aside for every sequence, ``buddy`` a chunk rounded up to a power of two (as
Kwon et al. assume of Orca), ``paged`` takes pages when they are needed (PagedAttention: Kwon et al. 2023,
arXiv 2309.06180).
"""

from simattn.kv_cache.allocators import (
    ALLOCATORS,
    DEFAULT_ALLOCATORS,
    Allocator,
    Buddy,
    BuddyPool,
    OutOfPagesError,
    Paged,
    PagedPool,
    Reservation,
    Reserve,
    ReservePool,
    get_allocator,
)
from simattn.kv_cache.result import STATES, CacheRun, CacheRuns
from simattn.kv_cache.shape import CacheShape
from simattn.kv_cache.simulation import compare_allocators, simulate
from simattn.kv_cache.workload import (
    DEFAULT_MAX_TOKENS,
    Constant,
    Geometric,
    Lengths,
    Lognormal,
    Poisson,
    Uniform,
    Workload,
    generate_workload,
    parse_lengths,
    read_trace,
    write_trace,
)

__all__ = [
    "ALLOCATORS",
    "DEFAULT_ALLOCATORS",
    "DEFAULT_MAX_TOKENS",
    "STATES",
    "Allocator",
    "Buddy",
    "BuddyPool",
    "CacheRun",
    "CacheRuns",
    "CacheShape",
    "Constant",
    "Geometric",
    "Lengths",
    "Lognormal",
    "OutOfPagesError",
    "Paged",
    "PagedPool",
    "Poisson",
    "Reservation",
    "Reserve",
    "ReservePool",
    "Uniform",
    "Workload",
    "compare_allocators",
    "generate_workload",
    "get_allocator",
    "parse_lengths",
    "read_trace",
    "simulate",
    "write_trace",
]
