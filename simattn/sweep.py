"""Sweeps: count every point of a grid, on one machine or many, resumable after an interruption.

::

    sweep(["flash1", "flash2"], q_len=[1 << 14, 1 << 20], causal=[False, True], output="q_len.jsonl")

The output file
---------------
JSON Lines. The first line is a header: format name, format version, version of the package that counts, and
the grid the file was begun with. Every further line is one finished point: its key (a digest of all its
arguments, defaults filled in), its arguments and its results. Lines are appended in the order in which points
finish; what `sweep` returns is in grid order all the same. Three rules make a file resumable:

* A line is written whole, in one append, and only after its point has finished. What follows the last newline
  is therefore an interrupted write, and is cut off before the next append. Every other irregularity (an
  unreadable line, a key that does not match its arguments, a key that occurs twice) is an error.
* Points are looked up by key, not by position, so a grid can be extended, shrunk or reordered between calls.
  Rows that are not in the present grid stay in the file.
* One sweep at a time holds the file, under a lock that the operating system drops when the process ends,
  however it ends. A stale lock cannot exist.

Rows reach the operating system at once, so a killed process loses none; they are forced to the disk every few
seconds, which is what a power failure can cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import numbers
import os
import reprlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np

from simattn.algorithms import get_algorithm
from simattn.api import profile
from simattn.tables import csv_text, text_table

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["SweepResult", "read_rows", "sweep", "write_csv"]

Row: TypeAlias = dict[str, Any]
OnError: TypeAlias = Literal["raise", "row"]
_ChunkResult: TypeAlias = tuple[list[Row], float]

_FORMAT = "simattn sweep"
_FORMAT_VERSION = 1
# A file without a single newline is an interrupted header only if it agrees with these bytes: anything else
# is somebody's file, and must not be cut.
_HEADER_START = json.dumps({"format": _FORMAT, "version": _FORMAT_VERSION})[:-1].encode()
_EXPECTED_HEADER = f"the header of a sweep file, {_HEADER_START.decode()}, …}}"

# Handing a task to another process costs about 0.2 ms, to a Dask worker about 3 ms, and a count takes about
# 1 ms: chunks of this duration make that cost small, and are still short beside a grid worth spreading.
_CHUNK_SECONDS = 0.05
_CHUNK_POINTS = 256
# A chunk that takes longer than expected hands back the rest: this bounds what a killed sweep counts again.
_CHUNK_LIMIT_SECONDS = 0.5
# Enough chunks to occupy a machine while the first results tell how large the others should be; if none comes
# in this time, points are slow, and the size of chunks hardly matters.
_PROBE_CHUNKS = 32
_PROBE_SECONDS = 0.2
_SYNC_SECONDS = 5.0

_SHOWN_ROWS = 20

_TRAFFIC_COLUMNS = (
    "hbm_read_bytes",
    "hbm_write_bytes",
    "hbm_reduce_bytes",
    "hbm_bytes",
    "sram_read_bytes",
    "sram_write_bytes",
)
_RUN_COLUMNS = ("peak_sram_bytes", "peak_register_bytes", "peak_hbm_bytes")
_OPERATION_COLUMNS = ("matmul_flops", "vector_flops", "exponentials")


class SweepResult(list[Row]):
    """The rows of a sweep: a list of flat dictionaries, whose repr is a table.

    Every value is a JSON value, and a row read back from a file equals the row as it was counted.
    """

    def column(self, name: str) -> list[Any]:
        """Return one column, with None in the rows that lack it.

        Parameters
        ----------
        name
            A key of at least one row.

        Returns
        -------
        list
            One value per row.
        """
        if self and not any(name in row for row in self):
            raise KeyError(f"{name=}: expected one of {', '.join(_columns(self))}")
        return [row.get(name) for row in self]

    def __repr__(self) -> str:
        # Arguments that never change tell rows apart no better than the call does.
        names = [
            name
            for name in _columns(self)
            if name in ("algorithm", *_TRAFFIC_COLUMNS) or any(row.get(name) != self[0].get(name) for row in self)
        ]
        body = [[_cell(row.get(name)) for name in names] for row in self[:_SHOWN_ROWS]]
        left_out = f"\n… {len(self) - _SHOWN_ROWS} more" if len(self) > _SHOWN_ROWS else ""
        return f"SweepResult, {len(self)} rows\n{text_table(names, body)}{left_out}"


def _columns(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def sweep(
    algorithm: str | Iterable[str] | None = None,
    *,
    grid: Sequence[Mapping[str, Any]] | None = None,
    output: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: bool | None = None,
    errors: OnError = "raise",
    max_in_flight: int = 512,
    **arguments: Any,
) -> SweepResult:
    r"""Count every point of a grid of arguments.

    Parameters
    ----------
    algorithm
        Name of an algorithm, or several names. May be left out when every entry of `grid` gives it.
    grid
        Arguments that vary together: a sequence of mappings from argument to value, e.g.
        ``[{"heads": 32, "kv_heads": 8}, {"heads": 64, "kv_heads": 8}]``. Each entry is a grid of its own,
        combined with `algorithm` and `arguments`, and its values may be axes too.
    output
        File that receives each row as it is finished. If it exists, its rows are reused and only the missing
        points are counted.
    executor
        Where points are counted: any `concurrent.futures.Executor`, such as a ``ProcessPoolExecutor``, or
        Dask's ``Client.get_executor()`` for a cluster whose workers have this package. It is left running.
        None counts in this process.
    progress
        Whether to show a progress bar on standard error; None shows it when that is a terminal.
    errors
        What becomes of a point that cannot be counted, e.g. because its tiles do not fit in `sram_bytes`
        (any ValueError). ``"raise"`` stops the sweep and keeps the rows that are finished: a mistake in the
        arguments cannot pass for a result. ``"row"`` puts the message in the row's ``error`` column and None
        in its counts: for grids that are meant to cross the limit of feasibility.
    max_in_flight
        Largest number of tasks given to `executor` at once; at least twice its workers keeps them all busy.
    **arguments
        Every argument of `simattn.count`, plan options included. A list, a range or a one-dimensional NumPy
        array is an axis of the grid. Anything else, a tuple such as ``window=(1023, 0)`` included, is one
        value.

    Returns
    -------
    SweepResult
        One row per point: all arguments, ``hbm_read_bytes``, ``hbm_write_bytes``, ``hbm_reduce_bytes``,
        ``hbm_bytes``, ``sram_read_bytes``, ``sram_write_bytes``, ``peak_sram_bytes``,
        ``peak_register_bytes``, ``peak_hbm_bytes``, ``matmul_flops``, ``vector_flops``, ``exponentials``,
        the plan's fields under ``plan_…``, and ``error``. The order is that of nested loops: entries of
        `grid`, then `algorithm`, then axes in the order in which they are given, the last one fastest.

    Raises
    ------
    TypeError, ValueError
        An argument that `simattn.count` does not have, an axis that is empty or lists a value twice, or an
        `output` that is no sweep file, is damaged, or was counted by another version.
    RuntimeError
        Another sweep holds `output`.
    """
    if errors not in ("raise", "row"):
        raise ValueError(f"{errors=}: expected 'raise' or 'row'")
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"{progress=}: expected True, False or None")
    if executor is not None and not isinstance(executor, Executor):
        raise TypeError(
            f"{executor=}: expected a concurrent.futures.Executor; that of a Dask client is client.get_executor()"
        )
    if not isinstance(max_in_flight, int) or max_in_flight < 1:
        raise ValueError(f"{max_in_flight=}: expected an integer of at least 1")

    points = _Grid(algorithm, grid, arguments)
    index_of_key = points.keys()
    rows: dict[int, Row] = {}
    with contextlib.ExitStack() as stack:
        file = None
        if output is not None:
            file = stack.enter_context(_RowFile(os.fspath(output), index_of_key))
            rows = {index_of_key[key]: row for key, row in file.found.items()}
            if errors == "raise":
                _raise_recorded_error(rows, file.path)
        advance = _progress_bar(stack, progress, total=len(index_of_key), done=len(rows))

        def record(finished: Sequence[_Point], results: Sequence[Row]) -> None:
            if file is not None:
                file.append(finished, results)
            for point, result in zip(finished, results, strict=True):
                rows[index_of_key[point.key]] = point.columns | result
            advance(len(results))

        missing = (point for point in points if index_of_key[point.key] not in rows)
        if executor is None:
            for point in missing:
                results, _ = _count_points([point.arguments], errors)
                record([point], results)
        else:
            _count_with_executor(
                executor,
                missing,
                record,
                n_missing=len(index_of_key) - len(rows),
                errors=errors,
                max_in_flight=max_in_flight,
            )
    return SweepResult(rows[index] for index in range(len(rows)))


def read_rows(path: str | os.PathLike[str]) -> SweepResult:
    """Read every finished row of a sweep's output file.

    The file may be in use: rows that are finished later are not seen.

    Parameters
    ----------
    path
        An `output` of `sweep`.

    Returns
    -------
    SweepResult
        The rows, in the order in which they were finished.

    Raises
    ------
    ValueError
        The file is no sweep file, or is damaged; names the line, what it holds and what was expected.
    """
    return SweepResult(_read("path", os.fspath(path)).rows.values())


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write rows as comma-separated values, one column for every key that occurs.

    Parameters
    ----------
    rows
        Rows of a sweep.
    path
        File to write; an existing one is replaced.
    """
    Path(path).write_text(csv_text(rows), encoding="utf-8", newline="")


# The grid --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Point:
    """One point: the arguments to count with, the same in JSON with defaults filled in, and their digest."""

    arguments: dict[str, Any]
    columns: Row
    key: str


class _Grid:
    """The points of a sweep in grid order, made anew on every iteration: a large grid takes no memory."""

    def __init__(
        self,
        algorithm: str | Iterable[str] | None,
        grid: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> None:
        parameters = inspect.signature(profile).parameters
        self._defaults = {
            name: None if parameter.default is parameter.empty else _json_value(name, parameter.default)
            for name, parameter in parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        }
        required = [name for name in self._defaults if parameters[name].default is inspect.Parameter.empty]

        shared = dict(arguments) if algorithm is None else {"algorithm": algorithm, **arguments}
        self._axes: list[dict[str, list[tuple[Any, Any]]]] = []
        for position, entry in enumerate(_grid_entries(grid)):
            for name in sorted(entry.keys() & shared.keys()):
                raise TypeError(
                    f"grid[{position}][{name!r}]={entry[name]!r}: "
                    f"expected no {name}, which is given for all points as {shared[name]!r}"
                )
            # The algorithm is the outermost loop, wherever it is given.
            given = {"algorithm": None, **entry, **shared}
            if given["algorithm"] is None:
                del given["algorithm"]
            for name in required:
                if name not in given:
                    raise TypeError(f"{name} is missing; expected a value or a list of values")
            axes = {name: _axis(name, value) for name, value in given.items()}
            for chosen, _ in axes["algorithm"]:
                # A misspelled name is a mistake even where infeasible points are rows.
                options = get_algorithm(chosen).own_arguments
                for name in sorted(given.keys() - self._defaults.keys() - set(options)):
                    raise TypeError(
                        f"{name}={reprlib.repr(given[name])}: no argument of {chosen}; "
                        f"expected one of {', '.join([*self._defaults, *options])}"
                    )
            self._axes.append(axes)

    def __iter__(self) -> Iterator[_Point]:
        for axes in self._axes:
            options = sorted(axes.keys() - self._defaults.keys())
            for values in itertools.product(*axes.values()):
                given = dict(zip(axes, values, strict=True))
                columns = self._defaults | {name: json_value for name, (_, json_value) in given.items()}
                # Options last and by name, so that columns do not depend on the order of the call.
                columns |= {name: columns.pop(name) for name in options}
                yield _Point({name: value for name, (value, _) in given.items()}, columns, _key(columns))

    def keys(self) -> dict[str, int]:
        """Return the position of each point by its key."""
        positions: dict[str, int] = {}
        for position, point in enumerate(self):
            if positions.setdefault(point.key, position) != position:
                raise ValueError(
                    f"grid: points {positions[point.key]} and {position} are the same, {point.arguments}; "
                    "expected every point once"
                )
        return positions


def _grid_entries(grid: Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    if grid is None:
        return [{}]
    if not isinstance(grid, Sequence) or isinstance(grid, str) or not all(isinstance(entry, Mapping) for entry in grid):
        raise TypeError(f"grid={reprlib.repr(grid)}: expected a list of mappings from argument to value")
    if not grid:
        raise ValueError("grid=[]: expected at least one mapping")
    return grid


def _axis(name: str, value: Any) -> list[tuple[Any, Any]]:
    """Return the values of one argument, each beside its JSON value."""
    if isinstance(value, (list, range)) or (isinstance(value, np.ndarray) and value.ndim == 1):
        values = value.tolist() if isinstance(value, np.ndarray) else list(value)
        if not values:
            raise ValueError(f"{name}={value!r}: expected at least one value")
    elif name == "algorithm" and not isinstance(value, str) and isinstance(value, Iterable):
        values = list(value)  # a registry or a tuple of names: no algorithm is itself a collection
        if not values:
            raise ValueError(f"{name}={value!r}: expected at least one name")
    else:
        values = [value]
    axis: list[tuple[Any, Any]] = []
    seen: set[str] = set()
    for item in values:
        # NumPy's integers wrap at 64 bits, and counts exceed that.
        plain = item.item() if isinstance(item, np.generic) else item
        json_value = _json_value(name, plain)
        text = _canonical_json(json_value)
        if text in seen:
            raise ValueError(f"{name}={reprlib.repr(value)} lists {item!r} twice: expected distinct values")
        seen.add(text)
        axis.append((plain, json_value))
    return axis


def _json_value(name: str, value: Any) -> Any:
    """Return what stands for an argument in rows and keys: itself if JSON has it, else identifying text."""
    structure = _json_structure(name, value)
    # Rows are flat: what is neither a scalar nor a list of scalars becomes text.
    nested = isinstance(structure, dict) or (
        isinstance(structure, list) and any(isinstance(item, (dict, list)) for item in structure)
    )
    return _canonical_json(structure) if nested else structure


def _json_structure(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value!r}: expected a finite number")
        return float(value)
    if isinstance(value, (tuple, list)):
        return [_json_structure(name, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _json_structure(name, item) for key, item in value.items()}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"array {value.dtype.name} {'×'.join(map(str, value.shape))} {_digest(value.tobytes())}"
    if callable(getattr(value, "fingerprint", None)):
        return f"{type(value).__name__} {value.fingerprint()}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _json_structure(name, getattr(value, f.name)) for f in dataclasses.fields(value)}
        title = " ".join([type(value).__name__, *([str(fields["name"])] if "name" in fields else [])])
        return f"{title} {_digest(_canonical_json(fields).encode())}"
    raise TypeError(
        f"{name}={reprlib.repr(value)} of type {type(value).__name__}: expected None, a bool, a number, "
        "a string, a tuple or mapping of these, a dtype, an array, a dataclass, or an object that has "
        "fingerprint()"
    )


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _key(columns: Row) -> str:
    return _digest(_canonical_json(columns).encode())


# Counting --------------------------------------------------------------------------------------------


def _count_points(
    points: Sequence[Mapping[str, Any]], errors: OnError, limit_seconds: float = math.inf
) -> _ChunkResult:
    """Count at least the first point and as many more as the time allows; return their results and the time.

    A point that raises ends the list before it. Its turn comes again as the first of another list, where its
    exception is raised: so the rows before it are kept, and exceptions travel as the executor sends them.
    """
    started_s = time.perf_counter()
    elapsed_s = 0.0
    results: list[Row] = []
    for arguments in points:
        try:
            results.append(_count_point(arguments, errors))
        except Exception as error:
            if results:
                break
            error.add_note(f"while counting {arguments}")
            raise
        elapsed_s = time.perf_counter() - started_s
        if elapsed_s > limit_seconds:
            break
    return results, elapsed_s


def _count_point(arguments: Mapping[str, Any], errors: OnError) -> Row:
    try:
        run = profile(**arguments)
    except ValueError as error:
        if errors == "raise":
            raise
        return dict.fromkeys((*_TRAFFIC_COLUMNS, *_RUN_COLUMNS, *_OPERATION_COLUMNS)) | {"error": str(error)}
    return {
        **{name: int(getattr(run.traffic, name)) for name in _TRAFFIC_COLUMNS},
        **{name: int(getattr(run, name)) for name in _RUN_COLUMNS},
        **{name: int(getattr(run.operations, name)) for name in _OPERATION_COLUMNS},
        **_flattened("plan", run.plan),
        "error": None,
    }


def _flattened(name: str, value: Any) -> Row:
    """Return the fields of nested dataclasses as one flat dictionary, e.g. ``plan_tiles_q``."""
    if dataclasses.is_dataclass(value):
        flat: Row = {}
        for field in dataclasses.fields(value):
            flat |= _flattened(f"{name}_{field.name}", getattr(value, field.name))
        return flat
    return {name: _json_value(name, value)}


def _count_with_executor(
    executor: Executor,
    missing: Iterator[_Point],
    record: Callable[[Sequence[_Point], Sequence[Row]], None],
    *,
    n_missing: int,
    errors: OnError,
    max_in_flight: int,
) -> None:
    """Count points in chunks, a bounded number of them at a time, and record each chunk as it is finished."""
    n_unsubmitted = n_missing
    handed_back: deque[_Point] = deque()
    in_flight: dict[Future[_ChunkResult], list[_Point]] = {}
    # Futures announce themselves; `concurrent.futures.wait` would walk all of them for each that is done.
    finished: SimpleQueue[Future[_ChunkResult]] = SimpleQueue()
    seconds_per_point = math.inf
    try:
        while n_unsubmitted or in_flight:
            patience_s: float | None = None
            if n_unsubmitted and len(in_flight) < max_in_flight:
                size = max(math.ceil(n_unsubmitted / max_in_flight), int(_CHUNK_SECONDS / seconds_per_point))
                size = min(size, _CHUNK_POINTS, n_unsubmitted)
                chunk = [handed_back.popleft() for _ in range(min(size, len(handed_back)))]
                chunk.extend(itertools.islice(missing, size - len(chunk)))
                n_unsubmitted -= size
                future = executor.submit(
                    _count_points, [point.arguments for point in chunk], errors, _CHUNK_LIMIT_SECONDS
                )
                in_flight[future] = chunk
                future.add_done_callback(finished.put)
                # Nobody waits while there is more to submit, except once, to learn how long a point takes.
                probing = len(in_flight) == _PROBE_CHUNKS and math.isinf(seconds_per_point)
                patience_s = _PROBE_SECONDS if probing else 0.0
            try:
                future = finished.get(timeout=patience_s)
            except Empty:
                continue
            # Out of flight before it is recorded: an interrupt in between leaves rows to be counted again,
            # but cannot write any twice.
            chunk = in_flight.pop(future)
            results, seconds = future.result()
            record(chunk[: len(results)], results)
            handed_back.extend(chunk[len(results) :])
            n_unsubmitted += len(chunk) - len(results)
            seconds_per_point = max(seconds, 1e-6) / len(results)
    except BaseException:
        # All are cancelled before any is recorded, lest workers start on more in the meantime.
        uncancelled = [future for future in in_flight if not future.cancel()]
        for future in uncancelled:
            if future.done() and not future.cancelled() and future.exception() is None:
                chunk, (results, _) = in_flight.pop(future), future.result()
                record(chunk[: len(results)], results)
        raise


def _progress_bar(
    stack: contextlib.ExitStack, progress: bool | None, *, total: int, done: int
) -> Callable[[int], object]:
    """Show a progress bar until `stack` is left, if wanted; return what advances it by a number of points."""
    if progress is None:
        # Standard error is None in a process without a console.
        progress = sys.stderr is not None and sys.stderr.isatty()
    if not progress:
        return lambda n_points: None
    from tqdm import tqdm

    bar = tqdm(total=total, initial=done, desc="sweep", unit=" points", file=sys.stderr)
    advance: Callable[[int], object] = stack.enter_context(bar).update
    return advance


# The file --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Contents:
    """A sweep file as read: its header (None if even that was torn), rows by key, size of its whole lines."""

    header: dict[str, Any] | None
    rows: dict[str, Row]
    size_bytes: int


class _RowFile:
    """A sweep's output file, held under a lock from entry to exit, with the rows of the grid found in it."""

    def __init__(self, path: str, index_of_key: Mapping[str, int]) -> None:
        self.path = path
        self.found: dict[str, Row] = {}
        self._index_of_key = index_of_key

    def __enter__(self) -> Self:
        # Unbuffered: nothing is left over in a buffer that a later close would write after a failed append.
        self._file = open(self.path, "a+b", buffering=0)
        _held_files.add(self)
        try:
            _lock(self._file.fileno(), self.path)
            contents = _read("output", self.path, self._index_of_key)
            self._check_version(contents.header)
            self._file.truncate(contents.size_bytes)
            if contents.header is None:
                self._write(json.dumps(self._header()).encode() + b"\n")
            self._sync()
        except BaseException:
            self._close()
            raise
        self.found = contents.rows
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._sync()
        finally:
            self._close()

    def append(self, points: Sequence[_Point], results: Sequence[Row]) -> None:
        """Append finished points, all or none of them."""
        lines = [
            json.dumps({"key": point.key, "arguments": point.columns, "results": result})
            for point, result in zip(points, results, strict=True)
        ]
        self._write("".join(line + "\n" for line in lines).encode())
        if time.monotonic() - self._synced_s > _SYNC_SECONDS:
            self._sync()

    def close_inherited(self) -> None:
        """Close this process's copy of the file, which leaves the lock with the process that took it."""
        self._file.close()

    def _header(self) -> dict[str, Any]:
        # The grid is a record of how the file began, not a condition on how it goes on.
        fingerprint = _digest("".join(self._index_of_key).encode())
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "simattn": _package_version(),
            "grid": {"points": len(self._index_of_key), "fingerprint": fingerprint},
        }

    def _check_version(self, header: Mapping[str, Any] | None) -> None:
        # Rows of two versions side by side would compare the versions, not the arguments.
        if header is not None and header.get("simattn") != _package_version():
            raise ValueError(
                f"output={self.path!r}, line 1: counted by simattn {header.get('simattn')}, "
                f"expected {_package_version()}; give another output, or read this one with read_rows"
            )

    def _write(self, data: bytes) -> None:
        size_bytes = self._file.seek(0, os.SEEK_END)
        try:
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except BaseException:
            # A full disk or an interrupt: leave no half line for the next append to continue.
            self._file.truncate(size_bytes)
            raise

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced_s = time.monotonic()

    def _close(self) -> None:
        _held_files.discard(self)
        self._file.close()


def _read(argument: str, path: str, wanted: Mapping[str, int] | None = None) -> _Contents:
    """Read a sweep file: all rows, or those whose keys are wanted. Every line is checked either way."""
    header: dict[str, Any] | None = None
    rows: dict[str, Row] = {}
    line_of_key: dict[str, int] = {}
    size_bytes = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{argument}={path!r}, line {number}"
            if not line.endswith(b"\n"):
                if number == 1 and not (line.startswith(_HEADER_START) or _HEADER_START.startswith(line)):
                    raise _malformed(where, line, _EXPECTED_HEADER)
                break
            if number == 1:
                header = _parse_header(where, line)
            else:
                key, row = _parse_row(where, line)
                if key in line_of_key:
                    raise ValueError(
                        f"{where}: the point with key {key} is already on line {line_of_key[key]}; "
                        "expected every point once"
                    )
                line_of_key[key] = number
                if wanted is None or key in wanted:
                    rows[key] = row
            size_bytes += len(line)
    return _Contents(header, rows, size_bytes)


def _parse_header(where: str, line: bytes) -> dict[str, Any]:
    header = _parse_json(line)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise _malformed(where, line, _EXPECTED_HEADER)
    if header.get("version") != _FORMAT_VERSION:
        raise ValueError(f"{where}: format version {header.get('version')!r}, expected {_FORMAT_VERSION}")
    return header


def _parse_row(where: str, line: bytes) -> tuple[str, Row]:
    record = _parse_json(line)
    if not (
        isinstance(record, dict)
        and record.keys() == {"key", "arguments", "results"}
        and isinstance(record["arguments"], dict)
        and isinstance(record["results"], dict)
        and "error" in record["results"]
    ):
        raise _malformed(where, line, '{"key": …, "arguments": {…}, "results": {…, "error": …}}')
    key = _key(record["arguments"])
    if record["key"] != key:
        raise ValueError(f"{where}: key {record['key']!r}, expected {key!r}, the digest of its arguments")
    return key, record["arguments"] | record["results"]


def _parse_json(line: bytes) -> Any:
    """Return the value of a line, or None (which no line of a sweep file is) if it is not JSON."""
    # Decoded here because `json.loads` would take bytes for UTF-16 on seeing zeros. RecursionError: "[[[[…".
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line.decode())
    return None


def _malformed(where: str, line: bytes, expected: str) -> ValueError:
    found = line[:60].decode(errors="backslashreplace").rstrip("\n")
    return ValueError(f"{where}: found {found!r}{'…' * (len(line) > 60)}, expected {expected}")


def _package_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("simattn")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"  # imported from a source tree, which has no version


def _raise_recorded_error(rows: Mapping[int, Row], path: str) -> None:
    for index in sorted(rows):
        error = rows[index]["error"]
        if error is not None:
            raise ValueError(f"{error} (point {index} of the grid, recorded in output={path!r} under errors='row')")


def _lock(file_descriptor: int, path: str) -> None:
    """Take the exclusive lock of an open file, or raise: the system releases it when the file is closed."""
    try:
        if sys.platform == "win32":
            # Windows locks byte ranges, and bars others from reading them: so one byte far beyond the end.
            os.lseek(file_descriptor, 0x7FFFFFFF, os.SEEK_SET)
            msvcrt.locking(file_descriptor, msvcrt.LK_NBLCK, 1)
        else:
            # flock, not lockf: a lockf lock is lost when the process closes any other descriptor of the file,
            # as `read_rows` does, and does not keep two threads apart.
            fcntl.flock(file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RuntimeError(
            f"output={path!r} is held by another sweep; expected a file that no other sweep writes"
        ) from error
    except OSError as error:
        raise RuntimeError(
            f"output={path!r} cannot be locked ({error}); expected a file system that has locks"
        ) from error


_held_files: set[_RowFile] = set()


def _close_held_files() -> None:
    for file in _held_files:
        file.close_inherited()


if hasattr(os, "register_at_fork"):
    # A forked worker shares the lock, and outlives a sweep that is killed: it would bar the resumption.
    os.register_at_fork(after_in_child=_close_held_files)
