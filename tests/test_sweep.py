"""Sweeps: grid order, executors, and files that survive interruptions at any byte."""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from simattn.algorithms.linear import FeatureMap
from simattn.algorithms.moba import BlockHistogram
from simattn.tables import csv_text

# The package exports the function under the module's name.
sweep_module = importlib.import_module("simattn.sweep")
SweepResult, read_rows, sweep, write_csv = (
    sweep_module.SweepResult,
    sweep_module.read_rows,
    sweep_module.sweep,
    sweep_module.write_csv,
)

TESTS = Path(__file__).parent
MISTAKE = 9999  # the query length at which the stub fails as a faulty program would


@dataclasses.dataclass(frozen=True)
class Tiles:
    q: int
    kv: int


@dataclasses.dataclass(frozen=True)
class Plan:
    tiles: Tiles
    splits: int = 1


class Mask:
    def __init__(self, digest):
        self.digest = digest

    def fingerprint(self):
        return self.digest


def stub_profile(algorithm, *, batch=1, q_len, kv_len=None, window=None, block_mask=None, plan=None, dtype="bfloat16"):
    """Stand in for `simattn.profile` where a test needs to steer its duration or its failures."""
    if q_len < 0:
        raise ValueError(f"{q_len=}: expected at least 0")
    if q_len == MISTAKE:
        raise RuntimeError("a mistake of the program")
    read = (q_len * (1 if kv_len is None else kv_len) + len(algorithm)) * batch << 70
    traffic = SimpleNamespace(
        hbm_read_bytes=read,
        hbm_write_bytes=q_len,
        hbm_reduce_bytes=np.int64(0),
        hbm_bytes=read + q_len,
        sram_read_bytes=2,
        sram_write_bytes=3,
    )
    return SimpleNamespace(
        traffic=traffic,
        peak_sram_bytes=64,
        peak_register_bytes=32,
        peak_hbm_bytes=128,
        operations=SimpleNamespace(matmul_flops=4 * q_len, vector_flops=3, exponentials=1),
        plan=plan or Plan(Tiles(64, 128)),
    )


def slow_profile(algorithm, **arguments):
    time.sleep(0.02)
    return stub_profile(algorithm, **arguments)


OWN_ARGUMENTS = sorted(item.name for item in dataclasses.fields(Plan))


def count_with(function, patch):
    """Make sweeps in this process and its forks call a function in place of `simattn.profile`."""

    @functools.wraps(stub_profile)  # for its signature
    def profile(algorithm, **arguments):
        return function(algorithm, **arguments)

    patch.setattr(sweep_module, "profile", profile)
    patch.setattr(sweep_module, "get_algorithm", lambda name: SimpleNamespace(own_arguments=OWN_ARGUMENTS))


@pytest.fixture
def stub(monkeypatch):
    """Count with the stub; return the list of arguments it is called with in this process."""
    calls = []

    def profile(algorithm, **arguments):
        calls.append({"algorithm": algorithm, **arguments})
        return stub_profile(algorithm, **arguments)

    count_with(profile, monkeypatch)
    return calls


def assert_complete(path, rows):
    """Assert that a file holds these rows, each once, and nothing else."""
    lines = path.read_text().splitlines()[1:]
    stored = [record["arguments"] | record["results"] for record in map(json.loads, lines)]
    assert sorted(map(str, stored)) == sorted(map(str, rows))
    assert sorted(map(str, read_rows(path))) == sorted(map(str, rows))


# Grids -----------------------------------------------------------------------------------------------


@given(
    algorithms=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3, unique=True),
    axes=st.dictionaries(
        st.sampled_from(["q_len", "kv_len", "batch"]),
        st.lists(st.integers(20, 1 << 80), min_size=1, max_size=4, unique=True),
    ),
)
def test_rows_are_in_the_order_of_nested_loops(algorithms, axes):
    with pytest.MonkeyPatch.context() as patch:
        count_with(stub_profile, patch)
        axes.setdefault("q_len", [20])
        rows = sweep(algorithms, **axes)
    expected = [
        {"algorithm": algorithm, **dict(zip(axes, values, strict=True))}
        for algorithm in algorithms
        for values in itertools.product(*axes.values())
    ]
    assert [{name: row[name] for name in ("algorithm", *axes)} for row in rows] == expected
    assert rows.column("hbm_write_bytes") == rows.column("q_len")


def test_row_holds_all_arguments_counts_and_the_plan(stub):
    (row,) = sweep("flash2", q_len=5, window=(3, None))
    assert row == {
        "algorithm": "flash2",
        "batch": 1,
        "q_len": 5,
        "kv_len": None,
        "window": [3, None],
        "block_mask": None,
        "plan": None,
        "dtype": "bfloat16",
        "hbm_read_bytes": 11 << 70,
        "hbm_write_bytes": 5,
        "hbm_reduce_bytes": 0,
        "hbm_bytes": (11 << 70) + 5,
        "sram_read_bytes": 2,
        "sram_write_bytes": 3,
        "peak_sram_bytes": 64,
        "peak_register_bytes": 32,
        "peak_hbm_bytes": 128,
        "matmul_flops": 20,
        "vector_flops": 3,
        "exponentials": 1,
        "plan_tiles_q": 64,
        "plan_tiles_kv": 128,
        "plan_splits": 1,
        "error": None,
    }
    assert json.loads(json.dumps(row)) == row
    assert stub == [{"algorithm": "flash2", "q_len": 5, "window": (3, None)}]


@pytest.mark.parametrize("axis", [[1, 2, 3], range(1, 4), np.arange(1, 4, dtype=np.uint8), list(np.arange(1, 4))])
def test_axes_may_be_lists_ranges_and_arrays(stub, axis):
    assert sweep("a", q_len=axis) == sweep("a", q_len=[1, 2, 3])
    assert {type(call["q_len"]) for call in stub} == {int}


def test_tuples_arrays_and_scalars_of_numpy_are_single_values(stub):
    block_mask = np.eye(3, dtype=bool)
    rows = sweep("a", q_len=np.int64(4), window=[(1, 0), (2, 0)], block_mask=block_mask)
    assert rows.column("window") == [[1, 0], [2, 0]]
    assert stub[0]["block_mask"] is block_mask
    assert type(stub[0]["q_len"]) is int


def test_grid_couples_arguments_and_its_entries_are_grids(stub):
    rows = sweep(
        grid=[
            {"algorithm": "a", "q_len": [1, 2], "kv_len": 10},
            {"q_len": 3, "algorithm": ["b", "c"]},
        ],
        batch=[1, 2],
    )
    assert [(row["algorithm"], row["q_len"], row["kv_len"], row["batch"]) for row in rows] == [
        *[("a", 1, 10, 1), ("a", 1, 10, 2), ("a", 2, 10, 1), ("a", 2, 10, 2)],
        *[("b", 3, None, 1), ("b", 3, None, 2), ("c", 3, None, 1), ("c", 3, None, 2)],
    ]


def test_algorithms_may_be_a_registry(stub):
    registry = {"a": object(), "b": object()}
    assert sweep(registry, q_len=1).column("algorithm") == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"q_len": [1], "headz": [2, 3]},
            TypeError,
            r"headz=\[2, 3\]: no argument of a; expected one of algorithm, batch.*tiles",
        ),
        ({}, TypeError, "q_len is missing; expected a value"),
        ({"algorithm": None, "q_len": 1}, TypeError, "algorithm is missing"),
        ({"algorithm": [], "q_len": 1}, ValueError, r"algorithm=\[\]: expected at least one value"),
        ({"algorithm": (), "q_len": 1}, ValueError, r"algorithm=\(\): expected at least one name"),
        ({"q_len": []}, ValueError, r"q_len=\[\]: expected at least one value"),
        ({"q_len": range(0)}, ValueError, r"q_len=range\(0, 0\): expected at least one value"),
        ({"q_len": np.empty(0, int)}, ValueError, "q_len=array.*: expected at least one value"),
        ({"q_len": [4, 5, 4]}, ValueError, r"q_len=\[4, 5, 4\] lists 4 twice"),
        ({"q_len": {1, 2}}, TypeError, r"q_len=\{1, 2\} of type set: expected None, a bool, a number"),
        ({"q_len": float("nan")}, ValueError, "q_len=nan: expected a finite number"),
        ({"q_len": 1, "plan": object}, TypeError, "plan=<class 'object'> of type type: expected"),
        ({"q_len": 1, "grid": []}, ValueError, "grid=.*expected at least one mapping"),
        ({"q_len": 1, "grid": {"batch": 1}}, TypeError, "grid=.*expected a list of mappings"),
        ({"grid": [{"q_len": 1}, {"q_len": [2, 1]}]}, ValueError, "grid: points 0 and 2 are the same"),
        ({"q_len": 1, "grid": [{"q_len": 2}]}, TypeError, r"grid\[0\]\['q_len'\]=2: expected no q_len"),
        ({"q_len": 1, "errors": "ignore"}, ValueError, "errors='ignore': expected 'raise' or 'row'"),
        ({"q_len": 1, "progress": 1}, TypeError, "progress=1: expected True, False or None"),
        ({"q_len": 1, "executor": 2}, TypeError, r"executor=2: expected a concurrent.futures.Executor"),
        ({"q_len": 1, "max_in_flight": 0}, ValueError, "max_in_flight=0: expected an integer of at least 1"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_file(stub, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        sweep(**{"algorithm": "a", "output": tmp_path / "rows.jsonl", **arguments})
    assert not stub
    assert not any(tmp_path.iterdir())


def test_keys_tell_objects_apart_by_content(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    axes = {
        "plan": lambda: [None, Plan(Tiles(1, 2)), Plan(Tiles(1, 3))],
        "block_mask": lambda: [Mask("x"), Mask("y")],
    }
    first = sweep("a", q_len=1, output=path, **{name: make() for name, make in axes.items()})
    assert len(stub) == 6
    # Equal objects made anew, as another process makes them, have the same keys.
    assert sweep("a", q_len=1, output=path, **{name: make() for name, make in axes.items()}) == first
    assert len(stub) == 6
    assert first[0]["block_mask"] == "Mask x"
    assert first[0]["plan"] is None
    assert first[2]["plan"].startswith("Plan ")


def test_defaults_and_names_of_dtypes_do_not_change_the_key(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    for same in ({}, {"batch": 1}, {"kv_len": None}, {"dtype": "bfloat16"}, {"batch": np.int8(1)}):
        sweep("a", q_len=1, output=path, **same)
    for same in ({"dtype": "float16"}, {"dtype": np.float16}, {"dtype": np.dtype(np.float16)}):
        sweep("a", q_len=1, output=path, **same)
    assert len(stub) == 2


# Infeasible points -----------------------------------------------------------------------------------


def test_infeasible_points_raise_and_finished_rows_stay(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"q_len=-1: expected at least 0") as raised:
        sweep("a", q_len=[1, 2, -1, 3], output=path)
    assert "q_len': -1" in raised.value.__notes__[0]
    assert read_rows(path).column("q_len") == [1, 2]


def test_infeasible_points_become_rows_where_that_is_asked_for(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = sweep("a", q_len=[1, -1, 3], output=path, errors="row")
    assert rows.column("error") == [None, "q_len=-1: expected at least 0", None]
    assert rows[1]["hbm_bytes"] is None
    assert sweep("a", q_len=[1, -1, 3], output=path, errors="row") == rows
    with pytest.raises(ValueError, match=r"q_len=-1: expected at least 0 \(point 1 of the grid, recorded in"):
        sweep("a", q_len=[1, -1, 3], output=path)
    assert sweep("a", q_len=[3, 1], output=path) == [rows[2], rows[0]]
    assert len(stub) == 3


def test_mistakes_of_the_program_always_raise(stub):
    with pytest.raises(RuntimeError, match="a mistake"):
        sweep("a", q_len=[1, MISTAKE], errors="row")


# Files -----------------------------------------------------------------------------------------------


def test_resume_after_an_interruption_at_every_byte(stub, tmp_path, monkeypatch):
    # What is durable on the disk is not in question here, and forcing it takes milliseconds each time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path = tmp_path / "rows.jsonl"
    grid = {"q_len": [3, 1, 2], "window": (7, 0)}
    rows = sweep("a", output=path, **grid)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        stub.clear()
        path.write_bytes(whole[:size])
        assert sweep("a", output=path, **grid) == rows
        n_complete = max(sum(end <= size for end in ends) - 1, 0)
        assert [call["q_len"] for call in stub] == [3, 1, 2][n_complete:]
        assert path.read_bytes() == whole


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_series_of_grids_and_interruptions_loses_and_doubles_no_row(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("sweep") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        count_with(stub_profile, patch)
        patch.setattr(os, "fsync", lambda descriptor: None)
        lengths = st.lists(st.integers(20, 30), min_size=1, max_size=6, unique=True)
        for grid in data.draw(st.lists(lengths, min_size=1, max_size=4)):
            assert sweep("a", q_len=grid, output=path) == sweep("a", q_len=grid)
            stored = read_rows(path).column("q_len")
            assert len(set(stored)) == len(stored)
            assert set(grid) <= set(stored)
            kept_bytes = data.draw(st.integers(0, path.stat().st_size))
            os.truncate(path, kept_bytes)


def test_extending_a_grid_counts_only_what_is_new(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    small = sweep("a", q_len=[1, 2], output=path)
    stub.clear()
    large = sweep(["b", "a"], q_len=[2, 4, 1], output=path)
    assert [(call["algorithm"], call["q_len"]) for call in stub] == [("b", 2), ("b", 4), ("b", 1), ("a", 4)]
    assert large.column("q_len") == [2, 4, 1, 2, 4, 1]
    assert [large[5], large[3]] == small
    stub.clear()
    assert sweep("a", q_len=[1], output=path) == small[:1]
    assert not stub
    assert_complete(path, large)


def test_empty_file_is_a_fresh_one(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.touch()
    assert read_rows(path) == []
    assert_complete(path, sweep("a", q_len=[1, 2], output=str(path)))


def lines_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    sweep("a", q_len=[1, 2], output=path)
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda header, a, b: [b"q_len,bytes\n", a],
            r"line 1: found 'q_len,bytes', expected the header of a sweep",
        ),
        (
            lambda header, a, b: [b"notes without a newline"],
            r"line 1: found 'notes without.*, expected the header",
        ),
        (lambda header, a, b: [b"[1, 2]\n"], r"line 1: found '\[1, 2\]', expected the header"),
        (lambda header, a, b: [a, b], r"line 1: found '\{\"key\".*…, expected the header"),
        (
            lambda header, a, b: [header.replace(b'n": 1,', b'n": 7,'), a],
            "line 1: format version 7, expected 1",
        ),
        (
            lambda header, a, b: [header, a[:-9] + b"\n", b],
            r"line 2: found .*, expected \{\"key\": …, \"arguments\"",
        ),
        (lambda header, a, b: [header, a[:50], b], "line 2: found .*expected"),
        (lambda header, a, b: [header, b"\n", a], "line 2: found '', expected"),
        (lambda header, a, b: [header, a, b"\0" * 99 + b"\n"], "line 3: found .*expected"),
        (lambda header, a, b: [header, a, b"\xff\xfe\n"], r"line 3: found '\\\\xff\\\\xfe', expected"),
        (lambda header, a, b: [header, b"[" * 100_000 + b"\n"], "line 2: found .*expected"),
        (lambda header, a, b: [header, b'{"key": 1}\n'], "line 2: found .*expected"),
        (lambda header, a, b: [header, a, b, a], r"line 4: the point with key \w+ is already on line 2"),
        (
            lambda header, a, b: [header, a.replace(b'"q_len": 1', b'"q_len": 9')],
            r"line 2: key '\w+', expected '\w+'",
        ),
    ],
)
def test_damaged_files_are_refused_and_left_alone(stub, tmp_path, damage, message):
    path = tmp_path / "rows.jsonl"
    lines = lines_of_a_file(tmp_path)
    damaged = b"".join(damage(*lines))
    path.write_bytes(damaged)
    for use, argument in (
        (lambda: sweep("a", q_len=[1, 2, 3], output=path), "output"),
        (lambda: read_rows(path), "path"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            use()
        assert str(raised.value).startswith(f"{argument}={str(path)!r}, line ")
    assert path.read_bytes() == damaged
    path.write_bytes(b"".join(lines))
    assert len(sweep("a", q_len=[1, 2, 3], output=path)) == 3  # the refusal holds no lock


def test_file_of_another_version_is_read_but_not_continued(stub, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = sweep("a", q_len=[1, 2], output=path)
    monkeypatch.setattr(sweep_module, "_package_version", lambda: "9.9")
    assert read_rows(path) == rows
    with pytest.raises(ValueError, match=r"line 1: counted by simattn .*, expected 9\.9; give another output"):
        sweep("a", q_len=[1, 2], output=path)


def test_full_disk_leaves_whole_rows(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    sweep("a", q_len=[1], output=path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The next row is cut off by the system in the middle.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            sweep("a", q_len=[1, 2, 3], output=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes().endswith(b"\n")
    assert read_rows(path).column("q_len") == [1]
    assert_complete(path, sweep("a", q_len=[1, 2, 3], output=path))


# Interruptions ---------------------------------------------------------------------------------------

SLOW_SWEEP = """
    import concurrent.futures, multiprocessing, sys
    import pytest, test_sweep

    test_sweep.count_with(test_sweep.slow_profile, pytest.MonkeyPatch())
    executor = None
    if sys.argv[2] == "fork":
        executor = concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
    test_sweep.sweep("a", q_len=range(20, 1020), output=sys.argv[1], executor=executor)
"""


@contextlib.contextmanager
def slow_sweep(path, how="serial"):
    """Run a sweep of 1000 slow points in another process, entered once its file holds some rows."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_SWEEP), str(path), how],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not path.exists() or path.read_bytes().count(b"\n") < 8:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        # The session is the process and its pool: a killed process leaves its forked workers behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("how", ["serial", "fork"])
def test_killed_sweep_resumes(stub, tmp_path, how):
    path = tmp_path / "rows.jsonl"
    with slow_sweep(path, how) as process:
        process.kill()
        process.wait()
        # Here forked workers are still alive, without a share in the lock.
        n_survived = len(read_rows(path))
        rows = sweep("a", q_len=range(20, 1020), output=path)
    assert 7 <= n_survived < 1000
    assert len(stub) == 1000 - n_survived
    assert_complete(path, rows)
    assert rows == sweep("a", q_len=range(20, 1020))


@pytest.mark.parametrize("how", ["serial", "fork"])
def test_sweep_interrupted_from_the_keyboard_ends_and_resumes(stub, tmp_path, how):
    path = tmp_path / "rows.jsonl"
    with slow_sweep(path, how) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the pool's workers too
        assert process.wait(10) != 0
    n_survived = len(read_rows(path))
    rows = sweep("a", q_len=range(20, 1020), output=path)
    assert 7 <= n_survived < 1000
    assert len(stub) == 1000 - n_survived
    assert_complete(path, rows)


def test_second_sweep_of_a_file_is_refused(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    with slow_sweep(path):
        assert len(read_rows(path)) >= 7  # reading is free
        with pytest.raises(RuntimeError, match=r"output='.*rows.jsonl' is held by another sweep; expected"):
            sweep("a", q_len=[1], output=path)
        assert not stub


def test_second_sweep_of_a_file_in_the_same_process_is_refused(stub, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    entered, leave = threading.Event(), threading.Event()

    def waiting_profile(algorithm, *, q_len):
        entered.set()
        assert leave.wait(10)
        return stub_profile(algorithm, q_len=q_len)

    with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(1) as thread:
        count_with(waiting_profile, patch)
        first = thread.submit(sweep, "a", q_len=[1], output=path)
        assert entered.wait(10)
        read_rows(path)  # opening and closing the file leaves the lock in force
        with pytest.raises(RuntimeError, match="is held by another sweep"):
            sweep("a", q_len=[1], output=path)
        leave.set()
        assert len(first.result()) == 1


def test_file_system_without_locks_is_refused(stub, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RuntimeError, match=r"cannot be locked \(.*No locks available\); expected a file system"):
        sweep("a", q_len=[1], output=tmp_path / "rows.jsonl")


def test_interrupt_keeps_finished_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"

    def profile(algorithm, *, q_len):
        if q_len == 3:
            raise KeyboardInterrupt
        return stub_profile(algorithm, q_len=q_len)

    count_with(profile, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sweep("a", q_len=range(1, 6), output=path)
    assert read_rows(path).column("q_len") == [1, 2]


class ScriptedExecutor(concurrent.futures.Executor):
    """Holds tasks until told to run them; calls `after_submit` with itself after every submission."""

    def __init__(self, after_submit):
        self.futures = []
        self.after_submit = after_submit

    def submit(self, function, /, *arguments):
        future = concurrent.futures.Future()
        self.futures.append(future)
        future.run = lambda: future.set_result(function(*arguments))
        future.n_points = len(arguments[0])
        self.after_submit(self)
        return future


def test_interrupt_records_what_is_finished_and_cancels_the_rest(stub, tmp_path):
    path = tmp_path / "rows.jsonl"

    def after_submit(executor):
        if len(executor.futures) == 5:
            executor.futures[0].set_running_or_notify_cancel()
            for future in executor.futures[1:3]:
                future.run()
            raise KeyboardInterrupt

    executor = ScriptedExecutor(after_submit)
    with pytest.raises(KeyboardInterrupt):
        sweep("a", q_len=range(1, 100), output=path, executor=executor)
    assert [future.cancelled() for future in executor.futures[:4]] == [False, False, False, True]
    assert read_rows(path).column("q_len") == [2, 3]
    assert_complete(path, sweep("a", q_len=range(1, 100), output=path))


# Executors -------------------------------------------------------------------------------------------


REAL_GRID = {
    "algorithm": "flash2",
    "q_len": [64, 1000, 1 << 20, 1 << 40],
    "causal": [False, True],
    "window": [None, (100, 0)],
    "direction": ["forward", "backward"],
    "block_mask": None,
    "hardware": ["A100-80GB", None],
}


@pytest.fixture(scope="module")
def real_rows():
    return sweep(**REAL_GRID)


def test_rows_are_those_of_profile(real_rows):
    assert len(real_rows) == 4 * 2 * 2 * 2 * 2
    for row in real_rows[::7]:
        arguments = {name: row[name] for name in ("q_len", "causal", "window", "direction", "hardware")}
        run = simattn.profile(row["algorithm"], **arguments)
        for name in ("hbm_read_bytes", "hbm_write_bytes", "hbm_reduce_bytes", "hbm_bytes"):
            assert row[name] == getattr(run.traffic, name)
        assert row["sram_read_bytes"] + row["sram_write_bytes"] == run.traffic.sram_bytes
        assert row["peak_sram_bytes"] == run.peak_sram_bytes
        assert row["matmul_flops"] == run.operations.matmul_flops
        assert (row["plan_tiles_q"], row["plan_tiles_kv"]) == (run.plan.tiles.q, run.plan.tiles.kv)
    assert max(real_rows.column("hbm_bytes")) > 1 << 64


def test_tiles_beyond_the_sram_are_infeasible(tmp_path):
    grid = {"algorithm": "flash2", "q_len": 64, "sram_bytes": [1 << 20, 1]}
    with pytest.raises(simattn.CapacityError):
        sweep(**grid, output=tmp_path / "rows.jsonl")
    feasible, infeasible = sweep(**grid, output=tmp_path / "rows.jsonl", errors="row")
    assert feasible["error"] is None
    assert feasible["peak_sram_bytes"] <= 1 << 20
    assert "sram" in infeasible["error"].lower()


def test_misspelled_names_are_refused_before_anything_is_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(TypeError, match=r"tile=3: no argument of flash2; expected one of .*q_len.*tiles"):
        sweep("flash2", q_len=64, tile=3, output=path, errors="row")
    with pytest.raises(ValueError, match=r"algorithm='flash22' is unknown; expected one of"):
        sweep(["flash2", "flash22"], q_len=64, output=path, errors="row")
    assert not path.exists()


def check_executor(executor, real_rows, path):
    """Assert that an executor's rows are the serial ones, for a fresh file and for an interrupted one."""
    assert sweep(**REAL_GRID, output=path, executor=executor) == real_rows
    assert_complete(path, real_rows)
    os.truncate(path, path.stat().st_size // 2)
    assert 0 < len(read_rows(path)) < len(real_rows)
    assert sweep(**REAL_GRID, output=path, executor=executor) == real_rows
    assert_complete(path, real_rows)
    # Block masks and plans travel, and errors come back as they are.
    mask = simattn.BlockMask.from_array(np.tri(4, dtype=bool), q_block=64, kv_block=64)
    plan = simattn.default_plan("flash2", q_len=256, block_mask=mask)
    objects = {"algorithm": "flash2", "q_len": 256, "block_mask": [mask, None], "plan": [plan, "paper"]}
    assert sweep(**objects, executor=executor) == sweep(**objects)
    with pytest.raises(simattn.CapacityError) as raised:
        sweep("flash2", q_len=64, sram_bytes=[1 << 20, 1], executor=executor)
    assert "while counting" in raised.value.__notes__[0]


def test_threads_equal_serial(real_rows, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        check_executor(executor, real_rows, tmp_path / "rows.jsonl")


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_processes_equal_serial(real_rows, tmp_path, start_method):
    context = multiprocessing.get_context(start_method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        check_executor(executor, real_rows, tmp_path / "rows.jsonl")


def test_dask_cluster_equals_serial(real_rows, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    with (
        # Port 0 is any free one: on its usual port the dashboard warns of a second cluster on the machine.
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        check_executor(client.get_executor(), real_rows, tmp_path / "rows.jsonl")
        with pytest.raises(TypeError, match=r"executor=.*that of a Dask client is client.get_executor\(\)"):
            sweep(**REAL_GRID, executor=client)


@pytest.mark.parametrize("max_in_flight", [1, 7, 512])
def test_results_may_come_in_any_order(stub, tmp_path, max_in_flight):
    path = tmp_path / "rows.jsonl"

    def after_submit(executor):
        waiting = [future for future in executor.futures if not future.done()]
        n_submitted = sum(future.n_points for future in executor.futures)
        if n_submitted == 3000 or len(waiting) == max_in_flight:
            for future in waiting[:: -1 if n_submitted == 3000 else -2]:
                future.run()

    executor = ScriptedExecutor(after_submit)
    rows = sweep("a", q_len=range(20, 3020), output=path, executor=executor, max_in_flight=max_in_flight)
    assert rows.column("q_len") == list(range(20, 3020))
    assert len(executor.futures) < 3000 / 4  # small points travel together
    assert_complete(path, rows)


class GatedExecutor(concurrent.futures.ThreadPoolExecutor):
    """Finishes nothing until some time after `n_tasks` are in flight; sees how many there are at most."""

    def __init__(self, n_tasks):
        super().__init__(2)
        self.futures = []
        self.n_tasks = n_tasks
        self.gate = threading.Event()
        self.most_in_flight = 0

    def submit(self, function, /, *arguments):
        future = super().submit(lambda: self.gate.wait() and function(*arguments))
        self.futures.append(future)
        n_in_flight = sum(not future.done() for future in self.futures)
        self.most_in_flight = max(self.most_in_flight, n_in_flight)
        if n_in_flight == self.n_tasks:
            threading.Timer(0.2, self.gate.set).start()
        return future


@pytest.mark.parametrize("max_in_flight", [1, 7, 50])
def test_tasks_in_flight_are_bounded(stub, max_in_flight):
    with GatedExecutor(max_in_flight) as executor:
        rows = sweep("a", q_len=range(20, 3020), executor=executor, max_in_flight=max_in_flight)
    assert rows.column("q_len") == list(range(20, 3020))
    assert executor.most_in_flight == max_in_flight


def test_slow_chunks_hand_back_what_they_have_not_reached(stub, monkeypatch):
    monkeypatch.setattr(sweep_module, "_CHUNK_LIMIT_SECONDS", 0.0)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        rows = sweep("a", q_len=range(20, 520), executor=executor, max_in_flight=4)
    assert rows == sweep("a", q_len=range(20, 520))
    assert len(stub) == 1000


def test_error_in_a_chunk_keeps_the_rows_before_it(stub, tmp_path):
    path = tmp_path / "rows.jsonl"
    with (
        concurrent.futures.ThreadPoolExecutor(1) as executor,
        pytest.raises(RuntimeError, match="a mistake") as raised,
    ):
        sweep("a", q_len=[*range(13), MISTAKE, 14], output=path, executor=executor, max_in_flight=1)
    assert f"q_len': {MISTAKE}" in raised.value.__notes__[0]
    assert read_rows(path).column("q_len") == list(range(13))


# Progress and reports --------------------------------------------------------------------------------


def test_progress_is_shown_on_a_terminal_or_on_request(stub, tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    sweep("a", q_len=[1, 2], output=path)
    sweep("a", q_len=[1, 2], progress=False)
    assert capsys.readouterr() == ("", "")
    sweep("a", q_len=[1, 2, 3, 4], output=path, progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "2/4" in err  # the rows of the file count as done
    assert "4/4" in err
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    sweep("a", q_len=[1, 2])
    assert "2/2" in terminal.getvalue()


def test_import_is_light():
    code = "import simattn.sweep, sys; print({'tqdm', 'dask', 'numba', 'multiprocessing'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_csv_holds_every_column(stub, tmp_path):
    rows = sweep("a", q_len=[1, -1], window=(1, 0), errors="row")
    write_csv(rows, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first.keys() == rows[0].keys() | rows[1].keys()
    assert int(first["hbm_read_bytes"]) == rows[0]["hbm_read_bytes"]
    assert first["window"] == "[1, 0]"
    assert (second["hbm_read_bytes"], second["error"]) == ("", "q_len=-1: expected at least 0")


def test_repr_is_a_table_of_what_varies(stub):
    rows = sweep("flash2", q_len=range(20, 50), batch=7)
    lines = repr(rows).splitlines()
    assert lines[0] == "SweepResult, 30 rows"
    assert lines[1].split()[:3] == ["algorithm", "q_len", "hbm_read_bytes"]
    assert lines[3].split()[:3] == ["flash2", "20", f"{(26 * 7) << 70:,}"]
    assert lines[-1] == "… 10 more"
    with pytest.raises(KeyError, match="expected one of algorithm, batch"):
        rows.column("heads")


def test_own_feature_maps_are_told_apart_by_what_counts_depend_on(tmp_path):
    def doubled(x):
        return 2 * x

    cheap, costly = (FeatureMap("doubled", doubled, np.ones_like, exponentials=count) for count in (0, 3))
    arguments = {"q_len": 64, "feature_map": ["relu", cheap, costly], "output": tmp_path / "rows.jsonl"}
    rows = sweep("linear", **arguments, progress=False)
    assert rows.column("feature_map") == ["relu", "FeatureMap doubled 0", "FeatureMap doubled 3"]
    assert rows.column("exponentials") == [0, 0, 3 * 2 * 64 * 64]
    assert sweep("linear", **arguments, progress=False) == rows


def test_selections_stand_in_rows_as_digests():
    choices = [BlockHistogram.random(heads=1, q_len=512, block=64, top_k=3, seed=seed) for seed in range(2)]
    rows = sweep("moba", q_len=512, block_size=64, top_k=3, selection=[None, *choices], progress=False)
    none, *digests = rows.column("selection")
    assert none is None
    assert len(set(digests)) == 2
    assert all(digest.startswith("BlockHistogram ") for digest in digests)
    assert list(csv.DictReader(io.StringIO(csv_text(rows))))[1]["selection"] == digests[0]
