"""The compiler and its cache, without a GPU. Tests that compile need NVRTC, from a wheel or a CUDA toolkit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cupy_kernels import CompileError, compiler, table
from cupy_kernels import __main__ as command_line
from cupy_kernels.compiler import Variant, cache_directory, check_architecture, choose_architecture, compile_variant
from simattn.hardware import get_hardware


def why_no_nvrtc():
    try:
        compiler.compiler_version()
    except RuntimeError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(why_no_nvrtc()), reason=why_no_nvrtc() or "NVRTC is there")

SCALE = Variant("scale.cu", "scale", (("FACTOR", "3"),))
SOURCE = """
#include "factor.cuh"
extern "C" __global__ void scale(float* values) { values[threadIdx.x] = times(values[threadIdx.x]); }
"""
HEADER = """
#pragma once
#include "deeper.cuh"
__device__ float times(float value) { return value * FACTOR + OFFSET; }
"""
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x) {
  float a[128];
  for (int i = 0; i < 128; i++) a[i] = x[i * 7];
  for (int j = 0; j < 10; j++)
    for (int i = 0; i < 128; i++) a[i] = a[i] * a[(i + 1) % 128];
  for (int i = 0; i < 128; i++) x[i] = a[i];
}
"""


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A directory of kernels with one source of two headers, and an empty cache."""
    directory = tmp_path / "kernels"
    directory.mkdir()
    for name, text in (("scale.cu", SOURCE), ("factor.cuh", HEADER), ("deeper.cuh", "#define OFFSET 1\n")):
        (directory / name).write_text(text)
    monkeypatch.setattr(compiler, "KERNEL_DIRECTORY", directory)
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    return directory


def reread():
    compiler._sources.cache_clear()


# The cache


@needs_nvrtc
def test_a_cubin_is_compiled_once(kernels):
    first = compile_variant(SCALE, "sm_80")
    assert not first.cached
    assert first.path.read_bytes().startswith(b"\x7fELF")
    assert first.architecture == "sm_80"
    assert 0 < first.registers <= 255
    assert (first.spill_bytes, first.stack_bytes, first.complaints) == (0, 0, ())
    second = compile_variant(SCALE, "sm_80")
    assert second.cached
    assert second == first
    assert compiler.find(SCALE, "sm_80") == first


@needs_nvrtc
def test_the_compiler_is_told_to_round_as_the_simulated_machine_does():
    for option in ("-ftz=false", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-std=c++17"):
        assert option in compiler.EXACT_OPTIONS


@needs_nvrtc
def test_products_and_sums_are_not_contracted(kernels, monkeypatch):
    made = compile_variant(SCALE, "sm_80")
    monkeypatch.setattr(
        compiler,
        "EXACT_OPTIONS",
        tuple("-fmad=true" if "fmad" in option else option for option in compiler.EXACT_OPTIONS),
    )
    contracted = compile_variant(SCALE, "sm_80")
    assert contracted.path != made.path
    assert contracted.path.read_bytes() != made.path.read_bytes()


@needs_nvrtc
@pytest.mark.parametrize("changed", ["scale.cu", "factor.cuh", "deeper.cuh"])
def test_a_change_of_any_file_compiles_again(kernels, changed):
    before = compile_variant(SCALE, "sm_80")
    with (kernels / changed).open("a") as file:
        file.write("\n#define CHANGED 1\n")
    reread()
    assert compiler.find(SCALE, "sm_80") is None
    assert not compile_variant(SCALE, "sm_80").cached
    assert before.path.exists()


@needs_nvrtc
def test_the_key_depends_on_macros_architecture_options_and_compiler(kernels, monkeypatch):
    keys = {compiler._record_name(SCALE, "sm_80")}
    keys.add(compiler._record_name(Variant("scale.cu", "scale", (("FACTOR", "4"),)), "sm_80"))
    keys.add(compiler._record_name(Variant("scale.cu", "other", (("FACTOR", "3"),)), "sm_80"))
    keys.add(compiler._record_name(SCALE, "sm_90a"))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "EXACT_OPTIONS", (*compiler.EXACT_OPTIONS, "-DMORE"))
        keys.add(compiler._record_name(SCALE, "sm_80"))
    for version in ((99, 0, 1), (99, 0, 2)):
        monkeypatch.setattr(compiler, "_compiler", lambda version=version: version)
        keys.add(compiler._record_name(SCALE, "sm_80"))
    assert len(keys) == 7


@needs_nvrtc
@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "absent"])
def test_a_damaged_cubin_is_made_again(kernels, damage):
    made = compile_variant(SCALE, "sm_80")
    good = made.path.read_bytes()
    if damage == "truncated":
        made.path.write_bytes(good[:-1])
    elif damage == "changed":
        made.path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    elif damage == "empty":
        made.path.write_bytes(b"")
    else:
        made.path.unlink()
    again = compile_variant(SCALE, "sm_80")
    assert not again.cached
    assert again.path.read_bytes().startswith(b"\x7fELF")
    assert compile_variant(SCALE, "sm_80").cached


@needs_nvrtc
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"cubin": 3}', '{"cubin": "absent.cubin", "sha256": "0"}'])
def test_a_damaged_record_is_made_again(kernels, text):
    compile_variant(SCALE, "sm_80")
    record = cache_directory() / compiler._record_name(SCALE, "sm_80")
    record.write_text(text)
    assert compiler.find(SCALE, "sm_80") is None
    assert not compile_variant(SCALE, "sm_80").cached
    assert compile_variant(SCALE, "sm_80").cached


@needs_nvrtc
def test_nothing_unfinished_is_left(kernels):
    compile_variant(SCALE, "sm_80")
    names = sorted(path.suffix for path in cache_directory().iterdir())
    assert names == [".cubin", ".json"]
    record = next(cache_directory().glob("*.json"))
    assert record.name.startswith("scale-sm_80-")
    assert "registers" in json.loads(record.read_text())["log"]


WORKER = """
import sys
from pathlib import Path
from cupy_kernels import compiler
compiler.KERNEL_DIRECTORY = Path(sys.argv[1])
for number in range(4):
    made = compiler.compile_variant(compiler.Variant("scale.cu", "scale", (("FACTOR", str(number)),)), "sm_80")
    assert made.path.read_bytes().startswith(bytes([0x7F]) + b"ELF")
    print(made.path.name)
"""


@needs_nvrtc
def test_processes_may_fill_the_cache_together(kernels):
    command = [sys.executable, "-c", WORKER, str(kernels)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [worker.communicate()[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    for number in range(4):
        found = compiler.find(Variant("scale.cu", "scale", (("FACTOR", str(number)),)), "sm_80")
        assert found is not None
        assert found.path.name in {output[number] for output in outputs}
    assert not [path for path in cache_directory().iterdir() if path.name.startswith(".")]


@needs_nvrtc
def test_threads_may_compile_together(kernels):
    variants = [Variant("scale.cu", "scale", (("FACTOR", str(number % 3)),)) for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda variant: compile_variant(variant, "sm_80"), variants))
    for variant, cubin in zip(variants, made, strict=True):
        assert compile_variant(variant, "sm_80").path == cubin.path


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_done_without(kernels, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="CUPY_KERNELS_CACHE_DIR"):
        made = compile_variant(SCALE, "sm_80")
    assert made.path.read_bytes().startswith(b"\x7fELF")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "here"))
    assert cache_directory() == tmp_path / "here"
    monkeypatch.delenv("CUPY_KERNELS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "cupy_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "cupy_kernels"


# Errors


@needs_nvrtc
def test_a_compile_error_names_the_kernel_and_shows_the_log(kernels):
    (kernels / "scale.cu").write_text('extern "C" __global__ void scale(float* x) {\n  x[0] = unknown;\n}\n')
    with pytest.raises(CompileError) as raised:
        compile_variant(SCALE, "sm_80")
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("scale (scale.cu, FACTOR=3) does not compile for sm_80 with NVRTC ")
    assert lines[1] == 'scale.cu(2): error: identifier "unknown" is undefined'
    assert compiler.find(SCALE, "sm_80") is None


@needs_nvrtc
def test_a_long_log_is_cut(kernels):
    body = "\n".join(f"  x[{number}] = unknown_{number};" for number in range(60))
    (kernels / "scale.cu").write_text(f'extern "C" __global__ void scale(float* x) {{\n{body}\n}}\n')
    with pytest.raises(CompileError, match=r"… \d+ more lines$") as raised:
        compile_variant(SCALE, "sm_80")
    assert len(str(raised.value).splitlines()) == compiler.LOG_LINES_SHOWN + 2


@needs_nvrtc
def test_spills_and_warnings_are_complaints(kernels):
    (kernels / "spilling.cu").write_text(SPILLING)
    made = compile_variant(Variant("spilling.cu", "spilling"), "sm_80")
    assert made.spill_bytes > 0
    assert made.complaints[-1] == f"{made.spill_bytes} bytes of spills"
    (kernels / "warned.cu").write_text('extern "C" __global__ void warned(float* x) { int unused; x[0] = 1; }\n')
    made = compile_variant(Variant("warned.cu", "warned"), "sm_80")
    assert "was declared but never referenced" in made.complaints[0]
    assert compile_variant(Variant("warned.cu", "warned"), "sm_80").complaints == made.complaints


def test_complaints_are_read_off_the_log():
    log = """ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem"""
    found = compiler._resources(log)
    assert (found["registers"], found["static_shared_bytes"]) == (168, 1024)
    assert (found["spill_bytes"], found["stack_bytes"]) == (20, 16)
    assert len(found["complaints"]) == 2
    assert "serialized" in found["complaints"][0]


def test_without_cuda_bindings_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    compiler._nvrtc.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"simattn\[cuda12\] or simattn\[cuda13\]"):
            compiler._nvrtc()
    finally:
        compiler._nvrtc.cache_clear()


# Architectures


def supported(monkeypatch, *numbers):
    pairs = tuple(divmod(number, 10) for number in numbers)
    monkeypatch.setattr(compiler, "supported_compute_capabilities", lambda: pairs)
    monkeypatch.setattr(compiler, "compiler_version", lambda: "NVRTC 12.9")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((12, 1), "sm_120"),  # newer than the compiler: the code of 12.0 runs there
    ],
)
def test_the_architecture_follows_from_the_device(monkeypatch, capability, architecture):
    supported(monkeypatch, 75, 80, 86, 89, 90, 100, 120)
    assert choose_architecture(capability) == architecture


@pytest.mark.parametrize("capability", [(7, 0), (13, 0), (6, 1)])
def test_a_device_without_a_kernel_is_refused(monkeypatch, capability):
    supported(monkeypatch, 75, 80, 90, 100)
    with pytest.raises(RuntimeError, match=rf"compute capability {capability[0]}\.{capability[1]}.*7\.5, 8\.0, 9\.0"):
        choose_architecture(capability)


@pytest.mark.parametrize("name", ["sm_12", "sm_999", "compute_80", "90", "sm_80 ", "sm_80b"])
def test_an_unknown_architecture_is_refused(monkeypatch, name):
    supported(monkeypatch, 75, 80, 90)
    with pytest.raises(ValueError, match=r"architecture=.*sm_75, sm_80, sm_90"):
        check_architecture(name)


@needs_nvrtc
def test_the_compiler_supports_what_the_kernels_promise():
    found = compiler.supported_compute_capabilities()
    assert {(7, 5), (8, 0), (9, 0)} <= set(found)
    assert min(found) == (7, 5)
    assert check_architecture("sm_90a") == "sm_90a"


@needs_nvrtc
def test_importing_the_compiler_imports_no_cupy():
    script = (
        "import sys\nfrom cupy_kernels import compiler\ncompiler.supported_compute_capabilities()\n"
        "print([name for name in ('cupy', 'hypothesis', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


# The kernels


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_every_kernel_compiles_without_spills_or_warnings(architecture, request, monkeypatch):
    directory = request.config.cache.mkdir("cubins")  # a run after a change compiles what changed
    done = warmup("--arch", architecture, "--json", CUPY_KERNELS_CACHE_DIR=str(directory))
    gpu = replace(get_hardware("H100-SXM"), compute_capability=compiler.capability_of(architecture))
    rows, kernels = json.loads(done.stdout), table.default_kernels(gpu)
    assert len(rows) == len(kernels)
    assert {row["kernel"] for row in rows} == {kernel.function for kernel in kernels}
    for row in rows:
        assert row["complaints"] == "", row
    assert done.returncode == 0
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(directory))
    for kernel in kernels:
        made = compiler.find(kernel.variant(count_traffic=False), architecture)
        blocks = int(dict(kernel.macros).get("BLOCKS", 1))
        assert made.registers <= 255
        assert kernel.threads * blocks * made.registers <= 65536, kernel
        assert made.static_shared_bytes == 0


def test_the_counting_build_is_another(request, monkeypatch):
    if why_no_nvrtc():
        pytest.skip(why_no_nvrtc())
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(request.config.cache.mkdir("cubins")))
    kernel = table.default_kernels()[0]
    made = [compile_variant(kernel.variant(count_traffic=counting), "sm_80") for counting in (False, True)]
    assert made[0].path.read_bytes() != made[1].path.read_bytes()


@needs_nvrtc
def test_the_fast_build_has_no_trace_of_counting(tmp_path, monkeypatch):
    """Without the counters' address in the source, the fast builds are the same machine code."""
    bare = tmp_path / "kernels"
    shutil.copytree(compiler.KERNEL_DIRECTORY, bare)
    uses = 0
    for source in bare.iterdir():
        text = source.read_text()
        uses += text.count("parameters.counters")
        source.write_text(text.replace("parameters.counters", "static_cast<unsigned long long*>(nullptr)"))
    assert uses > 50
    chosen = {kernel.function: kernel for kernel in table.default_kernels()}
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    for kernel in chosen.values():
        made = {}
        for counting in (False, True):
            for directory in (compiler.KERNEL_DIRECTORY, bare):
                with monkeypatch.context() as patch:
                    patch.setattr(compiler, "KERNEL_DIRECTORY", directory)
                    architecture = "sm_90a" if kernel.boxes else "sm_80"
                    cubin = compile_variant(kernel.variant(count_traffic=counting), architecture)
                made[counting, directory == bare] = cubin.path.read_bytes()
        assert made[False, False] == made[False, True], kernel.function
        assert made[True, False] != made[True, True], kernel.function


# The command line


def warmup(*arguments, **environment):
    command = [sys.executable, "-m", "cupy_kernels", "warmup", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@needs_nvrtc
def test_warmup_fills_the_cache_once(tmp_path):
    chosen = ("--arch", "sm_80", "--dtype", "float16", "--columns", "16")
    expected = [kernel for kernel in table.default_kernels() if is_chosen(kernel)]
    listed = warmup(*chosen, "--list", "--json", CUPY_KERNELS_CACHE_DIR=str(tmp_path))
    assert [row["cached"] for row in json.loads(listed.stdout)] == [False] * len(expected)
    assert not list(tmp_path.iterdir())
    for cached in (False, True):
        done = warmup(*chosen, "--json", CUPY_KERNELS_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0
        rows = json.loads(done.stdout)
        assert [row["kernel"] for row in rows] == [kernel.function for kernel in expected]
        assert {(row["storage"], row["counting"]) for row in rows} == {("float16", False)}
        assert [row["cached"] for row in rows] == [cached] * len(expected)
    counting = warmup(*chosen, "--counting", "--list", "--json", CUPY_KERNELS_CACHE_DIR=str(tmp_path))
    assert [row["cached"] for row in json.loads(counting.stdout)] == [True, False] * len(expected)
    lines = warmup(*chosen, "--list", CUPY_KERNELS_CACHE_DIR=str(tmp_path)).stdout.splitlines()
    assert len(lines) == 2 + len(expected)
    assert lines[0].split()[:3] == ["kernel", "storage", "columns"]


def is_chosen(kernel):
    """Say whether ``--dtype float16 --columns 16`` chooses a kernel; those without column buckets are always."""
    macros = dict(kernel.macros)
    return macros["STORAGE"] == "float16" and macros.get("COLUMNS", "16") == "16"


@needs_nvrtc
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sm_12"), "architecture='sm_12'"),
        (("--dtype", "float64"), "float64"),
        (("--columns", "17"), "17"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    done = warmup(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@needs_nvrtc
def test_a_kernel_that_does_not_compile_is_exit_code_1(kernels, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "variants", lambda hardware: [SCALE])
    monkeypatch.setattr(command_line, "_wanted", lambda variant, arguments: True)
    (kernels / "scale.cu").write_text("mistake\n")
    assert command_line.main(["warmup", "--arch", "sm_80", "--jobs", "1"]) == 1
    assert "scale (scale.cu, FACTOR=3) does not compile for sm_80" in capsys.readouterr().out
