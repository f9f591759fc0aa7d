"""The KV cache: sizes, pools whose invariants hold after every operation, and two simulators that agree."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import simattn
from simattn.arithmetic.formats import ITEM_BYTES
from simattn.claims import memory_management
from simattn.kv_cache import (
    ALLOCATORS,
    STATES,
    Buddy,
    BuddyPool,
    CacheRun,
    CacheShape,
    Constant,
    Geometric,
    Lognormal,
    OutOfPagesError,
    Paged,
    PagedPool,
    Poisson,
    Reserve,
    ReservePool,
    Uniform,
    Workload,
    compare_allocators,
    generate_workload,
    get_allocator,
    parse_lengths,
    read_trace,
    simulate,
    write_trace,
)
from simattn.models import MODELS

MAX_TOKENS = 32

# Sizes


@given(
    layers=st.integers(1, 100),
    kv_heads=st.integers(1, 64),
    dims=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    batch=st.integers(0, 9),
    length=st.integers(0, 10**6),
)
def test_bytes_are_the_sizes_of_the_arrays(layers, kv_heads, dims, dtype, batch, length):
    key_dim, value_dim = dims
    shape = CacheShape(layers=layers, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    keys, values = (math.prod((layers, batch, length, kv_heads, columns)) for columns in dims)
    assert shape.bytes(batch=batch, length=length) == (keys + values) * ITEM_BYTES[dtype]
    assert shape.bytes(length=1) == shape.bytes_per_token
    if length:
        assert shape.tokens_in(length * shape.bytes_per_token) == length
        assert shape.tokens_in((length + 1) * shape.bytes_per_token - 1) == length


def test_grouped_heads_and_wide_keys():
    whole = CacheShape(layers=40, kv_heads=40, key_dim=128)
    assert whole.value_dim == 128
    assert whole == MODELS["LLaMA-13B"].cache
    assert whole.bytes_per_token == 2 * 40 * 40 * 128 * 2
    assert dataclasses.replace(whole, kv_heads=8).bytes_per_token * 5 == whole.bytes_per_token
    assert dataclasses.replace(whole, kv_heads=1).bytes_per_token * 40 == whole.bytes_per_token
    assert dataclasses.replace(whole, key_dim=192).bytes_per_token == 40 * 40 * (192 + 128) * 2
    assert dataclasses.replace(whole, dtype=np.float32).bytes_per_token == 2 * whole.bytes_per_token


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": 0}, ValueError, "layers=0"),
        ({"kv_heads": 2.0}, TypeError, "kv_heads=2.0 is a float"),
        ({"key_dim": -1}, ValueError, "key_dim=-1"),
        ({"value_dim": True}, TypeError, "value_dim=True"),
        ({"dtype": "int8"}, ValueError, "dtype='int8'"),
    ],
)
def test_shapes_are_checked(changes, error, message):
    with pytest.raises(error, match=message):
        CacheShape(**{"layers": 1, "kv_heads": 1, "key_dim": 64, **changes})


def test_amounts_are_checked():
    shape = MODELS["OPT-13B"].cache
    with pytest.raises(ValueError, match="batch=-1"):
        shape.bytes(batch=-1, length=3)
    with pytest.raises(TypeError, match=r"length=1\.5"):
        shape.bytes(length=1.5)
    with pytest.raises(ValueError, match=r"pool_bytes=819199: expected at least the 819200 bytes of one token"):
        shape.tokens_in(819199)


# Pools


class PagedPoolMachine(RuleBasedStateMachine):
    """Random operations on a small pool, and beside it the tokens that every sequence should read."""

    def __init__(self):
        super().__init__()
        self.pool = PagedPool(pages=6, page_tokens=3)
        self.memory = {}  # what the slots hold
        self.written = {}  # what was written to each sequence
        self.names = iter(range(10**6))

    def new_token(self, sequence):
        place = len(self.written[sequence])
        page = self.pool.tables[sequence][place // 3]
        token = next(self.names)
        self.memory[page, place % 3] = token
        self.written[sequence].append(token)

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.pool.tables)))

    @rule(tokens=st.integers(0, 8))
    def allocate(self, tokens):
        name, needed, before = next(self.names), math.ceil(tokens / 3), self.pool.free_pages
        if needed > before:
            with pytest.raises(OutOfPagesError, match=f"{needed} pages are needed and {before} are free"):
                self.pool.allocate(name, tokens=tokens)
            assert name not in self.pool.tables
            return
        self.pool.allocate(name, tokens=tokens)
        assert self.pool.free_pages == before - needed
        self.written[name] = []
        for _ in range(tokens):
            self.new_token(name)

    @precondition(lambda self: self.pool.tables)
    @rule(data=st.data())
    def fork(self, data):
        parent, child, before = self.some(data), next(self.names), self.pool.free_pages
        self.pool.fork(parent, child)
        assert self.pool.free_pages == before
        self.written[child] = list(self.written[parent])

    @precondition(lambda self: self.pool.tables)
    @rule(data=st.data())
    def append(self, data):
        sequence = self.some(data)
        before = self.pool.free_pages
        needed = self.pool.pages_to_append(sequence)
        if needed > before:
            with pytest.raises(OutOfPagesError):
                self.pool.append(sequence)
            return
        old = list(self.pool.tables[sequence])
        copied = self.pool.append(sequence)
        new = self.pool.tables[sequence]
        assert self.pool.free_pages == before - needed
        if copied:  # as a kernel would: the new page begins as the old one
            assert old[:-1] == new[:-1]
            assert self.pool.references[old[-1]] >= 1
            for slot in range(3):
                if (old[-1], slot) in self.memory:
                    self.memory[new[-1], slot] = self.memory[old[-1], slot]
        self.new_token(sequence)

    @precondition(lambda self: self.pool.tables)
    @rule(data=st.data())
    def release(self, data):
        sequence = self.some(data)
        self.pool.release(sequence)
        del self.written[sequence]

    @invariant()
    def tables_are_consistent_and_hold_what_was_written(self):
        self.pool.check()
        assert set(self.written) == set(self.pool.tables)
        for sequence, tokens in self.written.items():
            table = self.pool.tables[sequence]
            assert [self.memory[table[place // 3], place % 3] for place in range(len(tokens))] == tokens
        slots = {
            (self.pool.tables[name][place // 3], place % 3)
            for name, tokens in self.written.items()
            for place in range(len(tokens))
        }
        assert self.pool.used_tokens == len(slots)


TestPagedPool = PagedPoolMachine.TestCase


@given(pool=st.integers(1, 200), data=st.data())
def test_buddy_chunks_are_conserved(pool, data):
    buddies, taken = BuddyPool(pool), {}
    for _ in range(data.draw(st.integers(0, 30))):
        if taken and data.draw(st.booleans()):
            start = data.draw(st.sampled_from(sorted(taken)))
            buddies.release(start)
            del taken[start]
        else:
            size = 1 << data.draw(st.integers(0, 8))
            start = buddies.allocate(size)
            largest = max((chunk for _, chunk in buddies.free_chunks), default=0)
            if start is None:
                assert largest < size
            else:
                taken[start] = size
        buddies.check()
        assert dict(buddies.taken_chunks) == taken
        slots = [slot for start, size in taken.items() for slot in range(start, start + size)]
        assert len(slots) == len(set(slots))
        assert all(0 <= slot < pool for slot in slots)
        assert all(start % size == 0 for start, size in taken.items())
    for start in list(taken):
        buddies.release(start)
        buddies.check()
    whole = [size for _, size in buddies.free_chunks]
    assert whole == sorted((1 << bit for bit in range(pool.bit_length()) if pool >> bit & 1), reverse=True)


def test_buddies_split_and_join():
    pool = BuddyPool(16)
    assert pool.allocate(4) == 0
    assert pool.free_chunks == [(4, 4), (8, 8)]
    assert pool.allocate(8) == 8
    assert pool.allocate(8) is None
    pool.release(0)
    assert pool.free_chunks == [(0, 8)]
    pool.release(8)
    assert pool.free_chunks == [(0, 16)]


def test_a_reserve_pool_hands_out_every_chunk_once():
    pool = ReservePool(14, 4)
    assert [pool.allocate(4) for _ in range(4)] == [0, 4, 8, None]
    pool.release(4)
    pool.check()
    assert pool.allocate(4) == 4
    assert pool.allocate(4) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BuddyPool(0), "pool_tokens=0"),
        (lambda: BuddyPool(8).allocate(3), "tokens=3: expected a power of two"),
        (lambda: BuddyPool(8).release(4), "start=4"),
        (lambda: ReservePool(8, 4).allocate(3), "tokens=3: expected 4"),
        (lambda: ReservePool(8, 4).release(4), "start=4"),
        (lambda: PagedPool(4, 0), "page_tokens=0"),
        (lambda: PagedPool(4, 2).append("a"), "sequence='a': expected a sequence of the pool"),
        (lambda: PagedPool(4, 2).release("a"), "sequence='a'"),
        (lambda: PagedPool(4, 2).fork("a", "b"), "parent='a'"),
    ],
)
def test_wrong_uses_of_pools_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_of_sequences_are_unique():
    pool = PagedPool(4, 2)
    pool.allocate("a", tokens=1)
    with pytest.raises(ValueError, match="sequence='a': expected a new one"):
        pool.allocate("a", tokens=1)
    with pytest.raises(ValueError, match="child='a': expected a new one"):
        pool.fork("a", "a")


def broken_pools():
    def pool():
        made = PagedPool(pages=4, page_tokens=2)
        made.allocate("a", tokens=3)
        made.allocate("b", tokens=2)
        made.check()
        return made

    lost, double, short, twice, wrong = (pool() for _ in range(5))
    lost._free.pop()
    double._free.append(double.tables["a"][0])
    short.tokens["a"] = 2
    twice.tables["a"][1] = twice.tables["a"][0]
    wrong.tables["b"][0] = wrong.tables["a"][0]
    yield lost, "free list"
    yield double, "free list"
    yield short, "'a' has 2 pages: expected 1"
    yield twice, "places 0 and 1"
    yield wrong, "has the count 1: expected 2"
    chunks = BuddyPool(16)
    chunks.allocate(4)
    chunks._free[2][4] = None
    del chunks._free[2][4]
    yield chunks, "a chunk starts at slot 8: expected slot 4"
    apart = BuddyPool(16)
    apart._free = [{}, {}, {}, {0: None, 8: None}, {}]
    yield apart, "apart from its free buddy"
    crooked = BuddyPool(16)
    crooked._free = [{15: None}, {13: None}, {}, {}, {}]
    crooked._taken = {0: 3, 8: 2, 12: 0}
    yield crooked, "not aligned"
    shorter = BuddyPool(16)
    shorter._free = [{}, {}, {}, {0: None}, {}]
    yield shorter, "end at slot 8: expected 16"
    reserve = ReservePool(16, 4)
    reserve.release(reserve.allocate(4))
    reserve.check()
    reserve._free.pop()
    yield reserve, "lost"


@pytest.mark.parametrize(("pool", "message"), list(broken_pools()))
def test_checks_find_broken_pools(pool, message):
    with pytest.raises(RuntimeError, match=message):
        pool.check()


# Simulation


@st.composite
def workloads(draw, samples=3):
    lengths = draw(
        st.lists(
            st.tuples(
                st.integers(0, 6), st.integers(1, MAX_TOKENS - 1), st.integers(1, 31), st.sampled_from([1, 1, samples])
            ),
            min_size=1,
            max_size=10,
        )
    )
    gaps, prompts, outputs, counts = zip(*lengths, strict=True)
    return Workload(
        np.cumsum(gaps),
        prompts,
        [min(output, MAX_TOKENS - prompt) for prompt, output in zip(prompts, outputs, strict=True)],
        counts,
    )


allocators = st.one_of(
    st.just(Reserve()),
    st.builds(Buddy, st.sampled_from(["max", "pow2", "pow2-uncapped", "oracle"])),
    st.builds(Paged, st.integers(1, 9), st.booleans(), st.integers(0, 3)),
)
pools = st.integers(MAX_TOKENS, 4 * MAX_TOKENS)


def try_simulate(workload, allocator, pool_tokens, **options):
    try:
        return simulate(workload, allocator, pool_tokens=pool_tokens, max_tokens=MAX_TOKENS, **options)
    except ValueError as error:
        message = str(error)
    assert re.match(r"request \d+ needs", message)
    assume(False)


def assert_events_are_the_steps(workload, allocator, pool_tokens):
    walked = try_simulate(workload, allocator, pool_tokens, every_step=True)
    run = try_simulate(workload, allocator, pool_tokens)
    places = np.searchsorted(walked.step, run.step)
    for entry in dataclasses.fields(CacheRun):
        found, expected = getattr(run, entry.name), getattr(walked, entry.name)
        if entry.name in ("start_step", "finish_step"):
            assert np.array_equal(found, expected), entry.name
        elif isinstance(found, np.ndarray):
            assert np.array_equal(found, expected[places]), entry.name
        elif entry.name != "workload":
            assert found == expected, entry.name
    assert run.row() == {**walked.row(), "peak_batch": run.peak_batch}
    assert run.peak_batch == walked.peak_batch
    assert np.array_equal(walked.step, np.arange(workload.arrival_step[0], walked.finish_step.max() + 1))
    # Between recorded steps the used slots grow by the sequences, as the result's description says.
    latest = np.searchsorted(run.step, walked.step, side="right") - 1
    grown = run.used[latest] + run.sequences[latest] * (walked.step - run.step[latest])
    assert np.array_equal(grown, walked.used)
    return run


@given(workload=workloads(), allocator=allocators, pool_tokens=pools)
def test_events_and_steps_agree(workload, allocator, pool_tokens):
    assert_events_are_the_steps(workload, allocator, pool_tokens)


@given(workload=workloads(), page_tokens=st.integers(1, 9), sharing=st.booleans(), spare=st.integers(0, 12))
def test_events_and_steps_agree_in_tight_pools(workload, page_tokens, sharing, spare):
    allocator = Paged(page_tokens, sharing)
    requests = zip(workload.prompt_tokens, workload.output_tokens, workload.samples, strict=True)
    largest = max(allocator.request_pages(*map(int, lengths)) for lengths in requests)
    assert_events_are_the_steps(workload, allocator, largest * page_tokens + spare)


@given(workload=workloads(), allocator=allocators, pool_tokens=pools)
def test_states_fill_the_pool_in_every_step(workload, allocator, pool_tokens):
    for every_step in (False, True):
        run = try_simulate(workload, allocator, pool_tokens, every_step=every_step)
        states = np.stack([getattr(run, state) for state in STATES])
        assert (states >= 0).all()
        assert (states.sum(axis=0) == pool_tokens).all()
        for sums, steps in (
            (run.token_steps, run.steps),
            (run.token_steps_while_waiting, run.waiting_steps),
        ):
            assert min(sums.values()) >= 0
            assert sum(sums.values()) == pool_tokens * steps
        assert sum(run.shares.values()) == pytest.approx(1.0)
    arrived = np.searchsorted(workload.arrival_step, run.step, side="right")
    assert np.array_equal(run.running + run.waiting + run.finished, arrived)
    assert run.request_steps == run.running.sum()
    assert (run.start_step >= workload.arrival_step).all()
    duration = run.finish_step - run.start_step + 1
    assert (duration >= workload.output_tokens).all()
    if not run.preemptions:
        assert np.array_equal(duration, workload.output_tokens)
        assert run.request_steps == workload.output_tokens.sum()
    if not isinstance(allocator, Paged):
        assert run.preemptions == 0


@given(workload=workloads(), allocator=allocators, pool_tokens=pools)
def test_what_each_allocator_wastes(workload, allocator, pool_tokens):
    run = try_simulate(workload, allocator, pool_tokens, every_step=True)
    if isinstance(allocator, Paged):
        assert (run.reserved + run.internal <= run.sequences * (allocator.page_tokens - 1)).all()
        assert (run.external == pool_tokens % allocator.page_tokens).all()
    elif isinstance(allocator, Reserve):
        assert np.array_equal(run.used + run.reserved + run.internal, run.sequences * MAX_TOKENS)
        assert (run.external[run.waiting == 0] == pool_tokens % MAX_TOKENS).all()
    if allocator == Buddy("oracle"):
        assert not run.internal.any()
    if allocator in (Buddy("pow2"), Buddy("pow2-uncapped")):
        # It knows each output to a factor of two, so less than an output is reserved in vain.
        longest = (workload.samples * workload.output_tokens).max()
        assert (run.internal < np.maximum(run.running * longest, 1)).all()
    if not isinstance(allocator, Paged):
        assert not run.free[run.waiting > 0].any()


@given(workload=workloads(), page_tokens=st.sampled_from([1, 2, 4, 8, 16]), sharing=st.booleans(), pool_tokens=pools)
def test_paged_serves_no_request_later_than_reserve(workload, page_tokens, sharing, pool_tokens):
    # In pages that divide the maximum length, the oldest requests, which chunks hold, always fit; others are extra.
    workload = dataclasses.replace(workload, samples=np.ones(len(workload), dtype=np.int64))
    reserve = try_simulate(workload, Reserve(), pool_tokens)
    paged = try_simulate(workload, Paged(page_tokens, sharing), pool_tokens)
    assert (paged.finish_step <= reserve.finish_step).all()
    assert paged.peak_batch >= reserve.peak_batch
    assert paged.steps <= reserve.steps


@given(workload=workloads(samples=4), page_tokens=st.integers(1, 9))
def test_sharing_takes_no_more_pages(workload, page_tokens):
    pool_tokens = 10 * 4 * (MAX_TOKENS + 9)  # all fit at once, so both runs serve the same requests in every step
    shared, apart = (
        try_simulate(workload, Paged(page_tokens, sharing), pool_tokens, every_step=True) for sharing in (True, False)
    )
    assert np.array_equal(shared.finish_step, apart.finish_step)
    assert (shared.free >= apart.free).all()
    assert (shared.used <= apart.used).all()
    saved = [
        (prompt // page_tokens) * page_tokens * (samples - 1) * output
        for prompt, samples, output in zip(
            *(values.tolist() for values in (workload.prompt_tokens, workload.samples, workload.output_tokens)),
            strict=True,
        )
    ]
    assert apart.token_steps["used"] - shared.token_steps["used"] == sum(saved)
    assert shared.token_steps["free"] - apart.token_steps["free"] == sum(saved)


def test_a_preempted_request_resumes_with_what_it_had():
    # Two requests of 4 + 5 tokens in 4 pages of 4: in step 4 both would enter a third page.
    workload = Workload([0, 0], [4, 4], [5, 5])
    run = simulate(workload, Paged(page_tokens=4), pool_tokens=16, max_tokens=16, every_step=True)
    assert_events_are_the_steps(workload, Paged(page_tokens=4), 16)
    assert run.start_step.tolist() == [0, 0]
    assert run.preemptions == 1
    assert run.running.tolist() == [2, 2, 2, 2, 1, 1]
    assert run.waiting.tolist() == [0, 0, 0, 0, 1, 0]
    assert run.finish_step.tolist() == [4, 5]
    assert run.used.tolist() == [10, 12, 14, 16, 9, 9]
    assert run.free.tolist() == [0, 0, 0, 0, 4, 4]
    assert run.internal.tolist() == [0, 0, 0, 0, 3, 3]


def test_a_watermark_keeps_pages_free_at_admission():
    workload = Workload([0, 0], [4, 4], [1, 1])
    for watermark, peak in ((0, 2), (1, 1)):
        allocator = Paged(page_tokens=4, watermark_pages=watermark)
        assert simulate(workload, allocator, pool_tokens=16, max_tokens=16).peak_batch == peak


def test_a_chunk_by_what_is_known_of_the_output():
    # 5 + 11 tokens of at most 32. An output known as 16 makes 21.
    workload = Workload([0], [5], [11])
    for name, reservation, chunk in (
        ("max", 32, 32),
        ("pow2", 21, 32),
        ("pow2-uncapped", 21, 32),
        ("oracle", 16, 16),
    ):
        run = simulate(workload, Buddy(name), pool_tokens=64, max_tokens=32)
        assert (run.used[0], run.reserved[0]) == (6, 10)
        assert run.internal[0] == reservation - 16
        assert run.external[0] == chunk - reservation
        assert run.free[0] == 64 - chunk


def test_reservations_are_cut_to_the_maximum_unless_told_otherwise():
    # 12 + 17 tokens of at most 32: the output known as 32 makes 44.
    workload = Workload([0], [12], [17])
    capped, uncapped = (
        simulate(workload, Buddy(name), pool_tokens=64, max_tokens=32) for name in ("pow2", "pow2-uncapped")
    )
    assert (capped.internal[0], capped.external[0], capped.free[0]) == (32 - 29, 0, 32)
    assert (uncapped.internal[0], uncapped.external[0], uncapped.free[0]) == (44 - 29, 64 - 44, 0)


def test_results_are_determined_by_the_seed():
    def drawn(seed):
        return generate_workload(
            200, prompt=Geometric(20), output=Lognormal(30), arrivals=Poisson(0.5), max_tokens=128, seed=seed
        )

    first, again, other = drawn(3), drawn(3), drawn(4)
    for name in ("arrival_step", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    names = [name for name in ALLOCATORS if name != "paged-unshared"]
    runs, repeated = (compare_allocators(w, names, pool_tokens=1000, max_tokens=128) for w in (first, again))
    assert [run.row() for run in runs] == [run.row() for run in repeated]
    assert [run.rows() for run in runs] == [run.rows() for run in repeated]


def test_a_result_is_frozen_and_prints_as_a_table():
    workload = generate_workload(50, prompt=Uniform(1, 20), output=Constant(10), max_tokens=32)
    run = simulate(workload, pool_tokens=256, max_tokens=32)
    with pytest.raises(ValueError, match="read-only"):
        run.used[0] = 1
    with pytest.raises(TypeError):
        run.token_steps["used"] = 1
    text = repr(run)
    assert text.startswith("50 requests, pool of 256 tokens\nShares of the pool, all steps\nallocator ")
    assert f"{100 * run.saturated_shares['used']:.1f} %" in text
    runs = compare_allocators(workload, pool_tokens=256, max_tokens=32)
    names = ["reserve ", "buddy-max ", "buddy-pow2 ", "buddy-oracle ", "paged, pages of 16 "]
    assert [run.allocator.name for run in runs] == [name.split(",")[0].strip() for name in names]
    assert all(repr(runs).count(f"\n{name} ") == 2 for name in names[:-1])
    assert repr(runs).count(f"\n{names[-1]} ") == 2


def test_a_pool_that_nobody_waits_for():
    run = simulate(Workload([0, 100], [3, 3], [2, 2]), pool_tokens=64)
    assert "no request ever waited" in repr(run)
    assert run.row()["saturated_used_share"] is None
    assert run.steps == 102
    assert run.mean_batch == 4 / 102
    with pytest.raises(ValueError, match="no request ever waited"):
        _ = run.saturated_shares
    with pytest.raises(ValueError, match="no request ever waited"):
        _ = run.saturated_mean_batch


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"allocator": "slab"}, ValueError, "allocator='slab': expected one of reserve, buddy-max"),
        ({"allocator": 3}, TypeError, "allocator=3 is a int"),
        ({"pool_tokens": 0}, ValueError, "pool_tokens=0"),
        ({"pool_tokens": 8.0}, TypeError, "pool_tokens=8.0"),
        ({"max_tokens": 15}, ValueError, "request 0 has 16 tokens, prompt and output: expected at most max_tokens=15"),
        ({"every_step": 1}, TypeError, "every_step=1"),
        ({"pool_tokens": 15}, ValueError, "request 0 needs 16 token slots in pages: expected at most 8"),
        (
            {"allocator": "reserve", "pool_tokens": 31},
            ValueError,
            "request 0 needs 1 × 32 contiguous token slots: expected that they fit in pool_tokens=31",
        ),
        ({"allocator": "buddy-oracle", "pool_tokens": 15}, ValueError, "needs 1 × 16 contiguous"),
    ],
)
def test_runs_are_checked(changes, error, message):
    arguments = {"allocator": Paged(page_tokens=8), "pool_tokens": 64, "max_tokens": 32, **changes}
    with pytest.raises(error, match=message):
        simulate(Workload([0], [5], [11]), **arguments)


def test_allocators_are_checked_and_found_by_name():
    assert {name: allocator.name for name, allocator in ALLOCATORS.items()} == {name: name for name in ALLOCATORS}
    assert get_allocator("buddy-pow2") == Buddy("pow2")
    assert get_allocator(Paged(8)) == Paged(8)
    with pytest.raises(ValueError, match="reservation='half'"):
        Buddy("half")
    with pytest.raises(ValueError, match="page_tokens=0"):
        Paged(0)
    with pytest.raises(TypeError, match="sharing=1"):
        Paged(sharing=1)
    with pytest.raises(ValueError, match="watermark_pages=-1"):
        Paged(watermark_pages=-1)


# Workloads


@pytest.mark.parametrize(
    ("distribution", "mean", "deviation"),
    [
        (Constant(161), 161, 0),
        (Uniform(1, 321), 161, math.sqrt((321**2 - 1) / 12)),
        (Geometric(161), 161, math.sqrt(161 * 160)),
        (Lognormal(161, 0.5), 161, 80.5),
    ],
    ids=repr,
)
def test_distributions_have_the_moments_they_name(distribution, mean, deviation):
    count = 100_000
    lengths = distribution.draw(np.random.default_rng(0), count)
    assert lengths.dtype == np.int64
    assert lengths.min() >= 1
    # Five standard errors; rounding adds at most 1/12 to the lognormal's variance.
    assert abs(lengths.mean() - mean) <= 5 * deviation / math.sqrt(count)
    assert lengths.std() == pytest.approx(deviation, rel=0.03)


def test_lengths_are_cut_to_the_model_and_arrivals_follow_the_rate():
    workload = generate_workload(
        50_000, prompt=Geometric(100), output=Geometric(300), arrivals=Poisson(0.25), max_tokens=256, samples=2
    )
    totals = workload.prompt_tokens + workload.output_tokens
    assert totals.max() == 256
    assert workload.prompt_tokens.max() == 255
    assert (workload.samples == 2).all()
    assert workload.arrival_step[-1] == pytest.approx(50_000 / 0.25, rel=5 / math.sqrt(50_000))


def test_lengths_arrivals_and_samples_may_be_given():
    workload = generate_workload(3, prompt=[1, 2, 3], output=[4, 5, 6], arrivals=[0, 0, 7], samples=[1, 2, 1])
    assert workload.prompt_tokens.tolist() == [1, 2, 3]
    assert workload.output_tokens.tolist() == [4, 5, 6]
    assert workload.arrival_step.tolist() == [0, 0, 7]
    assert workload.samples.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"requests": 0}, ValueError, "requests=0"),
        ({"prompt": [1, 2]}, ValueError, "prompt has 2 values: expected one for each of requests=3"),
        ({"prompt": [1, 0, 2]}, ValueError, r"prompt\[1\]=0"),
        ({"output": [1.0, 2.0, 3.0]}, TypeError, "output has dtype float64"),
        ({"output": [40, 1, 1]}, ValueError, "request 0 has 44 tokens, prompt and output: expected at most max_token"),
        ({"arrivals": [0, 2, 1]}, ValueError, r"arrival_step\[2\]=1: expected at least 2"),
        ({"arrivals": Poisson(1e-19)}, ValueError, "expected a rate at which all arrive before"),
        ({"samples": 0}, ValueError, "samples=0"),
        ({"samples": [1]}, ValueError, "samples has 1 values"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"max_tokens": 1}, ValueError, "max_tokens=1"),
    ],
)
def test_workloads_are_checked(changes, error, message):
    arguments = {"requests": 3, "prompt": Constant(4), "output": Constant(3), "max_tokens": 32, **changes}
    with pytest.raises(error, match=message):
        generate_workload(**arguments)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (([], [], []), ValueError, "no requests"),
        (([0], [1, 2], [1]), ValueError, "lengths"),
        (([-1], [1], [1]), ValueError, r"arrival_step\[0\]=-1"),
        (([[0]], [1], [1]), ValueError, r"arrival_step has shape \(1, 1\)"),
        (([0], [1], [0]), ValueError, r"output_tokens\[0\]=0"),
        (([0, 1 << 62], [1, 1], [1, 1]), ValueError, r"arrival_step\[1\]=4611686018427387904"),
    ],
)
def test_columns_are_checked(columns, error, message):
    with pytest.raises(error, match=message):
        Workload(*columns)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(0), "tokens=0"),
        (lambda: Constant(10**30), "tokens=1000000000000000000000000000000: expected an integer below"),
        (lambda: Uniform(5, 4), "high=4: expected an integer of at least 5"),
        (lambda: Geometric(1), "mean=1"),
        (lambda: Geometric(math.inf), "mean=inf"),
        (lambda: Lognormal(10, 0), "variation=0"),
        (lambda: Poisson(0), "rate=0"),
    ],
)
def test_distributions_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant:7", Constant(7)),
        ("uniform:1,9", Uniform(1, 9)),
        ("geometric:33.5", Geometric(33.5)),
        ("lognormal:40", Lognormal(40)),
        ("lognormal:40,0.5", Lognormal(40, 0.5)),
    ],
)
def test_distributions_are_parsed(text, expected):
    assert parse_lengths(text) == expected


@pytest.mark.parametrize("text", ["", "7", "constant", "constant:x", "constant:1,2", "uniform:1", "zipf:3", "uniform:"])
def test_unknown_distributions_are_errors(text):
    with pytest.raises(ValueError, match="expected constant:TOKENS, uniform:LOW,HIGH"):
        parse_lengths(text)


# Traces


@given(workload=workloads())
def test_traces_are_read_as_written(workload, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    write_trace(workload, path)
    read = read_trace(path)
    for entry in dataclasses.fields(Workload):
        assert np.array_equal(getattr(read, entry.name), getattr(workload, entry.name))
    assert ("samples" in path.read_text(encoding="utf-8")) == bool((workload.samples > 1).any())


def test_columns_may_come_in_any_order(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "\ufeffsamples, output_tokens,prompt_tokens,arrival_step\r\n2,5,7,0\r\n\r\n 1,6,8,3\r\n", encoding="utf-8"
    )
    workload = read_trace(path)
    assert workload.samples.tolist() == [2, 1]
    assert workload.output_tokens.tolist() == [5, 6]
    assert workload.prompt_tokens.tolist() == [7, 8]
    assert workload.arrival_step.tolist() == [0, 3]


HEADER = "arrival_step,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"trace\.csv, line 1: found the columns \(none\): expected arrival_step,prompt_tokens,output_tokens"),
        ("arrival_step,prompt_tokens\n0,1\n", "line 1: found the columns arrival_step,prompt_tokens: expected"),
        (HEADER.replace("\n", ",user\n"), "line 1: found the columns .*user"),
        (HEADER.replace("\n", ",prompt_tokens\n"), "line 1: found .*each once"),
        (HEADER, "line 1: found no request after it"),
        (HEADER + "0,1,1\n0,1\n", "line 3: found 2 values: expected 3, one for each column"),
        (HEADER + "0,0,1\n", "line 2: found prompt_tokens='0': expected an integer of at least 1"),
        (HEADER + "-1,1,1\n", "line 2: found arrival_step='-1': expected an integer of at least 0"),
        (HEADER + "0,1,1\n0,1,1.5\n", r"line 3: found output_tokens='1\.5'"),
        (HEADER + f"0,{1 << 62},1\n", "line 2: found prompt_tokens="),
        (HEADER + f"0,{'9' * 5000},1\n", "line 2: found prompt_tokens='999"),
        (HEADER + "5,1,1\n4,1,1\n", "line 3: found arrival_step=4: expected at least 5, as before"),
    ],
)
def test_malformed_traces_name_file_line_and_what_was_expected(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_other_files_are_errors(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.*expected comma-separated values in UTF-8"):
        read_trace(tmp_path / "binary")
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "missing")


# Claims


@pytest.mark.parametrize(
    ("claim", "system", "percent"),
    [
        (memory_management.reserved_used, "max", 30.0),
        (memory_management.reserved_used, "oracle", 30.0),
        (memory_management.paged_used, "paged", 99.0),
        (memory_management.waste_complement, "oracle", 50.0),
    ],
)
def test_other_published_shares_would_not_hold(monkeypatch, claim, system, percent):
    assert claim.check().verdict == "holds"
    monkeypatch.setitem(memory_management.PUBLISHED, system, percent)
    assert claim.check().verdict == "does not hold"


def test_public_names():
    assert simattn.kv_cache.simulate is simulate
    assert all(hasattr(simattn.kv_cache, name) for name in simattn.kv_cache.__all__)
    assert len(simattn.kv_cache.__all__) == len(set(simattn.kv_cache.__all__))
