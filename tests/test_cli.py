"""The command line: every command and argument, exit codes, and one-line errors."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import simattn
from simattn import cli, kv_cache, report
from simattn.hardware import table


def claim(ok=True):
    return {
        "identifier": "one",
        "statement": "A statement.",
        "source": "A source",
        "range_tested": "N = 1",
        "counted": "2",
        "numbers": {"elements": 2},
        "verdict": "holds" if ok else "does not hold",
        "expected": "holds",
        "ok": ok,
    }


@pytest.fixture
def run(capsys):
    """Run a command and return its exit code, standard output and standard error."""

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def printed(run, *arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    return out


def csv_rows(text):
    return list(csv.DictReader(io.StringIO(text)))


# count

PROBLEM = {"q_len": 3000, "kv_len": 5000, "batch": 2, "heads": 8, "kv_heads": 2, "head_dim": 96, "value_dim": 64}


def options(arguments):
    return [text for name, value in arguments.items() for text in (f"--{name.replace('_', '-')}", value)]


def test_count_prints_the_table(run):
    out = printed(run, "count", "flash2", "--q-len", "1M", "--head-dim", 128, "--causal")
    expected = simattn.profile("flash2", q_len=1 << 20, head_dim=128, causal=True)
    assert out == f"{expected!r}\n"


def test_count_json_has_the_numbers_of_the_call(run):
    out = printed(run, "count", "flash2", *options(PROBLEM), "--direction", "backward", "--json")
    found = json.loads(out)
    expected = simattn.profile("flash2", direction="backward", **PROBLEM)
    assert found["traffic"] == list(expected.traffic.rows())
    assert found["operations"]["matmul_flops"] == expected.operations.matmul_flops
    assert found["peak_sram_bytes"] == expected.peak_sram_bytes
    assert found["hbm_bytes_by_role"] == expected.hbm_bytes_by_role
    assert found["plan"]["tiles"]["q"] == expected.plan.tiles.q
    assert {name: found["problem"][name] for name in PROBLEM} == PROBLEM
    assert (found["algorithm"], found["direction"]) == ("flash2", "backward")


def test_count_json_keeps_large_integers(run):
    found = json.loads(printed(run, "count", "standard", "--q-len", "1_000_000_000_000", "--json"))
    assert found["traffic"][-1]["hbm_read_bytes"] == simattn.count("standard", q_len=10**12).hbm_read_bytes > 2**64


def test_count_csv_has_the_rows_of_the_traffic(run):
    rows = csv_rows(printed(run, "count", "flash1", "--q-len", 4096, "--csv"))
    expected = [{name: str(value) for name, value in row.items()} for row in simattn.count("flash1", q_len=4096).rows()]
    assert rows == expected


def test_count_closed_form(run):
    out = json.loads(printed(run, "count", "flash2", *options(PROBLEM), "--closed-form", "--json"))
    expected = simattn.closed_form("flash2", **PROBLEM)
    assert out["traffic"] == list(expected.rows())
    assert "peak_sram_bytes" not in out
    assert printed(run, "count", "flash2", *options(PROBLEM), "--closed-form") == f"{expected!r}\n"


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (["--window", "1023,0"], {"window": (1023, 0)}),
        (["--window", "none,512"], {"window": (None, 512)}),
        (["--window=-,5"], {"window": (None, 5)}),
        (["--window", "1k,none", "--causal"], {"window": (1024, None), "causal": True}),
        (["--tiles", "64,32"], {"tiles": (64, 32)}),
        (["--dtype", "float16"], {"dtype": "float16"}),
        (["--scale", "0.5"], {"scale": 0.5}),
        (["--plan", "paper"], {"plan": "paper"}),
        (["--hardware", "T4"], {"hardware": "T4"}),
        (["--sram-bytes", "96k"], {"sram_bytes": 96 * 1024}),
        (["--direction", "backward", "--option", "dq=deterministic"], {"direction": "backward", "dq": "deterministic"}),
        (["--option", "stages=3", "--option", "repeat_kv=true"], {"stages": 3, "repeat_kv": True}),
    ],
)
def test_count_passes_its_arguments_on(run, given, arguments):
    shape = {"q_len": 4096, "heads": 4, "kv_heads": 2}
    out = printed(run, "count", "flash2", *options(shape), *given, "--csv")
    expected = simattn.count("flash2", **shape, **arguments)
    assert out.splitlines()[-1] == ",".join(str(value) for value in list(expected.rows())[-1].values())


@pytest.mark.parametrize(
    ("name", "given", "arguments"),
    [
        ("paged", ["--option", "cache_lengths=100,2k,7"], {"cache_lengths": (100, 2048, 7)}),
        ("paged", ["--kv-len", "1k", "--option", "splits=v2"], {"kv_len": 1024, "splits": "v2"}),
        ("split_kv", ["--kv-len", "1M", "--option", "splits=4"], {"kv_len": 1 << 20, "splits": 4}),
        ("linear", ["--kv-len", "1M", "--option", "normalised=false"], {"normalised": False}),
        ("lightning2", ["--option", "slopes=0.5,1,2,4"], {"slopes": [0.5, 1, 2, 4]}),
        (
            "dilated_window",
            ["--kv-len", "9", "--window", "2,0", "--option", "global_tokens=1,"],
            {"kv_len": 9, "window": (2, 0), "global_tokens": (1,)},
        ),
        (
            "lightning2",
            ["--heads", "1", "--kv-heads", "1", "--option", "slopes=0.5,"],
            {"heads": 1, "kv_heads": 1, "slopes": [0.5]},
        ),
    ],
    ids=str,
)
def test_count_of_decoding_steps(run, name, given, arguments):
    shape = {"q_len": 1, "batch": 3, "heads": 4, "kv_heads": 2, "direction": "decode"}
    out = printed(run, "count", name, *options(shape), *given, "--csv")
    expected = simattn.count(name, **{**shape, **arguments})
    assert out.splitlines()[-1] == ",".join(str(value) for value in list(expected.rows())[-1].values())


def test_count_takes_three_tile_sizes(run):
    given = ("--sram-bytes", "64k", "--tiles", "32,32,16")
    found = json.loads(printed(run, "count", "small_cache", "--q-len", 1024, *given, "--json"))
    assert found["plan"]["tiles"] == {"q": 32, "kv": 32, "depth": 16}


def test_count_takes_a_block_mask(run, tmp_path):
    blocks = np.tri(8, dtype=bool)
    np.save(tmp_path / "mask.npy", blocks)
    given = ("--q-len", 1024, "--block-mask", tmp_path / "mask.npy", "--block-size", "128,128")
    found = json.loads(printed(run, "count", "flash2", *given, "--json"))
    mask = simattn.BlockMask.from_array(blocks, q_block=128, kv_block=128)
    assert found["traffic"] == list(simattn.count("flash2", q_len=1024, block_mask=mask).rows())
    assert found["problem"]["block_mask"] == mask.fingerprint()


def test_count_has_every_argument_of_the_call():
    parameters = inspect.signature(simattn.count).parameters
    expected = {name for name, entry in parameters.items() if entry.kind is not entry.VAR_KEYWORD}
    for command in ("count", "sweep"):
        arguments = cli._parser().parse_args([command, "flash2", "--q-len", "1"])
        assert expected <= set(vars(arguments)), command


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("1_000", 1000), ("128k", 131072), ("128K", 131072), ("1M", 1 << 20), ("2g", 2 << 30), ("1T", 1 << 40)],
)
def test_integers_take_suffixes(text, value):
    assert cli._integer(text) == value


# layer

LAYER = {"model_width": 96, "heads": 8, "kv_heads": 2, "head_dim": 24, "value_dim": 16, "dtype": "float32"}
LENGTHS = {"length": 300, "batch": 2}


def test_layer_prints_the_table(run):
    out = printed(run, "layer", "train", *options(LAYER), *options(LENGTHS), "--causal", "--biases")
    layer = simattn.AttentionLayer(**LAYER, causal=True, biases=True)
    assert out == f"{layer.profile('train', **LENGTHS)!r}\n"


def test_layer_json_has_the_numbers_of_the_call(run):
    found = json.loads(printed(run, "layer", "decode", *options(LAYER), "--cache-length", "1M", "--json"))
    layer = simattn.AttentionLayer(**LAYER)
    expected = layer.profile("decode", cache_length=1 << 20)
    assert found["parts"] == list(expected.rows())
    assert found["traffic"] == list(expected.traffic.rows())
    assert found["parameters"] == layer.parameters_by_array
    assert {name: found["layer"][name] for name in LAYER} == LAYER
    assert (found["phase"], found["algorithm"], found["problem"]["kv_len"]) == ("decode", "flash2", (1 << 20) + 1)


def test_layer_json_has_the_fields_of_the_problem(run):
    given = ("--cache-length", "1M", "--algorithm", "split_kv", "--option", "splits=7", "--json")
    found = json.loads(printed(run, "layer", "decode", *options(LAYER), *given))
    expected = simattn.AttentionLayer(**LAYER).profile("decode", cache_length=1 << 20, algorithm="split_kv", splits=7)
    assert found["parts"] == list(expected.rows())
    given = ("--algorithm", "moba", "--option", "block_size=64", "--json")
    found = json.loads(printed(run, "layer", "train", *options(LAYER), *options(LENGTHS), *given))
    assert (found["algorithm"], found["problem"]["block_size"], found["problem"]["causal"]) == ("moba", 64, True)


def test_layer_csv_has_the_rows_of_the_parts(run):
    rows = csv_rows(printed(run, "layer", "backward", *options(LAYER), *options(LENGTHS), "--csv"))
    expected = simattn.AttentionLayer(**LAYER).profile("backward", **LENGTHS).rows()
    assert rows == [{name: str(value) for name, value in row.items()} for row in expected]


def test_layer_closed_form(run):
    given = ("layer", "train", *options(LAYER), *options(LENGTHS), "--closed-form")
    expected = simattn.AttentionLayer(**LAYER).closed_form("train", **LENGTHS)
    assert printed(run, *given) == f"{expected!r}\n"
    found = json.loads(printed(run, *given, "--json"))
    assert found["traffic"] == list(expected.rows())
    assert "parts" not in found


@pytest.mark.parametrize(
    ("given", "shape", "work"),
    [
        (["--window", "63,none"], {"window": (63, None)}, {}),
        (["--context-width", "40", "--context-length", "77"], {"context_width": 40}, {"context_length": 77}),
        (["--algorithm", "flash1", "--tiles", "16,32"], {}, {"algorithm": "flash1", "tiles": (16, 32)}),
        (["--plan", "paper", "--hardware", "T4"], {}, {"plan": "paper", "hardware": "T4"}),
        (["--sram-bytes", "64k"], {}, {"sram_bytes": 65536}),
        (["--projection-tiles", "64,32,16"], {}, {"projection_tiles": (64, 32, 16)}),
        (
            ["--option", "dq=deterministic", "--option", "repeat_kv=true"],
            {},
            {"dq": "deterministic", "repeat_kv": True},
        ),
        (
            ["--algorithm", "linear", "--option", "feature_map=relu", "--option", "normalised=false"],
            {},
            {"algorithm": "linear", "feature_map": "relu", "normalised": False},
        ),
        (
            ["--algorithm", "dilated_window", "--window", "15,0", "--option", "dilation=2,3"],
            {"window": (15, 0)},
            {"algorithm": "dilated_window", "dilation": (2, 3)},
        ),
        (
            ["--algorithm", "moba", "--option", "block_size=64", "--option", "top_k=3"],
            {},
            {"algorithm": "moba", "block_size": 64, "top_k": 3},
        ),
    ],
)
def test_layer_passes_its_arguments_on(run, given, shape, work):
    out = printed(run, "layer", "train", *options(LAYER), *options(LENGTHS), *given, "--closed-form", "--csv")
    expected = simattn.AttentionLayer(**LAYER, **shape).closed_form("train", **LENGTHS, **work)
    assert out.splitlines()[-1] == ",".join(str(value) for value in list(expected.rows())[-1].values())


def test_layer_has_every_argument_of_the_layer_and_of_its_work():
    layer = simattn.AttentionLayer
    expected = {item.name for item in dataclasses.fields(layer)}
    parameters = inspect.signature(layer.profile).parameters
    expected |= {name for name, entry in parameters.items() if entry.kind is not entry.VAR_KEYWORD} - {"self"}
    assert expected <= set(vars(cli._parser().parse_args(["layer", "train"])))


# sweep

SWEEP = ("sweep", "flash1,flash2", "--q-len", "1k,4k", "--causal", "no,yes", "--head-dim", "64")


def expected_sweep():
    return simattn.sweep(["flash1", "flash2"], q_len=[1024, 4096], head_dim=64, causal=[False, True])


def test_sweep_json_equals_the_call(run):
    found = json.loads(printed(run, *SWEEP, "--json"))
    key = ("algorithm", "q_len", "causal")
    rows = {tuple(row[name] for name in key): row for row in found}
    expected = {tuple(row[name] for name in key): dict(row) for row in expected_sweep()}
    assert len(found) == 8
    assert rows == expected


def test_sweep_csv_and_table(run):
    rows = csv_rows(printed(run, *SWEEP, "--csv"))
    assert sorted(int(row["hbm_bytes"]) for row in rows) == sorted(expected_sweep().column("hbm_bytes"))
    assert printed(run, *SWEEP).startswith("SweepResult, 8 rows")


def test_sweep_resumes_from_its_file(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    first = printed(run, "sweep", "flash2", "--q-len", "1k,2k", "--output", path, "--json")
    size = path.stat().st_size
    assert printed(run, "sweep", "flash2", "--q-len", "1k,2k", "--output", path, "--json") == first
    assert path.stat().st_size == size
    assert len(json.loads(printed(run, "sweep", "flash2", "--q-len", "1k,2k,4k", "--output", path, "--json"))) == 3
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_sweep_counts_in_other_processes(run):
    assert printed(run, *SWEEP, "--workers", 2, "--json") == printed(run, *SWEEP, "--json")


def test_sweep_axes_of_pairs_and_options(run):
    found = json.loads(
        printed(
            run,
            *("sweep", "flash2", "--q-len", "4k", "--direction", "backward", "--causal"),
            *("--window", "1023,0", "--window", "none,0", "--tiles", "32,32", "--tiles", "64,64"),
            *("--option", "dq=reduce,deterministic", "--json"),
        )
    )
    expected = {
        (left, size, dq): simattn.count(
            "flash2",
            q_len=4096,
            causal=True,
            direction="backward",
            window=(left, 0),
            tiles=(size, size),
            dq=dq,
        ).hbm_bytes
        for left in (1023, None)
        for size in (32, 64)
        for dq in ("reduce", "deterministic")
    }
    assert {(row["window"][0], row["plan_tiles_q"], row["dq"]): row["hbm_bytes"] for row in found} == expected


def test_sweep_keeps_errors_as_rows(run):
    arguments = ("sweep", "flash2", "--q-len", "1k", "--plan", "fit", "--sram-bytes", "64,64k")
    found = json.loads(printed(run, *arguments, "--errors", "row", "--json"))
    assert [row["error"] is None for row in found] == [False, True]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("simattn: error: sram_bytes=64")
    assert "while counting" in err


# kv-cache


def expected_runs(allocators=kv_cache.DEFAULT_ALLOCATORS, pool_tokens=15728, max_tokens=2048, **workload):
    given = {"prompt": kv_cache.Geometric(161), "output": kv_cache.Geometric(338), **workload}
    made = kv_cache.generate_workload(given.pop("requests", 100), max_tokens=max_tokens, **given)
    return kv_cache.compare_allocators(made, allocators, pool_tokens=pool_tokens, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ([], {}),
        (["--seed", 7, "--samples", 2], {"seed": 7, "samples": 2}),
        (["--model", "Llama-2-70B", "--pool-bytes", "1G"], {"pool_tokens": (1 << 30) // 327680}),
        (["--kv-heads", 5, "--key-dim", 192, "--value-dim", 64], {"pool_tokens": (12 << 30) // (40 * 5 * 256 * 2)}),
        (["--layers", 20, "--key-dim", 64, "--dtype", "float32"], {"pool_tokens": (12 << 30) // (20 * 40 * 128 * 4)}),
        (["--pool-tokens", "4k", "--max-tokens", 512], {"pool_tokens": 4096, "max_tokens": 512}),
        (
            ["--allocator", "reserve,paged", "--page-tokens", 32, "--watermark-pages", 3],
            {"allocators": ["reserve", kv_cache.Paged(32, watermark_pages=3)]},
        ),
        (
            ["--prompt", "uniform:1,99", "--output", "lognormal:50,0.5", "--poisson", 0.25],
            {
                "prompt": kv_cache.Uniform(1, 99),
                "output": kv_cache.Lognormal(50, 0.5),
                "arrivals": kv_cache.Poisson(0.25),
            },
        ),
    ],
)
def test_kv_cache_passes_its_arguments_on(run, given, arguments):
    expected = [entry.row() for entry in expected_runs(**arguments)]
    found = json.loads(printed(run, "kv-cache", "--requests", 100, *given, "--json"))
    assert found["runs"] == expected
    assert found["pool_tokens"] == expected[0]["pool_tokens"]
    rows = csv_rows(printed(run, "kv-cache", "--requests", 100, *given, "--csv"))
    assert [row["used_share"] for row in rows] == [str(row["used_share"]) for row in expected]


def test_kv_cache_prints_sizes_and_tables(run):
    out = printed(run, "kv-cache", "--requests", 100)
    assert out.startswith("40 layers × 40 KV heads × (128 + 128) columns in float16: 819,200 bytes a token, 1.68 GB ")
    assert out.endswith(f"\n{expected_runs()!r}\n")


def test_kv_cache_reads_a_trace(run, tmp_path):
    workload = kv_cache.generate_workload(50, prompt=kv_cache.Constant(9), output=kv_cache.Geometric(5), seed=3)
    kv_cache.write_trace(workload, tmp_path / "trace.csv")
    found = json.loads(printed(run, "kv-cache", "--trace", tmp_path / "trace.csv", "--json"))["runs"]
    assert found == [entry.row() for entry in kv_cache.compare_allocators(workload, pool_tokens=15728)]


def test_malformed_trace_is_an_error(run, tmp_path):
    (tmp_path / "trace.csv").write_text("arrival_step,prompt_tokens,output_tokens\n0,1\n", encoding="utf-8")
    code, out, err = run("kv-cache", "--trace", tmp_path / "trace.csv")
    assert (code, out) == (2, "")
    assert "trace.csv, line 2: found 2 values: expected 3" in err


# hardware, claims, report


def test_hardware_rows(run):
    assert json.loads(printed(run, "hardware", "--json")) == table()
    assert len(csv_rows(printed(run, "hardware", "--csv"))) == len(table())
    out = printed(run, "hardware", "T4", "B200")
    assert out.startswith("T4\n")
    assert "\n\nB200\n" in out
    assert "H100" not in out.replace("H100 ", "")
    for row in table():
        if row["hardware"] in ("T4", "B200"):
            assert f"{row['figure']} " in out
            assert row["source"] in out


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_claims_exit_code_follows_the_verdicts(run, monkeypatch, ok, code):
    monkeypatch.setattr(report, "claim_rows", lambda: [claim(), claim(ok)])
    found, out, err = run("claims")
    assert (found, err) == (code, "")
    assert "[holds] A statement. (A source)" in out
    assert ("FAILS: does not hold, expected: holds" in out) is not ok
    assert out.splitlines()[-1] == (
        "Every claim that should hold does." if ok else "Claims that should hold and do not: 1"
    )
    found, out, _ = run("claims", "--json")
    assert (found, json.loads(out)) == (code, [claim(), claim(ok)])
    found, out, _ = run("claims", "--csv")
    assert found == code
    assert [row["ok"] for row in csv_rows(out)] == ["True", str(ok)]
    assert "numbers" not in csv_rows(out)[0]


def test_report_json_and_failing_exit_code(run, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "claim_rows", lambda: [claim(ok=False)])
    monkeypatch.setattr(report, "pictures", lambda hardware: [])
    code, out, err = run("report", "--output", tmp_path, "--hardware", "A100-80GB", "--json")
    assert (code, err) == (1, "")
    found = json.loads(out)
    assert found["ok"] is False
    assert found["page"] == str(tmp_path / "index.html")
    assert (tmp_path / "index.html").is_file()
    assert found["claims"] == [claim(ok=False)]
    assert len(found["counts"]) > len(simattn.ALGORITHMS)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["cuont"], "invalid choice: 'cuont'"),
        (["count"], "arguments are required: ALGORITHM"),
        (["count", "flash2"], "--q-len is missing"),
        (["count", "flash9", "--q-len", "8"], "algorithm='flash9'"),
        (["count", "flash2", "--q-len", "eight"], "'eight': expected an integer"),
        (["count", "flash2", "--q-len", ""], "'': expected an integer"),
        (["count", "flash2", "--q-len=-1"], "q_len=-1"),
        (["count", "flash2", "--q-len", "8", "--heads", "3", "--kv-heads", "2"], "kv_heads=2 does not divide heads=3"),
        (["count", "flash2", "--q-len", "8", "--dtype", "int8"], "dtype='int8'"),
        (["count", "flash2", "--q-len", "8", "--scale", "nan"], "scale=nan"),
        (["count", "flash2", "--q-len", "8", "--scale", "big"], "'big': expected a number"),
        (["count", "flash2", "--q-len", "8", "--window", "4"], "expected LEFT,RIGHT"),
        (["count", "flash2", "--q-len", "8", "--tiles", "4"], "expected Q,KV or Q,KV,DEPTH"),
        (["count", "flash2", "--q-len", "8", "--tiles", "0,4"], "tiles.q=0"),
        (["count", "flash2", "--q-len", "8", "--direction", "up"], "direction='up'"),
        (["count", "flash2", "--q-len", "8", "--plan", "best"], "plan='best'"),
        (["count", "flash2", "--q-len", "8", "--hardware", "H900"], "hardware='H900'"),
        (["count", "flash2", "--q-len", "8", "--sram-bytes", "16"], "sram_bytes=16"),
        (["count", "flash2", "--q-len", "8", "--option", "dq"], "'dq': expected NAME=VALUE"),
        (["count", "flash2", "--q-len", "8", "--option", "dp=reduce"], "'dp' is no argument"),
        (
            ["count", "flash2", "--q-len", "8", "--option", "stages=2", "--option", "stages=3"],
            "stages is given already",
        ),
        (["count", "flash2", "--q-len", "8", "--option", "q_len=3"], "q_len is given already"),
        (["count", "flash2", "--q-len", "8", "--block-mask", "mask.npy"], "expected both or neither"),
        (["count", "flash2", "--q-len", "8", "--block-mask", "no.npy", "--block-size", "8,8"], "no.npy"),
        (["count", "flash2", "--q-len", "8", "--json", "--csv"], "not allowed with"),
        (["count", "flash2", "--q-len", "8", "extra"], "unrecognized arguments: extra"),
        (["layer"], "arguments are required: PHASE"),
        (["layer", "train", "--heads", "8"], "--model-width is missing"),
        (["layer", "train", "--model-width", "8"], "--heads is missing"),
        (["layer", "train", "--model-width", "8", "--heads", "3"], "heads=3 does not divide model_width=8"),
        (["layer", "train", "--model-width", "8", "--heads", "2"], "length=None with phase='train'"),
        (["layer", "forward", "--model-width", "8", "--heads", "2"], "phase='forward'"),
        (["layer", "decode", "--model-width", "8", "--heads", "2"], "cache_length=None with phase='decode'"),
        (
            ["layer", "train", "--model-width", "8", "--heads", "2", "--projection-tiles", "4"],
            "expected ROWS,COLUMNS,D",
        ),
        (
            ["layer", "train", "--model-width", "8", "--heads", "2", "--length", "8", "--option", "length=9"],
            "length is given already",
        ),
        (["sweep", "flash2", "--q-len", "1k,1024"], "twice"),
        (["sweep", "flash2", "--q-len", "8", "--causal", "maybe"], "'maybe': expected true or false"),
        (["sweep", "flash2", "--q-len", "8", "--workers", "0"], "max_workers"),
        (["sweep", "flash2", "--q-len", "8", "--output", "/no/such/folder/rows.jsonl"], "/no/such/folder"),
        (["kv-cache", "--model", "GPT-5"], "model='GPT-5'"),
        (["kv-cache", "--kv-heads", "0"], "kv_heads=0"),
        (["kv-cache", "--prompt", "zipf:3"], "'zipf:3': expected constant:TOKENS"),
        (["kv-cache", "--poisson", "0"], "rate=0"),
        (["kv-cache", "--allocator", "slab"], "allocator='slab'"),
        (["kv-cache", "--page-tokens", "0"], "page_tokens=0"),
        (["kv-cache", "--pool-tokens", "1k"], "request 0 needs 1 × 2048 contiguous token slots"),
        (["kv-cache", "--pool-tokens", "8", "--pool-bytes", "8"], "not allowed with"),
        (["kv-cache", "--trace", "no.csv"], "no.csv"),
        (["kv-cache", "--trace", "no.csv", "--seed", "1"], "expected no --seed beside it"),
        (["hardware", "H900"], "hardware='H900'"),
        (["report", "--hardware", "H900"], "hardware='H900'"),
    ],
)
def test_wrong_arguments_are_one_line_and_two(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("simattn: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_report_into_a_file_is_an_error(run, tmp_path):
    (tmp_path / "taken").write_text("not a folder", encoding="utf-8")
    code, _, err = run("report", "--output", tmp_path / "taken")
    assert code == 2
    assert "taken" in err
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "not a folder"


def test_malformed_sweep_file_is_an_error(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("my notes\n", encoding="utf-8")
    code, _, err = run("sweep", "flash2", "--q-len", 8, "--output", path)
    assert code == 2
    assert "my notes" in err
    assert path.read_text(encoding="utf-8") == "my notes\n"


def test_broken_mask_file_is_an_error(run, tmp_path):
    (tmp_path / "mask.npy").write_bytes(b"no array")
    code, _, err = run("count", "flash2", "--q-len", 8, "--block-mask", tmp_path / "mask.npy", "--block-size", "8,8")
    assert code == 2
    assert err.startswith("simattn: error: ")


def test_a_bug_is_not_called_a_wrong_argument(run, monkeypatch):
    def broken():
        raise ValueError("a bug")

    monkeypatch.setattr(report, "claim_rows", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("claims")


def test_interruption_has_its_own_code(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "claim_rows", interrupted)
    assert run("claims") == (130, "", "simattn: interrupted\n")


# The process


@pytest.mark.parametrize(
    "command",
    [[], ["report"], ["claims"], ["count"], ["layer"], ["sweep"], ["compare"], ["kv-cache"], ["hardware"]],
    ids=" ".join,
)
def test_help_is_printed(run, command):
    out = printed(run, *command, "--help")
    assert out.startswith("usage: simattn")
    if command in (["count"], ["layer"], ["sweep"], ["compare"]):
        listed = {word.strip(",.") for word in out[out.index("Algorithms: ") :].split()}
        in_layers = {name for name, spec in simattn.ALGORITHMS.items() if spec.takes_any_mask}
        assert listed & {*simattn.ALGORITHMS} == (in_layers if command == ["layer"] else {*simattn.ALGORITHMS})


@pytest.mark.parametrize("command", ["compare", "kv-cache"])
def test_help_lists_the_models(run, command):
    out = printed(run, command, "--help")
    listed = {word.strip(",.") for word in out[out.index("Models: ") :].split()}
    assert {*simattn.MODELS} <= listed


def test_version_is_printed(run):
    assert printed(run, "--version").startswith("simattn 0.")


def test_the_module_is_a_program():
    command = [sys.executable, "-m", "simattn", "count", "flash2", "--q-len", "64", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert json.loads(done.stdout)["traffic"] == list(simattn.count("flash2", q_len=64).rows())
    assert done.stderr == ""
    failed = subprocess.run(command[:-2], capture_output=True, check=False, text=True)
    assert failed.returncode == 2


def test_a_terminal_without_unicode_gets_escapes():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "simattn", "count", "flash2", "--q-len", "64"]
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert rb"query \xd7 " in done.stdout
    assert done.stderr == b""


@pytest.mark.skipif(os.name != "posix", reason="closed pipes are reported this way on POSIX")
def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "simattn", "hardware"]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, text=True)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_counting_imports_no_heavy_module():
    script = (
        "import sys; from simattn.cli import main; main(['count', 'flash2', '--q-len', '64']); "
        "sys.exit(str({'matplotlib', 'numba', 'tqdm', 'ml_dtypes', 'hypothesis'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert done.stderr.strip() == "set()"
