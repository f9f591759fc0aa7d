"""Serving step by step with actual chunks and block tables, which are checked after each step.

The rules are those of :mod:`simattn.kv_cache.simulation`. Everything is counted afresh in every step, as an oracle for
the counts by events.
"""

from __future__ import annotations

import numpy as np

from simattn.kv_cache.allocators import (
    Allocator,
    Buddy,
    Paged,
    PagedPool,
    Reserve,
    allocate_chunks,
    chunk_pool,
)
from simattn.kv_cache.result import STATES, CacheRun
from simattn.kv_cache.workload import Workload


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


def serve_by_steps(workload: Workload, allocator: Allocator, pool_tokens: int, max_tokens: int) -> CacheRun:
    """Return the run, every step recorded.

    Raises
    ------
    RuntimeError
        If an invariant of the chunks, the block tables or the states of the slots does not hold.
    """
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
