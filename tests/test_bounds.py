"""Bounds as arithmetic, compulsory traffic against masks and counts, and exponents of known laws."""

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simattn
from simattn import AttentionProblem, BlockMask
from simattn.algorithms import ALGORITHMS
from simattn.bounds import (
    any_matmul_elements,
    backward_elements,
    block_sparse_elements,
    compulsory_traffic,
    fit_exponents,
    flash_elements,
    matmul_elements,
    saha_ye_elements,
    seen_columns,
    standard_elements,
)
from simattn.testing import attention_problems, tiles_for

PROGRAMS = [
    (name, direction)
    for name, algorithm in ALGORITHMS.items()
    if algorithm.takes_any_mask
    for direction in algorithm.directions
]


def arguments_of(problem):
    return {item.name: getattr(problem, item.name) for item in fields(problem)}


class TestCompulsory:
    def test_forward_of_one_head(self):
        problem = AttentionProblem(q_len=4096, head_dim=64, dtype="float32")
        moved = compulsory_traffic(problem, "forward")
        assert moved.hbm_read_bytes == 3 * 4096 * 64 * 4
        assert moved.hbm_write_bytes == 4096 * 64 * 4
        assert moved.hbm_reduce_bytes == 0
        assert moved == moved.global_only()

    def test_backward_of_one_head(self):
        problem = AttentionProblem(q_len=4096, head_dim=64, dtype="float16")
        moved = compulsory_traffic(problem, "backward")
        assert moved.hbm_read_bytes == 4 * 4096 * 64 * 2
        assert moved.hbm_write_bytes == 3 * 4096 * 64 * 2

    def test_grouped_heads_and_a_value_dim_of_its_own(self):
        problem = AttentionProblem(batch=3, heads=8, kv_heads=2, q_len=5, kv_len=7, head_dim=16, value_dim=32)
        arrays = compulsory_traffic(problem, "backward").by_array
        item = 2
        assert arrays["q"].hbm_read_bytes == 3 * 8 * 5 * 16 * item
        assert arrays["k"].hbm_read_bytes == 3 * 2 * 7 * 16 * item
        assert arrays["v"].hbm_read_bytes == 3 * 2 * 7 * 32 * item
        assert arrays["dout"].hbm_read_bytes == 3 * 8 * 5 * 32 * item
        assert arrays["dq"].hbm_write_bytes == 3 * 8 * 5 * 16 * item
        assert arrays["dk"].hbm_write_bytes == 3 * 2 * 7 * 16 * item
        assert arrays["dv"].hbm_write_bytes == 3 * 2 * 7 * 32 * item

    def test_eight_bit_storage_has_bfloat16_outputs_and_factors(self):
        problem = AttentionProblem(batch=2, heads=4, kv_heads=2, q_len=8, head_dim=16, dtype="float8_e4m3fn")
        arrays = compulsory_traffic(problem, "forward").by_array
        assert arrays["q"].hbm_read_bytes == 2 * 4 * 8 * 16
        assert arrays["out"].hbm_write_bytes == 2 * 4 * 8 * 16 * 2
        assert all(arrays[f"{name}_descale"].hbm_read_bytes == 2 * 2 * 4 for name in "qkv")

    def test_queries_before_the_first_key_are_not_read(self):
        problem = AttentionProblem(q_len=5, kv_len=2, head_dim=16, causal=True)
        arrays = compulsory_traffic(problem, "forward").by_array
        assert arrays["q"].hbm_read_bytes == 2 * 16 * 2
        assert arrays["k"].hbm_read_bytes == 2 * 16 * 2
        assert arrays["out"].hbm_write_bytes == 5 * 16 * 2

    def test_keys_outside_every_window_are_not_read(self):
        problem = AttentionProblem(q_len=10, kv_len=1000, head_dim=16, causal=True, window=(20, 0))
        arrays = compulsory_traffic(problem, "forward").by_array
        assert arrays["k"].hbm_read_bytes == (10 + 20) * 16 * 2

    def test_an_empty_block_mask_leaves_the_output(self):
        mask = BlockMask(4, 4, 2, 2, ())
        problem = AttentionProblem(q_len=8, head_dim=16, block_mask=mask)
        assert set(compulsory_traffic(problem, "forward").by_array) == {"out"}
        assert set(compulsory_traffic(problem, "backward").by_array) == {"dq", "dk", "dv"}

    def test_the_cost_does_not_depend_on_the_length(self):
        problem = AttentionProblem(q_len=10**12, head_dim=128, causal=True, window=(4095, 0))
        assert compulsory_traffic(problem, "forward").hbm_bytes == 4 * 10**12 * 128 * 2

    @given(problem=attention_problems())
    def test_a_decoding_step_moves_what_a_forward_pass_does(self, problem):
        assert compulsory_traffic(problem, "decode") == compulsory_traffic(problem, "forward")

    def test_unknown_direction(self):
        with pytest.raises(ValueError, match="direction='sideways'"):
            compulsory_traffic(AttentionProblem(q_len=1), "sideways")

    @given(problem=attention_problems())
    def test_seen_rows_are_those_of_the_whole_mask(self, problem):
        seen = problem.visible_elements()
        assert seen_columns(problem.keys_of_queries) == np.count_nonzero(seen.any(axis=0))
        assert seen_columns(problem.queries_of_keys) == np.count_nonzero(seen.any(axis=1))

    @pytest.mark.parametrize(("name", "direction"), PROGRAMS)
    @given(data=st.data())
    def test_no_program_moves_less_of_any_array(self, name, direction, data):
        dtypes = ("float32", "float16", "bfloat16") + (("float8_e4m3fn",) if direction == "forward" else ())
        problem = data.draw(attention_problems(dtypes=dtypes))
        tiles = data.draw(tiles_for(problem))
        counted = simattn.count(
            name, direction=direction, tiles=tiles, enforce_capacity=False, **arguments_of(problem)
        ).by_array
        for array, least in compulsory_traffic(problem, direction).by_array.items():
            assert counted[array].hbm_read_bytes >= least.hbm_read_bytes, array
            assert counted[array].hbm_write_bytes >= least.hbm_write_bytes, array


class TestExpressions:
    def test_values(self):
        n, d, m = 4096, 64, 1 << 16
        assert standard_elements(n, d) == 4096 * 64 + 4096**2
        assert flash_elements(n, d, m) == 4096**2 * 64**2 / 2**16
        assert block_sparse_elements(n, d, m, 0.25) == 4096 * 64 + 4096**2 * 64**2 / 2**16 / 4
        assert any_matmul_elements(n, d, 1024) == 4096**2
        assert any_matmul_elements(n, d, m) == flash_elements(n, d, m)
        assert backward_elements(n, d, m) == (4096**2 * 64**2 + 4096 * 64**3) / 2**16
        assert backward_elements(n, d, 1024) == (4096**2 * 64 + 4096 * 64**2) / 32
        assert matmul_elements(n, n, d, 1024) == 2 * 4096**2 * 64 / 32 - 2 * 1024

    def test_a_product_that_fits_has_no_bound(self):
        assert matmul_elements(4, 4, 4, 1000) == 0

    @pytest.mark.parametrize("d", [16, 64, 256])
    def test_the_regimes_of_saha_and_ye_meet_at_d_squared(self, d):
        n = 1 << 20
        assert saha_ye_elements(n, d, d * d) == flash_elements(n, d, d * d) == n * n
        assert saha_ye_elements(n, d, 4 * d * d) == n * n / 4
        assert saha_ye_elements(n, d, d * d // 4) == 2 * n * n

    def test_the_popular_expression_is_below_the_compulsory_elements(self):
        problem = AttentionProblem(q_len=4096, head_dim=64, dtype="float32")
        assert 4096**2 // 116_000 == 144
        assert compulsory_traffic(problem, "forward").hbm_bytes // 4 == 1_048_576


class TestFitExponents:
    @given(
        exponents=st.lists(st.floats(-3, 3), min_size=1, max_size=3),
        constant=st.floats(1e-6, 1e6),
    )
    def test_an_exact_law_is_found(self, exponents, constant):
        names = [f"x{index}" for index in range(len(exponents))]
        grid = np.stack(np.meshgrid(*[[1.0, 3.0, 10.0]] * len(names)), axis=-1).reshape(-1, len(names))
        rows = [
            dict(zip(names, values, strict=True)) | {"elements": constant * float(np.prod(values**exponents))}
            for values in grid
        ]
        if len(names) == 1:
            rows += [{"x0": 100.0, "elements": constant * 100.0 ** exponents[0]}]
        law = fit_exponents(rows, names)
        assert law.points == len(rows)
        assert law.constant == pytest.approx(constant)
        for name, exponent in zip(names, exponents, strict=True):
            assert law.exponents[name] == pytest.approx(exponent, abs=1e-9)
            assert law.standard_errors[name] < 1e-9

    def test_the_standard_error_measures_noise(self):
        generator = np.random.default_rng(0)
        hits, errors = 0, []
        for _ in range(200):
            noise = np.exp(generator.normal(0, 0.1, 32))
            rows = [{"N": 2.0**i, "elements": 5 * 4.0**i * noise[i]} for i in range(32)]
            law = fit_exponents(rows, ["N"])
            errors.append(law.standard_errors["N"])
            hits += abs(law.exponents["N"] - 2) <= 2 * law.standard_errors["N"]
        spread = np.log(2) * math.sqrt(32 * (32**2 - 1) / 12)
        assert np.mean(errors) == pytest.approx(0.1 / spread, rel=0.1)
        assert 0.9 <= hits / 200 <= 0.99

    def test_integers_of_any_size(self):
        rows = [{"N": 10**power, "elements": 7 * 10 ** (2 * power)} for power in (10, 20, 40, 80)]
        assert fit_exponents(rows, ["N"]).exponents["N"] == pytest.approx(2)

    def test_text(self):
        rows = [{"N": n, "M": m, "elements": n**2 / m} for n in (1, 2, 4) for m in (1, 2, 4)]
        assert str(fit_exponents(rows, ["N", "M"])) == "N^2.00 · M^-1.00"

    def test_a_rounded_zero_has_no_sign(self):
        rows = [{"N": n, "elements": n**-0.001} for n in (1, 2, 4, 8)]
        assert str(fit_exponents(rows, ["N"])) == "N^0.00"

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"N": 0, "elements": 1}] * 4, r"rows\[0\]\['N'\]=0"),
            ([{"N": 1, "elements": 1}, {"N": 1, "elements": -2}], r"rows\[1\]\['elements'\]=-2"),
            ([{"N": 1, "elements": math.nan}] * 4, "elements"),
            ([{"N": 1, "elements": math.inf}] * 4, "elements"),
            ([{"N": 1, "elements": 1}, {"N": 2, "elements": 2}], "rows has 2 rows: expected at least 3"),
            ([{"N": 2, "elements": n} for n in (1, 2, 3)], "vary independently"),
        ],
    )
    def test_bad_rows(self, rows, message):
        with pytest.raises(ValueError, match=message):
            fit_exponents(rows, ["N"])
