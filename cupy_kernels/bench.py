"""Time the kernels, beside other libraries where they are installed: ``python -m cupy_kernels.bench --output FILE``.

Protocol: device times between events; inputs drawn from N(0, 1) and rotated among copies that together exceed the L2
cache; every contender is warmed up and then timed in turn, one launch after the other, ``--rounds`` times; medians.
FLOPs are counted 4 · batch · heads · q_len · kv_len · head_dim, halved for a causal mask. The peak is a measured loop
of fused multiply-adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cupy_kernels import attention, default_plan
from cupy_kernels.arrays import require_cupy
from cupy_kernels.flash2 import checked_problem
from cupy_kernels.verify import environment
from simattn import count
from simattn.arithmetic.formats import ITEM_BYTES
from simattn.tables import text_table

PEAK_SOURCE = r"""
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
"""


@dataclass(frozen=True)
class Shape:
    """One problem to time, self-attention of ``heads`` heads."""

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
        square = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        return square // 2 if self.causal else square


SHAPES = tuple(
    Shape(dtype, head_dim, length, causal)
    for dtype in ("float32", "float16")
    for head_dim in (64, 128, 256)
    for length in (2048, 4096, 8192)
    for causal in (False, True)
)


def device_seconds(contenders: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Time every contender in turn; each is called with the number of the inputs to take."""
    cupy = require_cupy()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, call in contenders.items():
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            cupy.cuda.Device().synchronize()
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
    kernel, out, rounds = cupy.RawKernel(PEAK_SOURCE, "multiply_add"), cupy.zeros(1, "f4"), 4000
    blocks = 8 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    arguments = (out, cupy.int32(rounds))
    times = device_seconds({"peak": lambda _turn: kernel((blocks,), (256,), arguments)}, 9)["peak"]
    return float(blocks * 256 * rounds * 8 * 16 * 2 / statistics.median(times))


def torch_contenders(inputs: list[tuple[Any, Any, Any]], causal: bool) -> dict[str, Callable[[int], object]]:
    """Return PyTorch's attention by backend, for those that take the inputs; empty without PyTorch."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {}
    torch.backends.cuda.matmul.allow_tf32 = False
    stream = torch.cuda.ExternalStream(require_cupy().cuda.get_current_stream().ptr)
    heads_first = [tuple(torch.from_dlpack(array).transpose(1, 2) for array in arrays) for arrays in inputs]

    def contender(backend: Any) -> Callable[[int], object]:
        def call(turn: int) -> object:
            q, k, v = heads_first[turn % len(heads_first)]
            with torch.cuda.stream(stream), sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    found = {}
    backends = ("MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION")
    for backend in backends:
        call = contender(getattr(SDPBackend, backend))
        try:
            call(0)
        except RuntimeError:  # the backend does not take this dtype or shape
            continue
        found[f"torch {backend.lower()}"] = call
    return found


def measure(shape: Shape, peak: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Time one shape by every contender."""
    cupy = require_cupy()
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    input_bytes = 3 * shape.batch * shape.length * shape.heads * shape.head_dim * ITEM_BYTES[shape.dtype]
    copies = 1 + 2 * cupy.cuda.Device().attributes["L2CacheSize"] // input_bytes
    inputs = [
        tuple(cupy.random.standard_normal(size, dtype="f4").astype(shape.dtype) for _ in range(3))
        for _ in range(copies)
    ]
    out = cupy.empty(size, shape.dtype)
    contenders: dict[str, Callable[[int], object]] = {
        "flash2": lambda turn: attention(*inputs[turn % copies], causal=shape.causal, out=out)
    }
    contenders |= torch_contenders(inputs, shape.causal)
    problem = checked_problem(dict(zip("qkv", inputs[0], strict=True)), causal=shape.causal, scale=None, window=None)
    plan = default_plan(problem)
    arguments = {"batch": shape.batch, "heads": shape.heads, "q_len": shape.length, "head_dim": shape.head_dim}
    traffic = count("flash2", **arguments, dtype=shape.dtype, causal=shape.causal, plan=plan)
    times = device_seconds(contenders, rounds)
    ours = statistics.median(times["flash2"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        yield {
            **asdict(shape),
            "contender": name,
            "milliseconds": 1e3 * median,
            "teraflops_per_second": shape.flops / median / 1e12,
            "fraction_of_fp32_peak": shape.flops / median / peak,
            "time_over_flash2": median / ours,
            "counted_hbm_bytes": traffic.hbm_bytes if name == "flash2" else None,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write a file."""
    parser = argparse.ArgumentParser(prog="python -m cupy_kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dtype", choices=("float32", "float16"), help="only this storage format")
    arguments = parser.parse_args(argv)
    cupy = require_cupy()
    rows: list[dict[str, Any]] = []
    with cupy.cuda.Stream(non_blocking=True):  # a stream of its own, which other libraries can be given
        peak = peak_flops_per_second()
        for shape in SHAPES:
            if arguments.dtype in (None, shape.dtype):
                rows += measure(shape, peak, arguments.rounds)
    columns = ("dtype", "head_dim", "length", "causal", "contender")
    numbers = ("milliseconds", "teraflops_per_second", "fraction_of_fp32_peak", "time_over_flash2")
    table = [[*(str(row[name]) for name in columns), *(f"{row[name]:.3f}" for name in numbers)] for row in rows]
    sys.stdout.write(text_table([*columns, *numbers], table) + f"\nfp32 peak measured: {peak / 1e12:.1f} TFLOP/s\n")
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({**environment(), "fp32_peak_flops_per_second": peak, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
