"""What a run of an allocator gives: slots by state over time, and their shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from simattn.kv_cache.allocators import Allocator, Paged
from simattn.kv_cache.checks import Integers
from simattn.kv_cache.workload import Workload
from simattn.tables import text_table

STATES = ("used", "reserved", "internal", "external", "free")
"""What a token slot can be; see :class:`CacheRun`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheRun:
    """How an allocator's pool was filled while a workload was served.

    Every slot of the pool is in one of five states, those of Figure 2 of Kwon et al. 2023 and free ones:

    used
        It holds the keys and values of a token.
    reserved
        It is set aside for a token that its request will still generate.
    internal
        It is set aside for a request that will never use it: internal fragmentation, known only when the request
        ends. The reservation beyond the actual length, or the rest of a last page.
    external
        The allocator keeps it from every request, which is known before: external fragmentation. The rounding of a
        reservation to a chunk; the end of the pool, smaller than a chunk or page; and, for contiguous chunks, all
        free slots while a request waits, since its chunks do not fit in them.
    free
        None of these. While a request waits for pages, free ones are free: running requests take them.

    Attributes
    ----------
    allocator, workload
        What was run.
    pool_tokens
        Token slots of the pool.
    step
        Steps at which something changed, or every step; int64, shape (changes,). In between, the number of used slots
        grows by ``sequences`` a step.
    used, reserved, internal, external, free
        Slots in each state at the end of those steps; int64, shape (changes,). Their sum is ``pool_tokens``.
    running, sequences, waiting, finished, preempted
        Requests in the batch, their sequences, requests in the queue, requests finished so far, and preemptions so far,
        at the end of those steps; int64, shape (changes,).
    start_step, finish_step
        First and last step of each request in the batch; int64, shape (requests,).
    steps
        Steps from the first arrival to the last token.
    waiting_steps
        Those of them at whose end a request was waiting.
    token_steps, token_steps_while_waiting
        Sums of the slots in each state over all steps, and over those in which a request was waiting.
    request_steps, request_steps_while_waiting
        Sums of the requests in the batch over the same steps.
    """

    allocator: Allocator
    workload: Workload = field(repr=False)
    pool_tokens: int
    step: Integers
    used: Integers
    reserved: Integers
    internal: Integers
    external: Integers
    free: Integers
    running: Integers
    sequences: Integers
    waiting: Integers
    finished: Integers
    preempted: Integers
    start_step: Integers
    finish_step: Integers
    steps: int
    waiting_steps: int
    token_steps: Mapping[str, int]
    token_steps_while_waiting: Mapping[str, int]
    request_steps: int
    request_steps_while_waiting: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            elif isinstance(value, Mapping):
                object.__setattr__(self, name, MappingProxyType(dict(value)))

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pool in each state, averaged over all steps."""
        return {state: self.token_steps[state] / (self.pool_tokens * self.steps) for state in STATES}

    @property
    def saturated_shares(self) -> dict[str, float]:
        """Share of the pool in each state, averaged over the steps in which a request was waiting.

        Raises
        ------
        ValueError
            If none ever waited.
        """
        steps = self._saturated_steps()
        return {state: self.token_steps_while_waiting[state] / (self.pool_tokens * steps) for state in STATES}

    @property
    def mean_batch(self) -> float:
        """Requests in the batch, averaged over all steps."""
        return self.request_steps / self.steps

    @property
    def saturated_mean_batch(self) -> float:
        """Requests in the batch, averaged over the steps in which a request was waiting.

        Raises
        ------
        ValueError
            If none ever waited.
        """
        return self.request_steps_while_waiting / self._saturated_steps()

    @property
    def peak_batch(self) -> int:
        """Most requests in the batch at once."""
        return int(self.running.max())

    @property
    def preemptions(self) -> int:
        """How often a request was preempted."""
        return int(self.preempted[-1])

    def _saturated_steps(self) -> int:
        if not self.waiting_steps:
            raise ValueError("no request ever waited: expected a workload that fills the pool")
        return self.waiting_steps

    def row(self) -> dict[str, str | int | float | None]:
        """Return the summary as one flat row; the saturated shares are None if no request ever waited."""
        saturated = self.saturated_shares if self.waiting_steps else dict.fromkeys(STATES)
        return {
            "allocator": self.allocator.name,
            "page_tokens": self.allocator.page_tokens if isinstance(self.allocator, Paged) else None,
            "pool_tokens": self.pool_tokens,
            "requests": len(self.workload),
            "steps": self.steps,
            "waiting_steps": self.waiting_steps,
            "mean_batch": self.mean_batch,
            "saturated_mean_batch": self.saturated_mean_batch if self.waiting_steps else None,
            "peak_batch": self.peak_batch,
            "preemptions": self.preemptions,
            **{f"{state}_share": share for state, share in self.shares.items()},
            **{f"saturated_{state}_share": share for state, share in saturated.items()},
        }

    def rows(self) -> list[dict[str, int]]:
        """Return one flat row for each recorded step."""
        names = ("step", *STATES, "running", "sequences", "waiting", "finished", "preempted")
        columns = [getattr(self, name).tolist() for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def __repr__(self) -> str:
        return runs_text((self,))


class CacheRuns(tuple[CacheRun, ...]):
    """Runs of several allocators on one workload; the repr is a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        return runs_text(self)


def allocator_text(allocator: Allocator) -> str:
    """Return an allocator's name, and the size of its pages."""
    return f"{allocator.name}, pages of {allocator.page_tokens}" if isinstance(allocator, Paged) else allocator.name


def runs_text(runs: tuple[CacheRun, ...]) -> str:
    """Return a table with a row for every run: its batches, and its shares of the pool."""
    if not runs:
        return "no runs"
    heads = ("allocator", "steps", "mean batch", "peak", "preempted", *STATES)
    lines = [f"{len(runs[0].workload):,} requests, pool of {runs[0].pool_tokens:,} tokens"]
    for title, saturated in (("all steps", False), ("steps in which a request waited", True)):
        chosen = [run for run in runs if run.waiting_steps or not saturated]
        if not chosen:
            lines.append("no request ever waited")
            continue
        body = []
        for run in chosen:
            shares: Mapping[str, Any] = run.saturated_shares if saturated else run.shares
            body.append(
                (
                    allocator_text(run.allocator),
                    f"{run.waiting_steps if saturated else run.steps:,}",
                    f"{run.saturated_mean_batch if saturated else run.mean_batch:.2f}",
                    f"{run.peak_batch:,}",
                    f"{run.preemptions:,}",
                    *(f"{100 * shares[state]:.1f} %" for state in STATES),
                )
            )
        lines += [f"Shares of the pool, {title}", text_table(heads, body)]
    return "\n".join(lines)
