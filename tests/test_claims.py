"""Every claim comes to its expected verdict; false claims, wrong laws and impossible times are found out."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

import simattn
from simattn.claims import CLAIMS, VERDICTS, Claim, ClaimTable, Evidence, claim, claims
from simattn.claims.model import DOES_NOT_HOLD, HOLDS, HOLDS_WITH_CONSTANT, TIMING_ONLY
from simattn.claims.rules import (
    DRIFT_LIMIT,
    LARGE_MEMORY,
    SMALL_MEMORY,
    SPREAD_LIMIT,
    compare,
    crossing,
    elements,
    equality_evidence,
    forward_algorithms,
    fused_algorithms,
    theta_evidence,
)
from simattn.claims.timing import published_claim, visible_scores, work_of
from simattn.masks import BlockMask
from simattn.roofline import PUBLISHED


@pytest.fixture(scope="module")
def table():
    return claims()


@pytest.fixture(scope="module")
def by_name(table):
    return {row.identifier: row for row in table}


class TestTable:
    @pytest.mark.parametrize("identifier", [entry.identifier for entry in CLAIMS])
    def test_every_claim_comes_to_its_expected_verdict(self, by_name, identifier):
        row = by_name[identifier]
        assert row.ok, row
        assert row.verdict == row.expected

    def test_the_table(self, table):
        assert isinstance(table, ClaimTable)
        assert table.all_hold
        assert table.failures == ()
        assert [row.identifier for row in table] == [entry.identifier for entry in CLAIMS]
        assert {row.verdict for row in table} == set(VERDICTS)

    def test_every_row_says_what_where_and_how(self, table):
        for row in table:
            for text in (row.statement, row.source, row.range_tested, row.counted):
                assert text.strip() == text != ""
            assert row.numbers
            # Sources are papers and articles by name; nothing points into a file system.
            assert not re.search(r"(^|[\s:])[/~\\]|\.(txt|md)\b", row.source)

    def test_numbers_are_finite_json(self, table):
        read = json.loads(json.dumps([row.as_dict() for row in table], allow_nan=False))
        assert [row["identifier"] for row in read] == [row.identifier for row in table]

    def test_flat_rows(self, table):
        for row in table:
            assert all(isinstance(value, (str, bool)) for value in row.row().values())
            assert "numbers" not in row.row()

    def test_the_repr_is_a_table(self, table):
        text = repr(table)
        assert text.startswith(f"ClaimTable, {len(table)} claims, all as expected\n")
        assert "FAILS" not in text
        assert max(map(len, text.splitlines())) <= 180

    def test_the_public_name_is_the_function(self):
        assert simattn.claims is claims

    def test_importing_simattn_does_not_import_claims(self):
        code = "import sys, simattn; sys.exit('simattn.claims' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestDetection:
    def test_a_false_claim_fails_the_table(self, by_name):
        @claim("false", statement="FlashAttention-2 moves O(N²/M).", source="a test", expected=HOLDS_WITH_CONSTANT)
        def false():
            ratio = compare(LARGE_MEMORY, lambda point: elements("flash2", **point.problem), lambda n, d, m: n * n / m)
            return theta_evidence(ratio, "the grid")

        checked = claims([false, *CLAIMS[:1]])
        assert [row.ok for row in checked] == [False, True]
        assert not checked.all_hold
        assert [row.identifier for row in checked.failures] == ["false"]
        assert "1 fail" in repr(checked)
        assert "FAILS: does not hold" in " ".join(repr(checked).split())

    def test_a_refutation_that_is_not_confirmed_fails_too(self):
        evidence = equality_evidence([(4, 4)], "one case", "counted = stated")
        wrong = Claim(
            identifier="x", statement="4 is 4.", source="a test", expected=DOES_NOT_HOLD, evidence=lambda: evidence
        )
        assert not claims([wrong]).all_hold

    @pytest.mark.parametrize(
        "law",
        [
            lambda n, d, m: n * n / m,
            lambda n, d, m: n * n * d / m,
            lambda n, d, m: n * n * d / math.sqrt(m),
            lambda n, d, m: n**1.5 * d * d / m,
            lambda n, d, m: n * n * d**2.5 / m,
            lambda n, d, m: n * n * d * d / m * math.log2(m),
            lambda n, d, m: n * d + n * n,
        ],
        ids=["no d", "d", "√M", "N^1.5", "d^2.5", "log M", "standard"],
    )
    def test_wrong_laws_do_not_hold(self, law):
        ratio = compare(LARGE_MEMORY, lambda point: elements("flash2", **point.problem), law)
        assert ratio.verdict == DOES_NOT_HOLD

    @pytest.mark.parametrize(
        "law",
        [
            lambda n, d, m: n * n * d * d / m,
            lambda n, d, m: n * n,
            lambda n, d, m: n * n * math.sqrt(d) / m**0.25,
        ],
        ids=["N²d²/M", "N²", "between"],
    )
    def test_wrong_laws_of_small_memories_do_not_hold(self, law):
        ratio = compare(SMALL_MEMORY, lambda point: elements("small_cache", **point.problem), law)
        assert ratio.verdict == DOES_NOT_HOLD

    def test_a_spread_above_the_limit_does_not_hold_even_without_drift(self):
        seen = iter(range(len(LARGE_MEMORY)))
        ratio = compare(LARGE_MEMORY, lambda point: 4.0 if next(seen) == 0 else 1.0, lambda n, d, m: 1.0)
        assert max(map(abs, ratio.drift.exponents.values())) <= DRIFT_LIMIT
        assert ratio.high > SPREAD_LIMIT * ratio.low
        assert ratio.verdict == DOES_NOT_HOLD

    def test_grids_span_what_the_rule_assumes(self):
        for points in (LARGE_MEMORY, SMALL_MEMORY):
            for name in ("length", "head_dim", "sram_elements"):
                values = [getattr(point, name) for point in points]
                assert max(values) >= 16 * min(values)
        assert all(p.head_dim**2 <= p.sram_elements <= p.length * p.head_dim for p in LARGE_MEMORY)
        assert all(p.head_dim <= p.sram_elements < p.head_dim**2 for p in SMALL_MEMORY)

    def test_an_impossible_time_fails(self):
        real = PUBLISHED[0]
        impossible = dataclasses.replace(real, measured_seconds=1e-4)
        checked = claims([published_claim(1, real), published_claim(2, impossible)])
        assert [row.ok for row in checked] == [True, False]
        assert checked[1].verdict == TIMING_ONLY
        assert checked[1].numbers["fraction"] > 1

    def test_equality_of_nothing_is_no_evidence(self):
        assert equality_evidence([], "nothing", "a = b").verdict == DOES_NOT_HOLD

    def test_one_difference_is_found(self):
        evidence = equality_evidence([(1, 1), (2, 3)], "two", "a = b")
        assert evidence.verdict == DOES_NOT_HOLD
        assert "differs in 1 of 2 cases, first 2 counted against 3" in evidence.counted


class TestModel:
    def test_identifiers_are_unique(self):
        with pytest.raises(ValueError, match="more than once"):
            claims([CLAIMS[0], CLAIMS[0]])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"statement": " "}, "statement=' '"),
            ({"source": ""}, "source=''"),
            ({"identifier": ""}, "identifier=''"),
            ({"expected": "true"}, "expected='true'"),
        ],
    )
    def test_claims_are_checked(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CLAIMS[0], **changes)

    def test_verdicts_are_checked(self):
        evidence = Evidence(range_tested="x", counted="x", verdict="maybe", numbers={})
        odd = Claim(identifier="x", statement="x", source="x", expected=HOLDS, evidence=lambda: evidence)
        with pytest.raises(ValueError, match="verdict='maybe'"):
            odd.check()

    def test_crossing(self):
        assert crossing(lambda n: n - 1000, 1, 1 << 20) == 1000
        assert crossing(lambda n: n * n - 1000, 1, 100) == 32
        with pytest.raises(ValueError, match="change of sign"):
            crossing(lambda n: n, 1, 10)


class TestContents:
    """The rows that must be there, with numbers that follow from arithmetic."""

    def test_theorems_of_every_registered_program(self, by_name):
        assert {"flash1", "flash2", "flash3"} <= set(fused_algorithms())
        assert "small_cache" in forward_algorithms()
        for name in ("standard", *fused_algorithms()):
            for direction in ("forward", "backward"):
                row = by_name[f"{name}-{direction}"]
                assert row.verdict == HOLDS_WITH_CONSTANT
                assert 1 <= row.numbers["c_low"] <= row.numbers["c_high"] <= SPREAD_LIMIT * row.numbers["c_low"]

    @pytest.mark.parametrize("name", fused_algorithms())
    def test_fitted_exponents(self, by_name, name):
        for direction in ("forward", "backward"):
            exponents = by_name[f"{name}-{direction}"].numbers["exponents"]
            for variable, expected in {"N": 2, "d": 2, "M": -1}.items():
                assert exponents[variable] == pytest.approx(expected, abs=DRIFT_LIMIT)

    def test_leading_constants(self, by_name):
        assert by_name["flash1-leading-term"].numbers["c_low"] == pytest.approx(12, rel=0.01)
        # B_r = (M − 2d²)/3d for M ≫ d²: 2N²d/B_r = 6N²d²/M.
        assert by_name["flash2-forward"].numbers["c_low"] == pytest.approx(6, rel=0.01)
        # The cubes that fit are b = √(M/3) without the statistics: 5N²d/b = 5√3 N²d/√M.
        assert by_name["small-cache-upper"].numbers["c_low"] == pytest.approx(5 * 3**0.5, rel=0.01)

    def test_the_popular_expression(self, by_name):
        numbers = by_name["flash-io-without-d"].numbers
        assert by_name["flash-io-without-d"].verdict == DOES_NOT_HOLD
        assert int(numbers["expression_elements"]) == 144
        assert numbers["compulsory_elements"] == 4 * 4096 * 64
        assert numbers["flash2"]["exponents"]["d"] == pytest.approx(2, abs=0.05)

    def test_residency_of_the_papers_tiles(self, by_name):
        forward = by_name["flash1-residency"].numbers["peak_over_m"]["forward"]
        tiles = 2 * 192 * 128 + 2 * 128 * 128 + 192 * 128 + 2 * 128
        assert forward["d = 128, M = 98 304"] == tiles / 98_304
        assert forward["d = M = 128"] == (4 * 128 + 3) / 128

    def test_figure_2(self, by_name):
        numbers = by_name["figure-2-bytes"].numbers
        operand, square = 64 * 16 * 1024 * 64 * 2, 64 * 16 * 1024**2 * 2
        tiles = 7  # ⌈1024 / 166⌉ with 166 = ⌊√(83 456 / 3)⌋
        forward = 4 * square + (2 * tiles + tiles) * operand + operand + 64 * 16 * 1024 * 4
        backward = 7 * square + 5 * tiles * operand + 3 * operand
        assert numbers["gigabytes"]["standard"]["paper"] == pytest.approx((forward + backward) / 1e9)
        assert numbers["c"]["standard"] == numbers["gigabytes"]["standard"]["paper"] / 40.3
        assert numbers["c"]["flash1"] == numbers["gigabytes"]["flash1"]["paper"] / 4.4

    def test_memory(self, by_name):
        case = by_name["memory-saving"].numbers["d = 64"]
        assert case["least_length"] < 1024
        assert case["greatest_length"] > 4096
        assert case["ratio_at_512"] < 4
        assert case["ratio_at_65536"] > 20

    def test_every_published_time_has_a_row(self, by_name):
        for index, published in enumerate(PUBLISHED, start=1):
            row = by_name[f"published-time-{index:02d}"]
            assert row.statement.rstrip(".") == published.statement
            assert 0 < row.numbers["fraction"] <= 1
            assert row.verdict == TIMING_ONLY

    def test_flash3_runs_on_a_hopper(self, by_name):
        shares = by_name["flash3-on-a100"].numbers["share_of_peak"]
        assert shares["A100-80GB"] == 740 / 312
        assert shares["H100-SXM"] == 740 / 989.4


class TestPublishedWork:
    """The work that published times are held against, by hand."""

    @pytest.mark.parametrize("causal", [False, True])
    def test_visible_scores(self, causal):
        problem = simattn.AttentionProblem(batch=2, heads=3, q_len=1000, head_dim=64, causal=causal)
        assert visible_scores(problem) == 2 * 3 * (1000 * 1001 // 2 if causal else 1000**2)

    @pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.statement[:40])
    def test_least_work(self, published):
        work = work_of(published)
        n, heads = published.q_len, published.batch * published.heads
        visible = heads * (n * (n + 1) // 2 if published.causal else n * n)
        backward, standard = "backward" in published.direction, published.algorithm == "standard"
        products = 2 + (4 if standard else 5) * backward
        assert work.matmul_flops == products * 2 * visible * published.head_dim
        assert work.exponentials == visible * (2 if backward and not standard else 1)
        assert work.dtype == published.dtype

    def test_score_matrices_that_pass_through_memory(self):
        published = PUBLISHED[2]
        assert (published.algorithm, published.causal) == ("standard", False)
        square, operand, cache = 64 * 16 * 1024**2 * 2, 64 * 16 * 1024 * 64 * 2, 40 << 20
        # S and P written and read; P read, dP and dS written and read.
        expected = 9 * (square - cache) + (4 + 7) * (operand - cache)
        assert work_of(published).compulsory_bytes == expected


@pytest.mark.parametrize(("blocks", "stored"), [(1, 0), (1, 1), (8, 0), (8, 1), (8, 3), (8, 7), (8, 8)])
def test_masks_of_proposition_4_store_the_same_in_every_row_and_column(blocks, stored):
    from simattn.claims.io import _block_mask

    mask = _block_mask(blocks, 4, 4, stored)
    assert isinstance(mask, BlockMask)
    array = mask.to_array()
    assert (array.sum(axis=0) == stored).all()
    assert (array.sum(axis=1) == stored).all()
