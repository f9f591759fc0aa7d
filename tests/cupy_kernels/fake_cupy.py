"""A stand-in for CuPy whose device memory is host memory, for testing the host's side of the kernels without a GPU.

Its arrays are NumPy arrays that say on which device they are. Kernels are replaced by a function that records its
launches.
"""

from __future__ import annotations

import ctypes
import types
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np


class Array(np.ndarray):
    """An array of the stand-in; ``device_id`` passes on to views."""

    device_id = 0

    def __array_finalize__(self, parent):
        self.device_id = getattr(parent, "device_id", Device.current)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.__array_interface__["data"][0], device_id=self.device_id)

    def get(self):
        return np.array(self, subok=False)

    def __bool__(self):
        return bool(np.asarray(self))


class Device:
    """A device; entering it makes it the current one."""

    current = 0
    shared_bytes = 232448
    compute_capability = "90"

    def __init__(self, number=None):
        self.id = Device.current if number is None else number

    @property
    def attributes(self):
        shared = Device.shared_bytes
        return {
            "MaxSharedMemoryPerBlockOptin": shared,
            "MaxSharedMemoryPerMultiprocessor": shared + 1024,
            "MultiProcessorCount": 132,
        }

    def __enter__(self):
        self.before = Device.current
        Device.current = self.id
        return self

    def __exit__(self, *error):
        Device.current = self.before

    def synchronize(self):
        pass


class Memory:
    """Memory outside the pool."""

    def __init__(self, size):
        # Quiet NaN in every format: what a program leaves unwritten shows, and converting it raises no flag.
        self.held, self.size = np.full(size, 0xFF, np.uint8), size

    @property
    def ptr(self):
        return self.held.ctypes.data


def alloc(size):
    """Return memory of the pool, which starts where a workspace must."""
    memory = Memory(size + 256)
    start = -memory.ptr % 256
    return types.SimpleNamespace(ptr=memory.ptr + start, mem=memory)


@dataclass
class Launched:
    """One launch."""

    variant: object
    device: int
    grid: tuple
    block: tuple
    parameters: np.ndarray
    shared_bytes: int


@dataclass
class Kernels:
    """Takes the place of :func:`cupy_kernels.compiler.load`; ``run`` is called with every launch."""

    launches: list = field(default_factory=list)
    loaded: list = field(default_factory=list)
    run: object = None

    def load(self, variant, *, dynamic_shared_bytes=0):
        device = Device.current
        self.loaded.append((variant, device, dynamic_shared_bytes))

        def function(grid, block, arguments, shared_bytes):
            (parameters,) = arguments
            assert Device.current == device
            assert parameters.size == 1
            launched = Launched(variant, device, grid, block, parameters.copy(), shared_bytes)
            self.launches.append(launched)
            if self.run is not None:
                self.run(launched)

        return function


def make_module():
    """Return the stand-in for the module."""
    module = types.ModuleType("cupy")
    module.__version__ = "stand-in"
    module.ndarray, module.uint8, module.uint64 = Array, np.uint8, np.uint64

    def made(function):
        def make(*arguments, **options):
            return function(*arguments, **options).view(Array)

        return make

    for name in ("zeros", "full", "ascontiguousarray"):
        setattr(module, name, made(getattr(np, name)))

    def asarray(array):
        result = np.array(getattr(array, "host", array), subok=False, copy=not hasattr(array, "host")).view(Array)
        result.device_id = Device.current
        return result

    def from_dlpack(array):
        array.__dlpack__(stream=7)
        result = array.host.view(Array)
        result.device_id = array.__dlpack_device__()[1]
        return result

    module.asarray, module.from_dlpack = asarray, from_dlpack
    runtime = types.SimpleNamespace(
        getDevice=lambda: Device.current,
        getDeviceCount=lambda: 2,
        pointerGetAttributes=lambda pointer: types.SimpleNamespace(device=1),
        getDeviceProperties=lambda number: {"name": b"stand-in", "multiProcessorCount": 1},
        driverGetVersion=lambda: 0,
        memcpy=lambda to, source, size, kind: ctypes.memmove(to, source, size),
        memcpyHostToDevice=1,
    )
    stream = types.SimpleNamespace(synchronize=lambda: None)
    module.cuda = types.SimpleNamespace(
        runtime=runtime, Device=Device, Memory=Memory, alloc=alloc, get_current_stream=lambda: stream
    )
    return module


@contextmanager
def installed(monkeypatch):
    """Make the stand-in what ``import cupy`` finds; yields the :class:`Kernels` that record."""
    import sys

    from cupy_kernels import arrays, compiler, launch, tensor_map, verify

    kernels = Kernels()
    caches = (arrays.require_cupy, launch.prepare, launch._loaded, launch.present_hardware)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", make_module())
        patch.setattr(compiler, "load", kernels.load)
        patch.setattr(tensor_map.TensorMap, "encode", tensor_map.TensorMap.cpu_record)
        patch.setattr(compiler, "compiler_version", lambda: "stand-in")
        patch.setattr(compiler, "choose_architecture", lambda capability: "sm_90a")
        patch.setattr(verify, "precompile", lambda pool, variants, architecture: None)
        patch.setattr(Device, "current", 0)
        patch.setattr(launch, "_spare", {})
        for cached in caches:
            cached.cache_clear()
        yield kernels
    for cached in caches:
        cached.cache_clear()
