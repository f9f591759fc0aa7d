"""Time bounds: hand-computed, monotone, and respected by every published measurement."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simattn.hardware import HARDWARE, MATMUL_DTYPES, MIB
from simattn.roofline import (
    ANY_PLAN_RESOURCES,
    DIRECTIONS,
    PUBLISHED,
    RESOURCES,
    PublishedTime,
    Work,
    arithmetic_intensity,
    attainable_flops_per_second,
    attention_flops,
    check_published,
    ridge_point,
    spilled_bytes,
    time_bounds,
)

A100 = HARDWARE["A100-40GB"]
COUNTS = (
    "hbm_read_bytes",
    "hbm_write_bytes",
    "sram_bytes",
    "matmul_flops",
    "vector_flops",
    "exponentials",
    "compulsory_bytes",
)


def work(dtype="bfloat16", **counts):
    zeros = dict.fromkeys(COUNTS[:-1], 0)
    return Work(**(zeros | counts), dtype=dtype)


def least_work(published):
    """Work that no implementation of the algorithm can go below, from the problem alone."""
    row = HARDWARE[published.hardware]
    item = 1 if published.dtype.startswith("float8") else 2
    per_head = published.batch * published.heads
    operand = per_head * published.q_len * published.head_dim * item
    scores = per_head * published.q_len**2
    visible = scores // 2 if published.causal else scores
    forward, backward = "forward" in published.direction, "backward" in published.direction
    standard = published.algorithm == "standard"
    # Products: S, O forward; dV, dP, dQ, dK backward, and S once more unless P was stored.
    products = 2 * forward + (4 if standard else 5) * backward
    passes = [operand] * (4 * forward + 8 * backward)
    if standard:
        # Forward writes and reads S and P; backward reads P, writes and reads dP and dS.
        passes += [scores * item] * (4 * forward + 5 * backward)
    return work(
        dtype=published.dtype,
        matmul_flops=products * 2 * visible * published.head_dim,
        exponentials=visible * (forward + (backward and not standard)),
        compulsory_bytes=spilled_bytes(passes, row),
    )


class TestTimeBounds:
    def test_each_resource_by_hand(self):
        bounds = time_bounds(
            work(
                hbm_read_bytes=7_000_000,
                hbm_write_bytes=3_000_000,
                sram_bytes=5_000_000,
                matmul_flops=11_000_000,
                vector_flops=13_000_000,
                exponentials=17_000_000,
                compulsory_bytes=2_000_000,
            ),
            "A100-40GB",
        )
        assert bounds.dram_seconds == 2_000_000 / 1555e9
        assert bounds.l2_seconds == 7_000_000 / (5120 * 1.41e9)
        assert bounds.sram_seconds == 5_000_000 / (108 * 128 * 1.41e9)
        assert bounds.matmul_seconds == 11_000_000 / 312e12
        assert bounds.vector_seconds == 13_000_000 / 19.5e12
        assert bounds.exponential_seconds == 17_000_000 / (108 * 16 * 1.41e9)
        assert bounds.model_seconds == (7_000_000 + 3_000_000) / 1555e9
        assert bounds.seconds == 17_000_000 / (108 * 16 * 1.41e9)
        assert bounds.limited_by == "exponential"

    @pytest.mark.parametrize(
        ("count", "resource"),
        [
            ("compulsory_bytes", "dram"),
            ("hbm_read_bytes", "l2"),
            ("hbm_write_bytes", "l2"),
            ("sram_bytes", "sram"),
            ("matmul_flops", "matmul"),
            ("vector_flops", "vector"),
            ("exponentials", "exponential"),
        ],
    )
    def test_the_busiest_resource_limits(self, count, resource):
        bounds = time_bounds(work(**{count: 10**12}), A100)
        assert bounds.limited_by == resource
        assert bounds.seconds == bounds.by_resource()[resource]
        expected = bounds.seconds if resource in ANY_PLAN_RESOURCES else 0.0
        assert bounds.any_plan_seconds == expected

    def test_the_bound_of_any_plan_ignores_tiles(self):
        bounds = time_bounds(work(hbm_read_bytes=10**15, sram_bytes=10**15, matmul_flops=312 * 10**9), A100)
        assert bounds.any_plan_seconds == 1e-3
        assert bounds.any_plan_limited_by == "matmul"
        assert bounds.limited_by == "l2"
        assert bounds.any_plan_seconds < bounds.seconds

    def test_unknown_figures_give_no_bound(self):
        bounds = time_bounds(work("float16", hbm_read_bytes=10**12), "T4")
        assert bounds.dram_seconds is None
        assert bounds.l2_seconds is None
        assert bounds.seconds == 0.0
        assert bounds.model_seconds == 10**12 / 320e9
        assert list(bounds.by_resource()) == ["sram", "matmul", "vector", "exponential"]

    def test_the_model_of_the_papers_is_not_a_bound(self):
        # Traffic that the L2 cache serves: the model charges it at HBM bandwidth, the bounds do not.
        bounds = time_bounds(work(hbm_read_bytes=10**9, compulsory_bytes=10**6), A100)
        assert bounds.model_seconds > bounds.seconds

    def test_hbm_bytes_is_both_directions(self):
        assert work(hbm_read_bytes=3, hbm_write_bytes=4).hbm_bytes == 3 + 4

    def test_float32_products_run_on_the_cuda_cores(self):
        bounds = time_bounds(work("float32", matmul_flops=195 * 10**11), A100)
        assert bounds.matmul_seconds == 1.0

    def test_errors_name_hardware_and_format(self):
        with pytest.raises(ValueError, match="hardware='A100'"):
            time_bounds(work(), "A100")
        with pytest.raises(ValueError, match=r"float8_e5m2.*A100-40GB"):
            time_bounds(work("float8_e5m2"), A100)

    @given(
        counts=st.fixed_dictionaries({name: st.integers(0, 10**18) for name in COUNTS}),
        more=st.fixed_dictionaries({name: st.integers(0, 10**18) for name in COUNTS}),
        name=st.sampled_from(sorted(HARDWARE)),
        dtype=st.sampled_from(["float32", "float16"]),
    )
    def test_more_work_never_takes_less_time(self, counts, more, name, dtype):
        less = time_bounds(Work(**counts, dtype=dtype), name)
        total = {key: counts[key] + more[key] for key in COUNTS}
        greater = time_bounds(Work(**total, dtype=dtype), name)
        assert greater.seconds >= less.seconds
        assert greater.any_plan_seconds >= less.any_plan_seconds
        assert greater.model_seconds >= less.model_seconds
        for resource, seconds in less.by_resource().items():
            assert 0 <= seconds <= greater.by_resource()[resource]
        assert less.any_plan_seconds <= less.seconds
        assert less.by_resource()[less.limited_by] == less.seconds
        assert set(less.by_resource()) <= set(RESOURCES)


class TestWork:
    @pytest.mark.parametrize("name", COUNTS)
    def test_counts_are_checked(self, name):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            work(**{name: -1})
        for value in (1.0, "1", True):
            with pytest.raises(TypeError, match=f"{name}="):
                work(**{name: value})

    def test_format_is_checked(self):
        with pytest.raises(ValueError, match=r"dtype='bf16'.*bfloat16"):
            work("bf16")

    def test_integers_of_other_types_become_int(self):
        numpy = pytest.importorskip("numpy")
        counted = work(sram_bytes=numpy.int64(5))
        assert type(counted.sram_bytes) is int
        assert counted.sram_bytes == 5


class TestSpilledBytes:
    def test_what_fits_the_cache_costs_nothing(self):
        assert spilled_bytes([40 * MIB, MIB, 0], A100) == 0
        assert spilled_bytes([], A100) == 0

    def test_each_pass_pays_what_exceeds_the_cache(self):
        assert spilled_bytes([41 * MIB, 100 * MIB, 3 * MIB], "A100-40GB") == (41 - 40 + 100 - 40) * MIB

    def test_errors(self):
        with pytest.raises(ValueError, match=r"passes\[1\]=-1"):
            spilled_bytes([1, -1], A100)
        with pytest.raises(TypeError, match=r"passes\[0\]=1.5"):
            spilled_bytes([1.5], A100)

    @given(
        passes=st.lists(st.integers(0, 10**10), max_size=6),
        accesses=st.integers(0, 6),
    )
    def test_never_more_than_the_bytes_themselves(self, passes, accesses):
        spilled = spilled_bytes(passes, A100)
        assert 0 <= spilled <= sum(passes)
        assert spilled_bytes(passes + [41 * MIB] * accesses, A100) == spilled + accesses * MIB


class TestRoofline:
    def test_ridge_points_by_hand(self):
        assert ridge_point("A100-40GB", "bfloat16") == 312e12 / 1.555e12
        assert ridge_point("H100-SXM", "float16") == 989.4e12 / 3.35e12
        assert ridge_point("A100-40GB", "float16", "l2") == 312e12 / (5120 * 1.41e9)
        assert ridge_point("A100-40GB", "float32", "sram") == 19.5e12 / (108 * 128 * 1.41e9)

    def test_attainable_on_both_sides_of_the_ridge(self):
        ridge = ridge_point(A100, "bfloat16")
        assert attainable_flops_per_second(0, A100, "bfloat16") == 0
        assert attainable_flops_per_second(10, A100, "bfloat16") == 10 * 1.555e12
        assert attainable_flops_per_second(2 * ridge, A100, "bfloat16") == 312e12
        assert attainable_flops_per_second(10, A100, "bfloat16", "sram") == 10 * 108 * 128 * 1.41e9

    def test_intensity(self):
        assert arithmetic_intensity(12, 4) == 3
        assert arithmetic_intensity(0, 4) == 0

    def test_errors(self):
        with pytest.raises(ValueError, match="bytes_moved=0"):
            arithmetic_intensity(1, 0)
        with pytest.raises(ValueError, match="flops=-1"):
            arithmetic_intensity(-1, 1)
        with pytest.raises(TypeError, match="flops='1'"):
            arithmetic_intensity("1", 1)
        with pytest.raises(ValueError, match="intensity=nan"):
            attainable_flops_per_second(math.nan, A100, "bfloat16")
        with pytest.raises(ValueError, match="level='l1'"):
            ridge_point(A100, "bfloat16", "l1")
        with pytest.raises(ValueError, match=r"level='l2'.*T4"):
            ridge_point("T4", "float16", "l2")
        with pytest.raises(ValueError, match="bfloat16"):
            ridge_point("T4", "bfloat16")

    @given(
        low=st.floats(0, 1e6),
        high=st.floats(0, 1e6),
        dtype=st.sampled_from(sorted(A100.matmul_flops_per_second_by_dtype)),
    )
    def test_attainable_is_monotone_and_below_the_peak(self, low, high, dtype):
        low, high = sorted((low, high))
        slow = attainable_flops_per_second(low, A100, dtype)
        fast = attainable_flops_per_second(high, A100, dtype)
        assert slow <= fast <= A100.matmul_flops_per_second(dtype)


class TestAttentionFlops:
    def test_forward_is_four_n_squared_d(self):
        flops = attention_flops(batch=3, heads=5, q_len=7, head_dim=11)
        assert flops == 4 * 3 * 5 * 7**2 * 11

    def test_causal_halves_and_backward_is_two_and_a_half(self):
        shape = {"batch": 2, "heads": 4, "q_len": 64, "head_dim": 32}
        forward = attention_flops(**shape)
        assert attention_flops(**shape, causal=True) == forward // 2
        assert attention_flops(**shape, direction="backward") == 5 * forward // 2
        assert attention_flops(**shape, direction="forward+backward") == 7 * forward // 2

    def test_lengths_and_columns_of_their_own(self):
        shape = {"batch": 1, "heads": 1, "q_len": 3, "kv_len": 5, "head_dim": 7, "value_dim": 11}
        assert attention_flops(**shape) == 2 * 3 * 5 * (7 + 11)
        # S, dQ, dK have head_dim columns; dV and dP have value_dim.
        assert attention_flops(**shape, direction="backward") == 2 * 3 * 5 * (3 * 7 + 2 * 11)

    def test_exact_at_any_size(self):
        flops = attention_flops(batch=1, heads=128, q_len=1 << 24, head_dim=255, causal=True)
        assert flops == 2 * 128 * (1 << 48) * 255

    @pytest.mark.parametrize("name", ["batch", "heads", "q_len", "kv_len", "head_dim", "value_dim"])
    def test_sizes_are_checked(self, name):
        shape = {"batch": 1, "heads": 1, "q_len": 1, "head_dim": 1}
        with pytest.raises(ValueError, match=f"{name}=0"):
            attention_flops(**(shape | {name: 0}))
        with pytest.raises(TypeError, match=f"{name}=1.0"):
            attention_flops(**(shape | {name: 1.0}))

    def test_direction_is_checked(self):
        with pytest.raises(ValueError, match=r"direction='decode'.*forward\+backward"):
            attention_flops(batch=1, heads=1, q_len=1, head_dim=1, direction="decode")


class TestPublished:
    def test_the_numbers_that_the_papers_state(self):
        milliseconds = {(p.algorithm, p.measured_seconds) for p in PUBLISHED if p.measured_seconds}
        assert {("standard", 41.7e-3), ("flash1", 7.3e-3)} <= milliseconds
        short = {
            p.algorithm: p.measured_flops_per_second / 1e12
            for p in PUBLISHED
            if p.hardware == "H100-SXM" and p.q_len == 512
        }
        assert short == {"standard": 62, "flash1": 157, "flash2": 215}
        assert all(p.batch == 32 and p.heads == 32 for p in PUBLISHED if p.q_len == 512)

    def test_utilisations_that_the_papers_state(self):
        rates = {(p.algorithm, p.direction, round(p.flops_per_second / 1e12)): p for p in PUBLISHED}
        flash3, flash2 = rates["flash3", "forward", 740], rates["flash2", "forward", 230]
        for measurement, percent in ((flash3, 75), (flash2, 73)):
            peak = HARDWARE[measurement.hardware].matmul_flops_per_second(measurement.dtype)
            assert measurement.flops_per_second / peak == pytest.approx(percent / 100, abs=0.01)

    def test_a_time_and_a_rate_of_one_table_agree(self):
        (table2,) = (p for p in PUBLISHED if p.source.endswith("Table 2"))
        assert table2.flops == 4 * 4 * 16 * 8448**2 * 128
        assert table2.flops_per_second / 1e12 == pytest.approx(661, abs=0.5)

    def test_time_and_rate_convert(self):
        by_rate = next(p for p in PUBLISHED if p.measured_flops_per_second is not None)
        assert by_rate.seconds == by_rate.flops / by_rate.measured_flops_per_second
        by_time = dataclasses.replace(by_rate, measured_flops_per_second=None, measured_seconds=by_rate.seconds)
        assert by_time.flops_per_second == pytest.approx(by_rate.flops_per_second)

    def test_statements_differ(self):
        assert len({(p.statement, p.source) for p in PUBLISHED}) == len(PUBLISHED)

    def test_problems_of_the_benchmarks_have_16_ki_tokens(self):
        for p in PUBLISHED:
            if p.measured_flops_per_second is not None:
                assert p.batch * p.q_len == 16384
                assert p.heads * p.head_dim == 2048

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"statement": " "}, "statement="),
            ({"source": ""}, "source="),
            ({"hardware": "A100"}, "hardware='A100'"),
            ({"algorithm": "flash"}, "algorithm='flash'"),
            ({"direction": "fwd"}, "direction='fwd'"),
            ({"dtype": "half"}, "dtype='half'"),
            ({"batch": 0}, "batch=0"),
            ({"measured_seconds": 1.0, "measured_flops_per_second": 1.0}, "exactly one"),
            ({"measured_seconds": None}, "exactly one"),
            ({"measured_seconds": 0.0}, "measured_seconds=0.0"),
            ({"measured_seconds": math.inf}, "measured_seconds=inf"),
        ],
    )
    def test_fields_are_checked(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(PUBLISHED[0], **changes)

    @pytest.mark.parametrize(
        "changes",
        [{"causal": 1}, {"heads": 2.0}, {"measured_seconds": "1"}],
        ids=lambda changes: next(iter(changes)),
    )
    def test_types_are_checked(self, changes):
        with pytest.raises(TypeError, match=f"{next(iter(changes))}="):
            dataclasses.replace(PUBLISHED[0], **changes)


class TestCheckPublished:
    def test_every_published_time_respects_its_bound(self):
        checks = check_published(least_work)
        assert [check.published for check in checks] == list(PUBLISHED)
        for check in checks:
            assert check.ok, check.row()
            assert 0 < check.fraction <= 1
            assert check.limited_by in ANY_PLAN_RESOURCES

    def test_materialised_scores_are_what_limits_standard_attention(self):
        for check in check_published(least_work):
            assert (check.limited_by == "dram") == (check.published.algorithm == "standard")

    def test_the_bound_by_hand(self):
        (measurement,) = (p for p in PUBLISHED if p.source.endswith("Figure 5e"))
        (check,) = check_published(least_work, [measurement])
        assert check.bound_seconds == 4 * 8 * 16384**2 * 256 / 989.4e12
        assert check.published_seconds == 4 * 8 * 16384**2 * 256 / 756e12
        assert check.fraction == pytest.approx(756 / 989.4)
        assert check.limited_by == "matmul"

    def test_a_time_below_the_bound_fails(self):
        impossible = dataclasses.replace(PUBLISHED[1], measured_seconds=1e-6)
        (check,) = check_published(least_work, [impossible])
        assert check.fraction > 1
        assert not check.ok
        assert check.row()["ok"] is False

    def test_traffic_of_the_counted_tiles_does_not_enter_the_verdict(self):
        def heavy(published):
            return dataclasses.replace(least_work(published), hbm_read_bytes=10**16, sram_bytes=10**16)

        for plain, loaded in zip(check_published(least_work), check_published(heavy), strict=True):
            assert loaded.fraction == plain.fraction
            assert loaded.bounds.model_seconds > plain.bounds.model_seconds

    def test_work_in_another_format_is_an_error(self):
        with pytest.raises(ValueError, match=r"dtype='float32'.*expected 'float16'"):
            check_published(lambda _: work("float32"))

    def test_rows_are_flat(self):
        for check in check_published(least_work):
            row = check.row()
            assert row["fraction"] == check.bound_seconds / check.published_seconds
            assert all(isinstance(value, (str, int, float)) for value in row.values())


@given(
    dtype=st.sampled_from(MATMUL_DTYPES),
    direction=st.sampled_from(DIRECTIONS),
    q_len=st.integers(1, 4096),
    causal=st.booleans(),
    seconds=st.floats(1e-9, 1e3),
)
def test_rates_and_times_of_any_measurement_are_consistent(dtype, direction, q_len, causal, seconds):
    measurement = PublishedTime(
        statement="a measurement",
        source="a test",
        hardware="H100-SXM",
        algorithm="flash3",
        direction=direction,
        dtype=dtype,
        batch=2,
        heads=3,
        q_len=q_len,
        head_dim=64,
        causal=causal,
        measured_seconds=seconds,
    )
    assert measurement.seconds == seconds
    assert measurement.flops_per_second * seconds == pytest.approx(measurement.flops)
