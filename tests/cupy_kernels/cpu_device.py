"""Runs the launches that the stand-in for CuPy records, by the CPU build of the kernels."""

from __future__ import annotations

import ctypes

from cupy_kernels import cpu_build, launch


class CpuDevice:
    """Knows which step of which program a launch is."""

    def __init__(self, monkeypatch):
        self.current = None
        make, load = launch._Launched.__init__, launch._Launched.load

        def make_and_remember(step, of, program, strides):
            make(step, of, program, strides)
            step.arrays = tuple(program.array[name] for name in of.arrays)

        def load_and_remember(step, device, *, count_traffic):
            load(step, device, count_traffic=count_traffic)
            function = step.function

            def run(*arguments):
                self.current = step
                function(*arguments)

            step.function = run

        monkeypatch.setattr(launch._Launched, "__init__", make_and_remember)
        monkeypatch.setattr(launch._Launched, "load", load_and_remember)

    def run(self, launched):
        """Run a launch with nothing but what the host handed it.

        Every array is the stretch of memory from its first byte to its last; accesses outside them are faults.
        """
        kernel, arrays = self.current.step.kernel, self.current.arrays
        parameters = launched.parameters.view(kernel.struct)[0]
        if not parameters["counters"]:  # the CPU build always counts
            unread = (ctypes.c_uint64 * len(self.current.counters))()
            parameters["counters"] = ctypes.addressof(unread)
        records = [
            _record(name, access, array, parameters)
            for (name, access), array in zip(kernel.accesses, arrays, strict=True)
        ]
        message = ctypes.create_string_buffer(512)
        succeeded = cpu_build.loaded(cpu_build.build_variant(kernel.variant(count_traffic=True)))(
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


def _record(name, access, array, parameters):
    """Return how the CPU build knows an array, and the flags of what was written to it."""
    item_bytes = array.numpy_dtype.itemsize
    sizes = (array.batch, array.rows, array.heads)
    strides = [int(stride) * item_bytes for stride in parameters[f"{name}_strides"]]
    steps = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
    base = int(parameters[name]) + sum(step for step in steps if step < 0)
    span = sum(abs(step) for step in steps) + array.columns * item_bytes if 0 not in sizes else 0
    flags = (ctypes.c_ubyte * max(1, span))() if "w" in access else None
    whole = (ctypes.c_longlong * 3)(max(1, span), max(1, span), max(1, span))
    record = cpu_build.ArrayRecord(
        name.encode(),
        base,
        (ctypes.c_longlong * 3)(1, 1, 1),
        whole,
        span,
        None if flags is None else ctypes.addressof(flags),
        sum(cpu_build.ACCESS_BITS[letter] for letter in access),
    )
    return record, flags
