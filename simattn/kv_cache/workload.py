"""Streams of requests: drawn from distributions with a seed, or read from a trace."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from simattn.kv_cache.checks import LIMIT, Integers, checked_count, checked_integers, checked_number

DEFAULT_MAX_TOKENS = 2048
"""Maximum length of a sequence, prompt and output: that of OPT and of LLaMA."""

REQUIRED_COLUMNS = ("arrival_step", "prompt_tokens", "output_tokens")
OPTIONAL_COLUMNS = ("samples",)


# Distributions of lengths


@dataclass(frozen=True)
class Constant:
    """Every length is ``tokens``.

    Raises
    ------
    ValueError, TypeError
        If it is not an integer of at least 1.
    """

    tokens: int

    def __post_init__(self) -> None:
        checked_count("tokens", self.tokens)

    def draw(self, generator: np.random.Generator, count: int) -> Integers:
        """Return ``count`` lengths."""
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True)
class Uniform:
    """Lengths from ``low`` to ``high``, both included, equally likely.

    Raises
    ------
    ValueError, TypeError
        If they are not integers of at least 1, or ``high`` is below ``low``.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        checked_count("high", self.high, least=checked_count("low", self.low))

    def draw(self, generator: np.random.Generator, count: int) -> Integers:
        """Return ``count`` lengths."""
        return generator.integers(self.low, self.high, size=count, endpoint=True)


@dataclass(frozen=True)
class Geometric:
    """Lengths from 1 of the given mean, where each further token is as likely as the one before.

    Raises
    ------
    ValueError, TypeError
        If the mean is not a number above 1.
    """

    mean: float

    def __post_init__(self) -> None:
        checked_number("mean", self.mean, least=1.0)

    def draw(self, generator: np.random.Generator, count: int) -> Integers:
        """Return ``count`` lengths."""
        return generator.geometric(1 / self.mean, size=count)


@dataclass(frozen=True)
class Lognormal:
    """Lengths whose logarithm is normally distributed, rounded to the nearest integer and at least 1.

    Attributes
    ----------
    mean
        Mean before rounding.
    variation
        Standard deviation over mean.

    Raises
    ------
    ValueError, TypeError
        If a number is not above 0.
    """

    mean: float
    variation: float = 1.0

    def __post_init__(self) -> None:
        checked_number("mean", self.mean)
        checked_number("variation", self.variation)

    def draw(self, generator: np.random.Generator, count: int) -> Integers:
        """Return ``count`` lengths."""
        variance = math.log1p(self.variation**2)
        lengths = generator.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), size=count)
        # Longer ones are cut to a model's maximum anyway.
        return np.clip(np.rint(lengths), 1, LIMIT).astype(np.int64)


Lengths = Constant | Uniform | Geometric | Lognormal


# Arrivals


@dataclass(frozen=True)
class Poisson:
    """Arrivals at random, ``rate`` a step on average.

    Raises
    ------
    ValueError, TypeError
        If the rate is not a number above 0.
    """

    rate: float

    def __post_init__(self) -> None:
        checked_number("rate", self.rate)


# Workloads


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in the order of their arrival.

    Attributes
    ----------
    arrival_step
        Step in which each request arrives, from 0, never decreasing; int64, shape (requests,).
    prompt_tokens
        Tokens of its prompt, at least 1; int64, shape (requests,).
    output_tokens
        Tokens that each of its samples generates, at least 1; int64, shape (requests,).
    samples
        Sequences that continue its prompt in parallel, at least 1; int64, shape (requests,). Default 1 for all.

    Raises
    ------
    ValueError, TypeError
        If there is no request, the lengths differ, a value is out of range, or the arrivals decrease.
    """

    arrival_step: Integers
    prompt_tokens: Integers
    output_tokens: Integers
    samples: Integers = None  # type: ignore[assignment]  # an array from __post_init__ on

    def __post_init__(self) -> None:
        if self.samples is None:
            object.__setattr__(self, "samples", np.ones(np.shape(self.arrival_step), dtype=np.int64))
        for entry in fields(self):
            least = 0 if entry.name == "arrival_step" else 1
            object.__setattr__(self, entry.name, checked_integers(entry.name, getattr(self, entry.name), least=least))
        sizes = {entry.name: getattr(self, entry.name).size for entry in fields(self)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"columns have the lengths {sizes}: expected one length")
        if not self.arrival_step.size:
            raise ValueError("the workload has no requests: expected at least one")
        if falls := np.flatnonzero(np.diff(self.arrival_step) < 0).tolist():
            raise ValueError(
                f"arrival_step[{falls[0] + 1}]={self.arrival_step[falls[0] + 1]}: "
                f"expected at least {self.arrival_step[falls[0]]}, the step of the request before"
            )

    def __len__(self) -> int:
        return int(self.arrival_step.size)


def generate_workload(
    requests: int,
    *,
    prompt: Lengths | Sequence[int],
    output: Lengths | Sequence[int],
    arrivals: Poisson | Sequence[int] | None = None,
    samples: int | Sequence[int] = 1,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    seed: int = 0,
) -> Workload:
    """Draw a stream of requests; the same arguments give the same stream.

    Parameters
    ----------
    requests
        Number of requests.
    prompt, output
        Distributions of the lengths, or one length for each request. Drawn lengths are cut to what the model can
        take, the prompt first: prompts to ``max_tokens`` - 1, outputs to ``max_tokens`` - prompt. Given ones, and a
        :class:`Constant`, are not.
    arrivals
        None for all in step 0; :class:`Poisson`; or the step of each request, never decreasing.
    samples
        Sequences that continue each prompt: one number, or one for each request.
    max_tokens
        Maximum length of a sequence, prompt and output.
    seed
        Seed of the generator.

    Returns
    -------
    Workload
        Prompts, outputs and arrivals are drawn from independent generators, so that changing one leaves the others.

    Raises
    ------
    ValueError, TypeError
        If a number is out of range, a list has another length than ``requests``, or a given length does not fit
        ``max_tokens``.
    """
    checked_count("requests", requests)
    checked_count("max_tokens", max_tokens, least=2)
    generators = [np.random.default_rng((checked_count("seed", seed, least=0), stream)) for stream in range(3)]

    def lengths(name: str, given: Lengths | Sequence[int], generator: np.random.Generator, most: Any) -> Integers:
        if isinstance(given, Lengths):
            drawn = given.draw(generator, requests)
            fitting: Integers = drawn if isinstance(given, Constant) else np.minimum(drawn, most)
            return fitting
        return _listed(name, given, requests, least=1)

    prompts = lengths("prompt", prompt, generators[0], max_tokens - 1)
    outputs = lengths("output", output, generators[1], max_tokens - prompts)
    if isinstance(arrivals, Poisson):
        times = np.cumsum(generators[2].exponential(1 / arrivals.rate, requests))
        if times[-1] >= LIMIT:
            raise ValueError(f"arrivals={arrivals}: expected a rate at which all arrive before step 2^62")
        arrival_steps = np.floor(times).astype(np.int64)
    elif arrivals is None:
        arrival_steps = np.zeros(requests, dtype=np.int64)
    else:
        arrival_steps = _listed("arrivals", arrivals, requests, least=0)
    if isinstance(samples, (int, np.integer)):
        counts = np.full(requests, checked_count("samples", samples), dtype=np.int64)
    else:
        counts = _listed("samples", samples, requests, least=1)
    workload = Workload(arrival_steps, prompts, outputs, counts)
    check_lengths(workload, max_tokens)
    return workload


def check_lengths(workload: Workload, max_tokens: int) -> None:
    """Raise a ValueError if a request is longer than a model's maximum."""
    totals = workload.prompt_tokens + workload.output_tokens
    if (longest := int(totals.max())) > max_tokens:
        raise ValueError(
            f"request {int(totals.argmax())} has {longest} tokens, prompt and output: "
            f"expected at most max_tokens={max_tokens}"
        )


def _listed(name: str, values: Sequence[int], requests: int, *, least: int) -> Integers:
    listed = checked_integers(name, values, least=least)
    if listed.size != requests:
        raise ValueError(f"{name} has {listed.size} values: expected one for each of requests={requests}")
    return listed


_DISTRIBUTIONS: dict[str, tuple[Callable[..., Lengths], tuple[Callable[[str], Any], ...], int]] = {
    "constant": (Constant, (int,), 1),
    "uniform": (Uniform, (int, int), 2),
    "geometric": (Geometric, (float,), 1),
    "lognormal": (Lognormal, (float, float), 1),
}


def parse_lengths(text: str, *, name: str = "lengths") -> Lengths:
    """Return the distribution that a text names.

    Parameters
    ----------
    text
        ``constant:TOKENS``, ``uniform:LOW,HIGH``, ``geometric:MEAN`` or ``lognormal:MEAN[,VARIATION]``.
    name
        What messages call it.

    Raises
    ------
    ValueError
        If it is none of them, or a number is out of range.
    """
    kind_of, _, numbers = text.partition(":")
    parts = numbers.split(",")
    if kind_of in _DISTRIBUTIONS:
        make, types, fewest = _DISTRIBUTIONS[kind_of]
        if fewest <= len(parts) <= len(types):
            try:
                values = [kind(part) for kind, part in zip(types, parts, strict=False)]
            except ValueError:
                pass
            else:
                try:
                    return make(*values)
                except ValueError as error:
                    raise ValueError(f"{name}={text!r}: {error}") from None
    raise ValueError(
        f"{name}={text!r}: expected constant:TOKENS, uniform:LOW,HIGH, geometric:MEAN or lognormal:MEAN[,VARIATION]"
    )


# Traces


def read_trace(path: str | os.PathLike[str]) -> Workload:
    """Read requests from a file of comma-separated values.

    Parameters
    ----------
    path
        A file in UTF-8 whose first line names the columns ``arrival_step``, ``prompt_tokens``, ``output_tokens`` and,
        if wanted, ``samples``, in any order. Every further line is one request; arrivals never decrease. Blank lines
        are skipped.

    Raises
    ------
    ValueError
        If the file is not such a one; the message names the file, the line and what was expected.
    OSError
        If it cannot be read.
    """
    name = os.fspath(path)
    known = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
    columns: dict[str, list[int]] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.reader(file)
            header = [entry.strip() for entry in next(reader, [])]
            if not set(REQUIRED_COLUMNS) <= set(header) <= set(known) or len(set(header)) < len(header):
                raise ValueError(
                    f"{name}, line 1: found the columns {','.join(header) or '(none)'}: expected "
                    f"{','.join(REQUIRED_COLUMNS)} and optionally {','.join(OPTIONAL_COLUMNS)}, each once"
                )
            columns = {column: [] for column in header}
            for row in reader:
                if row:
                    _read_request(columns, row, f"{name}, line {reader.line_num}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{name}: {error}: expected comma-separated values in UTF-8") from error
    if not columns["arrival_step"]:
        raise ValueError(f"{name}, line 1: found no request after it: expected at least one")
    return Workload(**{column: np.array(values, dtype=np.int64) for column, values in columns.items()})


def _read_request(columns: dict[str, list[int]], row: Sequence[str], where: str) -> None:
    """Append a request's values to the columns."""
    if len(row) != len(columns):
        raise ValueError(f"{where}: found {len(row)} values: expected {len(columns)}, one for each column")
    for (column, values), text in zip(columns.items(), row, strict=True):
        least = 0 if column == "arrival_step" else 1
        stripped = text.strip()
        digits = stripped.isascii() and stripped.isdigit() and len(stripped) < 20
        if not (digits and least <= int(stripped) < LIMIT):
            raise ValueError(f"{where}: found {column}={text!r}: expected an integer of at least {least}, below 2^52")
        if column == "arrival_step" and values and int(stripped) < values[-1]:
            raise ValueError(f"{where}: found arrival_step={stripped}: expected at least {values[-1]}, as before")
        values.append(int(stripped))


def write_trace(workload: Workload, path: str | os.PathLike[str]) -> None:
    """Write requests as :func:`read_trace` reads them; ``samples`` only if a request has more than one.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    names = [*REQUIRED_COLUMNS, *(OPTIONAL_COLUMNS if workload.samples.max() > 1 else ())]
    rows: Iterable[Iterable[int]] = zip(*(getattr(workload, name).tolist() for name in names), strict=True)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
