"""Serving a workload from a pool, event by event; and the same step by step, with every chunk and page checked.

In every step of the simulated server, in this order:

1. Requests that have all their tokens leave.
2. Every running request gets one more token in each of its samples. If the free pages do not suffice, the request
   that was admitted last is preempted, again until they do: its pages are freed and it goes to the head of the queue.
3. Requests that arrive in this step join the end of the queue.
4. Requests are admitted from the head of the queue while they fit. An admitted request gets the slots of its prompt, of
   the tokens that it generated before it was preempted (they are recomputed), and of one new token, in the same step.

So a request that is never preempted is in the batch for as many steps as it generates tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from simattn.kv_cache.allocators import (
    DEFAULT_ALLOCATORS,
    Allocator,
    Paged,
    allocate_chunks,
    chunk_pool,
    get_allocator,
)
from simattn.kv_cache.checks import checked_count
from simattn.kv_cache.events import serve_by_events
from simattn.kv_cache.result import CacheRun, CacheRuns
from simattn.kv_cache.steps import serve_by_steps
from simattn.kv_cache.workload import DEFAULT_MAX_TOKENS, Workload, check_lengths
from simattn.plan import check_flag


def simulate(
    workload: Workload,
    allocator: str | Allocator = "paged",
    *,
    pool_tokens: int,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    every_step: bool = False,
) -> CacheRun:
    """Serve a workload from a pool of token slots.

    Parameters
    ----------
    workload
        The requests.
    allocator
        A name in :data:`ALLOCATORS`, or an allocator.
    pool_tokens
        Token slots of the pool; :meth:`CacheShape.tokens_in` computes them from bytes.
    max_tokens
        The model's maximum length of a sequence, prompt and output.
    every_step
        Walk every step with actual chunks and block tables, check them after each, and record each. The result is
        the same, but takes time in proportion to the tokens; without it, to the requests.

    Returns
    -------
    CacheRun
        Slots by state over time, and their shares.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, a request is longer than ``max_tokens``, or a request does not fit in the
        empty pool; the message names the request.
    """
    allocator = get_allocator(allocator)
    checked_count("pool_tokens", pool_tokens)
    checked_count("max_tokens", max_tokens, least=2)
    check_flag("every_step", every_step)
    check_lengths(workload, max_tokens)
    _check_fits(workload, allocator, pool_tokens, max_tokens)
    serve = serve_by_steps if every_step else serve_by_events
    return serve(workload, allocator, pool_tokens, max_tokens)


def compare_allocators(
    workload: Workload,
    allocators: Iterable[str | Allocator] = DEFAULT_ALLOCATORS,
    *,
    pool_tokens: int,
    max_tokens: int = DEFAULT_MAX_TOKENS,
) -> CacheRuns:
    """Serve a workload with several allocators; the arguments are those of :func:`simulate`.

    Returns
    -------
    CacheRuns
        A tuple of :class:`CacheRun`, in the order of the allocators; its repr is a table.

    Raises
    ------
    ValueError, TypeError
        As :func:`simulate`.
    """
    return CacheRuns(
        simulate(workload, allocator, pool_tokens=pool_tokens, max_tokens=max_tokens) for allocator in allocators
    )


def _check_fits(workload: Workload, allocator: Allocator, pool_tokens: int, max_tokens: int) -> None:
    """Raise a ValueError if a request does not fit in the empty pool, where it would wait for ever."""
    if isinstance(allocator, Paged):
        lengths = workload.prompt_tokens + workload.output_tokens
        page = allocator.page_tokens
        shared = np.where(workload.samples > 1, workload.prompt_tokens // page, 0) if allocator.sharing else 0
        pages = (-(-lengths // page) - shared).astype(object)  # products may exceed an int64
        need = (shared + workload.samples * pages) * page
        whole = pool_tokens // page * page
        refused = np.flatnonzero(need > whole)
        if refused.size:
            request = int(refused[0])
            raise ValueError(
                f"request {request} needs {need[request]} token slots in pages: expected at most {whole}, the whole "
                f"pages of pool_tokens={pool_tokens}"
            )
        return
    chunks = allocator.chunks(allocator.reservations(workload.prompt_tokens, workload.output_tokens, max_tokens))
    kinds, requests = np.unique(np.stack([chunks, workload.samples]), axis=1, return_index=True)
    for (chunk, samples), request in zip(kinds.T.tolist(), requests.tolist(), strict=True):
        if allocate_chunks(chunk_pool(allocator, pool_tokens, max_tokens)[0], chunk, samples) is None:
            raise ValueError(
                f"request {request} needs {samples} × {chunk} contiguous token slots: expected that they fit in "
                f"pool_tokens={pool_tokens}"
            )
