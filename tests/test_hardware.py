"""The hardware table: complete, sourced, consistent with itself and with what papers say of it."""

import dataclasses
import pickle
import subprocess
import sys

import pytest

from simattn.hardware import (
    GIB,
    HARDWARE,
    KIB,
    MATMUL_DTYPES,
    MEMORY_LEVELS,
    MIB,
    Figure,
    Hardware,
    get_hardware,
    table,
)

ROWS = list(HARDWARE.values())
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def changed(**changes):
    return dataclasses.replace(HARDWARE["A100-40GB"], **changes)


def test_the_rows_are_those_the_papers_measure():
    expected = {"V100-SXM2-32GB", "T4", "A100-40GB", "A100-80GB", "RTX-4090", "H100-SXM", "H200", "B200"}
    assert set(HARDWARE) == expected
    assert all(HARDWARE[name].name == name for name in HARDWARE)


@every_row
def test_every_figure_has_a_source(row):
    figures = row.figures()
    assert set(figures) == set(row.sources)
    for name, figure in figures.items():
        assert isinstance(figure, Figure)
        assert figure.source == row.source(name)
        assert figure.source.strip()


@every_row
def test_every_value_is_positive_or_declared_unpublished(row):
    for name, figure in row.figures().items():
        if name == "compute_capability":
            continue
        if figure.value is None:
            assert name == "l2_bytes_per_second"
            assert "not published" in figure.source
        else:
            assert figure.value > 0


@every_row
def test_derived_rates_follow_from_multiprocessors_and_clock(row):
    clocks = row.streaming_multiprocessors * row.boost_clock_hz
    assert row.sram_bytes_per_second == clocks * 32 * 4
    assert row.exponentials_per_second == clocks * 16
    assert row.register_bytes_per_block == 65536 * 4


@every_row
def test_published_float32_peak_agrees_with_multiprocessors_and_clock(row):
    cores = 64 if row.compute_capability < (8, 9) else 128
    derived = row.streaming_multiprocessors * row.boost_clock_hz * cores * 2
    assert row.vector_flops_per_second == pytest.approx(derived, rel=0.01)
    assert row.matmul_flops_per_second("float32") == row.vector_flops_per_second


@every_row
def test_memory_levels_get_smaller_and_faster(row):
    assert row.sram_bytes_per_block <= row.shared_bytes_per_multiprocessor <= row.sram_bytes_per_multiprocessor
    assert row.l2_bytes < row.hbm_bytes
    assert row.hbm_bytes_per_second < row.sram_bytes_per_second
    if row.l2_bytes_per_second is not None:
        assert row.hbm_bytes_per_second < row.l2_bytes_per_second < row.sram_bytes_per_second


def test_eight_bit_formats_double_the_rate_of_sixteen():
    for name in ("RTX-4090", "H100-SXM", "H200", "B200"):
        row = HARDWARE[name]
        for dtype in ("float8_e4m3fn", "float8_e5m2"):
            half = row.matmul_flops_per_second("float16")
            assert row.matmul_flops_per_second(dtype) == pytest.approx(2 * half, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kib"),
    [
        ("V100-SXM2-32GB", 96),
        ("T4", 64),
        ("A100-40GB", 163),
        ("A100-80GB", 163),
        ("RTX-4090", 99),
        ("H100-SXM", 227),
        ("H200", 227),
        ("B200", 227),
    ],
)
def test_shared_memory_of_one_block(name, kib):
    assert HARDWARE[name].sram_bytes_per_block == kib * KIB


def test_a100_is_the_machine_of_the_flashattention_paper():
    # "20 MB at 19 TB/s" on chip, "40 GB at 1.5 TB/s" of HBM.
    row = HARDWARE["A100-40GB"]
    assert row.sram_bytes_total == 108 * 192 * KIB
    assert row.sram_bytes_total // MIB == 20
    assert int(row.sram_bytes_per_second / 1e12) == 19
    assert row.hbm_bytes == 40 * GIB
    assert int(row.hbm_bytes_per_second / 1e11) == 15


def test_variants_of_a_chip_differ_in_memory_only():
    for first, second in (("A100-40GB", "A100-80GB"), ("H100-SXM", "H200")):
        figures, others = HARDWARE[first].figures(), HARDWARE[second].figures()
        differing = {name for name in figures if figures[name].value != others[name].value}
        assert differing == {"hbm_bytes", "hbm_bytes_per_second"}


def test_hopper_rates_cover_those_of_the_flashattention3_paper():
    # The paper states 3.9 TFLOP/s of exponentials and 31 TB/s at 1830 MHz; the row has the peak at 1980 MHz.
    row = HARDWARE["H100-SXM"]
    assert row.exponentials_per_second * 1830 / 1980 == pytest.approx(3.9e12, rel=0.01)
    assert row.sram_bytes_per_second * 1830 / 1980 == pytest.approx(31e12, rel=0.01)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("A100-40GB", "float8_e4m3fn"),
        ("T4", "bfloat16"),
        ("V100-SXM2-32GB", "bfloat16"),
        ("H100-SXM", "int8"),
    ],
)
def test_a_format_the_card_lacks_is_an_error_that_names_both(name, dtype):
    with pytest.raises(ValueError, match=f"{dtype}.*{name}"):
        HARDWARE[name].matmul_flops_per_second(dtype)


def test_bandwidth_by_level():
    row = HARDWARE["A100-40GB"]
    assert [row.bytes_per_second(level) for level in MEMORY_LEVELS] == [
        row.hbm_bytes_per_second,
        row.l2_bytes_per_second,
        row.sram_bytes_per_second,
    ]


def test_bandwidth_of_an_unknown_or_unpublished_level_is_an_error():
    with pytest.raises(ValueError, match=r"level='l1'.*hbm, l2, sram"):
        HARDWARE["A100-40GB"].bytes_per_second("l1")
    with pytest.raises(ValueError, match=r"level='l2'.*T4"):
        HARDWARE["T4"].bytes_per_second("l2")


def test_source_of_an_unknown_figure_is_an_error():
    with pytest.raises(ValueError, match=r"figure='l3_bytes'.*A100-40GB"):
        HARDWARE["A100-40GB"].source("l3_bytes")


def test_get_hardware_takes_a_name_or_a_row():
    row = get_hardware("H100-SXM")
    assert row is HARDWARE["H100-SXM"]
    assert get_hardware(row) is row
    custom = changed(name="mine", l2_bytes=MIB)
    assert get_hardware(custom) is custom


def test_get_hardware_lists_the_known_names():
    with pytest.raises(ValueError, match=r"hardware='A100': expected one of .*A100-40GB.*B200"):
        get_hardware("A100")
    with pytest.raises(TypeError, match="hardware=8 is a int"):
        get_hardware(8)


@pytest.mark.parametrize("value", ["", None, 4])
def test_name_is_checked(value):
    with pytest.raises(ValueError, match="name="):
        changed(name=value)


@pytest.mark.parametrize("value", [(8,), "8.0", (8, -1), (8, True), [8, 0]])
def test_compute_capability_is_checked(value):
    with pytest.raises(ValueError, match="compute_capability="):
        changed(compute_capability=value)


@pytest.mark.parametrize("name", ["streaming_multiprocessors", "l2_bytes", "hbm_bytes", "sram_bytes_per_block"])
def test_counts_are_checked(name):
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            changed(**{name: value})
    for value in (1.5, True, None):
        with pytest.raises(TypeError, match=f"{name}={value}"):
            changed(**{name: value})


@pytest.mark.parametrize("name", ["hbm_bytes_per_second", "l2_bytes_per_second", "exponentials_per_second"])
def test_rates_are_checked(name):
    for value in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            changed(**{name: value})
    for value in ("1", True):
        with pytest.raises(TypeError, match=f"{name}="):
            changed(**{name: value})


def test_a_block_cannot_have_more_sram_than_its_multiprocessor():
    with pytest.raises(ValueError, match=r"sram_bytes_per_block=.*shared_bytes_per_multiprocessor="):
        changed(sram_bytes_per_block=165 * KIB)
    with pytest.raises(ValueError, match=r"shared_bytes_per_multiprocessor=.*sram_bytes_per_multiprocessor="):
        changed(shared_bytes_per_multiprocessor=193 * KIB)


def test_matmul_rates_are_checked():
    rates = dict(HARDWARE["A100-40GB"].matmul_flops_per_second_by_dtype)
    with pytest.raises(ValueError, match="dtype='int8'"):
        changed(matmul_flops_per_second_by_dtype=rates | {"int8": 1.0})
    with pytest.raises(ValueError, match=r"\[float16\]=0"):
        changed(matmul_flops_per_second_by_dtype=rates | {"float16": 0})
    with pytest.raises(ValueError, match="float32"):
        changed(matmul_flops_per_second_by_dtype={"float16": 1.0})
    with pytest.raises(TypeError, match="is a list"):
        changed(matmul_flops_per_second_by_dtype=[("float32", 1.0)])


def test_sources_are_checked():
    sources = dict(HARDWARE["A100-40GB"].sources)
    with pytest.raises(ValueError, match="lacks hbm_bytes"):
        changed(sources={name: text for name, text in sources.items() if name != "hbm_bytes"})
    with pytest.raises(ValueError, match="names l3_bytes"):
        changed(sources=sources | {"l3_bytes": "nowhere"})
    with pytest.raises(ValueError, match=r"sources\['hbm_bytes'\]='  '"):
        changed(sources=sources | {"hbm_bytes": "  "})
    with pytest.raises(TypeError, match="is a NoneType"):
        changed(sources=None)


def test_rows_are_immutable():
    row = HARDWARE["T4"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.l2_bytes = 1
    with pytest.raises(TypeError):
        row.sources["l2_bytes"] = "elsewhere"
    with pytest.raises(TypeError):
        row.matmul_flops_per_second_by_dtype["bfloat16"] = 1.0
    with pytest.raises(TypeError):
        HARDWARE["mine"] = row


@every_row
def test_rows_survive_pickling_and_hash_alike(row):
    copy = pickle.loads(pickle.dumps(row))
    assert copy == row
    assert hash(copy) == hash(row)
    assert isinstance(copy, Hardware)


def test_table_has_one_flat_row_per_figure():
    rows = table()
    assert len(rows) == sum(len(row.figures()) for row in ROWS)
    assert all(set(row) == {"hardware", "figure", "value", "source"} for row in rows)
    assert all(isinstance(row["value"], (int, float, str, type(None))) for row in rows)
    by_key = {(row["hardware"], row["figure"]): row["value"] for row in rows}
    assert by_key["H100-SXM", "compute_capability"] == "9.0"
    assert by_key["B200", "matmul_flops_per_second[bfloat16]"] == 2.25e15
    assert set(MATMUL_DTYPES) >= {key[1][24:-1] for key in by_key if key[1].startswith("matmul")}


def test_importing_the_table_needs_the_standard_library_only():
    script = "import sys, simattn.hardware; print([m for m in ('numpy', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
