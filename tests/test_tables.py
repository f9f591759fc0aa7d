"""Tables, CSV, JSON and byte counts in print."""

from __future__ import annotations

import csv
import io
import json

import pytest

from simattn.tables import byte_text, csv_text, json_text, text_table

ROWS = [{"name": 'a "quoted", name', "bytes": 10**30}, {"name": "b", "bytes": 0, "extra": "é"}]


def test_text_table_aligns_numbers_right():
    assert text_table(["name", "n"], [["a", "10"], ["bcdef", "9"]]) == "\n".join(
        ["name    n", "-----  --", "a      10", "bcdef   9"]
    )


def test_text_table_aligns_words_left():
    assert text_table(["name", "word"], [["a", "b"]], numeric=False) == "name  word\n----  ----\na     b"


def test_text_table_without_rows_is_its_head():
    assert text_table(["a", "b"], []) == "a  b\n-  -"


def test_csv_reads_back():
    first, second = csv.DictReader(io.StringIO(csv_text(ROWS)))
    assert first == {"name": 'a "quoted", name', "bytes": str(10**30), "extra": ""}
    assert second == {"name": "b", "bytes": "0", "extra": "é"}


def test_json_keeps_integers_of_any_size():
    assert json.loads(json_text(ROWS)) == ROWS
    assert "é" in json_text(ROWS)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (232_448, "232 kB"),
        (999_600, "1 MB"),
        (40_300_000_000, "40.3 GB"),
        (10**18, "1 EB"),
        (5 * 10**21, "5 ZB"),
        (-2048, "-2.05 kB"),
    ],
)
def test_byte_text(count, text):
    assert byte_text(count) == text
