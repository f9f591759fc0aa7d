"""Hold the kernels against the simulated machine on random problems: every bit and every byte counted.

``python -m cupy_kernels.verify --problems 10000 --seed 1 --output FILE`` draws problems, each from its own seed,
simulates them on all CPU cores in the kernels' arithmetic while the device computes them, and writes a summary. A run
that was stopped goes on where it was when it is started again with the same file. The exit code is 1 if anything
differed.

Under ``compute-sanitizer``, ``--longest 100 --without-memory-pool`` keeps problems small and every array in memory of
its own, so that accesses outside it are seen.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cupy_kernels import compiler
from cupy_kernels.arrays import require_cupy
from cupy_kernels.compiler import Variant
from cupy_kernels.gradients import grouping
from cupy_kernels.parameters import column_bucket
from cupy_kernels.program import SEQUENCE_OFFSETS, SQUARE_ROW_MULTIPLE
from cupy_kernels.ragged import OFFSETS, RaggedProblem, offsets_of
from cupy_kernels.table import ALGORITHMS, default_plan, make_program
from simattn import AttentionProblem, Tiles, Traffic, run, run_backward
from simattn.algorithms.flash3 import ragged_metadata_bytes
from simattn.arithmetic.formats import numpy_dtype
from simattn.hardware import get_hardware
from simattn.plan import Plan
from simattn.planning import DEFAULT_HARDWARE
from simattn.problem import Direction
from simattn.testing import Inputs, attention_inputs, attention_problems

Values = npt.NDArray[Any]

HEAD_DIMS = tuple(range(8, 257, 8))
OTHER_TILES = (Tiles(q=64, kv=64), Tiles(q=64, kv=32), Tiles(q=32, kv=32))
"""Their tiles, for one in four."""

OTHER_PLANS_COLUMNS = (32, 128)
"""Column buckets of the problems that are not run by their default plan."""

PLAN_FIELDS: dict[str, tuple[Any, ...]] = {
    "dq": ("reduce", "deterministic", "load_add_store"),
    "grouped_gradients": ("loop", "expand", "reduce"),
    "softmax_passes": (1, 2, 3),
    "hbm_accumulator": ("float32", "storage"),
}
PACKED_HEADS = (1, 2, 4, 8)
"""Fields of plans, where an algorithm's has them, and what is drawn for them."""

LONGEST = 300
"""Most rows of a sequence: a few tiles."""

MOST_SEQUENCES = 6
"""Sequences of a problem whose sequences have lengths of their own, at most."""

CHUNK = 50
"""Problems that are simulated and compared at a time."""

FAILURES_DESCRIBED = 20
GUARD_BYTES = 4096
LOOSE_UNITS = 64
"""Units in the last place of float32, of the largest result, that sums in another order may differ by.

In a storage format of 16 bits they may differ by one of the format's units besides."""

LEAST_STORED = 2.0**-24
"""The smallest number of float16."""

SPECIAL_VALUES = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 65504.0)
"""Values that rounding, maxima and sums treat apart; 1e-40 is subnormal in float32 and bfloat16, 0 in float16."""


RESULTS: dict[Direction, tuple[str, ...]] = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}
"""What is compared, by direction."""

ProgramName = tuple[str, Direction]

PROGRAMS: tuple[ProgramName, ...] = tuple(
    (name, direction) for name, item in ALGORITHMS.items() for direction in item.programs
)
"""Every algorithm and direction that there are kernels for."""

# Cases


@dataclass(frozen=True)
class Layout:
    """How an array of shape (batch, length, heads, columns) lies in memory.

    Attributes
    ----------
    order
        The first three axes from the outermost to the innermost.
    padding
        Unused columns after every row; a multiple of 8.
    reverse
        Whether the rows are stored last to first.
    """

    order: tuple[int, ...] = (0, 1, 2)
    padding: int = 0
    reverse: bool = False


@dataclass(frozen=True)
class Case:
    """A problem with its inputs and how they lie in the device's memory.

    Attributes
    ----------
    algorithm, direction
        What computes it.
    problem, plan
        The problem, and the plan of that direction; a backward case's forward pass has the default plan.
    inputs
        q, k and v, and dout of a backward case.
    layouts
        Of the inputs.
    lengths
        Queries and keys of every sequence of a :class:`RaggedProblem`, whose inputs have a batch axis of length 1.
    """

    algorithm: str
    direction: Direction
    problem: AttentionProblem
    plan: Plan
    inputs: Inputs
    layouts: dict[str, Layout]
    lengths: tuple[tuple[int, int], ...] | None = None

    @property
    def offsets(self) -> dict[str, Values]:
        """Where the sequences start, and the last one ends, by name of the array; nothing if all have one length."""
        if self.lengths is None:
            return {}
        return {
            name: np.array(offsets_of([pair[side] for pair in self.lengths]), np.int32)
            for side, name in enumerate(OFFSETS)
        }

    def sequences(self) -> Iterator[Case]:
        """Yield every sequence as a case of its own."""
        assert self.lengths is not None
        assert isinstance(self.problem, RaggedProblem)
        q_starts, k_starts = (array.tolist() for array in self.offsets.values())
        for queries, keys, q_start, k_start in zip(*zip(*self.lengths, strict=True), q_starts, k_starts, strict=False):
            rows = {"q": slice(q_start, q_start + queries)}
            rows |= dict.fromkeys("kv", slice(k_start, k_start + keys))
            inputs = {name: array[:, rows[name]] for name, array in self.inputs.items()}
            yield replace(self, problem=self.problem.sequence(queries, keys), inputs=inputs, layouts={}, lengths=None)

    @property
    def repeats(self) -> frozenset[str]:
        """Results whose order of sums the plan fixes, and so their bits."""
        loose = set()
        if self.direction == "backward":
            if getattr(self.plan, "dq", None) == "reduce":
                loose.add("dq")
            if grouping(self.problem, self.plan) == "reduce":
                loose |= {"dk", "dv"}
        return frozenset(RESULTS[self.direction]) - loose


@dataclass(frozen=True)
class Expected:
    """What the simulated machine returns for a case: results, saved arrays that a backward case takes, bytes moved."""

    results: dict[str, Values]
    saved: dict[str, Values]
    traffic: Traffic
    offset_bytes: int = 0  # read of the offsets of sequences


@st.composite
def layouts(draw: st.DrawFn, *, may_reverse: bool = True) -> Layout:
    """Draw a layout; half of them are contiguous."""
    if draw(st.booleans()):
        return Layout()
    order, padding = draw(st.permutations((0, 1, 2)).map(tuple)), draw(st.sampled_from((0, 8, 24)))
    return Layout(order, padding, may_reverse and draw(st.booleans()))


@st.composite
def plans(draw: st.DrawFn, problem: AttentionProblem, algorithm: str, direction: Direction) -> Plan:
    """Draw a plan that there are kernels for.

    Plans far from the default ones are drawn for some column buckets alone, so that the kernels to compile stay few.
    """
    deterministic = direction == "backward" and draw(st.booleans())
    plan = default_plan(problem, algorithm=algorithm, direction=direction, deterministic=deterministic)
    changes: dict[str, Any] = {}
    if hasattr(plan, "packed_heads"):
        most = 1 if isinstance(problem, RaggedProblem) else problem.group_size
        sizes = [size for size in PACKED_HEADS if most % size == 0]
        changes["packed_heads"] = draw(st.sampled_from(sizes))
        plan = replace(plan, **changes)
    if column_bucket(problem) not in OTHER_PLANS_COLUMNS:
        return plan
    if algorithm == "flash2" and getattr(plan, "units", None) == "tensor_cores":
        changes["units"] = draw(st.sampled_from(("tensor_cores", "cuda_cores")))
    if draw(st.integers(0, 3)) == 0:
        changes["tiles"] = draw(st.sampled_from(OTHER_TILES))
    relevant = {"softmax_passes", "hbm_accumulator"} | (
        {"dq", "grouped_gradients"} if direction == "backward" else set()
    )
    for name in sorted(relevant):
        if hasattr(plan, name):
            changes[name] = draw(st.sampled_from(PLAN_FIELDS[name]))
    if changes.get("softmax_passes") == 1:
        changes["enforce_capacity"] = False  # the program keeps whole rows of a tile on chip, the kernel fewer of them
    changed = replace(plan, **changes)
    for tiles in (changed.tiles, plan.tiles, *OTHER_TILES):
        with contextlib.suppress(ValueError):  # tiles that are too large for the columns or the plan
            made = replace(changed, tiles=tiles)
            make_program(algorithm, direction, problem, made, DEFAULT_HARDWARE)
            return made
    raise AssertionError(f"no tiles fit {changed}")


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    algorithms: Sequence[str] | None = None,
    directions: Sequence[Direction] = ("forward", "backward"),
    max_len: int = LONGEST,
    max_heads: int = 6,
    head_dims: Sequence[int] = HEAD_DIMS,
) -> Case:
    """Draw a problem that the kernels take, its inputs and their layouts.

    Parameters
    ----------
    algorithms, directions
        What to draw from; default all that there are kernels for.
    max_len, max_heads, head_dims
        Sizes to draw from.
    """
    # First, since in a run of few examples hypothesis never draws the simplest value of the first draw.
    special_places = draw(st.integers(0, 2**32 - 1))
    algorithm = draw(st.sampled_from(tuple(algorithms or ALGORITHMS)))
    direction = draw(st.sampled_from([name for name in directions if name in ALGORITHMS[algorithm].programs]))
    problem = draw(
        attention_problems(
            max_batch=3,
            max_heads=max_heads,
            max_len=max_len,
            head_dims=head_dims,
            dtypes=ALGORITHMS[algorithm].dtypes(get_hardware(DEFAULT_HARDWARE)),
            block_sparse=False,
        )
    )
    lengths = None
    if direction in ALGORITHMS[algorithm].ragged and draw(st.integers(0, 2)) == 0:
        length = st.one_of(st.sampled_from((0, 1)), st.integers(0, max_len))
        lengths = tuple(draw(st.lists(st.tuples(length, length), min_size=1, max_size=MOST_SEQUENCES)))
        problem = RaggedProblem.of(problem, lengths)
    plan = draw(plans(problem, algorithm, direction))
    is_backward, hidden_is_finite = direction == "backward", draw(st.booleans())
    if isinstance(problem, RaggedProblem) and lengths is not None:
        parts = [draw(attention_inputs(problem.sequence(*pair), hidden_is_finite=hidden_is_finite)) for pair in lengths]
        inputs = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    else:
        inputs = draw(attention_inputs(problem, backward=is_backward, hidden_is_finite=hidden_is_finite))
    if draw(st.integers(0, 3)) == 0:
        generator = np.random.default_rng(special_places)
        for array in inputs.values():
            if array.size:
                places = generator.integers(0, array.size, draw(st.integers(0, 4)))
                array.reshape(-1)[places] = generator.choice(SPECIAL_VALUES, len(places)).astype(array.dtype)
    # Tensor maps take no rows from last to first.
    may_reverse = not any(
        step.kernel.boxes for step in make_program(algorithm, direction, problem, plan, DEFAULT_HARDWARE).steps
    )
    drawn_layouts = {name: draw(layouts(may_reverse=may_reverse)) for name in inputs}
    return Case(algorithm, direction, problem, plan, inputs, drawn_layouts, lengths)


def random_case(
    algorithm: str, direction: Direction, problem: AttentionProblem, *, plan: Plan | None = None, number: int = 0
) -> Case:
    """Return a problem with contiguous inputs from N(0, 1).

    Parameters
    ----------
    algorithm, direction, problem
        What computes what.
    plan
        Default: the default plan.
    number
        Seed of the inputs.
    """
    generator = np.random.default_rng(number)
    shapes = {
        "q": (problem.batch, problem.q_len, problem.heads, problem.head_dim),
        "k": (problem.batch, problem.kv_len, problem.kv_heads, problem.head_dim),
        "v": (problem.batch, problem.kv_len, problem.kv_heads, problem.value_dim),
    }
    if direction == "backward":
        shapes["dout"] = (problem.batch, problem.q_len, problem.heads, problem.value_dim)
    stored = numpy_dtype(problem.dtype)
    inputs = {name: generator.standard_normal(shape).astype(stored) for name, shape in shapes.items()}
    chosen = plan or default_plan(problem, algorithm=algorithm, direction=direction)
    return Case(algorithm, direction, problem, chosen, inputs, {name: Layout() for name in inputs})


def programs_of(algorithms: Sequence[str]) -> tuple[ProgramName, ...]:
    """Return the algorithms and directions that there are kernels for, of some algorithms."""
    return tuple(one for one in PROGRAMS if one[0] in algorithms)


def draw_case(
    number: int, index: int, longest: int = LONGEST, programs: Sequence[ProgramName] = PROGRAMS, **options: Any
) -> Case:
    """Return a case, which depends on the arguments and the version of hypothesis alone.

    Parameters
    ----------
    number
        The seed.
    index
        Which of its cases.
    longest
        Most rows of a sequence.
    programs
        Algorithms and directions that cases have in turn, without options.
    **options
        As for :func:`cases`.
    """
    drawn: list[Case] = []
    if not options:
        algorithm, direction = programs[index % len(programs)]
        options = {"algorithms": (algorithm,), "directions": (direction,)}

    @seed(f"{number} {index}")
    @settings(
        max_examples=2,  # the first is always the smallest problem; later ones would resemble the second
        phases=[Phase.generate],
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(max_len=longest, **options))
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn[-1]


# Both sides


def simulate(case: Case) -> Expected:
    """Run a case on the simulated machine, a backward case after its forward pass, sequences one after the other."""
    if case.lengths is not None:
        return _simulate_sequences(case)
    problem, arrays = case.problem, [case.inputs[name] for name in "qkv"]
    options: dict[str, Any] = {"scale": problem.scale, "causal": problem.causal, "window": problem.window}
    arithmetic_of = ALGORITHMS[case.algorithm].arithmetic
    plan = case.plan
    if case.direction == "backward":
        plan = default_plan(problem, algorithm=case.algorithm)
    done = run(case.algorithm, *arrays, **options, arithmetic=arithmetic_of(problem, plan), plan=plan)
    if case.direction == "backward":
        assert done.saved is not None
        saved = dict(done.saved)
        options["arithmetic"] = arithmetic_of(problem, case.plan)
        q, k, v = arrays
        done = run_backward(case.algorithm, q, k, v, case.inputs["dout"], **options, plan=case.plan, saved=saved)
    else:
        saved = {}
    return Expected({name: getattr(done, name) for name in RESULTS[case.direction]}, saved, done.traffic.global_only())


def _simulate_sequences(case: Case) -> Expected:
    """Return the results of all sequences, each simulated alone."""
    single = [simulate(sequence) for sequence in case.sequences()]
    results = {
        "out": np.concatenate([one.results["out"][0] for one in single]),
        "lse": np.concatenate([one.results["lse"][0] for one in single], axis=1),
    }
    traffic = Traffic()
    for one in single:
        traffic = traffic + one.traffic
    problem = case.problem
    read = ragged_metadata_bytes(problem.q_len, problem.batch, problem.heads, case.plan.tiles.q)
    return Expected(results, {}, traffic, read)


def variants_of_chunk(
    number: int, first: int, stop: int, longest: int, programs: Sequence[ProgramName] = PROGRAMS
) -> set[Variant]:
    """Return the kernels that cases ``first … stop - 1`` run."""
    found: set[Variant] = set()
    for index in range(first, stop):
        case = draw_case(number, index, longest, programs)
        program = make_program(case.algorithm, case.direction, case.problem, case.plan, DEFAULT_HARDWARE)
        for step in program.steps:
            found |= {step.kernel.variant(count_traffic=counting) for counting in (False, True)}
    return found


def simulated_chunk(
    number: int, first: int, stop: int, longest: int, programs: Sequence[ProgramName]
) -> list[tuple[Case, Expected]]:
    """Draw cases ``first … stop - 1`` and run them on the simulated machine; the work of a process of the pool."""
    drawn = [draw_case(number, index, longest, programs) for index in range(first, stop)]
    return [(case, simulate(case)) for case in drawn]


def on_device(values: Values, layout: Layout | None = None) -> Any:
    """Return a CuPy array of these values in a layout, the unused memory filled with NaN."""
    cupy = require_cupy()
    layout = layout or Layout()
    shape = [values.shape[axis] for axis in layout.order]
    stored = np.full((*shape, values.shape[3] + layout.padding), np.nan, values.dtype)
    stored[..., : values.shape[3]] = values.transpose(*layout.order, 3)
    if layout.reverse:
        stored = np.flip(stored, layout.order.index(1))
    back = [layout.order.index(axis) for axis in range(3)]
    # CuPy copies any two-byte type as an integer, whether or not it computes with it.
    held = cupy.asarray(np.ascontiguousarray(stored).view(f"u{stored.itemsize}")).view(values.dtype)
    array = held[..., : values.shape[3]].transpose(*back, 3)
    return array[:, ::-1] if layout.reverse else array


def saved_on_device(values: Values) -> Any:
    """Return a CuPy array of what a forward pass saved: statistics adjacent, rows of four axes padded to vectors."""
    if values.ndim == 3:
        return require_cupy().asarray(np.ascontiguousarray(values))
    return on_device(values, Layout(padding=-values.shape[3] % SQUARE_ROW_MULTIPLE))


def from_device(array: Any) -> Values:
    """Return the values of a CuPy array."""
    cupy = require_cupy()
    held: Values = cupy.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").get()
    return held.view(array.dtype)


class GuardedArray:
    """An array for results between two strips of memory that nothing may write to."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        cupy = require_cupy()
        self.size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.memory = cupy.full(self.size + 2 * GUARD_BYTES, 0xFF, dtype=cupy.uint8)  # NaN in every format
        self.array = self.memory[GUARD_BYTES : GUARD_BYTES + self.size].view(dtype).reshape(shape)

    def intact(self) -> bool:
        """Say whether nothing was written outside the array."""
        before, after = self.memory[:GUARD_BYTES], self.memory[GUARD_BYTES + self.size :]
        return bool((before == 0xFF).all()) and bool((after == 0xFF).all())


def compare(case: Case, expected: Expected) -> dict[str, int]:
    """Run a case on the device, in the fast and in the counting build, and count what differs.

    Results that are added up in no fixed order are left out of the bits, but must be within rounding of the sum.

    Returns
    -------
    dict
        ``elements`` compared; ``differing_elements`` of the results; ``differing_counts``, arrays and directions whose
        bytes differ; ``written_outside``, results that something was written beside.
    """
    from cupy_kernels import count_traffic

    arrays = {name: on_device(values, case.layouts[name]) for name, values in case.inputs.items()}
    saved = {name: saved_on_device(values) for name, values in expected.saved.items()}
    tally = Counter(elements=0, differing_elements=0, differing_counts=0, written_outside=0)
    for counting in (False, True):
        results = {name: GuardedArray(wanted.shape, wanted.dtype) for name, wanted in expected.results.items()}
        if counting:
            with count_traffic() as counted:
                call(case, arrays, saved, results)
            tally["differing_counts"] += differing_counts(counted.traffic, expected.traffic)
            tally["differing_counts"] += counted.metadata.get(SEQUENCE_OFFSETS, 0) != expected.offset_bytes
        else:
            call(case, arrays, saved, results)
        for name, wanted in expected.results.items():
            tally["elements"] += wanted.size
            found = from_device(results[name].array)
            differing = differing_elements if name in case.repeats else differing_sums
            tally["differing_elements"] += differing(found, wanted)
            tally["written_outside"] += not results[name].intact()
    return dict(tally)


def call(case: Case, arrays: dict[str, Any], saved: dict[str, Any], results: dict[str, GuardedArray]) -> None:
    """Run a case on the device, its results written to guarded arrays."""
    from cupy_kernels import attention, attention_backward

    problem, given = case.problem, [arrays[name] for name in "qkv"]
    options: dict[str, Any] = {
        "scale": problem.scale,
        "causal": problem.causal,
        "window": problem.window,
        "algorithm": case.algorithm,
        "plan": case.plan,
    }
    if case.lengths is not None:
        given = [array[0] for array in given]
        options |= {name: require_cupy().asarray(offsets) for name, offsets in case.offsets.items()}
    if case.direction == "forward":
        attention(*given, **options, return_lse=True, out=(results["out"].array, results["lse"].array))
    else:
        gradients = (results["dq"].array, results["dk"].array, results["dv"].array)
        attention_backward(arrays["dout"], *given, **options, saved=saved, gradients=gradients)


def differing_sums(actual: Values, expected: Values) -> int:
    """Return how many elements differ by more than sums in another order may, relative to the largest.

    A NaN or Inf of one must be one of the other.
    """
    found, wanted = (array.astype(np.float64) for array in (actual, expected))
    finite = np.isfinite(wanted)
    size = np.abs(wanted[finite]).max(initial=0.0)
    stored = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[actual.dtype.name]
    with np.errstate(invalid="ignore"):
        allowed = LOOSE_UNITS * float(np.finfo(np.float32).eps) * size + stored * np.abs(wanted) + LEAST_STORED
        far = ~(np.abs(found - wanted) <= allowed)
    return int(np.count_nonzero(np.where(finite, far, np.isfinite(found))))


def differing_elements(actual: Values, expected: Values) -> int:
    """Return how many elements differ in their bits, all NaN taken as equal."""
    bits = [array.view(f"u{array.itemsize}") for array in (actual, expected)]
    both_nan = np.isnan(actual.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    return int(np.count_nonzero((bits[0] != bits[1]) & ~both_nan))


def differing_counts(actual: Traffic, expected: Traffic) -> int:
    """Return how many counters of an array differ."""
    rows = [{row["array"]: row for row in traffic.rows()} for traffic in (actual, expected)]
    names = (set(rows[0]) | set(rows[1])) - {"total"}
    none: dict[str, str | int] = {}
    counters = {key for row in (*rows[0].values(), *rows[1].values()) for key in row if key != "array"}
    return sum(
        rows[0].get(name, none).get(key, 0) != rows[1].get(name, none).get(key, 0) for name in names for key in counters
    )


# The run


@dataclass
class Tally:
    """What was compared so far, and what differed."""

    problems: int = 0
    elements: int = 0
    differing_elements: int = 0
    differing_counts: int = 0
    written_outside: int = 0
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing differed."""
        return self.differing_elements == self.differing_counts == self.written_outside == 0


def describe(case: Case) -> str:
    """Return a case in one line."""
    layouts_text = ", ".join(f"{name}={layout}" for name, layout in case.layouts.items())
    lengths = "" if case.lengths is None else f" lengths={case.lengths}"
    return f"{case.algorithm} {case.direction} {case.problem} {case.plan} {layouts_text}{lengths}"


def environment() -> dict[str, Any]:
    """Return the device, the driver and the versions that results belong to."""
    cupy = require_cupy()
    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    versions = {"python": platform.python_version(), "cupy": cupy.__version__, "compiler": compiler.compiler_version()}
    for name in ("numpy", "numba", "ml_dtypes", "hypothesis", "simattn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": properties["name"].decode(),
        "compute_capability": device.compute_capability,
        "multiprocessors": properties["multiProcessorCount"],
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "versions": versions,
        "kernel_sources": sources_digest(),
    }


def sources_digest() -> str:
    """Return a digest of the kernels' source."""
    digest = hashlib.sha256()
    for source in sorted(compiler.KERNEL_DIRECTORY.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _write(path: Path, report: dict[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, path)


def _resumed(
    path: Path, request: dict[str, Any], found: dict[str, Any]
) -> tuple[Tally, Counter[str], list[dict[str, Any]]]:
    """Return what an earlier run left in the file."""
    if not path.exists():
        return Tally(), Counter(), []
    report = json.loads(path.read_text())
    for name, wanted in (("request", request), *found.items()):
        if report.get(name) != wanted:
            raise ValueError(f"{path} holds results of {name} {report.get(name)}: expected {wanted}, or another file")
    return Tally(**report["tally"]), Counter(report["problems_by_kind"]), report["failures"]


def precompile(pool: ProcessPoolExecutor, variants: set[Variant], architecture: str) -> None:
    """Compile kernels into the cache, side by side.

    Raises
    ------
    RuntimeError
        If one does not compile.
    """
    for made in pool.map(compiler.attempt, variants, [architecture] * len(variants)):
        if made.error:
            raise RuntimeError(made.error)


def _take_one_core() -> None:
    """Compute in one thread: there are as many workers as cores."""
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")


def _work(
    number: int,
    longest: int,
    programs: Sequence[ProgramName],
    first: int,
    stop: int,
    processes: int,
    architecture: str,
) -> Iterator[list[tuple[Case, Expected]]]:
    """Yield the cases ``first … stop - 1`` in order, in chunks, simulated by a pool that keeps a few ahead.

    The pool first compiles the kernels into the cache.
    """
    context = multiprocessing.get_context("spawn")  # a fork would take over the CUDA context
    chunks = [(at, min(stop, at + CHUNK)) for at in range(first, stop, CHUNK)]
    with ProcessPoolExecutor(processes, context, initializer=_take_one_core) as pool:
        try:
            drawn = [pool.submit(variants_of_chunk, number, *chunk, longest, programs) for chunk in chunks]
            variants: set[Variant] = set().union(*(future.result() for future in drawn))
            precompile(pool, variants, architecture)
            waiting: list[Future[list[tuple[Case, Expected]]]] = []
            while chunks or waiting:
                while chunks and len(waiting) < 2 * processes:
                    waiting.append(pool.submit(simulated_chunk, number, *chunks.pop(0), longest, programs))
                yield waiting.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)


def verify(
    problems: int,
    number: int,
    output: Path,
    *,
    longest: int = LONGEST,
    programs: Sequence[ProgramName] = PROGRAMS,
    processes: int | None = None,
    minutes: float | None = None,
) -> Tally:
    """Compare the kernels with the simulated machine on random problems and write a summary.

    Parameters
    ----------
    problems
        How many; those that the file holds already count.
    number
        Seed of the problems.
    output
        File of the summary, JSON; a run that was stopped goes on from it.
    longest
        Most rows of a sequence.
    programs
        Algorithms and directions, in turn.
    processes
        How many simulate; default one for each core.
    minutes
        When to stop, at the end of a chunk.

    Returns
    -------
    Tally
        What was compared and what differed.

    Raises
    ------
    ValueError
        If the file holds the results of another run.
    RuntimeError
        If there is no device.
    """
    request = {
        "seed": number,
        "longest": longest,
        "programs": [" ".join(one) for one in programs],
    }
    found, start = environment(), time.monotonic()
    tally, by_kind, failures = _resumed(output, request, found)
    spent = tally.seconds
    capability = found["compute_capability"]
    architecture = compiler.choose_architecture((int(capability[:-1]), int(capability[-1])))
    cores = processes or len(os.sched_getaffinity(0))
    for work in _work(number, longest, programs, tally.problems, problems, cores, architecture):
        for case, expected in work:
            result = compare(case, expected)
            if any(result[name] for name in result if name != "elements") and len(failures) < FAILURES_DESCRIBED:
                failures.append({"index": tally.problems, "case": describe(case), **result})
            for name, value in result.items():
                setattr(tally, name, getattr(tally, name) + value)
            tally.problems += 1
            by_kind[f"{case.algorithm} {case.direction} {case.problem.dtype}"] += 1
        tally.seconds = round(spent + time.monotonic() - start, 1)
        report = {
            "request": request,
            **found,
            "tally": asdict(tally),
            "problems_by_kind": dict(by_kind),
            "failures": failures,
        }
        _write(output, report)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{tally.problems:,} problems, clean: {tally.clean}")
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            break
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cupy_kernels.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=1000, help="how many problems (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems (default 0)")
    parser.add_argument("--output", type=Path, required=True, help="file of the summary, JSON")
    parser.add_argument("--longest", type=int, default=LONGEST, help=f"most rows of a sequence (default {LONGEST})")
    parser.add_argument(
        "--algorithm",
        action="append",
        choices=tuple(ALGORITHMS),
        help="an algorithm whose problems to draw; may be repeated (default: all)",
    )
    parser.add_argument("--without-memory-pool", action="store_true", help="allocate every array by itself")
    parser.add_argument("--processes", type=int, help="how many processes simulate (default one for each core)")
    parser.add_argument("--minutes", type=float, help="when to stop; a later run goes on")
    arguments = parser.parse_args(argv)
    if arguments.without_memory_pool:
        require_cupy().cuda.set_allocator(None)
    tally = verify(
        arguments.problems,
        arguments.seed,
        arguments.output,
        longest=arguments.longest,
        programs=programs_of(arguments.algorithm or tuple(ALGORITHMS)),
        processes=arguments.processes,
        minutes=arguments.minutes,
    )
    sys.stdout.write(json.dumps(asdict(tally), indent=1) + "\n")
    return 0 if tally.clean else 1


if __name__ == "__main__":
    # By the module's own name, by which the pool's processes know the classes.
    raise SystemExit(import_module("cupy_kernels.verify").main())
