"""Time the kernels, beside other libraries where they are installed.

``python -m cupy_kernels.bench --output FILE.json --plot FILE.svg``; with ``--read FILE.json`` the table and plot of an
earlier run.

Protocol: device times between events, queued while the device is busy; inputs drawn from N(0, 1) and rotated among
copies that together exceed twice the L2 cache, so that no launch finds its inputs there; every contender is warmed up
and then timed in turn, one launch after the other, ``--rounds`` times; medians. FLOPs are counted
4 · batch · heads · q_len · kv_len · head_dim forward and 10 times that product backward, halved for a causal mask. The
peak is a measured loop of fused multiply-adds. GB/s are the bytes that the program moves between memory and
multiprocessors, as counted, over the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cupy_kernels import attention, attention_backward, compiler, default_plan
from cupy_kernels.arrays import require_cupy
from cupy_kernels.launch import checked_problem, present_hardware
from cupy_kernels.table import ALGORITHMS, default_programs
from cupy_kernels.verify import environment
from simattn import AttentionProblem, count
from simattn.arithmetic.formats import ITEM_BYTES, numpy_dtype
from simattn.problem import Direction
from simattn.tables import text_table

SOURCE = r"""
extern "C" __global__ void __launch_bounds__(256) multiply_add(float* out, int rounds) {
  float sums[16];
  const float x = threadIdx.x * 1e-3f, y = 1.0001f;
#pragma unroll
  for (int i = 0; i < 16; i++) sums[i] = x + i;
  for (int round = 0; round < rounds; round++) {
#pragma unroll
    for (int repeat = 0; repeat < 8; repeat++)
#pragma unroll
      for (int i = 0; i < 16; i++) sums[i] = __fmaf_rn(sums[i], y, x);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) total += sums[i];
  if (total == 12345.678f) out[0] = total;
}

extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}
"""

SPIN_CYCLES = 2_000_000
"""Clock cycles that the device is kept busy before a contender is timed, in which the host queues its launches."""


THROUGH_MEMORY = ("standard", "flash1")
LONGEST_THROUGH_MEMORY = 4096
"""Longest sequences that the algorithms are timed on whose scores or outputs go through memory."""

TENSOR_CORE_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION")
"""Backends of PyTorch that multiply on tensor cores."""

Contenders = dict[str, Callable[[int], object]]
"""What to time, by name; each is called with the number of the inputs to take."""


@dataclass(frozen=True)
class Shape:
    """One problem to time, self-attention of ``heads`` heads."""

    direction: Direction
    dtype: str
    head_dim: int
    length: int
    causal: bool
    heads: int = 16
    tokens: int = 8192

    @property
    def batch(self) -> int:
        """Sequences of a batch: as many as make up the tokens."""
        return max(1, self.tokens // self.length)

    @property
    def flops(self) -> int:
        """FLOPs by the papers' convention."""
        products = 4 if self.direction == "forward" else 10
        square = products * self.batch * self.heads * self.length**2 * self.head_dim
        return square // 2 if self.causal else square


HEAD_DIMS = (64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

SHAPES = (
    *(
        Shape(direction, dtype, head_dim, length, causal)
        for direction in ("forward", "backward")
        for dtype in ("float32", "float16")
        for head_dim in HEAD_DIMS
        for length in (2048, 4096, 8192)
        for causal in (False, True)
    ),
    # What tensor cores are compared on: 16 384 tokens, heads that make up 2048 columns.
    *(
        Shape("forward", "bfloat16", head_dim, length, causal, heads=2048 // head_dim, tokens=16384)
        for head_dim in HEAD_DIMS
        for length in LENGTHS
        for causal in (False, True)
    ),
)
"""What is timed; bfloat16 by the tensor cores alone, beside the backends that use them."""


def device_seconds(contenders: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Time every contender in turn; each is called with the number of the inputs to take.

    The device is busy while the host queues the launches, so that their times are the device's alone.
    """
    cupy = require_cupy()
    spin = cupy.RawKernel(SOURCE, "spin")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, call in contenders.items():
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            cupy.cuda.Device().synchronize()
            spin((1,), (1,), (cupy.int64(SPIN_CYCLES),))
            begin.record()
            call(turn)
            end.record()
            end.synchronize()
            if turn >= 2:  # the first two warm up
                times[name].append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return times


def peak_flops_per_second() -> float:
    """Return the rate of a loop of fp32 fused multiply-adds that fills the device."""
    cupy = require_cupy()
    kernel, out, rounds = cupy.RawKernel(SOURCE, "multiply_add"), cupy.zeros(1, "f4"), 4000
    blocks = 8 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    arguments = (out, cupy.int32(rounds))
    times = device_seconds({"peak": lambda _turn: kernel((blocks,), (256,), arguments)}, 9)["peak"]
    return float(blocks * 256 * rounds * 8 * 16 * 2 / statistics.median(times))


# The host


def host_costs(dtype: str) -> dict[str, Any]:
    """Time what a call costs the host, and what the first call costs.

    Parameters
    ----------
    dtype
        Storage format of the arrays.

    Returns
    -------
    dict
        ``launch_microseconds`` of CuPy's launch of an empty kernel, ``attention_microseconds``,
        ``attention_out_microseconds`` and ``attention_backward_microseconds`` of calls with CuPy arrays, and
        ``dlpack_microseconds`` of one with PyTorch's tensors; ``first_load_seconds`` by kernel, the slowest build of
        the default plans for a causal mask and 128 columns, in 16 bits those on tensor cores, compilation included
        unless the cache has it, and ``cached_milliseconds`` to load the slowest of them again.
    """
    cupy = require_cupy()
    empty = cupy.RawKernel('extern "C" __global__ void empty(int) {}', "empty")
    small = [stored(cupy.zeros((1, 64, 2, 64), "f4"), dtype) for _ in range(4)]
    out, saved = attention(*small[:3], return_saved=True)
    gradients = tuple(cupy.empty_like(array) for array in small[:3])
    calls: Contenders = {
        "launch": lambda _turn: empty((1,), (32,), (0,)),
        "attention": lambda _turn: attention(*small[:3]),
        "attention_out": lambda _turn: attention(*small[:3], out=out),
        "attention_backward": lambda _turn: attention_backward(small[3], *small[:3], saved=saved, gradients=gradients),
    }
    with contextlib.suppress(ImportError):
        tensors = [tensor_of(array) for array in small[:3]]
        calls["dlpack"] = lambda _turn: attention(*tensors)
    costs: dict[str, Any] = {f"{name}_microseconds": 1e6 * seconds for name, seconds in host_seconds(calls).items()}
    problem = AttentionProblem(heads=2, kv_heads=1, q_len=256, head_dim=128, dtype=dtype, causal=True)
    kernels = {step.kernel for program in default_programs(problem) for step in program.steps}
    if dtype != "float32":
        kernels = {kernel for kernel in kernels if kernel.units != "CUDA cores"}
    chosen = [kernel.variant(count_traffic=False) for kernel in kernels]
    slowest: dict[str, float] = {}
    loads = []
    for variant in chosen:
        start = time.perf_counter()
        compiler.load(variant)
        seconds = round(time.perf_counter() - start, 2)
        slowest[variant.function] = max(slowest.get(variant.function, 0.0), seconds)
    for variant in chosen:
        start = time.perf_counter()
        compiler.load(variant)
        loads.append(time.perf_counter() - start)
    return {**costs, "first_load_seconds": slowest, "cached_milliseconds": 1e3 * max(loads)}


def host_seconds(calls: Contenders, repeats: int = 300) -> dict[str, float]:
    """Return the time after which each call returns, the shortest mean of several series.

    The series of the calls take turns, so that what else the host does for a while falls on all of them.
    """
    cupy = require_cupy()
    means: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(9):
        for name, call in calls.items():
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for turn in range(repeats):
                call(turn)
            means[name].append((time.perf_counter() - start) / repeats)
    return {name: min(series) for name, series in means.items()}


# Contenders


def our_contenders(shape: Shape, inputs: list[tuple[Any, ...]]) -> tuple[Contenders, dict[str, int]]:
    """Return the kernels, and the bytes that each moves."""
    cupy = require_cupy()
    contenders: Contenders = {}
    counted = {}
    arrays = dict(zip("qkv", inputs[0], strict=False))
    problem = checked_problem(arrays, causal=shape.causal, scale=None, window=None)
    described = {"batch": shape.batch, "heads": shape.heads, "q_len": shape.length, "head_dim": shape.head_dim}
    results = tuple(cupy.ndarray(array.shape, array.dtype) for array in inputs[0][:3])

    def contender(algorithm: str, plan: Any) -> Callable[[int], object]:
        if shape.direction == "forward":
            return lambda turn: attention(
                *inputs[turn % len(inputs)][:3], causal=shape.causal, algorithm=algorithm, plan=plan, out=results[0]
            )
        saved = [attention(*one[:3], causal=shape.causal, algorithm=algorithm, return_saved=True)[1] for one in inputs]
        return lambda turn: attention_backward(
            inputs[turn % len(inputs)][3],
            *inputs[turn % len(inputs)][:3],
            causal=shape.causal,
            algorithm=algorithm,
            saved=saved[turn % len(inputs)],
            gradients=results,
            plan=plan,
        )

    hardware = present_hardware(cupy.cuda.runtime.getDevice())
    for algorithm, chosen in ALGORITHMS.items():
        if algorithm in THROUGH_MEMORY and (shape.length > LONGEST_THROUGH_MEMORY or shape.dtype == "bfloat16"):
            continue
        if shape.direction not in chosen.programs or chosen.refusal(problem, hardware) is not None:
            continue
        for deterministic in (False, True) if shape.direction == "backward" else (False,):
            options: dict[str, Any] = {"algorithm": algorithm, "direction": shape.direction}
            plan = default_plan(problem, **options, deterministic=deterministic)
            if deterministic and plan == default_plan(problem, **options):
                continue
            name = f"{algorithm} deterministic" if deterministic else algorithm
            contenders[name] = contender(algorithm, plan)
            traffic = count(
                algorithm, **described, dtype=shape.dtype, causal=shape.causal, plan=plan, direction=shape.direction
            )
            counted[name] = traffic.hbm_bytes
    return contenders, counted


def tensor_of(array: Any) -> Any:
    """Return a CuPy array as a tensor of PyTorch."""
    import torch

    if array.dtype.name == "bfloat16":  # which DLPack does not carry from CuPy
        return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(array)


def torch_contenders(shape: Shape, inputs: list[tuple[Any, ...]], peers: Sequence[str]) -> Contenders:
    """Return the attention of PyTorch, by backend, and of libraries that take its tensors, where they take the inputs.

    Empty without PyTorch.
    """
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {}
    torch.backends.cuda.matmul.allow_tf32 = False
    stream = torch.cuda.ExternalStream(require_cupy().cuda.get_current_stream().ptr)

    def with_backend(backend: Any) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any, causal: bool) -> Any:
            with sdpa_kernel(backend):
                heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
                return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)

        return attend

    def contender(attend: Callable[..., Any]) -> Callable[[int], object]:
        tensors = [tuple(tensor_of(array) for array in arrays) for arrays in inputs]

        def forward(turn: int) -> object:
            with torch.cuda.stream(stream):
                return attend(*tensors[turn % len(tensors)][:3], causal=shape.causal)

        if shape.direction == "forward":
            return forward
        graphs = []
        with torch.cuda.stream(stream):
            for q, k, v, _ in tensors:
                leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
                graphs.append((attend(*leaves, causal=shape.causal), leaves))

        def backward(turn: int) -> object:
            out, leaves = graphs[turn % len(graphs)]
            with torch.cuda.stream(stream):
                return torch.autograd.grad(out, leaves, tensors[turn % len(tensors)][3], retain_graph=True)

        return backward

    named = {
        f"torch {name.lower()}": with_backend(getattr(SDPBackend, name))
        for name in ("MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION")
        if shape.dtype != "bfloat16" or name in TENSOR_CORE_BACKENDS
    }
    for peer in peers:
        name, _, place = peer.partition("=")
        module, _, function = place.partition(":")
        named[name] = getattr(import_module(module), function)
    for name, load in LIBRARIES.items():
        with contextlib.suppress(ImportError):
            named[name] = load()
    found: Contenders = {}
    for name, attend in named.items():
        try:
            call = contender(_first_result(attend))
            call(0)
        except Exception as error:  # each library has its own way to say that it does not take a problem
            sys.stderr.write(f"{name} does not take {shape}: {str(error).splitlines()[:1]}\n")
            continue
        found[name] = call
    return found


def _flash_attention_3() -> Callable[..., Any]:
    attend: Callable[..., Any] = import_module("flash_attn_interface").flash_attn_func
    return attend


def _flash_attention_2() -> Callable[..., Any]:
    attend: Callable[..., Any] = import_module("flash_attn").flash_attn_func
    return attend


def _flash_linear_attention() -> Callable[..., Any]:
    parallel_attention = import_module("fla.ops.attn").parallel_attn

    def attend(q: Any, k: Any, v: Any, causal: bool) -> Any:
        if not causal:
            raise ValueError("it is always causal")
        if q.element_size() == 4:
            raise ValueError("its products would be TF32's")
        return parallel_attention(q, k, v)

    return attend


LIBRARIES: dict[str, Callable[[], Callable[..., Any]]] = {
    "FlashAttention-3": _flash_attention_3,
    "FlashAttention-2": _flash_attention_2,
    "fla": _flash_linear_attention,
}
"""Libraries that take PyTorch's tensors as (batch, length, heads, columns), timed where they are installed."""


def _first_result(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that returns the output alone."""

    def call(*arrays: Any, causal: bool) -> Any:
        result = attend(*arrays, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return call


# Measurements


def stored(numbers: Any, dtype: str) -> Any:
    """Return float32 numbers in a storage format, rounded to nearest even."""
    if dtype != "bfloat16":
        return numbers.astype(dtype)
    bits = numbers.view("uint32")  # CuPy has no conversion to bfloat16
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16").view(numpy_dtype(dtype))


def measure(shape: Shape, peak: float, rounds: int, peers: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Time one shape by every contender."""
    cupy = require_cupy()
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    arrays = 3 if shape.direction == "forward" else 4
    input_bytes = arrays * shape.batch * shape.length * shape.heads * shape.head_dim * ITEM_BYTES[shape.dtype]
    copies = 1 + 2 * cupy.cuda.Device().attributes["L2CacheSize"] // input_bytes
    inputs = [
        tuple(stored(cupy.random.standard_normal(size, dtype="f4"), shape.dtype) for _ in range(arrays))
        for _ in range(copies)
    ]
    contenders, counted = our_contenders(shape, inputs)
    contenders |= torch_contenders(shape, inputs, peers)
    times = device_seconds(contenders, rounds)
    flash2 = statistics.median(times["flash2"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        yield {
            **asdict(shape),
            "contender": name,
            "milliseconds": 1e3 * median,
            "teraflops_per_second": shape.flops / median / 1e12,
            "fraction_of_fp32_peak": shape.flops / median / peak,
            "time_over_flash2": median / flash2,
            "counted_hbm_bytes": counted.get(name),
            "gigabytes_per_second": counted[name] / median / 1e9 if name in counted else None,
        }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every shape that was asked for."""
    cupy = require_cupy()
    rows: list[dict[str, Any]] = []
    found = environment()
    found["versions"] |= peer_versions()
    # First, as it times what is not compiled yet.
    host = {"host": host_costs(arguments.dtype or "float32")} if arguments.host else {}
    with cupy.cuda.Stream(non_blocking=True):  # a stream of its own, which other libraries can be given
        peak = peak_flops_per_second()
        report = {**found, "rounds": arguments.rounds, "fp32_peak_flops_per_second": peak, "rows": rows, **host}
        for shape in SHAPES:
            if (
                arguments.dtype in (None, shape.dtype)
                and arguments.direction in (None, shape.direction)
                and shape.head_dim in arguments.head_dims
                and shape.length in arguments.lengths
            ):
                rows += measure(shape, peak, arguments.rounds, arguments.peer)
                write(arguments.output, report)  # a run that is stopped leaves what it measured
                cupy.get_default_memory_pool().free_all_blocks()
                if sys.stderr.isatty():
                    sys.stderr.write(f"\r{shape}")
    return report


def peer_versions() -> dict[str, str]:
    """Return the versions of the libraries to measure against that are installed."""
    versions = {}
    for name in ("torch", "triton", "flash-attn-3", "flash-attn", "fla-core"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def write(output: str | None, report: dict[str, Any]) -> None:
    """Write the measurements to a file, if there is one."""
    if output:
        with open(output, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def table(report: dict[str, Any]) -> str:
    """Return the measurements as text."""
    columns = ("direction", "dtype", "head_dim", "length", "causal", "contender")
    numbers = ("milliseconds", "teraflops_per_second", "fraction_of_fp32_peak", "time_over_flash2",
               "gigabytes_per_second")  # fmt: skip
    cells = [
        [
            *(str(row[name]) for name in columns),
            *("" if row[name] is None else f"{row[name]:.3f}" for name in numbers),
        ]
        for row in report["rows"]
    ]
    host = "".join(f"{name}: {value}\n" for name, value in report.get("host", {}).items())
    return (
        text_table([*columns, *numbers], cells)
        + f"\nfp32 peak measured on {report['device']}: {report['fp32_peak_flops_per_second'] / 1e12:.1f} TFLOP/s\n"
        + host
    )


def plot(report: dict[str, Any], dtype: str = "float32") -> Any:
    """Return a figure of TFLOP/s against length: a panel for each head dimension, direction and mask.

    Parameters
    ----------
    report
        What :func:`run` returned.
    dtype
        Storage format whose rows to draw.
    """
    from matplotlib.figure import Figure

    from simattn.plots import INK, MUTED, PALETTE

    rows = [row for row in report["rows"] if row["dtype"] == dtype]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    kinds = list(dict.fromkeys((row["direction"], row["causal"]) for row in rows))
    dims = list(dict.fromkeys(row["head_dim"] for row in rows))
    figure = Figure(figsize=(3.2 * len(dims) + 1.8, 2.6 * len(kinds) + 0.6), layout="constrained")
    panels = figure.subplots(len(kinds), len(dims), squeeze=False, sharex=True, sharey="row")
    peak = report["fp32_peak_flops_per_second"] / 1e12
    for (direction, causal), line in zip(kinds, panels, strict=True):
        for head_dim, axes in zip(dims, line, strict=True):
            found = [
                row
                for row in rows
                if (row["direction"], row["causal"], row["head_dim"]) == (direction, causal, head_dim)
            ]
            for index, name in enumerate(names):
                points = sorted(
                    (row["length"], row["teraflops_per_second"]) for row in found if row["contender"] == name
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=colours[name],
                        linestyle="-" if name.partition(" ")[0] in ALGORITHMS else (0, (4, 2)),
                        marker="osD^vPX"[index % 7],
                        markersize=4,
                        linewidth=1.4,
                        label=name,
                    )
            if dtype != "bfloat16":  # which only tensor cores are timed on
                axes.axhline(peak, color=MUTED, linewidth=0.8, linestyle=":")
            lengths = sorted({row["length"] for row in rows})
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axes.set_title(f"{direction}{', causal' if causal else ''}, d = {head_dim}", fontsize=9, color=INK)
            axes.tick_params(labelsize=8, colors=INK)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylim(bottom=0)  # once all of the line is drawn, as it ends the fitting of the shared axis
        line[0].set_ylabel("TFLOP/s", fontsize=9, color=INK)
    for axes in panels[-1]:
        axes.set_xlabel("tokens", fontsize=9, color=INK)
    labelled: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    style: dict[str, Any] = {"loc": "outside right upper", "fontsize": 8, "frameon": False, "title_fontsize": 8}
    figure.legend(labelled.values(), labelled.keys(), title=report["device"], **style)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or read measurements; print a table, write files."""
    parser = argparse.ArgumentParser(prog="python -m cupy_kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--plot", help="picture to write, SVG or PNG")
    parser.add_argument("--read", help="JSON file of an earlier run, instead of measuring")
    parser.add_argument("--host", action="store_true", help="also time what calls and compilation cost the host")
    parser.add_argument("--rounds", type=int, default=11, help="times that each contender is timed (default 11)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="only this storage format")
    parser.add_argument("--direction", choices=("forward", "backward"), help="only this direction")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS, help="only these")
    parser.add_argument("--lengths", nargs="+", type=int, choices=LENGTHS, default=LENGTHS, help="only these")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="also time function(q, k, v, causal=...) of PyTorch tensors (batch, length, heads, columns)",
    )
    arguments = parser.parse_args(argv)
    if arguments.read:
        with open(arguments.read, encoding="utf-8") as file:
            report = json.load(file)
    else:
        report = run(arguments)
    sys.stdout.write(table(report))
    write(arguments.output, report)
    if arguments.plot:
        plot(report, arguments.dtype or "float32").savefig(arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
