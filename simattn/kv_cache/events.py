"""Serving from event to event: admissions, departures, preemptions, and entries into last pages.

The rules are those of :mod:`simattn.kv_cache.simulation`. Between two events every running sequence grows by a token a
step, so that all sums over the steps have closed forms.
"""

from __future__ import annotations

import heapq
from itertools import accumulate
from typing import Protocol

import numpy as np

from simattn.kv_cache.allocators import Allocator, Buddy, Paged, Reserve, allocate_chunks, chunk_pool
from simattn.kv_cache.result import STATES, CacheRun
from simattn.kv_cache.workload import Workload


class _Account(Protocol):
    """Sums over the running requests, and what an allocator can still take.

    ``held`` are the slots taken, ``rounding`` those of them beyond reservations, ``internal`` those that their
    requests never use; ``unusable`` slots are never taken. ``contiguous`` says that a request's slots must be.
    """

    contiguous: bool
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

    def tail_step(self, request: int) -> int:
        """Return the step in which a running request enters its last page; a past one if it has none."""

    def enter_tail(self, request: int) -> None:
        """Count the slots of its last pages that a request never uses."""

    def advance(self, step: int, steps: int) -> tuple[int, int]:
        """Grow all requests from a step by up to ``steps`` steps while there are pages; return the steps and Σ held."""

    def lacks(self, step: int) -> bool:
        """Say whether the pages do not suffice for growing into a step."""

    def grow(self, step: int) -> None:
        """Grow all requests into a step."""


class _ChunkAccount:
    """Contiguous chunks, one for every sample: nothing changes between admissions and departures."""

    contiguous = True

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

    def tail_step(self, request: int) -> int:
        return -1

    def enter_tail(self, request: int) -> None:
        raise AssertionError("chunks have no last pages")

    def lacks(self, step: int) -> bool:
        return False

    def grow(self, step: int) -> None:
        self.used += self.sequences


class _PageAccount:
    """Pages by count.

    All running sequences get one token in every step. So one that enters a page in step t enters the next in step
    t + page_tokens, and the pages that a step takes depend on nothing but its phase, t modulo page_tokens.
    """

    contiguous = False

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
        if self.tail_step(request) <= step:
            self.enter_tail(request)
        return True

    def remove(self, request: int, step: int) -> None:
        generated = step - 1 - self.birth[request]
        pages = self.allocator.request_pages(self.prompt[request], generated, self.samples[request])
        self._count(request, -1, generated, pages)
        if self.tail_step(request) < step:
            self.internal -= self._tail_tokens(request)
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
        full = (self.prompt[request] + self.output[request] - 1) // self.page * self.page
        return self.birth[request] + full + 1 - self.prompt[request]

    def enter_tail(self, request: int) -> None:
        self.internal += self._tail_tokens(request)

    def _tail_tokens(self, request: int) -> int:
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


_LEAVES, _ENTERS_TAIL = 0, 1
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


class _Server:
    """The queue, the batch, and the events to come.

    The queue is the preempted requests and, behind them, those that arrived and were never admitted, from
    ``next_new`` on: it is in the order of arrival, as is the batch before it.
    """

    def __init__(self, workload: Workload, account: _Account) -> None:
        self.account = account
        self.arrivals: list[int] = workload.arrival_step.tolist()
        self.outputs: list[int] = workload.output_tokens.tolist()
        self.requests = len(self.arrivals)
        self.start_step = [-1] * self.requests
        self.finish_step = [-1] * self.requests
        self.generated = [0] * self.requests  # before the last preemption
        self.admitted_in = [-1] * self.requests  # step of a running request's last admission, else -1
        # Step, kind, request, and the step of the admission it belongs to: void if that was ended by a preemption.
        self.events: list[tuple[int, int, int, int]] = []
        self.admissions: list[tuple[int, int]] = []  # request and step, the last at the end; some have ended
        self.preempted: list[int] = []  # the first to be readmitted at the end
        self.next_new = self.arrived = self.running = self.finished = self.preemptions = 0
        self.step = self.arrivals[0] - 1

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self.arrived - self.next_new + len(self.preempted)

    def next_event(self) -> int:
        """Return the step of the next event other than a lack of pages."""
        events, admitted_in = self.events, self.admitted_in
        while events and admitted_in[events[0][2]] != events[0][3]:
            heapq.heappop(events)
        arrives = self.next_new < self.requests and not self.waiting  # else an arrival changes nothing but the queue
        if arrives and events:
            return min(events[0][0], self.arrivals[self.next_new])
        return events[0][0] if events else self.arrivals[self.next_new]

    def take_step(self) -> None:
        """Do what happens in the current step, in the order of the rules."""
        self.leave()
        while self.account.lacks(self.step):
            self.preempt()
        self.account.grow(self.step)
        for request in self.due(_ENTERS_TAIL):
            self.account.enter_tail(request)
        while self.arrived < self.requests and self.arrivals[self.arrived] <= self.step:
            self.arrived += 1
        self.admit()

    def due(self, kind: int) -> list[int]:
        """Return the running requests that have an event of a kind in this step."""
        found = []
        while self.events and self.events[0][:2] == (self.step, kind):
            _, _, request, admitted = heapq.heappop(self.events)
            if self.admitted_in[request] == admitted:
                found.append(request)
        return found

    def leave(self) -> None:
        """Remove the requests that have all their tokens."""
        for request in self.due(_LEAVES):
            self.account.remove(request, self.step)
            self.admitted_in[request] = -1
            self.finish_step[request] = self.step - 1
            self.running -= 1
            self.finished += 1

    def preempt(self) -> None:
        """Move the request that was admitted last to the head of the queue."""
        request, admitted = self.admissions.pop()
        while self.admitted_in[request] != admitted:
            request, admitted = self.admissions.pop()
        self.account.remove(request, self.step)
        self.generated[request] += self.step - admitted
        self.admitted_in[request] = -1
        self.preempted.append(request)
        self.running -= 1
        self.preemptions += 1

    def admit(self) -> None:
        """Admit requests from the head of the queue while they fit."""
        while self.preempted or self.next_new < self.arrived:
            request = self.preempted[-1] if self.preempted else self.next_new
            generated = self.generated[request]
            if not self.account.admit(request, generated, self.step, alone=not self.running):
                break
            if self.preempted:
                self.preempted.pop()
            else:
                self.next_new += 1
                self.start_step[request] = self.step
            self.admitted_in[request] = self.step
            self.admissions.append((request, self.step))
            self.running += 1
            leaves = self.step + self.outputs[request] - generated
            heapq.heappush(self.events, (leaves, _LEAVES, request, self.step))
            tail = self.account.tail_step(request)
            if tail > self.step:
                heapq.heappush(self.events, (tail, _ENTERS_TAIL, request, self.step))


def serve_by_events(workload: Workload, allocator: Allocator, pool_tokens: int, max_tokens: int) -> CacheRun:
    """Return the run, the steps of its events recorded."""
    account: _Account
    if isinstance(allocator, Paged):
        account = _PageAccount(workload, allocator, pool_tokens)
    else:
        account = _ChunkAccount(workload, allocator, pool_tokens, max_tokens)
    server = _Server(workload, account)
    sums = {False: _Sums(), True: _Sums()}  # by whether a request waits
    records: list[tuple[int, ...]] = []
    while server.finished < server.requests:
        entered = sums[server.waiting > 0]
        used, sequences = account.used, account.sequences
        steps, held_sum = account.advance(server.step, server.next_event() - server.step - 1)
        entered.used += steps * used + sequences * (steps * (steps + 1) // 2)
        entered.held += held_sum
        _add(entered, account, server, steps)
        server.step += steps + 1
        server.take_step()
        if server.finished < server.requests:
            waiting = server.waiting
            entered = sums[waiting > 0]
            entered.used += account.used
            entered.held += account.held
            _add(entered, account, server, 1)
            records.append(
                (
                    server.step,
                    account.used,
                    account.held,
                    account.rounding,
                    account.internal,
                    server.running,
                    account.sequences,
                    waiting,
                    server.finished,
                    server.preemptions,
                )
            )

    columns = dict(zip(_RECORDED, np.array(records, dtype=np.int64).T, strict=True))
    held, rounding = columns.pop("held"), columns.pop("rounding")
    free = pool_tokens - account.unusable - held
    wasted = np.where(columns["waiting"] > 0, free, 0) if account.contiguous else np.zeros_like(free)
    by_state = {
        waits: entered.by_state(pool_tokens, account.unusable, waits and account.contiguous)
        for waits, entered in sums.items()
    }
    return CacheRun(
        allocator=allocator,
        workload=workload,
        pool_tokens=pool_tokens,
        **columns,
        reserved=held - rounding - columns["internal"] - columns["used"],
        external=rounding + account.unusable + wasted,
        free=free - wasted,
        start_step=np.array(server.start_step, dtype=np.int64),
        finish_step=np.array(server.finish_step, dtype=np.int64),
        steps=sums[False].steps + sums[True].steps,
        waiting_steps=sums[True].steps,
        token_steps={state: by_state[False][state] + by_state[True][state] for state in STATES},
        token_steps_while_waiting=by_state[True],
        request_steps=sums[False].requests + sums[True].requests,
        request_steps_while_waiting=sums[True].requests,
    )


def _add(sums: _Sums, account: _Account, server: _Server, steps: int) -> None:
    """Add what is the same in each of some steps."""
    sums.steps += steps
    sums.rounding += steps * account.rounding
    sums.internal += steps * account.internal
    sums.requests += steps * server.running
