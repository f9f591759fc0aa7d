"""Runs the launches that the stand-in for CuPy records, by the CPU build of the kernels."""

from __future__ import annotations

import ctypes

from cupy_kernels import cpu_build
from cupy_kernels.parameters import FLASH2_PARAMETERS, Flash2Forward
from simattn.arithmetic.formats import ITEM_BYTES

OUTPUTS = ("out", "lse")


def run_launch(launched):
    """Run a launch of the forward kernel with nothing but what the host handed it.

    Every array is the stretch of memory from its first byte to its last; accesses outside them are faults.
    """
    macros = dict(launched.variant.macros)
    parameters = launched.parameters.view(FLASH2_PARAMETERS)[0]
    kernel = Flash2Forward(
        storage=macros["STORAGE"],
        **{
            name: int(macros[name.upper()])
            for name in ("columns", "query_rows", "key_rows", "lanes", "rows_per_thread", "staged_keys", "blocks")
        },
    )
    if not parameters["counters"]:  # the CPU build always counts
        unread = (ctypes.c_uint64 * 5)()
        parameters["counters"] = ctypes.addressof(unread)
    records = [_record(name, parameters, ITEM_BYTES[kernel.storage]) for name in ("q", "k", "v", *OUTPUTS)]
    message = ctypes.create_string_buffer(512)
    succeeded = cpu_build.loaded(cpu_build.build_flash2_forward(kernel))(
        launched.parameters.ctypes.data,
        launched.grid[0],
        launched.block[0],
        launched.shared_bytes,
        (cpu_build.ArrayRecord * len(records))(*(record for record, _ in records)),
        len(records),
        0,
        0,
        0,
        message,
        len(message),
    )
    if not succeeded:
        raise cpu_build.KernelFaultError(message.value.decode())


def _record(name, parameters, item_bytes):
    """Return how the CPU build knows an array, and the flags of what was written to it."""
    columns, rows = int(parameters["head_dim" if name in ("q", "k") else "value_dim"]), int(parameters["q_len"])
    heads = int(parameters["heads"])
    if name in ("k", "v"):
        rows, heads = int(parameters["kv_len"]), heads // int(parameters["group_size"])
    sizes = (int(parameters["batch"]), rows, heads)
    if name == "lse":
        sizes, strides, row_bytes = (1, 1, 1), (0, 0, 0), 4 * int(parameters["batch"]) * rows * heads
    else:
        strides = [int(stride) * item_bytes for stride in parameters[f"{name}_strides"]]
        row_bytes = columns * item_bytes
    steps = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
    base = int(parameters[name]) + sum(step for step in steps if step < 0)
    span = sum(abs(step) for step in steps) + row_bytes if 0 not in sizes else 0
    flags = (ctypes.c_ubyte * max(1, span))() if name in OUTPUTS else None
    whole = (ctypes.c_longlong * 3)(max(1, span), max(1, span), max(1, span))
    record = cpu_build.ArrayRecord(
        name.encode(),
        base,
        (ctypes.c_longlong * 3)(1, 1, 1),
        whole,
        span,
        None if flags is None else ctypes.addressof(flags),
    )
    return record, flags
