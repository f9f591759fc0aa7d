"""Traffic: exact, additive, immutable, printable."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simattn import ArrayTraffic, Traffic
from simattn.traffic import COUNTERS

byte_counts = st.integers(0, 10**30)
counters = st.builds(ArrayTraffic, *[byte_counts] * len(COUNTERS))
traffics = st.builds(Traffic, st.dictionaries(st.sampled_from(["q", "k", "v", "out"]), counters))

READ = ArrayTraffic(hbm_read_bytes=8, sram_write_bytes=8)
WRITTEN = ArrayTraffic(hbm_write_bytes=4, hbm_reduce_bytes=2, sram_read_bytes=1)


@given(traffics, traffics, traffics, st.integers(0, 5))
def test_addition_is_that_of_integers(one, two, three, times):
    assert one + two == two + one
    assert (one + two) + three == one + (two + three)
    assert one + Traffic() == one
    assert times * one == one * times == sum([one] * times, Traffic())
    for counter in ("hbm_bytes", "sram_bytes", *COUNTERS):
        assert getattr(one + two, counter) == getattr(one, counter) + getattr(two, counter)


@given(traffics)
def test_copies_are_equal(traffic):
    again = pickle.loads(pickle.dumps(traffic))
    assert again == traffic
    assert hash(again) == hash(traffic)


def test_totals():
    traffic = Traffic({"q": READ, "out": WRITTEN})
    assert traffic.hbm_read_bytes == 8
    assert traffic.hbm_write_bytes == 4
    assert traffic.hbm_reduce_bytes == 2
    assert traffic.hbm_bytes == 8 + 4 + 2
    assert traffic.sram_read_bytes == 1
    assert traffic.sram_write_bytes == 8
    assert traffic.sram_bytes == 9


def test_arrays_that_moved_nothing_do_not_appear():
    assert Traffic({"q": READ, "k": ArrayTraffic()}) == Traffic({"q": READ})
    assert list(Traffic({"v": READ, "k": ArrayTraffic(), "a": READ}).by_array) == ["a", "v"]


def test_global_only_leaves_the_sram_out():
    expected = {"q": ArrayTraffic(hbm_read_bytes=8), "out": ArrayTraffic(hbm_write_bytes=4, hbm_reduce_bytes=2)}
    assert Traffic({"q": READ, "out": WRITTEN, "p": ArrayTraffic(sram_read_bytes=3)}).global_only() == Traffic(expected)


def test_unequal_to_other_things():
    assert Traffic({"q": READ}) != Traffic({"k": READ})
    assert Traffic({"q": READ}) != Traffic({"q": WRITTEN})
    assert Traffic() != 0
    with pytest.raises(TypeError):
        Traffic() + 1
    with pytest.raises(TypeError):
        READ + 1


def test_is_immutable():
    traffic = Traffic({"q": READ})
    with pytest.raises(TypeError):
        traffic.by_array["k"] = READ
    with pytest.raises(FrozenInstanceError):
        traffic.by_array = {}
    with pytest.raises(FrozenInstanceError):
        traffic.by_array["q"].hbm_read_bytes = 3


def test_rows_end_in_the_total():
    first, last = Traffic({"q": READ}).rows()
    assert first == {"array": "q", **asdict(READ)}
    assert last == {"array": "total", **asdict(READ)}


def test_repr_is_a_table():
    lines = repr(Traffic({"q": READ * 10**6, "out": WRITTEN})).splitlines()
    assert lines[0] == "Traffic, bytes"
    assert lines[1].split("  ")[0] == "array"
    assert [line.split()[0] for line in lines[3:]] == ["out", "q", "total"]
    assert lines[4].split()[1] == "8,000,000"
    assert len({len(line) for line in lines[1:]}) == 1


def test_only_whole_multiples():
    counters = ArrayTraffic(hbm_read_bytes=3)
    assert 2 * counters == counters * 2 == ArrayTraffic(hbm_read_bytes=6)
    for traffic in (counters, Traffic({"q": counters})):
        with pytest.raises(TypeError):
            traffic * 1.5
