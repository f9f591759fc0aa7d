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

import heapq
from collections.abc import Iterable
from itertools import accumulate
from typing import Protocol

import numpy as np

from simattn.kv_cache.allocators import (
    DEFAULT_ALLOCATORS,
    Allocator,
    Buddy,
    BuddyPool,
    ChunkPool,
    Paged,
    PagedPool,
    Reserve,
    ReservePool,
    get_allocator,
)
from simattn.kv_cache.checks import checked_count
from simattn.kv_cache.result import STATES, CacheRun, CacheRuns
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
    if every_step:
        return _walk(workload, allocator, pool_tokens, max_tokens)
    return _run_events(workload, allocator, pool_tokens, max_tokens)


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


# Chunks and pages as numbers


class _Account(Protocol):
    """Sums over the running requests, and what an allocator can still take.

    ``held`` are the slots taken, ``rounding`` those of them beyond reservations, ``internal`` those that their
    requests never use; ``unusable`` slots are never taken.
    """

    used: int
    sequences: int
    held: int
    rounding: int
    internal: int
    unusable: int

    def admit(self, request: int, generated: int, step: int, alone: bool) -> bool:
        """Take the slots of a request and its next token, if they are free."""

    def remove(self, request: int, step: int) -> None:
        """Free the slots of a request, whose tokens are those at the end of the step before."""

    def advance(self, step: int, steps: int) -> tuple[int, int]:
        """Grow all requests from a step by up to ``steps`` steps while there are pages; return the steps and Σ held."""

    def lacks(self, step: int) -> bool:
        """Say whether the pages do not suffice for growing into a step."""

    def grow(self, step: int) -> None:
        """Grow all requests into a step."""


class _ChunkAccount:
    """Contiguous chunks, one for every sample: nothing changes between admissions and departures."""

    def __init__(self, workload: Workload, allocator: Reserve | Buddy, pool_tokens: int, max_tokens: int) -> None:
        self.pool, self.unusable = chunk_pool(allocator, pool_tokens, max_tokens)
        self.prompt: list[int] = workload.prompt_tokens.tolist()
        self.output: list[int] = workload.output_tokens.tolist()
        self.samples: list[int] = workload.samples.tolist()
        reservations = allocator.reservations(workload.prompt_tokens, workload.output_tokens, max_tokens)
        self.reservation: list[int] = reservations.tolist()
        self.chunk: list[int] = allocator.chunks(reservations).tolist()
        self.starts: dict[int, list[int]] = {}
        self.used = self.sequences = self.held = self.rounding = self.internal = 0

    def admit(self, request: int, generated: int, step: int, alone: bool) -> bool:
        starts = allocate_chunks(self.pool, self.chunk[request], self.samples[request])
        if starts is None:
            return False
        self.starts[request] = starts
        self._count(request, 1, self.prompt[request] + 1)
        return True

    def remove(self, request: int, step: int) -> None:
        for start in self.starts.pop(request):
            self.pool.release(start)
        self._count(request, -1, self.prompt[request] + self.output[request])

    def _count(self, request: int, sign: int, tokens: int) -> None:
        samples = sign * self.samples[request]
        reservation = self.reservation[request]
        self.sequences += samples
        self.used += samples * tokens
        self.held += samples * self.chunk[request]
        self.rounding += samples * (self.chunk[request] - reservation)
        self.internal += samples * (reservation - self.prompt[request] - self.output[request])

    def advance(self, step: int, steps: int) -> tuple[int, int]:
        self.used += steps * self.sequences
        return steps, steps * self.held

    def lacks(self, step: int) -> bool:
        return False

    def grow(self, step: int) -> None:
        self.used += self.sequences


class _PageAccount:
    """Pages by count.

    All running sequences get one token in every step. So one that enters a page in step t enters the next in step
    t + page_tokens, and the pages that a step takes depend on nothing but its phase, t modulo page_tokens.
    """

    def __init__(self, workload: Workload, allocator: Paged, pool_tokens: int) -> None:
        self.allocator = allocator
        self.page = allocator.page_tokens
        self.prompt: list[int] = workload.prompt_tokens.tolist()
        self.output: list[int] = workload.output_tokens.tolist()
        self.samples: list[int] = workload.samples.tolist()
        self.free = pool_tokens // self.page
        self.unusable = pool_tokens % self.page
        self.taken_in_phase = [0] * self.page
        self.birth: dict[int, int] = {}
        self.used = self.sequences = self.held = self.rounding = self.internal = 0

    def admit(self, request: int, generated: int, step: int, alone: bool) -> bool:
        prompt, samples = self.prompt[request], self.samples[request]
        pages = self.allocator.request_pages(prompt, generated + 1, samples)
        if pages + (0 if alone else self.allocator.watermark_pages) > self.free:
            return False
        self.birth[request] = step - generated - 1  # a sequence has prompt + step - birth tokens
        self._count(request, 1, generated + 1, pages)
        return True

    def remove(self, request: int, step: int) -> None:
        generated = step - 1 - self.birth[request]
        pages = self.allocator.request_pages(self.prompt[request], generated, self.samples[request])
        self._count(request, -1, generated, pages)
        del self.birth[request]

    def _count(self, request: int, sign: int, generated: int, pages: int) -> None:
        prompt, samples = self.prompt[request], self.samples[request]
        shared = self.allocator.shared_pages(prompt, samples) * self.page
        self.free -= sign * pages
        self.held += sign * pages * self.page
        self.sequences += sign * samples
        self.used += sign * (shared + samples * (prompt - shared + generated))
        self.taken_in_phase[(self.birth[request] + 1 - prompt) % self.page] += sign * samples

    def tail_step(self, request: int) -> int:
        """Return the step in which a running request enters its last page."""
        full = (self.prompt[request] + self.output[request] - 1) // self.page * self.page
        return self.birth[request] + full + 1 - self.prompt[request]

    def tail_tokens(self, request: int) -> int:
        """Return the slots of its last pages that a request never uses."""
        return self.samples[request] * (-(self.prompt[request] + self.output[request]) % self.page)

    def advance(self, step: int, steps: int) -> tuple[int, int]:
        free, page = self.free, self.page
        done = free_sum = 0
        first = (step + 1) % page
        ahead = self.taken_in_phase[first:] + self.taken_in_phase[:first]  # pages of the next steps, in order
        if steps >= page:
            cycles = min(steps // page, free // self.sequences) if self.sequences else steps // page
            free_sum = page * (cycles * free - self.sequences * (cycles * (cycles - 1) // 2))
            free_sum -= cycles * sum(accumulate(ahead))
            free -= cycles * self.sequences
            done = cycles * page
        # The rest is less than a cycle, or the pages suffice for less than one.
        for pages in ahead[: steps - done]:
            if pages > free:
                break
            free -= pages
            free_sum += free
            done += 1
        held_sum = done * (self.held + self.free * page) - free_sum * page
        self.held += (self.free - free) * page
        self.free = free
        self.used += done * self.sequences
        return done, held_sum

    def lacks(self, step: int) -> bool:
        return self.taken_in_phase[step % self.page] > self.free

    def grow(self, step: int) -> None:
        pages = self.taken_in_phase[step % self.page]
        self.free -= pages
        self.held += pages * self.page
        self.used += self.sequences


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


def _check_fits(workload: Workload, allocator: Allocator, pool_tokens: int, max_tokens: int) -> None:
    """Raise a ValueError if a request does not fit in the empty pool, where it would wait for ever."""
    if isinstance(allocator, Paged):
        lengths = workload.prompt_tokens + workload.output_tokens
        page = allocator.page_tokens
        shared = np.where(workload.samples > 1, workload.prompt_tokens // page, 0) if allocator.sharing else 0
        need = (shared + workload.samples * (-(-lengths // page) - shared)) * page
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


# Event by event

_LEAVES, _ENTERS_LAST_PAGE = 0, 1
_RECORDED = (
    "step",
    "used",
    "held",
    "rounding",
    "internal",
    "running",
    "sequences",
    "waiting",
    "finished",
    "preempted",
)


class _Sums:
    """Sums over steps: used, held, rounding and internal slots, requests, and steps."""

    def __init__(self) -> None:
        self.used = self.held = self.rounding = self.internal = self.requests = self.steps = 0

    def by_state(self, pool_tokens: int, unusable: int, free_is_external: bool) -> dict[str, int]:
        """Return the sums by state."""
        free = (pool_tokens - unusable) * self.steps - self.held
        return {
            "used": self.used,
            "reserved": self.held - self.rounding - self.internal - self.used,
            "internal": self.internal,
            "external": self.rounding + unusable * self.steps + (free if free_is_external else 0),
            "free": 0 if free_is_external else free,
        }


def _run_events(workload: Workload, allocator: Allocator, pool_tokens: int, max_tokens: int) -> CacheRun:
    _check_fits(workload, allocator, pool_tokens, max_tokens)
    pages = _PageAccount(workload, allocator, pool_tokens) if isinstance(allocator, Paged) else None
    account: _Account = pages or _ChunkAccount(workload, allocator, pool_tokens, max_tokens)  # type: ignore[arg-type]
    arrivals: list[int] = workload.arrival_step.tolist()
    outputs: list[int] = workload.output_tokens.tolist()
    requests = len(arrivals)
    start_step, finish_step = [-1] * requests, [-1] * requests
    generated = [0] * requests  # before the last preemption
    admitted_in = [-1] * requests  # step of the last admission of a running request, else -1
    events: list[tuple[int, int, int, int]] = []  # step, kind, request, step of the admission it belongs to
    admissions: list[tuple[int, int]] = []  # request and step, the last admitted at the end; left ones among them
    preempted: list[int] = []  # the one to be readmitted first at the end
    next_new = arrived = running = finished = preemptions = 0
    sums = {False: _Sums(), True: _Sums()}
    records: list[tuple[int, ...]] = []
    step, waits = arrivals[0] - 1, False

    while finished < requests:
        while events and admitted_in[events[0][2]] != events[0][3]:
            heapq.heappop(events)  # of a request that was preempted meanwhile
        target = events[0][0] if events else arrivals[next_new]
        if not waits and next_new < requests:
            target = min(target, arrivals[next_new])
        entered = sums[waits]
        used, sequences = account.used, account.sequences
        done, held_sum = account.advance(step, target - step - 1)
        entered.steps += done
        entered.used += done * used + sequences * (done * (done + 1) // 2)
        entered.held += held_sum
        entered.rounding += done * account.rounding
        entered.internal += done * account.internal
        entered.requests += done * running
        step += done + 1

        while events and events[0][:2] == (step, _LEAVES):
            _, _, request, admitted = heapq.heappop(events)
            if admitted_in[request] == admitted:
                account.remove(request, step)
                if pages:
                    pages.internal -= pages.tail_tokens(request)
                admitted_in[request] = -1
                finish_step[request] = step - 1
                running -= 1
                finished += 1
        while account.lacks(step):
            request, admitted = admissions.pop()
            if admitted_in[request] == admitted:
                assert pages is not None
                if pages.tail_step(request) < step:
                    pages.internal -= pages.tail_tokens(request)
                generated[request] += step - admitted
                pages.remove(request, step)
                admitted_in[request] = -1
                preempted.append(request)
                running -= 1
                preemptions += 1
        account.grow(step)
        while events and events[0][0] == step:
            _, _, request, admitted = heapq.heappop(events)
            if admitted_in[request] == admitted:
                assert pages is not None
                pages.internal += pages.tail_tokens(request)

        while arrived < requests and arrivals[arrived] <= step:
            arrived += 1
        while preempted or next_new < arrived:
            request = preempted[-1] if preempted else next_new
            if not account.admit(request, generated[request], step, alone=not running):
                break
            if preempted:
                preempted.pop()
            else:
                next_new += 1
                start_step[request] = step
            admitted_in[request] = step
            admissions.append((request, step))
            running += 1
            heapq.heappush(events, (step + outputs[request] - generated[request], _LEAVES, request, step))
            if pages:
                tail = pages.tail_step(request)
                if tail <= step:
                    pages.internal += pages.tail_tokens(request)
                else:
                    heapq.heappush(events, (tail, _ENTERS_LAST_PAGE, request, step))

        waiting = arrived - next_new + len(preempted)
        waits = waiting > 0
        if finished < requests:
            entered = sums[waits]
            entered.steps += 1
            entered.used += account.used
            entered.held += account.held
            entered.rounding += account.rounding
            entered.internal += account.internal
            entered.requests += running
            records.append(
                (
                    step,
                    account.used,
                    account.held,
                    account.rounding,
                    account.internal,
                    running,
                    account.sequences,
                    waiting,
                    finished,
                    preemptions,
                )
            )

    columns = dict(zip(_RECORDED, np.array(records, dtype=np.int64).T, strict=True))
    held, rounding = columns.pop("held"), columns.pop("rounding")
    free = pool_tokens - account.unusable - held
    wasted = np.where(columns["waiting"] > 0, free, 0) if pages is None else np.zeros_like(free)
    by_state = {
        waited: entered.by_state(pool_tokens, account.unusable, waited and pages is None)
        for waited, entered in sums.items()
    }
    return CacheRun(
        allocator=allocator,
        workload=workload,
        pool_tokens=pool_tokens,
        **columns,
        reserved=held - rounding - columns["internal"] - columns["used"],
        external=rounding + account.unusable + wasted,
        free=free - wasted,
        start_step=np.array(start_step, dtype=np.int64),
        finish_step=np.array(finish_step, dtype=np.int64),
        steps=sums[False].steps + sums[True].steps,
        waiting_steps=sums[True].steps,
        token_steps={state: by_state[False][state] + by_state[True][state] for state in STATES},
        token_steps_while_waiting=by_state[True],
        request_steps=sums[False].requests + sums[True].requests,
        request_steps_while_waiting=sums[True].requests,
    )


# Step by step


class _ChunkServer:
    """Chunks of the running requests; every number is added up afresh."""

    def __init__(self, workload: Workload, allocator: Reserve | Buddy, pool_tokens: int, max_tokens: int) -> None:
        self.workload = workload
        self.pool_tokens = pool_tokens
        self.pool, self.unusable = chunk_pool(allocator, pool_tokens, max_tokens)
        self.reservations = allocator.reservations(workload.prompt_tokens, workload.output_tokens, max_tokens)
        self.chunks = allocator.chunks(self.reservations)
        self.starts: dict[int, list[int]] = {}
        self.generated: dict[int, int] = {}

    def admit(self, request: int, generated: int, alone: bool) -> bool:
        starts = allocate_chunks(self.pool, int(self.chunks[request]), int(self.workload.samples[request]))
        if starts is None:
            return False
        self.starts[request], self.generated[request] = starts, 1
        return True

    def remove(self, request: int) -> None:
        for start in self.starts.pop(request):
            self.pool.release(start)
        del self.generated[request]

    def append(self, request: int) -> bool:
        self.generated[request] += 1
        return True

    def check(self) -> None:
        self.pool.check()

    def states(self, waiting: bool) -> tuple[int, ...]:
        used = reserved = internal = external = 0
        for request, generated in self.generated.items():
            prompt, output, samples = (
                int(values[request])
                for values in (self.workload.prompt_tokens, self.workload.output_tokens, self.workload.samples)
            )
            used += samples * (prompt + generated)
            reserved += samples * (output - generated)
            internal += samples * int(self.reservations[request] - prompt - output)
            external += samples * int(self.chunks[request] - self.reservations[request])
        free = self.pool_tokens - self.unusable - used - reserved - internal - external
        external += self.unusable
        return (used, reserved, internal, external + free, 0) if waiting else (used, reserved, internal, external, free)


class _PageServer:
    """Block tables of the running requests; every number is added up from them afresh."""

    def __init__(self, workload: Workload, allocator: Paged, pool_tokens: int) -> None:
        self.workload, self.allocator, self.pool_tokens = workload, allocator, pool_tokens
        self.pool = PagedPool(pool_tokens // allocator.page_tokens, allocator.page_tokens)
        self.generated: dict[int, int] = {}

    def admit(self, request: int, generated: int, alone: bool) -> bool:
        prompt, samples = int(self.workload.prompt_tokens[request]), int(self.workload.samples[request])
        pages = self.allocator.request_pages(prompt, generated + 1, samples)
        if pages + (0 if alone else self.allocator.watermark_pages) > self.pool.free_pages:
            return False
        free = self.pool.free_pages
        self.pool.allocate((request, 0), tokens=prompt)
        for sample in range(1, samples):
            if self.allocator.sharing:
                self.pool.fork((request, 0), (request, sample))
            else:
                self.pool.allocate((request, sample), tokens=prompt)
        for sample in range(samples):
            for _ in range(generated + 1):
                self.pool.append((request, sample))
        if free - self.pool.free_pages != pages:
            raise RuntimeError(f"request {request} took {free - self.pool.free_pages} pages: expected {pages}")
        self.generated[request] = generated + 1
        return True

    def remove(self, request: int) -> None:
        for sample in range(int(self.workload.samples[request])):
            self.pool.release((request, sample))
        del self.generated[request]

    def append(self, request: int) -> bool:
        samples = [(request, sample) for sample in range(int(self.workload.samples[request]))]
        # After the first token no sample shares its last page, so their needs add up.
        if sum(map(self.pool.pages_to_append, samples)) > self.pool.free_pages:
            return False
        for sample in samples:
            self.pool.append(sample)
        self.generated[request] += 1
        return True

    def check(self) -> None:
        self.pool.check()

    def states(self, waiting: bool) -> tuple[int, ...]:
        page = self.allocator.page_tokens
        used = self.pool.used_tokens
        reserved = internal = 0
        for request, generated in self.generated.items():
            left = int(self.workload.output_tokens[request]) - generated
            for sample in range(int(self.workload.samples[request])):
                empty = -self.pool.tokens[request, sample] % page
                reserved += min(empty, left)
                internal += empty - min(empty, left)
        external = self.pool_tokens - self.pool.pages * page
        return used, reserved, internal, external, self.pool.free_pages * page


def _walk(workload: Workload, allocator: Allocator, pool_tokens: int, max_tokens: int) -> CacheRun:
    _check_fits(workload, allocator, pool_tokens, max_tokens)
    server: _ChunkServer | _PageServer
    if isinstance(allocator, Paged):
        server = _PageServer(workload, allocator, pool_tokens)
    else:
        server = _ChunkServer(workload, allocator, pool_tokens, max_tokens)
    arrivals, outputs = workload.arrival_step.tolist(), workload.output_tokens.tolist()
    generated, start_step, finish_step = [0] * len(arrivals), [-1] * len(arrivals), [-1] * len(arrivals)
    coming, queue, batch = list(reversed(range(len(arrivals)))), list[int](), list[int]()
    finished = preemptions = 0
    records: list[tuple[int, ...]] = []
    step = arrivals[0]
    while True:
        for request in [request for request in batch if generated[request] == outputs[request]]:
            server.remove(request)
            batch.remove(request)
            finish_step[request] = step - 1
            finished += 1
        if finished == len(arrivals):
            break
        grown = 0
        while grown < len(batch):
            if server.append(batch[grown]):
                generated[batch[grown]] += 1
                grown += 1
            else:
                latest = batch.pop()
                server.remove(latest)
                queue.insert(0, latest)
                preemptions += 1
        while coming and arrivals[coming[-1]] <= step:
            queue.append(coming.pop())
        while queue and server.admit(queue[0], generated[queue[0]], alone=not batch):
            request = queue.pop(0)
            batch.append(request)
            generated[request] += 1
            if start_step[request] < 0:
                start_step[request] = step
        server.check()
        states = server.states(bool(queue))
        if sum(states) != pool_tokens or min(states) < 0:
            raise RuntimeError(f"slots {dict(zip(STATES, states, strict=True))}: expected {pool_tokens} in all")
        sequences = sum(int(workload.samples[request]) for request in batch)
        records.append((step, *states, len(batch), sequences, len(queue), finished, preemptions))
        step += 1
    names = ("step", *STATES, "running", "sequences", "waiting", "finished", "preempted")
    columns = dict(zip(names, np.array(records, dtype=np.int64).T, strict=True))
    waited = columns["waiting"] > 0
    return CacheRun(
        allocator=allocator,
        workload=workload,
        pool_tokens=pool_tokens,
        **columns,
        start_step=np.array(start_step, dtype=np.int64),
        finish_step=np.array(finish_step, dtype=np.int64),
        steps=len(records),
        waiting_steps=int(waited.sum()),
        token_steps={state: int(columns[state].sum()) for state in STATES},
        token_steps_while_waiting={state: int(columns[state][waited].sum()) for state in STATES},
        request_steps=int(columns["running"].sum()),
        request_steps_while_waiting=int(columns["running"][waited].sum()),
    )
