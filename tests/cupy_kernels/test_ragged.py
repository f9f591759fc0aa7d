"""Sequences with lengths of their own: each has the bits it has alone, whatever its neighbours hold."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simattn
from cupy_kernels import cpu_build
from cupy_kernels.cpu_build import COPIES, ORDERS, run_program
from cupy_kernels.ragged import RaggedProblem, offsets_of
from cupy_kernels.table import default_plan, make_program
from simattn.algorithms.flash3 import Flash3Plan, ragged_metadata_bytes
from simattn.arithmetic.formats import numpy_dtype
from simattn.hardware import get_hardware
from simattn.plan import Tiles
from simattn.planning import DEFAULT_HARDWARE
from simattn.testing import assert_same_bits
from simattn.traffic import Traffic

try:
    COMPILER = cpu_build.compiler()
except cpu_build.CompilerNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)

BUILDS = (
    (64, "bfloat16", Tiles(q=64, kv=64)),
    (64, "float16", Tiles(q=192, kv=64)),
    (96, "float16", Tiles(q=128, kv=80)),
    (128, "bfloat16", Tiles(q=64, kv=64)),
    (256, "bfloat16", Tiles(q=64, kv=64)),
)
"""Column buckets, storage formats and tiles: few, since each is compiled."""

SPECIAL = (np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Case:
    """Sequences, their rows one after the other.

    Attributes
    ----------
    problem, plan
        What is computed of all of them.
    lengths
        Queries and keys of each.
    inputs
        q, k and v.
    """

    problem: RaggedProblem
    plan: Flash3Plan
    lengths: tuple[tuple[int, int], ...]
    inputs: dict

    @property
    def given(self):
        """What a program takes."""
        names = ("cu_seqlens_q", "cu_seqlens_k")
        offsets = (offsets_of([pair[side] for pair in self.lengths]) for side in range(2))
        return {**self.inputs, **{name: np.array(one, np.int32) for name, one in zip(names, offsets, strict=True)}}

    def rows(self, index):
        """Return the rows of a sequence in q and in k and v."""
        starts = [offsets_of([pair[side] for pair in self.lengths])[index] for side in range(2)]
        return tuple(slice(start, start + length) for start, length in zip(starts, self.lengths[index], strict=True))


def case_of(lengths, *, columns=64, value_dim=None, dtype="bfloat16", tiles=None, seed=0, **options):
    """Return a case with inputs from N(0, 1)."""
    problem = RaggedProblem(
        batch=len(lengths),
        q_len=sum(queries for queries, _ in lengths),
        kv_len=sum(keys for _, keys in lengths),
        head_dim=columns,
        value_dim=value_dim,
        dtype=dtype,
        **options,
    )
    plan = default_plan(problem, algorithm="flash3") if tiles is None else Flash3Plan(tiles=tiles)
    generator, stored = np.random.default_rng(seed), numpy_dtype(dtype)
    shapes = {
        "q": (problem.q_len, problem.heads, problem.head_dim),
        "k": (problem.kv_len, problem.kv_heads, problem.head_dim),
        "v": (problem.kv_len, problem.kv_heads, problem.value_dim),
    }
    inputs = {name: generator.standard_normal(shape).astype(stored) for name, shape in shapes.items()}
    return Case(problem, plan, tuple(lengths), inputs)


@st.composite
def cases(draw, max_len=200, **options):
    """Draw sequences of any lengths, and where NaN and Inf lie."""
    columns, dtype, tiles = draw(st.sampled_from(BUILDS))
    below = {64: 0, 96: 64, 128: 96, 256: 192}[columns]
    wide, narrow = draw(st.integers(below // 8 + 1, columns // 8)) * 8, draw(st.integers(1, columns // 8)) * 8
    head_dim, value_dim = draw(st.permutations((wide, narrow)))
    length = st.one_of(st.sampled_from((0, 1)), st.integers(0, max_len))
    lengths = draw(st.lists(st.tuples(length, length), min_size=1, max_size=7))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    side = st.one_of(st.none(), st.integers(0, max_len))
    mask = draw(st.sampled_from(({}, {"causal": True}, {"window": draw(st.tuples(side, side))})))
    case = case_of(
        lengths, columns=head_dim, value_dim=value_dim, dtype=dtype, tiles=tiles, heads=heads, kv_heads=kv_heads,
        seed=draw(st.integers(0, 2**32 - 1)), **mask, **options,
    )  # fmt: skip
    for name in draw(st.sets(st.sampled_from("qkv"))):
        array = case.inputs[name]
        places = np.random.default_rng(draw(st.integers(0, 99))).random(array.shape[:1]) < draw(
            st.sampled_from((0.01, 0.2))
        )
        array[places] = draw(st.sampled_from(SPECIAL))
    return case


def simulate(case):
    """Return results and traffic of the single sequences, one after the other."""
    problem, outs, lses, traffic = case.problem, [], [], Traffic()
    options = {"scale": problem.scale, "causal": problem.causal, "window": problem.window}
    for index in range(len(case.lengths)):
        queries, keys = case.rows(index)
        arrays = (case.inputs["q"][queries], case.inputs["k"][keys], case.inputs["v"][keys])
        done = simattn.run("flash3", *(array[None] for array in arrays), **options, arithmetic="hopper", plan=case.plan)
        outs.append(done.out[0]), lses.append(done.lse[0])
        traffic = traffic + done.traffic.global_only()
    return {"out": np.concatenate(outs), "lse": np.concatenate(lses, axis=1)}, traffic


def program_of(case, multiprocessors=2):
    hardware = replace(get_hardware(DEFAULT_HARDWARE), streaming_multiprocessors=multiprocessors)
    return make_program("flash3", "forward", case.problem, case.plan, hardware)


def metadata_of(case):
    problem = case.problem
    return ragged_metadata_bytes(problem.q_len, problem.batch, problem.heads, case.plan.tiles.q)


def assert_right(case, *, multiprocessors=2, **options):
    """The CPU build's results and counts are those of the single sequences on the simulated machine."""
    expected, traffic = simulate(case)
    metadata = {}
    found, counted = run_program(program_of(case, multiprocessors), case.given, **options, metadata=metadata)
    for name, wanted in expected.items():
        assert_same_bits(found[name], wanted, name=name)
    assert counted == traffic
    assert metadata.get("sequence_offsets", 0) == metadata_of(case)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the builds side by side."""
    kernels = set()
    for columns, dtype, tiles in BUILDS:
        for causal in (False, True):
            case = case_of([(1, 1)], columns=columns, dtype=dtype, tiles=tiles, causal=causal)
            kernels |= {step.kernel for step in program_of(case).steps}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cpu_build.build, kernels))


@settings(max_examples=60)
@given(
    cases(),
    st.sampled_from(ORDERS),
    st.sampled_from(COPIES),
    st.integers(0, 99),
    st.sampled_from((1, 3, 132)),
)
def test_bits_and_counts_are_those_of_the_single_sequences(case, order, copies, seed, multiprocessors):
    assert_right(case, order=order, copies=copies, seed=seed, multiprocessors=multiprocessors)
